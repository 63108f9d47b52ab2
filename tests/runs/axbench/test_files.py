"""AxBench's files: read as they are, checked row by row, written and read again."""

import json
from collections import Counter

import pandas as pd
import pytest

from sae_steering_plugin.runs.axbench.files import (
    SHARED,
    ConceptSet,
    Neuronpedia,
    drawn_instructions,
    own_instructions,
    read_axbench,
    read_instructions,
)
from tests.hosts import tiny_sae
from tests.runs.axbench.sets import LINK, axbench_folder, row, small_set

COUNTS = {
    "concept10/prod_2b_l10_v1": (936, 770, 50, 10),
    "concept10/prod_9b_l20_v1": (936, 760, 40, 10),
    "conceptFD/prod_2b_l10_v1": (1440, 1298, 74, 17),
}


@pytest.mark.parametrize("name", COUNTS)
def test_axbench_data_has_its_documented_rows_and_survives_a_round_trip(name, data, tmp_path):
    found = read_axbench(axbench_folder(data, name))
    train, held, hard, concepts = COUNTS[name]
    assert (len(found.train), len(found.evaluation), len(found)) == (train, held, concepts)
    assert found.counts()["evaluation hard negative"] == hard
    assert found.counts()["evaluation positive"] == 36 * concepts
    assert all(len(found.training(one.concept_id)) == 144 for one in found.concepts)
    again = read_axbench(found.write(tmp_path))
    pd.testing.assert_frame_equal(again.train, found.train)
    pd.testing.assert_frame_equal(again.evaluation, found.evaluation)
    assert again.concepts == found.concepts
    assert [again.fingerprint(i) for i in range(concepts)] == [
        found.fingerprint(i) for i in range(concepts)
    ]


def test_a_list_of_concepts_alone_says_that_it_holds_no_texts(data):
    folder = axbench_folder(data, "concept500_concepts")
    found = read_axbench(folder / "prod_2b_l10_v1.metadata.jsonl")
    assert len(found) == 500 and not len(found.train)
    assert found.concept(0).address == Neuronpedia("gemma-2-2b", "10-gemmascope-res-16k", 14874)
    with pytest.raises(ValueError, match="has no positive training text: this is a list of conc"):
        found.training(0)


def test_shared_negatives_go_to_the_concepts_of_their_genre_alone(tmp_path):
    found = read_axbench(small_set().write(tmp_path))
    for number, genre in ((0, "text"), (1, "code")):
        rows = found.training(number)
        assert Counter(rows["category"]) == {"positive": 3, "negative": 3}
        assert set(rows["concept_genre"]) == {genre}
    assert set(found.only([1]).train["concept_id"]) == {1, SHARED}


def test_negatives_of_ones_own_carry_their_concepts_number(tmp_path):
    made = small_set()
    own = pd.DataFrame([row(0, "concept 0", "other", "negative", 9)])
    mixed = ConceptSet(made.concepts, pd.concat([made.train, own]), made.evaluation)
    found = read_axbench(mixed.write(tmp_path))
    assert len(found.training(0)) == 7 and len(found.training(1)) == 6


def test_a_fingerprint_changes_with_a_shared_negative_and_not_with_another_concepts_text():
    made = small_set()
    before = [made.fingerprint(i) for i in (0, 1)]
    made.train.loc[0, "output"] = "a shared negative of genre text"
    assert made.fingerprint(0) != before[0] and made.fingerprint(1) == before[1]


def test_files_may_lie_where_axbench_leaves_them_and_pickles_are_not_opened(tmp_path):
    small_set().write(tmp_path)
    for folder, names in (
        ("generate", ("metadata.jsonl", "train_data.parquet")),
        ("inference", ("latent_eval_data.parquet",)),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / name).rename(tmp_path / folder / name)
        (tmp_path / folder / "state.pkl").write_bytes(b"not a pickle")
    assert read_axbench(tmp_path).counts() == small_set().counts()


