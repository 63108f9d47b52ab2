"""The files AxBench's analysis opens: documented columns, one judge, read back as written."""

import json

import numpy as np
import pandas as pd
import pytest

from sae_steering_plugin.runs.axbench.detection import detect
from sae_steering_plugin.runs.axbench.ratings import steering_score
from sae_steering_plugin.runs.axbench.writer import (
    axbench_name,
    judge_of,
    missing_columns,
    published_beside,
    read_evaluation,
    write_results,
)
from sae_steering_plugin.runs.judges.three import (
    AXBENCH_EVALUATOR,
    LLM_EVALUATOR,
    PROXY_EVALUATOR,
    RatedBy,
)
from tests.runs.axbench.sets import small_set

PROXY = RatedBy("offline", "1+a", "f" * 64, is_llm=False)
OWN_LLM = RatedBy("api:m@h", "1+b", "e" * 64, is_llm=True)
AXBENCH_LLM = RatedBy("api:m@h", "1+c", "d" * 64, is_llm=True, axbench_prompts=True)
FACTORS = (0.5, 1.0)


def rated_rows(judge: RatedBy, method: str = "diff_mean", seed: int = 0) -> pd.DataFrame:
    """Rows of two concepts, four instructions and two factors with drawn ratings."""
    rng = np.random.default_rng(seed)
    cells = [(c, i, f) for c in (0, 1) for f in FACTORS for i in range(4)]
    frame = pd.DataFrame(cells, columns=["concept_id", "input_id", "factor"])
    return frame.assign(
        method=method,
        dataset_name="tiny",
        original_prompt="say it",
        steered_input="say it",
        input="say it\n",
        generation=[f"text {n}" for n in range(len(cells))],
        perplexity=rng.random(len(cells)) + 1,
        strength=frame["factor"] * 3,
        **{
            name: rng.integers(0, 3, len(cells)).astype(float)
            for name in ("concept", "instruct", "fluency")
        },
        **judge.fields(),
        is_llm=judge.is_llm,
        axbench_prompts=judge.axbench_prompts,
    )


def latent_rows() -> pd.DataFrame:
    held = small_set().evaluation
    rows = held.assign(method="diff_mean", row=held.groupby("concept_id").cumcount())
    return rows.assign(
        score=np.arange(len(rows), dtype=float),
        max_index=1,
        max_token="a",
        acts=[[0.0, 1.0]] * len(rows),
        tokens=[["b", "a"]] * len(rows),
    )


def written(folder, judge=PROXY):
    latent = latent_rows()
    found = {
        (int(c), "diff_mean"): detect(part["score"].tolist(), part["category"].tolist())
        for c, part in latent.groupby("concept_id")
    }
    rated = rated_rows(judge)
    paths = write_results(folder, "run", small_set(), rated, latent, found, instructions=4)
    return rated, found, paths


def test_every_documented_file_and_column_is_written_in_one_folder_per_method(tmp_path):
    rated, _, paths = written(tmp_path)
    place = tmp_path / "run_diff_mean"
    assert {str(path.relative_to(place)) for path in paths} == {
        "inference/latent_data.parquet",
        "inference/steering_data.parquet",
        "evaluate/latent.jsonl",
        "evaluate/latent_data.parquet",
        "evaluate/steering.jsonl",
        "evaluate/steering_data.parquet",
        "evaluate/steering_test.jsonl",
        "evaluate/steering_test_data.parquet",
    }
    steering = pd.read_parquet(place / "inference" / "steering_data.parquet")
    latent = pd.read_parquet(place / "inference" / "latent_data.parquet")
    assert not missing_columns(steering, "diff_mean", "steering")
    assert not missing_columns(latent, "diff_mean", "latent")
    assert missing_columns(steering, "lora", "steering") == [
        f"LoRA_{name}" for name in ("steered_generation", "perplexity", "strength")
    ]
    keys = ["concept_id", "input_id", "factor"]
    assert len(steering) == len(rated)
    assert steering[keys].values.tolist() == sorted(steering[keys].values.tolist())


def test_ratings_read_back_give_the_score_they_were_written_with(tmp_path):
    rated, _, _ = written(tmp_path)
    place = tmp_path / "run_diff_mean" / "evaluate"
    for number, part in rated.groupby("concept_id"):
        lists = {
            mode: read_evaluation(place / f"{mode}.jsonl")[number][PROXY_EVALUATOR]["DiffMean"]
            for mode in ("steering", "steering_test")
        }
        chosen = int(np.argmax(lists["steering"]["lm_judge_rating"]))
        ratings = part[["concept", "instruct", "fluency"]].to_numpy()
        score = steering_score(
            number, "m", part["factor"].tolist(), part["input_id"].tolist(), ratings, instructions=4
        )
        assert lists["steering"]["factor"][chosen] == score.factor
        assert lists["steering_test"]["lm_judge_rating"][chosen] == pytest.approx(score.score)
        assert len(lists["steering"]["raw_fluency_ratings"]) == 4


