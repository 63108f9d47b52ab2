import math
import warnings
from dataclasses import astuple
from functools import cache

import pytest
import torch

from sae_steering_plugin.effects.belief import (
    PENALTY,
    BeliefCurve,
    derivatives,
    fit_belief,
    minimised,
    objective,
    observed_crossover,
)

TRUE = (0.8, -4.0, 1.1, 0.35)
STRENGTHS = [-2 + 0.5 * i for i in range(9)]
EXAMPLES = [0, 1, 2, 4, 6, 8, 12, 16, 24]


def planted(parameters=TRUE, trials=200, seed=0):
    """Trials drawn from the curve itself, independent in every cell."""
    true = BeliefCurve(*parameters)
    p = torch.tensor([[true.probability(m, float(k)) for k in EXAMPLES] for m in STRENGTHS])
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*p.shape, trials, generator=generator) < p[..., None]).float()


@cache
def fitted():
    return fit_belief(STRENGTHS, EXAMPLES, planted())


def test_planted_parameters_and_crossovers_are_recovered():
    fit = fit_belief(STRENGTHS, EXAMPLES, planted(trials=5000), resamples=2)
    for name, true in zip(("a", "b", "gamma", "alpha"), TRUE, strict=True):
        assert getattr(fit.curve, name) == pytest.approx(true, rel=0.05)
    for m in (-1.0, 0.0, 1.0):
        assert fit.curve.crossover(m) == pytest.approx(BeliefCurve(*TRUE).crossover(m), rel=0.05)


def test_two_hundred_trials_recover_the_parameters_within_their_errors():
    fit = fitted()
    for name, true in zip(("a", "b", "gamma", "alpha"), TRUE, strict=True):
        assert abs(getattr(fit.curve, name) - true) < 3 * fit.errors[name]
        assert 0 < fit.errors[name] < 0.2


def test_resampling_errors_are_those_of_fresh_data():
    z = torch.tensor(STRENGTHS, dtype=torch.float64)
    fresh = torch.stack([planted(seed=s).double().mean(-1) for s in range(1, 101)])
    found = minimised(z, torch.tensor(EXAMPLES).double(), fresh, torch.full_like(fresh, 200.0))
    assert fitted().errors["a"] == pytest.approx(float(found[:, 0].std()), rel=0.35)


def test_whole_strengths_are_predicted_from_the_others():
    fit = fitted()
    assert fit.heldout_r > 0.98
    assert fit.floor <= fit.heldout_entropy < fit.examples_only
    assert [one.strength for one in fit.heldout] == STRENGTHS
    for one in fit.heldout:
        assert one.predicted == pytest.approx(BeliefCurve(*TRUE).crossover(one.strength), rel=0.1)


def test_the_minimum_is_scipys():
    from scipy.optimize import minimize

    z, count = torch.tensor(STRENGTHS).double(), torch.tensor(EXAMPLES).double()
    shares, weights = planted().double().mean(-1)[None], torch.full((1, 9, 9), 200.0).double()
    ours = minimised(z, count, shares, weights)

    def loss(theta):
        return float(objective(z, count, shares, weights, torch.tensor(theta)[None]))

    theirs = minimize(loss, [0.0] * 4)
    assert loss(ours[0].tolist()) <= theirs.fun + 1e-4
    torch.testing.assert_close(ours[0], torch.tensor(theirs.x), atol=2e-3, rtol=2e-3)


def test_the_gradient_is_autograds():
    z, count = torch.tensor(STRENGTHS).double(), torch.tensor(EXAMPLES).double()
    shares, weights = planted().double().mean(-1)[None], torch.full((1, 9, 9), 7.0).double()
    theta = torch.tensor([[0.3, -1.0, 0.2, -0.4]], dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(objective(z, count, shares, weights, theta).sum(), theta)
    torch.testing.assert_close(derivatives(z, count, shares, weights, theta.detach())[0], wanted)
    assert PENALTY > 0


def test_steering_that_does_nothing_has_no_slope():
    outside = 0
    for seed in range(20):
        fit = fit_belief(
            STRENGTHS, EXAMPLES, planted((0.0, -2.0, 1.0, 0.4), seed=seed), resamples=50
        )
        outside += abs(fit.curve.a) >= 2 * fit.errors["a"]
    assert outside <= 4  # 5 % of 20 is one; five or more has probability 0.003


def test_what_is_believed_already_needs_no_example_and_what_examples_do_not_move_never_flips():
    assert BeliefCurve(1.0, 0.5, 1.0, 0.3).crossover(0.0) == 0.0
    assert BeliefCurve(1.0, -0.5, 1.0, 0.3).crossover(0.5) == 0.0
    assert BeliefCurve(1.0, -0.5, 0.0, 0.3).crossover(0.0) == math.inf
    assert BeliefCurve(1.0, -50.0, 1e-6, 0.999).crossover(0.0) == math.inf
    assert BeliefCurve(1.0, -0.5, 0.0, 0.3).exchange_rate(2.0) == -math.inf


def test_the_exchange_rate_is_the_slope_of_the_line_of_constant_belief():
    true, n, step = BeliefCurve(*TRUE), 5.0, 1e-6
    wanted = -(true.logit(step, n) - true.logit(-step, n)) / (
        true.logit(0.0, n + step) - true.logit(0.0, n - step)
    )
    assert true.exchange_rate(n) == pytest.approx(wanted, rel=1e-4)
    here = true.crossover(0.5)
    assert true.probability(0.5, here) == pytest.approx(0.5)


def test_separable_data_stop_with_a_warning():
    shown = torch.zeros(3, 4, 10)
    shown[:, 2:] = 1
    with pytest.warns(UserWarning, match="separable"):
        fit = fit_belief([-1.0, 0.0, 1.0], [0, 1, 2, 4], shown, resamples=3)
    assert fit.separable and all(map(math.isfinite, astuple(fit.curve)))
    assert fit.curve.probability(0.0, 1.0) < 0.5 < fit.curve.probability(0.0, 2.0)


def test_strengths_in_another_unit_give_the_same_curve():
    shown = planted(trials=50)
    one = fit_belief(STRENGTHS, EXAMPLES, shown, resamples=2)
    other = fit_belief([10 * m + 3 for m in STRENGTHS], EXAMPLES, shown, resamples=2)
    assert other.curve.a == pytest.approx(one.curve.a / 10)
    assert other.curve.crossover(13.0) == pytest.approx(one.curve.crossover(1.0))


def test_the_observed_crossover_lies_between_cells():
    assert observed_crossover([0, 2, 4], torch.tensor([0.1, 0.3, 0.7])) == pytest.approx(3.0)
    assert observed_crossover([0, 2], torch.tensor([0.6, 0.9])) == 0.0
    assert observed_crossover([0, 2], torch.tensor([0.1, 0.2])) == math.inf


def test_grids_that_cannot_be_fitted_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"\(3, 2\) cells for 3 strengths and 3"):
            fit_belief([0.0, 1.0, 2.0], [0, 1, 2], torch.zeros(3, 2, 5))
        with pytest.raises(ValueError, match="three different strengths"):
            fit_belief([0.0, 1.0], [0, 1], torch.zeros(2, 2, 5))
        with pytest.raises(ValueError, match="three different strengths"):
            fit_belief([1.0, 1.0, 1.0], [0, 1], torch.zeros(3, 2, 5))
        with pytest.raises(ValueError, match="0 to 1"):
            fit_belief([0.0, 1.0, 2.0], [0, 1], torch.full((3, 2, 5), 2.0))
