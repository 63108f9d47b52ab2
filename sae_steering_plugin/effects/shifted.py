"""What a shift of logits does to the next-token distribution and to single logits.

Source: arXiv 2606.08365, section "other labels kept".
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MOVED = (0.05, 0.1, 0.2, 0.5)
"""A logit moved when it changed by more than this."""

TOP = (10, 50, 100, 500)
"""Sizes of the sets of most moved logits whose share of the total is given."""


def shift_columns() -> tuple[str, ...]:
    """Names of the numbers `shifted` gives, in its order."""
    return (
        "kl_clean_steered",
        "kl_steered_clean",
        *(f"logits_moved_{bar:g}" for bar in MOVED),
        *(f"logit_share_top{k}" for k in TOP),
        "logits_effective",
    )


def shifted(
    clean: Float[Tensor, "row d_vocab"], shift: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, "row column"]:
    """KL both ways (nats), logits moved, share of |shift| in the top k, exp-entropy of |shift|, of
    rows of logits and what was added to them.

    Columns as `shift_columns` names them, float64. Shares are NaN for a shift of zero.
    """
    before = clean.float().log_softmax(-1)
    after = (clean.float() + shift.float()).log_softmax(-1)
    gap = before - after
    size = shift.float().abs()
    total = size.sum(dim=-1, dtype=torch.float64)
    largest = size.topk(min(max(TOP), size.shape[1]), dim=-1).values.double()
    # H(size / total) = ln total - sum(size ln size) / total
    logs = torch.special.xlogy(size, size).sum(dim=-1, dtype=torch.float64)
    entropy = total.clamp_min(1e-300).log() - logs / total.clamp_min(1e-300)
    columns = [
        (before.exp_() * gap).sum(-1, dtype=torch.float64),
        -(after.exp_() * gap).sum(-1, dtype=torch.float64),
        *((size > bar).sum(-1).double() for bar in MOVED),
        *(torch.where(total > 0, largest[:, :k].sum(-1) / total, torch.nan) for k in TOP),
        torch.where(total > 0, entropy.exp(), 0.0),
    ]
    return torch.stack(columns, dim=1)


__all__ = ["MOVED", "TOP", "shift_columns", "shifted"]
