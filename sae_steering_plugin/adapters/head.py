"""From what the final norm gives to logits: the host's own unembedding, and its Gram matrix.

Differences of logits are linear in differences of the final norm's output, `dF W_U`, so lengths and
inner products of logit shifts are those of `dF` under `W_U W_U'`: `d_model` numbers stand for
`d_vocab`. A final soft cap bends that, and logits must then be formed.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steering_plugin.adapters.lens import lens_settings
from sae_steering_plugin.adapters.transformer_lens import Model

VOCABULARY_BLOCK = 8192
"""Columns of `W_U` multiplied at once."""


def head_gram(model: Model) -> Float[Tensor, "d_model d_model"]:
    """`W_U W_U'` in float64 on the CPU, from products of float32 blocks of the vocabulary.

    Raises ValueError under a final soft cap, where it gives no inner products of logit shifts.
    """
    if lens_settings(model)["soft_cap"] is not None:
        raise ValueError("this model caps its logits: inner products of shifts need the logits")
    weight = model.W_U.detach()
    width = int(model.cfg.d_model)
    if weight.shape[0] != width:
        raise ValueError(f"W_U has shape {tuple(weight.shape)}; [{width}, d_vocab] expected")
    gram = torch.zeros(width, width, dtype=torch.float64)
    for part in weight.split(VOCABULARY_BLOCK, dim=1):
        wide = part.float()
        gram += (wide @ wide.T).double().cpu()
    return gram


def head_logits(
    model: Model, final: Float[Tensor, "row d_model"], *, cap: Any = None
) -> Float[Tensor, "row d_vocab"]:
    """Logits of the final norm's output, float32, with the soft cap `cap` (None: none)."""
    weight = next(model.parameters())
    with torch.no_grad():
        logits = model.unembed(final.to(weight.device, weight.dtype)[:, None])[:, 0].float()
    return logits if cap is None else cap * torch.tanh(logits / cap)


__all__ = ["head_gram", "head_logits"]
