"""The activations of a dictionary that are not zero, without the dense table of all of them.

`sae.encode` writes tokens x features several times over. Here the encoder's columns are taken in
blocks into one reused buffer, and only what passes the dictionary's own rule leaves it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steering_plugin.adapters.sae_parts import (
    RANKED,
    RECTIFIED,
    THRESHOLDED,
    architecture,
    normalised,
    row_norms,
    whole_codes,
)
from sae_steering_plugin.features.sieve import ACCUMULATED, OUTPUT, exact_products, floor_bits

COLUMNS = 4096
"""Features per block."""

TOKENS = 1024
"""Tokens per block: with `COLUMNS`, one buffer of 16 MB."""

SAMPLED = 1024
"""Features whose k-th largest is the first bar of a top-k dictionary: a bound from below."""


@dataclass(frozen=True, eq=False)
class Hits:
    """Activation `values[i]` of `features[i]` at token `tokens[i]`, counted over kept tokens; every
    other activation of the `n` tokens is zero."""

    tokens: Int[Tensor, " hit"]
    features: Int[Tensor, " hit"]
    values: Float[Tensor, " hit"]
    n: int


Encoder = Callable[[Float[Tensor, "batch pos d_in"], Bool[Tensor, "batch pos"]], Hits]


def active_encoder(sae: Any, *, sieve: bool = False) -> Encoder:
    """`(x, keep) -> Hits` of the tokens where `keep` is True, in float32, on the SAE's device.

    The codes are those of `sae.encode`, in a tenth of its memory traffic; activations within
    rounding of the dictionary's threshold may fall on the other side. Architectures without a
    block-wise rule (matching pursuit, temporal, steering dictionaries, unknown ones) go through
    `encode` itself. Weights are read where they are, not copied, when they are float32.

    `sieve` multiplies ReLU and JumpReLU dictionaries in bfloat16 first and works out in float32
    whatever could be active given what rounding can do: the same codes. It pays where bfloat16 is
    several times faster; other architectures take no notice of it.
    """
    word = architecture(sae)
    if word in RANKED:
        return _by_token(sae, _Ranked(sae, signed=word == "abstopk"))
    if word == "gated":
        return _by_token(sae, _Gated(sae))
    if word in RECTIFIED | THRESHOLDED:
        kind = _Sieved if sieve else _Pointwise
        return _by_token(sae, kind(sae, word in THRESHOLDED))
    return _whole(sae)


def _whole(sae: Any) -> Encoder:
    def encode(x: Tensor, keep: Tensor) -> Hits:
        with torch.no_grad():
            codes = whole_codes(sae, x)[keep.to(x.device)]
        tokens, features = codes.nonzero(as_tuple=True)
        return Hits(tokens, features, codes[tokens, features], len(codes))

    return encode


Rule = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Normalised activations `[token, d_in]` -> tokens, features, values of what is not zero."""


def _by_token(sae: Any, rule: Rule) -> Encoder:
    def encode(x: Tensor, keep: Tensor) -> Hits:
        with torch.no_grad():
            kept = x[keep.to(x.device)].to(sae.W_dec.device).float()
            if not len(kept):
                empty = torch.empty(0, dtype=torch.long)
                return Hits(empty, empty, torch.empty(0), 0)
            seen = normalised(sae, kept)[0]
            parts = [rule(some) for some in seen.split(TOKENS)]
        starts = range(0, len(seen), TOKENS)
        tokens = [part[0] + first for part, first in zip(parts, starts, strict=True)]
        return Hits(
            torch.cat(tokens),
            torch.cat([part[1] for part in parts]),
            torch.cat([part[2] for part in parts]),
            len(seen),
        )

    return encode


class _Blocks:
    """Products of tokens with blocks of encoder columns, in one buffer that is reused."""

    def __init__(self, sae: Any) -> None:
        self.encoder = sae.W_enc.detach()
        self.width = self.encoder.shape[1]
        columns = min(COLUMNS, self.width)
        self.buffer = torch.empty(TOKENS * columns, device=self.encoder.device)

    def products(self, x: Tensor) -> Any:
        """(slice of features, x @ W_enc[:, slice]) one after the other; the product is reused."""
        for some in self.slices():
            block = self.encoder[:, some].float()
            shape = (len(x), block.shape[1])
            out = self.buffer[: shape[0] * shape[1]].view(shape)
            yield some, torch.mm(x, block, out=out)

    def slices(self) -> list[slice]:
        """The features of every block."""
        starts = range(0, self.width, COLUMNS)
        return [slice(first, min(first + COLUMNS, self.width)) for first in starts]


