"""Codes of labelled examples in a dictionary, kept only for the latents that fire."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steering_plugin.adapters.sae_parts import (
    architecture,
    decoder_rows,
    site_names,
    whole_codes,
)
from sae_steering_plugin.types import Labelled, SparseCodes


@dataclass(frozen=True, eq=False)
class FiredCodes:
    """Codes of examples on the latents that fire in at least one of them; all others are zero.

    `values[i, c]` is the code of example i on latent `latents[c]` (ascending). `rows[c]` is what
    the dictionary's `decode` multiplies that code with. Codes were read at `read_name`; a vector
    made of the rows belongs to `hook_name`, which differs for transcoders only. `scale` is the mean
    factor that run-time input normalisation puts between a unit of code and the row (1 without it).
    """

    values: Float[Tensor, "example fired"]
    latents: Int[Tensor, " fired"]
    rows: Float[Tensor, "fired d_model"]
    d_sae: int
    sae_id: str
    read_name: str
    hook_name: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not torch.isfinite(self.values).all():
            raise ValueError(f"codes in {self.sae_id!r} hold a value that is not finite")

    def __len__(self) -> int:
        return len(self.values)

    def dense(self) -> Float[Tensor, "example d_sae"]:
        """All codes; `n x d_sae` numbers, so for small dictionaries only."""
        full = self.values.new_zeros(len(self), self.d_sae)
        full[:, self.latents] = self.values
        return full

    def sparse(self, weights: Float[Tensor, " fired"]) -> SparseCodes:
        """Weights on the fired latents as a sparse vector of the dictionary."""
        kept = weights.nonzero().flatten()
        return SparseCodes(self.latents[kept], weights[kept].float(), self.d_sae, self.sae_id)


def fired_codes(
    dictionary: Any, labelled: Labelled, *, batch_size: int = 256, sae_id: str | None = None
) -> FiredCodes:
    """The codes of `labelled` in a SAELens dictionary, by its own `encode`, in batches.

    Raises ValueError when the activations were not read where the dictionary was trained, when the
    widths differ, or for a temporal dictionary, whose codes depend on tokens that are not kept
    here.
    """
    read_name, hook_name = site_names(dictionary)
    if not same_site(labelled.hook_name, read_name):
        raise ValueError(
            f"activations come from {labelled.hook_name!r} and this dictionary was trained on "
            f"{read_name!r}: collect again with that dictionary or at that hook point"
        )
    if architecture(dictionary) == "temporal":
        raise ValueError(
            "codes of a temporal dictionary depend on all earlier tokens; one read position per "
            "example cannot give them"
        )
    width = labelled.activations.shape[1]
    if width != dictionary.cfg.d_in:
        raise ValueError(
            f"activations are {width} wide, the dictionary reads {dictionary.cfg.d_in}"
        )
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    device = dictionary.W_dec.device
    for start in range(0, len(labelled), batch_size):
        x = labelled.activations[start : start + batch_size].float().to(device)
        with torch.no_grad():
            codes = whole_codes(dictionary, x[:, None])[:, 0].cpu()
        example, latent = codes.nonzero(as_tuple=True)
        found.append((example + start, latent, codes[example, latent]))
    examples, columns, values = (torch.cat(part) for part in zip(*found, strict=True))
    latents, place = columns.unique(return_inverse=True)
    table = torch.zeros(len(labelled), len(latents))
    table[examples, place] = values
    return FiredCodes(
        values=table,
        latents=latents,
        rows=decoder_rows(dictionary, latents).cpu(),
        d_sae=dictionary.W_dec.shape[0],
        sae_id=identity(dictionary) if sae_id is None else sae_id,
        read_name=read_name,
        hook_name=hook_name,
        scale=code_scale(dictionary, labelled.activations),
    )


def codes_or_encoded(dictionary: Any, labelled: Labelled, codes: FiredCodes | None) -> FiredCodes:
    """`codes` when they were made before, else the codes of `labelled` in `dictionary`."""
    if codes is None:
        return fired_codes(dictionary, labelled)
    if len(codes) != len(labelled):
        raise ValueError(f"codes have {len(codes)} rows and there are {len(labelled)} examples")
    return codes


def identity(dictionary: Any) -> str:
    """The id that vectors built in `dictionary` carry, however it was loaded."""
    from sae_steering_plugin.adapters.sae_lens import sae_id

    return sae_id(dictionary)


def code_scale(dictionary: Any, activations: Float[Tensor, "example d_model"]) -> float:
    """Mean of the per-token factor between a unit of code and the decoder row; 1 without one."""
    from sae_steering_plugin.adapters.sae_parts import normalised

    scale = normalised(dictionary, activations.float().to(dictionary.W_dec.device))[1]
    return 1.0 if scale is None else float(scale.mean())


def same_site(first: str, second: str) -> bool:
    """True when two hook names carry the same residual stream.

    Aliases of one point, or after one block and before the next.
    """
    return _boundary(first) == _boundary(second)


def _boundary(name: str) -> tuple[str, int] | str:
    found = re.fullmatch(r"blocks\.(\d+)\.(hook_resid_pre|hook_in|hook_resid_post|hook_out)", name)
    if not found:
        return name
    return "residual", int(found[1]) + (found[2] in ("hook_resid_post", "hook_out"))
