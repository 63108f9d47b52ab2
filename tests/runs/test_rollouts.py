import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sae_steering_plugin
from sae_steering_plugin.edits.shift import Add
from sae_steering_plugin.effects import cohens_d
from sae_steering_plugin.effects.contrast import mann_whitney
from sae_steering_plugin.runs.agent_loop import end_of_turn_ids, left_padded, row_edits
from sae_steering_plugin.runs.rollouts import (
    Arm,
    compare,
    dose_response,
    random_vector,
    run_rollouts,
)
from sae_steering_plugin.runs.transcripts import PROXIES, Rollout, Rollouts, read_released
from sae_steering_plugin.types import (
    DECODE,
    PREFILL,
    Edit,
    Recipe,
    Scenario,
    SteeringVector,
)
from tests.hosts import D_MODEL, SITE, tiny_tokenizer

EOS = 2


def scenario(name: str, user: str = "go", **responses: list[str]) -> Scenario:
    every = ("web_search", "code_execute", "ask_user", "file_read", "file_write")
    return Scenario(name, "data", "s", user, every, {k: tuple(v) for k, v in responses.items()})


def call(name: str, **arguments: str) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def always(text: str) -> Callable[[str], str]:
    return lambda prompt: text  # noqa: ARG005


def plain(messages: Any, tools: Any) -> str:
    del tools
    return "".join(f"[{m['role']}]{m['content']}" for m in messages)


@dataclass
class Script:
    """A model that answers from a function of the prompt text, and keeps what it was asked."""

    answer: Callable[[str], str]
    asked: list[list[str]] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, model: Any, tokens: Any, edits: Any, **options: Any) -> Any:
        del model
        tokenizer = tiny_tokenizer()
        self.options.append({"edits": edits, **options})
        mask = options["attention_mask"].bool()
        prompts = [tokenizer.decode(row[keep]) for row, keep in zip(tokens, mask, strict=True)]
        self.asked.append(prompts)
        limit = options["max_new_tokens"]
        written = [
            [*tokenizer(self.answer(p), add_special_tokens=False)["input_ids"], EOS]
            for p in prompts
        ]
        return SimpleNamespace(
            new_tokens=[torch.tensor(row[:limit]) for row in written], record=None
        )


def scripted(script: Script, scenarios: Any, *edits: Any, **options: Any) -> Rollouts:
    config = SimpleNamespace(d_vocab=len(tiny_tokenizer()), n_ctx=4096, model_name="script")
    model = SimpleNamespace(cfg=config, tokenizer=tiny_tokenizer())
    options = {"generate": script, "render": plain, "progress": False, **options}
    return run_rollouts(model, scenarios, *edits, **options)


# The loop


def test_a_plain_answer_ends_the_rollout():
    (one,) = scripted(Script(always("All done.")), [scenario("a")])
    assert (one.turns, one.calls, one.valid, one.cut) == (1, (), True, False)
    assert one.messages[-1] == {"role": "assistant", "content": "All done."}
    assert one.n_tokens == len(tiny_tokenizer()("All done.")["input_ids"])


def test_calls_are_answered_from_the_cache_and_then_with_errors():
    script = Script(lambda p: "done" if p.count("[tool]") >= 3 else call("web_search", query="x"))
    (one,) = scripted(script, [scenario("a", web_search=["first", "second"])])
    results = [m["content"] for m in one.messages if m["role"] == "tool"]
    assert results[:2] == ["first", "second"]
    assert json.loads(results[2])["error"].startswith("Connection timed out")
    assert (one.turns, one.calls) == (4, ("web_search",) * 3)
    assert one.messages[-1]["content"] == "done"


