"""A forward pass to learn through: logits with gradients, under edits, on either host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from jaxtyping import Float
from torch import Tensor

from sae_steering_plugin.adapters.activations import TokenBatch
from sae_steering_plugin.adapters.calls import Observer
from sae_steering_plugin.adapters.sharing import bridge_forward
from sae_steering_plugin.adapters.steering import steer
from sae_steering_plugin.adapters.transformer_lens import Model, is_bridge
from sae_steering_plugin.types import Edit


def learning_logits(
    model: Model,
    batch: TokenBatch,
    edits: Sequence[Edit] = (),
    *,
    prompt_lengths: Tensor | None = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits under edits, with gradients to whatever requires them.

    `prompt_lengths` (real tokens per row, BOS included) says where each row's prompt ends; all
    tokens count as prompt without it.
    """
    device = next(model.parameters()).device
    tokens, mask = batch.tokens.to(device), batch.real.long().to(device)
    with ExitStack() as stack:
        if edits:
            stack.enter_context(
                steer(model, list(edits), prompt_lengths=prompt_lengths, measure=False)
            )
        stack.enter_context(Observer.of(model).generating(tokens, mask))
        if is_bridge(model):
            return bridge_forward(model)(tokens, mask).logits
        return model(tokens, attention_mask=mask)


@contextmanager
def fixed_weights(model: Model) -> Iterator[None]:
    """Inside, no parameter of the model takes a gradient; afterwards each does as before."""
    with as_before(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield


@contextmanager
def as_before(model: Model) -> Iterator[None]:
    """Puts every parameter's `requires_grad` back as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


__all__ = ["as_before", "fixed_weights", "learning_logits"]
