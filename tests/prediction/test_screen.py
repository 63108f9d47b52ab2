from dataclasses import replace

import numpy as np
import pytest

from sae_steering_plugin.prediction.screen import screen_groups, split_features
from sae_steering_plugin.prediction.sets import PREDICTOR_SETS, named_columns
from tests.prediction.tables import effects, statistics


def planted(n=200, seed=0):
    """A clean score that falls with crowding: stability does, all else is noise."""
    table = statistics(n, seed=seed)
    crowding = table.table["crowding_max_abs_cos"].to_numpy()
    noise = np.random.default_rng(seed).normal(size=n)
    labels = effects(table, stability_abs=-crowding + 0.1 * noise, count_005=np.full(n, 3.0))
    return table, labels


def chosen(table, labels, **options):
    train, pool = split_features(range(len(table.table)))
    return screen_groups(table, labels, train, pool, **{"size": 15, **options})


def test_the_clean_group_is_less_crowded_than_the_messy_one():
    table, labels = planted()
    found = chosen(table, labels)
    crowding = {
        name: table.of(features).table["crowding_max_abs_cos"]
        for name, features in found.groups.items()
    }
    assert crowding["clean"].max() < crowding["messy"].min()
    assert crowding["clean"].mean() < crowding["random"].mean() < crowding["messy"].mean()


def test_no_pool_feature_was_seen_in_fitting():
    table, labels = planted()
    found = chosen(table, labels)
    fitted = set(found.score.features) | set(found.effect.features)
    assert not fitted & set(found.pool)
    assert all(set(group) <= set(found.matched) for group in found.groups.values())
    members = [f for group in found.groups.values() for f in group]
    assert len(set(members)) == len(members) == 45


def test_pool_labels_do_not_matter_under_the_strict_protocol_and_shift_the_papers():
    table, labels = planted()
    pool = list(chosen(table, labels).pool)
    moved = labels.table.copy()
    moved.loc[pool, "stability_abs"] += 7.0
    other = replace(labels, table=moved)
    strict = [chosen(table, one).forecast for one in (labels, other)]
    paper = [chosen(table, one, protocol="paper").forecast for one in (labels, other)]
    assert strict[0] == strict[1]
    assert paper[0] != paper[1]
    train_only = labels.of(chosen(table, labels).train)
    assert chosen(table, train_only).forecast == strict[0]


def test_matching_keeps_the_middle_of_the_forecast_effect():
    table, labels = planted()
    found = chosen(table, labels, band=(25.0, 75.0))
    size = found.effect.predict(table.of(found.pool)).table["effect"]
    low, high = np.percentile(size, (25, 75))
    kept = size[(size >= low) & (size <= high)].index
    assert set(found.matched) == set(kept)


def test_groups_are_at_most_a_third_of_what_matches():
    table, labels = planted(40)
    found = chosen(table, labels, size=50)
    assert found.settings["size"] == len(found.matched) // 3
    assert found.settings["asked_size"] == 50


def test_features_without_a_forecast_are_in_no_group():
    table, labels = planted()
    pool = split_features(range(200))[1]
    table.table.loc[pool[:9], "kurtosis"] = np.nan
    found = chosen(table, labels)
    assert not set(pool[:9]) & set(found.matched)


def test_the_split_is_the_seeds_and_complete():
    train, pool = split_features(range(100), seed=3)
    assert (len(train), len(pool)) == (60, 40)
    assert sorted((*train, *pool)) == list(range(100))
    assert (train, pool) == split_features(tuple(reversed(range(100))), seed=3)
    assert train != split_features(range(100), seed=4)[0]


def test_what_cannot_be_screened_is_refused():
    table, labels = planted(40)
    train, pool = split_features(range(40))
    with pytest.raises(ValueError, match="choose one of strict, paper"):
        screen_groups(table, labels, train, pool, size=5, protocol="loose")
    with pytest.raises(ValueError, match="in the training set and in the pool"):
        screen_groups(table, labels, train, train, size=5)
    with pytest.raises(ValueError, match="too few"):
        screen_groups(table, labels, train, pool[:2], size=5)
    with pytest.raises(ValueError, match="leave a side empty"):
        split_features([1])


def test_sets_are_explicit_disjoint_where_they_should_be_and_named():
    full = set(PREDICTOR_SETS["full_no_magnitude"])
    magnitude = set(PREDICTOR_SETS["activation_magnitude_only"])
    assert not full & magnitude
    assert set(PREDICTOR_SETS["full_all"]) == full | magnitude
    assert set(PREDICTOR_SETS["compact_no_magnitude"]) < full
    for name in ("freq_only", "geometry_only", "direct_logit_only", "coactivation_only"):
        assert set(PREDICTOR_SETS[name]) < full
    assert named_columns(("a", "b")) == ("a", "b")
    with pytest.raises(ValueError, match="each once"):
        named_columns(("a", "a"))
