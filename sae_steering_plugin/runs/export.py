"""Steering written down for programs that do not know this package.

    export_checkpoint   a Hugging Face folder with the steering in its weights
    export_lm_eval      a `.pt` file for lm-evaluation-harness, `--model steered`
    export_gguf         a control vector for llama.cpp

All three add a constant at every token, so all refuse what depends on position or activation.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steering_plugin.adapters.checkpoint import (
    opened_otherwise,
    output_module,
    own_tokenizer,
    plain_model,
)
from sae_steering_plugin.adapters.parameters import place_of
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.adapters.weights import (
    NotConvertible,
    Steering,
    WeightEdit,
    check_text,
    constant_of,
    everywhere,
    to_bias_edit,
)
from sae_steering_plugin.types import Edit, SteeringVector

PROVENANCE = "steering.json"
"""The file beside an exported checkpoint that says what was added."""
OWN_TOKENIZER = "as in the checkpoint of the model"
HOST_TOKENIZER = "as the host has it, which prepends a BOS: the model's checkpoint was not found"
ARCHITECTURE = "controlvector"


def export_checkpoint(model: Any, edits: Steering | WeightEdit, folder: str | Path) -> Path:
    """A folder that plain `transformers` loads and that is steered without hooks, or this package.

    Holds the weights, the tokenizer of the model's own checkpoint (a host's prepends a BOS where
    that one may not; `steering.json` says when it was not found and the host's was saved), and
    `steering.json` with what was added. Written, loaded again with `AutoModelForCausalLM` and
    compared with the edited model on a short text before this returns. Warns where `AutoTokenizer`
    would split texts otherwise than the tokenizer that was saved. Raises NotConvertible, leaving no
    folder behind, for edits that are none of weights, for architectures that have no such
    parameter, and when the comparison fails; FileExistsError for a folder that holds something.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder")
    weights = edits if isinstance(edits, WeightEdit) else to_bias_edit(model, edits)
    plain_model(weights).save_pretrained(folder)
    listed = [] if isinstance(edits, WeightEdit) else everywhere(model, edits)
    told = provenance(weights, listed)
    if model.tokenizer is not None:
        own = own_tokenizer(model.tokenizer)
        told["tokenizer"] = HOST_TOKENIZER if own is None else OWN_TOKENIZER
        saved = model.tokenizer if own is None else own
        saved.save_pretrained(folder)
        if other := opened_otherwise(saved, folder):
            told["tokenizer"] += f"; AutoTokenizer opens it as {other}, which splits otherwise"
            warnings.warn(
                f"transformers' AutoTokenizer opens {folder} as {other} and splits texts otherwise "
                f"than the model's tokenizer: load it with {type(saved).__name__}.from_pretrained",
                stacklevel=2,
            )
    (folder / PROVENANCE).write_text(json.dumps(told, indent=1))
    try:
        require_equal(model, weights, folder)
    except NotConvertible:
        rmtree(folder)
        raise
    return folder


def provenance(weights: WeightEdit, edits: Sequence[Edit]) -> dict[str, Any]:
    """What was added, where and from which recipe."""
    from sae_steering_plugin import __version__

    def about(edit: Edit) -> dict[str, Any]:
        vector = getattr(edit.change, "vector", None)
        made: dict[str, Any] = {"change": type(edit.change).__name__, "hook_name": edit.site}
        if isinstance(vector, SteeringVector):
            made |= {"label": vector.label, "recipe": vector.recipe.to_dict()}
        return made

    return {
        "made by": f"sae-steering-plugin {__version__}",
        "edits": [about(edit) for edit in edits],
        "parameters": {name: float(delta.float().norm()) for name, delta in weights.deltas},
    }


def require_equal(model: Any, weights: WeightEdit, folder: Path) -> None:
    """Load the folder with transformers alone and compare its logits with the edited model's."""
    from transformers import AutoModelForCausalLM

    tokens = check_text(model)
    with weights.apply():
        wanted = steered_logits(model, tokens)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted.dtype).eval()
    with torch.no_grad():
        found = saved(tokens, use_cache=True).logits
    missed, size = float((found - wanted.cpu()).abs().max()), float(wanted.abs().max())
    if not missed <= 256 * torch.finfo(wanted.dtype).eps * size:
        raise NotConvertible(
            f"the saved checkpoint differs from the edited model by {missed:.3g} in a logit: its "
            "weights were processed after loading (enable_compatibility_mode), or trained in parts "
            "that the bridge keeps twice; convert on a freshly loaded model"
        )


