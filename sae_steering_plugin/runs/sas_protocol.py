"""Sparse activation steering as its paper evaluates it, as a plan: lines x question sets x forms.

    lines = sweep_lines(["autonomy"], ["l2-topk-512"], taus=(0.5, 0.7))
    plan = SASPlan(ModelRef.of("agent-gpt2"), (SAERef.of("agent-gpt2", "l2-topk-512"),), behaviours,
                   tuple(Task(line, "options") for line in lines))
    InProcess().run(plan, "out")
    table = collect(plan, "out").to_pandas()

A line is one way of steering for one behaviour: SAS with its threshold, parts and SAE (so its
layer and width), an ablation of it, a dense baseline, a random direction, or two SAS vectors in one
sparse edit. A unit is (line, question set, form, block of items); the strengths of a line are rows
of one batch, which is what makes a dose-response cheap. Source: arXiv 2503.00177.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..adapters.activations import activations_at, bos_policy, encode_texts, padded
from ..edits.codes import SparseAdd
from ..edits.shift import Add
from ..edits.unexplained import Reconstruct
from ..types import Contrast, Edit, Labelled, Positions, SteeringVector, named_positions
from .canonical import content_key
from .choice_items import (
    FORMS,
    ChoiceForm,
    ChoiceItem,
    lead,
    letter_share,
    named_form,
    prompted_contrast,
    question_contrast,
    refuse_built,
)
from .choices import Steering, Strength, evaluate_choices, mean_change
from .plan import Unit
from .references import ModelRef, folder_fingerprint
from .rollouts import random_vector

if TYPE_CHECKING:
    import pandas as pd

MEASURE = "sas choices 1"
"""Name and version of what a part holds."""

Method = Literal[
    "sas", "sas without error term", "sas decoded", "caa", "caa matched", "random matched"
]
METHODS: tuple[str, ...] = get_args(Method)
MATCHED = ("sas decoded", "caa matched", "random matched")
"""Dense directions at the displacement that SAS has at the same strength."""

PROBED = 32
"""Prompts of the build set on which the displacement of SAS is measured."""


@dataclass(frozen=True)
class SAERef:
    """An SAE by its word (one of an organism's, a folder, `release:id`) and a fingerprint."""

    name: str
    source: str
    fingerprint: str

    @classmethod
    def of(cls, model: str, word: str) -> SAERef:
        """The reference as it is now. Raises ValueError or FileNotFoundError for what is not there.

        A release is known by its name alone: its files are not fetched for a plan.
        """
        from ..organisms import data_folder, list_organisms

        folder = Path(word)
        if model in list_organisms() and not (folder / "cfg.json").is_file():
            folder = data_folder(model) / "saes" / word
            known = sorted(one.name for one in folder.parent.glob("*"))
            if ":" not in word and word not in known:
                raise ValueError(f"{model} has no SAE {word!r}; it has {', '.join(known)}")
        if folder.is_dir():
            return cls(word, str(folder.resolve()), folder_fingerprint(folder))
        if ":" in word:
            return cls(word, word, f"release {word}")
        raise FileNotFoundError(f"no SAE {word!r}: a folder of save_model, or release:sae_id")

    def open(self, model: ModelRef) -> Any:
        """The SAE. Raises ValueError when other weights lie there than when the plan was made."""
        from ..adapters.sae_lens import load_sae
        from .subject import DTYPES

        folder = Path(self.source)
        if folder.is_dir() and folder_fingerprint(folder) != self.fingerprint:
            raise ValueError(f"the SAE {self.name!r} has changed since the plan: make it again")
        return load_sae(self.source, device=model.device, dtype=DTYPES[model.dtype])


@dataclass(frozen=True)
class TextPair:
    """Two ready texts that differ in the behaviour, and the wording group they belong to."""

    positive: str
    negative: str
    group: str


@dataclass(frozen=True)
class Behaviour:
    """A behaviour's questions: those to build from and those held out.

    Built from `build` alone, pairs differ in the chosen answer (CAA). With `against` they are one
    question under two system prompts, `build` under the one for the behaviour and `against` under
    the one against it. With `pairs` they are ready texts, read at the last token. Raises ValueError
    when a test item, or its wording group, stands in the build set.
    """

    name: str
    build: tuple[ChoiceItem, ...]
    test: tuple[ChoiceItem, ...]
    against: tuple[ChoiceItem, ...] = ()
    pairs: tuple[TextPair, ...] = ()

    def __post_init__(self) -> None:
        if not (self.build or self.pairs) or not self.test:
            raise ValueError(f"behaviour {self.name!r} lacks questions to build from or to test on")
        if self.build and self.pairs:
            raise ValueError(f"behaviour {self.name!r} is built from questions or texts, not both")
        self.refuse(self.test)

    def refuse(self, items: Sequence[ChoiceItem]) -> None:
        """Raise ValueError when one of `items` was used to build the vector."""
        refuse_built(items, self.texts() if self.pairs else self.build)

    def texts(self) -> Contrast:
        return Contrast(
            positive=tuple(pair.positive for pair in self.pairs),
            negative=tuple(pair.negative for pair in self.pairs),
            groups=tuple(pair.group for pair in self.pairs),
            name=self.name,
            source=f"{len(self.pairs)} pairs of texts",
        )

    def contrast(self, form: ChoiceForm, render: Any) -> Contrast:
        if self.pairs:
            return self.texts()
        if self.against:
            return prompted_contrast(
                self.build, self.against, form=form, render=render, name=self.name
            )
        return question_contrast(self.build, form=form, render=render, name=self.name)

    def probes(self, form: ChoiceForm, render: Any) -> list[str]:
        """Prompts of the build set on which displacement is measured."""
        if self.pairs:
            return [pair.negative for pair in self.pairs[:PROBED]]
        return [lead(item, form, render) for item in self.build[:PROBED]]


@dataclass(frozen=True)
class Line:
    """One way of steering for one behaviour.

    `second` names another behaviour whose SAS vector joins in one sparse edit; strengths are then
    the grid of pairs. `seed` is that of a random direction.
    """

    behaviour: str
    sae: str
    method: Method = "sas"
    tau: float = 0.7
    parts: Literal["both", "positive", "negative"] = "both"
    top_n: int | None = None
    seed: int | None = None
    second: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"no method {self.method!r}; choose one of {', '.join(METHODS)}")
        if (self.method == "random matched") != (self.seed is not None):
            raise ValueError("a seed belongs to 'random matched', and to nothing else")
        if self.second and self.method != "sas":
            raise ValueError("two vectors go together in one sparse edit: method 'sas'")

    def __str__(self) -> str:
        words = [self.behaviour + (f" + {self.second}" if self.second else ""), self.sae]
        words.append(self.method + ("" if self.seed is None else f" {self.seed}"))
        words.append(f"tau {self.tau:g}")
        words += [] if self.parts == "both" else [f"{self.parts} part"]
        words += [] if self.top_n is None else [f"top {self.top_n}"]
        return " | ".join(words)


