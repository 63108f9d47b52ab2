"""Agent rollouts as a plan: scenarios x arms, cut into (arm, block of scenarios).

    vectors = {"autonomy": VectorRef.of("autonomy-vectors")}
    plan = RolloutPlan(
        ModelRef.of("agent-gpt2"),
        tuple(scenarios),
        (BASE, *steering_arms(vectors, strengths=(0.25, 0.5), positions=("all", "decode"))),
    )
    InProcess().run(plan, "out")
    rollouts = plan.rollouts(collect(plan, "out"))        # as run_rollouts gives them

The collected rows are those of one `run_rollouts` call over the same arms and scenarios, by arm
and then by scenario. A rollout's noise depends on (seed, scenario, turn, step) alone, so neither
blocks nor other arms matter, up to a tie of two logits within rounding. A unit fixes its batches
and has them in its key, so that one key means one table to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..edits.shift import Add
from ..types import ALL, Edit, Positions, Scenario, SteeringVector, named_positions
from ..types import Unit as StrengthUnit
from .canonical import content_key
from .plan import Unit, plan_key
from .references import ModelRef, VectorRef
from .rollouts import Arm, check_run, random_vector, run_rollouts
from .runner import is_out_of_memory, with_smaller_batches
from .scenarios import TOOLS
from .transcripts import Rollouts, arrow_table, rollouts_from

if TYPE_CHECKING:
    import pyarrow as pa

    from .parts import Collected

MEASURE = "rollouts 1"
"""Name and version of what a part holds. A change of the loop, the parser or the proxies that can
change a number raises it."""


@dataclass(frozen=True)
class Shift:
    """A constant shift: `length` residual units along a vector, or along a random direction at its
    site (`random` is that direction's seed)."""

    vector: VectorRef
    length: float
    random: int | None = None

    def edit(self, vector: SteeringVector, positions: Positions) -> Edit:
        """The edit, given the loaded vector."""
        chosen = vector if self.random is None else random_vector(vector, self.random)
        change = Add(chosen, strength=self.length, unit="unit")
        return Edit(change, vector.hook_name, positions)


@dataclass(frozen=True)
class ArmSpec:
    """An arm as text: shifts at one position rule (the base: none), and what `Effect` says of it.

    `strength` in `unit` is what was asked for, `displacement` its length against the mean residual
    norm; None where unknown.
    """

    name: str
    shifts: tuple[Shift, ...] = ()
    positions: Positions = ALL
    method: str = ""
    strength: float | None = None
    unit: str = ""
    displacement: float | None = None
    trait: str = ""

    def arm(self, vectors: Mapping[VectorRef, SteeringVector] | None = None) -> Arm:
        """The arm with its edits when the loaded `vectors` are given, else only its description."""
        edits: tuple[Edit, ...] = ()
        if vectors is not None:
            edits = tuple(one.edit(vectors[one.vector], self.positions) for one in self.shifts)
        return Arm(
            self.name,
            edits,
            method=self.method,
            strength=math.nan if self.strength is None else self.strength,
            unit=self.unit,
            positions=str(self.positions) if self.shifts else "",
            displacement=math.nan if self.displacement is None else self.displacement,
            trait=self.trait,
        )

    def identity(self) -> dict[str, Any]:
        """What of the arm can change a row: its name, shifts and positions; not where a file lies.

        How the strength is worded (method, unit, trait) stands in the plan, not in the rows.
        """
        shifts = [[one.vector.fingerprint, one.length, one.random] for one in self.shifts]
        return {"name": self.name, "shifts": shifts, "positions": self.positions}


BASE = ArmSpec("base")
"""The unsteered arm."""


def steering_arms(
    vectors: Mapping[str, VectorRef],
    *,
    strengths: Sequence[float],
    unit: StrengthUnit = "norm",
    positions: Sequence[Positions | str] = (ALL,),
    like: Mapping[str, VectorRef] | None = None,
    traits: Mapping[str, str] | None = None,
) -> tuple[ArmSpec, ...]:
    """One arm per vector, position rule and strength, named as `dose_response` names its arms.

    A strength is turned into a length by the vector's own recipe, or by that of `like[name]` for a
    baseline at another vector's displacement. `traits` says which trait a vector is for (its name
    when None). Raises ValueError when a recipe lacks the figure the unit needs.
    """
    found = []
    for name, reference in vectors.items():
        own = reference.load()
        measured = like[name].load() if like is not None and name in like else own
        for rule in map(position_rule, positions):
            for strength in strengths:
                length = measured.displacement(float(strength), unit)
                found.append(
                    described(
                        f"{name} {strength:+g} {rule}",
                        Shift(reference, float(length)),
                        measured,
                        rule,
                        method=name,
                        strength=float(strength),
                        unit=unit,
                        trait=name if traits is None else traits.get(name, ""),
                    )
                )
    return tuple(found)


def random_arms(
    like: VectorRef,
    *,
    seeds: Sequence[int],
    strengths: Sequence[float],
    unit: StrengthUnit = "norm",
    positions: Sequence[Positions | str] = (ALL,),
    label: str = "",
    trait: str = "",
) -> tuple[ArmSpec, ...]:
    """Random directions at the site and the displacements of `like`, one arm per seed, rule and
    magnitude.

    `label` tells the controls of one vector from another's in the arm's name.
    """
    vector = like.load()
    magnitudes = sorted({abs(float(strength)) for strength in strengths} - {0.0})
    return tuple(
        described(
            f"random {seed}{label and f' {label}'} {strength:+g} {rule}",
            Shift(like, float(vector.displacement(strength, unit)), int(seed)),
            vector,
            rule,
            method="random",
            strength=strength,
            unit=unit,
            trait=trait,
        )
        for seed in seeds
        for rule in map(position_rule, positions)
        for strength in magnitudes
    )


def random_crowd(
    named: Mapping[str, VectorRef],
    *,
    seeds: Sequence[int],
    strengths: Sequence[float],
    unit: StrengthUnit = "norm",
    positions: Sequence[Positions | str] = (ALL,),
) -> list[ArmSpec]:
    """`random_arms` of every vector; with several, an arm's name says whose control it is."""
    return [
        arm
        for name, reference in named.items()
        for arm in random_arms(
            reference,
            seeds=seeds,
            strengths=strengths,
            unit=unit,
            positions=positions,
            label="" if len(named) == 1 else f"like {name}",
        )
    ]


def position_rule(rule: Positions | str) -> Positions:
    return named_positions(rule) if isinstance(rule, str) else rule


def described(
    name: str, shift: Shift, measured: SteeringVector, rule: Positions, **details: Any
) -> ArmSpec:
    """An arm of one shift, with its length against the mean residual norm where that is known."""
    norm = measured.recipe.mean_norm
    displacement = float(abs(shift.length) / norm) if norm else None
    return ArmSpec(name, (shift,), rule, displacement=displacement, **details)


@dataclass(frozen=True)
class RolloutPlan:
    """Scenarios run once in each arm, in units of one arm and `block` scenarios.

    The options are those of `run_rollouts`; `batch_size` rollouts share a forward pass inside a
    unit. Raises ValueError for what would spoil the run, before anything is loaded.
    """

    model: ModelRef
    scenarios: tuple[Scenario, ...]
    arms: tuple[ArmSpec, ...] = (BASE,)
    seed: int = 42
    max_turns: int = 5
    max_new_tokens: int = 256
    temperature: float = 0.6
    top_p: float | None = None
    prose: bool = False
    block: int = 50
    batch_size: int = 64
    tools: tuple[Mapping[str, Any], ...] = TOOLS
    worker: ClassVar[str] = f"{__name__}:RolloutWorker"
    title: ClassVar[str] = "rollouts"

    def __post_init__(self) -> None:
        check_run(
            self.scenarios,
            [spec.arm() for spec in self.arms],
            self.tools,
            self.max_turns,
            self.max_new_tokens,
            self.temperature,
            min(self.batch_size, self.block),
        )

    @property
    def key(self) -> str:
        """The identity of the plan's table."""
        return plan_key(self)

    def __len__(self) -> int:
        """The number of rollouts."""
        return len(self.scenarios) * len(self.arms)

    def settings(self) -> dict[str, Any]:
        """The options a rollout's text depends on."""
        return {
            "seed": self.seed,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_turns": self.max_turns,
            "max_new_tokens": self.max_new_tokens,
            "prose": self.prose,
        }

    def units(self) -> Sequence[Unit]:
        """By arm, then by block of scenarios, in the order given."""
        blocks = [
            self.scenarios[start : start + self.block]
            for start in range(0, len(self.scenarios), self.block)
        ]
        prints = [[content_key(scenario) for scenario in block] for block in blocks]
        shared = {
            "measure": MEASURE,
            "model": self.model.identity(),
            "tools": content_key(self.tools),
            "batch_size": self.batch_size,
            **self.settings(),
        }
        return [
            Unit.of(
                {"arm": spec.name, "scenarios": [scenario.id for scenario in block]},
                arm=spec.identity(),
                scenarios=fingerprints,
                **shared,
            )
            for spec in self.arms
            for block, fingerprints in zip(blocks, prints, strict=True)
        ]

    def rollouts(self, collected: Collected) -> Rollouts:
        """The collected rows as `run_rollouts` gives them, with the plan's arms and settings."""
        details = {
            spec.name: {**spec.arm().details(), "model": self.model.source} for spec in self.arms
        }
        return Rollouts(
            rollouts_from(collected.table, "collected rollouts"),
            details,
            {"model": self.model.source, **self.settings()},
        )


class RolloutWorker:
    """Runs units of a `RolloutPlan` on its model, loaded once."""

    def __init__(self, plan: RolloutPlan) -> None:
        self.plan = plan
        self.model = plan.model.open().model
        references = {shift.vector for spec in plan.arms for shift in spec.shifts}
        vectors = {reference: reference.load() for reference in references}
        self.arms = {spec.name: spec.arm(vectors) for spec in plan.arms}
        self.scenarios = {scenario.id: scenario for scenario in plan.scenarios}

    def run(self, unit: Unit) -> pa.Table:
        """The unit's rollouts: the columns of `Rollouts.save`, and the `batch_size` that fitted."""
        import pyarrow as pa

        arm = self.arms[unit.coordinates["arm"]]
        scenarios = [self.scenarios[name] for name in unit.coordinates["scenarios"]]
        found, size = with_smaller_batches(
            lambda size: self.rolled(arm, scenarios, size), self.plan.batch_size
        )
        table = arrow_table(found)
        return table.append_column("batch_size", pa.array([size] * len(found), pa.int64()))

    def rolled(self, arm: Arm, scenarios: Sequence[Scenario], batch_size: int) -> Rollouts:
        """One call of the loop. Raises OutOfMemoryError where a rollout ended for lack of memory:
        how much there is says nothing about the model."""
        found = run_rollouts(
            self.model,
            scenarios,
            arms=[arm],
            tools=self.plan.tools,
            batch_size=batch_size,
            progress=False,
            **self.plan.settings(),
        )
        for one in found:
            if one.error.startswith(MEMORY_ERRORS) or is_out_of_memory(RuntimeError(one.error)):
                raise torch.OutOfMemoryError(f"scenario {one.scenario!r}: {one.error}")
        return found


MEMORY_ERRORS = ("OutOfMemoryError", "MemoryError")
