import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steering_plugin.features.causal import (
    CausalScores,
    Peaks,
    confidence,
    generation_success,
    input_score,
    lens_probability,
    rank_average,
    successful_factor,
)
from sae_steering_plugin.features.lens import top_tokens


def peaks(*entries):
    features, texts, tokens, codes = zip(*entries, strict=True)
    return Peaks(*map(torch.tensor, (features, texts, tokens)), torch.tensor(codes))


LENS = top_tokens([0, 1], [torch.tensor([[3.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 3.0]])], k=2)


def test_the_input_score_is_the_share_of_peaks_among_the_lens_tokens():
    entries = [(0, n, token, 1.0) for n, token in enumerate((0, 1, 2, 0))] + [(1, 0, 3, 2.0)]
    scores, counts = input_score(peaks(*entries), LENS, fewest=2)
    assert scores[0] == 0.75
    assert math.isnan(scores[1])  # one text is too few: unknown, not 0
    assert counts.tolist() == [4, 1]


def test_only_the_strongest_texts_count():
    entries = [(0, n, n % 2 * 2, 10.0 - n) for n in range(6)]  # tokens 0 2 0 2 0 2
    scores, _ = input_score(peaks(*entries), LENS, fewest=1, most=1)
    assert scores[0] == 1.0
    scores, _ = input_score(peaks(*entries), LENS, fewest=1, most=2)
    assert scores[0] == 0.5


def test_delta_confidence_by_hand():
    uniform = torch.full((1, 4), 0.25).log()
    sure = torch.tensor([[0.97, 0.01, 0.01, 0.01]]).log()
    assert float(confidence(sure) - confidence(uniform)) == pytest.approx(-1.356, abs=1e-3)
    assert float(confidence(sure, 4)) == pytest.approx(
        -(math.log(0.97) + 3 * math.log(0.01)) / 4, abs=1e-6
    )
    with pytest.raises(ValueError, match=r"k is 9; it must lie in 1\.\.4"):
        confidence(sure, 9)


def test_the_lens_probability_is_the_papers_formula_and_its_code():
    logp = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    tokens = torch.stack(
        [torch.randperm(30, generator=torch.Generator().manual_seed(i))[:4] for i in range(5)]
    )
    found = lens_probability(logp, tokens)
    for row, chosen, value in zip(logp.double().exp(), tokens.tolist(), found, strict=True):
        rank = {token: int((row > row[token]).sum()) for token in chosen}
        first = min(chosen, key=lambda token: rank[token])
        assert float(value) == pytest.approx(float((1 - rank[first] / 30) * row[first]), rel=1e-12)


def test_ties_are_not_strictly_likelier():
    assert float(lens_probability(torch.full((1, 4), 0.25).log(), torch.tensor([[2]]))) == (
        pytest.approx(0.25)
    )


@settings(deadline=None)  # the first example imports scipy.stats
@given(st.lists(st.integers(-50, 50), min_size=3, max_size=12, unique=True))
def test_a_rank_average_of_one_score_keeps_its_order(values):
    ranks = rank_average(torch.tensor(values, dtype=torch.float64))
    assert ranks.argsort().tolist() == torch.tensor(values, dtype=torch.float64).argsort().tolist()
    assert float(ranks.max()) == 1.0


def test_a_feature_must_be_good_at_both_for_the_product():
    ranks = rank_average(torch.tensor([3.0, 2.0, 0.0]), torch.tensor([0.0, 2.0, 3.0]))
    assert int(ranks.argmax()) == 1 or float(ranks[1]) >= float(ranks[0])
    assert rank_average(torch.tensor([float("nan"), 1.0]))[0] == 0.5


def test_both_forms_of_the_output_score_are_kept():
    scores = CausalScores(
        torch.tensor([4, 7]),
        torch.tensor([0.5, 0.25]),
        torch.tensor([0.125, 0.25]),
        torch.tensor([-1.0, 0.5]),
    )
    assert scores.of(4) == (0.375, 0.5, -1.0)
    table = scores.table()
    assert (table.output_score_unsubtracted - table.base_term == table.output_score).all()
    with pytest.raises(KeyError, match="feature 5 has no causal scores"):
        scores.of(5)


def test_success_counts_lens_tokens_and_the_factor_is_the_best_share_per_perplexity():
    texts = [torch.tensor([5, 5, 1]), torch.tensor([2, 3, 4]), torch.tensor([], dtype=torch.long)]
    assert generation_success(texts, torch.tensor([5, 4])).tolist() == [2.0, 1.0, 0.0]
    success, perplexity = [0.5, 1.0, 2.0, 9.0], [2.0, 3.0, 12.0, 10.0]
    shares = [
        (s / max(success)) / (p / max(perplexity)) for s, p in zip(success, perplexity, strict=True)
    ]
    assert successful_factor(success, perplexity, most=10.0) == int(np.argmax(shares)) == 3
    assert successful_factor(success, perplexity) == 1  # 9 lens tokens per text is repetition
    assert successful_factor([0.0, 0.0], [4.0, 3.0]) == 0  # nothing succeeds: the gentlest
    with pytest.raises(LookupError, match="more than 3 lens tokens are written per text"):
        successful_factor([4.0, 5.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="one positive perplexity per factor"):
        successful_factor([1.0], [0.0])
