"""Agent scenarios and tools: the five default tools, readers for the user's own, cached results.

A scenario file holds one JSON object per line with `id`, `system_prompt` (or `system`),
`user_message` (or `user`), `mock_tool_responses` (or `responses`: tool name -> list of results)
and, optionally, `domain`, `tools` (names; all when absent), `measurable_traits` (or `traits`).
This is the form of the scenarios released with arXiv 2603.16335.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..types import Scenario


def tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """A tool's JSON schema as chat templates take it; every parameter is a required string."""
    properties = {
        key: {"type": "string", "description": meaning} for key, meaning in parameters.items()
    }
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


TOOLS: tuple[dict[str, Any], ...] = (
    tool("web_search", "Search the web for current information", query="Search query"),
    tool(
        "code_execute", "Execute Python code and return the output", code="Python code to execute"
    ),
    tool("ask_user", "Ask the user a clarifying question", question="Question to ask"),
    tool("file_read", "Read the contents of a file", path="File path to read"),
    tool("file_write", "Write content to a file", path="File path", content="Content to write"),
)
"""The five tools of the protocol. They are names and schemas only: nothing stands behind them."""

TRANSIENT_ERRORS: tuple[str, ...] = (
    "Connection timed out. The service may be temporarily unavailable.",
    "Rate limit exceeded. Please retry after a short delay.",
    "Internal server error (502 Bad Gateway). The upstream service returned an invalid response.",
    "Request failed: DNS resolution error for the target host.",
    "The operation could not be completed due to a transient network error.",
)
"""Given out in turn once a tool's cached results have run out (order of the released rollouts)."""


def tool_name(schema: Mapping[str, Any]) -> str:
    """The name in a tool's schema."""
    return str(schema["function"]["name"])


def tool_result(scenario: Scenario, name: str, earlier: int) -> str:
    """What the scenario answers to a call of `name` after `earlier` calls of that tool.

    The cached results in order, then the transient errors in rotation; a tool without cached
    results answers with an error. Nothing is executed.
    """
    results = scenario.responses.get(name, ())
    if not results:
        return json.dumps({"error": f"No mock response for {name}"})
    if earlier < len(results):
        return results[earlier]
    return json.dumps({"error": TRANSIENT_ERRORS[(earlier - len(results)) % len(TRANSIENT_ERRORS)]})


# Reading ----------------------------------------------------------------------------------------

NAMES = {
    "id": ("id",),
    "domain": ("domain",),
    "system": ("system_prompt", "system"),
    "user": ("user_message", "user"),
    "responses": ("mock_tool_responses", "responses"),
    "tools": ("tools",),
    "traits": ("measurable_traits", "traits"),
}


def read_scenarios(path: str | Path, *, tools: Sequence[str] | None = None) -> tuple[Scenario, ...]:
    """The scenarios of a JSON-lines file, in order.

    `tools` are the names a scenario without its own list offers; the five defaults when None.
    Raises ValueError that names the file, the line and the field at fault, also for an id that
    occurs twice and a file without scenarios.
    """
    offered = tuple(tools) if tools is not None else tuple(map(tool_name, TOOLS))
    scenarios: list[Scenario] = []
    first_line: dict[str, int] = {}
    for line, record in json_lines(path):
        place = f"{path}:{line}"
        scenario = scenario_from(record, place, offered)
        if scenario.id in first_line:
            earlier = first_line[scenario.id]
            raise ValueError(f"{place}: field 'id': {scenario.id!r} is already on line {earlier}")
        first_line[scenario.id] = line
        scenarios.append(scenario)
    if not scenarios:
        raise ValueError(f"{path} holds no scenario")
    return tuple(scenarios)


def json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not blank; ValueError names the bad line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: a JSON object is needed, not {kind(record)}")
        yield number, record


def scenario_from(record: Mapping[str, Any], place: str, offered: tuple[str, ...]) -> Scenario:
    """One scenario from its JSON object. Raises ValueError with `place` and the field at fault."""
    values = {ours: field_of(record, names) for ours, names in NAMES.items()}
    for ours in ("id", "system", "user"):
        written, value = values[ours]
        if not isinstance(value, str) or (ours != "system" and not value.strip()):
            raise ValueError(f"{place}: field {written!r} must be text, not {kind(value)}")
    written, domain = values["domain"]
    if domain is not None and not isinstance(domain, str):
        raise ValueError(f"{place}: field {written!r} must be text, not {kind(domain)}")
    names = words(*values["tools"], place)
    return Scenario(
        id=values["id"][1],
        domain=domain or "",
        system=values["system"][1],
        user=values["user"][1],
        tools=names if values["tools"][1] is not None else offered,
        responses=responses(*values["responses"], place),
        traits=words(*values["traits"], place),
    )


def field_of(record: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of several spellings that the record has, and its value (None without any)."""
    written = next((name for name in names if name in record), names[0])
    return written, record.get(written)


def words(written: str, value: Any, place: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ValueError(f"{place}: field {written!r} must be a list of names, not {kind(value)}")
    return tuple(value)


def responses(written: str, value: Any, place: str) -> dict[str, tuple[str, ...]]:
    """Cached results per tool as text; objects become JSON, as the transcripts show them."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{place}: field {written!r} must map tool names to lists")
    table: dict[str, tuple[str, ...]] = {}
    for name, results in value.items():
        if not isinstance(results, list):
            raise ValueError(f"{place}: field {written + '.' + name!r} must be a list of results")
        table[name] = tuple(
            result if isinstance(result, str) else json.dumps(result) for result in results
        )
    return table


def read_tools(path: str | Path) -> tuple[dict[str, Any], ...]:
    """Tool schemas from a JSON file: a list of `{"type": "function", "function": {"name": ...}}`.

    Raises ValueError that names the entry and the field at fault.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: a list of tool schemas is needed, not {kind(entries)}")
    for number, entry in enumerate(entries):
        function = entry.get("function") if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{path}: entry {number}: field 'function.name' must be text")
    names = [tool_name(entry) for entry in entries]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: tool {repeated[0]!r} occurs more than once")
    return tuple(entries)


def write_scenarios(scenarios: Sequence[Scenario], path: str | Path) -> None:
    """Write scenarios in the form `read_scenarios` reads."""
    lines = [
        json.dumps(
            {
                "id": scenario.id,
                "domain": scenario.domain,
                "system_prompt": scenario.system,
                "user_message": scenario.user,
                "tools": list(scenario.tools),
                "mock_tool_responses": {k: list(v) for k, v in scenario.responses.items()},
                "measurable_traits": list(scenario.traits),
            },
            ensure_ascii=False,
        )
        for scenario in scenarios
    ]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def kind(value: Any) -> str:
    """What a JSON value is, in a reader's words."""
    if value is None:
        return "missing"
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return names.get(type(value), "a number") + (" that is blank" if value == "" else "")
