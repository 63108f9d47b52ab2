import copy

import numpy as np
import pytest
import torch

from sae_steering_plugin.runs.sparsity import sparsity_study, with_intervals
from tests.planted import PROMPT, planted
from tests.runs.test_validation import PROMPTS


def lowered(bias):
    """The planted SAE with a lower threshold: the same features, firing on more tokens."""
    sae = copy.deepcopy(planted().sae)
    with torch.no_grad():
        sae.W_enc += 0.02 * torch.randn(sae.W_enc.shape, generator=torch.Generator().manual_seed(0))
        sae.b_enc += bias
    return sae


def test_firing_frequency_loses_a_dense_dictionary_and_mean_activation_keeps_it():
    """Check 11: the pooling, not the dictionary, forgets the concept."""
    p = planted()
    labels = {name: p.labels[name] for name in ("label 0", "label 1")}
    rows = sparsity_study(
        p.model, {"sparse": lowered(-0.05), "dense": lowered(0.5)}, p.texts, labels, PROMPTS,
        strengths=(5.0,), support=40, variant="interpretability", prompt=PROMPT, progress=False,
        candidates=2,
    )  # fmt: skip
    found = {(row["sae"], row["pooling"]): row for row in rows}
    assert found["dense", "mean"]["l0"] > 4 * found["sparse", "mean"]["l0"]
    assert found["dense", "frequency"]["auroc"] < found["sparse", "frequency"]["auroc"]
    assert found["dense", "frequency"]["auroc"] < found["dense", "mean"]["auroc"]
    assert found["sparse", "mean"]["gain_less_sparsest"] == 0.0


def test_intervals_are_over_concepts():
    rows = [
        {"pooling": "mean", "l0": l0, "areas": np.full(20, 0.8), "gains": np.arange(20) / 20 + l0}
        for l0 in (1.0, 2.0)
    ]
    found = with_intervals(rows[1], rows, 500, 0)
    assert found["gain_low"] < found["gain"] < found["gain_high"]
    assert found["auroc_low"] == pytest.approx(0.8) == found["auroc_high"]
    assert found["gain_less_sparsest_low"] == pytest.approx(1.0)  # paired: no spread is left


def test_dictionaries_of_two_layers_are_no_study():
    p = planted()
    other = copy.deepcopy(p.sae)
    other.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    with pytest.raises(ValueError, match="one layer at a time"):
        sparsity_study(p.model, {"a": p.sae, "b": other}, p.texts, p.labels, PROMPTS)
