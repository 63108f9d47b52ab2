import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from sae_steering_plugin import Add, Edit, Recipe, SteeringDictionary, SteeringVector
from sae_steering_plugin.adapters.steering import steer
from sae_steering_plugin.organisms.world import World
from sae_steering_plugin.runs.capability import ManyAnswers, read_truthful, world_capability
from sae_steering_plugin.runs.capability_evaluation import question_sets, score_rows, shift_rows
from sae_steering_plugin.runs.capability_plan import (
    CapabilityPlan,
    CapabilityWorker,
    ChoiceSet,
    TruthSet,
    answer_logprobs,
    truth_rows,
    truth_scores,
)
from sae_steering_plugin.runs.choice_evaluation import Fit
from sae_steering_plugin.runs.choice_items import FORMS
from sae_steering_plugin.runs.choices import evaluate_choices
from sae_steering_plugin.runs.parts import collect
from sae_steering_plugin.runs.plan import plan_json, plan_key, read_plan
from sae_steering_plugin.runs.references import ModelRef, VectorRef
from sae_steering_plugin.runs.rollout_plan import BASE, steering_arms
from sae_steering_plugin.runs.runner import InProcess
from tests.hosts import D_MODEL, SITE
from tests.local import model_folder

HEADER = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"

QUESTIONS = (
    ManyAnswers("the cat", "sat.", ("sat.", "sat on the mat."), ("ran.", "ran in the park."), "x"),
    ManyAnswers("the dog", "ran.", ("ran.",), ("sat.", "sat on the mat and the cat."), "y"),
    ManyAnswers("the mat", "is.", ("is.", "is still."), ("ran.",), "x"),
)


SUMS = world_capability(World(), "arithmetic", 5)

# Scores ---------------------------------------------------------------------------------------


def test_mc1_and_mc2_are_those_of_a_sum_done_by_hand():
    """p = 0.2 (best), 0.1 (true), 0.05 and 0.15 (false): MC2 = 0.3 / 0.5, and 0.2 > 0.15."""
    logs = [math.log(p) for p in (0.2, 0.1, 0.05, 0.15)]
    mc1, mc2 = truth_scores(logs[0], logs[:2], logs[2:])
    assert mc1 == 1.0 and mc2 == pytest.approx(0.6)
    mc1, mc2 = truth_scores(logs[1], logs[:2], logs[2:])
    assert mc1 == 0.0 and mc2 == pytest.approx(0.6)


def test_a_tie_is_no_correct_answer_and_small_probabilities_do_not_vanish():
    assert truth_scores(-1.0, [-1.0], [-1.0]) == (0.0, 0.5)
    mc1, mc2 = truth_scores(-2000.0, [-2000.0], [-2000.0 - math.log(3), -2000.0 - math.log(3)])
    assert mc1 == 1.0 and mc2 == pytest.approx(0.6)


def by_hand(model, prompt, answer, edits):
    """The sum of log-probabilities, token by token, with a forward pass for each."""
    whole = model.tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    shared = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = [model.tokenizer.bos_token_id] if model.cfg.default_prepend_bos else []
    total = 0.0
    assert whole[: len(shared)] == shared
    for i in range(len(shared), len(whole)):
        tokens = torch.tensor([start + whole[:i]])
        with torch.no_grad(), steer(model, edits):
            logits = model(tokens)[0, -1]
        total += float(logits.log_softmax(-1)[whole[i]])
    return total


@pytest.mark.parametrize("steered", [False, True])
def test_an_answer_s_log_probability_is_the_sum_over_its_tokens(host, steered):
    edits = [Edit(Add(torch.linspace(-1, 1, D_MODEL), 3.0), SITE)] if steered else []
    pairs = [(one.prompt, f" {answer}") for one in QUESTIONS for answer in one.answers]
    for size in (2, 32):
        found = answer_logprobs(host, pairs, edits, batch_size=size)
        for value, (prompt, answer) in zip(found, pairs, strict=True):
            assert value == pytest.approx(by_hand(host, prompt, answer, edits), rel=1e-4)


def test_rows_put_each_answer_on_its_side(host):
    found = truth_rows(host, QUESTIONS, (), 8)
    for row, one in zip(found, QUESTIONS, strict=True):
        sums = {a: by_hand(host, one.prompt, f" {a}", []) for a in one.answers}
        shares = {a: math.exp(value) for a, value in sums.items()}
        expected = sum(shares[a] for a in one.true) / sum(shares.values())
        assert row["p_true"] == pytest.approx(expected, rel=1e-4)
        assert row["correct"] == float(all(sums[one.best] > sums[a] for a in one.false))


# Files ----------------------------------------------------------------------------------------


def test_all_answers_of_a_row_are_read_as_sentences(tmp_path):
    path = tmp_path / "TruthfulQA.csv"
    path.write_text(
        HEADER + 'X,Law,Is it so?,No,"No; Never.;  No one knows ;","Yes; Always; Never",url\n'
        "X,Law,Why?,Because,,For no reason,url\n"
    )
    first, second = read_truthful(path)
    assert first.true == ("No.", "Never.", "No one knows.") and first.best == "No."
    assert first.false == ("Yes.", "Always.")  # "Never" is listed on both sides
    assert (first.prompt, first.group) == ("Q: Is it so?\nA:", "Law")
    assert second.true == ("Because.",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("X,Law,,No,No,Yes,url", r"q.csv:3: field 'Question' is empty"),
        ("X,Law,Why?,No,No,,url", r"q.csv:3: field 'Incorrect Answers' is empty"),
        ("X,Law,Why?,No,No,No,url", r"q.csv:3: column 'Incorrect Answers' holds no answer"),
        ("X,Law,Why?,No,No", r"q.csv:3: 5 cells under 7 column names"),
    ],
)
def test_a_malformed_row_is_refused_with_its_line(tmp_path, row, message):
    path = tmp_path / "q.csv"
    path.write_text(f"{HEADER}X,Law,Is it so?,No,No,Yes,url\n{row}\n")
    with pytest.raises(ValueError, match=message):
        read_truthful(path)


