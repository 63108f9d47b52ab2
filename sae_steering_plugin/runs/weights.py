"""Steering as a low-rank change of a matrix, and back, with what each way round loses.

Where no bias exists, a rank-one change of the projection's matrix adds the same vector on average;
a LoRA update, conversely, is a steering vector as far as what it adds is the same at every token.
Both are fitted on half of the texts and measured on the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steering_plugin.adapters.activations import bos_policy, encode_texts, model_name, padded
from sae_steering_plugin.adapters.checkpoint import live
from sae_steering_plugin.adapters.parameters import Slot, post_norm, slots_of
from sae_steering_plugin.adapters.reading import reading
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.adapters.transformer_lens import Model, is_bridge, layer_of
from sae_steering_plugin.adapters.weights import (
    NotConvertible,
    Steering,
    WeightEdit,
    added,
    everywhere,
)
from sae_steering_plugin.concepts import LowRankDelta, factors, rank_one, unexplained, written
from sae_steering_plugin.types import Recipe, SteeringVector

INPUTS = {"mlp.W_out": "mlp.hook_post", "attn.W_O": "attn.hook_z"}
"""Where the input of each output matrix is read."""


@dataclass(frozen=True)
class RankOneResidual:
    """How far a rank-one change is from the constant, on texts it was not fitted on.

    At token t the change adds `factor_t` times the vector; the constant's factor is 1. `mean` is
    the mean factor, `error` the root mean square of factor - 1 (so the error in units of the
    vector's length), `low` and `high` the 5th and 95th percentile of the factor.
    """

    name: str
    mean: float
    error: float
    low: float
    high: float
    n_fit: int
    n_held: int


@dataclass(frozen=True, eq=False)
class RankOneEdit:
    """`weights` to apply or save, and per changed matrix what the change misses."""

    weights: WeightEdit
    residuals: tuple[RankOneResidual, ...]


@dataclass(frozen=True, eq=False)
class LoraVector:
    """A low-rank update as a steering vector, and how much of the update that is.

    `left` is E|y - v|^2 / E|y|^2 of what the update adds, y, on texts the vector was not averaged
    over: 0 where the update is the vector, 1 where the vector is worth nothing. `variance` divides
    by the variance of y instead; 1 means that v is the mean of the held-out texts too.
    """

    vector: SteeringVector
    left: float
    variance: float
    n_fit: int
    n_held: int


def rank_one_edit(
    model: Model,
    edits: Steering,
    texts: Sequence[str],
    *,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
) -> RankOneEdit:
    """A change of output matrices that adds what `edits` add, on average over `texts`.

    For architectures whose projections have no bias. `edits` are those `to_bias_edit` takes, at
    places that a projection writes to. The first, third, ... text are averaged over, the others
    measure. Raises NotConvertible as `to_bias_edit` does, and for `blocks.0.hook_resid_pre` (no
    matrix writes there); ValueError for fewer than two texts.
    """
    slots, deltas, residuals = slots_of(model), [], []
    for name, vector in added(model, everywhere(model, edits)).items():
        matrix = name.replace(".b_", ".W_")
        if matrix == name:
            raise NotConvertible(
                f"{name} is a table of embeddings: no matrix writes there; to_bias_edit is exact"
            )
        fit, held = halves(model, slots[matrix], texts, prepend_bos, batch_size)
        mean = fit.double().mean(0).float()
        deltas.append((matrix, rank_one(vector, mean).reshape(slots[matrix].shape)))
        found = factors(held, mean).double()
        low, high = torch.quantile(found, torch.tensor([0.05, 0.95]).double()).tolist()
        error = float((found - 1).square().mean().sqrt())
        residuals.append(
            RankOneResidual(matrix, float(found.mean()), error, low, high, len(fit), len(held))
        )
    return RankOneEdit(WeightEdit(model, tuple(deltas)), tuple(residuals))


def lora_vector(
    model: Model,
    name: str,
    delta: LowRankDelta | Tensor,
    texts: Sequence[str],
    *,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
) -> LoraVector:
    """The mean of what a change of an output matrix adds, as a steering vector at its output.

    `name` is the matrix (`blocks.l.mlp.W_out`, `blocks.l.attn.W_O`) or its module's name in the
    Hugging Face model, as `low_rank_deltas` gives them; `delta` its change, `[in, d_model]` or low
    rank factors. Inputs are those of the unchanged model: changes in earlier layers are not in
    them. Raises KeyError for a name that is no output matrix, ValueError for a delta of other size.
    """
    slot = matrix_of(model, name)
    fit, held = halves(model, slot, texts, prepend_bos, batch_size)
    flat = delta if isinstance(delta, LowRankDelta) else delta.reshape(-1, delta.shape[-1])
    if flat.shape != (fit.shape[1], model.cfg.d_model):
        raise ValueError(
            f"the change has shape {tuple(flat.shape)}, {slot.name} has "
            f"{(fit.shape[1], model.cfg.d_model)}"
        )
    vector = written(fit, flat).double().mean(0).float()
    left, variance = unexplained(written(held, flat), vector)
    recipe = Recipe(
        "low-rank update",
        model_name=model_name(model),
        n=len(fit),
        settings={"matrix": slot.name},
        scores={"left": left, "variance": variance},
    )
    place = SteeringVector(vector, output_site(model, slot), recipe)
    return LoraVector(place, left, variance, len(fit), len(held))


def matrix_of(model: Model, name: str) -> Slot:
    """The output matrix of that name, TransformerLens's or the Hugging Face module's."""
    matrices = {n: slot for n, slot in slots_of(model).items() if n.split(".", 2)[-1] in INPUTS}
    if name in matrices:
        return matrices[name]
    module = live(model.original_model, name) if is_bridge(model) else None
    for slot in matrices.values():
        if module is not None and slot.module is module:
            return slot
    raise KeyError(f"{name!r} is no output matrix of this model; those are {', '.join(matrices)}")


def output_site(model: Model, slot: Slot) -> str:
    """The hook point that what the matrix writes flows past."""
    layer, part, _ = slot.name.split(".", 1)[1].split(".")
    if not post_norm(model, model.blocks[int(layer)]):
        return f"blocks.{layer}.hook_{part}_out"
    if not is_bridge(model):
        raise NotConvertible(f"no hook point lies between {slot.name} and the norm behind it")
    return f"blocks.{layer}.{part}.hook_out"


def halves(
    model: Model, slot: Slot, texts: Sequence[str], prepend_bos: bool | None, batch_size: int
) -> tuple[Float[Tensor, "fit in"], Float[Tensor, "held in"]]:
    """Inputs of an output matrix at every token but a leading BOS: even texts, odd texts."""
    if len(texts) < 2:
        raise ValueError(
            f"give at least two texts, one to fit and one to measure, not {len(texts)}"
        )
    return (
        inputs_of(model, slot, texts[::2], prepend_bos, batch_size),
        inputs_of(model, slot, texts[1::2], prepend_bos, batch_size),
    )


def inputs_of(
    model: Model, slot: Slot, texts: Sequence[str], prepend_bos: bool | None, batch_size: int
) -> Float[Tensor, "token in"]:
    """Inputs of an output matrix over the texts, float32, on the CPU."""
    layer, word = layer_of(slot.name), slot.name.split(".", 2)[-1]
    if word not in INPUTS:
        raise NotConvertible(f"the input of {slot.name} is no hook point of this model")
    encoded = encode_texts(model, texts, prepend_bos=bos_policy(model, None, prepend_bos))
    found: list[Tensor] = []

    def see(x: Tensor, counted: Tensor, final: Tensor) -> None:
        del final
        found.append(x.flatten(2)[counted].float().cpu())

    with reading(model, f"blocks.{layer}.{INPUTS[word]}", see):
        for start in range(0, len(encoded), batch_size):
            batch = padded(model, encoded[start : start + batch_size])
            steered_logits(model, batch.tokens, attention_mask=batch.real.long(), share=False)
    return torch.cat(found)


__all__ = ["LoraVector", "RankOneEdit", "RankOneResidual", "lora_vector", "rank_one_edit"]
