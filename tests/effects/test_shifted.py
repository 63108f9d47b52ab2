import math

import pytest
import torch

from sae_steering_plugin.effects.shifted import shift_columns, shifted


def figures(clean, steered):
    before = torch.tensor([clean])
    found = shifted(before, torch.tensor([steered]) - before)[0].tolist()
    return dict(zip(shift_columns(), found, strict=True))


def test_divergences_are_those_of_the_two_distributions():
    found = figures([0.0, math.log(3.0)], [0.0, 0.0])
    assert found["kl_clean_steered"] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert found["kl_steered_clean"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_logits_moved_shares_and_effective_number():
    found = figures([0.0] * 20, [0.3] * 12 + [0.0] * 8)
    assert found["logits_moved_0.2"] == 12
    assert found["logits_moved_0.5"] == 0
    assert found["logit_share_top10"] == pytest.approx(10 / 12)
    assert found["logit_share_top500"] == pytest.approx(1.0)
    assert found["logits_effective"] == pytest.approx(12)


def test_a_shift_of_zero_has_no_shares():
    found = figures([1.0, 2.0], [1.0, 2.0])
    assert found["kl_clean_steered"] == 0.0
    assert math.isnan(found["logit_share_top10"])
    assert found["logits_effective"] == 0.0


@pytest.mark.parametrize("scale", [1e-3, 0.3, 8.0, 60.0])
def test_divergences_of_small_and_of_huge_shifts_are_those_in_double_precision(scale):
    generator = torch.Generator().manual_seed(0)
    clean = 3 * torch.randn(4, 5000, generator=generator)
    shift = scale * torch.randn(4, 5000, generator=generator)
    p, q = ((x.double()).log_softmax(-1) for x in (clean, clean.double() + shift.double()))
    found = shifted(clean, shift)
    # float32 sums of squares of the shift: relative to the divergence itself
    torch.testing.assert_close(found[:, 0], (p.exp() * (p - q)).sum(-1), rtol=2e-3, atol=0)
    torch.testing.assert_close(found[:, 1], (q.exp() * (q - p)).sum(-1), rtol=2e-3, atol=0)