def test_another_table_is_no_truthfulqa(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("Why?,a,b,c,d,B\n")
    with pytest.raises(ValueError, match="no column 'Best Answer'"):
        read_truthful(path)


def test_the_published_questions_have_their_best_answer_among_the_true_ones(data):
    found = read_truthful(data / "truthfulqa" / "TruthfulQA.csv")
    assert len(found) == 817
    for one in found:
        assert one.best in one.true and one.false and not set(one.true) & set(one.false)


# The plan -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder, and a vector at its site."""
    root = tmp_path_factory.mktemp("tiny")
    drawn = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector(drawn, SITE, Recipe("random", mean_norm=4.0), label="push")
    SteeringDictionary.from_vectors([vector]).save_model(root / "vectors")
    return str(model_folder(root / "model")), VectorRef.of(root / "vectors")


def plan_of(tiny, **options):
    model, vector = tiny
    arms = (BASE, *steering_arms({"push": vector}, strengths=(2.0,)))
    sums = ChoiceSet("sums", SUMS, "hidden")
    given = {"arms": arms, "truth": (TruthSet("truth", QUESTIONS),), "choices": (sums,), "block": 2}
    return CapabilityPlan(ModelRef.of(model), **{**given, **options})


@pytest.fixture(scope="module")
def table(tiny, tmp_path_factory):
    plan = plan_of(tiny)
    folder = tmp_path_factory.mktemp("run")
    InProcess().run(plan, folder, progress=False)
    return collect(plan, folder).to_pandas()


def test_collected_rows_are_those_of_a_direct_computation(tiny, table):
    plan = plan_of(tiny)
    worker = CapabilityWorker(plan)
    model, (_, push) = worker.subject.model, plan.arms
    base = table[table["arm"] == "base"].set_index(["set", "item"])
    steered = table[table["arm"] == push.name].set_index(["set", "item"])
    for found, edits in ((base, ()), (steered, worker.edits[push.name])):
        direct = truth_rows(model, QUESTIONS, edits, 32)
        assert found.loc["truth", "p_true"].tolist() == pytest.approx(
            [row["p_true"] for row in direct], rel=1e-5
        )
        sums = evaluate_choices(
            model,
            plan.choices[0].questions,
            (lambda _, edits=edits: edits) if edits else None,
            strengths=(1.0,),
            form=FORMS[2],
        ).table()
        assert found.loc["sums", "p_true"].tolist() == pytest.approx(
            sums["p_match_normalised"].tolist(), rel=1e-5
        )
    assert (base["p_true"] != steered["p_true"]).all()
    assert table["letter_mass"].isna().all() and len(table) == 2 * (3 + 5)


def test_a_plan_is_text_and_what_changes_a_number_changes_its_key(tiny):
    plan = plan_of(tiny)
    assert read_plan(plan_json(plan), CapabilityPlan) == plan
    others = [
        replace(plan, batch_size=8),
        replace(plan, truth=(TruthSet("truth", QUESTIONS[:2]),)),
        replace(plan, choices=(replace(plan.choices[0], form="hidden-prefix"),)),
        replace(plan, arms=plan.arms[:1]),
    ]
    assert len({plan_key(one) for one in (plan, *others)}) == len(others) + 1


def test_what_does_not_fit_is_refused(tiny):
    with pytest.raises(ValueError, match="edits at all positions, not decode"):
        arms = steering_arms({"push": tiny[1]}, strengths=(1.0,), positions=("decode",))
        plan_of(tiny, arms=arms)
    with pytest.raises(ValueError, match="at least one, and each name once"):
        plan_of(tiny, truth=(), choices=())
    with pytest.raises(ValueError, match="set 'truth' holds no question"):
        plan_of(tiny, truth=(TruthSet("truth", ()),))
    with pytest.raises(ValueError, match="no condition 'shown'"):
        plan_of(tiny, choices=(ChoiceSet("c", SUMS, "shown"),), truth=())


def test_what_is_longer_than_the_context_is_left_out_and_noted(data):
    from tests.hosts import tiny_tokenizer

    words = [str(data / "truthfulqa" / "TruthfulQA.csv")]
    fit = Fit(tiny_tokenizer(), 60)
    with pytest.warns(UserWarning, match="longer than the model's context of 60"):
        (truth,), choices = question_sets("x", words, fit, items=0, seed=0)
    assert not choices and 0 < len(truth.questions) < 817
    assert (
        fit.notes[0].endswith("tokens") and f"{817 - len(truth.questions)} of 817" in fit.notes[0]
    )


def test_shifts_are_paired_and_count_answers_for_the_worse():
    rows = [
        {"set": "s", "arm": arm, "item": i, "form": "answers", "letter_mass": math.nan, **figures}
        for i in range(10)
        for arm, figures in (
            ("base", {"correct": 1.0, "p_true": 0.5 + i / 100}),
            ("push", {"correct": float(i > 2), "p_true": 0.4 + i / 100}),
        )
    ]
    (row,) = shift_rows(pd.DataFrame(rows), ["push"], seed=0)
    assert row["score"] == "0.545 to 0.445" and row["answers changed"] == 3
    assert row["of them for the worse"] == "100%" and row["p"] < 0.01
    base, push = score_rows(pd.DataFrame(rows))
    assert (base["correct"], push["correct"], base["letter mass"]) == (1.0, 0.7, "")
