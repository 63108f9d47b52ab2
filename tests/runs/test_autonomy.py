"""The autonomy protocol: its conditions, its statistics on planted rollouts, its runs and files."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sae_steering_plugin.adapters.sae_lens import SteeringDictionary
from sae_steering_plugin.cli import app
from sae_steering_plugin.effects.contrast import corrected
from sae_steering_plugin.organisms import list_organisms
from sae_steering_plugin.runs import autonomy as protocol_module
from sae_steering_plugin.runs.autonomy import (
    AutonomyProtocol,
    analysed,
    autonomy_protocol,
    counted,
    mean_correlation,
    run_autonomy,
)
from sae_steering_plugin.runs.autonomy_arms import RANDOM, condition_arms, control_arms, middle
from sae_steering_plugin.runs.autonomy_vectors import KINDS, PROBE, TraitVector, TraitVectors
from sae_steering_plugin.runs.references import ModelRef, VectorRef
from sae_steering_plugin.runs.rollout_evaluation import rollouts
from sae_steering_plugin.runs.rollout_plan import BASE, RolloutPlan
from sae_steering_plugin.runs.scenarios import TOOLS, read_scenarios
from sae_steering_plugin.runs.transcripts import PROXIES, Rollout, Rollouts
from sae_steering_plugin.types import Recipe, Scenario, SteeringVector
from tests.local import traits_file

ROOT = Path(__file__).resolve().parents[2]
TRAITS = tuple(PROXIES)
STRENGTHS = (0.25, 0.5, 1.0)


def vector_set(folder: Path, traits: tuple[str, ...] = TRAITS, draws: int = 2) -> TraitVectors:
    """Random vectors in the places of the built ones."""
    generator = torch.Generator().manual_seed(0)
    recipe = Recipe("x", mean_norm=4.0)
    named = [
        (trait, kind, draw, f"{trait} {kind} {draw}")
        for trait in traits
        for kind in KINDS
        for draw in range(draws if kind in KINDS[1:3] else 1)
    ]
    SteeringDictionary.from_vectors(
        [
            SteeringVector(torch.randn(8, generator=generator), SITE, recipe, label=label)
            for *_, label in named
        ]
    ).save_model(folder)
    references = {one.label: one for one in VectorRef.all_of(folder)}
    scores = {trait: {"r2": 0.9, "text_r2": 0.4, "sample_r2": 0.99} for trait in traits}
    return TraitVectors(
        tuple(TraitVector(t, kind, draw, references[label]) for t, kind, draw, label in named),
        4.0,
        SITE,
        "an sae",
        scores,
        {"probe": "ridge", "pairs": 12},
    )


SITE = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> TraitVectors:
    return vector_set(tmp_path_factory.mktemp("vectors"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> TraitVectors:
    return vector_set(tmp_path_factory.mktemp("single"), ("autonomy",), draws=1)


# Conditions ---------------------------------------------------------------------------------------


def test_five_traits_make_the_36_conditions(vectors: TraitVectors) -> None:
    arms = condition_arms(vectors.probes, STRENGTHS)
    assert len(arms) == 36 == len({arm.name for arm in arms}) and arms[0] == BASE
    for trait in TRAITS:
        mine = [(str(a.positions), a.strength) for a in arms if a.trait == trait]
        expected = [(rule, s) for rule in ("all", "prefill") for s in STRENGTHS]
        assert mine == [*expected, ("decode", 0.5)]


def test_the_middle_strength_is_the_matrix_s() -> None:
    assert [middle(s) for s in [(3.0, 1.0, 2.0), (1.0, 2.0), (5.0,)]] == [2, 1, 5]


def test_controls_have_the_displacement_of_the_probes(vectors: TraitVectors) -> None:
    arms = control_arms(vectors, STRENGTHS, 10)
    kinds: dict[str, int] = {}
    for arm in arms:
        kinds[arm.method] = kinds.get(arm.method, 0) + 1
        assert str(arm.positions) == "all"
        (shift,) = arm.shifts
        assert shift.length == pytest.approx(arm.strength * 4.0)
    assert kinds == {RANDOM: 30, **dict.fromkeys(KINDS[1:3], 10), **dict.fromkeys(KINDS[3:], 5)}
    seeds = {arm.shifts[0].random for arm in arms if arm.method == RANDOM}
    assert seeds == set(range(10))
    assert len({arm.name for arm in arms}) == len(arms)


# Planted rollouts ---------------------------------------------------------------------------------

Behave = Callable[[int, float], tuple[str, ...]]
"""(scenario number, strength) -> the calls of that rollout."""


def scenario(number: int) -> Scenario:
    return Scenario(f"s{number:02d}", "data", "s", "go", ("ask_user",), {"ask_user": ("yes",)})


def protocol_of(vectors: TraitVectors, n: int, seeds: int = 2, **options: Any) -> AutonomyProtocol:
    crowd = control_arms(vectors, STRENGTHS, seeds) if seeds else ()
    arms = (*condition_arms(vectors.probes, STRENGTHS), *crowd)
    plan = RolloutPlan(ModelRef("m", "weights"), tuple(map(scenario, range(n))), arms)
    return AutonomyProtocol(plan, vectors, STRENGTHS, seeds, resamples=200, **options)


def rolled(protocol: AutonomyProtocol, behave: Mapping[str, Behave], base: Behave) -> Rollouts:
    """Rollouts in which a method's arms behave as told, and all others as the base does."""
    rows = [
        Rollout(
            f"s{number:02d}",
            arm.name,
            ({"role": "assistant", "content": ""},),
            turns=len(calls) + 1,
            calls=calls,
            domain="data",
        )
        for arm in protocol.plan.arms
        for number in range(len(protocol.plan.scenarios))
        for calls in (behave.get(arm.method, base)(number, arm.strength or 0.0),)
    ]
    details = {arm.name: {**arm.arm().details(), "model": "m"} for arm in protocol.plan.arms}
    return Rollouts(tuple(rows), details, {"max_turns": 5, "max_new_tokens": 64, "temperature": 0})


