"""Screening: forecast side effects, steer with what is forecast clean, and check it on fresh
contexts.

    found = screen(model, sae, tokens, fresh, downstream=later)
    found.rows        # group differences with intervals and tests
    found.dictionary(sae).save_model("clean")

Label contexts give statistics of all features and labels of the training features. Groups of pool
features are then measured on contexts that nothing was fitted or chosen on, with a panel of their
own. Source: arXiv 2606.08365, section "held-out screening".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from ..adapters.feature_metadata import keep_table
from ..adapters.sae_lens import SteeringDictionary
from ..effects.corrections import holm
from ..effects.intervals import bootstrap, item_draws
from ..effects.significance import mann_whitney
from ..prediction.association import Association, association
from ..prediction.predictors import SideEffectPredictor, fit_predictor, label_values
from ..prediction.screen import (
    BAND,
    GROUPS,
    TRAIN_SHARE,
    Groups,
    check_words,
    screen_groups,
    split_features,
)
from ..prediction.sets import CURVATURE, TANGENT, named_columns
from ..types import FeatureTable
from .feature_statistics import feature_statistics
from .gradient_statistics import CONTEXTS, gradient_statistics
from .side_effects import (
    PANEL,
    PER_KIND,
    ROWS,
    SideEffects,
    measure_side_effects,
    sample_features,
    survey_contexts,
)

METRICS = (
    "stability_abs",
    "stability_signed",
    "count_per_effect",
    "count",
    "moved_l2",
    "effective_moved",
    "effect",
)
"""What groups are compared by; `count` is the count at the first tau."""

AXES = {"stability": "stability_abs", "spread": "count_per_effect", "clean": "clean"}
"""The axes of a screen and the label of each."""


@dataclass(frozen=True, eq=False)
class Forecast:
    """A fitted forecast with the statistics of all features: what a selection can ask."""

    statistics: FeatureTable
    score: SideEffectPredictor

    def forecast_of(self, features: Sequence[int]) -> dict[int, float]:
        """The forecast score of any features of the dictionary, steered or not; higher is cleaner.

        NaN where a statistic is undefined. Nothing is steered.
        """
        table = self.score.predict(self.statistics.of(features)).table
        return {int(f): float(v) for f, v in table[self.score.target].items()}

    @classmethod
    def load(cls, folder: str | Path) -> Forecast:
        """The forecast of a screen that was saved in `folder`."""
        place = Path(folder)
        return cls(
            FeatureTable.from_parquet(place / "statistics.parquet"),
            SideEffectPredictor.load(place / "forecast_score.safetensors"),
        )


@dataclass(frozen=True, eq=False)
class Screen:
    """What a screen chose and what came of it.

    `labels` were measured on the label contexts (training features; all under the paper's
    protocol), `fresh` on the fresh ones. `rows` hold a comparison of two groups by one metric each,
    `axes` the forecast's rank correlation with what was measured on fresh contexts, and the groups'
    means.
    """

    groups: Groups
    statistics: FeatureTable
    labels: SideEffects
    fresh: SideEffects
    rows: tuple[dict[str, Any], ...]
    axes: tuple[dict[str, Any], ...]

    def forecast_of(self, features: Sequence[int]) -> dict[int, float]:
        """The forecast score of any features of the dictionary, as `Forecast.forecast_of`."""
        return Forecast(self.statistics, self.groups.score).forecast_of(features)

    def dictionary(self, sae: Any, group: str = "clean") -> SteeringDictionary:
        """A group's decoder rows as a SAELens dictionary, with measured stability and spread.

        Stability is `stability_abs`, spread the count per effect, both on fresh contexts; all that
        was measured there, and the forecast, is its `kept_table`. Raises ValueError for an unknown
        group.
        """
        if group not in self.groups.groups:
            raise ValueError(f"no group {group!r}; choose one of {', '.join(self.groups.groups)}")
        chosen = self.groups.groups[group]
        measured = self.fresh.of().of(chosen)
        dictionary = SteeringDictionary.from_features(
            sae,
            chosen,
            stability=measured.table["stability_abs"].tolist(),
            spread=measured.table["count_per_effect"].tolist(),
        )
        forecast = [self.groups.forecast[feature] for feature in chosen]
        keep_table(dictionary, replace(measured, table=measured.table.assign(forecast=forecast)))
        return dictionary

    def save(self, folder: str | Path, sae: Any = None) -> list[Path]:
        """Write `screen.json`, the tables, both forecasts and, with `sae`, the clean group."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        told = {
            "settings": dict(self.groups.settings),
            "labels": dict(self.labels.settings),
            "fresh": dict(self.fresh.settings),
            "groups": {name: list(found) for name, found in self.groups.groups.items()},
            "axes": list(self.axes),
            "differences": list(self.rows),
        }
        report = place / "screen.json"
        report.write_text(json.dumps(told, indent=1, default=str) + "\n")
        paths = [report]
        for name, table in (("labels", self.labels.table), ("fresh", self.fresh.table)):
            paths.append(place / f"{name}.parquet")
            table.to_parquet(paths[-1])
        paths.append(place / "statistics.parquet")
        self.statistics.to_parquet(paths[-1])
        for name, one in (("score", self.groups.score), ("effect", self.groups.effect)):
            paths.append(place / f"forecast_{name}.safetensors")
            one.save(paths[-1])
        if sae is not None:
            self.dictionary(sae).save_model(place / "clean")
            paths.append(place / "clean")
        return paths


