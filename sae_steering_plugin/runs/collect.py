"""Labelled activations from a model: one position per text, batched and streaming.

Only the read positions are kept, so memory does not grow with the length of the texts. Texts are
sorted by length, so batches hold little padding, and come back in their own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_steering_plugin.adapters.activations import (
    EncodedText,
    activations_at,
    bos_policy,
    encode_texts,
    explained_variance,
    letter_token,
    model_name,
    padded,
    read_site,
)
from sae_steering_plugin.directions.codes import FiredCodes, fired_codes
from sae_steering_plugin.types import Contrast, Labelled

Position = Literal["auto", "last", "letter"] | int


def collect_contrast(
    model: Any,
    contrast: Contrast,
    site: Any,
    *,
    batch_size: int = 16,
    position: Position = "auto",
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] = "right",
    max_tokens: int | None = None,
    min_explained_variance: float | None = None,
    progress: bool = True,
) -> Labelled:
    """Activations of every text of `contrast`, positives (label 1) first, at one hook point.

    `site` is a hook name or an SAE, whose training site is then read. `position` says which token:
    "letter" the one that holds the answer letter (by the contrast's character offsets), "last" the
    last real token, an integer that real token (-2 is the last but one), "auto" the letter where
    the contrast has offsets and the last token elsewhere. `prepend_bos` defaults to what the SAE
    was trained with, then to the host's default. `max_tokens` defaults to the model's context; a
    longer text raises. `min_explained_variance` (with an SAE) checks on the first batch that the
    SAE fits this site, for example 0.5 of its own reported value.

    `mean_norm` is the mean residual norm over all real tokens but leading BOS tokens. Without
    groups every pair (unpaired: every distinct text) is a group of its own. Raises before the first
    forward pass for empty, over-long or ambiguous texts and unknown hook names.
    """
    texts = (*contrast.positive, *contrast.negative)
    n, m = len(contrast.positive), len(contrast.negative)
    offsets: list[int | None] = []
    for side, letters in zip((n, m), contrast.letters, strict=True):
        offsets += letters or [None] * side
    if contrast.paired:
        groups = contrast.groups or first_seen(
            zip(contrast.positive, contrast.negative, strict=True)
        )
        groups = (*groups, *groups)
        pairs = torch.arange(n).repeat(2)
    else:
        groups = contrast.groups or first_seen(texts)
        pairs = torch.full((n + m,), -1)
    return _collected(
        model,
        texts,
        torch.tensor([1] * n + [0] * m),
        site,
        groups=groups,
        pairs=pairs,
        offsets=offsets,
        position=position,
        batch_size=batch_size,
        prepend_bos=prepend_bos,
        padding_side=padding_side,
        max_tokens=max_tokens,
        min_explained_variance=min_explained_variance,
        progress=progress,
        name=contrast.name,
    )


def collect_labelled(
    model: Any,
    texts: Sequence[str],
    labels: Sequence[int] | Tensor,
    site: Any,
    *,
    groups: Sequence[str] = (),
    letters: Sequence[int] = (),
    batch_size: int = 16,
    position: Position = "auto",
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] = "right",
    max_tokens: int | None = None,
    min_explained_variance: float | None = None,
    progress: bool = True,
    name: str = "",
) -> Labelled:
    """Activations of texts that belong to no pair, with labels 1 or 0; see `collect_contrast`.

    `letters` are character offsets of the token to read, one per text. Without `groups` every
    distinct text is a group of its own.
    """
    if not len(texts):
        raise ValueError("there are no texts to collect")
    given = torch.as_tensor(labels).long()
    if given.shape != (len(texts),):
        raise ValueError(f"labels have shape {tuple(given.shape)} for {len(texts)} texts")
    if not torch.isin(given, torch.tensor([0, 1])).all():
        raise ValueError(
            f"labels are 1 or 0, and {sorted(set(given.tolist()) - {0, 1})[0]} was given"
        )
    for what, entries in (("groups", groups), ("letters", letters)):
        if entries and len(entries) != len(texts):
            raise ValueError(f"{what} has {len(entries)} entries for {len(texts)} texts")
    return _collected(
        model,
        tuple(texts),
        given,
        site,
        groups=tuple(groups) or first_seen(texts),
        pairs=torch.full((len(texts),), -1),
        offsets=list(letters) or [None] * len(texts),
        position=position,
        batch_size=batch_size,
        prepend_bos=prepend_bos,
        padding_side=padding_side,
        max_tokens=max_tokens,
        min_explained_variance=min_explained_variance,
        progress=progress,
        name=name,
    )


def encode_labelled(sae: Any, labelled: Labelled, *, batch_size: int = 256) -> FiredCodes:
    """The codes of collected activations in `sae`, on the latents that fire; in batches.

    Each batch is encoded by itself and no scale is left in the SAE, so dictionaries with run-time
    normalisation are safe. Raises ValueError when the activations come from another site.
    """
    return fired_codes(sae, labelled, batch_size=batch_size)


def first_seen(items: Any) -> tuple[str, ...]:
    """A group name per item, the same for equal items: repeats never straddle a split."""
    numbers: dict[Any, int] = {}
    return tuple(f"item {numbers.setdefault(item, len(numbers))}" for item in items)


def read_positions(
    encoded: Sequence[EncodedText],
    texts: Sequence[str],
    offsets: Sequence[int | None],
    position: Position,
) -> list[int]:
    """Which token of each text is read, counted from its first real token.

    Raises ValueError, naming the text, for a missing or ambiguous letter and for a position that
    lies outside the text or on its BOS.
    """
    if position not in ("auto", "last", "letter") and not isinstance(position, int):
        raise ValueError(f"position is {position!r}; choose 'auto', 'last', 'letter' or an integer")
    out = []
    for number, (text, words, offset) in enumerate(zip(encoded, texts, offsets, strict=True)):
        if position == "letter" and offset is None:
            raise ValueError(
                f"text {number} has no letter offset: give letters, or position='last'"
            )
        if isinstance(position, int):
            index = position + len(text) if position < 0 else position
            if not int(text.leading_bos) <= index < len(text):
                raise ValueError(
                    f"position {position} of text {number} ({len(text)} tokens) is outside it or "
                    "on its BOS"
                )
        elif offset is None or position == "last":
            index = len(text) - 1
        else:
            try:
                index = letter_token(text, words, offset)
            except ValueError as error:
                raise ValueError(f"text {number}: {error}") from error
        out.append(index)
    return out


def _collected(
    model: Any,
    texts: tuple[str, ...],
    labels: Tensor,
    site: Any,
    *,
    groups: tuple[str, ...],
    pairs: Tensor,
    offsets: Sequence[int | None],
    position: Position,
    batch_size: int,
    prepend_bos: bool | None,
    padding_side: Literal["left", "right"],
    max_tokens: int | None,
    min_explained_variance: float | None,
    progress: bool,
    name: str,
) -> Labelled:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    hook_name, sae = read_site(site)
    if min_explained_variance is not None and sae is None:
        raise ValueError("min_explained_variance needs an SAE as the site")
    bos = bos_policy(model, sae, prepend_bos)
    encoded = encode_texts(model, texts, prepend_bos=bos, max_tokens=max_tokens)
    read = read_positions(encoded, texts, offsets, position)
    order = sorted(range(len(texts)), key=lambda i: -len(encoded[i]))  # longest first: fail early
    rows: list[Tensor] = [torch.empty(0)] * len(texts)
    norm_sum, norm_count = 0.0, 0
    bar = tqdm(total=len(texts), desc=f"collect {hook_name}", unit="text", disable=not progress)
    with bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = padded(model, [encoded[i] for i in chosen], side=padding_side)
            x = activations_at(model, hook_name, batch)
            counted = x[batch.counted.to(x.device)]
            norm_sum += float(counted.norm(dim=-1).double().sum())
            norm_count += len(counted)
            if start == 0 and sae is not None:
                require_fit(sae, hook_name, counted, min_explained_variance)
            places = batch.place + torch.tensor([read[i] for i in chosen])
            kept = x[torch.arange(len(chosen), device=x.device), places.to(x.device)].cpu()
            for row, i in zip(kept, chosen, strict=True):
                rows[i] = row
            bar.update(len(chosen))
    by_letter = position in ("auto", "letter") and all(offset is not None for offset in offsets)
    return Labelled(
        activations=torch.stack(rows),
        labels=labels,
        hook_name=hook_name,
        groups=groups,
        pairs=pairs,
        texts=texts,
        mean_norm=norm_sum / norm_count,
        model_name=model_name(model),
        name=name,
        letters=tuple(text[o] for text, o in zip(texts, offsets, strict=True) if o is not None)
        if by_letter
        else (),
    )


def require_fit(sae: Any, hook_name: str, x: Tensor, least: float | None) -> None:
    """Raise ValueError when an SAE cannot belong to these activations of real tokens.

    The width must agree, and with `least` the share of variance it explains must reach that.
    """
    if x.shape[-1] != sae.cfg.d_in:
        raise ValueError(
            f"{hook_name!r} is {x.shape[-1]} wide and the SAE reads {sae.cfg.d_in}: it belongs to "
            "another model"
        )
    if least is None:
        return
    explained = explained_variance(sae, x)
    if explained < least:
        raise ValueError(
            f"the SAE explains {explained:.2f} of the variance at {hook_name!r}, less than "
            f"{least}: check that it belongs to this model, this layer, this side of the layer, "
            "and its BOS policy"
        )
