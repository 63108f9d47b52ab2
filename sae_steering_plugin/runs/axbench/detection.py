"""AxBench's concept detection: one score per text, and what is read off the scores.

Pure arithmetic on scores and categories. A text's score is the largest of its tokens' scores after
rounding each to three decimals; AUROC and threshold are over positive and negative rows, and hard
negatives only enter the macro accuracy at that threshold. Source: arXiv 2501.17148 and its code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ...effects.sizes import superiority

DECIMALS = 3
"""Decimals a token's score is rounded to before the maximum is taken."""
FALLBACK = 50.0
"""The maximum activation that stands in for one that is missing or not above 0."""


def rounded(scores: Sequence[float | int]) -> list[float]:
    """Token scores as AxBench stores them. Raises ValueError for none, or one that is no number."""
    found = [round(float(one), DECIMALS) for one in scores]
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(f"token scores must be finite and at least one; got {found[:5]}")
    return found


@dataclass(frozen=True)
class Pooled:
    """A text's score, and the first token that has it."""

    value: float
    index: int

    @classmethod
    def of(cls, scores: Sequence[float | int]) -> Pooled:
        """The largest rounded token score. The prefix must have been left out before."""
        found = rounded(scores)
        best = max(found)
        return cls(best, found.index(best))


def auroc(scores: Float[np.ndarray, " text"], positive: Bool[np.ndarray, " text"]) -> float:
    """Area under the ROC curve with midranks: P(positive > negative) + P(equal) / 2.

    0.5 for a constant score. Raises ValueError without rows on either side.
    """
    check_both_sides(positive)
    return superiority(scores[~positive].tolist(), scores[positive].tolist())


def check_both_sides(positive: Bool[np.ndarray, " text"]) -> None:
    if not 0 < int(positive.sum()) < len(positive):
        raise ValueError(
            f"{int(positive.sum())} of {len(positive)} rows are positive: detection needs both"
        )


def normalised(scores: Float[np.ndarray, " text"]) -> Float[np.ndarray, " text"]:
    """Scores from 0 to 1 by their smallest and largest; all 0 where they are one number."""
    low, high = float(scores.min()), float(scores.max())
    return (scores - low) / (high - low) if high > low else np.zeros_like(scores)


@dataclass(frozen=True)
class Curve:
    """The ROC curve as scikit-learn draws it, and Youden's threshold.

    A row counts as positive when its score reaches `threshold`, the first one with the largest TPR
    minus FPR. Where no cut is better than none, the threshold is 1 above every score.
    """

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]
    threshold: float

    @classmethod
    def of(cls, scores: Float[np.ndarray, " text"], positive: Bool[np.ndarray, " text"]) -> Curve:
        from sklearn.metrics import roc_curve

        check_both_sides(positive)
        fpr, tpr, cuts = roc_curve(positive, scores)
        best = float(cuts[int(np.argmax(tpr - fpr))])
        threshold = best if math.isfinite(best) else float(scores.max()) + 1.0
        return cls(tuple(map(float, fpr)), tuple(map(float, tpr)), threshold)


@dataclass(frozen=True)
class Detection:
    """What one method's scores say of one concept.

    `max_act` is the largest score over *all* rows, hard negatives included, in the method's own
    units; it scales steering. `threshold` is on scores normalised over all rows. `hard_accuracy` is
    None for a concept without hard negatives. `best_f1` is the largest F1 over thresholds with the
    other concepts' negatives added; None when none were scored.
    """

    auroc: float
    max_act: float
    threshold: float
    hard_accuracy: float | None
    n: Mapping[str, int]
    curve: Curve = field(repr=False)
    best_f1: float | None = None

    def fields(self) -> dict[str, dict[str, Any]]:
        """The fields AxBench's evaluators write, by evaluator."""
        found: dict[str, dict[str, Any]] = {
            "AUCROCEvaluator": {
                "max_act": self.max_act,
                "roc_auc": self.auroc,
                "optimal_threshold": self.threshold,
                "roc_curve": {"fpr": list(self.curve.fpr), "tpr": list(self.curve.tpr)},
            }
        }
        if self.hard_accuracy is not None:
            found["HardNegativeEvaluator"] = {"macro_avg_accuracy": self.hard_accuracy}
        return found


def detect(
    scores: Sequence[float | int],
    categories: Sequence[str],
    *,
    further: Sequence[float] = (),
) -> Detection:
    """A concept's detection from the score and category of each of its rows.

    `further` are scores of other concepts' negatives, for the imbalanced F1 alone. Raises
    ValueError for an unknown category, a score that is no number, or a side without rows.
    """
    values = np.asarray(scores, dtype=np.float64)
    kinds = np.asarray(categories, dtype=object)
    if unknown := sorted({*kinds} - {"positive", "negative", "hard negative"}):
        raise ValueError(f"no category {unknown[0]!r}")
    if len(values) != len(kinds) or not np.isfinite(values).all():
        raise ValueError("one finite score per row is needed")
    counted = kinds != "hard negative"
    positive = kinds[counted] == "positive"
    scaled = normalised(values)
    curve = Curve.of(scaled[counted], positive)
    hard = scaled[kinds == "hard negative"]
    return Detection(
        auroc=auroc(values[counted], positive),
        max_act=float(values.max()),
        threshold=curve.threshold,
        hard_accuracy=macro_accuracy(scaled[kinds == "positive"], hard, curve.threshold),
        n={name: int((kinds == name).sum()) for name in ("positive", "negative", "hard negative")},
        curve=curve,
        best_f1=best_f1(values[counted], positive, further) if len(further) else None,
    )


def macro_accuracy(
    positives: Float[np.ndarray, " positive"], hard: Float[np.ndarray, " hard"], threshold: float
) -> float | None:
    """Mean of the accuracy on positives and on hard negatives; None without hard negatives."""
    if not len(hard):
        return None
    return float(((positives >= threshold).mean() + (hard < threshold).mean()) / 2)


def best_f1(
    scores: Float[np.ndarray, " text"],
    positive: Bool[np.ndarray, " text"],
    further: Sequence[float] = (),
) -> float:
    """The largest F1 over all thresholds, with further negatives added."""
    values = np.concatenate([scores, np.asarray(further, dtype=np.float64)])
    labels = np.concatenate([positive, np.zeros(len(further), dtype=bool)])
    order = np.argsort(-values, kind="stable")
    hits, values = np.cumsum(labels[order]), values[order]
    last = np.append(values[1:] != values[:-1], True)  # a threshold takes all rows that tie
    taken = np.arange(1, len(values) + 1)
    return float((2 * hits / (taken + labels.sum()))[last].max())


def scale_of(max_act: float | None) -> tuple[float, bool]:
    """The maximum activation that factors multiply, and whether it is the fallback of 50.

    Missing, not finite and not above 0 all mean the fallback.
    """
    if max_act is None or not math.isfinite(max_act) or max_act <= 0:
        return FALLBACK, True
    return float(max_act), False


# The text-only baseline ---------------------------------------------------------------------------


def bag_of_words_scores(
    train_texts: Sequence[str], train_positive: Sequence[bool], texts: Sequence[str]
) -> list[float]:
    """Probabilities of a bag of words for `texts`: counts, logistic regression with L2, C = 100.

    It reads no model. What it reaches is what a detection score says nothing about a
    representation with. Source: AxBench's BoW baseline.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer()
    counts = words.fit_transform(train_texts)
    model = LogisticRegression(C=100.0, max_iter=1000).fit(counts, np.asarray(train_positive))
    return [float(one) for one in model.predict_proba(words.transform(texts))[:, 1]]
