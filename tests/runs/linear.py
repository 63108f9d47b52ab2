"""A model in which everything after block 0 is linear, with SAEs whose collateral is known."""

from __future__ import annotations

from typing import Any

import torch

SITE, LATER = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
WIDTH = 16


def linear_model() -> Any:
    """Two blocks, no norm, block 1 writes nothing: the final residual is that after block 0."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2,
        d_model=WIDTH,
        n_ctx=32,
        d_head=8,
        n_heads=2,
        d_mlp=32,
        d_vocab=40,
        act_fn="gelu",
        normalization_type=None,
        seed=0,
        device="cpu",
        initializer_range=0.3,
    )
    model = HookedSAETransformer(config).eval()
    with torch.no_grad():
        for name in ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out"):
            part: Any = model.blocks[1]
            for step in name.split("."):
                part = getattr(part, step)
            part.zero_()
    return model


def basis() -> torch.Tensor:
    """An orthonormal basis of the residual stream, one direction a row."""
    noise = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))
    return torch.linalg.qr(noise)[0].T.contiguous()


def dictionary(rows: torch.Tensor, hook_name: str, *, bias: float = 0.0) -> Any:
    """A ReLU SAE whose encoder and decoder are `rows`."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_class("standard")
    metadata = SAEMetadata(hook_name=hook_name, model_name="linear", prepend_bos=False)
    sae = sae_class(config_class(d_in=rows.shape[1], d_sae=len(rows), metadata=metadata))
    with torch.no_grad():
        sae.W_enc.copy_(rows.T)
        sae.W_dec.copy_(rows)
        sae.b_enc.fill_(bias)
        sae.b_dec.zero_()
    return sae.eval()


def primary() -> Any:
    """An orthonormal dictionary after block 0."""
    return dictionary(basis(), SITE)


def watched() -> Any:
    """Always active rows, four of them along Q0: what steering latent 0, 1, 4, 9 moves is known
    (4, 1, 1 and 0 of them)."""
    q = basis()
    half = 0.5**0.5
    rows = [q[0], (q[0] + q[1]) * half, (q[0] + q[2]) * half, (q[0] - q[3]) * half]
    return dictionary(torch.stack([*rows, *q[4:8]]), LATER, bias=20.0)


def contexts(n: int = 64, length: int = 6, *, vocab: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (n, length), generator=generator)
