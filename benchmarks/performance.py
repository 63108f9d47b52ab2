"""One page of every timed row: what was aimed at, what was reached, and what was missed.

`python -m benchmarks.performance [--table docs/performance.md]`

Nothing is measured here. The rows are those of `benchmarks/results/`, each file written by
`python -m benchmarks.NAME --json benchmarks/results/NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
TIMED = (
    "hook_overhead",
    "weight_edits",
    "feature_statistics",
    "geometry",
    "footprint",
    "score_features",
    "side_effects",
    "learning_report",
    "dose_batch",
    "rollout_throughput",
    "killed_runs",
    "import_time",
)
Row = Mapping[str, Any]


def results() -> dict[str, list[Row]]:
    """The committed rows of every timed benchmark."""
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in TIMED}


def page(timed: Mapping[str, Sequence[Row]]) -> str:
    """The targets met and missed, then every row of every benchmark."""
    aimed = [(name, row) for name, rows in timed.items() for row in rows if row["met"] is not None]
    missed = [
        f"- {name} {row['row']}, {row['what']} ({row['shapes']}): {number(row['ratio'])} of "
        f"{number(row['target'])}"
        for name, row in aimed
        if not row["met"]
    ]
    text = [
        "# How fast",
        "",
        "Written by `python -m benchmarks.performance --table docs/performance.md` from the rows "
        "in `benchmarks/results/`, which `python -m benchmarks.NAME --json "
        "benchmarks/results/NAME.json` writes.",
        "",
        "A row is a ratio of process CPU time on one thread (memory where it says so), both sides "
        "in one process in shuffled rounds, after their answers were compared; smaller is better. "
        "`+-` is the spread over rounds, `differ` the largest difference of the answers, `growth` "
        "the exponent over sizes. Rows without a target are the naive way, a peer, or a floor.",
        "",
        f"{len(aimed) - len(missed)} of {len(aimed)} targets are met. Missed:",
        "",
        *missed,
        "",
    ]
    for name, rows in timed.items():
        text += [
            f"## {name}",
            "",
            "| row | what | shapes | ratio | +- | target | met | growth | differ |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *(line(row) for row in rows),
            "",
            f"{given(rows[0]['versions'])}.",
            "",
        ]
    return "\n".join(text)


def line(row: Row) -> str:
    met = {True: "yes", False: "no", None: ""}[row["met"]]
    cells = [
        row["row"],
        row["what"],
        row["shapes"],
        number(row["ratio"]) if row["ratio"] else "",
        number(row["spread"]),
        number(row["target"]),
        met,
        "" if row["exponent"] is None else f"{row['exponent']:+.2f}",
        "" if row["max_abs_error"] is None else f"{row['max_abs_error']:.1g}",
    ]
    return f"| {' | '.join(cells)} |"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 0.1 else f"{value:.3f}"


def given(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", type=Path, help="write the Markdown page to this file")
    text = page(results())
    sys.stdout.write(text)
    if table := parser.parse_args().table:
        table.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
