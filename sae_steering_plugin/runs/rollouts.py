"""Agent rollouts under steering, and the dose-response of a vector with its controls.

`run_rollouts` runs scenarios in one or several arms; `dose_response` builds the arms of a sweep
(methods x strengths x positions, random directions, dense baselines), runs them in shared batches
and compares each with the unsteered arm. Nothing that a model writes is ever executed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ..adapters import engine
from ..edits.shift import Add
from ..effects.compare import compare
from ..effects.contrast import corrected
from ..types import ALL, Change, Edit, Effect, Positions, Recipe, Scenario, SteeringVector, Unit
from .agent_loop import (
    Conversation,
    Generate,
    Loop,
    Render,
    Sampling,
    end_of_turn_ids,
)
from .scenarios import TOOLS, tool_name
from .transcripts import Rollouts

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Arm", "DoseResponse", "compare", "dose_response", "random_vector", "run_rollouts"]


@dataclass(frozen=True, eq=False)
class Arm:
    """One way of steering (or, without edits, the base), and what an `Effect` will say of it.

    `displacement` is the length of the change against the mean residual norm, where known.
    """

    name: str
    edits: tuple[Edit | Change, ...] = ()
    method: str = ""
    strength: float = math.nan
    unit: str = ""
    positions: str = ""
    displacement: float = math.nan
    trait: str = ""

    def details(self) -> dict[str, Any]:
        """The fields that are known, under the names `Effect` has for them."""
        given = {
            "method": self.method or self.name,
            "strength": self.strength,
            "unit": self.unit,
            "positions": self.positions,
            "displacement": self.displacement,
            "trait": self.trait,
        }
        return {key: value for key, value in given.items() if value == value and value != ""}

    def bound(self) -> tuple[Edit, ...]:
        """The edits as `Edit` records. Raises ValueError when one is bound to rows already."""
        edits = tuple(edit if isinstance(edit, Edit) else Edit(edit) for edit in self.edits)
        if any(edit.rows is not None for edit in edits):
            raise ValueError(
                f"arm {self.name!r}: rows are given out by the loop; leave Edit.rows None"
            )
        return edits


def run_rollouts(
    model: Any,
    scenarios: Sequence[Scenario],
    edits: Sequence[Edit | Change] = (),
    *,
    arms: Sequence[Arm] | None = None,
    tools: Sequence[Mapping[str, Any]] = TOOLS,
    max_turns: int = 5,
    max_new_tokens: int = 256,
    temperature: float = 0.6,
    top_p: float | None = None,
    seed: int = 42,
    batch_size: int = 64,
    stop_ids: Sequence[int] | None = None,
    prose: bool = False,
    tokenizer: Any = None,
    generate: Generate | None = None,
    render: Render | None = None,
    progress: bool = True,
) -> Rollouts:
    """Each scenario run once in each arm, by arm and then in the order given.

    Without `arms` there is one: "base", or "steered" when `edits` are given. A turn's calls are
    answered from the scenario's cached results and the loop goes on; it ends at a turn without a
    call or after `max_turns`. Defaults are those of arXiv 2603.16335's code, except
    `max_new_tokens` (1,024 there).

    A rollout samples the same text whatever else is in the run: noise is keyed by `seed`, scenario
    and turn, shared by all arms. Rounding differs with the batch's shape, so a tie of two logits
    within rounding may still fall either way. `prose=True` also counts calls written inside
    sentences, as the source does. `render` replaces the tokenizer's chat template, `generate` the
    engine. An exception ends its own rollout and is recorded there; when every rollout fails at
    once it is raised.
    """
    if arms is not None and edits:
        raise ValueError("pass edits for one arm or arms for several, not both")
    if arms is None:
        arms = [Arm("steered" if edits else "base", tuple(edits))]
    check_run(scenarios, arms, tools, max_turns, max_new_tokens, temperature, batch_size)
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    sampling = Sampling(
        max_new_tokens,
        float(temperature),
        top_p,
        seed,
        tuple(stop_ids) if stop_ids is not None else end_of_turn_ids(tokenizer),
    )
    schemas = {tool_name(schema): schema for schema in tools}
    conversations = [
        Conversation(
            scenario, arm.name, bound, tuple(schemas[name] for name in scenario.tools), max_turns
        )
        for arm in arms
        for bound in (arm.bound(),)
        for scenario in scenarios
    ]
    from tqdm.auto import tqdm

    with tqdm(
        total=len(conversations), desc="rollouts", unit="rollout", disable=not progress
    ) as bar:
        Loop(
            model,
            tokenizer,
            generate or engine.generate,
            render or chat_template(tokenizer),
            sampling,
            d_vocab=int(model.cfg.d_vocab),
            n_ctx=int(model.cfg.n_ctx),
            batch_size=batch_size,
            prose=prose,
            keep_caches=generate is None,
            finished=bar.update,
        ).run(conversations)
    settings = {
        "model": str(model.cfg.model_name),
        "seed": seed,
        "temperature": float(temperature),
        "top_p": top_p,
        "max_turns": max_turns,
        "max_new_tokens": max_new_tokens,
        "prose": prose,
    }
    return Rollouts(
        tuple(one.rollout() for one in conversations),
        {arm.name: {**arm.details(), "model": settings["model"]} for arm in arms},
        settings,
    )


def check_run(
    scenarios: Sequence[Scenario],
    arms: Sequence[Arm],
    tools: Sequence[Mapping[str, Any]],
    max_turns: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
) -> None:
    """Raise ValueError for whatever would spoil the run, before the first forward pass."""
    if not scenarios or not arms:
        raise ValueError("a run needs at least one scenario and one arm")
    for what, names in (
        ("scenario", [scenario.id for scenario in scenarios]),
        ("arm", [arm.name for arm in arms]),
        ("tool", [tool_name(schema) for schema in tools]),
    ):
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{what} {repeated[0]!r} occurs more than once")
    known = {tool_name(schema) for schema in tools}
    for scenario in scenarios:
        if unknown := [name for name in scenario.tools if name not in known]:
            raise ValueError(
                f"scenario {scenario.id!r} offers a tool {unknown[0]!r} without a schema; "
                f"known tools: {', '.join(sorted(known))}. Pass tools="
            )
    if min(max_turns, max_new_tokens, batch_size) < 1:
        raise ValueError("max_turns, max_new_tokens and batch_size must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or more")


def chat_template(tokenizer: Any) -> Render:
    """Rendering by the tokenizer's own chat template, tools included, thinking off.

    Raises ValueError when the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "this tokenizer has no chat template: use an instruction-tuned model, or pass "
            "render=, a function from (messages, tools) to the prompt text"
        )

    def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,
            )
        )

    return render


