import math

import pytest
import torch

from sae_steering_plugin.features import footprint
from sae_steering_plugin.features.footprint import footprint_moments, footprints


def drawn(n=40, d=12, words=700, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(d, words, generator=generator)


@pytest.mark.parametrize("blocks", [(512, 4096), (16, 96)])
@pytest.mark.parametrize("centred", [False, True])
def test_every_figure_is_that_of_the_dense_product(blocks, centred, monkeypatch):
    monkeypatch.setattr(footprint, "ROWS", blocks[0])
    monkeypatch.setattr(footprint, "COLUMNS", blocks[1])
    rows, unembed = drawn()
    centre = unembed.mean(1) if centred else None
    r = rows.double() @ unembed.double()
    r = r - r.mean(1, keepdim=True) if centred else r
    s = r.abs() / r.abs().sum(1, keepdim=True)
    entropy = -(s * s.log()).sum(1)
    found = footprints(rows, unembed, centre=centre, shares=(10, 50, 700, 900), top=5)
    moments = footprint_moments(rows, unembed, centre=centre)
    expected = {
        "direct_logit_l2": r.norm(dim=1),
        "direct_logit_linf": r.abs().amax(1),
        "direct_logit_entropy": entropy,
        "direct_logit_effective_vocab": entropy.exp(),
        "direct_top10_abs_mass_frac": s.topk(10).values.sum(1),
        "direct_top50_abs_mass_frac": s.topk(50).values.sum(1),
        "direct_top700_abs_mass_frac": torch.ones(len(r)).double(),
        "direct_top900_abs_mass_frac": torch.ones(len(r)).double(),
    }
    assert set(found.columns) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found.columns[name], values, rtol=3e-6, atol=0), name
    torch.testing.assert_close(moments["direct_logit_l2"], r.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments["direct_logit_mean"], r.mean(1), rtol=1e-5, atol=1e-6)
    variance = r.var(1, unbiased=False)
    torch.testing.assert_close(moments["direct_logit_var"], variance, rtol=1e-5, atol=0)
    up, down = r.topk(5), (-r).topk(5)
    assert torch.equal(found.promoted, up.indices)
    assert torch.equal(found.suppressed, down.indices)
    torch.testing.assert_close(found.suppressed_logits.double(), -down.values, rtol=0, atol=2e-5)


def test_one_column_that_is_not_zero_has_no_entropy_and_all_mass():
    unembed = torch.zeros(6, 300)
    unembed[:, 41] = 1
    found = footprints(torch.ones(2, 6), unembed, shares=(10,), top=1)
    assert found.columns["direct_logit_entropy"].tolist() == [0, 0]
    assert found.columns["direct_top10_abs_mass_frac"].tolist() == [1, 1]
    assert found.promoted.flatten().tolist() == [41, 41]


def test_logits_of_equal_size_have_the_entropy_of_the_whole_vocabulary():
    signs = torch.ones(1, 300)
    signs[:, ::3] = -1
    found = footprints(torch.tensor([[2.0]]), signs, shares=(30,), top=0)
    assert found.columns["direct_logit_entropy"][0] == pytest.approx(math.log(300), rel=1e-6)
    assert found.columns["direct_top30_abs_mass_frac"][0] == pytest.approx(0.1, rel=1e-6)


def test_rows_that_fall_short_of_a_wrong_bar_are_worked_out_exactly(monkeypatch):
    rows, unembed = drawn()
    expected = footprints(rows, unembed, shares=(50,), top=4)
    monkeypatch.setattr(footprint, "sample_bars", lambda sample, k, n: sample.amax(1).numpy())
    found = footprints(rows, unembed, shares=(50,), top=4)
    name = "direct_top50_abs_mass_frac"
    torch.testing.assert_close(found.columns[name], expected.columns[name])
    assert torch.equal(found.promoted, expected.promoted)
    assert torch.equal(found.suppressed, expected.suppressed)


def test_a_row_that_moves_nothing_has_length_zero_and_no_spread():
    rows, unembed = drawn()
    rows[3] = 0
    found = footprints(rows, unembed, shares=(10, 900), top=0).columns
    assert found["direct_logit_l2"][3] == found["direct_logit_linf"][3] == 0
    for name in (
        "direct_logit_entropy",
        "direct_top10_abs_mass_frac",
        "direct_top900_abs_mass_frac",
    ):
        assert found[name].isnan().nonzero().flatten().tolist() == [3]


def test_wrong_sizes_are_refused():
    rows, unembed = drawn()
    with pytest.raises(ValueError, match="the vocabulary has 700 words"):
        footprints(rows, unembed, top=701)
    with pytest.raises(ValueError, match="there are no rows"):
        footprints(rows[:0], unembed)
