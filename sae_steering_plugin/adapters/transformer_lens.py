"""TransformerLens models: loading, and one resolver from a hook name to the live hook point.

Works on `TransformerBridge`, `SAETransformerBridge`, `HookedTransformer` and
`HookedSAETransformer`, with or without SAEs attached, with or without compatibility mode. A name is
resolved at every entry and the object never kept, because leaving SAELens's `saes()` puts a new
`HookPoint` in place of the old one.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

Model = Any
"""One of the four host classes; they share no base, so the room is typed by duck."""

GATED = {
    "hook_result": "use_attn_result",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_tokens": "use_hook_tokens",
}
"""Hook points that exist always and fire only when this flag of the model's config is on."""

_canonical: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Site:
    """A live place in a model: `point` is where an edit attaches, `owner.attribute` where it hangs.

    `name` is the canonical name. `sae` is the dictionary attached there, if any; then `point` is
    its `hook_sae_output`, so that what flows on is edited exactly once.
    """

    name: str
    point: HookPoint
    owner: nn.Module
    attribute: str
    held: nn.Module
    sae: Any = None
    sae_error_term: bool = False

    @property
    def live(self) -> bool:
        """False once the host has put another object at this place."""
        return _child(self.owner, self.attribute) is self.held


def is_bridge(model: Model) -> bool:
    """True for the classes that wrap a Hugging Face model in place."""
    from transformer_lens.model_bridge import TransformerBridge

    return isinstance(model, TransformerBridge)


