"""The SAS protocol on every organism, beside what its paper reports.

`python -m benchmarks.sas_protocol [--quick] [--models NAME ...] [--json FILE] [--table FILE]`

Per organism: multiple choice on held-out questions about five traits, in four forms, over SAEs
(layers, widths, kinds), thresholds and strengths, with vectors built in two ways; ablations, CAA
and ten random directions at the same displacement; two vectors in one sparse edit; the width trend;
open-ended requests judged by a lexicon, with fluency and repetition; the world's sums and facts.
Nothing is timed. FILE of `--json` receives every table, FILE of `--table` a Markdown page.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from benchmarks.timing import versions  # noqa: E402
from sae_steering_plugin.directions.sparse import sas_vector  # noqa: E402
from sae_steering_plugin.directions.width import width_trend  # noqa: E402
from sae_steering_plugin.edits.codes import SparseAdd  # noqa: E402
from sae_steering_plugin.organisms import list_organisms, load_organism  # noqa: E402
from sae_steering_plugin.runs.canonical import finite  # noqa: E402
from sae_steering_plugin.runs.choice_evaluation import choices  # noqa: E402
from sae_steering_plugin.runs.choice_items import world_prompted  # noqa: E402
from sae_steering_plugin.runs.choices import evaluate_choices  # noqa: E402
from sae_steering_plugin.runs.collect import collect_labelled  # noqa: E402
from sae_steering_plugin.runs.contrast_files import chat_render  # noqa: E402
from sae_steering_plugin.runs.judges import open_judge  # noqa: E402
from sae_steering_plugin.runs.open_ended import evaluate_open_ended, world_requests  # noqa: E402
from sae_steering_plugin.runs.parts import collect  # noqa: E402
from sae_steering_plugin.runs.runner import InProcess  # noqa: E402
from sae_steering_plugin.runs.sas_protocol import SAERef, SASWorker  # noqa: E402
from sae_steering_plugin.runs.sas_tables import (  # noqa: E402
    OUTCOME,
    control_rows,
    own_response,
    shift_effects,
    summary_table,
    unsteered_rows,
)

STRENGTHS = (-2.0, -1.0, 1.0, 2.0)
BUILDS = ("questions", "decisions")
TAUS = (0.7, 0.5)

REPORTED: tuple[tuple[str, str, str], ...] = (
    ("effect", "vectors shift behaviours both ways; on par with CAA", "abstracts"),
    ("options and prefix", "showing options and adding the prefix increase steerability", "third"),
    ("strength", "lambda 1 to 2 intensifies without collapse", "third"),
    ("error term", "without it steering is unstable, most at early layers", "third"),
    ("parts", "both parts together are best", "third"),
    ("width", "wider SAEs: more monosemantic, support a smaller share", "abstracts, third"),
    ("composition", "several behaviours at once, each metric answers to its own strength", "third"),
    ("side effects", "MMLU and TruthfulQA kept or improved at lambda 1 to 2", "third"),
)
"""Findings of arXiv 2503.00177 as this project's method page could establish them, with the kind of
source; no table of numbers could be obtained."""


def run(name: str, build: str, budget: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    """The plan of one organism and way of building, and its table."""
    primary = load_organism(name, saes=()).card["primary_sae"]
    width = primary.rpartition("-")[2]
    others = [one for one in sae_names(name) if one != primary and one.endswith(f"-{width}")]
    ordered = [primary, *(others if build == BUILDS[1] else [])]
    made = choices(
        model=name,
        saes=ordered[: budget["saes"]],
        behaviours=list(budget["traits"]),
        taus=list(TAUS),
        strengths=list(STRENGTHS),
        build=build,
        build_items=budget["build"],
        items=budget["items"],
        controls=budget["controls"],
        ablations=True,
        compose=True,
        capability=["world"],
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        report = InProcess().run(made.plan, folder)
        if not report.complete:
            raise RuntimeError(str(report))
        return made.plan, collect(made.plan, folder).to_pandas()


def sae_names(name: str) -> list[str]:
    from sae_steering_plugin.organisms import data_folder

    return sorted(path.parent.name for path in (data_folder(name) / "saes").glob("*/cfg.json"))


def widths(plan: Any) -> Any:
    """The width trend over the SAEs of the primary one's layer and kind, from the same examples."""
    worker = SASWorker(plan)
    primary = plan.saes[0].name
    kind = primary.rpartition("-")[0]
    found: dict[str, dict[str, Any]] = {}
    for name in sae_names(plan.model.source):
        if name.rpartition("-")[0] == kind:
            dictionary = SAERef.of(plan.model.source, name).open(plan.model)
            found[name] = {
                one.name: sas_vector(
                    worker.examples(one.name, primary), dictionary, tau=TAUS[0], label=one.name
                )
                for one in plan.behaviours
            }
    return width_trend(found)


