import json

import numpy as np
import pandas as pd
import pytest

from sae_steering_plugin.runs.labelled_texts import read_labelled, world_statements


def written(tmp_path, text, name="posts.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(tmp_path, rows):
    return written(tmp_path, "\n".join(json.dumps(row) for row in rows), "posts.jsonl")


def same(found, expected):
    assert list(found.labels) == list(expected)
    for name, column in expected.items():
        assert np.array_equal(found.labels[name], np.array(column, float), equal_nan=True)


TABLE = pd.DataFrame({"text": ["one", "two", "three"], "label": ["a", "b", None]})


def test_every_distinct_label_is_a_concept_and_a_blank_one_is_unknown(tmp_path):
    TABLE.to_csv(tmp_path / "t.csv", index=False)
    TABLE.to_parquet(tmp_path / "t.parquet")
    TABLE.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    for name in ("t.csv", "t.parquet", "t.jsonl"):
        found = read_labelled(tmp_path / name)
        assert found.texts == ("one", "two", "three")
        same(found, {"a": [1, 0, np.nan], "b": [0, 1, np.nan]})
        assert found.notes == ("1 of 3 texts have no label and count for no concept",)


def test_list_columns_give_several_concepts_per_text(tmp_path):
    rows = [
        {"text": "x", "tags": ["a", "b"]},
        {"text": "y", "tags": ["b"]},
        {"text": "z", "tags": []},
    ]
    expected = {"a": [1, 0, 0], "b": [1, 1, 0]}
    same(read_labelled(jsonl(tmp_path, rows), label="tags"), expected)
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    same(read_labelled(tmp_path / "t.parquet", label="tags"), expected)
    path = written(tmp_path, "text,tags\nx,a | b\ny,b\nz,c\n")
    same(
        read_labelled(path, label="tags", separator="|"),
        {"a": [1, 0, 0], "b": [1, 1, 0], "c": [0, 0, 1]},
    )


def test_concept_columns_hold_yes_no_or_nothing(tmp_path):
    path = written(tmp_path, "body,id,joy,fear\nx,1,1,no\ny,2,0,yes\nz,3,,TRUE\n")
    found = read_labelled(path, text="body", concepts=("joy", "fear"), group="id")
    same(found, {"joy": [1, 0, np.nan], "fear": [0, 1, 1]})
    assert found.groups == ("1", "2", "3")
    assert found.notes == ("1 of 3 labels of 'joy' are blank",)


def test_without_a_choice_the_other_columns_are_concepts(tmp_path):
    same(read_labelled(written(tmp_path, "text,joy\nx,1\ny,0\n")), {"joy": [1, 0]})


def test_line_breaks_inside_a_cell_do_not_shift_the_line(tmp_path):
    path = written(tmp_path, 'text,joy\n"two\nlines",1\ny,maybe\n')
    with pytest.raises(ValueError, match=r"posts.csv:4: column 'joy' holds 'maybe'"):
        read_labelled(path)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("text,lable\nx,a\n", {"label": "label"}, "no column 'label'; did you mean 'lable'"),
        ("words,label\nx,a\n", {}, "no column 'text'"),
        ("text,label\n ,a\nx,b\n", {}, r"posts.csv:2: field 'text' is empty"),
        ("text,joy\nx,2\n", {"concepts": ("joy",)}, r"posts.csv:2: column 'joy' holds '2'"),
        ("text,label\nx,a\ny,b\nx,b\n", {}, r"posts.csv:4: this text stands at .*:2 too"),
        ("text,label\nx,\ny,\n", {}, "column 'label' holds no label"),
        ("text,label\nx,a\ny,a\n", {}, "no concept has texts with and texts without it"),
        ("text,joy\nx,1\ny,1\n", {}, "'joy': 2 with, 0 without"),
        ("text\nx\n", {}, "no column of labels beside 'text'"),
        ("text,label,label\nx,a,b\n", {}, "column 'label' occurs twice"),
        ("text,label\nx\n", {}, r"posts.csv:2: 1 cells under 2 column names"),
        ("text,label\na,1\nb,2\nc,3\nd,4\ne,5\n", {}, "that is a text or an id, not a label"),
        ("text,a\nx,1\n", {"label": "a", "concepts": ("a",)}, "not both"),
    ],
)
def test_a_bad_file_is_refused_with_place_and_reason(tmp_path, content, options, message):
    with pytest.raises(ValueError, match=message):
        read_labelled(written(tmp_path, content), **options)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"read from .csv, .jsonl, .parquet"):
        read_labelled(written(tmp_path, "x", "posts.txt"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_labelled(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="is no parquet file"):
        read_labelled(written(tmp_path, "text", "posts.parquet"))
    with pytest.raises(ValueError, match=r"jsonl:1: column 'tags' must hold labels .* object"):
        read_labelled(jsonl(tmp_path, [{"text": "x", "tags": {"a": 1}}]), label="tags")
    with pytest.raises(ValueError, match=r"posts.jsonl:2: column 'text' is missing"):
        read_labelled(jsonl(tmp_path, [{"text": "x", "label": "a"}, {"label": "b"}]))


def test_the_worlds_statements_are_labelled_texts():
    found = world_statements(60)
    assert len(found.texts) == len(found.groups) == 60
    assert (found.labels["register=pirate"] + found.labels["register=plain"] == 1).all()
