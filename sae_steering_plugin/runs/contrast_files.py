"""Contrast sets on disk: read, checked line by line, and turned into a `Contrast`.

Five forms, told apart by the file's ending and the fields of its first record:

    pairs       .jsonl or .csv   positive, negative[, group]
    caa         .json list       question, answer_matching_behavior, answer_not_matching_behavior
    evals       .jsonl           the same fields on each line, answers " Yes"/" No" or " (A)"
    persona     .json object     instruction: list of {pos, neg}, questions: list
    traits      .jsonl           system_high, system_low, user[, domain, template, tools]

`statements` is a second reading of an evals file: its `statement` texts, unpaired, without a
question. A file is read and checked whole before anything else happens, so that a bad file fails
before a model is loaded; chat forms are rendered afterwards, with the model's own chat template.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sae_steering_plugin.directions.recipe import LETTER_SLACK
from sae_steering_plugin.runs.scenarios import TOOLS, tool_name
from sae_steering_plugin.types import Contrast

LARGEST_FILE = 256 * 2**20
"""Bytes. Larger files are refused before they are read."""

LONGEST_TEXT = 100_000
"""Characters of one text: far beyond what a read position in a prompt can mean."""

LONGEST_LINE = 1_000_000
"""Characters of one line or record."""

Render = Callable[[Sequence[Mapping[str, str]], Sequence[str]], str]
"""(messages, names of the tools offered) -> prompt text that ends where the assistant begins."""


@dataclass(frozen=True)
class Side:
    """One side of a pair: a ready `text`, or a chat turn to render, then the chosen `answer`."""

    text: str = ""
    system: str = ""
    user: str = ""
    answer: str = ""
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class ContrastFile:
    """A checked file: `positive` and `negative` sides and their groups, still without a model.

    Groups are one per pair, or one per text (positives, then negatives) when not `paired`; empty
    when the file names none.
    """

    positive: tuple[Side, ...]
    negative: tuple[Side, ...]
    groups: tuple[str, ...]
    paired: bool
    format: str
    name: str
    source: str

    @property
    def chat(self) -> bool:
        """True when the texts are conversations, which a chat template should render."""
        return not self.positive[0].text

    @property
    def answers(self) -> dict[str, float]:
        """Share of each answer among the matching ones, largest first; empty without answers."""
        return answer_shares(self.positive)

    def contrast(self, render: Render | None = None) -> Contrast:
        """The texts, with the character offset of each choice letter where every answer is one.

        `render` writes chat turns (see `chat_render`); without one they are plain paragraphs. Texts
        of the question forms end in the chosen letter ("... (A") or word ("... Yes").
        """
        positive = [written(side, render) for side in self.positive]
        negative = [written(side, render) for side in self.negative]
        answers = [side.answer for side in (*self.positive, *self.negative)]
        lettered = all(CHOICE.fullmatch(answer) for answer in answers)
        return Contrast(
            positive=tuple(text for text, _ in positive),
            negative=tuple(text for text, _ in negative),
            groups=self.groups,
            letters=(
                tuple(offset for _, offset in positive) if lettered else (),
                tuple(offset for _, offset in negative) if lettered else (),
            ),
            paired=self.paired,
            name=self.name,
            source=self.source,
        )


def read_contrast(
    path: str | Path,
    *,
    format: str | None = None,
    render: Render | None = None,
    allow_unbalanced_letters: bool = False,
) -> Contrast:
    """The contrast set in a file, as texts.

    `format` is one of the module's six words (found from the file when None). Raises ValueError
    that names file, line and field for whatever is not a clean set, FileNotFoundError without file.
    """
    checked = read_contrast_file(
        path, format=format, allow_unbalanced_letters=allow_unbalanced_letters
    )
    return checked.contrast(render)


def read_contrast_file(
    path: str | Path, *, format: str | None = None, allow_unbalanced_letters: bool = False
) -> ContrastFile:
    """The checked records of a file, without model and tokenizer. Raises as `read_contrast` does.

    A question set in which one answer's share differs between the matching and the other answers by
    more than a fifth is refused unless `allow_unbalanced_letters`: the letter would be the vector.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        near = get_close_matches(format, FORMATS, n=1) or list(FORMATS)
        raise ValueError(f"no contrast format {format!r}; did you mean {', '.join(near)}?")
    text, digest = whole_text(path)
    records = listed(readers_by_ending[path.suffix.lower()](text, path), path)
    found = format_of(records[0], path)
    form = format or found
    if form != found and not (form == "statements" and found in ("evals", "caa")):
        raise ValueError(f"{records[0].place}: this file holds the form {found!r}, not {form!r}")
    for record in records:
        check_same_form(record, found, records[0])
    sides = FORMATS[form](records)
    made = ContrastFile(
        positive=tuple(sides.positive),
        negative=tuple(sides.negative),
        groups=sides.groups,
        paired=sides.paired,
        format=form,
        name=path.stem,
        source=f"{path.name} sha256:{digest[:16]}",
    )
    if not allow_unbalanced_letters:
        refuse_unbalanced(made, path)
    return made


