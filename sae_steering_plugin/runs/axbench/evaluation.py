"""The protocol `axbench`: concepts, a model and methods; tables and AxBench's own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..judges.calibrated import CalibratedRatings
from ..judges.three import LLMRatings, ThreeRatings
from ..parts import collect
from ..protocols import Evaluation, Rows
from ..runner import InProcess
from .files import ConceptSet, read_instructions
from .plan import INSTRUCTIONS, UNSTEERED, AxBenchPlan, axbench_plan
from .ratings import ASPECTS
from .results import AxBenchResults, offline_ratings
from .world import WorldRatings, is_world, world_concepts

if TYPE_CHECKING:
    from ..parts import Collected
    from ..runner import Runner

JUDGES = (
    "offline (a stand-in, not calibrated), offline:FILE (calibrated, see runs.judges.calibrated), "
    "world (a rule, for the world's concepts), api:MODEL@URL, model:FOLDER"
)
DEFAULT_METHODS = (UNSTEERED, "diff_mean")
COMPARED = (
    ("supervised", "lora"),
    ("supervised_output", "lora"),
    ("sae_auroc", "lora"),
    ("supervised", "sae_auroc"),
    ("supervised", "diff_mean"),
    ("supervised_chosen", "lora"),
    ("supervised_chosen", "sae_named"),
)


RATED = ("score", "95% interval", *ASPECTS, "winrate vs sae", "covered")


def open_ratings(
    word: str,
    concepts: ConceptSet,
    *,
    prompts: str | Path | None = None,
    cache: str | Path | None = None,
    **options: Any,
) -> ThreeRatings:
    """The judge a word names; see `JUDGES`. Raises ValueError for another word, and for the world's
    rule on concepts that are not the world's."""
    if word == "offline":
        return offline_ratings(concepts)
    if word.startswith("offline:"):
        return CalibratedRatings.of(offline_ratings(concepts), word.partition(":")[2])
    if word == "world":
        if not is_world(concepts):
            raise ValueError(f"{concepts.source} holds concepts that are not the world's")
        return WorldRatings()
    if word.partition(":")[0] in ("api", "model"):
        return LLMRatings.open(word, prompts=prompts, cache=cache, **options)
    raise ValueError(f"no judge {word!r}; known are {JUDGES}")


def result_tables(
    plan: AxBenchPlan, found: AxBenchResults, judge: ThreeRatings
) -> Mapping[str, Rows]:
    """The tables of a completed plan, each titled with what its scores are."""
    tables: dict[str, Rows] = {}
    if plan.detection:
        tables["concept detection, mean AUROC over concepts (bow reads the text alone)"] = (
            found.detection_table()
        )
    if plan.steering:
        rated = found.rated(judge)
        scores = found.scores(rated)
        line = results_line(judge)
        table = found.steering_table(rated, scores)
        beside = [{k: row[k] for k in row if k not in RATED} for row in table]
        tables[f"steering ({line})"] = [{k: row[k] for k in ("method", *RATED)} for row in table]
        tables["beside the scores, on the same rows"] = beside
        tests = found.compared(scores, COMPARED, judge=judge.name)
        tables[f"paired tests over concepts, Holm ({line})"] = [
            {
                "comparison": one.method,
                "concepts": one.n,
                "difference": f"{one.arm_mean - one.base_mean:+.3f}",
                "d": f"{one.d:.2f} ({one.ci_low:.2f} to {one.ci_high:.2f})",
                "p": f"{one.p_value:.3g}",
                "p, Holm": f"{one.p_adjusted:.3g}",
            }
            for one in tests
        ]
    tables["counted"] = found.notes()
    return {title: rows for title, rows in tables.items() if rows}


def results_line(judge: ThreeRatings) -> str:
    from ..judges.three import RatedBy

    return f"{judge.name}: {RatedBy.of(judge).line}"


def results_of(plan: AxBenchPlan, collected: Collected) -> AxBenchResults:
    """A completed plan's rows with the concepts they are about."""
    concepts = plan.concepts.open().only(plan.concept_ids)
    return AxBenchResults(collected.to_pandas(), concepts, plan.instructions, plan.name)


