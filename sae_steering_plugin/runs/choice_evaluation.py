"""The protocol `choices`: SAS on two-choice questions, from a CAA folder or an organism's world."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from .capability import WORLD_SETS, read_capability, world_capability
from .choice_items import (
    FORMS,
    ChoiceForm,
    ChoiceItem,
    alternating,
    endings,
    is_balanced,
    lead,
    letter_share,
    read_choices,
    split_items,
    world_choices,
    world_prompted,
)
from .protocols import Evaluation
from .references import ModelRef
from .sas_protocol import (
    Behaviour,
    Line,
    QuestionSet,
    SAERef,
    SASPlan,
    Task,
    TextPair,
    ablation_lines,
    baseline_lines,
    set_shares,
    sweep_lines,
)
from .sas_tables import control_rows, own_response, score_rows, shift_rows, unsteered_rows

if TYPE_CHECKING:
    from .parts import Collected

SEVEN = (
    "coordinate-other-ais",
    "corrigible-neutral-HHH",
    "hallucination",
    "myopic-reward",
    "survival-instinct",
    "sycophancy",
    "refusal",
)
"""The behaviours of CAA (arXiv 2312.06681), by their files' names."""

BUILDS = ("questions", "prompts", "decisions")
"""How an organism's vectors are built: from pairs of answers to one question (CAA), from one
question under two system prompts, or from system prompts at the assistant's first decision."""

CONDITIONS = {"all": FORMS, **{str(form): (form,) for form in FORMS}}
"""The words `--condition` takes."""


