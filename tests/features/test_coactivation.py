import math

import numpy as np
import pytest
import torch

from sae_steering_plugin.features import coactivation
from sae_steering_plugin.features.coactivation import ActiveCodes, coactivation_of


def active(tokens=200, features=30, seed=0):
    rates = torch.linspace(0.5, 0.02, features)
    drawn = torch.rand(tokens, features, generator=torch.Generator().manual_seed(seed)) < rates
    drawn[:, -1] = False
    return drawn


def dense_figures(table, panel, keep_self):
    """The page's formulas on the dense count matrix."""
    z = table.double().numpy()
    counts = z.T @ z
    own = counts.diagonal().copy()
    chosen = np.sort(np.argsort(-own, kind="stable")[:panel])
    if not keep_self:
        np.fill_diagonal(counts, 0)
    c = counts[:, chosen]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = c / c.sum(1, keepdims=True)
        entropy = -np.where(c > 0, share * np.log(share), 0).sum(1) / math.log(len(chosen))
        alone = c.sum(1) == 0
        return {
            "coact_entropy_norm": np.where(alone, np.nan, entropy),
            "coact_count_mean": np.where(own > 0, c.sum(1) / own, np.nan),
            "coact_top20_mass": -np.sort(-share, axis=1)[:, :20].sum(1),
            "coact_degree": np.where(own > 0, (c > 0).sum(1).astype(float), np.nan),
        }


@pytest.mark.parametrize("rows", [1024, 7])
@pytest.mark.parametrize("panel", [None, 25])
@pytest.mark.parametrize("keep_self", [False, True])
def test_sparse_counting_equals_the_dense_product(rows, panel, keep_self, monkeypatch):
    monkeypatch.setattr(coactivation, "ROWS", rows)
    table = active()
    found = coactivation_of(ActiveCodes.from_dense(table), panel=panel, keep_self=keep_self)
    expected = dense_figures(table, panel or table.shape[1], keep_self)
    for name, values in expected.items():
        np.testing.assert_allclose(found.columns[name].numpy(), values, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("by", ["jaccard", "lift"])
def test_partners_are_the_best_by_the_dense_table(by):
    table = active()
    z = table.double()
    together, own = z.T @ z, z.sum(0)
    size = (
        together / (own[:, None] + own - together)
        if by == "jaccard"
        else together * len(z) / (own[:, None] * own)
    )
    size[together == 0] = -1
    size = size.nan_to_num(-1).fill_diagonal_(-1)
    found = coactivation_of(ActiveCodes.from_dense(table), panel=None, k=5, by=by)
    best = size.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.partners[:-1], best.indices[:-1, :5])
    torch.testing.assert_close(found.similarity[:-1], best.values[:-1, :5])
    assert found.partners[-1].eq(-1).all() and found.similarity[-1].isnan().all()


def test_a_planted_pair_finds_each_other():
    table = active()
    table[:, 7] = table[:, 20]
    found = coactivation_of(ActiveCodes.from_dense(table), panel=None, k=1)
    assert found.partners[7, 0] == 20 and found.partners[20, 0] == 7
    assert found.similarity[7, 0] == 1


def test_always_alone_and_never_active_are_told_apart():
    table = torch.zeros(10, 3, dtype=torch.bool)
    table[0, 0] = True
    found = coactivation_of(ActiveCodes.from_dense(table), panel=None).columns
    assert found["coact_count_mean"][0] == found["coact_degree"][0] == 0
    assert found["coact_entropy_norm"].isnan().all()
    assert found["coact_count_mean"][1:].isnan().all()


def test_halves_and_a_saved_state_count_as_the_whole():
    table = active()
    whole = coactivation_of(ActiveCodes.from_dense(table), panel=10)
    halves = ActiveCodes.from_dense(table[:90]).merge(ActiveCodes.from_dense(table[90:]))
    again = ActiveCodes.from_state(halves.state(), 30)
    assert again.n_tokens == 200
    for name, values in coactivation_of(again, panel=10).columns.items():
        assert torch.equal(values.nan_to_num(-1), whole.columns[name].nan_to_num(-1))


def test_wrong_input_is_refused():
    codes = ActiveCodes(3)
    with pytest.raises(ValueError, match="no token was counted"):
        coactivation_of(codes)
    with pytest.raises(ValueError, match="lies outside 2 tokens x 3"):
        codes.add(torch.tensor([0]), torch.tensor([3]), 2)
    with pytest.raises(ValueError, match="choose 'jaccard' or 'lift'"):
        coactivation_of(codes, by="cosine")
    with pytest.raises(ValueError, match="a spread needs two"):
        coactivation_of(codes, panel=1)
    with pytest.raises(ValueError, match="3 and 4 features"):
        codes.merge(ActiveCodes(4))
