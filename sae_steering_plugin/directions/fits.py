"""Linear read-outs: weights from a design matrix, and the same fit's predictions on held-out rows.

Predictions work with whichever is smaller, features or inner products of examples, so their cost
does not grow with the width of the dictionary; permuted labels share one factorisation as further
columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


def ridge_primal(
    X: Float[Tensor, "example feature"], y: Float[Tensor, " example"], a: float
) -> Float[Tensor, " feature"]:
    """w = (X'X + a I)^-1 X'y. Cost grows with the cube of the number of features."""
    gram = X.T @ X + a * torch.eye(X.shape[1], dtype=X.dtype)
    return torch.cholesky_solve((X.T @ y)[:, None], torch.linalg.cholesky(gram))[:, 0]


def ridge_dual(
    X: Float[Tensor, "example feature"], y: Float[Tensor, " example"], a: float
) -> Float[Tensor, " feature"]:
    """w = X' (XX' + a I)^-1 y, equal to `ridge_primal`. Cost grows with the cube of the
    examples."""
    gram = X @ X.T + a * torch.eye(X.shape[0], dtype=X.dtype)
    return X.T @ torch.cholesky_solve(y[:, None], torch.linalg.cholesky(gram))[:, 0]


def ridge_weights(
    X: Float[Tensor, "example feature"], labels: Int[Tensor, " example"], a: float
) -> Float[Tensor, " feature"]:
    """Ridge of centred labels on `X` as given, in float64, by whichever form is smaller."""
    design, y = X.double(), labels.double()
    solve = ridge_primal if X.shape[1] <= X.shape[0] else ridge_dual
    return solve(design, y - y.mean(), a)


def logistic_weights(
    X: Float[Tensor, "example feature"], labels: Int[Tensor, " example"], a: float
) -> Float[Tensor, " feature"]:
    """L2-penalised logistic regression, penalty a/2 ||w||^2 beside the summed loss;
    scikit-learn."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / a, max_iter=5000, tol=1e-6)
    return torch.as_tensor(model.fit(X.double().numpy(), labels.numpy()).coef_[0])


