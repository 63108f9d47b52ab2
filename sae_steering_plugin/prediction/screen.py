"""From a forecast to groups of features to steer with: split, match on effect, take the extremes.

Source: arXiv 2606.08365, section "held-out screening". Two ridge forecasts are fitted on the
training features alone, one of the clean score and one of the effect size; pool features of
middling forecast effect are ranked, and the top, the bottom and random others become groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..types import FeatureTable
from .models import named_model
from .predictors import SideEffectPredictor, fit_predictor, label_values
from .sets import named_columns

TRAIN_SHARE = 0.6
BAND = (10.0, 90.0)
"""Percentiles of the forecast effect between which pool features are kept."""

GROUPS = ("clean", "random", "messy")
PROTOCOLS = ("strict", "paper")


@dataclass(frozen=True, eq=False)
class Groups:
    """Pool features by forecast, and the two forecasts behind them.

    `forecast` is the forecast score of every pool feature, `matched` those of middling forecast
    effect, `groups` the features of each group, best forecast first. `settings` say how.
    """

    train: tuple[int, ...]
    pool: tuple[int, ...]
    matched: tuple[int, ...]
    groups: Mapping[str, tuple[int, ...]]
    forecast: Mapping[int, float]
    score: SideEffectPredictor
    effect: SideEffectPredictor
    settings: Mapping[str, Any] = field(default_factory=dict)


def split_features(
    features: Sequence[int], *, train_share: float = TRAIN_SHARE, seed: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Training and pool features by a shuffle, each sorted. ValueError when one side is empty."""
    distinct = sorted(set(int(f) for f in features))
    cut = round(train_share * len(distinct))
    if not 0 < cut < len(distinct):
        raise ValueError(f"{len(distinct)} features split {train_share:g} leave a side empty")
    order = np.random.default_rng(seed).permutation(len(distinct))
    train, pool = order[:cut], order[cut:]
    return tuple(sorted(distinct[i] for i in train)), tuple(sorted(distinct[i] for i in pool))


def check_words(columns: str | Sequence[str], model: str, protocol: str) -> None:
    """Raise ValueError for an unknown predictor set, model or protocol, naming the known ones."""
    named_columns(columns)
    named_model(model)
    if protocol not in PROTOCOLS:
        raise ValueError(f"no protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}")


def screen_groups(
    statistics: FeatureTable,
    labels: FeatureTable,
    train: Sequence[int],
    pool: Sequence[int],
    *,
    size: int,
    target: str = "clean",
    columns: str | Sequence[str] = "full_no_magnitude",
    model: str = "ridge",
    band: tuple[float, float] = BAND,
    protocol: str = "strict",
    seed: int = 0,
) -> Groups:
    """Groups of `size` pool features with the cleanest and messiest forecasts, and random others.

    "strict": only training labels are used, for fitting and for standardising the score. "paper":
    the score is standardised over all labelled features, the pool's included (no predictor leaks,
    but the scale of the target does). Groups are at most a third of the matched features.

    Raises ValueError for an unknown protocol, a feature on both sides, and fewer than three matched
    features.
    """
    check_words(columns, model, protocol)
    if both := set(train) & set(pool):
        raise ValueError(f"feature {min(both)} is in the training set and in the pool")
    training = labels.of([f for f in train if f in set(labels.table.index)])
    standard = training.table if protocol == "strict" else labels.table
    scored = training.table.assign(score=label_values(training.table, target, standard=standard))
    fitted = replace(training, table=scored)
    options: dict[str, Any] = {"columns": columns, "model": model, "seed": seed}
    score = replace(fit_predictor(statistics, fitted, "score", **options), target=target)
    effect = fit_predictor(statistics, training, "effect", **options)
    asked = statistics.of(pool)
    ranked = score.predict(asked).table[target].to_numpy()
    size_of = effect.predict(asked).table["effect"].to_numpy()
    defined = np.isfinite(ranked) & np.isfinite(size_of)
    if defined.sum() < len(GROUPS):
        raise ValueError(f"{int(defined.sum())} pool features have a forecast: too few")
    low, high = np.percentile(size_of[defined], band)
    matched = np.flatnonzero(defined & (size_of >= low) & (size_of <= high))
    number = min(size, len(matched) // len(GROUPS))
    if number < 1:
        raise ValueError(f"{len(matched)} pool features match in effect: too few for three groups")
    order = matched[np.argsort(-ranked[matched], kind="stable")]
    rest = order[number : len(order) - number]
    drawn = np.random.default_rng(seed).permutation(len(rest))[:number]
    features = np.array(pool)
    chosen = {"clean": order[:number], "random": rest[np.sort(drawn)], "messy": order[-number:]}
    return Groups(
        train=tuple(score.features),
        pool=tuple(int(f) for f in pool),
        matched=tuple(int(f) for f in features[matched]),
        groups={name: tuple(int(f) for f in features[rows]) for name, rows in chosen.items()},
        forecast=dict(zip((int(f) for f in pool), ranked.tolist(), strict=True)),
        score=score,
        effect=effect,
        settings={
            "target": target,
            "columns": columns if isinstance(columns, str) else list(columns),
            "model": model,
            "band": list(band),
            "protocol": protocol,
            "asked_size": size,
            "size": number,
            "seed": seed,
        },
    )


__all__ = [
    "BAND",
    "GROUPS",
    "PROTOCOLS",
    "TRAIN_SHARE",
    "Groups",
    "screen_groups",
    "split_features",
]
