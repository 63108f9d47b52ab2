"""Probes on raw activations beside probes on the dictionary, on every organism's world.

`python -m benchmarks.probe_comparison [--quick] [--models NAME ...] [--json FILE] [--table FILE]`

Eleven concepts of the world's statements per organism; wordings stay in one split, and other
wordings are the shifted rows. One split and one drawing of the random dictionary per seed.
Detection only: how well a probe reads a concept says nothing about steering for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from benchmarks.pages import asked, give  # noqa: E402
from sae_steering_plugin import (  # noqa: E402
    collect_labelled,
    compare_probes,
    load_organism,
    quiver_of_arrows,
)
from sae_steering_plugin.effects.intervals import mean_interval  # noqa: E402
from sae_steering_plugin.organisms import list_organisms  # noqa: E402
from sae_steering_plugin.runs.choice_evaluation import primary_sae  # noqa: E402
from sae_steering_plugin.runs.labelled_texts import world_statements  # noqa: E402

TOP_K = (1, 5, 20)
SEEDS = (0,)


def measure(name: str, quick: bool) -> dict[str, Any]:
    """Mean AUROC of every probe over concepts and seeds, and what the quiver gains."""
    organism = load_organism(name)
    sae = organism.saes[primary_sae(name)]
    own = world_statements(200 if quick else 500)
    away = world_statements(100 if quick else 250, split="test", seed=1)
    chosen = list(own.labels)[:2] if quick else list(own.labels)
    seeds = (0,) if quick else SEEDS
    found = []
    for concept in chosen:
        sides = {
            part: collect_labelled(
                organism.model, data.texts, data.labels[concept].astype(int).tolist(), sae,
                groups=data.groups, name=concept, progress=False,
            )
            for part, data in (("own", own), ("away", away))
        }  # fmt: skip
        found += [
            compare_probes(
                sides["own"], sae, shifted=sides["away"], top_k=TOP_K[:2] if quick else TOP_K,
                seed=seed,
            )
            for seed in seeds
        ]  # fmt: skip
    rows = []
    for score in found[0].scores:
        row: dict[str, Any] = {"probe": score.name, "kind": score.kind}
        for part in ("test", "shifted"):
            values = [getattr(one[score.name], part) for one in found]
            known = np.array(values)[~np.isnan(values)]
            interval = mean_interval(known, seed=0)
            row |= {part: float(known.mean()), f"{part}_low": interval.low,
                    f"{part}_high": interval.high, f"{part}_n": len(known)}  # fmt: skip
        rows.append(row)
    quivers = {}
    for part in ("test", "shifted"):
        usable = [one for one in found if all(getattr(s, part) == getattr(s, part)
                                              for s in one.scores)]  # fmt: skip
        quiver = quiver_of_arrows(usable, part=part)
        quivers[part] = {
            "improvement": quiver.improvement, "low": quiver.interval.low,
            "high": quiver.interval.high, "chosen_share": quiver.chosen_share,
            "data_sets": len(usable),
        }  # fmt: skip
    return {"model": name, "sae": primary_sae(name), "n": dict(found[0].n), "rows": rows,
            "concepts": len(chosen), "seeds": len(seeds), "quiver": quivers}  # fmt: skip


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as the page in docs/."""
    lines = [
        "# Raw probes beside SAE probes",
        "",
        "Written by `python -m benchmarks.probe_comparison --table docs/probe_comparison.md`.",
        "",
        str(__doc__).split("\n\n", 2)[2].strip(),
        "",
        "AUROC, mean over concepts and seeds with a bootstrap interval over those comparisons, 95 "
        "%. `test`: held-out wordings of the same part of the world; `shifted`: wordings of its "
        "test part. The penalty, and in the quiver the probe, is chosen on validation rows. "
        "`random SAE`: random directions, as many, firing as often.",
    ]
    for one in results:
        n = ", ".join(f"{part} {count}" for part, count in one["n"].items())
        lines += [
            "",
            f"## {one['model']}, {one['sae']}: {one['concepts']} concepts, {one['seeds']} seed(s) "
            f"each ({n})",
            "",
            "| probe | kind | test | shifted |",
            "| --- | --- | --- | --- |",
        ]
        for row in one["rows"]:
            cells = [
                f"{row[part]:.3f} [{row[f'{part}_low']:.3f}, {row[f'{part}_high']:.3f}]"
                for part in ("test", "shifted")
            ]
            lines.append(f"| {row['probe']} | {row['kind']} | {' | '.join(cells)} |")
        lines.append("")
        for part, quiver in one["quiver"].items():
            lines.append(
                f"Quiver on {part} rows: adding SAE probes to the raw ones changes the AUROC of "
                f"the validated choice by {quiver['improvement']:+.4f} [{quiver['low']:+.4f}, "
                f"{quiver['high']:+.4f}] over {quiver['data_sets']} comparisons; an SAE probe is "
                f"chosen in {quiver['chosen_share']:.0%}."
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = asked(str(__doc__), list_organisms())
    results = [measure(name, options.quick) for name in options.models]
    give(options, {"results": results}, page(results))


if __name__ == "__main__":
    main()
