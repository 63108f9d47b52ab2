import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from sae_steering_plugin.directions.codes import fired_codes
from sae_steering_plugin.directions.dense import diff_mean_vector
from sae_steering_plugin.directions.fits import PROBES
from sae_steering_plugin.directions.probe import (
    decoded,
    probe_vector,
    score_table,
    weight_spread,
)
from tests.directions.planted import fired_of, labelled_of, probe_toy
from tests.hosts import D_MODEL, SITE, tiny_sae

QUICK = {"permutations": 2, "strengths": (1.0,)}


def random_rows(n=60, **options):
    generator = torch.Generator().manual_seed(2)
    x = 2 * torch.randn(n, D_MODEL, generator=generator)
    return labelled_of(x, (x[:, 0] > 0).long(), **options)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {}),
        ("gated", {}),
        ("jumprelu", {}),
        ("topk", {}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
    ],
    ids=str,
)
def test_vector_is_the_weights_times_the_rows_in_the_unit_row_convention(architecture, options):
    sae, labelled = tiny_sae(architecture, **options), random_rows()
    v = probe_vector(labelled, sae, **QUICK)
    with torch.no_grad():
        codes = sae.encode(labelled.activations).double()
        rows = sae.W_dec.double()
    if options:  # decode divides rows by their norm already, and encode multiplied the codes
        rows = rows / rows.norm(dim=1, keepdim=True)
    norms = rows.norm(dim=1)
    fit = Ridge(alpha=1.0).fit((codes * norms).numpy(), labelled.labels.double().numpy())
    expected = torch.as_tensor(fit.coef_) @ (rows / norms[:, None])
    assert torch.allclose(v.vector.double(), expected, atol=1e-6)


def test_biases_of_the_decoder_do_not_enter():
    sae, labelled = tiny_sae("standard", apply_b_dec_to_input=False), random_rows()
    before = probe_vector(labelled, sae, **QUICK).vector
    with torch.no_grad():
        sae.b_dec.fill_(100.0)
    assert torch.equal(probe_vector(labelled, sae, **QUICK).vector, before)


@pytest.mark.parametrize("seed", range(5))
def test_planted_latent_has_the_largest_weight_and_centring_helps(seed):
    """The bounds are those measured on this design in the method page: 0.72-0.80 and 0.94-0.96."""
    codes, labels, labelled = probe_toy(seed=seed)
    row = codes.rows[7]
    as_published = probe_vector(labelled, None, codes=codes, center=False, **QUICK)
    centred = probe_vector(labelled, None, codes=codes, center=True, **QUICK)
    for v in (as_published, centred):
        assert v.recipe.settings["top_features"][0][0] == 7
    assert float(as_published.direction @ row) > 0.6
    assert float(centred.direction @ row) > 0.9
    assert centred.recipe.scores["permuted_r2"] <= 0.05
    assert centred.recipe.scores["r2"] > 0.5


def test_permuted_labels_score_nothing_on_grouped_folds():
    codes, labels, labelled = probe_toy(seed=0, n=200)
    generator = torch.Generator().manual_seed(0)
    scores = [
        probe_vector(
            replace(labelled, labels=labels[torch.randperm(200, generator=generator)]),
            None,
            codes=codes,
            permutations=0,
            strengths=(1.0, 100.0),
        ).recipe.scores["r2"]
        for _ in range(20)
    ]
    assert sum(scores) / 20 <= 0.05


def test_equivalent_dictionaries_give_one_vector_only_in_the_unit_row_convention():
    codes, labels, labelled = probe_toy(seed=0)
    generator = torch.Generator().manual_seed(1)
    c = torch.exp(2 * torch.randn(64, generator=generator))
    scaled = fired_of(codes.values * c, codes.rows / c[:, None])
    for convention, same in ((True, True), (False, False)):
        one, two = (
            probe_vector(labelled, None, codes=form, unit_rows=convention, **QUICK).direction
            for form in (codes, scaled)
        )
        assert (float(one @ two) > 0.9999) is same


def test_logistic_and_mean_difference_probes_find_the_planted_latent():
    codes, _, labelled = probe_toy(seed=0, n=200)
    for name in ("logistic", "mean_difference"):
        v = probe_vector(labelled, None, codes=codes, probe=name, **QUICK)
        assert v.recipe.settings["top_features"][0][0] == 7
        assert float(v.direction @ codes.rows[7]) > 0.6
        assert v.recipe.settings["probe"] == name
        assert v.recipe.scores["auroc"] > 0.95


def test_a_probe_of_ones_own_can_be_given():
    codes, _, labelled = probe_toy(seed=0, n=100)
    mine = replace(PROBES["ridge"], name="mine")
    ours = probe_vector(labelled, None, codes=codes, probe=mine, **QUICK)
    assert ours.recipe.settings["probe"] == "mine"
    assert torch.equal(ours.vector, probe_vector(labelled, None, codes=codes, **QUICK).vector)


def test_raw_activations_probe_is_reported_and_is_not_the_vector():
    codes, _, labelled = probe_toy(seed=0, n=200)
    v = probe_vector(labelled, None, codes=codes, **QUICK)
    assert v.recipe.scores["raw_auroc"] > 0.8
    assert float(v.direction @ diff_mean_vector(labelled).direction) < 0.999


