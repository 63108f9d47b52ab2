"""Several vectors against several outcomes: the cross-trait matrix, its mirrors, selectivity."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from ..types import Effect, escaped
from .compare import SHOWN, ArmResults
from .contrast import corrected, effect
from .intervals import Interval, bootstrap, item_draws, resampled_d

if TYPE_CHECKING:
    import pandas as pd


# Outcomes that say the same ---------------------------------------------------------------------


@dataclass(frozen=True)
class Mirror:
    """Two outcomes that are one by construction: `second` = a + `slope` * `first` in every item.

    With a negative slope their effects are exact opposites, and counting both counts one twice.
    """

    first: str
    second: str
    slope: float

    def __str__(self) -> str:
        return f"{self.second} = {'-' if self.slope < 0 else ''}{self.first} by construction"


MIRROR_ROUNDING = 1e-9
"""Largest deviation from a straight line, in deviations of the outcome, that counts as rounding."""


def mirrored(
    values: Float[np.ndarray, "row outcome"], outcomes: Sequence[str]
) -> tuple[Mirror, ...]:
    """Every pair of outcomes that lie on one straight line in all rows. Constant ones have none."""
    centred = values - values.mean(axis=0)
    deviation = centred.std(axis=0)
    found = []
    for i, first in enumerate(outcomes):
        for j in range(i + 1, len(outcomes)):
            if not min(deviation[i], deviation[j]) > 0:
                continue
            slope = float(centred[:, i] @ centred[:, j] / (centred[:, i] @ centred[:, i]))
            off = np.abs(centred[:, j] - slope * centred[:, i]).max()
            if off <= MIRROR_ROUNDING * deviation[j]:
                found.append(Mirror(first, outcomes[j], slope))
    return tuple(found)


def without_mirrors(outcomes: Sequence[str], mirrors: Sequence[Mirror]) -> tuple[str, ...]:
    """The outcomes without those that mirror an earlier one."""
    twins = {mirror.second for mirror in mirrors}
    return tuple(name for name in outcomes if name not in twins)


# Selectivity ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selectivity:
    """|d| on the target over the largest |d| elsewhere, its interval, and the word for it.

    `left_out` are outcomes not counted as "elsewhere": mirrors of the target, where the ratio could
    never exceed 1. The ratio is infinite when nothing else moved, and 0 when nothing moved at all.
    """

    vector: str
    target: str
    ratio: float
    low: float
    high: float
    level: float
    strongest_other: str
    word: str
    left_out: tuple[str, ...]
    thresholds: tuple[float, float]
    interval: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SPECIFIC, PARTIAL = 2.0, 1.0
"""Ratios from which a vector is "specific" and "partial" (arXiv 2603.16335, code)."""


def selectivity(
    base: Float[np.ndarray, ...],
    arm: Float[np.ndarray, ...],
    outcomes: Sequence[str],
    *,
    target: str,
    vector: str = "",
    mirrors: Sequence[Mirror] | None = None,
    thresholds: tuple[float, float] = (SPECIFIC, PARTIAL),
    ddof: int = 1,
    level: float = 0.95,
    method: str = "percentile",
    resamples: int = 2000,
    seed: int = 0,
) -> Selectivity:
    """The selectivity ratio |d_target| / max |d_other| of one arm, with a bootstrap interval.

    `base` and `arm` are `[item outcome]`, the same items in both.
    Items are drawn with all their outcomes in both arms, so what outcomes share stays shared. The
    largest of several noisy |d| lies above the largest true one, so the ratio leans towards "not
    specific" for small samples. `mirrors` of the target are left out (found in the data when None).
    Words: at least `thresholds[0]` "specific", at least `thresholds[1]` "partial", else
    "not specific". Raises ValueError for an unknown target or no other outcome.
    """
    names = list(outcomes)
    base, arm = np.asarray(base, dtype=np.float64), np.asarray(arm, dtype=np.float64)
    if base.shape != arm.shape or base.ndim != 2 or base.shape[1] != len(names):
        raise ValueError(
            f"base has shape {base.shape} and arm {arm.shape}; both need one row per item and "
            f"{len(names)} outcomes"
        )
    if target not in names:
        raise ValueError(f"no outcome {target!r}; choose one of {', '.join(names)}")
    if mirrors is None:
        mirrors = mirrored(np.concatenate([base, arm]), names)
    twins = {one.first for one in mirrors if one.second == target}
    twins |= {one.second for one in mirrors if one.first == target}
    others = [name for name in names if name != target and name not in twins]
    if not others:
        raise ValueError(f"no outcome besides {target!r} that does not mirror it")
    columns = [names.index(name) for name in (target, *others)]

    def sizes(rows: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        each = [resampled_d(base[:, c], arm[:, c], rows, drawn, ddof=ddof) for c in columns]
        return np.abs(np.stack(each))

    def ratios(rows: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        found = sizes(rows, drawn)
        return ratio_of(found[0], found[1:].max(axis=0))

    n = len(base)
    once = np.ones((1, n))
    measured = sizes(once, once)[:, 0]
    ratio = float(ratio_of(measured[:1], measured[1:].max(keepdims=True))[0])
    around = bootstrap(
        ratios,
        item_draws(n, n, paired=True),
        level=level,
        method=method,
        resamples=resamples,
        seed=seed,
        whole=(0.0, np.inf),
    )
    notes = [around.note] if around.note else []
    if not measured.any():
        notes.append("nothing moved")
    elif not measured[1:].any():
        notes.append("no other outcome moved")
    specific, partial = thresholds
    word = "specific" if ratio >= specific else "partial" if ratio >= partial else "not specific"
    return Selectivity(
        vector=vector,
        target=target,
        ratio=ratio,
        low=around.low,
        high=around.high,
        level=level,
        strongest_other=others[int(measured[1:].argmax())],
        word=word,
        left_out=tuple(sorted(twins, key=names.index)),
        thresholds=(specific, partial),
        interval=f"bootstrap {around.method}" if around.method != "none" else "none",
        note="; ".join(notes),
    )


def ratio_of(
    target: Float[np.ndarray, " resample"], other: Float[np.ndarray, " resample"]
) -> Float[np.ndarray, " resample"]:
    """target / other; infinite where only `other` is 0 or target is infinite, 0 where both are 0.

    Infinite over infinite (both separate without spread) has no value: NaN.
    """
    nothing = other <= 0
    both = np.isinf(target) & np.isinf(other)
    safe = np.where(nothing | both, 1.0, other)
    ratio = np.where(both, 1.0, target) / safe
    return np.where(both, np.nan, np.where(nothing, np.where(target > 0, np.inf, 0.0), ratio))


# The matrix -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CrossTraitMatrix:
    """One `Effect` per vector and outcome, corrected as one family, and the data behind them.

    `effects` run by vector, then by outcome. `targets` name the outcome each vector was built for,
    where there is one. `mirrors` were recognised in the data; `dropped` outcomes are not in it.
    `values[a, i, o]` is outcome o of item i in arm a (the base first, then the vectors): items with
    every value in every arm; `n_incomplete` items lack one and are in no `values`.
    """

    vectors: tuple[str, ...]
    outcomes: tuple[str, ...]
    effects: tuple[Effect, ...]
    targets: Mapping[str, str]
    mirrors: tuple[Mirror, ...]
    dropped: tuple[str, ...]
    values: Float[np.ndarray, "arm item outcome"]
    items: tuple[str, ...]
    n_incomplete: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def cell(self, vector: str, outcome: str) -> Effect:
        """The effect of one vector on one outcome. KeyError lists the known ones."""
        for name, known in ((vector, self.vectors), (outcome, self.outcomes)):
            if name not in known:
                raise KeyError(f"no {name!r}; the matrix has {', '.join(known)}")
        place = self.vectors.index(vector) * len(self.outcomes) + self.outcomes.index(outcome)
        return self.effects[place]

    def grid(self, name: str = "d") -> pd.DataFrame:
        """One field of the effects ("d", "p_value", "p_adjusted", "ci_low", ...), vectors down."""
        import pandas as pd

        cells = np.array([getattr(one, name) for one in self.effects], dtype=object)
        frame = pd.DataFrame(
            cells.reshape(len(self.vectors), len(self.outcomes)),
            index=pd.Index(self.vectors, name="vector"),
            columns=pd.Index(self.outcomes, name="outcome"),
        )
        return frame.infer_objects()

    def table(self) -> pd.DataFrame:
        """One row per cell: vector, whether the outcome is its target, and the effect's fields."""
        import pandas as pd

        names = [vector for vector in self.vectors for _ in self.outcomes]
        return pd.DataFrame(
            {"vector": name, "on_target": self.targets.get(name) == one.outcome, **one.to_dict()}
            for name, one in zip(names, self.effects, strict=True)
        )

    def significant(self, alpha: float = 0.05) -> dict[str, int | float]:
        """How many cells have p at most `alpha` before and after the correction, and how many are.

        `expected` is the number by chance before correction, if no vector did anything.
        """
        return {
            "cells": len(self.effects),
            "uncorrected": sum(one.p_value <= alpha for one in self.effects),
            "corrected": sum(one.p_adjusted <= alpha for one in self.effects),
            "expected": alpha * len(self.effects),
        }

    def selectivity(self, **options: Any) -> tuple[Selectivity, ...]:
        """The selectivity of every vector that has a target (see `selectivity`)."""
        given = {"ddof": self.settings.get("ddof", 1), "mirrors": self.mirrors, **options}
        return tuple(
            selectivity(
                self.values[0],
                self.values[1 + self.vectors.index(vector)],
                self.outcomes,
                target=target,
                vector=vector,
                **given,
            )
            for vector, target in self.targets.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but `values`, as JSON takes it."""
        return {
            "vectors": list(self.vectors),
            "outcomes": list(self.outcomes),
            "effects": [one.to_dict() for one in self.effects],
            "targets": dict(self.targets),
            "mirrors": [asdict(one) for one in self.mirrors],
            "dropped": list(self.dropped),
            "n_items": len(self.items),
            "n_incomplete": self.n_incomplete,
            "settings": dict(self.settings),
        }

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escaped(name)}</th>" for name in self.outcomes)
        body = ""
        for vector in self.vectors:
            cells = "".join(cell_html(self.cell(vector, name)) for name in self.outcomes)
            body += f"<tr><th>{escaped(vector)}</th>{cells}</tr>"
        counts = self.significant()
        first = self.effects[0]
        words = [
            f"d (ddof {first.ddof}), {first.level:.0%} interval ({first.interval}), p adjusted "
            f"({first.correction} over {self.settings.get('distinct_cells', counts['cells'])} "
            "cells); bold: at most 0.05",
            *map(str, self.mirrors),
        ]
        if self.dropped:
            words.append(f"left out: {', '.join(self.dropped)}")
        notes = "".join(f"<p>{escaped(one)}</p>" for one in words)
        return f"<table><tr><th>vector</th>{head}</tr>{body}</table>{notes}"


def cell_html(one: Effect) -> str:
    """d over its interval and adjusted p; bold when that is at most 0.05."""
    size = f"<b>{one.d:+.2f}</b>" if one.p_adjusted <= 0.05 else f"{one.d:+.2f}"
    return (
        f"<td>{size}<br><small>{one.ci_low:+.2f} to {one.ci_high:+.2f}<br>"
        f"p {one.p_adjusted:.2g}</small></td>"
    )


def cross_trait_matrix(
    table: pd.DataFrame | ArmResults,
    *,
    outcomes: Sequence[str],
    base: str = "base",
    vectors: Sequence[str] | Mapping[str, str] | None = None,
    targets: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
    arm: str = "arm",
    item: str = "scenario",
    clusters: str | None = None,
    paired: bool = True,
    test: str | None = None,
    correction: str = "holm",
    ddof: int = 1,
    level: float = 0.95,
    interval: str = "bca",
    resamples: int = 2000,
    seed: int = 0,
    details: Mapping[str, Mapping[str, Any]] | None = None,
) -> CrossTraitMatrix:
    """Each vector's effect on each outcome against the base arm, corrected over all cells.

    `table` has one row per arm and item (`Rollouts`, or their table): columns `arm`, `item`, the
    outcomes and, where known, `valid`. `vectors` are the arms to compare (a mapping gives them
    other names; default: every arm but `base`). `targets` map a vector's name to the outcome it was
    built for; by default a vector named like an outcome has that one. `details[arm]` are further
    fields of its effects (`Rollouts.arms`).

    Outcomes that are one by construction (deference = 1 - autonomy) are found and reported in
    `mirrors`; they stay in the matrix, as in the source's, unless named in `drop`. The family of
    the correction is every cell. `paired=False` compares as the source's script does. `clusters`
    names a column (the items' template) whose items are resampled and flipped together.

    An item without a value in an arm is left out of that cell, counted in its `n_missing` and named
    in one warning. Raises KeyError for an arm or column the table lacks, ValueError for an item
    that occurs twice in an arm.
    """
    import pandas as pd

    frame = table if isinstance(table, pd.DataFrame) else table.table()
    for column in (arm, item, *outcomes, *drop, *([clusters] if clusters else [])):
        if column not in frame:
            raise KeyError(f"no column {column!r}; the table has {', '.join(map(str, frame))}")
    kept = tuple(name for name in outcomes if name not in drop)
    present = list(dict.fromkeys(frame[arm]))
    if vectors is None:
        vectors = [name for name in present if name != base]
    named = dict(vectors) if isinstance(vectors, Mapping) else {name: name for name in vectors}
    if not named or not kept:
        raise ValueError("a cross-trait matrix needs at least one vector and one outcome")
    for name in (base, *named):
        if name not in present:
            raise KeyError(f"no arm {name!r}; the table has {', '.join(map(str, present))}")
    if base in named:
        raise ValueError(f"{base!r} is the base arm and cannot be one of the vectors")
    if len(set(named.values())) < len(named):
        raise ValueError(f"two vectors have one name: {', '.join(named.values())}")
    wanted = dict(targets) if targets is not None else {v: v for v in named.values() if v in kept}
    for vector, outcome in wanted.items():
        if vector not in named.values() or outcome not in kept:
            raise KeyError(
                f"target {vector!r}: {outcome!r}; vectors are {', '.join(named.values())}, "
                f"outcomes {', '.join(kept)}"
            )
    columns = list(kept) + [name for name in ("valid", clusters) if name and name in frame]
    sides = {name: one_arm(frame, arm, name, item, columns) for name in (base, *named)}
    first = sides[base]
    found: list[Effect] = []
    gaps: set[str] = set()
    for name, label in named.items():
        says = dict((details or {}).get(name, {}))
        says["method"] = label
        for outcome in kept:
            before, after, missing = cell_columns(first, sides[name], outcome, paired=paired)
            gaps.update(missing)
            known = {
                "n_missing": len(missing),
                "base_valid_rate": rate(first),
                "valid_rate": rate(sides[name]),
                **({"trait": wanted[label]} if label in wanted else {}),
                **says,
            }
            found.append(
                effect(
                    before.to_numpy(),
                    after.to_numpy(),
                    outcome=outcome,
                    paired=paired,
                    test=test,
                    ddof=ddof,
                    level=level,
                    interval=interval,
                    resamples=resamples,
                    seed=seed,
                    clusters=first.loc[before.index, clusters] if clusters else None,
                    **known,
                )
            )
    complete = complete_items(list(sides.values()), kept)
    if gaps:
        shown = ", ".join(sorted(gaps)[:SHOWN]) + (", ..." if len(gaps) > SHOWN else "")
        warnings.warn(
            f"{len(gaps)} items lack a value in some arm and are left out of its cells: {shown}",
            stacklevel=2,
        )
    values = np.stack([side.loc[complete, list(kept)].to_numpy(float) for side in sides.values()])
    every = {name for side in sides.values() for name in side.index}
    return CrossTraitMatrix(
        vectors=tuple(named.values()),
        outcomes=kept,
        effects=corrected(found, correction=correction),
        targets=wanted,
        mirrors=mirrored(values.reshape(-1, len(kept)), kept) if len(complete) else (),
        dropped=tuple(name for name in drop if name in outcomes),
        values=values,
        items=tuple(map(str, complete)),
        n_incomplete=len(every) - len(complete),
        settings={
            "base": base,
            "paired": paired,
            "correction": correction,
            "ddof": ddof,
            "level": level,
            "resamples": resamples,
            "seed": seed,
            "clusters": clusters or "",
        },
    )


def one_arm(
    frame: pd.DataFrame, arm: str, name: str, item: str, columns: Sequence[str]
) -> pd.DataFrame:
    """One arm's columns by item. Raises ValueError when an item occurs twice."""
    mine = frame[frame[arm] == name]
    repeated = mine[item][mine[item].duplicated()]
    if len(repeated):
        raise ValueError(f"item {repeated.iloc[0]!r} occurs more than once in arm {name!r}")
    return mine.set_index(item, drop=False)[list(columns)]


def cell_columns(
    first: pd.DataFrame, second: pd.DataFrame, outcome: str, *, paired: bool
) -> tuple[pd.Series, pd.Series, list[str]]:
    """The outcome of both arms where it has a value (in both, if paired), and items without one."""
    before, after = (side[outcome].astype("float64").dropna() for side in (first, second))
    whole = first.index.union(second.index, sort=False)
    if paired:
        shared = before.index.intersection(after.index, sort=False)
        before, after = before.loc[shared], after.loc[shared]
        missing = whole.difference(shared, sort=False)
    else:
        lost = [
            side.index.difference(kept.index, sort=False)
            for side, kept in ((first, before), (second, after))
        ]
        missing = lost[0].union(lost[1], sort=False)
    if not len(before) or not len(after):
        raise ValueError(f"the arms share no item with a value of {outcome!r}")
    return before, after, [str(name) for name in missing]


def complete_items(sides: Sequence[pd.DataFrame], outcomes: Sequence[str]) -> list[Any]:
    """Items with a value of every outcome in every arm, in the order of the first arm."""
    kept = [set(side.index[side[list(outcomes)].notna().all(axis=1)]) for side in sides]
    return [name for name in sides[0].index if all(name in one for one in kept)]


def rate(side: pd.DataFrame) -> float:
    """Share of valid outputs; NaN where the table does not say."""
    return float(side["valid"].mean()) if "valid" in side else float("nan")


__all__ = [
    "CrossTraitMatrix",
    "Interval",
    "Mirror",
    "Selectivity",
    "cross_trait_matrix",
    "mirrored",
    "selectivity",
    "without_mirrors",
]