def screen(
    model: Any,
    sae: Any,
    tokens: Int[Tensor, "context pos"],
    fresh: Int[Tensor, "fresh pos"],
    *,
    downstream: Any,
    features: Sequence[int] | None = None,
    n_features: int = 300,
    without: Sequence[int] = (),
    size: int = 25,
    strength: float = 1.0,
    unit: str = "raw",
    target: str = "clean",
    columns: str | Sequence[str] = "full_no_magnitude",
    predictor: str = "ridge",
    protocol: str = "strict",
    train_share: float = TRAIN_SHARE,
    band: tuple[float, float] = BAND,
    per_kind: int = PER_KIND,
    panel: int = PANEL,
    statistics: FeatureTable | None = None,
    whole_pool: bool = True,
    controls: int = 0,
    lowest: float = 0.001,
    highest: float = 0.5,
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = True,
) -> Screen:
    """Forecast which of `features` steer cleanly, and compare the forecast's groups on `fresh`.

    `features` default to `n_features` of all firing rates between `lowest` and `highest`. Features
    in `without` are neither labelled nor pooled: what is then forecast of them is out of sample.
    "strict" labels and uses the training features alone; "paper" labels all and standardises the
    score over all. Groups hold `size` features (a third of the matched ones at most). With
    `whole_pool` all pool features are measured on fresh contexts, which gives the held-out rank
    correlation; without it only the groups. `controls` random directions of equal length are
    measured beside each of them, on the fresh contexts. `statistics` default to
    `feature_statistics` of `tokens`, with `gradient_statistics` of the first 256 where `columns`
    names any of those.

    Raises ValueError when a fresh context is among the label contexts, and what
    `measure_side_effects`, `split_features` and `screen_groups` raise.
    """
    check_words(columns, predictor, protocol)
    known = {tuple(row) for row in tokens.tolist()}
    if shared := sum(tuple(row) in known for row in fresh.tolist()):
        raise ValueError(f"{shared} of {len(fresh)} fresh contexts are label contexts, too")
    options: dict[str, Any] = {
        "downstream": downstream,
        "strengths": (strength,),
        "unit": unit,
        "panel": panel,
        "rows": rows,
        "seed": seed,
        "progress": progress,
    }
    survey = survey_contexts(
        model, sae, tokens, downstream=downstream, panel=panel, rows=rows, progress=progress
    )
    if features is None:
        features = sample_features(survey, n_features, lowest=lowest, highest=highest, seed=seed)
    features = [f for f in features if f not in set(without)]
    train, pool = split_features(features, train_share=train_share, seed=seed)
    if statistics is None:
        statistics = feature_statistics(model, sae, tokens, progress=progress)
        if set(named_columns(columns)) & {*CURVATURE, *TANGENT}:
            some = tokens[:CONTEXTS]
            gradients = gradient_statistics(model, sae, some, seed=seed, progress=progress)
            statistics = statistics.join(gradients)
    labelled = train if protocol == "strict" else tuple(sorted((*train, *pool)))
    labels = measure_side_effects(
        model, sae, labelled, tokens, survey=survey, per_kind=per_kind, **options
    )
    groups = screen_groups(
        statistics,
        labels.of(),
        train,
        pool,
        size=size,
        target=target,
        columns=columns,
        model=predictor,
        band=band,
        protocol=protocol,
        seed=seed,
    )
    chosen = sorted({f for found in groups.groups.values() for f in found})
    measured = measure_side_effects(
        model,
        sae,
        pool if whole_pool else chosen,
        fresh,
        contexts="shared",
        controls=controls,
        **options,
    )
    table = measured.of()
    return Screen(
        groups=groups,
        statistics=statistics,
        labels=labels,
        fresh=measured,
        rows=tuple(group_differences(groups, table, seed=seed)),
        axes=tuple(axis_rows(groups, statistics, labels.of(), table, seed=seed)),
    )


