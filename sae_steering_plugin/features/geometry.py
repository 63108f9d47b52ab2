"""How the decoder rows of a dictionary lie to each other: lengths, nearest rows, crowding.

The product of all rows with all rows is taken block by block into one reused buffer, and only the
few largest cosines of each row leave it (`largest.py`). Means and variances of all cosines come
from the Gram identities and need no such product.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_steering_plugin.features.largest import Largest, sample_bars
from sae_steering_plugin.features.sieve import SievedProduct
from sae_steering_plugin.types import SMALLEST_NORM

CROWDING_K = 20
"""Neighbours in `crowding_topk_mean_abs_cos` (arXiv 2606.08365, code)."""

ROWS, COLUMNS = 1024, 4096
"""The block of cosines held at once (16 MB)."""

SAMPLED = 1024
"""Columns, evenly spaced, from which the first bar of each row is guessed."""


def unit_rows(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """Rows at length 1; a row without length (`SMALLEST_NORM`) becomes zero."""
    norms = rows.norm(dim=1, keepdim=True)
    return torch.where(norms > SMALLEST_NORM, rows / norms, 0.0)


def nearest_rows(
    unit: Float[Tensor, "row d"],
    k: int,
    *,
    features: Int[Tensor, " chosen"] | None = None,
    sieve: bool = False,
    progress: bool = False,
) -> tuple[Float[Tensor, "chosen k"], Int[Tensor, "chosen k"]]:
    """The k largest |cosines| of each row with the *other* rows, descending, and which rows.

    `unit` holds unit rows (and zero rows, whose cosines are 0). A duplicate row is a neighbour at
    cosine 1, the row itself never. Values are those of a float32 product; equal values go to the
    smaller row. With all rows asked for each pair is multiplied once: half the product, rows^2 d
    operations; with some `features`, all pairs of theirs.

    `sieve` multiplies in bfloat16 and works out again, in float32, every pair that could be among
    the largest given what rounding can do (`sieve.py`): the same lists, to rounding of a sum. It
    pays where bfloat16 products are several times faster. Raises ValueError when k is not between 1
    and the number of other rows.
    """
    n = len(unit)
    if not 1 <= k < n:
        raise ValueError(f"k is {k}; each of {n} rows has {n - 1} others")
    product = SievedProduct(unit) if sieve else ExactProduct(unit)
    sampled = unit[torch.linspace(0, n - 1, min(SAMPLED, n)).long()]
    blocks = (torch.arange(n) if features is None else features.cpu()).split(ROWS)

    def begun(some: Tensor) -> Largest:
        sample = (unit[some.to(unit.device)] @ sampled.T).abs()
        return Largest(k, sample_bars(sample, k + 1, n))

    bar = tqdm(total=len(blocks), desc="geometry", unit="block", disable=not progress)
    with bar:
        if features is not None:
            done = []
            for some in blocks:
                found = begun(some)
                for first in range(0, n, COLUMNS):
                    product.offer(some, first, min(first + COLUMNS, n), found)
                done.append(_finished(found, unit, some))
                bar.update()
        else:
            lists = [begun(some) for some in blocks]
            for i, some in enumerate(blocks):
                for j in range(i, len(blocks)):
                    first, stop = int(blocks[j][0]), int(blocks[j][-1]) + 1
                    product.offer(some, first, stop, lists[i], lists[j] if j > i else None)
                bar.update()
            done = [_finished(f, unit, some) for f, some in zip(lists, blocks, strict=True)]
    values, indices = zip(*done, strict=True)
    return torch.cat(values), torch.cat(indices)


def _finished(found: Largest, unit: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """The lists of some rows, with those that came out short worked out exactly."""
    best, which, short = found.result()
    if len(short):
        rows = unit[some[short].to(unit.device)]
        exact = without_self((rows @ unit.T).abs(), some[short], 0)
        repaired = torch.from_numpy(exact).sort(dim=1, descending=True, stable=True)
        best[short], which[short] = (
            repaired.values[:, : best.shape[1]],
            repaired.indices[:, : best.shape[1]],
        )
    return best, which


class ExactProduct:
    """|Cosines| of two blocks of rows in float32, offered to the lists of both."""

    def __init__(self, unit: Float[Tensor, "row d"]) -> None:
        self.unit = unit
        self.buffer = torch.empty(0, device=unit.device)

    def offer(
        self, some: Tensor, first: int, stop: int, rows: Largest, columns: Largest | None = None
    ) -> None:
        """Rows `some` against rows `first` to `stop`; `columns` are the lists of the latter."""
        size = len(some) * (stop - first)
        if len(self.buffer) < size:
            self.buffer = torch.empty(size, device=self.unit.device)
        block = self.buffer[:size].view(len(some), stop - first)
        torch.mm(self.unit[some.to(self.unit.device)], self.unit[first:stop].T, out=block)
        cosines = without_self(block.abs_(), some, first)
        rows.offer(cosines, first)
        if columns is not None:
            columns.offer_columns(cosines, int(some[0]))


def without_self(block: Tensor, rows: Tensor, first: int) -> np.ndarray:
    """The block in which no row meets itself: those entries are -1, below any |cosine|."""
    inside = (rows >= first) & (rows < first + block.shape[1])
    block[inside.nonzero().flatten(), (rows[inside] - first)] = -1.0
    return block.cpu().numpy()


def gram(rows: Float[Tensor, "row d"]) -> Float[Tensor, "d d"]:
    """`rows' rows` in float64, from float32 products over blocks of rows."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for block in rows.split(COLUMNS):
        total += block.T @ block
    return total