def test_one_message_holds_all_calls_of_a_turn_and_one_answer_each_follows():
    both = (
        call("ask_user", question="q")
        + call("web_search", query="x")
        + call("ask_user", question="r")
    )
    script = Script(lambda p: "done" if "[tool]" in p else f"Wait. {both}")
    (one,) = scripted(script, [scenario("a", ask_user=["yes", "no"])])
    assert [m["role"] for m in one.messages] == [
        "system", "user", "assistant", "tool", "tool", "tool", "assistant",
    ]  # fmt: skip
    spoken = one.messages[2]
    assert spoken["content"] == "Wait."
    assert [c["function"]["name"] for c in spoken["tool_calls"]] == list(one.calls)
    assert [m["content"] for m in one.messages[3:6]] == [
        "yes",
        '{"error": "No mock response for web_search"}',
        "no",
    ]


def test_the_loop_stops_at_the_turn_limit():
    rollouts = scripted(
        Script(always(call("ask_user", question="q"))), [scenario("a")], max_turns=3
    )
    (one,) = rollouts
    assert (one.turns, len(one.calls), one.valid) == (3, 3, True)
    assert one.messages[-1]["role"] == "tool"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        ("<tool_call>{", "unclosed <tool_call>"),
        (call("launch"), "unknown tool 'launch'"),
        ("well <pad> then", "control token '<pad>'"),
    ],
)
def test_a_malformed_turn_makes_the_rollout_invalid_and_says_why(text, problem):
    script = Script(lambda p: "done" if "[tool]" in p else text)
    (one,) = scripted(script, [scenario("a")])
    assert not one.valid
    assert problem in one.problem


def test_a_turn_that_reaches_the_token_limit_is_cut_and_not_valid():
    (one,) = scripted(Script(always("a b c d e f g h")), [scenario("a")], max_new_tokens=3)
    assert (one.cut, one.valid, one.n_tokens) == (True, False, 3)
    (one,) = scripted(Script(always("a b")), [scenario("a")], max_new_tokens=60)
    assert (one.cut, one.valid) == (False, True)


def test_nothing_a_model_writes_is_run(tmp_path):
    target = tmp_path / "written"
    code = f"open({str(target)!r}, 'w').write('x')"
    script = Script(
        always(call("code_execute", code=code) + call("file_write", path=str(target), content="x"))
    )
    (one,) = scripted(script, [scenario("a")], max_new_tokens=900)
    assert len(one.calls) == 10
    assert not target.exists()


def test_an_exception_ends_its_own_rollout_only():
    def answer(prompt: str) -> str:
        if "bad" in prompt and "[tool]" in prompt:
            raise RuntimeError("boom")
        return "done" if "[tool]" in prompt else call("ask_user", question="q")

    rollouts = scripted(Script(answer), [scenario("a"), scenario("b", "bad"), scenario("c")])
    errors = {one.scenario: one.error for one in rollouts}
    assert errors == {"a": "", "b": "RuntimeError: boom", "c": ""}
    failed = next(one for one in rollouts if one.error)
    assert (failed.turns, failed.calls, failed.valid) == (1, ("ask_user",), False)


def test_a_failure_of_everything_at_once_is_raised():
    def answer(prompt: str) -> str:  # noqa: ARG001
        raise KeyError("no hook point")

    with pytest.raises(KeyError, match="no hook point"):
        scripted(Script(answer), [scenario("a"), scenario("b")])
    with pytest.raises(ValueError, match="does not fit the 6 that max_new_tokens=4090"):
        scripted(Script(str), [scenario("a")], max_new_tokens=4090)


def test_an_arm_that_cannot_run_is_raised_though_the_others_can(bridge):
    wrong = Edit(Add(torch.ones(D_MODEL + 1)), SITE)
    with pytest.raises(ValueError, match="built for another model or site"):
        host_run(bridge, host_scenarios(3), arms=[Arm("base"), Arm("wrong", (wrong,))])


def test_a_rollout_without_a_turn_has_no_outcome():
    def answer(prompt: str) -> str:
        if "bad" in prompt:
            raise RuntimeError("boom")
        return "done"

    rollouts = scripted(
        Script(answer), [scenario(f"s{i}", "bad" if i == 2 else "go") for i in range(5)]
    )
    table = rollouts.table().set_index("scenario")
    assert table.loc["s2", ["autonomy", "risk"]].isna().all()
    with pytest.warns(UserWarning, match="1 of 5 items lack 'tool_use' .*: s2"):
        one = compare(rollouts, rollouts, outcome="tool_use")
    assert (one.n, one.n_missing, one.valid_rate) == (4, 1, 0.8)


