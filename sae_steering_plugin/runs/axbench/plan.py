"""AxBench's whole run as a plan: concepts x methods, detection and steering.

    plan = AxBenchPlan(ModelRef.of("agent-gpt2"), ConceptsRef.of("world-concepts"), (0, 1), METHODS)
    InProcess().run(plan, "out")
    rows = collect(plan, "out").to_pandas()

A unit is one concept and one method, detection or a block of factors. A worker fits a method to a
concept once, whichever of its units comes first, and reads a concept's texts once for all methods.
Judging is not in it: ratings are made from the collected rows, so that another judge reads the same
texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...adapters.engine import generate
from ...adapters.steering import steer
from ..canonical import seed_of
from ..noise import gumbel_noise, noise_key
from ..plan import Unit
from ..references import ModelRef
from ..runner import with_smaller_batches
from ..sas_protocol import SAERef
from ..steering_methods import ConceptData, Fitted, SteeringMethod, find_method
from .detection import Pooled, bag_of_words_scores, scale_of
from .files import Concept, ConceptSet, drawn_instructions, own_instructions, read_axbench
from .ratings import ADDITION_FACTORS, CLAMPING_FACTORS
from .texts import ChatForm, ReadText, displacement_of, read_texts, rows_of, text_nll

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MEASURE = "axbench 1"
"""Name and version of what a part holds."""
BOW = "bow"
"""The text-only detector; it reads no model, so every detection table has it."""
UNSTEERED = "none"
"""No steering at all: what the others are seen against."""
INSTRUCTIONS = 10
MOST_KEPT = 2**29
"""Bytes of residuals of other concepts' texts that a worker keeps."""


@dataclass(frozen=True)
class ConceptsRef:
    """A folder of AxBench's files; what it holds is in the units' keys, concept by concept."""

    folder: str

    def open(self) -> ConceptSet:
        return read_axbench(self.folder)


