"""Training texts from files: sources by file and side, refusals with their line."""

import json

import pytest

from sae_steering_plugin.runs.learning_texts import read_sources


def test_lines_rows_and_pairs_become_sources(tmp_path):
    (tmp_path / "plain.txt").write_text("one\n\n  two  \n")
    (tmp_path / "rows.csv").write_text("text,other\nthree,x\n")
    pair = {"positive": "good", "negative": "bad"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    texts, sources = read_sources(
        [tmp_path / name for name in ("plain.txt", "rows.csv", "pairs.jsonl")]
    )
    assert texts == ["one", "two", "three", "good", "bad"]
    assert sources == ["plain", "plain", "rows", "pairs: positive", "pairs: negative"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "a.txt holds no text"),
        ("a.jsonl", '{"prompt": "x"}\n', r"a.jsonl:1: a row needs a field 'text'.*it has prompt"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', r"a.jsonl:2"),
        ("a.pdf", "x", "labelled texts are read from .csv, .jsonl, .parquet"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_sources([tmp_path / name])


def test_a_file_that_is_not_there_is_named(tmp_path):
    for name in ("a.txt", "a.csv"):
        with pytest.raises(FileNotFoundError, match=f"there is no file .*{name}"):
            read_sources([tmp_path / name])
    with pytest.raises(ValueError, match="no file of texts is given"):
        read_sources([])
