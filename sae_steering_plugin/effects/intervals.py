"""Intervals: bootstrap (percentile and BCa) over items, pairs or clusters; Wilson; DeLong.

The bootstrap works on weights: a resample is how often each item was drawn, and a statistic turns
weights into one number per resample. So pairs stay pairs, clusters stay whole, leaving one out (for
BCa) is a weight of 0, and 2,000 resamples are one matrix product. SciPy's `bootstrap` gives the
same intervals (the tests compare them) but has no clusters, and answers NaN with a warning for data
that does not vary; here such data gets an interval that says so in `note`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from .values import ROUNDING, Values, as_values, both_values, numbered

BLOCK = 4_000_000
"""Entries of a resampling block held in memory at once (32 MB of float64)."""

FEW_CLUSTERS = 10
"""With fewer clusters than this an interval over clusters is known to be too narrow."""

METHODS = ("percentile", "bca")


@dataclass(frozen=True)
class Interval:
    """Lower and upper end of an interval at `level`, how it was made, and what is odd about it.

    `note` is empty for an ordinary interval; otherwise it names why the data gave another one
    (nothing to resample, nothing that varies, a fall back to another method, few clusters).
    """

    low: float
    high: float
    level: float = 0.95
    method: str = "percentile"
    note: str = ""

    def __contains__(self, value: float) -> bool:
        return bool(self.low <= value <= self.high)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1")


# Resampling -------------------------------------------------------------------------------------

Weights: TypeAlias = Float[np.ndarray, "resample n"]
Statistic: TypeAlias = Callable[[Weights, Weights], Float[np.ndarray, " resample"]]
"""Weights of the base items and of the arm's items in, one number per resample out."""


