"""Causal and lens scores of features: one forward pass per feature, many features per batch.

The neutral prompt is shared by all rows; below the dictionary's site it is computed once. The edit
stands at the prompt's last token only and is `a + s a_max` in the feature's code with the
reconstruction error kept, which is to add `s a_max` times the row that the decoder uses.
"""

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
    model_name,
    padded,
)
from sae_steering_plugin.adapters.lens import lens_logits, lens_settings
from sae_steering_plugin.adapters.sae_lens import sae_id
from sae_steering_plugin.adapters.sae_parts import (
    decoder_rows,
    normalised,
    site_names,
    whole_codes,
)
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.edits.shift import Add
from sae_steering_plugin.features.causal import (
    CausalScores,
    Peaks,
    confidence,
    lens_probability,
)
from sae_steering_plugin.features.lens import LENS_TOKENS, Lens, top_tokens
from sae_steering_plugin.types import LAST, SMALLEST_NORM, Edit

PROMPT = "From my experience,"
"""The neutral prompt of the code of arXiv 2505.20063 (the paper prints "In my experience,")."""

STRENGTH = 10.0
"""Multiples of a_max (arXiv 2505.20063 and 2510.03659)."""


def checked_features(sae: Any, features: Sequence[int] | None) -> list[int]:
    """Feature numbers, all of the dictionary's when None. IndexError for one it lacks."""
    width = int(sae.W_dec.shape[0])
    chosen = list(range(width)) if features is None else [int(f) for f in features]
    outside = [f for f in chosen if not 0 <= f < width]
    if outside:
        raise IndexError(f"feature {outside[0]} lies outside 0..{width - 1} of this SAE")
    if not chosen:
        raise ValueError("no feature is named")
    return chosen


def feature_lens(
    model: Any, sae: Any, features: Sequence[int] | None = None, *, k: int = LENS_TOKENS
) -> Lens:
    """The k tokens that each feature's decoder row promotes through the model's own head.

    Rows are those `decode` uses. No table of features x vocabulary is held. Raises ValueError when
    the dictionary does not write to the residual stream.
    """
    chosen = checked_features(sae, features)
    rows = decoder_rows(sae, chosen)
    still = [f for f, n in zip(chosen, rows.norm(dim=1), strict=True) if n <= SMALLEST_NORM]
    about = {**lens_settings(model), "sae_id": sae_id(sae), "k": k, "zero_rows": still}
    return top_tokens(chosen, lens_logits(model, rows), k=k, settings=about)