def test_detection_read_back_is_what_was_found(tmp_path):
    _, found, _ = written(tmp_path)
    lines = read_evaluation(tmp_path / "run_diff_mean" / "evaluate" / "latent.jsonl")
    for number, results in lines.items():
        one = found[number, "diff_mean"]
        assert results["AUCROCEvaluator"]["DiffMean"]["roc_auc"] == one.auroc
        assert results["AUCROCEvaluator"]["DiffMean"]["optimal_threshold"] == one.threshold
        assert results["HardNegativeEvaluator"]["DiffMean"]["macro_avg_accuracy"] == (
            one.hard_accuracy
        )


@pytest.mark.parametrize(
    "judge, key",
    [(PROXY, PROXY_EVALUATOR), (OWN_LLM, LLM_EVALUATOR), (AXBENCH_LLM, AXBENCH_EVALUATOR)],
)
def test_only_a_language_model_under_axbench_prompts_writes_under_axbenchs_key(
    judge, key, tmp_path
):
    written(tmp_path, judge)
    evaluate = tmp_path / "run_diff_mean" / "evaluate"
    for mode in ("steering", "steering_test"):
        for results in read_evaluation(evaluate / f"{mode}.jsonl").values():
            assert set(results) == {"PerplexityEvaluator", key}
            rated = results[key]["DiffMean"]
            assert rated["judge_fingerprint"] == judge.fingerprint
            assert ("note" in rated) == (key != AXBENCH_EVALUATOR)
    frame = pd.read_parquet(evaluate / "steering_data.parquet")
    assert f"DiffMean_{key}_fluency_ratings" in frame.columns
    assert set(frame["judge_fingerprint"]) == {judge.fingerprint}


def test_two_judges_are_refused_in_one_table_and_in_one_folder(tmp_path):
    mixed = pd.concat([rated_rows(PROXY), rated_rows(OWN_LLM, "lat")])
    with pytest.raises(ValueError, match="ratings of one judge, and here are 2: offline"):
        judge_of(mixed)
    with pytest.raises(ValueError, match="ratings of one judge"):
        write_results(tmp_path, "run", small_set(), mixed, latent_rows(), {}, instructions=4)
    written(tmp_path, PROXY)
    written(tmp_path, PROXY)  # the same judge may write again
    with pytest.raises(ValueError, match="two judges do not share a table"):
        written(tmp_path, AXBENCH_LLM)


def test_published_scores_stand_beside_no_proxy():
    with pytest.raises(ValueError, match="offline proxy score, not an AxBench score"):
        published_beside(PROXY)
    with pytest.raises(ValueError, match="this project's own prompts, not an AxBench score"):
        published_beside(OWN_LLM)
    published_beside(AXBENCH_LLM)


def test_a_judge_without_fingerprint_or_asked_in_nobodys_words_is_refused():
    with pytest.raises(ValueError, match="has no fingerprint"):
        RatedBy("x", "1", "", is_llm=False)
    with pytest.raises(ValueError, match="no language model, so it was asked in nobody's words"):
        RatedBy("x", "1", "f", is_llm=False, axbench_prompts=True)
    with pytest.raises(ValueError, match="these rows are not rated: no column 'judge_name'"):
        judge_of(latent_rows())


def test_infinite_perplexity_is_null_in_json_and_infinite_in_the_table(tmp_path):
    rated = rated_rows(PROXY)
    rated.loc[0, "perplexity"] = np.inf
    write_results(tmp_path, "run", small_set(), rated, latent_rows().iloc[:0], {}, instructions=4)
    place = tmp_path / "run_diff_mean"
    text = (place / "evaluate" / "steering.jsonl").read_text()
    first = json.loads(text.splitlines()[0], parse_constant=pytest.fail)
    values = first["results"]["PerplexityEvaluator"]["DiffMean"]
    assert values["perplexity"][0] is None and values["perplexity"][1] is not None
    frame = pd.read_parquet(place / "inference" / "steering_data.parquet")
    assert np.isinf(frame["DiffMean_perplexity"]).sum() == 1


def test_methods_carry_axbenchs_names():
    assert axbench_name("sae_auroc") == "GemmaScopeSAEMaxAUC"
    assert axbench_name("supervised") == "supervised"


def test_a_line_that_is_no_result_is_refused(tmp_path):
    path = tmp_path / "latent.jsonl"
    path.write_text('{"concept_id": 0, "results": {}}\n{"concept_id": "1"}\n')
    with pytest.raises(ValueError, match="line 2: 'concept_id' and 'results' are needed"):
        read_evaluation(path)
