"""The world's answer about its traits, and its likeness to a measured structure."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sae_steering_plugin.effects.cross import CrossTraitMatrix, cross_trait_matrix
from sae_steering_plugin.organisms.behaviour import level_correlation
from sae_steering_plugin.organisms.world import TRAITS
from sae_steering_plugin.runs.trait_structure import (
    AGREED,
    cosine,
    drawn_levels,
    expected_effects,
    first_turns,
    likeness,
    off_diagonal_correlation,
    trait_structure,
)

OUTCOMES = ("autonomy", "tool_use", "persistence", "risk", AGREED)


N = 100
CHANCE = 3 * (2 / N) ** 0.5
"""Three standard errors of d around 0, with N transcripts a side: what chance alone may reach."""


@pytest.fixture(scope="module")
def alone() -> np.ndarray:
    return expected_effects(TRAITS, OUTCOMES, "alone", n=N)


def test_each_trait_alone_moves_what_it_governs(alone: np.ndarray) -> None:
    own = {"autonomy": 0, "tool_use": 1, "persistence": 1, "risk": 3, "deference": 4}
    for trait, column in own.items():
        assert abs(alone[TRAITS.index(trait)]).argmax() in (column, 2)
        assert alone[TRAITS.index(trait), column] > CHANCE
    assert abs(alone[TRAITS.index("risk"), [0, 4]]).max() < CHANCE  # it governs neither


def test_together_the_correlated_traits_come_along(alone: np.ndarray) -> None:
    """Autonomy and deference correlate at -0.6: observed together, each moves the other's."""
    pair = ("autonomy", "deference")
    (_, agrees), (acts, _) = expected_effects(pair, ("autonomy", AGREED), "together", n=N)
    autonomy, deference = (TRAITS.index(trait) for trait in pair)
    apart = CHANCE * 2**0.5  # of a difference of two d
    assert agrees < -CHANCE and agrees < alone[autonomy, 4] - apart
    assert acts < -CHANCE and acts < alone[deference, 0] - apart


def test_levels_drawn_together_have_the_world_s_correlation() -> None:
    import random

    rng = random.Random(0)
    rows = [drawn_levels(rng, "risk", i % 2, "together") for i in range(1500)]
    table = np.array([[row[trait] for trait in TRAITS] for row in rows])
    assert set(table[:, TRAITS.index("risk")]) == {0, 1}
    found = np.corrcoef(table.T)[TRAITS.index("risk")]
    for i, trait in enumerate(TRAITS):
        # The drawn level is balanced, as the copula's is; four standard errors of a correlation.
        assert abs(found[i] - level_correlation("risk", trait)) < 4 / 1500**0.5


def test_a_transcript_ends_with_its_last_allowed_turn() -> None:
    roles = ["system", "user", "assistant", "tool", "assistant", "tool", "assistant"]
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    assert first_turns(messages, 3) == messages
    assert first_turns(messages, 2) == messages[:5]
    assert first_turns(messages, 1) == messages[:3]


def test_a_likeness_stands_among_all_orders_of_the_traits() -> None:
    truth = np.eye(4) + 0.1 * np.arange(16).reshape(4, 4) / 16
    same = likeness("x", truth, truth, cosine)
    assert same.value == pytest.approx(1.0) and same.p_value == 1 / 24 and same.orders == 24
    assert likeness("x", truth[::-1], truth, cosine).p_value > 0.5
    flat = likeness("x", np.ones((4, 4)), truth, cosine)
    assert flat.p_value == 1.0


def test_the_correlation_of_pairs_ignores_the_diagonal() -> None:
    first = np.array([[1, 0.5, 0.1], [0.5, 1, -0.3], [0.1, -0.3, 1]])
    assert off_diagonal_correlation(first, 3 * first + 2 * np.eye(3) + 1) == pytest.approx(1.0)
    assert off_diagonal_correlation(first, np.eye(3)) == 0.0


FEW = 20
"""Transcripts per level where the same draw stands on both sides of a comparison."""


@pytest.fixture(scope="module")
def told() -> np.ndarray:
    """What `trait_structure(..., n=FEW)` itself draws as the world's answer."""
    return expected_effects(TRAITS, OUTCOMES, "alone", n=FEW)


def planted(effects: np.ndarray, n: int = 50) -> CrossTraitMatrix:
    """A matrix whose d is `effects` exactly: outcomes of mean 0, deviation 1, shifted by them."""
    generator = np.random.default_rng(0)
    rows = []
    for arm, shift in (("base", np.zeros(effects.shape[1])), *zip(TRAITS, effects, strict=True)):
        values = generator.normal(size=(n, effects.shape[1]))
        values = (values - values.mean(0)) / values.std(0, ddof=1) + shift
        frame = pd.DataFrame(values, columns=list(OUTCOMES))
        rows.append(frame.assign(arm=arm, scenario=[str(i) for i in range(n)]))
    return cross_trait_matrix(
        pd.concat(rows), outcomes=OUTCOMES, vectors=list(TRAITS), targets={}, resamples=10
    )


def test_vectors_that_do_what_the_world_says_are_found_alike(told: np.ndarray) -> None:
    correlation = np.array([[level_correlation(a, b) for b in TRAITS] for a in TRAITS])
    found = trait_structure(planted(told), cosines=correlation, n=FEW)
    np.testing.assert_allclose(found.measured, told, atol=1e-12)
    as_alone, as_together, of_vectors = found.likenesses
    assert as_alone.value == pytest.approx(1.0) and as_alone.p_value == 1 / 120
    assert of_vectors.value == pytest.approx(1.0) and of_vectors.p_value == 1 / 120
    product = (told * found.together).sum()
    scale = np.linalg.norm(told) * np.linalg.norm(found.together)
    assert as_together.value == pytest.approx(product / scale) and as_together.value < 1
    assert set(found.shares) == {
        "traits' own correlation",
        "measured d",
        "world, trait alone",
        "world, correlated traits",
    }
    assert found.shares["measured d"] == pytest.approx(found.shares["world, trait alone"])
    assert all(found.on_target.values())
    rows = found.rows()
    assert len(rows) == 25 and rows[0]["vector"] == "autonomy"
    assert rows[0]["measured d"] == rows[0]["trait alone"] == round(told[0, 0], 2)
    assert "trait alone" in found._repr_html_() and found.to_dict()["outcomes"] == list(OUTCOMES)


def test_one_axis_is_told_from_five_traits(told: np.ndarray) -> None:
    """Every vector does what autonomy does: one component holds all, the world's does not."""
    axis = np.outer([1.0, 0.7, 0.6, 0.8, -0.5], told[0])
    found = trait_structure(planted(axis), n=FEW)
    squares = np.linalg.svd(told, compute_uv=False) ** 2
    assert found.shares["measured d"] == pytest.approx(1.0)
    assert found.shares["world, trait alone"] == pytest.approx(squares[0] / squares.sum())
    assert squares[0] / squares.sum() < 1 - 1e-3
    product = (axis * told).sum() / (np.linalg.norm(axis) * np.linalg.norm(told))
    assert found.likenesses[0].value == pytest.approx(product) and product < 1
    assert len(found.likenesses) == 2


def test_one_trait_has_no_structure() -> None:
    frame = pd.DataFrame(
        {
            "arm": ["base"] * 3 + ["risk"] * 3,
            "scenario": list("abc") * 2,
            "risk": [0, 1, 0, 1, 1, 0],
        }
    )
    matrix = cross_trait_matrix(frame, outcomes=("risk",), resamples=10)
    with pytest.raises(ValueError, match="at least two traits"):
        trait_structure(matrix)
