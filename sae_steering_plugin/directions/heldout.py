"""Held-out folds by template group, and the figures that are reported on them.

Members of one group (a template, a pair, a repeated text) never stand on both sides of a split:
with a split over samples, wording alone predicts the label (arXiv 2603.16335 data: bag-of-words R2
of 0.91 to 0.99 by sample against 0.50 to 0.69 by template).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steering_plugin.types import Labelled

Fold = tuple[Tensor, Tensor]
"""Row numbers to fit on and row numbers to report on."""


def grouped_folds(
    labels: Int[Tensor, " example"], groups: Sequence[str], *, n_folds: int = 5, seed: int = 0
) -> list[Fold]:
    """Folds that keep groups whole and spread both labels, at most one fold per group.

    Groups are placed in random order, largest first, each into the fold that holds fewest of its
    label. Raises ValueError when there are fewer than two groups.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    if len(members) < 2:
        raise ValueError(
            "all examples belong to one group, so nothing can be held out: name the template "
            "behind each example in groups"
        )
    names = sorted(members)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [names[i] for i in torch.randperm(len(names), generator=generator)]
    shuffled.sort(key=lambda name: -len(members[name]))  # stable: random among equal sizes
    folds: list[list[int]] = [[] for _ in range(min(n_folds, len(names)))]
    held = [[0, 0] for _ in folds]
    for name in shuffled:
        rows = members[name]
        positive = sum(int(labels[row]) for row in rows)
        major = int(2 * positive > len(rows))
        place = min(range(len(folds)), key=lambda i: (held[i][major], sum(held[i]), i))
        folds[place] += rows
        held[place][1] += positive
        held[place][0] += len(rows) - positive
    everything = torch.arange(len(labels))
    out = []
    for rows in folds:
        test = torch.tensor(sorted(rows))
        out.append((everything[~torch.isin(everything, test)], test))
    return out


def sample_folds(n: int, *, n_folds: int = 5, seed: int = 0) -> list[Fold]:
    """Folds over single examples, blind to groups: they show how much a leak would flatter."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    parts = [part for part in order.tensor_split(min(n_folds, n)) if len(part)]
    return [
        (torch.cat(parts[:i] + parts[i + 1 :]).sort()[0], parts[i].sort()[0])
        for i in range(len(parts))
    ]


def r2(truth: Float[Tensor, " item"], guess: Float[Tensor, " item"]) -> float:
    """Share of the variance of `truth` that `guess` explains; NaN when `truth` is constant."""
    spread = (truth - truth.mean()).square().sum()
    if len(truth) == 0 or spread == 0:
        return float("nan")
    return float(1 - (truth - guess).square().sum() / spread)


def auroc(scores: Float[Tensor, " item"], labels: Int[Tensor, " item"]) -> float:
    """Chance that a positive item scores above a negative one, ties half; NaN with one label
    only."""
    from scipy.stats import rankdata

    positive = int((labels == 1).sum())
    negative = len(labels) - positive
    if not positive or not negative:
        return float("nan")
    ranks = torch.as_tensor(rankdata(scores.double().numpy()))
    rank_sum = float(ranks[labels == 1].sum())
    return (rank_sum - positive * (positive + 1) / 2) / (positive * negative)


def mean_defined(values: Sequence[float]) -> float:
    """Mean of the figures that are defined; NaN when none is."""
    kept = [value for value in values if value == value]
    return sum(kept) / len(kept) if kept else float("nan")


def projection_scores(
    labelled: Labelled,
    score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    n_folds: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """Held-out `auroc` and `accuracy` of a direction that is built again on every training fold.

    `score(train, test)` builds on the rows `train` and gives the projections of both. The threshold
    of `accuracy` lies halfway between the class means of the training rows. Both are means over
    folds that hold both labels; NaN without a second group.
    """
    if len(set(labelled.groups)) < 2:
        return {"auroc": float("nan"), "accuracy": float("nan")}
    areas, shares = [], []
    for train, test in grouped_folds(labelled.labels, labelled.groups, n_folds=n_folds, seed=seed):
        seen, y = labelled.labels[train], labelled.labels[test]
        if len(seen.unique()) < 2 or len(y.unique()) < 2:
            continue
        of_train, of_test = score(train, test)
        middle = (of_train[seen == 1].mean() + of_train[seen == 0].mean()) / 2
        areas.append(auroc(of_test, y))
        shares.append(float(((of_test > middle) == (y == 1)).float().mean()))
    return {"auroc": mean_defined(areas), "accuracy": mean_defined(shares)}
