import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_steering_plugin.effects.stability import gram_stability, stability


def noise(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def slow_cosines(shifts, *, leave_one_out):
    """cos(D_i, mean) one by one."""
    found = []
    for i, one in enumerate(shifts):
        kept = torch.cat([shifts[:i], shifts[i + 1 :]]) if leave_one_out else shifts
        found.append(torch.nn.functional.cosine_similarity(one, kept.mean(0), dim=0))
    return torch.stack(found)


def test_opposed_copies_tell_signed_absolute_and_pairwise_apart():
    v = noise(1, 20)
    found = stability(torch.cat([v.repeat(36, 1), -v.repeat(12, 1)]))
    assert found.stability_signed == pytest.approx(0.5)
    assert found.stability_abs == pytest.approx(1.0)
    assert found.pairwise_signed == pytest.approx((24**2 - 48) / (48 * 47))
    assert found.pairwise_abs == pytest.approx(1.0)
    assert found.effect == pytest.approx(float(v.norm()), rel=1e-6)


def test_a_mean_shift_of_zero_has_no_cosine():
    v = noise(1, 20)
    found = stability(torch.cat([v.repeat(24, 1), -v.repeat(24, 1)]))
    assert math.isnan(found.stability_signed) and math.isnan(found.stability_abs)
    assert found.pairwise_signed == pytest.approx(-1 / 47)


def test_noise_scores_one_over_root_n_and_zero_when_left_out():
    found = [stability(noise(48, 50257, seed)) for seed in range(2)]
    for one in found:
        assert one.stability_signed == pytest.approx(48**-0.5, abs=0.01)
        assert one.loo_signed == pytest.approx(0.0, abs=0.01)
        assert one.pairwise_signed == pytest.approx(0.0, abs=0.01)


@given(st.integers(2, 9), st.integers(0, 99), st.floats(-2, 2))
def test_the_gram_form_equals_cosines_one_by_one(n, seed, common):
    shifts = noise(n, 7, seed).double() + common
    found = stability(shifts)
    whole, left = (slow_cosines(shifts, leave_one_out=out) for out in (False, True))
    assert found.stability_signed == pytest.approx(float(whole.mean()), abs=1e-6)
    assert found.stability_abs == pytest.approx(float(whole.abs().mean()), abs=1e-6)
    assert found.loo_signed == pytest.approx(float(left.mean()), abs=1e-6)
    assert found.loo_abs == pytest.approx(float(left.abs().mean()), abs=1e-6)
    lengths = shifts.norm(dim=1)
    assert found.effect == pytest.approx(float(lengths.mean()))
    assert found.effect_cv == pytest.approx(float(lengths.std() / lengths.mean()))


def test_a_rotation_of_the_space_changes_nothing():
    shifts = noise(12, 9).double()
    turn = torch.linalg.qr(noise(9, 9, 1).double())[0]
    before, after = stability(shifts).to_dict(), stability(shifts @ turn).to_dict()
    assert before == pytest.approx(after)


def test_scaling_all_shifts_scales_the_effect_and_nothing_else():
    shifts = noise(12, 9).double()
    one, three = stability(shifts).to_dict(), stability(3 * shifts).to_dict()
    assert three.pop("effect") == pytest.approx(3 * one.pop("effect"))
    assert three == pytest.approx(one)


def test_shifts_of_zero_length_count_in_the_effect_and_in_no_cosine():
    v = noise(1, 5)
    found = stability(torch.cat([v.repeat(3, 1), torch.zeros(1, 5)]))
    assert (found.n, found.n_moved) == (4, 3)
    assert found.stability_signed == pytest.approx(1.0)
    assert found.effect == pytest.approx(0.75 * float(v.norm()))


def test_nothing_moved_is_an_effect_of_zero_and_no_stability():
    found = stability(torch.zeros(4, 5))
    assert found.effect == 0.0
    assert all(
        math.isnan(value)
        for name, value in found.to_dict().items()
        if name not in ("n", "n_moved", "effect")
    )


def test_one_context_has_no_spread_and_no_pairs():
    found = stability(noise(1, 5))
    assert found.stability_signed == pytest.approx(1.0)
    assert math.isnan(found.effect_cv) and math.isnan(found.pairwise_signed)
    assert math.isnan(found.loo_signed)


def test_no_context_is_an_error():
    with pytest.raises(ValueError, match="at least one context"):
        gram_stability(torch.zeros(0, 0))