def mean_difference_weights(
    X: Float[Tensor, "example feature"],
    labels: Int[Tensor, " example"],
    a: float,  # noqa: ARG001
) -> Float[Tensor, " feature"]:
    """Mean code at label 1 minus mean code at label 0; it has no penalty."""
    design = X.double()
    return design[labels == 1].mean(0) - design[labels == 0].mean(0)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Rows a probe reads, in float64, with their inner products where those are the smaller
    table."""

    X: Float[Tensor, "example feature"]
    gram: Float[Tensor, "example example"] | None

    @classmethod
    def of(cls, X: Float[Tensor, "example feature"]) -> Inputs:
        rows = X.double()
        return cls(rows, rows @ rows.T if rows.shape[1] > rows.shape[0] else None)

    def products(self) -> Float[Tensor, "example example"]:
        """Inner products of all pairs of rows."""
        return self.X @ self.X.T if self.gram is None else self.gram

    def over(self, scale: Float[Tensor, " feature"]) -> Inputs:
        """The same rows with every feature divided by `scale`."""
        return Inputs.of(self.X / scale)


def ridge_predictions(
    inputs: Inputs,
    Y: Float[Tensor, "example column"],
    train: Tensor,
    test: Tensor,
    a: float,
    *,
    center: bool,
) -> Float[Tensor, "test column"]:
    """Ridge predictions on `test` for every label column, fitted on `train`, by the smaller
    form."""
    target = Y[train] - Y[train].mean(0)
    if inputs.gram is not None:
        inner, cross = _blocks(inputs.gram, train, test, center=center)
        return cross @ _penalised(inner, a, target) + Y[train].mean(0)
    fit, held = inputs.X[train], inputs.X[test]
    if center:
        fit, held = fit - fit.mean(0), held - fit.mean(0)
    return held @ _penalised(fit.T @ fit, a, fit.T @ target) + Y[train].mean(0)


def _penalised(gram: Tensor, a: float, target: Tensor) -> Tensor:
    """(gram + a I)^-1 target."""
    factor = torch.linalg.cholesky(gram + a * torch.eye(len(gram), dtype=gram.dtype))
    return torch.cholesky_solve(target, factor)


def logistic_predictions(
    inputs: Inputs,
    Y: Float[Tensor, "example column"],
    train: Tensor,
    test: Tensor,
    a: float,
    *,
    center: bool,
) -> Float[Tensor, "test column"]:
    """Predicted probabilities on `test`, column by column; NaN for a column with one label in
    `train`.

    The same fit as scikit-learn's, found in example space by `dual_logistic`.
    """
    inner, cross = _blocks(inputs.products(), train, test, center=center)
    out = torch.full((len(test), Y.shape[1]), float("nan"), dtype=torch.float64)
    for column in range(Y.shape[1]):
        y = Y[train, column]
        if 0 < float(y.sum()) < len(y):
            alpha, intercept = dual_logistic(inner, y, a)
            out[:, column] = torch.sigmoid(cross @ alpha + intercept)
    return out


def dual_logistic(
    K: Float[Tensor, "train train"],
    y: Float[Tensor, " train"],
    a: float,
    *,
    steps: int = 100,
    tolerance: float = 1e-7,
) -> tuple[Float[Tensor, " train"], Tensor]:
    """Example weights and intercept that minimise sum log(1 + exp(-s f)) + a/2 alpha'K alpha.

    Here f = K alpha + b and s = +-1: L2-penalised logistic regression with a free intercept,
    written in the span of the examples. Newton's method: each step solves (K + a/W) alpha + b = z
    with sum(alpha) = 0, where W = p (1 - p) and z = f + (y - p) / W, and is halved while the
    objective grows.
    """
    alpha, b = torch.zeros_like(y), torch.logit(y.mean())
    ones, best = torch.ones_like(y), float("inf")

    def objective(alpha: Tensor, b: Tensor) -> float:
        along = K @ alpha
        loss = torch.nn.functional.softplus((1 - 2 * y) * (along + b)).sum()
        return float(loss + a / 2 * alpha @ along)

    best = objective(alpha, b)
    for _ in range(steps):
        f = K @ alpha + b
        p = torch.sigmoid(f)
        W = (p * (1 - p)).clamp_min(1e-9)
        factor = torch.linalg.cholesky(K + torch.diag(a / W))
        solved = torch.cholesky_solve(torch.stack([f + (y - p) / W, ones], dim=1), factor)
        new_b = solved[:, 0].sum() / solved[:, 1].sum()
        toward = solved[:, 0] - new_b * solved[:, 1] - alpha
        size = 1.0
        value = objective(alpha + toward, new_b)
        while value > best and size > 1e-4:
            size /= 2
            value = objective(alpha + size * toward, b + size * (new_b - b))
        if value > best:
            break
        alpha, b, gain, best = alpha + size * toward, b + size * (new_b - b), best - value, value
        if gain <= tolerance * (1 + abs(best)):
            break
    return alpha, b


def mean_difference_predictions(
    inputs: Inputs,
    Y: Float[Tensor, "example column"],
    train: Tensor,
    test: Tensor,
    a: float,  # noqa: ARG001
    *,
    center: bool,  # noqa: ARG001
) -> Float[Tensor, "test column"]:
    """Projection on the mean difference, scaled so that the class means lie at 0 and 1."""
    y, X = Y[train], inputs.X
    weight = X[train].T @ (y / y.sum(0) - (1 - y) / (1 - y).sum(0))
    along = X[train] @ weight
    zero = (along * (1 - y)).sum(0) / (1 - y).sum(0)
    one = (along * y).sum(0) / y.sum(0)
    return (X[test] @ weight - zero) / (one - zero)


def _blocks(K: Tensor, train: Tensor, test: Tensor, *, center: bool) -> tuple[Tensor, Tensor]:
    """Inner products train x train and test x train, about the training mean when `center`."""
    inner, cross = K[train][:, train], K[test][:, train]
    if not center:
        return inner, cross
    mean = inner.mean(0)
    return (
        inner - mean - mean[:, None] + mean.mean(),
        cross - mean - cross.mean(1, keepdim=True) + mean.mean(),
    )


@dataclass(frozen=True)
class Probe:
    """A way to fit: weights from a design matrix, and the same fit's predictions in example
    space."""

    name: str
    weights: Callable[[Tensor, Tensor, float], Tensor]
    predictions: Callable[..., Tensor]
    penalised: bool = True


PROBES: dict[str, Probe] = {
    probe.name: probe
    for probe in (
        Probe("ridge", ridge_weights, ridge_predictions),
        Probe("logistic", logistic_weights, logistic_predictions),
        Probe("mean_difference", mean_difference_weights, mean_difference_predictions, False),
    )
}


def named_probe(word: str) -> Probe:
    """The probe a word names. Raises ValueError listing the known ones."""
    if word not in PROBES:
        raise ValueError(f"no probe {word!r}; choose one of {', '.join(PROBES)}")
    return PROBES[word]


def deviations(X: Float[Tensor, "example feature"]) -> Float[Tensor, " feature"]:
    """Standard deviation of each feature; 1 for a constant one, which then carries no weight."""
    s = X.double().std(dim=0)
    return torch.where(s > 1e-12, s, 1.0)


def fitted_weights(
    X: Float[Tensor, "example feature"],
    labels: Int[Tensor, " example"],
    probe: Probe,
    a: float,
    *,
    center: bool,
    standardize: bool,
    spread: Literal["divide", "multiply"] = "divide",
) -> Float[Tensor, " feature"]:
    """The probe's weight on every feature as it stands, never the weight of a standardised feature.

    With `standardize` the fit sees `x / s`; its weight is given back as `w / s` (`spread="divide"`,
    the same predictions) or as `w * s` ("multiply", one deviation per feature).
    """
    design = X.double()
    if center:
        design = design - design.mean(0)
    if not standardize:
        return probe.weights(design, labels, a)
    s = deviations(X)
    w = probe.weights(design / s, labels, a)
    return w / s if spread == "divide" else w * s
