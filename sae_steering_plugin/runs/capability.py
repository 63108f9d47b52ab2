"""What steering must not break: two-choice sets of knowledge, read into `ChoiceItem`s.

    mmlu.json, truthful_qa.json     CAA's two-choice sets (prompt, correct, incorrect, ...)
    TruthfulQA.csv                  the authors' table: best answer against the first incorrect one
    *_test.csv                      MMLU's own: question, A, B, C, D, letter, without a header

`read_truthful` keeps all answers of TruthfulQA.csv, for the authors' own MC1 and MC2. Elsewhere
`matching` is the correct answer throughout, so `p_match` is the probability of the truth. An
organism knows none of these; its world's sums and facts stand beside them (`world_capability`),
scored as completions of the sentence.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_steering_plugin.runs.choice_items import ChoiceItem, options_of
from sae_steering_plugin.runs.contrast_files import (
    Record,
    answer_field,
    checked_text,
    differ,
    json_document,
    letter_of,
    listed,
    text_field,
    whole_text,
)

WORLD_SETS = ("arithmetic", "facts")
"""What an organism's world knows."""


def read_capability(path: str | Path) -> tuple[ChoiceItem, ...]:
    """The two-choice items of a file in one of the three forms.

    Raises ValueError that names file and line for a record that is not one of them.
    """
    path = Path(path)
    text, _ = whole_text(path)
    if path.suffix.lower() == ".json":
        records = listed(json_document(text, path), path)
        return tuple(two_choice(record) for record in records)
    if path.suffix.lower() != ".csv":
        raise ValueError(
            f"{path}: capability sets are read from .json (CAA) and .csv (TruthfulQA, MMLU)"
        )
    rows = list(csv_rows(text, path))
    if not rows:
        raise ValueError(f"{path} holds no record")
    header = [cell.strip() for cell in rows[0][1]]
    if is_truthful(header):
        made = truthful_rows(rows)
    elif len(header) == 6 and header[-1] in "ABCD":
        made = mmlu_rows(rows)
    else:
        raise ValueError(
            f"{rows[0][0]}: neither TruthfulQA's columns (Question, Best Answer, Incorrect "
            "Answers) nor MMLU's six (question, four options, letter)"
        )
    return tuple(made)


def two_choice(record: Record) -> ChoiceItem:
    """A record of CAA's capability files."""
    question = text_field(record, "prompt")
    right = letter_of(answer_field(record, "correct"))
    wrong = letter_of(answer_field(record, "incorrect"))
    differ(right, wrong, "correct", "incorrect", record)
    stem, options = options_of(question, record.place, blank=True)
    for letter in (right, wrong):
        if letter not in options:
            raise ValueError(
                f"{record.place}: field 'prompt': no line begins with '({letter})', and that is "
                "an answer"
            )
    group = text_field(record, "category") if "category" in record.values else ""
    texts = (options[right], options[wrong])
    # CAA's TruthfulQA holds an option without text: it can be shown, and not be scored by itself
    return ChoiceItem(question, right, wrong, stem, texts if all(texts) else (), group)


def csv_rows(text: str, path: Path) -> Iterator[tuple[str, list[str]]]:
    """Each row of a table with the place it begins at. Raises ValueError for broken quoting."""
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        for cells in lines:
            place, start = f"{path}:{start}", lines.line_num + 1
            if any(cell.strip() for cell in cells):
                yield place, cells
    except csv.Error as error:
        raise ValueError(
            f"{path}:{lines.line_num}: not a table of comma-separated text: {error}"
        ) from error


def is_truthful(header: Sequence[str]) -> bool:
    return "Best Answer" in header


