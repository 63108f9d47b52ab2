"""How long the package takes to start: imported alone, imported after the hosts, and the command's
help; and that SAELens reads a steering dictionary whichever package was imported first.

    python benchmarks/import_time.py [--quick] [--json FILE]

Rows 9a and 9b of the target table. Each figure is CPU seconds of a fresh interpreter, divided by
the limit; the import after the hosts is timed in forks of one interpreter that has loaded them.
`--quick` leaves out the floors (`import torch`, the two hosts).
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import resource  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
from statistics import median  # noqa: E402

from benchmarks.timing import ROUNDS, Report, main  # noqa: E402

ALONE, AFTER, HELP = 0.03, 0.02, 0.3
"""Limits in seconds: the import alone, after the hosts, and `sae-steer --help`."""

IMPORTED = """
import json, sys, time
wall, cpu = time.perf_counter(), time.process_time()
import {name}
print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall, len(sys.modules),
                  sorted({{"torch", "sae_lens", "transformer_lens"}} & set(sys.modules))]))
"""

FORKED = """
import json, os, time, warnings
warnings.filterwarnings("ignore")
import transformer_lens, sae_lens
for _ in range({rounds}):
    read, write = os.pipe()
    if not os.fork():
        wall, cpu = time.perf_counter(), time.process_time()
        import sae_steering_plugin
        found = [time.process_time() - cpu, time.perf_counter() - wall]
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.wait()
    print(os.read(read, 1000).decode())
"""

WRITE = """
import torch
from sae_steering_plugin import Recipe, SteeringDictionary, SteeringVector
vector = SteeringVector(torch.arange(8.0) + 1, "blocks.0.hook_resid_post", Recipe("given"), "one")
SteeringDictionary.from_vectors([vector]).save_model({folder!r})
"""

READ = """
import json, warnings
warnings.filterwarnings("ignore")
import {first}
import {second}
from sae_lens import SAE
sae = SAE.load_from_disk({folder!r})
print(json.dumps([type(sae).__name__, sae.W_dec.detach().flatten().tolist()]))
"""


def run(*arguments: str) -> tuple[str, float]:
    """What a fresh interpreter prints, and the CPU seconds it took from start to end."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    # an installed package has its bytecode beside it
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**kept, "PYTHONPATH": path},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def last_line(source: str) -> list:
    return json.loads(run("-c", source)[0].strip().splitlines()[-1])


def measure(report: Report) -> None:
    rounds = ROUNDS if report.quick else 9
    floors = [] if report.quick else ["torch", "transformer_lens", "sae_lens"]
    imports: dict[str, list[list]] = {name: [] for name in ["sae_steering_plugin", *floors]}
    commands: dict[str, list[float]] = {"help": [], "python": [], "typer": []}
    sources = {
        "help": ("-m", "sae_steering_plugin.cli", "--help"),
        "python": ("-c", "pass"),
        "typer": ("-c", "import typer"),
    }
    order = random.Random(0)
    jobs = [*imports, *commands]
    for number in range(-1, rounds):
        order.shuffle(jobs)
        for job in jobs:
            if job in imports and (number < 3 or job not in floors):
                found = last_line(IMPORTED.format(name=job))
                if number >= 0:
                    imports[job].append(found)
            elif job in commands:
                text, seconds = run(*sources[job])
                if job == "help":
                    report.same("--help lists the commands", "generate" in text)
                if number >= 0:
                    commands[job].append(seconds)
    alone = imports["sae_steering_plugin"]
    report.same("the import alone loads no host", not alone[0][3])
    limit(report, "9a", "import alone", [f[0] for f in alone], [f[1] for f in alone], ALONE)
    forked = run("-c", FORKED.format(rounds=rounds))[0].strip().splitlines()
    after = [json.loads(line) for line in forked[-rounds:]]
    limit(
        report, "9a", "import after the hosts", [f[0] for f in after], [f[1] for f in after], AFTER
    )
    for name in floors:
        seconds = [found[0] for found in imports[name]]
        limit(
            report,
            "9a",
            f"  floor: import {name}",
            seconds,
            [f[1] for f in imports[name]],
            ALONE,
            False,
        )
    limit(report, "9b", "sae-steer --help, the whole process", commands["help"], None, HELP)
    limit(report, "9b", "  floor: import typer", commands["typer"], None, HELP, False)
    limit(report, "9b", "  floor: python -c pass", commands["python"], None, HELP, False)
    either_order(report)


def limit(
    report: Report,
    row: str,
    what: str,
    cpu: list[float],
    wall: list[float] | None,
    seconds: float,
    judged: bool = True,
) -> None:
    """A row whose ratio is CPU seconds over the limit."""
    report.add(
        row,
        f"{what} / {seconds} s",
        median(cpu) / seconds,
        target=1.0 if judged else None,
        seconds=median(cpu),
        wall_ratio=None if wall is None else median(wall) / seconds,
        shapes=f"{median(cpu) * 1e3:.1f} ms",
        dtype="",
    )


def either_order(report: Report) -> None:
    """SAELens reads a steering dictionary whichever of the two was imported first."""
    with tempfile.TemporaryDirectory() as folder:
        run("-c", WRITE.format(folder=folder))
        names = ("sae_steering_plugin", "sae_lens")
        for first, second in (names, names[::-1]):
            found = last_line(READ.format(first=first, second=second, folder=folder))
            expected = ["SteeringDictionary", [float(i) for i in range(1, 9)]]
            report.same(f"load_from_disk, {first} first", found == expected)
    report.notes.append("SAE.load_from_disk read a steering dictionary in both import orders")


if __name__ == "__main__":
    main("import_time", measure, machine=False)
