"""AxBench's data files: concept lists, labelled texts, instructions; read, checked and written.

    concepts = read_axbench("axbench/concept10/prod_2b_l10_v1")
    concepts.training(3)       # 72 positive rows and the 72 shared negatives of the same genre
    concepts.held_out(3)       # 36 positive, 36 negative and some hard negative rows

A folder holds `metadata.jsonl`, `train_data.parquet` (or several, `train_data_0.parquet`, ...) and
`latent_eval_data.parquet`, side by side or under `generate/` and `inference/` as AxBench leaves
them. A set of one's own has the same files; its negatives may also carry their concept's number
instead of -1. Pickles beside them are never read.

Source: arXiv 2501.17148 and stanfordnlp/axbench at e9b8cd4 (columns and categories).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..canonical import content_key
from ..parts import write_whole

if TYPE_CHECKING:
    import pandas as pd

SHARED = -1
"""The `concept_id` of negatives that belong to every concept of their genre."""
PLACEHOLDER = "EEEEE"
"""What stands for the concept's text in a shared negative."""
CATEGORIES = ("positive", "negative", "hard negative")
TRAIN_COLUMNS = (
    "input",
    "output",
    "output_concept",
    "concept_genre",
    "category",
    "dataset_category",
    "concept_id",
)
EVAL_COLUMNS = (*TRAIN_COLUMNS, "sae_link", "sae_id")
NUMBERS = ("concept_id", "sae_id")
PLACES = ("", "generate", "inference")
"""Where in a folder a file may lie: beside the others, or as AxBench's own runs leave it."""


# Concepts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neuronpedia:
    """A feature's address: the model, the SAE's name there, and the feature's number."""

    model: str
    sae: str
    feature: int

    @classmethod
    def of(cls, url: str) -> Neuronpedia:
        """The address in `https://www.neuronpedia.org/MODEL/SAE/FEATURE`.

        Raises ValueError for anything else.
        """
        found = re.fullmatch(r"(?:https?://)?(?:www\.)?neuronpedia\.org/(.+)", url.strip())
        parts = found[1].rstrip("/").split("/") if found else []
        if len(parts) != 3 or not all(parts) or not parts[2].isdigit():
            raise ValueError(
                f"{url!r} is no feature address; it must read "
                "https://www.neuronpedia.org/MODEL/SAE/FEATURE"
            )
        return cls(parts[0], parts[1], int(parts[2]))

    @property
    def sae_id(self) -> str:
        """`MODEL/SAE`, as SAELens stores it in an SAE's metadata."""
        return f"{self.model}/{self.sae}"

    def in_sae(self, sae: Any) -> int:
        """The feature's number in a loaded SAE.

        Raises ValueError when the SAE is another one or does not say which it is: a concept's
        number means nothing in another SAE.
        """
        found = getattr(sae.cfg.metadata, "neuronpedia_id", None)
        if found != self.sae_id:
            named = f"says {found!r}" if found else "names no neuronpedia_id"
            raise ValueError(
                f"feature {self.feature} belongs to {self.sae_id!r}, and the loaded SAE {named}: "
                "its feature of that number is another one"
            )
        if self.feature >= int(sae.cfg.d_sae):
            raise ValueError(f"{self.sae_id} has {sae.cfg.d_sae} features, not {self.feature}")
        return self.feature


@dataclass(frozen=True)
class Concept:
    """One line of `metadata.jsonl`: number, text, genres (the first one counts), and address.

    `ref` is empty for a concept that no SAE feature stands for. `prompt` steers by prompting;
    AxBench's files have none (its generator writes one per run).
    """

    concept_id: int
    text: str
    genres: tuple[str, ...] = ("text",)
    ref: str = ""
    prompt: str = ""

    @property
    def genre(self) -> str:
        return self.genres[0]

    @property
    def address(self) -> Neuronpedia | None:
        return Neuronpedia.of(self.ref) if self.ref else None

    def to_line(self) -> str:
        content = {
            "concept_id": self.concept_id,
            "concept": self.text,
            "ref": self.ref,
            "concept_genres_map": {self.text: list(self.genres)},
        }
        more = {"prompt": self.prompt} if self.prompt else {}
        return json.dumps({**content, **more}, ensure_ascii=False)


