"""Two arms in, one `Effect` out: effect sizes, bootstrap intervals, tests, corrections.

Every function takes one value per item; where a function is paired, entry i of both arms belongs
to item i. Everything is computed in float64 and SciPy does the tests. Nothing here is selected,
dropped or corrected silently: a value that is not finite is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from ..types import Effect

Values: TypeAlias = Iterable[Any]
"""One number (or truth value) per item: a list, an array, a tensor, a pandas column."""

EXACT_LIMIT = 200_000
"""Most distinct outcomes a sign-flip distribution is enumerated over before it is sampled."""

ROUNDING = 1e-9
"""Rounding allowed when two sums are compared, relative to the size of what was summed."""


def as_values(values: Values, name: str = "values") -> Float[np.ndarray, " n"]:
    """`values` as a float64 column. Raises ValueError when empty, not one column, or not finite."""
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or not len(column):
        raise ValueError(f"{name} has shape {column.shape}; one number per item is needed")
    if not np.isfinite(column).all():
        where = int(np.flatnonzero(~np.isfinite(column))[0])
        raise ValueError(
            f"{name}[{where}] is {column[where]}: leave missing items out and count them"
        )
    return column


def paired_values(
    base: Values, arm: Values
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Both arms as columns of one length. Raises ValueError when the lengths differ."""
    first, second = as_values(base, "base"), as_values(arm, "arm")
    if len(first) != len(second):
        raise ValueError(
            f"base has {len(first)} items and arm {len(second)}: a paired comparison needs the "
            "same items in the same order; use paired=False for independent items"
        )
    return first, second


# Effect sizes -----------------------------------------------------------------------------------


def cohens_d(base: Values, arm: Values, *, ddof: int = 1) -> float:
    """Difference of means in units of the pooled standard deviation; positive when `arm` is larger.

    d = (mean(arm) - mean(base)) / s,   s^2 = (SS(base) + SS(arm)) / (n + m - 2 ddof)

    with SS the sum of squares about the arm's own mean. `ddof=1` is the usual pooled deviation;
    `ddof=0` is larger by sqrt(n / (n - 1)) for equal arms. Gives 0 when the pooled deviation is 0,
    also when the means differ: look at the means then. Raises ValueError when n + m < 3.
    Source: Cohen (1988), ch. 2; arXiv 2603.16335, code (`ddof=1`) and table (`ddof=0`).
    """
    first, second = as_values(base, "base"), as_values(arm, "arm")
    if len(first) + len(second) < 3:
        raise ValueError("Cohen's d needs at least three values in the two arms together")
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof!r}; it must be 0 or 1")
    squares = np.square(first - first.mean()).sum() + np.square(second - second.mean()).sum()
    pooled = np.sqrt(squares / (len(first) + len(second) - 2 * ddof))
    gap = second.mean() - first.mean()
    return float(gap / pooled) if is_spread(pooled, first, second) else 0.0


def is_spread(
    deviation: float, first: Float[np.ndarray, " n"], second: Float[np.ndarray, " m"]
) -> bool:
    """True when a deviation is more than the rounding of the numbers it was computed from."""
    scale = max(np.abs(first).max(), np.abs(second).max())
    return bool(deviation > 1e-12 * scale)


def hedges_g(base: Values, arm: Values) -> float:
    """Cohen's d (ddof=1) times Hedges' exact small-sample factor; unbiased for normal items.

    Source: Hedges, Journal of Educational Statistics 6 (1981).
    """
    from scipy.special import gammaln

    first, second = as_values(base, "base"), as_values(arm, "arm")
    freedom = len(first) + len(second) - 2
    log_factor = gammaln(freedom / 2) - gammaln((freedom - 1) / 2) - 0.5 * np.log(freedom / 2)
    return cohens_d(first, second) * float(np.exp(log_factor))


def paired_d(base: Values, arm: Values, *, ddof: int = 1) -> float:
    """Mean of the paired differences over their standard deviation (d_z); 0 when that is 0.

    Larger than `cohens_d` when the items agree across arms; the two must not be mixed in a table.
    """
    first, second = paired_values(base, arm)
    if len(first) <= ddof:
        raise ValueError(f"d_z with ddof={ddof} needs more than {ddof} items")
    difference = second - first
    deviation = difference.std(ddof=ddof)
    return float(difference.mean() / deviation) if is_spread(deviation, first, second) else 0.0


