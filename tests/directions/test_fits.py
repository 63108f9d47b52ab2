import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from sae_steering_plugin.directions.fits import (
    PROBES,
    Inputs,
    deviations,
    fitted_weights,
    mean_difference_weights,
    named_probe,
    ridge_dual,
    ridge_primal,
)


def table(n, p, *, seed=0):
    """Codes-like rows: non-negative, half of them zero; labels follow two columns."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.rand(n, p, generator=generator, dtype=torch.float64)
    X *= torch.rand(n, p, generator=generator) < 0.5
    noise = 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    labels = (X[:, 0] - X[:, 1] + noise > 0).long()
    labels[:2] = torch.tensor([0, 1])
    return X, labels


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(1, 30), st.sampled_from([0.01, 1.0, 10.0]))
def test_primal_and_dual_ridge_agree(n, p, a):
    X, labels = table(n, p + 1)
    y = labels.double() - labels.double().mean()
    assert torch.allclose(ridge_primal(X, y, a), ridge_dual(X, y, a), atol=1e-10)


@pytest.mark.parametrize("shape", [(30, 8), (12, 40)])
@pytest.mark.parametrize("center", [True, False])
def test_ridge_weights_are_scikit_learns(shape, center):
    X, labels = table(*shape)
    w = fitted_weights(X, labels, PROBES["ridge"], 0.5, center=center, standardize=False)
    model = Ridge(alpha=0.5, fit_intercept=center)
    y = labels.double() - labels.double().mean()  # uncentred features, centred labels: the paper
    assert torch.allclose(w, torch.as_tensor(model.fit(X.numpy(), y.numpy()).coef_), atol=1e-8)


@pytest.mark.parametrize("shape", [(60, 8), (30, 40)])
def test_logistic_weights_are_scikit_learns(shape):
    X, labels = table(*shape)
    w = fitted_weights(X, labels, PROBES["logistic"], 2.0, center=True, standardize=False)
    model = LogisticRegression(C=0.5, tol=1e-8, max_iter=5000).fit(X.numpy(), labels.numpy())
    assert torch.allclose(w, torch.as_tensor(model.coef_[0]), atol=1e-3)


def test_mean_difference_needs_no_penalty():
    X, labels = table(20, 5)
    expected = X[labels == 1].mean(0) - X[labels == 0].mean(0)
    assert torch.allclose(mean_difference_weights(X, labels, 1.0), expected)


@pytest.mark.parametrize("name", ["ridge", "logistic", "mean_difference"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", [(40, 6), (24, 50)])
def test_predictions_on_held_out_rows_are_those_of_the_weights(name, center, shape):
    X, labels = table(*shape)
    train, test = torch.arange(0, shape[0] - 6), torch.arange(shape[0] - 6, shape[0])
    probe = PROBES[name]
    Y = labels.double()[:, None]
    found = probe.predictions(Inputs.of(X), Y, train, test, 1.0, center=center)[:, 0]
    mean = X[train].mean(0) if center else torch.zeros(shape[1], dtype=torch.float64)
    w = fitted_weights(X[train], labels[train], probe, 1.0, center=center, standardize=False)
    along = (X[test] - mean) @ w
    if name == "ridge":
        assert torch.allclose(found, along + Y[train].mean(), atol=1e-8)
    elif name == "mean_difference":
        seen, y = X[train] @ w, labels[train]
        zero, one = seen[y == 0].mean(), seen[y == 1].mean()
        assert torch.allclose(found, (X[test] @ w - zero) / (one - zero), atol=1e-8)
    else:
        model = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000)
        model.fit((X[train] - mean).numpy(), labels[train].numpy())
        expected = torch.as_tensor(model.predict_proba((X[test] - mean).numpy())[:, 1])
        assert torch.allclose(found, expected, atol=1e-3)


def test_a_label_column_with_one_label_has_no_logistic_prediction():
    X, labels = table(20, 4)
    Y = torch.stack([labels.double(), torch.zeros(20, dtype=torch.float64)], dim=1)
    train, test = torch.arange(15), torch.arange(15, 20)
    found = PROBES["logistic"].predictions(Inputs.of(X), Y, train, test, 1.0, center=True)
    assert torch.isfinite(found[:, 0]).all()
    assert found[:, 1].isnan().all()


def test_standardised_fits_give_back_weights_of_the_latents_as_they_stand():
    X, labels = table(60, 8)
    X[:, 3] *= 50
    options = {"center": True, "standardize": True}
    divided = fitted_weights(X, labels, PROBES["ridge"], 1.0, **options)
    scaled = StandardScaler().fit_transform(X.numpy()) * (59 / 60) ** 0.5  # ddof 1, as ours
    y = labels.double() - labels.double().mean()
    standard = torch.as_tensor(Ridge(alpha=1.0).fit(scaled, y.numpy()).coef_)
    assert torch.allclose(divided, standard / deviations(X), atol=1e-8)
    multiplied = fitted_weights(X, labels, PROBES["ridge"], 1.0, spread="multiply", **options)
    assert torch.allclose(multiplied, standard * deviations(X), atol=1e-8)
    centred = X - X.mean(0)
    assert torch.allclose(centred @ divided, torch.as_tensor(scaled) @ standard, atol=1e-8)


def test_a_constant_latent_gets_no_weight_when_standardised():
    X, labels = table(20, 4)
    X[:, 2] = 7.0
    w = fitted_weights(X, labels, PROBES["ridge"], 1.0, center=True, standardize=True)
    assert abs(float(w[2])) < 1e-12
    assert deviations(X)[2] == 1.0


def test_an_unknown_probe_lists_the_known_ones():
    with pytest.raises(ValueError, match="no probe 'lasso'; choose one of ridge, logistic, mean"):
        named_probe("lasso")
