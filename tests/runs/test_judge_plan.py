import json
from dataclasses import replace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_steering_plugin.runs.judge_plan import JudgePlan, JudgeRef
from sae_steering_plugin.runs.judges import Item, RuleJudge, open_judge
from sae_steering_plugin.runs.open_evaluation import judging, score_effect_rows, verdict_rows
from sae_steering_plugin.runs.parts import collect
from sae_steering_plugin.runs.plan import plan_json, plan_key, read_plan, units_of
from sae_steering_plugin.runs.runner import InProcess, run_shard

from ..chat_server import KEY, chat_server

TEXTS = ["arr matey", "good day", "arr", "", "nothing at all", "the sea, arr", "ship"]


def silent_on_nothing(item):
    """A rule that cannot decide on a text without words."""
    return None if not item.text else "arr" in item.text


PICKY = RuleJudge("picky", "1", silent_on_nothing)


def texts_file(path, texts=TEXTS, **columns):
    table = {"question": [f"q{i}" for i in range(len(texts))], "text": list(texts), **columns}
    pq.write_table(pa.table(table), path)
    return path


def run(plan, out, **options):
    report = InProcess().run(plan, out, progress=False, **options)
    return report, collect(plan, out).table if report.complete else None


def test_the_rows_come_back_with_each_judge_s_own_scores(tmp_path):
    own = "judge:tests.runs.test_judge_plan:PICKY"
    plan = JudgePlan.of(texts_file(tmp_path / "t.parquet"), ["rule:/arr/", own], block=3)
    _, found = run(plan, tmp_path / "out")
    assert found["judge"].to_pylist() == ["rule:/arr/"] * 7 + ["picky"] * 7
    assert found["text"].to_pylist() == TEXTS * 2
    direct = open_judge("rule:/arr/").score(TEXTS)
    assert found["score"].to_pylist()[:7] == [one.score for one in direct]
    (lost,) = (row for row in found.to_pylist() if not row["valid"])
    assert lost["score"] is None and lost["text"] == "" and lost["reason"]
    assert found["stand_in"].to_pylist() == [True] * 14


def test_a_plan_is_text_and_a_place_is_no_identity(tmp_path):
    plan = JudgePlan.of(texts_file(tmp_path / "t.parquet"), ["rule:/arr/"], block=3)
    assert read_plan(plan_json(plan), JudgePlan) == plan
    moved = JudgePlan.of(texts_file(tmp_path / "elsewhere.parquet"), ["rule:/arr/"], block=3)
    assert plan_key(moved) == plan_key(plan)
    cached = replace(plan, cache=str(tmp_path / "replies"))
    assert plan_key(cached) == plan_key(plan)


def test_only_what_is_new_in_a_table_is_judged(tmp_path):
    path, out = texts_file(tmp_path / "t.parquet", TEXTS[:6]), tmp_path / "out"
    report, _ = run(JudgePlan.of(path, ["rule:/arr/"], block=3), out)
    assert (report.done, report.skipped) == (2, 0)
    texts_file(path, TEXTS)
    report, found = run(JudgePlan.of(path, ["rule:/arr/"], block=3), out)
    assert (report.done, report.skipped) == (1, 2)
    assert found["text"].to_pylist() == TEXTS
    texts_file(path, ["changed", *TEXTS[1:]])
    report, _ = run(JudgePlan.of(path, ["rule:/arr/"], block=3), out)
    assert (report.done, report.skipped) == (1, 2)


def test_what_a_judge_reads_is_in_the_keys(tmp_path):
    path = texts_file(tmp_path / "t.parquet", topic=["ships"] * 7)
    plan = JudgePlan.of(path, ["rule:/arr/"])
    (judge,) = plan.judges
    others = [
        replace(plan, judges=(replace(judge, version="2"),)),
        replace(plan, judges=(replace(judge, name="other"),)),
        replace(plan, instruction=""),
        replace(plan, concept="topic"),
        replace(plan, one_concept="ships"),
        replace(plan, block=5),
    ]
    keys = {units_of(one)[0].key for one in (plan, *others)}
    assert len(keys) == len(others) + 1


def test_two_shards_give_one_process_s_bits(tmp_path):
    plan = JudgePlan.of(texts_file(tmp_path / "t.parquet"), ["rule:/arr/", "rule:/s/"], block=2)
    run(plan, tmp_path / "one")
    for index in (1, 0):
        run_shard(plan, tmp_path / "two", index, 2, progress=False)
    assert collect(plan, tmp_path / "one").digest == collect(plan, tmp_path / "two").digest


@pytest.fixture
def endpoint(monkeypatch):
    pytest.importorskip("openai", reason="needs the extra [judge]")
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    with chat_server() as server:
        yield server


def test_an_endpoint_s_silence_is_a_null_and_its_replies_are_kept(tmp_path, endpoint):
    said = ["say good", "say garbage", "say long", "say good again"]
    path = texts_file(tmp_path / "t.parquet", said)
    options = {"rubric": "fluency", "cache": tmp_path / "replies", "block": 2}
    plan = JudgePlan.of(path, [f"api:tiny@{endpoint.url}"], **options)
    _, found = run(plan, tmp_path / "one")
    rows = found.to_pylist()
    assert [row["score"] for row in rows] == [2.0, None, None, 2.0]
    assert 'no "Rating:"' in rows[1]["reason"] and "too long" in rows[2]["reason"]
    assert all("api:tiny@" in row["judge"] and not row["stand_in"] for row in rows)
    asked = sum(endpoint.asked.values())
    run(plan, tmp_path / "again")  # only the refused one is asked once more
    assert sum(endpoint.asked.values()) == asked + 1
    written = b"".join(one.read_bytes() for one in tmp_path.rglob("*") if one.is_file())
    assert KEY.encode() not in written


