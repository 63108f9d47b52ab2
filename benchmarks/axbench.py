"""AxBench's protocol on the organisms' worlds, and its concept10 on a small real model.

`python -m benchmarks.axbench [--quick] [--models NAME ...] [--json FILE] [--table FILE]`

Per organism: concepts of its world (labels of its statements, and one word per topic), every method
of the package on the same texts, rated by the world's own rule; detection beside a bag of words;
does supervised selection close the gap to LoRA, by paired tests over concepts. On `stories260k` of
the shared data (where it is): AxBench's concept10 end to end, rated by the uncalibrated stand-in.
No score here is an AxBench score. Nothing is timed. A run with `--out` goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from benchmarks.pages import table_lines  # noqa: E402
from benchmarks.timing import versions  # noqa: E402
from sae_steering_plugin.organisms import list_organisms  # noqa: E402
from sae_steering_plugin.runs.axbench.evaluation import (  # noqa: E402
    open_ratings,
    result_tables,
    results_of,
)
from sae_steering_plugin.runs.axbench.plan import (  # noqa: E402
    UNSTEERED,
    AxBenchPlan,
    MethodLine,
    axbench_plan,
)
from sae_steering_plugin.runs.axbench.results import AxBenchResults  # noqa: E402
from sae_steering_plugin.runs.axbench.world import known_concepts, world_concepts  # noqa: E402
from sae_steering_plugin.runs.axbench.writer import (  # noqa: E402
    axbench_name,
    missing_columns,
    read_evaluation,
)
from sae_steering_plugin.runs.canonical import finite  # noqa: E402
from sae_steering_plugin.runs.choice_evaluation import primary_sae  # noqa: E402
from sae_steering_plugin.runs.parts import collect  # noqa: E402
from sae_steering_plugin.runs.runner import InProcess  # noqa: E402
from sae_steering_plugin.runs.steering_methods import METHODS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SAE_STEERING_DATA", ROOT.parent / "shared" / "data"))
ALL_TEXTS = "all"
PROXY = "offline proxy score, not an AxBench score"
FACTORS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0)
CLAMPED = (0.4, 0.8, 1.2, 1.6, 2.0, 3.0, 4.0)
"""Half of AxBench's factors, up to where these small models write noise."""
REAL_MODEL, REAL_SAE = "stories260k", "saes-stories260k/l2-resid-post-topk"
LEFT_OUT = ("sae", "sae_clamp", "sae_min_clamp")
"""Methods by the concept's label: no feature of these dictionaries carries one."""


def lines(words: Sequence[str], quick: bool, epochs: int | None = None) -> list[MethodLine]:
    """The methods with their factors; `epochs` shortens the long schedules."""
    found = []
    for word in words:
        factors = CLAMPED if "clamp" in word else FACTORS
        settings: Mapping[str, Any] = {}
        if epochs is not None and word in ("probe", "lora", "loreft"):
            settings = {"schedule": {"epochs": epochs}}
        found.append(MethodLine(word, factors[1::3] if quick else factors, settings))
    return found


def world_numbers(quick: bool, words: bool) -> list[int]:
    """The world's labels; with `words` also one noun per topic and two feelings."""
    labels = [n for n, one in enumerate(known_concepts()) if one.kind not in ("noun", "feeling")]
    more = [n for n in range(len(labels), len(known_concepts())) if n % 5 == 1] if words else []
    return [0, 3, 6] if quick else labels + more


def every_method() -> list[str]:
    return [UNSTEERED, *(one for one in METHODS if one not in LEFT_OUT)]


def world_plan(name: str, folder: str, quick: bool, words: bool = False) -> AxBenchPlan:
    methods = every_method()
    if quick:
        methods = [UNSTEERED, "diff_mean", "sae_auroc", "supervised", "prompt"]
    return axbench_plan(
        name,
        folder,
        lines(methods, quick),
        sae=primary_sae(name),
        concept_ids=world_numbers(quick, words),
        n_instructions=10,
        max_new_tokens=24,
        others=2,
        factor_block=14,
        name=f"world_{name}",
    )


