"""Checks of shared/methods/supervised_feature_selection, section 8, on the planted fixture."""

import json
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from sae_steering_plugin import LAST, Add, Edit, SteeringDictionary, select_features
from sae_steering_plugin.adapters.sae_lens import load_sae
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.runs.pooled_codes import collect_codes
from sae_steering_plugin.runs.selection import heldout_f1, lexicons, usable_concepts
from tests.planted import PROMPT, planted

CUT = 0.1


def selected(**options):
    p = planted()
    settings = {"support": 40, "prompt": PROMPT, "lens_k": 5, "k": 2, "candidates": 2}
    settings["progress"] = False
    return select_features(p.model, p.sae, p.texts, p.labels, **{**settings, **options})


@cache
def full():
    return selected(cut=CUT)


@cache
def by_interpretability():
    return selected(variant="interpretability")


def first(found):
    return tuple(s.features[0] for s in found.selections.values())


def test_twins_tie_in_detection_and_both_are_candidates():
    p = planted()
    for concept, one, other in zip(p.labels, p.inputs, p.outputs, strict=True):
        chosen = by_interpretability().selections[concept]
        assert set(chosen.features) == {one, other}
        assert chosen.scores["train_f1"][0] == chosen.scores["train_f1"][1]


def test_the_causal_variant_keeps_exactly_the_output_twins():
    p = planted()
    assert first(full()) == p.outputs
    assert all(len(s.features) == 1 for s in full().selections.values())
    assert first(by_interpretability()) == p.inputs  # the tie goes to the smaller number


@pytest.mark.parametrize("order", ["output", "product"])
def test_orders_with_the_output_score_put_the_cause_first(order):
    p = planted()
    assert first(selected(cut=0.0, order=order)) == p.outputs


def test_equal_scores_go_to_the_cause_and_unequal_ones_keep_their_order():
    p = planted()
    options = {"cut": 0.0, "order": "equals", "k": 30, "candidates": 30}
    ties = selected(**options, within=0.0)
    with pytest.warns(UserWarning, match="best for several concepts"):
        every = selected(**options, within=9.0)  # all are equal: one feature causes most
    by_score = selected(cut=0.0, k=30, candidates=30)
    assert first(ties) == p.outputs and first(by_score) == p.inputs
    for concept, one in ties.selections.items():
        plain = by_score.selections[concept].features
        assert one.features[1] == plain[0] and one.features[2:] == plain[2:]
        outputs = every.selections[concept].scores["output_score"]
        assert list(outputs) == sorted(outputs, reverse=True)


def test_a_random_feature_scores_far_below_the_planted_one():
    p = planted()
    found = selected(variant="interpretability", k=20, candidates=30)
    for concept in p.labels:
        scores = dict(
            zip(
                found.selections[concept].features,
                found.selections[concept].scores["train_f1"],
                strict=True,
            )
        )
        best = max((scores[f] for f in p.random if f in scores), default=0.0)
        assert best < 0.1 < max(scores.values())


def test_the_output_twin_climbs_where_the_input_twin_saturates():
    """Check 4, as a claim about shapes: strengths are multiples of each twin's own a_max."""
    p = planted()
    tokens = torch.tensor([[1, 33, 34, 35, 36]])
    own = list(p.tokens["label 0"])

    def curve(vector):
        strengths = torch.tensor([0.4, 1.0, 2.0, 5.0, 20.0])
        edit = Edit(Add(vector, strengths, unit="max_activation"), positions=LAST)
        logits = steered_logits(p.model, tokens, edit, copies=5, last_only=True)
        return logits.softmax(-1)[:, own].sum(-1)

    cause = curve(full().vectors["label 0"][0])
    detector = curve(by_interpretability().vectors["label 0"][0])
    assert bool((cause.diff() > 0).all())
    assert float((detector[-1] - detector[-2]).abs()) < 0.01
    assert full().vectors["label 0"][0].recipe.max_activation == pytest.approx(0.1, abs=0.01)
    assert by_interpretability().vectors["label 0"][0].recipe.max_activation == pytest.approx(
        3.0, abs=0.01
    )


def test_a_label_without_a_feature_is_reported_with_its_fallback(tmp_path):
    p = planted()
    rare = np.zeros(len(p.texts))
    rare[:5] = 1.0
    found = select_features(
        p.model, p.sae, p.texts, {"label 0": p.labels["label 0"], "rare": rare}, cut=0.9,
        support=40, prompt=PROMPT, lens_k=5, progress=False,
    )  # fmt: skip
    assert found.missing["rare"] == "5 texts, support asks for 40"
    assert "candidates has an output score of 0.9 (largest 0.16)" in found.missing["label 0"]
    assert found.coverage == (0, 2) and found.to_vectors() == []
    assert all(row.endswith("fallback: unsteered") for row in found.table().note)
    assert len(found.save(tmp_path)) == 2 and not (tmp_path / "vectors").exists()
    assert any("'rare' has no feature" in note for note in found.notes)


def test_a_feature_that_is_best_for_two_concepts_is_named():
    p = planted()
    column = p.labels["label 0"]
    with pytest.warns(UserWarning, match="best for several concepts: {6: .'one', 'other'.}"):
        select_features(
            p.model, p.sae, p.texts, {"one": column, "other": column}, cut=0.1, candidates=2,
            k=1, support=40, prompt=PROMPT, lens_k=5, progress=False,
        )  # fmt: skip