@dataclass(frozen=True, eq=False)
class ConceptSet:
    """Concepts with their labelled texts.

    `train` and `evaluation` are frames with AxBench's columns (`TRAIN_COLUMNS`, `EVAL_COLUMNS`);
    both are empty for a bare list of concepts. `instructions` are those of the folder's own
    `instructions.json`, empty without one. `source` is where it was read from.
    """

    concepts: tuple[Concept, ...]
    train: pd.DataFrame
    evaluation: pd.DataFrame
    instructions: tuple[str, ...] = ()
    source: str = ""

    def __len__(self) -> int:
        return len(self.concepts)

    def concept(self, concept_id: int) -> Concept:
        """The concept of that number. Raises KeyError that says which there are."""
        for one in self.concepts:
            if one.concept_id == concept_id:
                return one
        known = [one.concept_id for one in self.concepts]
        raise KeyError(f"no concept {concept_id} in {self.source}; it has {known}")

    def training(self, concept_id: int) -> pd.DataFrame:
        """The concept's positive rows, then its negatives: its own, and those shared by its genre.

        Never a shared negative of another genre. Raises ValueError when a side is empty.
        """
        concept, rows = self.concept(concept_id), self.train
        own = rows["concept_id"] == concept_id
        shared = (rows["concept_id"] == SHARED) & (rows["concept_genre"] == concept.genre)
        positive = rows[own & (rows["category"] == "positive")]
        negative = rows[(own | shared) & (rows["category"] == "negative")]
        for side, found in (("positive", positive), ("negative", negative)):
            if not len(found):
                raise ValueError(
                    f"{self.source}: concept {concept_id} ({concept.genre}) has no {side} training "
                    "text" + ("" if len(rows) else ": this is a list of concepts without texts")
                )
        return concatenated([positive, negative])

    def held_out(self, concept_id: int) -> pd.DataFrame:
        """The concept's rows for detection, hard negatives included, in file order."""
        self.concept(concept_id)
        rows = self.evaluation
        return rows[rows["concept_id"] == concept_id].reset_index(drop=True)

    def fingerprint(self, concept_id: int) -> str:
        """A hash of the concept and every row that belongs to it, shared negatives included."""
        rows = [self.training(concept_id)[list(TRAIN_COLUMNS)], self.held_out(concept_id)]
        return content_key([self.concept(concept_id), *(one.to_dict("split") for one in rows)])

    def counts(self) -> dict[str, int]:
        """Rows by file and category."""
        found = {}
        for name, rows in (("train", self.train), ("evaluation", self.evaluation)):
            for category in CATEGORIES:
                found[f"{name} {category}"] = int((rows["category"] == category).sum())
        return found

    def only(self, concept_ids: Sequence[int]) -> ConceptSet:
        """The same set with these concepts alone; shared negatives stay."""
        kept = tuple(self.concept(number) for number in concept_ids)
        numbers = [one.concept_id for one in kept]
        train = self.train[self.train["concept_id"].isin([*numbers, SHARED])]
        evaluation = self.evaluation[self.evaluation["concept_id"].isin(numbers)]
        return ConceptSet(
            kept,
            train.reset_index(drop=True),
            evaluation.reset_index(drop=True),
            self.instructions,
            self.source,
        )

    def write(self, folder: str | Path) -> Path:
        """Write the set as AxBench's files, side by side in `folder`; the folder."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        lines = "".join(one.to_line() + "\n" for one in self.concepts)
        write_text(place / "metadata.jsonl", lines)
        frames = {"train_data": self.train, "latent_eval_data": self.evaluation}
        for name, rows in frames.items():
            write_whole(place / f"{name}.parquet", partial(rows.to_parquet, index=False))
        if self.instructions:
            listed = [{"instruction": one} for one in self.instructions]
            write_text(place / "instructions.json", json.dumps(listed, ensure_ascii=False))
        return place


def write_text(target: Path, text: str) -> None:
    write_whole(target, lambda path: path.write_text(text, encoding="utf-8"))


def concatenated(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat(list(parts), ignore_index=True)


# Reading ------------------------------------------------------------------------------------------


def read_axbench(folder: str | Path) -> ConceptSet:
    """The concept set in a folder of AxBench (concept10, conceptFD, concept500, or one's own).

    A `.jsonl` file is read as a bare list of concepts, and so is a folder that holds no texts.
    Every row is checked; `.pkl` files are ignored. Raises FileNotFoundError without a concept list,
    and ValueError that names file and row for a missing column, an unknown category or concept, an
    empty text, a row whose concept text or feature is not the list's, or a concept without texts of
    either side.
    """
    place = Path(folder).expanduser()
    if place.is_file() and place.suffix == ".jsonl":
        return ConceptSet(
            read_concepts(place), empty(TRAIN_COLUMNS), empty(EVAL_COLUMNS), (), str(place)
        )
    if not place.is_dir():
        raise FileNotFoundError(f"no folder {place}")
    listed = found_in(place, "metadata.jsonl")
    if not listed:
        raise FileNotFoundError(
            f"{place} holds no metadata.jsonl (nor generate/metadata.jsonl): it is no concept set"
        )
    concepts = read_concepts(listed[0])
    known = {one.concept_id: one for one in concepts}
    train_files = sorted(found_in(place, "train_data*.parquet"), key=rotation)
    eval_files = sorted(found_in(place, "latent_eval_data*.parquet"), key=rotation)
    train = [read_rows(path, TRAIN_COLUMNS, known) for path in train_files]
    evaluation = [read_rows(path, EVAL_COLUMNS, known) for path in eval_files]
    instructions = found_in(place, "instructions.json")
    found = ConceptSet(
        concepts,
        concatenated(train) if train else empty(TRAIN_COLUMNS),
        concatenated(evaluation) if evaluation else empty(EVAL_COLUMNS),
        read_instructions(instructions[0]) if instructions else (),
        str(place),
    )
    check_sides(found)
    return found


def found_in(place: Path, pattern: str) -> list[Path]:
    for folder in PLACES:
        if paths := list((place / folder).glob(pattern)):
            return paths
    return []


def rotation(path: Path) -> tuple[int, str]:
    """The number of a file that AxBench rotated every 500 concepts; -1 for the unnumbered one."""
    number = re.search(r"_(\d+)$", path.stem)
    return (int(number[1]) if number else -1, path.name)


def empty(columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    kinds = {name: "int64" if name in NUMBERS else "str" for name in columns}
    return pd.DataFrame({name: pd.Series([], dtype=kind) for name, kind in kinds.items()})


def read_concepts(path: Path) -> tuple[Concept, ...]:
    """The concepts of a `metadata.jsonl`. Raises ValueError that names the line."""
    found: dict[int, Concept] = {}
    for number, content in json_lines(path):
        where = f"{path}, line {number}"
        concept_id, text = content.get("concept_id"), content.get("concept")
        if not isinstance(concept_id, int) or isinstance(concept_id, bool) or concept_id < 0:
            raise ValueError(f"{where}: 'concept_id' is {concept_id!r}, not a whole number from 0")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: 'concept' is {text!r}, not a text")
        if concept_id in found:
            raise ValueError(f"{where}: concept {concept_id} stands there twice")
        genres = content.get("concept_genres_map", {}).get(text, ["text"])
        if not genres or not all(isinstance(one, str) for one in genres):
            raise ValueError(f"{where}: the genres of concept {concept_id} are {genres!r}")
        ref = content.get("ref") or ""
        if ref:
            try:
                Neuronpedia.of(ref)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        prompt = content.get("prompt", "")
        if not isinstance(prompt, str):
            raise ValueError(f"{where}: 'prompt' is {prompt!r}, not a text")
        found[concept_id] = Concept(concept_id, text, tuple(genres), ref, prompt)
    if not found:
        raise ValueError(f"{path} holds no concept")
    return tuple(found.values())


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from ..judges.labelled import json_rows

    yield from json_rows(path)


def read_rows(path: Path, columns: Sequence[str], known: dict[int, Concept]) -> pd.DataFrame:
    """A parquet file's rows, each checked against the concept list. ValueError with the row."""
    import pandas as pd
    import pyarrow as pa

    try:
        rows = pd.read_parquet(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    if missing := [name for name in columns if name not in rows.columns]:
        raise ValueError(
            f"{path}: no column {missing[0]!r}; there are {', '.join(map(str, rows.columns))}"
        )
    if not len(rows):
        raise ValueError(f"{path} holds no row")
    rows = rows[list(columns)]
    for name in columns:
        whole = pd.api.types.is_integer_dtype(rows[name])
        if name in NUMBERS and not whole:
            raise ValueError(f"{path}: column {name!r} is {rows[name].dtype}, not whole numbers")
    for number, row in enumerate(rows.to_dict("records")):
        if problem := problem_of(row, known):
            raise ValueError(f"{path}, row {number}: {problem}")
    return rows


def problem_of(row: dict[str, Any], known: dict[int, Concept]) -> str:
    """What is wrong with a row, in words; empty when nothing is."""
    for name in ("input", "output", "output_concept", "concept_genre"):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"{name!r} is {row[name]!r}, not a text"
    category, number = row["category"], row["concept_id"]
    if category not in CATEGORIES:
        return f"category is {category!r}; it must be one of {', '.join(CATEGORIES)}"
    if number == SHARED:
        return "" if category == "negative" else f"a shared row (concept -1) is {category!r}"
    if number not in known:
        return f"concept_id {number} is not in the concept list"
    concept = known[number]
    if category == "positive" and row["output_concept"] != concept.text:
        return (
            f"a positive row of concept {number} names the concept {row['output_concept']!r}, and "
            f"the list says {concept.text!r}"
        )
    link = row.get("sae_link")
    if link and concept.ref and link != concept.ref:
        return f"sae_link is {link!r}, and the list says {concept.ref!r}"
    if link and row["sae_id"] != Neuronpedia.of(link).feature:
        return f"sae_id is {row['sae_id']}, and sae_link says {link!r}"
    return ""


def check_sides(concepts: ConceptSet) -> None:
    """Raise ValueError when a concept lacks positive or negative texts in a file that is there."""
    for one in concepts.concepts:
        if len(concepts.train):
            concepts.training(one.concept_id)
        if len(concepts.evaluation):
            there = set(concepts.held_out(one.concept_id)["category"])
            if lacking := [side for side in CATEGORIES[:2] if side not in there]:
                raise ValueError(
                    f"{concepts.source}: concept {one.concept_id} has no {lacking[0]} row in the "
                    "evaluation file"
                )


# Instructions -------------------------------------------------------------------------------------


def read_instructions(path: str | Path) -> tuple[str, ...]:
    """The `instruction` fields of AlpacaEval's JSON list, in file order, which draws depend on.

    A `.jsonl` file of such objects and a `.txt` file with one instruction per line are read too.
    Raises FileNotFoundError, or ValueError that names the entry.
    """
    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"no file {place}")
    if place.suffix == ".txt":
        lines = place.read_text(encoding="utf-8").splitlines()
        found = tuple(line.strip() for line in lines if line.strip())
    elif place.suffix == ".jsonl":
        found = tuple(instruction(row, f"{place}, line {n}") for n, row in json_lines(place))
    else:
        try:
            rows = json.loads(place.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{place} is no JSON file: {error}") from error
        if not isinstance(rows, list):
            raise ValueError(f"{place} holds a {type(rows).__name__}, not a list of objects")
        found = tuple(instruction(row, f"{place}, entry {n}") for n, row in enumerate(rows))
    if not found:
        raise ValueError(f"{place} holds no instruction")
    return found


def instruction(row: Any, where: str) -> str:
    text = row.get("instruction") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: 'instruction' is {text!r}, not a text")
    return text


def drawn_instructions(instructions: Sequence[str], n: int, concept_id: int) -> tuple[str, ...]:
    """The concept's `n` instructions: `DataFrame.sample(n, random_state=concept_id)`, as AxBench.

    Depends on the order of `instructions`; equal numbers draw equal rows at every site. Raises
    ValueError when there are fewer than `n`.
    """
    import pandas as pd

    if n > len(instructions):
        raise ValueError(f"{n} instructions are asked for and there are {len(instructions)}")
    return tuple(pd.Series(list(instructions), dtype=object).sample(n, random_state=concept_id))


def own_instructions(concepts: ConceptSet) -> tuple[str, ...]:
    """Instructions where AlpacaEval is not at hand: the distinct inputs of the negative evaluation
    rows of genre text, in file order. They are no AxBench instructions; whoever uses them says so.
    """
    rows = concepts.evaluation
    kept = rows[(rows["category"] == "negative") & (rows["concept_genre"] == "text")]
    return tuple(dict.fromkeys(kept["input"]))
