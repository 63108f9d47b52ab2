"""Is the nominal level the true one? Tests, intervals and corrections on data of known truth.

`python benchmarks/calibration.py [--quick] [--json FILE] [--table FILE] [--seed N]`

Tests: the share of null data sets (2,000; `--quick` 150) that a test at 5 % rejects, against the
binomial 99 % band around 5 %. A test on few distinct values cannot use its whole level; it must
stay below the band's upper end. Permutation tests draw 999 permutations where they are not exact.
Intervals: the share that covers the true value at level 95 %, against 93 to 97 % (widened by the
binomial 99 % band in a quick run). Corrections: the share of null families with any rejection, and
the mean share of false rejections with half the tests non-null (Benjamini-Hochberg). Nothing is
timed. Data sets are drawn anew for every row. A missed target is printed and does not change the
exit code.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from sae_steering_plugin import effects
from sae_steering_plugin.effects.axis import INDEPENDENT, NOTHING, behaviour_axis
from sae_steering_plugin.effects.corrections import CORRECTIONS
from sae_steering_plugin.effects.significance import TESTS

LEVEL = 0.05
SETS, QUICK_SETS = 2000, 150
GAP = 0.5
"""Shift of the arm, in deviations of what is normal, wherever an effect is planted."""

Arms = tuple[np.ndarray, np.ndarray]


def pairs(generator: np.random.Generator, n: int, gap: float = 0.0) -> Arms:
    """Normal pairs that correlate at 1/2, each arm of deviation 1."""
    shared = generator.normal(size=n)
    base, arm = (generator.normal(size=(2, n)) + shared) / math.sqrt(2)
    return base, arm + gap


def apart(generator: np.random.Generator, n: int, gap: float = 0.0) -> Arms:
    """Independent normal arms of deviation 1."""
    base, arm = generator.normal(size=(2, n))
    return base, arm + gap


def asks(arms: Arms) -> Arms:
    """Truth values, as "asked the user" is."""
    return (arms[0] > 0).astype(float), (arms[1] > 0).astype(float)


def calls(arms: Arms) -> Arms:
    """Small counts with many zeros, as "tool calls" are."""
    return np.floor(np.exp(arms[0])), np.floor(np.exp(arms[1]))


SHAPES: dict[str, Callable[[Arms], Arms]] = {
    "normal": lambda arms: arms,
    "counts": calls,
    "binary": asks,
}


def band(sets: int, share: float) -> tuple[float, float]:
    low, high = stats.binom.ppf([0.005, 0.995], sets, share)
    return float(low) / sets, float(high) / sets


# Tests ------------------------------------------------------------------------------------------


def test_rows(sets: int, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    low, high = band(sets, LEVEL)
    for name, test in TESTS.items():
        options = {"resamples": 999} if "permutation" in name else {}
        for shape, made in SHAPES.items():
            if name.startswith("mcnemar") and shape != "binary":
                continue
            for n in (20, 50, 200):
                draw = pairs if test.paired else apart
                rejected = sum(
                    test.p_value(*made(draw(generator, n)), **options) <= LEVEL for _ in range(sets)
                )
                rate = rejected / sets
                exact = shape == "normal" and not name.startswith("mcnemar")
                yield {
                    "kind": "test",
                    "what": name,
                    "data": shape,
                    "n": n,
                    "rate": rate,
                    "target": f"{low:.3f} to {high:.3f}" if exact else f"<= {high:.3f}",
                    "met": rate <= high and (rate >= low or not exact),
                }


def clustered_rows(sets: int, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Twenty templates of five items whose differences share a template's effect."""
    names = np.repeat(np.arange(20), 5)
    low, high = band(sets, LEVEL)
    rejected = {True: 0, False: 0}
    for _ in range(sets):
        moved = np.round(2 * (generator.normal(size=20)[names] + generator.normal(size=100)))
        for grouped in rejected:
            p = effects.paired_permutation(
                np.zeros(100), moved, clusters=names if grouped else None
            )
            rejected[grouped] += p <= LEVEL
    for grouped, count in rejected.items():
        rate = count / sets
        yield {
            "kind": "test",
            "what": "paired permutation, " + ("by template" if grouped else "items (wrong here)"),
            "data": "templates",
            "n": 100,
            "rate": rate,
            "target": f"{low:.3f} to {high:.3f}" if grouped else "",
            "met": low <= rate <= high if grouped else None,
        }


# Intervals --------------------------------------------------------------------------------------


def truths(shape: str, paired: bool) -> tuple[float, float]:
    """The true d and the true probability of superiority of the planted shift, to 0.002."""
    generator = np.random.default_rng(12345)
    base, arm = SHAPES[shape]((pairs if paired else apart)(generator, 2_000_000, GAP))
    return effects.cohens_d(base, arm), effects.superiority(base, arm)