def test_a_conversation_that_outgrows_the_context_is_recorded():
    script = Script(always(call("web_search", query="x")))
    rollouts = scripted(
        script,
        [scenario("a", web_search=["y" * 400] * 9), scenario("b")],
        max_new_tokens=3300,
        max_turns=5,
    )
    long, short = rollouts
    assert "does not fit" in long.error
    assert long.turns < short.turns == 5
    assert not short.error


def test_prompts_of_like_length_share_left_padded_batches():
    script = Script(always("done"))
    users = ["x " * n for n in (30, 1, 29, 2, 31, 3)]
    scripted(script, [scenario(f"s{i}", user) for i, user in enumerate(users)], batch_size=3)
    lengths = [[len(p) for p in batch] for batch in script.asked]
    assert [len(batch) for batch in lengths] == [3, 3]
    assert max(lengths[0]) < min(lengths[1])
    tokens, mask = left_padded([[5], [6, 7, 8]], pad=0)
    assert tokens.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_rollouts_come_back_by_arm_in_the_order_given():
    arms = [Arm("one"), Arm("two")]
    rollouts = scripted(Script(always("done")), [scenario("b"), scenario("a")], arms=arms)
    assert [(r.arm, r.scenario) for r in rollouts] == [
        ("one", "b"), ("one", "a"), ("two", "b"), ("two", "a"),
    ]  # fmt: skip


def test_the_same_noise_goes_to_every_arm_and_none_when_greedy():
    script = Script(always("done"))
    scripted(script, [scenario("a"), scenario("b")], arms=[Arm("one"), Arm("two")])
    noise = script.options[0]["noise"](0)
    order = [p.split("[user]")[0] for p in script.asked[0]]
    assert len(order) == 4
    same = {tuple(row.tolist()) for row in noise}
    assert len(same) == 2
    scripted(script, [scenario("a")], temperature=0.0)
    assert script.options[-1]["noise"] is None


def test_a_set_up_that_cannot_work_is_refused_before_anything_runs():
    script, one = Script(always("done")), scenario("a")
    vector = torch.ones(D_MODEL)
    bad = [
        (dict(scenarios=[]), "at least one scenario"),
        (dict(scenarios=[one, one]), "scenario 'a' occurs more than once"),
        (dict(scenarios=[one], arms=[Arm("x"), Arm("x")]), "arm 'x' occurs more than once"),
        (dict(scenarios=[one], tools=[]), "offers a tool 'web_search' without a schema"),
        (dict(scenarios=[one], max_turns=0), "must be at least 1"),
        (dict(scenarios=[one], temperature=-1.0), "must be 0"),
        (dict(scenarios=[one], render=None), "no chat template"),
        (
            dict(scenarios=[one], arms=[Arm("x", (Edit(Add(vector), SITE, rows=[0]),))]),
            "rows are given out by the loop",
        ),
        (dict(scenarios=[one], edits=[Edit(Add(vector), SITE)], arms=[Arm("x")]), "not both"),
    ]
    for options, message in bad:
        scenarios, *edits = options.pop("scenarios"), options.pop("edits", ())
        with pytest.raises(ValueError, match=message):
            scripted(script, scenarios, *edits, **options)
    assert script.asked == []


def test_an_end_of_turn_token_is_required():
    nameless = SimpleNamespace(eos_token_id=None, get_vocab=dict)
    with pytest.raises(ValueError, match="pass stop_ids"):
        end_of_turn_ids(nameless)
    assert end_of_turn_ids(tiny_tokenizer()) == (EOS,)


# Edits per row