def budget_plan(name: str, folder: str, texts: str, quick: bool) -> AxBenchPlan:
    """Methods that learn from labels, on concepts that come with so many labelled texts."""
    learned = ["diff_mean", "reft_r1", "lora", "sae_auroc", "supervised", "supervised_chosen"]
    return axbench_plan(
        name,
        folder,
        lines([UNSTEERED, *(learned[::4] if quick else learned)], quick),
        sae=primary_sae(name),
        concept_ids=world_numbers(quick, False),
        n_instructions=10,
        max_new_tokens=24,
        others=2 if texts == ALL_TEXTS else 0,  # so that its units are those of the whole table
        factor_block=14,
        name=f"world_{name}_{texts}_texts",
    )


def real_plan(quick: bool, concepts: int) -> AxBenchPlan | None:
    """The first concepts of concept10 on the small real model; None where the data is not."""
    folder = DATA / "axbench" / "concept10" / "prod_2b_l10_v1"
    if not (folder.is_dir() and (DATA / REAL_SAE).is_dir()):
        return None
    return axbench_plan(
        str(DATA / REAL_MODEL),
        str(folder),
        lines([UNSTEERED, "diff_mean"] if quick else every_method(), quick, epochs=3),
        sae=str(DATA / REAL_SAE),
        concept_ids=(0, 3) if quick else tuple(range(concepts)),
        n_instructions=4 if quick else 10,
        max_new_tokens=16 if quick else 32,
        max_tokens=400,
        others=0 if quick else 2,
        name="concept10_2b_l10",
    )


def run(plan: AxBenchPlan, judge: str, out: Path) -> dict[str, list[dict[str, Any]]]:
    """The tables of a plan, run or gone on with in `out`. Raises RuntimeError for failed units."""
    report = InProcess().run(plan, out)
    if not report.complete:
        raise RuntimeError(str(report))
    found = results_of(plan, collect(plan, out))
    ratings = open_ratings(judge, found.concepts)
    tables = {
        title: [dict(row) for row in rows]
        for title, rows in result_tables(plan, found, ratings).items()
    }
    found.write(out / "results", found.rated(ratings))
    return {**tables, "AxBench's files, written and read back": checked(found, out / "results")}


def checked(found: AxBenchResults, folder: Path) -> list[dict[str, Any]]:
    """What AxBench's files hold, read back. Raises RuntimeError for a documented column or a
    concept that a file lacks."""
    import pandas as pd

    rows = []
    for kind, own in (("latent", found.latent), ("steering", found.steered)):
        methods, count, lines = list(dict.fromkeys(own["method"])), 0, 0
        for method in methods:
            place = folder / f"{found.name}_{method}"
            frame = pd.read_parquet(place / "inference" / f"{kind}_data.parquet")
            count += len(frame)
            if missing := missing_columns(frame, method, kind):
                raise RuntimeError(f"{place} lacks the {kind} columns {missing}")
            for mode in ("latent",) if kind == "latent" else ("steering", "steering_test"):
                results = read_evaluation(place / "evaluate" / f"{mode}.jsonl")
                lines += len(results)
                concepts = set(own[own["method"] == method]["concept_id"])
                named = {m for one in results.values() for values in one.values() for m in values}
                if set(results) != concepts or named != {axbench_name(method)}:
                    raise RuntimeError(f"{place}: {mode}.jsonl does not hold every concept")
        rows.append({"kind": kind, "methods": len(methods), "rows": count, "lines": lines})
    return rows