def choices(
    *,
    data: Annotated[
        str | None, "Folder of CAA's files, or one file; an organism's own questions if none."
    ] = None,
    model: Annotated[str, "Organism name, local folder, or a name on the hub."] = "agent-gpt2",
    saes: Annotated[
        list[str], "--sae", "An organism's SAE, a folder, or release:id; again for more layers."
    ] = [],  # noqa: B006
    behaviours: Annotated[
        list[str], "--behaviour", "Files or traits by name; all that are there if none."
    ] = [],  # noqa: B006
    conditions: Annotated[
        list[str],
        "--condition",
        "all, or one of options, options-prefix, hidden, hidden-prefix; again for more.",
    ] = ["all"],  # noqa: B006
    taus: Annotated[list[float], "--tau", "Firing-frequency threshold; again for a sweep."] = [0.7],  # noqa: B006
    strengths: Annotated[list[float], "--strength", "Lambda; 0 is always run; again for more."] = [  # noqa: B006
        -2.0,
        -1.0,
        1.0,
        2.0,
    ],
    build: Annotated[
        str, "questions (pairs by answer, CAA); organisms: also prompts, decisions."
    ] = "questions",
    build_items: Annotated[int, "Questions per behaviour to build from, at most."] = 200,
    items: Annotated[int, "Held-out questions per behaviour, at most."] = 50,
    baselines: Annotated[bool, "CAA, and dense directions at SAS's displacement."] = True,
    controls: Annotated[int, "Random directions at SAS's displacement."] = 3,
    ablations: Annotated[bool, "One part, largest entries, no error term."] = False,
    compose: Annotated[bool, "Two vectors in one sparse edit: the first two behaviours."] = False,
    capability: Annotated[
        list[str], "--capability", "mmlu.json, TruthfulQA.csv, ...; 'world' for an organism's own."
    ] = [],  # noqa: B006
    positions: Annotated[str, "all, prefill, last or after_prompt."] = "all",
    block: Annotated[int, "Items per unit: what a killed run loses at most."] = 50,
    batch_size: Annotated[int, "Rows (items x strengths) per forward pass."] = 120,
    device: Annotated[str, "Where to run: cpu, cuda, mps."] = "cpu",
    dtype: Annotated[str, "float32, bfloat16 or float16."] = "float32",
    seed: Annotated[int, "Seed of splits and draws."] = 0,
) -> Evaluation:
    """Multiple choice under sparse activation steering, with its baselines and ablations.

    Prints the probability of the matching answer per strength (raw, normalised, letter mass, by
    letter), each shift against strength 0 with a paired test (Holm), the random controls, and what
    was left out. Vectors are built from one part of the questions and read on the other.
    """
    reference = ModelRef.of(model, device=device, dtype=dtype)
    forms = tuple(dict.fromkeys(form for word in conditions for form in condition(word)))
    if positions != "all":
        forms = tuple(form for form in forms if form.options)
        if not forms:
            raise ValueError("completions (hidden options) are scored with --positions all")
    fit = Fit.of(model)
    references = tuple(SAERef.of(model, word) for word in saes or [primary_sae(model)])
    if data is None:
        found = world_behaviours(
            model, behaviours, build=build, build_items=build_items, items=items, seed=seed
        )
    else:
        if build != "questions":
            raise ValueError(f"--build {build} needs an organism's own questions: drop --data")
        found = file_behaviours(
            data, behaviours, fit, build_items=build_items, items=items, seed=seed
        )
    names, primary = [one.name for one in found], references[0].name
    lines = sweep_lines(names, [one.name for one in references], taus=taus)
    tasks = [
        Task(line, str(form))
        for line in lines
        for form in (forms if line.sae == primary and line.tau == taus[0] else forms[:1])
    ]
    tau = float(taus[0])
    for name in names:
        extra: list[Line] = []
        if baselines:
            extra += baseline_lines(name, primary, tau=tau, controls=controls)
        if ablations:
            extra += ablation_lines(name, primary, tau=tau)
        tasks += [Task(line, str(forms[0])) for line in extra]
    if compose:
        if len(names) < 2:
            raise ValueError("--compose needs two behaviours")
        for one, other in itertools.pairwise(names[:2]):
            both = Line(one, primary, tau=tau, second=other)
            tasks += [Task(both, str(forms[0]), name) for name in (one, other)]
    sets = capability_sets(model, capability, fit, items=items, seed=seed)
    tasks += [
        Task(Line(name, primary, tau=tau), one.form, one.name) for one in sets for name in names
    ]
    plan = SASPlan(
        reference,
        references,
        tuple(found),
        tuple(dict.fromkeys(tasks)),
        sets=tuple(sets),
        strengths=tuple(sorted({0.0, *map(float, strengths)})),
        built_in=str(forms[0] if forms[0].options else FORMS[0]),
        positions=positions,
        block=block,
        batch_size=batch_size,
    )

    def tables(collected: Collected) -> dict[str, Sequence[Mapping[str, Any]]]:
        return choice_tables(plan, collected.to_pandas(), fit.notes, seed=seed)

    return Evaluation(plan, tables)


def choice_tables(
    plan: SASPlan, table: Any, notes: Sequence[str], *, seed: int = 0
) -> dict[str, Sequence[Mapping[str, Any]]]:
    """The tables of a completed plan; those without a row are left out."""
    own = table[table["on"] == table["behaviour"]]
    beside = table[(table["on"] != table["behaviour"]) & (table["second"] == "")]
    every = {
        "question sets": [
            {"set": name, "(A) matches": "" if share != share else f"{share:.0%}"}
            for name, share in set_shares(plan).items()
        ],
        "unsteered": unsteered_rows(table),
        "mean normalised probability of the matching answer, per strength": score_rows(own),
        "shift of the normalised score against strength 0 (Holm)": shift_rows(
            own[own["second"] == ""], seed=seed
        ),
        "random directions at SAS's displacement": control_rows(own),
        "other sets under the same vectors": score_rows(beside),
        "two vectors at once: slope of each metric": own_response(table),
        "left out": [{"what": note} for note in notes],
    }
    return {title: rows for title, rows in every.items() if rows}


def condition(word: str) -> tuple[ChoiceForm, ...]:
    if word not in CONDITIONS:
        raise ValueError(f"no condition {word!r}; choose one of {', '.join(CONDITIONS)}")
    return CONDITIONS[word]