@dataclass(frozen=True, eq=False)
class Draws:
    """What is drawn: units in one or two strata, and the unit of every item of both arms.

    A unit is an item, a pair or a cluster. `sizes` are the numbers of units per stratum; `base` and
    `arm` name the stratum and give each item's unit in it.
    """

    sizes: tuple[int, ...]
    base: tuple[int, Int[np.ndarray, " n"]]
    arm: tuple[int, Int[np.ndarray, " m"]]
    clustered: bool = False

    def weights(self, counts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Item weights of both arms from the counts of the units: per stratum [resample unit]."""
        (stratum, units), (other, arm_units) = self.base, self.arm
        return counts[stratum][:, units], counts[other][:, arm_units]

    def ones(self) -> list[np.ndarray]:
        """Every unit drawn once: the data themselves."""
        return [np.ones((1, size)) for size in self.sizes]


def item_draws(
    n: int,
    m: int,
    *,
    paired: bool,
    clusters: Iterable[Any] | tuple[Iterable[Any], Iterable[Any]] | None = None,
) -> Draws:
    """How two arms of `n` and `m` items are resampled.

    Paired: items (or `clusters` of items) are drawn with both their values. Unpaired: each arm by
    itself, or, with `clusters=(names of base, names of arm)`, clusters: jointly when both arms hold
    the same clusters, apart when they share none. Raises ValueError when they share some.
    """
    if clusters is None:
        if paired:
            return Draws((n,), (0, np.arange(n)), (0, np.arange(n)))
        return Draws((n, m), (0, np.arange(n)), (1, np.arange(m)))
    if paired:
        units = numbered(clusters, n)
        return Draws((int(units.max()) + 1,), (0, units), (0, units), clustered=True)
    sides = list(clusters)
    if len(sides) != 2 or any(isinstance(side, str) for side in sides):
        raise ValueError("unpaired arms need clusters=(names of base items, names of arm items)")
    first, second = ([str(name) for name in side] for side in sides)
    shared = set(first) & set(second)
    if not shared:
        one, two = numbered(first, n), numbered(second, m)
        sizes = (int(one.max()) + 1, int(two.max()) + 1)
        return Draws(sizes, (0, one), (1, two), clustered=True)
    if lonely := sorted(set(first) ^ set(second)):
        raise ValueError(
            f"cluster {lonely[0]!r} occurs in one arm only while {sorted(shared)[0]!r} occurs in "
            "both: an interval over clusters needs the same clusters in both arms, or none shared"
        )
    both = numbered([*first, *second], n + m)
    return Draws((int(both.max()) + 1,), (0, both[:n]), (0, both[n:]), clustered=True)


def resample_counts(
    generator: np.random.Generator, items: int, resamples: int
) -> Float[np.ndarray, "resample item"]:
    """How often each item was drawn in each resample: `items` draws with replacement per row."""
    drawn = generator.integers(items, size=(resamples, items))
    flat = drawn + np.arange(resamples)[:, None] * items
    return np.bincount(flat.ravel(), minlength=resamples * items).reshape(resamples, items) * 1.0


def resampled(
    statistic: Statistic, draws: Draws, *, resamples: int, seed: int
) -> Float[np.ndarray, " resample"]:
    """The statistic of each resample. The same for one seed, whatever the size of a block."""
    generators = [
        np.random.default_rng([seed, stratum] if stratum else seed)
        for stratum in range(len(draws.sizes))
    ]
    blocks = []
    step = max(1, BLOCK // max(len(draws.base[1]), len(draws.arm[1])))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        counts = [
            resample_counts(generator, size, count)
            for generator, size in zip(generators, draws.sizes, strict=True)
        ]
        blocks.append(statistic(*draws.weights(counts)))
    return np.concatenate(blocks)


def bootstrap(
    statistic: Statistic,
    draws: Draws,
    *,
    level: float = 0.95,
    method: str = "percentile",
    resamples: int = 2000,
    seed: int = 0,
    whole: tuple[float, float] = (-np.inf, np.inf),
    finish: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> Interval:
    """Bootstrap interval of a statistic of weights, `method` "percentile" or "bca".

    BCa corrects the percentile interval for bias and skew: unlike it, it cannot be made when no
    resample lies on one side of the estimate; then the percentile interval is given and named.
    `whole` is the statistic's range: the answer when one unit alone leaves nothing to resample.
    `finish` may replace draws that have no finite value. Draws that are NaN are left out and
    counted in `note`. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), 14.3.
    """
    check_level(level)
    if method not in METHODS:
        raise ValueError(f"no bootstrap {method!r}; choose one of {', '.join(METHODS)}")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; at least 1 is needed")
    if min(draws.sizes) < 2:
        unit = "cluster" if draws.clustered else "item"
        return Interval(*whole, level, "none", f"one {unit}: nothing to resample")
    notes = []
    if draws.clustered and min(draws.sizes) < FEW_CLUSTERS:
        notes.append(f"{min(draws.sizes)} clusters: the interval is too narrow")
    values = finish(resampled(statistic, draws, resamples=resamples, seed=seed))
    if missing := int(np.isnan(values).sum()):
        notes.append(f"{missing} of {resamples} resamples have no value and are left out")
        values = values[~np.isnan(values)]
    if not len(values):
        return Interval(*whole, level, "none", "; ".join(notes))
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if values.min() == values.max():
        value = float(values[0])
        notes.append("every resample gives the same value")
        return Interval(value, value, level, "percentile", "; ".join(notes))
    if method == "bca":
        corrected_tails = bca_tails(statistic, draws, values, tails)
        if corrected_tails is None:
            method = "percentile"
            notes.append("BCa has no value here (all resamples on one side): percentile given")
        else:
            tails = corrected_tails
    # Infinite draws cannot be interpolated between: take order statistics then.
    how = "linear" if np.isfinite(values).all() else "inverted_cdf"
    low, high = np.quantile(values, tails, method=how)  # type: ignore[call-overload]
    return Interval(float(low), float(high), level, method, "; ".join(notes))


def bca_tails(
    statistic: Statistic,
    draws: Draws,
    values: Float[np.ndarray, " resample"],
    tails: Float[np.ndarray, " tail"],
) -> Float[np.ndarray, " tail"] | None:
    """The shares of the bootstrap distribution at which BCa cuts; None where they do not exist."""
    from scipy.special import ndtr, ndtri

    estimate = float(statistic(*draws.weights(draws.ones()))[0])
    finite = values[np.isfinite(values)]
    if not np.isfinite(estimate) or not len(finite):
        return None
    # Ties with the estimate count half; which draws are ties must not hang on the last bits.
    tied = np.abs(values - estimate) <= ROUNDING * max(abs(estimate), float(np.ptp(finite)))
    below = float((values < estimate)[~tied].sum() + tied.sum() / 2) / len(values)
    if not 0 < below < 1:
        return None
    cubes = squares = 0.0
    for stratum, size in enumerate(draws.sizes):
        counts = [np.ones((size, other)) for other in draws.sizes]
        counts[stratum] = 1.0 - np.eye(size)
        left_out = statistic(*draws.weights(counts))
        if not np.isfinite(left_out).all():
            return None
        influence = (left_out.mean() - left_out) * (size - 1)
        cubes += float((influence**3).sum()) / size**3
        squares += float((influence**2).sum()) / size**2
    acceleration = cubes / (6 * squares**1.5) if squares > 0 else 0.0
    bias = ndtri(below)
    shifted = bias + ndtri(tails)
    found = ndtr(bias + shifted / (1 - acceleration * shifted))
    # Past the pole of the correction the two ends would cross.
    return found if (1 - acceleration * shifted > 0).all() else None


# Cohen's d --------------------------------------------------------------------------------------


def d_interval(
    base: Values,
    arm: Values,
    *,
    paired: bool = True,
    ddof: int = 1,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    method: str = "bca",
    clusters: Any = None,
) -> Interval:
    """Bootstrap interval of Cohen's d, resampling items; `method` "bca" or "percentile".

    Paired: an item is drawn with both its values, so that what items share stays shared. Unpaired:
    each arm is resampled by itself. `clusters` (a name per item; unpaired, one list per arm) draws
    whole clusters instead. A resample whose pooled deviation is zero while its means differ has no
    d; it counts as the largest finite d met on its side. When no resample varies the interval is
    [0, 0], as `cohens_d` is 0, and `note` says which case it is. Deterministic for one seed.

    "bca" (the default) covers as nominal from 20 items on for normal and binary outcomes, where
    "percentile" needs 50; for counts with a long tail both are too narrow at any size here, bca
    less so (measured by `benchmarks/calibration.py`, table in `docs/calibration.md`).
    `superiority_interval` covers as nominal throughout.
    """
    first, second = both_values(base, arm, paired=paired)
    draws = item_draws(len(first), len(second), paired=paired, clusters=clusters)
    if min(draws.sizes) > 1 and np.ptp(first) == 0 == np.ptp(second):
        check_level(level)
        same = first[0] == second[0]
        note = "all values are equal" if same else "each arm is constant: d has no value"
        return Interval(0.0, 0.0, level, "none", note)
    return bootstrap(
        lambda rows, columns: resampled_d(first, second, rows, columns, ddof=ddof),
        draws,
        level=level,
        method=method,
        resamples=resamples,
        seed=seed,
        finish=with_finite_ends,
    )


def resampled_d(
    first: Float[np.ndarray, " n"],
    second: Float[np.ndarray, " m"],
    rows: Float[np.ndarray, "resample n"],
    columns: Float[np.ndarray, "resample m"],
    *,
    ddof: int,
) -> Float[np.ndarray, " resample"]:
    """Cohen's d of each resample; infinite where the arms separate without spread.

    The sizes of the arms are the sums of their weights, which clusters of unequal size change.
    """
    n, m = rows.sum(axis=1), columns.sum(axis=1)
    centre = np.concatenate([first, second]).mean()
    first, second = first - centre, second - centre
    mean_first, mean_second = rows @ first / n, columns @ second / m
    # Sums of squares from centred values: E[x^2] - E[x]^2 loses no digits that matter here.
    squares = rows @ first**2 - n * mean_first**2 + columns @ second**2 - m * mean_second**2
    gap = mean_second - mean_first
    scale = max(np.abs(first).max(), np.abs(second).max(), np.finfo(float).tiny)
    flat = squares <= ROUNDING * scale**2
    pooled = np.sqrt(np.where(flat, 1.0, squares) / np.maximum(n + m - 2 * ddof, 1))
    without_d = np.where(np.abs(gap) > ROUNDING * scale, np.copysign(np.inf, gap), 0.0)
    return np.where(flat, without_d, gap / pooled)


def with_finite_ends(draws: Float[np.ndarray, " resample"]) -> Float[np.ndarray, " resample"]:
    """Infinite draws replaced by the most extreme finite ones on their side (0 without any)."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return np.zeros_like(draws)
    return np.clip(draws, finite.min(), finite.max())


