"""Low-rank adapters of peft on the model under a `TransformerBridge`.

peft's layers stand beside the host's own projections and are put in their place only inside
`applied()`; afterwards the model holds its own modules again, so that it is bit-identical to one
that never had an adapter. peft comes with `pip install "sae-steering-plugin[lora]"`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sae_steering_plugin.adapters.learning import as_before
from sae_steering_plugin.adapters.transformer_lens import Model, is_bridge, refuse_compiled
from sae_steering_plugin.concepts.update import LowRankDelta

ATTENTION_OUTPUT = (
    r"\.(?P<layer>\d+)\.(self_attn|attn|attention|linear_attn)\.(o|o_proj|out_proj|c_proj|dense)"
)
"""Output projections of attention (and of GatedDeltaNet) in the hosts' module names."""


@dataclass(frozen=True, eq=False)
class Projection:
    """A place in the model that holds `own`, and peft's layer around it."""

    name: str
    parent: nn.Module = field(repr=False)
    attribute: str
    own: nn.Module = field(repr=False)
    layer: nn.Module = field(repr=False)

    def put(self, module: nn.Module) -> None:
        self.parent._modules[self.attribute] = module


@dataclass(frozen=True, eq=False)
class LowRankAdapter:
    """Adapters of one model, off until `applied()`."""

    model: Model = field(repr=False)
    projections: tuple[Projection, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.projections)

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' own matrices; the model's are not among them."""
        return [
            parameter
            for one in self.projections
            for name, parameter in one.layer.named_parameters()
            if "lora_" in name
        ]

    @contextmanager
    def applied(self, *, learning: bool = False) -> Iterator[None]:
        """The model with its adapters, dropout only while `learning`.

        Raises RuntimeError inside another block of the same places.
        """
        refuse_compiled(self.model)
        for one in self.projections:
            if one.parent._modules[one.attribute] is not one.own:
                raise RuntimeError(f"{one.name} holds an adapter already: leave that block first")
        try:
            for one in self.projections:
                one.layer.train(learning)
                one.put(one.layer)
            yield
        finally:
            for one in self.projections:
                one.put(one.own)
                one.layer.eval()


def low_rank_adapter(
    model: Model,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    layers: Sequence[int] = (),
    target: str = ATTENTION_OUTPUT,
    seed: int = 0,
) -> LowRankAdapter:
    """Rank-stabilised LoRA on the projections of `layers` (all when empty) whose names end in
    `target`; a new adapter changes nothing.

    Raises TypeError for a model that is no bridge (its weights are no modules), ImportError without
    peft, and ValueError for a layer without such a projection or one that holds an adapter already.
    """
    if not is_bridge(model):
        raise TypeError(
            f"LoRA needs the Hugging Face model under a TransformerBridge; {type(model).__name__} "
            "keeps its weights in tensors of its own: load the model with load_model"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            'LoRA needs peft: python -m pip install "sae-steering-plugin[lora]"'
        ) from error
    refuse_compiled(model)
    inner = model.original_model
    found = {
        name: one for name, one in projections_of(inner, target) if one in layers or not layers
    }
    missing = sorted(set(layers) - set(found.values()))
    if missing or not found:
        raise ValueError(
            f"no projection like {target!r} in layer {missing[0] if missing else '0 or above'}: "
            "name one of the model's modules with target="
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=True,
        bias="none",
        target_modules=list(found),
        fan_in_fan_out=not isinstance(inner.get_submodule(next(iter(found))), nn.Linear),
    )
    places = [(name, *name.rpartition(".")[::2], inner.get_submodule(name)) for name in found]
    with as_before(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, inner)
        del inner.peft_config
    made = []
    for name, path, attribute, own in places:
        parent = inner.get_submodule(path)
        layer = parent._modules[attribute]
        assert isinstance(layer, nn.Module) and layer is not own
        made.append(Projection(plain_name(name), parent, attribute, own, layer.eval()))
    for one in made:
        one.put(one.own)
    for one in made:
        for name, parameter in one.layer.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
    return LowRankAdapter(model, tuple(made))


def projections_of(inner: Any, target: str) -> Iterator[tuple[str, int]]:
    """Names and layers of the linear maps whose plain name ends in `target`."""
    from transformers.pytorch_utils import Conv1D

    for name, module in inner.named_modules():
        found = re.search(f"{target}$", plain_name(name))
        if found and isinstance(module, nn.Linear | Conv1D):
            yield name, int(found["layer"])


def low_rank_deltas(model: Any, *, adapter: str = "default") -> dict[str, LowRankDelta]:
    """What peft's LoRA layers add to each matrix `[in, out]`, in factors, by the matrix's name.

    `model` is a `LowRankAdapter`, a `PeftModel`, or any module with peft layers in it. Raises
    ValueError when it holds no LoRA layer of that name.
    """
    from peft.tuners.lora import LoraLayer

    if isinstance(model, LowRankAdapter):
        named: list[tuple[str, Any]] = [(one.name, one.layer) for one in model.projections]
    else:
        named = [(plain_name(name), one) for name, one in model.named_modules()]
    layers: list[tuple[str, Any]] = [
        (name, one) for name, one in named if isinstance(one, LoraLayer) and adapter in one.lora_A
    ]
    found = {
        name: LowRankDelta(
            one.lora_A[adapter].weight.detach().T,
            one.lora_B[adapter].weight.detach().T,
            float(one.scaling[adapter]),
        )
        for name, one in layers
    }
    if not found:
        raise ValueError(f"{type(model).__name__} holds no LoRA layer named {adapter!r}")
    return found


def plain_name(name: str) -> str:
    """A module's name without the bridge's layers in between."""
    return name.replace("._original_component", "")


__all__ = ["LowRankAdapter", "low_rank_adapter", "low_rank_deltas"]
