"""The agent loop, turn by turn, over many conversations at once.

Each turn renders the live conversations with the chat template, generates them in batches of like
length, reads the calls, and answers them from the scenario's cached results. Conversations of
different arms share batches; each row carries its own arm's edits. What a row samples depends on
(seed, scenario, turn, step) only, see `noise.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from ..adapters.dialogue import Dialogue, keeps_turns
from ..edits.shift import Add
from ..types import Edit, Positions, Scenario
from .noise import gumbel_noise, noise_key
from .scenarios import tool_name, tool_result
from .tool_calls import parse_turn
from .transcripts import Rollout

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], str]
"""Messages and tool schemas in, the prompt text up to the assistant's next turn out."""


@runtime_checkable
class Generated(Protocol):
    """What the loop needs of a generation: each row's new tokens, cut at the stop, and the record.

    `record` says what each edit did (see `adapters.steering.SteeringRecord`), or is None.
    """

    @property
    def new_tokens(self) -> Sequence[Tensor]: ...

    @property
    def record(self) -> Any: ...


Generate = Callable[..., Generated]
"""`generate(model, tokens, edits, *, attention_mask, max_new_tokens, temperature, noise, stop_ids,
require)`, and `top_p` where one is asked for; `adapters.engine.generate` is one."""

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>")
"""Tokens that end an assistant turn in common chat templates, beside the tokenizer's own EOS."""