def refuse_unbalanced(file: ContrastFile, path: Path) -> None:
    """Raise ValueError when an answer's share differs between the sides by more than the slack.

    For pairs that answer with opposite letters that is a share outside 40 to 60 %.
    """
    matching, other = answer_shares(file.positive), answer_shares(file.negative)
    for answer, share in matching.items():
        if abs(share - other.get(answer, 0.0)) > LETTER_SLACK + 1e-9:
            shares = ", ".join(f"{name} {part:.0%}" for name, part in matching.items())
            raise ValueError(
                f"{path}: field 'answer_matching_behavior': answers are not balanced ({shares}): "
                f"the vector would hold the answer {answer!r}. Swap the options in half of the "
                "questions, or pass allow_unbalanced_letters=True (--allow-unbalanced-letters)"
            )


def answer_shares(sides: Sequence[Side]) -> dict[str, float]:
    """Share of each answer on one side, largest first; empty without answers."""
    counts = Counter(letter_of(side.answer) for side in sides if side.answer)
    return {answer: n / len(sides) for answer, n in counts.most_common()}


def chat_render(tokenizer: Any, schemas: Sequence[Mapping[str, Any]] = TOOLS) -> Render:
    """A `Render` by the tokenizer's chat template, tools included, thinking off.

    Raises ValueError when the tokenizer has no template, and when a record offers an unknown tool.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "this tokenizer has no chat template: texts are then written as plain paragraphs "
            "(render=None)"
        )
    known = {tool_name(schema): schema for schema in schemas}

    def render(messages: Sequence[Mapping[str, str]], tools: Sequence[str]) -> str:
        unknown = [name for name in tools if name not in known]
        if unknown:
            raise ValueError(f"no schema for tool {unknown[0]!r}; known are {', '.join(known)}")
        offered = [known[name] for name in tools]
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=offered or None,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
        )

    return render


def written(side: Side, render: Render | None) -> tuple[str, int]:
    """A side as text, and the offset of its answer's first letter (-1 without an answer)."""
    if side.text:
        return side.text, -1
    if render is not None:
        messages = [{"role": "user", "content": side.user}]
        if side.system:
            messages.insert(0, {"role": "system", "content": side.system})
        body = render(messages, side.tools)
    else:
        body = "\n\n".join(part for part in (side.system, side.user) if part)
    if not side.answer:
        return body, -1
    if render is None:
        body = body.rstrip()
        body += "" if body.endswith("Answer:") else "\n\nAnswer:"
    choice = CHOICE.fullmatch(side.answer)
    ending = f"({choice[1]}" if choice else side.answer.strip()
    start = body + ("" if body[-1:].isspace() else " ")
    return start + ending, len(start) + (1 if choice else 0)


CHOICE = re.compile(r"\s*\(([A-Za-z0-9])\)?\s*")
"""An answer that is a choice letter in brackets."""