def firing_peaks(
    model: Any,
    sae: Any,
    texts: Sequence[str],
    features: Sequence[int] | None = None,
    *,
    prepend_bos: bool | None = None,
    max_tokens: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Peaks:
    """For every text in which a feature fires: the token with its largest code, BOS left out.

    Equal codes go to the earlier token. One pass over the texts.
    """
    chosen = torch.tensor(checked_features(sae, features))
    encoded = encode_texts(
        model, texts, prepend_bos=bos_policy(model, sae, prepend_bos), max_tokens=max_tokens
    )
    order = sorted(range(len(texts)), key=lambda i: -len(encoded[i]))
    found: list[tuple[Tensor, ...]] = []
    for start in tqdm(
        range(0, len(order), batch_size), desc="peaks", unit="batch", disable=not progress
    ):
        members = order[start : start + batch_size]
        batch = padded(model, [encoded[i] for i in members])
        x = activations_at(model, site_names(sae)[0], batch)
        with torch.no_grad():
            codes = whole_codes(sae, x).cpu()[..., chosen]
        codes = codes.masked_fill(~batch.counted[..., None], 0.0).abs()
        largest, place = codes.max(dim=1)
        row, column = (largest > 0).nonzero(as_tuple=True)
        found.append(
            (
                chosen[column],
                torch.tensor(members)[row],
                batch.tokens[row, place[row, column]],
                largest[row, column],
            )
        )
    return Peaks(*(torch.cat(part) for part in zip(*found, strict=True)))


def output_scores(
    model: Any,
    sae: Any,
    features: Sequence[int] | None = None,
    *,
    prompt: str = PROMPT,
    strength: float = STRENGTH,
    k: int = LENS_TOKENS,
    confidence_k: int = 1,
    a_max: float | Tensor | None = None,
    lens: Lens | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> CausalScores:
    """Output score (with and without the base term) and Delta C_k of each feature.

    Each feature is a batch row: its code at the prompt's last token becomes a + `strength` a_max,
    the reconstruction error kept. `a_max` defaults to the paper's rule, the largest code of *any*
    feature at that token (so the push does not follow the feature's own scale); give a number, or
    one per feature, for another. `k` tokens per feature from `lens`, computed when not given.
    Strength 0 gives exactly 0.

    Equal to one feature at a time up to the rounding of another batch size. Raises ValueError when
    no feature fires at that token and no a_max is given.
    """
    chosen = checked_features(sae, features)
    read, write = site_names(sae)
    bos = bos_policy(model, sae, prepend_bos)
    encoded = encode_texts(model, [prompt], prepend_bos=bos)
    batch = padded(model, encoded)
    x = activations_at(model, read, batch)
    with torch.no_grad():
        codes = whole_codes(sae, x)[0, -1].cpu()
    scale = normalised(sae, x[0, -1:])[1]
    push, rule = _push(a_max, codes, len(chosen))
    lens = feature_lens(model, sae, chosen, k=k) if lens is None else lens
    tokens = lens.of(chosen)
    device = x.device
    steps = decoder_rows(sae, chosen).to(device) * (strength * push).to(device)[:, None]
    steps = steps if scale is None else steps * scale
    base = steered_logits(model, batch.tokens, last_only=True).float().cpu().log_softmax(-1)
    base_confidence = confidence(base, confidence_k)
    found: list[tuple[Tensor, Tensor]] = []
    with tqdm(total=len(chosen), desc="output", unit="feature", disable=not progress) as bar:
        for part, promoted in zip(steps.split(batch_size), tokens.split(batch_size), strict=True):
            logp = _last_logp(model, batch.tokens, part, write)
            change = confidence(logp, confidence_k) - base_confidence
            found.append((lens_probability(logp, promoted), change))
            bar.update(len(part))
    # Rows that were not pushed are the base exactly, whatever the batch they stood in.
    still = ~steps.cpu().any(dim=1)
    base_term = lens_probability(base.expand(len(chosen), -1), tokens)
    steered, change = (torch.cat(part) for part in zip(*found, strict=True))
    return CausalScores(
        features=torch.tensor(chosen),
        steered=torch.where(still, base_term, steered),
        base=base_term,
        confidence=torch.where(still, 0.0, change),
        settings={
            "prompt": prompt,
            "prepend_bos": bos,
            "strength": strength,
            "k": lens.k,
            "confidence_k": confidence_k,
            "positions": "the prompt's last token",
            "error_term": "kept",
            **rule,
            **{name: lens.settings.get(name) for name in ("soft_cap", "folded")},
            "sae_id": sae_id(sae),
            "model_name": model_name(model),
        },
    )


def _push(
    a_max: float | Tensor | None, codes: Float[Tensor, " d_sae"], n: int
) -> tuple[Float[Tensor, " feature"], dict[str, Any]]:
    """a_max per feature, and the rule it came from."""
    if a_max is None:
        largest = float(codes.abs().max())
        if largest == 0:
            raise ValueError("no feature fires at the prompt's last token: pass a_max")
        rule = {
            "a_max_rule": "largest code of any feature at the prompt's last token",
            "a_max": largest,
            "a_max_feature": int(codes.abs().argmax()),
        }
        return torch.full((n,), largest), rule
    given = torch.as_tensor(a_max, dtype=torch.float32).reshape(-1).cpu()
    if len(given) not in (1, n):
        raise ValueError(f"a_max has {len(given)} entries for {n} features")
    if not torch.isfinite(given).all():
        raise ValueError("a_max holds a value that is not finite")
    own = len(given) > 1
    rule = {"a_max_rule": "given per feature" if own else "given"}
    return given.expand(n), rule if own else {**rule, "a_max": float(given[0])}


def _last_logp(
    model: Any, tokens: Tensor, steps: Float[Tensor, "row d_model"], site: str
) -> Float[Tensor, "row d_vocab"]:
    """Log-probabilities after the prompt, one row per step added at its last token."""
    edit = Edit(Add(steps), site, positions=LAST) if bool(steps.any()) else ()
    logits = steered_logits(model, tokens, edit, copies=len(steps), last_only=True)
    return logits.float().cpu().log_softmax(-1)