def reading(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """What the tables of one model answer: does supervised selection close the gap to LoRA?"""
    found = []
    for title, rows in tables.items():
        if title.startswith("steering (") and {row["score"] for row in rows} == {"0"}:
            found.append(
                "Every method scores 0: this model is too small to take up AxBench's instructions, "
                "so that the run shows the protocol at work and ranks nothing."
            )
        if not title.startswith("paired tests") or found:
            continue
        for row in rows:
            method, _, reference = row["comparison"].partition(" against ")
            if reference != "lora":
                continue
            if float(row["p, Holm"]) >= 0.05:
                said = "no gap is shown"
            else:
                said = "the gap stays open" if row["difference"].startswith("-") else "it is above"
            found.append(
                f"- `{method}` against LoRA: {row['difference']} over {row['concepts']} concepts, "
                f"Holm p {row['p, Holm']}: {said}."
            )
    return [*found, ""] if found else []


def page(
    results: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], options: Sequence[str] = ()
) -> str:
    text = [
        f"# AxBench's protocol on small models: {PROXY}",
        "",
        f"Written by `{' '.join(['python -m benchmarks.axbench', *options])} --table "
        "docs/axbench.md`.",
        "",
        "Every score here is read by a rule or by word statistics, never by a language model: the "
        "order of methods on these planted tasks may be read off, the level may not, and nothing "
        "compares with published AxBench numbers. Factors are some of AxBench's, chosen per "
        "concept on instructions 0-4 and reported on 5-9; methods without a factor are averaged "
        "over all rows of the second half. Intervals are bootstraps over concepts. `bow` reads the "
        "text alone. Perplexity is under the unsteered model (for `prompt` of the generation "
        "alone); displacement is the mean length of what steering changes at the site, against the "
        "mean residual there.",
        "",
    ]
    for name, tables in results.items():
        text += [f"## {name}", "", *reading(tables)]
        for title, rows in tables.items():
            text += [f"{title}; {PROXY}:" if PROXY not in title else f"{title}:", ""]
            heads = list(rows[0])
            text += [*table_lines(heads, ([row[one] for one in heads] for row in rows)), ""]
    text += [f"Versions: {versions()}", ""]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few concepts and methods: a minute")
    parser.add_argument("--models", nargs="*", default=None, help="organisms; all if not given")
    parser.add_argument("--words", action="store_true", help="also concepts of one word each")
    parser.add_argument(
        "--budgets", nargs="*", type=int, default=[], help="also with so few labelled texts (16 72)"
    )
    parser.add_argument("--no-real", action="store_true", help="leave the small real model out")
    parser.add_argument("--real-concepts", type=int, default=10, help="of concept10's ten")
    parser.add_argument("--json", type=Path, help="write every table to this file")
    parser.add_argument("--table", type=Path, help="write a Markdown page to this file")
    parser.add_argument("--out", type=Path, help="folder of the runs, to go on with")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    names = list_organisms() if arguments.models is None else arguments.models
    if arguments.quick and arguments.models is None:
        names = names[:1]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        concepts = str(world_concepts().write(out / "world-concepts"))
        for name in names:
            plan = world_plan(name, concepts, arguments.quick, arguments.words)
            title = f"{name}: {len(plan.concept_ids)} concepts of its world"
            results[title] = run(plan, "world", out / name)
            for texts in arguments.budgets:
                few = world_concepts(train=texts // 2).write(out / f"world-concepts-{texts}")
                plan = budget_plan(name, str(few), str(texts), arguments.quick)
                title = f"{name}: {len(plan.concept_ids)} concepts, {texts} labelled texts each"
                results[title] = run(plan, "world", out / f"{name}-{texts}")
            if arguments.budgets:
                plan = budget_plan(name, concepts, ALL_TEXTS, arguments.quick)
                title = f"{name}: the same {len(plan.concept_ids)} concepts, all labelled texts"
                results[title] = run(plan, "world", out / name)
        real = None if arguments.no_real else real_plan(arguments.quick, arguments.real_concepts)
        if real is not None:
            title = f"concept10 (2B L10) on {REAL_MODEL}: {len(real.concept_ids)} concepts"
            results[title] = run(real, "offline", out / REAL_MODEL)
    options = ["--quick"] * arguments.quick + ["--words"] * arguments.words
    if arguments.budgets:
        options += ["--budgets", *map(str, arguments.budgets)]
    text = page(results, options)
    sys.stdout.write(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"versions": versions(), "note": PROXY, "tables": results}
        arguments.json.write_text(json.dumps(finite(content), indent=1) + "\n", encoding="utf-8")
    if arguments.table:
        arguments.table.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
