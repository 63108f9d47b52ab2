"""What choosing by forecast bought: the chosen features steered on contexts nothing was chosen on.

Three ways to take one of several features that a selection holds for equally good: the best
forecast, the best score, or any of them at random. The last one's figures are the means over all of
them, which is what drawing one gives on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from ..effects.intervals import mean_interval
from ..effects.significance import paired_permutation
from ..prediction.choice import cleanest_first
from .side_effects import ROWS, measure_side_effects

if TYPE_CHECKING:
    import pandas as pd

WAYS = ("forecast", "score", "random")
FIGURES = ("stability_abs", "count_per_effect", "count", "moved_l2", "effect")
"""What the ways are compared by; `count` is the count at the first tau."""


@dataclass(frozen=True)
class Equals:
    """Features that a selection holds for equally good for one concept, best score first, and the
    forecast of each (higher is cleaner, NaN without one)."""

    concept: str
    features: tuple[int, ...]
    forecast: Mapping[int, float]

    @property
    def chosen(self) -> dict[str, tuple[int, ...]]:
        """The features behind each way's figures."""
        first = cleanest_first(self.features, self.features, self.forecast)[:1]
        ways = (tuple(first), self.features[:1], self.features)
        return dict(zip(WAYS, ways, strict=True))


@dataclass(frozen=True, eq=False)
class ForecastGain:
    """Measured figures of every way, a row per concept, and the ways compared over concepts.

    `table` has the columns `concept`, `n_equal`, `changed` (the forecast took another feature than
    the score) and `FIGURE WAY`; `rows` hold the paired differences.
    """

    table: pd.DataFrame
    rows: tuple[dict[str, Any], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def measured_gain(
    model: Any,
    sae: Any,
    equals: Sequence[Equals],
    fresh: Int[Tensor, "fresh pos"],
    *,
    downstream: Any,
    strength: float = 1.0,
    unit: str = "raw",
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = True,
) -> ForecastGain:
    """Steer with all equally good features on all `fresh` contexts and compare the three ways.

    Concepts with a single such feature leave nothing to choose: they are left out and counted in
    `settings["one_feature"]`. Raises ValueError when no concept has two, and what
    `measure_side_effects` raises.
    """
    several = [one for one in equals if len(one.features) > 1]
    if not several:
        raise ValueError(f"none of {len(equals)} concepts has two equally good features")
    asked = sorted({f for one in several for f in one.features})
    measured = measure_side_effects(
        model,
        sae,
        asked,
        fresh,
        downstream=downstream,
        strengths=(strength,),
        unit=unit,
        contexts="shared",
        rows=rows,
        seed=seed,
        progress=progress,
    )
    table = gain_table(several, measured.of().table)
    settings = {**measured.settings, "one_feature": len(equals) - len(several)}
    return ForecastGain(table, tuple(gain_rows(table, seed=seed)), settings)


def gain_table(equals: Sequence[Equals], measured: pd.DataFrame) -> pd.DataFrame:
    """Each way's figures per concept, from measured side effects by feature number."""
    import pandas as pd

    first_count = next(name for name in measured if str(name).startswith("count_0"))
    figures = measured.rename(columns={first_count: "count"})[list(FIGURES)]
    out = []
    for one in equals:
        chosen = one.chosen
        row: dict[str, Any] = {
            "concept": one.concept,
            "n_equal": len(one.features),
            "changed": chosen["forecast"] != chosen["score"],
            "by_forecast": chosen["forecast"][0],
            "by_score": chosen["score"][0],
        }
        for way, features in chosen.items():
            means = figures.loc[list(features)].mean()
            row |= {f"{name} {way}": float(means[name]) for name in FIGURES}
        out.append(row)
    return pd.DataFrame(out)


def gain_rows(
    table: pd.DataFrame, *, clusters: Sequence[str] | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """The forecast's way minus each other way, paired over concepts: the mean difference with a 95
    % bootstrap interval and the p of a sign-flip test (both over `clusters`, if given)."""
    out = []
    for name in FIGURES:
        for other in WAYS[1:]:
            arm, base = (table[f"{name} {way}"].to_numpy(np.float64) for way in (WAYS[0], other))
            kept = np.isfinite(arm) & np.isfinite(base)
            groups = None if clusters is None else np.array(clusters)[kept].tolist()
            ends = mean_interval(arm[kept] - base[kept], clusters=groups, seed=seed)
            out.append(
                {
                    "figure": name,
                    "against": other,
                    "n": int(kept.sum()),
                    "forecast_mean": float(arm[kept].mean()),
                    "other_mean": float(base[kept].mean()),
                    "difference": float((arm[kept] - base[kept]).mean()),
                    "low": ends.low,
                    "high": ends.high,
                    "p_value": paired_permutation(
                        base[kept], arm[kept], clusters=groups, seed=seed
                    ),
                }
            )
    return out


__all__ = ["Equals", "ForecastGain", "gain_rows", "gain_table", "measured_gain"]
