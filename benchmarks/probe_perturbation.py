"""TPP and SCR of every organism's SAEs: what a few features taken out do to linear probes.

`python -m benchmarks.probe_perturbation [--quick] [--models NAME ...] [--json FILE] [--table FILE]`

TPP (targeted probe perturbation) over the world's five topics; SCR (spurious correlation removal)
over eleven pairs: each topic with pirate speech and with formality, and those two with each other.
Beside every dictionary stand random directions of its width and firing rates. Texts are split as
SAEBench splits them: other texts, of the same wordings, are tested, and equal texts stay together.
Sentiment is not used: in a trial even clean probes read it poorly, which leaves little to break or
to repair.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.pages import asked, give, table_lines  # noqa: E402
from sae_steering_plugin import (  # noqa: E402
    collect_pooled,
    load_organism,
    perturb_probes,
    remove_spurious,
)
from sae_steering_plugin.organisms import list_organisms  # noqa: E402
from sae_steering_plugin.runs.labelled_texts import world_statements  # noqa: E402
from sae_steering_plugin.runs.probe_perturbation import HEADLINE, N_FEATURES  # noqa: E402

TEXTS = 1000
SEEDS = range(5)
CONFOUNDS = ("register=pirate", "formality=formal")


def measure(name: str, quick: bool) -> list[dict[str, Any]]:
    """A row per dictionary, metric and number of features."""
    organism = load_organism(name)
    data = world_statements(400 if quick else TEXTS)
    seeds = range(2) if quick else SEEDS
    topics = {name: y for name, y in data.labels.items() if name.startswith("topic=")}
    pairs = [(topic, other) for topic in topics for other in CONFOUNDS] + [CONFOUNDS]
    rows = []
    for sae_name in sorted(organism.saes)[: 1 if quick else None]:
        pooled = collect_pooled(
            organism.model, organism.saes[sae_name], data.texts, batch_size=64, progress=False
        )
        for found in (
            perturb_probes(pooled, topics, seeds=seeds),
            remove_spurious(pooled, data.labels, pairs[:2] if quick else pairs, seeds=seeds),
        ):
            about = {
                "model": name, "sae": sae_name, "metric": found.metric, "seeds": len(seeds),
                "texts": len(pooled), "converged": found.converged,
            }  # fmt: skip
            told = [row for row in found.rows if getattr(row, "reported", True)]
            probes = [name for name in ("clean", "biased") if hasattr(told[0], name)]
            about |= {name: sum(getattr(r, name) for r in told) / len(told) for name in probes}
            rows += [about | dict(line) for line in found.table().to_dict("records")]
    return rows


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as the page in docs/."""
    lines = [
        "# Features taken out of probes: TPP and SCR",
        "",
        "Written by `python -m benchmarks.probe_perturbation --table docs/probe_perturbation.md`.",
        "",
        str(__doc__).split("\n\n", 2)[2].strip(),
        "",
        "Cells: dictionary / random directions with as many features taken out, mean over "
        f"{rows[0]['seeds']} seeds and over topics or pairs. `lead`: dictionary less random, with "
        "a bootstrap interval over seeds, 95 %. A seed draws another split, other probes and other "
        "random directions from the same texts, so the intervals say nothing of other texts, and "
        "from so few seeds they are somewhat too narrow. "
        "`clean` and `biased`: accuracy of the probes before anything is taken out, 0.5 being "
        "chance. TPP is at most about clean - 0.5. SCR is 1 where the biased probe becomes as good "
        "as the clean one, negative where it becomes worse. Where the settings differ from "
        "SAEBench's: `runs/probe_perturbation.py`. No figure here compares with SAEBench's tables.",
        "",
        *found_in(rows),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        for metric in ("TPP", "SCR"):
            own = [row for row in rows if (row["model"], row["metric"]) == (model, metric)]
            lines += ["", f"## {model}: {metric} ({own[0]['texts']} texts)", "", *listed(own)]
    return "\n".join(lines) + "\n"


def listed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One model and metric as a table, a line per dictionary."""
    numbers = list(dict.fromkeys(row["n"] for row in rows))
    probes = [name for name in ("clean", "biased") if name in rows[0]]
    heads = ["SAE", *probes, *(f"n = {n}" for n in numbers)]
    heads += [f"lead, n = {n}" for n in (numbers[0], HEADLINE)]
    lines = []
    for sae in dict.fromkeys(row["sae"] for row in rows):
        by_n = {row["n"]: row for row in rows if row["sae"] == sae}
        cells = [sae, *(f"{by_n[numbers[0]][name]:.2f}" for name in probes)]
        cells += [f"{row['dictionary']:.3f} / {row['random']:.3f}" for row in by_n.values()]
        cells += [
            f"{row['lead']:+.3f} [{row['lead_low']:+.3f}, {row['lead_high']:+.3f}]"
            for row in (by_n[numbers[0]], by_n[HEADLINE])
        ]
        lines.append(cells)
    return table_lines(heads, lines)


def found_in(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How often the dictionary is ahead of random directions, and behind, for each n."""
    lines = []
    for metric in ("TPP", "SCR"):
        cells = [metric]
        for n in N_FEATURES:
            own = [row for row in rows if (row["metric"], row["n"]) == (metric, n)]
            above = sum(row["lead_low"] > 0 for row in own)
            below = sum(row["lead_high"] < 0 for row in own)
            cells.append(f"{above} above, {below} below, of {len(own)}")
        lines.append(cells)
    return [
        "In how many dictionaries the whole interval of the lead is above 0, and below it:",
        "",
        *table_lines(["metric", *(f"n = {n}" for n in N_FEATURES)], lines),
    ]


def main() -> None:
    options = asked(str(__doc__), list_organisms())
    rows = [row for name in options.models for row in measure(name, options.quick)]
    give(options, {"results": rows}, page(rows))


if __name__ == "__main__":
    main()
