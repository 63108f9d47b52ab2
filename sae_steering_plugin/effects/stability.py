"""Effect stability: does one direction change the output the same way in every context?

Everything follows from the inner products of the shifts, `gram[i, j] = <D_i, D_j>`, so shifts may
be given in any space with the same inner products: logits, or final residuals under `W_U W_U'`.
Source: arXiv 2606.08365, section "labels" (formulas of its released scripts).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_SHIFT = 1e-8
"""Shorter shifts (arXiv 2606.08365) have no direction and enter no cosine."""

CANCELLED = 1e-6
"""A mean shorter than this share of the mean length is rounding of shifts that cancel."""


@dataclass(frozen=True)
class Stability:
    """How alike the shifts of one direction are over `n` contexts, `n_moved` of them not zero.

    `effect` is their mean length and `effect_cv` its unbiased standard deviation over it. `signed`
    and `absolute` are mean (absolute) cosines with the mean shift, which holds the shift itself:
    isotropic noise scores 1/sqrt(n), so compare at one n. `loo_` leaves the shift out of the mean:
    noise scores 0. `pairwise_` runs over pairs of contexts. NaN where the mean shift is zero, or
    with fewer shifts than a figure needs: never 0.
    """

    n: int
    n_moved: int
    effect: float
    effect_cv: float
    stability_signed: float
    stability_abs: float
    loo_signed: float
    loo_abs: float
    pairwise_signed: float
    pairwise_abs: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def stability(shifts: Float[Tensor, "context width"]) -> Stability:
    """Stability of the rows of `shifts` (steered minus clean outputs, one row per context)."""
    wide = shifts.double()
    return gram_stability(wide @ wide.T)


def gram_stability(gram: Float[Tensor, "context context"]) -> Stability:
    """Stability from the inner products of the shifts. Raises ValueError without a context.

    mu = mean_i D_i,  c_i = cos(D_i, mu);  leave-one-out: cos(D_i, mu - D_i / n)

    Sums in float64. Shifts of zero length count in `effect` and in the mean, not in the cosines.
    """
    n = len(gram)
    if not n:
        raise ValueError("stability needs at least one context")
    inner = gram.double().cpu()
    length = inner.diagonal().clamp_min(0).sqrt()
    effect = float(length.mean())
    moved = length > SMALLEST_SHIFT
    with_sum = inner.sum(dim=1)
    square = float(inner.sum())
    to_mean = _cosines(with_sum, length, torch.full_like(length, square), n, effect)
    others = with_sum - inner.diagonal()
    rest = square - 2 * with_sum + inner.diagonal()
    to_rest = _cosines(others, length, rest, max(n - 1, 1), effect)
    pairs = _pairs(inner, length, moved)
    spread = float(length.std(correction=1)) if n > 1 else float("nan")
    return Stability(
        n=n,
        n_moved=int(moved.sum()),
        effect=effect,
        effect_cv=spread / effect if effect > SMALLEST_SHIFT else float("nan"),
        stability_signed=_mean(to_mean[moved]),
        stability_abs=_mean(to_mean[moved].abs()),
        loo_signed=_mean(to_rest[moved]) if n > 1 else float("nan"),
        loo_abs=_mean(to_rest[moved].abs()) if n > 1 else float("nan"),
        pairwise_signed=_mean(pairs),
        pairwise_abs=_mean(pairs.abs()),
    )


def _cosines(dot: Tensor, length: Tensor, square: Tensor, count: int, effect: float) -> Tensor:
    """`dot / (length * sqrt(square))`, NaN where that sum of `count` shifts cancels."""
    norm = square.clamp_min(0).sqrt()
    bar = max(SMALLEST_SHIFT, CANCELLED * effect) * count
    value = dot / (length * norm).clamp_min(1e-300)
    return torch.where(norm > bar, value.clamp(-1, 1), torch.nan)


def _pairs(inner: Tensor, length: Tensor, moved: Tensor) -> Float[Tensor, " pair"]:
    """Cosines of all ordered pairs of different contexts that moved."""
    kept = inner[moved][:, moved] / (length[moved][:, None] * length[moved][None])
    apart = ~torch.eye(len(kept), dtype=torch.bool)
    return kept[apart].clamp(-1, 1)


def _mean(values: Tensor) -> float:
    """The mean of the defined values; NaN when there is none."""
    defined = values[~values.isnan()]
    return float(defined.mean()) if len(defined) else float("nan")


__all__ = ["SMALLEST_SHIFT", "Stability", "gram_stability", "stability"]
