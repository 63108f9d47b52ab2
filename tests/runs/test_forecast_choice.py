import math

import pandas as pd
import pytest

from sae_steering_plugin.runs.forecast_choice import (
    FIGURES,
    Equals,
    gain_rows,
    gain_table,
    measured_gain,
)
from sae_steering_plugin.runs.side_effects import measure_side_effects
from tests.hosts import tiny_bridge, tiny_sae, tokens_of_length
from tests.runs.test_screening import later_sae


def test_each_way_has_the_figures_of_the_features_it_takes():
    model, sae, fresh = tiny_bridge(), tiny_sae(d_sae=64), tokens_of_length(64, 6)
    equals = [
        Equals("one", (3, 5, 9), {3: 0.0, 5: 2.0, 9: math.nan}),
        Equals("two", (8, 4), {8: 1.0, 4: 0.0}),
        Equals("alone", (7,), {7: 0.0}),
    ]
    options = {"downstream": later_sae(), "progress": False}
    found = measured_gain(model, sae, equals, fresh, **options)
    direct = measure_side_effects(
        model, sae, [3, 4, 5, 8, 9], fresh, contexts="shared", **options
    ).of()
    one, two = (row for _, row in found.table.iterrows())
    for name, column in (("stability_abs", "stability_abs"), ("count", "count_0.05")):
        values = direct.table[column]
        assert one[f"{name} forecast"] == values[5]
        assert one[f"{name} score"] == values[3]
        assert one[f"{name} random"] == pytest.approx(values[[3, 5, 9]].mean())
    assert (one["changed"], two["changed"]) == (True, False)
    assert found.settings["one_feature"] == 1
    assert len(found.rows) == 2 * len(FIGURES)
    with pytest.raises(ValueError, match="none of 1 concepts has two equally good features"):
        measured_gain(model, sae, equals[2:], fresh, **options)


def test_a_planted_gain_is_found_and_concepts_of_one_cluster_count_once():
    figures = {f"{name} {way}": [1.0] * 40 for name in FIGURES for way in ("forecast", "score")}
    table = pd.DataFrame(figures | {f"{name} random": [0.0, 0.5] * 20 for name in FIGURES})
    rows = {(row["figure"], row["against"]): row for row in gain_rows(table)}
    best, same = rows["stability_abs", "random"], rows["stability_abs", "score"]
    assert best["difference"] == 0.75 and 0.5 < best["low"] < 0.75 < best["high"] < 1
    assert best["p_value"] < 0.01 and best["n"] == 40
    assert (same["difference"], same["p_value"]) == (0.0, 1.0)
    clustered = gain_rows(table, clusters=[f"c{i // 20}" for i in range(40)])[1]
    assert clustered["p_value"] == 0.5  # two clusters: two of four sign patterns reach as far


def test_undefined_figures_leave_the_concept_out():
    measured = pd.DataFrame(
        {
            "stability_abs": [math.nan, 0.5],
            "count_0.05": [1.0, 2.0],
            "count_per_effect": [1.0, 2.0],
            "moved_l2": [1.0, 2.0],
            "effect": [0.0, 1.0],
        },
        index=[1, 2],
    )
    table = gain_table([Equals("a", (1, 2), {1: 1.0, 2: 0.0})] * 2, measured)
    assert table["stability_abs forecast"].isna().all()
    assert table["count score"].tolist() == [1.0, 1.0]
