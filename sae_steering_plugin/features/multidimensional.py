"""Features of more than one dimension: groups of latents that span a plane with a shape in it.

A circle (days, months) needs two dimensions at once. A group of decoder rows is looked at through
what it alone reconstructs, in pairs of principal components: a pair is irreducible when its two
coordinates tell of each other however it is turned (separability) and no line holds a large part of
the points (mixture). Source: Engels et al., arXiv 2405.14860, and its code; the mixture index is
found on a grid of angles and offsets here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

BINS, REACH = 20, 2.5
"""The histogram of a pair: bins per axis, from -REACH to REACH root mean square lengths."""
TURNS = 100
"""Angles that separability is the least over."""
LINE_TURNS, LINE_OFFSETS, LINE_WIDTH = 180, 201, 0.1
"""The grid of lines for the mixture index, and epsilon of the paper."""
COMPONENTS = 5
"""Principal components of a group that are paired (arXiv 2405.14860)."""
NEIGHBOURS, LEAST_COSINE = 2, 0.5
"""The graph of variant 1: an edge from each row to so many nearest ones above this cosine."""


def neighbour_groups(
    rows: Float[Tensor, "latent d_model"],
    *,
    neighbours: int = NEIGHBOURS,
    least: float = LEAST_COSINE,
) -> list[tuple[int, ...]]:
    """Connected components of the graph of nearest decoder rows with at least two latents, largest
    first.

    A row has an edge to each of its `neighbours` nearest rows whose cosine exceeds `least`.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    unit = torch.nn.functional.normalize(rows.detach().float(), dim=1)
    sources, targets = [], []
    for first in range(0, len(unit), 1024):
        cosines = unit[first : first + 1024] @ unit.T
        own = torch.arange(len(cosines))
        cosines[own, first + own] = -1.0
        best = cosines.topk(min(neighbours, len(unit) - 1), dim=1)
        row, column = (best.values > least).nonzero(as_tuple=True)
        sources.append(row + first)
        targets.append(best.indices[row, column])
    edges = (torch.cat(sources).numpy(), torch.cat(targets).numpy())
    graph = coo_array((torch.ones(len(edges[0])).numpy(), edges), shape=(len(unit),) * 2)
    return _groups(connected_components(graph, directed=False)[1].tolist())


def spectral_groups(
    rows: Float[Tensor, "latent d_model"], n: int, *, seed: int = 0
) -> list[tuple[int, ...]]:
    """`n` groups by spectral clustering of decoder rows, those of two latents or more, largest
    first.

    The similarity is 1 - arccos(cos) / pi. Cost grows with the cube of the latents: for small
    dictionaries. Raises ValueError when `n` is not between 2 and the number of rows less one.
    """
    from sklearn.cluster import SpectralClustering

    if not 2 <= n < len(rows):
        raise ValueError(f"{n} groups cannot be made of {len(rows)} rows")
    unit = torch.nn.functional.normalize(rows.detach().double(), dim=1)
    near = 1 - (unit @ unit.T).clamp(-1, 1).arccos() / math.pi
    found = SpectralClustering(n, affinity="precomputed", random_state=seed)
    return _groups(found.fit_predict(near.numpy()).tolist())


def _groups(labels: Sequence[int]) -> list[tuple[int, ...]]:
    held: dict[int, list[int]] = {}
    for latent, label in enumerate(labels):
        held.setdefault(label, []).append(latent)
    groups = [tuple(group) for group in held.values() if len(group) > 1]
    return sorted(groups, key=lambda group: (-len(group), group))


def _scaled(points: Float[Tensor, "point 2"]) -> Float[Tensor, "point 2"]:
    """Centred, with a root mean square length of 1."""
    centred = points.double() - points.double().mean(0)
    return centred / centred.square().sum(1).mean().sqrt().clamp_min(1e-300)