def superiority(base: Values, arm: Values) -> float:
    """P(arm > base) + P(arm = base) / 2 over all pairs of items; 0.5 means no difference.

    Equals the Mann-Whitney U of `arm` over n m. Also called the common-language effect size.
    """
    from scipy.stats import rankdata

    first, second = as_values(base, "base"), as_values(arm, "arm")
    ranks = rankdata(np.concatenate([first, second]))[len(first) :]
    m = len(second)
    return float((ranks.sum() - m * (m + 1) / 2) / (len(first) * m))


def moved_wrong(base: Values, arm: Values, *, sign: int = 1) -> float:
    """Share of items moved against the intended `sign`; an item that did not move is not.

    Source: share of anti-steerable samples, Tan et al., arXiv 2407.12404.
    """
    if sign not in (-1, 1):
        raise ValueError(f"sign is {sign!r}; it must be 1 (intended up) or -1 (intended down)")
    first, second = paired_values(base, arm)
    return float((sign * (second - first) < 0).mean())


# Intervals --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """Lower and upper end of an interval at `level`."""

    low: float
    high: float
    level: float = 0.95


BLOCK = 4_000_000
"""Entries of a resampling block held in memory at once (32 MB of float64)."""


def d_interval(
    base: Values,
    arm: Values,
    *,
    paired: bool = True,
    ddof: int = 1,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap percentile interval of Cohen's d, resampling items.

    Paired: an item is drawn with both its values, so that what items share stays shared. Unpaired:
    each arm is resampled by itself. A resample whose pooled deviation is zero while its means
    differ has no d; it counts as the largest finite d met on its side. When no resample varies the
    interval is [0, 0], as `cohens_d` is 0. Deterministic for one seed. At level 0.95 it covered
    the true d in 93 to 95 % of simulated samples of 30 to 200 pairs, normal and binary.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1")
    first, second = paired_values(base, arm) if paired else (as_values(base), as_values(arm))
    generator = np.random.default_rng(seed)
    blocks: list[Float[np.ndarray, " resample"]] = []
    step = max(1, BLOCK // max(len(first), len(second)))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        rows = resample_counts(generator, len(first), count)
        columns = rows if paired else resample_counts(generator, len(second), count)
        blocks.append(resampled_d(first, second, rows, columns, ddof=ddof))
    draws = with_finite_ends(np.concatenate(blocks))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def resample_counts(
    generator: np.random.Generator, items: int, resamples: int
) -> Float[np.ndarray, "resample item"]:
    """How often each item was drawn in each resample: `items` draws with replacement per row."""
    drawn = generator.integers(items, size=(resamples, items))
    flat = drawn + np.arange(resamples)[:, None] * items
    return np.bincount(flat.ravel(), minlength=resamples * items).reshape(resamples, items) * 1.0


def resampled_d(
    first: Float[np.ndarray, " n"],
    second: Float[np.ndarray, " m"],
    rows: Float[np.ndarray, "resample n"],
    columns: Float[np.ndarray, "resample m"],
    *,
    ddof: int,
) -> Float[np.ndarray, " resample"]:
    """Cohen's d of each resample; infinite where the arms separate without spread."""
    n, m = len(first), len(second)
    centre = np.concatenate([first, second]).mean()
    first, second = first - centre, second - centre
    mean_first, mean_second = rows @ first / n, columns @ second / m
    # Sums of squares from centred values: E[x^2] - E[x]^2 loses no digits that matter here.
    squares = rows @ first**2 - n * mean_first**2 + columns @ second**2 - m * mean_second**2
    gap = mean_second - mean_first
    scale = max(np.abs(first).max(), np.abs(second).max(), np.finfo(float).tiny)
    flat = squares <= ROUNDING * scale**2
    pooled = np.sqrt(np.where(flat, 1.0, squares) / max(n + m - 2 * ddof, 1))
    without_d = np.where(np.abs(gap) > ROUNDING * scale, np.copysign(np.inf, gap), 0.0)
    return np.where(flat, without_d, gap / pooled)


def with_finite_ends(draws: Float[np.ndarray, " resample"]) -> Float[np.ndarray, " resample"]:
    """Infinite draws replaced by the most extreme finite ones on their side (0 without any)."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return np.zeros_like(draws)
    return np.clip(draws, finite.min(), finite.max())


# Tests ------------------------------------------------------------------------------------------


def paired_permutation(base: Values, arm: Values, *, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p of the mean paired difference under random sign flips of the differences.

    Exact when the differences are whole numbers (the null distribution is a convolution) or when
    there are at most 2^17 sign patterns; otherwise `resamples` flips with the observed one counted,
    so that p is never 0. Tests that the differences are symmetric about zero.
    """
    first, second = paired_values(base, arm)
    differences = (second - first)[second != first]
    if not len(differences):
        return 1.0
    sizes, observed = np.abs(differences), abs(differences.sum())
    reached_at = observed - ROUNDING * sizes.sum()  # the sums cancel, so their rounding is absolute
    if (sizes == np.round(sizes)).all() and sizes.sum() <= EXACT_LIMIT / 4:
        return flip_probability(sizes.astype(int), int(observed))
    if 2 ** min(len(sizes), 60) <= EXACT_LIMIT:
        signs = sign_patterns(len(sizes))
        return float((np.abs(signs @ sizes) >= reached_at).mean())
    generator = np.random.default_rng(seed)
    reached = 0
    for start in range(0, resamples, step := max(1, BLOCK // len(sizes))):
        shape = (min(step, resamples - start), len(sizes))
        signs = generator.integers(0, 2, size=shape, dtype=np.int8) * 2.0 - 1
        reached += int((np.abs(signs @ sizes) >= reached_at).sum())
    return (reached + 1) / (resamples + 1)


def sign_patterns(count: int) -> Float[np.ndarray, "pattern count"]:
    """All 2^count rows of +1 and -1."""
    bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    return bits * 2.0 - 1


def flip_probability(sizes: np.ndarray, observed: int) -> float:
    """P(|sum of randomly signed `sizes`| >= observed) for whole numbers, by convolution."""
    total = int(sizes.sum())
    chance = np.zeros(2 * total + 1)
    chance[total] = 1.0
    for size in sizes:
        # Sums stay inside +-total because total bounds every partial sum.
        chance = (np.roll(chance, size) + np.roll(chance, -size)) / 2
    sums = np.abs(np.arange(-total, total + 1))
    return float(min(1.0, chance[sums >= observed].sum()))


def wilcoxon(base: Values, arm: Values) -> float:
    """Two-sided p of the Wilcoxon signed-rank test (SciPy defaults); 1 when no item moved."""
    from scipy.stats import wilcoxon as signed_rank

    first, second = paired_values(base, arm)
    if (first == second).all():
        return 1.0
    return float(signed_rank(first, second).pvalue)


def mcnemar(base: Values, arm: Values) -> float:
    """Two-sided exact p of McNemar's test: a binomial test on the items that changed.

    Raises ValueError unless both arms hold zeros and ones only.
    """
    from scipy.stats import binomtest

    first, second = paired_values(base, arm)
    if not np.isin(np.concatenate([first, second]), (0.0, 1.0)).all():
        raise ValueError("McNemar's test needs outcomes that are 0 or 1; use 'paired permutation'")
    up, down = int((second > first).sum()), int((second < first).sum())
    return float(binomtest(up, up + down).pvalue) if up + down else 1.0


def mann_whitney(base: Values, arm: Values) -> float:
    """Two-sided p of Mann-Whitney's U (SciPy defaults) for independent items; 1 if all tie."""
    from scipy.stats import mannwhitneyu

    first, second = as_values(base, "base"), as_values(arm, "arm")
    if len(np.unique(np.concatenate([first, second]))) == 1:
        return 1.0
    return float(mannwhitneyu(first, second, alternative="two-sided").pvalue)


@dataclass(frozen=True)
class Test:
    """A two-sided test of two arms: `p_value(base, arm)`, and whether it pairs the items."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    name: str
    p_value: Callable[[Values, Values], float]
    paired: bool


TESTS = {
    test.name: test
    for test in (
        Test("paired permutation", paired_permutation, paired=True),
        Test("wilcoxon", wilcoxon, paired=True),
        Test("mcnemar", mcnemar, paired=True),
        Test("mann-whitney", mann_whitney, paired=False),
    )
}


def named_test(word: str) -> Test:
    """The test that a word names; unknown words list the known ones."""
    if word not in TESTS:
        raise ValueError(f"no test {word!r}; choose one of {', '.join(TESTS)}")
    return TESTS[word]


# Many tests -------------------------------------------------------------------------------------


def holm(p_values: Values) -> Float[np.ndarray, " n"]:
    """Holm's step-down adjusted p values: family-wise error rate, no assumption on dependence."""
    p = p_column(p_values)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def benjamini_hochberg(p_values: Values) -> Float[np.ndarray, " n"]:
    """Benjamini-Hochberg adjusted p values: false discovery rate, independent or positive tests."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p_column(p_values), method="bh"))


def uncorrected(p_values: Values) -> Float[np.ndarray, " n"]:
    """The p values as they are."""
    return p_column(p_values)


def p_column(p_values: Values) -> Float[np.ndarray, " n"]:
    p = as_values(p_values, "p_values")
    if ((p < 0) | (p > 1)).any():
        raise ValueError("a p value lies outside 0..1")
    return p


CORRECTIONS = {"holm": holm, "bh": benjamini_hochberg, "none": uncorrected}


def named_correction(word: str) -> Callable[[Values], np.ndarray]:
    """The correction that a word names; unknown words list the known ones."""
    if word not in CORRECTIONS:
        raise ValueError(f"no correction {word!r}; choose one of {', '.join(CORRECTIONS)}")
    return CORRECTIONS[word]


# The record -------------------------------------------------------------------------------------


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
    paired: bool = True,
    sign: int = 1,
    ddof: int = 1,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    **details: Any,
) -> Effect:
    """Everything known about one outcome in two arms, as one `Effect`.

    `test` defaults to the paired permutation test, or Mann-Whitney for `paired=False`; naming a
    test of the other kind is an error. `details` are further fields of `Effect` (trait,
    valid_rate, displacement, model, judge, ...). Warns when every item has the same value in each
    arm and the arms differ: d is 0 by the source's convention and says nothing then.
    """
    chosen = named_test(test or ("paired permutation" if paired else "mann-whitney"))
    if chosen.paired and not paired:
        raise ValueError(
            f"{chosen.name!r} needs paired items; choose mann-whitney for paired=False"
        )
    first, second = (
        paired_values(base, arm) if paired else (as_values(base, "base"), as_values(arm, "arm"))
    )
    size = cohens_d(first, second, ddof=ddof)
    if size == 0 and first.mean() != second.mean():
        warnings.warn(
            f"{outcome!r} is {first[0]:g} for every base item and {second[0]:g} for every item of "
            f"{method!r}: d has no value and is given as 0; read the means and the p value",
            stacklevel=2,
        )
    interval = d_interval(
        first, second, paired=paired, ddof=ddof, level=level, resamples=resamples, seed=seed
    )
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
        ci_low=interval.low,
        ci_high=interval.high,
        p_value=chosen.p_value(first, second),
        test=chosen.name,
        ddof=ddof,
        level=level,
        moved_wrong=moved_wrong(first, second, sign=sign) if paired else float("nan"),
        **{"d_z": paired_d(first, second, ddof=ddof) if paired else float("nan"), **details},
    )


def corrected(effects: Sequence[Effect], *, correction: str = "holm") -> tuple[Effect, ...]:
    """The same effects with `p_adjusted` over the whole family and the correction's name."""
    from dataclasses import replace

    adjust = named_correction(correction)
    if not effects:
        return ()
    adjusted = adjust([one.p_value for one in effects])
    return tuple(
        replace(one, p_adjusted=float(p), correction=correction)
        for one, p in zip(effects, adjusted, strict=True)
    )