@dataclass(frozen=True)
class QuestionSet:
    """Items beside the behaviours' own: what steering must not break, or another behaviour.

    `form` is the condition they are put in, as `str(ChoiceForm)`.
    """

    name: str
    items: tuple[ChoiceItem, ...]
    form: str = str(FORMS[0])


@dataclass(frozen=True)
class Task:
    """What a line is measured on: a question set in one form. Empty `on` is its own behaviour."""

    line: Line
    form: str
    on: str = ""


@dataclass(frozen=True)
class SASPlan:
    """Tasks run in blocks of items; see `runs.plan`. Raises ValueError for what does not fit."""

    model: ModelRef
    saes: tuple[SAERef, ...]
    behaviours: tuple[Behaviour, ...]
    tasks: tuple[Task, ...]
    sets: tuple[QuestionSet, ...] = ()
    strengths: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    grid: tuple[float, ...] = (-1.0, 0.0, 1.0)
    built_in: str = str(FORMS[0])
    positions: str = "all"
    block: int = 50
    batch_size: int = 120
    worker: ClassVar[str] = f"{__name__}:SASWorker"
    title: ClassVar[str] = "sas choices"

    def __post_init__(self) -> None:
        named_form(self.built_in)
        named_positions(self.positions)
        if self.block < 1 or self.batch_size < 1:
            raise ValueError("block and batch_size are at least 1")
        names = {one.name for one in self.behaviours}
        saes = {one.name for one in self.saes}
        sets = {one.name for one in self.sets} | names
        if len(names) < len(self.behaviours) or len(sets) < len(self.behaviours) + len(self.sets):
            raise ValueError("two behaviours or question sets have one name")
        for task in self.tasks:
            line = task.line
            for what, name, known in (
                ("behaviour", line.behaviour, names),
                ("behaviour", line.second or line.behaviour, names),
                ("SAE", line.sae, saes),
                ("question set", task.on or line.behaviour, sets),
            ):
                if name not in known:
                    raise ValueError(f"no {what} {name!r} in this plan; it has {sorted(known)}")
        if 0.0 not in self.strengths or 0.0 not in self.grid:
            raise ValueError("strengths and grid need 0: every shift is read against it")

    def items(self, task: Task) -> tuple[ChoiceItem, ...]:
        """The items a task is measured on. Raises ValueError when the line was built from one."""
        name = task.on or task.line.behaviour
        found = {one.name: one.test for one in self.behaviours}
        found |= {one.name: one.items for one in self.sets}
        for built in (task.line.behaviour, task.line.second):
            if built and built != name:
                self.behaviour(built).refuse(found[name])
        return found[name]

    def behaviour(self, name: str) -> Behaviour:
        return next(one for one in self.behaviours if one.name == name)

    def doses(self, line: Line) -> tuple[Strength, ...]:
        """The line's strengths; for two vectors the grid of pairs."""
        return tuple(itertools.product(self.grid, self.grid)) if line.second else self.strengths

    def units(self) -> Sequence[Unit]:
        """By task, then by block of items, in the order given."""
        prints = {one.name: one.fingerprint for one in self.saes}
        built = {
            one.name: content_key([one.build, one.against, one.pairs]) for one in self.behaviours
        }
        found = []
        for task in self.tasks:
            items = self.items(task)
            for start in range(0, len(items), self.block):
                stop = min(start + self.block, len(items))
                found.append(
                    Unit.of(
                        {
                            "line": str(task.line),
                            "on": task.on or task.line.behaviour,
                            "form": task.form,
                            "items": [start, stop],
                        },
                        measure=MEASURE,
                        model=self.model.identity(),
                        sae=prints[task.line.sae],
                        built=[built[task.line.behaviour], built.get(task.line.second, "")],
                        built_in=self.built_in,
                        doses=self.doses(task.line),
                        positions=self.positions,
                        batch_size=self.batch_size,
                        asked=content_key(items[start:stop]),
                    )
                )
        return found