def interval_rows(sets: int, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    slack = band(sets, 0.95)
    low, high = (0.93, 0.97) if sets >= SETS else (min(0.93, slack[0]), max(0.97, slack[1]))
    makers: dict[str, Callable[..., Any]] = {
        "d, percentile": lambda b, a, p: effects.d_interval(
            b, a, paired=p, resamples=1000, method="percentile"
        ),
        "d, bca": lambda b, a, p: effects.d_interval(b, a, paired=p, resamples=1000, method="bca"),
        "superiority, delong": lambda b, a, p: effects.superiority_interval(b, a, paired=p),
    }
    for shape in SHAPES:
        for paired in (True, False):
            size, chance = truths(shape, paired)
            for n in (20, 50, 200):
                inside = dict.fromkeys(makers, 0)
                for _ in range(sets):
                    base, arm = SHAPES[shape]((pairs if paired else apart)(generator, n, GAP))
                    for name, maker in makers.items():
                        true = size if name.startswith("d") else chance
                        inside[name] += true in maker(base, arm, paired)
                for name, count in inside.items():
                    rate = count / sets
                    yield {
                        "kind": "interval",
                        "what": name + (", paired" if paired else ", unpaired"),
                        "data": shape,
                        "n": n,
                        "rate": rate,
                        "target": f"{low:.3f} to {high:.3f}",
                        "met": low <= rate <= high,
                    }


# Families ---------------------------------------------------------------------------------------


def family_rows(sets: int, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    """5 vectors x 4 outcomes against one base arm: cells that share the base, paired tests."""
    _, high = band(sets, LEVEL)
    any_false = dict.fromkeys(CORRECTIONS, 0)
    false_share = dict.fromkeys(CORRECTIONS, 0.0)
    for _ in range(sets):
        arms = np.round(2 * (generator.normal(size=(6, 50, 4)) + generator.normal(size=(1, 50, 4))))
        half = arms.copy()
        half[1:, :, :2] += 2  # every vector moves two of the four outcomes
        for data, planted in ((arms, False), (half, True)):
            p = np.array(
                [
                    [effects.paired_permutation(data[0, :, o], data[v, :, o]) for o in range(4)]
                    for v in range(1, 6)
                ]
            )
            for name, adjust in CORRECTIONS.items():
                rejected = adjust(p.ravel()).reshape(p.shape) <= LEVEL
                if planted:
                    false_share[name] += rejected[:, 2:].sum() / max(rejected.sum(), 1)
                else:
                    any_false[name] += bool(rejected.any())
    for name in CORRECTIONS:
        rate = any_false[name] / sets
        yield {
            "kind": "family",
            "what": f"any of 20 null cells, {name}",
            "data": "counts",
            "n": 50,
            "rate": rate,
            "target": "" if name == "none" else f"<= {high:.3f}",
            "met": None if name == "none" else rate <= high,
        }
    rate = false_share["bh"] / sets
    yield {
        "kind": "family",
        "what": "false share of rejections, bh, half the cells planted",
        "data": "counts",
        "n": 50,
        "rate": rate,
        "target": f"<= {LEVEL:.3f}",
        "met": rate <= LEVEL,
    }


def axis_rows(sets: int, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    """The two nulls of the behaviour axis, each on data for which it is true."""
    sets = max(40, sets // 10)
    low, high = band(sets, LEVEL)
    rejected = {NOTHING: 0, INDEPENDENT: 0}
    for number in range(sets):
        arms = generator.normal(size=(6, 50, 4)) + generator.normal(size=(1, 50, 4))
        moved = arms.copy()
        moved[1:] += (generator.choice([-1.0, 1.0], size=(5, 4)) * generator.uniform(1, 3, (5, 4)))[
            :, None
        ]
        for name, data in ((NOTHING, arms), (INDEPENDENT, moved)):
            found = behaviour_axis(data, draws=199, resamples=1, seed=number)
            rejected[name] += found.nulls[name].p_value <= LEVEL
    for name, count in rejected.items():
        rate = count / sets
        yield {
            "kind": "axis",
            "what": f"first component, {name}",
            "data": "normal",
            "n": 50,
            "rate": rate,
            "target": f"{low:.3f} to {high:.3f}",
            "met": low <= rate <= high,
            "sets": sets,
        }


# The page ---------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    met = {True: "yes", False: "NO", None: ""}[row["met"]]
    return (
        f"| {row['kind']} | {row['what']} | {row['data']} | {row['n']} | {row['sets']} | "
        f"{row['rate']:.3f} | {row['target']} | {met} |"
    )


HEAD = (
    "| kind | what | data | items | data sets | share | target | met |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="150 data sets instead of 2,000")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sets = QUICK_SETS if options.quick else SETS
    generator = np.random.default_rng(options.seed)
    started = time.perf_counter()
    versions = {name: version(name) for name in ("numpy", "scipy")} | {
        "python": platform.python_version()
    }
    rows: list[dict[str, Any]] = []
    print("\n".join(HEAD))
    for maker in (test_rows, clustered_rows, interval_rows, family_rows, axis_rows):
        for row in maker(sets, generator):
            row = {
                "row": "calibration", "sets": sets, "seed": options.seed,
                **row, "met": None if row["met"] is None else bool(row["met"]),
                "rate": float(row["rate"]), "versions": versions,
            }  # fmt: skip
            rows.append(row)
            print(line(row), flush=True)
    missed = [row for row in rows if row["met"] is False]
    print(f"{len(rows)} rows, {len(missed)} outside, {time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.table:
        command = "python benchmarks/calibration.py --table FILE" + (
            " --quick" if options.quick else ""
        )
        page = [f"Written by `{command}` (seed {options.seed}).", "", *HEAD, *map(line, rows), ""]
        options.table.write_text("\n".join(page))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
