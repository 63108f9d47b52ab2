"""The pages of `benchmarks/study.py`'s studies are what their commands wrote, and nothing else."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.study import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["curved_concepts", "unlearning"])
def test_the_page_is_what_the_rows_say(name):
    rows = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    written = (ROOT / f"docs/{name}.md").read_text()
    assert importlib.import_module(f"benchmarks.{name}").page(rows) == written


def test_a_study_writes_rows_and_page_where_it_is_told(tmp_path, monkeypatch, capsys):
    rows, table = tmp_path / "a" / "rows.json", tmp_path / "page.md"
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--json", str(rows), "--table", str(table)])
    main("x", lambda quick: {"quick": quick}, lambda found: f"quick: {found['quick']}\n")
    assert json.loads(rows.read_text()) == {"quick": True}
    assert table.read_text() == "quick: True\n" and "quick: True" in capsys.readouterr().out
