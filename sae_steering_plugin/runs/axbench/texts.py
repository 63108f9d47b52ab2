"""How instructions and responses become text and tokens: chat form, prefix, and what is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...adapters.activations import (
    EncodedText,
    activations_at,
    bos_policy,
    encode_texts,
    padded,
)
from ...adapters.sharing import steered_logits
from ..contrast_files import chat_render

PLAIN_BREAK = "\n"
"""What stands between instruction and response where there is no chat template."""
PROBES = ("a", "What is it?")
UNLIMITED = 2**40


@dataclass(frozen=True, eq=False)
class ChatForm:
    """The form of a model's texts: chat-formatted with a template, two paragraphs without one.

    `suffix` is what the template puts behind a response; it ends a generation and is no part of an
    evaluated text. `prefix_length` counts the leading tokens that two differently filled chats
    share (1, the BOS, for a model without a template).
    """

    model: Any = field(repr=False)
    bos: bool
    suffix: str
    prefix_length: int

    @classmethod
    def of(cls, model: Any, sae: Any = None) -> ChatForm:
        """The model's form; the BOS as the dictionary was trained."""
        bos = bos_policy(model, sae)
        draft = cls(model, bos, template_suffix(model.tokenizer), 0)
        rows = [one.tokens for one in draft.encoded([draft.text(one, "") for one in PROBES])]
        if draft.has_template:
            pairs = zip(*rows, strict=False)
            shared = next((i for i, pair in enumerate(pairs) if len(set(pair)) > 1), 0)
        else:
            shared = int(bos)
        return replace(draft, prefix_length=shared)

    @property
    def has_template(self) -> bool:
        return bool(getattr(self.model.tokenizer, "chat_template", None))

    def prompt(self, instruction: str) -> str:
        """What the model gets to answer."""
        if not self.has_template:
            return instruction + PLAIN_BREAK
        render = chat_render(self.model.tokenizer)
        return render([{"role": "user", "content": instruction}], ())

    def text(self, instruction: str, response: str) -> str:
        """An instruction with its response, without the template's suffix."""
        return self.prompt(instruction) + response

    def encoded(self, texts: Sequence[str]) -> list[EncodedText]:
        """Texts as tokens, however long."""
        return encode_texts(self.model, texts, prepend_bos=self.bos, max_tokens=UNLIMITED)

    def limit(self, most: int) -> int:
        """`most` tokens, or the model's context where that is smaller."""
        context = getattr(self.model.cfg, "n_ctx", None)
        return min(most, int(context)) if context else most

    def response_cut(self, instruction: str, response: str, most: int) -> tuple[str, bool]:
        """The response cut so that the whole text has at most `most` tokens, and whether it was.

        A word piece is never split, so that the shorter text reads as the longer one's beginning.
        Raises ValueError when the instruction alone leaves no room.
        """
        found = self.encoded([self.text(instruction, response)])[0]
        if len(found) <= most:
            return response, False
        start = len(self.prompt(instruction))
        for keep in range(most, 0, -1):
            stop = found.spans[keep - 1][1] if found.spans is not None else 0
            kept = response[: max(0, stop - start)]
            if not kept.strip():
                break
            if len(self.encoded([self.text(instruction, kept)])[0]) <= most:
                return kept, True
        raise ValueError(
            f"the instruction {instruction[:60]!r} leaves no room for a response within {most} "
            "tokens"
        )


def template_suffix(tokenizer: Any) -> str:
    """What the chat template writes behind an assistant's words; empty without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    mark = "response"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(mark)[2].strip()


@dataclass(frozen=True, eq=False)
class ReadText:
    """One text's residuals at the site without its prefix, and the tokens they stand on."""

    residual: Float[Tensor, "pos d_model"]
    tokens: tuple[str, ...]


def read_texts(
    form: ChatForm, hook_name: str, texts: Sequence[str], *, batch_size: int
) -> list[ReadText]:
    """Residuals at a site, float32, prefix and padding left out.

    A text of nothing but prefix raises ValueError.
    """
    encoded, found = form.encoded(texts), []
    for start in range(0, len(texts), batch_size):
        chosen = encoded[start : start + batch_size]
        batch = padded(form.model, chosen)
        residual = activations_at(form.model, hook_name, batch).cpu()
        for row, one in enumerate(chosen):
            if len(one) <= form.prefix_length:
                raise ValueError(f"text {start + row} holds nothing behind the chat prefix")
            own = residual[row, form.prefix_length : len(one)].clone()
            ids = one.tokens[form.prefix_length :]
            found.append(ReadText(own, tuple(form.model.tokenizer.convert_ids_to_tokens(ids))))
    return found


# Measures of a steered text -----------------------------------------------------------------------


def rows_of(encoded: Sequence[Sequence[int]], bos: bool) -> list[EncodedText]:
    return [EncodedText(tuple(one), None, bos) for one in encoded]


def text_nll(model: Any, rows: Sequence[EncodedText]) -> list[tuple[float, int]]:
    """Summed negative log-probability (nats) of each row's tokens behind its first, and how many,
    under the model as it stands."""
    batch = padded(model, rows)
    device = next(model.parameters()).device
    tokens, mask = batch.tokens.to(device), batch.real.long().to(device)
    with torch.no_grad():
        logits = steered_logits(model, tokens, attention_mask=mask)
    found = []
    for row, one in enumerate(rows):
        chances = logits[row, : len(one) - 1].float().log_softmax(dim=-1)
        said = tokens[row, 1 : len(one)]
        total = -chances.gather(-1, said[:, None]).double().sum()
        found.append((float(total), len(one) - 1))
    return found


def displacement_of(
    model: Any,
    hook_name: str,
    rows: Sequence[EncodedText],
    steered: Callable[[], Any],
) -> list[float]:
    """Per row, the mean length of what steering changes at a site against the mean residual there.

    Both passes read the same tokens; `steered` opens the steering. It holds for any method that
    acts at or below the site, whether by edits or by weights.
    """
    batch = padded(model, rows)
    before = activations_at(model, hook_name, batch)
    with steered():
        after = activations_at(model, hook_name, batch)
    real = batch.real.to(before.device).float()
    moved = ((after - before).norm(dim=-1) * real).sum(dim=1)
    length = (before.norm(dim=-1) * real).sum(dim=1)
    return [float(one) for one in moved / length]
