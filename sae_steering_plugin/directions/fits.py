"""Linear read-outs: weights from a design matrix, and the same fit's predictions in example space.

The second form needs inner products only: its cost grows with the number of examples and not with
the width of the dictionary, and permuted labels share one factorisation as further columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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
    return torch.as_tensor(_logistic(X, labels, a).coef_[0])


def mean_difference_weights(
    X: Float[Tensor, "example feature"],
    labels: Int[Tensor, " example"],
    a: float,  # noqa: ARG001
) -> Float[Tensor, " feature"]:
    """Mean code at label 1 minus mean code at label 0; it has no penalty."""
    design = X.double()
    return design[labels == 1].mean(0) - design[labels == 0].mean(0)


def _logistic(X: Tensor, labels: Tensor, a: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / a, max_iter=2000, tol=1e-6)
    return model.fit(X.double().numpy(), labels.numpy())


def ridge_predictions(
    K: Float[Tensor, "example example"],
    Y: Float[Tensor, "example column"],
    train: Tensor,
    test: Tensor,
    a: float,
    *,
    center: bool,
) -> Float[Tensor, "test column"]:
    """Ridge predictions on `test` for every label column, fitted on `train`, from inner
    products."""
    inner, cross = _blocks(K, train, test, center=center)
    target = Y[train] - Y[train].mean(0)
    penalised = inner + a * torch.eye(len(train), dtype=K.dtype)
    weights = torch.cholesky_solve(target, torch.linalg.cholesky(penalised))
    return cross @ weights + Y[train].mean(0)


def logistic_predictions(
    K: Float[Tensor, "example example"],
    Y: Float[Tensor, "example column"],
    train: Tensor,
    test: Tensor,
    a: float,
    *,
    center: bool,
) -> Float[Tensor, "test column"]:
    """Predicted probabilities on `test`, column by column; NaN for a column with one label in
    `train`.

    The penalised solution lies in the span of the examples, so fitting in coordinates that keep all
    inner products gives the same predictions as fitting on the codes.
    """
    rows = torch.cat([train, test])
    inner, cross = _blocks(K, train, rows, center=center)
    del inner
    size = len(train)
    jitter = 1e-10 * float(cross[:size].diagonal().mean()) + 1e-30
    factor = torch.linalg.cholesky(cross[:size] + jitter * torch.eye(size, dtype=K.dtype))
    placed = torch.linalg.solve_triangular(factor, cross[size:].T, upper=False).T
    out = torch.full((len(test), Y.shape[1]), float("nan"), dtype=K.dtype)
    for column in range(Y.shape[1]):
        labels = Y[train, column].long()
        if len(labels.unique()) == 2:
            model = _logistic(factor, labels, a)
            out[:, column] = torch.as_tensor(model.predict_proba(placed.numpy())[:, 1])
    return out


def mean_difference_predictions(
    K: Float[Tensor, "example example"],
    Y: Float[Tensor, "example column"],
    train: Tensor,
    test: Tensor,
    a: float,  # noqa: ARG001
    *,
    center: bool,  # noqa: ARG001
) -> Float[Tensor, "test column"]:
    """Projection on the mean difference, scaled so that the class means lie at 0 and 1."""
    y = Y[train]
    weight = y / y.sum(0) - (1 - y) / (1 - y).sum(0)
    along = K[train][:, train] @ weight
    zero = (along * (1 - y)).sum(0) / (1 - y).sum(0)
    one = (along * y).sum(0) / y.sum(0)
    return (K[test][:, train] @ weight - zero) / (one - zero)


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
