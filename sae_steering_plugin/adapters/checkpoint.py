"""The Hugging Face model under a bridge as an ordinary one again, with an edit of its weights.

A bridge puts layers of its own around the modules of the model it wraps. Here each parameter is
looked up at the place where a plain model of the same configuration has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_steering_plugin.adapters.parameters import (
    Slot,
    carried_sites,
    child,
    component,
    place_of,
    slots_of,
    writer_of,
)
from sae_steering_plugin.adapters.transformer_lens import Model, is_bridge, resolve
from sae_steering_plugin.adapters.weights import NotConvertible, WeightEdit

BIAS_FLAGS = ("mlp_bias", "attention_bias")
"""Options of stock configurations that give projections a bias."""


def plain_model(edit: WeightEdit) -> Any:
    """A Hugging Face model of the bridge's class with the edit in its weights, ready to be saved.

    Parameters are shared with the bridge's, not copied. Biases that the configuration can switch on
    are (those that are not edited are zeros); an embedding that was tied to the unembedding and is
    edited is untied. The model has no buffers of its own: it is for `save_pretrained`, not to run.
    Raises TypeError for a model that is no bridge, and NotConvertible where the architecture has no
    such bias, with the sites that can be saved.
    """
    inner = wrapped(edit.model)
    slots = slots_of(edit.model)
    config = with_biases(edit.model, [slots[name] for name in edit.names])
    with edit.apply():
        head = inner.get_output_embeddings()
        apart = component(inner.get_input_embeddings()).weight is not component(head).weight
        if apart:
            config.tie_word_embeddings = False
        plain = skeleton(inner, config)
        state = {name: held(inner, name, like) for name, like in plain.state_dict().items()}
    plain.load_state_dict(state, assign=True)
    plain.generation_config = deepcopy(inner.generation_config)
    return plain


def wrapped(model: Model) -> Any:
    """The Hugging Face model under a bridge; TypeError for another host."""
    if not is_bridge(model):
        raise TypeError(
            f"{type(model).__name__} holds no Hugging Face model: load the checkpoint with "
            "load_model and convert there"
        )
    return model.original_model


def skeleton(inner: Any, config: Any) -> Any:
    """A plain model of that configuration on the meta device: names and shapes alone."""
    with torch.device("meta"):
        return type(inner)(config)


def live(inner: Any, name: str) -> Any:
    """The module under the bridge that a plain model has at `name`; None when there is none."""
    module = component(inner)
    for step in name.split(".") if name else ():
        while child(module, step) is None and child(module, "_original_component") is not None:
            module = child(module, "_original_component")
        module = child(module, step)
    return component(module)


def held(inner: Any, name: str, like: Tensor) -> Tensor:
    """The parameter or buffer a plain model has at `name`; zeros for a bias switched on."""
    path, _, attribute = name.rpartition(".")
    module = live(inner, path)
    kept = {} if module is None else {**module._parameters, **module._buffers}
    found = kept.get(attribute)
    if found is not None:
        return found.detach()
    weight = kept.get("weight")
    if attribute != "bias" or weight is None:
        raise NotConvertible(f"the wrapped model holds no {name} of shape {tuple(like.shape)}")
    return torch.zeros(like.shape, dtype=weight.dtype, device=weight.device)


def own_tokenizer(tokenizer: Any) -> Any | None:
    """The tokenizer as its source has it; None when that is gone or has other tokens.

    A host loads a tokenizer again so that it prepends a BOS, also where the source's does not.
    """
    try:
        own = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    except (OSError, ValueError):
        return None
    if own.get_vocab() != tokenizer.get_vocab():
        return None
    own.chat_template = tokenizer.chat_template
    return own


SAMPLES = ("3 + 14 = 17, or 3.5?", "Isn't it\n\nlate: caf\u00e9 (a_b)  ")
"""Digits, signs, contractions, accents and spaces: where ways to split a text part."""


def opened_otherwise(tokenizer: Any, folder: Path) -> str | None:
    """The class that `AutoTokenizer` makes of what `tokenizer` saved in `folder`, if it splits
    texts in another way: for some architectures transformers has its own, whatever is saved."""
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(folder)
    same = all(opened(text)["input_ids"] == tokenizer(text)["input_ids"] for text in SAMPLES)
    return None if same else type(opened).__name__


def module_names(model: Model, *, base: bool = False) -> dict[int, str]:
    """Names in a plain model of every module under the bridge, by `id`; those of the model without
    its head with `base`."""
    inner = wrapped(model)
    root, plain = inner, skeleton(inner, inner.config)
    if base:
        root, plain = inner.base_model, plain.base_model
    return {id(live(root, name)): name for name, _ in plain.named_modules() if name}


def with_biases(model: Model, slots: Sequence[Slot]) -> Any:
    """A copy of the model's configuration under which every slot is a parameter, with as few flags
    switched on as that takes."""
    inner = wrapped(model)
    config, names = deepcopy(inner.config), module_names(model)
    for slot in slots:
        if not has(skeleton(inner, config), names, slot):
            able = [f for f in flags(config) if has(switched(inner, config, f), names, slot)]
            if not able:
                raise NotConvertible(
                    f"{names[id(slot.module)]} has no bias in any {type(config).__name__}, so a "
                    f"plain checkpoint cannot carry {slot.name}; sites that it can: "
                    f"{', '.join(saved_sites(model)) or 'none'}"
                )
            setattr(config, able[0], True)
    return config


def saved_sites(model: Model) -> list[str]:
    """Of `carried_sites`, those whose parameter a plain checkpoint of the architecture can have."""
    inner, names, slots = wrapped(model), module_names(model), slots_of(model)
    plain = switched(inner, inner.config, *flags(inner.config))
    found = []
    for site in carried_sites(model):
        place = place_of(model, site)
        slot = None if place is None else writer_of(model, slots, place)
        if slot is not None and has(plain, names, slot):
            found.append(site)
    return found


def flags(config: Any) -> list[str]:
    return [flag for flag in BIAS_FLAGS if getattr(config, flag, None) is False]


def switched(inner: Any, config: Any, *names: str) -> Any:
    """The skeleton with those flags on."""
    other = deepcopy(config)
    for name in names:
        setattr(other, name, True)
    return skeleton(inner, other)


def has(plain: Any, names: dict[int, str], slot: Slot) -> bool:
    module = plain.get_submodule(names[id(slot.module)])
    return module._parameters.get(slot.attribute) is not None


def output_module(model: Model, hook_name: str) -> str:
    """The module, named as in a plain model without its head, whose output the hook point is.

    Raises NotConvertible for a hook point that is no module's output.
    """
    names, site = module_names(model, base=True), resolve(model, hook_name)
    place = place_of(model, hook_name)
    owner: Any = site.owner if site.attribute == "hook_out" else None
    if site.attribute == "hook_in" and place is not None and place.kind == "before":
        learned = child(model, "pos_embed") is not None
        first = None if learned else model.embed  # no module adds token and position
        owner = model.blocks[place.layer - 1] if place.layer else first
    name = None if owner is None else names.get(id(component(owner)))
    if name is None:
        raise NotConvertible(
            f"{hook_name} is not the output of a module of the Hugging Face model, which is where "
            "other programs can hook in: use blocks.l.hook_resid_post, hook_attn_out or "
            "hook_mlp_out"
        )
    return name


__all__ = ["opened_otherwise", "output_module", "own_tokenizer", "plain_model", "saved_sites"]
