import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steering_plugin.edits import ProjectOut
from sae_steering_plugin.types import Recipe, SteeringVector
from tests.hosts import D_MODEL, SITE

F32 = {"dtype": torch.float32, "device": torch.device("cpu")}


def basis(k, seed=0):
    return torch.randn(k, D_MODEL, generator=torch.Generator().manual_seed(seed))


def residual(seed=9):
    return torch.randn(2, 5, D_MODEL, generator=torch.Generator().manual_seed(seed)) * 4


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 6), seed=st.integers(0, 999), strength=st.floats(-1, 2))
def test_what_is_left_is_the_least_squares_residual(k, seed, strength):
    rows, x = basis(k, seed), residual(seed)
    change = ProjectOut(rows, strength).prepare(**F32)(x)
    fit = torch.linalg.lstsq(rows.T.double(), x.reshape(-1, D_MODEL).T.double()).solution
    inside = (rows.T.double() @ fit).T.reshape(x.shape).float()
    torch.testing.assert_close(change, -strength * inside, rtol=1e-3, atol=1e-4)


def test_strength_one_removes_and_two_reflects():
    rows, x = basis(3), residual()
    removed = x + ProjectOut(rows).prepare(**F32)(x)
    assert (removed @ rows.T).abs().max() < 1e-4
    again = removed + ProjectOut(rows).prepare(**F32)(removed)
    torch.testing.assert_close(again, removed, rtol=1e-5, atol=1e-5)
    reflect = ProjectOut(rows, 2.0).prepare(**F32)
    mirrored = x + reflect(x)
    torch.testing.assert_close(mirrored + reflect(mirrored), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mirrored.norm(dim=-1), x.norm(dim=-1))


def test_only_the_span_counts():
    rows, x = basis(2), residual()
    mixed = torch.stack([rows[0] * 5 - rows[1], rows[0] * 1e-3 + rows[1] * 100])
    torch.testing.assert_close(
        ProjectOut(mixed).prepare(**F32)(x),
        ProjectOut(rows).prepare(**F32)(x),
        rtol=1e-3,
        atol=1e-3,
    )


def test_strength_can_differ_by_row():
    rows, x = basis(2), residual()
    edit = ProjectOut(rows, torch.tensor([0.0, 1.0]))
    assert edit.batch_rows == 2
    change = edit.prepare(**F32)(x)
    assert (change[0] == 0).all()
    assert torch.equal(change[1], ProjectOut(rows).prepare(**F32)(x[1:])[0])
    assert ProjectOut(rows, 0.0).prepare(**F32).idle


def test_vectors_bring_their_hook_point():
    v = SteeringVector(basis(1)[0], SITE, Recipe("test"), "v")
    w = SteeringVector(basis(1, 1)[0], "blocks.1.hook_resid_post", Recipe("test"), "w")
    assert ProjectOut(v).hook_name == SITE
    assert ProjectOut([v]).hook_name == SITE
    assert ProjectOut(basis(2)).hook_name is None
    with pytest.raises(ValueError, match="basis vectors belong to different hook points"):
        _ = ProjectOut([v, w]).hook_name


def test_a_basis_that_is_not_one_is_refused():
    rows = basis(2)
    with pytest.raises(ValueError, match="the 3 basis vectors are not independent .* drop one"):
        ProjectOut(torch.stack([*rows, rows[0] - 2 * rows[1]]))
    with pytest.raises(ValueError, match="not independent"):
        ProjectOut(torch.zeros(D_MODEL))
    with pytest.raises(ValueError, match="the basis holds a value that is not finite"):
        ProjectOut(torch.full((D_MODEL,), float("nan")))
    with pytest.raises(ValueError, match="strength is not finite"):
        ProjectOut(rows, float("nan"))
    with pytest.raises(ValueError, match="give one strength, or one per batch row"):
        ProjectOut(rows, torch.ones(2, 2))
