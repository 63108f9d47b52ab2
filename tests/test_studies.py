"""Pages of results are what their commands wrote, and nothing else."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["curved_concepts", "unlearning"])
def test_the_page_is_what_the_rows_say(name):
    rows = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    written = (ROOT / f"docs/{name}.md").read_text()
    assert importlib.import_module(f"benchmarks.{name}").page(rows) == written
