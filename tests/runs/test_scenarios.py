import json

import pytest

from sae_steering_plugin.runs.scenarios import (
    TOOLS,
    TRANSIENT_ERRORS,
    read_scenarios,
    read_tools,
    tool_name,
    tool_result,
    write_scenarios,
)
from sae_steering_plugin.runs.transcripts import read_released
from sae_steering_plugin.types import Scenario

GOOD = {
    "id": "a",
    "domain": "coding",
    "system_prompt": "You help.",
    "user_message": "Do it.",
    "mock_tool_responses": {"web_search": [{"results": []}, "plain"]},
    "measurable_traits": ["autonomy"],
}


def written(tmp_path, *records):
    path = tmp_path / "scenarios.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def test_a_scenario_is_read_and_offers_every_tool_by_default(tmp_path):
    (one,) = read_scenarios(written(tmp_path, GOOD))
    assert one == Scenario(
        "a", "coding", "You help.", "Do it.", tuple(map(tool_name, TOOLS)),
        {"web_search": ('{"results": []}', "plain")}, ("autonomy",),
    )  # fmt: skip
    (one,) = read_scenarios(
        written(tmp_path, {"id": "b", "system": "", "user": "u", "tools": ["x"]})
    )
    assert (one.tools, one.responses, one.domain) == (("x",), {}, "")


def test_scenarios_survive_a_file(tmp_path):
    scenarios = read_scenarios(
        written(tmp_path, GOOD, "", {**GOOD, "id": "b", "tools": ["ask_user"]})
    )
    write_scenarios(scenarios, tmp_path / "again.jsonl")
    assert read_scenarios(tmp_path / "again.jsonl") == scenarios


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{nonsense", r"scenarios.jsonl:2: not JSON"),
        ("[" * 100_000, r"scenarios.jsonl:2: not JSON"),
        ("[1]", r"scenarios.jsonl:2: a JSON object is needed, not a list"),
        ({**GOOD, "id": 3}, r":2: field 'id' must be text, not a number"),
        ({**GOOD, "id": ""}, r":2: field 'id' must be text, not text that is blank"),
        ({"id": "x", "user": "u"}, r":2: field 'system_prompt' must be text, not missing"),
        ({"id": "x", "system": "s", "user": ["u"]}, r":2: field 'user' must be text, not a list"),
        ({**GOOD, "id": "x", "domain": 1}, r":2: field 'domain' must be text, not a number"),
        (
            {**GOOD, "id": "x", "tools": "ask"},
            r":2: field 'tools' must be a list of names, not text",
        ),
        ({**GOOD, "id": "x", "mock_tool_responses": []}, r":2: .*must map tool names to lists"),
        (
            {**GOOD, "id": "x", "responses": None, "mock_tool_responses": {"a": "b"}},
            r":2: field 'mock_tool_responses.a' must be a list of results",
        ),
        (GOOD, r":2: field 'id': 'a' is already on line 1"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_field(tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        read_scenarios(written(tmp_path, GOOD, record))


def test_an_empty_file_and_a_binary_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no scenario"):
        read_scenarios(written(tmp_path))
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_scenarios(tmp_path / "bad.jsonl")


def test_tools_of_one_s_own_are_read_or_refused(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(TOOLS))
    assert read_tools(path) == TOOLS
    for text, message in (
        ("{", "not JSON"),
        ("{}", "a list of tool schemas is needed, not an object"),
        ('[{"function": {}}]', "entry 0: field 'function.name' must be text"),
        (json.dumps([TOOLS[0], TOOLS[0]]), "'web_search' occurs more than once"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_tools(path)


def test_results_come_in_order_then_errors_rotate():
    one = Scenario("a", "", "s", "u", ("x",), {"x": ("first", "second")})
    answers = [tool_result(one, "x", earlier) for earlier in range(8)]
    assert answers[:2] == ["first", "second"]
    assert [json.loads(text)["error"] for text in answers[2:]] == [
        *TRANSIENT_ERRORS,
        TRANSIENT_ERRORS[0],
    ]
    assert json.loads(tool_result(one, "y", 0)) == {"error": "No mock response for y"}


def test_the_default_tools_are_the_released_ones(data):
    assert read_tools(data / "agent-traits" / "tool_schemas.json") == TOOLS


def test_the_released_scenarios_load(data):
    scenarios = read_scenarios(data / "agent-traits" / "scenarios.jsonl")
    assert len(scenarios) == 50
    assert {scenario.domain for scenario in scenarios} == {
        "coding", "research", "communication", "data",
    }  # fmt: skip


def test_replaying_the_released_calls_gives_the_released_answers(data):
    folder = data / "agent-traits"
    known = {scenario.id: scenario for scenario in read_scenarios(folder / "scenarios.jsonl")}
    replayed = 0
    for path in sorted((folder / "rollouts").glob("*.json")):
        for rollout in read_released(path):
            if rollout.scenario not in known:
                continue
            answers = [m for m in rollout.messages if m["role"] == "tool"]
            earlier: dict[str, int] = {}
            for message in answers:
                name = message["tool_name"]
                mine = tool_result(known[rollout.scenario], name, earlier.get(name, 0))
                earlier[name] = earlier.get(name, 0) + 1
                shown = message["content"].removesuffix("...")
                assert mine.startswith(shown) or json.loads(mine) == json.loads(shown)
                replayed += 1
    assert replayed > 100
