"""Choosing by forecast among features that a selection holds for equally good."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Forecaster(Protocol):
    """Forecasts of side effects by feature, higher is cleaner, NaN where none can be made."""

    def forecast_of(self, features: Sequence[int]) -> dict[int, float]: ...


def equally_good(
    features: Sequence[int], scores: Sequence[float], *, within: float
) -> tuple[int, ...]:
    """The features whose score is at most `within` below the best one, in the order given.

    Raises ValueError for a negative `within` and for lists of two lengths.
    """
    if not within >= 0:
        raise ValueError(f"within is {within}: how far below the best score is as good as the best")
    if len(features) != len(scores):
        raise ValueError(f"{len(features)} features with {len(scores)} scores")
    best = max(scores, default=0.0)
    return tuple(f for f, score in zip(features, scores, strict=True) if score >= best - within)


def cleanest_first(
    features: Sequence[int], equals: Sequence[int], forecast: Mapping[int, float]
) -> list[int]:
    """`equals` by falling forecast, then the other features in their order.

    Equals without a forecast come after those that have one; ties keep their order.
    """
    known = [f for f in equals if not math.isnan(forecast[f])]
    chosen = sorted(known, key=lambda f: -forecast[f])
    chosen += [f for f in equals if math.isnan(forecast[f])]
    return [*chosen, *(f for f in features if f not in set(equals))]


__all__ = ["Forecaster", "cleanest_first", "equally_good"]
