"""AxBench's steering score: three ratings per text, one number per concept and method.

Pure arithmetic. A text's score is the harmonic mean of its ratings, 0 as soon as one is 0; a
factor's is the mean of its texts' scores (not the harmonic mean of means). The factor is chosen on
the first half of the instructions and reported on the other. Source: arXiv 2501.17148 and its code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from ..judges.three import Ratings

ADDITION_FACTORS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0)
CLAMPING_FACTORS = (0.4, 0.8, 1.2, 1.6, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 100.0)
"""AxBench's factors, in multiples of the concept's maximum activation."""

ASPECTS = ("concept", "instruct", "fluency")
Missing = Literal["left out", "zero"]
"""What a rating that a judge did not give counts as. AxBench's code says zero, which is a bias:
the default leaves the text out and counts it."""


def harmonic_mean(ratings: Float[np.ndarray, "*text 3"]) -> Float[np.ndarray, "*text"]:
    """3 / (1/c + 1/i + 1/f) per text, 0 where one rating is 0, NaN where one is missing.

    Raises ValueError for a rating outside 0 to 2.
    """
    values = np.asarray(ratings, dtype=np.float64)
    if ((values < 0) | (values > 2)).any():
        raise ValueError("ratings lie between 0 and 2")
    with np.errstate(divide="ignore"):
        found = 3 / (1 / values).sum(axis=-1)
    return np.where(np.isnan(values).any(axis=-1), np.nan, found)


def as_array(ratings: Sequence[Ratings], missing: Missing = "left out") -> np.ndarray:
    """Ratings as `[text, 3]`; a missing one is NaN, or 0 where AxBench's code is to be matched."""
    blank = 0.0 if missing == "zero" else math.nan
    return np.array(
        [[blank if one is None else one for one in row] for row in ratings], dtype=np.float64
    ).reshape(-1, 3)


def selection_half(input_ids: Sequence[int], instructions: int) -> Bool[np.ndarray, " text"]:
    """True for the instructions a factor is chosen on: `input_id < instructions / 2`."""
    return np.asarray(input_ids) < instructions / 2


@dataclass(frozen=True)
class SteeringScore:
    """What one method reached on one concept.

    `score` is the mean over the reported half at `factor`, the first of the best factors on the
    other half (`selection_score`). Without factors it is the mean over all rows of the reported
    half and `factor` is None. `aspects` are the means of the three ratings on the rows behind
    `score`, `unrated` how many of these had no score, `covered` False when the method had nothing
    to steer with and its score is 0 for that.
    """

    concept_id: int
    method: str
    score: float
    factor: float | None
    selection_score: float
    aspects: Mapping[str, float]
    n: int
    unrated: int = 0
    covered: bool = True


def steering_score(
    concept_id: int,
    method: str,
    factors: Sequence[float],
    input_ids: Sequence[int],
    ratings: Float[np.ndarray, "text 3"],
    *,
    instructions: int,
    has_factor: bool = True,
) -> SteeringScore:
    """The score of a concept and method from its rows: factor, instruction and ratings of each.

    `factors` come in the order of the factor list, which decides ties. A factor whose every
    selection text is unrated cannot be chosen. Raises ValueError when a half has no rated text.
    """
    half = selection_half(input_ids, instructions)
    overall, rows = harmonic_mean(ratings), np.asarray(factors, dtype=np.float64)
    chosen: float | None = None
    if has_factor:
        listed = list(dict.fromkeys(rows.tolist()))
        means = [mean_of(overall[half & (rows == one)]) for one in listed]
        if all(map(math.isnan, means)):
            raise ValueError(f"{method}, concept {concept_id}: no rated text to choose a factor on")
        best = max(one for one in means if one == one)
        place = next(i for i, one in enumerate(means) if one == best)
        chosen, selected = listed[place], best
        reported = ~half & (rows == chosen)
    else:
        selected, reported = mean_of(overall[half]), ~half
    score = mean_of(overall[reported])
    if math.isnan(score):
        raise ValueError(f"{method}, concept {concept_id}: no rated text to report")
    aspects = {name: mean_of(ratings[reported, place]) for place, name in enumerate(ASPECTS)}
    unrated = int(np.isnan(overall[reported]).sum())
    return SteeringScore(
        concept_id, method, score, chosen, selected, aspects, int(reported.sum()), unrated
    )


def mean_of(values: Float[np.ndarray, " text"]) -> float:
    """The mean over what is there; NaN for nothing."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else math.nan


def hm_of_means(scores: Sequence[SteeringScore]) -> float:
    """The mean over concepts of the harmonic mean of each one's mean ratings; 0 where uncovered.

    The aggregation of arXiv 2505.20063, never below AxBench's (the mean of harmonic means) and no
    AxBench score. NaN without scores.
    """
    if not scores:
        return math.nan
    kept = [[s.aspects[name] for name in ASPECTS] if s.covered else [0.0] * 3 for s in scores]
    return float(harmonic_mean(np.asarray(kept, dtype=np.float64)).mean())


def uncovered(concept_id: int, method: str) -> SteeringScore:
    """The score of a method that found nothing to steer a concept with: 0, and marked."""
    nothing = dict.fromkeys(ASPECTS, math.nan)
    return SteeringScore(concept_id, method, 0.0, None, math.nan, nothing, 0, covered=False)


def winrate(scores: Mapping[int, float], reference: Mapping[int, float]) -> float:
    """Percentage of concepts won against a reference, a tie counting half.

    Raises ValueError when the two are not over the same concepts.
    """
    if set(scores) != set(reference) or not scores:
        raise ValueError("a winrate compares two methods on the same concepts")
    points = [
        1.0 if scores[one] > reference[one] else 0.5 if scores[one] == reference[one] else 0.0
        for one in scores
    ]
    return 100 * float(np.mean(points))


def perplexity(total_nll: float, tokens: int) -> float:
    """exp(nats per token); inf, never NaN, where that overflows. NaN without tokens."""
    if not tokens:
        return math.nan
    try:
        return math.exp(total_nll / tokens)
    except OverflowError:
        return math.inf