def separability(points: Float[Tensor, "point 2"]) -> float:
    """Least mutual information, in nats, of the two coordinates over all ways to turn the pair.

    Zero for what is a product in some pair of axes (independent features, a Gaussian). From 2-D
    histograms, less their expected excess (bins - 1)^2 / (2 n), never below 0; NaN for fewer than
    `BINS`^2 points, where that correction means nothing.
    """
    if len(points) < BINS**2:
        return float("nan")
    scaled = _scaled(points)
    least = math.inf
    for turn in range(TURNS):
        angle = math.pi * turn / TURNS
        c, s = math.cos(angle), math.sin(angle)
        turned = scaled @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        place = ((turned + REACH) / (2 * REACH) * BINS).floor().long().clamp(0, BINS - 1)
        counts = torch.bincount(place[:, 0] * BINS + place[:, 1], minlength=BINS**2)
        p = counts.double().reshape(BINS, BINS) / len(points)
        alone = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
        least = min(least, float(torch.special.xlogy(p, p / alone).nansum()))
    return max(0.0, least - (BINS - 1) ** 2 / (2 * len(points)))


def mixture(points: Float[Tensor, "point 2"]) -> float:
    """Largest share of points within `LINE_WIDTH` of one line, in units of all points' root mean
    square distance from that line.

    Large when the points are a mixture of features of one dimension, of which one acts at a time.
    """
    scaled = _scaled(points)
    offsets = torch.linspace(-REACH, REACH, LINE_OFFSETS, dtype=torch.float64)
    most = 0.0
    for turn in range(LINE_TURNS):
        angle = math.pi * turn / LINE_TURNS
        along = scaled @ torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        ordered = along.sort().values
        # RMS of (v.x + c) is sqrt(var + c^2), because v.x is centred
        reach = LINE_WIDTH * (along.square().mean() + offsets.square()).sqrt()
        last = torch.searchsorted(ordered, offsets + reach, right=True)
        first = torch.searchsorted(ordered, offsets - reach)
        most = max(most, float((last - first).max()) / len(points))
    return most


@dataclass(frozen=True)
class GroupShape:
    """How irreducible a group of latents is: means over pairs of neighbouring components.

    `score` is the mean of (1 - mixture) * separability. `variance` is each component's share of the
    variance of what the group reconstructs. `points` is the number of tokens it acts at.
    """

    latents: tuple[int, ...]
    points: int
    separability: float
    mixture: float
    score: float
    variance: tuple[float, ...]


def group_shape(
    latents: Sequence[int],
    codes: Float[Tensor, "token member"],
    rows: Float[Tensor, "member d_model"],
    *,
    components: int = COMPONENTS,
) -> GroupShape:
    """The shape of what a group alone reconstructs, where one of its latents acts.

    `codes` are the group's at every token, `rows` its decoder rows. Scores are NaN when it acts at
    fewer than `BINS`^2 tokens or spans one dimension.
    """
    acting = codes[(codes != 0).any(dim=1)].double()
    if len(acting) < BINS**2:
        return _shapeless(latents, len(acting), ())
    made = acting @ rows.double()
    made = made - made.mean(0)
    _, sizes, right = torch.linalg.svd(made, full_matrices=False)
    kept = min(components, int((sizes > 1e-6 * sizes[0]).sum()))
    share = tuple(float(part) for part in sizes[:kept].square() / sizes.square().sum())
    if kept < 2:
        return _shapeless(latents, len(acting), share)
    turned = made @ right[:kept].T
    pairs = [turned[:, i : i + 2] for i in range(kept - 1)]
    s, m = [separability(pair) for pair in pairs], [mixture(pair) for pair in pairs]
    both = [(1 - one) * other for one, other in zip(m, s, strict=True)]
    means = [sum(values) / len(values) for values in (s, m, both)]
    return GroupShape(tuple(latents), len(acting), means[0], means[1], means[2], share)


def _shapeless(latents: Sequence[int], points: int, share: tuple[float, ...]) -> GroupShape:
    nan = float("nan")
    return GroupShape(tuple(latents), points, nan, nan, nan, share)