# Dose-response ----------------------------------------------------------------------------------

EditMaker = Callable[[float, Positions], Sequence[Edit]]
"""Strength and positions in, edits out: for changes that no single vector describes."""

Steerings = Mapping[str, SteeringVector | EditMaker]


@dataclass(frozen=True, eq=False)
class DoseResponse:
    """Effects of a sweep: the vectors', the dense baselines', and one per random direction.

    `effects` and `baselines` were corrected together; `controls` are not part of that family.
    `rollouts` holds every transcript, base first, so any other outcome can be compared later.

    A small p value says that an arm differs from the base, not that its direction matters: with
    shared sampling noise a random push is told apart from none just as well (see
    `share_significant` of `control_summary`). What the direction adds is `control_p` of `table`.
    """

    effects: tuple[Effect, ...]
    baselines: tuple[Effect, ...]
    controls: tuple[Effect, ...]
    rollouts: Rollouts
    outcome: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def control_summary(self) -> pd.DataFrame:
        """Per positions and strength: how many random directions, their mean and largest |d|."""
        import pandas as pd

        rows = [
            {
                "positions": one.positions,
                "strength": one.strength,
                "displacement": one.displacement,
                "size": abs(one.d),
                "rejected": one.p_value < 0.05,
                "valid_rate": one.valid_rate,
            }
            for one in self.controls
        ]
        columns = ["positions", "strength", "displacement", "size", "rejected", "valid_rate"]
        return (
            pd.DataFrame(rows, columns=columns)
            .groupby(["positions", "strength"], sort=False)
            .agg(
                displacement=("displacement", "first"),
                seeds=("size", "size"),
                mean_abs_d=("size", "mean"),
                max_abs_d=("size", "max"),
                share_significant=("rejected", "mean"),
                valid_rate=("valid_rate", "mean"),
            )
            .reset_index()
        )

    def table(self) -> pd.DataFrame:
        """One row per effect and baseline, with the random directions of its strength beside it.

        `control_p` is the rank of |d| among theirs, (1 + those at least as large) / (1 + seeds):
        with ten seeds it cannot fall below 1/11. NaN where no random direction ran.
        """
        import pandas as pd

        family = [("vector", one) for one in self.effects]
        family += [("baseline", one) for one in self.baselines]
        return pd.DataFrame(
            {"role": role, **one.to_dict(), **self.beside(one)} for role, one in family
        )

    def beside(self, one: Effect) -> dict[str, int | float]:
        """How the random directions at an effect's positions and magnitude compare with it."""
        sizes = [
            abs(control.d)
            for control in self.controls
            if control.positions == one.positions and control.strength == abs(one.strength)
        ]
        larger = sum(size >= abs(one.d) for size in sizes)
        return {
            "control_seeds": len(sizes),
            "control_mean_abs_d": sum(sizes) / len(sizes) if sizes else math.nan,
            "control_max_abs_d": max(sizes, default=math.nan),
            "control_p": (1 + larger) / (1 + len(sizes)) if sizes else math.nan,
        }

    def best(self, *, sign: int = 1, valid: float = 0.95) -> Effect:
        """The largest effect in the direction of `sign` whose valid rate is at least `valid`.

        Raises ValueError when no arm is that valid. Chosen on these items, so report it on others.
        """
        fit = [one for one in self.effects if one.valid_rate >= valid]
        if not fit:
            highest = max((one.valid_rate for one in self.effects), default=math.nan)
            raise ValueError(
                f"no arm reaches a valid rate of {valid:g}; the highest is {highest:g}"
            )
        return max(fit, key=lambda one: sign * one.d)


