"""What a shift of logits does to the next-token distribution and to single logits.

Source: arXiv 2606.08365, section "other labels kept".
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MOVED = (0.05, 0.1, 0.2, 0.5)
"""A logit moved when it changed by more than this."""

LARGE = 20.0
"""Shifts of logits beyond which their exponentials are not summed as they are."""

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
    size = shift.float().abs()
    total = size.sum(dim=-1).double()
    largest = size.topk(min(max(TOP), size.shape[1]), dim=-1).values.double()
    # H(size / total) = ln total - sum(size ln size) / total
    logs = torch.linalg.vecdot(size, size.clamp_min(torch.finfo(size.dtype).tiny).log()).double()
    entropy = total.clamp_min(1e-300).log() - logs / total.clamp_min(1e-300)
    columns = [
        *_divergences(clean.float(), shift.float()),
        *_counts(size),
        *(torch.where(total > 0, largest[:, :k].sum(-1) / total, torch.nan) for k in TOP),
        torch.where(total > 0, entropy.exp(), 0.0),
    ]
    return torch.stack(columns, dim=1)


def _divergences(clean: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """KL(clean || steered) and KL(steered || clean) per row.

    With p the clean chances and s the shift less its mean under p, the steered chances are
    p e^s / Z and Z - 1 = E_p[e^s - 1]: no numbers near each other are subtracted.
    """
    chance = clean.softmax(-1)
    step = shift - torch.linalg.vecdot(chance, shift)[:, None]
    if bool(step.abs().max() > LARGE):
        before, after = clean.log_softmax(-1), (clean + shift).log_softmax(-1)
        gap = (before - after).double()
        return (before.double().exp() * gap).sum(-1), -(after.double().exp() * gap).sum(-1)
    grown = torch.expm1(step)
    beyond = torch.linalg.vecdot(chance, grown).double()
    pulled = torch.linalg.vecdot(chance.mul_(grown), step).double()  # E_p[s] is 0
    log_z = torch.log1p(beyond)
    return log_z, pulled / (1 + beyond) - log_z


def _counts(size: Float[Tensor, "row d_vocab"]) -> list[Tensor]:
    """How many entries of each row lie above each of `MOVED`; counting bits is NumPy's forte."""
    dense = size.cpu().numpy()
    return [
        torch.tensor(
            [np.count_nonzero(row) for row in dense > bar], dtype=torch.float64, device=size.device
        )
        for bar in MOVED
    ]


__all__ = ["MOVED", "TOP", "shift_columns", "shifted"]