def test_shifts_of_many_arms_become_one_shift_with_a_row_each():
    one, two = torch.ones(D_MODEL), torch.arange(D_MODEL).float()
    first, second = Edit(Add(one, 2.0), SITE), Edit(Add(two, 1.0), SITE)
    late = Edit(Add(one, 3.0), SITE, DECODE)
    merged = row_edits([(), (first,), (second, late), (first, second)])
    assert [(edit.site, str(edit.positions)) for edit in merged] == [
        (SITE, "all"),
        (SITE, "decode"),
    ]
    assert torch.equal(merged[0].change.step(), torch.stack([0 * one, 2 * one, two, 2 * one + two]))
    assert torch.equal(merged[1].change.step()[2], 3 * one)
    assert not merged[1].change.step()[[0, 1, 3]].any()


def test_edits_that_all_rows_share_stay_as_they_are():
    edits = (Edit(Add(torch.ones(D_MODEL)), SITE),)
    assert row_edits([edits, edits]) == list(edits)
    assert row_edits([(), ()]) == []


def test_other_edits_are_bound_to_their_rows():
    trained = Edit(Add(torch.ones(D_MODEL, requires_grad=True)), SITE)
    (bound,) = row_edits([(), (trained,), (trained,)])
    assert bound.change is trained.change
    assert bound.rows == (1, 2)


# On a real host


def host_scenarios(count: int = 6) -> list[Scenario]:
    return [scenario(f"s{i}", "the cat sat " * (1 + i % 3) + str(i)) for i in range(count)]


def steered_arms() -> list[Arm]:
    generator = torch.Generator().manual_seed(0)
    vectors = 3 * torch.randn(2, D_MODEL, generator=generator)
    return [
        Arm("base"),
        Arm("all", (Edit(Add(vectors[0]), SITE),)),
        Arm("prefill", (Edit(Add(vectors[0]), SITE, PREFILL),)),
        Arm("decode", (Edit(Add(vectors[1]), SITE, DECODE),)),
    ]


def host_run(model: Any, scenarios: Any, **options: Any) -> Rollouts:
    options = {
        "render": plain, "progress": False, "max_new_tokens": 8, "max_turns": 2, "temperature": 1.0,
        **options,
    }  # fmt: skip
    return run_rollouts(model, scenarios, **options)


def texts(rollouts: Rollouts) -> dict[tuple[str, str], str]:
    return {(one.arm, one.scenario): one.messages[-1]["content"] for one in rollouts}


def test_a_rollout_is_the_same_alone_and_in_any_batch(host):
    scenarios, arms = host_scenarios(), steered_arms()
    together = texts(host_run(host, scenarios, arms=arms, batch_size=64))
    assert len(set(together.values())) > len(scenarios)  # the arms differ
    backwards = texts(host_run(host, scenarios[::-1], arms=arms[::-1], batch_size=5))
    assert backwards == together
    alone = {}
    for arm in arms:
        for one in scenarios[:3]:
            alone |= texts(host_run(host, [one], arms=[arm]))
    assert alone == {key: together[key] for key in alone}