def test_wording_that_gives_the_label_away_shows_in_the_text_baseline():
    codes, labels, labelled = probe_toy(seed=0, n=100)
    texts = [f"{'act at once' if y else 'please ask'} item {i}" for i, y in enumerate(labels)]
    v = probe_vector(replace(labelled, texts=tuple(texts)), None, codes=codes, **QUICK)
    assert v.recipe.scores["text_r2"] > 0.9
    table = str(score_table(v))
    assert "text only (words)" in table
    assert "permuted labels" in table
    assert f"{v.recipe.scores['text_r2']:.3f}" in table


def test_score_table_is_safe_html_and_belongs_to_probes():
    codes, _, labelled = probe_toy(seed=0, n=60)
    v = probe_vector(labelled, None, codes=codes, label="<script>", **QUICK)
    page = score_table(v)._repr_html_()
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    with pytest.raises(ValueError, match="'diff_mean' vectors have no probe scores"):
        score_table(diff_mean_vector(labelled))


def test_replication_chooses_by_test_r2_and_says_so():
    codes, labels, labelled = probe_toy(seed=0, n=100)
    v = probe_vector(labelled, None, codes=codes, replication=True, permutations=1)
    settings, scores = v.recipe.settings, v.recipe.scores
    assert "chosen on the test rows" in settings["preset"]
    assert (settings["probe"], settings["center"], settings["standardize"]) == (
        "ridge",
        False,
        False,
    )
    assert (settings["fitted_rows"], v.recipe.seed) == (80, 42)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(42))
    X = (codes.values.double() * codes.rows.double().norm(dim=1)).numpy()
    y = labels.double().numpy()
    train, test = order[:80].numpy(), order[80:].numpy()
    found = {}
    for a in (0.01, 0.1, 1.0, 10.0):
        centred = y[train] - y[train].mean()
        w = np.linalg.solve(X[train].T @ X[train] + a * np.eye(64), X[train].T @ centred)
        guess = X[test] @ w + y[train].mean()
        spread = ((y[test] - y[test].mean()) ** 2).sum()
        found[a] = (1 - ((y[test] - guess) ** 2).sum() / spread, w)
    best = max(found, key=lambda a: found[a][0])
    assert settings["strength"] == best
    assert scores["test_r2_that_chose_the_penalty"] == pytest.approx(found[best][0], abs=1e-8)
    rows = (codes.rows / codes.rows.norm(dim=1, keepdim=True)).double()
    assert torch.allclose(v.vector.double(), torch.as_tensor(found[best][1]) @ rows, atol=1e-6)
    assert "also chose the penalty" in str(score_table(v))


def test_recipe_survives_strict_json_and_carries_its_origin():
    labelled = random_rows(groups=[f"g{i // 4}" for i in range(60)])
    sae = tiny_sae("topk")
    v = probe_vector(labelled, sae, positive="asks less", label="autonomy", **QUICK)
    record = json.loads(json.dumps(v.recipe.to_dict(), allow_nan=False))
    assert record["source"] == "arXiv 2603.16335"
    assert record["sae_id"].startswith("topk@")
    assert record["mean_norm"] == pytest.approx(labelled.mean_norm)
    assert record["positive"] == "asks less"
    assert record["n"] == 60
    assert v.hook_name == SITE


def test_labels_without_signal_warn_and_give_no_nan():
    codes = fired_of(torch.ones(8, 3), torch.eye(3))
    labelled = labelled_of(torch.ones(8, 3), [0, 1] * 4)
    with pytest.warns(UserWarning, match="labels carry no signal"):
        v = probe_vector(labelled, None, codes=codes, permutations=0)
    assert v.vector.tolist() == [0, 0, 0]


def test_weights_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="weights hold a value that is not finite"):
        decoded(torch.tensor([1.0, float("nan")]), torch.eye(2))


def test_activations_of_another_site_are_refused():
    with pytest.raises(ValueError, match="trained on"):
        probe_vector(random_rows(hook_name="blocks.1.hook_resid_post"), tiny_sae(), **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe": "lasso"}, "no probe 'lasso'"),
        ({"strengths": ()}, "each penalty must be positive"),
        ({"strengths": (0.0, 1.0)}, "each penalty must be positive"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        probe_vector(random_rows(), tiny_sae(), **options)


def test_weight_spread_counts_the_latents_that_hold_the_weight():
    w = torch.tensor([3.0, -1.0, 0.0, 1.0])  # squares 9, 1, 1 of 11: 82 %, 91 %, 100 %
    assert weight_spread(w) == {"50%": 1, "80%": 1, "90%": 2, "95%": 3}


def test_codes_given_once_are_not_encoded_again():
    labelled, sae = random_rows(), tiny_sae("jumprelu")
    codes = fired_codes(sae, labelled)
    again = probe_vector(labelled, None, codes=codes, **QUICK)
    assert torch.equal(again.vector, probe_vector(labelled, sae, **QUICK).vector)


def test_run_time_normalisation_gives_the_direction_of_its_own_codes():
    sae = tiny_sae("standard", normalize_activations="layer_norm")
    v = probe_vector(random_rows(), sae, **QUICK)
    assert v.recipe.settings["code_scale"] != 1.0
    assert v.norm > 0