def dose_response(
    model: Any,
    scenarios: Sequence[Scenario],
    vectors: Sequence[SteeringVector] | Steerings,
    *,
    strengths: Sequence[float],
    unit: Unit = "norm",
    positions: Sequence[Positions] = (ALL,),
    outcome: str = "autonomy",
    sign: int = 1,
    baselines: Sequence[SteeringVector] | Mapping[str, SteeringVector] = (),
    controls: int = 10,
    control_strengths: Sequence[float] | None = None,
    test: str | None = None,
    correction: str = "holm",
    ddof: int = 1,
    level: float = 0.95,
    resamples: int = 2000,
    trait: str = "",
    seed: int = 42,
    **loop: Any,
) -> DoseResponse:
    """The effect of each vector on `outcome` at each strength and position rule, with controls.

    Every arm runs in shared batches with the unsteered one, on the same scenarios and the same
    sampling noise. A vector's displacement at a strength is `vector.displacement(strength, unit)`.
    `baselines` (dense vectors) and `controls` random directions (seeded 0, 1, ...) are given the
    displacement of the first of `vectors` at their site; random directions run at the magnitudes of
    `control_strengths` (all strengths when None). `outcome` is a column of the rollouts' table.
    `correction` spans vectors and baselines. `loop` goes to `run_rollouts`.

    A mapping gives the methods their names, and may hold an `EditMaker` instead of a vector (then
    it has no displacement and no control of its own). Raises ValueError for names that repeat and
    for a baseline whose site no vector has.
    """
    methods, dense = named(vectors), named(baselines)
    if repeated := sorted(set(methods) & set(dense)):
        raise ValueError(f"{repeated[0]!r} is both a vector and a baseline: give them other names")
    references: dict[str, SteeringVector] = {}
    for one in methods.values():
        if isinstance(one, SteeringVector):
            references.setdefault(one.hook_name, one)
    if misplaced := [one for one in dense.values() if one.hook_name not in references]:
        raise ValueError(
            f"baseline {misplaced[0].label!r} acts at {misplaced[0].hook_name!r}, where no vector "
            f"does: an equal displacement needs one site ({', '.join(references)})"
        )
    if controls and not references:
        raise ValueError("random directions need a vector to take their length from: controls=0")
    magnitudes = sorted({abs(s) for s in (control_strengths or strengths)} - {0.0})
    places = [(rule, strength) for rule in positions for strength in strengths]

    def shift(
        name: str, vector: SteeringVector, like: SteeringVector, s: float, rule: Positions
    ) -> Arm:
        length = like.displacement(s, unit)
        norm = like.recipe.mean_norm
        return Arm(
            f"{name} {s:+g} {rule}",
            (Edit(Add(vector, strength=length, unit="unit"), vector.hook_name, rule),),
            method=name,
            strength=float(s),
            unit=unit,
            positions=str(rule),
            displacement=abs(length) / norm if norm else math.nan,
            trait=trait,
        )

    def made(name: str, maker: EditMaker, s: float, rule: Positions) -> Arm:
        edits = tuple(maker(s, rule))
        return Arm(f"{name} {s:+g} {rule}", edits, name, float(s), unit, str(rule), trait=trait)

    steered = [
        shift(name, one, one, s, rule)
        if isinstance(one, SteeringVector)
        else made(name, one, s, rule)
        for name, one in methods.items()
        for rule, s in places
    ]
    matched = [
        shift(name, one, references[one.hook_name], s, rule)
        for name, one in dense.items()
        for rule, s in places
    ]
    crowd = [
        replace(
            shift(f"random {number}{suffix}", random_vector(like, number), like, s, rule),
            method="random",
        )
        for suffix, like in suffixed(references)
        for number in range(controls)
        for rule in positions
        for s in magnitudes
    ]
    rollouts = run_rollouts(
        model, scenarios, arms=[Arm("base"), *steered, *matched, *crowd], seed=seed, **loop
    )
    base = rollouts.arm("base")

    def effects(arms: Sequence[Arm]) -> list[Effect]:
        return [
            compare(
                base,
                rollouts.arm(arm.name),
                outcome=outcome,
                test=test,
                sign=sign if arm.strength >= 0 else -sign,
                ddof=ddof,
                level=level,
                resamples=resamples,
                seed=seed,
            )
            for arm in arms
        ]

    family = corrected([*effects(steered), *effects(matched)], correction=correction)
    settings = {
        "strengths": [float(s) for s in strengths],
        "unit": unit,
        "positions": [str(rule) for rule in positions],
        "controls": controls,
        "correction": correction,
        **rollouts.settings,
    }
    return DoseResponse(
        family[: len(steered)],
        family[len(steered) :],
        tuple(effects(crowd)),
        rollouts,
        outcome,
        settings,
    )


def named(vectors: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Vectors under their names: the mapping's keys, else the label, else the method."""
    if isinstance(vectors, Mapping):
        return dict(vectors)
    names = [vector.label or vector.recipe.method for vector in vectors]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"two vectors are called {repeated[0]!r}: pass a mapping from names to vectors"
        )
    return dict(zip(names, vectors, strict=True))


def suffixed(references: Mapping[str, SteeringVector]) -> list[tuple[str, SteeringVector]]:
    """Each site's reference vector with what tells its controls apart: nothing at a single site."""
    if len(references) == 1:
        return [("", next(iter(references.values())))]
    return [(f" at {site}", vector) for site, vector in references.items()]


def random_vector(like: SteeringVector, seed: int) -> SteeringVector:
    """A uniformly random direction with the length, site and mean norm of `like`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(like.vector), generator=generator)
    recipe = Recipe(
        method="random",
        positive="nothing: a control",
        model_name=like.recipe.model_name,
        seed=seed,
        mean_norm=like.recipe.mean_norm,
    )
    vector = drawn / drawn.norm() * like.norm
    return SteeringVector(vector, like.hook_name, recipe, label=f"random {seed}")
