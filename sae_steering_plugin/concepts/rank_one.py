"""Between a constant added to an output and a low-rank change of the matrix that writes it.

A matrix `[in, out]` adds x @ W. A rank-one change a b' adds (x . a) b, so steering is the limit in
which the factor x . a is the same for every token. Source: algebra of
shared/methods/neighbouring_systems, section a.4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steering_plugin.concepts.update import LowRankDelta


def rank_one(
    vector: Float[Tensor, " out"], mean_input: Float[Tensor, " in"]
) -> Float[Tensor, "in out"]:
    """The change xbar v' / |xbar|^2, which adds `vector` to the output of the mean input.

    Raises ValueError for a mean input of length zero.
    """
    square = float(mean_input.double().square().sum())
    if square == 0:
        raise ValueError("the mean input is zero: no rank-one change adds a constant on average")
    return torch.outer(mean_input.double() / square, vector.double()).float()


def factors(
    inputs: Float[Tensor, "token in"], mean_input: Float[Tensor, " in"]
) -> Float[Tensor, " token"]:
    """How often `rank_one` adds its vector at each token: x . xbar / |xbar|^2, 1 on average over
    the tokens that xbar was averaged over."""
    mean = mean_input.double()
    return (inputs.double() @ mean / mean.square().sum()).float()


def written(
    inputs: Float[Tensor, "token in"], delta: LowRankDelta | Float[Tensor, "in out"]
) -> Float[Tensor, "token out"]:
    """What a change adds to the output at each token, low-rank factors never multiplied out."""
    if isinstance(delta, LowRankDelta):
        return delta.scale * ((inputs @ delta.down.to(inputs)) @ delta.up.to(inputs))
    return inputs @ delta.to(inputs)


def unexplained(
    outputs: Float[Tensor, "token out"], vector: Float[Tensor, " out"]
) -> tuple[float, float]:
    """Share of the outputs' square, and of their variance, that a constant `vector` leaves.

    The first is E|y - v|^2 / E|y|^2: 0 when y is the constant, 1 when leaving y out is as good. The
    second divides by E|y - E y|^2 and is 1 for v = E y; above that, v misses the mean. NaN where
    nothing is added.
    """
    y = outputs.double()
    left = float((y - vector.double()).square().sum())
    square, variance = float(y.square().sum()), float((y - y.mean(0)).square().sum())
    nan = float("nan")
    return left / square if square else nan, left / variance if variance else nan


__all__ = ["factors", "rank_one", "unexplained", "written"]