@dataclass(frozen=True)
class MethodLine:
    """A method by its word in `runs.steering_methods`, the factors it is run at, and its settings
    where they differ from the method's own; a setting that is a record is changed field by field,
    as `{"schedule": {"epochs": 4}}`."""

    word: str
    factors: tuple[float, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> Any:
        """What of the method can change a number; its word for the two that need no fit."""
        return self.word if self.word in (BOW, UNSTEERED) else self.method.identity()

    @property
    def method(self) -> SteeringMethod:
        """The method under these settings. Raises ValueError for an unknown word or setting."""
        own = find_method(self.word)
        changes = {
            name: replace(getattr(own.settings, name), **value)
            if isinstance(value, Mapping) and name in getattr(own.settings, "__dict__", {})
            else value
            for name, value in self.settings.items()
        }
        return own.having(**changes)

    @classmethod
    def of(cls, word: str, factors: Sequence[float] = ()) -> MethodLine:
        """With AxBench's factors for additions, or for clamping methods, where none are given."""
        default = CLAMPING_FACTORS if "clamp" in word else ADDITION_FACTORS
        return cls(word, tuple(float(one) for one in factors or default))


@dataclass(frozen=True)
class AxBenchPlan:
    """Concepts x methods; see this module.

    `fingerprints` and `asked` hold, per concept, a hash of its rows and its instructions.
    `max_tokens` bounds every text that is read (a longer response is cut, and counted). `others` is
    how many other concepts' negatives the imbalanced detection adds. `own_scale=False` takes every
    method's maximum activation from the evaluation rows, also where the method brings one
    (AxBench's switch). Raises ValueError for what would spoil the run.
    """

    model: ModelRef
    concepts: ConceptsRef
    concept_ids: tuple[int, ...]
    methods: tuple[MethodLine, ...]
    fingerprints: tuple[str, ...]
    asked: tuple[tuple[str, ...], ...]
    sae: SAERef | None = None
    hook_name: str = ""
    max_new_tokens: int = 128
    temperature: float = 1.0
    max_tokens: int = 512
    others: int = 0
    own_scale: bool = True
    detection: bool = True
    steering: bool = True
    factor_block: int = 14
    batch_size: int = 70
    seed: int = 0
    name: str = "axbench"
    worker: ClassVar[str] = f"{__name__}:AxBenchWorker"
    title: ClassVar[str] = "axbench"

    def __post_init__(self) -> None:
        if not self.concept_ids or not self.methods:
            raise ValueError("a run needs at least one concept and one method")
        if len(set(self.concept_ids)) < len(self.concept_ids):
            raise ValueError("a concept stands in the plan twice")
        if len({line.word for line in self.methods}) < len(self.methods):
            raise ValueError("a method stands in the plan twice")
        if not len(self.concept_ids) == len(self.fingerprints) == len(self.asked):
            raise ValueError("every concept needs its fingerprint and its instructions")
        if len({len(one) for one in self.asked}) != 1 or len(self.asked[0]) < 2:
            raise ValueError("every concept needs the same number of instructions, two at least")
        if self.max_new_tokens < 1 or self.factor_block < 1 or self.batch_size < 1:
            raise ValueError("max_new_tokens, factor_block and batch_size are at least 1")
        if not (self.detection or self.steering):
            raise ValueError("neither detection nor steering is asked for")
        if self.sae is None and not self.hook_name:
            raise ValueError("where to steer? give an SAE or a hook name")

    @property
    def instructions(self) -> int:
        return len(self.asked[0])

    def other_places(self, number: int) -> list[int]:
        """Which of the plan's concepts lend their negatives to a concept's imbalanced F1: the first
        `others` of the rest."""
        places = [at for at, one in enumerate(self.concept_ids) if one != number]
        return places[: self.others]

    def units(self) -> Sequence[Unit]:
        """By concept and method: detection, then its blocks of factors."""
        shared = {
            "measure": MEASURE,
            "model": self.model.identity(),
            "sae": None if self.sae is None else self.sae.fingerprint,
            "hook_name": self.hook_name,
            "max_tokens": self.max_tokens,
            "own_scale": self.own_scale,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
        found = []
        for number, rows in zip(self.concept_ids, self.fingerprints, strict=True):
            asked = self.asked[self.concept_ids.index(number)]
            for line in self.methods:
                place = {"concept": number, "method": line.word}
                key = {**shared, "rows": rows, "fit": line.identity}
                if self.detection and line.word != UNSTEERED:
                    found.append(
                        Unit.of(
                            {**place, "what": "detection"},
                            **key,
                            others=[self.fingerprints[at] for at in self.other_places(number)],
                        )
                    )
                if not self.steering or line.word == BOW:
                    continue
                for block in blocks(line.factors, self.factor_block):
                    found.append(
                        Unit.of(
                            {**place, "what": "steering", "factors": list(block)},
                            **key,
                            asked=asked,
                            max_new_tokens=self.max_new_tokens,
                            temperature=self.temperature,
                        )
                    )
        return found


def blocks(values: Sequence[float], size: int) -> list[tuple[float, ...]]:
    return [tuple(values[start : start + size]) for start in range(0, len(values), size)]


def axbench_plan(
    model: str,
    folder: str,
    methods: Sequence[str | MethodLine],
    *,
    sae: str | None = None,
    concept_ids: Sequence[int] = (),
    factors: Sequence[float] = (),
    instructions: Sequence[str] = (),
    n_instructions: int = INSTRUCTIONS,
    device: str = "cpu",
    dtype: str = "float32",
    **options: Any,
) -> AxBenchPlan:
    """The plan of a folder's concepts (all of them when no numbers are given) on a model.

    `instructions` are AlpacaEval's in file order, or one's own; without them the folder's, else the
    inputs of its negative evaluation rows. The text-only detector is added. Raises ValueError for
    an unknown method, and what the readers raise for the folder.
    """
    concepts = read_axbench(folder)
    numbers = tuple(concept_ids) or tuple(one.concept_id for one in concepts.concepts)
    pool = tuple(instructions) or concepts.instructions or own_instructions(concepts)
    lines = [one if isinstance(one, MethodLine) else MethodLine.of(one, factors) for one in methods]
    for line in lines:
        assert line.identity  # an unknown word or setting is refused here, before a model is read
    if BOW not in [line.word for line in lines] and options.get("detection", True):
        lines.append(MethodLine(BOW))
    return AxBenchPlan(
        ModelRef.of(model, device=device, dtype=dtype),
        ConceptsRef(folder),
        numbers,
        tuple(lines),
        tuple(concepts.fingerprint(number) for number in numbers),
        tuple(drawn_instructions(pool, n_instructions, number) for number in numbers),
        None if sae is None else SAERef.of(model, sae),
        **options,
    )


# The worker ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fit:
    """A method fitted to a concept with the scale of its factors.

    `covered` is False when the method found nothing to steer with; `why` says so. `scores` are the
    pooled scores of the concept's evaluation rows, None when the method does not detect. `max_act`
    is None for a method without factors.
    """

    fitted: Fitted | None
    scores: tuple[tuple[Pooled, tuple[float, ...]], ...] | None = None
    max_act: float | None = None
    fallback: bool | None = None
    why: str = ""

    @property
    def covered(self) -> bool:
        return self.fitted is not None


class AxBenchWorker:
    """Runs units of an `AxBenchPlan`: a model, an SAE, the last fit, the texts read so far."""

    def __init__(self, plan: AxBenchPlan) -> None:
        self.plan = plan
        self.subject = plan.model.open()
        if plan.sae is not None:
            loaded = plan.sae.open(plan.model)
            self.subject = replace(self.subject, sae=loaded, sae_name=plan.sae.name)
        self.concepts = plan.concepts.open()
        self.form = ChatForm.of(self.subject.model, self.subject.sae)
        self.lines = {line.word: line for line in plan.methods}
        self.fits: dict[tuple[int, str], Fit] = {}
        self.texts: dict[int, tuple[pd.DataFrame, list[bool]]] = {}
        self.residuals: dict[tuple[int, bool], list[ReadText]] = {}

    @cached_property
    def hook_name(self) -> str:
        return self.plan.hook_name or str(self.subject.sae.cfg.metadata.hook_name)

    @property
    def most(self) -> int:
        """Tokens of a text at most, with room for the template's suffix."""
        suffix = self.form.suffix
        room = len(self.form.encoded([suffix])[0]) if suffix else 0
        return self.form.limit(self.plan.max_tokens + room) - room

    def run(self, unit: Unit) -> pa.Table:
        """The unit's rows, in the columns of `SCHEMA`."""
        number, word = unit.coordinates["concept"], unit.coordinates["method"]
        expected = self.plan.fingerprints[self.plan.concept_ids.index(number)]
        if self.concepts.fingerprint(number) != expected:
            raise ValueError(
                f"the texts of concept {number} in {self.plan.concepts.folder} are not those the "
                "plan was made with: make the plan again"
            )
        if unit.coordinates["what"] == "detection":
            return as_table(self.detection_rows(number, word))
        factors = [float(one) for one in unit.coordinates["factors"]]  # JSON writes 2.0 as 2
        return as_table(self.steering_rows(number, word, factors))

    # Texts ----------------------------------------------------------------------------------------

    def cut(self, rows: pd.DataFrame) -> tuple[pd.DataFrame, list[bool]]:
        """Rows with their responses cut to the model's bound, and which were cut."""
        pairs = [
            self.form.response_cut(asked, said, self.most)
            for asked, said in zip(rows["input"], rows["output"], strict=True)
        ]
        found = rows.assign(output=[text for text, _ in pairs])
        return found, [was for _, was in pairs]

    def evaluated(self, number: int) -> tuple[pd.DataFrame, list[bool]]:
        if number not in self.texts:
            self.texts = {number: self.cut(self.concepts.held_out(number))}
        return self.texts[number]

    def read(self, number: int, *, other: bool = False) -> list[ReadText]:
        """Residuals of a concept's evaluation rows, or of its negatives alone when another concept
        asks for them. The concept at hand is kept, others as far as they fit."""
        key = (number, other)
        if key not in self.residuals:
            rows, _ = self.evaluated(number) if not other else self.cut(self.negatives(number))
            texts = [
                self.form.text(asked, said)
                for asked, said in zip(rows["input"], rows["output"], strict=True)
            ]
            found = read_texts(self.form, self.hook_name, texts, batch_size=16)
            if not other:
                self.residuals = {k: v for k, v in self.residuals.items() if k[1]}
            elif bytes_of(self.residuals.values()) > MOST_KEPT:
                return found
            self.residuals[key] = found
        return self.residuals[key]

    def negatives(self, number: int) -> pd.DataFrame:
        rows = self.concepts.held_out(number)
        return rows[rows["category"] == "negative"].reset_index(drop=True)

    # Fits -----------------------------------------------------------------------------------------

    def fit(self, number: int, word: str) -> Fit:
        """The method fitted to the concept, once while its units follow each other."""
        if (number, word) not in self.fits:
            self.fits = {(number, word): self.fitted(number, word)}
        return self.fits[number, word]

    def fitted(self, number: int, word: str) -> Fit:
        concept = self.concepts.concept(number)
        rows, _ = self.cut(self.concepts.training(number))
        data = concept_data(concept, rows, self.subject.sae, self.plan.hook_name)
        seed = seed_of(self.plan.seed, "fit", number, word) % 2**31
        try:
            fitted = self.lines[word].method.fit(self.subject, data, seed=seed)
        except LookupError as error:
            return Fit(None, why=str(error))
        scores = self.scores(fitted, self.read(number))
        own = fitted.max_activation if self.plan.own_scale else None
        largest = None if scores is None else max(pooled.value for pooled, _ in scores)
        if not fitted.has_factor:
            return Fit(fitted, scores)
        scale, fallback = scale_of(own if own is not None else largest)
        fitted.max_activation = scale
        return Fit(fitted, scores, scale, fallback)

    def scores(
        self, fitted: Fitted, texts: Sequence[ReadText]
    ) -> tuple[tuple[Pooled, tuple[float, ...]], ...] | None:
        """Pooled score and rounded token scores per text; None when the method does not detect."""
        found = []
        for one in texts:
            with torch.no_grad():
                values = fitted.token_scores(one.residual[None].to(self.subject.model.cfg.device))
            if values is None:
                return None
            listed = [float(v) for v in values[0].float().cpu()]
            found.append((Pooled.of(listed), tuple(round(v, 3) for v in listed)))
        return tuple(found)

    # Rows -----------------------------------------------------------------------------------------

    def detection_rows(self, number: int, word: str) -> list[dict[str, Any]]:
        """One row per evaluation text, then one per further negative (`row` -1)."""
        rows, cut = self.evaluated(number)
        common = {"what": "detection", "concept_id": number, "method": word}
        others = [self.plan.concept_ids[at] for at in self.plan.other_places(number)]
        further: list[float] = []
        scored: list[tuple[Pooled, tuple[float, ...]]]
        if word == BOW:
            values, more = self.bag_of_words(number, others)
            scored = [(Pooled(value, -1), ()) for value in values]
            further = more
        else:
            fit = self.fit(number, word)
            if fit.fitted is None or fit.scores is None:
                return [{**common, "covered": fit.covered, "why": fit.why, "row": None}]
            scored = list(fit.scores)
            for other in others:
                found = self.scores(fit.fitted, self.read(other, other=True))
                further += [pooled.value for pooled, _ in found or ()]
        tokens = [one.tokens for one in self.read(number)] if word != BOW else [()] * len(rows)
        out = [
            {
                **common,
                "covered": True,
                "row": place,
                "category": row["category"],
                "input": self.form.text(row["input"], row["output"]),
                "score": pooled.value,
                "max_index": pooled.index,
                "max_token": words[pooled.index] if words else "",
                "acts": list(acts),
                "tokens": list(words),
                "cut": was,
            }
            for place, (row, (pooled, acts), words, was) in enumerate(
                zip(rows.to_dict("records"), scored, tokens, cut, strict=True)
            )
        ]
        return out + [
            {**common, "covered": True, "row": -1, "category": "negative", "score": value}
            for value in further
        ]

    def bag_of_words(self, number: int, others: Sequence[int]) -> tuple[list[float], list[float]]:
        """The text-only baseline on whole texts: it reads no model, so nothing is cut."""
        train, held = self.concepts.training(number), self.concepts.held_out(number)
        more = [text for other in others for text in joined(self.negatives(other))]
        values = bag_of_words_scores(
            joined(train), (train["category"] == "positive").tolist(), [*joined(held), *more]
        )
        return values[: len(held)], values[len(held) :]

    def steering_rows(
        self, number: int, word: str, factors: Sequence[float]
    ) -> list[dict[str, Any]]:
        """One row per instruction and factor; a single one for a method without a fit."""
        asked = self.plan.asked[self.plan.concept_ids.index(number)]
        fit = None if word == UNSTEERED else self.fit(number, word)
        if fit is not None and not fit.covered:
            nothing = {"what": "steering", "concept_id": number, "method": word}
            return [{**nothing, "covered": False, "why": fit.why}]
        cells = list(itertools.product(enumerate(asked), factors))
        found: list[dict[str, Any]] = []
        while len(found) < len(cells):
            chosen = cells[len(found) : len(found) + self.plan.batch_size]
            made, size = with_smaller_batches(
                partial(self.first_steered, number, word, fit, chosen), len(chosen)
            )
            found += [{**row, "batch_size": size} for row in made]
        return found

    def first_steered(
        self,
        number: int,
        word: str,
        fit: Fit | None,
        cells: Sequence[tuple[tuple[int, str], float]],
        size: int,
    ) -> list[dict[str, Any]]:
        return self.steered(number, word, fit, cells[:size])

    def steered(
        self,
        number: int,
        word: str,
        fit: Fit | None,
        cells: Sequence[tuple[tuple[int, str], float]],
    ) -> list[dict[str, Any]]:
        """The rows of one batch: each with its own factor, its own noise and its own measures."""
        model, form = self.subject.model, self.form
        fitted = None if fit is None else fit.fitted
        factors = torch.tensor([factor for _, factor in cells], dtype=torch.float32)
        steered_inputs = [
            asked if fitted is None else fitted.prompt(asked) for (_, asked), _ in cells
        ]
        prompts = [form.prompt(one) for one in steered_inputs]
        noise = None
        if self.plan.temperature > 0:
            keys = [
                noise_key(self.plan.seed, "axbench", number, place, factor)
                for (place, _), factor in cells
            ]
            noise = gumbel_noise(keys, model.cfg.d_vocab)
        edits = () if fitted is None else fitted.edits(factors)

        @contextmanager
        def acting() -> Any:
            with ExitStack() as stack:
                if fitted is not None:
                    stack.enter_context(fitted.applied())
                if edits:
                    stack.enter_context(steer(model, edits))
                yield

        with ExitStack() as stack:
            if fitted is not None:
                stack.enter_context(fitted.applied())
            out = generate(
                model,
                prompts,
                edits,
                max_new_tokens=self.plan.max_new_tokens,
                temperature=self.plan.temperature,
                noise=noise,
                prepend_bos=form.bos,
                stop_strings=(form.suffix,) if form.suffix else (),
            )
        texts = [one.removesuffix(form.suffix) if form.suffix else one for one in out.texts]
        prompted = [one.tokens for one in form.encoded(prompts)]
        whole = [
            [*before, *new.tolist()] for before, new in zip(prompted, out.new_tokens, strict=True)
        ]
        by_prompt = any(
            used != asked for used, ((_, asked), _) in zip(steered_inputs, cells, strict=True)
        )
        # a steering prompt is no part of what is written: its perplexity is the generation's own
        counted = [form.encoded([one])[0].tokens if one.strip() else () for one in texts]
        read = counted if by_prompt else whole
        losses = nll_of(model, read, form.bos)
        moved = [0.0] * len(cells)
        if fitted is not None and not by_prompt:
            moved = displacement_of(model, self.hook_name, rows_of(whole, form.bos), acting)
        return [
            {
                "what": "steering",
                "concept_id": number,
                "method": word,
                "covered": True,
                "input_id": place,
                "factor": float(factor),
                "original_prompt": asked,
                "steered_input": used,
                "input": prompt,
                "generation": text,
                "new_tokens": len(new),
                "ended": ended,
                "nll": loss[0],
                "nll_tokens": loss[1],
                "max_act": None if fit is None else fit.max_act,
                "fallback": None if fit is None else fit.fallback,
                "strength": None if fit is None or fit.max_act is None else factor * fit.max_act,
                "has_factor": fitted is not None and fitted.has_factor,
                "displacement": displaced,
            }
            for ((place, asked), factor), used, prompt, text, new, ended, loss, displaced in zip(
                cells,
                steered_inputs,
                prompts,
                texts,
                out.new_tokens,
                out.ended,
                losses,
                moved,
                strict=True,
            )
        ]


def nll_of(model: Any, rows: Sequence[Sequence[int]], bos: bool) -> list[tuple[float, int]]:
    """`text_nll`, with (0, 0) for a row that has no token behind its first."""
    kept = [place for place, one in enumerate(rows) if len(one) > 1]
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    if kept:
        measured = text_nll(model, rows_of([rows[place] for place in kept], bos))
        for place, value in zip(kept, measured, strict=True):
            found[place] = value
    return found


def joined(rows: pd.DataFrame) -> list[str]:
    return (rows["input"] + "\n" + rows["output"]).tolist()


def bytes_of(lists: Any) -> int:
    return sum(one.residual.nbytes for texts in lists for one in texts)


def concept_data(concept: Concept, rows: pd.DataFrame, sae: Any, hook_name: str) -> ConceptData:
    """A concept's training rows as the methods take them.

    The feature that the concept's label belongs to is given where the loaded SAE is its SAE, and
    to no method otherwise.
    """
    try:
        feature = None if concept.address is None else concept.address.in_sae(sae)
    except ValueError:
        feature = None
    sides = {
        side: tuple(
            (row["input"], row["output"])
            for row in rows[rows["category"] == side].to_dict("records")
        )
        for side in ("positive", "negative")
    }
    return ConceptData(
        concept=concept.text,
        positives=sides["positive"],
        negatives=sides["negative"],
        genre=concept.genre,
        feature=feature,
        hook_name=hook_name,
        prompt=concept.prompt,
    )


def as_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows in the columns of `schema`, absent ones null."""
    import pyarrow as pa

    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema())


def schema() -> pa.Schema:
    """The columns of a part."""
    import pyarrow as pa

    text, number, whole, truth = pa.large_string(), pa.float64(), pa.int64(), pa.bool_()
    return pa.schema(
        [
            ("what", text),
            ("concept_id", whole),
            ("method", text),
            ("covered", truth),
            ("why", text),
            ("row", whole),
            ("category", text),
            ("input", text),
            ("score", number),
            ("max_index", whole),
            ("max_token", text),
            ("acts", pa.list_(number)),
            ("tokens", pa.list_(text)),
            ("cut", truth),
            ("input_id", whole),
            ("factor", number),
            ("original_prompt", text),
            ("steered_input", text),
            ("generation", text),
            ("new_tokens", whole),
            ("ended", truth),
            ("nll", number),
            ("nll_tokens", whole),
            ("max_act", number),
            ("fallback", truth),
            ("strength", number),
            ("has_factor", truth),
            ("displacement", number),
            ("batch_size", whole),
        ]
    )
