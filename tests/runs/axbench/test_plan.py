"""The run as a plan: each row by its own factor, measured as stated, resumed bit for bit."""

from dataclasses import replace

import pytest
import torch

from sae_steering_plugin.adapters.activations import activations_at, padded
from sae_steering_plugin.adapters.engine import generate
from sae_steering_plugin.adapters.steering import steer
from sae_steering_plugin.adapters.transformer_lens import load_model
from sae_steering_plugin.edits.codes import Clamp, codes_of
from sae_steering_plugin.edits.shift import Add
from sae_steering_plugin.organisms import data_folder, list_organisms
from sae_steering_plugin.runs.axbench.detection import FALLBACK
from sae_steering_plugin.runs.axbench.evaluation import open_ratings, results_of, run_axbench
from sae_steering_plugin.runs.axbench.files import drawn_instructions, read_axbench
from sae_steering_plugin.runs.axbench.plan import (
    BOW,
    UNSTEERED,
    AxBenchWorker,
    MethodLine,
    axbench_plan,
)
from sae_steering_plugin.runs.axbench.ratings import ADDITION_FACTORS, CLAMPING_FACTORS
from sae_steering_plugin.runs.axbench.results import offline_ratings
from sae_steering_plugin.runs.axbench.texts import (
    ChatForm,
    displacement_of,
    read_texts,
    text_nll,
)
from sae_steering_plugin.runs.axbench.world import world_concepts
from sae_steering_plugin.runs.axbench.writer import missing_columns, read_evaluation
from sae_steering_plugin.runs.parts import collect, todo
from sae_steering_plugin.runs.plan import plan_json, read_plan
from sae_steering_plugin.runs.runner import InProcess, run_shard
from sae_steering_plugin.runs.steering_methods import METHODS, SteeringMethod, find_method
from sae_steering_plugin.runs.tuned.records import Fitted
from sae_steering_plugin.types import Edit, Positions
from tests.hosts import D_MODEL, SITE, tiny_bridge, tiny_sae
from tests.local import model_folder, sae_folder
from tests.runs.axbench.sets import small_set

