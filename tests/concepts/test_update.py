"""Shares of a weight change over concepts; a LoRA delta without forming it."""

import pytest
import torch

from sae_steering_plugin.concepts import (
    LowRankDelta,
    lora_write,
    moved_along,
    read_share,
    write_share,
)


def test_shares_over_an_orthonormal_basis_sum_to_one():
    delta = torch.randn(9, 6).double()
    basis = torch.linalg.qr(torch.randn(6, 6).double()).Q
    assert float(write_share(delta, basis)[1].sum()) == pytest.approx(1.0)
    assert float(read_share(delta.T, basis)[1].sum()) == pytest.approx(1.0)
    sizes, _ = write_share(delta, 3 * basis)  # a row's length does not matter
    assert torch.allclose(sizes, (delta @ basis.T).norm(dim=0))


def test_a_lora_delta_equals_the_dense_one():
    down, up, rows = torch.randn(9, 2), torch.randn(2, 6), torch.randn(11, 6)
    delta = LowRankDelta(down, up, -0.5)
    dense = write_share(-0.5 * down @ up, rows)
    for one, low in zip(dense, lora_write(delta, rows), strict=True):
        assert torch.allclose(one, low, atol=1e-6)
    transposed = read_share(-0.5 * (down @ up).T, rows)
    for one, low in zip(transposed, lora_write(delta.mT.mT, rows), strict=True):
        assert torch.allclose(one, low, atol=1e-6)
    assert delta.shape == (9, 6) and delta.mT.shape == (6, 9)
    assert delta.square == pytest.approx(float((0.5 * down @ up).square().sum()), rel=1e-5)


def test_an_empty_delta_has_no_share():
    empty = LowRankDelta(torch.zeros(3, 1), torch.zeros(1, 4))
    assert float(write_share(torch.zeros(3, 4), torch.randn(2, 4))[1].abs().max()) == 0.0
    assert float(lora_write(empty, torch.randn(2, 4))[1].max()) == 0


def test_movement_is_the_mean_change_along_the_unit_row():
    before, after = torch.randn(8, 4), torch.randn(8, 4)
    row = torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    assert float(moved_along(before, after, row)) == pytest.approx(
        float((after - before)[:, 1].mean()), abs=1e-6
    )
