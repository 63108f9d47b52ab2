"""Rows of a batch that hold the same text, computed once until an edit tells them apart.

Several strengths (or different edits) of one prompt are rows of one batch. Below the lowest site
that is edited in the prompt these rows agree, so the lower layers run once per distinct text and
their residual and cache are copied to the rows. Where no prompt token is edited at all, the whole
prompt runs once. While decoding, rows hold different tokens and nothing is shared.

Work left, with n layers, the lowest site in block l, unembedding worth u layers, S rows of P
tokens:  (l + S (n - l) + S u / P) / (S (n + u)) of S separate runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_steering_plugin.adapters.calls import Observer, Scope
from sae_steering_plugin.adapters.gates import condition_sites, ungated
from sae_steering_plugin.adapters.sae_parts import site_names
from sae_steering_plugin.adapters.steering import as_edits, steer
from sae_steering_plugin.adapters.transformer_lens import (
    Model,
    is_bridge,
    layer_of,
    refuse_compiled,
    resolve,
)
from sae_steering_plugin.edits.codes import CodeChange
from sae_steering_plugin.types import Change, Edit

BEHIND_BLOCKS = ("ln_final", "unembed")
"""Parts of a model that come after its blocks; any other part is taken to come before them."""


@dataclass(frozen=True, eq=False)
class Sharing:
    """Which rows of a batch are one text, and how far up they may be computed as one.

    `first[u]` is the first row that holds distinct text u, `member[b]` the text that row b holds.
    Blocks below `depth` run once per text; the rest, and the unembedding, too when `whole`.
    """

    first: Int[Tensor, " text"]
    member: Int[Tensor, " batch"]
    depth: int
    whole: bool


def sharing_of(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    edits: Sequence[Edit],
    *,
    fixed_prompt: bool = True,
) -> Sharing | None:
    """How the prompt of a batch can be shared under `edits`; None when nothing can be.

    Call it before the edits are attached: any hook found on the model then is somebody else's, who
    expects the whole batch, and limits sharing to the layers below it. `fixed_prompt=False` says
    that the prompt may end inside these tokens, so that decode-only edits may act in them.
    """
    refuse_compiled(model, "")
    if len(tokens) < 2 or not layers_carry_only_the_residual(model):
        return None
    texts = torch.cat([tokens, mask.to(tokens.dtype)], dim=1)
    distinct, member = torch.unique(texts, dim=0, return_inverse=True)
    if len(distinct) == len(tokens):
        return None
    if len(distinct) == 1 and not bool(mask.all()):
        # GatedDeltaNet ignores the mask of a batch of one
        return None
    numbers = torch.arange(len(tokens), device=tokens.device).flip(0)
    first = member.new_zeros(len(distinct)).scatter_(0, member.flip(0), numbers)
    blocks = len(model.blocks)
    foreign = lowest_foreign_hook(model)
    prompt_untouched = fixed_prompt and all(
        e.positions.phase == "decode" and not condition_sites(e) for e in edits
    )
    if prompt_untouched and foreign > blocks:
        return Sharing(first, member, blocks, whole=True)
    depth = min([foreign, blocks, *(_lowest_layer(model, edit) for edit in edits)])
    return Sharing(first, member, depth, whole=False) if depth > 0 else None


def layers_carry_only_the_residual(model: Model) -> bool:
    """False where a block hands its successors more than the residual stream and its own cache."""
    if not hasattr(model, "blocks") or getattr(model.cfg, "positional_embedding_type", "") == (
        "shortformer"
    ):
        return False
    config = getattr(getattr(model, "original_model", None), "config", None)
    return not getattr(config, "num_kv_shared_layers", 0) and not getattr(
        config, "is_encoder_decoder", False
    )


def _lowest_layer(model: Model, edit: Edit) -> int:
    """The first block that an edit or its gate touches; 0 for a site outside the blocks."""
    names = [edit.site, *condition_sites(edit)]
    change = ungated(edit).change
    if isinstance(change, CodeChange):
        names += site_names(change.sae)
    return min(layer_of(resolve(model, name).name) or 0 for name in names)


def lowest_foreign_hook(model: Model) -> int:
    """The lowest block with a hook on one of its hook points; beyond the last one when none has."""
    blocks = len(model.blocks)
    lowest = blocks + 1
    for name, part in model.named_children():
        if name != "blocks" and _hooked(part):
            lowest = min(lowest, blocks if name in BEHIND_BLOCKS else 0)
    for i, block in enumerate(model.blocks):
        if i < lowest and _hooked(block):
            return i
    return lowest


def _hooked(part: nn.Module) -> bool:
    from transformer_lens.hook_points import HookPoint

    return any(
        isinstance(point, HookPoint)
        and (point._forward_hooks or point._forward_pre_hooks or point._backward_hooks)
        for point in part.modules()
    )


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module.forward` is `forward` inside the block; uncovered again whatever happens."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def last_position_only(model: Model) -> Iterator[None]:
    """Inside the block only the last column is unembedded, unless somebody hooked the
    unembedding."""
    unembed = getattr(model, "unembed", None)
    if unembed is None or _hooked(unembed):
        yield
        return
    original = unembed.forward

    def forward(residual: Tensor, *arguments: Any, **named: Any) -> Any:
        return original(residual[:, -1:], *arguments, **named)

    with replaced(unembed, forward):
        yield


class _Reached(Exception):
    """Carries the residual out of a forward pass that need not go further."""

    def __init__(self, output: Any, cache: Any) -> None:
        self.output = output
        self.cache = cache


def bridge_prompt(
    model: Model,
    observer: Observer,
    forward: Callable[[Tensor, Tensor], Any],
    tokens: Tensor,
    mask: Tensor,
    sharing: Sharing,
) -> tuple[Tensor, Any]:
    """Logits and cache of a prompt on a bridge, with the lower layers run once per distinct text.

    `forward(tokens, mask)` is a pass of the wrapped model that makes its own cache. The blocks
    below `depth` are replaced in their instance dictionaries while the second pass runs.
    """
    first, member, depth = sharing.first, sharing.member, sharing.depth
    if sharing.whole:
        with observer.standing_for(member):
            output = forward(tokens[first], mask[first])
        output.past_key_values.reorder_cache(member)
        return output.logits[member], output.past_key_values
    blocks = model.blocks
    top = blocks[depth - 1]
    original = top.forward

    def leave(*arguments: Any, **named: Any) -> Any:
        raise _Reached(original(*arguments, **named), _cache_among(arguments, named))

    with replaced(top, leave):
        try:
            forward(tokens[first], mask[first])
        except _Reached as reached:
            output, lower = reached.output, reached.cache
        else:
            raise RuntimeError(f"block {depth - 1} of this model never ran")
    single = isinstance(output, tuple)
    if single and len(output) > 1:
        raise NotImplementedError(
            f"{type(top).__name__} hands on more than its residual: pass share=False"
        )
    residual = (output[0] if single else output)[member]
    stored = (residual,) if single else residual

    def hand_on(hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        del arguments, named
        return (hidden,) if single else hidden

    with ExitStack() as stack:
        stack.enter_context(replaced(blocks[0], lambda *_a, **_n: stored))
        for block in blocks[1:depth]:
            stack.enter_context(replaced(block, hand_on))
        output = forward(tokens, mask)
    cache = output.past_key_values
    if lower is not None and cache is not None:
        for i in range(depth):
            lower.layers[i].reorder_cache(member)
            cache.layers[i] = lower.layers[i]
    return output.logits, cache


def _cache_among(arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    from transformers.cache_utils import Cache

    found = [value for value in (*arguments, *named.values()) if isinstance(value, Cache)]
    return found[0] if found else None


def hooked_prompt(
    model: Model,
    observer: Observer,
    scope: Scope,
    tokens: Tensor,
    mask: Tensor,
    sharing: Sharing,
) -> tuple[Tensor, Any]:
    """Logits and cache of a prompt on a HookedTransformer, lower layers once per distinct text."""
    first, member, depth = sharing.first, sharing.member, sharing.depth
    lower = hooked_cache(model, len(first))
    if sharing.whole:
        with observer.standing_for(member):
            logits = model(tokens[first], attention_mask=mask[first], past_kv_cache=lower)
        for entry in lower.entries:
            _spread(entry, entry, member)
        lower.previous_attention_mask = lower.previous_attention_mask[member]
        return logits[member], lower
    residual = model(
        tokens[first], attention_mask=mask[first], past_kv_cache=lower, stop_at_layer=depth
    )
    cache = hooked_cache(model, len(tokens))
    cache.previous_attention_mask = lower.previous_attention_mask[member]
    scope.embedded[:] = [tokens]
    try:
        logits = model(
            residual[member],
            start_at_layer=depth,
            attention_mask=cache.previous_attention_mask,
            past_kv_cache=cache,
        )
    finally:
        scope.embedded.clear()
    for source, target in zip(lower.entries[:depth], cache.entries[:depth], strict=True):
        _spread(source, target, member)
    return logits, cache


def hooked_cache(model: Model, rows: int) -> Any:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    return TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, rows)


def _spread(source: Any, target: Any, member: Tensor) -> None:
    target.past_keys = source.past_keys[member]
    target.past_values = source.past_values[member]


def steered_logits(
    model: Model,
    tokens: Int[Tensor, "text pos"],
    edits: Edit | Change | Sequence[Edit | Change] = (),
    *,
    copies: int = 1,
    attention_mask: Int[Tensor, "text pos"] | None = None,
    last_only: bool = False,
    share: bool = True,
    require: bool = True,
) -> Float[Tensor, "*row d_vocab"]:
    """Logits of given texts under edits, no gradients: `[batch, pos, d_vocab]`, or
    `[batch, d_vocab]`.

    Each text stands on `copies` neighbouring rows (text 0's copies first), so that edits can differ
    per row: S strengths of one prompt are `copies=S` and an edit with S strengths. Rows that hold
    the same text share the layers below the lowest edited site. `last_only` unembeds and gives the
    last column alone. All tokens count as prompt. Equal to separate forward passes up to the
    rounding of matrix products of another batch size.

    Raises ValueError for `last_only` on right-padded rows; `SteeringError` when an edit did
    nothing.
    """
    device = next(model.parameters()).device
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    if last_only and not bool(mask[:, -1].all()):
        raise ValueError("last_only reads the last column: pad on the left")
    tokens = tokens.to(device).repeat_interleave(copies, dim=0)
    mask = mask.to(device).repeat_interleave(copies, dim=0)
    listed = as_edits(edits)
    sharing = sharing_of(model, tokens, mask, listed) if share else None
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if last_only:
            stack.enter_context(last_position_only(model))
        if listed:
            stack.enter_context(steer(model, listed, require=require))
        scope = stack.enter_context(Observer.of(model).generating(tokens, mask))
        logits = _prompt_logits(model, scope, tokens, mask, sharing)
    return logits[:, -1] if last_only else logits


def _prompt_logits(
    model: Model, scope: Scope, tokens: Tensor, mask: Tensor, sharing: Sharing | None
) -> Tensor:
    observer = Observer.of(model)
    if not is_bridge(model):
        if sharing is None:
            return model(tokens, attention_mask=mask)
        return hooked_prompt(model, observer, scope, tokens, mask, sharing)[0]
    forward = bridge_forward(model)
    if sharing is None:
        return forward(tokens, mask).logits
    return bridge_prompt(model, observer, forward, tokens, mask, sharing)[0]


def bridge_forward(model: Model) -> Callable[..., Any]:
    """`(chunk, mask so far, cache=None)` -> output of one pass of the wrapped model, with its
    cache.

    A cache is asked for even where it is thrown away: without one the bridge takes a GatedDeltaNet
    path that transformers >= 5.15 no longer supports.
    """
    inner = model.original_model
    positions = model._accepts_derived_position_ids()
    counted = getattr(model, "pos_embed", None)

    def forward(chunk: Tensor, mask: Tensor, cache: Any = None) -> Any:
        named: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
        if positions:
            index = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
            named["position_ids"] = index[:, -chunk.shape[1] :]
        if cache is not None:
            named["past_key_values"] = cache
        if counted is not None:
            counted._current_batch_size = chunk.shape[0]
        return inner(chunk, **named)

    return forward


__all__ = ["Sharing", "sharing_of", "steered_logits"]
