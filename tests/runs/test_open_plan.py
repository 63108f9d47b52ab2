from dataclasses import replace

import pytest

from sae_steering_plugin.organisms import list_organisms
from sae_steering_plugin.runs.choice_items import items_from
from sae_steering_plugin.runs.judges import open_judge
from sae_steering_plugin.runs.open_ended import evaluate_open_ended, open_item
from sae_steering_plugin.runs.open_evaluation import file_questions, text_rows, world_open
from sae_steering_plugin.runs.open_plan import Asked, OpenPlan, OpenWorker
from sae_steering_plugin.runs.parts import collect
from sae_steering_plugin.runs.plan import plan_json, plan_key, read_plan, units_of
from sae_steering_plugin.runs.references import ModelRef
from sae_steering_plugin.runs.runner import InProcess, run_shard
from sae_steering_plugin.runs.sas_protocol import (
    Behaviour,
    Line,
    SAERef,
    SASPlan,
    TextPair,
)
from tests.local import model_folder, sae_folder

PAIRS = tuple(
    TextPair(f"the dog ran in the park {word}", f"the cat sat on the mat {word}", f"g{i}")
    for i, word in enumerate(("and still", "still", "and", "again"))
)
QUESTIONS = tuple(open_item(f"the cat {'sat ' * i}and") for i in range(5))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder and an SAE folder on disk."""
    root = tmp_path_factory.mktemp("tiny")
    return str(model_folder(root / "model")), str(sae_folder(root / "sae", "topk"))


def plan_of(tiny, **options):
    model, sae = tiny
    steering = SASPlan(
        ModelRef.of(model),
        (SAERef.of(model, sae),),
        (Behaviour("b", (), QUESTIONS, pairs=PAIRS),),
        (),
        strengths=(0.0, 40.0),
    )
    given = {"max_new_tokens": 5, "block": 2, "lines": (Line("b", sae, tau=0.3),)}
    return OpenPlan(steering, asked=(Asked("b", QUESTIONS),), **{**given, **options})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_blocks_give_the_texts_of_one_evaluation(tiny, tmp_path, temperature):
    plan = plan_of(tiny, temperature=temperature, seed=3)
    InProcess().run(plan, tmp_path, progress=False)
    table = collect(plan, tmp_path).to_pandas()
    worker = OpenWorker(plan)
    direct = evaluate_open_ended(
        worker.steered.subject.model,
        QUESTIONS,
        worker.steered.steering(plan.lines[0]),
        judges=[open_judge("rule:/dog/")],
        strengths=(0.0, 40.0),
        max_new_tokens=5,
        temperature=temperature,
        seed=3,
    ).table()
    assert table["text"].tolist() == direct["text"].tolist()
    assert table["item"].tolist() == direct["item"].tolist()
    assert table.groupby("strength")["text"].sum().nunique() == 2
    assert not {"score", "judge"} & set(table.columns)
    assert table[table["strength"] > 0]["displacement"].min() > 0


def test_a_plan_is_text_and_shards_share_its_units(tiny, tmp_path):
    plan = plan_of(tiny)
    assert read_plan(plan_json(plan), OpenPlan) == plan
    assert len(units_of(plan)) == 3
    InProcess().run(plan, tmp_path / "one", progress=False)
    for index in (0, 1):
        run_shard(plan, tmp_path / "two", index, 2, progress=False)
    assert collect(plan, tmp_path / "one").digest == collect(plan, tmp_path / "two").digest


def test_what_can_change_a_text_changes_the_key(tiny):
    plan = plan_of(tiny)
    steering = plan.steering
    others = [
        replace(plan, max_new_tokens=6),
        replace(plan, temperature=0.5),
        replace(plan, seed=1),
        replace(plan, batch_size=8),
        replace(plan, asked=(Asked("b", QUESTIONS[:4]),)),
        replace(plan, lines=(replace(plan.lines[0], tau=0.5),)),
        replace(plan, steering=replace(steering, strengths=(0.0, 1.0))),
        replace(plan, steering=replace(steering, positions="prefill")),
        replace(
            plan,
            steering=replace(
                steering, behaviours=(replace(steering.behaviours[0], pairs=PAIRS[:3]),)
            ),
        ),
    ]
    assert len({plan_key(one) for one in (plan, *others)}) == len(others) + 1
    moved = replace(steering, saes=(replace(steering.saes[0], source="/elsewhere"),))
    assert plan_key(replace(plan, steering=moved)) == plan_key(plan)


def test_what_does_not_fit_is_refused(tiny):
    with pytest.raises(ValueError, match="needs its behaviour, its questions and its SAE"):
        plan_of(tiny, lines=(Line("c", tiny[1]),))
    with pytest.raises(ValueError, match="of one vector"):
        plan_of(tiny, lines=(Line("b", tiny[1], second="b"),))
    with pytest.raises(ValueError, match="at least 1"):
        plan_of(tiny, block=0)
    plan = plan_of(tiny)
    with pytest.raises(ValueError, match="has no questions to ask"):
        replace(plan, asked=(Asked("b", ()),))
    with pytest.raises(ValueError, match="were used to build"):
        replace(plan, asked=(Asked("b", (open_item(PAIRS[0].positive),)),))


def test_rows_to_print_are_one_per_line_and_strength(tiny, tmp_path):
    plan = plan_of(tiny, lines=(Line("b", tiny[1], tau=0.3), Line("b", tiny[1], "caa", tau=0.3)))
    InProcess().run(plan, tmp_path, progress=False)
    rows = text_rows(collect(plan, tmp_path).to_pandas())
    assert [(row["arm"], row["strength"], row["n"]) for row in rows] == [
        ("b: sas, tau 0.3", "0", 5),
        ("b: sas, tau 0.3", "+40", 5),
        ("b: caa, tau 0.3", "0", 5),
        ("b: caa, tau 0.3", "+40", 5),
    ]


@pytest.mark.parametrize("name", list_organisms())
def test_a_world_is_asked_for_kinds_of_text_and_for_traits(name):
    found, asked = world_open(name, ["pirate", "risk"], build_items=8, items=4, seed=0)
    assert [one.name for one in found] == [one.behaviour for one in asked] == ["pirate", "risk"]
    assert len(found[0].pairs) == 8 and len(found[1].build) == 8
    judge = open_judge("lexicon:pirate")
    sides = [[getattr(pair, side) for pair in found[0].pairs] for side in ("positive", "negative")]
    high, low = (sum(one.score for one in judge.score(side)) for side in sides)
    assert high > 4 > low
    with pytest.raises(
        ValueError, match=r"no behaviour 'cheese'; an organism has autonomy.*pirate"
    ):
        world_open(name, ["cheese"], build_items=8, items=4, seed=0)


def test_questions_come_from_the_open_ended_file_or_lose_their_options(data, tmp_path):
    caa = data / "caa"
    record = {
        "question": "Is it so?\n\nChoices:\n (A) yes\n (B) no",
        "answer_matching_behavior": "(A)",
        "answer_not_matching_behavior": "(B)",
    }
    test = items_from([record], "memory")
    other = items_from([{**record, "question": record["question"].replace("so", "not so")}], "m")
    published = file_questions(caa, Behaviour("sycophancy", other, test), 7)
    assert len(published) == 7 and all(not one.options for one in published)
    hidden = file_questions(caa, Behaviour("survival-instinct", other, test), 7)
    assert [one.question for one in hidden] == ["Is it so?"]
