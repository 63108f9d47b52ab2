"""Exact mid-ranks of sparse columns: one sort of the stored values, zeros share one rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class MidRanks:
    """Ranks (from 1, ties averaged) of every column of a sparse table of `n` rows.

    `stored[e]` is the rank of a stored value in its column; `zero[j]` the rank that all zeros of
    column j share.
    """

    stored: Float[np.ndarray, " stored"]
    zero: Float[np.ndarray, " feature"]


def mid_ranks(
    values: Float[np.ndarray, " stored"], starts: Int[np.ndarray, " bound"], n: int
) -> MidRanks:
    """Mid-ranks of each column of a CSC table with `n` rows; stored values are never 0.

    One sort of 64-bit keys (column, then the bits of the float32 value in an order-preserving
    form), so two values tie exactly when they are equal. Cost n_stored log(n_stored), whatever the
    width. Raises ValueError for a stored zero, which would tie with those that are not stored.
    """
    single = np.ascontiguousarray(values, dtype=np.float32)
    if (single == 0).any():
        raise ValueError("a zero is stored: leave zeros out of sparse codes")
    counts = np.diff(starts)
    columns = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    # Columns come in order, which the stable (merging) sort makes use of, and stay where they are.
    order = np.argsort((columns << 32) | ordered_bits(single), kind="stable")
    ordered = single[order]
    new = np.ones(len(order), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    new[starts[:-1][counts > 0]] = True
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(order))
    # Positions from 1 inside the column; positive values stand above the column's zeros.
    zeros = n - counts
    middle = (first + last + 1) / 2 - starts[:-1][columns[first]]
    middle += np.where(ordered[first] > 0, zeros[columns[first]], 0)
    ranks = np.empty(len(order))
    ranks[order] = np.repeat(middle, last - first)
    negative = np.zeros(len(counts))
    if (single < 0).any():
        negative += np.bincount(columns[single < 0], minlength=len(counts))
    return MidRanks(ranks, negative + (zeros + 1) / 2)


def ordered_bits(values: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """float32 values as integers below 2^32 in the same order."""
    bits = values.view(np.uint32)
    flipped = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return flipped.astype(np.int64)
