"""A user's labelled texts: CSV, JSONL or parquet, checked before any model is loaded.

Labels come in three forms: one column with a label per text (every distinct value is a concept),
a column with a list of labels, or one column of 1/0 per concept. A blank label is unknown, not
negative. Every refusal names file, line and column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_steering_plugin.runs.contrast_files import (
    Record,
    checked_text,
    json_lines,
    kind,
    listed,
    table_rows,
    whole_text,
)

if TYPE_CHECKING:
    from sae_steering_plugin.organisms.wording import Split

ENDINGS = (".csv", ".jsonl", ".parquet")
YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
MOST_CONCEPTS = 10_000
"""More distinct values than this in a label column are texts or ids, not concepts."""


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Texts with one column of 1, 0 or NaN (unknown) per concept, and the group of each text.

    `notes` say what was left unknown; nothing else is changed or dropped.
    """

    texts: tuple[str, ...]
    labels: Mapping[str, np.ndarray]
    groups: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_labelled(
    path: str | Path,
    *,
    text: str = "text",
    label: str | None = None,
    concepts: Sequence[str] = (),
    group: str | None = None,
    separator: str | None = None,
) -> LabelledTexts:
    """The texts of a file with their labels.

    `label` names one column of labels, text or lists; `separator` splits text into a list ("a|b").
    `concepts` name columns of 1/0 (also true/false, yes/no) instead. With neither, the column
    "label" or "labels" is taken when there is one, else every other column. `group` names what
    must stay in one split: a thread, an author, a template.

    Raises FileNotFoundError, and ValueError with file, line and column for an unknown column, an
    empty text, a value that is no label, one text with two different labels, and for a concept
    without both kinds of texts.
    """
    path = Path(path)
    if label is not None and concepts:
        raise ValueError("give a label column or concept columns, not both")
    records = listed(text_records(path), path)
    names = tuple(dict.fromkeys(name for record in records for name in record.values))
    for wanted in (text, *concepts, *(name for name in (label, group) if name)):
        if wanted not in names:
            near = get_close_matches(wanted, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"
            raise ValueError(f"{path}: no column {wanted!r}{hint}")
    if label is None and not concepts:
        label = next((name for name in ("label", "labels") if name in names), None)
        concepts = () if label else tuple(n for n in names if n not in (text, group))
        if not label and not concepts:
            raise ValueError(f"{path}: there is no column of labels beside {text!r}")
    texts = tuple(_cell_text(record, text) for record in records)
    if label is not None:
        table, notes = _from_labels(records, label, separator, path)
    else:
        table, notes = _from_columns(records, concepts)
    _refuse_contradictions(records, texts, table)
    _refuse_one_sided(table, path)
    groups = tuple(_cell_text(record, group) for record in records) if group else ()
    about = {"file": str(path), "text": text, "label": label, "concepts": list(table)}
    return LabelledTexts(texts, table, groups, tuple(notes), about)


def text_records(path: Path) -> Iterator[Record]:
    """The rows of a CSV, JSONL or parquet file, each with its place; nothing is checked yet."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path}: labelled texts are read from {', '.join(ENDINGS)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path)
    content, _ = whole_text(path)
    reader = json_lines if path.suffix.lower() == ".jsonl" else _rows_of_any_table
    return reader(content, path)


def _rows_of_any_table(content: str, path: Path) -> Iterator[Record]:
    return table_rows(content, path, required=())


def _parquet_rows(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no parquet file: {error}") from error
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Record(values, f"{path}: row {number}")


def _cell_text(record: Record, name: str) -> str:
    if name not in record.values:
        raise ValueError(f"{record.place}: column {name!r} is missing")
    value = record.values[name]
    if isinstance(value, int) and not isinstance(value, bool) and name != "text":
        value = str(value)
    return checked_text(value, name, record.place)


def _blank(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and value != value)
    )


def _from_labels(
    records: Sequence[Record], column: str, separator: str | None, path: Path
) -> tuple[dict[str, np.ndarray], list[str]]:
    """One concept per distinct label; a text without a label is unknown for every concept."""
    sets: list[frozenset[str] | None] = []
    for record in records:
        value = record.values.get(column)
        if isinstance(value, list):
            sets.append(frozenset(_word(one, record, column) for one in value))
        elif _blank(value):
            sets.append(None)
        elif separator and isinstance(value, str):
            sets.append(frozenset(part.strip() for part in value.split(separator) if part.strip()))
        else:
            sets.append(frozenset([_word(value, record, column)]))
    names = sorted({name for found in sets if found for name in found})
    if not names:
        raise ValueError(f"{path}: column {column!r} holds no label")
    times = Counter(name for found in sets if found for name in found)
    if len(names) > MOST_CONCEPTS or (len(names) > 2 and max(times.values()) == 1):
        raise ValueError(
            f"{path}: column {column!r} holds {len(names)} different values in {len(records)} "
            "rows: that is a text or an id, not a label"
        )
    unknown = sum(found is None for found in sets)
    table = {
        name: np.array([np.nan if found is None else float(name in found) for found in sets])
        for name in names
    }
    note = f"{unknown} of {len(records)} texts have no label and count for no concept"
    return table, [note] if unknown else []


def _word(value: Any, record: Record, column: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | int):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{record.place}: column {column!r} must hold labels as text or whole numbers, not "
            f"{'an empty label' if isinstance(value, str) else kind(value)}"
        )
    return value.strip()


def _from_columns(
    records: Sequence[Record], concepts: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """One column of yes and no per concept; blank cells are unknown."""
    table = {name: np.array([_yes_or_no(record, name) for record in records]) for name in concepts}
    unknown = {name: int(np.isnan(column).sum()) for name, column in table.items()}
    notes = [
        f"{n} of {len(records)} labels of {name!r} are blank" for name, n in unknown.items() if n
    ]
    return table, notes


def _yes_or_no(record: Record, name: str) -> float:
    value = record.values.get(name)
    if _blank(value):
        return np.nan
    word = str(value).strip().lower()
    if isinstance(value, list) or word not in YES + NO:
        raise ValueError(
            f"{record.place}: column {name!r} holds {value!r}; a concept column holds 1, 0 or "
            "nothing (for a column of labels pass it as the label column)"
        )
    return float(word in YES)


def _refuse_contradictions(
    records: Sequence[Record], texts: Sequence[str], table: Mapping[str, np.ndarray]
) -> None:
    """One text may stand twice, but not with a concept on one line and without it on another."""
    seen: dict[str, int] = {}
    for i, text in enumerate(texts):
        first = seen.setdefault(text, i)
        for name, column in table.items():
            if column[i] != column[first] and not (np.isnan(column[i]) or np.isnan(column[first])):
                raise ValueError(
                    f"{records[i].place}: this text stands at {records[first].place} too, with "
                    f"another label for {name!r}; for several labels of one text use a list column "
                    "or concept columns"
                )


def _refuse_one_sided(table: Mapping[str, np.ndarray], path: Path) -> None:
    """Every concept lacks positives or negatives: then nothing can be told apart."""
    if not any((column == 1).any() and (column == 0).any() for column in table.values()):
        counts = Counter({name: int((column == 1).sum()) for name, column in table.items()})
        name, n = counts.most_common(1)[0]
        raise ValueError(
            f"{path}: no concept has texts with and texts without it ({name!r}: {n} with, "
            f"{int((table[name] == 0).sum())} without)"
        )


def world_statements(n: int = 900, *, split: Split = "train", seed: int = 0) -> LabelledTexts:
    """Statements of the organisms' world with their topic, sentiment, formality and register.

    Groups are wordings, so that no split has seen another's.
    """
    from sae_steering_plugin.organisms.world import World

    drawn = World().statements(n, split=split, seed=seed)
    table = {
        f"{what}={value}": np.array([float(one[what] == value) for one in drawn])
        for what in ("topic", "sentiment", "formality", "register")
        for value in sorted({one[what] for one in drawn})
    }
    return LabelledTexts(
        tuple(one["text"] for one in drawn),
        table,
        tuple(one["group"] for one in drawn),
        settings={"world": "statements", "split": split, "seed": seed},
    )
