"""Planted shifts and preferences are read off activations and firing rates."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_steering_plugin.concepts import disparity, shift_along


def test_a_planted_shift_is_read_off_exactly():
    base = torch.randn(6, 4).double()
    row = torch.tensor([[0.0, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).double()
    found = shift_along(base + 0.3 * row[0] / 5, base, row)
    assert torch.allclose(found, torch.tensor([[0.3, 0.0]] * 6).double())
    assert float(shift_along(base, base, row).abs().max()) == 0.0


rates = st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5)


@given(rates, rates, st.floats(0, 1))
def test_disparity_is_bounded_and_antisymmetric(chosen, rejected, least):
    n = min(len(chosen), len(rejected))
    one, other = torch.tensor(chosen[:n]).double(), torch.tensor(rejected[:n]).double()
    found = disparity(one, other, least_rate=least)
    assert float(found.abs().max()) <= 1
    assert torch.equal(found, -disparity(other, one, least_rate=least))


def test_a_latent_of_chosen_texts_only_has_disparity_one():
    chosen = torch.tensor([[0.5, 0.1], [0.2, 0.1]])
    rejected = torch.tensor([[0.0, 0.1], [0.0, 0.1]])
    assert disparity(chosen, rejected, least_rate=0.0).mean(0).tolist() == [1.0, 0.0]
    assert disparity(chosen, rejected, least_rate=0.3).mean(0)[0] == pytest.approx(0.5)
