import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_steering_plugin.runs.tool_calls import ParsedTurn, ToolCall, parse_turn

TOOLS = ("web_search", "code_execute", "ask_user", "file_read", "file_write")

names = st.sampled_from(TOOLS)
keys = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
words = st.text(
    st.characters(exclude_characters="<>", exclude_categories=["Cs", "Cc"]), max_size=20
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
json_arguments = st.dictionaries(keys, json_values, max_size=3)
text_arguments = st.dictionaries(keys, words, min_size=1, max_size=3)
PIECES = (
    *("<tool_call>", "</tool_call>", "<function=", "ask_user>", "</function>", "<parameter="),
    *("a>", "</parameter>", '{"name": "ask_user", "arguments": {', "}}", '"name"', "[", "{"),
    *('"', "\\", "ask_user(", "question=", ")", ",", "```", "\n", "<|im_end|>", "text", "'"),
)
garbage = st.text(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


def tagged(name, arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def native(name, arguments):
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def keyword(name, arguments):
    return f"{name}({', '.join(f'{k}={json.dumps(v)}' for k, v in arguments.items())})"


@given(names, json_arguments)
def test_tagged_json_comes_back_as_it_was_written(name, arguments):
    turn = parse_turn(tagged(name, arguments), tools=TOOLS)
    assert turn == ParsedTurn((ToolCall(name, arguments, "tagged"),), "")
    assert turn.valid


@given(names, text_arguments)
def test_native_tags_come_back_as_they_were_written(name, arguments):
    turn = parse_turn(native(name, arguments), tools=TOOLS)
    assert turn == ParsedTurn((ToolCall(name, arguments, "native"),), "")


@given(names, json_arguments, st.booleans())
def test_bare_json_comes_back_with_and_without_a_fence(name, arguments, fenced):
    written = json.dumps({"name": name, "arguments": arguments}, indent=1)
    turn = parse_turn(f"```json\n{written}\n```" if fenced else written, tools=TOOLS)
    assert turn == ParsedTurn((ToolCall(name, arguments, "json"),), "")


@given(
    names,
    st.dictionaries(
        keys,
        st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='\\"<>')),
        min_size=1,
        max_size=3,
    ),
)
def test_a_keyword_call_on_its_own_line_comes_back(name, arguments):
    turn = parse_turn(f"I will look.\n{keyword(name, arguments)}", tools=TOOLS)
    assert turn.calls == (ToolCall(name, arguments, "keyword"),)
    assert turn.text == "I will look."


@given(garbage)
def test_no_text_makes_the_parser_raise(text):
    for prose in (False, True):
        turn = parse_turn(text, tools=TOOLS, prose=prose)
        assert turn.valid == (not turn.problem)
        assert all(isinstance(call.name, str) for call in turn.calls)
        assert turn.calls or turn.text or not turn.valid


@given(garbage)
def test_a_valid_turn_is_a_known_call_or_clean_text(text):
    turn = parse_turn(text, tools=TOOLS, control=("<eos>",))
    if turn.valid:
        assert all(call.name in TOOLS and isinstance(call.arguments, dict) for call in turn.calls)
        assert not any(mark in turn.text for mark in ("<tool_call", "<function=", "<|im_end|>"))
        assert turn.calls or turn.text.strip()


@given(st.text(st.characters(exclude_characters="<{(", exclude_categories=["Cs"]), max_size=80))
def test_text_without_markup_holds_no_call_and_is_kept(text):
    turn = parse_turn(text, tools=TOOLS)
    assert turn.calls == ()
    assert turn.text == text.strip()
    assert turn.valid == bool(text.strip())


def test_several_calls_in_one_turn_keep_their_order_and_the_text_beside_them():
    written = (
        "First. " + tagged("web_search", {"query": "a"}) + native("ask_user", {"question": "b"})
    )
    turn = parse_turn(written, tools=TOOLS)
    assert [call.name for call in turn.calls] == ["web_search", "ask_user"]
    assert turn.text == "First."
    listed = [{"name": "ask_user", "arguments": {}}, {"name": "file_read", "arguments": {}}]
    assert [c.name for c in parse_turn(json.dumps(listed), tools=TOOLS).calls] == [
        "ask_user",
        "file_read",
    ]


def test_tagged_calls_hide_calls_of_lower_priority():
    written = tagged("web_search", {"query": "a"}) + '\n{"name": "ask_user", "arguments": {}}'
    assert [call.name for call in parse_turn(written, tools=TOOLS).calls] == ["web_search"]
    written = '{"name": "ask_user", "arguments": {}}\nweb_search(query="a")'
    assert [call.name for call in parse_turn(written, tools=TOOLS).calls] == ["ask_user"]


def test_prose_that_names_a_tool_counts_only_when_asked_for():
    sentence = "Before that I would ask_user(question='which one?') about the port."
    assert parse_turn(sentence, tools=TOOLS).calls == ()
    assert parse_turn(sentence, tools=TOOLS).valid
    (call,) = parse_turn(sentence, tools=TOOLS, prose=True).calls
    assert (call.name, call.arguments) == ("ask_user", {"question": "which one?"})
    assert parse_turn("see ask_user(...)", tools=TOOLS, prose=True).calls[0].arguments == {}


def test_openai_s_forms_of_a_call_are_read():
    inner = {"name": "ask_user", "arguments": '{"question": "x"}'}
    for written in (inner, {"type": "function", "function": inner}):
        (call,) = parse_turn(json.dumps(written), tools=TOOLS).calls
        assert call.arguments == {"question": "x"}
    (call,) = parse_turn('{"name": "ask_user", "parameters": {}}', tools=TOOLS).calls
    assert call.arguments == {}


@pytest.mark.parametrize(
    ("text", "problem", "calls"),
    [
        ("", "empty", 0),
        ("  \n", "empty", 0),
        ("<tool_call>", "unclosed <tool_call>", 0),
        ('<tool_call>{"name": "ask_user", "arguments": {}}', "unclosed <tool_call>", 1),
        ("<tool_call>not json</tool_call>", "neither JSON nor a function", 0),
        ('<tool_call>{"name": "ask_user", "arguments": "x"}</tool_call>', "neither JSON", 0),
        ('<tool_call>{"name": "ask_user"}</tool_call>', "neither JSON", 0),
        ('<tool_call>{"name": "ask_user", "arguments": {"a": NaN}}</tool_call>', "neither JSON", 0),
        ("done</tool_call>", "broken markup '</tool_call'", 0),
        ("<function=ask_user><parameter=q>x", "broken markup '<function'", 0),
        ("done <|im_start|>user", "broken markup '<|im_start|>'", 0),
        ("<tool_response>{}</tool_response>", "broken markup '<tool_response'", 0),
        ("a <pad> b", "control token '<pad>'", 0),
        (tagged("rm_rf", {}), "unknown tool 'rm_rf'", 1),
        (tagged("ask_user", {}) + "<tool_call>", "unclosed", 1),
        (tagged("ask_user", {}) + "</tool_call>", "broken markup", 1),
    ],
)
def test_what_is_wrong_with_a_turn_is_said(text, problem, calls):
    turn = parse_turn(text, tools=TOOLS, control=("<pad>",))
    assert problem in turn.problem
    assert not turn.valid
    assert len(turn.calls) == calls


def test_any_name_is_known_without_a_list_of_tools():
    assert parse_turn(tagged("anything", {})).valid


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 4000,
        "<function=a>" * 4000,
        '{"name":' * 4000,
        '{"name": ["' * 2000,
        "[" * 40_000 + '"name"',
        "<tool_call>" + "[" * 40_000 + "</tool_call>",
        "ask_user(" * 4000,
        "ask_user(a=" + '"' * 20_000 + ")",
        "ask_user(" + "a=b, " * 5000 + ")",
        '{"name": "ask_user", "arguments": {"a": ' + "9" * 20_000 + "}}",
    ],
    ids=lambda text: text[:14],
)
def test_hostile_texts_are_read_in_good_time(text):
    start = time.perf_counter()
    parse_turn(text, tools=TOOLS, prose=True)
    parse_turn(text, tools=TOOLS)
    assert time.perf_counter() - start < 3
