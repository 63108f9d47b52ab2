"""What data would teach, read off activations and codes before any gradient is taken.

Sources: persona vectors, arXiv 2507.21509 (projection difference); Anatomy of Post-Training, arXiv
2606.12360, known here from a reading note (disparity of a preference pair).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from .update import unit_rows


def shift_along(
    data: Float[Tensor, "sample d_model"],
    base: Float[Tensor, "sample d_model"],
    rows: Float[Tensor, "direction d_model"],
) -> Float[Tensor, "sample direction"]:
    """(data - base) . d / |d| per sample and direction, in residual units; 0 along a zero row."""
    return (data.double() - base.double()) @ unit_rows(rows).T


def disparity(
    chosen: Float[Tensor, "pair latent"],
    rejected: Float[Tensor, "pair latent"],
    *,
    least_rate: float,
) -> Float[Tensor, "pair latent"]:
    """1[chosen rate > tau] - 1[rejected rate > tau] per pair and latent, tau being `least_rate`.

    A rate is the share of a text's tokens that fire a latent. The mean over pairs is the disparity
    u_f, from -1 to 1. Exchanging the sides changes the sign.
    """
    return (chosen > least_rate).double() - (rejected > least_rate).double()