def truthful_records(rows: Sequence[tuple[str, list[str]]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row of TruthfulQA's table by column, with its place; cells that are needed hold text."""
    header = [cell.strip() for cell in rows[0][1]]
    needed = ("Question", "Best Answer", "Incorrect Answers")
    for name in needed:
        if name not in header:
            raise ValueError(f"{rows[0][0]}: column {name!r} is missing")
    for place, cells in rows[1:]:
        if len(cells) != len(header):
            raise ValueError(f"{place}: {len(cells)} cells under {len(header)} column names")
        found = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        for name in needed:
            checked_text(found[name], name, place)
        yield place, found


def truthful_rows(rows: Sequence[tuple[str, list[str]]]) -> Iterator[ChoiceItem]:
    for number, (place, found) in enumerate(truthful_records(rows)):
        wrong = found["Incorrect Answers"].split(";")[0].strip()
        group = found.get("Category", "")
        yield two_options(found["Question"], found["Best Answer"], wrong, number, place, group)


def mmlu_rows(rows: Sequence[tuple[str, list[str]]]) -> Iterator[ChoiceItem]:
    """The correct option against the next one in MMLU's order, (D) against (A)."""
    for number, (place, cells) in enumerate(rows):
        if len(cells) != 6 or cells[5].strip() not in "ABCD" or not cells[5].strip():
            raise ValueError(f"{place}: MMLU rows have a question, four options and a letter")
        question = checked_text(cells[0], "question", place).strip()
        right = "ABCD".index(cells[5].strip())
        options = [checked_text(one, "option", place).strip() for one in cells[1:5]]
        yield two_options(question, options[right], options[(right + 1) % 4], number, place, "")


def two_options(
    question: str, right: str, wrong: str, number: int, place: str, group: str
) -> ChoiceItem:
    """A question in CAA's form; the right answer is (A) in every second item."""
    if right == wrong:
        raise ValueError(f"{place}: the right and the wrong answer are the same text")
    letter, other = ("A", "B") if number % 2 == 0 else ("B", "A")
    first, second = (right, wrong) if letter == "A" else (wrong, right)
    asked = f"{question}\n\nChoices:\n(A) {first}\n(B) {second}"
    return ChoiceItem(asked, letter, other, question, (right, wrong), group)


# Many answers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ManyAnswers:
    """A question with all its true and false answers, each a sentence; `best` is one of `true`."""

    question: str
    best: str
    true: tuple[str, ...]
    false: tuple[str, ...]
    group: str = ""

    @property
    def prompt(self) -> str:
        """The question as the authors put it, without their six examples before it."""
        return f"Q: {self.question}\nA:"

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers, the true ones first."""
        return (*self.true, *self.false)


def read_truthful(path: str | Path) -> tuple[ManyAnswers, ...]:
    """TruthfulQA's questions with all reference answers, for MC1 and MC2.

    Answers stand between semicolons and get a full stop where they have none, as in the authors'
    code; the best answer joins the correct ones where it is not among them. Raises ValueError that
    names file and line. An answer that the table lists on both sides counts as true alone.
    """
    path = Path(path)
    text, _ = whole_text(path)
    rows = list(csv_rows(text, path))
    if not rows or not is_truthful([cell.strip() for cell in rows[0][1]]):
        raise ValueError(f"{path} is no table of TruthfulQA: it has no column 'Best Answer'")
    found = []
    for place, one in truthful_records(rows):
        (best,) = sentences(one["Best Answer"].replace(";", ",")) or ("",)
        true = tuple(dict.fromkeys((*sentences(one.get("Correct Answers", "")), best)))
        false = tuple(dict.fromkeys(sentences(one["Incorrect Answers"])))
        false = tuple(answer for answer in false if answer not in true)
        if not false:
            raise ValueError(f"{place}: column 'Incorrect Answers' holds no answer")
        found.append(ManyAnswers(one["Question"], best, true, false, one.get("Category", "")))
    return tuple(found)


def sentences(cell: str) -> tuple[str, ...]:
    """The answers of a cell, each with a full stop."""
    words = (part.strip() for part in cell.split(";"))
    return tuple(one if one.endswith(".") else f"{one}." for one in words if one)


# The world ----------------------------------------------------------------------------------------


def world_capability(
    world: Any, name: str, n: int, *, split: str = "test", seed: int = 0
) -> tuple[ChoiceItem, ...]:
    """Sums or facts of an organism's world: the true completion against another item's answer.

    Distinct items, at most `n`. Score them with options hidden. Raises ValueError for an unknown
    name.
    """
    if name not in WORLD_SETS:
        raise ValueError(f"no capability {name!r}; the world knows {', '.join(WORLD_SETS)}")
    draw: Callable[[], list[dict[str, Any]]] = {
        "arithmetic": lambda: world.arithmetic(50 * n, split=split, seed=seed),
        "facts": world.facts,
    }[name]
    rng = random.Random(f"{name}/{split}/{seed}")
    found = list({one["prompt"]: one for one in draw()}.values())
    rng.shuffle(found)
    return tuple(
        ChoiceItem(
            question=one["prompt"],
            matching=one["answer"],
            other=wrong,
            stem=one["prompt"],
            options=(one["answer"], wrong),
            verbatim=True,
        )
        for one in found[:n]
        for wrong in [other_answer(rng, found, one)]
    )


def other_answer(rng: random.Random, found: Sequence[dict[str, Any]], one: dict[str, Any]) -> str:
    """A wrong answer of the same kind: one that another item with like wording has."""
    kind = one["prompt"].split()[:2] if one["prompt"][0].isalpha() else []
    answers = sorted(
        {
            other["answer"]
            for other in found
            if other["answer"] != one["answer"]
            and (other["prompt"].split()[:2] if other["prompt"][0].isalpha() else []) == kind
        }
    )
    return rng.choice(answers)
