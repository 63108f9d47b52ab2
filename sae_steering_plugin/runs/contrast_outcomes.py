"""What steering does to a model on held-out contrast pairs: one number per pair and arm.

Three outcomes, larger when the model moves towards the positive side; no text is sampled:

    answer_share  p(matching answer) / (p(matching) + p(other)) as the next token (question sets)
    closeness     -KL(next token after the positive prompt || after the negative one), in nats; the
                  positive prompt is never steered (opposite instructions on one user message)
    preference    mean log-probability per token of the positive text minus the negative (texts)

Beside each stands `valid`: the log-probability per token of the item's own prompt fell by no more
than `TOLERATED_NATS`. It plays the part that well-formed output has in rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steering_plugin.adapters.activations import EncodedText, bos_policy, encode_texts, padded
from sae_steering_plugin.adapters.steering import steer
from sae_steering_plugin.adapters.transformer_lens import is_bridge
from sae_steering_plugin.runs.rollouts import Arm
from sae_steering_plugin.types import Contrast

if TYPE_CHECKING:
    import pandas as pd

TOLERATED_NATS = 0.5
"""Loss of log-probability per token of ordinary text beyond which an item counts as broken."""


@dataclass(frozen=True, eq=False)
class ContrastResult:
    """One arm's outcome per held-out pair; an `Arm` of `effects.compare`."""

    arm: Arm
    outcome: str
    values: Float[Tensor, " pair"]
    nats: Float[Tensor, " pair"]
    base_nats: Float[Tensor, " pair"]
    model: str = ""

    def table(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(
            {
                "scenario": [f"pair {i}" for i in range(len(self.values))],
                self.outcome: self.values.tolist(),
                "valid": (self.base_nats - self.nats <= TOLERATED_NATS).tolist(),
            }
        )

    def details(self) -> dict[str, Any]:
        known = {**self.arm.details(), "model": self.model, "judge": "next-token probabilities"}
        return {"method": self.arm.name, **known}


def outcome_word(contrast: Contrast, *, chat: bool, answers: bool) -> str:
    """Which outcome fits a set: answers, conversations that pair up, or plain texts."""
    if answers:
        return "answer_share"
    return "closeness" if chat and contrast.paired else "preference"


def run_contrast(
    model: Any,
    contrast: Contrast,
    arms: Sequence[Arm],
    *,
    outcome: str,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, ContrastResult]:
    """Every arm on every held-out pair; one arm without edits is the base.

    Lists that do not pair up are compared in the order given, as many as the shorter one has.
    Raises ValueError for an unknown outcome, without a base arm, and for pairs an outcome cannot
    read.
    """
    if outcome not in OUTCOMES:
        raise ValueError(f"no outcome {outcome!r}; choose one of {', '.join(OUTCOMES)}")
    bare = [arm for arm in arms if not arm.edits]
    if len(bare) != 1:
        raise ValueError(f"a comparison needs one arm without edits; {len(bare)} were given")
    from tqdm.auto import tqdm

    bos = bos_policy(model, None, prepend_bos)
    n = min(len(contrast.positive), len(contrast.negative))
    high = encode_texts(model, contrast.positive[:n], prepend_bos=bos)
    low = encode_texts(model, contrast.negative[:n], prepend_bos=bos)
    by_length = sorted(range(n), key=lambda i: len(high[i]) + len(low[i]))
    back = torch.tensor(by_length).argsort()
    high, low = ([side[i] for i in by_length] for side in (high, low))
    measured: dict[str, tuple[Tensor, Tensor]] = {}
    order = [*bare, *(arm for arm in arms if arm.edits)]
    for arm in tqdm(order, desc="held-out pairs", unit="arm", disable=not progress):
        values, nats = [], []
        for start in range(0, n, batch_size):
            rows = slice(start, start + batch_size)
            value, fit = OUTCOMES[outcome](model, high[rows], low[rows], arm)
            values.append(value)
            nats.append(fit)
        measured[arm.name] = torch.cat(values)[back], torch.cat(nats)[back]
    base = measured[bare[0].name][1]
    return {
        arm.name: ContrastResult(
            arm, outcome, *measured[arm.name], base_nats=base, model=str(model.cfg.model_name)
        )
        for arm in arms
    }


def steered(model: Any, arm: Arm) -> AbstractContextManager[Any]:
    return steer(model, arm.bound(), measure=False) if arm.edits else nullcontext()


def logprobs(
    model: Any, texts: Sequence[EncodedText], at: Sequence[int]
) -> tuple[Float[Tensor, "batch d_vocab"], Float[Tensor, " batch"]]:
    """Log-probabilities after token `at[row]`, and each text's mean log-probability per token.

    Rows are right-padded; what stands on padding is not part of any figure.
    """
    batch = padded(model, texts)
    device = next(model.parameters()).device
    options: dict[str, Any] = {"attention_mask": batch.real.long().to(device)}
    if is_bridge(model):
        options["use_cache"] = False
    with torch.no_grad():
        logits = model(batch.tokens.to(device), **options)
    tokens, counted = batch.tokens[:, 1:].to(device), batch.real[:, 1:].to(device)
    picked = logits[:, :-1].gather(-1, tokens[..., None])[..., 0].float()
    total = torch.stack([row.float().logsumexp(dim=-1) for row in logits[:, :-1]])
    nats = ((picked - total) * counted).sum(-1) / counted.sum(-1).clamp_min(1)
    after = logits[torch.arange(len(texts)), torch.tensor(list(at))].float().log_softmax(dim=-1)
    return after.cpu(), nats.cpu()


def answer_share(
    model: Any, high: Sequence[EncodedText], low: Sequence[EncodedText], arm: Arm
) -> tuple[Tensor, Tensor]:
    """The matching answer's share of the two answers, read where the texts first differ."""
    forks = [fork(a, b) for a, b in zip(high, low, strict=True)]
    prompts = [cut(text, at) for text, at in zip(high, forks, strict=True)]
    with steered(model, arm):
        scores, nats = logprobs(model, prompts, ends(prompts))
    both = torch.stack(
        [
            scores[row, [a.tokens[at], b.tokens[at]]]
            for row, (at, a, b) in enumerate(zip(forks, high, low, strict=True))
        ]
    )
    return both.softmax(dim=-1)[:, 0], nats


def fork(high: EncodedText, low: EncodedText) -> int:
    """The first token at which two texts differ. ValueError when there is none behind token 0."""
    pairs = zip(high.tokens, low.tokens, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), -1)
    if at < 1:
        raise ValueError(
            "the two answers of a question differ from the first token on, or one text begins with "
            "the other: their probabilities cannot be compared"
        )
    return at


