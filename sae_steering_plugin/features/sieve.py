"""bfloat16 as a sieve, never as an answer: what rounding can hide, and the pairs to work out again.

For |a| = |b| = 1 with bfloat16 copies a', b':  |a.b - a'.b'| <= |a - a'| |b| + |a'| |b - b'|, to
which come the float32 accumulation (d 2^-24) and the rounding of the product to bfloat16 (a share
2^-8 of it). The residual lengths |a - a'| are measured, once per row.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steering_plugin.features.largest import Largest

OUTPUT = 2.0**-8
"""Relative rounding of a bfloat16 result, on the safe side."""

ACCUMULATED = 2.0**-24
"""Relative rounding of one float32 addition; a product of length d has d of them."""


BLOCK = 4096
"""Rows compared with their copies at once."""


def rounded(rows: Float[Tensor, "row d"]) -> tuple[Tensor, Float[Tensor, " row"]]:
    """The rows in bfloat16, and how far each lies from what it was."""
    narrow = rows.bfloat16()
    parts = zip(rows.split(BLOCK), narrow.split(BLOCK), strict=True)
    return narrow, torch.cat([(wide - some.float()).norm(dim=1) for wide, some in parts])


def slack(
    one: Float[Tensor, " row"], other: Float[Tensor, " other"], d: int
) -> Float[np.ndarray, " row"]:
    """By how much a bfloat16 cosine, before it is rounded itself, may fall short of the true one:
    per row of `one`, with the worst row of `other` (both: distances of unit rows from their
    copies)."""
    worst = float(other.max())
    found = one + (1 + one) * worst + 1.1 * d * ACCUMULATED
    return found.double().cpu().numpy()


def floor_bits(bars: Float[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
    """The largest bfloat16 at or below each bar, as the integer of its bits; 0 for bars below 0.

    Bits of non-negative bfloat16 numbers are ordered as the numbers are.
    """
    bits = np.maximum(bars, 0.0).astype(np.float32)
    down = np.where(bits.astype(np.float64) > np.maximum(bars, 0.0), np.nextafter(bits, 0), bits)
    return (down.astype(np.float32).view(np.int32) >> 16).astype(np.int16)


class SievedProduct:
    """|Cosines| of two blocks of rows that could be among the largest, offered to the lists of
    both."""

    def __init__(self, unit: Float[Tensor, "row d"]) -> None:
        self.unit = unit
        self.narrow, self.off = rounded(unit)
        self.survivors = 0

    def offer(
        self, some: Tensor, first: int, stop: int, rows: Largest, columns: Largest | None = None
    ) -> None:
        """As `ExactProduct.offer`."""
        device, d = self.unit.device, self.unit.shape[1]
        here = some.to(device)
        block = torch.mm(self.narrow[here], self.narrow[first:stop].T).abs_()
        bits = block.view(torch.int16).cpu().numpy()
        off = self.off[here], self.off[first:stop]
        keep = 1 - OUTPUT
        hits = bits >= floor_bits((rows.bars - slack(*off, d)) * keep)[:, None]
        if columns is not None:
            hits |= bits >= floor_bits((columns.bars - slack(*off[::-1], d)) * keep)
        place, other = np.divmod(np.flatnonzero(hits), stop - first)
        itself = some.numpy()[place] == other + first
        place, other = place[~itself], other[~itself]
        self.survivors += len(place)
        pairs = (torch.from_numpy(numbers).to(device) for numbers in (place, other))
        sides = self.unit[here], self.unit[first:stop]
        values = exact_products(*sides, *pairs).abs_().cpu().numpy()
        rows.take(place, other + first, values)
        if columns is not None:
            columns.take(other, place + int(some[0]), values)


def exact_products(
    one: Float[Tensor, "row d"],
    other: Float[Tensor, "column d"],
    rows: Int[Tensor, " pair"],
    columns: Int[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """`one[rows] . other[columns]`, pair by pair in float32; `rows` do not fall."""
    starts = torch.zeros(len(one) + 1, dtype=torch.long, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=len(one)).cumsum(0)
    nothing = torch.zeros(len(rows), device=one.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        asked = torch.sparse_csr_tensor(
            starts, columns, nothing, size=(len(one), len(other)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(asked, one, other.T, beta=0.0).values()
