"""Exact mid-ranks of sparse columns: one sort of the stored values, zeros share one rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class MidRanks:
    """Ranks (from 1, ties averaged) of every column of a sparse table.

    `zero[j]` is the rank that all zeros of column j share, and `lift[e]` how far a stored value's
    rank in its column lies above that (negative below it): what sums of ranks need.
    """

    lift: Float[np.ndarray, " stored"]
    zero: Float[np.ndarray, " feature"]


def mid_ranks(
    values: Float[np.ndarray, " stored"], starts: Int[np.ndarray, " bound"], n: int
) -> MidRanks:
    """Mid-ranks of each column of a CSC table with `n` rows; stored values are never 0.

    One sort of 64-bit keys (column, then the bits of the float32 value in an order-preserving form,
    then the place in the column where the bits allow), so two values tie exactly when they are
    equal. Cost n_stored log(n_stored), whatever the width. Raises ValueError for a stored zero,
    which would tie with those that are not stored.
    """
    single = np.ascontiguousarray(values, dtype=np.float32)
    if not single.all():
        raise ValueError("a zero is stored: leave zeros out of sparse codes")
    counts = np.diff(starts)
    begins = np.asarray(starts[:-1], dtype=np.int64)
    signed = bool((single < 0).any())
    # Columns come in order, which the stable (merging) sort makes use of, and stay where they are.
    keys, order = sorted_keys(single, begins, counts, signed=signed)
    new = np.ones(len(keys) + 1, dtype=bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:-1])
    bounds = np.flatnonzero(new)  # where groups of equal values of a column begin, and the end
    zeros = n - counts
    negative = np.zeros(len(counts))
    if signed:
        columns = np.repeat(np.arange(len(counts)), counts)
        negative += np.bincount(columns[single < 0], minlength=len(counts))
    zero = negative + (zeros + 1) / 2
    middle = 0.5 * bounds[1:]
    middle += 0.5 * bounds[:-1]
    if signed:  # only positive values stand above the column's zeros
        first = keys[bounds[:-1]]
        middle -= np.where(first & POSITIVE, 0, zeros[first >> 32])
    lift = np.empty(len(keys))
    lift[order] = np.repeat(middle, np.diff(bounds))
    # Positions from 1 inside the column, whose entries stayed together.
    lift += np.repeat(zeros - begins - zero + 0.5, counts)
    return MidRanks(lift, zero)


POSITIVE = np.int64(1 << 31)
"""The bit of `ordered_bits` that every positive value has."""


def sorted_keys(
    values: Float[np.ndarray, " stored"],
    begins: Int[np.ndarray, " feature"],
    counts: Int[np.ndarray, " feature"],
    *,
    signed: bool,
) -> tuple[Int[np.ndarray, " stored"], Int[np.ndarray, " stored"]]:
    """(column << 32 | ordered bits of the value) in ascending order, and where each comes from.

    A key that has room for the place in its column is sorted with it: sorting numbers costs less
    than sorting their places.
    """
    bits = ordered_bits(values) if signed else values.view(np.int32) | POSITIVE  # int64
    room = int(counts.max(initial=0)).bit_length()
    if len(counts).bit_length() + 32 + room > 63:
        keys = np.repeat(np.arange(len(counts), dtype=np.int64) << 32, counts) | bits
        order = np.argsort(keys, kind="stable")
        return keys[order], order
    # The column's part less its beginning, so that adding every entry's number leaves its place.
    keys = np.repeat((np.arange(len(counts), dtype=np.int64) << (32 + room)) - begins, counts)
    keys += np.arange(len(keys))
    bits <<= room
    keys += bits
    keys.sort(kind="stable")
    order = keys & ((1 << room) - 1)
    order += np.repeat(begins, counts)  # columns stay where they are
    keys >>= room
    return keys, order


def ordered_bits(values: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """float32 values as integers below 2^32 in the same order."""
    bits = values.view(np.uint32)
    flipped = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return flipped.astype(np.int64)