def axbench(
    *,
    out: Path,
    data: Annotated[
        str | None, "Folder of AxBench's files; the organism's own world if none."
    ] = None,
    model: Annotated[str, "Organism name, local folder, or a name on the hub."] = "agent-gpt2",
    sae: Annotated[
        str | None, "An organism's SAE (its primary one if none), a folder, or release:id."
    ] = None,
    methods: Annotated[list[str], "--methods", "A method by name; again for more."] = [],  # noqa: B006
    concepts: Annotated[
        list[int], "--concept", "Number of a concept; again for more. All if none."
    ] = [],  # noqa: B006
    factors: Annotated[
        list[float], "--factor", "In maximum activations; again for more. AxBench's 14 if none."
    ] = [],  # noqa: B006
    instructions: Annotated[
        str | None, "AlpacaEval's JSON (order counts), .jsonl or .txt; the folder's own if none."
    ] = None,
    items: Annotated[int, "Instructions per concept; half choose the factor."] = INSTRUCTIONS,
    judge: Annotated[str, JUDGES] = "offline",
    prompts: Annotated[
        str | None, "Folder with AxBench's own three prompts as rubrics, for api: and model:."
    ] = None,
    cache: Annotated[str | None, "Folder of an API judge's replies."] = None,
    others: Annotated[int, "Other concepts whose negatives join the imbalanced F1."] = 0,
    max_new_tokens: Annotated[int, "Tokens per generation."] = 128,
    max_tokens: Annotated[int, "Tokens per text that is read; longer responses are cut."] = 512,
    temperature: Annotated[float, "0 is greedy."] = 1.0,
    batch_size: Annotated[int, "Rows (instructions x factors) per forward pass."] = 70,
    device: Annotated[str, "Where to run: cpu, cuda, mps."] = "cpu",
    dtype: Annotated[str, "float32, bfloat16 or float16."] = "float32",
    seed: Annotated[int, "Seed of everything that is drawn."] = 0,
) -> Evaluation:
    """AxBench: concept detection and steering, every method on the same concepts.

    Factors are chosen on the first half of the instructions and reported on the other. Prints mean
    AUROC beside a bag of words, and scores with intervals over concepts; writes AxBench's own
    files, one folder per method, under OUT/results. Without a language model under AxBench's
    prompts the scores are no AxBench scores, and the tables say so.
    """
    from ..choice_evaluation import primary_sae

    folder = data
    if folder is None:
        folder = str(world_concepts().write(out / "concepts"))
        judge = "world" if judge == "offline" else judge
    plan = axbench_plan(
        model,
        folder,
        list(methods) or list(DEFAULT_METHODS),
        sae=sae or primary_sae(model),
        concept_ids=concepts,
        factors=factors,
        instructions=() if instructions is None else read_instructions(instructions),
        n_instructions=items,
        others=others,
        max_new_tokens=max_new_tokens,
        max_tokens=max_tokens,
        temperature=temperature,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    rated_by = open_ratings(judge, plan.concepts.open(), prompts=prompts, cache=cache)

    def tables(collected: Collected) -> Mapping[str, Rows]:
        return result_tables(plan, results_of(plan, collected), rated_by)

    def save(collected: Collected, place: Path) -> Sequence[Path]:
        found = results_of(plan, collected)
        rated = found.rated(rated_by) if plan.steering else None
        return [place / "results"] if found.write(place / "results", rated) else []

    return Evaluation(plan, tables, save)


def run_axbench(
    model: str,
    data: str | Path,
    methods: Sequence[str],
    *,
    out: str | Path,
    sae: str | None = None,
    runner: Runner | None = None,
    progress: bool = True,
    **options: Any,
) -> AxBenchResults:
    """Run AxBench's protocol, or go on with it where `out` has parts of it; the results.

        found = run_axbench("agent-gpt2", "world-concepts", ["none", "diff_mean"],
                            sae="l2-topk-512", out="axbench")
        rated = found.rated(offline_ratings(found.concepts))
        found.steering_table(rated); found.detection_table()

    `options` are those of `axbench_plan`. Raises ValueError when a unit failed, with its words: the
    same call runs on with `retry_failed`.
    """
    plan = axbench_plan(model, str(data), methods, sae=sae, **options)
    report = (runner or InProcess()).run(plan, out, progress=progress)
    if not report.complete:
        raise ValueError(str(report))
    return results_of(plan, collect(plan, out))
