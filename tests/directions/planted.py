"""Labelled data with a known answer, and dictionaries whose codes are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sae_steering_plugin.directions.codes import FiredCodes
from sae_steering_plugin.types import Labelled
from tests.hosts import D_MODEL, SITE


def labelled_of(
    activations: Tensor,
    labels: Sequence[int] | Tensor,
    *,
    groups: Sequence[str] | None = None,
    pairs: Sequence[int] | None = None,
    texts: Sequence[str] | None = None,
    letters: Sequence[str] = (),
    hook_name: str = SITE,
) -> Labelled:
    """A `Labelled` with the measured mean norm; every row its own group unless groups are given."""
    n = len(activations)
    return Labelled(
        activations=activations.float(),
        labels=torch.as_tensor(labels).long(),
        hook_name=hook_name,
        groups=tuple(groups) if groups else tuple(f"row {i}" for i in range(n)),
        pairs=torch.tensor(pairs) if pairs is not None else torch.full((n,), -1),
        texts=tuple(texts) if texts else tuple(f"text {i}" for i in range(n)),
        mean_norm=float(activations.norm(dim=-1).mean()),
        model_name="tiny",
        name="planted",
        letters=tuple(letters),
    )


def fired_of(codes: Tensor, rows: Tensor) -> FiredCodes:
    """Hand-made codes of every latent, with their rows."""
    return FiredCodes(
        values=codes.float(),
        latents=torch.arange(codes.shape[1]),
        rows=rows.float(),
        d_sae=codes.shape[1],
        sae_id="hand-made",
        read_name=SITE,
        hook_name=SITE,
    )


def orthonormal_sae() -> Any:
    """A dictionary of D_MODEL orthonormal rows: `encode(c @ W_dec)` is c, for c over 0.001."""
    from tests.hosts import tiny_sae

    sae = tiny_sae("jumprelu", d_sae=D_MODEL)
    generator = torch.Generator().manual_seed(5)
    rows = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=generator))[0]
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        for bias in (sae.b_enc, sae.b_dec):
            bias.zero_()
        sae.threshold.fill_(1e-3)
    return sae


def probe_toy(
    *, seed: int, n: int = 600, latents: int = 64, width: int = 32, chosen: int = 7
) -> tuple[FiredCodes, Tensor, Labelled]:
    """Independent sparse non-negative codes; label 1 raises latent `chosen`. Unit decoder rows."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(n, latents, generator=generator)
    codes *= torch.rand(n, latents, generator=generator) < 0.5
    labels = (torch.rand(n, generator=generator) < 0.5).long()
    codes[:, chosen] = labels * 1.0 + 0.3 * torch.rand(n, generator=generator)
    rows = torch.randn(latents, width, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    return fired_of(codes, rows), labels, labelled_of(codes @ rows, labels)
