"""Does taking a few features out break one probe and no other, or free a probe of a confound?

The maths of SAEBench's targeted probe perturbation (TPP) and spurious correlation removal (SCR).
Probes read the mean of a text's residuals. A mean is linear, and so is a decoder: setting a code to
zero at every token, with the reconstruction error kept, moves that mean by the mean code times the
decoder row. So nothing is encoded or decoded again, and no other pooling will do.

Source: arXiv 2503.09532 and its code (shared/methods/causal_feature_scores, section 8).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from .pooled import PooledCodes

LEAST_ROOM = 1e-3
"""Accuracy that a biased probe must have to gain; SCR is 0 below it."""


def class_gaps(
    codes: PooledCodes, positive: Int[np.ndarray, " chosen"], negative: Int[np.ndarray, " other"]
) -> Float[np.ndarray, " feature"]:
    """Mean code over the texts `positive` less the mean over the texts `negative`."""
    weight = np.zeros(len(codes))
    weight[positive] += 1 / len(positive)
    weight[negative] -= 1 / len(negative)
    return np.asarray(codes.matrix().T @ weight)


def targeted_effects(
    gaps: Float[np.ndarray, " feature"],
    probe: Float[np.ndarray, " d_model"],
    rows: Float[np.ndarray, "feature d_model"],
) -> Float[np.ndarray, " feature"]:
    """TPP's order of features: max(0, gap) (w . W_dec), what a feature adds for the class."""
    return np.maximum(gaps, 0.0) * (rows @ probe)


def spurious_effects(
    gaps: Float[np.ndarray, " feature"],
    probe: Float[np.ndarray, " d_model"],
    rows: Float[np.ndarray, "feature d_model"],
) -> Float[np.ndarray, " feature"]:
    """SCR's order of features: |gap (w . W_dec)|, what a feature says for either side."""
    return np.abs(gaps * (rows @ probe))


def largest_effects(effects: Float[np.ndarray, " feature"], n: int) -> Int[np.ndarray, " chosen"]:
    """The n features of largest effect, largest first and ties by number.

    Only positive effects count, so fewer than n may come back. (SAEBench fills up with features of
    effect 0, and takes negative ones, where too few are positive.)
    """
    order = np.argsort(-effects, kind="stable")[:n]
    return order[effects[order] > 0]


def without_features(
    activations: Float[np.ndarray, "text d_model"],
    codes: PooledCodes,
    rows: Float[np.ndarray, "feature d_model"],
    features: Int[np.ndarray, " chosen"],
) -> Float[np.ndarray, "text d_model"]:
    """Mean-pooled activations with `features` set to zero at every token, the error kept.

    `codes` are the same texts' mean codes in units of the decoder `rows`. Raises ValueError for
    codes of another pooling.
    """
    if codes.pooling != "mean":
        raise ValueError(
            f"codes are pooled by {codes.pooling!r}; zeroing a feature is a subtraction for mean "
            "pooling only"
        )
    return activations - codes.matrix()[:, features] @ rows[features]


def balanced_accuracy(right: Bool[np.ndarray, " text"], cells: Int[np.ndarray, " text"]) -> float:
    """Mean over the cells of the share that is right: the accuracy expected on equal cells."""
    return float(np.mean([right[cells == cell].mean() for cell in np.unique(cells)]))


def targeted_scores(drops: Float[np.ndarray, "ablated probe"]) -> Float[np.ndarray, " ablated"]:
    """Per class, the accuracy its own probe loses less the mean that the other probes lose.

    `drops[i, j]` is what probe j loses when the features of class i are taken out; TPP is the mean.
    """
    own = np.diag(drops)
    return own - (drops.sum(axis=1) - own) / (len(drops) - 1)


def removal_score(ablated: float, biased: float, clean: float) -> float:
    """SCR: the share of (clean - biased) accuracy that ablation gives back; 1 is all of it.

    0 where the biased probe is within `LEAST_ROOM` of the clean one, or above it.
    """
    room = clean - biased
    return 0.0 if room < LEAST_ROOM else (ablated - biased) / room
