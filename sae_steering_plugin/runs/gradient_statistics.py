"""Predictors of side effects from gradients of clean passes: a family of our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.activations import TokenBatch, model_name, refuse_dropout
from ..adapters.learning import fixed_weights, learning_logits
from ..adapters.sae_parts import decoder_rows, site_names
from ..adapters.transformer_lens import refuse_compiled
from ..features.tangent import curvature_columns, tangent_columns
from ..types import FeatureTable
from .feature_tables import table_of
from .learning import captured

SKETCHES = 16
DRAWS = 4
CONTEXTS = 256
"""Contexts that a screen reads gradients on, of those it has."""


def gradient_statistics(
    model: Any,
    sae: Any,
    tokens: Int[Tensor, "context pos"],
    *,
    sketches: int = SKETCHES,
    draws: int = DRAWS,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> FeatureTable:
    """What a small step along each decoder row would do at the last token, to first order.

    `tokens` are contexts of one length without padding. Columns as `features.tangent` names them:
    `tangent_*` from `sketches` random directions of the logits, `fisher_curvature*` from `draws`
    next tokens that the model itself gives. They join the table of `feature_statistics`; the
    predictor sets with them are `tangent_only`, `curvature_only`, `full_with_curvature` and
    `full_with_gradients`. Not of arXiv 2606.08365.

    Nothing is steered. Cost: one forward pass and `sketches + draws` backward ones to the site per
    context, for all features together. Raises ValueError for fewer than two contexts or sketches,
    for no draw, and what `resolve` raises for the site.
    """
    if len(tokens) < 2 or sketches < 2 or draws < 1:
        raise ValueError(
            f"{len(tokens)} contexts, {sketches} sketches, {draws} draws: at least 2, 2 and 1"
        )
    refuse_compiled(model)
    refuse_dropout(model)
    site = site_names(sae)[1]
    generator = torch.Generator().manual_seed(seed)
    looks = torch.randn(sketches, int(model.cfg.d_vocab), generator=generator)
    found: list[list[Tensor]] = [[], []]
    with (
        fixed_weights(model),
        tqdm(total=len(tokens), desc="gradients", unit="context", disable=not progress) as bar,
    ):
        for some in tokens.split(batch_size):
            for kept, part in zip(
                found, _pulled_back(model, site, some, looks, draws, generator), strict=True
            ):
                kept.append(part)
            bar.update(len(some))
    rows = decoder_rows(sae).cpu()
    columns = {
        **tangent_columns(torch.cat(found[0]), rows),
        **curvature_columns(torch.cat(found[1]), rows),
    }
    settings = {
        "gradient_contexts": len(tokens),
        "sketches": sketches,
        "draws": draws,
        "gradient_seed": seed,
        "gradient_hook": site,
        "model_name": model_name(model),
    }
    return table_of(sae, torch.arange(len(rows)), columns, settings)


def _pulled_back(
    model: Any,
    site: str,
    tokens: Int[Tensor, "row pos"],
    looks: Float[Tensor, "sketch d_vocab"],
    draws: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "row sketch d"], Float[Tensor, "row draw d"]]:
    """Gradients at the site, at the last token: of each look at the logits, and of the log
    probability of each drawn next token."""
    zeros = torch.zeros(len(tokens), dtype=torch.long)
    batch = TokenBatch(tokens.cpu(), torch.ones_like(tokens.cpu()).bool(), zeros, zeros.bool())
    with captured(model, [site]) as seen, torch.enable_grad():
        logits = learning_logits(model, batch)[:, -1].float()
        held = seen[site]

        def pulled(cotangents: Iterator[Tensor]) -> Tensor:
            grads = [
                torch.autograd.grad(logits, held, one.to(logits.device), retain_graph=True)[0]
                for one in cotangents
            ]
            return torch.stack([g[:, -1].float().cpu() for g in grads], dim=1)

        chance = logits.detach().softmax(dim=-1).cpu()
        drawn = torch.multinomial(chance, draws, replacement=True, generator=generator)
        words = torch.nn.functional.one_hot(drawn, chance.shape[1]).float()
        return (
            pulled(look.expand_as(chance) for look in looks),
            pulled(words[:, place] - chance for place in range(draws)),
        )


__all__ = ["gradient_statistics"]
