from functools import cache

import numpy as np
import pytest
import torch

from sae_steering_plugin import validate_selection
from sae_steering_plugin.runs.selection import select_features
from sae_steering_plugin.runs.validation import arms_of
from tests.planted import BACKGROUND, PROMPT, planted

PROMPTS = [" ".join(f"word{(7 * i + j) % BACKGROUND}" for j in range(4)) for i in range(16)]


@cache
def chosen(variant="full"):
    p = planted()
    labels = {name: p.labels[name] for name in ("label 0", "label 1")}
    return select_features(
        p.model, p.sae, p.texts, labels, variant=variant, cut=0.1, support=40, k=1,
        candidates=2,
        prompt=PROMPT, lens_k=5, progress=False,
    )  # fmt: skip


def validated(variant="full", **options):
    p = planted()
    settings = {"strengths": (5.0, 50.0), "controls": 5, "tokens": p.tokens, "progress": False}
    return validate_selection(p.model, p.sae, chosen(variant), PROMPTS, **{**settings, **options})


def test_the_planted_cause_beats_every_control():
    found = validated()
    table = found.table()
    assert set(table.against) == {"unsteered", "random features", "random directions"}
    assert (table.ci_low > 0).all() and (table.p_adjusted < 0.05).all()
    assert set(found.chosen.values()) == {50.0}
    assert all(p == 1 / 11 for p in found.rank_p.values())
    assert (table.n == 8).all()


def test_a_cause_gains_more_than_a_detector_of_the_same_length():
    p = planted()
    cause, detector = validated().gains, validated("interpretability", strengths=(5.0,)).gains
    assert min(cause.values()) > 0.5 > max(detector.values())
    assert p.inputs[0] == chosen("interpretability").selections["label 0"].features[0]


def test_a_concept_without_a_feature_counts_as_no_gain():
    from dataclasses import replace

    lacking = replace(chosen(), missing={"label 9": "no feature tells it"})
    p = planted()
    found = validate_selection(
        p.model, p.sae, lacking, PROMPTS, strengths=(50.0,), controls=2, tokens=p.tokens,
        progress=False,
    )  # fmt: skip
    summary = found.summary()
    assert summary["concepts"] == 3 and summary["survivors"] == 2
    assert summary["mean_gain_all"] == pytest.approx(summary["mean_gain_survivors"] * 2 / 3)
    assert summary["ci_low"] <= summary["mean_gain_all"] <= summary["ci_high"]
    assert "unsteered" in found.table().against.iloc[-1]


def test_the_strength_is_chosen_on_other_prompts_than_those_reported():
    """An outcome that differs by half: what the choosing half prefers is what is chosen."""
    p = planted()
    calls = []

    def judge(concept, texts):
        calls.append(len(texts))
        return [text.count("own0") + 0.01 * text.count("1") for text in texts]

    found = validated(judge=judge, max_new_tokens=3, strengths=(1.0, 50.0), controls=2)
    assert calls == [16, 80, 80] * 2
    assert found.settings["choosing"] == found.settings["reporting"] == 8
    assert found.gains["label 0"] > 2.0  # three new tokens, nearly all of them the label's
    assert {e.judge for e in found.effects} == {"given"}
    assert found.chosen["label 0"] == 50.0
    assert p.labels


def test_arms_have_one_length_and_controls_are_nobodys_choice():
    p = planted()
    arms = arms_of(chosen().vectors["label 0"][0], p.sae, {*p.inputs, *p.outputs}, 4, seed=0)
    assert torch.allclose(arms.norm(dim=1), torch.ones(9))
    rows = p.sae.W_dec.detach() / p.sae.W_dec.detach().norm(dim=1, keepdim=True)
    nearest = (arms[1:5] @ rows.T).argmax(1).tolist()
    assert set(nearest) <= set(p.random)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="16 prompts, 1 of them different"):
        p = planted()
        validate_selection(p.model, p.sae, chosen(), PROMPTS[:1] * 16)
    with pytest.raises(ValueError, match="give positive numbers"):
        validated(strengths=(0.0, 1.0))
    with pytest.raises(ValueError, match="at least one control"):
        validated(controls=0)
    with pytest.raises(ValueError, match="controls are asked"):
        validated(controls=99)
    with pytest.raises(ValueError, match="'label 0' has no lexicon"):
        validated(tokens={"label 0": ()})
    with pytest.raises(ValueError, match="the judge gave"):
        validated(judge=lambda concept, texts: np.zeros(3), max_new_tokens=1)
