"""L2 logistic probes of many concepts at once, on sparse features far wider than the data are long.

The solution lies in the span of the texts, w = A' a, so everything happens in example space: one
Gram matrix K = A A', then L-BFGS on all concepts together, each iteration one product with K. A
step along a direction changes the logits linearly, so a line search costs no product at all.
Source: shared/performance_notes section 5. scikit-learn is the reference in the tests, and the
better choice for a single probe.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .pooled import PooledCodes
from .scores import label_table

HISTORY = 10
SUFFICIENT = 1e-4
"""Armijo's constant: a step must gain this share of what the slope promises."""


@dataclass(frozen=True, eq=False)
class Probes:
    """Weights `[feature concept]` and intercepts of one logistic probe per concept.

    `objective[c]` is 1/2 |w|^2 + C sum_i log loss_i, the function scikit-learn minimises;
    `gradient[c]` the norm of its gradient at the end, as a share of that at the start (w = 0).
    """

    weights: Float[Tensor, "feature concept"]
    intercepts: Float[Tensor, " concept"]
    concepts: tuple[str, ...]
    objective: Float[Tensor, " concept"]
    gradient: Float[Tensor, " concept"]
    iterations: int
    converged: bool

    def logits(self, codes: PooledCodes) -> Float[Tensor, "example concept"]:
        """Log-odds of each concept for each text."""
        product = codes.matrix() @ self.weights.numpy()
        return torch.from_numpy(np.asarray(product)) + self.intercepts


def fit_probes(
    codes: PooledCodes,
    labels: Any,
    *,
    concepts: Sequence[str] = (),
    inverse_penalty: float = 1.0,
    tolerance: float = 1e-5,
    iterations: int = 500,
) -> Probes:
    """One logistic probe per concept with penalty 1/2 |w|^2 and C = `inverse_penalty`.

    The intercept is not penalised, as in scikit-learn. `labels` as in `score_features`, complete:
    a concept with unknown labels needs a fit of its own. Stops when every concept's gradient is
    below `tolerance` of its first one, and warns when `iterations` end before. Raises ValueError
    for unknown labels and for a concept with texts of one class.
    """
    names, table = label_table(labels, len(codes), concepts)
    if np.isnan(table).any():
        raise ValueError("unknown labels: fit that concept alone, on the texts that have one")
    for name, column in zip(names, table.T, strict=True):
        if column.min() == column.max():
            raise ValueError(f"concept {name!r} has texts of one class only")
    if inverse_penalty <= 0:
        raise ValueError(f"inverse_penalty is {inverse_penalty}; it must be positive")
    matrix = codes.matrix().tocsr()
    gram = np.asarray((matrix @ matrix.T).todense())
    state = _Fit(gram, table, inverse_penalty)
    done = state.run(tolerance, iterations)
    if not done:
        warnings.warn(
            f"probes stopped after {state.steps} iterations at {state.gradient().max():.1e} of the "
            f"first gradient, above {tolerance:g}: raise iterations or tolerance",
            stacklevel=2,
        )
    return Probes(
        torch.from_numpy(np.asarray(matrix.T @ state.alpha)),
        torch.from_numpy(state.intercept),
        names,
        torch.from_numpy(state.value),
        torch.from_numpy(state.gradient()),
        state.steps,
        done,
    )


