"""The map on gradients: coordinates scaled, complement kept, also for correlated rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steering_plugin.concepts import concept_basis, edited, scale_map

D = 12


def rows(count=3, seed=0, correlated=True):
    found = torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).double()
    return found + 2 * found[:1] if correlated else found


@given(
    st.integers(0, 100), st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0]), min_size=3, max_size=3)
)
@settings(max_examples=40, deadline=None)
def test_coordinates_are_scaled_and_the_complement_is_not_touched(seed, scales):
    basis = concept_basis(rows(seed=seed))
    g = torch.randn(5, D, generator=torch.Generator().manual_seed(seed + 1)).double()
    new = edited(g, basis, scales)
    expected = basis.coordinates(g) * torch.tensor(scales)
    assert torch.allclose(basis.coordinates(new), expected, atol=1e-9)
    q = basis.orthonormal()
    assert torch.allclose(g - (g @ q) @ q.T, new - (new @ q) @ q.T, atol=1e-9)
    assert torch.allclose(g @ scale_map(basis, scales).T, new, atol=1e-9)


def test_all_zero_is_the_orthogonal_projection_and_all_one_is_nothing():
    basis = concept_basis(rows())
    g = torch.randn(4, D).double()
    q = basis.orthonormal()
    assert torch.allclose(edited(g, basis, [0.0] * 3), g - (g @ q) @ q.T, atol=1e-12)
    assert torch.equal(edited(g, basis, [1.0] * 3), g)
    assert (edited(g, basis, [0.0] * 3) @ basis.rows.T).abs().max() < 1e-12


def test_subtracting_row_by_row_is_wrong_for_correlated_rows():
    basis = concept_basis(rows())
    g = torch.randn(4, D).double()
    shortcut = g - (g @ basis.rows.T) @ basis.rows
    assert (shortcut @ basis.rows.T).abs().max() > 0.1


def test_near_copies_are_dropped_and_named():
    base = rows(2, correlated=False)
    basis = concept_basis(torch.cat([base, base[:1] + 1e-4 * torch.randn(1, D).double()]))
    assert len(basis.kept) == 2 and len(basis.dropped) == 1
    assert basis.dropped[0] in (0, 2)
    assert basis.condition <= 1e4


@pytest.mark.parametrize(
    ("given_rows", "message"),
    [
        (torch.zeros(0, D), "no concept is given"),
        (torch.zeros(2, D), "decoder row 0 of those given is zero"),
        (torch.randn(7, D), "7 concepts in 12 dimensions"),
    ],
)
def test_sets_without_coordinates_are_refused(given_rows, message):
    with pytest.raises(ValueError, match=message):
        concept_basis(given_rows)
