"""The matrices of either host that read the residual stream, with the norm in front of them.

A reader sees the residual through a norm: centred (LayerNorm), divided by a length, and multiplied
by one number per dimension. The first and the last are linear maps, and what a matrix reads from a
direction is meant with both multiplied into it, as TransformerLens's `fold_ln` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_steering_plugin.adapters.checkpoint import live
from sae_steering_plugin.adapters.parameters import child, component, exact
from sae_steering_plugin.adapters.transformer_lens import Model, is_bridge
from sae_steering_plugin.concepts.update import LowRankDelta

WORDS: Mapping[str, str] = {
    "read": r"W_(Q|K|V|in|gate|U)|(q|k|v|qkv|gate|up|gate_up)_proj|in_proj_\w+|c_attn|c_fc|fc1"
    r"|fc_in|query_key_value|dense_h_to_4h|lm_head|embed_out",
    "write": r"[Wb]_(O|out)|W_(E|pos)|(o|out|down)_proj|c_proj|dense|dense_4h_to_h|fc2|fc_out"
    r"|embed_tokens|wte|wpe|embed_in",
}
"""Last words of names, TransformerLens's and Hugging Face's, by what the matrix does."""
SPLIT = ("q", "k", "v")
RECURRENT = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")


def side_of(name: str) -> str | None:
    """`read` or `write`: what the matrix of that name does to the residual; None when the name does
    not say."""
    last = name.rpartition(".")[2]
    return next((side for side, words in WORDS.items() if re.fullmatch(words, last)), None)


@dataclass(frozen=True, eq=False)
class Reader:
    """A matrix `[d_model, out]` under its TransformerLens name, the module that holds it, and the
    norm in front (None without one)."""

    name: str
    module: nn.Module
    matrix: Float[Tensor, "d_model out"]
    norm: nn.Module | None

    def folded(self, matrix: Float[Tensor, "d_model any"]) -> Float[Tensor, "d_model any"]:
        """`matrix`, which stands behind the norm, as a map of the residual in front of it."""
        if self.norm is None:
            return matrix
        scale, centred = norm_map(self.norm, len(matrix))
        matrix = matrix * scale[:, None].to(matrix)
        return matrix - matrix.mean(0) if centred else matrix


def readers_of(model: Model) -> dict[str, Reader]:
    """Every matrix that reads the residual, by TransformerLens name.

    Per block `attn.W_Q`, `W_K`, `W_V`, `mlp.W_in`, `W_gate` (heads flattened into `out`), the input
    projections of GatedDeltaNet (`linear_attn.in_proj_*`), and `unembed.W_U`. The experts of a
    block and their router are not among them.
    """
    found = _of_bridge(model) if is_bridge(model) else _of_hooked(model)
    return {reader.name: reader for reader in found}


def folded(
    model: Model, change: Mapping[str, Tensor | LowRankDelta]
) -> dict[str, Tensor | LowRankDelta]:
    """A change of reading matrices, `[d_model, out]` or low-rank factors, with the norms folded in.

    Names are those of `readers_of`, or the Hugging Face modules' (`low_rank_deltas` gives those).
    What writes is left as it was. Raises KeyError for a reader that the model does not hold under
    that name (an adapter that is applied stands in its place).
    """
    readers = readers_of(model)
    modules = {id(reader.module): reader for reader in readers.values()}
    out = dict(change)
    for name, delta in change.items():
        module = live(model.original_model, name) if is_bridge(model) else None
        reader = readers.get(name) or modules.get(id(module))
        if reader is not None and isinstance(delta, LowRankDelta):
            out[name] = replace(delta, down=reader.folded(delta.down))
        elif reader is not None and isinstance(delta, Tensor):
            out[name] = reader.folded(delta)
        elif side_of(name) == "read":
            raise KeyError(f"no reading matrix {name!r}; this model holds {', '.join(readers)}")
    return out


def norm_map(norm: nn.Module, width: int) -> tuple[Float[Tensor, " d_model"], bool]:
    """What a norm multiplies each dimension by, and whether it takes the mean away first.

    Read off its outputs, so that it does not matter how the norm keeps its scale (Gemma adds 1).
    """
    parameter = next(norm.parameters(), None)
    like: dict[str, Any] = (
        {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}
    )
    x = torch.ones(width)
    x[1::2] = -1
    if width % 2:
        x[-3:] = torch.tensor([1.0, 1.0, -2.0])
    length = float(x.square().mean().sqrt())

    def of(y: Tensor) -> Tensor:
        with torch.no_grad():
            return norm((1e3 * y).to(**like)[None, None]).float().cpu()[0, 0]

    scale = (of(x) - of(-x)) / 2 / (x / length)
    shifted = float((of(x + 1) - of(x)).abs().max())
    return scale, shifted <= 1e-2 * float(scale.abs().max())


def _of_hooked(model: Model) -> Iterator[Reader]:
    for layer, block in enumerate(model.blocks):
        for part, word, norm in (
            *(("attn", f"W_{one}", "ln1") for one in "QKV"),
            ("mlp", "W_in", "ln2"),
            ("mlp", "W_gate", "ln2"),
        ):
            owner = child(block, part)
            held = {} if owner is None else owner._parameters
            value = held.get(word, held.get(f"_{word}"))  # `_W_K` under grouped queries
            if value is not None:
                matrix = exact(value)
                if matrix.ndim == 3:
                    matrix = matrix.permute(1, 0, 2).flatten(1)
                yield Reader(f"blocks.{layer}.{part}.{word}", owner, matrix, _norm(block, norm))
    unembed = model.unembed
    yield Reader("unembed.W_U", unembed, exact(unembed.W_U), _norm(model, "ln_final"))


def _of_bridge(model: Model) -> Iterator[Reader]:
    for layer, block in enumerate(model.blocks):
        ahead = {one: _in_front(block, one) for one in ("ln1", "ln2")}
        attention, mlp = child(block, "attn"), child(block, "mlp")
        recurrent = component(child(block, "linear_attn"))
        for part, owner, words, norm in (
            ("attn", attention, {word: f"W_{word.upper()}" for word in SPLIT}, "ln1"),
            ("mlp", mlp, {"in": "W_in", "gate": "W_gate"}, "ln2"),
            ("linear_attn", recurrent, {word: word for word in RECURRENT}, "ln1"),
        ):
            for word, name in words.items():
                yield from _linear(f"blocks.{layer}.{part}.{name}", child(owner, word), ahead[norm])
    yield from _linear("unembed.W_U", child(model, "unembed"), _norm(model, "ln_final"))


def _linear(name: str, module: Any, norm: nn.Module | None) -> Iterator[Reader]:
    from transformers.pytorch_utils import Conv1D

    linear = component(module)
    if isinstance(linear, nn.Linear | Conv1D):
        matrix = exact(linear.weight)
        yield Reader(name, linear, matrix.T if isinstance(linear, nn.Linear) else matrix, norm)


def _norm(owner: Any, name: str) -> nn.Module | None:
    found = component(child(owner, name))
    return None if isinstance(found, nn.Identity) else found


def _in_front(block: nn.Module, name: str) -> nn.Module | None:
    """The norm in front of attention (`ln1`) or of the MLP (`ln2`, or the one that a parallel block
    shares); None in a block that normalises what it writes alone, as OLMo 2 does."""
    held = child(block, name) if child(block, name) is not None else child(block, "ln1")
    behind = "post_" if name == "ln1" else "post_feedforward"
    if str(getattr(held, "name", "")).startswith(behind):
        return None
    return component(held) if held is not None else None


__all__ = ["WORDS", "Reader", "folded", "norm_map", "readers_of", "side_of"]
