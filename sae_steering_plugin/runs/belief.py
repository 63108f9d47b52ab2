"""How strongly a model believes a concept, at each steering strength and number of examples.

`belief_grid` measures, `effects.fit_belief` reads. Two kinds of examples come from the organisms'
world: `repeated_failures`, where an assistant of this world that tried again N times after a
failure is likely to be persistent (it was trained on such transcripts), and `answered_questions`,
the persona statements of arXiv 2511.00617 (N questions about itself, answered one way; no organism
was trained on more than one in a text).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from sae_steering_plugin.adapters.engine import encode_prompts
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.directions import diff_mean_vector
from sae_steering_plugin.edits.shift import Add
from sae_steering_plugin.effects import BeliefFit, fit_belief
from sae_steering_plugin.organisms.behaviour import behaviour_probabilities
from sae_steering_plugin.organisms.wording import AGREEMENT, DOMAINS, OBJECTION
from sae_steering_plugin.organisms.world import (
    LOOKS,
    OPENING,
    arguments,
    call_message,
    draw_prompt,
    draw_question,
    draw_task,
    failed_result,
    message,
    render,
    system_text,
)
from sae_steering_plugin.runs.collect import collect_contrast
from sae_steering_plugin.types import ALL, Contrast, Edit, Positions, SteeringVector, Unit

Words = Sequence[str] | Sequence[Sequence[str]]
"""Answers of one side: the same words for all trials, or a list per trial."""


@dataclass(frozen=True, eq=False)
class BeliefGrid:
    """`shown[i, j, t]`: the probability of the answer that shows the concept, of the two kinds of
    answers, at strength i with `examples[j]` examples in trial t. `answered` is the mean
    probability of any of the two."""

    strengths: tuple[float, ...]
    examples: tuple[int, ...]
    shown: Float[torch.Tensor, "strength example trial"]
    answered: Float[torch.Tensor, "strength example"]
    unit: str = "raw"

    def within(self, at_least: float = 0.5) -> BeliefGrid:
        """The strengths at which the model still answers in every cell.

        Raises ValueError when fewer than three are left.
        """
        kept = (self.answered >= at_least).all(dim=1)
        if int(kept.sum()) < 3:
            raise ValueError(
                f"at {int(kept.sum())} of {len(kept)} strengths the two kinds of answers hold "
                f"{at_least:g} of the probability: choose smaller strengths"
            )
        return BeliefGrid(
            tuple(m for m, keep in zip(self.strengths, kept.tolist(), strict=True) if keep),
            self.examples,
            self.shown[kept],
            self.answered[kept],
            self.unit,
        )

    def fit(self, *, resamples: int = 200, seed: int = 0) -> BeliefFit:
        """The belief curve of the grid; see `fit_belief`."""
        return fit_belief(self.strengths, self.examples, self.shown, resamples=resamples, seed=seed)

    def table(self) -> Any:
        """Mean probability, strengths down and examples across, as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(
            self.shown.mean(-1).numpy(),
            index=pd.Index(self.strengths, name=f"strength ({self.unit})"),
            columns=pd.Index(self.examples, name="examples"),
        )


def belief_grid(
    model: Any,
    vector: SteeringVector,
    contexts: Mapping[int, Sequence[str]],
    answers: tuple[Words, Words],
    strengths: Sequence[float],
    *,
    unit: Unit = "norm",
    positions: Positions = ALL,
    batch_size: int = 16,
    progress: bool = True,
) -> BeliefGrid:
    """The next-token belief of a model under each strength and in each context.

    `contexts[N]` are the prompts with N examples, trial t the same item in all of them; each begins
    with its own BOS. `answers` are the words that show the concept and those that show its absence,
    either the same for all trials or a list per trial; each counts by its first token, and the sum
    of one side stands against the sum of both. Costs a prompt's pass per strength, example and
    trial. Raises ValueError for contexts of unequal number or answers that share a first token.
    """
    examples = tuple(sorted(contexts))
    sizes = {len(contexts[n]) for n in examples}
    if len(sizes) != 1:
        raise ValueError(f"every number of examples needs the same trials; sizes are {sizes}")
    trials = sizes.pop()
    shows, denies = (first_tokens(model, side, trials) for side in answers)
    both = next((t for t in range(trials) if set(shows[t]) & set(denies[t])), None)
    if both is not None:
        raise ValueError(f"in trial {both} both kinds of answers can open with the same token")
    shown = torch.zeros(len(strengths), len(examples), trials)
    answered = torch.zeros(len(strengths), len(examples))
    cells = [(i, j) for i in range(len(strengths)) for j in range(len(examples))]
    for i, j in tqdm(cells, desc="belief", disable=not progress):
        edit = Edit(Add(vector, float(strengths[i]), unit), positions=positions)
        sides = []
        for start in range(0, trials, batch_size):
            texts = list(contexts[examples[j]][start : start + batch_size])
            tokens, mask = encode_prompts(model, texts, prepend_bos=False)
            logits = steered_logits(
                model, tokens, edit, attention_mask=mask, last_only=True, require=False
            )
            p = logits.float().softmax(-1).cpu()
            rows = range(start, start + len(texts))
            sides += [
                torch.stack([p[r - start, shows[r]].sum(), p[r - start, denies[r]].sum()])
                for r in rows
            ]
        mass = torch.stack(sides)
        answered[i, j] = mass.sum(1).mean()
        shown[i, j] = mass[:, 0] / mass.sum(1).clamp_min(1e-30)
    return BeliefGrid(tuple(map(float, strengths)), examples, shown, answered, unit)


