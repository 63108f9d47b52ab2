"""Steering along a curve: a token's coordinates in a small subspace are set to a point of a path
through class centroids, and the part of the activation outside that subspace stays.

    y = (h - mean) P'
    h' = h + (s(t) - y) P               replace
    h' = h + (s(t) - s(t_now)) P        shift, t_now the knot nearest to y

P has orthonormal rows, s is a cubic spline through the centroids in the coordinates of P, closed
for a circular concept. Source: Wurgaft et al., arXiv 2605.05115 (manifold steering); the chord
between two centroids is its linear baseline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Mode = Literal["replace", "shift"]

TURN = 2 * math.pi
LEAST_KNOTS = 4
"""With fewer knots a path is piecewise linear."""


@dataclass(frozen=True, eq=False)
class ConceptPath:
    """A curve through `points` (coordinates in `basis`, knot after knot) at parameters `knots`.

    `basis` has orthonormal rows, coordinates are `(h - mean) @ basis.T`. `order[k]` is the class
    that stands at knot k. `period` closes the curve (2 pi when ordered by angle); None for a line,
    which ends at its first and last knot. `curvature` holds the spline's second derivatives at the
    knots, zero for a piecewise linear path.
    """

    mean: Float[Tensor, " d_model"]
    basis: Float[Tensor, "r d_model"]
    knots: Float[Tensor, " knot"]
    points: Float[Tensor, "knot r"]
    curvature: Float[Tensor, "knot r"]
    order: tuple[int, ...]
    period: float | None = None
    hook_name: str | None = None

    def coordinates(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch r"]:
        """Where activations lie in the path's subspace."""
        return (h - self.mean.to(h)) @ self.basis.T.to(h)

    def at(self, t: float | Tensor) -> Float[Tensor, "*t r"]:
        """Points of the curve in its coordinates. A closed path takes any t, a line only those
        between its ends (ValueError)."""
        wanted = torch.as_tensor(t, dtype=torch.float64)
        first, last = float(self.knots[0]), float(self.knots[-1])
        if not bool(torch.isfinite(wanted).all()):
            raise ValueError("t holds a value that is not finite")
        if self.period is not None:
            wanted = first + (wanted - first).remainder(self.period)
        elif bool(((wanted < first) | (wanted > last)).any()):
            raise ValueError(f"t lies outside the path, which runs from {first:.3f} to {last:.3f}")
        knots, points, bends = self._closed()
        left = (torch.searchsorted(knots, wanted, right=True) - 1).clamp(0, len(knots) - 2)
        step = (knots[left + 1] - knots[left])[..., None]
        b = (wanted - knots[left])[..., None] / step
        a = 1 - b
        bent = (a**3 - a) * bends[left] + (b**3 - b) * bends[left + 1]
        found = a * points[left] + b * points[left + 1] + bent * step**2 / 6
        return found.to(self.points.dtype)

    def _closed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Knots, points and second derivatives in float64; a closed path ends where it began."""
        knots, points, bends = self.knots.double(), self.points.double(), self.curvature.double()
        if self.period is None:
            return knots, points, bends
        end = knots[:1] + self.period
        return tuple(torch.cat([x, y]) for x, y in (  # type: ignore[return-value]
            (knots, end), (points, points[:1]), (bends, bends[:1])
        ))  # fmt: skip

    def knot_of(self, label: int) -> float:
        """The parameter at which a class stands. Raises ValueError for a class it does not hold."""
        if label not in self.order:
            raise ValueError(f"class {label} is not on this path; it holds {sorted(self.order)}")
        return float(self.knots[self.order.index(label)])

    def waypoints(self, start: int, stop: int, n: int) -> Float[Tensor, " n"]:
        """`n` parameters, evenly spaced from class `start` to class `stop`, the shorter way round.

        Ties go forwards. Both ends are among them.
        """
        first, last = self.knot_of(start), self.knot_of(stop)
        way = last - first
        if self.period is not None:
            way = way % self.period
            way = way if way <= self.period / 2 + 1e-9 else way - self.period
        return first + way * torch.linspace(0, 1, n, dtype=torch.float64)

    def chord(self, start: int, stop: int) -> ConceptPath:
        """The straight path between two classes, t from 0 to 1, in the same subspace."""
        rows = [self.order.index(one) for one in (start, stop) if self.knot_of(one) is not None]
        return ConceptPath(
            self.mean, self.basis, torch.tensor([0.0, 1.0], dtype=torch.float64),
            self.points[rows], torch.zeros_like(self.points[rows]), (start, stop), None,
            self.hook_name,
        )  # fmt: skip


def concept_path(
    activations: Float[Tensor, "example d_model"],
    labels: Int[Tensor, " example"],
    *,
    periodic: bool = True,
    order: Sequence[int] | None = None,
    components: int | None = None,
    hook_name: str | None = None,
) -> ConceptPath:
    """The path through the class means of labelled activations.

    The subspace is spanned by the first `components` principal components of the class means (all
    of them when None). Without `order` a closed path places its knots at the angles of the first
    two coordinates, each divided by its deviation, and a line at the first coordinate; with `order`
    knots are evenly spaced. With fewer than four classes the path is piecewise linear. Raises
    ValueError for fewer than two classes (three when periodic), more components than there are,
    two classes at one place, an order that is none, and classes that lie on a surface: a path more
    than twice as long as the shortest tree through them (a dozen classes on a sphere still pass).
    """
    classes = labels.unique().tolist()
    if len(classes) < (3 if periodic else 2):
        raise ValueError(f"{len(classes)} classes make no path: a line needs 2, a circle 3")
    wide = activations.detach().double()
    means = torch.stack([wide[labels == one].mean(0) for one in classes])
    mean = means.mean(0)
    _, sizes, right = torch.linalg.svd(means - mean, full_matrices=False)
    rank = int((sizes > 1e-5 * sizes[0].clamp_min(1e-300)).sum())
    wanted = rank if components is None else components
    if not (2 if periodic else 1) <= wanted <= rank:
        raise ValueError(
            f"{wanted} components cannot be had: {len(classes)} class means span {rank} dimensions"
            f", and a {'circle' if periodic else 'line'} needs {2 if periodic else 1}"
        )
    basis = right[:wanted]
    points = (means - mean) @ basis.T
    places = _places(points, classes, periodic, order)
    ranks = places.argsort()
    knots, points = places[ranks], points[ranks]
    period = TURN if periodic else None
    if bool((steps_behind(knots, period) < 1e-6).any()):
        raise ValueError("two classes lie at one place of the path: give order=")
    _refuse_surface(points, periodic)
    return ConceptPath(
        mean, basis, knots, points, second_derivatives(knots, points, period),
        tuple(classes[i] for i in ranks.tolist()), period, hook_name,
    )  # fmt: skip


def _places(
    points: Float[Tensor, "label r"],
    classes: Sequence[int],
    periodic: bool,
    order: Sequence[int] | None,
) -> Float[Tensor, " label"]:
    """The parameter of each class."""
    if order is not None:
        if sorted(order) != sorted(classes):
            raise ValueError(f"order must hold each class once: {sorted(classes)}")
        step = TURN / len(classes) if periodic else 1.0
        return torch.tensor([order.index(one) * step for one in classes], dtype=torch.float64)
    scaled = points / points.std(dim=0, unbiased=False).clamp_min(1e-300)
    return torch.atan2(scaled[:, 1], scaled[:, 0]) % TURN if periodic else scaled[:, 0]


def _refuse_surface(points: Float[Tensor, "knot r"], periodic: bool) -> None:
    """A way round a tree's edges and back visits all its points: twice the shortest tree is enough
    for a path in a good order."""
    apart = torch.cdist(points, points)
    length = float((points.roll(-1, 0) - points).norm(dim=1)[: None if periodic else -1].sum())
    tree, near = 0.0, apart[0].clone()
    left = set(range(1, len(points)))
    while left:
        nearest = min(left, key=lambda place: float(near[place]))
        tree += float(near[nearest])
        left.discard(nearest)
        near = torch.minimum(near, apart[nearest])
    if length > 2 * tree:
        raise ValueError(
            f"a path through these classes is {length / tree:.1f} times as long as the shortest "
            "tree that joins them: they lie on a surface or in another order, which no path "
            "follows; give order= or fewer classes"
        )


def steps_behind(knots: Float[Tensor, " knot"], period: float | None) -> Float[Tensor, " knot"]:
    """From each knot to the next; behind a line's last one the step is 1, and means nothing."""
    behind = torch.roll(knots, -1) - knots
    behind[-1] = period + knots[0] - knots[-1] if period is not None else 1.0
    return behind


