"""Held-out figures of a probe, beside words alone, raw activations and permuted labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steering_plugin.directions.fits import Inputs, Probe, deviations
from sae_steering_plugin.directions.heldout import (
    Fold,
    auroc,
    grouped_folds,
    mean_defined,
    r2,
    sample_folds,
)
from sae_steering_plugin.types import Labelled

Design = Callable[[Tensor], Inputs]
"""What a probe reads, given the rows that standardisation may look at."""


@dataclass(frozen=True, eq=False)
class Figures:
    """Held-out figures of one probe on one kind of input: means over folds, undefined ones left
    out.

    `folds` lists R2 per fold (NaN where a test fold holds one label). `permuted_r2` is the mean R2
    over label permutations in the same folds with the same penalties; NaN when none was asked for.
    """

    r2: float
    accuracy: float
    auroc: float
    permuted_r2: float
    folds: tuple[float, ...]
    strengths: tuple[float, ...]


def chosen_strength(
    design: Design,
    labels: Int[Tensor, " example"],
    groups: Sequence[str],
    rows: Tensor,
    probe: Probe,
    strengths: Sequence[float],
    *,
    center: bool,
    seed: int,
    n_folds: int = 3,
) -> float:
    """The penalty with the best mean R2 on folds inside `rows`, grouped; the largest among equals.

    With fewer than two groups in `rows` nothing can be held out: the middle of `strengths`.
    """
    inside = [groups[int(i)] for i in rows]
    if len(strengths) == 1 or not probe.penalised:
        return strengths[0]
    if len(set(inside)) < 2:
        return sorted(strengths)[len(strengths) // 2]
    Y = labels.double()[:, None]
    results: dict[float, list[float]] = {a: [] for a in strengths}
    for train, test in grouped_folds(labels[rows], inside, n_folds=n_folds, seed=seed):
        fit, held = rows[train], rows[test]
        if len(labels[fit].unique()) < 2:
            continue
        inputs = design(fit)
        for a in strengths:
            guess = probe.predictions(inputs, Y, fit, held, a, center=center)[:, 0]
            results[a].append(r2(Y[held, 0], guess))
    score = {a: mean_defined(values) for a, values in results.items()}
    defined = [a for a in strengths if score[a] == score[a]]
    if not defined:
        return sorted(strengths)[len(strengths) // 2]
    return max(sorted(defined, reverse=True), key=lambda a: score[a])


def held_out_figures(
    design: Design,
    labels: Int[Tensor, " example"],
    groups: Sequence[str],
    folds: Sequence[Fold],
    probe: Probe,
    strengths: Sequence[float],
    *,
    center: bool,
    seed: int,
    permutations: int = 0,
) -> Figures:
    """Figures over `folds`; each fold's penalty is chosen inside its training rows only."""
    generator = torch.Generator().manual_seed(seed)
    n = len(labels)
    shuffles = [labels[torch.randperm(n, generator=generator)] for _ in range(permutations)]
    Y = torch.stack([labels, *shuffles], dim=1).double()
    scores: list[float] = []
    shares: list[float] = []
    areas: list[float] = []
    permuted: list[float] = []
    chosen: list[float] = []
    for train, test in folds:
        if len(labels[train].unique()) < 2:
            scores.append(float("nan"))
            continue
        a = chosen_strength(
            design, labels, groups, train, probe, strengths, center=center, seed=seed
        )
        guess = probe.predictions(design(train), Y, train, test, a, center=center)
        chosen.append(a)
        scores.append(r2(Y[test, 0], guess[:, 0]))
        areas.append(auroc(guess[:, 0], labels[test]))
        shares.append(float(((guess[:, 0] > 0.5) == (labels[test] == 1)).double().mean()))
        permuted += [r2(Y[test, c], guess[:, c]) for c in range(1, Y.shape[1])]
    return Figures(
        r2=mean_defined(scores),
        accuracy=mean_defined(shares),
        auroc=mean_defined(areas),
        permuted_r2=mean_defined(permuted),
        folds=tuple(scores),
        strengths=tuple(chosen),
    )


def design_of(X: Float[Tensor, "example feature"], *, standardize: bool) -> Design:
    """The rows of `X` as probes read them, each feature over its training deviation if asked
    for."""
    whole = Inputs.of(X)
    if not standardize:
        return lambda _: whole
    return lambda rows: whole.over(deviations(whole.X[rows]))


def word_table(texts: Sequence[str]) -> Float[Tensor, "example word"]:
    """Which word stands in which text (0 or 1), lower case: the input of the text-only baseline."""
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    column = {word: i for i, word in enumerate(sorted(set().union(*words)))}
    table = torch.zeros(len(texts), len(column))
    for row, found in enumerate(words):
        table[row, [column[word] for word in found]] = 1.0
    return table


def comparison(
    labelled: Labelled,
    design: Design,
    probe: Probe,
    strengths: Sequence[float],
    *,
    center: bool,
    standardize: bool,
    n_folds: int,
    permutations: int,
    seed: int,
) -> dict[str, Any]:
    """Held-out figures of codes, words and raw activations, by group and (codes, words) by
    sample."""
    labels, groups = labelled.labels, labelled.groups
    by_group = grouped_folds(labels, groups, n_folds=n_folds, seed=seed)
    by_sample = sample_folds(len(labelled), n_folds=n_folds, seed=seed)
    alone = [f"row {i}" for i in range(len(labelled))]
    figures = partial(
        held_out_figures, labels=labels, probe=probe, strengths=strengths, center=center, seed=seed
    )
    out: dict[str, Any] = {}
    words = (
        design_of(word_table(labelled.texts), standardize=False) if any(labelled.texts) else None
    )
    raw = design_of(labelled.activations, standardize=standardize)
    for prefix, of_input, count in (
        ("", design, permutations),
        ("text_", words, 0),
        ("raw_", raw, 0),
    ):
        if of_input is None:
            continue
        found = figures(of_input, groups=groups, folds=by_group, permutations=count)
        out |= {
            f"{prefix}r2": found.r2,
            f"{prefix}accuracy": found.accuracy,
            f"{prefix}auroc": found.auroc,
        }
        if not prefix:
            out |= {"permuted_r2": found.permuted_r2, "r2_folds": list(found.folds)}
        if prefix != "raw_":
            out[f"{prefix}sample_r2"] = figures(of_input, groups=alone, folds=by_sample).r2
    return out
