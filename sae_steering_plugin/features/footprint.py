"""What a decoder row does to the logits by itself: r_f = d_f W_U over the whole vocabulary.

The product of all rows with the unembedding is taken block by block into one reused buffer. Sums
are reduced on the way; top lists and top shares keep the few largest entries (`largest.py`).
Length, mean and variance of every footprint come from a Gram matrix and need no such product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_steering_plugin.features.geometry import quadratic
from sae_steering_plugin.features.largest import Largest, sample_bars

SHARES = (10, 50, 100, 500)
"""K of `direct_topK_abs_mass_frac` (arXiv 2606.08365, code)."""

ROWS, COLUMNS = 512, 4096
"""The block of logits held at once (8 MB)."""

SAMPLED = 1024
"""Words, evenly spaced, from which the first bar of each row is guessed."""


@dataclass(frozen=True, eq=False)
class Footprints:
    """Row i belongs to the i-th row given: columns of figures, and its words, best first.

    `promoted` and `suppressed` are token ids with the logits they get from one raw row.
    """

    columns: dict[str, Tensor]
    promoted: Int[Tensor, "row top"]
    promoted_logits: Float[Tensor, "row top"]
    suppressed: Int[Tensor, "row top"]
    suppressed_logits: Float[Tensor, "row top"]


def footprints(
    rows: Float[Tensor, "row d_model"],
    unembed: Float[Tensor, "d_model d_vocab"],
    *,
    centre: Float[Tensor, " d_model"] | None = None,
    shares: Sequence[int] = SHARES,
    top: int = 10,
    progress: bool = False,
) -> Footprints:
    """L2, Linf, entropy, effective vocabulary and top shares of |r|, and the words moved most.

    r = d (W - centre), with `centre` taken from every column (the mean column centres logits over
    the vocabulary).

    With s = |r| / sum |r|: `direct_logit_entropy` is H(s) in nats, `direct_logit_effective_vocab`
    exp(H), `direct_topK_abs_mass_frac` the sum of the K largest s. A row that moves no logit has
    NaN in these and 0 in the lengths. A share K at or above the vocabulary is 1. Equal logits go to
    the smaller token id. `top=0` and `shares=()` leave the lists out and save their cost. Raises
    ValueError when `top` exceeds the vocabulary. Source: arXiv 2606.08365, code.
    """
    words = unembed.shape[1]
    if not 0 <= top <= words:
        raise ValueError(f"top is {top}; the vocabulary has {words} words")
    if not len(rows):
        raise ValueError("there are no rows")
    parts = [
        _block_of_rows(_Product(some.float(), unembed, centre), shares, top)
        for some in tqdm(rows.split(ROWS), desc="footprint", unit="block", disable=not progress)
    ]
    names = parts[0].columns
    return Footprints(
        {name: torch.cat([part.columns[name] for part in parts]) for name in names},
        *(
            torch.cat([getattr(part, field) for part in parts])
            for field in ("promoted", "promoted_logits", "suppressed", "suppressed_logits")
        ),
    )


def footprint_moments(
    rows: Float[Tensor, "row d_model"],
    unembed: Float[Tensor, "d_model d_vocab"],
    *,
    centre: Float[Tensor, " d_model"] | None = None,
) -> dict[str, Tensor]:
    """`direct_logit_l2`, and `direct_logit_mean` and `direct_logit_var` over the vocabulary.

    |r|^2 = d' (W W') d and mean(r) = d . mean(W): no product of rows and vocabulary. float64.
    """
    words = unembed.shape[1]
    square = torch.zeros(len(unembed), len(unembed), dtype=torch.float64, device=unembed.device)
    for first in range(0, words, COLUMNS):
        some = unembed[:, first : first + COLUMNS].float()
        square += some @ some.T
    word = mean_column(unembed)
    if centre is not None:
        away = centre.double()
        square += words * (away.outer(away) - word.outer(away) - away.outer(word))
        word = word - away
    total = quadratic(rows.float(), square)
    mean = (rows.float() @ word.float()).double()
    return {
        "direct_logit_l2": total.clamp_min(0).sqrt().cpu(),
        "direct_logit_mean": mean.cpu(),
        "direct_logit_var": (total / words - mean**2).clamp_min(0).cpu(),
    }


def mean_column(unembed: Float[Tensor, "d_model d_vocab"]) -> Float[Tensor, " d_model"]:
    """The mean column in float64, without a float64 copy of all of them."""
    parts = unembed.detach().split(COLUMNS, dim=1)
    return torch.stack([part.double().sum(1) for part in parts]).sum(0) / unembed.shape[1]


@dataclass(frozen=True, eq=False)
class _Product:
    """A block of rows times the unembedding, whole or in part."""

    rows: Tensor
    unembed: Tensor
    centre: Tensor | None

    def logits(self, columns: slice | Tensor, rows: Tensor | None = None) -> Tensor:
        some = self.rows if rows is None else self.rows[rows]
        found = some @ self.unembed[:, columns].to(some.dtype)
        return found if self.centre is None else found - (some @ self.centre)[:, None]

    def into(self, buffer: Tensor, first: int) -> Tensor:
        """The logits of one block of words, written into `buffer`."""
        words = self.unembed[:, first : first + COLUMNS].to(self.rows.dtype)
        shape = (len(self.rows), words.shape[1])
        out = buffer[: shape[0] * shape[1]].view(shape)
        if self.centre is None:
            return torch.mm(self.rows, words, out=out)
        shift = -(self.rows @ self.centre)[:, None]
        return torch.addmm(shift, self.rows, words, out=out)


def _block_of_rows(product: _Product, shares: Sequence[int], top: int) -> Footprints:
    rows, words = product.rows, product.unembed.shape[1]
    kept = max((k for k in shares if k < words), default=0)
    sample = product.logits(torch.linspace(0, words - 1, min(SAMPLED, words)).long())
    largest = Largest(kept, sample_bars(sample.abs(), kept, words)) if kept else None
    upper = Largest(top, sample_bars(sample, top, words)) if top else None
    lower = Largest(top, sample_bars(-sample, top, words)) if top else None
    sums = {name: torch.zeros(len(rows), dtype=torch.float64) for name in ("l1", "l2", "log")}
    linf = torch.zeros(len(rows))
    buffer = torch.empty(len(rows) * min(COLUMNS, words), device=rows.device)
    spare = torch.empty_like(buffer)
    for first in range(0, words, COLUMNS):
        logits = product.into(buffer, first)
        if upper is not None and lower is not None:
            dense = logits.cpu().numpy()
            upper.offer(dense, first)
            lower.offer(dense, first, -1.0)
        sizes = logits.abs_()
        if largest is not None:
            largest.offer(sizes.cpu().numpy(), first)
        linf = torch.maximum(linf, sizes.amax(1).cpu())
        sums["l1"] += sizes.sum(1).double().cpu()
        logs = spare[: sizes.numel()].view(sizes.shape)
        torch.log(sizes.clamp_min(torch.finfo(torch.float32).tiny), out=logs)
        sums["log"] += torch.linalg.vecdot(sizes, logs).double().cpu()
        sums["l2"] += torch.linalg.vecdot(sizes, sizes).double().cpu()
    total = sums["l1"]
    entropy = (total.log() - sums["log"] / total).clamp_min(0)
    columns = {
        "direct_logit_l2": sums["l2"].sqrt(),
        "direct_logit_linf": linf.double(),
        "direct_logit_entropy": entropy,
        "direct_logit_effective_vocab": entropy.exp(),
    }
    if largest is not None:
        biggest = _finished(largest, product, torch.abs)[0].double().cumsum(1)
    for k in shares:
        share = biggest[:, k - 1] / total if k < words else total / total
        columns[f"direct_top{k}_abs_mass_frac"] = share
    nothing = torch.empty(len(rows), 0)
    up = (nothing, nothing.long()) if upper is None else _finished(upper, product, torch.clone)
    down = (nothing, nothing.long()) if lower is None else _finished(lower, product, torch.neg)
    return Footprints(columns, up[1], up[0], down[1], -down[0])


def _finished(
    found: Largest, product: _Product, seen: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Values and words of the lists, with the rows that came out short worked out exactly."""
    values, words, short = found.result()
    if len(short):
        exact = seen(product.logits(slice(None), short.to(product.rows.device))).cpu()
        best = exact.sort(dim=1, descending=True, stable=True)
        values[short], words[short] = best.values[:, : found.k], best.indices[:, : found.k]
    return values, words
