"""A concept's training texts as tokens, and the token states a method is built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...adapters.activations import EncodedText, TokenBatch, padded
from ..axbench.texts import ChatForm, read_texts
from ..subject import Subject
from .records import ConceptData, Texts

READ_BATCH = 16


@dataclass(frozen=True, eq=False)
class TokenStates:
    """States at a site of every token behind the prefix, text by text."""

    positive: tuple[Float[Tensor, "_ d_model"], ...]
    negative: tuple[Float[Tensor, "_ d_model"], ...]
    hook_name: str
    mean_norm: float


def token_states(subject: Subject, data: ConceptData, *sides: str) -> TokenStates:
    """Token states of the texts of `sides` ("positives", "negatives"); the other side is empty.

    A text is instruction and response in the model's chat form, without its prefix.
    """
    data.require(*sides)
    form, site = ChatForm.of(subject.model, subject.sae), data.site(subject)
    found: dict[str, tuple[Tensor, ...]] = {"positives": (), "negatives": ()}
    for side in sides:
        texts = [form.text(asked, said) for asked, said in getattr(data, side)]
        require_room(form, form.encoded(texts), side)
        read = read_texts(form, site, texts, batch_size=READ_BATCH)
        found[side] = tuple(one.residual for one in read)
    lengths = torch.cat([one.norm(dim=-1) for side in sides for one in found[side]])
    return TokenStates(found["positives"], found["negatives"], site, float(lengths.mean()))


def require_room(form: ChatForm, encoded: Sequence[EncodedText], side: str) -> None:
    """Raise ValueError, naming the text, when one is longer than the model's context."""
    for number, one in enumerate(encoded):
        if len(one) > (most := form.limit(len(one))):
            raise ValueError(
                f"{side} text {number} has {len(one)} tokens and the model's context is {most}: "
                "shorten the response"
            )


@dataclass(frozen=True, eq=False)
class ResponseTexts:
    """Texts to learn from: tokens, and where in each the response begins.

    The template's end-of-turn belongs to the response, so that ending is learned too.
    """

    form: ChatForm = field(repr=False)
    encoded: tuple[EncodedText, ...]
    prompt_lengths: tuple[int, ...]

    @classmethod
    def of(cls, subject: Subject, pairs: Texts, side: str = "positives") -> ResponseTexts:
        """Raises ValueError for a text beyond the context and for a response without a token."""
        form = ChatForm.of(subject.model, subject.sae)
        encoded = form.encoded([form.text(a, said) + form.suffix for a, said in pairs])
        require_room(form, encoded, side)
        lengths = []
        for number, (text, (asked, _)) in enumerate(zip(encoded, pairs, strict=True)):
            stop = len(form.prompt(asked))
            if text.spans is None:
                own = len(form.encoded([form.prompt(asked)])[0])
            else:
                own = sum(start < stop for start, _ in text.spans)
            if own >= len(text):
                raise ValueError(f"{side} text {number} has no token in its response")
            lengths.append(own)
        return cls(form, tuple(encoded), tuple(lengths))

    def __len__(self) -> int:
        return len(self.encoded)

    def batch(self, rows: Sequence[int]) -> ResponseBatch:
        """The texts with these numbers, padded on the right."""
        made = padded(self.form.model, [self.encoded[i] for i in rows])
        prompts = torch.tensor([self.prompt_lengths[i] for i in rows])
        return ResponseBatch(made, prompts, self.form.prefix_length)


@dataclass(frozen=True, eq=False)
class ResponseBatch:
    """A padded batch; `prompts` are tokens per row before the response."""

    tokens: TokenBatch
    prompts: Tensor
    prefix_length: int

    @property
    def behind_prefix(self) -> Bool[Tensor, "batch pos"]:
        """Real tokens behind the chat prefix: those that are steered while learning."""
        place = torch.arange(self.tokens.tokens.shape[1])
        return self.tokens.real & (place >= self.prefix_length)

    def loss(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
        """Mean cross-entropy (nats) of the responses' tokens."""
        place = torch.arange(self.tokens.tokens.shape[1])
        counted = (self.tokens.real & (place >= self.prompts[:, None]))[:, 1:].to(logits.device)
        said = self.tokens.tokens[:, 1:].to(logits.device)
        return torch.nn.functional.cross_entropy(logits[:, :-1][counted].float(), said[counted])


def as_rows(texts: Sequence[Tensor]) -> Float[Tensor, "token d_model"]:
    """All tokens of all texts as rows, float64 for sums."""
    return torch.cat(list(texts)).double()


def about_texts(data: ConceptData) -> dict[str, Any]:
    """Counts that every recipe names."""
    return {"positive_texts": len(data.positives), "negative_texts": len(data.negatives)}
