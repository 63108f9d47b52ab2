"""The protocols `open-ended` (texts under steering, then judged) and `judge` (finished texts)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .choice_evaluation import Fit, file_behaviours, primary_sae, question_files, world_behaviours
from .choice_items import ChoiceItem
from .judge_plan import JudgePlan, JudgeRef
from .judges.local import KINDS
from .open_ended import open_item, read_open_ended, world_requests
from .open_plan import Asked, OpenPlan
from .protocols import Evaluation
from .references import ModelRef
from .sas_protocol import Behaviour, SAERef, SASPlan, TextPair, baseline_lines, sweep_lines
from .sas_tables import arm_name, effect_cells, rounded

if TYPE_CHECKING:
    import pandas as pd

    from .parts import Collected

ABOUT = ("behaviour", "second", "sae", "method", "tau", "parts", "top_n", "seed")
"""The columns that name a line."""


def open_ended(
    *,
    data: Annotated[
        str | None,
        "Folder of CAA's files (test_open_ended beside them); an organism's own if none.",
    ] = None,
    model: Annotated[str, "Organism name, local folder, or a name on the hub."] = "agent-gpt2",
    sae: Annotated[str | None, "An organism's SAE, a folder, or release:id."] = None,
    behaviours: Annotated[
        list[str],
        "--behaviour",
        "Files by name; of an organism a trait or one of " + ", ".join(KINDS) + ". Again for more.",
    ] = [],  # noqa: B006
    judges: Annotated[
        list[str],
        "--judge",
        "rule:/REGEX/, lexicon:WORD, classifier:FILE, model:NAME, api:MODEL@URL; again for more.",
    ] = [],  # noqa: B006
    rubric: Annotated[str, "What model and api judges are asked: a name or a file."] = "behaviour",
    cache: Annotated[str | None, "Folder of an api judge's replies; the run's own if none."] = None,
    tau: Annotated[float, "Firing-frequency threshold of SAS."] = 0.7,
    strengths: Annotated[list[float], "--strength", "Lambda; 0 is always run; again for more."] = [  # noqa: B006
        -1.0,
        1.0,
    ],
    build_items: Annotated[int, "Questions or pairs of texts to build from, at most."] = 200,
    items: Annotated[int, "Open-ended questions per behaviour, at most."] = 50,
    baselines: Annotated[bool, "CAA, and dense directions at SAS's displacement."] = True,
    controls: Annotated[int, "Random directions at SAS's displacement."] = 3,
    positions: Annotated[str, "all, prefill, decode, last or after_prompt."] = "all",
    max_new_tokens: Annotated[int, "Tokens per text."] = 48,
    temperature: Annotated[float, "0 is greedy."] = 0.0,
    block: Annotated[int, "Questions per unit: what a killed run loses at most."] = 50,
    batch_size: Annotated[int, "Rows (questions x strengths) per forward pass."] = 64,
    device: Annotated[str, "Where to run: cpu, cuda, mps."] = "cpu",
    dtype: Annotated[str, "float32, bfloat16 or float16."] = "float32",
    seed: Annotated[int, "Seed of splits and draws."] = 0,
) -> Evaluation:
    """Open-ended texts under sparse activation steering, with fluency and repetition, then judged.

    The texts come first, in units through the chosen runner. With --judge they are then judged as a
    plan of their own in the folder's `judged`, in one process: no GPU waits for a judge. The same
    can be done later, or again, with `evaluate judge`. Every row names its judge.
    """
    reference = ModelRef.of(model, device=device, dtype=dtype)
    dictionary = SAERef.of(model, sae or primary_sae(model))
    opened = tuple(JudgeRef.of(w, rubric=rubric, device=device, dtype=dtype) for w in judges)
    fit = Fit.of(model)
    if data is None:
        found, asked = world_open(
            model, behaviours or ["pirate"], build_items=build_items, items=items, seed=seed
        )
    else:
        found = file_behaviours(
            data, behaviours, fit, build_items=build_items, items=items, seed=seed
        )
        asked = [Asked(one.name, file_questions(Path(data), one, items)) for one in found]
    steering = SASPlan(
        reference,
        (dictionary,),
        tuple(found),
        (),
        strengths=tuple(sorted({0.0, *map(float, strengths)})),
        positions=positions,
    )
    names = [one.name for one in found]
    lines = sweep_lines(names, [dictionary.name], taus=[tau])
    if baselines:
        for name in names:
            lines += baseline_lines(name, dictionary.name, tau=float(tau), controls=controls)
    plan = OpenPlan(
        steering,
        tuple(lines),
        tuple(asked),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        block=block,
        batch_size=batch_size,
    )

    def tables(collected: Collected) -> dict[str, Sequence[Mapping[str, Any]]]:
        every = {
            "texts per arm and strength": text_rows(collected.to_pandas()),
            "left out": [{"what": note} for note in fit.notes],
        }
        return {title: rows for title, rows in every.items() if rows}

    def judged(folder: Path) -> Evaluation:
        return judging(
            JudgePlan.of(
                folder / "table.parquet",
                opened,
                concept="behaviour",
                cache=cache or folder / "replies",
            ),
            seed=seed,
        )

    return Evaluation(plan, tables, then=("judged", judged) if opened else None)


def judge(
    *,
    texts: Annotated[str, "Parquet file, or the folder of a run that left table.parquet."],
    judges: Annotated[
        list[str],
        "--judge",
        "rule:/REGEX/, lexicon:WORD, classifier:FILE, model:NAME, api:MODEL@URL; again for more.",
    ],
    rubric: Annotated[str, "What model and api judges are asked: a name or a file."] = "concept",
    text: Annotated[str, "Column of the texts."] = "text",
    instruction: Annotated[
        str | None, "Column of what they answer; question or instruction if there."
    ] = None,
    concept_column: Annotated[str, "Column of the concept judged for."] = "",
    concept: Annotated[str, "One concept for all rows."] = "",
    cache: Annotated[str | None, "Folder of an api judge's replies; the run's own if none."] = None,
    block: Annotated[int, "Rows per unit: what a killed run loses at most."] = 64,
    device: Annotated[str, "Where a model judge runs: cpu, cuda, mps."] = "cpu",
    dtype: Annotated[str, "float32, bfloat16 or float16."] = "float32",
    seed: Annotated[int, "Seed of intervals and tests."] = 0,
    out: Path,
) -> Evaluation:
    """Judge the texts of a finished run, or of any parquet table, as a plan of its own.

    Units are slices of rows, keyed by their content and the judge's name and version: a killed run
    goes on, a table that has grown is judged where it is new. A text that a judge cannot score is a
    null with its reason. Prints the scores per arm, and each arm against strength 0 where there is.
    """
    place = Path(texts)
    plan = JudgePlan.of(
        place / "table.parquet" if place.is_dir() else place,
        judges,
        text=text,
        instruction=instruction,
        concept=concept_column,
        one_concept=concept,
        rubric=rubric,
        cache=cache or out / "replies",
        block=block,
        device=device,
        dtype=dtype,
    )
    return judging(plan, seed=seed)


def judging(plan: JudgePlan, *, seed: int = 0) -> Evaluation:
    """The plan with what to show of its table."""

    def tables(collected: Collected) -> dict[str, Sequence[Mapping[str, Any]]]:
        table = collected.to_pandas()
        every = {
            "scores": verdict_rows(table),
            "score against strength 0 (Holm)": score_effect_rows(table, seed=seed),
            "texts without a score": reason_rows(table),
        }
        return {title: rows for title, rows in every.items() if rows}

    return Evaluation(plan, tables)


# What is asked ------------------------------------------------------------------------------------


def world_open(
    model: str, names: Sequence[str], *, build_items: int, items: int, seed: int
) -> tuple[list[Behaviour], list[Asked]]:
    """Behaviours of an organism, and requests for a sentence about a topic to ask under each.

    A trait is built from its questions; a kind of text (`KINDS`) from statements of that kind
    against others, training wordings on both sides. Raises ValueError for another word.
    """
    from ..organisms import data_folder, list_organisms, read_card
    from ..organisms.wording import TRAITS
    from ..organisms.world import World

    if model not in list_organisms():
        raise ValueError(f"{model} is no organism with texts of its own: pass --data FOLDER")
    if unknown := [name for name in names if name not in (*TRAITS, *KINDS)]:
        raise ValueError(
            f"no behaviour {unknown[0]!r}; an organism has {', '.join((*TRAITS, *KINDS))}"
        )
    world = World(seed=int(read_card(data_folder(model)).get("world_seed", 0)))
    questions = world_requests(world, items, seed=seed)
    found = []
    for name in names:
        if name in KINDS:
            pairs = text_pairs(world, name, build_items, seed=seed)
            found.append(Behaviour(name, (), questions, pairs=pairs))
        else:
            found += world_behaviours(
                model, [name], build="questions", build_items=build_items, items=items, seed=seed
            )
    return found, [Asked(name, questions) for name in names]


def text_pairs(world: Any, kind: str, n: int, *, seed: int) -> tuple[TextPair, ...]:
    """At most `n` training statements of a kind, each beside one that is not."""
    drawn = world.statements(8 * n, split="train", seed=seed)
    of_kind = [one for one in drawn if one[KINDS[kind]] == kind]
    others = [one for one in drawn if one[KINDS[kind]] != kind]
    return tuple(
        TextPair(one["text"], other["text"], one["group"])
        for one, other in list(zip(of_kind, others, strict=False))[:n]
    )


def file_questions(data: Path, behaviour: Behaviour, items: int) -> tuple[ChoiceItem, ...]:
    """The behaviour's `test_open_ended` file, or its held-out questions without their options."""
    source = question_files(data)[behaviour.name][0]
    folder = source.parent.parent if source.parent.name == "generate" else source.parent
    place = folder / "test_open_ended" / f"{behaviour.name}.json"
    if place.is_file():
        return read_open_ended(place)[:items]
    return tuple(open_item(one.stem or one.question, system=one.system) for one in behaviour.test)


