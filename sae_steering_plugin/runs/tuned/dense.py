"""Directions read off token states without a dictionary: DiffMean, PCA, LAT, and the linear probe.

AxBench's definitions: every token behind the chat prefix is an example with its text's label,
directions have unit length, a token's score is its projection, and steering adds the direction at
every position. The signs of PCA and LAT are arbitrary there; `oriented` turns them (not AxBench).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...adapters.activations import model_name
from ...directions.dense import first_component
from ...directions.lat import lat_direction
from ...edits.shift import Add
from ...types import SMALLEST_NORM, Edit, Positions, Recipe, SteeringVector
from ..subject import Subject
from .descent import Schedule, descend, summary
from .records import ConceptData, Fitted
from .texts import TokenStates, about_texts, as_rows, token_states

EVERYWHERE = Positions(bos=True)
"""AxBench steers every position, the BOS and the chat prefix included."""
SOURCE = "arXiv 2501.17148"


@dataclass(frozen=True)
class Component:
    """Settings of PCA and LAT."""

    oriented: bool = False


@dataclass(frozen=True)
class ProbeSettings:
    """AxBench's values for 2B; `schedule.weight_decay` is its L2 coefficient."""

    schedule: Schedule = Schedule(12, 4, 24, 0.005, 0.001)


def added(
    method: str,
    subject: Subject,
    data: ConceptData,
    direction: Float[Tensor, " d_model"],
    *,
    seed: int,
    settings: Mapping[str, Any],
    mean_norm: float | None,
    scores: Mapping[str, Any] | None = None,
    rectified: bool = False,
    keep_length: bool = False,
) -> Fitted:
    """A direction that is added at every position and detects by projection.

    `rectified` cuts negative projections to 0; `keep_length` leaves out the unit norm. Raises
    LookupError for a direction without a length.
    """
    length = float(direction.norm())
    if length <= SMALLEST_NORM:
        raise LookupError(f"{method} finds no direction for {data.concept!r}: its length is 0")
    w = (direction if keep_length else direction / length).detach().float().cpu()
    recipe = Recipe(
        method=method,
        positive=f"more of {data.concept!r}",
        model_name=model_name(subject.model),
        n=len(data.positives) + len(data.negatives),
        seed=seed,
        mean_norm=mean_norm,
        settings={**about_texts(data), **settings, "raw_norm": length},
        scores=dict(scores or {}),
        source=SOURCE,
    )
    vector = SteeringVector(w, data.site(subject), recipe, label=f"{method}: {data.concept}")

    def steering(amounts: Tensor) -> tuple[Edit, ...]:
        return (Edit(Add(vector, amounts), positions=EVERYWHERE),)

    def detection(residual: Tensor) -> Tensor:
        found = residual @ w.to(residual.device)
        return found.relu() if rectified else found

    return Fitted(method, data.concept, vector, steering, detection)


def diff_mean(subject: Subject, data: ConceptData, settings: None, seed: int) -> Fitted:
    """w = mean(H+) - mean(H-) over tokens, unit norm."""
    del settings
    states = token_states(subject, data, "positives", "negatives")
    gap = mean_gap(states)
    return added(
        "diff_mean", subject, data, gap, seed=seed, settings={}, mean_norm=states.mean_norm
    )


def mean_gap(states: TokenStates) -> Float[Tensor, " d_model"]:
    return as_rows(states.positive).mean(0) - as_rows(states.negative).mean(0)


def pca(subject: Subject, data: ConceptData, settings: Component, seed: int) -> Fitted:
    """The first principal component of the positive texts' tokens about their mean."""
    states = token_states(subject, data, *sides(settings))
    rows = as_rows(states.positive)
    direction, share = first_component(rows - rows.mean(0))
    return of_component("pca", subject, data, states, direction, share, settings, seed)


def lat(subject: Subject, data: ConceptData, settings: Component, seed: int) -> Fitted:
    """LAT of the positive texts' tokens, as AxBench's code has it (its text says all texts)."""
    states = token_states(subject, data, *sides(settings))
    generator = torch.Generator().manual_seed(seed)
    direction, share = lat_direction(as_rows(states.positive), generator=generator)
    return of_component("lat", subject, data, states, direction, share, settings, seed)


def sides(settings: Component) -> tuple[str, ...]:
    return ("positives", "negatives") if settings.oriented else ("positives",)


def of_component(
    method: str,
    subject: Subject,
    data: ConceptData,
    states: TokenStates,
    direction: Tensor,
    share: float,
    settings: Component,
    seed: int,
) -> Fitted:
    if settings.oriented and float(mean_gap(states) @ direction.double()) < 0:
        direction = -direction
    about = {**asdict(settings), "explained_variance": share}
    return added(
        method, subject, data, direction, seed=seed, settings=about, mean_norm=states.mean_norm
    )


def probe(subject: Subject, data: ConceptData, settings: ProbeSettings, seed: int) -> Fitted:
    """Cross-entropy of token labels under sigma(h w), no bias, w of unit norm after every step."""
    states = token_states(subject, data, "positives", "negatives")
    texts = [*states.positive, *states.negative]
    labels = [1.0] * len(states.positive) + [0.0] * len(states.negative)
    generator = torch.Generator().manual_seed(seed)
    w = unit_start(texts[0].shape[1], generator).requires_grad_()

    def loss_of(rows: list[int], progress: float) -> Tensor:
        del progress
        h = torch.cat([texts[i] for i in rows])
        truth = torch.cat([torch.full((len(texts[i]),), labels[i]) for i in rows])
        return torch.nn.functional.binary_cross_entropy_with_logits(h @ w, truth)

    losses = descend(
        [w], len(texts), loss_of, settings.schedule, generator, unit_rows=True, desc="probe"
    )
    about = {**asdict(settings), "loss": summary(losses)}
    return added(
        "probe", subject, data, w.detach(), seed=seed, settings=about, mean_norm=states.mean_norm
    )


def unit_start(width: int, generator: torch.Generator) -> Float[Tensor, " d_model"]:
    """A random unit vector."""
    drawn = torch.randn(width, generator=generator)
    return drawn / drawn.norm()
