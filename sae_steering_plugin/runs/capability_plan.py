"""Sets of knowledge under steering as a plan: arms x sets x blocks of questions.

TruthfulQA with all its answers is scored as its authors do (arXiv 2109.07958, section 3.3, and
their code): the log-probability of each answer behind the question, summed over its tokens.

    MC1   1 when the best answer is more probable than every false one
    MC2   the probability of the true answers among all that are listed

Their six examples before each question are left out, so figures compare with runs of this plan and
not with published ones. Two-choice sets are scored by `evaluate_choices`. Both give two columns:
`correct` (MC1, or the better of two answers) and `p_true` (MC2, or the normalised probability).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..adapters.activations import bos_policy, encode_texts
from ..adapters.sharing import steered_logits
from ..types import ALL, Edit
from .canonical import content_key
from .capability import ManyAnswers
from .choice_items import ChoiceItem, named_form
from .choices import evaluate_choices, first_behind, left_padded
from .plan import Unit
from .references import ModelRef
from .rollout_plan import ArmSpec
from .runner import with_smaller_batches

if TYPE_CHECKING:
    import pandas as pd

MEASURE = "capability 1"
"""Name and version of what a part holds."""


@dataclass(frozen=True)
class TruthSet:
    """Questions with all their answers."""

    name: str
    questions: tuple[ManyAnswers, ...]


@dataclass(frozen=True)
class ChoiceSet:
    """Two-choice questions, put in the form that `str(ChoiceForm)` names."""

    name: str
    questions: tuple[ChoiceItem, ...]
    form: str


@dataclass(frozen=True)
class CapabilityPlan:
    """Every question of every set under every arm, in units of one arm and `block` questions.

    `batch_size` rows (answers, or questions) share a forward pass. Raises ValueError for arms that
    steer some positions only: an answer is scored as part of the prompt.
    """

    model: ModelRef
    arms: tuple[ArmSpec, ...]
    truth: tuple[TruthSet, ...] = ()
    choices: tuple[ChoiceSet, ...] = ()
    block: int = 50
    batch_size: int = 32
    worker: ClassVar[str] = f"{__name__}:CapabilityWorker"
    title: ClassVar[str] = "capability"

    def __post_init__(self) -> None:
        if self.block < 1 or self.batch_size < 1:
            raise ValueError("block and batch_size are at least 1")
        names = [one.name for one in self.sets]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sets are {names}: at least one, and each name once")
        if empty := [one.name for one in self.sets if not one.questions]:
            raise ValueError(f"set {empty[0]!r} holds no question")
        for arm in self.arms:
            if arm.positions != ALL:
                raise ValueError(
                    f"answers are scored with edits at all positions, not {arm.positions}"
                )
        for one in self.choices:
            named_form(one.form)

    @property
    def sets(self) -> tuple[TruthSet | ChoiceSet, ...]:
        """All sets, in the order of the rows."""
        return (*self.truth, *self.choices)

    def set(self, name: str) -> TruthSet | ChoiceSet:
        return next(one for one in self.sets if one.name == name)

    def units(self) -> Sequence[Unit]:
        """By arm, then by set, then by block of questions, in the order given."""
        blocks = [
            (one, start, min(start + self.block, len(one.questions)))
            for one in self.sets
            for start in range(0, len(one.questions), self.block)
        ]
        asked = [
            content_key([one.questions[start:stop], form_of(one)]) for one, start, stop in blocks
        ]
        return [
            Unit.of(
                {"arm": arm.name, "set": one.name, "questions": [start, stop]},
                measure=MEASURE,
                model=self.model.identity(),
                arm=arm.identity(),
                asked=content,
                batch_size=self.batch_size,
            )
            for arm in self.arms
            for (one, start, stop), content in zip(blocks, asked, strict=True)
        ]


def form_of(one: TruthSet | ChoiceSet) -> str:
    return one.form if isinstance(one, ChoiceSet) else "answers"


class CapabilityWorker:
    """Runs units of a `CapabilityPlan` on its model, loaded once."""

    def __init__(self, plan: CapabilityPlan) -> None:
        self.plan = plan
        self.subject = plan.model.open()
        references = {shift.vector for arm in plan.arms for shift in arm.shifts}
        vectors = {reference: reference.load() for reference in references}
        self.edits = {arm.name: arm.arm(vectors).bound() for arm in plan.arms}

    def run(self, unit: Unit) -> pd.DataFrame:
        """One row per question: arm, set, item, group, form, correct, p_true, letter_mass (NaN
        where no letter is read), answers, and the batch size that fitted."""
        import pandas as pd

        asked = self.plan.set(unit.coordinates["set"])
        start, stop = unit.coordinates["questions"]
        edits = self.edits[unit.coordinates["arm"]]
        found, size = with_smaller_batches(
            lambda size: (
                self.chosen(asked, edits, start, stop, size)
                if isinstance(asked, ChoiceSet)
                else truth_rows(self.subject.model, asked.questions[start:stop], edits, size)
            ),
            self.plan.batch_size,
        )
        about = {"arm": unit.coordinates["arm"], "set": asked.name}
        questions: Sequence[ManyAnswers | ChoiceItem] = asked.questions[start:stop]
        return pd.DataFrame(
            [
                {
                    **about,
                    "item": start + i,
                    "group": one.group,
                    "form": form_of(asked),
                    **figures,
                    "batch_size": size,
                }
                for i, (one, figures) in enumerate(zip(questions, found, strict=True))
            ]
        )

    def chosen(
        self, asked: ChoiceSet, edits: Sequence[Edit], start: int, stop: int, size: int
    ) -> list[dict[str, Any]]:
        """Two-choice figures, by question."""
        import warnings

        with warnings.catch_warnings():
            # a block may hold more of one letter; the set's share stands in the protocol's table
            warnings.filterwarnings("ignore", ".*letters are unbalanced", UserWarning)
            found = evaluate_choices(
                self.subject.model,
                asked.questions[start:stop],
                (lambda _: edits) if edits else None,
                strengths=(1.0,),
                form=named_form(asked.form),
                render=self.subject.render,
                batch_size=size,
            )
        return [
            {
                "correct": float(row["chosen"]),
                "p_true": row["p_match_normalised"],
                "letter_mass": row["letter_mass"],
                "answers": 2,
            }
            for row in found.rows
        ]


def truth_rows(
    model: Any, questions: Sequence[ManyAnswers], edits: Sequence[Edit], batch_size: int
) -> list[dict[str, Any]]:
    """MC1 (`correct`) and MC2 (`p_true`) of each question."""
    pairs = [(one.prompt, f" {answer}") for one in questions for answer in one.answers]
    sums = iter(answer_logprobs(model, pairs, edits, batch_size=batch_size))
    rows = []
    for one in questions:
        found = {answer: next(sums) for answer in one.answers}
        mc1, mc2 = truth_scores(
            found[one.best], [found[a] for a in one.true], [found[a] for a in one.false]
        )
        rows.append({"correct": mc1, "p_true": mc2, "letter_mass": math.nan, "answers": len(found)})
    return rows


def truth_scores(best: float, true: Sequence[float], false: Sequence[float]) -> tuple[float, float]:
    """(MC1, MC2) from the log-probabilities of the answers, in nats."""
    every = torch.tensor([*true, *false], dtype=torch.float64).softmax(dim=0)
    return float(best > max(false)), float(every[: len(true)].sum())


def answer_logprobs(
    model: Any,
    pairs: Sequence[tuple[str, str]],
    edits: Sequence[Edit] = (),
    *,
    batch_size: int = 32,
) -> list[float]:
    """The log-probability of each answer behind its prompt, summed over its tokens, in nats.

    Rows are batched by length. Raises ValueError for an answer without a token of its own.
    """
    bos = bos_policy(model)
    encoded = encode_texts(model, [prompt + answer for prompt, answer in pairs], prepend_bos=bos)
    starts = [
        first_behind(one, len(prompt)) for one, (prompt, _) in zip(encoded, pairs, strict=True)
    ]
    order = sorted(range(len(pairs)), key=lambda i: (-len(encoded[i]), i))
    out = [0.0] * len(pairs)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        tokens, mask = left_padded(model, [list(encoded[i].tokens) for i in chosen], bos)
        logits = steered_logits(model, tokens, edits, attention_mask=mask)
        for row, i in zip(logits, chosen, strict=True):
            said = torch.tensor(encoded[i].tokens[starts[i] :], device=row.device)
            chance = row[-len(said) - 1 : -1].float().log_softmax(dim=-1)
            out[i] = float(chance.gather(-1, said[:, None]).double().sum())
    return out
