"""Two arms with one row per item, matched by item and compared: `compare(base, arm, ...)`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ..types import Effect
from .contrast import effect

if TYPE_CHECKING:
    import pandas as pd


@runtime_checkable
class ArmResults(Protocol):
    """One arm's results: `table()` gives one row per item, `details()` what an `Effect` says of it.

    The table holds a column naming the item, one column per outcome, and `valid` (was the output
    well formed). `details()` may give any of method, strength, unit, positions, displacement,
    trait and model.
    """

    def table(self) -> pd.DataFrame: ...

    def details(self) -> dict[str, Any]: ...


SHOWN = 5
"""How many missing items a warning names."""


def compare(
    base: ArmResults,
    arm: ArmResults,
    *,
    outcome: str,
    item: str = "scenario",
    paired: bool = True,
    test: str | None = None,
    sign: int = 1,
    ddof: int = 1,
    level: float = 0.95,
    interval: str = "bca",
    resamples: int = 2000,
    seed: int = 0,
    clusters: str | None = None,
    **details: Any,
) -> Effect:
    """The effect of `arm` against `base` on one outcome column, paired by item: one table row.

    Items that one arm lacks, or whose outcome is not a number there, are not dropped in silence:
    they are counted in `Effect.n_missing` and named in a warning, and `n` counts the pairs used.
    Valid rates are over every item of each arm. `clusters` names a column (the items' template, or
    their seed) whose items are resampled and flipped together. `details` override what the arm says
    of itself; the other options are those of `effect`. Raises KeyError for a column that the tables
    lack, ValueError when an item occurs twice in an arm or no item is shared.
    """
    first, second = outcome_column(base, outcome, item), outcome_column(arm, outcome, item)
    missing, groups = 0, None
    if paired:
        first, second, missing = matched(first, second, outcome)
    else:
        missing = int(first.isna().sum() + second.isna().sum())
        first, second = first.dropna(), second.dropna()
    if clusters is not None:
        names = named_column(base, clusters, item)
        groups = names.loc[first.index]
    known = {
        "base_valid_rate": valid_rate(base),
        "valid_rate": valid_rate(arm),
        "n_missing": missing,
        **arm.details(),
        **details,
    }
    return effect(
        first.to_numpy(dtype=np.float64),
        second.to_numpy(dtype=np.float64),
        outcome=outcome,
        paired=paired,
        test=test,
        sign=sign,
        ddof=ddof,
        level=level,
        interval=interval,
        resamples=resamples,
        seed=seed,
        clusters=groups,
        **known,
    )


def matched(first: pd.Series, second: pd.Series, outcome: str) -> tuple[pd.Series, pd.Series, int]:
    """Both columns on the items that have a value in both, in base order, and how many lack one."""
    shared = first.dropna().index.intersection(second.dropna().index, sort=False)
    missing = first.index.union(second.index, sort=False).difference(shared, sort=False)
    if not len(shared):
        raise ValueError(f"the two arms share no item with a value of {outcome!r}")
    if len(missing):
        named = ", ".join(map(str, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
        warnings.warn(
            f"{len(missing)} of {len(shared) + len(missing)} items lack {outcome!r} in one arm and "
            f"are left out of the pairs: {named}",
            stacklevel=3,
        )
    return first.loc[shared], second.loc[shared], len(missing)


def outcome_column(arm: ArmResults, outcome: str, item: str) -> pd.Series:
    """One outcome indexed by item. KeyError for an unknown column, ValueError for a repeat."""
    return named_column(arm, outcome, item).astype("float64")


def named_column(arm: ArmResults, name: str, item: str) -> pd.Series:
    """One column indexed by item. KeyError for an unknown column, ValueError for a repeat."""
    table = arm.table()
    for column in (item, name):
        if column not in table:
            known = [one for one in table.columns if table[one].dtype.kind in "bif" or one == item]
            raise KeyError(f"no column {column!r}; the table has {', '.join(map(str, known))}")
    repeated = table[item][table[item].duplicated()]
    if len(repeated):
        raise ValueError(
            f"item {repeated.iloc[0]!r} occurs more than once: compare one arm at a time, "
            "with one row per item"
        )
    return table.set_index(item, drop=False)[name]


def valid_rate(arm: ArmResults) -> float:
    """Share of an arm's items whose output was well formed; NaN when the table does not say."""
    table = arm.table()
    return float(table["valid"].mean()) if "valid" in table else float("nan")