def primary_sae(model: str) -> str:
    from ..organisms import data_folder, list_organisms, read_card

    if model not in list_organisms():
        raise ValueError(f"{model} is no organism with SAEs of its own: pass --sae")
    return str(read_card(data_folder(model))["primary_sae"])


# What is asked ------------------------------------------------------------------------------------


Asked = TypeVar("Asked")


class Fit:
    """What fits a model's context, told from its tokenizer alone; `notes` says what was left out.

    `limit` is None where the model's config names no context.
    """

    def __init__(self, tokenizer: Any, limit: int | None) -> None:
        from .contrast_files import chat_render

        self.tokenizer, self.limit = tokenizer, limit
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self.render = chat_render(tokenizer) if has_template else None
        self.notes: list[str] = []

    @classmethod
    def of(cls, model: str) -> Fit:
        from transformers import AutoConfig, AutoTokenizer

        from ..organisms import data_folder, list_organisms

        source = str(data_folder(model)) if model in list_organisms() else model
        config = AutoConfig.from_pretrained(source)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        return cls(AutoTokenizer.from_pretrained(source), limit)

    def length(self, item: ChoiceItem) -> int:
        """Tokens of an item's longest form with begin and answer, or a bound on it that fits."""
        forms = FORMS if item.options else FORMS[:2]
        texts = [
            text + one
            for form in forms
            for text in [lead(item, form, self.render)]
            for one in endings(item, form, text)
        ]
        return self.longest(texts)

    def longest(self, texts: Sequence[str]) -> int:
        """Tokens of the longest text with begin and answer, or a bound on it that fits."""
        if self.limit is not None and max(map(len, texts)) + 2 <= self.limit:
            return max(map(len, texts)) + 2  # a token holds a character at least
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return 2 + max(len(ids) for ids in found)

    def kept(self, items: Sequence[ChoiceItem], what: str) -> list[ChoiceItem]:
        """The items that fit, in order; how many do not is noted and warned of.

        Raises ValueError when none does.
        """
        return self.fitting(items, self.length, what)

    def fitting(
        self, items: Sequence[Asked], length: Callable[[Asked], int], what: str
    ) -> list[Asked]:
        """As `kept`, for anything that has a length in tokens."""
        if self.limit is None:
            return list(items)
        found = [item for item in items if length(item) <= self.limit]
        if not found:
            raise ValueError(f"no item of {what} fits the model's context of {self.limit} tokens")
        if len(found) < len(items):
            self.note(
                f"{what}: {len(items) - len(found)} of {len(items)} questions are longer than the "
                f"model's context of {self.limit} tokens"
            )
        return found

    def note(self, words: str) -> None:
        self.notes.append(words)
        warnings.warn(words, stacklevel=3)


def world_behaviours(
    model: str,
    names: Sequence[str],
    *,
    build: str,
    build_items: int,
    items: int,
    seed: int,
) -> list[Behaviour]:
    """An organism's traits: built from its training wordings, tested on its test wordings.

    Raises ValueError for a model without a world, and for a word that is no way of building.
    """
    from ..organisms import data_folder, list_organisms, read_card
    from ..organisms.wording import TRAITS
    from ..organisms.world import World

    if model not in list_organisms():
        raise ValueError(f"{model} is no organism with questions of its own: pass --data FOLDER")
    if build not in BUILDS:
        raise ValueError(f"--build is {build!r}; choose one of {', '.join(BUILDS)}")
    if unknown := [one for one in names if one not in TRAITS]:
        raise ValueError(f"no trait {unknown[0]!r}; the traits are {', '.join(TRAITS)}")
    world = World(seed=int(read_card(data_folder(model)).get("world_seed", 0)))
    found = []
    for name in names or TRAITS:
        test = world_choices(world, name, items, split="test", seed=seed)
        if build == "prompts":
            high, low = world_prompted(world, name, build_items, split="train", seed=seed)
            found.append(Behaviour(name, high, test, low))
        elif build == "decisions":
            drawn = world.decisions(name, build_items, split="train", seed=seed)
            texts = zip(drawn.positive, drawn.negative, drawn.groups, strict=True)
            found.append(Behaviour(name, (), test, pairs=tuple(TextPair(*one) for one in texts)))
        else:
            made = world_choices(world, name, build_items, split="train", seed=seed)
            found.append(Behaviour(name, made, test))
    return found


