"""Every construction at one displacement on the embedded agents, beside random directions.

`python benchmarks/constructions.py [--quick] [--models NAME ...] [--strength S] [--json FILE]
[--table FILE]`

For each organism all methods of `runs.construction.METHODS` build a vector from the same training
wordings (SAE-TS and FGAA from a measured effect map, CorrSteer from unsteered rollouts), and each
moves the residual by S mean norms on the same 200 test scenarios, as do ten random directions. The
outcome is "did not ask the user"; d is Cohen's d (ddof 1) with a paired bootstrap interval, p is
paired and Holm-adjusted over the methods. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from sae_steering_plugin.organisms import list_organisms  # noqa: E402
from sae_steering_plugin.runs.canonical import finite  # noqa: E402
from sae_steering_plugin.runs.construction_table import (  # noqa: E402
    ConstructionTable,
    TableBudget,
    compare_constructions,
)
from sae_steering_plugin.runs.demo import row  # noqa: E402
from sae_steering_plugin.types import Effect  # noqa: E402

QUICK = TableBudget(
    pairs=120, items=16, controls=3, vectors=32, prompts=4, corpus=6, outcomes=48, new_tokens=16
)

HEAD = (
    "| method | n | did not ask | d | 95 % interval | p (Holm) | valid |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)


MAPPED = ("sae_ts", "fgaa")
"""The methods that read their vector off the effect map."""


def line(one: Effect, effect_r2: float | None = None) -> str:
    """A row; methods that stand on an effect map say how well it predicts left-out vectors."""
    name = one.method
    if name in MAPPED:
        name += f" (map: R2 {'not defined' if effect_r2 is None else f'{effect_r2:.2f}'})"
    return (
        f"| {name} | {one.n} | {one.base_mean:.2f} -> {one.arm_mean:.2f} | {one.d:+.2f} | "
        f"{one.ci_low:+.2f} to {one.ci_high:+.2f} | {one.p_adjusted:.2g} | {one.valid_rate:.2f} |"
    )


def section(table: ConstructionTable) -> str:
    sizes = [abs(one.d) for one in table.controls]
    ordered = sorted(table.headline, key=lambda one: -one.d)
    effects = table.settings["effects"]
    score = effects.get("effect_r2")
    parts = [
        f"## {table.model}",
        f"SAE `{table.sae}`, {table.trait}, every vector {table.strength:g} mean residual norms "
        "long, at all positions.",
        "\n".join([*HEAD, *(line(one, score) for one in ordered)]),
        f"{len(sizes)} random directions of the same length: mean |d| "
        f"{sum(sizes) / len(sizes):.2f}, largest {max(sizes):.2f}.",
    ]
    if effects:
        parts.append(
            f"Effect map of SAE-TS and FGAA: {effects['vectors']} vectors, {effects['unreached']} "
            "more did not reach the target loss; R2 on left-out vectors "
            + ("not defined." if score is None else f"{score:.2f} (0: no better than the mean).")
        )
    parts += [f"Left out: {name}: {why}" for name, why in table.left_out.items()]
    return "\n\n".join(parts)


def page(tables: Sequence[ConstructionTable], command: str) -> str:
    """All results as one Markdown page."""
    intro = (
        f"# Constructions at one displacement\n\nWritten by `{command}`. The embedded agents are "
        "model organisms of one or two million parameters, not a real assistant; the methods' "
        "papers report on models a thousand times larger, so the order here is not theirs."
    )
    return "\n\n".join([intro, *(section(one) for one in tables)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small run that ends within minutes")
    parser.add_argument("--models", nargs="+", default=None, help="organisms; all of them")
    parser.add_argument("--trait", default="autonomy")
    parser.add_argument("--strength", type=float, default=0.35)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None)
    given = parser.parse_args()
    tables = [
        compare_constructions(
            model,
            trait=given.trait,
            strength=given.strength,
            budget=QUICK if given.quick else None,
            seed=given.seed,
        )
        for model in given.models or list_organisms()
    ]
    command = "python benchmarks/constructions.py" + (" --quick" if given.quick else "")
    command += f" --strength {given.strength:g}"
    if given.table is not None:
        command += f" --table {given.table}"
        given.table.write_text(page(tables, command), encoding="utf-8")
    print(page(tables, command))
    if given.json is not None:
        rows = [
            {"model": one.model, "sae": one.sae, "stage": stage, **row(effect)}
            for one in tables
            for stage, found in (("headline", one.headline), ("control", one.controls))
            for effect in found
        ]
        given.json.write_text(json.dumps(finite(rows), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