FACTORS = (0.5, 2.0)
QUICK = {"n_instructions": 2, "factors": FACTORS, "max_new_tokens": 3, "max_tokens": 48}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of a tiny model, its SAE, and a small concept set."""
    root = tmp_path_factory.mktemp("axbench")
    model = model_folder(root / "model")
    sae = sae_folder(root / "sae")
    return str(model), str(sae), str(small_set().write(root / "concepts"))


def small_plan(places, *methods, **options):
    model, sae, concepts = places
    return axbench_plan(model, concepts, methods or ("diff_mean",), sae=sae, **{**QUICK, **options})


def ran(plan, out):
    report = InProcess().run(plan, out, progress=False)
    assert report.complete, report
    return collect(plan, out)


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory):
    """A run of two methods and the unsteered model: plan, collected rows, results."""
    plan = small_plan(places, UNSTEERED, "diff_mean", "lat", others=1)
    collected = ran(plan, tmp_path_factory.mktemp("run"))
    return plan, collected, results_of(plan, collected)


# The plan -----------------------------------------------------------------------------------------


def test_units_are_concepts_by_methods_and_bow_is_always_there(places):
    plan = small_plan(places, UNSTEERED, "diff_mean", factor_block=1)
    found = [
        (u.coordinates["concept"], u.coordinates["method"], u.coordinates["what"])
        for u in plan.units()
    ]
    one = [(UNSTEERED, "steering")] * 2
    one += [("diff_mean", "detection")] + [("diff_mean", "steering")] * 2 + [(BOW, "detection")]
    assert found == [(c, *rest) for c in (0, 1) for rest in one]


def test_factors_default_to_axbenchs_lists():
    assert MethodLine.of("diff_mean").factors == ADDITION_FACTORS and len(ADDITION_FACTORS) == 14
    assert MethodLine.of("sae_clamp").factors == CLAMPING_FACTORS and len(CLAMPING_FACTORS) == 14


def test_a_plan_comes_back_from_its_json_with_the_same_units(places):
    line = MethodLine("probe", FACTORS, {"schedule": {"epochs": 2}})
    plan = small_plan(places, line)
    again = read_plan(plan_json(plan))
    assert [u.key for u in again.units()] == [u.key for u in plan.units()]
    assert line.method.settings.schedule.epochs == 2
    other = replace(line, settings={})
    assert small_plan(places, other).units()[0].key != plan.units()[0].key


def test_keys_follow_what_can_change_a_number_and_nothing_else(places, tmp_path):
    before = {u.key for u in small_plan(places).units()}
    assert {u.key for u in small_plan(places, name="another name").units()} == before
    for options in ({"seed": 1}, {"max_tokens": 40}, {"own_scale": False}, {"batch_size": 3}):
        assert not before & {u.key for u in small_plan(places, **options).units()}
    made = small_set()
    made.train.loc[made.train["concept_id"] == 1, "output"] += " now"
    changed = str(made.write(tmp_path))
    after = {u.key for u in small_plan((*places[:2], changed)).units()}
    assert len(before & after) == len(before) / 2  # concept 0 is untouched


@pytest.mark.parametrize(
    "methods, options, message",
    [
        (("diff_meen",), {}, "no method 'diff_meen'; did you mean 'diff_mean'"),
        ((MethodLine("diff_mean", (1.0,), {"k": 2}),), {}, "diff_mean has no setting 'k'"),
        (("lat", "lat"), {}, "a method stands in the plan twice"),
        (("lat",), {"concept_ids": (0, 0)}, "a concept stands in the plan twice"),
        (("lat",), {"n_instructions": 1}, "the same number of instructions, two at least"),
        (("lat",), {"n_instructions": 9}, "9 instructions are asked for and there are 3"),
        (("lat",), {"steering": False, "detection": False}, "neither detection nor steering"),
        (("lat",), {"batch_size": 0}, "are at least 1"),
    ],
)
def test_what_would_spoil_a_run_is_refused_before_it(methods, options, message, places):
    with pytest.raises(ValueError, match=message):
        small_plan(places, *methods, **options)


def test_a_run_without_a_site_is_refused(places):
    model, _, concepts = places
    with pytest.raises(ValueError, match="where to steer"):
        axbench_plan(model, concepts, ["diff_mean"], **QUICK)


# Runs ---------------------------------------------------------------------------------------------


def test_a_killed_run_and_two_shards_end_in_the_same_table(places, whole, tmp_path):
    plan, collected, _ = whole
    units = plan.units()
    early = {unit.key for unit in units[: len(units) // 2 + 1]}
    InProcess().run(plan, tmp_path / "killed", only=lambda u: u.key in early, progress=False)
    assert len(todo(plan, tmp_path / "killed")) == len(units) - len(early)
    assert ran(plan, tmp_path / "killed").digest == collected.digest
    for index in (1, 0):
        run_shard(plan, tmp_path / "shards", index, 2, progress=False)
    assert collect(plan, tmp_path / "shards").digest == collected.digest


def test_rows_are_every_instruction_at_every_factor_and_every_evaluation_text(whole):
    plan, collected, found = whole
    rows = found.steered
    assert len(rows) == 2 * 3 * 2 * len(FACTORS)
    assert rows.groupby(["concept_id", "method", "input_id", "factor"]).size().eq(1).all()
    for number, part in rows.groupby("concept_id"):
        pool = read_axbench(plan.concepts.folder)
        expected = drawn_instructions(("say 0", "say 1", "say 2"), 2, number)
        assert len(pool) == 2
        assert tuple(part.sort_values("input_id")["original_prompt"].unique()) == expected
    latent = found.latent[found.latent["row"] >= 0]
    assert latent.groupby(["concept_id", "method"]).size().eq(7).all()
    further = found.latent[found.latent["row"] < 0]
    assert further.groupby(["concept_id", "method"]).size().eq(3).all()
    assert set(further["method"]) == {"diff_mean", "lat", BOW}


def test_changed_texts_are_refused_and_not_mixed(places, tmp_path):
    folder = small_set().write(tmp_path / "concepts")
    plan = small_plan((*places[:2], str(folder)))
    made = small_set()
    made.train.loc[0, "output"] = "something else"
    made.write(folder)
    with pytest.raises(ValueError, match="texts of concept 0 in .* are not those the plan was"):
        AxBenchWorker(plan).run(plan.units()[0])


def test_a_method_that_finds_nothing_counts_as_zero_and_says_why(places, monkeypatch, tmp_path):
    def build(subject, data, settings, seed):
        del subject, settings, seed
        if data.concept == "concept 0":
            raise LookupError("no feature survives")
        return find_method("diff_mean").fit(AxBenchWorker(plan).subject, data)

    monkeypatch.setitem(METHODS, "picky", SteeringMethod("picky", build))
    plan = small_plan(places, "picky", "diff_mean")
    found = results_of(plan, ran(plan, tmp_path))
    rated = found.rated(offline_ratings(found.concepts))
    for aspect in ("concept", "instruct", "fluency"):
        rated[aspect] = 1.0 + rated["concept_id"]
    picky = [one for one in found.scores(rated) if one.method == "picky"]
    assert [(one.concept_id, one.covered) for one in picky] == [(1, True), (0, False)]
    row, other = found.steering_table(rated)
    assert (row["concepts"], row["covered"]) == (2, 1)
    # a text of concept 0 scores 1 here and one of concept 1 scores 2
    assert (row["score"], row["covered score"], row["with DiffMean"]) == ("1", "2", "1.5")
    assert other["score"] == other["with DiffMean"] == "1.5"
    assert {"what": "picky, concept 0: not covered (no feature survives)"} in found.notes()


# What a row is ------------------------------------------------------------------------------------


def test_a_row_of_a_batch_is_what_it_is_alone(places, tmp_path):
    tables = [
        ran(small_plan(places, temperature=1.0, batch_size=size), tmp_path / str(size)).to_pandas()
        for size in (1, 4)
    ]
    texts = [table[table["what"] == "steering"]["generation"].tolist() for table in tables]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


def test_the_scale_is_the_largest_score_over_all_rows_hard_negatives_included(whole):
    _, _, found = whole
    for (number, method), one in found.detections.items():
        if method == BOW:
            continue
        latent = found.latent
        own = latent[(latent["concept_id"] == number) & (latent["method"] == method)]
        largest = own[own["row"] >= 0]["score"].max()
        assert one.max_act == largest
        rows = found.steered[(found.steered["concept_id"] == number)]
        rows = rows[rows["method"] == method]
        expected = largest if largest > 0 else FALLBACK
        assert set(rows["max_act"]) == {expected}
        assert (rows["fallback"] == (largest <= 0)).all()
        assert rows["strength"].tolist() == pytest.approx((rows["factor"] * expected).tolist())


@pytest.mark.parametrize(
    "own, scale, expected", [(7.0, True, 7.0), (7.0, False, 3.0), (None, True, 3.0)]
)
def test_a_published_maximum_is_used_unless_the_switch_says_otherwise(
    own, scale, expected, places, monkeypatch
):
    def build(subject, data, settings, seed):
        del subject, settings, seed
        return Fitted(
            "flat", data.concept, detection=lambda h: h[..., 0] * 0 + 3, max_activation=own
        )

    monkeypatch.setitem(METHODS, "flat", SteeringMethod("flat", build))
    worker = AxBenchWorker(small_plan(places, "flat", own_scale=scale))
    fit = worker.fit(0, "flat")
    assert (fit.max_act, fit.fallback) == (expected, False)


def test_a_scale_that_is_not_above_zero_is_fifty_and_counted(places, monkeypatch, tmp_path):
    def build(subject, data, settings, seed):
        del settings
        flat = find_method("diff_mean").fit(subject, data, seed=seed)
        flat.detection = lambda h: h[..., 0] * 0 - 1
        return flat

    monkeypatch.setitem(METHODS, "flat", SteeringMethod("flat", build))
    plan = small_plan(places, "flat")
    found = results_of(plan, ran(plan, tmp_path))
    assert set(found.steered["max_act"]) == {FALLBACK} and found.steered["fallback"].all()
    row = found.steering_table(found.rated(offline_ratings(found.concepts)))[0]
    assert row["fallback 50"] == 2
    assert {one.auroc for (_, method), one in found.detections.items() if method == "flat"} == {0.5}


def test_the_prefix_changes_neither_score_nor_scale():
    model = tiny_bridge()
    form = ChatForm.of(model, tiny_sae())
    assert form.prefix_length == 1
    text = form.text("the cat", "sat on the mat")
    read = read_texts(form, SITE, [text, "a dog"], batch_size=2)
    encoded = form.encoded([text])
    residual = activations_at(model, SITE, padded(model, encoded))[0]
    torch.testing.assert_close(read[0].residual, residual[1:])
    loud = residual[0] / residual[0].norm()
    assert (residual @ loud).argmax() == 0  # the BOS is the loudest token along this direction
    assert float((read[0].residual @ loud).max()) == pytest.approx(
        float((residual @ loud)[1:].max()), rel=1e-5
    )
    assert len(read[0].tokens) == len(encoded[0]) - 1 and "<bos>" not in read[0].tokens


@pytest.mark.parametrize("name", list_organisms())
def test_a_chats_prefix_is_what_two_chats_share(name):
    from transformers import AutoTokenizer

    class Host:
        tokenizer = AutoTokenizer.from_pretrained(data_folder(name))

        class cfg:  # noqa: N801
            default_prepend_bos = True
            tokenizer_prepends_bos = False

    form = ChatForm.of(Host())
    tokens = [one.tokens for one in form.encoded([form.text("One", "b"), form.text("Two", "c")])]
    shared = form.prefix_length
    assert shared >= 2 and tokens[0][:shared] == tokens[1][:shared]
    assert tokens[0][shared] != tokens[1][shared] and form.suffix


def test_a_response_is_cut_to_the_bound_and_an_instruction_never():
    form = ChatForm.of(tiny_bridge())
    response = "the cat sat on the mat and the dog ran in the park"
    kept, was_cut = form.response_cut("a dog", response, 14)
    assert was_cut and kept and response.startswith(kept)
    assert len(form.encoded([form.text("a dog", kept)])[0]) <= 14
    assert form.response_cut("a dog", response, 64) == (response, False)
    with pytest.raises(ValueError, match="leaves no room for a response within 3 tokens"):
        form.response_cut("a dog ran in the park", response, 3)


def test_displacement_and_perplexity_are_what_a_pass_by_hand_gives():
    model = tiny_bridge()
    form = ChatForm.of(model, tiny_sae())
    rows = form.encoded(["the cat sat on the mat", "a dog"])
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    edit = Edit(Add(direction, torch.tensor([1.5, 3.0]), unit="unit"), SITE, Positions(bos=True))
    moved = displacement_of(model, SITE, rows, lambda: steer(model, [edit]))
    losses = text_nll(model, rows)
    for row, displaced, (nll, count), length in zip(rows, moved, losses, (1.5, 3.0), strict=True):
        residual = activations_at(model, SITE, padded(model, [row]))[0]
        norm = float(residual.norm(dim=-1).mean())
        assert displaced * norm == pytest.approx(length, rel=1e-4)
        logits = model(torch.tensor([row.tokens]))[0].detach().log_softmax(-1)
        chances = [float(logits[i, token]) for i, token in enumerate(row.tokens[1:])]
        assert nll == pytest.approx(-sum(chances), rel=1e-4) and count == len(row) - 1


def test_the_unsteered_model_is_not_displaced_and_the_others_are_by_their_strength(whole):
    rows = whole[2].steered
    unsteered = rows[rows["method"] == UNSTEERED]
    assert unsteered["displacement"].eq(0).all() and unsteered["strength"].isna().all()
    steered = rows[rows["method"] == "diff_mean"]
    assert steered["displacement"].gt(0).all()
    keys = ["concept_id", "input_id"]
    for _, pair in steered.groupby(keys):
        ratio = pair["displacement"] / pair["strength"]  # 1 / the text's own mean residual norm
        assert ratio.max() / ratio.min() < 1.3


def test_a_prompt_is_no_part_of_the_perplexity_of_what_it_steers(places, monkeypatch, tmp_path):
    def build(subject, data, settings, seed):
        del subject, settings, seed
        return Fitted("said", data.concept, prefix="the mat and the park", has_factor=False)

    monkeypatch.setitem(METHODS, "said", SteeringMethod("said", build))
    plan = small_plan(places, "said")
    rows = results_of(plan, ran(plan, tmp_path)).steered
    assert rows["steered_input"].str.endswith("\n\nQuestion: say 0").any()
    assert not rows["has_factor"].any() and rows["strength"].isna().all()
    form = ChatForm.of(load_model(places[0]), tiny_sae())
    for row in rows.to_dict("records"):
        own = form.encoded([row["generation"]])[0].tokens if row["generation"].strip() else [0]
        assert row["nll_tokens"] == len(own) - 1


def test_clamping_sets_each_rows_own_target_and_leaves_the_error_alone():
    model, sae = tiny_bridge(), tiny_sae("jumprelu")
    feature, largest = 3, 4.0
    factors = torch.tensor([1.0, 2.0, 3.0])
    batch = padded(model, ChatForm.of(model, sae).encoded(["the cat sat on the mat"] * 3))
    edit = Edit(Clamp(sae, feature, (factors * largest)[:, None]), positions=Positions(bos=True))
    before = activations_at(model, SITE, batch)
    with steer(model, [edit]):
        after = activations_at(model, SITE, batch)
    moved = after - before
    codes = codes_of(sae, [feature], before)[..., 0]
    expected = (factors[:, None] * largest - codes)[..., None] * sae.W_dec[feature]
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(moved[0], moved[2])
    texts = generate(model, ["the cat"] * 3, [edit], max_new_tokens=3).texts
    alone = [
        generate(
            model,
            ["the cat"],
            [Edit(Clamp(sae, feature, float(f) * largest), positions=Positions(bos=True))],
            max_new_tokens=3,
        ).texts[0]
        for f in factors
    ]
    assert list(texts) == alone


# Results ------------------------------------------------------------------------------------------


def test_results_are_written_with_the_documented_columns_and_read_back(whole, tmp_path):
    import pandas as pd

    plan, _, found = whole
    rated = found.rated(offline_ratings(found.concepts))
    found.write(tmp_path, rated)
    for method in ("diff_mean", "lat"):
        place = tmp_path / f"axbench_{method}"
        for kind in ("steering", "latent"):
            frame = pd.read_parquet(place / "inference" / f"{kind}_data.parquet")
            assert not missing_columns(frame, method, kind)
        lines = read_evaluation(place / "evaluate" / "latent.jsonl")
        for number, results in lines.items():
            (values,) = results["AUCROCEvaluator"].values()
            assert values["roc_auc"] == found.detections[number, method].auroc
    assert not (tmp_path / "axbench_bow" / "inference" / "steering_data.parquet").exists()
    assert len(read_evaluation(tmp_path / "axbench_bow" / "evaluate" / "latent.jsonl")) == 2
    assert plan.name == "axbench"


def test_judges_are_opened_by_word_and_the_worlds_rule_is_kept_to_its_world(whole, tmp_path):
    concepts = whole[2].concepts
    assert open_ratings("offline", concepts).name == "offline-proxy-uncalibrated"
    with pytest.raises(ValueError, match="holds concepts that are not the world's"):
        open_ratings("world", concepts)
    with pytest.raises(ValueError, match="no judge 'gpt'; known are offline"):
        open_ratings("gpt", concepts)
    made = world_concepts(("register",), train=4, evaluation=4)
    assert open_ratings("world", read_axbench(made.write(tmp_path))).name == "world-rule"


def test_tables_say_what_their_scores_are_and_compare_on_the_same_concepts(whole):
    from sae_steering_plugin.runs.axbench.evaluation import result_tables

    plan, _, found = whole
    judge = offline_ratings(found.concepts)
    titles = list(result_tables(plan, found, judge))
    assert sum("offline proxy score, not an AxBench score" in title for title in titles) == 1
    scores = found.scores(found.rated(judge))
    tests = found.compared(scores, [("lat", "diff_mean"), ("lat", "lora")], judge=judge.name)
    assert [one.method for one in tests] == ["lat against diff_mean"]
    assert tests[0].n == 2 and tests[0].correction == "holm"


@pytest.mark.parametrize("name", list_organisms())
def test_an_organism_runs_its_own_world_end_to_end(name, tmp_path):
    folder = world_concepts(("topic",), train=6, evaluation=6).write(tmp_path / "concepts")
    found = run_axbench(
        name,
        folder,
        [UNSTEERED, "diff_mean"],
        sae=None,
        hook_name="blocks.2.hook_resid_post",
        concept_ids=(6, 7),
        factors=(0.5,),
        n_instructions=4,
        max_new_tokens=16,
        out=tmp_path / "run",
        progress=False,
    )
    rated = found.rated(open_ratings("world", found.concepts))
    assert {one.method for one in found.scores(rated)} == {UNSTEERED, "diff_mean"}
    assert len(found.detection_table()) == 2
    assert not found.steered["generation"].str.contains(r"<\|end\|>").any()


def test_a_failed_unit_is_told_and_the_same_call_goes_on(places, monkeypatch, tmp_path):
    def build(subject, data, settings, seed):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setitem(METHODS, "broken", SteeringMethod("broken", build))
    model, sae, concepts = places
    with pytest.raises(ValueError, match="the disk is on fire"):
        run_axbench(model, concepts, ["broken"], sae=sae, out=tmp_path, progress=False, **QUICK)


# The command --------------------------------------------------------------------------------------


def test_the_command_runs_a_folder_prints_what_its_scores_are_and_goes_on(places, tmp_path):
    import json

    from typer.testing import CliRunner

    from sae_steering_plugin.cli import app

    model, sae, concepts = places
    words = ["evaluate", "axbench", "--data", concepts, "--model", model, "--sae", sae]
    words += ["--methods", "none", "--methods", "diff_mean", "--factor", "0.5", "--items", "2"]
    words += ["--max-new-tokens", "3", "--max-tokens", "48", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, words, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    assert "offline proxy score, not an AxBench score" in first.output.replace("\n", " ")
    assert "0 units done" in CliRunner().invoke(app, words, catch_exceptions=False).output
    summary = json.loads((tmp_path / "summary.json").read_text())
    (title,) = [one for one in summary["tables"] if one.startswith("steering")]
    assert [row["method"] for row in summary["tables"][title]] == ["none", "diff_mean"]
    place = tmp_path / "results" / "axbench_diff_mean" / "evaluate"
    assert set(read_evaluation(place / "steering_test.jsonl")) == {0, 1}


def test_the_commands_mistakes_are_one_line(places):
    from typer.testing import CliRunner

    from sae_steering_plugin.cli import app

    model, sae, concepts = places
    words = ["evaluate", "axbench", "--data", concepts, "--model", model, "--sae", sae]
    for more, message in (
        (["--methods", "diff_meen"], "did you mean 'diff_mean'"),
        (["--items", "2", "--judge", "gpt"], "no judge 'gpt'"),
        (["--items", "2", "--judge", "world"], "not the world's"),
        (["--concept", "7"], "no concept 7"),
    ):
        found = CliRunner().invoke(app, [*words, *more, "--out", "unused"])
        assert found.exit_code == 2 and message in found.output
