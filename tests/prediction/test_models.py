import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steering_plugin.prediction.models import fit_ridge, fit_trees, from_arrays


def data(n, columns, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, columns)) * rng.uniform(0.1, 9, columns) + rng.normal(size=columns)
    return x, x @ rng.normal(size=columns) + rng.normal(size=n)


@settings(deadline=None)
@given(st.integers(4, 40), st.integers(1, 6), st.integers(0, 99))
def test_ridge_solves_the_normal_equations(n, columns, seed):
    x, y = data(n, columns, seed)
    z = (x - x.mean(0)) / x.std(0)
    weights = np.linalg.solve(z.T @ z + np.eye(columns), z.T @ (y - y.mean()))
    expected = y.mean() + z @ weights
    assert fit_ridge(x, y).predict(x) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_constant_column_weighs_nothing():
    x, y = data(30, 2)
    wide = np.column_stack([x, np.full(30, 4.0)])
    assert fit_ridge(wide, y).predict(wide) == pytest.approx(fit_ridge(x, y).predict(x))


@pytest.mark.parametrize("seed", range(3))
def test_trees_are_scikit_learns(seed):
    from sklearn.ensemble import GradientBoostingRegressor

    x, y = data(120, 4, seed)
    theirs = GradientBoostingRegressor(
        max_depth=2, n_estimators=100, learning_rate=0.05, random_state=seed
    ).fit(x, y)
    fresh = data(50, 4, seed + 50)[0]
    ours = fit_trees(x, y, seed=seed)
    assert ours.predict(fresh) == pytest.approx(theirs.predict(fresh), rel=1e-12)


def test_a_row_on_a_threshold_goes_the_way_it_went_in_training():
    x = np.repeat([[0.1], [0.2], [0.3]], 10, axis=0)
    y = np.repeat([0.0, 5.0, 1.0], 10)
    from sklearn.ensemble import GradientBoostingRegressor

    theirs = GradientBoostingRegressor(
        max_depth=2, n_estimators=100, learning_rate=0.05, random_state=0
    ).fit(x, y)
    on = np.float64(np.unique(fit_trees(x, y).threshold))[:, None]
    assert fit_trees(x, y).predict(on) == pytest.approx(theirs.predict(on), rel=1e-12)


@pytest.mark.parametrize("word, fit", [("ridge", fit_ridge), ("trees", fit_trees)])
def test_arrays_make_the_model_again(word, fit):
    x, y = data(40, 3)
    model = fit(x, y)
    assert (from_arrays(word, model.arrays()).predict(x) == model.predict(x)).all()
    arrays = model.arrays()
    arrays.popitem()
    with pytest.raises(ValueError, match=f"a {word} model has arrays"):
        from_arrays(word, arrays)