def letter_of(answer: str) -> str:
    """The letter of a choice, or the whole answer word."""
    choice = CHOICE.fullmatch(answer)
    return choice[1] if choice else answer.strip()


# Text and records -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One object of a file and where it stands, as `file:line`."""

    values: Mapping[str, Any]
    place: str


def whole_text(path: Path) -> tuple[str, str]:
    """The file as text, and its SHA-256. Raises ValueError for what cannot be a contrast set."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the file inside it")
    if path.suffix.lower() not in readers_by_ending:
        raise ValueError(
            f"{path}: contrast sets are read from {', '.join(readers_by_ending)}, not "
            f"{path.suffix or 'a file without ending'!r}"
        )
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{path} has {size:,} bytes; at most {LARGEST_FILE:,} are read")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text: {error.reason}") from error
    return text, hashlib.sha256(raw).hexdigest()


def listed(records: Iterator[Record], path: Path) -> list[Record]:
    found = list(records)
    if not found:
        raise ValueError(f"{path} holds no record")
    return found


def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises ValueError for a key that occurs twice."""
    counts = Counter(key for key, _ in pairs)
    repeated = [key for key, n in counts.items() if n > 1]
    if repeated:
        raise RepeatedField(repeated[0])
    return dict(pairs)


class RepeatedField(ValueError):
    """A JSON object names one field twice."""


DECODER = json.JSONDecoder(object_pairs_hook=no_repeats)


def decoded(text: str, start: int, place: Callable[[int], str]) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends; errors name the place."""
    try:
        value, end = DECODER.raw_decode(text, start)
    except RepeatedField as error:
        raise ValueError(f"{place(start)}: field {error.args[0]!r} occurs twice") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{place(error.pos)}: not JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{place(start)}: not JSON that can be read: {error}") from error
    if end - start > LONGEST_LINE:
        raise ValueError(
            f"{place(start)}: this record has {end - start:,} characters; at most {LONGEST_LINE:,}"
        )
    return value, end


def json_lines(text: str, path: Path) -> Iterator[Record]:
    """One object per line; blank lines are passed over."""
    for number, line in enumerate(text.split("\n"), start=1):
        place = f"{path}:{number}"
        if len(line) > LONGEST_LINE:
            raise ValueError(
                f"{place}: this line has {len(line):,} characters; at most {LONGEST_LINE:,}"
            )
        stripped = line.strip()
        if not stripped:
            continue
        value, end = decoded(stripped, 0, lambda _, place=place: place)  # type: ignore[misc]
        if stripped[end:].strip():
            raise ValueError(f"{place}: not JSON: more text follows the object")
        yield Record(an_object(value, place), place)


def json_document(text: str, path: Path) -> Iterator[Record]:
    """The objects of a JSON list with the lines they begin on, or the one object of the file."""

    def place(at: int) -> str:
        return f"{path}:{text.count(chr(10), 0, at) + 1}"

    at = skip_blank(text, 0)
    if at == len(text):
        return
    if text[at] != "[":
        value, end = decoded(text, at, place)
        if text[end:].strip():
            raise ValueError(
                f"{place(skip_blank(text, end))}: not JSON: more text follows the object"
            )
        yield Record(an_object(value, place(at)), place(at))
        return
    line, seen = 1, 0
    at = skip_blank(text, at + 1)
    closed = text[at : at + 1] == "]"
    while not closed:
        line, seen = line + text.count("\n", seen, at), at
        value, end = decoded(text, at, place)
        yield Record(an_object(value, f"{path}:{line}"), f"{path}:{line}")
        at = skip_blank(text, end)
        mark = text[at : at + 1]
        if mark not in (",", "]"):
            raise ValueError(f"{place(at)}: not JSON: a list goes on with ',' or ends with ']'")
        closed = mark == "]"
        at = at if closed else skip_blank(text, at + 1)
    if text[at + 1 :].strip():
        raise ValueError(f"{place(skip_blank(text, at + 1))}: not JSON: more text follows the list")


BLANK = re.compile(r"[ \t\r\n]*")


def skip_blank(text: str, at: int) -> int:
    found = BLANK.match(text, at)
    return found.end() if found else at


def table_rows(
    text: str, path: Path, required: Sequence[str] = ("positive", "negative")
) -> Iterator[Record]:
    """One record per row of a comma-separated table with a header line."""
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    previous = csv.field_size_limit(LONGEST_TEXT)
    try:
        header: list[str] = []
        start = 1
        for cells in lines:
            place, start = f"{path}:{start}", lines.line_num + 1
            if not header:
                header = header_of(cells, place, required)
            elif any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    raise ValueError(
                        f"{place}: {len(cells)} cells under {len(header)} column names"
                    )
                yield Record(dict(zip(header, cells, strict=True)), place)
    except csv.Error as error:
        raise ValueError(
            f"{path}:{lines.line_num}: not a table of comma-separated text: {error}"
        ) from error
    finally:
        csv.field_size_limit(previous)


def header_of(cells: Sequence[str], place: str, required: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    repeated = [name for name, n in Counter(names).items() if n > 1]
    if repeated:
        raise ValueError(f"{place}: column {repeated[0]!r} occurs twice in the header")
    missing = [name for name in required if name not in names]
    if missing:
        raise ValueError(
            f"{place}: field {missing[0]!r} is missing from the header: a table needs the columns "
            f"positive, negative[, group]; it has {', '.join(names) or 'none'}"
        )
    return names


readers_by_ending: dict[str, Callable[[str, Path], Iterator[Record]]] = {
    ".jsonl": json_lines,
    ".csv": table_rows,
    ".json": json_document,
}


def an_object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a JSON object is needed, not {kind(value)}")
    return value


def kind(value: Any) -> str:
    """What a JSON value is, in a reader's words."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")