def asks(share: int) -> Behave:
    """Asks in the first `share` scenarios, then searches once or twice."""
    return lambda number, _: ("ask_user",) * (number < share) + ("web_search",) * (1 + number % 2)


def test_the_paper_s_cell_comes_out_as_the_paper_s_code_gives_it(single: TraitVectors) -> None:
    """27/50 against 46/50 without a question: d 0.9375 (ddof 1), 0.9470 (ddof 0), p 2.10e-5."""
    for ddof, d in ((1, 0.9375), (0, 0.9470)):
        protocol = protocol_of(single, 50, seeds=0, ddof=ddof)
        report = analysed(protocol, rolled(protocol, {"autonomy": asks(4)}, asks(23)))
        cell = report.matrix.cell("autonomy", "autonomy")
        assert cell.d == pytest.approx(d, abs=5e-5) and cell.ddof == ddof
        assert cell.unpaired_p == pytest.approx(2.10e-5, rel=2e-3)
        assert (cell.base_mean, cell.arm_mean) == (27 / 50, 46 / 50)
        mirror = report.matrix.cell("autonomy", "deference")
        assert mirror.d == -cell.d and mirror.p_adjusted == cell.p_adjusted


def risky(number: int, strength: float) -> tuple[str, ...]:
    """As the base, but the stronger, the more scenarios run code where it searches."""
    ran = "code_execute" if number % 10 < 10 * strength else "web_search"
    return (*asks(20)(number, strength)[:-1], ran)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The risk vector raises risk with its strength, persistence adds calls, others do nothing."""
    protocol = protocol_of(vector_set(tmp_path_factory.mktemp("report"), draws=1), 40)
    busy: Behave = lambda number, s: asks(20)(number, s) + ("web_search",) * (number % 3)  # noqa: E731
    return analysed(protocol, rolled(protocol, {"risk": risky, "persistence": busy}, asks(20)))


def test_a_planted_dose_response_is_read_and_tiered(report: Any) -> None:
    tiers = {one.method: one.tier for one in report.tiers}
    assert tiers["risk"] == "tier 1"
    assert {tiers[trait] for trait in ("autonomy", "tool_use", "deference")} == {
        "failed (epiphenomenal)"
    }
    (curve,) = [one for one in report.doses if one.method == "risk" and one.positions == "all"]
    assert curve.onset["up"] == 0.25 and curve.breakdown["up"] is None
    assert curve.peak["up"] == 1.0 and curve.rise.rho == pytest.approx(1.0)
    sizes = [one.effect.d for one in report.own("risk") if one.effect.positions == "all"]
    assert sizes == sorted(sizes) and sizes[0] > 0


def test_every_condition_stands_on_its_own_proxy_with_turns_and_calls(report: Any) -> None:
    rows = report.condition_rows()
    assert len(rows) == 35
    table = report.rollouts.table().groupby("arm")[["turns", "n_calls", "asks"]].mean()
    for one in report.effects:
        means = table.loc[one.arm]
        assert (one.turns, one.calls, one.asks) == pytest.approx(tuple(means))
        assert (one.base_turns, one.base_calls) == pytest.approx(
            tuple(table.loc["base", ["turns", "n_calls"]])
        )
    assert len(report.effects) == 35 * 5 and len(report.controls) == (6 + 10 + 10) * 5


def test_own_proxies_are_one_family_and_nothing_else_is_corrected(report: Any) -> None:
    own = [one.effect for one in report.effects if one.effect.method == one.effect.outcome]
    expected = corrected([replace(one, correction="none") for one in own])
    assert [one.p_adjusted for one in own] == [one.p_adjusted for one in expected]
    rest = [one.effect for one in report.effects if one.effect.method != one.effect.outcome]
    assert {one.correction for one in rest} == {"none"}


def test_mirrors_are_counted_once(report: Any) -> None:
    matrix = report.matrix
    distinct = [one for one in matrix.effects if one.outcome != "deference"]
    assert len(distinct) == 20 and report.settings["distinct_cells"] == 20
    assert "holm over 20 cells" in matrix._repr_html_()
    expected = corrected([replace(one, correction="none") for one in distinct])
    assert [one.p_adjusted for one in distinct] == [one.p_adjusted for one in expected]
    for trait in TRAITS:
        one, other = matrix.cell(trait, "autonomy"), matrix.cell(trait, "deference")
        assert (other.d, other.p_adjusted) == (-one.d, one.p_adjusted)
    assert report.behaviour.columns == tuple(name for name in TRAITS if name != "deference")
    word = {one.vector: one for one in report.selectivity}
    assert word["risk"].word == "specific" and word["deference"].left_out == ("autonomy",)


def test_a_vector_stands_beside_every_control_of_its_strength(report: Any) -> None:
    row = report.control_row("risk")
    assert row["random direction: mean |d|"] == 0 and row["random direction: p"] == round(1 / 3, 3)
    assert row["permuted labels: p"] == row["random weights: p"] == round(1 / 6, 3)
    assert row["DiffMean"] == row["ridge on activations"] == 0
    assert report.control_row("autonomy")["random direction: p"] == 1.0
    assert report.probe_rows()[0]["text only R2"] == 0.4


def test_power_says_what_so_many_scenarios_see(report: Any) -> None:
    first, *paired = report.power
    # Two-sided t-test, 40 per arm, 80 %: d = 0.634 by any power calculator.
    assert first["d, one test"] == 0.63 and first["d, 20 tests"] > first["d, one test"]
    assert all(row["d, one test"] < first["d, one test"] for row in paired)
    assert {row["outcome"] for row in paired} == set(TRAITS) - {"risk"}  # constant in the base


def test_a_mean_correlation_leaves_out_what_does_not_vary() -> None:
    base = np.array([0.0, 1.0, 2.0, 3.0])
    arms = np.stack([base, base[::-1], np.zeros(4)])
    assert mean_correlation(base, arms) == pytest.approx(0.0)
    assert mean_correlation(np.ones(4), arms) is None
    assert mean_correlation(base, np.zeros((2, 4))) is None


def test_the_report_says_what_a_reader_must_know(report: Any) -> None:
    text = " ".join(report.notes)
    for words in ("inferred", "by construction", "80 % power", "rank among the controls", "alphas"):
        assert words in text
    assert "40 scenarios x 36 conditions = 1440 rollouts" in text
    page = report._repr_html_()
    assert "36 conditions" in page and "tier 1" in page and "nan" not in page.lower()
    assert counted(["a", "b", "a"]) == ["a (2 times)", "b"]


def test_the_same_report_is_saved_as_the_same_files(report: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        report.save(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["autonomy.html", "autonomy.json", "effects.parquet", "rollouts.parquet"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    content = json.loads((tmp_path / "one" / "autonomy.json").read_text())
    assert content["settings"]["conditions"] == 36 and len(content["effects"]) == 175
    assert Rollouts.load(tmp_path / "one" / "rollouts.parquet").rollouts == report.rollouts.rollouts


def test_a_rollout_without_behaviour_is_counted_and_named(single: TraitVectors) -> None:
    protocol = protocol_of(single, 12, seeds=1)
    found = rolled(protocol, {}, asks(5))
    lost = replace(found.rollouts[-1], turns=0, calls=(), error="ValueError: x")
    report = analysed(protocol, replace(found, rollouts=(*found.rollouts[:-1], lost)))
    assert sum(one.effect.n_missing for one in report.controls) == 5
    assert any("items lack 'autonomy' in one arm" in note for note in report.notes)


def test_one_trait_alone_has_no_axis(tmp_path: Path) -> None:
    protocol = protocol_of(vector_set(tmp_path, ("risk",)), 12)
    found = analysed(protocol, rolled(protocol, {"risk": risky}, asks(5)))
    assert found.behaviour is None and found.geometry is None and found.structure is None
    assert "axis" not in found.tables() and found.settings["conditions"] == 8


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list_organisms()[:1])
def embedded(request: pytest.FixtureRequest) -> str:
    return str(request.param)


SMALL: dict[str, Any] = {
    "traits": ("autonomy", "deference"),
    "pairs": 12,
    "items": 3,
    "strengths": (0.5,),
    "controls": 1,
    "draws": 1,
    "max_turns": 1,
    "max_new_tokens": 24,
    "resamples": 50,
}


def test_the_whole_protocol_runs_on_an_organism(
    embedded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        protocol_module,
        "AutonomyProtocol",
        lambda *given, **options: AutonomyProtocol(*given, **options, world_draws=2),
    )
    report = run_autonomy(embedded, out=tmp_path, progress=False, **SMALL)
    assert report.n == 3 and report.settings["conditions"] == 1 + 2 * 3
    assert set(report.structure.traits) == {"autonomy", "deference"}
    assert report.geometry.cosines.shape == (2, 2)
    assert (tmp_path / "autonomy.json").is_file()
    seen = json.loads((tmp_path / "autonomy.json").read_text())
    with monkeypatch.context() as patched:
        patched.setattr("sae_steering_plugin.runs.rollout_plan.run_rollouts", None)
        again = run_autonomy(embedded, out=tmp_path, progress=False, **SMALL)
    assert again.to_dict() == report.to_dict() == seen


def test_scenarios_and_tools_may_be_the_user_s_own(embedded: str, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "ask_user", "parameters": {}}},
             {"type": "function", "function": {"name": "send_mail", "parameters": {}}}]  # fmt: skip
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    row = {"id": "a", "system": "You help.", "user": "Do it.", "responses": {"send_mail": ["ok"]}}
    (tmp_path / "tasks.jsonl").write_text(
        "".join(json.dumps({**row, "id": name}) + "\n" for name in "abc")
    )
    files = tmp_path / "contrasts"
    files.mkdir()
    traits_file(files / "risk_calibration.jsonl")
    protocol = autonomy_protocol(
        embedded,
        out=tmp_path / "run",
        scenarios=tmp_path / "tasks.jsonl",
        tools=tmp_path / "tools.json",
        contrasts=files,
        items=0,
        controls=0,
    )
    assert protocol.traits == ("risk",) and not protocol.world
    assert [one.id for one in protocol.plan.scenarios] == ["a", "b", "c"]
    assert {one.tools for one in protocol.plan.scenarios} == {("ask_user", "send_mail")}
    assert len(protocol.plan) == 3 * 8


def test_the_released_scenarios_make_the_1800_rollouts(data: Path, vectors: TraitVectors) -> None:
    tasks = read_scenarios(data / "agent-traits" / "scenarios.jsonl")
    arms = condition_arms(vectors.probes, STRENGTHS)
    assert len(RolloutPlan(ModelRef("m", "weights"), tasks, arms)) == 1800
    assert {len(one.tools) for one in tasks} == {len(TOOLS)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strengths": (0.0, 1.0)}, "give distinct positive ones"),
        ({"strengths": (1.0, 1.0)}, "give distinct positive ones"),
        ({"strengths": ()}, "give distinct positive ones"),
        ({"traits": ("risk", "risk")}, "trait 'risk' is given twice"),
        ({"items": 0}, "pass --items"),
        ({"scenarios": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_built(
    options: dict[str, Any], words: str, embedded: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        autonomy_protocol(embedded, out=tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_rollouts_without_vectors_are_this_protocol(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def instead(**given: Any) -> Any:
        seen.update(given)
        raise InterruptedError

    monkeypatch.setattr(protocol_module, "autonomy", instead)
    with pytest.raises(InterruptedError):
        rollouts(out=tmp_path, items=7, seed=3)
    assert (seen["out"], seen["items"], seen["seed"], seen["controls"]) == (tmp_path, 7, 3, 10)
    assert seen["strengths"] == [0.25, 0.5, 1.0] and seen["max_new_tokens"] == 64
    for own in ({"positions": ["all"]}, {"unit": "kl"}, {"outcome": "risk"}):
        with pytest.raises(ValueError, match="--positions, --unit and --outcome need --vectors"):
            rollouts(out=tmp_path, **own)


def words(embedded: str, out: Path) -> list[str]:
    size = "--items 4 --block 1 --controls 0 --max-turns 1 --max-new-tokens 16 --strength 0.5"
    return [
        *("evaluate", "autonomy", "--model", embedded, "--out", str(out), "--trait", "autonomy"),
        *("--pairs", "12", *size.split()),
    ]


def run_here(embedded: str, out: Path) -> str:
    """The command in this process, which has loaded what it needs; what it prints."""
    result = CliRunner().invoke(app, words(embedded, out))
    assert result.exit_code == 0, result.output
    return result.output


def test_a_run_killed_at_any_moment_and_started_again_gives_the_same_files(
    embedded: str, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    chance = random.Random(0)
    run_here(embedded, whole)
    (vectors,) = whole.glob("vectors-*")
    shutil.copytree(vectors, broken / vectors.name)
    process = subprocess.Popen(
        [sys.executable, "-m", "sae_steering_plugin.cli", *words(embedded, broken)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    goal = chance.randint(2, 8)
    while process.poll() is None and len(list(broken.glob("part-*"))) < goal:
        time.sleep(0.005)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = len(list(broken.glob("part-*")))
    assert 0 < left < 16 and not (broken / "autonomy.json").exists()
    assert f"{left} were there" in run_here(embedded, broken)
    digests = [json.loads((out / "summary.json").read_text())["digest"] for out in (whole, broken)]
    assert digests[0] == digests[1]
    for name in ("autonomy.json", "autonomy.html", "effects.parquet", "rollouts.parquet"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_probes_are_found_under_their_trait(vectors: TraitVectors) -> None:
    assert list(vectors.probes) == list(TRAITS)
    assert [one.kind for one in vectors.of(PROBE)] == [PROBE] * 5
