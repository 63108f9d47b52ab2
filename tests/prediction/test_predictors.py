import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from sae_steering_plugin.prediction.predictors import (
    CONTROLS,
    SideEffectPredictor,
    clean_scale,
    clean_score,
    cross_validate,
    difference,
    fit_predictor,
    label_values,
)
from sae_steering_plugin.types import FeatureTable
from tests.prediction.tables import effects, statistics

COLUMNS = ("decoder_norm", "kurtosis")


def planted(n=300, noise=0.3):
    table = statistics(n)
    rng = np.random.default_rng(5)
    x = table.table[list(COLUMNS)].to_numpy()
    y = 2 * x[:, 0] - x[:, 1] + noise * rng.normal(size=n)
    return table, effects(table, planted=y), y


@pytest.mark.parametrize("model", ["ridge", "trees"])
def test_a_planted_relation_is_recovered_out_of_fold(model):
    table, labels, _ = planted()
    found = cross_validate(table, labels, "planted", columns=COLUMNS, model=model, resamples=50)
    assert found.spearman > 0.9 and found.spearman_mean > 0.9 and found.r2 > 0.8
    assert found.low < found.spearman < found.high
    assert len(found.forecasts) == found.n == 300


@pytest.mark.parametrize("seed", range(3))
def test_an_unrelated_label_is_not_forecast(seed):
    table = statistics(300, seed=seed)
    labels = effects(table, seed=seed + 10)
    found = cross_validate(table, labels, "stability_abs", resamples=0, seed=seed)
    assert abs(found.spearman) < 0.2


def test_the_other_columns_forecast_the_planted_label_worse():
    table, labels, _ = planted()
    one, other = (
        cross_validate(table, labels, "planted", columns=name, resamples=0)
        for name in ("full_no_magnitude", "freq_only")
    )
    found = difference(one, other, resamples=200)
    assert found.difference == pytest.approx(one.spearman - other.spearman)
    assert found.low > 0.5
    with pytest.raises(ValueError, match="one target"):
        difference(one, cross_validate(table, labels, "effect", resamples=0))


def test_out_of_fold_means_that_a_fold_is_not_seen():
    table, labels, y = planted(50)
    found = cross_validate(table, labels, "planted", columns=COLUMNS, folds=5, resamples=0)
    test = found.forecasts["fold"].to_numpy() == 2
    kept = labels.table.index[~test].tolist()
    alone = fit_predictor(table.of(kept), labels.of(kept), "planted", columns=COLUMNS)
    expected = alone.predict(table).table["planted"].to_numpy()[test]
    assert found.forecasts["forecast"].to_numpy()[test] == pytest.approx(expected)
    assert np.bincount(found.forecasts["fold"]).tolist() == [10] * 5
    assert found.forecasts["label"].to_numpy() == pytest.approx(y)


def test_what_is_the_control_exactly_leaves_no_label():
    table = statistics(100)
    size = np.random.default_rng(0).uniform(1, 2, 100)
    labels = effects(table, effect=size, copy=3 * size + 1)
    found = cross_validate(table, labels, "copy", controls=("effect",), resamples=50)
    assert math.isnan(found.spearman) and math.isnan(found.r2) and math.isnan(found.low)
    assert found.n == 100


def test_residuals_take_away_what_goes_through_the_control_and_keep_the_rest():
    table = statistics(300)
    x = table.table["decoder_norm"].to_numpy()
    noise = np.random.default_rng(2).normal(size=(2, 300))
    size = x + 0.1 * noise[0]
    labels = effects(table, effect=size, through=size + 0.1 * noise[1], beside=x + size)
    options = {"columns": ("decoder_norm",), "controls": ("effect",), "resamples": 0}
    assert cross_validate(table, labels, "through", columns=("decoder_norm",)).spearman > 0.9
    assert abs(cross_validate(table, labels, "through", **options).spearman) < 0.2
    assert cross_validate(table, labels, "beside", **options).spearman < 0.6


def test_the_nuisance_fit_never_sees_the_fold_it_is_applied_to():
    table = statistics(60)
    labels = effects(table)
    y, e = labels.table["stability_abs"].to_numpy(), labels.table["effect"].to_numpy()
    found = cross_validate(table, labels, "stability_abs", controls=("effect",), resamples=0)
    for fold in range(5):
        test = found.forecasts["fold"].to_numpy() == fold
        slope, start = np.polyfit(e[~test], y[~test], 1)
        left = found.forecasts["label"].to_numpy()[test]
        assert left == pytest.approx(y[test] - slope * e[test] - start)


def test_constant_columns_are_dropped_and_named():
    table, labels, _ = planted(60)
    table.table["kurtosis"] = 3.0
    found = fit_predictor(table, labels, "planted", columns=COLUMNS)
    assert (found.columns, found.dropped) == (("decoder_norm",), ("kurtosis",))
    table.table["decoder_norm"] = 1.0
    with pytest.raises(ValueError, match="no predictor varies"):
        fit_predictor(table, labels, "planted", columns=COLUMNS)