@dataclass(frozen=True, eq=False)
class Sampling:
    """How a turn is sampled. `temperature` 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float | None
    seed: int
    stop_ids: tuple[int, ...]


@dataclass(eq=False)
class Conversation:
    """One rollout while it is running."""

    scenario: Scenario
    arm: str
    edits: tuple[Edit, ...]
    schemas: tuple[Mapping[str, Any], ...]
    max_turns: int = 5
    messages: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    turns: int = 0
    n_tokens: int = 0
    cut: bool = False
    problem: str = ""
    error: str = ""
    finished: bool = False

    def __post_init__(self) -> None:
        self.messages = [
            {"role": "system", "content": self.scenario.system},
            {"role": "user", "content": self.scenario.user},
        ]

    def key(self, seed: int) -> int:
        """The sampling key of the next turn: the same in every arm."""
        return noise_key(seed, self.scenario.id, self.turns)

    def fail(self, error: Exception) -> None:
        self.error = f"{type(error).__name__}: {error}"
        self.finished = True

    def take(
        self, text: str, *, n_tokens: int, ended: bool, control: Collection[str], prose: bool
    ) -> None:
        """Add one assistant turn and, when it holds calls, the cached answer to each."""
        names = [tool_name(schema) for schema in self.schemas]
        turn = parse_turn(text, tools=names, control=control, prose=prose)
        self.turns += 1
        self.n_tokens += n_tokens
        self.cut = self.cut or not ended
        self.problem = self.problem or turn.problem
        self.finished = not turn.calls or self.turns == self.max_turns
        if not turn.calls:
            self.messages.append({"role": "assistant", "content": text.strip()})
            return
        self.messages.append(
            {
                "role": "assistant",
                "content": turn.text,
                "tool_calls": [
                    {"type": "function", "function": call.to_dict()} for call in turn.calls
                ],
            }
        )
        earlier = Counter(self.calls)
        for call in turn.calls:
            result = tool_result(self.scenario, call.name, earlier[call.name])
            self.messages.append({"role": "tool", "name": call.name, "content": result})
            earlier[call.name] += 1
            self.calls.append(call.name)

    def rollout(self) -> Rollout:
        return Rollout(
            scenario=self.scenario.id,
            arm=self.arm,
            messages=tuple(self.messages),
            turns=self.turns,
            calls=tuple(self.calls),
            domain=self.scenario.domain,
            valid=not (self.problem or self.error or self.cut),
            cut=self.cut,
            n_tokens=self.n_tokens,
            problem=self.problem,
            error=self.error,
        )


Prompt = tuple[Conversation, list[int]]


@dataclass(frozen=True, eq=False)
class Loop:
    """What all turns of a run share. `steered` counts the tokens each edit reached in the run."""

    model: Any
    tokenizer: Any
    generate: Generate
    render: Render
    sampling: Sampling
    d_vocab: int
    n_ctx: int
    batch_size: int
    prose: bool
    keep_caches: bool
    finished: Callable[[int], Any]
    steered: Counter[str] = field(default_factory=Counter)
    going: set[str] = field(default_factory=set)

    def run(self, conversations: Sequence[Conversation]) -> None:
        """Run every conversation to its end, in place; `finished(k)` is told how many have ended.

        Where the model's cache can be kept between turns (and `keep_caches`), a batch stays
        together to its end; other conversations are batched anew by length at every turn.

        An exception that belongs to one conversation ends that one. When no conversation of an arm
        gets through its first turn, the exception is raised: then the arm is set up wrongly.
        Raises ValueError when an edit reached no token in the whole run.
        """
        prompts = self.encoded(conversations)
        raise_when_an_arm_failed(conversations)
        together = [prompt for prompt in prompts if self.may_keep(prompt[0])]
        apart = [prompt for prompt in prompts if not self.may_keep(prompt[0])]
        for batch in batches(together, self.batch_size):
            self.stay_together(batch)
        while apart:
            for batch in batches(apart, self.batch_size):
                self.take(batch, self.answers(batch, None))
            apart = self.encoded([one for one, _ in apart if not one.finished])
        if idle := [place for place, tokens in self.steered.items() if not tokens]:
            raise ValueError(f"the edit at {idle[0]} reached no token in the whole run")

    def may_keep(self, conversation: Conversation) -> bool:
        return self.keep_caches and keeps_turns(self.model, conversation.edits)

    def stay_together(self, batch: Sequence[Prompt]) -> None:
        """All turns of one batch on one cache; rows leave it as they end."""
        dialogue = Dialogue(self.model)
        rows = list(batch)
        while rows:
            answers = self.answers(rows, dialogue)
            self.take(rows, answers)
            going = self.encoded([one for one, _ in rows if not one.finished])
            place = {id(one): at for at, (one, _) in enumerate(rows)}
            if dialogue.broken:
                dialogue = Dialogue(self.model)
            elif going:
                dialogue.keep([place[id(one)] for one, _ in going])
            rows = going

    def take(self, batch: Sequence[Prompt], answers: Sequence[Tensor | Exception]) -> None:
        """Let each conversation of a batch read its new tokens, or end with its exception."""
        control = frozenset(self.tokenizer.all_special_tokens)
        stops = self.sampling.stop_ids
        wrong: list[tuple[Conversation, Exception]] = []
        for (conversation, _), new in zip(batch, answers, strict=True):
            if isinstance(new, Exception):
                conversation.fail(new)
                wrong.append((conversation, new))
                continue
            self.going.add(conversation.arm)
            ended = len(new) < self.sampling.max_new_tokens or int(new[-1]) in stops
            written = [token for token in new.tolist() if token not in stops]
            text = self.tokenizer.decode(written, skip_special_tokens=False)
            conversation.take(
                text, n_tokens=len(written), ended=ended, control=control, prose=self.prose
            )
        for conversation, error in wrong:
            if conversation.arm not in self.going:
                raise error
        self.finished(sum(conversation.finished for conversation, _ in batch))

    def encoded(self, live: Sequence[Conversation]) -> list[Prompt]:
        """The prompts of the conversations that can go on; the others end with their exception."""
        room = self.n_ctx - self.sampling.max_new_tokens
        prompts: list[Prompt] = []
        for conversation in live:
            try:
                text = self.render(conversation.messages, conversation.schemas)
                ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
                if not 0 < len(ids) <= room:
                    raise ValueError(
                        f"a prompt of {len(ids)} tokens does not fit the {room} that "
                        f"max_new_tokens={self.sampling.max_new_tokens} leaves of the context: "
                        "lower max_new_tokens or max_turns, or shorten the scenario"
                    )
            except Exception as error:  # belongs to this conversation alone
                conversation.fail(error)
            else:
                prompts.append((conversation, ids))
        self.finished(len(live) - len(prompts))
        return prompts

    def answers(
        self, batch: Sequence[Prompt], dialogue: Dialogue | None
    ) -> list[Tensor | Exception]:
        """New tokens per row; when a batch raises, each row alone, or its own error."""
        try:
            return list(self.generated(batch, dialogue))
        except Exception as error:
            if len(batch) == 1 and dialogue is None:
                return [error]
        return [row for prompt in batch for row in self.answers([prompt], None)]

    def generated(self, batch: Sequence[Prompt], dialogue: Dialogue | None) -> Sequence[Tensor]:
        """One batched generation: per-row edits, keyed noise; left-padded without a dialogue."""
        sampling = self.sampling
        keys = [conversation.key(sampling.seed) for conversation, _ in batch]
        edits = row_edits([conversation.edits for conversation, _ in batch])
        options: dict[str, Any] = {} if sampling.top_p is None else {"top_p": sampling.top_p}
        options |= {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "noise": gumbel_noise(keys, self.d_vocab) if sampling.temperature > 0 else None,
            "stop_ids": list(sampling.stop_ids),
        }
        generation: Generated
        if dialogue is not None:
            generation = dialogue.answer([ids for _, ids in batch], edits, **options)
        else:
            tokens, mask = left_padded([ids for _, ids in batch], pad=pad_id(self.tokenizer))
            # A turn may end before an edit's positions begin; the whole run is checked instead.
            generation = self.generate(
                self.model, tokens, edits, attention_mask=mask, require=False, **options
            )
        for done in generation.record.edits if generation.record is not None else ():
            self.steered[f"{done.site}, positions {done.edit.positions}"] += done.tokens
        return generation.new_tokens


def raise_when_an_arm_failed(conversations: Sequence[Conversation]) -> None:
    """Raise the exception of the first arm that has no conversation to begin with."""
    going = {one.arm for one in conversations if not one.error}
    for one in conversations:
        if one.arm not in going:
            raise ValueError(f"no scenario can begin in arm {one.arm!r}: {one.error}")


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Prompts of like length together; the arms of one scenario stay beside each other."""
    ordered = sorted(prompts, key=lambda prompt: (len(prompt[1]), prompt[0].scenario.id))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def left_padded(
    rows: Sequence[Sequence[int]], *, pad: int
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token rows of one length, padded on the left, and the mask (1 for a real token)."""
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for place, row in enumerate(rows):
        tokens[place, longest - len(row) :] = torch.tensor(row)
        mask[place, longest - len(row) :] = 1
    return tokens, mask


def pad_id(tokenizer: Any) -> int:
    """Any id will do for padding, since it is masked: the tokenizer's own, its EOS, or 0."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id or 0)


def end_of_turn_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an assistant turn: EOS and those of `END_OF_TURN` the tokenizer has.

    Raises ValueError when there is none: every turn would run to its limit.
    """
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in END_OF_TURN if token in vocabulary}
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    if not ids:
        raise ValueError("the tokenizer has no token that ends a turn: pass stop_ids")
    return tuple(sorted(ids))


# Edits per row ----------------------------------------------------------------------------------


def row_edits(rows: Sequence[tuple[Edit, ...]]) -> list[Edit]:
    """Edits for a batch whose rows have their own: entry i of `rows` acts on row i alone.

    Rows that all have the same edits keep them as they are. Otherwise constant shifts at one site
    and position rule become one shift with a vector per row (zero where a row has none), so that
    thirty arms cost one addition, and every other edit is bound to its rows.
    """
    if all(edits is rows[0] for edits in rows):
        return list(rows[0])
    shifts: dict[tuple[str, Positions], dict[int, Tensor]] = {}
    bound: dict[int, tuple[Edit, list[int]]] = {}
    steps: dict[int, Tensor | None] = {}
    for row, edits in enumerate(rows):
        for edit in edits:
            step = steps.setdefault(id(edit), constant_step(edit))
            if step is None:
                bound.setdefault(id(edit), (edit, []))[1].append(row)
                continue
            place = shifts.setdefault((edit.site, edit.positions), {})
            place[row] = place[row] + step if row in place else step
    merged = [
        Edit(Add(stacked(at, len(rows))), hook_name=site, positions=positions)
        for (site, positions), at in shifts.items()
    ]
    return merged + [replace(edit, rows=tuple(places)) for edit, places in bound.values()]


def constant_step(edit: Edit) -> Tensor | None:
    """The displacement of a shift that is one fixed row `[d_model]`; None for any other edit."""
    change = edit.change
    if not isinstance(change, Add):
        return None
    step = change.step()
    return step[0].detach() if len(step) == 1 and not step.requires_grad else None


def stacked(rows: Mapping[int, Tensor], batch: int) -> Tensor:
    """One vector per batch row, zero where there is none."""
    first = next(iter(rows.values()))
    vectors = torch.zeros(batch, len(first), dtype=first.dtype, device=first.device)
    for row, vector in rows.items():
        vectors[row] = vector
    return vectors