def test_shuffled_labels_leave_nothing_on_held_out_texts():
    p = planted()
    order = np.random.default_rng(0).permutation(len(p.texts))
    found = select_features(
        p.model, p.sae, p.texts, {c: column[order] for c, column in p.labels.items()},
        variant="interpretability", support=40, prior=1e-2, progress=False,
    )  # fmt: skip
    shuffled = [s.scores["test_f1"][0] for s in found.selections.values()]
    real = selected(variant="interpretability", prior=1e-2)
    honest = [s.scores["test_f1"][0] for s in real.selections.values()]
    assert np.mean(shuffled) < 0.1 < np.mean(honest)


def test_order_of_texts_changes_no_score():
    p = planted()
    order = np.random.default_rng(1).permutation(len(p.texts))
    splits = by_interpretability().splits
    found = select_features(
        p.model, p.sae, [p.texts[i] for i in order], {c: x[order] for c, x in p.labels.items()},
        splits=[splits[i] for i in order], variant="interpretability", support=40, k=2,
        progress=False,
    )  # fmt: skip
    for concept, selection in by_interpretability().selections.items():
        assert found.selections[concept].features == selection.features
        for name in ("train_f1", "test_f1", "a_max", "density"):
            assert found.selections[concept].scores[name] == pytest.approx(
                selection.scores[name], rel=1e-5
            )


def test_a_max_is_the_largest_code_over_training_tokens_only():
    p = planted()
    pooled = collect_codes(p.model, p.sae, p.texts, poolings=("max",), progress=False)["max"]
    train = [i for i, split in enumerate(full().splits) if split == "train"]
    largest = pooled.dense()[train].amax(0)
    for concept, selection in full().selections.items():
        feature = selection.features[0]
        assert selection.scores["a_max"][0] == pytest.approx(float(largest[feature]))
        vector = full().vectors[concept][0]
        assert torch.equal(vector.vector, p.sae.W_dec[feature].detach())
        assert vector.length_of("max_activation") == pytest.approx(
            float(largest[feature]) * float(p.sae.W_dec[feature].detach().norm()), rel=1e-5
        )


def test_held_out_f1_at_its_own_prevalence_is_the_plain_one():
    y = np.array([1.0, 1, 1, 0, 0, 0, 0, np.nan])
    guess = np.array([1, 1, 0, 1, 0, 0, 0, 1], dtype=bool)
    assert heldout_f1(guess, y, None) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert heldout_f1(guess, y, 1e-3) < 0.01
    assert np.isnan(heldout_f1(guess, np.zeros(8), None))


def test_a_selection_becomes_a_saelens_folder(tmp_path):
    written = full().save(tmp_path)
    table = pd.read_csv(written[0])
    assert table.feature.tolist() == list(planted().outputs)
    about = json.loads(written[1].read_text())
    assert about["coverage"] == [6, 6] and about["causal"]["prompt"] == PROMPT
    book = load_sae(written[2])
    assert [v.label for v in book.vectors()] == list(planted().labels)
    assert isinstance(full().to_dictionary(), SteeringDictionary)
    assert book.vector("label 3").recipe.max_activation == pytest.approx(0.1, abs=0.01)


def test_lexicons_are_the_labels_own_tokens():
    p = planted()
    everything = torch.arange(len(p.texts))
    found = lexicons(p.model, p.sae, p.texts, p.labels, everything, list(p.labels))
    for concept, own in p.tokens.items():
        assert set(found[concept][:5]) == set(own)
        assert len(set(full().lexicon[concept][:5]) & set(own)) >= 4  # from a fifth of the texts


def test_unknown_labels_are_left_out_of_their_concept():
    p = planted()
    column = p.labels["label 0"].copy()
    column[:50] = np.nan
    names, table, missing = usable_concepts({"label 0": column}, len(p.texts), support=10)
    assert names == ("label 0",) and not missing and np.isnan(table[:50]).all()


def test_wrong_options_stop_before_the_model():
    texts = ["a b"] * 4
    for options, message in (
        ({"variant": "causal"}, "no variant 'causal'; choose among full, interpretability"),
        ({"score": "f2"}, "no score 'f2'; choose among"),
        ({"order": "best"}, "no order 'best'"),
        ({"pooling": "median"}, "no pooling"),
        ({"order": "output", "variant": "interpretability"}, "needs output scores"),
        ({"k": 60}, "1 <= k <= candidates"),
        ({}, "no concept has enough texts .'x': 2 texts, support asks for 50"),
    ):
        with pytest.raises(ValueError, match=message):
            select_features(None, None, texts, {"x": [1, 1, 0, 0]}, **options)


class Says:
    """Forecasts as planted: these features are clean, the others are not, some have none."""

    def __init__(self, clean, unknown=()):
        self.clean, self.unknown = set(clean), set(unknown)

    def forecast_of(self, features):
        return {f: float("nan") if f in self.unknown else float(f in self.clean) for f in features}


def test_a_forecast_chooses_among_features_of_equal_score_and_no_others():
    p = planted()
    found = selected(variant="interpretability", screen=Says(p.outputs))
    assert first(found) == p.outputs  # without a forecast the tie goes to the inputs
    chosen = found.selections["label 0"]
    assert chosen.scores["forecast"] == (1.0, 0.0)
    assert found.equals["label 0"].chosen["score"] == (p.inputs[0],)
    assert any("for 6 of them the forecast took another one" in note for note in found.notes)
    kept = selected(variant="interpretability", screen=Says(p.inputs, unknown=p.outputs))
    assert first(kept) == p.inputs
    # a random feature is far below the best score, so no forecast brings it up
    poor = selected(variant="interpretability", screen=Says(p.random), candidates=30, k=20)
    assert all(not {f} & set(p.random) for f in first(poor))


def test_a_screen_goes_with_the_order_of_scores():
    with pytest.raises(ValueError, match="a screen chooses among equal scores: order is 'output'"):
        selected(order="output", screen=Says(()))