def test_rotated_files_are_read_in_the_order_of_their_numbers(tmp_path):
    made = small_set()
    made.write(tmp_path)
    (tmp_path / "train_data.parquet").unlink()
    for number, rows in ((10, made.train[6:]), (2, made.train[:6])):
        rows.to_parquet(tmp_path / f"train_data_{number}.parquet", index=False)
    pd.testing.assert_frame_equal(read_axbench(tmp_path).train, made.train, check_dtype=False)


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("category", "neutral", r"train_data.parquet, row 6: category is 'neutral'"),
        ("concept_id", 7, r"row 6: concept_id 7 is not in the concept list"),
        ("output", " ", r"row 6: 'output' is ' ', not a text"),
        ("output_concept", "else", r"row 6: a positive row of concept 0 names the concept 'else'"),
        ("concept_id", -1, r"row 6: a shared row \(concept -1\) is 'positive'"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_number(column, value, message, tmp_path):
    made = small_set()
    made.train.loc[6, column] = value
    made.write(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_axbench(tmp_path)


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("sae_link", LINK.format(5), "sae_link is .*, and the list says"),
        ("sae_id", 4, "row 0: sae_id is 4, and sae_link says"),
    ],
)
def test_an_evaluation_row_of_another_feature_is_refused(column, value, message, tmp_path):
    made = small_set()
    made.evaluation.loc[0, column] = value
    made.write(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_axbench(tmp_path)


def test_missing_columns_numbers_and_sides_are_refused(tmp_path):
    made = small_set()
    made.write(tmp_path)
    path = tmp_path / "train_data.parquet"
    made.train.drop(columns="category").to_parquet(path)
    with pytest.raises(ValueError, match="no column 'category'; there are input, output"):
        read_axbench(tmp_path)
    made.train.assign(concept_id=0.5).to_parquet(path)
    with pytest.raises(ValueError, match="'concept_id' is float64, not whole numbers"):
        read_axbench(tmp_path)
    made.train[made.train["concept_id"] != 1].to_parquet(path)
    with pytest.raises(ValueError, match="concept 1 .code. has no positive training text"):
        read_axbench(tmp_path)
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        read_axbench(tmp_path)


@pytest.mark.parametrize(
    "line, message",
    [
        ({"concept_id": "0", "concept": "a"}, "line 1: 'concept_id' is '0', not a whole number"),
        ({"concept_id": 0, "concept": ""}, "'concept' is '', not a text"),
        ({"concept_id": 0, "concept": "a", "ref": "x/y"}, "is no feature address"),
    ],
)
def test_a_bad_line_of_the_concept_list_is_refused(line, message, tmp_path):
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message):
        read_axbench(tmp_path)


def test_a_folder_without_a_list_and_a_concept_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no metadata.jsonl"):
        read_axbench(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_axbench(tmp_path / "nowhere")
    with pytest.raises(KeyError, match="no concept 9"):
        small_set().concept(9)


def test_a_feature_number_is_refused_for_another_sae():
    sae = tiny_sae(d_sae=32)
    address = Neuronpedia.of(LINK.format(5))
    with pytest.raises(ValueError, match="names no neuronpedia_id"):
        address.in_sae(sae)
    sae.cfg.metadata.neuronpedia_id = "tiny/1-other-res"
    with pytest.raises(ValueError, match="belongs to 'tiny/0-test-res'.*says 'tiny/1-other-res'"):
        address.in_sae(sae)
    sae.cfg.metadata.neuronpedia_id = "tiny/0-test-res"
    assert address.in_sae(sae) == 5
    with pytest.raises(ValueError, match="has 32 features, not 99"):
        Neuronpedia.of(LINK.format(99)).in_sae(sae)


def test_instructions_are_drawn_as_pandas_draws_rows_in_file_order(tmp_path):
    rows = [{"instruction": f"do {i}", "output": "", "dataset": "x"} for i in range(50)]
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(rows))
    pool = read_instructions(path)
    frame = pd.DataFrame(rows)
    for number in (0, 7):
        expected = frame.sample(10, random_state=number)["instruction"].tolist()
        assert list(drawn_instructions(pool, 10, number)) == expected
    assert drawn_instructions(pool[::-1], 10, 0) != drawn_instructions(pool, 10, 0)
    with pytest.raises(ValueError, match="60 instructions are asked for and there are 50"):
        drawn_instructions(pool, 60, 0)


def test_instruction_files_of_other_forms_and_broken_ones(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\n\ntwo\n")
    assert read_instructions(text) == ("one", "two")
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"instruction": "one"}\n{"prompt": "two"}\n')
    with pytest.raises(ValueError, match="line 2: 'instruction' is None"):
        read_instructions(lines)
    broken = tmp_path / "a.json"
    broken.write_text("{}")
    with pytest.raises(ValueError, match="holds a dict, not a list"):
        read_instructions(broken)


def test_without_alpaca_eval_the_negative_inputs_serve_and_no_positive_ones():
    made = small_set()
    made.evaluation.loc[made.evaluation["category"] == "positive", "input"] = "never this"
    assert own_instructions(made) == ("say 0", "say 1", "say 2")