# Forms ------------------------------------------------------------------------------------------

MARKS: dict[str, tuple[str, ...]] = {
    "traits": ("system_high", "system_low"),
    "persona": ("instruction", "questions"),
    "evals": ("answer_matching_behavior", "answer_not_matching_behavior"),
    "pairs": ("positive", "negative"),
}
"""Fields by which each form is known; one is enough, so that the missing one can be named."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "pairs": ("group",),
    "traits": ("domain", "template", "tools"),
    "evals": ("statement",),
    "caa": (),
    "persona": (),
}


def known_form(values: Mapping[str, Any]) -> str | None:
    """The form whose marks a record carries; None when it carries none."""
    return next((form for form, names in MARKS.items() if any(n in values for n in names)), None)


def format_of(record: Record, path: Path) -> str:
    """The form of a file, from its first record."""
    form = known_form(record.values)
    if form is None:
        if "question" in record.values:
            raise ValueError(
                f"{record.place}: field 'answer_matching_behavior' is missing: questions without "
                "answers hold no contrast"
            )
        fields = ", ".join(map(repr, list(record.values)[:6])) or "none"
        raise ValueError(
            f"{record.place}: field 'positive' is missing (fields here: {fields}); a record has "
            "positive and negative, or question and answers, or system_high, system_low and user"
        )
    if form == "evals" and path.suffix.lower() == ".json":
        return "caa"
    if form == "persona" and path.suffix.lower() != ".json":
        raise ValueError(f"{record.place}: the form 'persona' is one object in a .json file")
    return form


def check_same_form(record: Record, form: str, first: Record) -> None:
    """Raise ValueError for a record of another form, or a field that looks like a misspelt one."""
    own = known_form(record.values)
    expected = "evals" if form == "caa" else form
    if own is not None and own != expected:
        raise ValueError(
            f"{record.place}: field {next(n for n in MARKS[own] if n in record.values)!r} belongs "
            f"to the form {own!r}, but {first.place} is {form!r}: one file holds one form"
        )
    for name in OPTIONAL[form]:
        if name in record.values:
            continue
        strangers = [key for key in record.values if key not in (*MARKS[expected], *OPTIONAL[form])]
        near = [
            key
            for key in get_close_matches(name, strangers, n=1, cutoff=0.8)
            if key.lower().strip("s_ ") == name
        ]
        if near:
            raise ValueError(f"{record.place}: field {near[0]!r} is not read; write it {name!r}")


def text_field(record: Record, name: str, *, blank: bool = False) -> str:
    """A field that is text. Raises ValueError when missing, of another type, blank or too long."""
    if name not in record.values:
        near = get_close_matches(name, list(record.values), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{record.place}: field {name!r} is missing{hint}")
    return checked_text(record.values[name], name, record.place, blank=blank)


def checked_text(value: Any, name: str, place: str, *, blank: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {name!r} must be text, not {kind(value)}")
    if not blank and not value.strip():
        raise ValueError(f"{place}: field {name!r} is empty")
    if len(value) > LONGEST_TEXT:
        raise ValueError(
            f"{place}: field {name!r} has {len(value):,} characters; at most {LONGEST_TEXT:,}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: field {name!r} holds half of a surrogate pair at character {error.start}"
        ) from error
    return value


@dataclass(frozen=True)
class Sides:
    """What a form's reader gives: both sides, their groups, and whether they pair up."""

    positive: Sequence[Side]
    negative: Sequence[Side]
    groups: tuple[str, ...]
    paired: bool = True


