"""Dense baselines: vectors built from labelled activations without a dictionary."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steering_plugin.directions.heldout import projection_scores
from sae_steering_plugin.directions.recipe import (
    pair_rows,
    recipe_of,
    require_balanced_letters,
    require_choice,
    require_two_sides,
)
from sae_steering_plugin.types import SMALLEST_NORM, Labelled, SteeringVector


def diff_mean_vector(
    labelled: Labelled, *, positive: str = "", label: str = "", seed: int = 0
) -> SteeringVector:
    """Mean of the positive rows minus mean of the negative rows; pairs are not needed.

    Strength 1.0 (raw) moves the residual by the distance between the class means. `seed` draws the
    folds of the held-out figures and nothing else. Source: AxBench (arXiv 2501.17148), DiffMean.
    """
    require_two_sides(labelled)
    return _built(
        labelled,
        class_difference,
        method="diff_mean",
        positive=positive,
        label=label,
        seed=seed,
        source="arXiv 2501.17148",
    )


def caa_vector(
    labelled: Labelled,
    *,
    positive: str = "",
    label: str = "",
    seed: int = 0,
    allow_unbalanced_letters: bool = False,
) -> SteeringVector:
    """Mean over pairs of (positive - negative), each read at its answer letter or last token.

    Raises ValueError for rows that do not pair up, and for letter sets where one letter is the
    matching answer in less than 40 % or more than 60 % of the pairs. Equals `diff_mean_vector` on
    the same rows. Source: CAA (arXiv 2312.06681), section 3.
    """
    require_two_sides(labelled)
    balance = require_balanced_letters(labelled, allow=allow_unbalanced_letters)
    pair_rows(labelled)
    return _built(
        labelled,
        paired_difference,
        method="caa",
        positive=positive,
        label=label,
        seed=seed,
        settings={"letter_balance": balance},
        source="arXiv 2312.06681",
    )


def pca_vector(
    labelled: Labelled,
    *,
    centre: Literal["pair", "mean"] | None = None,
    positive: str = "",
    label: str = "",
    seed: int = 0,
) -> SteeringVector:
    """First principal component of centred activations, turned so that positive rows score higher.

    `centre="pair"` (the default where rows pair up) subtracts each pair's midpoint, so the
    component is that of the pair differences in both orders: LAT with its random pair order
    averaged out. `centre="mean"` (the default otherwise) subtracts the midpoint of the class means.
    The vector's length is the distance between the class means along the component, so strength 1.0
    (raw) means the same displacement as `diff_mean_vector` would make in that direction. Warns when
    the component does not separate the labels at all. Source: representation engineering (arXiv
    2310.01405), LAT.
    """
    require_two_sides(labelled)
    if centre is not None:
        require_choice("centre", centre, ("pair", "mean"))
    else:
        centre = "pair" if bool((labelled.pairs >= 0).all()) else "mean"
    if centre == "pair":
        pair_rows(labelled)
    component = pair_component if centre == "pair" else mean_component
    direction, share = component(labelled)
    return _built(
        labelled,
        lambda rows: oriented(component(rows)[0], rows),
        method="pca",
        positive=positive,
        label=label,
        seed=seed,
        settings={"centre": centre, "explained_variance": share},
        source="arXiv 2310.01405",
        whole=oriented(direction, labelled),
    )


def class_difference(labelled: Labelled) -> Float[Tensor, " d_model"]:
    """Mean of the positive rows minus mean of the negative rows, in float32."""
    return (labelled.positive.double().mean(0) - labelled.negative.double().mean(0)).float()


def paired_difference(labelled: Labelled) -> Float[Tensor, " d_model"]:
    """Mean over pairs of positive minus negative, in float32."""
    positive, negative = pair_rows(labelled)
    rows = labelled.activations.double()
    return (rows[positive] - rows[negative]).mean(0).float()


def pair_component(labelled: Labelled) -> tuple[Float[Tensor, " d_model"], float]:
    """First principal component of the pairs about their midpoints, and its share of the
    variance."""
    positive, negative = pair_rows(labelled)
    rows = labelled.activations.double()
    return first_component((rows[positive] - rows[negative]) / 2)


def mean_component(labelled: Labelled) -> tuple[Float[Tensor, " d_model"], float]:
    """First principal component about the midpoint of the class means, and its share."""
    middle = (labelled.positive.double().mean(0) + labelled.negative.double().mean(0)) / 2
    return first_component(labelled.activations.double() - middle)


def first_component(
    centred: Float[Tensor, "row d_model"],
) -> tuple[Float[Tensor, " d_model"], float]:
    """The unit vector along which rows vary most about zero, and its share of their squares.

    Its sign is arbitrary. Zero rows give a zero vector and share 0.
    """
    total = float(centred.square().sum())
    if total == 0:
        return centred.new_zeros(centred.shape[1]).float(), 0.0
    _, spread, axes = torch.linalg.svd(centred, full_matrices=False)
    return axes[0].float(), float(spread[0] ** 2) / total


def oriented(direction: Float[Tensor, " d_model"], labelled: Labelled) -> Float[Tensor, " d_model"]:
    """`direction` times the signed distance of the class means along it."""
    return direction * (class_difference(labelled) @ direction)


def rows_of(labelled: Labelled, rows: Tensor) -> Labelled:
    """The chosen examples as a `Labelled` of their own."""
    chosen = rows.tolist()
    return replace(
        labelled,
        activations=labelled.activations[rows],
        labels=labelled.labels[rows],
        pairs=labelled.pairs[rows],
        groups=tuple(labelled.groups[i] for i in chosen),
        texts=tuple(labelled.texts[i] for i in chosen),
        letters=tuple(labelled.letters[i] for i in chosen) if labelled.letters else (),
    )


def _built(
    labelled: Labelled,
    build: Callable[[Labelled], Tensor],
    *,
    method: str,
    positive: str,
    label: str,
    seed: int,
    source: str,
    settings: dict[str, Any] | None = None,
    whole: Tensor | None = None,
) -> SteeringVector:
    """`build` on all rows as a vector, scored by what it builds on each training fold."""

    def score(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
        vector = build(rows_of(labelled, train))
        return labelled.activations[train].float() @ vector, labelled.activations[
            test
        ].float() @ vector

    vector = build(labelled) if whole is None else whole
    if float(vector.norm()) <= SMALLEST_NORM:
        warnings.warn(
            f"the {method} vector has length {float(vector.norm()):.1e}: it does not separate the "
            "labels, and steering with it does nothing",
            stacklevel=3,
        )
    return SteeringVector(
        vector=vector,
        hook_name=labelled.hook_name,
        recipe=recipe_of(
            labelled,
            method,
            positive=positive,
            seed=seed,
            settings=settings,
            scores=projection_scores(labelled, score, seed=seed),
            source=source,
        ),
        label=label or method,
    )