def test_another_seed_gives_other_rollouts(host):
    first, again, other = (texts(host_run(host, host_scenarios(), seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_an_arm_of_strength_zero_is_the_base(bridge):
    vector = torch.ones(D_MODEL)
    arms = [Arm("base"), Arm("zero", (Edit(Add(vector, 0.0), SITE),)), steered_arms()[1]]
    found = texts(host_run(bridge, host_scenarios(), arms=arms))
    for one in host_scenarios():
        assert found["zero", one.id] == found["base", one.id]


def test_an_unknown_hook_name_is_raised_and_not_recorded(bridge):
    with pytest.raises(KeyError, match="hook_resid_pst"):
        host_run(
            bridge,
            host_scenarios(2),
            edits=[Edit(Add(torch.ones(D_MODEL)), "blocks.0.hook_resid_pst")],
        )


def test_an_edit_that_reaches_no_token_is_raised(bridge):
    edit = Edit(Add(torch.ones(D_MODEL)), SITE, DECODE)
    with pytest.raises(ValueError, match="reached no token in the whole run"):
        host_run(bridge, host_scenarios(2), edits=[edit], max_new_tokens=1)


# On the embedded organism


@pytest.fixture(scope="module")
def organism() -> Any:
    if not (Path(sae_steering_plugin.__file__).parent / "organisms/data/agent-gpt2").is_dir():
        pytest.skip("the organism agent-gpt2 is not in this checkout")
    return sae_steering_plugin.load_organism("agent-gpt2")


def test_the_organism_writes_valid_calls_and_asks_sometimes(organism):
    scenarios = organism.world.scenarios(60)
    rollouts = run_rollouts(organism.model, scenarios, max_new_tokens=96, progress=False)
    summary = rollouts.summary().loc["base"]
    assert summary["valid"] >= 0.9
    assert 0.2 < summary["autonomy"] < 0.8
    assert not any(one.error for one in rollouts)


def test_the_organism_s_rollouts_do_not_depend_on_their_batch(organism):
    scenarios = organism.world.scenarios(12)
    shift = torch.randn(organism.model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    arms = [Arm("base"), Arm("pushed", (Edit(Add(shift), "blocks.1.hook_resid_post"),))]
    options = {"max_new_tokens": 96, "progress": False}
    together = texts(run_rollouts(organism.model, scenarios, arms=arms, **options))
    alone: dict[tuple[str, str], str] = {}
    for arm in arms:
        some = scenarios[3:8][::-1]
        alone |= texts(run_rollouts(organism.model, some, arms=[arm], batch_size=2, **options))
    assert alone == {key: together[key] for key in alone}
    assert any(together["base", one.id] != together["pushed", one.id] for one in scenarios)


# Dose-response


def vector(
    label: str, seed: int, *, mean_norm: float | None = 2.0, hook_name: str = SITE
) -> SteeringVector:
    drawn = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(drawn, hook_name, Recipe(method="probe", mean_norm=mean_norm), label)


@dataclass
class Asker:
    """Asks more often, the further the first entry of the row's shift lies below a threshold."""

    def __call__(self, model: Any, tokens: Any, edits: Any, **options: Any) -> Any:
        del model
        tokenizer = tiny_tokenizer()
        push = torch.zeros(len(tokens))
        for edit in edits:
            push = push + edit.change.step()[:, 0]
        luck = options["noise"](0)[:, 5]
        ask, done = (
            [*tokenizer(text, add_special_tokens=False)["input_ids"], EOS]
            for text in (call("ask_user", question="q"), "done")
        )
        rows = [ask if luck[i] > 0.4 + push[i] else done for i in range(len(tokens))]
        return SimpleNamespace(new_tokens=[torch.tensor(row) for row in rows], record=None)


def axis(sign: float = 1.0) -> SteeringVector:
    unit = torch.zeros(D_MODEL)
    unit[0] = sign
    return SteeringVector(unit, SITE, Recipe(method="probe", mean_norm=2.0), "axis")


def swept(*vectors: Any, count: int = 120, **options: Any) -> Any:
    config = SimpleNamespace(d_vocab=16, n_ctx=4096, model_name="script")
    model = SimpleNamespace(cfg=config, tokenizer=tiny_tokenizer())
    options = {
        "strengths": (-0.5, 0.5), "generate": Asker(), "render": plain, "progress": False,
        "max_turns": 1, "resamples": 200, **options,
    }  # fmt: skip
    scenarios = [scenario(f"s{i}") for i in range(count)]
    return dose_response(model, scenarios, list(vectors), **options)


def test_a_planted_effect_is_found_with_its_sign_and_random_directions_are_not():
    found = swept(axis(), controls=10)
    down, up = found.effects
    assert (down.strength, up.strength) == (-0.5, 0.5)
    assert down.d < -0.3 < 0.3 < up.d
    assert up.ci_low > 0
    assert up.p_adjusted < 0.01
    assert (up.n, up.test, up.correction, up.valid_rate) == (120, "paired permutation", "holm", 1.0)
    assert up.displacement == 0.5
    (summary,) = found.control_summary().to_dict("records")
    assert (summary["seeds"], summary["strength"]) == (10, 0.5)
    assert summary["mean_abs_d"] < up.d
    table = found.table()
    assert list(table["control_seeds"]) == [10, 10]
    larger = sum(abs(one.d) >= abs(up.d) for one in found.controls)
    assert table["control_p"].iloc[1] == (1 + larger) / 11 < 0.5
    assert found.best(sign=1) is up


def test_baselines_and_controls_get_the_displacement_of_the_first_vector():
    short = vector("short", 1)
    found = swept(short, baselines=[vector("dense", 2, mean_norm=None)], unit="raw", controls=2)
    lengths = {
        name: float(arm["displacement"])
        for name, arm in found.rollouts.arms.items()
        if name != "base"
    }
    assert len(set(lengths.values())) == 1
    assert {one.method for one in found.baselines} == {"dense"}
    assert all(one.p_adjusted >= one.p_value for one in (*found.effects, *found.baselines))
    assert random_vector(short, 3).norm == pytest.approx(short.norm)


def test_common_noise_makes_the_paired_comparison_sharper():
    found = swept(axis(), controls=0)
    up = found.effects[1]
    assert up.moved_wrong == 0  # with the same noise nobody asks more
    unpaired = compare(
        found.rollouts.arm("base"),
        found.rollouts.arm("axis +0.5 all"),
        outcome="autonomy",
        paired=False,
    )
    assert up.p_value < unpaired.p_value


def test_edits_of_one_s_own_can_be_swept():
    def maker(strength: float, positions: Any) -> list[Edit]:
        return [Edit(Add(axis(), strength, unit="unit"), SITE, positions)]

    config = SimpleNamespace(d_vocab=16, n_ctx=4096, model_name="script")
    model = SimpleNamespace(cfg=config, tokenizer=tiny_tokenizer())
    found = dose_response(
        model, [scenario(f"s{i}") for i in range(40)], {"mine": maker}, strengths=(1.0,),
        controls=0, generate=Asker(), render=plain, progress=False, max_turns=1, resamples=50,
    )  # fmt: skip
    assert found.effects[0].method == "mine"
    assert found.effects[0].d > 0
    assert list(found.table()["control_seeds"]) == [0]
    assert found.table()["control_p"].isna().all()


def test_sweeps_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="two vectors are called 'a'"):
        swept(vector("a", 1), vector("a", 2))
    with pytest.raises(ValueError, match="both a vector and a baseline"):
        swept(vector("a", 1), baselines=[vector("a", 2)])
    with pytest.raises(ValueError, match="where no vector does"):
        swept(vector("a", 1), baselines=[vector("b", 2, hook_name="blocks.1.hook_resid_post")])
    with pytest.raises(ValueError, match="cannot be measured in 'norm'"):
        swept(vector("a", 1, mean_norm=None))
    with pytest.raises(ValueError, match="no arm reaches a valid rate of 1.1; the highest is 1"):
        swept(axis(), controls=0).best(valid=1.1)


# Records


def trajectory(*turns: tuple[str, ...]) -> Rollout:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "u"}]
    for names in turns:
        calls = [{"function": {"name": name, "arguments": {}}} for name in names]
        messages.append(
            {"role": "assistant", "content": "", **({"tool_calls": calls} if calls else {})}
        )
        messages += [{"role": "tool", "name": name, "content": "r"} for name in names]
    return Rollout.from_messages(messages, scenario="a", arm="base")


def test_the_page_s_three_trajectories_give_its_proxies():
    rollouts = [
        trajectory(()),
        trajectory(("ask_user", "code_execute"), ()),
        trajectory(("web_search",), ("web_search", "web_search"), ()),
    ]
    found = {name: [proxy(one) for one in rollouts] for name, proxy in PROXIES.items()}
    assert found == {
        "autonomy": [1, 0, 1],
        "tool_use": [0, 1, 3],
        "persistence": [1, 2, 3],
        "risk": [0, 0.5, 0],
        "deference": [0, 1, 0],
    }


def test_rollouts_survive_both_file_forms(tmp_path):
    script = Script(lambda p: "done é" if "[tool]" in p else call("ask_user", question="q"))
    arms = [Arm("base"), Arm("steered", (Edit(Add(torch.ones(D_MODEL)), SITE),), strength=2.0)]
    rollouts = scripted(script, [scenario("a"), scenario("b")], arms=arms)
    for name in ("r.jsonl", "r.parquet"):
        rollouts.save(tmp_path / name)
        assert Rollouts.load(tmp_path / name) == rollouts
    with pytest.raises(ValueError, match="write rollouts as .jsonl or .parquet"):
        rollouts.save(tmp_path / "r.csv")
    with pytest.raises(ValueError, match="are read from .jsonl or .parquet"):
        Rollouts.load(tmp_path / "r.csv")
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="bad.jsonl:1: this is no file of rollouts"):
        Rollouts.load(tmp_path / "bad.jsonl")
    text = (tmp_path / "r.jsonl").read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([text[0], '{"scenario": "a"}']))
    with pytest.raises(ValueError, match="bad.jsonl:2: not a rollout"):
        Rollouts.load(tmp_path / "bad.jsonl")


