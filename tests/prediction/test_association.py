import math

import numpy as np
import pytest

from sae_steering_plugin.prediction.association import (
    association,
    partial_spearman,
    pearson,
    spearman,
)


def columns(n=80, k=3, seed=0):
    return np.random.default_rng(seed).normal(size=(k, n))


def test_plain_correlations_are_scipys():
    from scipy import stats

    x, y, _ = columns()
    y = y.round(0)  # ties
    found = association(x, y, resamples=50)
    theirs = stats.spearmanr(x, y)
    assert found.rho == pytest.approx(theirs.statistic)
    assert found.p_value == pytest.approx(theirs.pvalue)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)


def test_one_control_gives_the_textbook_partial_correlation():
    x, y, z = columns()
    x, y = x + z, y + z
    xy, xz, yz = spearman(x, y), spearman(x, z), spearman(y, z)
    expected = (xy - xz * yz) / ((1 - xz**2) * (1 - yz**2)) ** 0.5
    assert partial_spearman(x, y, z[:, None]) == pytest.approx(expected)


def test_what_goes_through_the_control_is_gone_and_its_interval_holds_zero():
    x, y, z = columns(400)
    found = association(x + 3 * z, y + 3 * z, z[:, None], resamples=200)
    assert spearman(x + 3 * z, y + 3 * z) > 0.8
    assert found.low < 0 < found.high
    assert found.n == 400


def test_a_constant_control_changes_nothing():
    x, y, _ = columns()
    assert partial_spearman(x, y, np.ones((80, 1))) == pytest.approx(spearman(x, y))


def test_degrees_of_freedom_count_the_controls():
    from scipy.stats import t

    x, y, z = columns()
    found = association(x + z, y + z, z[:, None], resamples=20)
    size = abs(found.rho) * ((80 - 3) / (1 - found.rho**2)) ** 0.5
    assert found.p_value == pytest.approx(2 * t.sf(size, 80 - 3))


def test_sides_that_do_not_vary_have_no_correlation():
    x, y, _ = columns()
    flat = np.full(80, 0.1) + 1e-14 * x
    assert math.isnan(spearman(flat, y)) and math.isnan(pearson(x, flat))
    assert math.isnan(partial_spearman(x, y, x[:, None]))
    found = association(x, flat, resamples=20)
    assert math.isnan(found.rho) and math.isnan(found.p_value) and math.isnan(found.low)


def test_the_interval_is_that_of_a_seed():
    x, y, _ = columns()
    first, again, other = (association(x, y, resamples=99, seed=s) for s in (0, 0, 1))
    assert first == again and first != other
