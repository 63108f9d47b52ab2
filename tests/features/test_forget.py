import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steering_plugin.features.forget import forget_features
from sae_steering_plugin.types import FeatureTable

SHARED = 0.3


def rates(own, *, n=40, sae_id="a#1"):
    """Planted: latents `own` fire on this topic, 10 to 14 on both, the others never."""
    frequency = np.zeros(n)
    frequency[list(own)] = np.linspace(0.1, 0.2, len(own))
    frequency[10:15] = SHARED
    return FeatureTable(pd.DataFrame({"token_act_freq": frequency}), sae_id)


@settings(max_examples=30, deadline=None)
@given(tau=st.floats(1e-4, SHARED), n=st.integers(1, 5))
def test_only_the_topics_own_latents_are_chosen_for_every_tau_below_the_shared_rate(tau, n):
    found = forget_features(rates(range(5)), rates(range(5, 10)), retain_below=tau, n=n)
    assert found.features == tuple(range(4, 4 - n, -1))
    assert found.scores["retain_rate"] == (0.0,) * n
    assert list(found.scores["forget_rate"]) == sorted(found.scores["forget_rate"], reverse=True)


def test_fewer_than_asked_warn_and_none_are_an_empty_selection():
    with pytest.warns(UserWarning, match="only 5 of 20 features fire on the forget texts"):
        found = forget_features(rates(range(5)), rates(range(5, 10)))
    assert set(found.features) == set(range(5))
    with pytest.warns(UserWarning, match="only 10 of 20"):
        both = forget_features(rates(range(5)), rates(range(5, 10)), retain_below=0.31)
    assert set(range(10, 15)) < set(both.features)
    assert forget_features(rates(()), rates(range(5))).features == ()


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one table is about 'a#1' and the other about 'a#2'"):
        forget_features(rates(range(5)), rates(range(5), sae_id="a#2"))
    bare = FeatureTable(pd.DataFrame({"other": [0.0]}), "a#1")
    with pytest.raises(ValueError, match="a table lacks token_act_freq: make it with"):
        forget_features(rates(range(5)), bare)
    with pytest.raises(ValueError, match="n is 0 and retain_below 0.01"):
        forget_features(rates(range(5)), rates(range(5)), n=0)