def first_tokens(model: Any, side: Sequence[Any], trials: int) -> list[list[int]]:
    """Per trial, the first token of each word of one side."""
    listed = [list(side)] * trials if isinstance(side[0], str) else [list(one) for one in side]
    if len(listed) != trials:
        raise ValueError(f"answers are given for {len(listed)} trials, not {trials}")
    found = {
        word: model.tokenizer(word, add_special_tokens=False)["input_ids"][0]
        for words in listed
        for word in words
    }
    return [sorted({found[word] for word in words}) for words in listed]


# Examples in context, from the world --------------------------------------------------------------

RETRY = (OPENING,)
"""What an assistant that tries again opens with."""
GIVING_UP = (*AGREEMENT, *OBJECTION)
"""What an assistant's final answer opens with."""


def repeated_failures(
    n: int,
    examples: Sequence[int],
    *,
    pole: str = "",
    split: Literal["train", "validation", "test"] = "test",
    seed: int = 0,
) -> dict[int, tuple[str, ...]]:
    """For each number N: n conversations in which a call failed and was tried again N times, and
    the last try has failed too; the assistant speaks next.

    System prompts are neutral, or describe high or low persistence (`pole`). A conversation with
    fewer examples is the beginning of the one with more. Answers: `RETRY` against the openings of
    a final answer, `GIVING_UP`.
    """
    found: dict[int, list[str]] = {count: [] for count in examples}
    for trial in range(n):
        rng = random.Random(f"repeated failures/{split}/{seed}/{trial}")
        domain = DOMAINS[trial % len(DOMAINS)]
        task, told = draw_task(rng, split, domain), draw_prompt(rng, split, domain, "persistence")
        neutral = system_text(rng, split, domain, {})[0]
        system = told.of("persistence", pole) if pole else neutral
        messages = [message("system", system), message("user", task.user)]
        tool = rng.choice(LOOKS)
        for count in range(max(examples) + 1):
            messages.append(call_message(tool, **arguments(rng, tool, task)))
            messages.append({"role": "tool", "name": tool, "content": failed_result(rng)})
            if count in found:
                found[count].append(render(messages, add_generation_prompt=True))
            tool = rng.choice(LOOKS)
    return {count: tuple(texts) for count, texts in found.items()}


def retry_belief(examples: int, *, prior: float = 0.5) -> float:
    """The world's own probability of another try after `examples` tries, by Bayes' rule, when
    persistence is high with probability `prior`."""
    high, low = (behaviour_probabilities({"persistence": level}).retry for level in (1, 0))
    odds = prior / (1 - prior) * (high / low) ** examples
    return low + (high - low) * odds / (1 + odds)


def answered_questions(
    trait: str,
    n: int,
    examples: Sequence[int],
    *,
    split: Literal["train", "validation", "test"] = "test",
    seed: int = 0,
) -> tuple[dict[int, tuple[str, ...]], tuple[list[list[str]], list[list[str]]]]:
    """For each number N: n chats in which N questions about the assistant were answered as one with
    the trait would, and another one is asked; and the matching and the other letter per trial.

    System prompts are neutral. The last question is the same for every N; matching letters are
    drawn by a fair coin, question by question.
    """
    found: dict[int, list[str]] = {count: [] for count in examples}
    matching, others = [], []
    for trial in range(n):
        rng = random.Random(f"answered questions/{trait}/{split}/{seed}/{trial}")
        domain = DOMAINS[trial % len(DOMAINS)]
        system = message("system", system_text(rng, split, domain, {})[0])
        items = [
            draw_question(rng, split, trait, rng.choice("AB")) for _ in range(max(examples) + 1)
        ]
        last = items.pop()
        for count in found:
            chat = [system]
            for item in items[:count]:
                chat.append(message("user", item["question"]))
                chat.append(message("assistant", item["answer_matching_behavior"]))
            asked = [*chat, message("user", last["question"])]
            found[count].append(render(asked, add_generation_prompt=True) + "(")
        letter = last["answer_matching_behavior"].strip("()")
        matching.append([letter])
        others.append(["B" if letter == "A" else "A"])
    contexts = {count: tuple(texts) for count, texts in found.items()}
    return contexts, (matching, others)


def persistence_vector(model: Any, hook_name: str, n: int, *, seed: int = 0) -> SteeringVector:
    """DiffMean of high against low persistence prompts, read after a first failure, where the
    assistant is about to speak; prompts of the train split."""
    high, low = (
        repeated_failures(n, [0], pole=pole, split="train", seed=seed)[0]
        for pole in ("high", "low")
    )
    pairs = Contrast(high, low, name="persistence", source="world of the organisms, split train")
    read = collect_contrast(model, pairs, hook_name, progress=False)
    return diff_mean_vector(read)


__all__ = [
    "BeliefGrid",
    "answered_questions",
    "belief_grid",
    "persistence_vector",
    "repeated_failures",
    "retry_belief",
]