class SASWorker:
    """Runs units of a `SASPlan`: a model loaded once, activations and vectors made when needed."""

    def __init__(self, plan: SASPlan) -> None:
        self.plan = plan
        self.subject = plan.model.open()
        self.lines = {str(task.line): task.line for task in plan.tasks}
        self.tasks = {
            (str(task.line), task.on or task.line.behaviour, task.form): task for task in plan.tasks
        }
        self.saes: dict[str, Any] = {}
        self.collected: dict[tuple[str, str], Labelled] = {}
        self.codes: dict[tuple[str, str], Any] = {}
        self.vectors: dict[Any, SteeringVector] = {}
        self.probes: dict[tuple[str, str], Tensor] = {}
        self.lengths: dict[Any, dict[float, tuple[float, float]]] = {}

    def sae(self, name: str) -> Any:
        if name not in self.saes:
            reference = next(one for one in self.plan.saes if one.name == name)
            self.saes[name] = reference.open(self.plan.model)
        return self.saes[name]

    def examples(self, behaviour: str, sae: str) -> Labelled:
        """The build set's activations at the SAE's site."""
        from .collect import collect_contrast

        dictionary = self.sae(sae)
        key = (behaviour, dictionary.cfg.metadata.hook_name)
        if key not in self.collected:
            form = named_form(self.plan.built_in)
            found = self.plan.behaviour(behaviour).contrast(form, self.subject.render)
            self.collected[key] = collect_contrast(
                self.subject.model, found, dictionary, progress=False
            )
        return self.collected[key]

    def vector(self, line: Line, behaviour: str = "") -> SteeringVector:
        """The sparse or dense vector of a line, for its behaviour or another one."""
        from ..directions.codes import fired_codes
        from ..directions.dense import caa_vector
        from ..directions.sparse import sas_vector

        name = behaviour or line.behaviour
        dense = line.method in ("caa", "caa matched")
        key = (name, line.sae) if dense else (name, line.sae, line.tau, line.parts, line.top_n)
        if key not in self.vectors:
            examples = self.examples(name, line.sae)
            if dense:
                self.vectors[key] = caa_vector(examples, label=name)
            else:
                place = (name, line.sae)
                if place not in self.codes:
                    self.codes[place] = fired_codes(self.sae(line.sae), examples)
                with warnings.catch_warnings():
                    # an empty vector is reported by the column "support"
                    warnings.filterwarnings("ignore", "no latent is left", UserWarning)
                    self.vectors[key] = sas_vector(
                        examples,
                        self.sae(line.sae),
                        tau=line.tau,
                        parts=line.parts,
                        top_n=line.top_n,
                        codes=self.codes[place],
                        label=name,
                    )
        return self.vectors[key]

    def displacement(self, line: Line) -> dict[float, tuple[float, float]]:
        """Per strength the mean length of the SAS change and of the residual, over the prompts of
        the build set; lengths carry the strength's sign."""
        key = (line.behaviour, line.sae, line.tau, line.parts, line.top_n)
        if key not in self.lengths:
            sas = Line(line.behaviour, line.sae, "sas", line.tau, line.parts, line.top_n)
            found = {}
            for strength in self.plan.strengths:
                if strength == 0 or not self.vector(sas).norm:
                    found[strength] = (0.0, float("nan"))
                    continue
                length, residual = self.moved(sas, strength)
                found[strength] = (length if strength > 0 else -length, residual)
            self.lengths[key] = found
        return self.lengths[key]

    def moved(self, line: Line, strength: float) -> tuple[float, float]:
        """Mean length of the change and of the residual over the build set's probe prompts.

        Where all positions are steered the activations are read once per site and the change is
        applied to them, which is what a steered pass would measure there.
        """
        if self.plan.positions != "all":
            texts = self.probe_texts(line.behaviour)
            return mean_change(self.subject.model, texts, self.steering(line), strength)
        sae = self.sae(line.sae)
        key = (line.behaviour, sae.cfg.metadata.hook_name)
        if key not in self.probes:
            model = self.subject.model
            encoded = encode_texts(
                model, self.probe_texts(line.behaviour), prepend_bos=bos_policy(model)
            )
            batch = padded(model, encoded)
            self.probes[key] = activations_at(model, key[1], batch)[batch.counted]
        x = self.probes[key][:, None]
        change = SparseAdd(sae, self.vector(line), strength).prepare(dtype=x.dtype, device=x.device)
        with torch.no_grad():
            length = change(x).norm(dim=-1).double().mean()
        return float(length), float(x.norm(dim=-1).double().mean())

    def probe_texts(self, behaviour: str) -> list[str]:
        form = named_form(self.plan.built_in)
        return self.plan.behaviour(behaviour).probes(form, self.subject.render)

    def steering(self, line: Line) -> Steering:
        """The edits of a line, as a function of the rows' strengths."""
        rule = named_positions(self.plan.positions)
        sae = self.sae(line.sae)
        vector = self.vector(line)
        if line.second:
            other = self.vector(line, line.second)
            both = ((vector, 0), (other, 1))
            return lambda s: [
                Edit(SparseAdd(sae, one, s[:, column]), positions=rule)
                for one, column in both
                if one.norm
            ]
        if line.method == "sas without error term":
            return lambda s: Edit(Reconstruct(sae, vector, s), positions=rule)
        if line.method == "sas":
            return (
                (lambda s: Edit(SparseAdd(sae, vector, s), positions=rule))
                if vector.norm
                else nothing
            )
        if line.method == "caa":
            return lambda s: Edit(Add(vector, s), positions=rule)
        lengths = self.displacement(line)
        if not any(length for length, _ in lengths.values()):
            return nothing
        chosen = vector
        if line.seed is not None:
            chosen = random_vector(vector, line.seed)
        return lambda s: matched(chosen, s, lengths, rule)

    def run(self, unit: Unit) -> pd.DataFrame:
        """One row per item and strength of the unit: what was asked, and the scores."""
        key = tuple(unit.coordinates[name] for name in ("line", "on", "form"))
        task = self.tasks[key]
        line = task.line
        start, stop = unit.coordinates["items"]
        items = self.plan.items(task)[start:stop]
        with warnings.catch_warnings():
            # a block may hold more of one letter; the whole set's share stands in the table
            warnings.filterwarnings("ignore", ".*letters are unbalanced", UserWarning)
            found = evaluate_choices(
                self.subject.model,
                items,
                self.steering(line),
                strengths=self.plan.doses(line),
                form=named_form(task.form),
                render=self.subject.render,
                batch_size=self.plan.batch_size,
                name=line.behaviour,
            )
        table = found.table()
        table["item"] += start
        about = {
            **self.named(line),
            "on": task.on or line.behaviour,
            "form": task.form,
            **self.extent(line),
        }
        table["displacement"] = self.displacements(line, table["strength"])
        for place, (name, value) in enumerate(about.items()):
            table.insert(place, name, value)
        second = table.pop("strength_2") if "strength_2" in table else float("nan")
        table.insert(table.columns.get_loc("strength") + 1, "strength_2", second)
        return table.sort_values(["item", "strength", "strength_2"], ignore_index=True)

    def named(self, line: Line) -> dict[str, Any]:
        """The columns that say which line a row belongs to."""
        return {
            "line": str(line),
            "behaviour": line.behaviour,
            "second": line.second,
            "sae": line.sae,
            "hook_name": self.vector(line).hook_name,
            "method": line.method,
            "tau": line.tau,
            "parts": line.parts,
            "top_n": -1 if line.top_n is None else line.top_n,
            "seed": -1 if line.seed is None else line.seed,
        }

    def extent(self, line: Line) -> dict[str, int]:
        """How many latents the line's vector has (-1: it is dense), of how many."""
        codes = self.vector(line).codes
        support = -1 if codes is None else int((codes.values != 0).sum())
        return {"support": support, "d_sae": int(self.sae(line.sae).W_dec.shape[0])}

    def displacements(self, line: Line, strengths: pd.Series) -> Any:
        """The length of the change against the residual at each row's strength; NaN where it is not
        measured (two vectors, CAA in its own unit, the edit without error term)."""
        if (line.method != "sas" or line.second) and line.method not in MATCHED:
            return float("nan")
        ratios = {
            strength: abs(length) / residual if length else 0.0
            for strength, (length, residual) in self.displacement(line).items()
        }
        return strengths.map(ratios).astype(float)