class _Fit:
    """L-BFGS over all concepts at once, a column each: variables (a, b), logits f = K a + b.

    The gradient in w is A'(a + C (p - y)), so r = a + C (p - y) stands for it in example space, and
    inner products of w's are taken through K.
    """

    def __init__(self, gram: np.ndarray, y: np.ndarray, inverse_penalty: float) -> None:
        self.gram, self.y, self.c = gram, y, inverse_penalty
        shape = y.shape
        self.alpha = np.zeros(shape)
        share = y.mean(axis=0)
        self.intercept = np.log(share / (1 - share))
        self.image = np.zeros(shape)  # K alpha
        self.steps = 0
        self.value = self._value(self.alpha, self.image, self.intercept)
        self.pairs: list[tuple[np.ndarray, ...]] = []
        self.r, self.slope = self._residual()
        self.kr = self.gram @ self.r
        self.first = self._norm()

    def _value(self, alpha: np.ndarray, image: np.ndarray, intercept: np.ndarray) -> np.ndarray:
        logits = image + intercept
        loss = np.logaddexp(0.0, logits) - self.y * logits
        return 0.5 * (alpha * image).sum(axis=0) + self.c * loss.sum(axis=0)

    def _residual(self) -> tuple[np.ndarray, np.ndarray]:
        """The gradient's two parts: example-space r, and the intercept's."""
        p = 1 / (1 + np.exp(-(self.image + self.intercept)))
        pull = self.c * (p - self.y)
        return self.alpha + pull, pull.sum(axis=0)

    def _norm(self) -> np.ndarray:
        """Norm of the gradient in (w, b): r' K r is |A' r|^2."""
        return np.sqrt(np.maximum((self.r * self.kr).sum(axis=0), 0.0) + self.slope**2)

    def gradient(self) -> np.ndarray:
        return self._norm() / self.first

    def run(self, tolerance: float, iterations: int) -> bool:
        while self.steps < iterations and not (self.gradient() <= tolerance).all():
            d, kd, bd = self._direction(self.r, self.kr, self.slope)
            descent = (d * self.kr).sum(axis=0) + bd * self.slope
            uphill = descent >= 0  # rounding at the end of a column's way: plain descent there
            if uphill.any():
                d, kd = np.where(uphill, -self.r, d), np.where(uphill, -self.kr, kd)
                bd = np.where(uphill, -self.slope, bd)
                descent = (d * self.kr).sum(axis=0) + bd * self.slope
            step, self.value = self._line_search(d, kd, bd, descent)
            if not step.any():
                break
            self.alpha, self.image = self.alpha + step * d, self.image + step * kd
            self.intercept = self.intercept + step * bd
            self.steps += 1
            before = (self.r, self.kr, self.slope)
            self.r, self.slope = self._residual()
            self.kr = self.gram @ self.r
            moved = (step * d, step * kd, step * bd)
            turned = tuple(
                new - old for new, old in zip((self.r, self.kr, self.slope), before, strict=True)
            )
            self.pairs = [*self.pairs, (*moved, *turned)][-HISTORY:]
        return bool((self.gradient() <= tolerance).all())

    def _line_search(
        self, direction: np.ndarray, k_direction: np.ndarray, b: np.ndarray, descent: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Halved per column until the step gains enough; 0 where none does."""
        step = np.ones(self.y.shape[1])
        for _ in range(30):
            value = self._value(
                self.alpha + step * direction,
                self.image + step * k_direction,
                self.intercept + step * b,
            )
            short = value <= self.value + SUFFICIENT * step * descent
            if short.all():
                return step, value
            step = np.where(short, step, step / 2)
        step = np.where(short, step, 0.0)
        return step, np.where(short, value, self.value)

    def _direction(
        self, r: np.ndarray, kr: np.ndarray, slope: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """L-BFGS's two loops, with every product by K carried along instead of computed."""
        d, kd, bd = -r.copy(), -kr.copy(), -slope.copy()
        kept = []
        for s, _ks, bs, g, kg, bg in reversed(self.pairs):
            curvature = (s * kg).sum(axis=0) + bs * bg
            use = curvature > 1e-12
            rho = np.where(use, 1 / np.where(use, curvature, 1.0), 0.0)
            a = rho * ((s * kd).sum(axis=0) + bs * bd)
            d, kd, bd = d - a * g, kd - a * kg, bd - a * bg
            kept.append((a, rho))
        if self.pairs:
            s, _, bs, g, kg, bg = self.pairs[-1]
            curvature = (s * kg).sum(axis=0) + bs * bg
            size = (g * kg).sum(axis=0) + bg * bg
            scale = np.where(
                (curvature > 1e-12) & (size > 0), curvature / np.where(size > 0, size, 1.0), 1.0
            )
        else:
            size = (r * kr).sum(axis=0) + slope**2
            scale = 1 / np.maximum(np.sqrt(size), 1.0)
        d, kd, bd = scale * d, scale * kd, scale * bd
        for (s, ks, bs, g, _kg, bg), (a, rho) in zip(self.pairs, reversed(kept), strict=True):
            back = rho * ((g * kd).sum(axis=0) + bg * bd)
            d, kd, bd = d + (a - back) * s, kd + (a - back) * ks, bd + (a - back) * bs
        return d, kd, bd


def top_k_accuracy(
    codes: PooledCodes,
    labels: Float[np.ndarray, " example"],
    *,
    train: Sequence[int],
    test: Sequence[int],
    k: int = 1,
    inverse_penalty: float = 1.0,
) -> tuple[float, list[int]]:
    """Test accuracy of a logistic probe on the k features of largest |mean difference| on `train`,
    and those features.

    The sparse probing of SAEBench (arXiv 2503.09532): L2, C = 1, at most 1,000 iterations.
    """
    from sklearn.linear_model import LogisticRegression

    from .scores import score_features

    y = np.asarray(labels)
    first, second = codes.of(list(train)), codes.of(list(test))
    gap = score_features(first, y[list(train)], scores=("mean_difference",))
    order = torch.argsort(gap.values["mean_difference"][:, 0].abs(), descending=True, stable=True)
    chosen = [int(feature) for feature in order[:k]]
    probe = LogisticRegression(C=inverse_penalty, max_iter=1000)
    probe.fit(first.matrix()[:, chosen].toarray(), y[list(train)])
    found = probe.score(second.matrix()[:, chosen].toarray(), y[list(test)])
    return float(found), chosen
