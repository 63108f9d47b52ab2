"""Every notebook runs on the embedded model, names its model in one cell, is stored clean."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EMBEDDED = "agent-"


def model_cells(notebook):
    return [cell for cell in notebook.cells if "model" in cell.metadata.get("tags", [])]


def stored_errors(notebook):
    return [
        f"{output.ename}: {output.evalue}"
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]


def check(notebook):
    """Raise AssertionError unless the notebook has one model cell and no stored error."""
    cells = model_cells(notebook)
    assert len(cells) == 1, f"{len(cells)} cells carry the tag 'model'; exactly one must"
    assert EMBEDDED in cells[0].source, "the stored model line must name an embedded model"
    assert not stored_errors(notebook), stored_errors(notebook)


def test_there_are_notebooks():
    assert NOTEBOOKS
    assert all(path.stem[:2].isdigit() and path.stem[2] == "_" for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_on_the_embedded_model(path, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    check(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert all(cell.execution_count for cell in code), "commit the notebook with its outputs"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    assert not stored_errors(notebook)


def written(*cells):
    return nbformat.v4.new_notebook(cells=list(cells))


def code_cell(source, *tags, outputs=()):
    cell = nbformat.v4.new_code_cell(source, outputs=list(outputs))
    cell.metadata["tags"] = list(tags)
    return cell


def test_a_notebook_without_a_model_line_fails():
    with pytest.raises(AssertionError, match="0 cells carry the tag 'model'"):
        check(written(code_cell("1 + 1")))
    with pytest.raises(AssertionError, match="must name an embedded model"):
        check(written(code_cell("MODEL = 'gpt2'", "model")))


def test_a_notebook_with_a_stored_error_fails():
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
    with pytest.raises(AssertionError, match="ValueError: no"):
        check(written(code_cell("MODEL = 'agent-gpt2'", "model", outputs=[error])))
