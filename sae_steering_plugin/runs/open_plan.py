"""Open-ended texts under steering as a plan: lines x blocks of questions, nothing judged.

The lines are those of `runs.sas_protocol`: SAS, its baselines and random directions. A unit is
(line, block of questions); the strengths of a line are rows of one batch. What comes back are texts
with fluency and repetition; `runs.judge_plan` scores them afterwards, when the workers of this plan
are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .canonical import content_key
from .choice_items import ChoiceItem
from .open_ended import steered_texts
from .plan import Unit
from .sas_protocol import Line, SASPlan, SASWorker

if TYPE_CHECKING:
    import pandas as pd

MEASURE = "open-ended texts 1"
"""Name and version of what a part holds."""


@dataclass(frozen=True)
class Asked:
    """The open-ended questions of a behaviour."""

    behaviour: str
    questions: tuple[ChoiceItem, ...]


@dataclass(frozen=True)
class OpenPlan:
    """Lines asked their behaviour's questions in blocks of `block`.

    `steering` is a plan without tasks: its model, SAEs, behaviours, strengths and positions are
    used. Raises ValueError for what does not fit it.
    """

    steering: SASPlan
    lines: tuple[Line, ...]
    asked: tuple[Asked, ...]
    max_new_tokens: int = 48
    temperature: float = 0.0
    seed: int = 0
    block: int = 50
    batch_size: int = 64
    worker: ClassVar[str] = f"{__name__}:OpenWorker"
    title: ClassVar[str] = "open-ended texts"

    def __post_init__(self) -> None:
        if self.block < 1 or self.batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError("block, batch_size and max_new_tokens are at least 1")
        known = {one.name for one in self.steering.behaviours}
        saes = {one.name for one in self.steering.saes}
        asked = {one.behaviour for one in self.asked}
        for line in self.lines:
            if line.behaviour not in known & asked or line.sae not in saes:
                raise ValueError(
                    f"the line '{line}' needs its behaviour, its questions and its SAE in the "
                    f"plan; there are {sorted(known)}, {sorted(asked)} and {sorted(saes)}"
                )
            if line.second:
                raise ValueError("open-ended texts are of one vector: drop `second`")
        for one in self.asked:
            if not one.questions:
                raise ValueError(f"behaviour {one.behaviour!r} has no questions to ask")
            self.steering.behaviour(one.behaviour).refuse(one.questions)

    def questions(self, behaviour: str) -> tuple[ChoiceItem, ...]:
        return next(one.questions for one in self.asked if one.behaviour == behaviour)

    def units(self) -> Sequence[Unit]:
        """By line, then by block of questions, in the order given."""
        plan = self.steering
        prints = {one.name: one.fingerprint for one in plan.saes}
        found = []
        for line in self.lines:
            behaviour = plan.behaviour(line.behaviour)
            questions = self.questions(line.behaviour)
            for start in range(0, len(questions), self.block):
                stop = min(start + self.block, len(questions))
                found.append(
                    Unit.of(
                        {"line": str(line), "questions": [start, stop]},
                        measure=MEASURE,
                        model=plan.model.identity(),
                        sae=prints[line.sae],
                        built=content_key([behaviour.build, behaviour.against, behaviour.pairs]),
                        built_in=plan.built_in,
                        strengths=plan.strengths,
                        positions=plan.positions,
                        asked=content_key(questions[start:stop]),
                        max_new_tokens=self.max_new_tokens,
                        temperature=self.temperature,
                        seed=self.seed,
                        batch_size=self.batch_size,
                    )
                )
        return found


class OpenWorker:
    """Runs units of an `OpenPlan`: model, SAEs and vectors as a `SASWorker` holds them."""

    def __init__(self, plan: OpenPlan) -> None:
        self.plan = plan
        self.steered = SASWorker(plan.steering)
        self.lines = {str(line): line for line in plan.lines}

    def run(self, unit: Unit) -> pd.DataFrame:
        """One row per question and strength: which line, what was asked, the text, its figures."""
        import pandas as pd

        line = self.lines[unit.coordinates["line"]]
        start, stop = unit.coordinates["questions"]
        rows = steered_texts(
            self.steered.subject.model,
            self.plan.questions(line.behaviour)[start:stop],
            self.steered.steering(line),
            strengths=self.plan.steering.strengths,
            render=self.steered.subject.render,
            max_new_tokens=self.plan.max_new_tokens,
            temperature=self.plan.temperature,
            seed=self.plan.seed,
            batch_size=self.plan.batch_size,
            first=start,
        )
        table = pd.DataFrame([{**self.steered.named(line), **row} for row in rows])
        for name, value in self.steered.extent(line).items():
            table[name] = value
        table["displacement"] = self.steered.displacements(line, table["strength"])
        return table
