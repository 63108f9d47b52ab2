"""L2 logistic probes of many concepts at once, on sparse features far wider than the data are long.

The solution lies in the span of the texts, w = A' a, so everything happens in example space: one
Gram matrix K = A A', then Newton steps for all concepts together, each solved by conjugate
gradients at one product with K a step. A step changes the logits linearly, so a line search costs
no product at all. Source: shared/performance_notes section 5 (with L-BFGS instead). scikit-learn is
the reference in the tests, and the better choice for a single probe.
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

CG_STEPS = 200
LARGEST_ROUGH = 1e12
"""Inner products of texts beyond which float32 could overflow in a sum of squares."""
HALVINGS = 30
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
    iterations: int = 50,
) -> Probes:
    """One logistic probe per concept with penalty 1/2 |w|^2 and C = `inverse_penalty`.

    The intercept is not penalised, as in scikit-learn. `labels` as in `score_features`, complete:
    a concept with unknown labels needs a fit of its own. Pays for few texts: the Gram matrix is
    texts x texts and dense, and with n^2 near the stored values scikit-learn given the sparse table
    is as fast (`benchmarks/score_features.py`, row 7d). Stops when every concept's gradient is
    below `tolerance` of its first one (tests hold the default's objective to scikit-learn's), and
    warns when `iterations` end before. Raises ValueError for unknown labels and for a concept with
    texts of one class.
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
    state = _Fit(gram_of(matrix), table, inverse_penalty)
    done = state.run(tolerance, iterations)
    if not done:
        warnings.warn(
            f"probes stopped after {state.steps} iterations at {state.gradient.max():.1e} of the "
            f"first gradient, above {tolerance:g}: raise iterations or tolerance",
            stacklevel=2,
        )
    return Probes(
        torch.from_numpy(np.asarray(matrix.T @ state.alpha)),
        torch.from_numpy(state.intercept),
        names,
        torch.from_numpy(state.value),
        torch.from_numpy(state.gradient),
        state.steps,
        done,
    )


def gram_of(matrix: Any, blocks: int = 8) -> Float[np.ndarray, "example example"]:
    """A A' of sparse rows, dense; only blocks on and above the diagonal are computed."""
    n = matrix.shape[0]
    bounds = np.linspace(0, n, blocks + 1).astype(int)
    pieces = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
    found = np.empty((n, n))
    for i, rows in enumerate(pieces):
        for columns in pieces[i:]:
            found[rows, columns] = (matrix[rows] @ matrix[columns].T).toarray()
            found[columns, rows] = found[rows, columns].T
    return found


