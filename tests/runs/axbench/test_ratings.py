"""Steering scores: harmonic mean per text, factor from one half, report from the other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_steering_plugin.runs.axbench.ratings import (
    as_array,
    harmonic_mean,
    hm_of_means,
    perplexity,
    selection_half,
    steering_score,
    uncovered,
    winrate,
)


def rows(table):
    """Factors, instructions and equal ratings of `{factor: [score per instruction]}`."""
    cells = [(f, i, s) for f, scores in table.items() for i, s in enumerate(scores)]
    return (
        [c[0] for c in cells],
        [c[1] for c in cells],
        np.array([[c[2]] * 3 for c in cells], float),
    )


def test_the_harmonic_mean_is_per_text_and_zero_as_soon_as_one_rating_is():
    found = harmonic_mean(np.array([[2, 2, 2], [1, 2, 2], [0, 2, 2], [1, 1, 1], [0, 0, 0]], float))
    assert found.tolist() == pytest.approx([2.0, 1.5, 0.0, 1.0, 0.0])
    assert found[[0, 3]].mean() == 1.5
    assert found[[2, 0]].mean() == 1.0  # the harmonic mean of the means would be 1.5
    with pytest.raises(ValueError, match="between 0 and 2"):
        harmonic_mean(np.array([[3.0, 1, 1]]))


@given(st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_the_harmonic_mean_lies_between_its_ratings_and_forgets_their_order(ratings):
    found = float(harmonic_mean(np.array(ratings, float)))
    assert found == float(harmonic_mean(np.array(ratings[::-1], float)))
    assert min(ratings) <= found + 1e-12 and found <= max(ratings) + 1e-12


def test_the_harmonic_mean_of_means_is_another_aggregation_and_never_below():
    ratings = np.array([[0.0, 2, 2]] * 6 + [[2, 2, 2]] * 2 + [[0, 2, 2]] * 2)
    found = steering_score(0, "m", [1.0] * 10, list(range(10)), ratings, instructions=10)
    assert found.score == pytest.approx(2 * 2 / 5)  # the reported half: two of five texts score
    assert hm_of_means([found]) == pytest.approx(3 / (1 / 0.8 + 1 / 2 + 1 / 2))
    assert hm_of_means([found]) > found.score
    assert hm_of_means([found, uncovered(1, "m")]) == pytest.approx(hm_of_means([found]) / 2)
    assert math.isnan(hm_of_means([]))


def test_instructions_zero_to_four_choose_and_five_to_nine_report():
    assert selection_half(range(10), 10).tolist() == [True] * 5 + [False] * 5
    assert selection_half(range(5), 5).tolist() == [True, True, True, False, False]


def test_the_best_factor_of_one_half_is_reported_by_the_other_half_however_bad():
    table = {0.5: [1] * 5 + [2] * 5, 1.0: [2] * 5 + [0] * 5, 2.0: [0] * 5 + [1] * 5}
    found = steering_score(0, "m", *rows(table), instructions=10)
    assert (found.factor, found.selection_score, found.score) == (1.0, 2.0, 0.0)
    assert found.n == 5 and found.aspects == {"concept": 0.0, "instruct": 0.0, "fluency": 0.0}


def test_the_first_of_equal_factors_is_chosen():
    table = {0.2: [0] * 10, 0.4: [1] * 5 + [2] * 5, 0.6: [1] * 10}
    assert steering_score(0, "m", *rows(table), instructions=10).factor == 0.4


def test_without_factors_all_rows_of_the_reported_half_are_samples():
    table = {0.2: [2] * 5 + [1] * 5, 0.4: [0] * 5 + [2] * 5}
    found = steering_score(0, "prompt", *rows(table), instructions=10, has_factor=False)
    assert (found.factor, found.score, found.n) == (None, 1.5, 10)


def test_a_missing_rating_is_left_out_and_counted_or_zero_where_axbench_is_matched():
    factors, inputs, ratings = rows({1.0: [2] * 10})
    given_ = [tuple(one) for one in ratings]
    given_[9] = (2.0, None, 2.0)
    left_out = steering_score(0, "m", factors, inputs, as_array(given_), instructions=10)
    zero = steering_score(0, "m", factors, inputs, as_array(given_, "zero"), instructions=10)
    assert (left_out.score, left_out.unrated) == (2.0, 1)
    assert (zero.score, zero.unrated) == (pytest.approx(1.6), 0)


def test_a_half_without_a_rating_is_refused():
    factors, inputs, ratings = rows({1.0: [2] * 10})
    ratings[5:] = math.nan
    with pytest.raises(ValueError, match="m, concept 3: no rated text to report"):
        steering_score(3, "m", factors, inputs, ratings, instructions=10)
    ratings[:] = math.nan
    with pytest.raises(ValueError, match="no rated text to choose a factor on"):
        steering_score(3, "m", factors, inputs, ratings, instructions=10)


def test_a_concept_without_a_feature_counts_as_zero():
    found = uncovered(4, "supervised")
    assert found.score == 0.0 and not found.covered


def test_winrates_count_a_tie_half_and_need_the_same_concepts():
    assert winrate({0: 1.0, 1: 0.5, 2: 0.0, 3: 0.2}, {0: 0.5, 1: 0.5, 2: 0.1, 3: 0.1}) == 62.5
    with pytest.raises(ValueError, match="on the same concepts"):
        winrate({0: 1.0}, {1: 1.0})


def test_perplexity_overflows_to_infinity_and_is_nan_only_without_tokens():
    assert perplexity(2 * math.log(8), 2) == pytest.approx(8.0)
    assert perplexity(1e6, 1) == math.inf and math.isnan(perplexity(0.0, 0))