# Tables -------------------------------------------------------------------------------------------


def text_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per line and strength: fluency, repetition and length of the texts."""
    return [
        {
            "arm": arm_name(dict(zip((*ABOUT, "strength"), key, strict=True))),
            "strength": f"{key[-1]:+g}" if key[-1] else "0",
            "n": len(part),
            "length": rounded(part["displacement"].iloc[0], 2),
            "nll": rounded(part["nll"].mean()),
            "repetition": rounded(part["repetition"].mean()),
            "tokens": rounded(part["new_tokens"].mean(), 1),
            "ended": rounded(part["ended"].mean(), 2),
        }
        for key, part in table.groupby([*ABOUT, "strength"], sort=False)
    ]


def arm_columns(table: pd.DataFrame) -> list[str]:
    """The columns that name a row's arm: a line's, or `arm`; none for a table of bare texts."""
    if set(ABOUT) <= set(table.columns):
        return list(ABOUT)
    return ["arm"] if "arm" in table.columns else []


def named_arm(columns: Sequence[str], key: Sequence[Any]) -> str:
    """The arm in words; every text for a table that names none."""
    if not columns:
        return "all"
    if len(columns) == 1:
        return str(key[0])
    return arm_name(dict(zip(columns, key, strict=False)))


def verdict_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per judge, arm and strength: mean score over the scored texts, and how many are not.

    `stand-in` marks judges whose scores stand in for a language model's.
    """
    own = arm_columns(table)
    more = ["strength"] if "strength" in table.columns else []
    rows = []
    for key, part in table.groupby(["judge", *own, *more], sort=False):
        row = {"judge": key[0], "arm": named_arm(own, key[1 : 1 + len(own)])}
        if more:
            row["strength"] = f"{key[-1]:+g}" if key[-1] else "0"
        rows.append(
            {
                **row,
                "n": len(part),
                "unscored": int((~part["valid"]).sum()),
                "score": rounded(part["score"].mean()),
                "scale": f"{part['scale_low'].iloc[0]:g} to {part['scale_high'].iloc[0]:g}",
                "stand-in": bool(part["stand_in"].iloc[0]),
            }
        )
    return rows


