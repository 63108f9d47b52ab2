import json
from dataclasses import replace

import pytest
import torch

from sae_steering_plugin.runs.demo import run_demo
from sae_steering_plugin.runs.demo_stages import (
    BASE,
    DIFF_MEAN,
    FEATURE,
    PCA,
    PROBE,
    PROBE_KINDS,
    SAS,
    SAS_DENSE,
    Budget,
    matching_strength,
)
from sae_steering_plugin.runs.screen_job import Sizes
from sae_steering_plugin.runs.subject import Subject, open_subject
from tests.local import model_folder, pairs_file, questions_file, sae_folder, traits_file

TINY = Budget(
    pairs=24,
    validation=6,
    test=8,
    controls=2,
    control_items=6,
    curve_items=6,
    strengths=(0.3, 0.6),
    max_new_tokens=40,
    max_turns=2,
    batch_size=64,
    screen=Sizes(contexts=64, fresh=64, features=40, group=4, length=16),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("demo")
    model_folder(base / "model")
    sae_folder(base / "sae")
    return base


@pytest.mark.parametrize(
    ("write", "name", "outcome"),
    [
        (pairs_file, "pairs.jsonl", "preference"),
        (questions_file, "questions.json", "answer_share"),
        (traits_file, "traits.jsonl", "closeness"),
    ],
)
def test_a_contrast_file_gives_the_same_job_on_a_local_model(folder, write, name, outcome):
    found = run_demo(
        model=str(folder / "model"),
        sae=str(folder / "sae"),
        contrast=write(folder / name),
        budget=TINY,
        progress=False,
    )
    assert found.outcome == outcome and found.rollouts is None
    methods = [one.method for one in found.headline]
    assert methods[0] == PROBE and {DIFF_MEAN, PCA, FEATURE} <= set(methods)
    assert len(found.controls) == TINY.controls
    tried = {one.strength for one in found.validation}
    assert found.strength in tried and set(TINY.strengths) <= tried
    assert {one.strength for one in found.headline} == {found.strength}
    assert len(found.examples) >= 1
    json.dumps(found.summary(), allow_nan=False)
    assert "next-token probabilities" in found.notes[0]


def test_every_dense_method_moves_the_residual_equally_far(folder):
    found = run_demo(
        model=str(folder / "model"),
        sae=str(folder / "sae"),
        contrast=pairs_file(folder / "p.jsonl"),
        budget=TINY,
        progress=False,
    )
    for one in (*found.headline, *found.controls):
        tolerance = 0.021 if one.method == SAS else 1e-9
        assert one.displacement == pytest.approx(found.strength, rel=tolerance)


def test_the_same_seed_gives_the_same_summary(folder):
    given = dict(
        model=str(folder / "model"),
        sae=str(folder / "sae"),
        contrast=pairs_file(folder / "q.jsonl"),
        budget=TINY,
        progress=False,
    )
    one, other = (replace(run_demo(**given), seconds=0.0).summary() for _ in range(2))
    assert one == other


def test_a_file_with_too_few_groups_is_refused_before_a_model_is_loaded(tmp_path):
    path = tmp_path / "two.jsonl"
    rows = [{"positive": f"a{i}", "negative": f"b{i}", "group": f"g{i % 2}"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="field 'group' names 2 groups; three are needed"):
        run_demo(model="/none", contrast=path)


def test_a_model_without_scenarios_needs_a_file_and_an_sae(folder):
    with pytest.raises(ValueError, match="is not an embedded organism .* pass --contrast FILE"):
        run_demo(model=str(folder / "model"))
    with pytest.raises(ValueError, match="builds vectors in an SAE: pass --sae"):
        run_demo(model=str(folder / "model"), contrast=pairs_file(folder / "r.jsonl"))


def test_the_sae_route_reaches_the_asked_displacement(folder):
    subject = open_subject(str(folder / "model"), str(folder / "sae"))
    from sae_steering_plugin.directions import sas_vector
    from sae_steering_plugin.runs.collect import collect_contrast
    from sae_steering_plugin.runs.contrast_files import read_contrast

    contrast = read_contrast(pairs_file(folder / "s.jsonl"))
    labelled = collect_contrast(subject.model, contrast, subject.sae, progress=False)
    vector = sas_vector(labelled, subject.sae, tau=0.3)
    wanted = 0.7 * labelled.mean_norm
    factor, reached = matching_strength(subject, vector, contrast.positive, wanted)
    assert factor is not None and reached == pytest.approx(wanted, rel=0.021)


@pytest.fixture(scope="module")
def agent():
    from sae_steering_plugin.organisms import list_organisms

    if "agent-gpt2" not in list_organisms():
        pytest.skip("the embedded model agent-gpt2 is not in this checkout")
    return run_demo(budget=TINY, progress=False)


def test_the_main_job_compares_every_method_on_the_agent(agent):
    methods = {one.method for one in agent.headline}
    assert {PROBE, SAS_DENSE, FEATURE, DIFF_MEAN, PCA} <= methods
    assert len(methods & set(PROBE_KINDS)) == 1  # the read-out that was not chosen
    assert {one.method for one in agent.validation} == set(PROBE_KINDS)
    assert {one.n for one in agent.headline} == {TINY.test}
    assert {one.n for one in agent.controls} == {TINY.control_items}
    assert len(agent.controls) == TINY.controls
    assert {one.positions for one in agent.curve} == {"all", "prefill", "decode"}
    assert all(one.valid_rate >= 0 for one in agent.headline)


def test_the_single_feature_is_the_one_forecast_cleanest_among_equals(agent):
    single = next(one for one in agent.vectors if one.recipe.method == "feature")
    taken = single.recipe.settings["feature"]
    assert taken == agent.selection.features[0]
    choice, scores = agent.forecast_choice, agent.selection.scores
    best = max(scores["train_d"])
    within = agent.selection.settings["equally_good_within"]
    equal = [i for i, d in enumerate(scores["train_d"]) if d >= best - within]
    assert equal == list(range(len(equal)))  # they come first
    forecasts = [scores["forecast_clean"][i] for i in equal]
    assert forecasts == sorted(forecasts, reverse=True)
    if len(equal) > 1:
        assert (choice["n_equal"], choice["by_forecast"]) == (len(equal), taken)
        assert choice["contexts"] == TINY.screen.fresh
    assert agent.summary()["forecast_choice"].keys() == choice.keys()


def test_the_agents_records_hold_every_transcript_of_the_headline(agent, tmp_path):
    arms = agent.rollouts.names
    assert BASE in arms and len(arms) == 1 + len(agent.headline)
    assert len(agent.rollouts) == len(arms) * TINY.test
    assert len(agent.save(tmp_path)) == 5


def test_validation_and_test_scenarios_differ(agent):
    splits = {one.scenario.split("-")[0] for one in agent.rollouts}
    assert splits == {"test"}


def test_a_subject_without_world_has_no_trait(folder):
    from sae_steering_plugin.runs.subject import world_contrast

    subject = open_subject(str(folder / "model"))
    assert isinstance(subject, Subject) and subject.sae is None
    with pytest.raises(ValueError, match="is no organism, so it has no world"):
        world_contrast(subject, "autonomy", 4)
    assert subject.model.cfg.dtype == torch.float32
