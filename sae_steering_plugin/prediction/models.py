"""Ridge and gradient-boosted trees as plain arrays: fitted by scikit-learn, evaluated here.

A fitted model is its arrays, so it is saved without pickle and predicts the same bits when read
back: nothing but these few lines evaluates it, before saving or after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

PENALTY = 1.0
"""Ridge penalty on standardised predictors (arXiv 2606.08365)."""

TREES, DEPTH, RATE = 100, 2, 0.05
"""Gradient boosting of arXiv 2606.08365."""

Matrix = Float[np.ndarray, "row column"]
Column = Float[np.ndarray, " row"]


@runtime_checkable
class Fitted(Protocol):
    """A model that has been fitted."""

    def predict(self, x: Matrix) -> Column: ...

    def arrays(self) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True, eq=False)
class Ridge:
    """yhat = intercept + ((x - mean) / scale) @ weights; scale 1 for a constant column."""

    mean: Float[np.ndarray, " column"]
    scale: Float[np.ndarray, " column"]
    weights: Float[np.ndarray, " column"]
    intercept: Float[np.ndarray, 1]

    def predict(self, x: Matrix) -> Column:
        standard = (x - self.mean) / self.scale
        # summed column by column, so that a row's prediction does not depend on its company
        total = np.full(len(x), self.intercept[0])
        for column, weight in zip(standard.T, self.weights, strict=True):
            total = total + column * weight
        return total

    def arrays(self) -> dict[str, np.ndarray]:
        return arrays_of(self)


@dataclass(frozen=True, eq=False)
class Trees:
    """yhat = start + rate * sum over trees of the value of the leaf that a row ends in.

    `child` is -1 at leaves; a row goes left where its value, as float32, is <= the threshold.
    """

    start: Float[np.ndarray, 1]
    rate: Float[np.ndarray, 1]
    column: Int[np.ndarray, "tree node"]
    threshold: Float[np.ndarray, "tree node"]
    left: Int[np.ndarray, "tree node"]
    right: Int[np.ndarray, "tree node"]
    value: Float[np.ndarray, "tree node"]

    def predict(self, x: Matrix) -> Column:
        seen, rows = x.astype(np.float32), np.arange(len(x))
        total = np.full(len(x), self.start[0])
        for tree in range(len(self.value)):
            node = np.zeros(len(x), dtype=np.int64)
            while (inner := self.left[tree, node] >= 0).any():
                below = seen[rows, self.column[tree, node].clip(0)] <= self.threshold[tree, node]
                child = np.where(below, self.left[tree, node], self.right[tree, node])
                node = np.where(inner, child, node)
            total = total + self.rate[0] * self.value[tree, node]
        return total

    def arrays(self) -> dict[str, np.ndarray]:
        return arrays_of(self)


def arrays_of(model: Any) -> dict[str, np.ndarray]:
    return {one.name: getattr(model, one.name) for one in fields(model)}


def fit_ridge(x: Matrix, y: Column, *, penalty: float = PENALTY, seed: int = 0) -> Ridge:
    """Ridge on standardised columns, intercept free: w = (Z'Z + penalty I)^-1 Z'(y - mean y)."""
    from sklearn.linear_model import Ridge as SklearnRidge

    del seed  # nothing is drawn
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    fitted = SklearnRidge(alpha=penalty).fit((x - mean) / scale, y)
    return Ridge(mean, scale, np.asarray(fitted.coef_), np.array([float(fitted.intercept_)]))


def fit_trees(x: Matrix, y: Column, *, penalty: float = PENALTY, seed: int = 0) -> Trees:
    """Gradient-boosted trees for squared error: 100 trees of depth 2, rate 0.05."""
    from sklearn.ensemble import GradientBoostingRegressor

    del penalty  # trees have none
    fitted = GradientBoostingRegressor(
        max_depth=DEPTH, n_estimators=TREES, learning_rate=RATE, random_state=seed
    ).fit(x, y)
    trees = [one.tree_ for one in fitted.estimators_[:, 0]]
    nodes = max(tree.node_count for tree in trees)

    def table(name: str, fill: float | int, kind: Any) -> np.ndarray:
        out = np.full((len(trees), nodes), fill, dtype=kind)
        for row, tree in zip(out, trees, strict=True):
            row[: tree.node_count] = np.asarray(getattr(tree, name)).reshape(tree.node_count)
        return out

    return Trees(
        start=np.array([float(np.mean(y))]),
        rate=np.array([RATE]),
        column=table("feature", -1, np.int64),
        threshold=table("threshold", 0.0, np.float64),
        left=table("children_left", -1, np.int64),
        right=table("children_right", -1, np.int64),
        value=table("value", 0.0, np.float64),
    )


Fit = Callable[..., Fitted]
MODELS: dict[str, tuple[Fit, type]] = {"ridge": (fit_ridge, Ridge), "trees": (fit_trees, Trees)}


def named_model(word: str) -> tuple[Fit, type]:
    """How the model that a word names is fitted, and its class."""
    if word not in MODELS:
        raise ValueError(f"no model {word!r}; choose one of {', '.join(MODELS)}")
    return MODELS[word]


def from_arrays(word: str, arrays: Mapping[str, np.ndarray]) -> Fitted:
    """The fitted model that `arrays()` described. Raises ValueError when an array is missing."""
    kind = named_model(word)[1]
    wanted = [one.name for one in fields(kind)]
    if set(arrays) != set(wanted):
        raise ValueError(f"a {word} model has arrays {wanted}, not {sorted(arrays)}")
    model: Fitted = kind(**arrays)
    return model
