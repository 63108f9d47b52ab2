"""On the planted fixture, where which option is right is known."""

import numpy as np
import pytest

from sae_steering_plugin.runs import option_choice
from sae_steering_plugin.runs.option_choice import choose_options, openings
from sae_steering_plugin.runs.pooled_codes import collect_codes
from sae_steering_plugin.runs.selection import needed_poolings, select_features
from tests.planted import BACKGROUND, PROMPT, planted

PROMPTS = [" ".join(f"word{(7 * i + j) % BACKGROUND}" for j in range(4)) for i in range(16)]
COMMON = {"support": 40, "prompt": PROMPT, "lens_k": 5, "candidates": 2}


def chosen(grid, **options):
    p = planted()
    labels = {name: p.labels[name] for name in ("label 0", "label 1")}
    settings = {**COMMON, "strengths": (50.0,), "controls": 3, "progress": False, **options}
    return choose_options(p.model, p.sae, p.texts, labels, grid, prompts=PROMPTS, **settings)


def test_validation_takes_the_cut_that_separates_causes_from_detectors():
    p = planted()
    found = chosen({"cut": (0.0, 0.1, 0.9)})
    assert found.options == {"cut": 0.1}
    assert [s.features[0] for s in found.selected.selections.values()] == list(p.outputs[:2])
    none, right, nothing = found.rows
    assert none["with_feature"] == 2 > nothing["with_feature"] == 0
    assert right["gain"] > none["gain"] + 0.1 and nothing["gain"] == 0.0
    assert none["validation_auroc"] == right["validation_auroc"] > nothing["validation_auroc"]
    assert found.table().iloc[0]["cut"] == 0.1


def test_the_first_of_equal_combinations_is_taken_and_each_feature_is_measured_once(monkeypatch):
    calls = []
    real = option_choice.validate_selection

    def counted(*arguments, **options):
        calls.append(tuple(arguments[2].selections))
        return real(*arguments, **options)

    monkeypatch.setattr(option_choice, "validate_selection", counted)
    found = chosen({"prior": (1e-2, 1e-3), "order": ("output",)}, cut=0.0)
    assert found.options == {"prior": 1e-2, "order": "output"}
    assert calls == [("label 0", "label 1")]
    assert found.rows[0]["gain"] == found.rows[1]["gain"]


def test_only_training_and_validation_texts_choose():
    p = planted()
    first = chosen({"cut": (0.0, 0.1)}, seed=3)
    splits = np.array(first.selected.splits)
    labels = {name: p.labels[name].copy() for name in ("label 0", "label 1")}
    for column in labels.values():
        column[splits == "test"] = 1 - column[splits == "test"]
    again = choose_options(
        p.model, p.sae, p.texts, labels, {"cut": (0.0, 0.1)}, prompts=PROMPTS, seed=3,
        strengths=(50.0,), controls=3, progress=False, **COMMON,
    )  # fmt: skip
    assert again.rows == first.rows and again.options == first.options


def test_codes_at_hand_select_what_reading_the_texts_again_does():
    p = planted()
    labels = {"label 0": p.labels["label 0"]}
    codes = collect_codes(p.model, p.sae, p.texts, poolings=needed_poolings(), progress=False)
    given, read = (
        select_features(
            p.model, p.sae, p.texts, labels, variant="interpretability", progress=False,
            codes=one, **{k: v for k, v in COMMON.items() if k != "prompt"}, k=2,
        )
        for one in (codes, None)
    )  # fmt: skip
    assert given.selections["label 0"].rows() == read.selections["label 0"].rows()
    with pytest.raises(ValueError, match="codes lack the pooling 'mean'"):
        select_features(p.model, p.sae, p.texts, labels, codes=codes, pooling="mean")
    with pytest.raises(ValueError, match="codes are of 600 texts in .* are 599 texts"):
        short = {"label 0": p.labels["label 0"][1:]}
        select_features(p.model, p.sae, p.texts[1:], short, codes=codes)


def test_openings_are_halves_of_texts_each_once():
    assert openings(["a b c d", "a b x y", "e"], 5) == ["a b", "e"]


def test_a_grid_without_a_choice_is_refused():
    with pytest.raises(ValueError, match="the grid names no option to choose"):
        chosen({})
    with pytest.raises(ValueError, match="'cut' is both in the grid and given"):
        chosen({"cut": (0.0,)}, cut=0.1)