def score_effect_rows(table: pd.DataFrame, *, seed: int = 0) -> list[dict[str, Any]]:
    """Each arm's score at each strength against strength 0 on the same items, by judge (Holm).

    An item without a score in either is left out and counted. Empty for a table without items and
    strengths. Random directions are shown and not corrected with the others.
    """
    from ..effects.contrast import corrected, effect

    if not {"item", "strength"} <= set(table.columns):
        return []
    own = arm_columns(table)
    rows = []
    for judge_name, judged in table.groupby("judge", sort=False):
        named, found = [], []
        groups = judged.groupby(own, sort=False) if own else [((), judged)]
        for key, part in groups:
            base = part[part["strength"] == 0].set_index("item")["score"]
            for strength, arm in part[part["strength"] != 0].groupby("strength"):
                steered = arm.set_index("item")["score"].reindex(base.index)
                both = base.notna() & steered.notna()
                if both.sum() < 2:
                    continue
                named.append((named_arm(own, key), int((~both).sum())))
                found.append(
                    effect(
                        base[both].to_numpy(),
                        steered[both].to_numpy(),
                        method=str(arm["method"].iloc[0]) if "method" in arm else "",
                        outcome="score",
                        strength=float(strength),
                        seed=seed,
                        judge=str(judge_name),
                    )
                )
        tested = [i for i, one in enumerate(found) if one.method != "random matched"]
        family = corrected([found[i] for i in tested], correction="holm") if tested else []
        for i, one in zip(tested, family, strict=True):
            found[i] = one
        rows += [
            {
                "judge": one.judge,
                "arm": arm,
                "strength": f"{one.strength:+g}",
                "left out": missing,
                **effect_cells(one),
            }
            for (arm, missing), one in zip(named, found, strict=True)
        ]
    return rows


def reason_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """How many texts each judge gave no score, by reason."""
    lost = table[~table["valid"]]
    return [
        {"judge": name, "reason": reason, "texts": len(part)}
        for (name, reason), part in lost.groupby(["judge", "reason"], sort=False)
    ]
