"""Collateral spread: how many watched features of a downstream dictionary move, and how far.

Per context the change of the watched features' codes, `G[j] = steered - clean`, is reduced to a
few numbers at once; a direction's spread is their mean over contexts. Source: arXiv 2606.08365,
section "labels"; `ex_self` is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

TAUS = (0.05, 0.01, 0.10)
"""A feature moved when its code changed by more than this; the first is the paper's target."""

EPSILON = 1e-8
"""Added to the effect before dividing by it (arXiv 2606.08365)."""


def spread_columns(taus: Sequence[float] = TAUS) -> tuple[str, ...]:
    """Names of the numbers `spread` gives, in its order."""
    return (
        *(f"count_{tau:g}" for tau in taus),
        "count_ex_self",
        "moved_l1",
        "moved_l2",
        "moved_linf",
        "effective_moved",
    )


def spread(
    change: Float[Tensor, "row watched"],
    own: Int[Tensor, " row"],
    *,
    taus: Sequence[float] = TAUS,
) -> Float[Tensor, "row column"]:
    """What moved in each row, columns as `spread_columns` names them, float64.

    count_tau        #{j : |G_j| > tau}
    count_ex_self    count at the first tau without feature `own[row]` of the watched ones (the
                     direction's own continuation; -1 when it is not watched)
    moved_l1/l2/linf norms of G
    effective_moved  exp(H(|G| / sum |G|)): 0 when nothing moved, 1 for one feature

    Raises ValueError without a tau or for one below 0.
    """
    if not taus or min(taus) < 0:
        raise ValueError(f"taus are {tuple(taus)}: at least one, none below 0")
    size = change.abs()
    counts = [(size > tau).sum(dim=1).double() for tau in taus]
    row = torch.arange(len(size), device=size.device)
    itself = (size[row, own.clamp_min(0)] > taus[0]) & (own >= 0)
    wide = size.double()
    total = wide.sum(dim=1)
    share = wide / total.clamp_min(1e-300)[:, None]
    entropy = -torch.special.xlogy(share, share).sum(dim=1)
    columns = [
        *counts,
        counts[0] - itself.double(),
        total,
        wide.square().sum(dim=1).sqrt(),
        wide.amax(dim=1),
        torch.where(total > 0, entropy.exp(), 0.0),
    ]
    return torch.stack(columns, dim=1)


def per_effect(value: float, effect: float) -> float:
    """A spread per unit of effect: `value / (effect + 1e-8)`."""
    return value / (effect + EPSILON)


def own_continuation(
    directions: Float[Tensor, "direction d_model"], rows: Float[Tensor, "watched d_read"]
) -> Int[Tensor, " direction"]:
    """The watched row with the largest |cosine| to each direction (rows of zero length: cosine 0).

    Raises ValueError when the two have different widths: the dictionaries then live in different
    spaces and no row continues another.
    """
    if directions.shape[1] != rows.shape[1]:
        raise ValueError(
            f"directions have {directions.shape[1]} entries and the downstream rows "
            f"{rows.shape[1]}: they cannot be compared"
        )
    unit = torch.nn.functional.normalize(rows.float(), dim=1)
    return (directions.float() @ unit.T).abs().argmax(dim=1)


__all__ = ["EPSILON", "TAUS", "own_continuation", "per_effect", "spread", "spread_columns"]
