"""The k largest entries of every row of a matrix that is never held, from blocks of columns.

A full sort or `topk` of a dense block costs more than the matrix product that made it. So each row
has a bar: entries above it are collected, the few collected ones are sorted, and the bar rises.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

COLUMN_BITS = 22
"""Columns are numbered with so many bits of a 64-bit key: up to four million."""

LARGEST_ROWS = 1024
"""Rows are numbered with ten bits; 32 hold the value."""


class Largest:
    """Takes the columns of a [rows, columns] float32 matrix block by block; keeps k per row.

    The bar of each row starts at `bars`, a guess from a sample. Rows that end with fewer than k
    entries had too high a guess; `short` lists them, and the caller works them out exactly. Equal
    values go to the smaller column.
    """

    def __init__(self, k: int, bars: Float[np.ndarray, " row"]) -> None:
        if len(bars) > LARGEST_ROWS:
            raise ValueError(f"{len(bars)} rows at once; at most {LARGEST_ROWS}")
        self.k = k
        self.bars = bars.astype(np.float32)
        self._keys: list[np.ndarray] = []
        self._held = 0
        self._cut_at = 2 * k * len(bars)

    def offer(self, block: Float[np.ndarray, "row column"], first: int, sign: float = 1.0) -> None:
        """Look at columns `first` and on. `sign` -1 looks for the smallest: bars and values are
        those of the negated block."""
        above = block >= self.bars[:, None] if sign > 0 else block <= -self.bars[:, None]
        flat = np.flatnonzero(above)
        if not len(flat):
            return
        rows, columns = np.divmod(flat, block.shape[1])
        values = block.reshape(-1)[flat]
        self._keep(rows, columns + first, values if sign > 0 else -values)

    def offer_columns(self, block: Float[np.ndarray, "column row"], first: int) -> None:
        """The same of a transposed block: its columns are this matrix's rows, its rows the columns
        `first` and on."""
        flat = np.flatnonzero(block >= self.bars)
        if len(flat):
            columns, rows = np.divmod(flat, block.shape[1])
            self._keep(rows, columns + first, block.reshape(-1)[flat])

    def take(
        self,
        rows: Int[np.ndarray, " entry"],
        columns: Int[np.ndarray, " entry"],
        values: Float[np.ndarray, " entry"],
    ) -> None:
        """Look at single entries; each may be taken once."""
        above = values >= self.bars[rows]
        self._keep(rows[above], columns[above], values[above])

    def _keep(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        self._keys.append(_packed(rows, values, columns))
        self._held += len(rows)
        if self._held > self._cut_at:
            self._cut()

    def _cut(self) -> None:
        """Keep k per row and raise the bars to the k-th."""
        keys = np.sort(np.concatenate(self._keys)) if self._keys else np.empty(0, dtype=np.uint64)
        rows = (keys >> np.uint64(32 + COLUMN_BITS)).astype(np.int64)
        starts = np.searchsorted(rows, np.arange(len(self.bars)))
        rank = np.arange(len(keys)) - starts[rows]
        keys, rows, rank = keys[rank < self.k], rows[rank < self.k], rank[rank < self.k]
        last = rank == self.k - 1
        self.bars[rows[last]] = _unpacked(keys[last])[0]
        self._keys, self._held = [keys], len(keys)
        self._cut_at = 2 * max(len(keys), self.k * len(self.bars))

    def result(self) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"], Int[Tensor, " short"]]:
        """Values (descending), columns, and the rows that came out short (filled: NaN, -1)."""
        self._cut()
        (keys,) = self._keys
        rows = (keys >> np.uint64(32 + COLUMN_BITS)).astype(np.int64)
        rank = np.arange(len(keys)) - np.searchsorted(rows, np.arange(len(self.bars)))[rows]
        values = np.full((len(self.bars), self.k), np.nan, dtype=np.float32)
        columns = np.full((len(self.bars), self.k), -1, dtype=np.int64)
        values[rows, rank], columns[rows, rank] = _unpacked(keys)
        short = np.flatnonzero(columns[:, -1] < 0)
        return torch.from_numpy(values), torch.from_numpy(columns), torch.from_numpy(short)


def sample_bars(sample: Float[Tensor, "row sampled"], k: int, n: int) -> np.ndarray:
    """A guess at the k-th largest of n entries per row, from a sample of them, on the safe side.

    The order statistic is taken three standard deviations below the expected one, so about one row
    in a thousand comes out short.
    """
    expected = k * sample.shape[1] / n
    place = min(int(expected + 3 * (expected + 1) ** 0.5) + 2, sample.shape[1])
    if place >= sample.shape[1]:
        return np.full(len(sample), -np.inf, dtype=np.float32)
    return sample.topk(place, dim=1).values[:, -1].cpu().numpy()


def _packed(rows: np.ndarray, values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Keys that sort by row, then by falling value, then by column."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0, its equal
    falling = np.where(bits >> np.uint32(31), bits, ~(bits | np.uint32(1 << 31)))
    return (
        (rows.astype(np.uint64) << np.uint64(32 + COLUMN_BITS))
        | (falling.astype(np.uint64) << np.uint64(COLUMN_BITS))
        | columns.astype(np.uint64)
    )


def _unpacked(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and columns of keys."""
    falling = ((keys >> np.uint64(COLUMN_BITS)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    bits = np.where(falling >> np.uint32(31), falling, ~falling & np.uint32(0x7FFFFFFF))
    columns = (keys & np.uint64((1 << COLUMN_BITS) - 1)).astype(np.int64)
    return bits.astype(np.uint32).view(np.float32), columns
