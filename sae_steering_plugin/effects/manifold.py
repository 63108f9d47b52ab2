"""How far steered activations and behaviour stray from what the model does unsteered."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def nearest_distances(
    x: Float[Tensor, "point d"], others: Float[Tensor, "other d"]
) -> Float[Tensor, " point"]:
    """Euclidean distance of each point to the nearest of the others."""
    return torch.cdist(x.double(), others.double()).amin(dim=1)


def off_manifold_ratio(
    x: Float[Tensor, "point d_model"],
    natural: Float[Tensor, "natural d_model"],
    held_out: Float[Tensor, "held_out d_model"],
) -> Float[Tensor, " point"]:
    """Distance to the nearest natural activation, in units of its median over natural points that
    were held out.

    1 is as far as an unsteered activation usually lies from others. Raises ValueError when held-out
    points coincide with natural ones, so that the unit is 0. Source: this project
    (shared/methods/neighbouring_systems d.3).
    """
    unit = nearest_distances(held_out, natural).median()
    if not float(unit) > 0:
        raise ValueError("half of the held-out points are natural points themselves: no unit")
    return nearest_distances(x, natural) / unit


def hellinger_distances(
    p: Float[Tensor, "point outcome"], curve: Float[Tensor, "step outcome"]
) -> Float[Tensor, " point"]:
    """Hellinger distance of each distribution to the nearest of a set of them.

    sqrt(1 - sum_i sqrt(p_i q_i)), between 0 and 1; what a row lacks of 1 is an outcome of its own,
    "anything else". arXiv 2605.05115 measures behaviour in this geometry.
    """
    roots = [_whole(one).sqrt() for one in (p, curve)]
    return (1 - (roots[0] @ roots[1].T).amax(dim=1)).clamp_min(0).sqrt()


def _whole(p: Float[Tensor, "row outcome"]) -> Float[Tensor, "row whole"]:
    wide = p.double()
    return torch.cat([wide, (1 - wide.sum(1, keepdim=True)).clamp_min(0)], dim=1)
