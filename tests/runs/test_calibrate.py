"""calibrate_strength: the budget is spent, and KL becomes a unit like any other."""

from __future__ import annotations

import pytest
import torch

from sae_steering_plugin.adapters.steering import steer
from sae_steering_plugin.edits import Add
from sae_steering_plugin.runs.calibrate import calibrate_strength
from sae_steering_plugin.types import Edit, Recipe, SteeringVector
from tests.hosts import SITE

TEXTS = ["the cat sat on the mat", "a dog ran in the park", "the cat"]


@pytest.fixture
def vector() -> SteeringVector:
    values = torch.randn(16, generator=torch.Generator().manual_seed(0))
    return SteeringVector(values, SITE, Recipe("random"), "random")


@torch.no_grad()
def _one_by_one(host, edit):
    """An independent oracle: one text at a time, without padding, KL by torch."""
    total, count = 0.0, 0
    for text in TEXTS:
        tokens = host.to_tokens(text, prepend_bos=True)
        base = host(tokens).log_softmax(-1)
        with steer(host, edit):
            after = host(tokens).log_softmax(-1)
        kl = torch.nn.functional.kl_div(after, base, log_target=True, reduction="none").sum(-1)
        total += float(kl[:, 1:].sum())
        count += tokens.shape[1] - 1
    return total / count, count


@pytest.mark.parametrize("budget", [0.05, 0.5, -0.2])
def test_strength_spends_the_budget(host, vector, budget):
    found = calibrate_strength(host, vector, TEXTS, budget, tolerance=0.01)
    assert found.nats == pytest.approx(abs(budget), rel=0.01)
    assert found.strength * budget > 0
    nats, count = _one_by_one(host, Edit(Add(vector, found.strength)))
    assert count == found.tokens
    assert nats == pytest.approx(found.nats, rel=1e-3)


def test_kl_is_a_unit_afterwards(bridge, vector):
    known = calibrate_strength(bridge, vector, TEXTS, 0.3, tolerance=0.005)
    budget = known.nats
    length = known.vector.displacement(budget, "kl")
    assert length == pytest.approx(known.strength * vector.norm, rel=1e-6)
    assert known.vector.convert(length, "unit", "kl") == pytest.approx(budget, rel=1e-6)
    assert Add(known.vector, budget, unit="kl").step().norm() == pytest.approx(length, rel=1e-5)


def test_both_sides_are_kept(bridge, vector):
    up = calibrate_strength(bridge, vector, TEXTS, 0.2)
    both = calibrate_strength(bridge, up.vector, TEXTS, -0.2)
    assert both.vector.displacement(-0.1, "kl") < 0 < both.vector.displacement(0.1, "kl")


def test_bad_requests_are_refused(bridge, vector):
    with pytest.raises(ValueError, match="budget other than 0"):
        calibrate_strength(bridge, vector, TEXTS, 0.0)
    with pytest.raises(ValueError, match="are not reached"):
        calibrate_strength(bridge, vector, TEXTS, 1e6)
    with pytest.raises(ValueError, match="has no KL curve"):
        vector.displacement(0.1, "kl")
    with pytest.raises(ValueError, match="beyond the measured curve"):
        calibrate_strength(bridge, vector, TEXTS, 0.1).vector.displacement(1e6, "kl")
