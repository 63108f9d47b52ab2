"""Losses that a learning report differentiates: next tokens, and preferences between two texts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_steering_plugin.adapters.activations import TokenBatch
from sae_steering_plugin.adapters.learning import learning_logits
from sae_steering_plugin.adapters.transformer_lens import Model

Loss = Callable[[Float[Tensor, "batch pos d_vocab"], TokenBatch], Tensor]
"""Logits and the batch's tokens to one number, a sum over what is counted (not a mean)."""

BETA = 0.1
"""DPO's usual strength (arXiv 2305.18290, section 6)."""


def next_token_loss(logits: Float[Tensor, "batch pos d_vocab"], batch: TokenBatch) -> Tensor:
    """Cross-entropy of every real token given those before it, in nats, summed over the batch."""
    counted = (batch.real[:, 1:] & batch.real[:, :-1]).to(logits.device)
    return -log_chances(logits, batch)[counted].sum()


def preference_loss(*, beta: float = BETA, reference: Model | None = None) -> Loss:
    """DPO's loss of batches whose rows alternate: chosen, rejected, chosen, rejected.

    L = - sum over pairs of log sigmoid(beta (log pi(chosen) / ref(chosen) - log pi(rejected) /
    ref(rejected))), over the tokens behind the beginning that both texts of a pair share (it is the
    prompt, and cancels). Without `reference` the model is its own, as at the start of training.
    Source: arXiv 2305.18290, equation 7. Raises ValueError for an odd number of rows and for a pair
    of equal texts.
    """

    def preference(logits: Float[Tensor, "batch pos d_vocab"], batch: TokenBatch) -> Tensor:
        counted = behind_shared_beginning(batch)[:, 1:].to(logits.device)
        said = (log_chances(logits, batch) * counted).sum(1)
        if reference is None:
            base = said.detach()
        else:
            with torch.no_grad():
                base = (log_chances(learning_logits(reference, batch), batch) * counted).sum(1)
        gain = said - base
        return -torch.nn.functional.logsigmoid(beta * (gain[0::2] - gain[1::2])).sum()

    return preference


def behind_shared_beginning(batch: TokenBatch) -> Bool[Tensor, "batch pos"]:
    """Real tokens of each row from the first one in which the two texts of its pair differ.

    Rows are padded on the right, so that a pair's tokens stand at the same places.
    """
    if len(batch.tokens) % 2:
        raise ValueError(
            f"{len(batch.tokens)} rows do not pair up: give chosen and rejected texts in turn and "
            "an even batch_size"
        )
    kept = batch.real.clone()
    for row in range(0, len(kept), 2):
        one, other = (torch.where(batch.real[at], batch.tokens[at], -1) for at in (row, row + 1))
        differ = (one != other).nonzero()
        if not len(differ):
            raise ValueError("a pair holds the same text twice: there is nothing to prefer")
        kept[row : row + 2, : int(differ[0])] = False
    return kept


def log_chances(
    logits: Float[Tensor, "batch pos d_vocab"], batch: TokenBatch
) -> Float[Tensor, "batch next"]:
    """Log-probability of every token but the first, in float32 or better; padding included."""
    targets = batch.tokens[:, 1:].to(logits.device)
    chances = torch.log_softmax(single(logits[:, :-1]), dim=-1)
    return chances.gather(-1, targets[..., None])[..., 0]


def single(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when that is finer."""
    return x if x.dtype == torch.float64 else x.float()
