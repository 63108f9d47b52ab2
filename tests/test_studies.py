"""Pages of results are what their commands wrote, and nothing else."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import performance

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["curved_concepts", "unlearning"])
def test_the_page_is_what_the_rows_say(name):
    rows = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    written = (ROOT / f"docs/{name}.md").read_text()
    assert importlib.import_module(f"benchmarks.{name}").page(rows) == written


def test_the_page_of_timings_is_what_their_rows_say():
    assert performance.page(performance.results()) == (ROOT / "docs/performance.md").read_text()


def test_every_timed_benchmark_is_on_the_page():
    """A file of results whose rows are ratios to a target belongs there."""
    found = set()
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        rows = json.loads(path.read_text())
        if isinstance(rows, list) and "wall_ratio" in rows[0]:
            found.add(path.stem)
    assert found == set(performance.TIMED)