def pairs(records: Sequence[Record]) -> Sides:
    """Ready texts. Either every record names a group or none does."""
    sides: list[tuple[Side, Side]] = []
    groups: list[str] = []
    grouped = "group" in records[0].values
    for record in records:
        high, low = text_field(record, "positive"), text_field(record, "negative")
        differ(high, low, "positive", "negative", record)
        if grouped != ("group" in record.values):
            raise ValueError(
                f"{record.place}: field 'group' is {'missing' if grouped else 'given'} here, not "
                f"so on {records[0].place}: group all pairs or none"
            )
        if grouped:
            groups.append(name_field(record, "group"))
        sides.append((Side(text=high), Side(text=low)))
    return paired(sides, tuple(groups))


def questions(records: Sequence[Record]) -> Sides:
    """Question sets: one pair per question, equal up to the chosen answer; grouped by question."""
    sides: list[tuple[Side, Side]] = []
    for record in records:
        question = text_field(record, "question")
        matching = answer_field(record, "answer_matching_behavior")
        other = answer_field(record, "answer_not_matching_behavior")
        differ(
            letter_of(matching),
            letter_of(other),
            "answer_matching_behavior",
            "answer_not_matching_behavior",
            record,
        )
        sides.append((Side(user=question, answer=matching), Side(user=question, answer=other)))
    return paired(sides, numbered("question", [high.user for high, _ in sides]))


def statements(records: Sequence[Record]) -> Sides:
    """Statements someone of that persona would (Yes) or would not (No) make, unpaired."""
    positive: list[Side] = []
    negative: list[Side] = []
    for record in records:
        statement = text_field(record, "statement")
        word = letter_of(answer_field(record, "answer_matching_behavior")).lower()
        if word not in ("yes", "no"):
            raise ValueError(
                f"{record.place}: field 'answer_matching_behavior' is {word!r}; statements are "
                "read by Yes and No"
            )
        (positive if word == "yes" else negative).append(Side(text=statement))
    for side, word in ((positive, "Yes"), (negative, "No")):
        if not side:
            raise ValueError(
                f"{records[0].place}: field 'answer_matching_behavior' is {word!r} on no line: "
                "statements of both kinds are needed"
            )
    groups = numbered("statement", [side.text for side in (*positive, *negative)])
    return Sides(positive, negative, groups, paired=False)


