"""Rank correlations of predictors with labels: plain, partial, and with intervals over features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 2000

CONSTANT = 1e-9
"""A column whose deviation is below this share of its size (or of what it is left over from) does
not vary: correlations with it are undefined."""

BLOCK = 2_000_000
"""Entries of resampled columns held at once."""

Values = Float[np.ndarray, " row"]
Rows = Float[np.ndarray, "sample row"]
Statistic = Callable[[Int[np.ndarray, "sample row"]], Float[np.ndarray, " sample"]]
"""Row numbers of each sample in, one number per sample out."""


@dataclass(frozen=True)
class Association:
    """A correlation over `n` features, its percentile interval at 95 %, and a two-sided p value.

    NaN where it is undefined (a side that does not vary).
    """

    rho: float
    low: float
    high: float
    p_value: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def varies(values: Values, scale: float | None = None) -> bool:
    """Whether values differ by more than rounding, against `scale` (their own size by default)."""
    size = float(np.abs(values).max()) if scale is None else scale
    return bool(values.std() > CONSTANT * max(size, 1e-300))


def spearman(x: Values, y: Values) -> float:
    """Spearman's rank correlation; NaN when a side does not vary."""
    if len(x) < 2 or not varies(x) or not varies(y):
        return float("nan")
    return float(_correlations(_ranks(x[None]), _ranks(y[None]))[0])


def pearson(x: Values, y: Values) -> float:
    """Pearson's correlation; NaN when a side does not vary."""
    moving = len(x) > 1 and varies(x) and varies(y)
    return float(_correlations(x[None], y[None])[0]) if moving else float("nan")


def partial_spearman(x: Values, y: Values, controls: Float[np.ndarray, "row control"]) -> float:
    """Correlation of the ranks of x and y after least squares on the ranks of the controls.

    NaN when what is left of a side does not vary.
    """
    return float(rank_statistic(x, y, controls)(np.arange(len(x))[None])[0])


def rank_statistic(
    x: Values, y: Values, controls: Float[np.ndarray, "row control"] | None = None
) -> Statistic:
    """Spearman of x and y (partial given `controls`) as a function of samples of their rows."""
    moving = varies(x) and varies(y)
    kept = [] if controls is None else [one for one in controls.T if varies(one)]

    def statistic(rows: np.ndarray) -> np.ndarray:
        if not moving:
            return np.full(len(rows), np.nan)
        sides = [_ranks(x[rows]), _ranks(y[rows])]
        if kept:
            ones = np.ones(rows.shape)
            basis = np.stack([ones, *(_ranks(one[rows]) for one in kept)], axis=2)
            inverse = np.linalg.pinv(basis)
            sides = [side - (basis @ (inverse @ side[:, :, None]))[:, :, 0] for side in sides]
        first, second = sides
        return _correlations(first, second, scale=float(rows.shape[1]))

    return statistic


def association(
    x: Values,
    y: Values,
    controls: Float[np.ndarray, "row control"] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Association:
    """Spearman of x and y (partial given `controls`), bootstrap over rows, t test with n - 2 - k
    degrees of freedom."""
    from scipy.stats import t

    n = len(x)
    statistic = rank_statistic(x, y, controls)
    rho = float(statistic(np.arange(n)[None])[0])
    low, high = bootstrapped(statistic, n, resamples=resamples, seed=seed)
    degrees = n - 2 - (0 if controls is None else controls.shape[1])
    p = float("nan")
    if rho == rho and degrees > 0:
        size = abs(rho) * (degrees / max(1 - rho**2, 1e-300)) ** 0.5
        p = float(2 * t.sf(size, degrees))
    return Association(rho, low, high, p, n)


def bootstrapped(
    statistic: Statistic, n: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval at 95 % of a statistic of row numbers, over rows drawn with replacement.

    Resamples in which it is undefined are left out; NaN when it is so in more than half.
    """
    draws = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    step = max(1, BLOCK // n)
    found = np.concatenate(
        [statistic(draws[start : start + step]) for start in range(0, resamples, step)]
    )
    found = found[~np.isnan(found)]
    if len(found) <= resamples / 2:
        return float("nan"), float("nan")
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _ranks(values: Rows) -> Rows:
    """Mid-ranks within each sample."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=1))


def _correlations(x: Rows, y: Rows, scale: float = 0.0) -> Float[np.ndarray, " sample"]:
    """Pearson's correlation of each sample; NaN where a side is constant up to rounding of values
    of its size, or of `scale`."""
    sides = [side - side.mean(axis=1, keepdims=True) for side in (x, y)]
    sizes = [np.sqrt((side**2).sum(axis=1)) for side in sides]
    bar = [CONSTANT * np.abs(side).max(axis=1).clip(max(scale, 1e-290)) for side in (x, y)]
    defined = (sizes[0] > bar[0]) & (sizes[1] > bar[1])
    product = (sides[0] * sides[1]).sum(axis=1)
    return np.where(defined, product / np.where(defined, sizes[0] * sizes[1], 1.0), np.nan)


__all__ = ["Association", "association", "bootstrapped", "partial_spearman", "pearson", "spearman"]