def second_derivatives(
    knots: Float[Tensor, " knot"], points: Float[Tensor, "knot r"], period: float | None
) -> Float[Tensor, "knot r"]:
    """Second derivatives at the knots of the cubic spline through `points`, by one linear solve.

    Row k of the system is  h0 m_(k-1) + 2 (h0 + h1) m_k + h1 m_(k+1) = 6 (slope1 - slope0), with h0
    and h1 the steps before and behind knot k; closed when `period` is given, else natural (m = 0
    at both ends). Zero with fewer than four knots.
    """
    n = len(knots)
    if n < LEAST_KNOTS:
        return torch.zeros_like(points)
    behind = steps_behind(knots, period)
    before = torch.roll(behind, 1)
    slopes = (torch.roll(points, -1, 0) - points) / behind[:, None]
    wanted = 6 * (slopes - torch.roll(slopes, 1, 0))
    rows = torch.arange(n)
    system = torch.zeros(n, n, dtype=knots.dtype)
    system[rows, rows] = 2 * (before + behind)
    system[rows, (rows - 1) % n] += before
    system[rows, (rows + 1) % n] += behind
    if period is None:
        for end in (0, n - 1):
            system[end], wanted[end] = 0.0, 0.0
            system[end, end] = 1.0
    return torch.linalg.solve(system, wanted)


