import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steering_plugin.runs import contrast_files
from sae_steering_plugin.runs.contrast_files import (
    chat_render,
    read_contrast,
    read_contrast_file,
)
from sae_steering_plugin.types import Contrast


def put(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


PAIR = {"positive": "I go ahead.", "negative": "May I go ahead?"}
QUESTION = {
    "question": "Go on?\n (A) Yes\n (B) No",
    "answer_matching_behavior": "(A)",
    "answer_not_matching_behavior": "(B)",
}
SWAPPED = {**QUESTION, "answer_matching_behavior": "(B)", "answer_not_matching_behavior": "(A)"}
TRAIT = {"system_high": "Just do it.", "system_low": "Always ask.", "user": "Fix the bug."}


# Real files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sycophancy", "refusal", "hallucination", "coordinate-other-ais"])
def test_caa_texts_end_in_the_chosen_letter(data: Path, name: str) -> None:
    path = data / "caa" / "generate" / f"{name}.json"
    contrast = read_contrast(path)
    answers = json.loads(path.read_text())
    assert len(contrast) == len(answers)
    for i, record in enumerate(answers):
        for texts, offsets, field in (
            (contrast.positive, contrast.letters[0], "answer_matching_behavior"),
            (contrast.negative, contrast.letters[1], "answer_not_matching_behavior"),
        ):
            letter = record[field].strip(" ()")
            assert texts[i].endswith(f"({letter}")
            assert offsets[i] == len(texts[i]) - 1 and texts[i][offsets[i]] == letter
        assert contrast.positive[i][:-1] == contrast.negative[i][:-1]
        assert record["question"] in contrast.positive[i]


def test_caa_set_that_answers_one_letter_too_often_is_refused_unless_forced(data: Path) -> None:
    path = data / "caa" / "generate" / "survival-instinct.json"
    with pytest.raises(ValueError, match=r"answers are not balanced \(A 62%, B 28%"):
        read_contrast(path)
    assert len(read_contrast(path, allow_unbalanced_letters=True)) == 903


def test_evals_pair_yes_with_no_and_statements_do_not_pair(data: Path) -> None:
    path = data / "anthropic-evals" / "persona" / "openness.jsonl"
    paired = read_contrast(path)
    assert len(paired) == 1000 and paired.paired
    assert Counter(text[-3:].strip() for text in paired.positive) == {"Yes": 500, "No": 500}
    assert paired.letters == ((), ())  # the whole word is read, at the last token
    assert paired.positive[0].endswith("Answer: Yes") and paired.negative[0].endswith("Answer: No")
    loose = read_contrast(path, format="statements")
    assert not loose.paired and len(loose.positive) == len(loose.negative) == 500
    assert "I hate new ideas and artistic things" in loose.negative
    assert loose.letters == ((), ())


def test_a_question_that_ends_in_answer_gets_no_second_one(data: Path) -> None:
    path = data / "anthropic-evals" / "advanced-ai-risk-human" / "power-seeking-inclination.jsonl"
    contrast = read_contrast(path, allow_unbalanced_letters=True)
    assert all(text.count("Answer:") == 1 for text in contrast.positive)


def test_persona_pairs_every_instruction_with_every_question(data: Path) -> None:
    contrast = read_contrast(data / "persona-vectors" / "extract" / "evil.json")
    assert len(contrast) == 100
    assert Counter(contrast.groups) == {f"instruction {i}": 20 for i in range(5)}


def test_traits_share_the_user_message_and_group_by_template(data: Path) -> None:
    path = data / "agent-traits" / "contrastive" / "autonomy.jsonl"
    contrast = read_contrast(path)
    assert len(contrast) == 160 and len(set(contrast.groups)) == 40
    for high, low in zip(contrast.positive, contrast.negative, strict=True):
        assert high.split("\n\n", 1)[1] == low.split("\n\n", 1)[1]


def test_traits_are_rendered_by_the_given_hook_with_their_tools(data: Path) -> None:
    seen: list[tuple[str, ...]] = []

    def render(messages: object, tools: object) -> str:
        seen.append(tuple(tools))  # type: ignore[call-overload]
        return "|".join(m["content"] for m in messages) + "|assistant:"  # type: ignore[attr-defined]

    contrast = read_contrast(
        data / "agent-traits" / "contrastive" / "autonomy.jsonl", render=render
    )
    assert contrast.positive[0].startswith("You are an expert coding assistant.")
    assert contrast.positive[0].endswith("|assistant:")
    assert seen[0] == ("code_execute", "file_read", "file_write", "ask_user")


def test_open_ended_caa_file_has_no_contrast(data: Path) -> None:
    path = data / "caa" / "test_open_ended" / "sycophancy.json"
    with pytest.raises(ValueError, match=r"sycophancy.json:2: field 'answer_matching_behavior' is"):
        read_contrast(path)


# Small files ------------------------------------------------------------------------------------


def test_pairs_read_the_same_from_jsonl_and_csv(tmp_path: Path) -> None:
    records = [{**PAIR, "group": "g1"}, {"positive": 'a "b"\nc', "negative": "d,e", "group": "g2"}]
    one = read_contrast(put(tmp_path, "a.jsonl", jsonl(*records)))
    rows = 'group,positive,negative\ng1,I go ahead.,May I go ahead?\ng2,"a ""b""\nc","d,e"\n'
    other = read_contrast(put(tmp_path, "b.csv", rows))
    assert (one.positive, one.negative, one.groups) == (
        other.positive,
        other.negative,
        other.groups,
    )
    assert one.groups == ("g1", "g2") and one.paired


def test_a_byte_order_mark_and_windows_lines_are_no_text(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbfpositive,negative\r\nyes,no\r\n"
    assert read_contrast(put(tmp_path, "a.csv", text)).positive == ("yes",)


def test_a_repeated_question_is_one_group(tmp_path: Path) -> None:
    contrast = read_contrast(put(tmp_path, "a.json", json.dumps([QUESTION, SWAPPED])))
    assert contrast.groups == ("question 0", "question 0")


def test_chat_template_renders_questions_up_to_the_letter(tmp_path: Path) -> None:
    class Tokenizer:
        chat_template = "x"

        def apply_chat_template(self, messages: list[dict[str, str]], **named: object) -> str:
            assert named["add_generation_prompt"] and not named["tokenize"]
            return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    path = put(tmp_path, "a.json", json.dumps([QUESTION, SWAPPED]))
    contrast = read_contrast(path, render=chat_render(Tokenizer()))
    assert contrast.positive[0] == f"<user>{QUESTION['question']}<assistant> (A"
    assert contrast.positive[0][contrast.letters[0][0]] == "A"


def test_chat_render_refuses_what_it_cannot_render() -> None:
    class Bare:
        chat_template = None

    class Templated:
        chat_template = "x"

    with pytest.raises(ValueError, match="no chat template"):
        chat_render(Bare())
    with pytest.raises(ValueError, match="no schema for tool 'telescope'; known are web_search"):
        chat_render(Templated())([{"role": "user", "content": "x"}], ["telescope"])


def test_the_source_names_the_bytes(tmp_path: Path) -> None:
    import hashlib

    path = put(tmp_path, "a.jsonl", jsonl(PAIR))
    assert (
        read_contrast(path).source
        == f"a.jsonl sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    )


DEEP = "[" * 100_000

BAD = {
    "no such ending": (
        "a.pkl",
        b"\x80\x04K\x01.",
        r"a.pkl: contrast sets are read from .jsonl, .csv, .json",
    ),
    "empty": ("a.jsonl", "", "a.jsonl holds no record"),
    "blank lines only": ("a.jsonl", "\n \n", "a.jsonl holds no record"),
    "header only": ("a.csv", "positive,negative\n", "a.csv holds no record"),
    "empty list": ("a.json", "[]", "a.json holds no record"),
    "broken JSON": ("a.jsonl", jsonl(PAIR) + '{"positive": ', r"a.jsonl:2: not JSON"),
    "two objects on a line": ("a.jsonl", "{} {}", r"a.jsonl:1: not JSON: more text follows"),
    "a number": ("a.jsonl", "3\n", r"a.jsonl:1: a JSON object is needed, not a number"),
    "bad UTF-8": (
        "a.jsonl",
        jsonl(PAIR).encode() + b'{"positive": "\xff"}',
        r"a.jsonl:2: not UTF-8",
    ),
    "missing field": (
        "a.jsonl",
        jsonl(PAIR, {"positive": "x"}),
        r":2: field 'negative' is missing",
    ),
    "misspelt field": (
        "a.jsonl",
        jsonl({"positive": "x", "negativ": "y"}),
        "did you mean 'negativ'",
    ),
    "unknown fields": (
        "a.jsonl",
        jsonl({"text": "x"}),
        r":1: field 'positive' is missing \(fields here: 'text'",
    ),
    "empty text": (
        "a.jsonl",
        jsonl(PAIR, {**PAIR, "negative": " "}),
        r":2: field 'negative' is empty",
    ),
    "wrong type": (
        "a.jsonl",
        jsonl({**PAIR, "negative": 3}),
        r":1: field 'negative' must be text, not a number",
    ),
    "null": ("a.jsonl", jsonl({**PAIR, "negative": None}), r"'negative' must be text, not null"),
    "same text": (
        "a.jsonl",
        jsonl({"positive": "x", "negative": "x"}),
        r":1: fields 'positive' and 'negative' are",
    ),
    "field twice": (
        "a.jsonl",
        '{"positive": "x", "positive": "y", "negative": "z"}',
        r":1: field 'positive' occurs twice",
    ),
    "mixed forms": (
        "a.jsonl",
        jsonl(PAIR, TRAIT),
        r":2: field 'system_high' belongs to the form 'traits', but .*:1 is 'pairs'",
    ),
    "group missing": (
        "a.jsonl",
        jsonl({**PAIR, "group": "a"}, PAIR),
        r":2: field 'group' is missing here",
    ),
    "group misspelt": (
        "a.jsonl",
        jsonl({**PAIR, "groups": "a"}),
        r":1: field 'groups' is not read; write it 'group'",
    ),
    "group is a list": (
        "a.jsonl",
        jsonl({**PAIR, "group": []}),
        r":1: field 'group' must be text, not a list",
    ),
    "half a surrogate": (
        "a.jsonl",
        r'{"positive": "\ud800", "negative": "y"}',
        r":1: field 'positive' holds half of",
    ),
    "huge line": (
        "a.jsonl",
        jsonl(PAIR) + '{"positive": "' + "x" * 1_000_001,
        r":2: this line has 1,000,0",
    ),
    "huge text": (
        "a.jsonl",
        jsonl({**PAIR, "positive": "x" * 100_001}),
        r":1: field 'positive' has 100,001",
    ),
    "deep nesting": ("a.jsonl", DEEP, r"a.jsonl:1: not JSON"),
    "deep list": ("a.json", DEEP, r"a.json:1: not JSON"),
    "csv column missing": (
        "a.csv",
        "positive,group\na,b\n",
        r"a.csv:1: field 'negative' is missing from the header",
    ),
    "csv header twice": (
        "a.csv",
        "positive,negative,positive\n",
        r"a.csv:1: column 'positive' occurs twice",
    ),
    "csv short row": (
        "a.csv",
        "positive,negative\na,b\nc\n",
        r"a.csv:3: 1 cells under 2 column names",
    ),
    "csv row after a long one": (
        "a.csv",
        'positive,negative\n"a\n\nb",c\nd\n',
        r"a.csv:5: 1 cells",
    ),
    "csv open quote": ("a.csv", 'positive,negative\n"a,b\n', r"a.csv:2: not a table"),
    "csv huge cell": (
        "a.csv",
        "positive,negative\n" + "a" * 100_001 + ",b\n",
        r"a.csv:2: not a table.*larger than",
    ),
    "caa broken list": (
        "a.json",
        json.dumps([QUESTION], indent=1)[:-1] + ",\n {]",
        r"a.json:\d+: not JSON",
    ),
    "caa list without comma": ("a.json", "[{} {}]", r"a.json:1: not JSON: a list goes on"),
    "caa text after list": (
        "a.json",
        json.dumps([QUESTION]) + "\nx",
        r"a.json:2: not JSON: more text",
    ),
    "caa missing answer": (
        "a.json",
        "[\n" + json.dumps(QUESTION) + ',\n{"question": "x"}]',
        r"a.json:3: field 'answer_matching_behavior' is missing",
    ),
    "caa same answers": (
        "a.json",
        json.dumps([{**QUESTION, "answer_matching_behavior": "(B)"}]),
        "are the same text",
    ),
    "caa long answer": (
        "a.json",
        json.dumps([{**QUESTION, "answer_matching_behavior": "x" * 41}]),
        "must be a choice",
    ),
    "letters one-sided": ("a.json", json.dumps([QUESTION] * 3), r"not balanced \(A 100%\)"),
    "persona list": (
        "a.json",
        json.dumps([{"instruction": [{"pos": "a", "neg": "b"}], "questions": ["q"]}] * 2),
        "one object, not a list",
    ),
    "persona as lines": (
        "a.jsonl",
        jsonl({"instruction": [], "questions": []}),
        "one object in a .json file",
    ),
    "persona no questions": (
        "a.json",
        json.dumps({"instruction": [{"pos": "a", "neg": "b"}], "questions": []}),
        r":1: field 'questions' must be a list that is not empty",
    ),
    "persona without neg": (
        "a.json",
        json.dumps({"instruction": [{"pos": "a"}], "questions": ["q"]}),
        r"field 'instruction\[0\].neg' is missing",
    ),
    "persona bad question": (
        "a.json",
        json.dumps({"instruction": [{"pos": "a", "neg": "b"}], "questions": ["q", 3]}),
        r"field 'questions\[1\]' must be text",
    ),
    "trait without user": (
        "a.jsonl",
        jsonl({"system_high": "a", "system_low": "b"}),
        r":1: field 'user' is missing",
    ),
    "trait tools as text": (
        "a.jsonl",
        jsonl({**TRAIT, "tools": "all"}),
        r":1: field 'tools' must be a list of names",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_a_bad_file_is_refused_by_line_and_field(tmp_path: Path, case: str) -> None:
    name, text, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_contrast(put(tmp_path, name, text))


def test_a_folder_a_missing_file_and_a_giant_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        read_contrast(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_contrast(tmp_path / "none.jsonl")
    path = put(tmp_path, "a.jsonl", jsonl(PAIR))
    monkeypatch.setattr(contrast_files, "LARGEST_FILE", 10)
    with pytest.raises(ValueError, match="at most 10 are read"):
        read_contrast(path)


def test_an_unknown_or_wrong_format_word_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", jsonl(PAIR))
    with pytest.raises(ValueError, match="did you mean pairs"):
        read_contrast(path, format="pair")
    with pytest.raises(ValueError, match="holds the form 'pairs', not 'caa'"):
        read_contrast(path, format="caa")
    with pytest.raises(ValueError, match="field 'statement' is missing"):
        read_contrast(put(tmp_path, "b.jsonl", jsonl(QUESTION, SWAPPED)), format="statements")


def test_reading_a_table_leaves_the_csv_limit_alone(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    read_contrast(put(tmp_path, "a.csv", "positive,negative\na,b\n"))
    assert csv.field_size_limit() == before


words = st.text(min_size=1).filter(str.strip)


@given(st.lists(st.tuples(words, words).filter(lambda p: p[0] != p[1]), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_a_jsonl_file(
    tmp_path_factory: pytest.TempPathFactory, sides: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    records = [{"positive": high, "negative": low} for high, low in sides]
    contrast = read_contrast(put(folder, "a.jsonl", jsonl(*records)))
    assert list(zip(contrast.positive, contrast.negative, strict=True)) == sides


@given(st.sampled_from([".jsonl", ".csv", ".json"]), st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes_give_a_contrast_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, ending: str, raw: bytes
) -> None:
    path = put(tmp_path_factory.mktemp("any"), f"a{ending}", raw)
    try:
        assert isinstance(read_contrast(path), Contrast)
    except ValueError as error:
        assert str(path) in str(error)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("positive", "negative", "group", "question", "answer_matching_behavior", "statement"),
        *("answer_not_matching_behavior", "system_high", "system_low", "user", "tools", "template"),
        *("instruction", "questions", "domain"),
    ]
)


@given(st.sampled_from([".jsonl", ".json"]), st.lists(st.dictionaries(FIELDS, VALUES), max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_json_with_our_fields_gives_a_contrast_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, ending: str, records: list[dict[str, object]]
) -> None:
    text = jsonl(*records) if ending == ".jsonl" else json.dumps(records)
    path = put(tmp_path_factory.mktemp("any"), f"a{ending}", text)
    try:
        read_contrast_file(path)
    except ValueError as error:
        assert str(path) in str(error)
