"""Do vectors that know nothing of a trait show "effects"? Label-permuted probes on an organism.

`python benchmarks/shuffled_traits.py [--quick] [--models NAME ...] [--json FILE] [--table FILE]`

Eight probes per trait, each fitted after a random half of the contrast pairs swapped its labels,
steer 50 held-out scenarios at half a mean residual norm, beside the unsteered arm, the five real
probes and 19 random directions of the same length. Each is asked what the autonomy protocol asks of
a trait's vector. The share of permuted vectors that pass is held against the binomial 99 % band of
5 % (a vector's four outcomes come from the same rollouts, so the true band is somewhat wider).

The paired test against the unsteered arm is shown without a target: with common random numbers it
tells any push of this length from none, so that a small p says "the residual was moved", not "along
the trait". The rank among random directions and the unpaired test are what must be nominal.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from scipy import stats  # noqa: E402

from sae_steering_plugin.effects import evidence_tier  # noqa: E402
from sae_steering_plugin.effects.tiers import TIERS  # noqa: E402
from sae_steering_plugin.organisms import list_organisms  # noqa: E402
from sae_steering_plugin.runs.autonomy import arm_effects  # noqa: E402
from sae_steering_plugin.runs.autonomy_vectors import (  # noqa: E402
    PERMUTED,
    PROBE,
    VectorSettings,
    saved_vectors,
)
from sae_steering_plugin.runs.environment import versions  # noqa: E402
from sae_steering_plugin.runs.parts import collect  # noqa: E402
from sae_steering_plugin.runs.references import ModelRef  # noqa: E402
from sae_steering_plugin.runs.rollout_evaluation import chosen_scenarios  # noqa: E402
from sae_steering_plugin.runs.rollout_plan import (  # noqa: E402
    BASE,
    RolloutPlan,
    random_arms,
    steering_arms,
)
from sae_steering_plugin.runs.runner import InProcess  # noqa: E402
from sae_steering_plugin.runs.transcripts import PROXIES  # noqa: E402
from sae_steering_plugin.types import Effect  # noqa: E402

LEVEL, STRENGTH, SEEDS = 0.05, 0.5, 19
DISTINCT = tuple(name for name in PROXIES if name != "deference")
"""Deference mirrors autonomy: an effect on one is an effect on the other."""


def effects_on(model: str, folder: Path, *, items: int, draws: int, pairs: int) -> dict[str, Any]:
    """Effects by kind: real probes, permuted probes, random directions."""
    vectors = saved_vectors(model, VectorSettings(tuple(PROXIES), pairs, draws=draws), folder)
    like = next(iter(vectors.probes.values()))
    kinds = {
        kind: [
            arm
            for one in vectors.of(kind)
            for arm in steering_arms(
                {one.reference.label: one.reference},
                strengths=(STRENGTH,),
                traits={one.reference.label: one.trait},
            )
        ]
        for kind in (PROBE, PERMUTED)
    }
    kinds["random"] = list(random_arms(like, seeds=range(SEEDS), strengths=(STRENGTH,)))
    plan = RolloutPlan(
        ModelRef.of(model),
        chosen_scenarios(model, None, items, ()),
        (BASE, *(arm for arms in kinds.values() for arm in arms)),
        max_new_tokens=64,
    )
    report = InProcess().run(plan, folder)
    if not report.complete:
        raise RuntimeError(str(report))
    found = plan.rollouts(collect(plan, folder))
    options = {"resamples": 500, "seed": 0}
    return {
        kind: [one.effect for one in arm_effects(found, arms, options)]
        for kind, arms in kinds.items()
    }


def rows_of(model: str, found: dict[str, list[Effect]]) -> list[dict[str, Any]]:
    crowd = {
        name: sorted(abs(one.d) for one in found["random"] if one.outcome == name)
        for name in DISTINCT
    }

    def rank_p(one: Effect) -> float:
        sizes = crowd[one.outcome]
        return (1 + sum(size >= abs(one.d) for size in sizes)) / (1 + len(sizes))

    rows = []
    for kind in (PERMUTED, PROBE):
        cells = [one for one in found[kind] if one.outcome in DISTINCT]
        asked: dict[str, tuple[list[bool], bool]] = {
            "rank among 19 random directions, p <= 0.05": (
                [rank_p(one) <= LEVEL for one in cells],
                True,
            ),
            "Mann-Whitney against the base, p <= 0.05": (
                [one.unpaired_p <= LEVEL for one in cells],
                True,
            ),
            "paired permutation against the base, p <= 0.05": (
                [one.p_value <= LEVEL for one in cells],
                False,
            ),
            "tier 1 or 2 on its trait's own proxy": (
                [tier_of(one, found["random"]) in TIERS[:2] for one in found[kind]
                 if one.outcome == one.trait],
                True,
            ),
        }  # fmt: skip
        for what, (passed, judged) in asked.items():
            high = float(stats.binom.ppf(0.995, len(passed), LEVEL)) / len(passed)
            rate = sum(passed) / len(passed)
            target = judged and kind == PERMUTED
            rows.append(
                {
                    "model": model,
                    "vectors": kind,
                    "what": what,
                    "n": len(passed),
                    "share": round(rate, 3),
                    "target": f"<= {high:.3f}" if target else "",
                    "met": bool(rate <= high) if target else None,
                }
            )
    return rows


def tier_of(one: Effect, crowd: Sequence[Effect]) -> str:
    """The tier of a single dose, as if the vector had been built for its trait."""
    mine = [other for other in crowd if other.outcome == one.outcome]
    return evidence_tier([one], controls=mine).tier


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        met = {True: "yes", False: "NO", None: ""}[row["met"]]
        lines.append("| " + " | ".join(str(v) for v in {**row, "met": met}.values()) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="six scenarios: does it run?")
    parser.add_argument("--models", nargs="+", default=list_organisms())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    size = (
        {"items": 6, "draws": 1, "pairs": 40}
        if given.quick
        else {"items": 50, "draws": 8, "pairs": 400}
    )
    rows: list[dict[str, Any]] = []
    for model in given.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(model, effects_on(model, Path(folder), **size))
    print(table(rows))
    if given.table:
        command = "python benchmarks/shuffled_traits.py" + (" --quick" if given.quick else "")
        given.table.write_text(f"Written by `{command} --table FILE`.\n\n{table(rows)}\n")
    if given.json:
        content = [{"row": "shuffled traits", **one, "versions": versions()} for one in rows]
        given.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
