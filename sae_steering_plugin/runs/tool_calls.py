"""Tool calls found in what a model wrote. Text in, names and arguments out; nothing is executed.

Four notations are read, and the first that yields a call wins (arXiv 2603.16335, code):

    native    <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>
    tagged    <tool_call>{"name": NAME, "arguments": {...}}</tool_call>
    json      {"name": NAME, "arguments": {...}}, bare or in a code fence
    keyword   NAME(KEY=VALUE, ...), alone on its line

Native and tagged calls share their tags and may stand side by side. The source also counts a
keyword call inside a sentence ("I could call ask_user(...)"); here that needs `prose=True`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Notation = Literal["native", "tagged", "json", "keyword"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"

LEFTOVER = re.compile(
    r"</?tool_call|</?tool_response|</?function\b|</?parameter\b|<\|[\w ]{1,40}\|>"
)
"""Pieces of markup that plain text must not hold: tags of calls and results, control tokens."""

FUNCTION = re.compile(r"<function=([^<>\s]+)\s*>")
PARAMETER = re.compile(r"<parameter=([^<>\s]+)\s*>")
VALUE = r"""("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|[^\s,()=]+)"""
PAIR = re.compile(rf"\s*([A-Za-z_]\w*)\s*=\s*{VALUE}\s*(?:,|$)")
FENCE = re.compile(r"^[ \t]*```[\w-]*[ \t]*$", re.MULTILINE)

MOST_OBJECTS = 256
"""Opening braces that are tried as the start of a bare JSON call before giving up."""


@dataclass(frozen=True)
class ToolCall:
    """One call a model asked for: a tool's name and its arguments."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    notation: Notation = "tagged"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "arguments": dict(self.arguments)}


@dataclass(frozen=True)
class ParsedTurn:
    """What one assistant turn holds: its calls, the text beside them, and what is wrong with it.

    `problem` is empty for a well-formed turn, which is either at least one complete call, each of a
    known tool with an object of arguments and no broken markup beside it, or text without calls,
    markup or control tokens, and not blank. Calls that could be read are kept also in a turn with
    a problem. Well formed is a claim about syntax: fluent nonsense passes.
    """

    calls: tuple[ToolCall, ...]
    text: str
    problem: str = ""

    @property
    def valid(self) -> bool:
        return not self.problem


def parse_turn(
    text: str,
    *,
    tools: Collection[str] | None = None,
    control: Collection[str] = (),
    prose: bool = False,
) -> ParsedTurn:
    """The calls in one assistant turn, the text around them, and the turn's problem if it has one.

    `tools` are the known tool names (any name is known when None; keyword calls need them, since
    any word before a bracket would do). `control` are further control tokens that text must not
    hold, such as a tokenizer's special tokens. Never raises on any text.
    """
    known = None if tools is None else frozenset(tools)
    calls, rest, problem = tagged_calls(text)
    if not calls:
        for read in (json_calls, prose_calls if prose else keyword_calls):
            calls, remaining = read(rest, known or frozenset())
            if calls:
                rest = remaining
                break
    rest = rest.strip()
    unknown = [call.name for call in calls if known is not None and call.name not in known]
    if not problem and (found := LEFTOVER.search(rest)):
        problem = f"broken markup {found.group()!r}"
    if not problem and (held := [token for token in control if token and token in rest]):
        problem = f"control token {held[0]!r} inside text"
    if not problem and unknown:
        problem = f"unknown tool {unknown[0]!r}"
    if not problem and not calls and not rest:
        problem = "empty"
    return ParsedTurn(tuple(calls), rest, problem)


# Tagged and native ------------------------------------------------------------------------------


def tagged_calls(text: str) -> tuple[list[ToolCall], str, str]:
    """Calls between tool-call tags, the text outside, and the first problem met.

    A block whose closing tag is missing is read when it is complete otherwise, and is a problem.
    Native functions without the outer tags are read too.
    """
    calls: list[ToolCall] = []
    outside: list[str] = []
    problem = ""
    place = 0
    while (start := text.find(OPEN, place)) >= 0:
        outside.append(text[place:start])
        inner = start + len(OPEN)
        stop = text.find(CLOSE, inner)
        again = text.find(OPEN, inner)
        closed = stop >= 0 and not 0 <= again < stop
        end = stop if closed else (again if again >= 0 else len(text))
        found = block_calls(text[inner:end])
        calls += found
        if not problem and not closed:
            problem = f"unclosed {OPEN}"
        if not problem and not found:
            problem = "a tool call that is neither JSON nor a function"
        place = end + len(CLOSE) if closed else end
    outside.append(text[place:])
    rest = "".join(outside)
    if "<function=" in rest:
        bare, rest = native_calls(rest)
        calls += bare
    return calls, rest, problem


def block_calls(block: str) -> list[ToolCall]:
    """The calls in one tagged block: native functions, else one JSON call or a list of them."""
    if FUNCTION.search(block):
        calls, rest = native_calls(block)
        return [] if rest.strip() else calls
    value = read_json(block.strip())
    return json_value_calls(value, "tagged")


def native_calls(text: str) -> tuple[list[ToolCall], str]:
    """Calls written as function and parameter tags, and the text without the complete ones."""
    calls: list[ToolCall] = []
    outside: list[str] = []
    place = 0
    for match in FUNCTION.finditer(text):
        if match.start() < place:
            continue
        stop = text.find("</function>", match.end())
        if stop < 0:
            break
        arguments = parameters(text[match.end() : stop])
        if arguments is None:
            continue
        outside.append(text[place : match.start()])
        calls.append(ToolCall(match.group(1), arguments, "native"))
        place = stop + len("</function>")
    outside.append(text[place:])
    return calls, "".join(outside)


def parameters(body: str) -> dict[str, Any] | None:
    """The parameters of one native function as strings; None when the body holds anything else."""
    arguments: dict[str, Any] = {}
    place = 0
    while match := PARAMETER.search(body, place):
        stop = body.find("</parameter>", match.end())
        if body[place : match.start()].strip() or stop < 0:
            return None
        # The template puts one line break around a value; the value's own breaks stay.
        value = body[match.end() : stop]
        arguments[match.group(1)] = value.removeprefix("\n").removesuffix("\n")
        place = stop + len("</parameter>")
    return None if body[place:].strip() else arguments


# JSON -------------------------------------------------------------------------------------------


def not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


STRICT = json.JSONDecoder(parse_constant=not_json)


def read_json(text: str) -> Any:
    """The JSON value that `text` is, or None when it is none."""
    try:
        value, end = STRICT.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return value if end == len(text) else None


def json_value_calls(value: Any, notation: Notation) -> list[ToolCall]:
    """The calls a JSON value describes: one object, or a list that holds nothing else."""
    if isinstance(value, list):
        calls = [call for item in value for call in json_value_calls(item, notation)]
        flat = all(isinstance(item, dict) for item in value)
        return calls if flat and len(calls) == len(value) else []
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # OpenAI's form: an object written as a string
        arguments = read_json(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return []
    return [ToolCall(name, arguments, notation)]


def json_calls(text: str, known: Collection[str]) -> tuple[list[ToolCall], str]:  # noqa: ARG001
    """Bare JSON calls anywhere in the text, and the text without them and their code fences."""
    if '"name"' not in text:
        return [], text
    calls: list[ToolCall] = []
    outside: list[str] = []
    place = 0
    for start in brace_places(text):
        if start < place:
            continue
        try:
            value, stop = STRICT.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        found = json_value_calls(value, "json")
        if found:
            calls += found
            outside.append(text[place:start])
            place = stop
    outside.append(text[place:])
    rest = "".join(outside)
    return calls, FENCE.sub("", rest) if calls else text


def brace_places(text: str) -> Iterator[int]:
    """Where a JSON object or list of objects may start, the first `MOST_OBJECTS` of them."""
    for count, match in enumerate(re.finditer(r"(?:\[\s{0,8})?(\{)\s*\"", text)):
        if count == MOST_OBJECTS:
            return
        yield match.start()
        if match.start(1) > match.start():
            yield match.start(1)


# NAME(KEY=VALUE) --------------------------------------------------------------------------------


def keyword_calls(text: str, known: Collection[str]) -> tuple[list[ToolCall], str]:
    """Calls of a known tool that fill a whole line (backticks allowed), and the other lines."""
    calls: list[ToolCall] = []
    kept: list[str] = []
    for line in text.splitlines(keepends=True):
        call = keyword_call(line.strip().strip("`").strip(), known)
        if call is None:
            kept.append(line)
        else:
            calls.append(call)
    rest = "".join(kept)
    return calls, FENCE.sub("", rest) if calls else text


def keyword_call(line: str, known: Collection[str]) -> ToolCall | None:
    """The call that `line` is, with at least one KEY=VALUE, or None."""
    name, bracket, rest = line.partition("(")
    if not bracket or name.strip() not in known or not rest.endswith(")"):
        return None
    arguments = keyword_arguments(rest[:-1])
    return ToolCall(name.strip(), arguments, "keyword") if arguments else None


def keyword_arguments(body: str) -> dict[str, Any] | None:
    """KEY=VALUE pairs between brackets, quotes taken off; None when anything else is there."""
    arguments: dict[str, Any] = {}
    place = 0
    while place < len(body):
        match = PAIR.match(body, place)
        if match is None:
            return None
        arguments[match.group(1)] = plain_value(match.group(2))
        place = match.end()
    return arguments


def plain_value(written: str) -> Any:
    """A written value as a string, number, truth value or None."""
    if written[0] in "\"'" and written[-1] == written[0] and len(written) > 1:
        return re.sub(r"\\(.)", unescaped, written[1:-1])
    words = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
    if written in words:
        return words[written]
    number = read_json(written) if re.fullmatch(r"-?\d{1,18}(\.\d{1,18})?", written) else None
    return written if number is None else number


def unescaped(match: re.Match[str]) -> str:
    return {"n": "\n", "t": "\t"}.get(match.group(1), match.group(1))


def prose_calls(text: str, known: Collection[str]) -> tuple[list[ToolCall], str]:
    """Every NAME(...) of a known tool, also in a sentence (the source's rule); text unchanged."""
    if not known:
        return [], text
    names = "|".join(re.escape(name) for name in sorted(known))
    found = re.finditer(rf"\b({names})\s{{0,8}}\(([^()\n]*)\)", text)
    calls = [
        ToolCall(match.group(1), keyword_arguments(match.group(2)) or {}, "keyword")
        for match in found
    ]
    return calls, text