# Means and shares -------------------------------------------------------------------------------


def mean_interval(
    values: Values,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    method: str = "percentile",
    clusters: Iterable[Any] | None = None,
) -> Interval:
    """Bootstrap interval of a mean; of a mean paired difference when given the differences."""
    column = as_values(values)
    draws = item_draws(len(column), len(column), paired=True, clusters=clusters)
    return bootstrap(
        lambda rows, _: rows @ column / rows.sum(axis=1),
        draws,
        level=level,
        method=method,
        resamples=resamples,
        seed=seed,
    )


def share_interval(hits: int, n: int, *, level: float = 0.95) -> Interval:
    """Wilson's interval of a share of independent items; it has a width at 0 of n and n of n too.

    Source: Wilson, Journal of the American Statistical Association 22 (1927); SciPy computes it.
    """
    from scipy.stats import binomtest

    check_level(level)
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"{hits} of {n} is no share")
    found = binomtest(int(hits), int(n)).proportion_ci(level, method="wilson")
    return Interval(float(found.low), float(found.high), level, "wilson")


# Probability of superiority ---------------------------------------------------------------------


def superiority_interval(
    base: Values,
    arm: Values,
    *,
    paired: bool = True,
    level: float = 0.95,
    method: str = "delong",
    clusters: Any = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of `superiority`, by "delong" (default), "percentile" or "bca".

    DeLong: the variance of the statistic's two one-item averages (of their sum per pair or cluster
    where items go together), with the normal interval on the logit scale, so that it stays within
    0..1. Where that variance is zero (the arms do not overlap, or nothing varies) Newcombe's
    interval for independent arms is given and named; it is too wide for pairs that agree.
    Sources: DeLong et al., Biometrics 44 (1988); Newcombe, Statistics in Medicine 25 (2006) 559.
    """
    from scipy.special import expit, logit, ndtri

    first, second = both_values(base, arm, paired=paired)
    draws = item_draws(len(first), len(second), paired=paired, clusters=clusters)
    check_level(level)
    if method != "delong":
        wins = won(first, second)
        return bootstrap(
            lambda rows, columns: (
                ((rows @ wins) * columns).sum(axis=1) / rows.sum(axis=1) / columns.sum(axis=1)
            ),
            draws,
            level=level,
            method=method,
            resamples=resamples,
            seed=seed,
            whole=(0.0, 1.0),
        )
    if min(draws.sizes) < 2:
        unit = "cluster" if draws.clustered else "item"
        return Interval(0.0, 1.0, level, "none", f"one {unit}: nothing varies")
    lost, beaten = one_item_averages(first, second)
    estimate = float(beaten.mean())
    shares = np.zeros((2, max(draws.sizes)))
    for (stratum, units), values in zip((draws.base, draws.arm), (lost, beaten), strict=True):
        np.add.at(shares[stratum], units, (values - estimate) / len(values))
    variance = sum(
        float(np.square(shares[stratum, :size]).sum()) * size / (size - 1)
        for stratum, size in enumerate(draws.sizes)
    )
    if not 0 < estimate < 1 or variance <= ROUNDING**2:
        low, high = newcombe(estimate, len(first), len(second), level)
        why = "the arms do not overlap" if not 0 < estimate < 1 else "no average varies"
        return Interval(low, high, level, "newcombe", f"{why}: interval of independent arms")
    reach = ndtri((1 + level) / 2) * variance**0.5 / (estimate * (1 - estimate))
    note = ""
    if draws.clustered and min(draws.sizes) < FEW_CLUSTERS:
        note = f"{min(draws.sizes)} clusters: the interval is too narrow"
    low, high = expit(logit(estimate) - reach), expit(logit(estimate) + reach)
    return Interval(float(low), float(high), level, "delong", note)


def won(
    first: Float[np.ndarray, " n"], second: Float[np.ndarray, " m"]
) -> Float[np.ndarray, "n m"]:
    """1 where the arm's item beats the base's, 1/2 where they tie, else 0."""
    return (second > first[:, None]) + 0.5 * (second == first[:, None])


def one_item_averages(
    first: Float[np.ndarray, " n"], second: Float[np.ndarray, " m"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]]:
    """Per base item the share of the arm's items that beat it; per arm item the share it beats."""

    def below(values: np.ndarray, points: np.ndarray) -> np.ndarray:
        ordered = np.sort(values)
        left, right = (ordered.searchsorted(points, side) for side in ("left", "right"))
        return (left + right) / (2 * len(values))

    return 1 - below(second, first), below(first, second)


def newcombe(estimate: float, n: int, m: int, level: float) -> tuple[float, float]:
    """Newcombe's interval (his method 5) of the probability of superiority, independent arms.

    Solves (estimate - t)^2 = z^2 V(t) with
    V(t) = t (1 - t) (1 + s (1 - t) / (2 - t) + s t / (1 + t)) / (n m),  s = (n + m) / 2 - 1.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri

    z, s = ndtri((1 + level) / 2), (n + m) / 2 - 1

    def excess(t: float) -> float:
        variance = t * (1 - t) * (1 + s * (1 - t) / (2 - t) + s * t / (1 + t)) / (n * m)
        return (estimate - t) ** 2 - z**2 * variance

    # At 0 and 1 the estimate itself is a second root, which the bracket must leave out.
    low = 0.0 if estimate <= 0 else brentq(excess, 0.0, min(estimate, 1 - 1e-12))
    high = 1.0 if estimate >= 1 else brentq(excess, max(estimate, 1e-12), 1.0)
    return float(low), float(high)
