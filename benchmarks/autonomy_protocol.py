"""The autonomy protocol on every organism, the paper's figures beside ours, and what differs.

`python benchmarks/autonomy_protocol.py [--quick] [--models NAME ...] [--json FILE] [--table FILE]`
`python benchmarks/autonomy_protocol.py --kill-test 10`

For each organism: vectors of five traits, 50 scenarios x 36 conditions = 1,800 rollouts, and the
control arms (`sae-steer evaluate autonomy`). An organism whose forward pass is slow runs less
(`SIZES`), and the page says so. `--large N` adds the 36 conditions alone on N scenarios
of the first model. The paper's figures are read from its own released statistics
(`agent-traits/published_statistics.json` of the shared data); without that folder its columns are
empty. Nothing is timed for the page.

`--kill-test N` runs the 1,800 rollouts of agent-gpt2 once undisturbed and once killed with SIGKILL
at N random moments, the first while the vectors are built, each time started again with the same
command. Exit code 1 unless table and report agree bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from sae_steering_plugin.effects import behaviour_axis  # noqa: E402
from sae_steering_plugin.effects.axis import INDEPENDENT, Axis  # noqa: E402
from sae_steering_plugin.organisms import data_folder, list_organisms, read_card  # noqa: E402
from sae_steering_plugin.runs.autonomy import run_autonomy  # noqa: E402
from sae_steering_plugin.runs.autonomy_report import AutonomyReport  # noqa: E402
from sae_steering_plugin.runs.canonical import finite  # noqa: E402
from sae_steering_plugin.runs.environment import versions  # noqa: E402
from sae_steering_plugin.runs.transcripts import PROXIES  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TRAITS = tuple(PROXIES)
RELEASED = {"tool_use": "tool_use_eagerness", "risk": "risk_calibration"}
"""Names of two traits in the released statistics."""
SIZES: dict[str, dict[str, Any]] = {"agent-qwen3_5_moe": {"draws": 1}}
"""Options of organisms that do not run at full size: all conditions, half of the built controls."""
QUICK: dict[str, Any] = {
    "items": 4,
    "controls": 2,
    "draws": 1,
    "pairs": 40,
    "strengths": (0.5,),
    "max_turns": 2,
    "resamples": 200,
}
TIERS = {
    "autonomy": "1",
    "tool_use": "2",
    "persistence": "failed (suppression only)",
    "risk": "failed (epiphenomenal)",
    "deference": "3 (borderline)",
}
"""The paper's evidence tiers (README of its repository)."""
DECODE = "no effect, p > 0.35"
"""Its autonomy vector at decoded tokens only (abstract)."""


# The paper ----------------------------------------------------------------------------------------


