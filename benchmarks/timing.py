"""Timing shared by the benchmarks: one thread, shuffled interleaving, ratios of CPU time.

Two things timed in one run are compared by the median over rounds of the ratio of their *process
CPU times*: with one thread it does not see the neighbours' load, as wall-clock time does. Answers
are compared before anything is timed; a disagreement makes the benchmark exit with 1, a missed
target does not.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import platform  # noqa: E402
import random  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from importlib.metadata import PackageNotFoundError, version  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from typing import Any  # noqa: E402

ROUNDS = 5
VERSIONED = ("torch", "transformer-lens", "sae-lens", "transformers", "numpy")


class Clock:
    """CPU and wall seconds of what runs inside `with clock:`, added up."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self._start = (0.0, 0.0)

    def __enter__(self) -> Clock:
        self._start = (time.process_time(), time.perf_counter())
        return self

    def __exit__(self, *error: object) -> None:
        self.cpu += time.process_time() - self._start[0]
        self.wall += time.perf_counter() - self._start[1]


Variant = Callable[[Clock], Any]
"""Does one round's work, the part that counts inside `with clock:`."""


@dataclass(frozen=True)
class Times:
    """Seconds per round of each variant."""

    cpu: Mapping[str, Sequence[float]]
    wall: Mapping[str, Sequence[float]]

    def ratio(self, one: str, other: str) -> float:
        """Median over rounds of the ratio of CPU times."""
        return median(a / b for a, b in zip(self.cpu[one], self.cpu[other], strict=True))

    def wall_ratio(self, one: str, other: str) -> float:
        return median(a / b for a, b in zip(self.wall[one], self.wall[other], strict=True))

    def spread(self, one: str, other: str) -> float:
        """Half the interquartile range of the CPU ratios: how far one round strays."""
        found = sorted(a / b for a, b in zip(self.cpu[one], self.cpu[other], strict=True))
        return (found[(3 * len(found)) // 4] - found[len(found) // 4]) / 2

    def seconds(self, name: str) -> float:
        return median(self.cpu[name])


def whole(function: Callable[[], Any]) -> Variant:
    """A variant all of whose work counts."""

    def variant(clock: Clock) -> Any:
        with clock:
            return function()

    return variant


def interleaved(
    variants: Mapping[str, Variant], *, rounds: int = ROUNDS, seed: int = 0, warm_up: int = 1
) -> Times:
    """Run every variant once a round, in an order shuffled anew each round."""
    order = random.Random(seed)
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    wall: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(-warm_up, rounds):
        order.shuffle(names)
        for name in names:
            clock = Clock()
            variants[name](clock)
            if number >= 0:
                cpu[name].append(clock.cpu)
                wall[name].append(clock.wall)
    return Times(cpu, wall)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Least-squares slope of log seconds on log size. Raises ValueError under a factor of 8."""
    import numpy as np

    if max(sizes) < 8 * min(sizes):
        raise ValueError(
            f"growth needs sizes a factor of 8 apart, not {min(sizes)} to {max(sizes)}"
        )
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


@dataclass(eq=False)
class Report:
    """The rows of one benchmark, and whether the answers agreed.

    The targets of the rows in `full_size` hold for the sizes of a full run and are left out of a
    quick one.
    """

    name: str
    quick: bool
    full_size: frozenset[str] = frozenset()
    rows: list[dict[str, Any]] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def agree(self, what: str, ours: Any, theirs: Any, tolerance: float) -> float:
        """The largest absolute difference; one above `tolerance` is a disagreement."""
        error = float((ours.double() - theirs.double()).abs().max())
        if not error <= tolerance:
            self.disagreements.append(f"{what}: differs by {error:.2e}, tolerance {tolerance:.0e}")
        return error

    def same(self, what: str, equal: bool) -> None:
        """Records a disagreement unless `equal`."""
        if not equal:
            self.disagreements.append(f"{what}: not equal")

    def add(
        self,
        row: str,
        what: str,
        ratio: float,
        *,
        target: float | None = None,
        seconds: float | None = None,
        wall_ratio: float | None = None,
        spread: float | None = None,
        exponent: float | None = None,
        error: float | None = None,
        shapes: str = "",
        dtype: str = "float32",
    ) -> None:
        """One line. `ratio <= target` is what `met` says; without a target the line is context."""
        if self.quick and row in self.full_size:
            target = None
        self.rows.append(
            {
                "row": row,
                "what": what,
                "ratio": ratio,
                "target": target,
                "met": None if target is None else bool(ratio <= target),
                "exponent": exponent,
                "max_abs_error": error,
                "shapes": shapes,
                "dtype": dtype,
                "threads": 1,
                "seconds": seconds,
                "wall_ratio": wall_ratio,
                "spread": spread,
                "versions": versions(),
            }
        )

    def compare(
        self, row: str, what: str, times: Times, one: str, other: str, **fields: Any
    ) -> float:
        """`add` with everything that the times tell; gives back the ratio."""
        ratio = times.ratio(one, other)
        self.add(
            row,
            what,
            ratio,
            seconds=times.seconds(one),
            wall_ratio=times.wall_ratio(one, other),
            spread=times.spread(one, other),
            **fields,
        )
        return ratio

    def judged(self, measure: Callable[[], Times], one: str, other: str, target: float) -> Times:
        """Times of `measure`, taken a second time when the first misses the target."""
        times = measure()
        if times.ratio(one, other) <= target or self.quick:
            return times
        again = measure()
        return again if again.ratio(one, other) < times.ratio(one, other) else times

    def print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        console = Console(width=None if sys.stdout.isatty() else 150)
        table = Table(title=f"{self.name}: ratio of CPU time, one thread; smaller is better")
        for heading in ("row", "what", "ratio", "+-", "wall", "target", "met", "growth", "error"):
            right = heading not in ("row", "what", "met")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        marks = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}
        for row in self.rows:
            table.add_row(
                row["row"],
                f"{row['what']} [dim]{row['shapes']}[/]",
                _number(row["ratio"], "{:.3f}"),
                _number(row["spread"], "{:.3f}"),
                _number(row["wall_ratio"], "{:.3f}"),
                _number(row["target"], "<= {:g}"),
                marks[row["met"]],
                _number(row["exponent"], "{:+.2f}"),
                _number(row["max_abs_error"], "{:.1e}"),
            )
        console.print(table)
        for note in self.notes:
            console.print(note, markup=False)
        for line in self.disagreements:
            console.print(f"ANSWERS DISAGREE  {line}", style="red", markup=False)
        took = time.perf_counter() - self.started
        console.print(f"{took:.0f} s, load {os.getloadavg()[0]:.1f}, {versions()}", markup=False)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("sae-steering-plugin", *VERSIONED):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def ceilings(quick: bool) -> dict[str, float]:
    """The machine's own limits, one thread: GFLOP/s of matrix products, GB/s of reading memory."""
    import torch

    def best(work: Callable[[], Any], amount: float) -> float:
        work()
        seconds = []
        for _ in range(3 if quick else 7):
            clock = Clock()
            with clock:
                work()
            seconds.append(clock.cpu)
        return amount / min(seconds) / 1e9

    n = 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    half = a.bfloat16(), b.bfloat16()
    matrix, vector = torch.randn(4096, 8192), torch.randn(8192)
    found = {
        "fp32 GEMM GFLOP/s": best(lambda: a @ b, 2 * n**3),
        "bf16 GEMM GFLOP/s": best(lambda: half[0] @ half[1], 2 * n**3),
        "memory read GB/s": best(lambda: matrix @ vector, matrix.nbytes),
    }
    if not quick:
        found["bf16 GEMM GFLOP/s, oneDNN held to AVX2"] = _bf16_without_amx()
    return found


def _bf16_without_amx() -> float:
    source = (
        "import time, torch; torch.set_num_threads(1)\n"
        "a = torch.randn(512, 512).bfloat16(); a @ a\n"
        "t = time.process_time(); a @ a; print(2 * 512**3 / (time.process_time() - t) / 1e9)"
    )
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", source], env=limited, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main(
    name: str,
    measure: Callable[[Report], None],
    *,
    full_size: Sequence[str] = (),
    machine: bool = True,
) -> None:
    """The command line of every benchmark: `[--quick] [--json FILE]`; exits 1 on disagreement."""
    parser = argparse.ArgumentParser(description=f"benchmark {name}")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, within a minute")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    report = Report(name, arguments.quick, frozenset(full_size))
    if machine:
        import torch

        torch.set_num_threads(1)
        limits = ceilings(arguments.quick)
        report.notes.append("ceilings: " + ", ".join(f"{k} {v:.0f}" for k, v in limits.items()))
    measure(report)
    report.print()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report.rows, indent=1) + "\n")
    sys.exit(1 if report.disagreements else 0)
