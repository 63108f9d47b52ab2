"""The parameters of either host that write to the residual stream, under TransformerLens's names.

A `HookedTransformer` owns tensors of those names. A bridge keeps the Hugging Face modules, whose
layouts differ, and whose linear maps may have no bias; a bias that is absent reads as zeros and can
be put in. A parameter is never written into: a new one takes its place in one module, so that a
tensor which two modules share (tied embeddings) changes in that one alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sae_steering_plugin.adapters.transformer_lens import Model, is_bridge, resolve

Kind = Literal["before", "mid", "attn", "mlp", "z"]
PLACES: tuple[tuple[str, Kind, int], ...] = (
    (r"hook_resid_pre|hook_in", "before", 0),
    (r"hook_resid_post|hook_out", "before", 1),
    (r"hook_resid_mid|ln2\.hook_in", "mid", 0),
    (r"hook_attn_out|attn\.hook_out|linear_attn\.hook_out", "attn", 0),
    (r"hook_mlp_out|mlp\.hook_out", "mlp", 0),
    (r"attn\.hook_z|attn\.o\.hook_in", "z", 0),
)
"""Canonical names inside a block, the kind of place, and how many blocks further on it lies."""
WORDS = (
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "attn.hook_out",
    "linear_attn.hook_out",
    "hook_mlp_out",
    "mlp.hook_out",
    "hook_resid_post",
)
"""A name of each kind of place, in the order of a block's computation."""


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter: its TransformerLens name, the module that holds it, and how it is laid out.

    `transposed` when the module stores `[d_model, in]`. `heads` splits `in` into
    `[head, d_head, d_model]` (0 where nothing is split). `scale` multiplies what the module reads
    (Gemma's embedding); it is part of `value`.
    """

    name: str
    module: nn.Module
    attribute: str
    transposed: bool = False
    heads: int = 0
    scale: float = 1.0

    @property
    def held(self) -> nn.Parameter | None:
        """The module's own parameter; None for a bias that it does not have."""
        return self.module._parameters[self.attribute]

    def put(self, parameter: nn.Parameter | None) -> None:
        self.module._parameters[self.attribute] = parameter

    def value(self) -> Tensor:
        """The parameter in TransformerLens's layout, detached, at least float32; an absent bias is
        zeros."""
        held = self.held
        if held is not None:
            return self.from_host(exact(held))
        weight = self.module._parameters["weight"]
        assert weight is not None
        return torch.zeros_like(exact(weight)[:, 0])

    @property
    def shape(self) -> torch.Size:
        """Of `value`, which is not formed."""
        held, weight = self.held, self.module._parameters.get("weight")
        if held is not None:
            return self.from_host(torch.empty(held.shape, device="meta")).shape
        assert weight is not None
        return weight.shape[:1]

    def from_host(self, tensor: Tensor) -> Tensor:
        if self.transposed:
            tensor = tensor.T
        if self.heads:
            tensor = tensor.reshape(self.heads, -1, tensor.shape[-1])
        return tensor * self.scale

    def to_host(self, tensor: Tensor) -> Tensor:
        """What `from_host` was given."""
        if self.heads:
            tensor = tensor.flatten(0, 1)
        return (tensor.T if self.transposed else tensor) / self.scale

    def moved(self, delta: Tensor) -> nn.Parameter:
        """A new parameter: the held one plus `delta` (our layout), rounded once."""
        held = self.held
        like = held if held is not None else self.module._parameters["weight"]
        assert like is not None
        step = self.to_host(delta.to(like.device))
        total = step if held is None else exact(held) + step
        needs = held is not None and held.requires_grad
        return nn.Parameter(total.to(like.dtype).contiguous(), requires_grad=needs)


def slots_of(model: Model) -> dict[str, Slot]:
    """Every parameter of the model that writes to the residual, by TransformerLens name.

    `embed.W_E`, `pos_embed.W_pos` (where positions are learned and added to the residual), and per
    block `attn.W_O`, `attn.b_O`, `mlp.W_out`, `mlp.b_out`. GatedDeltaNet layers have
    `linear_attn.W_out` and `linear_attn.b_out`. A block with experts has no `mlp` entries: no
    single projection gives its output.
    """
    found = _of_bridge(model) if is_bridge(model) else _of_hooked(model)
    return {slot.name: slot for slot in found}


def exact(tensor: Tensor) -> Tensor:
    """The tensor detached, in float32, or in float64 where it is that."""
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def component(module: Any) -> Any:
    """The Hugging Face module under the bridge's own layers."""
    while isinstance(module, nn.Module) and "_original_component" in module._modules:
        module = module._modules["_original_component"]
    return module


def child(module: Any, name: str) -> Any:
    """The child of that name, None when there is none."""
    return module._modules.get(name) if isinstance(module, nn.Module) else None


def _of_hooked(model: Model) -> list[Slot]:
    slots = [Slot("embed.W_E", model.embed, "W_E")]
    if model.cfg.positional_embedding_type == "standard":
        slots.append(Slot("pos_embed.W_pos", model.pos_embed, "W_pos"))
    for layer, block in enumerate(model.blocks):
        for part, names in (("attn", ("W_O", "b_O")), ("mlp", ("W_out", "b_out"))):
            owner = child(block, part)
            held = {} if owner is None else owner._parameters
            slots += [
                Slot(f"blocks.{layer}.{part}.{name}", owner, name)
                for name in names
                if owner is not None and held.get(name) is not None
            ]
    return slots


def _of_bridge(model: Model) -> list[Slot]:
    slots = []
    for name, part in (("embed.W_E", "embed"), ("pos_embed.W_pos", "pos_embed")):
        table = component(child(model, part))
        if isinstance(table, nn.Embedding):
            scale = float(getattr(table, "embed_scale", 1.0))
            slots.append(Slot(name, table, "weight", scale=scale))
    for layer, block in enumerate(model.blocks):
        name = f"blocks.{layer}"
        slots += _linear(f"{name}.attn", "O", child(child(block, "attn"), "o"), model.cfg.n_heads)
        slots += _linear(f"{name}.mlp", "out", child(child(block, "mlp"), "out"))
        recurrent = component(child(block, "linear_attn"))
        slots += _linear(f"{name}.linear_attn", "out", child(recurrent, "out_proj"))
    return slots


def _linear(owner: str, word: str, module: Any, heads: int = 0) -> list[Slot]:
    """The matrix and bias of one output projection; nothing for something else."""
    from transformers.pytorch_utils import Conv1D

    linear = component(module)
    if not isinstance(linear, nn.Linear | Conv1D):
        return []
    transposed = isinstance(linear, nn.Linear)
    matrix = Slot(f"{owner}.W_{word}", linear, "weight", transposed, heads)
    return [matrix, Slot(f"{owner}.b_{word}", linear, "bias")]


# Places -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A stage of the residual stream in front of block `layer`, or a place inside that block."""

    kind: Kind
    layer: int


def place_of(model: Model, hook_name: str) -> Place | None:
    """The place a hook point is; None for one that no rule knows. KeyError for an unknown name."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", resolve(model, hook_name).name)
    if not found:
        return None
    layer = int(found[1])
    for pattern, kind, further in PLACES:
        if re.fullmatch(pattern, found[2]):
            absent = kind == "mid" and not has_middle(model, model.blocks[layer])
            return None if absent else Place(kind, layer + further)
    return None


def has_middle(model: Model, block: nn.Module) -> bool:
    """True when the MLP reads what attention wrote: neither parallel nor attention alone."""
    return not model.cfg.parallel_attn_mlp and child(block, "mlp") is not None


def post_norm(model: Model, block: nn.Module) -> bool:
    """True when the block's outputs pass a norm of their own before they are added (Gemma 2)."""
    after = any(child(block, name) is not None for name in ("ln1_post", "ln2_post"))
    return after or bool(getattr(model.cfg, "use_normalization_before_and_after", False))


def writer_of(model: Model, slots: Mapping[str, Slot], place: Place) -> Slot | None:
    """The parameter that adds to a place at every token and to nothing earlier; None without one.

    Behind an output norm only what stands in front of that norm can be reached: head outputs, and
    on a bridge, whose `attn.hook_out` and `mlp.hook_out` lie in front of it, those. A bridge's
    `hook_resid_mid` is the input of the MLP's norm alone: what is added there does not flow on.
    """
    if place.kind == "mid" and is_bridge(model):
        return None
    if place.kind == "before" and place.layer == 0:
        return slots.get("pos_embed.W_pos", slots.get("embed.W_E"))
    layer = place.layer - (place.kind == "before")
    block = model.blocks[layer]
    in_front = place.kind == "z" or (place.kind in ("attn", "mlp") and is_bridge(model))
    if post_norm(model, block) and not in_front:
        return None
    if place.kind == "mlp" or (place.kind == "before" and has_middle(model, block)):
        names = ["mlp.b_out"]
    elif place.kind == "before":
        names = ["mlp.b_out", "attn.b_O"]
    else:
        names = ["attn.b_O", "linear_attn.b_out"]
    held = [slots[f"blocks.{layer}.{name}"] for name in names if f"blocks.{layer}.{name}" in slots]
    return held[0] if held else None


def carried_sites(model: Model) -> list[str]:
    """The hook points of a model at which adding a vector everywhere is a change of weights."""
    slots, found = slots_of(model), dict[str, str]()
    for layer in range(len(model.blocks)):
        for name in (f"blocks.{layer}.{word}" for word in WORDS):
            if _carries(model, slots, name):
                found.setdefault(resolve(model, name).name, name)
    return list(found.values())


def _carries(model: Model, slots: Mapping[str, Slot], name: str) -> bool:
    try:
        place = place_of(model, name)
    except (KeyError, ValueError):  # a place that this architecture lacks, or that never fires
        return False
    return place is not None and writer_of(model, slots, place) is not None


def residual_sites(model: Model) -> list[str]:
    """Hook points of every stage of the residual stream, each stage once, in order."""
    sites = ["blocks.0.hook_resid_pre"]
    for layer, block in enumerate(model.blocks):
        if has_middle(model, block):
            sites.append(f"blocks.{layer}.hook_resid_mid")
        sites.append(f"blocks.{layer}.hook_resid_post")
    return sites


__all__ = [
    "Place",
    "Slot",
    "carried_sites",
    "child",
    "component",
    "exact",
    "has_middle",
    "place_of",
    "post_norm",
    "residual_sites",
    "slots_of",
    "writer_of",
]
