import json
import math

import pytest
import torch

from sae_steering_plugin.adapters.feature_metadata import kept_table
from sae_steering_plugin.adapters.sae_lens import SteeringDictionary
from sae_steering_plugin.adapters.steering import steer
from sae_steering_plugin.prediction import PREDICTOR_SETS
from sae_steering_plugin.prediction.predictors import SideEffectPredictor
from sae_steering_plugin.runs.screening import METRICS, Forecast, screen
from tests.hosts import tiny_bridge, tiny_sae, tokens_of_length

SIZE = 3


def later_sae():
    sae = tiny_sae(d_sae=40, seed=5)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    return sae


def screened(**options):
    return screen(
        tiny_bridge(),
        tiny_sae(d_sae=64),
        tokens_of_length(96, 6),
        tokens_of_length(64, 6, seed=9),
        downstream=later_sae(),
        size=SIZE,
        lowest=0.0,
        highest=1.0,
        progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def strict():
    return screened()


def test_the_strict_protocol_steers_no_pool_feature_on_label_contexts(strict):
    assert not set(strict.labels.table["feature"]) & set(strict.groups.pool)
    assert set(strict.fresh.table["feature"]) == set(strict.groups.pool)
    assert set(strict.groups.score.features) <= set(strict.groups.train)


def test_the_papers_protocol_labels_all_of_them():
    found = screened(protocol="paper", whole_pool=False)
    labelled = set(found.labels.table["feature"])
    assert set(found.groups.pool) <= labelled and set(found.groups.train) <= labelled
    members = {f for group in found.groups.groups.values() for f in group}
    assert set(found.fresh.table["feature"]) == members


def test_every_metric_compares_every_two_groups(strict):
    assert len(strict.rows) == 3 * len(METRICS)
    measured = strict.fresh.of()
    for row in strict.rows:
        one, other = row["groups"].split(" - ")
        means = [
            float(measured.of(strict.groups.groups[name]).table[row["metric"]].mean())
            for name in (one, other)
        ]
        assert row["difference"] == pytest.approx(means[0] - means[1], abs=1e-9)
        assert row["n"] == (SIZE, SIZE)
        assert row["p_value"] <= row["p_holm"] <= 1


def test_mann_whitney_is_scipys(strict):
    from scipy.stats import mannwhitneyu

    row = strict.rows[0]
    one, other = (
        strict.fresh.of().of(strict.groups.groups[name]).table[row["metric"]]
        for name in row["groups"].split(" - ")
    )
    found = mannwhitneyu(one, other)
    assert (row["u"], row["p_value"]) == (found.statistic, pytest.approx(found.pvalue))


def test_axes_hold_the_groups_means_and_a_held_out_correlation(strict):
    assert [row["axis"] for row in strict.axes] == ["stability", "spread", "clean"]
    stability = strict.fresh.of().of(strict.groups.groups["clean"]).table["stability_abs"]
    assert strict.axes[0]["clean_mean"] == pytest.approx(stability.mean())
    assert all(-1 <= row["spearman_heldout"] <= 1 for row in strict.axes)


def test_any_feature_of_the_dictionary_has_a_forecast(strict):
    trained = strict.groups.train[0]
    found = strict.forecast_of([trained, *strict.groups.pool[:2]])
    assert found[strict.groups.pool[0]] == strict.groups.forecast[strict.groups.pool[0]]
    assert math.isfinite(found[trained])


def test_a_screened_group_is_a_dictionary_with_its_stability_and_spread(strict, tmp_path):
    sae = tiny_sae(d_sae=64)
    dictionary = strict.dictionary(sae, "messy")
    chosen = strict.groups.groups["messy"]
    assert torch.equal(dictionary.W_dec, sae.W_dec[list(chosen)])
    measured = strict.fresh.of().of(chosen).table
    dictionary.save_model(tmp_path)
    kept = SteeringDictionary.load_from_disk(tmp_path)
    assert kept.stability.tolist() == pytest.approx(measured["stability_abs"].tolist())
    assert kept.spread.tolist() == pytest.approx(measured["count_per_effect"].tolist())
    told = kept_table(kept)
    assert list(told.table.index) == list(chosen)
    assert list(told.table["effect"]) == list(measured["effect"])
    assert list(told.table["forecast"]) == [strict.groups.forecast[f] for f in chosen]
    assert told.settings["strength"] == 1.0
    with pytest.raises(ValueError, match="choose one of clean, random, messy"):
        strict.dictionary(sae, "cleanest")


def test_everything_is_written_and_read_back(strict, tmp_path):
    paths = strict.save(tmp_path, tiny_sae(d_sae=64))
    assert all(path.exists() for path in paths)
    told = json.loads((tmp_path / "screen.json").read_text())
    assert told["groups"]["clean"] == list(strict.groups.groups["clean"])
    assert len(told["differences"]) == len(strict.rows)
    forecast = SideEffectPredictor.load(tmp_path / "forecast_score.safetensors")
    again = forecast.predict(strict.statistics.of(strict.groups.pool)).table["clean"]
    assert dict(again) == strict.groups.forecast
    assert Forecast.load(tmp_path).forecast_of(strict.groups.pool) == strict.groups.forecast


def test_features_kept_out_are_neither_labelled_nor_pooled(strict):
    kept = (*strict.groups.train[:2], strict.groups.pool[0])
    found = screened(without=kept)
    assert not set(kept) & {*found.groups.pool, *found.labels.table["feature"]}
    assert all(math.isfinite(v) for v in found.forecast_of(kept).values())


def test_the_same_seed_gives_the_same_screen(strict):
    again = screened()
    assert again.groups.groups == strict.groups.groups
    assert again.rows == strict.rows and again.axes == strict.axes
    assert screened(seed=1).groups.train != strict.groups.train


def test_a_set_with_gradients_reads_them_before_anything_is_steered():
    found = screened(columns="tangent_only", whole_pool=False)
    assert set(found.groups.score.columns) == set(PREDICTOR_SETS["tangent_only"])
    assert found.statistics.settings["gradient_contexts"] == 96


def test_fresh_contexts_must_be_fresh():
    tokens = tokens_of_length(96, 6)
    with pytest.raises(ValueError, match="64 of 64 fresh contexts are label contexts"):
        screen(
            tiny_bridge(), tiny_sae(), tokens, tokens[:64], downstream=later_sae(), progress=False
        )


def test_forecasting_needs_no_steered_pass(strict, monkeypatch):
    from sae_steering_plugin.adapters import columns

    def refuse(*_arguments, **_named):
        raise AssertionError("a steered pass")

    monkeypatch.setattr(columns.ContextRows, "under", refuse)
    monkeypatch.setattr(f"{steer.__module__}.steer", refuse)
    assert strict.forecast_of(strict.groups.pool)
