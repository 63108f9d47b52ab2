"""The logit lens: residual-stream rows through a model's own final norm and unembedding.

The host's own modules are called, so weights that were folded or centred at loading are right
without any formula of ours: raw weights scale in the norm, folded ones in `W_U`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steering_plugin.adapters.transformer_lens import Model, is_bridge

BLOCK = 8_000_000
"""Logits held at once (32 MB): rows are taken in blocks of this many over the vocabulary."""


def lens_logits(
    model: Model, rows: Float[Tensor, "row d_model"], *, block: int = BLOCK
) -> Iterator[Float[Tensor, "row d_vocab"]]:
    """`ln_final(row) @ W_U + b_U` of every row, a block of rows at a time, float32, on the CPU.

    Without a final soft cap: it is monotone and changes no rank (`lens_settings` records it).
    Raises ValueError for a model without `ln_final` or `unembed`, and for rows of another width.
    """
    norm, unembed = (getattr(model, name, None) for name in ("ln_final", "unembed"))
    if norm is None or unembed is None:
        raise ValueError(f"{type(model).__name__} has no ln_final and unembed to read rows with")
    if rows.shape[1] != model.cfg.d_model:
        raise ValueError(
            f"rows have {rows.shape[1]} entries and the residual stream {model.cfg.d_model}: a "
            "dictionary of another site has no logit lens"
        )
    weight = next(model.parameters())
    step = max(1, block // int(model.cfg.d_vocab))
    with torch.no_grad():
        for part in rows.split(step):
            x = part.to(weight.device, weight.dtype)[None]
            yield unembed(norm(x))[0].float().cpu()


def lens_settings(model: Model) -> dict[str, Any]:
    """What decides the lens besides the weights: folded norm, soft cap (None without one)."""
    if is_bridge(model):
        config = getattr(model.original_model, "config", None)
        cap = getattr(config, "final_logit_softcapping", None)
        folded = bool(getattr(model, "compatibility_mode", False))
    else:
        cap = getattr(model.cfg, "output_logits_soft_cap", None)
        folded = str(model.cfg.normalization_type or "").endswith("Pre")
    return {"soft_cap": float(cap) if cap and cap > 0 else None, "folded": folded}


__all__ = ["BLOCK", "lens_logits", "lens_settings"]