def quadratic(rows: Float[Tensor, "row d"], form: Float[Tensor, "d d"]) -> Float[Tensor, " row"]:
    """`r' form r` of every row, in float64."""
    narrow = form.to(rows.dtype)
    parts = [((block @ narrow) * block).double().sum(1) for block in rows.split(COLUMNS)]
    return torch.cat(parts)


def cosine_moments(
    unit: Float[Tensor, "row d"],
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Mean and population variance of each row's cosines with all other rows that have a length.

    sum_j cos_ij = u_i . sum_j u_j and sum_j cos_ij^2 = u_i' (U'U) u_i, less the row itself:
    4 rows d^2 operations instead of 2 rows^2 d. NaN for a zero row.
    """
    real = unit.any(dim=1)
    others = int(real.sum()) - 1
    if others < 1:
        raise ValueError("cosines need two rows that have a length")
    mean = ((unit @ unit.double().sum(0).to(unit.dtype)).double() - 1) / others
    square = (quadratic(unit, gram(unit)) - 1) / others
    variance = (square - mean**2).clamp_min(0)
    missing = torch.full_like(mean, torch.nan)
    return torch.where(real, mean, missing), torch.where(real, variance, missing)


def geometry_columns(
    rows: Float[Tensor, "row d_out"],
    encoder: Float[Tensor, "row d_in"] | None,
    features: Int[Tensor, " chosen"],
    *,
    k: int = CROWDING_K,
    sieve: bool = False,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The columns of `runs.feature_tables.decoder_geometry`, for `features` among all `rows`."""
    unit = unit_rows(rows.float())
    norms = rows.float().norm(dim=1)
    everything = len(features) == len(rows) and bool((features == torch.arange(len(rows))).all())
    asked = None if everything else features
    near, which = nearest_rows(unit, k, features=asked, sieve=sieve, progress=progress)
    mean, variance = cosine_moments(unit)
    chosen = features.to(rows.device)
    missing = torch.full((len(features),), torch.nan)
    if encoder is None:
        reading, agreement = missing, missing
    else:
        own = encoder[chosen].float()
        reading = own.norm(dim=1).cpu()
        both = (unit_rows(own) * unit[chosen]).sum(1) if own.shape[1] == unit.shape[1] else None
        agreement = missing if both is None else both.cpu()
        agreement = torch.where(reading > SMALLEST_NORM, agreement, torch.nan)
    lengths = norms[chosen].cpu()
    real = lengths > SMALLEST_NORM
    found = {
        "crowding_max_abs_cos": near[:, 0],
        "crowding_topk_mean_abs_cos": near.mean(1),
        "cos_mean": mean[chosen].cpu(),
        "cos_var": variance[chosen].cpu(),
        "encoder_decoder_cos": agreement,
    }
    found = {name: torch.where(real, values, torch.nan) for name, values in found.items()}
    nearest = torch.where(real, which[:, 0], -1)
    return {
        "decoder_norm": lengths,
        "encoder_norm": reading,
        **found,
        "crowding_nearest": nearest,
    }