def prompted(name: str, budget: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """The positive control: the same score under system prompts for and against each trait."""
    organism = load_organism(name, saes=())
    render = chat_render(organism.tokenizer)
    rows = []
    for trait in budget["traits"]:
        sides = world_prompted(organism.world, trait, budget["items"], split="test", seed=seed)
        scores = [
            evaluate_choices(organism.model, side, render=render).summary()[OUTCOME].iloc[0]
            for side in sides
        ]
        rows.append({"trait": trait, "prompted for": scores[0], "prompted against": scores[1]})
    return rows


def pirate(name: str, budget: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """Open-ended requests under the vector of a register, judged by the world's lexicon."""
    organism = load_organism(name)
    sae = organism.primary_sae
    drawn = organism.world.statements(2 * budget["build"], split="train", seed=seed)
    examples = collect_labelled(
        organism.model,
        [one["text"] for one in drawn],
        [int(one["register"] == "pirate") for one in drawn],
        sae,
        groups=[one["group"] for one in drawn],
        progress=False,
    )
    vector = sas_vector(examples, sae, tau=0.5, label="pirate")
    found = evaluate_open_ended(
        organism.model,
        world_requests(organism.world, budget["items"], seed=seed),
        lambda strength: SparseAdd(sae, vector, strength),
        judges=[open_judge("lexicon:pirate")],
        strengths=(-2.0, -1.0, 0.0, 1.0, 2.0, 4.0),
        concept="pirate",
        render=chat_render(organism.tokenizer),
        built_from=examples,
        max_new_tokens=24,
    )
    return found.summary().to_dict("records")


def reading(tables: Mapping[str, Any]) -> list[dict[str, str]]:
    """The paper's findings beside what was found here, as figures."""
    by_form = "; ".join(f"{form} {value:.3f}" for form, value in tables["span by form"].items())
    width = ", ".join(
        f"{row['width']}: {row['share']:.2%} of latents, Jaccard {row['jaccard']:.2f}"
        for row in tables["width"]
    )
    span = tables["span by arm"]
    own = ", ".join(
        f"{row['metric']} {row['own']:+.4f} / {row['other']:+.4f}" for row in tables["own"]
    )
    ours = {
        "effect": f"{tables['significant']} of {tables['tests']} shifts of SAS arms significant "
        f"(Holm); span between lambda -2 and +2: SAS {span['sas']:+.3f}, CAA at the same "
        f"displacement {span['caa matched']:+.3f}, largest random {tables['random']:.3f}",
        "options and prefix": f"mean absolute span by form: {by_form}",
        "strength": f"least letter mass under any strength {tables['mass']:.3f}",
        "error term": f"unsteered score {tables['plain']:.3f}, reconstructed without the error "
        f"term {tables['reconstructed']:.3f}",
        "parts": f"span: both {span['sas']:+.3f}, positive {span['positive']:+.3f}, negative "
        f"{span['negative']:+.3f}",
        "width": width,
        "composition": f"own / other slope of each metric: {own}",
        "side effects": "; ".join(
            f"{name} {low:.3f} to {high:.3f} over all strengths (unsteered {still:.3f})"
            for name, (low, high, still) in tables["capability"].items()
        ),
    }
    return [
        {"finding": what, "paper": said, "known from": mark, "here": ours[what]}
        for what, said, mark in REPORTED
    ]


def figures(plan: Any, table: Any) -> dict[str, Any]:
    """What `reading` and the page need of one table."""
    found = summary_table(table)
    own = found[(found["on"] == found["behaviour"]) & (found["second"] == "")]
    primary = plan.saes[0].name
    main = own[(own["sae"] == primary) & (own["tau"] == TAUS[0])]
    shown = main[main["form"] == "options"]

    def span(part: Any) -> float:
        ends = part.groupby("strength")[OUTCOME].mean()
        return float(ends[max(STRENGTHS)] - ends[min(STRENGTHS)])

    whole = (shown["parts"] == "both") & (shown["top_n"] < 0)
    arms = {
        "sas": shown[whole & (shown["method"] == "sas")],
        "caa": shown[shown["method"] == "caa"],
        "caa matched": shown[shown["method"] == "caa matched"],
        "sas decoded": shown[shown["method"] == "sas decoded"],
        "without error term": shown[shown["method"] == "sas without error term"],
        "positive": shown[shown["parts"] == "positive"],
        "negative": shown[shown["parts"] == "negative"],
        "top 1": shown[shown["top_n"] == 1],
        "top 4": shown[shown["top_n"] == 4],
    }
    plain = main[(main["method"] == "sas") & (main["parts"] == "both") & (main["top_n"] < 0)]
    forms = {
        str(form): float(part.groupby("behaviour").apply(span, include_groups=False).abs().mean())
        for form, part in plain.groupby("form", sort=False)
    }
    aside = found[(found["on"] != found["behaviour"]) & (found["second"] == "")]
    capability = {
        str(name): (
            float(part[OUTCOME].min()),
            float(part[OUTCOME].max()),
            float(part[part["strength"] == 0][OUTCOME].mean()),
        )
        for name, part in aside.groupby("on", sort=False)
    }
    alone = table[(table["on"] == table["behaviour"]) & (table["second"] == "")]
    with warnings.catch_warnings():
        # an empty vector moves nothing, and says so in its support
        warnings.filterwarnings("ignore", ".*d has no value.*", UserWarning)
        effects = shift_effects(alone)
    random = control_rows(alone)
    zero = shown[shown["strength"] == 0]
    sparse = [one for about, one in effects if about["method"] == "sas"]
    return {
        "span by arm": {name: span(part) for name, part in arms.items()},
        "span by form": forms,
        "capability": capability,
        "own": own_response(table),
        "unsteered": unsteered_rows(table),
        "random": max(row["largest |shift|"] for row in random),
        "mass": float(own["letter_mass"].min()),
        "plain": float(zero[whole & (zero["method"] == "sas")][OUTCOME].mean()),
        "reconstructed": float(zero[zero["method"] == "sas without error term"][OUTCOME].mean()),
        "tests": len(sparse),
        "significant": sum(one.p_adjusted < 0.05 for one in sparse),
        "sweep": sweep(own[(own["method"] == "sas") & (own["form"] == "options")]),
        "effects": [
            {**about, **{name: getattr(one, name) for name in KEPT}} for about, one in effects
        ],
    }


KEPT = ("strength", "n", "base_mean", "arm_mean", "d", "ci_low", "ci_high", "p_value", "p_adjusted")


def sweep(own: Any) -> list[dict[str, Any]]:
    """Mean support and span per SAE and threshold over the behaviours."""
    whole = own[(own["parts"] == "both") & (own["top_n"] < 0)]
    rows = []
    for (sae, tau), part in whole.groupby(["sae", "tau"], sort=False):
        ends = part.groupby("strength")[OUTCOME].mean()
        zero = part[part["strength"] == 0]
        rows.append(
            {
                "sae": sae,
                "tau": tau,
                "latents": round(float(zero["support"].mean()), 1),
                "empty": int((zero["support"] == 0).sum()),
                **{f"{s:+g}" if s else "0": round(float(x), 3) for s, x in ends.items()},
            }
        )
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "(none)"
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)


def page(results: Sequence[Mapping[str, Any]], command: str) -> str:
    """All results as one Markdown page."""
    parts = [
        "# Sparse activation steering, beside its paper",
        f"Written by `{command}`.",
        "What differs from arXiv 2503.00177 throughout: the models are organisms of one or two "
        "million parameters (the paper: Gemma-2 2B and 9B with Gemma Scope SAEs), the behaviours "
        "are their world's five traits (the paper: seven CAA behaviours), the open-ended judge is "
        "a lexicon (the paper: GPT-4o), and the paper's findings are given as this project's "
        "method page could establish them; its tables of numbers could not be obtained. Scores "
        "are the normalised probability of the matching answer on held-out questions; `span` is "
        "the mean score at lambda +2 minus that at -2; a vector without a latent (`empty`) moves "
        "nothing and is counted in every mean.",
    ]
    for one in results:
        parts.append(f"## {one['model']}, vectors built from {one['build']}")
        parts += ["Unsteered:", markdown(one["unsteered"])]
        if one["prompted"]:
            parts += [
                "Positive control, system prompts (options shown):",
                markdown(one["prompted"]),
            ]
        parts += ["The paper's findings and ours:", markdown(one["reading"])]
        parts += ["Spans (primary SAE, tau 0.7, options shown):", markdown(spans(one))]
        parts += [
            "SAE x tau, means over the traits, options shown:",
            markdown(one["sweep"]),
        ]
        parts += ["Width trend:", markdown(one["width"])]
        if one["pirate"]:
            parts += [
                "Open-ended requests under the SAS vector of the register (judge: lexicon):",
                markdown(one["pirate"]),
            ]
    return "\n\n".join(parts) + "\n"


def spans(one: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"arm": name, "span": round(value, 4)} for name, value in one["span by arm"].items()]


