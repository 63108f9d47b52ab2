"""The map from the residual stream to the logits, as far as it is linear, of either host.

Gain and centring of the final norm are read off the host's own module by what it does to a probe,
so weights that were folded or centred at loading, and Gemma's `1 + weight`, need no case of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steering_plugin.adapters.lens import lens_settings
from sae_steering_plugin.adapters.transformer_lens import Model

PROBE_LENGTH = 1e3
"""Entries of the probe: large against the norm's epsilon, small enough for any dtype."""


@dataclass(frozen=True, eq=False)
class Unembedding:
    """`rows -> rows in the basis that multiplies `weight``, and how the model was loaded.

    `weight` is the model's own `W_U` (no copy). `gain` is the final norm's weight (None where it is
    all ones, as after folding), `centres` whether the norm takes the mean out of a row, and
    `mean_word` what is taken from every column so that logits are centred over the vocabulary.
    """

    weight: Float[Tensor, "d_model d_vocab"]
    gain: Float[Tensor, " d_model"] | None
    centres: bool
    mean_word: Float[Tensor, " d_model"] | None
    settings: dict[str, Any]

    def read(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Rows as `weight` reads them: centred and scaled by the norm's gain."""
        seen = rows.float().to(self.weight.device)
        if self.centres:
            seen = seen - seen.mean(-1, keepdim=True)
        return seen if self.gain is None else seen * self.gain


def unembedding(model: Model, *, basis: str = "logits") -> Unembedding:
    """The model's unembedding in one of two bases.

    "logits": the final norm's gain and centring are applied and logits are centred over the
    vocabulary (softmax does not see their mean), so that every way of loading one model gives one
    footprint. Nothing is centred over the vocabulary under a soft cap, which is not blind to the
    mean. "loaded": `d_f @ W_U` as the weights stand, as the code of arXiv 2606.08365 computes it.
    The norm's division by the residual's length depends on the token and is in neither: a
    footprint's size counts in units of the final residual's scale. Under a soft cap it is a bound.

    Raises ValueError for a model without `ln_final` and `W_U`, and for an unknown basis.
    """
    if basis not in ("logits", "loaded"):
        raise ValueError(f"basis is {basis!r}; choose 'logits' or 'loaded'")
    norm, weight = getattr(model, "ln_final", None), getattr(model, "W_U", None)
    if weight is None or (norm is None and basis == "logits"):
        raise ValueError(f"{type(model).__name__} has no ln_final and W_U to read a footprint with")
    settings = {"basis": basis, **lens_settings(model)}
    if basis == "loaded":
        settings |= {"norm_gain": False, "centred_row": False, "centred_vocabulary": False}
        return Unembedding(weight, None, False, None, settings)
    gain, centres = norm_of(norm, weight)
    ones = bool((gain - 1).abs().max() < 1e-5)
    mean_word = None if settings["soft_cap"] else _mean_word(weight.detach())
    settings |= {
        "norm_gain": not ones,
        "centred_row": centres,
        "centred_vocabulary": mean_word is not None,
    }
    return Unembedding(weight, None if ones else gain, centres, mean_word, settings)


def norm_of(norm: Any, weight: Tensor) -> tuple[Float[Tensor, " d_model"], bool]:
    """The gain of a LayerNorm or RMSNorm module and whether it centres, from what it does.

    A norm is y = gain * (x - mean?) / rms + bias. Two probes x and -x give the bias away; shifting
    x by a constant tells whether it centres.
    """
    d_model = weight.shape[0]
    probe = torch.linspace(-1.5, -0.5, d_model, device=weight.device)
    probe = probe * (1 - 2 * (torch.arange(d_model, device=weight.device) % 2))
    probe = (probe - probe.mean()).to(weight.dtype)[None, None] * PROBE_LENGTH

    def odd(x: Tensor) -> Tensor:
        with torch.no_grad():
            return (norm(x).float() - norm(-x).float())[0, 0] / 2

    plain = odd(probe)
    shifted = odd(probe + 0.5 * PROBE_LENGTH)
    x = probe[0, 0].float()
    gain = plain / (x / x.square().mean().sqrt())
    centres = bool((shifted - plain).norm() < 0.05 * plain.norm())
    return gain, centres


def _mean_word(weight: Tensor) -> Tensor:
    """The mean column, summed in float64 over blocks of the vocabulary."""
    parts = [part.double().sum(1) for part in weight.detach().split(4096, dim=1)]
    return (torch.stack(parts).sum(0) / weight.shape[1]).float()


__all__ = ["Unembedding", "norm_of", "unembedding"]