def traits(records: Sequence[Record]) -> Sides:
    """Opposite system prompts on one user message; grouped by template, else by the two prompts."""
    sides: list[tuple[Side, Side]] = []
    groups: list[str] = []
    numbers: dict[tuple[str, str], int] = {}
    for record in records:
        high, low = text_field(record, "system_high"), text_field(record, "system_low")
        differ(high, low, "system_high", "system_low", record)
        user, tools = text_field(record, "user"), names_field(record, "tools")
        if "template" in record.values:
            domain = name_field(record, "domain") if "domain" in record.values else ""
            groups.append(f"{domain} template {name_field(record, 'template')}".strip())
        else:
            groups.append(f"prompts {numbers.setdefault((high, low), len(numbers))}")
        sides.append(
            (Side(system=high, user=user, tools=tools), Side(system=low, user=user, tools=tools))
        )
    return paired(sides, tuple(groups))


def persona(records: Sequence[Record]) -> Sides:
    """Every opposite pair of instructions with every question; grouped by instruction."""
    record = records[0]
    if len(records) > 1:
        raise ValueError(
            f"{records[1].place}: the form 'persona' is one object, not a list of them"
        )
    sides: list[tuple[Side, Side]] = []
    groups: list[str] = []
    asked = [
        checked_text(question, f"questions[{i}]", record.place)
        for i, question in enumerate(list_field(record, "questions"))
    ]
    for i, instruction in enumerate(list_field(record, "instruction")):
        name = f"instruction[{i}]"
        if not isinstance(instruction, dict):
            raise ValueError(
                f"{record.place}: field {name!r} must be an object with pos and neg, not "
                f"{kind(instruction)}"
            )
        for word in ("pos", "neg"):
            if word not in instruction:
                raise ValueError(f"{record.place}: field {f'{name}.{word}'!r} is missing")
        high = checked_text(instruction["pos"], f"{name}.pos", record.place)
        low = checked_text(instruction["neg"], f"{name}.neg", record.place)
        differ(high, low, f"{name}.pos", f"{name}.neg", record)
        for question in asked:
            sides.append((Side(system=high, user=question), Side(system=low, user=question)))
            groups.append(f"instruction {i}")
    return paired(sides, tuple(groups))


def paired(sides: Sequence[tuple[Side, Side]], groups: tuple[str, ...]) -> Sides:
    return Sides([high for high, _ in sides], [low for _, low in sides], groups)


def numbered(word: str, texts: Sequence[str]) -> tuple[str, ...]:
    """One name per text, the same for equal texts."""
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return tuple(f"{word} {numbers[text]}" for text in texts)


def differ(high: str, low: str, one: str, other: str, record: Record) -> None:
    if high == low:
        raise ValueError(f"{record.place}: fields {one!r} and {other!r} are the same text")


def answer_field(record: Record, name: str) -> str:
    """An answer: a choice letter in brackets or a short word."""
    answer = text_field(record, name)
    if len(answer) > 40 or "\n" in answer.strip():
        raise ValueError(
            f"{record.place}: field {name!r} must be a choice as '(A)' or a word as ' Yes'"
        )
    return answer


def name_field(record: Record, name: str) -> str:
    """A group name: text or a whole number."""
    value = record.values[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return checked_text(value, name, record.place)


def names_field(record: Record, name: str) -> tuple[str, ...]:
    """An optional list of names."""
    if name not in record.values:
        return ()
    value = record.values[name]
    if not isinstance(value, list):
        raise ValueError(
            f"{record.place}: field {name!r} must be a list of names, not {kind(value)}"
        )
    return tuple(checked_text(item, f"{name}[{i}]", record.place) for i, item in enumerate(value))


def list_field(record: Record, name: str) -> list[Any]:
    if name not in record.values:
        raise ValueError(f"{record.place}: field {name!r} is missing")
    value = record.values[name]
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{record.place}: field {name!r} must be a list that is not empty, not "
            f"{'an empty list' if value == [] else kind(value)}"
        )
    return value


FORMATS: dict[str, Callable[[Sequence[Record]], Sides]] = {
    "pairs": pairs,
    "caa": questions,
    "evals": questions,
    "statements": statements,
    "persona": persona,
    "traits": traits,
}
"""The words `format` may be, and how each is read."""
