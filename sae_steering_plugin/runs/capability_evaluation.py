"""The protocol `capability`: what a model knows, steered and unsteered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from ..types import UNITS
from ..types import Unit as StrengthUnit
from .capability import ManyAnswers, read_capability, read_truthful
from .capability_plan import CapabilityPlan, ChoiceSet, TruthSet
from .choice_evaluation import Fit, capability_sets
from .choice_items import FORMS, alternating, letter_share
from .protocols import Evaluation
from .references import ModelRef
from .rollout_evaluation import named_vectors
from .rollout_plan import BASE, random_crowd, steering_arms
from .sas_tables import effect_cells, rounded

if TYPE_CHECKING:
    import pandas as pd

    from .parts import Collected

WORLD_ITEMS = 100
"""Sums and facts of a world where all are asked for: it makes as many as one likes."""


def capability(
    *,
    data: Annotated[
        list[str],
        "TruthfulQA.csv, CAA's mmlu.json or truthful_qa.json, MMLU's *_test.csv; 'world' for an "
        "organism's own. Again for more.",
    ],
    vectors: Annotated[list[str], "Folder of build or save_model; again for more."] = [],  # noqa: B006
    model: Annotated[str, "Organism name, local folder, or a name on the hub."] = "agent-gpt2",
    strengths: Annotated[list[float], "--strength", "In --unit; again for more."] = [0.5],  # noqa: B006
    unit: Annotated[str, "raw, unit, norm, max_activation or kl."] = "norm",
    controls: Annotated[int, "Random directions per vector, at the same displacement."] = 3,
    items: Annotated[int, "Questions per set, from the first; 0 for all."] = 100,
    block: Annotated[int, "Questions per unit: what a killed run loses at most."] = 50,
    batch_size: Annotated[int, "Answers (of two-choice sets, questions) per forward pass."] = 32,
    device: Annotated[str, "Where to run: cpu, cuda, mps."] = "cpu",
    dtype: Annotated[str, "float32, bfloat16 or float16."] = "float32",
    seed: Annotated[int, "Seed of everything that is drawn."] = 0,
) -> Evaluation:
    """TruthfulQA (MC1, MC2) and two-choice sets of knowledge, steered and unsteered.

    Prints per arm and set the share of correct answers (MC1, or the better of two) and the
    probability of the truth (MC2, or the normalised probability), each arm's shift against the base
    on the same questions (Holm), the random directions, and what does not fit the model's context.
    """
    if unit not in UNITS:
        raise ValueError(f"no strength unit {unit!r}; choose one of {', '.join(UNITS)}")
    scale = cast("StrengthUnit", unit)
    named = named_vectors(vectors)
    steered = steering_arms(named, strengths=strengths, unit=scale)
    crowd = random_crowd(named, seeds=range(controls), strengths=strengths, unit=scale)
    fit = Fit.of(model)
    truth, choices = question_sets(model, data, fit, items=items, seed=seed)
    plan = CapabilityPlan(
        ModelRef.of(model, device=device, dtype=dtype),
        (BASE, *steered, *crowd),
        tuple(truth),
        tuple(choices),
        block=block,
        batch_size=batch_size,
    )

    def tables(collected: Collected) -> dict[str, Sequence[Mapping[str, Any]]]:
        table = collected.to_pandas()
        every = {
            "question sets": [
                {"set": one.name, "n": len(one.questions), "(A) matches": share_of(one)}
                for one in plan.sets
            ],
            "knowledge per arm": score_rows(table),
            "probability of the truth against the base (Holm over the vectors)": shift_rows(
                table, [arm.name for arm in steered], seed=seed
            ),
            "probability of the truth under random directions, against the base": shift_rows(
                table, [arm.name for arm in crowd], seed=seed
            ),
            "left out": [{"what": note} for note in fit.notes],
        }
        return {title: rows for title, rows in every.items() if rows}

    return Evaluation(plan, tables)


def question_sets(
    model: str, words: Sequence[str], fit: Fit, *, items: int, seed: int
) -> tuple[list[TruthSet], list[ChoiceSet]]:
    """The sets that `--data` names, what does not fit the context left out and noted. Two-choice
    sets alternate between the letters, as far as both last.

    Raises ValueError for a file that is none of the forms, with its line.
    """
    truth: list[TruthSet] = []
    choices: list[ChoiceSet] = []
    most = items or 10**9
    for word in words:
        path = Path(word)
        if word != "world" and not path.is_file():
            raise FileNotFoundError(f"no file {path}: a set of knowledge, or the word 'world'")
        if word != "world" and is_truthful_file(path):
            kept = fit.fitting(
                read_truthful(path), lambda one: fit.longest(texts_of(one)), path.name
            )
            truth.append(TruthSet(path.stem, tuple(kept[:most])))
            continue
        if word == "world":
            found = capability_sets(model, [word], fit, items=items or WORLD_ITEMS, seed=seed)
            choices += [ChoiceSet(one.name, one.items, one.form) for one in found]
        else:
            even = alternating(fit.kept(read_capability(path), path.name))
            choices.append(ChoiceSet(path.stem, tuple(even[:most]), str(FORMS[0])))
    return truth, choices


def is_truthful_file(path: Path) -> bool:
    """True for a table with TruthfulQA's columns."""
    if path.suffix.lower() != ".csv":
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return "Best Answer" in file.readline()


