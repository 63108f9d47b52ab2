"""What a finished change of weights writes to, or reads from, the directions of a dictionary.

Orientation is TransformerLens's: a matrix is `[in, out]`, so what it adds to the residual is
`x @ dW`. Source: shared/methods/gradient_projection section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """A change `scale * down @ up` of a matrix `[in, out]`, kept in factors."""

    down: Float[Tensor, "in rank"]
    up: Float[Tensor, "rank out"]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the change itself."""
        return self.down.shape[0], self.up.shape[1]

    @property
    def mT(self) -> LowRankDelta:
        """The transposed change, still in factors."""
        return LowRankDelta(self.up.mT, self.down.mT, self.scale)

    @property
    def square(self) -> float:
        """|change|^2 = tr(down' down up up') scale^2, without the product."""
        gram = self.down.double().T @ self.down.double()
        return self.scale**2 * float((gram * (self.up.double() @ self.up.double().T)).sum())


def unit_rows(rows: Float[Tensor, "latent d_model"]) -> Float[Tensor, "latent d_model"]:
    """Rows of length 1 in float64; a zero row stays zero."""
    rows = rows.double()
    return torch.nn.functional.normalize(rows, dim=1, eps=1e-300)


def write_share(
    delta: Float[Tensor, "in d_model"], rows: Float[Tensor, "latent d_model"]
) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
    """|dW d| per latent, and |dW d|^2 / |dW|^2, for a matrix that writes into the rows' space.

    Shares over an orthonormal basis sum to 1. Heads `[head, d_head, d_model]` are to be flattened.
    """
    sizes = (delta.double() @ unit_rows(rows).T).norm(dim=0)
    whole = float(delta.double().square().sum())
    return sizes, sizes**2 / whole if whole else torch.zeros_like(sizes)


def read_share(
    delta: Float[Tensor, "d_model out"], rows: Float[Tensor, "latent d_model"]
) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
    """|d' dW| per latent, and its share, for a matrix that reads from the rows' space.

    A scale of the layer norm in front must have been folded into the matrix first.
    """
    return write_share(delta.T, rows)


def lora_write(
    delta: LowRankDelta, rows: Float[Tensor, "latent d_model"]
) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
    """`write_share` of a low-rank change, without forming it.

    |down v|^2 = v' (down' down) v for v = up d.
    """
    gram = delta.down.double().T @ delta.down.double()
    inner = delta.up.double() @ unit_rows(rows).T
    sizes = abs(delta.scale) * ((gram @ inner) * inner).sum(dim=0).clamp_min(0).sqrt()
    whole = delta.square
    return sizes, sizes**2 / whole if whole else torch.zeros_like(sizes)


def moved_along(
    before: Float[Tensor, "pos d_model"],
    after: Float[Tensor, "pos d_model"],
    rows: Float[Tensor, "latent d_model"],
) -> Float[Tensor, " latent"]:
    """Mean of (after - before) . d per latent, d of length 1, in residual units."""
    return (after.double() - before.double()).mean(dim=0) @ unit_rows(rows).T
