"""Reading activations: texts tokenised for a host, padded with a mask, run as far as one hook
point.

The BOS is decided here once and explicitly, because hosts and dictionaries disagree about it by
default. The host never adds a token by itself: it gets token tensors and the mask of real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_steering_plugin.adapters.sae_parts import site_names
from sae_steering_plugin.adapters.transformer_lens import (
    bos_token,
    pad_token,
    refuse_compiled,
    resolve,
)


@dataclass(frozen=True)
class EncodedText:
    """One text as token ids, and the characters `[start, stop)` behind each; a BOS covers none.

    `spans` is None for a tokenizer that cannot tell (a slow one).
    """

    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] | None
    leading_bos: bool

    def __len__(self) -> int:
        return len(self.tokens)


def bos_policy(model: Any, sae: Any = None, prepend_bos: bool | None = None) -> bool:
    """Whether texts get a BOS: as asked, else as the dictionary was trained, else the host's
    default."""
    if prepend_bos is not None:
        return prepend_bos
    trained = None if sae is None else sae.cfg.metadata.prepend_bos
    return bool(getattr(model.cfg, "default_prepend_bos", True) if trained is None else trained)


def encode_texts(
    model: Any,
    texts: Sequence[str],
    *,
    prepend_bos: bool,
    max_tokens: int | None = None,
) -> list[EncodedText]:
    """Each text's tokens, with at most one leading BOS and no other special token added.

    A text that already begins with the BOS keeps that one. Raises ValueError, naming the text, when
    it holds no token, or more tokens than `max_tokens` (the model's context by default): nothing is
    ever cut, because cutting would move the position that is read.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("this model has no tokenizer: give it one, or build Labelled by hand")
    bos = bos_token(model)
    if prepend_bos and bos is None:
        raise ValueError(
            "prepend_bos=True and the tokenizer has no BOS token: pass prepend_bos=False"
        )
    limit = max_tokens or getattr(model.cfg, "n_ctx", None)
    out = []
    for number, text in enumerate(texts):
        tokens, spans = _tokens_and_spans(tokenizer, text)
        begins = bool(tokens) and bos is not None and tokens[0] == bos
        if prepend_bos and bos is not None and not begins:
            tokens = [bos, *tokens]
            spans = None if spans is None else [(0, 0), *spans]
        leading = begins or prepend_bos
        if len(tokens) <= int(leading):
            raise ValueError(f"text {number} is empty: it has no token to read ({text!r})")
        if limit and len(tokens) > limit:
            raise ValueError(
                f"text {number} has {len(tokens)} tokens and the limit is {limit}: shorten it or "
                f"leave it out; it begins {text[:60]!r}"
            )
        out.append(EncodedText(tuple(tokens), None if spans is None else tuple(spans), leading))
    return out


def _tokens_and_spans(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
    fast = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    spans = [tuple(span) for span in found["offset_mapping"]] if fast else None
    return list(found["input_ids"]), spans


def letter_token(encoded: EncodedText, text: str, offset: int) -> int:
    """Index of the token that holds the answer letter at character `offset` of `text`.

    The letter may stand alone ("A"), after a space (" A") or merged with brackets ("(A)", "(A").
    Raises ValueError when the place is ambiguous: the offset lies outside the text or on something
    that is neither letter nor digit, no token or several tokens hold it, or its token holds another
    letter or digit beside it.
    """
    if not 0 <= offset < len(text) or not text[offset].isalnum():
        raise ValueError(f"character {offset} of {text[-60:]!r} is not an answer letter")
    if encoded.spans is None:
        raise ValueError(
            "letter positions need a fast tokenizer, which knows each token's characters"
        )
    holding = [i for i, (start, stop) in enumerate(encoded.spans) if start <= offset < stop]
    if len(holding) != 1:
        raise ValueError(
            f"letter {text[offset]!r} at character {offset} lies in {len(holding)} tokens: the "
            "position to read is ambiguous"
        )
    start, stop = encoded.spans[holding[0]]
    merged = text[start:stop]
    if sum(character.isalnum() for character in merged) != 1:
        raise ValueError(
            f"letter {text[offset]!r} at character {offset} is merged into the token {merged!r}: "
            "the position to read is ambiguous"
        )
    return holding[0]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Padded texts: `real` marks tokens of the text, `place[row]` where the row's first one
    stands."""

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    place: Int[Tensor, " batch"]
    leading_bos: Bool[Tensor, " batch"]

    @property
    def counted(self) -> Bool[Tensor, "batch pos"]:
        """Real tokens that are no leading BOS: those that averages run over."""
        kept = self.real.clone()
        rows = self.leading_bos.nonzero().flatten()
        kept[rows, self.place[rows]] = False
        return kept


def padded(
    model: Any, encoded: Sequence[EncodedText], *, side: Literal["left", "right"] = "right"
) -> TokenBatch:
    """Texts of one batch as a token tensor on the CPU, padded on `side`."""
    if side not in ("left", "right"):
        raise ValueError(f"padding side is {side!r}; it must be 'left' or 'right'")
    width = max(len(text) for text in encoded)
    filler = pad_token(model)
    tokens = torch.full((len(encoded), width), 0 if filler is None else filler)
    real = torch.zeros(len(encoded), width, dtype=torch.bool)
    place = torch.tensor([width - len(text) if side == "left" else 0 for text in encoded])
    for row, text in enumerate(encoded):
        first = int(place[row])
        tokens[row, first : first + len(text)] = torch.tensor(text.tokens)
        real[row, first : first + len(text)] = True
    return TokenBatch(tokens, real, place, torch.tensor([text.leading_bos for text in encoded]))


class _Reached(Exception):
    """Raised at the hook point to end the forward pass there; it never leaves this module."""


def activations_at(
    model: Any, hook_name: str, batch: TokenBatch
) -> Float[Tensor, "batch pos d_model"]:
    """What flows past `hook_name`, float32, on the model's device; later layers are not computed.

    Edits that are active at the site are seen. Raises what `resolve` raises for a bad name,
    ValueError for a site that is not `[batch pos d_model]`, and RuntimeError for a site that the
    forward pass never reaches.
    """
    refuse_compiled(model)
    refuse_dropout(model)
    site = resolve(model, hook_name)
    seen: list[Tensor] = []

    def read(module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
        seen.append(output.detach())
        raise _Reached

    device = next(model.parameters()).device
    handle = site.point.register_forward_hook(read)
    mask = batch.real.long().to(device)
    try:
        with torch.no_grad():
            model(batch.tokens.to(device), return_type=None, attention_mask=mask)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not seen:
        raise RuntimeError(f"the forward pass never reached {hook_name!r}")
    if seen[0].ndim != 3:
        raise ValueError(
            f"{hook_name!r} carries {seen[0].ndim} axes {tuple(seen[0].shape)}; vectors are read "
            "at sites of shape [batch pos d_model], such as blocks.L.hook_resid_post"
        )
    return seen[0].float()


def refuse_dropout(model: Any) -> None:
    """Raise ValueError while dropout is active: a model built from a config starts in training
    mode."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise ValueError(
                f"dropout is active ({name}, p={module.p}), so activations are random: "
                "call model.eval()"
            )


def read_site(site: Any) -> tuple[str, Any]:
    """Hook name to read and the dictionary it belongs to (None) for a hook name or an SAE."""
    if isinstance(site, str):
        return site, None
    return site_names(site)[0], site


def explained_variance(sae: Any, x: Float[Tensor, "token d_model"]) -> float:
    """1 - squared error / squared distance to the mean, of a dictionary on activations of real
    tokens."""
    x = x.to(sae.W_dec.device)
    with torch.no_grad():
        reconstruction = sae(x[:, None].to(sae.dtype))[:, 0].float()
    spread = (x - x.mean(0)).square().sum()
    return float(1 - (x - reconstruction).square().sum() / spread)


def model_name(model: Any) -> str:
    """The name the host was booted under."""
    return str(getattr(model.cfg, "model_name", "") or "")


__all__ = [
    "EncodedText",
    "TokenBatch",
    "activations_at",
    "bos_policy",
    "encode_texts",
    "explained_variance",
    "letter_token",
    "model_name",
    "padded",
    "read_site",
]