def group_differences(
    groups: Groups, fresh: FeatureTable, *, seed: int = 0
) -> list[dict[str, Any]]:
    """Means of every metric in every two groups, their difference with a 95 % BCa bootstrap
    interval, Mann-Whitney's U and p, and p after Holm over all rows."""
    from scipy.stats import mannwhitneyu

    out = []
    for metric in METRICS:
        column = _first_count(fresh) if metric == "count" else metric
        found = {
            name: fresh.of(features).table[column].dropna().to_numpy(np.float64)
            for name, features in groups.groups.items()
        }
        for one, other in combinations(GROUPS, 2):
            a, b = found[one], found[other]
            if len(a) < 2 or len(b) < 2:
                continue
            ends = bootstrap(
                _mean_difference(b, a),
                item_draws(len(b), len(a), paired=False),
                method="bca",
                seed=seed,
            )
            out.append(
                {
                    "metric": column,
                    "groups": f"{one} - {other}",
                    "n": (len(a), len(b)),
                    "means": (float(a.mean()), float(b.mean())),
                    "difference": float(a.mean() - b.mean()),
                    "low": ends.low,
                    "high": ends.high,
                    "u": float(mannwhitneyu(a, b, alternative="two-sided").statistic),
                    "p_value": mann_whitney(b, a),
                }
            )
    for row, p in zip(out, holm([row["p_value"] for row in out]), strict=True):
        row["p_holm"] = float(p)
    return out


def _mean_difference(base: np.ndarray, arm: np.ndarray) -> Any:
    """mean(arm) - mean(base) from weights of the items."""

    def statistic(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.asarray(columns @ arm / columns.sum(1) - rows @ base / rows.sum(1))

    return statistic


def _first_count(table: FeatureTable) -> str:
    return next(name for name in table.columns if name.startswith("count_"))


def axis_rows(
    groups: Groups,
    statistics: FeatureTable,
    labels: FeatureTable,
    fresh: FeatureTable,
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Per axis: how the forecast fitted on training features ranks the measured others on fresh
    contexts (Spearman with interval), and the groups' means.

    The clean score of fresh contexts is standardised over the features measured there.
    """
    out = []
    training = labels.of([f for f in groups.train if f in set(labels.table.index)])
    options = {"columns": groups.settings["columns"], "model": groups.settings["model"]}
    for axis, label in AXES.items():
        measured = fresh.table.assign(value=label_values(fresh.table, label))["value"]
        forecast = (
            fit_predictor(statistics, training, label, **options)
            .predict(statistics.of(fresh.table.index.tolist()))
            .table[label]
        )
        both = forecast.notna() & measured.notna()
        found: Association = association(
            forecast[both].to_numpy(), measured[both].to_numpy(), seed=seed
        )
        means = {
            f"{name}_mean": float(measured.loc[list(features)].mean())
            for name, features in groups.groups.items()
        }
        out.append(
            {
                "axis": axis,
                "label": label,
                "n_features": found.n,
                "spearman_heldout": found.rho,
                "low": found.low,
                "high": found.high,
                "p_value": found.p_value,
                **means,
                "group_size": groups.settings["size"],
            }
        )
    return out


__all__ = ["Forecast", "Screen", "axis_rows", "group_differences", "screen"]
