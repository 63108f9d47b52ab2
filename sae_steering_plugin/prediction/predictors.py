"""Forecasts of side effects from statistics that need no steered pass, and how good they are.

    predictor = fit_predictor(statistics, effects, "clean")
    forecast = predictor.predict(statistics)                    # a FeatureTable
    found = cross_validate(statistics, effects, "count_0.05", controls=CONTROLS)

Source: arXiv 2606.08365, sections "prediction and controls"; nuisance fits stay inside folds, as
its replication recommends. A forecast is about activation spread, not about harm, and holds for one
(model, dictionary, layer, strength).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from ..types import FeatureTable
from .association import CONSTANT, RESAMPLES, bootstrapped, rank_statistic, spearman, varies
from .models import PENALTY, Fitted, from_arrays, named_model
from .sets import named_columns

if TYPE_CHECKING:
    import pandas as pd

FOLDS = 5
FEWEST_ROWS = 5
"""Rows a fold needs at least."""

CONTROLS = ("effect", "natural_mean", "natural_max", "firing_rate")
"""Nuisances of a label: effect size, natural activation, firing rate (the intervention value of
the paper is one number in additive steering)."""

EPSILON = 1e-8

CLEAN = ("clean", "clean_log_count_per_effect")
"""Targets that are computed from several labels; see `clean_score`."""

BINDING = (
    "crowding_k",
    "basis",
    "folded",
    "norm_gain",
    "centred_row",
    "centred_vocabulary",
    "coactivation_self",
)
"""Settings that decide what a column means: a forecast needs those it was fitted with."""

FORMAT = "sae-steering-plugin side-effect predictor 1"

Values = Float[np.ndarray, " row"]


@dataclass(frozen=True)
class CleanScale:
    """Means and deviations that the two parts of a clean score are standardised with."""

    stability: tuple[float, float]
    spread: tuple[float, float]


def clean_parts(effects: pd.DataFrame, target: str = "clean") -> tuple[Values, Values]:
    """Stability, and log collateral per effect, of each feature.

    "clean": log1p(C / (E + 1e-8)); "clean_log_count_per_effect": log1p(C) / (E + 1e-8). The
    scripts of arXiv 2606.08365 use the first for one of the paper's settings and the second for the
    others. Raises ValueError without collateral labels.
    """
    if target not in CLEAN:
        raise ValueError(f"no clean score {target!r}; choose one of {', '.join(CLEAN)}")
    counts = [name for name in effects if str(name).startswith("count_") and _is_tau(str(name))]
    if not counts:
        raise ValueError("a clean score needs collateral labels: measure with a downstream SAE")
    count, effect = (effects[name].to_numpy(np.float64) for name in (counts[0], "effect"))
    per = count / (effect + EPSILON)
    spread = np.log1p(per) if target == "clean" else np.log1p(count) / (effect + EPSILON)
    return effects["stability_abs"].to_numpy(np.float64), spread


def _is_tau(name: str) -> bool:
    return name.removeprefix("count_").replace(".", "", 1).isdigit()


def clean_scale(effects: pd.DataFrame, target: str = "clean") -> CleanScale:
    """The standardisation that these features give (undefined ones left out)."""
    stability, spread = clean_parts(effects, target)
    return CleanScale(_moments(stability), _moments(spread))


def _moments(values: Values) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    return float(defined.mean()), float(defined.std())


def clean_score(effects: pd.DataFrame, scale: CleanScale, target: str = "clean") -> Values:
    """z(stability) - z(log collateral per effect), higher is cleaner; z by `scale`."""
    parts = zip(clean_parts(effects, target), (scale.stability, scale.spread), strict=True)
    first, second = ((values - mean) / (std + EPSILON) for values, (mean, std) in parts)
    return np.asarray(first - second)


def label_values(
    effects: pd.DataFrame, target: str, *, standard: pd.DataFrame | None = None
) -> Values:
    """The target's value per row; clean scores are standardised by `standard` (the rows
    themselves).

    Raises ValueError for a label that was not measured.
    """
    if target in CLEAN:
        scale = clean_scale(effects if standard is None else standard, target)
        return clean_score(effects, scale, target)
    if target not in effects:
        raise ValueError(
            f"no label {target!r}; measured are {', '.join(map(str, effects.columns))}, and "
            f"computed {', '.join(CLEAN)}"
        )
    return effects[target].to_numpy(np.float64)


@dataclass(frozen=True, eq=False)
class SideEffectPredictor:
    """A fitted forecast of one label, with everything that decides whether it applies.

    `features` are those it was fitted on; `dropped` lists constant columns, which it ignores;
    `settings` hold the model, hook, strength and thresholds of the labels and the loading options
    of the statistics.
    """

    target: str
    columns: tuple[str, ...]
    kind: str
    model: Fitted
    sae_id: str
    features: tuple[int, ...]
    dropped: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.features)

    def predict(self, statistics: FeatureTable) -> FeatureTable:
        """The forecast as column `target`, one row per feature; NaN where a predictor is NaN.

        Raises ValueError when a column is missing or was made with other settings. Warns when the
        statistics are of another dictionary: forecasts do not carry over.
        """
        self._check(statistics)
        table = statistics.table
        x = table[list(self.columns)].to_numpy(np.float64)
        defined = np.isfinite(x).all(axis=1)
        forecast = np.full(len(x), np.nan)
        if defined.any():
            forecast[defined] = self.model.predict(x[defined])
        import pandas as pd

        settings = {
            "forecast": self.target,
            "n_fitted": self.n,
            "undefined": int((~defined).sum()),
            **self.settings,
        }
        found = pd.DataFrame({self.target: forecast}, index=table.index)
        return FeatureTable(found, statistics.sae_id, settings)

    def _check(self, statistics: FeatureTable) -> None:
        missing = [name for name in self.columns if name not in statistics.table]
        if missing:
            raise ValueError(
                f"the statistics lack column {missing[0]!r} that this forecast was fitted with"
            )
        for name in BINDING:
            mine, given = self.settings.get(name), statistics.settings.get(name)
            if mine is not None and given is not None and mine != given:
                raise ValueError(
                    f"the statistics were made with {name} = {given!r}, the forecast with {mine!r}"
                )
        if statistics.sae_id != self.sae_id:
            warnings.warn(
                f"this forecast was fitted on {self.sae_id!r} and is asked about "
                f"{statistics.sae_id!r}: correlations do not carry over between dictionaries",
                UserWarning,
                stacklevel=3,
            )

    def save(self, path: str | Path) -> None:
        """Write the arrays as safetensors with everything else as JSON in the header."""
        from safetensors.numpy import save_file

        words = {
            "format": FORMAT,
            "target": self.target,
            "columns": list(self.columns),
            "kind": self.kind,
            "sae_id": self.sae_id,
            "features": list(self.features),
            "dropped": list(self.dropped),
            "settings": dict(self.settings),
        }
        arrays = {name: np.ascontiguousarray(a) for name, a in self.model.arrays().items()}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, str(path), metadata={"predictor": json.dumps(words)})

    @classmethod
    def load(cls, path: str | Path) -> SideEffectPredictor:
        """A predictor that `save` wrote; it predicts the same bits. ValueError for any other
        file."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is no file")
        try:
            with safe_open(str(path), framework="numpy") as file:
                words = json.loads((file.metadata() or {})["predictor"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no side-effect predictor") from error
        if words.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is no side-effect predictor of format {FORMAT!r}")
        for name in ("columns", "features", "dropped"):
            words[name] = tuple(words[name])
        return cls(model=from_arrays(words["kind"], arrays), **words)

    def __repr__(self) -> str:
        return (
            f"SideEffectPredictor({self.target!r}, {self.kind}, {len(self.columns)} columns, "
            f"{self.n} features)"
        )


@dataclass(frozen=True, eq=False)
class _Data:
    """Rows of both tables that are complete: predictors, label, controls, features."""

    x: Float[np.ndarray, "row column"]
    y: Values
    controls: Float[np.ndarray, "row control"]
    features: tuple[int, ...]
    columns: tuple[str, ...]
    dropped: tuple[str, ...]
    effects: pd.DataFrame
    excluded: int


def _joined(
    statistics: FeatureTable,
    effects: FeatureTable,
    target: str,
    columns: str | Sequence[str],
    controls: Sequence[str] = (),
) -> _Data:
    if statistics.sae_id != effects.sae_id:
        raise ValueError(
            f"the statistics are of {statistics.sae_id!r} and the labels of {effects.sae_id!r}"
        )
    wanted = named_columns(columns)
    for name in (*wanted, *controls):
        table = statistics if name in wanted else effects
        if name not in table.table:
            kind = "statistics" if table is statistics else "labels"
            raise ValueError(f"the {kind} have no column {name!r}")
    shared = [f for f in effects.table.index if f in set(statistics.table.index)]
    left, labels = statistics.table.loc[shared], effects.table.loc[shared]
    x = left[list(wanted)].to_numpy(np.float64)
    y = label_values(labels, target)
    z = labels[list(controls)].to_numpy(np.float64).reshape(len(shared), len(controls))
    kept = np.isfinite(x).all(axis=1) & np.isfinite(y) & np.isfinite(z).all(axis=1)
    moving = [i for i in range(len(wanted)) if kept.any() and varies(x[kept, i])]
    if not moving:
        raise ValueError("no predictor varies over the features that have statistics and labels")
    chosen = np.flatnonzero(kept)
    return _Data(
        x=x[chosen][:, moving],
        y=y[chosen],
        controls=z[chosen],
        features=tuple(int(shared[i]) for i in chosen),
        columns=tuple(wanted[i] for i in moving),
        dropped=tuple(name for i, name in enumerate(wanted) if i not in moving),
        effects=labels.iloc[chosen],
        excluded=len(effects.table) - len(chosen),
    )


def fit_predictor(
    statistics: FeatureTable,
    effects: FeatureTable,
    target: str = "clean",
    *,
    columns: str | Sequence[str] = "full_no_magnitude",
    model: str = "ridge",
    penalty: float = PENALTY,
    seed: int = 0,
) -> SideEffectPredictor:
    """A forecast of `target` from a predictor set, fitted on the features that both tables hold.

    `model` is "ridge" (penalty on standardised columns) or "trees" (gradient boosting). Features
    with an undefined figure are left out and constant columns dropped; both are on record. Raises
    ValueError for tables of two dictionaries, an unknown label, set, column or model, and fewer
    than 5 complete features.
    """
    fit = named_model(model)[0]
    data = _joined(statistics, effects, target, columns)
    if len(data.y) < FEWEST_ROWS:
        raise ValueError(f"{len(data.y)} complete features are too few to fit on")
    return SideEffectPredictor(
        target=target,
        columns=data.columns,
        kind=model,
        model=fit(data.x, data.y, penalty=penalty, seed=seed),
        sae_id=statistics.sae_id,
        features=data.features,
        dropped=data.dropped,
        settings={**_about(statistics, effects), "excluded": data.excluded, "seed": seed},
    )


def _about(statistics: FeatureTable, effects: FeatureTable) -> dict[str, Any]:
    kept = ("model_name", "hook_name", "downstream_id", "strength", "unit", "taus", "positions")
    found = {name: effects.settings[name] for name in kept if name in effects.settings}
    binding = {name: statistics.settings.get(name) for name in (*BINDING, "soft_cap")}
    return {**found, **{name: value for name, value in binding.items() if value is not None}}


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """How well a label is forecast for features that were left out.

    `spearman` is of the pooled out-of-fold forecasts with a bootstrap interval over features,
    `spearman_folds` of each fold, `spearman_mean` their mean. `forecasts` holds feature, fold,
    label (residual label with controls) and forecast. Undefined correlations are NaN.
    """

    target: str
    columns: tuple[str, ...]
    kind: str
    controls: tuple[str, ...]
    spearman: float
    low: float
    high: float
    spearman_mean: float
    spearman_folds: tuple[float, ...]
    r2: float
    mae: float
    n: int
    excluded: int
    dropped: tuple[str, ...]
    forecasts: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """Everything but the forecasts."""
        names = [name for name in self.__dataclass_fields__ if name != "forecasts"]
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        after = f" after {', '.join(self.controls)}" if self.controls else ""
        return (
            f"CrossValidation({self.target!r}{after}: Spearman {self.spearman:.3f} "
            f"({self.low:.3f} to {self.high:.3f}), n {self.n})"
        )


def cross_validate(
    statistics: FeatureTable,
    effects: FeatureTable,
    target: str = "clean",
    *,
    columns: str | Sequence[str] = "full_no_magnitude",
    model: str = "ridge",
    penalty: float = PENALTY,
    folds: int = FOLDS,
    controls: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> CrossValidation:
    """Out-of-fold forecasts of `target` over shuffled folds.

    With `controls` (columns of the labels) the label is first regressed on them by least squares
    inside each training fold; what is left, there and in the fold that is forecast, is the label.
    Standardisation, also of a clean score, uses the training fold alone. The p value of a
    difference to another set comes from `difference`.

    Raises what `fit_predictor` raises, and ValueError for fewer than two folds or fewer than 5
    features per fold.
    """
    import pandas as pd

    fit = named_model(model)[0]
    data = _joined(statistics, effects, target, columns, controls)
    n = len(data.y)
    if folds < 2 or n < FEWEST_ROWS * folds:
        raise ValueError(
            f"{n} complete features in {folds} folds: at least two folds of {FEWEST_ROWS}"
        )
    order = np.random.default_rng(seed).permutation(n)
    fold = np.empty(n, dtype=np.int64)
    fold[order] = np.arange(n) % folds
    forecast, label = np.full(n, np.nan), np.full(n, np.nan)
    for number in range(folds):
        test = fold == number
        y = label_values(data.effects, target, standard=data.effects[~test])
        left = _residual(y, data.controls, ~test)
        label[test] = left[test]
        if varies(left[~test], scale=float(np.abs(y).max())):
            fitted = fit(data.x[~test], left[~test], penalty=penalty, seed=seed)
            forecast[test] = fitted.predict(data.x[test])
    scale = float(np.abs(data.y).max())
    defined = bool(np.isfinite(forecast).all()) and varies(label, scale=scale)
    per_fold = tuple(
        spearman(label[fold == i], forecast[fold == i]) if defined else float("nan")
        for i in range(folds)
    )
    ends = (float("nan"), float("nan"))
    if defined and resamples:
        statistic = rank_statistic(label, forecast)
        ends = bootstrapped(statistic, n, resamples=resamples, seed=seed)
    wrong = label - forecast
    return CrossValidation(
        target=target,
        columns=data.columns,
        kind=model,
        controls=tuple(controls),
        spearman=spearman(label, forecast) if defined else float("nan"),
        low=ends[0],
        high=ends[1],
        spearman_mean=float(np.mean(per_fold)),
        spearman_folds=per_fold,
        r2=float(1 - (wrong @ wrong) / ((label - label.mean()) ** 2).sum())
        if defined
        else float("nan"),
        mae=float(np.abs(wrong).mean()) if defined else float("nan"),
        n=n,
        excluded=data.excluded,
        dropped=data.dropped,
        forecasts=pd.DataFrame(
            {"feature": data.features, "fold": fold, "label": label, "forecast": forecast}
        ),
    )


def _residual(y: Values, controls: Float[np.ndarray, "row control"], train: np.ndarray) -> Values:
    """`y` less its least-squares fit on the controls, fitted on the rows `train`."""
    if not controls.shape[1]:
        return y
    centre, scale = controls[train].mean(axis=0), controls[train].std(axis=0)
    moving = scale > CONSTANT * np.abs(centre).clip(1e-300)
    standard = (controls[:, moving] - centre[moving]) / scale[moving]
    basis = np.column_stack([np.ones(len(y)), standard])
    weights = np.linalg.lstsq(basis[train], y[train], rcond=None)[0]
    return np.asarray(y - basis @ weights)


@dataclass(frozen=True)
class SetDifference:
    """How much better one predictor set forecasts than another on the same features and folds."""

    difference: float
    low: float
    high: float
    n: int


def difference(
    one: CrossValidation, other: CrossValidation, *, resamples: int = RESAMPLES, seed: int = 0
) -> SetDifference:
    """Spearman of `one` minus that of `other`, with a bootstrap interval over shared features.

    Raises ValueError for two targets or controls.
    """
    if (one.target, one.controls) != (other.target, other.controls):
        raise ValueError("two cross-validations of one target and its controls are compared")
    both = one.forecasts.merge(other.forecasts, on="feature", suffixes=("", "_other"))
    label = both["label"].to_numpy()
    first, second = (
        rank_statistic(label, both[name].to_numpy()) for name in ("forecast", "forecast_other")
    )

    def statistic(rows: np.ndarray) -> np.ndarray:
        return first(rows) - second(rows)

    n = len(both)
    low, high = bootstrapped(statistic, n, resamples=resamples, seed=seed)
    return SetDifference(float(statistic(np.arange(n)[None])[0]), low, high, n)


__all__ = [
    "CONTROLS",
    "CrossValidation",
    "SetDifference",
    "SideEffectPredictor",
    "clean_score",
    "cross_validate",
    "difference",
    "fit_predictor",
]
