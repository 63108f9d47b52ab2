"""Judging finished texts as a plan of its own: judges x slices of a parquet table.

    plan = JudgePlan.of("texts/table.parquet", ["lexicon:pirate", "api:gpt-4o"], cache="replies")
    InProcess().run(plan, "judged")
    table = collect(plan, "judged").to_pandas()       # the rows again, with score and reason

Generating and judging are two plans, so that no accelerator waits for a judge: the second one's
input is what the first one left. A unit is (judge, slice of rows) and its key holds the slice's
content and the judge's name and version, so a table that has grown is judged where it is new. A
text without a score is a null with its reason; to ask again for those, run into another folder with
the same `cache`: replies that were read are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .judges.opening import open_judge
from .judges.protocol import Item, Judge, check_judge, judge_identity
from .parts import as_arrow, table_digest
from .plan import Unit

if TYPE_CHECKING:
    import pyarrow as pa

MEASURE = "verdicts 1"
"""Name and version of what a part holds."""

QUESTIONS = ("question", "instruction")
"""Columns that hold what a text answers, unless another is named."""

REPLIES = ("model", "api")
"""The judges that read a rubric."""


@dataclass(frozen=True)
class JudgeRef:
    """A judge by its word (see `judges.USES`), and the name and version it has now."""

    word: str
    name: str
    version: str
    rubric: str = "concept"
    device: str = "cpu"
    dtype: str = "float32"

    @classmethod
    def of(
        cls, word: str, *, rubric: str = "concept", device: str = "cpu", dtype: str = "float32"
    ) -> JudgeRef:
        """The reference to the judge as it is now, which is opened for it. Raises as `open_judge`
        does."""
        found = opened(word, rubric, device, dtype, None)
        return cls(word, found.name, found.version, rubric, device, dtype)

    def open(self, cache: str | Path | None = None) -> Judge:
        """The judge. Raises ValueError when it is another one than when the plan was made."""
        found = opened(self.word, self.rubric, self.device, self.dtype, cache)
        if (found.name, found.version) != (self.name, self.version):
            raise ValueError(
                f"the judge {self.word!r} is now {found.name} ({found.version}), not {self.name} "
                f"({self.version}): make the plan again"
            )
        return found


def opened(word: str, rubric: str, device: str, dtype: str, cache: str | Path | None) -> Judge:
    """`open_judge` with the options of the plan, without a bar of its own."""
    return open_judge(word, rubric=rubric, cache=cache, device=device, dtype=dtype, progress=False)


@dataclass(frozen=True)
class JudgePlan:
    """Every row of a parquet table scored by every judge, in units of `block` rows.

    `text`, `instruction` and `concept` name columns; without an instruction or concept column the
    judges get none (`one_concept` is then the concept of all rows). `digest` is that of the table:
    a worker that finds other rows raises ValueError. `cache` is the folder of an API judge's
    replies. Where the table and the cache lie is in no key.
    """

    table: str
    digest: str
    judges: tuple[JudgeRef, ...]
    text: str = "text"
    instruction: str = ""
    concept: str = ""
    one_concept: str = ""
    cache: str = ""
    block: int = 64
    worker: ClassVar[str] = f"{__name__}:JudgeWorker"
    title: ClassVar[str] = "judging"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError("block is at least 1")
        if not self.judges:
            raise ValueError("texts need a judge, for example lexicon:pirate")
        names = [one.name for one in self.judges]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"judge {repeated[0]!r} is given twice")
        if self.concept and self.one_concept:
            raise ValueError("name a concept for all rows or a column of concepts, not both")

    @classmethod
    def of(
        cls,
        table: str | Path,
        judges: Sequence[str | JudgeRef],
        *,
        text: str = "text",
        instruction: str | None = None,
        concept: str = "",
        one_concept: str = "",
        rubric: str = "concept",
        cache: str | Path | None = None,
        block: int = 64,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> JudgePlan:
        """The plan of a table as it is now.

        The instruction column is "question" or "instruction" where there is one, unless named.
        Raises ValueError for a column that is not there or a text that is none, and as the judges'
        opening does.
        """
        place = Path(table).expanduser().resolve()
        rows = read_table(str(place))
        if instruction is None:
            instruction = next((name for name in QUESTIONS if name in rows.column_names), "")
        check_rows(rows, place, (text, *(name for name in (instruction, concept) if name)))
        return cls(
            str(place),
            table_digest(rows),
            tuple(
                one
                if isinstance(one, JudgeRef)
                else JudgeRef.of(one, rubric=rubric, device=device, dtype=dtype)
                for one in judges
            ),
            text,
            instruction,
            concept,
            one_concept,
            "" if cache is None else str(Path(cache).expanduser().resolve()),
            block,
        )

    def rows(self) -> pa.Table:
        """The table to judge. Raises ValueError when it is not the one the plan was made with."""
        found = read_table(self.table)
        if table_digest(found) != self.digest:
            raise ValueError(f"{self.table} has changed since the plan: make it again")
        return found

    def units(self) -> Sequence[Unit]:
        """By judge, then by slice of rows, in their order."""
        rows = self.rows()
        starts = range(0, len(rows), self.block)
        slices = [
            (start, min(start + self.block, len(rows)), table_digest(rows.slice(start, self.block)))
            for start in starts
        ]
        return [
            Unit.of(
                {"judge": judge.name, "rows": [start, stop]},
                measure=MEASURE,
                version=judge.version,
                content=content,
                columns=[self.text, self.instruction, self.concept, self.one_concept],
            )
            for judge in self.judges
            for start, stop, content in slices
        ]


class JudgeWorker:
    """Runs units of a `JudgePlan`: the table read once, each judge opened when it is needed."""

    def __init__(self, plan: JudgePlan) -> None:
        self.plan = plan
        self.rows = plan.rows()
        self.references = {one.name: one for one in plan.judges}
        self.judges: dict[str, Judge] = {}

    def run(self, unit: Unit) -> pa.Table:
        """The slice's rows, then score (null for none), valid, reason, raw and the judge's
        identity."""
        import pyarrow as pa

        name = unit.coordinates["judge"]
        if name not in self.judges:
            self.judges[name] = self.references[name].open(self.plan.cache or None)
        judge = self.judges[name]
        start, stop = unit.coordinates["rows"]
        rows = self.rows.slice(start, stop - start)
        given = judge.score(items_of(rows, self.plan))
        check_judge(judge, given)
        columns: dict[str, Any] = {
            "score": pa.array([one.score for one in given], pa.float64()),
            "valid": pa.array([one.score is not None for one in given], pa.bool_()),
            "reason": pa.array([one.reason for one in given], pa.large_string()),
            "raw": pa.array([one.raw for one in given], pa.large_string()),
            **{key: pa.array([value] * len(rows)) for key, value in judge_identity(judge).items()},
        }
        for column, values in columns.items():
            rows = rows.append_column(column, values)
        return rows


def items_of(rows: pa.Table, plan: JudgePlan) -> list[Item]:
    """The rows as a judge reads them."""
    blank = [""] * len(rows)
    texts = rows[plan.text].to_pylist()
    asked = rows[plan.instruction].to_pylist() if plan.instruction else blank
    about = rows[plan.concept].to_pylist() if plan.concept else [plan.one_concept] * len(rows)
    return [
        Item(text, instruction or "", concept or "")
        for text, instruction, concept in zip(texts, asked, about, strict=True)
    ]


@lru_cache(maxsize=4)
def read_whole(path: str, changed: int, size: int) -> pa.Table:
    """`read_table` of a file in the state that time and size tell."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    del changed, size
    try:
        return as_arrow(pq.read_table(path).replace_schema_metadata(None))
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read as a parquet table: {error}") from error


def read_table(path: str) -> pa.Table:
    """A parquet file's rows, read again only when the file has changed.

    Raises FileNotFoundError for no file and ValueError for one that is no table.
    """
    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"no table {place}: a parquet file, or a run's folder that has one")
    state = place.stat()
    return read_whole(path, state.st_mtime_ns, state.st_size)


def check_rows(rows: pa.Table, place: Path, wanted: Sequence[str]) -> None:
    """Raise ValueError for a missing column, for one that verdicts would replace, for no rows, and
    for a cell that should be text and is none."""
    import pyarrow as pa

    there = ", ".join(rows.column_names)
    for name in wanted:
        if name not in rows.column_names:
            raise ValueError(f"{place} has no column {name!r}; it has {there}")
        kind = rows.schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{place}: column {name!r} holds {kind}, not text")
    if taken := sorted({"score", "judge", "reason"} & set(rows.column_names)):
        raise ValueError(
            f"{place} has a column {taken[0]!r} already: give the generated texts, not a judged "
            "table"
        )
    if not len(rows):
        raise ValueError(f"{place} holds no rows")
    if (empty := rows[wanted[0]].is_null().index(True).as_py()) >= 0:
        raise ValueError(f"{place}: row {empty} has no text in column {wanted[0]!r}")