class _Fit:
    """Truncated Newton over all concepts at once, a column each: w = A' alpha, f = K alpha + b.

    The gradient in w is A'(alpha + C (p - y)), so r = alpha + C (p - y) stands for it in example
    space, and inner products of w's are taken through K. Concepts that are done leave it.
    """

    def __init__(self, gram: np.ndarray, y: np.ndarray, inverse_penalty: float) -> None:
        self.gram, self.y, self.c = gram, y, inverse_penalty
        self.rough = gram.astype(np.float32) if np.abs(gram).max() < LARGEST_ROUGH else gram
        self.alpha = np.zeros(y.shape)
        self.image = np.zeros(y.shape)  # K alpha
        share = y.mean(axis=0)
        self.intercept = np.log(share / (1 - share))
        self.value = self._value(self.image * 0, self.image, self.intercept, self.y)
        self.gradient = np.ones(y.shape[1])
        self.steps = 0

    def run(self, tolerance: float, iterations: int) -> bool:
        """Whether every gradient fell below `tolerance` of its first within `iterations`."""
        active = np.arange(self.y.shape[1])
        first = np.ones(len(active))
        while True:
            y, alpha = self.y[:, active], self.alpha[:, active]
            image, intercept = self.image[:, active], self.intercept[active]
            p = 1 / (1 + np.exp(-(image + intercept)))
            pull = self.c * (p - y)
            r, slope = alpha + pull, pull.sum(axis=0)
            kr = self.gram @ r
            size = np.sqrt(np.maximum((r * kr).sum(axis=0), 0.0) + slope**2)  # |gradient|
            if self.steps == 0:
                first = size
            self.gradient[active] = size / first[active]
            going = self.gradient[active] > tolerance
            if not going.any() or self.steps >= iterations:
                return not going.any()
            active = active[going]
            r, kr, slope, p = r[:, going], kr[:, going], slope[going], p[:, going]
            forcing = np.minimum(0.5, np.sqrt(self.gradient[active]))
            moved = self._newton(r, kr, slope, self.c * p * (1 - p), forcing)
            self._search(active, kr, slope, *moved)
            self.steps += 1

    def _newton(
        self,
        r: np.ndarray,
        kr: np.ndarray,
        slope: np.ndarray,
        bend: np.ndarray,
        forcing: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Conjugate gradients on (1 + C A' D A) dw = -gradient: d alpha, K d alpha, d intercept."""
        rough: list[np.ndarray] = [
            one.astype(np.float32) for one in (-r, -kr, -slope, bend, forcing)
        ]
        left, k_left, b_left, bend, forcing = rough
        step: np.ndarray = np.zeros_like(left)
        b_step: np.ndarray = np.zeros_like(b_left)
        p, kp, bp = left, k_left, b_left
        size = (left * k_left).sum(axis=0) + b_left**2
        goal = forcing**2 * size
        for _ in range(CG_STEPS):
            seen = kp + bp  # the change of the logits along p
            curved = bend * seen
            curvature = (p * kp).sum(axis=0) + (seen * curved).sum(axis=0)
            going = (size > goal) & (curvature > 0)
            if not going.any():
                break
            length = np.where(going, size / np.where(going, curvature, 1), 0)
            step, b_step = step + length * p, b_step + length * bp
            left = left - length * (p + curved)
            b_left = b_left - length * curved.sum(axis=0)
            k_left = self.rough @ left
            new = np.maximum((left * k_left).sum(axis=0), 0.0) + b_left**2
            turn = np.where(going, new / np.where(size > 0, size, 1.0), 0.0)
            p, kp, bp = left + turn * p, k_left + turn * kp, b_left + turn * bp
            size = np.where(going, new, size)
        exact = step.astype(np.float64)
        return exact, self.gram @ exact, b_step.astype(np.float64)

    def _search(
        self,
        active: np.ndarray,
        kr: np.ndarray,
        slope: np.ndarray,
        step: np.ndarray,
        k_step: np.ndarray,
        b_step: np.ndarray,
    ) -> None:
        """Take each column's step, halved until it gains enough; logits move linearly along it."""
        promised = (step * kr).sum(axis=0) + b_step * slope
        alpha, image = self.alpha[:, active], self.image[:, active]
        intercept, before, y = self.intercept[active], self.value[active], self.y[:, active]
        length = np.ones(len(active))
        for _ in range(HALVINGS):
            value = self._value(
                alpha + length * step, image + length * k_step, intercept + length * b_step, y
            )
            enough = value <= before + SUFFICIENT * length * promised
            if enough.all():
                break
            length = np.where(enough, length, length / 2)
        length = np.where(enough, length, 0.0)
        self.alpha[:, active] = alpha + length * step
        self.image[:, active] = image + length * k_step
        self.intercept[active] = intercept + length * b_step
        self.value[active] = np.where(enough, value, before)

    def _value(
        self, alpha: np.ndarray, image: np.ndarray, intercept: np.ndarray, y: np.ndarray
    ) -> np.ndarray:
        logits = image + intercept
        loss = np.logaddexp(0.0, logits) - y * logits
        return 0.5 * (alpha * image).sum(axis=0) + self.c * loss.sum(axis=0)


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
