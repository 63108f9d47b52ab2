import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_steering_plugin.adapters.sae_lens import SteeringDictionary
from sae_steering_plugin.organisms import list_organisms, load_organism
from sae_steering_plugin.runs import rollout_plan
from sae_steering_plugin.runs.parts import collect
from sae_steering_plugin.runs.plan import plan_json, read_plan, units_of
from sae_steering_plugin.runs.references import ModelRef, VectorRef
from sae_steering_plugin.runs.rollout_plan import (
    BASE,
    ArmSpec,
    RolloutPlan,
    RolloutWorker,
    Shift,
    random_arms,
    steering_arms,
)
from sae_steering_plugin.runs.rollouts import dose_response, run_rollouts
from sae_steering_plugin.runs.runner import InProcess, run_shard
from sae_steering_plugin.runs.scenarios import (
    TOOLS,
    read_scenarios,
    read_tools,
    tool_name,
    tool_result,
)
from sae_steering_plugin.runs.transcripts import Rollouts
from sae_steering_plugin.types import DECODE, Recipe, Scenario, SteeringVector

WIDTH = 8
SITE = "blocks.2.hook_resid_post"


def saved(folder: Path, *labels: str, width: int = WIDTH, mean_norm: float = 4.0) -> Path:
    generator = torch.Generator().manual_seed(0)
    recipe = Recipe("x", mean_norm=mean_norm)
    SteeringDictionary.from_vectors(
        [
            SteeringVector(torch.randn(width, generator=generator), SITE, recipe, label=label)
            for label in labels
        ]
    ).save_model(folder)
    return folder


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VectorRef]:
    folder = saved(tmp_path_factory.mktemp("vectors"), "a", "b")
    return {one.label: one for one in VectorRef.all_of(folder)}


def scenario(name: str, user: str = "go") -> Scenario:
    return Scenario(name, "data", "s", user, ("ask_user",), {"ask_user": ("yes",)})


def plan_of(*arms: ArmSpec, **changes: Any) -> RolloutPlan:
    names = changes.pop("scenarios", "abcde")
    return RolloutPlan(
        ModelRef("m", "weights"),
        tuple(scenario(name) for name in names),
        arms or (BASE,),
        **{"block": 2, **changes},
    )


# The plan -----------------------------------------------------------------------------------------


def test_units_are_arms_times_blocks_in_the_order_of_the_rows(named: Any) -> None:
    plan = plan_of(BASE, *steering_arms(named, strengths=(1.0,)))
    found = [
        (unit.coordinates["arm"], "".join(unit.coordinates["scenarios"])) for unit in units_of(plan)
    ]
    assert found == [
        (name, block) for name in ("base", "a +1 all", "b +1 all") for block in ("ab", "cd", "e")
    ]
    assert len(plan) == 15


def test_a_plan_comes_back_from_its_text(named: Any) -> None:
    arms = (
        BASE,
        *steering_arms(named, strengths=(0.5, -1.0), positions=("all", DECODE)),
        *random_arms(named["a"], seeds=(0, 1), strengths=(0.5,)),
    )
    plan = plan_of(*arms, temperature=0.0, top_p=0.9)
    assert read_plan(plan_json(plan), RolloutPlan) == plan
    assert read_plan(plan_json(plan), RolloutPlan).key == plan.key


def keys(plan: RolloutPlan) -> dict[tuple[str, str], str]:
    return {
        (unit.coordinates["arm"], "".join(unit.coordinates["scenarios"])): unit.key
        for unit in units_of(plan)
    }


def changed(one: RolloutPlan, other: RolloutPlan) -> set[tuple[str, str]]:
    """The units of `other` that `one` has not."""
    known = set(keys(one).values())
    return {place for place, key in keys(other).items() if key not in known}


def test_an_edit_changes_the_keys_of_what_it_touches_and_no_other(named: Any) -> None:
    weak, strong = (steering_arms({"a": named["a"]}, strengths=(s,))[0] for s in (0.5, 1.0))
    plan = plan_of(BASE, weak)
    assert not changed(plan, plan_of(weak, BASE))
    assert changed(plan, plan_of(BASE, weak, strong)) == {
        (strong.name, block) for block in ("ab", "cd", "e")
    }
    assert changed(plan, plan_of(BASE, weak, scenarios="abcdef")) == {
        ("base", "ef"),
        (weak.name, "ef"),
    }
    louder = replace(weak, shifts=(replace(weak.shifts[0], length=9.0),))
    assert {arm for arm, _ in changed(plan, plan_of(BASE, louder))} == {weak.name}
    reworded = replace(weak, method="renamed", trait="t", unit="raw")
    assert not changed(plan, plan_of(BASE, reworded))
    moved = replace(weak.shifts[0], vector=replace(weak.shifts[0].vector, folder="/elsewhere"))
    assert not changed(plan, plan_of(BASE, replace(weak, shifts=(moved,))))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"max_turns": 2},
        {"max_new_tokens": 5},
        {"temperature": 0.0},
        {"top_p": 0.5},
        {"prose": True},
        {"batch_size": 3},
        {"tools": TOOLS[:3]},
        {"model": ModelRef("m", "other weights")},
        {"model": ModelRef("m", "weights", dtype="bfloat16")},
    ],
    ids=str,
)
def test_what_can_change_a_number_changes_every_key(change: dict[str, Any]) -> None:
    plan = plan_of()
    assert len(changed(plan, replace(plan, **change))) == 3


