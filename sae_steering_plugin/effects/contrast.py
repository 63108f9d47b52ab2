"""Two arms in, one `Effect` out: size, interval, tests, shares. And the correction of a family.

Every function takes one value per item; where a function is paired, entry i of both arms belongs
to item i. Everything is computed in float64. Nothing here is selected, dropped or corrected
silently: a value that is not finite is an error, and data that has no interval says so in `note`.

The parts stand in `sizes`, `intervals`, `significance` and `corrections`, and can be imported from
here too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from typing import Any

from ..types import Effect
from .corrections import (
    CORRECTIONS,
    benjamini_hochberg,
    bonferroni,
    holm,
    named_correction,
    simultaneous_level,
    uncorrected,
)
from .intervals import Interval, d_interval, superiority_interval
from .significance import (
    TESTS,
    Test,
    mann_whitney,
    mcnemar,
    mcnemar_chi2,
    named_test,
    paired_permutation,
    permutation,
    wilcoxon,
)
from .sizes import cohens_d, hedges_g, moved_wrong, paired_d, superiority
from .values import Values, as_values, both_values, numbered, paired_values

__all__ = [
    "CORRECTIONS",
    "TESTS",
    "Interval",
    "Test",
    "Values",
    "as_values",
    "benjamini_hochberg",
    "bonferroni",
    "cohens_d",
    "corrected",
    "d_interval",
    "effect",
    "hedges_g",
    "holm",
    "mann_whitney",
    "mcnemar",
    "mcnemar_chi2",
    "moved_wrong",
    "named_correction",
    "named_test",
    "paired_d",
    "paired_permutation",
    "paired_values",
    "permutation",
    "simultaneous_level",
    "superiority",
    "superiority_interval",
    "uncorrected",
    "wilcoxon",
]


def effect(
    base: Values,
    arm: Values,
    *,
    method: str,
    outcome: str,
    strength: float | int = float("nan"),
    unit: str = "",
    positions: str = "",
    test: str | None = None,
    unpaired_test: str = "mann-whitney",
    paired: bool = True,
    sign: int = 1,
    ddof: int = 1,
    level: float = 0.95,
    interval: str = "bca",
    resamples: int = 2000,
    seed: int = 0,
    clusters: Any = None,
    **details: Any,
) -> Effect:
    """Everything known about one outcome in two arms, as one `Effect`: the row a table needs.

    `test` gives `p_value`: the paired permutation test by default, or `unpaired_test` for
    `paired=False`; naming a test of the other kind is an error. Paired arms are also given to
    `unpaired_test` (`unpaired_p`), which forgets the pairing, as the source's headline test does.
    `interval` is the bootstrap of d, "bca" or "percentile". With `clusters` (a name per item) the
    intervals draw and the permutation test flips whole clusters; tests that would take the items
    for independent are then an error, and `unpaired_p` is left out. `details` are further fields of
    `Effect` (trait, valid_rate, displacement, model, judge, ...).

    Warns when every item has the same value in each arm and the arms differ: d is 0 by the source's
    convention and says nothing then.
    """
    chosen = named_test(test or ("paired permutation" if paired else unpaired_test))
    beside = named_test(unpaired_test)
    if beside.paired:
        raise ValueError(f"{unpaired_test!r} pairs the items: it cannot be the unpaired test")
    if chosen.paired and not paired:
        raise ValueError(
            f"{chosen.name!r} needs paired items; choose mann-whitney for paired=False"
        )
    if clusters is not None and not (chosen.clustered and paired):
        raise ValueError(
            f"{chosen.name!r} takes items for independent, which clusters are not: use paired "
            "items and 'paired permutation'"
        )
    first, second = both_values(base, arm, paired=paired)
    size = cohens_d(first, second, ddof=ddof)
    if size == 0 and first.mean() != second.mean():
        warnings.warn(
            f"{outcome!r} is {first[0]:g} for every base item and {second[0]:g} for every item of "
            f"{method!r}: d has no value and is given as 0; read the means and the p value",
            stacklevel=2,
        )
    groups = None if clusters is None else numbered(clusters, len(first))
    around_d = d_interval(
        first,
        second,
        paired=paired,
        ddof=ddof,
        level=level,
        resamples=resamples,
        seed=seed,
        method=interval,
        clusters=groups,
    )
    around_share = superiority_interval(first, second, paired=paired, level=level, clusters=groups)
    with_clusters = {} if groups is None else {"clusters": groups}
    computed = {
        "n_base": len(first),
        "n_clusters": 0 if groups is None else int(groups.max()) + 1,
        "interval": f"bootstrap {around_d.method}" if around_d.method != "none" else "none",
        "note": around_d.note,
        "d_z": paired_d(first, second, ddof=ddof) if paired else nan,
        "hedges_g": hedges_g(first, second),
        "superiority": superiority(first, second),
        "superiority_low": around_share.low,
        "superiority_high": around_share.high,
        "unpaired_p": beside.p_value(first, second) if groups is None else nan,
        "unpaired_test": beside.name if groups is None else "",
        "moved_wrong": moved_wrong(first, second, sign=sign) if paired else nan,
    }
    return Effect(
        method=method,
        outcome=outcome,
        strength=float(strength),
        unit=unit,
        positions=str(positions),
        n=len(second),
        base_mean=float(first.mean()),
        arm_mean=float(second.mean()),
        d=size,
        ci_low=around_d.low,
        ci_high=around_d.high,
        p_value=chosen.p_value(first, second, **with_clusters),
        test=chosen.name,
        ddof=ddof,
        level=level,
        **{**computed, **details},
    )


def corrected(effects: Sequence[Effect], *, correction: str = "holm") -> tuple[Effect, ...]:
    """The same effects with `p_adjusted` over the whole family and the correction's name."""
    adjust = named_correction(correction)
    if not effects:
        return ()
    adjusted = adjust([one.p_value for one in effects])
    return tuple(
        replace(one, p_adjusted=float(p), correction=correction)
        for one, p in zip(effects, adjusted, strict=True)
    )