def test_arms_are_picked_and_summed_up():
    rollouts = scripted(Script(always("done")), [scenario("a")], arms=[Arm("one"), Arm("two")])
    assert rollouts.names == ("one", "two")
    assert len(rollouts.arm("two")) == 1
    assert (rollouts.arm("one") + rollouts.arm("two")).names == rollouts.names
    assert rollouts.summary().loc["one", "valid"] == 1
    with pytest.raises(KeyError, match="no arm 'three'; the run has one, two"):
        rollouts.arm("three")
    with pytest.raises(ValueError, match=r"2 arms are here .* pick one with .arm"):
        rollouts.details()


@pytest.mark.parametrize("trait", ["autonomy", "risk_calibration", "tool_use_eagerness"])
def test_the_released_transcripts_have_the_turns_they_say(data, trait):
    path = data / "agent-traits" / "rollouts" / f"{trait}.json"
    released = json.loads(path.read_text())
    said = {
        (arm, name): run["turns"]
        for scenarios in released["categories"].values()
        for name, runs in scenarios.items()
        for arm, run in runs.items()
        if arm != "desc"
    }
    assert {(one.arm, one.scenario): one.turns for one in read_released(path)} == said
    table = read_released(path).table()
    assert len(table) == 48
    assert (table["autonomy"] + table["deference"] == 1).all()
    assert (table["tool_use"] + table["asks"] == table["n_calls"]).all()