def texts_of(one: ManyAnswers) -> list[str]:
    return [f"{one.prompt} {answer}" for answer in one.answers]


def share_of(one: TruthSet | ChoiceSet) -> str:
    """The share of matching first letters, empty where there is no letter."""
    share = letter_share(one.questions) if isinstance(one, ChoiceSet) else float("nan")
    return "" if share != share else f"{share:.0%}"


# Tables -------------------------------------------------------------------------------------------


def by_set(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Set, arm and rows: the arms of one set one after the other, in the order they ran."""
    for name, asked in table.groupby("set", sort=False):
        for arm, part in asked.groupby("arm", sort=False):
            yield str(name), str(arm), part


def score_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per set and arm."""
    rows = []
    for name, arm, part in by_set(table):
        many = part["form"].iloc[0] == "answers"
        rows.append(
            {
                "set": name,
                "arm": arm,
                "n": len(part),
                "measure": "MC1, MC2" if many else "two choices",
                "correct": rounded(part["correct"].mean()),
                "probability of the truth": rounded(part["p_true"].mean()),
                "letter mass": rounded(part["letter_mass"].mean()),
            }
        )
    return rows


def shift_rows(table: pd.DataFrame, arms: Sequence[str], *, seed: int) -> list[dict[str, Any]]:
    """Each arm's probability of the truth against the base on the same questions, by set; paired
    permutation, corrected (Holm) over these arms and sets."""
    from ..effects.contrast import corrected, effect

    named, found = [], []
    for name, arm, part in by_set(table):
        if arm not in arms:
            continue
        base = table[(table["set"] == name) & (table["arm"] == BASE.name)].set_index("item")
        steered = part.set_index("item").loc[base.index]
        changed = base["correct"] != steered["correct"]
        worse = (base["correct"] > steered["correct"]).sum() / max(int(changed.sum()), 1)
        named.append((name, arm, int(changed.sum()), float(worse)))
        found.append(
            effect(
                base["p_true"].to_numpy(),
                steered["p_true"].to_numpy(),
                method=str(arm),
                outcome="p_true",
                seed=seed,
            )
        )
    if not found:
        return []
    return [
        {
            "set": name,
            "arm": arm,
            **effect_cells(one),
            "answers changed": changed,
            "of them for the worse": f"{worse:.0%}" if changed else "",
        }
        for (name, arm, changed, worse), one in zip(
            named, corrected(found, correction="holm"), strict=True
        )
    ]