def export_lm_eval(model: Any, edits: Steering, path: str | Path) -> Path:
    """A file for `lm_eval --model steered --model_args pretrained=...,steer_path=PATH`.

    A dictionary from a module of the Hugging Face model to the vector added to its output; edits of
    one module are summed, because the harness keeps one vector per module. The format is torch's
    archive with tensors and numbers alone (the harness itself unpickles whatever file it is given).
    The harness steers every token, padding and BOS among them, and rounds the vector to the
    checkpoint's dtype. Raises NotConvertible for edits that are no constants everywhere and for
    hook points that are no module's output; ValueError for another suffix than `.pt`.
    Format: EleutherAI/lm-evaluation-harness 0.4.13, lm_eval/models/hf_steered.
    """
    path = Path(path)
    if path.suffix != ".pt":
        raise ValueError(f"{path.name} must end in .pt: the harness goes by the suffix")
    vectors: dict[str, Tensor] = {}
    for edit in everywhere(model, edits):
        name, step = output_module(model, edit.site), constant_of(edit)
        vectors[name] = vectors[name] + step if name in vectors else step
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            name: {
                "steering_vector": vector.clone(),
                "steering_coefficient": 1.0,
                "action": "add",
                "bias": None,
                "head_index": None,
            }
            for name, vector in vectors.items()
        },
        path,
    )
    return path


def read_lm_eval(path: str | Path) -> dict[str, Float[Tensor, " d_model"]]:
    """What a file of the harness adds to the output of each module.

    Raises ValueError for an entry that does anything but add.
    """
    found = torch.load(path, weights_only=True, map_location="cpu")
    odd = [name for name, entry in found.items() if entry["action"] != "add"]
    if odd:
        raise ValueError(f"{odd[0]} has action {found[odd[0]]['action']!r}; only 'add' is a vector")
    return {
        name: entry["steering_vector"].float() * float(entry["steering_coefficient"])
        for name, entry in found.items()
    }


def export_gguf(model: Any, edits: Steering, path: str | Path) -> Path:
    """A control vector file for llama.cpp's `--control-vector`.

    Tensor `direction.k` is added to the output of block k, counted from 0, at every token, so
    `blocks.k.hook_resid_post` and `blocks.k+1.hook_resid_pre` are `direction.k`. The format has no
    k = 0: what is added behind block 0 cannot be written. Needs gguf (extra `[gguf]`). Raises
    NotConvertible for that, for any other place, and for edits that are no constants everywhere.
    """
    gguf = gguf_module()
    directions: dict[int, Tensor] = {}
    for edit in everywhere(model, edits):
        place, step = place_of(model, edit.site), constant_of(edit)
        if place is None or place.kind != "before" or place.layer < 2:
            raise NotConvertible(
                f"{edit.site}: a control vector is added to the output of block 1 or a later one "
                "(blocks.k.hook_resid_post with k >= 1)"
            )
        layer = place.layer - 1
        directions[layer] = directions[layer] + step if layer in directions else step
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), ARCHITECTURE)
    kind = getattr(getattr(model, "original_model", None), "config", model.cfg)
    writer.add_string(f"{ARCHITECTURE}.model_hint", str(getattr(kind, "model_type", "")))
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
    for layer, direction in sorted(directions.items()):
        writer.add_tensor(f"direction.{layer}", direction.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def read_gguf(path: str | Path) -> Mapping[int, Float[Tensor, " d_model"]]:
    """What a control vector file adds to the output of each block, by the block's number.

    Raises ValueError for a file of another architecture.
    """
    reader = gguf_module().GGUFReader(str(path))
    kind = reader.fields["general.architecture"]
    architecture = bytes(kind.parts[kind.data[0]]).decode()
    if architecture != ARCHITECTURE:
        raise ValueError(f"{path} holds a {architecture!r}, not a {ARCHITECTURE!r}")
    return {
        int(tensor.name.removeprefix("direction.")): torch.from_numpy(tensor.data.copy()).float()
        for tensor in reader.tensors
    }


def gguf_module() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            'control vectors need gguf: python -m pip install "sae-steering-plugin[gguf]"'
        ) from error
    return gguf


__all__ = ["export_checkpoint", "export_gguf", "export_lm_eval", "read_gguf", "read_lm_eval"]