def test_where_the_model_lies_changes_no_key() -> None:
    plan = plan_of()
    assert replace(plan, model=ModelRef("elsewhere", "weights")).key == plan.key


def test_another_task_under_the_same_name_is_another_unit() -> None:
    plan = plan_of()
    other = replace(plan, scenarios=(*plan.scenarios[:4], scenario("e", "something else")))
    assert changed(plan, other) == {("base", "e")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scenarios": "aa"}, "scenario 'a' occurs more than once"),
        ({"scenarios": ""}, "at least one scenario and one arm"),
        ({"block": 0}, "batch_size must be at least 1"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"tools": TOOLS[:1]}, "offers a tool 'ask_user' without a schema"),
    ],
)
def test_what_would_spoil_the_run_is_refused_at_once(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_of(**changes)
    with pytest.raises(ValueError, match="arm 'base' occurs more than once"):
        plan_of(BASE, BASE)


# Arms ---------------------------------------------------------------------------------------------


def test_arms_are_those_of_a_dose_response(named: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same names, descriptions and edits, in the same order."""
    seen: list[Any] = []

    def instead(model: Any, scenarios: Any, *, arms: Any, **loop: Any) -> Any:
        seen.extend(arms)
        raise InterruptedError

    monkeypatch.setattr("sae_steering_plugin.runs.rollouts.run_rollouts", instead)
    vector = named["a"].load()
    with pytest.raises(InterruptedError):
        dose_response(
            None,
            [scenario("x")],
            {"a": vector},
            strengths=(0.5, -1.0),
            positions=(DECODE,),
            baselines={"b": named["b"].load()},
            controls=2,
        )
    options: dict[str, Any] = {"strengths": (0.5, -1.0), "positions": ("decode",)}
    specs = (
        BASE,
        *steering_arms({"a": named["a"]}, **options, traits={}),
        *steering_arms({"b": named["b"]}, **options, traits={}, like={"b": named["a"]}),
        *random_arms(named["a"], seeds=range(2), **options),
    )
    loaded = {one: one.load() for one in named.values()}
    ours = [spec.arm(loaded) for spec in specs]
    assert [arm.name for arm in ours] == [arm.name for arm in seen]
    for one, other in zip(ours, seen, strict=True):
        assert one.details() == other.details()
        assert len(one.edits) == len(other.edits)
        for mine, theirs in zip(one.edits, other.edits, strict=True):
            assert (mine.site, mine.positions) == (theirs.site, theirs.positions)
            assert torch.equal(mine.change.step(), theirs.change.step())


def test_an_arm_of_several_shifts_adds_them(named: Any) -> None:
    both = ArmSpec("both", (Shift(named["a"], 1.0), Shift(named["b"], -2.0)))
    loaded = {one: one.load() for one in named.values()}
    steps = [edit.change.step()[0] for edit in both.arm(loaded).edits]
    assert torch.allclose(steps[0], loaded[named["a"]].direction)
    assert torch.allclose(steps[1], -2 * loaded[named["b"]].direction)
    assert both.arm().details() == {"method": "both", "positions": "all"}


def test_a_vector_is_for_its_own_trait_unless_told(named: Any) -> None:
    (own,) = steering_arms({"a": named["a"]}, strengths=(1.0,))
    (told,) = steering_arms({"a": named["a"]}, strengths=(1.0,), traits={"a": "risk"})
    assert (own.trait, told.trait) == ("a", "risk")
    assert own.displacement == 1.0 and own.shifts[0].length == 4.0


def test_a_unit_that_the_recipe_cannot_serve_is_refused(tmp_path: Path) -> None:
    reference = VectorRef.of(saved(tmp_path / "v", "a"))
    with pytest.raises(ValueError, match="cannot be measured in 'max_activation'"):
        steering_arms({"a": reference}, strengths=(1.0,), unit="max_activation")


# Rows ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list_organisms())
def organism(request: pytest.FixtureRequest) -> Any:
    return load_organism(request.param, saes=())


DOMAINS = ("coding", "research", "communication", "data")


def small(organism: Any, folder: Path, **changes: Any) -> RolloutPlan:
    """Five scenarios in three arms, two turns of at most 24 tokens."""
    width = int(organism.model.cfg.d_model)
    (reference,) = VectorRef.all_of(saved(folder, "a", width=width, mean_norm=20.0))
    arms = (
        BASE,
        *steering_arms({"a": reference}, strengths=(5.0,)),
        *random_arms(reference, seeds=(0,), strengths=(1.0,), positions=("decode",)),
    )
    scenarios = changes.pop("scenarios", None) or tuple(organism.world.scenarios(5))
    return RolloutPlan(
        ModelRef.of(organism.name),
        scenarios,
        arms,
        **{"max_turns": 2, "max_new_tokens": 24, "block": 2, **changes},
    )


def test_the_collected_rows_are_those_of_one_direct_run(organism: Any, tmp_path: Path) -> None:
    plan = small(organism, tmp_path / "v")
    assert InProcess().run(plan, tmp_path, progress=False).complete
    found = plan.rollouts(collect(plan, tmp_path))
    loaded = {shift.vector: shift.vector.load() for spec in plan.arms for shift in spec.shifts}
    direct = run_rollouts(
        organism.model,
        plan.scenarios,
        arms=[spec.arm(loaded) for spec in plan.arms],
        max_turns=2,
        max_new_tokens=24,
        progress=False,
    )
    assert found.rollouts == direct.rollouts
    assert found.table().equals(direct.table())
    texts = [[one.messages for one in found.arm(name)] for name in ("base", "a +5 all")]
    assert texts[0] != texts[1]  # the edit did something
    for name in found.names:
        assert {**found.arms[name], "model": ""} == {**direct.arms[name], "model": ""}


def test_shards_and_another_order_of_units_give_the_same_bits(
    organism: Any, tmp_path: Path
) -> None:
    plan = small(organism, tmp_path / "v", max_turns=1)
    InProcess().run(plan, tmp_path / "one", progress=False)
    for index in (1, 0):
        run_shard(plan, tmp_path / "two", index, 2, progress=False)
    one, two = (collect(plan, tmp_path / name) for name in ("one", "two"))
    assert one.digest == two.digest
    assert one.to_pandas()["batch_size"].unique().tolist() == [plan.batch_size]


def test_the_released_scenarios_run_and_answer_with_their_own_results(
    organism: Any, tmp_path: Path, data: Path
) -> None:
    released = data / "agent-traits"
    tools = read_tools(released / "tool_schemas.json")
    every = read_scenarios(released / "scenarios.jsonl", tools=[tool_name(one) for one in tools])
    chosen = tuple(next(one for one in every if one.domain == word) for word in DOMAINS)
    plan = small(organism, tmp_path / "v", scenarios=chosen, tools=tools, max_new_tokens=32)
    assert InProcess().run(plan, tmp_path, progress=False).complete
    found = plan.rollouts(collect(plan, tmp_path))
    known = {one.id: one for one in chosen}
    assert [one.scenario for one in found.arm("base")] == list(known)
    answers = 0
    for one in found:
        scenario, used = known[one.scenario], Counter[str]()
        assert [one.messages[0]["content"], one.messages[1]["content"]] == [
            *(scenario.system, scenario.user)
        ]
        for message in (m for m in one.messages if m["role"] == "tool"):
            name = message["name"]
            assert message["content"] == tool_result(scenario, name, used[name])
            used[name] += 1
            answers += 1
    assert answers > 0


# Memory -------------------------------------------------------------------------------------------


class Cramped(RolloutWorker):
    """A worker without a model whose rollouts fit into memory up to a batch size."""

    def __init__(self, plan: RolloutPlan, fits: int) -> None:
        self.plan, self.model, self.fits, self.tried = plan, None, fits, []
        self.arms = {spec.name: spec.arm({}) for spec in plan.arms}
        self.scenarios = {one.id: one for one in plan.scenarios}

    def loop(self, model: Any, scenarios: Any, *, batch_size: int, **options: Any) -> Rollouts:
        from sae_steering_plugin.runs.transcripts import Rollout

        self.tried.append(batch_size)
        error = "OutOfMemoryError: CUDA out of memory" if batch_size > self.fits else ""
        return Rollouts(tuple(Rollout(one.id, "base", (), 1, (), error=error) for one in scenarios))


def test_a_rollout_without_memory_halves_the_batch_and_the_row_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(batch_size=16)
    worker = Cramped(plan, fits=5)
    monkeypatch.setattr(rollout_plan, "run_rollouts", worker.loop)
    table = worker.run(units_of(plan)[0])
    assert worker.tried == [16, 8, 4] and table["batch_size"].to_pylist() == [4, 4]

    worker = Cramped(plan, fits=0)
    monkeypatch.setattr(rollout_plan, "run_rollouts", worker.loop)
    with pytest.raises(torch.OutOfMemoryError, match="scenario 'a': OutOfMemoryError: CUDA out"):
        worker.run(units_of(plan)[0])
    assert worker.tried == [16, 8, 4, 2, 1]


def test_a_strength_that_is_not_known_is_not_a_number(named: Any) -> None:
    assert math.isnan(ArmSpec("x", (Shift(named["a"], 1.0),)).arm().strength)