def test_dead_features_are_left_out_of_the_fit_and_have_no_forecast():
    table, labels, _ = planted(60)
    table.table.loc[7, "kurtosis"] = np.nan
    found = fit_predictor(table, labels, "planted", columns=COLUMNS)
    assert found.n == 59 and 7 not in found.features and found.settings["excluded"] == 1
    forecast = found.predict(table)
    assert math.isnan(forecast.table.loc[7, "planted"])
    assert forecast.settings["undefined"] == 1
    assert forecast.table["planted"].notna().sum() == 59


@pytest.mark.parametrize("model", ["ridge", "trees"])
def test_a_saved_predictor_forecasts_the_same_bits(model, tmp_path):
    table, labels, _ = planted()
    found = fit_predictor(table, labels, "planted", columns=COLUMNS, model=model)
    found.save(tmp_path / "one.safetensors")
    again = SideEffectPredictor.load(tmp_path / "one.safetensors")
    one, other = (p.predict(table).table["planted"].to_numpy() for p in (found, again))
    assert (one == other).all()
    assert (again.columns, again.features, again.target) == (
        found.columns,
        found.features,
        "planted",
    )
    assert again.settings == found.settings
    alone = again.predict(table.of([11])).table["planted"].to_numpy()
    assert alone == one[11:12]


def test_other_files_are_no_predictors(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no file"):
        SideEffectPredictor.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello, no tensors here")
    with pytest.raises(ValueError, match="no side-effect predictor"):
        SideEffectPredictor.load(tmp_path / "text")
    save_file({"x": np.zeros(1)}, tmp_path / "x", metadata={"predictor": json.dumps({"a": 1})})
    with pytest.raises(ValueError, match="of format"):
        SideEffectPredictor.load(tmp_path / "x")


def test_foreign_columns_and_settings_are_refused_and_another_sae_is_warned_of():
    table, labels, _ = planted(60)
    bound = FeatureTable(table.table, table.sae_id, {"crowding_k": 20})
    found = fit_predictor(bound, labels, "planted", columns=COLUMNS)
    less = FeatureTable(table.table.drop(columns="kurtosis"), table.sae_id, {})
    with pytest.raises(ValueError, match="lack column 'kurtosis'"):
        found.predict(less)
    other = FeatureTable(table.table, table.sae_id, {"crowding_k": 3})
    with pytest.raises(ValueError, match="crowding_k = 3, the forecast with 20"):
        found.predict(other)
    with pytest.warns(UserWarning, match="do not carry over"):
        found.predict(FeatureTable(table.table, "relu@blocks.1#def", {}))


def test_what_cannot_be_fitted_is_refused():
    table, labels, _ = planted(24)
    with pytest.raises(ValueError, match="at least two folds of 5"):
        cross_validate(table, labels, "planted", columns=COLUMNS)
    with pytest.raises(ValueError, match="no label 'stabilty'"):
        fit_predictor(table, labels, "stabilty")
    with pytest.raises(ValueError, match="no predictor set 'ful_all'.*did you mean 'full_all'"):
        fit_predictor(table, labels, "planted", columns="ful_all")
    with pytest.raises(ValueError, match="statistics have no column 'nothing'"):
        fit_predictor(table, labels, "planted", columns=("nothing",))
    with pytest.raises(ValueError, match="labels have no column 'nothing'"):
        cross_validate(table, labels, "planted", controls=("nothing",))
    with pytest.raises(ValueError, match="no model 'forest'"):
        fit_predictor(table, labels, "planted", model="forest")
    with pytest.raises(ValueError, match="too few to fit"):
        fit_predictor(table, labels.of([0, 1, 2]), "planted")
    with pytest.raises(ValueError, match="statistics are of"):
        fit_predictor(statistics(24, sae_id="other"), labels, "planted")


def test_the_clean_score_is_high_for_stable_directions_of_little_spread_per_effect():
    table = statistics(3)
    labels = effects(
        table, stability_abs=[0.9, 0.9, 0.1], count_005=[1.0, 50.0, 50.0], effect=[1.0, 1.0, 1.0]
    ).table
    score = clean_score(labels, clean_scale(labels))
    assert score[0] > score[1] > score[2]
    halves = label_values(labels, "clean", standard=labels.iloc[:2])
    assert halves != pytest.approx(score)
    both = [label_values(labels, name) for name in ("clean", "clean_log_count_per_effect")]
    assert both[0] == pytest.approx(both[1])  # an effect of 1 makes the two forms one


def test_the_two_clean_scores_are_different_functions():
    table = statistics(20)
    labels = effects(table, effect=np.linspace(0.1, 9, 20)).table
    both = [label_values(labels, name) for name in ("clean", "clean_log_count_per_effect")]
    assert not np.allclose(*both)
    with pytest.raises(ValueError, match="downstream SAE"):
        label_values(labels.drop(columns="count_0.05"), "clean")


def test_controls_are_columns_that_side_effects_have():
    assert set(CONTROLS) <= set(effects(statistics(3)).table)