def _above(block: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries above a bar (a row or a column of bars)."""
    if block.device.type != "cpu":
        rows, columns = (block > bar).nonzero(as_tuple=True)
        return rows, columns
    flat = np.flatnonzero(block.numpy() > bar.numpy())  # a fifth of what torch.nonzero costs
    tokens, features = np.divmod(flat, block.shape[1])
    return torch.from_numpy(tokens), torch.from_numpy(features)


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    tokens, features, values = (torch.cat(each) for each in zip(*parts, strict=True))
    return tokens, features, values


class _Pointwise:
    """ReLU: pre > 0. JumpReLU: pre > max(threshold, 0)."""

    def __init__(self, sae: Any, thresholded: bool) -> None:
        self.blocks = _Blocks(sae)
        self.offset = sae.b_enc.detach().float()
        bar = sae.threshold.detach().float().clamp_min(0) if thresholded else 0.0
        self.bar = bar + torch.zeros_like(self.offset)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for some, block in self.blocks.products(x):
            offset, bar = self.offset[some], self.bar[some]
            rows, columns = _above(block, bar - offset)
            values = block[rows, columns] + offset[columns]
            kept = values > bar[columns]  # the rule itself, in the dictionary's order of summation
            parts.append((rows[kept], columns[kept] + some.start, values[kept]))
        return _joined(parts)


class _Sieved(_Pointwise):
    """The same codes from a bfloat16 product: what it cannot rule out is multiplied again."""

    def __init__(self, sae: Any, thresholded: bool) -> None:
        super().__init__(sae, thresholded)
        sizes = []
        for some in self.blocks.slices():
            columns = self.blocks.encoder[:, some].float()
            off = (columns - columns.bfloat16().float()).norm(dim=0)
            sizes.append(torch.stack([columns.norm(dim=0), off]))
        self.length, self.off = torch.cat(sizes, dim=1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        narrow = x.bfloat16()
        off = (x - narrow.float()).norm(dim=1).max()
        longest = x.norm(dim=1).max()
        slack = off * self.length + (longest + off) * self.off
        slack = slack + 1.1 * x.shape[1] * ACCUMULATED * longest * self.length
        parts = []
        for some in self.blocks.slices():
            columns = self.blocks.encoder[:, some].float()
            offset, bar = self.offset[some], self.bar[some]
            least = (bar - offset - slack[some]).cpu().numpy()
            block = torch.mm(narrow, columns.bfloat16())
            hits = block.view(torch.int16).cpu().numpy() >= floor_bits(least * (1 - OUTPUT))
            if (low := np.flatnonzero(least <= 0)).size:  # bits order non-negative numbers only
                values = block[:, torch.from_numpy(low).to(block.device)].float().cpu().numpy()
                hits[:, low] = values >= least[low] * (1 + OUTPUT)
            tokens, features = np.divmod(np.flatnonzero(hits), hits.shape[1])
            rows, places = (torch.from_numpy(e).to(x.device) for e in (tokens, features))
            values = exact_products(x, columns.T.contiguous(), rows, places) + offset[places]
            kept = values > bar[places]
            parts.append((rows[kept], places[kept] + some.start, values[kept]))
        return _joined(parts)


class _Gated:
    """relu(product * exp(r_mag) + b_mag) where product + b_gate > 0."""

    def __init__(self, sae: Any) -> None:
        self.blocks = _Blocks(sae)
        self.gate = sae.b_gate.detach().float()
        self.magnitude = sae.b_mag.detach().float()
        self.growth = sae.r_mag.detach().float().exp()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for some, block in self.blocks.products(x):
            gate = self.gate[some]
            rows, columns = _above(block, -gate)
            products = block[rows, columns]
            values = products * self.growth[some][columns] + self.magnitude[some][columns]
            kept = (products + gate[columns] > 0) & (values > 0)
            parts.append((rows[kept], columns[kept] + some.start, values[kept]))
        return _joined(parts)


class _Ranked:
    """The k largest pre-activations (AbsTopK: by size), negative ones dropped by TopK's ReLU.

    The bar of a token starts at the k-th best of some features, a bound from below, and rises to
    the k-th best seen whenever a block has been sorted out.
    """

    def __init__(self, sae: Any, *, signed: bool) -> None:
        self.blocks = _Blocks(sae)
        self.offset = sae.b_enc.detach().float()
        self.norms = row_norms(sae, self.offset.device)
        self.k, self.signed = min(int(sae.cfg.k), self.blocks.width), signed

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        held: tuple[Tensor, Tensor, Tensor] | None = None
        bar: Tensor | None = None
        for some, block in self.blocks.products(x):
            block += self.offset[some]
            if self.norms is not None:
                block *= self.norms[some]
            sizes = block.abs() if self.signed else block
            if bar is None:
                bar = self._first_bar(sizes)
            below = torch.nextafter(bar, torch.full_like(bar, -torch.inf))  # ">=" by ">"
            rows, columns = _above(sizes, below[:, None])
            found = (rows, columns + some.start, block[rows, columns])
            held, bar = self._cut(found if held is None else _joined([held, found]), len(x), bar)
        assert held is not None
        rows, columns, values = held
        kept = values != 0 if self.signed else values > 0
        return rows[kept], columns[kept], values[kept]

    def _first_bar(self, sizes: Tensor) -> Tensor:
        """The k-th best of evenly spaced features where that many are sampled, and at least 0."""
        step = max(1, sizes.shape[1] // max(SAMPLED, 2 * self.k))
        sample = sizes[:, ::step]
        if sample.shape[1] < self.k:
            return torch.zeros(len(sizes), device=sizes.device)
        return sample.topk(self.k, dim=1).values.amin(1).clamp_min(0)

    def _cut(
        self, found: tuple[Tensor, Tensor, Tensor], n: int, bar: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The k best per token, and each token's bar raised to its k-th."""
        rows, columns, values = found
        sizes = values.abs() if self.signed else values
        order = torch.from_numpy(np.lexsort((-sizes.cpu().numpy(), rows.cpu().numpy())))
        order = order.to(rows.device)
        rows, columns, values, sizes = (each[order] for each in (rows, columns, values, sizes))
        starts = torch.searchsorted(rows, torch.arange(n, device=rows.device))
        rank = torch.arange(len(rows), device=rows.device) - starts[rows]
        last = rank == self.k - 1
        bar = bar.index_put((rows[last],), sizes[last])
        kept = rank < self.k
        return (rows[kept], columns[kept], values[kept]), bar


__all__ = ["Encoder", "Hits", "active_encoder"]
