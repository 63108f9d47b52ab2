"""Steering and in-context examples as one belief: log-odds against strength and number of examples.

    logit p(m, N) = a m + b + gamma N^(1 - alpha)        gamma > 0, 0 < alpha < 1, 0^x = 0

a is what a unit of strength adds to the log-odds, b the prior log-odds, gamma what the first
example adds, and alpha how much less each further one is worth. Source: Bigelow et al., arXiv
2511.00617 (steering moves the prior, examples add evidence); the paper's own equations could not be
read, so the form is that of shared/methods/neighbouring_systems, section b.3.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

PENALTY = 1e-3
"""Squared parameters times this are added to the summed cross entropy: nothing where there are
data, an end to the climb where they are separable."""
STEPS = 200
"""Damped Newton steps at most; a fit takes some ten to thirty."""
NAMES = ("a", "b", "gamma", "alpha")
NO_EVIDENCE = 1e-9
"""Below this gamma, examples count for nothing."""
LARGEST_POWER = 700.0
"""exp of more is no float: infinitely many examples."""


@dataclass(frozen=True)
class BeliefCurve:
    """The four parameters, and what follows from them."""

    a: float
    b: float
    gamma: float
    alpha: float

    def logit(self, strength: float, examples: float) -> float:
        """Log-odds at a strength and a number of examples."""
        gained = self.gamma * examples ** (1 - self.alpha) if examples else 0.0
        return self.a * strength + self.b + gained

    def probability(self, strength: float, examples: float) -> float:
        return 1 / (1 + math.exp(-self.logit(strength, examples)))

    def crossover(self, strength: float) -> float:
        """N*: the number of examples at which p is one half; 0 when the concept is believed
        without any, infinity when no number suffices."""
        missing = -(self.a * strength + self.b)
        if missing <= 0:
            return 0.0
        if self.gamma < NO_EVIDENCE:
            return math.inf
        power = math.log(missing / self.gamma) / (1 - self.alpha)
        return math.exp(power) if power < LARGEST_POWER else math.inf

    def exchange_rate(self, examples: float) -> float:
        """Examples per unit of strength at constant belief, at `examples` > 0:
        dN/dm = -a / (gamma (1 - alpha) N^(-alpha)); negative where strength stands in for them."""
        slope = self.gamma * (1 - self.alpha) * examples**-self.alpha
        return -self.a / slope if slope else -math.copysign(math.inf, self.a)


@dataclass(frozen=True)
class HeldOutStrength:
    """Where one strength passes one half: predicted from all others, and observed."""

    strength: float
    predicted: float
    observed: float


@dataclass(frozen=True, eq=False)
class BeliefFit:
    """The fitted curve and how good it is; see `fit_belief`.

    `covariance` is of (a, b, gamma, alpha), over resampled trials. `heldout_r` correlates predicted
    with observed shares over cells whose whole strength was left out; `heldout_entropy` is the
    cross entropy per trial there, beside `examples_only` (every cell predicted by the mean of the
    other strengths at the same number of examples) and `floor` (the observed shares themselves).
    """

    curve: BeliefCurve
    covariance: Float[Tensor, "4 4"] = field(repr=False)
    heldout_r: float
    heldout_entropy: float
    examples_only: float
    floor: float
    heldout: tuple[HeldOutStrength, ...] = field(repr=False)
    n_trials: int
    separable: bool

    @property
    def errors(self) -> dict[str, float]:
        """Standard error of each parameter."""
        return dict(zip(NAMES, self.covariance.diagonal().sqrt().tolist(), strict=True))


def fit_belief(
    strengths: Sequence[float],
    examples: Sequence[int],
    shown: Float[Tensor, "strength example trial"],
    *,
    resamples: int = 200,
    seed: int = 0,
) -> BeliefFit:
    """The belief curve of a grid of strengths and numbers of examples, by binomial cross entropy.

    `shown[i, j, t]` is 1 where trial t shows the concept at that cell, or its probability there.
    Trial t should be the same item in every cell, as trials are resampled together. Strengths are
    standardised inside and given back in their own unit; leave out strengths at which the model no
    longer answers. The held-out figures leave out one strength at a time.

    Warns (UserWarning) when the data are separable (every cell all or none): parameters are then
    set by the penalty, not by the data. Raises ValueError for fewer than three strengths or two
    numbers of examples, no variation in strength, or shares outside 0 to 1.
    """
    m = torch.tensor(list(strengths), dtype=torch.float64)
    count = torch.tensor(list(examples), dtype=torch.float64)
    require_grid(m, count, shown)
    shares, n = shown.double().mean(-1), shown.shape[-1]
    separable = bool(((shares == 0) | (shares == 1)).all())
    if separable:
        warnings.warn(
            "every cell is all or none: the data are separable, and the slopes are set by the "
            "penalty; add strengths or numbers of examples in between",
            stacklevel=2,
        )
    mean, scale = m.mean(), m.std(correction=0)
    z = (m - mean) / scale
    whole = torch.full_like(shares, float(n))
    fit = minimised(z, count, shares[None], whole[None])[0]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    resampled = torch.stack([shown.double()[..., rows].mean(-1) for rows in drawn])
    cloud = in_own_unit(minimised(z, count, resampled, whole.expand_as(resampled)), mean, scale)
    left_out = 1 - torch.eye(len(m), dtype=torch.float64)
    partial = minimised(z, count, shares.expand(len(m), -1, -1), left_out[:, :, None] * whole)
    predicted = torch.stack(
        [torch.sigmoid(logits(z, count, one[None])[0, i]) for i, one in enumerate(partial)]
    )
    others = (shares.sum(0, keepdim=True) - shares) / (len(m) - 1)
    curves = [
        BeliefCurve(*one.tolist())
        for one in in_own_unit(torch.cat([fit[None], partial]), mean, scale)
    ]
    held = tuple(
        HeldOutStrength(
            float(m[i]), one.crossover(float(m[i])), observed_crossover(examples, shares[i])
        )
        for i, one in enumerate(curves[1:])
    )
    return BeliefFit(
        curve=curves[0],
        covariance=cloud.T.cov().float(),
        heldout_r=correlation(predicted, shares),
        heldout_entropy=entropy(predicted, shares),
        examples_only=entropy(others, shares),
        floor=entropy(shares, shares),
        heldout=held,
        n_trials=n,
        separable=separable,
    )


def require_grid(m: Tensor, count: Tensor, shown: Tensor) -> None:
    if shown.shape[:2] != (len(m), len(count)):
        raise ValueError(
            f"shown has {tuple(shown.shape[:2])} cells for {len(m)} strengths and {len(count)} "
            "numbers of examples"
        )
    if len(m) < 3 or len(count) < 2 or float(m.std(correction=0)) == 0:
        raise ValueError("give at least three different strengths and two numbers of examples")
    if not bool(((shown >= 0) & (shown <= 1)).all()) or bool((count < 0).any()):
        raise ValueError("shown holds shares of 0 to 1, and numbers of examples are not negative")


def observed_crossover(examples: Sequence[int], shares: Float[Tensor, " example"]) -> float:
    """Where the shares first reach one half, straight between cells; infinity where they do not."""
    values = shares.tolist()
    if values[0] >= 0.5:
        return 0.0
    for i in range(1, len(values)):
        if values[i] >= 0.5:
            part = (0.5 - values[i - 1]) / (values[i] - values[i - 1])
            return examples[i - 1] + part * (examples[i] - examples[i - 1])
    return math.inf


# The fit ------------------------------------------------------------------------------------------


def powers(
    count: Float[Tensor, " example"], alpha: Float[Tensor, "fit 1"]
) -> tuple[Float[Tensor, "fit example"], Float[Tensor, " example"]]:
    """N^(1 - alpha) and log N, both 0 at N = 0."""
    logs = torch.where(count > 0, count.clamp_min(1e-300).log(), 0.0)
    return torch.where(count > 0, ((1 - alpha) * logs).exp(), 0.0), logs


def logits(
    z: Float[Tensor, " strength"],
    count: Float[Tensor, " example"],
    theta: Float[Tensor, "fit 4"],
) -> Float[Tensor, "fit strength example"]:
    gamma = torch.nn.functional.softplus(theta[:, 2:3])
    gained, _ = powers(count, torch.sigmoid(theta[:, 3:4]))
    prior = theta[:, 0:1] * z + theta[:, 1:2]
    return prior[:, :, None] + (gamma * gained)[:, None, :]


def minimised(
    z: Float[Tensor, " strength"],
    count: Float[Tensor, " example"],
    shares: Float[Tensor, "fit strength example"],
    weights: Float[Tensor, "fit strength example"],
) -> Float[Tensor, "fit 4"]:
    """The minimisers of many fits at once: damped Newton steps with Fisher's information.

    Parameters are a and b (standardised strength), softplus^-1 gamma and logit alpha, from zero.
    """
    theta = torch.zeros(len(shares), 4, dtype=torch.float64)
    damping = torch.full((len(shares), 1), 1e-2, dtype=torch.float64)
    loss = objective(z, count, shares, weights, theta)
    for _ in range(STEPS):
        slope, curvature = derivatives(z, count, shares, weights, theta)
        ridge = damping * curvature.diagonal(dim1=1, dim2=2)
        step = torch.linalg.solve(curvature + torch.diag_embed(ridge), -slope)
        moved = objective(z, count, shares, weights, theta + step)
        better = moved <= loss
        theta = torch.where(better[:, None], theta + step, theta)
        damping = torch.where(better[:, None], damping / 5, damping * 4).clamp(1e-12, 1e12)
        settled = (moved - loss).abs() <= 1e-10 * loss.abs().clamp_min(1)
        loss = torch.where(better, moved, loss)
        if bool(settled.all()):
            break
    return theta


def objective(
    z: Tensor, count: Tensor, shares: Tensor, weights: Tensor, theta: Tensor
) -> Float[Tensor, " fit"]:
    eta = logits(z, count, theta)
    cross = weights * (torch.nn.functional.softplus(eta) - shares * eta)
    return cross.sum((1, 2)) + PENALTY * theta.square().sum(1)


def derivatives(
    z: Tensor, count: Tensor, shares: Tensor, weights: Tensor, theta: Tensor
) -> tuple[Float[Tensor, "fit 4"], Float[Tensor, "fit 4 4"]]:
    """Gradient of `objective`, and Fisher's information with the penalty's."""
    alpha = torch.sigmoid(theta[:, 3:4])
    gamma = torch.nn.functional.softplus(theta[:, 2:3])
    gained, logs = powers(count, alpha)
    p = torch.sigmoid(logits(z, count, theta))
    by_gamma = torch.sigmoid(theta[:, 2:3]) * gained
    by_alpha = -gamma * gained * logs * alpha * (1 - alpha)
    columns = [
        z[None, :, None].expand_as(p),
        torch.ones_like(p),
        by_gamma[:, None, :].expand_as(p),
        by_alpha[:, None, :].expand_as(p),
    ]
    jacobian = torch.stack(columns, dim=-1).flatten(1, 2)
    pull = (weights * (p - shares)).flatten(1)
    slope = (jacobian * pull[..., None]).sum(1) + 2 * PENALTY * theta
    mass = (weights * p * (1 - p)).flatten(1)
    curvature = jacobian.mT @ (jacobian * mass[..., None])
    return slope, curvature + 2 * PENALTY * torch.eye(4, dtype=theta.dtype)


def in_own_unit(
    theta: Float[Tensor, "fit 4"], mean: Tensor, scale: Tensor
) -> Float[Tensor, "fit 4"]:
    """(a, b, gamma, alpha) for strengths that are not standardised."""
    a = theta[:, 0] / scale
    gamma, alpha = torch.nn.functional.softplus(theta[:, 2]), torch.sigmoid(theta[:, 3])
    return torch.stack([a, theta[:, 1] - a * mean, gamma, alpha], dim=1)


def correlation(predicted: Tensor, shares: Tensor) -> float:
    """Pearson's r over cells; NaN when one side does not vary."""
    both = torch.stack([predicted.flatten(), shares.flatten()])
    return float(torch.corrcoef(both)[0, 1]) if bool((both.std(dim=1) > 0).all()) else math.nan


def entropy(predicted: Tensor, shares: Tensor) -> float:
    """Mean cross entropy per trial, nats; predictions are kept 1e-6 away from 0 and 1."""
    p = predicted.clamp(1e-6, 1 - 1e-6)
    return float(-(shares * p.log() + (1 - shares) * (1 - p).log()).mean())


__all__ = ["BeliefCurve", "BeliefFit", "HeldOutStrength", "fit_belief", "observed_crossover"]
