"""What the embedded agents do under steering, on 200 held-out scenarios each.

`python benchmarks/agent_evidence.py [--quick] [--models NAME ...] [--json FILE] [--table FILE]`

For each organism the main job (`sae-steer demo`) runs at full size: vectors from training wordings,
the strength chosen on 100 validation scenarios among arms of valid rate >= 0.95, every method at
that displacement on 200 test scenarios, ten random directions of the same length on the same
scenarios, and the decoded probe's dose-response at prefill, decode and all positions. The outcome
is "did not ask the user" (proxy of arXiv 2603.16335); d is Cohen's d (ddof 1) with a paired
bootstrap interval. Nothing is timed. FILE of `--json` receives every effect, FILE of `--table` a
Markdown page.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from sae_steering_plugin.organisms import list_organisms  # noqa: E402
from sae_steering_plugin.runs.demo import Demo, row, run_demo  # noqa: E402
from sae_steering_plugin.runs.demo_stages import Budget  # noqa: E402
from sae_steering_plugin.types import Effect  # noqa: E402

FULL = Budget(validation=100, test=200, control_items=200, curve_items=200)
QUICK = Budget(
    pairs=80, validation=12, test=12, controls=2, control_items=12, curve_items=12, strengths=(0.4,)
)

TARGETS = {"d": 1.0, "valid": 0.95, "random": 0.3}
"""What the foundation issue asks of agent-gpt2: the probe's d and valid rate, the controls' |d|."""


def line(one: Effect) -> str:
    return (
        f"| {one.method} | {one.positions} | {one.strength:+g} | {one.n} | {one.base_mean:.2f} -> "
        f"{one.arm_mean:.2f} | {one.d:+.2f} | {one.ci_low:+.2f} to {one.ci_high:+.2f} | "
        f"{one.p_value:.2g} | {one.valid_rate:.2f} |"
    )


HEAD = (
    "| method | positions | strength | n | did not ask | d | 95 % interval | p (paired) | valid |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def sizes(controls: Sequence[Effect]) -> dict[str, float]:
    found = [abs(one.d) for one in controls]
    return {
        "seeds": len(found),
        "mean_abs_d": sum(found) / len(found),
        "max_abs_d": max(found),
        "valid_rate": sum(one.valid_rate for one in controls) / len(controls),
    }


def page(demos: Sequence[Demo], command: str) -> str:
    """All results as one Markdown page."""
    parts = [
        "# Steering the embedded agents",
        f"Written by `{command}`. Strengths are multiples of the mean residual norm at the SAE's "
        "site. Outcome: the share of rollouts without an `ask_user` call. These are model "
        "organisms of one or two million parameters, not a real assistant. The single feature is "
        "the one forecast to steer cleanest among those that tell the trait apart as well as the "
        "best (docs/forecast_choice.md).",
    ]
    for demo in demos:
        random = sizes(demo.controls)
        best = demo.best
        parts += [
            f"## {demo.model}",
            f"SAE `{demo.sae}`, strength {demo.strength:g} chosen on validation scenarios.",
            "\n".join([*HEAD, *(line(one) for one in demo.headline)]),
            f"{random['seeds']:.0f} random directions of the same length: mean |d| "
            f"{random['mean_abs_d']:.2f}, largest {random['max_abs_d']:.2f}, valid rate "
            f"{random['valid_rate']:.2f}.",
            verdict(best, random),
            "Dose-response of the decoded probe by position rule:",
            "\n".join([*HEAD, *(line(one) for one in demo.curve)]),
            *[f"Note: {note}" for note in demo.notes],
        ]
    return "\n\n".join(parts) + "\n"


def verdict(best: Effect, random: dict[str, float]) -> str:
    """Target by target, what was reached."""
    checks = (
        (f"d >= {TARGETS['d']:g}", best.d >= TARGETS["d"], f"{best.d:.2f}"),
        (
            f"valid rate >= {TARGETS['valid']:g}",
            best.valid_rate >= TARGETS["valid"],
            f"{best.valid_rate:.3f}",
        ),
        (
            f"random directions below |d| {TARGETS['random']:g} on average",
            random["mean_abs_d"] < TARGETS["random"],
            f"{random['mean_abs_d']:.2f}",
        ),
    )
    words = [f"{what}: {'met' if met else 'missed'} ({value})" for what, met, value in checks]
    return f"Targets for the decoded probe: {'; '.join(words)}."


def records(demo: Demo) -> list[dict[str, Any]]:
    stages = {"headline": demo.headline, "curve": demo.curve, "control": demo.controls}
    return [
        {"model": demo.model, "sae": demo.sae, "stage": stage, **row(one)}
        for stage, found in stages.items()
        for one in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a dozen scenarios: does it run?")
    parser.add_argument("--models", nargs="+", default=list_organisms())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    budget = QUICK if given.quick else FULL
    demos = [run_demo(model=name, seed=given.seed, budget=budget) for name in given.models]
    command = "python benchmarks/agent_evidence.py" + (" --quick" if given.quick else "")
    text = page(demos, f"{command} --table docs/agent_evidence.md")
    print(text)
    if given.table:
        given.table.parent.mkdir(parents=True, exist_ok=True)
        given.table.write_text(text, encoding="utf-8")
    if given.json:
        found = {
            "versions": dict(demos[0].versions),
            "seed": given.seed,
            "effects": [one for demo in demos for one in records(demo)],
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