def nothing(strengths: Tensor) -> list[Edit]:
    """The edits of an empty vector: none."""
    del strengths
    return []


def matched(
    vector: SteeringVector,
    strengths: Tensor,
    lengths: Mapping[float, tuple[float, float]],
    rule: Positions,
) -> Edit:
    """A dense shift along `vector`, as long as SAS moves the residual at each row's strength."""
    known = {float(torch.tensor(one, dtype=torch.float32)): lengths[one][0] for one in lengths}
    steps = torch.tensor([known[float(one)] for one in strengths])
    return Edit(Add(vector, steps, unit="unit"), positions=rule)


# Lines --------------------------------------------------------------------------------------------


def sweep_lines(
    behaviours: Sequence[str],
    saes: Sequence[str],
    *,
    taus: Sequence[float] = (0.7,),
) -> list[Line]:
    """SAS for every behaviour, SAE (layer, width, kind) and threshold."""
    return [
        Line(behaviour, sae, tau=float(tau))
        for behaviour in behaviours
        for sae in saes
        for tau in taus
    ]


def ablation_lines(
    behaviour: str, sae: str, *, tau: float = 0.7, tops: Sequence[int] = (1, 4)
) -> list[Line]:
    """One part only, the largest entries only, and the edit without the error term."""
    return [
        Line(behaviour, sae, tau=tau, parts="positive"),
        Line(behaviour, sae, tau=tau, parts="negative"),
        *(Line(behaviour, sae, tau=tau, top_n=n) for n in tops),
        Line(behaviour, sae, "sas without error term", tau=tau),
    ]


def baseline_lines(behaviour: str, sae: str, *, tau: float = 0.7, controls: int = 10) -> list[Line]:
    """CAA in its own unit; CAA, the decoded SAS vector and random directions as long as SAS."""
    return [
        Line(behaviour, sae, "caa", tau=tau),
        Line(behaviour, sae, "caa matched", tau=tau),
        Line(behaviour, sae, "sas decoded", tau=tau),
        *(Line(behaviour, sae, "random matched", tau=tau, seed=i) for i in range(controls)),
    ]


def set_shares(plan: SASPlan) -> dict[str, float]:
    """Share of first letters among the matching answers of each question set."""
    found = {one.name: letter_share(one.test) for one in plan.behaviours}
    return found | {one.name: letter_share(one.items) for one in plan.sets}
