"""What a gradient at a dictionary's hook point says in concepts.

g is the gradient of the loss by the activation. A step of gradient descent moves the
activation along -g, so `push` = -(g . d) / |d| > 0 means that the step wants more of concept d
there, `amount` is the push at the positions where d is active, and `attribution` = -(g . d) z is,
to first order, the loss saved by scaling an active concept up.
Source: shared/methods/gradient_projection section 3 (algebra of this project; CAFT, arXiv
2507.16795, ranks by the attribution with the other sign).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 16_000_000
"""Numbers of one position x latent block held at once."""

COLUMNS = ("push", "push_abs", "amount", "attribution", "active", "squares", "crossed")
"""Sums with one number per latent."""


@dataclass(eq=False)
class GradientSums:
    """Running sums over examples, mergeable; feed one example's positions at a time with `add`.

    `rows` are what `decode` multiplies codes with, `bias` what it adds. Sums are float64; rows
    given in float64 are held as they are, so that several sums can share them.
    """

    rows: Float[Tensor, "latent d_model"]
    bias: Float[Tensor, " d_model"]
    watch: tuple[int, ...] = ()
    keep: int = 10
    positions: int = 0
    examples: int = 0
    push: Tensor = field(init=False)
    push_abs: Tensor = field(init=False)
    amount: Tensor = field(init=False)
    attribution: Tensor = field(init=False)
    active: Tensor = field(init=False)
    squares: Tensor = field(init=False)
    crossed: Tensor = field(init=False)
    sizes: float = 0.0
    second: Tensor = field(init=False)
    total: float = 0.0
    named: float = 0.0
    biased: float = 0.0
    unnamed: float = 0.0
    named_abs: float = 0.0
    biased_abs: float = 0.0
    unnamed_abs: float = 0.0
    top_latents: list[Tensor] = field(default_factory=list)
    top_values: list[Tensor] = field(default_factory=list)
    watched: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows, self.bias = self.rows.double(), self.bias.double()
        latents, width = self.rows.shape
        for name in COLUMNS:
            setattr(self, name, torch.zeros(latents, dtype=torch.float64))
        self.second = torch.zeros(width, width, dtype=torch.float64)
        lengths = self.rows.norm(dim=1)
        # A zero row names no concept: its push is 0.
        self.unit = torch.where(lengths > 0, 1 / lengths.clamp_min(1e-300), 0.0)

    def add(
        self,
        g: Float[Tensor, "pos d_model"],
        h: Float[Tensor, "pos d_model"],
        z: Float[Tensor, "pos latent"],
    ) -> None:
        """Count the positions of one example: gradient, activation and codes there."""
        g, h, z = (part.detach().double().cpu() for part in (g, h, z))
        rows, bias = self.rows, self.bias
        one = -(rows @ g.sum(0)) * self.unit
        named = torch.zeros(len(g), dtype=torch.float64)
        step = max(1, BLOCK // max(len(g), 1))
        for start in range(0, len(rows), step):
            inside = slice(start, start + step)
            along = g @ rows[inside].T
            where, which = z[:, inside].nonzero(as_tuple=True)
            slope = along[where, which]
            saved = slope * z[where, which + start]
            which += start
            self.amount.index_add_(0, which, -slope * self.unit[which])
            self.attribution.index_add_(0, which, -saved)
            self.active += which.bincount(minlength=len(rows))
            named.index_add_(0, where, saved)
            self.push_abs[inside] += along.abs_().sum(0) * self.unit[inside]
        self.push += one
        self.squares += one**2
        self.crossed += one * len(g)
        self.sizes += float(len(g)) ** 2
        self.positions += len(g)
        self.examples += 1
        self.second += g.T @ g
        rest = (g * (h - z @ rows - bias)).sum(1)
        by_bias = g @ bias
        self.total += float((g * h).sum())
        for name, part in (("named", named), ("biased", by_bias), ("unnamed", rest)):
            setattr(self, name, getattr(self, name) + float(part.sum()))
            setattr(self, f"{name}_abs", getattr(self, f"{name}_abs") + float(part.abs().sum()))
        size = one.abs().topk(min(self.keep, len(one))).indices
        self.top_latents.append(size)
        self.top_values.append(one[size])
        self.watched.append(one[list(self.watch)])

    def merge(self, other: GradientSums) -> GradientSums:
        """Both together, this one's examples first; as if one had seen everything."""
        same = self.rows is other.rows or torch.equal(self.rows, other.rows)
        if not same or self.watch != other.watch:
            raise ValueError("sums over different latents do not merge")
        out = GradientSums(self.rows, self.bias, self.watch, self.keep)
        for name in (
            *COLUMNS, "sizes", "second", "positions", "examples", "total", "named", "biased",
            "unnamed", "named_abs", "biased_abs", "unnamed_abs",
            "top_latents", "top_values", "watched",
        ):  # fmt: skip
            setattr(out, name, getattr(self, name) + getattr(other, name))
        return out

    def standard_errors(self) -> Float[Tensor, " latent"]:
        """Standard error over examples of each mean push; NaN below eight examples.

        The mean is a ratio (sum of pushes over positions), so an example's deviation is its sum
        minus the mean times its own number of positions.
        """
        if self.examples < LEAST_EXAMPLES:
            return torch.full_like(self.push, float("nan"))
        mean = self.push / self.positions
        spread = self.squares - 2 * mean * self.crossed + mean**2 * self.sizes
        few = self.examples / (self.examples - 1)
        return (spread.clamp_min(0) * few).sqrt() / self.positions

    def energy(self, rows: Float[Tensor, "some d_model"]) -> float:
        """Share of |g|^2 that lies in the span of these rows."""
        basis = torch.linalg.qr(rows.double().T).Q
        whole = float(self.second.trace())
        return float((basis.T @ self.second @ basis).trace()) / whole if whole else float("nan")


LEAST_EXAMPLES = 8
"""With fewer examples a standard error over them is left out (gradient_projection 3.5)."""
