"""Recipes of vectors built from labelled examples, and the checks all constructions share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_steering_plugin.types import Labelled, Recipe

LETTER_SLACK = 0.2
"""Largest difference between the sides in one answer letter's share; 40 to 60 % for pairs of two
letters."""


def recipe_of(
    labelled: Labelled,
    method: str,
    *,
    positive: str,
    seed: int | None = None,
    sae_id: str = "",
    settings: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    source: str = "",
    mean_norm: float | None = None,
) -> Recipe:
    """The recipe of a vector built from `labelled`; `mean_norm` overrides the one measured
    there."""
    measured = labelled.mean_norm if mean_norm is None else mean_norm
    return Recipe(
        method=method,
        positive=positive or f"moves towards label 1 of {labelled.name or 'the examples'}",
        model_name=labelled.model_name,
        sae_id=sae_id,
        n=len(labelled),
        seed=seed,
        mean_norm=measured if math.isfinite(measured) and measured > 0 else None,
        settings={
            "groups": len(set(labelled.groups)),
            "positive_rows": int((labelled.labels == 1).sum()),
            **(settings or {}),
        },
        scores=without_nan(scores or {}),
        source=source,
    )


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same figures with None for what is undefined, so that they survive strict JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return without_nan(value)
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: plain(value) for key, value in values.items()}


def require_choice(name: str, given: str, known: Sequence[str]) -> None:
    """Raise ValueError, listing the known words, when option `name` was given another."""
    if given not in known:
        raise ValueError(f"{name} is {given!r}; choose one of {', '.join(known)}")


def require_two_sides(labelled: Labelled) -> None:
    """Raise ValueError unless every label is 0 or 1, both occur, and pairs lie within groups."""
    kinds = sorted(int(label) for label in labelled.labels.unique())
    if kinds != [0, 1]:
        raise ValueError(
            f"{labelled.name or 'the examples'} have labels {kinds}: a direction needs rows of "
            "label 1 and rows of label 0"
        )
    require_pairs_within_groups(labelled)


def require_pairs_within_groups(labelled: Labelled) -> None:
    """Raise ValueError when a pair spans two groups: a held-out split would part it."""
    group_of: dict[int, str] = {}
    for number, group in zip(labelled.pairs.tolist(), labelled.groups, strict=True):
        if number >= 0 and group_of.setdefault(number, group) != group:
            raise ValueError(
                f"pair {number} has rows in the groups {group_of[number]!r} and {group!r}: name "
                "one group per pair"
            )


def pair_rows(labelled: Labelled) -> tuple[Tensor, Tensor]:
    """Row numbers of the positive and the negative member of each pair, in the same order.

    Raises ValueError when a row belongs to no pair or a pair is not one positive and one negative.
    """
    if (labelled.pairs < 0).any():
        raise ValueError(
            f"row {int((labelled.pairs < 0).nonzero()[0])} belongs to no pair: use "
            "diff_mean_vector for examples that do not pair up"
        )
    sides = []
    for label in (1, 0):
        rows = (labelled.labels == label).nonzero().flatten()
        numbers, order = labelled.pairs[rows].sort()
        if len(numbers.unique()) != len(numbers):
            doubled = int(numbers[:-1][numbers[1:] == numbers[:-1]][0])
            raise ValueError(f"pair {doubled} has two rows of label {label}")
        sides.append((numbers, rows[order]))
    (first, positive), (second, negative) = sides
    if not torch.equal(first, second):
        lonely = sorted(set(first.tolist()) ^ set(second.tolist()))[0]
        raise ValueError(f"pair {lonely} lacks its positive or its negative row")
    return positive, negative


def letter_balance(labelled: Labelled) -> float | None:
    """Share of the positive rows whose answer letter is the set's first; None without letters."""
    if not labelled.letters:
        return None
    first = min(set(labelled.letters))
    positive = [
        letter
        for letter, label in zip(labelled.letters, labelled.labels, strict=True)
        if label == 1
    ]
    return sum(letter == first for letter in positive) / len(positive)


def require_balanced_letters(labelled: Labelled, *, allow: bool) -> float | None:
    """The letter balance. Raises ValueError when a letter marks one side, unless `allow`.

    A letter whose share differs between the sides by more than `LETTER_SLACK` enters the vector
    with full weight; for pairs that answer with opposite letters this is a share outside 40 to 60 %
    (arXiv 2312.06681 balances the option order for this reason).
    """
    balance = letter_balance(labelled)
    if balance is None or allow:
        return balance
    sides = [
        [letter for letter, y in zip(labelled.letters, labelled.labels, strict=True) if y == side]
        for side in (1, 0)
    ]
    for letter in sorted(set(labelled.letters)):
        positive, negative = (side.count(letter) / len(side) for side in sides)
        if abs(positive - negative) > LETTER_SLACK + 1e-9:
            raise ValueError(
                f"{positive:.0%} of the positive rows answer {letter!r} and {negative:.0%} of the "
                "negative rows: the vector would hold the letter. Swap the options in half of the "
                "pairs, or pass allow_unbalanced_letters=True"
            )
    return balance
