"""Texts through a model and a dictionary, pooled to one sparse row per text, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_steering_plugin.adapters.activations import (
    EncodedText,
    activations_at,
    bos_policy,
    encode_texts,
    padded,
)
from sae_steering_plugin.adapters.sae_lens import sae_id
from sae_steering_plugin.adapters.sae_parts import architecture, site_names, whole_codes
from sae_steering_plugin.features.pooled import PooledCodes, starts_of
from sae_steering_plugin.runs.collect import require_fit

POOLINGS = ("max", "mean", "last", "frequency", "any")
"""Largest code, mean over tokens, the last token's, share of tokens that fire, fired at all."""

DENSE = 32_000_000
"""Codes held dense at once (128 MB)."""


def collect_codes(
    model: Any,
    sae: Any,
    texts: Sequence[str],
    *,
    poolings: Sequence[str] = ("max",),
    starts: Sequence[int] = (),
    max_tokens: int | None = None,
    cut: bool = False,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, PooledCodes]:
    """The pooled codes of every text, by pooling: all of `POOLINGS` that are asked, from one pass.

    Padding and a leading BOS never count; `starts` (a character offset per text) leaves out a
    prefix, a prompt for instance: pooled are the tokens that begin there or later. A text longer
    than `max_tokens` (default: the model's context) raises, or with `cut` is cut there and its
    number kept in `settings["cut"]`. Nothing denser than one batch is held.

    Raises ValueError, naming the text, when nothing of it is left to pool, for an unknown pooling,
    and when the SAE does not fit the site.
    """
    check_poolings(poolings)
    if starts and len(starts) != len(texts):
        raise ValueError(f"starts has {len(starts)} entries for {len(texts)} texts")
    if not len(texts):
        raise ValueError("there are no texts to encode")
    bos = bos_policy(model, sae, prepend_bos)
    encoded, shortened = shortened_texts(model, texts, bos, max_tokens, cut)
    first = [first_token(text, number, starts) for number, text in enumerate(encoded)]
    about = {
        "architecture": architecture(sae),
        "prepend_bos": bos,
        "prefix_left_out": bool(starts),
        "cut": shortened,
    }
    return pooled_pass(
        model,
        sae,
        encoded,
        first,
        poolings,
        settings=about,
        batch_size=batch_size,
        progress=progress,
    )


def pooled_pass(
    model: Any,
    sae: Any,
    encoded: Sequence[EncodedText],
    first: Sequence[int],
    poolings: Sequence[str],
    *,
    settings: Mapping[str, Any],
    batch_size: int,
    progress: bool,
    codes_of: Callable[[Any, Tensor], Tensor] = whole_codes,
    see: Callable[[int, Tensor], None] | None = None,
) -> dict[str, PooledCodes]:
    """Codes of the tokens from `first[i]` of text i on, pooled, from one pass over the texts.

    `codes_of(sae, x)` are the codes; `see(i, x)` is shown the activations `[token d_in]` that text
    i is pooled over.
    """
    hook_name, width = site_names(sae)[0], sae.W_dec.shape[0]
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in poolings}
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    with tqdm(total=len(encoded), desc="codes", unit="text", disable=not progress) as bar:
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            batch = padded(model, [encoded[i] for i in chosen])
            x = activations_at(model, hook_name, batch)
            if begin == 0:
                require_fit(sae, hook_name, x[batch.counted.to(x.device)], None)
            counted = batch.counted.to(x.device, copy=True)
            for row, i in enumerate(chosen):
                counted[row, : first[i]] = False
                if see is not None:
                    see(i, x[row, counted[row]])
            for rows in blocks(len(chosen), x.shape[1] * width):
                # A temporal dictionary reads earlier tokens, so rows stay whole.
                with torch.no_grad():
                    codes = codes_of(sae, x[rows])
                numbers = torch.tensor(chosen)[rows]
                for name in poolings:
                    pooled = pool(name, codes, counted[rows].to(codes.device)).cpu()
                    member, feature = pooled.nonzero(as_tuple=True)
                    found[name].append((feature, numbers[member], pooled[member, feature]))
            bar.update(len(chosen))
    n_tokens = torch.tensor([len(t) - f for t, f in zip(encoded, first, strict=True)])
    return {
        name: by_feature(
            *(torch.cat(part) for part in zip(*entries, strict=True)),
            width=width,
            n_tokens=n_tokens,
            pooling=name,
            sae_id=sae_id(sae),
            hook_name=hook_name,
            settings=settings,
        )
        for name, entries in found.items()
    }


def check_poolings(names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"poolings is a list of names: poolings=({names!r},)")
    if not names or set(names) - set(POOLINGS):
        unknown = sorted(set(names) - set(POOLINGS))
        raise ValueError(f"no pooling {unknown}; choose among {', '.join(POOLINGS)}")


def shortened_texts(
    model: Any, texts: Sequence[str], bos: bool, max_tokens: int | None, cut: bool
) -> tuple[list[EncodedText], list[int]]:
    """Encoded texts, and the numbers of those that were cut at the limit."""
    limit = max_tokens or getattr(model.cfg, "n_ctx", None)
    if not cut or not limit:
        return encode_texts(model, texts, prepend_bos=bos, max_tokens=max_tokens), []
    encoded = encode_texts(model, texts, prepend_bos=bos, max_tokens=2**62)
    long = [number for number, text in enumerate(encoded) if len(text) > limit]
    for number in long:
        text = encoded[number]
        spans = None if text.spans is None else text.spans[:limit]
        encoded[number] = replace(text, tokens=text.tokens[:limit], spans=spans)
    return encoded, long


def first_token(text: EncodedText, number: int, starts: Sequence[int]) -> int:
    """Index of the first token that is pooled."""
    first = int(text.leading_bos)
    if starts:
        if text.spans is None:
            raise ValueError("starts need a fast tokenizer, which knows each token's characters")
        first = next(
            (
                i
                for i, (begin, _) in enumerate(text.spans)
                if i >= first and begin >= starts[number]
            ),
            len(text),
        )
    if first >= len(text):
        raise ValueError(f"nothing is left to pool of text {number} after its prefix")
    return first


def blocks(rows: int, per_row: int) -> list[slice]:
    """Rows in runs whose dense codes stay below `DENSE` numbers."""
    step = max(1, DENSE // max(per_row, 1))
    return [slice(start, start + step) for start in range(0, rows, step)]


def pool(
    name: str, codes: Float[Tensor, "row pos feature"], counted: Bool[Tensor, "row pos"]
) -> Float[Tensor, "row feature"]:
    """One number per row and feature over its counted positions.

    Of codes that may be negative, "max" is the one of largest size, with its sign.
    """
    here = counted[..., None]
    if name == "max":
        size = torch.where(here, codes.abs(), -1.0).argmax(dim=1, keepdim=True)
        return codes.gather(1, size)[:, 0]
    if name == "last":
        last = (counted * torch.arange(1, counted.shape[1] + 1, device=counted.device)).argmax(1)
        return codes[torch.arange(len(codes), device=codes.device), last]
    if name == "mean":
        return (codes * here).sum(1) / here.sum(1)
    fired = ((codes != 0) & here).float()
    return fired.amax(1) if name == "any" else fired.sum(1) / here.sum(1)


def by_feature(
    features: Tensor, examples: Tensor, values: Tensor, *, width: int, **about: Any
) -> PooledCodes:
    """Entries in any order as pooled codes, feature by feature."""
    order = torch.argsort(features * (int(examples.max()) + 1 if len(examples) else 1) + examples)
    return PooledCodes(values[order], examples[order], starts_of(features[order], width), **about)