FULL = {
    "traits": ("autonomy", "tool_use", "persistence", "risk", "deference"),
    "saes": 99,
    "build": 200,
    "items": 40,
    "controls": 10,
}
QUICK = {"traits": ("autonomy", "risk"), "saes": 2, "build": 40, "items": 10, "controls": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two traits, ten questions")
    parser.add_argument("--models", nargs="+", default=list_organisms())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    budget = QUICK if given.quick else FULL
    results: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        # an empty vector is a result here and stands in the tables
        warnings.filterwarnings("ignore", "no latent is left", UserWarning)
        for name in given.models:
            for build in BUILDS:
                plan, table = run(name, build, budget, given.seed)
                found = figures(plan, table)
                found["width"] = widths(plan).by_width().to_dict("records")
                found["pirate"] = pirate(name, budget, given.seed) if build == BUILDS[0] else []
                found["prompted"] = prompted(name, budget, given.seed) if build == BUILDS[0] else []
                found["reading"] = reading(found)
                results.append({"model": name, "build": build, "rows": len(table), **found})
    text = page(results, "python -m benchmarks.sas_protocol --table docs/sas_protocol.md")
    print(text)
    if given.table:
        given.table.parent.mkdir(parents=True, exist_ok=True)
        given.table.write_text(text, encoding="utf-8")
    if given.json:
        content = finite({"versions": versions(), "seed": given.seed, "results": results})
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
