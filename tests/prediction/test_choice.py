import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_steering_plugin.prediction.choice import cleanest_first, equally_good


def test_as_good_as_the_best_means_within_the_margin():
    assert equally_good([4, 7, 9], [0.9, 0.85, 0.5], within=0.05) == (4, 7)
    assert equally_good([4, 7, 9], [0.9, 0.85, 0.5], within=0.0) == (4,)
    assert equally_good([], [], within=0.1) == ()
    with pytest.raises(ValueError, match="within is -1.0"):
        equally_good([4], [0.9], within=-1.0)
    with pytest.raises(ValueError, match="1 features with 2 scores"):
        equally_good([4], [0.9, 0.1], within=1.0)


@given(st.dictionaries(st.integers(0, 99), st.floats(-5, 5) | st.just(math.nan)), st.data())
def test_equals_are_sorted_by_forecast_and_nothing_is_lost(forecast, data):
    features = data.draw(st.permutations(sorted(forecast)))
    equals = features[: data.draw(st.integers(0, len(features)))]
    found = cleanest_first(features, equals, forecast)
    assert sorted(found) == sorted(features)
    assert found[len(equals) :] == features[len(equals) :]
    values = [forecast[f] for f in found[: len(equals)]]
    known = [v for v in values if not math.isnan(v)]
    assert known == sorted(known, reverse=True) == values[: len(known)]
