"""Probes of many concepts at once against scikit-learn, one at a time."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sae_steering_plugin.features import PooledCodes, fit_probes, top_k_accuracy

from .test_scores import drawn, pooled


def objective(x, y, w, b, c):
    logits = x @ w + b
    return 0.5 * (w**2).sum() + c * (np.logaddexp(0, logits) - y * logits).sum()


@pytest.mark.parametrize("c", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(("n", "width"), [(60, 200), (120, 12)])
def test_the_objective_is_not_above_scikit_learn_s(n, width, c):
    table, labels = drawn(n, width, 3)
    found = fit_probes(pooled(table), labels, inverse_penalty=c, tolerance=1e-7)
    assert found.converged and float(found.gradient.max()) <= 1e-7
    for concept, y in enumerate(labels.T):
        theirs = LogisticRegression(C=c, tol=1e-10, max_iter=20_000).fit(table, y)
        best = objective(table, y, theirs.coef_[0], theirs.intercept_[0], c)
        w, b = found.weights[:, concept].numpy(), float(found.intercepts[concept])
        mine = objective(table, y, w, b, c)
        assert mine == pytest.approx(float(found.objective[concept]), rel=1e-9)
        assert mine <= best * (1 + 1e-7)
        assert np.abs(w - theirs.coef_[0]).max() < 1e-3 * max(1.0, np.abs(w).max())


@pytest.mark.parametrize("c", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("seed", range(3))
def test_with_both_at_their_defaults_the_objective_is_not_above_scikit_learn_s(seed, c):
    table, labels = drawn(60, 200, 3, seed)
    found = fit_probes(pooled(table), labels, inverse_penalty=c)
    for concept, y in enumerate(labels.T):
        theirs = LogisticRegression(C=c, max_iter=5000).fit(table, y)
        value = objective(table, y, theirs.coef_[0], theirs.intercept_[0], c)
        assert float(found.objective[concept]) <= value * (1 + 1e-12)


@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_the_unit_of_the_codes_does_not_move_the_optimum(scale):
    table, labels = drawn(80, 40)
    one = fit_probes(pooled(table), labels, tolerance=1e-6)
    other = fit_probes(pooled(table * scale), labels, inverse_penalty=scale**-2, tolerance=1e-6)
    assert other.converged
    assert torch.allclose(other.objective * scale**2, one.objective, rtol=1e-6, atol=0)


def test_codes_beyond_the_squares_of_float32_are_fitted_too():
    table, labels = drawn(80, 40)
    found = fit_probes(pooled(table * 1e10), labels, inverse_penalty=1e-20, tolerance=1e-6)
    assert found.converged and torch.isfinite(found.weights).all()
    share = labels.mean(0)
    flat = -80e-20 * (share * np.log(share) + (1 - share) * np.log(1 - share))  # at w = 0
    assert (found.objective.numpy() < 0.95 * flat).all()


def test_logits_are_codes_times_weights():
    table, labels = drawn()
    found = fit_probes(pooled(table), labels, concepts=["a", "b", "c"])
    expected = torch.as_tensor(table) @ found.weights + found.intercepts
    assert torch.allclose(found.logits(pooled(table)), expected, atol=1e-9)
    assert found.concepts == ("a", "b", "c")


def test_too_few_iterations_warn_and_unfit_labels_are_refused():
    table, labels = drawn()
    with pytest.warns(UserWarning, match="stopped after 1 iterations at .* of the first gradient"):
        assert not fit_probes(pooled(table), labels, iterations=1).converged
    holes = labels.copy()
    holes[0, 0] = np.nan
    with pytest.raises(ValueError, match="unknown labels"):
        fit_probes(pooled(table), holes)
    with pytest.raises(ValueError, match="'concept 0' has texts of one class only"):
        fit_probes(pooled(table), np.ones(len(table)))
    with pytest.raises(ValueError, match="must be positive"):
        fit_probes(pooled(table), labels, inverse_penalty=0.0)


def test_sparse_probing_finds_the_planted_feature_and_not_in_the_test_texts():
    table, labels = drawn(200, 20, 1)
    y = labels[:, 0]
    table[:, 7] = y * (1 + table[:, 7])
    table[100:, 3] = 5 * y[100:]  # tells the test texts apart, and nothing in training
    table[:100, 3] = 0
    accuracy, chosen = top_k_accuracy(
        PooledCodes.from_dense(torch.as_tensor(table, dtype=torch.float32)),
        y, train=range(100), test=range(100, 200),
    )  # fmt: skip
    assert chosen == [7] and accuracy == 1.0