def published() -> dict[str, Any] | None:
    """The released statistics of arXiv 2603.16335; None where the shared data are not."""
    given = os.environ.get("SAE_STEERING_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    path = folder / "agent-traits" / "published_statistics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def paper_matrix(statistics: Mapping[str, Any] | None) -> np.ndarray | None:
    """Its 5 x 5 matrix of d (alpha 2, all tokens), in the order of the proxies."""
    if statistics is None:
        return None
    found = statistics["crossTrait"]
    names = list(found["traits_steered"])
    order = [names.index(RELEASED.get(trait, trait)) for trait in TRAITS]
    columns = [found["proxies_measured"].index(f"{trait}_proxy") for trait in TRAITS]
    return np.array(found["matrix_cohens_d"])[np.ix_(order, columns)]


# The page -----------------------------------------------------------------------------------------


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    def escaped(value: Any) -> str:
        return "" if value is None else str(value).replace("|", "\\|")

    names = list(rows[0])
    lines = ["| " + " | ".join(map(escaped, names)) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = (escaped(row.get(name)) for name in names)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(value: float | None, form: str = "+.2f") -> str:
    return "" if value is None else format(value, form)


def headline_rows(
    statistics: Mapping[str, Any] | None, reports: Sequence[AutonomyReport]
) -> list[dict[str, Any]]:
    """The paper's figures beside ours: own effects, base rates, probes, geometry, axis, tiers."""
    theirs = paper_matrix(statistics)
    rows: list[dict[str, Any]] = []

    def add(what: str, paper: str, ours: Sequence[str]) -> None:
        names = [one.model for one in reports]
        rows.append({"figure": what, "paper": paper, **dict(zip(names, ours, strict=True))})

    def axis_share(found: Axis | None) -> str:
        if found is None:
            return ""
        return f"{found.shares[0]:.2f} (p {found.nulls[INDEPENDENT].p_value:.2g})"

    base = None if statistics is None else statistics["crossTrait"]["baseline_means"]
    for trait in TRAITS:
        add(
            f"base: {trait} proxy",
            "" if base is None else f"{base[f'{trait}_proxy']:.2f}",
            [f"{one.headline(trait, trait).effect.base_mean:.2f}" for one in reports],
        )
    for i, trait in enumerate(TRAITS):
        add(
            f"{trait} vector on its own proxy: d",
            "" if theirs is None else figure(float(theirs[i, i])),
            [
                f"{e.d:+.2f} ({e.ci_low:+.2f} to {e.ci_high:+.2f}), adjusted p "
                f"{cell.p_adjusted:.2g}"
                for one in reports
                for e in (one.headline(trait, trait).effect,)
                for cell in (one.matrix.cell(trait, trait),)
            ],
        )
    add(
        "autonomy vector on tool use: d",
        "" if theirs is None else figure(float(theirs[0, 1])),
        [figure(one.headline("autonomy", "tool_use").effect.d) for one in reports],
    )
    add(
        "vectors that raise the autonomy proxy",
        "" if theirs is None else f"{int((theirs[:, 0] > 0).sum())} of 5",
        [f"{int((one.matrix.grid()['autonomy'] > 0).sum())} of 5" for one in reports],
    )
    add(
        "autonomy vector, decoded tokens only: d",
        DECODE,
        [
            f"{e.d:+.2f} (p {e.p_value:.2g})"
            for one in reports
            for e in (
                next(x.effect for x in one.own("autonomy") if x.effect.positions == "decode"),
            )
        ],
    )
    add(
        "autonomy vector, prompt tokens only: d at the middle strength",
        "not found",
        [
            f"{e.d:+.2f} (p {e.p_value:.2g})"
            for one in reports
            for e in (next(x.effect for x in one.own("autonomy")
                           if x.effect.positions == "prefill"
                           and x.effect.strength == one.headline("autonomy", "autonomy")
                           .effect.strength),)
        ],
    )  # fmt: skip
    add(
        "first component's share of d (outcomes move independently: p)",
        axis_share(
            None
            if theirs is None
            else behaviour_axis(theirs, vectors=TRAITS, outcomes=TRAITS, drop=("deference",))
        ),
        [axis_share(one.behaviour) for one in reports],
    )
    add(
        "the same share: vectors do nothing, p",
        "needs the rollouts",
        [
            f"{one.behaviour.nulls['vectors do nothing'].p_value:.2g}" if one.behaviour else ""
            for one in reports
        ],
    )
    cosine = None if statistics is None else statistics["dissociation"]["cosine_similarity"]
    add(
        "cosine of tool-use and risk vectors",
        "" if cosine is None else figure(cosine["residual_stream"]),
        [
            figure(float(one.geometry.cosines[1, 3])) if one.geometry is not None else ""
            for one in reports
        ],
    )
    for trait in TRAITS:
        meta = None if statistics is None else statistics["meta"][RELEASED.get(trait, trait)]
        add(
            f"{trait} probe: R2, split by sample (text alone)",
            "" if meta is None else f"{meta['probe_r2']:.2f}",
            [
                f"{scores['sample_r2']:.2f} ({scores['text_sample_r2']:.2f})"
                for one in reports
                for scores in (one.vectors.scores[trait],)
            ],
        )
        add(
            f"{trait} probe: R2, split by template (text alone)",
            "not reported",
            [
                f"{scores['r2']:.2f} ({scores['text_r2']:.2f})"
                for one in reports
                for scores in (one.vectors.scores[trait],)
            ],
        )
    for trait in TRAITS:
        tiers = [{tier.method: tier.tier for tier in one.tiers}[trait] for one in reports]
        add(f"{trait}: evidence tier (ours by our own rules)", TIERS[trait], tiers)
    return rows


def differences(reports: Sequence[AutonomyReport]) -> list[dict[str, Any]]:
    """What differs from the paper, by name."""
    paper = {
        "model": "Qwen3.5-35B-A3B",
        "parameters": "35 B (3 B active)",
        "SAE": "best of nine per trait, layers 15 to 23, d_sae 16,384, top-k",
        "site": "four layers, so most vectors have no common coordinates",
        "read position": "last prompt token",
        "contrast pairs per trait": "304",
        "penalty": "by test R2, split by sample",
        "matrix at": "alpha 2, about a third of the activation norm",
        "strengths": "alpha 1, 2, 3",
        "scenarios": "50 of 100, own tools and mock results",
        "turns, new tokens, temperature": "5, 1024, 0.6",
        "d": "ddof 0 in the text, 1 in the code",
        "test": "Mann-Whitney, uncorrected",
        "judge": "none: rule-based proxies",
        "conditions": "36, list not found",
    }
    rows = [{"": name, "paper": value} for name, value in paper.items()]
    for one in reports:
        card = read_card(data_folder(one.model))
        size = card.get("parameters", 0) / 1e6
        mid = one.headline("autonomy", "autonomy").effect.strength
        ours = {
            "model": one.model,
            "parameters": f"{size:.1f} M",
            "SAE": f"{one.settings['sae']}, one for all traits",
            "site": one.settings["hook_name"],
            "read position": "the token that opens the tool call",
            "contrast pairs per trait": str(one.settings["pairs"]),
            "penalty": "on grouped inner folds, within one standard error",
            "matrix at": f"{mid:g} mean residual norms ({mid * one.settings['mean_norm']:.3g} "
            "residual units)",
            "strengths": ", ".join(f"{s:g}" for s in one.strengths) + " norms",
            "scenarios": f"{one.n} of the organism's world, held out",
            "turns, new tokens, temperature": f"{one.settings['max_turns']}, "
            f"{one.settings['max_new_tokens']}, {one.settings['temperature']:g}",
            "d": f"ddof {one.settings['ddof']}",
            "test": "paired permutation, Holm; Mann-Whitney beside it",
            "judge": "none: the same proxies",
            "conditions": f"{one.settings['conditions']} (inferred) and "
            f"{one.settings['control_rollouts'] // one.n} control arms",
        }
        for row in rows:
            row[one.model] = ours[row[""]]
    return rows


def page(reports: Sequence[AutonomyReport], large: AutonomyReport | None, command: str) -> str:
    statistics = published()
    parts = [
        "# The autonomy protocol",
        f"Written by `{command}`. Source: arXiv 2603.16335; its columns come from the statistics "
        "released with it. Ours are model organisms of one or two million parameters in a world of "
        "their own: a protocol carried through, not a replication of the finding.",
        "## The paper's figures beside ours",
        markdown(headline_rows(statistics, reports)),
        "## What differs",
        markdown(differences(reports)),
    ]
    for one in reports:
        parts.append(f"## {one.model}")
        parts += shown(one)
    if large is not None:
        parts.append(f"## {large.model}, the 36 conditions on {large.n} scenarios")
        kept = ("cross-trait", "conditions", "axis", "world and", "what so many", "selectivity")
        parts += shown(large, kept)
    return "\n\n".join(parts) + "\n"


def shown(report: AutonomyReport, kept: Sequence[str] = ()) -> list[str]:
    parts = ["\n".join(f"- {note}" for note in report.notes)]
    for title, rows in report.tables().items():
        if title != "notes" and (not kept or title.startswith(tuple(kept))):
            parts += [f"### {title[0].upper()}{title[1:]}", markdown(rows)]
    return parts


# Killed -------------------------------------------------------------------------------------------


def started(out: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    words = ["-m", "sae_steering_plugin.cli", "evaluate", "rollouts", "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, *words, *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def parts_in(out: Path) -> int:
    return len(list(out.glob("part-*.parquet")))


def kill_test(kills: int, options: Sequence[str], *, seed: int = 0) -> list[dict[str, Any]]:
    """One undisturbed run, one killed `kills` times; a row for each with digests of its files."""
    chance = random.Random(seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for what in ("undisturbed", f"killed {kills} times"):
            out = Path(name) / what.replace(" ", "-")
            begun = time.perf_counter()
            moments: list[str] = []
            if what != "undisturbed":
                moments = killed(out, options, kills, int(rows[0]["units"]), chance)
            last = started(out, options)
            if last.wait():
                raise RuntimeError(f"{what}: ended with exit code {last.returncode}")
            summary = json.loads((out / "summary.json").read_text())
            rows.append(
                {
                    "run": what,
                    "rollouts": summary["rows"],
                    "units": parts_in(out),
                    "kills that hit": len(moments),
                    "at": ", ".join(moments),
                    "seconds": round(time.perf_counter() - begun, 1),
                    "digest": summary["digest"],
                    "report": digest_of(out / "autonomy.json"),
                    "transcripts": digest_of(out / "rollouts.parquet"),
                }
            )
    return rows


def killed(
    out: Path, options: Sequence[str], kills: int, units: int, chance: random.Random
) -> list[str]:
    """Start and kill the run that many times, the first while it builds vectors; where each hit."""
    moments = []
    for left in range(kills, 0, -1):
        process = started(out, options)
        before = parts_in(out)
        most = max(1, (units - 1 - before) // left)
        goal = before if left == kills else before + chance.randint(0, most)
        time.sleep(chance.uniform(1, 12) if left == kills else 0)
        while process.poll() is None and parts_in(out) < goal:
            time.sleep(0.01)
        time.sleep(chance.random() * 2)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            moments.append(f"{parts_in(out)} of {units}")
        process.wait()
    return moments


def digest_of(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


# The command --------------------------------------------------------------------------------------


def measured(name: str, options: dict[str, Any], folder: Path) -> AutonomyReport:
    return run_autonomy(name, out=folder / name, **options)


def record(report: AutonomyReport) -> dict[str, Any]:
    """The report without its transcripts; control effects on other traits' proxies left out."""
    found = report.to_dict()
    keep = ("arm", "outcome", "d", "ci_low", "ci_high", "p_value", "valid_rate", "turns", "calls")
    found["controls"] = [{key: one[key] for key in keep} for one in found["controls"]]
    found["tables"] = finite(report.tables())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="four scenarios: does it run?")
    parser.add_argument("--models", nargs="+", default=list_organisms())
    parser.add_argument("--large", type=int, default=0, help="scenarios of the larger run")
    parser.add_argument("--kill-test", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--out", type=Path, help="keep the runs here (a killed one goes on)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.kill_test:
        quick = ["--items", "4", "--block", "2", "--max-turns", "1"] if given.quick else []
        rows = kill_test(given.kill_test, ["--controls", "0", *quick])
        print(markdown(rows))
        same = all(rows[0][key] == rows[1][key] for key in ("digest", "report", "transcripts"))
        print("bit for bit the same" if same else "THE TABLES DIFFER")
        if given.json:
            content = {"kill_test": rows, "same": same, "python": platform.python_version()}
            given.json.write_text(json.dumps(content, indent=1) + "\n")
        if given.table:
            command = f"python benchmarks/autonomy_protocol.py --kill-test {given.kill_test}"
            given.table.write_text(f"Written by `{command} --table FILE`.\n\n{markdown(rows)}\n")
        return 0 if same else 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        reports = [
            measured(name, QUICK if given.quick else SIZES.get(name, {}), folder)
            for name in given.models
        ]
        large = None
        if given.large and not given.quick:
            options = {"items": given.large, "controls": 0}
            large = measured(given.models[0], options, folder / "large")
    words = ["python benchmarks/autonomy_protocol.py", *(["--quick"] if given.quick else [])]
    if given.large:
        words.append(f"--large {given.large}")
    text = page(reports, large, " ".join([*words, "--table docs/autonomy_protocol.md"]))
    print(text)
    if given.table:
        given.table.parent.mkdir(parents=True, exist_ok=True)
        given.table.write_text(text, encoding="utf-8")
    if given.json:
        content = {
            "versions": versions(),
            "paper": None if (theirs := paper_matrix(published())) is None else theirs.tolist(),
            "reports": [record(one) for one in reports],
            "large": None if large is None else finite(large.tables()),
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
