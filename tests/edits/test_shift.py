import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steering_plugin.edits import Add
from sae_steering_plugin.types import Recipe, SteeringVector
from tests.hosts import D_MODEL, SITE
from tests.oracles import unchecked

F32 = {"dtype": torch.float32, "device": torch.device("cpu")}
CURVE = ((-2.0, 0.4), (1.0, 0.1), (2.0, 0.4), (4.0, 1.6))


def vector(length=3.0, seed=0, **recipe):
    values = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    known = dict(mean_norm=5.0, max_activation=2.0, row_norm=1.5, kl_curve=CURVE)
    return SteeringVector(
        values / values.norm() * length, SITE, Recipe("test", **{**known, **recipe}), "v"
    )


@pytest.mark.parametrize(
    "unit, length",
    [("raw", 3.0), ("unit", 1.0), ("norm", 5.0), ("max_activation", 3.0), ("kl", None)],
)
@pytest.mark.parametrize("strength", [1.0, 0.4, -0.3])
def test_the_step_has_the_length_its_unit_says(unit, length, strength):
    v = vector()
    step = Add(v, strength, unit=unit).step()
    # nats grow with the square of a small step: 0.1 nats at length 1, 0.4 at 2 and at -2
    wanted = length * strength if length else math.copysign((abs(strength) / 0.1) ** 0.5, strength)
    assert step.shape == (1, D_MODEL)
    torch.testing.assert_close(step[0], v.direction * wanted)


@settings(max_examples=40, deadline=None)
@given(
    strengths=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=5),
    unit=st.sampled_from(["raw", "unit", "norm", "max_activation"]),
)
def test_rows_of_strengths_are_the_single_steps_stacked(strengths, unit):
    v = vector()
    together = Add(v, torch.tensor(strengths), unit=unit)
    assert together.batch_rows == len(strengths)
    for row, strength in zip(together.step(), strengths, strict=True):
        torch.testing.assert_close(row, Add(v, strength, unit=unit).step()[0])


def test_a_bare_tensor_knows_raw_and_unit():
    rows = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(0))
    strength = torch.tensor([1.0, -2.0, 0.5])
    torch.testing.assert_close(Add(rows, strength).step(), strength[:, None] * rows)
    lengths = Add(rows, strength, unit="unit").step().norm(dim=-1)
    torch.testing.assert_close(lengths, strength.abs())
    assert Add(rows).hook_name is None
    assert Add(vector()).hook_name == SITE


def test_zero_is_idle_in_every_unit_even_without_figures():
    bare = SteeringVector(torch.randn(D_MODEL), SITE, Recipe("test"), "v")
    for unit in ("raw", "unit", "norm", "max_activation", "kl"):
        assert Add(bare, 0.0, unit=unit).prepare(**F32).idle
        assert Add(bare, torch.zeros(4), unit=unit).prepare(**F32).idle
    assert Add(torch.zeros(D_MODEL)).prepare(**F32).idle
    assert not Add(bare, torch.tensor([0.0, 1.0])).prepare(**F32).idle


def test_strength_and_its_negative_mirror_each_other():
    for unit in ("raw", "unit", "norm", "max_activation"):
        assert torch.equal(
            Add(vector(), 0.7, unit=unit).step(), -Add(vector(), -0.7, unit=unit).step()
        )


def test_the_step_is_float32_until_it_meets_the_activation():
    v = vector()
    prepared = Add(v, 0.1).prepare(dtype=torch.bfloat16, device=torch.device("cpu"))
    assert torch.equal(prepared.constant[0], Add(v, 0.1).step().bfloat16())
    assert Add(v.vector.double(), 0.1).step().dtype == torch.float32


def test_a_vector_that_requires_grad_is_read_anew_at_each_call():
    trained = torch.zeros(D_MODEL, requires_grad=True)
    prepared = Add(trained, 2.0).prepare(**F32)
    assert prepared.constant is None and not prepared.idle
    x = torch.zeros(1, 2, D_MODEL)
    assert (prepared(x) == 0).all()
    with torch.no_grad():
        trained += 1.5
    assert (prepared(x) == 3.0).all()
    prepared(x).sum().backward()
    assert torch.equal(trained.grad, torch.full((D_MODEL,), 2.0))


def test_a_vector_without_length_has_no_direction():
    nothing = SteeringVector(torch.full((D_MODEL,), 1e-10), SITE, Recipe("test"), "noise")
    with pytest.raises(ValueError, match="'noise' has length .* it has no direction"):
        Add(nothing, 1.0, unit="unit")
    with pytest.raises(
        ValueError, match="a vector of length zero has no direction; use unit='raw'"
    ):
        Add(torch.zeros(D_MODEL), 1.0, unit="unit")


def test_units_that_need_a_figure_name_it():
    bare = SteeringVector(torch.randn(D_MODEL), SITE, Recipe("test"), "bare")
    for unit in ("norm", "max_activation"):
        with pytest.raises(ValueError, match=f"'bare' cannot be measured in {unit!r}.*calibrate"):
            Add(bare, 1.0, unit=unit)
    with pytest.raises(ValueError, match="no KL curve on that side: run calibrate_strength first"):
        Add(bare, 1.0, unit="kl")
    with pytest.raises(ValueError, match="a bare tensor has no recipe"):
        Add(bare.vector, 1.0, unit="norm")
    known = "no strength unit 'sigma'; choose one of raw, unit, norm, max_activation, kl"
    with unchecked(), pytest.raises(ValueError, match=known):
        Add(bare, 1.0, unit="sigma")


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="strength is not finite"):
        Add(vector(), float("nan"))
    with pytest.raises(ValueError, match="the vector holds a value that is not finite"):
        Add(torch.full((D_MODEL,), float("inf")))
    with pytest.raises(
        ValueError, match=r"strength has shape \(1, 2\); give one number or one per"
    ):
        Add(vector(), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"vector has shape \(1, 2, 16\); give \[d_model\] or"):
        Add(torch.ones(1, 2, D_MODEL))
    with pytest.raises(ValueError, match="2 strengths were given for 3 vectors: give one strength"):
        Add(torch.ones(3, D_MODEL), torch.ones(2))