def cut(text: EncodedText, stop: int) -> EncodedText:
    spans = None if text.spans is None else text.spans[:stop]
    return replace(text, tokens=text.tokens[:stop], spans=spans)


def ends(texts: Sequence[EncodedText]) -> list[int]:
    return [len(text) - 1 for text in texts]


def closeness(
    model: Any, high: Sequence[EncodedText], low: Sequence[EncodedText], arm: Arm
) -> tuple[Tensor, Tensor]:
    """-KL from the next token after the positive prompt to that after the (steered) negative."""
    goal, _ = logprobs(model, high, ends(high))
    with steered(model, arm):
        reached, nats = logprobs(model, low, ends(low))
    return -(goal.exp() * (goal - reached)).sum(dim=-1), nats


def preference(
    model: Any, high: Sequence[EncodedText], low: Sequence[EncodedText], arm: Arm
) -> tuple[Tensor, Tensor]:
    """Mean log-probability per token, positive text minus negative."""
    with steered(model, arm):
        _, of_high = logprobs(model, high, ends(high))
        _, of_low = logprobs(model, low, ends(low))
    return of_high - of_low, (of_high + of_low) / 2


Outcome = Callable[[Any, Sequence[EncodedText], Sequence[EncodedText], Arm], tuple[Tensor, Tensor]]
OUTCOMES: Mapping[str, Outcome] = {
    "answer_share": answer_share,
    "closeness": closeness,
    "preference": preference,
}
"""The words `outcome` may be."""
