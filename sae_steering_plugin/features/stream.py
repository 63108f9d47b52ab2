"""Statistics of every feature of a dictionary over a stream of tokens that is never kept.

Only activations that are not zero are looked at, one batch after the other; a position at which a
feature is silent costs nothing, and its zeros enter the moments once, at the end. Two streams over
two halves of a corpus merge into the stream over the whole: counts, largest values, histograms and
top examples bit for bit, moments and sums to rounding (float64, centred: Chan, Golub, LeVeque 1983;
Pebay, SAND2008-6212). A stream that was saved and taken up again is bit for bit the one that ran
through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

ACTIVE = 1e-6
"""A feature counts as active above this size (arXiv 2606.08365, code)."""

LOWEST_OCTAVE, OCTAVES = -7, 16
"""Histogram bins cover sizes from 2^-7 to 2^9; what lies outside goes to the outermost bin."""

BIN_BYTES = 34_000_000
"""The histogram of all features stays below this; it decides how fine the bins are."""

FREQUENCY_FLOOR = 1e-8
"""Firing rates are held this far from 0 and 1 in the binary entropy (arXiv 2606.08365, code)."""

MOMENTS = ("count", "mean", "m2", "m3", "m4")
ARRAYS = (*MOMENTS, "active", "size", "size_log", "largest", "bins", "top_values", "top_ids")


def bins_per_octave(n_features: int) -> int:
    """4 to 64, a power of two: as fine as `BIN_BYTES` allows. Bins are equal within an octave, so a
    quantile is off by less than this fraction of itself, and usually by far less."""
    fits = BIN_BYTES // (4 * OCTAVES * max(n_features, 1))
    return max(4, min(64, 1 << (max(fits, 1).bit_length() - 1)))


@dataclass(eq=False)
class FeatureStream:
    """Running statistics of `n_features` features over `n` positions; made by `empty`.

    Every array has a row per feature. `count`, `mean`, `m2`, `m3`, `m4` are the number, mean and
    sums of centred powers of the activations that are not zero; `active` counts those above
    `ACTIVE` in size; `size` and `size_log` are the sums of |z| and |z| ln |z|; `bins` is the
    histogram of the positive ones; `top_values` and `top_ids` the largest with their positions.
    """

    n: int
    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray
    m3: np.ndarray
    m4: np.ndarray
    active: np.ndarray
    size: np.ndarray
    size_log: np.ndarray
    largest: np.ndarray
    bins: np.ndarray
    top_values: np.ndarray
    top_ids: np.ndarray

    @classmethod
    def empty(cls, n_features: int, *, top: int = 0) -> FeatureStream:
        """A stream that has seen nothing and will keep the `top` largest examples per feature."""
        if n_features < 1 or top < 0:
            raise ValueError(f"a stream needs features and top >= 0, not {n_features} and {top}")
        bins = OCTAVES * bins_per_octave(n_features)
        return cls(
            n=0,
            count=np.zeros(n_features, dtype=np.int64),
            mean=np.zeros(n_features),
            m2=np.zeros(n_features),
            m3=np.zeros(n_features),
            m4=np.zeros(n_features),
            active=np.zeros(n_features, dtype=np.int64),
            size=np.zeros(n_features),
            size_log=np.zeros(n_features),
            largest=np.full(n_features, -np.inf),
            bins=np.zeros((n_features, bins), dtype=np.int32),
            top_values=np.full((n_features, top), -np.inf, dtype=np.float32),
            top_ids=np.full((n_features, top), -1, dtype=np.int64),
        )

    @property
    def n_features(self) -> int:
        return len(self.count)

    @property
    def top(self) -> int:
        return self.top_values.shape[1]

    def update(
        self,
        features: Int[Tensor, " hit"],
        values: Float[Tensor, " hit"],
        n: int,
        *,
        ids: Int[Tensor, " hit"] | None = None,
    ) -> None:
        """Take in `n` further positions, at which `features[i]` had the activation `values[i]` and
        every feature not named was zero.

        `ids[i]` is the number of the position, for the top examples. Raises ValueError for a value
        that is not finite, a feature outside the dictionary, or missing ids.
        """
        f = features.cpu().numpy()
        v = values.detach().cpu().double().numpy()
        if not np.isfinite(v).all():
            raise ValueError("an activation is not finite: the statistics would be lost")
        if len(f) and not 0 <= f.min() <= f.max() < self.n_features:
            raise ValueError(f"a feature lies outside 0..{self.n_features - 1}")
        if n < 1 or (len(f) and np.bincount(f).max() > n):
            raise ValueError(f"a feature has more activations than the {n} positions of the batch")
        if self.top and ids is None:
            raise ValueError("top examples need the number of each position: give ids")
        if not v.all():
            kept = v != 0
            f, v = f[kept], v[kept]
            ids = None if ids is None else ids.cpu()[torch.from_numpy(kept)]
        self.n += n
        self._combine(_moments(f, v, self.n_features))
        sizes = np.abs(v)
        self.active += np.bincount(f[sizes > ACTIVE], minlength=self.n_features)
        self.size += np.bincount(f, sizes, self.n_features)
        self.size_log += np.bincount(f, sizes * np.log(sizes), self.n_features)
        np.maximum.at(self.largest, f, v)
        self._tally(f, v)
        if self.top:
            assert ids is not None
            self._raise_top(f, v.astype(np.float32), ids.cpu().numpy())

    def merge(self, other: FeatureStream) -> FeatureStream:
        """The stream over both. Raises ValueError when they are of different shapes."""
        if self.bins.shape != other.bins.shape or self.top != other.top:
            raise ValueError(
                f"a stream of {self.n_features} features with {self.top} top examples does not "
                f"merge with one of {other.n_features} and {other.top}"
            )
        both = FeatureStream(self.n, *(getattr(self, name).copy() for name in ARRAYS))
        both.n += other.n
        both._combine(tuple(getattr(other, name) for name in MOMENTS))
        for name in ("active", "size", "size_log", "bins"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        both.largest = np.maximum(self.largest, other.largest)
        if self.top:
            rows, columns = np.nonzero(other.top_ids >= 0)
            both._raise_top(rows, other.top_values[rows, columns], other.top_ids[rows, columns])
        return both

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors for a safetensors file."""
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in ARRAYS}
        return {"n": torch.tensor(self.n), **arrays}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> FeatureStream:
        """The stream that `state` was taken of. Raises ValueError for other arrays."""
        if set(state) != {"n", *ARRAYS}:
            raise ValueError(f"this is no stream: it holds {sorted(state)}")
        arrays = [state[name].numpy().copy() for name in ARRAYS]
        if {len(array) for array in arrays} != {len(arrays[0])}:
            raise ValueError("the arrays of this stream differ in length")
        return cls(int(state["n"]), *arrays)

    def frequency(self) -> np.ndarray:
        """The share of positions at which each feature is active; NaN before the first position."""
        return self.active / self.n if self.n else np.full(self.n_features, np.nan)

    def moments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean and mean centred powers 2, 3, 4 over all positions, the zeros included."""
        zeros = np.zeros(self.n_features)
        silent = (self.n - self.count, zeros, zeros, zeros, zeros)
        total, mean, *sums = _combined(tuple(getattr(self, name) for name in MOMENTS), silent)
        with np.errstate(invalid="ignore", divide="ignore"):
            second, third, fourth = (powers / total for powers in sums)
        return mean, second, third, fourth

    def kurtosis(self) -> np.ndarray:
        """Fourth centred moment over squared variance (3 for a Gaussian); NaN without variance."""
        _, second, _, fourth = self.moments()
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(second > 0, fourth / second**2, np.nan)

    def maximum(self) -> np.ndarray:
        """The largest activation of each feature, zeros included."""
        return np.where(self.count < self.n, np.maximum(self.largest, 0.0), self.largest)

    def quantile(self, q: float) -> np.ndarray:
        """The q-quantile over all positions of the positive part of each activation.

        Read off the histogram, linearly inside a bin (see `bins_per_octave`); exactly 0 where the
        quantile falls among the zeros, and never above the largest value.
        """
        if not 0 <= q <= 1 or not self.n:
            raise ValueError(f"q is {q} over {self.n} positions; it lies in 0..1, over some")
        cumulated = self.bins.cumsum(axis=1, dtype=np.int64)
        positive = cumulated[:, -1]
        rank = q * (self.n - 1) - (self.n - positive)
        bin_of = (cumulated <= np.maximum(rank, 0)[:, None]).sum(axis=1)
        bin_of = np.minimum(bin_of, self.bins.shape[1] - 1)
        rows = np.arange(self.n_features)
        inside = self.bins[rows, bin_of]
        before = cumulated[rows, bin_of] - inside
        low, high = _edges(bin_of, self.bins.shape[1] // OCTAVES)
        share = (np.maximum(rank, 0) - before + 0.5) / np.maximum(inside, 1)
        found = np.minimum(low + (high - low) * np.clip(share, 0, 1), np.maximum(self.largest, 0))
        return np.where(rank <= -1, 0.0, np.where(rank < 0, found * (1 + rank), found))

    def activation_entropy(self) -> np.ndarray:
        """Entropy of how a feature's activation is spread over positions, over ln n.

        1 for a constant feature, 0 for one that fires once; NaN for a dead one. With signed codes
        sizes are meant.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            nats = np.log(self.size) - self.size_log / self.size
            spread = np.clip(nats, 0, None) / np.log(self.n)
        return np.where(self.size > 0, spread, np.nan)

    def binary_entropy(self) -> np.ndarray:
        """Entropy in nats of the question whether the feature is active; NaN for a dead one."""
        rate = np.clip(self.frequency(), FREQUENCY_FLOOR, 1 - FREQUENCY_FLOOR)
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return np.where(self.active > 0, entropy, np.nan)

    def columns(self, form: str, *, shape: bool) -> dict[str, np.ndarray]:
        """The columns of a feature table; `form` is "token" or "final", `shape` adds entropies and
        kurtosis. Deviations are population ones."""
        mean, variance, _, _ = self.moments()
        found: dict[str, Any] = {
            f"{form}_act_freq": self.frequency(),
            f"{form}_mean": mean,
            f"{form}_std": np.sqrt(variance),
            f"{form}_max": self.maximum(),
            f"{form}_q95": self.quantile(0.95),
        }
        if shape:
            found |= {
                "binary_entropy": self.binary_entropy(),
                "activation_entropy_norm": self.activation_entropy(),
                "kurtosis": self.kurtosis(),
            }
        return found

    def _combine(self, batch: tuple[np.ndarray, ...]) -> None:
        mine = tuple(getattr(self, name) for name in MOMENTS)
        self.count, self.mean, self.m2, self.m3, self.m4 = _combined(mine, batch)

    def _tally(self, f: np.ndarray, v: np.ndarray) -> None:
        """Add the positive values to the histogram: exponent and leading mantissa bits, exactly."""
        fine = (self.bins.shape[1] // OCTAVES).bit_length() - 1
        bits = v.astype(np.float32).view(np.int32) >> (23 - fine)
        place = bits - ((LOWEST_OCTAVE + 127) << fine)
        place = np.clip(place, 0, self.bins.shape[1] - 1)
        positive = v > 0
        keys, counts = np.unique(
            f[positive] * self.bins.shape[1] + place[positive], return_counts=True
        )
        self.bins.reshape(-1)[keys] += counts.astype(np.int32)

    def _raise_top(self, f: np.ndarray, v: np.ndarray, ids: np.ndarray) -> None:
        """Let the candidates that beat a feature's last top example in; ties: the earlier one."""
        better = v >= self.top_values[f, -1]
        f, v, ids = f[better], v[better], ids[better]
        touched = np.unique(f)
        f = np.concatenate([f, touched.repeat(self.top)])
        v = np.concatenate([v, self.top_values[touched].reshape(-1)])
        ids = np.concatenate([ids, self.top_ids[touched].reshape(-1)])
        order = np.lexsort((ids, -v, f))
        f, v, ids = f[order], v[order], ids[order]
        starts = np.searchsorted(f, touched)
        place = starts[:, None] + np.arange(self.top)
        self.top_values[touched], self.top_ids[touched] = v[place], ids[place]


def _moments(f: np.ndarray, v: np.ndarray, n_features: int) -> tuple[np.ndarray, ...]:
    """Number, mean and sums of centred powers 2, 3, 4 of the values of each feature."""
    count = np.bincount(f, minlength=n_features)
    mean = np.bincount(f, v, n_features) / np.maximum(count, 1)
    away = v - mean[f]
    square = away * away
    powers = (square, square * away, square * square)
    return (count, mean, *(np.bincount(f, power, n_features) for power in powers))


def _combined(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Moments of two sets together, from their numbers, means and centred power sums."""
    n_a, mean_a, a2, a3, a4 = a
    n_b, mean_b, b2, b3, b4 = b
    n = n_a + n_b
    # shares instead of products of counts: counts to the third power would overflow int64
    s_a, s_b = n_a / np.maximum(n, 1), n_b / np.maximum(n, 1)
    d = mean_b - mean_a
    mean = mean_a + d * s_b
    both = s_a * s_b * n
    m2 = a2 + b2 + d**2 * both
    m3 = a3 + b3 + d**3 * both * (s_a - s_b) + 3 * d * (s_a * b2 - s_b * a2)
    m4 = (
        a4
        + b4
        + d**4 * both * (s_a**2 - s_a * s_b + s_b**2)
        + 6 * d**2 * (s_a**2 * b2 + s_b**2 * a2)
        + 4 * d * (s_a * b3 - s_b * a3)
    )
    return n, mean, m2, m3, m4


def _edges(bin_of: np.ndarray, per_octave: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge of histogram bins; the lowest bin begins at 0."""
    octave, part = np.divmod(bin_of, per_octave)
    base = np.exp2(octave + LOWEST_OCTAVE)
    low, high = base * (1 + part / per_octave), base * (1 + (part + 1) / per_octave)
    return np.where(bin_of == 0, 0.0, low), high
