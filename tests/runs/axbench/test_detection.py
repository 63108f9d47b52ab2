"""Detection: exact on planted groups, ties at one half, hard negatives out of the AUROC."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from sae_steering_plugin.runs.axbench.detection import (
    FALLBACK,
    Pooled,
    auroc,
    bag_of_words_scores,
    best_f1,
    detect,
    scale_of,
)
from sae_steering_plugin.runs.axbench.files import read_axbench
from tests.runs.axbench.sets import axbench_folder

BOW_AUROC = {
    "concept10/prod_2b_l10_v1": 0.914,
    "concept10/prod_9b_l20_v1": 0.941,
    "conceptFD/prod_2b_l10_v1": 0.963,
}
"""Measured on the files by this project's notes on AxBench; three decimals."""
GROUPS, TOKENS, WIDTH = 6, 5, 64


def planted_texts(n: int, seed: int, stray: float):
    """Tokens `[text, pos]` of six groups of five tokens with one read direction each, the group a
    text is about (none from six on), and the residual of each token.
    """
    world, rng = np.random.default_rng(0), np.random.default_rng(100 + seed)
    read = np.linalg.qr(world.normal(size=(WIDTH, GROUPS)))[0].T
    embed = world.normal(size=(64, WIDTH)) * 0.1
    for group in range(GROUPS):
        rows = slice(group * TOKENS, (group + 1) * TOKENS)
        embed[rows] -= embed[rows] @ read.T @ read
        embed[rows] += 3 * read[group]
    embed[GROUPS * TOKENS :] -= embed[GROUPS * TOKENS :] @ read.T @ read
    about = rng.integers(0, 2 * GROUPS, n)  # half of the texts are about no group
    tokens = rng.integers(GROUPS * TOKENS, 64, (n, 20))
    strays = rng.random((n, 20)) < stray * GROUPS
    tokens[strays] = rng.integers(0, GROUPS * TOKENS, strays.sum())
    for text, group in enumerate(about):
        if group < GROUPS:
            places = rng.choice(20, 3, replace=False)
            tokens[text, places] = group * TOKENS + rng.integers(0, TOKENS, 3)
    return tokens, about, embed[tokens]


@pytest.mark.parametrize("group", range(GROUPS))
def test_diff_mean_detects_a_planted_group_exactly_and_its_label_as_far_as_strays_allow(group):
    _, about, states = planted_texts(300, 0, 0.01)
    high, low = states[about == group], states[about != group]
    direction = high.mean((0, 1)) - low.mean((0, 1))
    tokens, about, states = planted_texts(300, 1, 0.01)
    scores = np.array([Pooled.of((one @ direction).tolist()).value for one in states])
    holds = (tokens // TOKENS == group).any(axis=1)
    assert auroc(scores, holds) == 1.0
    assert 0.91 <= auroc(scores, about == group) <= 0.965


def test_shuffled_labels_are_detected_at_one_half_on_average():
    _, about, states = planted_texts(300, 1, 0.01)
    rng = np.random.default_rng(2)
    found = []
    for group in range(GROUPS):
        for _ in range(5):
            labels = rng.permutation(about == group)
            direction = states[labels].mean((0, 1)) - states[~labels].mean((0, 1))
            _, other, fresh = planted_texts(300, 3, 0.01)
            scores = (fresh @ direction).max(axis=1)
            found.append(auroc(scores, rng.permutation(other == group)))
    assert np.mean(found) == pytest.approx(0.5, abs=0.05)


def test_ties_count_half():
    kinds = ["negative", "positive", "negative", "positive"]
    assert detect([3.0] * 4, kinds).auroc == 0.5
    assert detect([0, 0, 1, 1], kinds).auroc == 0.5


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=40))
def test_auroc_and_f1_agree_with_scikit_learn(rows):
    scores, labels = np.array([a for a, _ in rows], float), np.array([b for _, b in rows])
    if labels.all() or not labels.any():
        with pytest.raises(ValueError, match="detection needs both"):
            auroc(scores, labels)
        return
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    cuts = [f1_score(labels, scores >= cut) for cut in np.unique(scores)]
    assert best_f1(scores, labels) == pytest.approx(max(cuts), abs=1e-12)


def test_hard_negatives_stay_out_of_the_auroc_and_enter_the_macro_accuracy_and_the_scale():
    kinds = ["positive", "positive", "negative", "negative"]
    plain = detect([3, 2, 1, 0], kinds)
    mixed = detect([3, 2, 1, 0, 9, 0.5], [*kinds, "hard negative", "hard negative"])
    assert plain.auroc == mixed.auroc == 1.0
    assert plain.hard_accuracy is None and "HardNegativeEvaluator" not in plain.fields()
    assert mixed.hard_accuracy == pytest.approx((1.0 + 0.5) / 2)
    assert (plain.max_act, mixed.max_act) == (3.0, 9.0)
    assert mixed.n == {"positive": 2, "negative": 2, "hard negative": 2}


def test_the_threshold_is_youdens_on_normalised_scores():
    found = detect([10, 8, 7, 2], ["positive", "positive", "negative", "negative"])
    assert found.threshold == pytest.approx((8 - 2) / 8)
    constant = detect([5, 5], ["positive", "negative"])
    assert constant.threshold == 1.0 and constant.auroc == 0.5


def test_further_negatives_lower_the_f1_and_nothing_else():
    kinds = ["positive", "positive", "negative"]
    alone = detect([3, 2, 1], kinds, further=[0.0] * 3600)
    harder = detect([3, 2, 1], kinds, further=[0.0] * 1800 + [4.0] * 1800)
    assert alone.best_f1 == 1.0 and harder.best_f1 < 0.01
    assert alone.auroc == harder.auroc == 1.0 and alone.max_act == harder.max_act == 3.0


def test_token_scores_are_rounded_before_the_maximum_and_the_first_token_wins_a_tie():
    assert Pooled.of([0.1234, 0.12341, 0.1]) == Pooled(0.123, 0)
    with pytest.raises(ValueError, match="token scores must be finite and at least one"):
        Pooled.of([float("nan")])


@pytest.mark.parametrize("value", [None, 0.0, -3.0, float("nan"), float("inf")])
def test_a_maximum_that_is_missing_or_not_above_zero_falls_back(value):
    assert scale_of(value) == (FALLBACK, True)
    assert scale_of(0.25) == (0.25, False)


def test_unknown_categories_and_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="no category 'neutral'"):
        detect([1, 2], ["positive", "neutral"])
    with pytest.raises(ValueError, match="one finite score per row"):
        detect([1, float("nan")], ["positive", "negative"])


@pytest.mark.parametrize("name", BOW_AUROC)
def test_the_bag_of_words_reaches_what_was_measured_on_axbench_data(name, data):
    concepts = read_axbench(axbench_folder(data, name))
    found = []
    for one in concepts.concepts:
        train, held = concepts.training(one.concept_id), concepts.held_out(one.concept_id)
        texts = [(rows["input"] + "\n" + rows["output"]).tolist() for rows in (train, held)]
        scores = bag_of_words_scores(texts[0], (train["category"] == "positive").tolist(), texts[1])
        found.append(detect(scores, held["category"].tolist()).auroc)
    assert np.mean(found) == pytest.approx(BOW_AUROC[name], abs=0.0015)
