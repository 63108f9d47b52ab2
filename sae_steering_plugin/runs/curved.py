"""Curved concepts on a model: what it says along a path, and which groups of latents are planes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_steering_plugin.adapters.activations import (
    activations_at,
    bos_policy,
    encode_texts,
    padded,
)
from sae_steering_plugin.adapters.active_codes import active_encoder
from sae_steering_plugin.adapters.sae_parts import decoder_rows, site_names
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.features.multidimensional import GroupShape, group_shape
from sae_steering_plugin.types import LAST, Change, Edit


def final_activations(
    model: Any, hook_name: str, prompts: Sequence[str], *, prepend_bos: bool | None = None
) -> Float[Tensor, "prompt d_model"]:
    """The activation at each prompt's last token, float32."""
    encoded = encode_texts(model, prompts, prepend_bos=bos_policy(model, None, prepend_bos))
    batch = padded(model, encoded, side="left")
    return activations_at(model, hook_name, batch)[:, -1]


def said_along(
    model: Any,
    prompts: Sequence[str],
    change: Change,
    words: Sequence[int],
    *,
    hook_name: str | None = None,
    prepend_bos: bool | None = None,
) -> Float[Tensor, "prompt step word"]:
    """Probabilities of the tokens `words` after each prompt, its last token edited.

    `change` holds a step per batch row (`FollowPath(path, path.waypoints(...))`, `Add` with
    strengths); every prompt is run at each of its `batch_rows` steps.
    """
    steps = change.batch_rows
    encoded = encode_texts(model, prompts, prepend_bos=bos_policy(model, None, prepend_bos))
    edit = Edit(change, hook_name, LAST)
    found = []
    for one in encoded:  # one prompt at a time: a step belongs to a row of the batch
        batch = padded(model, [one], side="left")
        logits = steered_logits(
            model, batch.tokens, edit, copies=steps, attention_mask=batch.real.long(),
            last_only=True, require=False,
        )  # fmt: skip
        found.append(logits.float().softmax(-1)[:, list(words)])
    return torch.stack(found)


def group_shapes(
    model: Any,
    sae: Any,
    texts: Sequence[str],
    groups: Sequence[Sequence[int]],
    *,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> list[GroupShape]:
    """The shape of each group of latents over texts, best first; groups without a score come last.

    `groups` are those of `neighbour_groups` or `spectral_groups` over `sae.W_dec`. Codes are read
    at real tokens but BOS and only those of grouped latents are kept. Raises ValueError without a
    group.
    """
    if not groups:
        raise ValueError("no group of latents is given: lower the cosine, or cluster otherwise")
    members = sorted({latent for group in groups for latent in group})
    column = torch.full((int(sae.W_dec.shape[0]),), -1)
    column[members] = torch.arange(len(members))
    encode, hook_name = active_encoder(sae), site_names(sae)[0]
    encoded = encode_texts(model, texts, prepend_bos=bos_policy(model, sae, prepend_bos))
    kept: list[Tensor] = []
    starts = range(0, len(encoded), batch_size)
    for start in tqdm(starts, desc="groups", unit="batch", disable=not progress):
        batch = padded(model, encoded[start : start + batch_size])
        hits = encode(activations_at(model, hook_name, batch), batch.counted)
        place = column[hits.features.cpu()]
        codes = torch.zeros(hits.n, len(members))
        inside = place >= 0
        codes[hits.tokens.cpu()[inside], place[inside]] = hits.values.cpu().float()[inside]
        kept.append(codes)
    codes = torch.cat(kept)
    rows = decoder_rows(sae).cpu()
    found = [
        group_shape(group, codes[:, column[list(group)]], rows[list(group)]) for group in groups
    ]
    return sorted(found, key=lambda one: -one.score if one.score == one.score else torch.inf)


__all__ = ["final_activations", "group_shapes", "said_along"]