@dataclass(frozen=True, eq=False)
class FollowPath:
    """Set a token's place on a path: its coordinates there become those of the point `t`.

    `t` is one parameter or one per batch row (`path.knot_of(label)`, `path.waypoints(...)`).
    `mode` "replace" puts every token on the curve itself; "shift" moves it by the way from its
    nearest knot to `t` and so keeps its own offset. What lies outside the path's subspace stays.
    """

    path: ConceptPath
    t: float | Tensor
    mode: Mode = "replace"

    def __post_init__(self) -> None:
        if self.mode not in ("replace", "shift"):
            raise ValueError(f"mode is {self.mode!r}; choose 'replace' or 'shift'")
        if torch.as_tensor(self.t).ndim > 1:
            raise ValueError("give one t, or one per batch row")
        self.path.at(self.t)

    @property
    def hook_name(self) -> str | None:
        return self.path.hook_name

    @property
    def batch_rows(self) -> int:
        """How many batch rows the change was written for; 1 fits any batch."""
        return torch.as_tensor(self.t).numel()

    def prepare(self, *, dtype: torch.dtype, device: torch.device | str) -> PreparedPath:
        del dtype
        target = self.path.at(torch.as_tensor(self.t).cpu()).reshape(-1, 1, len(self.path.basis))
        kept = (target, self.path.basis, self.path.mean, self.path.points)
        target, basis, mean, points = (part.to(device, torch.float32) for part in kept)
        return PreparedPath(target, basis, mean, points, self.mode)


@dataclass(frozen=True, eq=False)
class PreparedPath:
    """A path for one site; computed in float32 whatever the activation's dtype."""

    target: Float[Tensor, "rows 1 r"]
    basis: Float[Tensor, "r d_model"]
    mean: Float[Tensor, " d_model"]
    points: Float[Tensor, "knot r"]
    mode: Mode
    idle: bool = False
    constant: None = None
    reads_context: bool = False

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        now = (x.float() - self.mean) @ self.basis.T
        if self.mode == "shift":
            far = (now.unsqueeze(-2) - self.points).square().sum(-1)
            now = self.points[far.argmin(dim=-1)]
        return (self.target - now) @ self.basis
