"""What a finished change of weights writes to, or reads from, the directions of a dictionary.

Orientation is TransformerLens's: a matrix is `[in, out]`, so what it adds to the residual is
`x @ dW`. Source: shared/methods/gradient_projection section 4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


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
    down: Float[Tensor, "in rank"],
    up: Float[Tensor, "rank d_model"],
    rows: Float[Tensor, "latent d_model"],
    *,
    scale: float = 1.0,
) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
    """`write_share` of scale * down @ up, without forming that matrix.

    |down v|^2 = v' (down' down) v for v = up d, and |down up|^2 = tr(down' down up up').
    """
    gram = down.double().T @ down.double()
    inner = up.double() @ unit_rows(rows).T
    sizes = abs(scale) * ((gram @ inner) * inner).sum(dim=0).clamp_min(0).sqrt()
    whole = scale**2 * float((gram * (up.double() @ up.double().T)).sum())
    return sizes, sizes**2 / whole if whole else torch.zeros_like(sizes)


def moved_along(
    before: Float[Tensor, "pos d_model"],
    after: Float[Tensor, "pos d_model"],
    rows: Float[Tensor, "latent d_model"],
) -> Float[Tensor, " latent"]:
    """Mean of (after - before) . d per latent, d of length 1, in residual units."""
    return (after.double() - before.double()).mean(dim=0) @ unit_rows(rows).T
