"""Slow, independent ways to say what a steered pass should give: loops over rows, tokens and
latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jaxtyping
import torch
from transformer_lens.hook_points import HookPoint

from sae_steering_plugin.adapters.transformer_lens import is_bridge, resolve
from sae_steering_plugin.types import Positions
from tests.hosts import SITE, tiny_bridge, tiny_hooked

BOS, EOS, PAD = 1, 2, 0


@cache
def shared_host(name: str) -> Any:
    """One host per session and kind; `leftovers` says whether a test gave it back as it was."""
    return {"bridge": tiny_bridge, "hooked": tiny_hooked}[name]()


@contextmanager
def unchecked() -> Iterator[None]:
    """Calls without shape and type checks, as outside tests: for words that types forbid too."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def leftovers(model: Any) -> list[str]:
    """What a test left on a model: hooks on its hook points or on the wrapped model, methods laid
    over the class's. (Transformers keeps hooks of its own on the parts it traces.)"""
    found = [
        f"hook on {name}"
        for name, module in model.named_modules()
        if isinstance(module, HookPoint) and (module._forward_hooks or module._forward_pre_hooks)
    ]
    inner = model.original_model if is_bridge(model) else model.embed
    if inner._forward_hooks or inner._forward_pre_hooks:
        found.append("hook on the wrapped model or the embedding")
    for owner in (model, inner):
        for method in ("forward", "generate", "hf_generate", "generate_stream"):
            if method in owner.__dict__:
                found.append(f"{type(owner).__name__}.{method} is laid over")
    return found


@contextmanager
def tapped(model: Any, site: str = SITE) -> Iterator[list[torch.Tensor]]:
    """The activations that leave `site`, pass by pass, after every hook put there before."""
    seen: list[torch.Tensor] = []
    handle = resolve(model, site).point.register_forward_hook(
        lambda module, arguments, output: seen.append(output.detach().clone())
    )
    try:
        yield seen
    finally:
        handle.remove()


def kept_tokens(
    positions: Positions, row: list[int], prompt_length: int, *, bos: int | None = BOS
) -> list[bool]:
    """Which of a row's real tokens are steered, one by one."""
    kept = []
    for number, token in enumerate(row):
        low = positions.start if positions.start >= 0 else prompt_length + positions.start
        inside = number >= low
        if positions.stop is not None:
            high = positions.stop if positions.stop >= 0 else prompt_length + positions.stop
            inside = inside and number < high
        if positions.phase == "prefill":
            inside = inside and number < prompt_length
        if positions.phase == "decode":
            inside = inside and number >= prompt_length
        if number == 0 and token == bos and not positions.bos:
            inside = False
        kept.append(inside)
    return kept


def kept_batch(
    positions: Positions,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    prompt_lengths: list[int],
    *,
    bos: int | None = BOS,
) -> torch.Tensor:
    """`kept_tokens` over a padded batch, `[batch, pos]`; padding is never kept."""
    kept = torch.zeros(tokens.shape, dtype=torch.bool)
    for i in range(len(tokens)):
        columns = mask[i].nonzero().reshape(-1).tolist()
        row = [int(tokens[i, c]) for c in columns]
        for column, wanted in zip(
            columns, kept_tokens(positions, row, prompt_lengths[i], bos=bos), strict=True
        ):
            kept[i, column] = wanted
    return kept


def padded_batch(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length as one tensor and its mask."""
    width = max(len(row) for row in rows)
    tokens, mask = [], []
    for row in rows:
        blank = [PAD] * (width - len(row))
        real, no = [1] * len(row), [0] * (width - len(row))
        tokens.append(blank + row if side == "left" else row + blank)
        mask.append(no + real if side == "left" else real + no)
    return torch.tensor(tokens), torch.tensor(mask)


def own_rule(sae: Any, codes: torch.Tensor) -> torch.Tensor:
    """The dictionary's nonlinearity on one token's codes `[d_sae]`, latent by latent."""
    word = sae.cfg.architecture()
    out = torch.zeros_like(codes)
    if word in ("topk", "abstopk") or (word == "temporal" and sae.cfg.kval_topk):
        k = sae.cfg.k if word != "temporal" else sae.cfg.kval_topk
        rank = codes.abs() if word == "abstopk" else codes
        for j in sorted(range(len(codes)), key=lambda j: -float(rank[j]))[:k]:
            if word == "abstopk" or codes[j] > 0:
                out[j] = codes[j]
        return out
    for j, code in enumerate(codes):
        if word.startswith("jumprelu"):
            if code > sae.threshold[j] and code > 0:
                out[j] = code
        elif word == "steering" or code > 0:
            out[j] = code
    return out


@torch.no_grad()
def decoded(sae: Any, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """`decode(codes)` by the SAE itself, right after the `encode` whose scale it needs."""
    sae.encode(x)
    return sae.decode(codes)


@torch.no_grad()
def algorithm_2(sae: Any, a: torch.Tensor, added: torch.Tensor, rule: Any = None) -> torch.Tensor:
    """decode(sigma(f(a) + added)) + a - decode(f(a)), token by token (arXiv 2503.00177)."""
    codes = sae.encode(a)
    moved = codes + added
    edited = torch.stack(
        [torch.stack([(rule or own_rule)(sae, token) for token in row]) for row in moved]
    )
    return decoded(sae, a, edited) + (a - decoded(sae, a, codes))


@torch.no_grad()
def fed_by_hand(
    model: Any,
    tokens: torch.Tensor,
    widths: list[int],
    mask: torch.Tensor | None = None,
    *,
    cached: bool = True,
) -> None:
    """Feeds `tokens` in chunks of `widths` columns, as somebody's own loop would.

    Cached, each chunk is one pass on the same cache; uncached, each pass is the text up to there.
    """
    end = 0
    cache: Any = None
    for width in widths:
        start, end = end, end + width
        seen = None if mask is None else mask[:, :end]
        if not cached:
            model(tokens[:, :end], attention_mask=seen)
        elif is_bridge(model):
            named = {"past_key_values": cache, "use_cache": True}
            out = model.original_model(tokens[:, start:end], attention_mask=seen, **named)
            cache = out.past_key_values
        else:
            if cache is None:
                cache = hooked_cache(model, len(tokens))
            part = None if mask is None else mask[:, start:end]
            model(tokens[:, start:end], attention_mask=part, past_kv_cache=cache)


def hooked_cache(model: Any, rows: int) -> Any:
    """An empty cache of a HookedTransformer."""
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    return TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, rows)


@torch.no_grad()
def slow_greedy(
    model: Any,
    row: list[int],
    steps: int,
    push: torch.Tensor | None = None,
    rule: Positions | None = None,
    *,
    site: str = SITE,
) -> list[int]:
    """Greedy continuation of one unpadded text, the whole text again for each token, with `push`
    added by a plain hook to the tokens a loop finds."""
    text, bos = list(row), BOS
    for _ in range(steps):
        kept = kept_tokens(rule, text, len(row), bos=bos) if rule else [False] * len(text)
        mask = torch.tensor(kept)[:, None]

        def add(module: Any, arguments: Any, output: torch.Tensor, mask: Any = mask) -> Any:
            return output if push is None else torch.where(mask, output + push, output)

        handle = resolve(model, site).point.register_forward_hook(add)
        try:
            logits = model(torch.tensor([text]))
        finally:
            handle.remove()
        text.append(int(logits[0, -1].argmax()))
    return text[len(row) :]