def test_the_published_effects_on_the_binary_proxies_are_reproduced(data):
    published = json.loads((data / "agent-traits" / "published_statistics.json").read_text())
    table = published["crossTrait"]
    # With 50 scenarios an arm, the mean of a 0/1 outcome is the whole sample.
    for column, name in ((0, "autonomy_proxy"), (4, "deference_proxy")):
        base = ones(table["baseline_means"][name])
        for row, means in enumerate(table["matrix_steered_means"]):
            arm = ones(means[column])
            assert cohens_d(base, arm) == pytest.approx(table["matrix_cohens_d"][row][column])
            assert mann_whitney(base, arm) == pytest.approx(table["matrix_p_values"][row][column])


def ones(mean: float, n: int = 50) -> list[float]:
    return [1.0] * round(mean * n) + [0.0] * (n - round(mean * n))


def test_released_arms_are_compared_by_scenario(data):
    rollouts = read_released(data / "agent-traits" / "rollouts" / "autonomy.json")
    base, arm = rollouts.arm("0.0"), rollouts.arm("10.0")
    one = compare(base, arm, outcome="asks")
    assert (one.n, one.n_missing, one.method) == (12, 0, "10.0")
    assert one.d == pytest.approx(cohens_d(base.table()["asks"], arm.table()["asks"]))
    with pytest.raises(ValueError, match="field 'categories' is missing"):
        read_released(data / "agent-traits" / "published_statistics.json")