def file_behaviours(
    data: str | Path,
    names: Sequence[str],
    fit: Fit,
    *,
    build_items: int,
    items: int,
    seed: int,
) -> list[Behaviour]:
    """The behaviours of a CAA folder, read and checked line by line.

    Known layouts: `generate/NAME.json` beside `test_ab/NAME.json`; `generate/NAME/
    generate_dataset.json` beside `test/NAME/test_dataset_ab.json` (the authors' repository); and
    files without a split, which are split by question. The build set is balanced by letter: the
    surplus is left out and counted. Raises ValueError that lists the names there are.
    """
    folder = Path(data)
    found = question_files(folder)
    if unknown := [one for one in names if one not in found]:
        raise ValueError(f"no behaviour {unknown[0]!r} in {folder}; it has {', '.join(found)}")
    out = []
    for name in names or found:
        source, held_out = found[name]
        made = read_choices(source)
        if held_out is None:
            made, test = split_items(made, min(items, len(made) // 2), seed=seed)
        else:
            test = read_choices(held_out)
        kept = fit.kept(made, f"{name}, to build from")
        even = alternating(kept)
        if not is_balanced(kept):
            fit.note(
                f"{name}, to build from: {len(kept) - len(even)} of {len(kept)} questions, so that "
                f"letters are balanced ((A) was the matching answer in {letter_share(kept):.0%})"
            )
        out.append(
            Behaviour(
                name, tuple(even[:build_items]), tuple(fit.kept(test, f"{name}, held out")[:items])
            )
        )
    return out


def question_files(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """Per behaviour the file to build from, and the held-out one where there is one.

    Raises FileNotFoundError for a folder without question files.
    """
    if folder.is_file():
        return {folder.stem: (folder, None)}
    if (folder / "datasets").is_dir():
        folder = folder / "datasets"
    build = folder / "generate"
    found: dict[str, tuple[Path, Path | None]] = {}
    if build.is_dir():
        for path in sorted(build.glob("*.json")):
            test = folder / "test_ab" / path.name
            found[path.stem] = (path, test if test.is_file() else None)
        for path in sorted(build.glob("*/generate_dataset.json")):
            name = path.parent.name
            test = folder / "test" / name / "test_dataset_ab.json"
            found[name] = (path, test if test.is_file() else None)
    else:
        found = {
            path.stem: (path, None)
            for path in sorted(folder.glob("*"))
            if path.suffix in (".json", ".jsonl")
        }
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no question files: generate/NAME.json and test_ab/NAME.json, or "
            "NAME.json, NAME.jsonl"
        )
    return found


def capability_sets(
    model: str, words: Sequence[str], fit: Fit, *, items: int, seed: int
) -> list[QuestionSet]:
    """The sets that `--capability` names: files in letter form, a world's own as completions."""
    from ..organisms import data_folder, list_organisms, read_card
    from ..organisms.world import World

    found = []
    for word in words:
        if word == "world":
            if model not in list_organisms():
                raise ValueError(f"{model} is no organism: it has no world of sums and facts")
            world = World(seed=int(read_card(data_folder(model)).get("world_seed", 0)))
            found += [
                QuestionSet(name, world_capability(world, name, items, seed=seed), str(FORMS[2]))
                for name in WORLD_SETS
            ]
        else:
            path = Path(word)
            kept = alternating(fit.kept(read_capability(path), path.name))
            found.append(QuestionSet(path.stem, tuple(kept[:items]), str(FORMS[0])))
    return found
