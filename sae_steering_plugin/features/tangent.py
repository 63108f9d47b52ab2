"""What gradients of clean passes say about every decoder row: first order and curvature.

Not of arXiv 2606.08365: a family of our own. With J_x the Jacobian of the last token's logits with
respect to the steered activation of context x, a small step a d moves the logits by a J_x d, and
the next-token distribution by KL = a^2/2 d' F_x d, where F_x is the Fisher information. Both are
had from products of a few cotangents with J_x, once for all rows; nothing is steered.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

ROWS = 1024
"""Decoder rows at once."""


def tangent_columns(
    sketches: Float[Tensor, "context sketch d_model"], rows: Float[Tensor, "row d_model"]
) -> dict[str, Float[Tensor, " row"]]:
    """Size and stability of the first-order logit shift J_x d over contexts, from a random sketch.

    `sketches[x, r]` is J_x' w_r with the same standard normal w_r for every context, so w_r . J_x d
    stands for the shift: lengths and inner products are right on average, each with a relative
    error of about (2 / sketches)^.5. Columns: `tangent_effect` (mean length), `tangent_effect_cv`,
    `tangent_stability_signed` and `tangent_stability_abs` (mean cosine with the mean shift). NaN
    where nothing moves.
    """
    found = []
    for some in rows.float().split(ROWS):
        shift = torch.einsum("xrd,fd->xrf", sketches, some)
        length = shift.norm(dim=1)
        mean = shift.mean(dim=0)
        cosines = (shift * mean).sum(dim=1) / (length * mean.norm(dim=0))
        effect = length.mean(dim=0)
        found.append(
            torch.stack(
                [
                    effect / sketches.shape[1] ** 0.5,
                    length.std(dim=0) / effect,
                    cosines.nanmean(dim=0),
                    cosines.abs().nanmean(dim=0),
                ]
            )
        )
    names = ("effect", "effect_cv", "stability_signed", "stability_abs")
    return dict(zip((f"tangent_{name}" for name in names), torch.cat(found, dim=1), strict=True))


def curvature_columns(
    scores: Float[Tensor, "context draw d_model"], rows: Float[Tensor, "row d_model"]
) -> dict[str, Float[Tensor, " row"]]:
    """Curvature of the loss along each row: the mean of d' F_x d over contexts, in nats.

    `scores[x, s]` is the gradient of log p(y | x) for a next token y drawn from the model itself,
    so E (g . d)^2 = d' F_x d: the Fisher (for softmax also the Gauss-Newton) form in the decoder's
    direction. Columns: `fisher_curvature`, and `fisher_curvature_cv`, the deviation of the
    contexts' own means over their mean (NaN where that is zero).
    """
    found = []
    for some in rows.float().split(ROWS):
        square = torch.einsum("xsd,fd->xsf", scores, some).square().mean(dim=1)
        mean = square.mean(dim=0)
        found.append(torch.stack([mean, square.std(dim=0) / mean]))
    mean, spread = torch.cat(found, dim=1)
    return {"fisher_curvature": mean, "fisher_curvature_cv": spread}