def test_a_refused_key_fails_its_units_and_the_next_run_may_try_again(tmp_path, endpoint):
    path = texts_file(tmp_path / "t.parquet", ["say good", "say denied"])
    plan = JudgePlan.of(path, [f"api:tiny@{endpoint.url}"], rubric="fluency", block=1)
    report, _ = run(plan, tmp_path / "out")
    assert report.done == 1 and "cannot judge" in report.failed[0].error
    report, _ = run(plan, tmp_path / "out", retry_failed=True)
    assert report.done == 0 and report.skipped == 1 and len(report.failed) == 1


def test_another_judge_or_table_than_the_plan_s_is_refused(tmp_path):
    reference = JudgeRef.of("rule:/arr/")
    with pytest.raises(ValueError, match=r"is now rule:/arr/ \(.*\), not rule:/arr/ \(old\)"):
        replace(reference, version="old").open()
    path = texts_file(tmp_path / "t.parquet")
    plan = JudgePlan.of(path, [reference])
    texts_file(path, TEXTS[:3])
    with pytest.raises(ValueError, match="has changed since the plan"):
        plan.units()


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["a"]}, {"text": "said"}, "no column 'said'; it has text"),
        ({"text": [1]}, {}, "column 'text' holds int64, not text"),
        ({"text": ["a"], "judge": ["b"]}, {}, "has a column 'judge' already"),
        ({"text": pa.array([], pa.string())}, {}, "holds no rows"),
        ({"text": ["a", None]}, {}, "row 1 has no text"),
        ({"text": ["a"]}, {"concept": "topic"}, "no column 'topic'"),
        ({"text": ["a"]}, {"block": 0}, "block is at least 1"),
    ],
)
def test_tables_that_cannot_be_judged_are_refused(tmp_path, columns, options, message):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(ValueError, match=message):
        JudgePlan.of(path, ["rule:/arr/"], **options)


def test_a_plan_needs_a_table_and_distinct_judges(tmp_path):
    with pytest.raises(FileNotFoundError, match="no table"):
        JudgePlan.of(tmp_path / "none.parquet", ["rule:/a/"])
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="cannot be read as a parquet table"):
        JudgePlan.of(tmp_path / "bad.parquet", ["rule:/a/"])
    path = texts_file(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="need a judge"):
        JudgePlan.of(path, [])
    with pytest.raises(ValueError, match="'rule:/a/' is given twice"):
        JudgePlan.of(path, ["rule:/a/", "rule:/a/"])
    with pytest.raises(ValueError, match="no judge 'oracle'"):
        JudgePlan.of(path, ["oracle:x"])
    with pytest.raises(ValueError, match="not both"):
        JudgePlan.of(path, ["rule:/a/"], concept="text", one_concept="ships")


def judged_table():
    """Two arms at two strengths, one judge; item 3 has no score when steered."""
    rows = [
        {
            "judge": "j",
            "arm": arm,
            "strength": strength,
            "item": item,
            "score": None if (strength and item == 3) else float(item) + strength * shift,
            "valid": not (strength and item == 3),
            "reason": "" if not (strength and item == 3) else "mute",
            "scale_low": 0.0,
            "scale_high": 9.0,
            "stand_in": True,
        }
        for arm, shift in (("up", 1.0), ("same", 0.0))
        for strength in (0.0, 1.0)
        for item in range(12)
    ]
    return pd.DataFrame(rows).astype({"score": float})


def test_scores_are_compared_on_the_items_that_both_arms_have():
    rows = {row["arm"]: row for row in score_effect_rows(judged_table())}
    assert (rows["up"]["n"], rows["up"]["left out"]) == (11, 1)
    mean = (sum(range(12)) - 3) / 11
    assert rows["up"]["score"] == f"{mean:.3f} to {mean + 1:.3f}"
    assert rows["up"]["p"] < 0.01 and rows["same"]["p"] == 1.0
    assert rows["up"]["adjusted"] == pytest.approx(2 * rows["up"]["p"], rel=0.1)
    shown = verdict_rows(judged_table())
    assert [(row["strength"], row["unscored"]) for row in shown] == [("0", 0), ("+1", 1)] * 2


def test_bare_texts_have_scores_and_no_comparison(tmp_path):
    plan = JudgePlan.of(texts_file(tmp_path / "t.parquet"), ["rule:/arr/"])
    run(plan, tmp_path / "out")
    tables = judging(plan).tables(collect(plan, tmp_path / "out"))
    assert list(tables) == ["scores"]
    assert [(row["arm"], row["n"]) for row in tables["scores"]] == [("all", 7)]
    assert json.dumps(tables)


def test_items_carry_what_the_columns_say(tmp_path):
    from sae_steering_plugin.runs.judge_plan import items_of

    path = texts_file(tmp_path / "t.parquet", ["a", "b"], topic=["sea", None])
    plan = JudgePlan.of(path, ["rule:/a/"], concept="topic")
    assert items_of(plan.rows(), plan) == [Item("a", "q0", "sea"), Item("b", "q1", "")]