def load_model(
    name_or_folder: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Model:
    """A `SAETransformerBridge` in eval mode, from a hub name or a local folder, by the host's
    loader.

    The folder must hold an ordinary Hugging Face checkpoint with its tokenizer. A name that is not
    a folder goes to the hub exactly as `TransformerBridge.boot_transformers` would.
    """
    from sae_lens import SAETransformerBridge

    try:
        model = SAETransformerBridge.boot_transformers(
            str(name_or_folder),
            device=device,
            dtype=dtype,
            tokenizer=plain_tokenizer(name_or_folder),
        )
    except OSError as error:
        raise OSError(
            f"could not load {name_or_folder!r}: it is neither a local folder with config.json nor "
            f"a model the hub served ({error})"
        ) from error
    return model.eval()


def plain_tokenizer(folder: str) -> Any | None:
    """The tokenizer of a local folder whose `tokenizer.json` is all there is to it, else None.

    Such a folder names no model's tokenizer class. For some model types (Qwen3.5) transformers
    would then take that type's own class, which splits text by rules of its own and not by those in
    the file: other tokens than the model was trained on, without an error.
    """
    path = Path(folder)
    settings, pieces = path / "tokenizer_config.json", path / "tokenizer.json"
    if not (settings.is_file() and pieces.is_file()):
        return None
    named = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class")
    if named not in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return None
    from transformers import PreTrainedTokenizerFast

    # with add_bos_token the host keeps this object instead of loading the folder its own way
    found = PreTrainedTokenizerFast.from_pretrained(folder, add_bos_token=True)
    return found if found.bos_token is not None else None


def canonical_name(model: Model, hook_name: str) -> str:
    """The name the model itself registers a hook point under; aliases are looked up once a
    model."""
    if not is_bridge(model):
        return hook_name
    known = _canonical.setdefault(model, {})
    if hook_name not in known:
        aliases = {**model.hook_aliases, **model._collect_hook_aliases_from_registry()}
        target = aliases.get(hook_name, hook_name)
        known[hook_name] = target if isinstance(target, str) else hook_name
    return known[hook_name]


def _child(owner: Any, attribute: str) -> Any:
    if attribute.isdigit():
        return owner[int(attribute)]
    modules = owner.__dict__.get("_modules") or {}
    found = modules.get(attribute)
    return found if found is not None else getattr(owner, attribute, None)


def _place(model: Model, name: str) -> tuple[Any, str, Any]:
    """The module a dotted name hangs on, its last word, and what hangs there, if anything."""
    owner: Any = model
    *path, attribute = name.split(".")
    try:
        for step in path:
            owner = _child(owner, step)
        return owner, attribute, _child(owner, attribute)
    except (AttributeError, IndexError, TypeError, KeyError):
        return owner, attribute, None


def resolve(model: Model, hook_name: str) -> Site:
    """The live site called `hook_name`.

    Raises KeyError with the nearest names for an unknown hook point, ValueError for one that exists
    but cannot fire under the model's config, and TypeError for something that is not a host model.
    """
    if not isinstance(model, nn.Module) or not (is_bridge(model) or "hook_dict" in model.__dict__):
        raise TypeError(
            f"{type(model).__name__} has no hook points: pass a TransformerBridge or "
            "HookedTransformer "
            "(for a Hugging Face model: TransformerBridge.boot_transformers(name, hf_model=model))"
        )
    name = canonical_name(model, hook_name)
    owner, attribute, held = _place(model, name)
    if isinstance(held, HookPoint):
        _refuse_gated(model, hook_name, name)
        registry = getattr(model, "_hook_registry", {})
        registered = str(held.name or "")
        if registered and registry.get(registered) is held:
            name = registered
        else:
            # SAELens restores a detached site under a shortened name, which the bridge's hooks()
            # then looks up in vain; the true name mends that.
            held.name = name
        _refuse_transcoder_input(model, name)
        return Site(name, held, owner, attribute, held)
    output = getattr(held, "hook_sae_output", None)
    if isinstance(output, HookPoint) and getattr(held, "sae", None) is not None:
        return Site(
            f"{name}.hook_sae_output",
            output,
            owner,
            attribute,
            held,
            sae=held.sae,
            sae_error_term=bool(held.use_error_term),
        )
    raise KeyError(_unknown(model, hook_name))


def tell_of_a_branch(hook_name: str, site: Site) -> None:
    """Warns where a bridge's `hook_resid_mid` is an alias of the MLP norm's input: the value is the
    residual stream's, but what is written or differentiated there is the MLP's reading alone."""
    if hook_name.endswith("hook_resid_mid") and "hook_resid_mid" not in site.name:
        warnings.warn(
            f"on this model {hook_name} is {site.name}, the input of the MLP's norm: a change or a "
            "gradient there is of what the MLP reads, and the residual stream flows on beside it. "
            f"For the stream, add at {hook_name.replace('hook_resid_mid', 'hook_attn_out')}, or "
            "load the model as a HookedTransformer; for the branch on purpose, name "
            f"{site.name}",
            stacklevel=3,
        )


def hook_names(model: Model) -> list[str]:
    """Every name a user may write, aliases included."""
    from transformer_lens.model_bridge import TransformerBridge

    if is_bridge(model):
        aliases = {**model.hook_aliases, **model._collect_hook_aliases_from_registry()}
        return [*TransformerBridge.hook_dict.fget(model), *aliases]  # type: ignore[attr-defined]
    return list(model.hook_dict)


def _unknown(model: Model, hook_name: str) -> str:
    names = list(dict.fromkeys(hook_names(model)))
    near = get_close_matches(hook_name, names, n=3, cutoff=0.6)
    layer = re.match(r"blocks\.(\d+)\.", hook_name)
    depth = model.cfg.n_layers
    if layer and int(layer[1]) >= depth:
        return f"no hook point {hook_name!r}: the model has blocks 0 to {depth - 1}"
    hint = f"; nearest are {near}" if near else ""
    return f"no hook point {hook_name!r} in this {type(model).__name__}{hint}"


def _refuse_gated(model: Model, asked: str, name: str) -> None:
    for word in (asked.rsplit(".", 1)[-1], name.rsplit(".", 1)[-1]):
        flag = GATED.get(word)
        if flag and not getattr(model.cfg, flag, False):
            raise ValueError(
                f"{asked!r} fires only when model.cfg.{flag} is on: call model.set_{flag}(True) "
                "first"
            )


def _refuse_transcoder_input(model: Model, name: str) -> None:
    """An edit at the input of an attached transcoder would not reach it."""
    outputs = getattr(model, "_transcoder_output_hooks", None)
    if not outputs:
        return
    for read in outputs:
        if canonical_name(model, read) == name and canonical_name(model, outputs[read]) != name:
            raise ValueError(
                f"{name!r} is the input of an attached transcoder, which reads it before any later "
                "hook: call model.reset_saes() first, and attach the transcoder inside no edit"
            )


def refuse_compiled(model: Model, hook_name: str | None = None) -> None:
    """Raise RuntimeError for a model with a compiled part: hooks added after compilation are
    silently ignored.

    With the canonical name of a site only the parts around it are looked at, which costs the same
    at any depth.
    """
    dynamo = getattr(torch, "_dynamo", None)
    inner = getattr(model, "original_model", None)
    root = inner if isinstance(inner, nn.Module) else model
    parts: Iterable[Any] = ()
    if hook_name is not None:
        parts = (inner, *_around(model, inner, hook_name))
    elif isinstance(root, nn.Module):
        parts = root.modules()
    for module in (model, *parts):
        wrapped = dynamo is not None and isinstance(module, dynamo.eval_frame.OptimizedModule)
        if wrapped or getattr(module, "_compiled_call_impl", None) is not None:
            raise RuntimeError(
                "this model is compiled, and a compiled model ignores hooks added later: steer the "
                "uncompiled model (model._orig_mod, or build it again without compile())"
            )


def _around(model: Model, inner: Any, hook_name: str) -> Iterator[Any]:
    """The modules whose forward pass a hook point's own lies in, the wrapped model's among them."""
    owner: Any = model
    for step in hook_name.split(".")[:-1]:
        owner = _child(owner, step)
        yield owner
        yield owner._modules.get("_original_component")
        path = getattr(owner, "name", None)
        if inner is not None and isinstance(path, str) and "." in path:
            node = inner
            for part in path.split("."):
                node = _child(node, part)
                yield node


def same_place(model: Model, first: str, second: str) -> bool:
    """True when two hook names carry the same residual: aliases, or post of a layer and pre of the
    next."""
    return _boundary(canonical_name(model, first)) == _boundary(canonical_name(model, second))


def _boundary(name: str) -> tuple[str, int] | str:
    found = re.fullmatch(r"blocks\.(\d+)\.(hook_resid_pre|hook_in|hook_resid_post|hook_out)", name)
    if not found:
        return name
    after = found[2] in ("hook_resid_post", "hook_out")
    return "residual before block", int(found[1]) + after


def layer_of(hook_name: str) -> int | None:
    """The block a hook name lies in; None outside the blocks."""
    found = re.match(r"blocks\.(\d+)\.", hook_name)
    return int(found[1]) if found else None


def bos_token(model: Model) -> int | None:
    """The id that may open a text; None when the tokenizer has none."""
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else tokenizer.bos_token_id


def pad_token(model: Model) -> int | None:
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else tokenizer.pad_token_id


def stop_tokens(model: Model) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's EOS and the generation config's."""
    found: list[int] = []
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.append(int(tokenizer.eos_token_id))
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    found += [
        int(i) for i in (named if isinstance(named, list | tuple) else [named]) if i is not None
    ]
    return tuple(dict.fromkeys(found))
