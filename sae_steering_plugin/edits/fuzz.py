"""Overwriting the residual stream with one fixed random vector: RMU's target without training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def rmu_direction(d_model: int, *, generator: torch.Generator) -> Float[Tensor, " d_model"]:
    """A unit vector in the positive orthant: r / |r| with r uniform in [0, 1) per coordinate.

    Source: RMU (WMDP, Li et al. 2024), by the code of a public replication.
    """
    drawn = torch.rand(d_model, generator=generator)
    return drawn / drawn.norm()


@dataclass(frozen=True, eq=False)
class Fuzz:
    """Replace the activation by `length` times one fixed random unit vector.

    `length` is in residual units and should exceed the usual norm at the site. The vector is the
    same for all tokens (`rmu_direction` with `seed`). Meant to stand behind a gate:
    `Gated(Fuzz(...), FeatureFires(sae, features, per="token"))`; alone it erases every token.
    """

    hook_name: str
    d_model: int
    length: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.length) and self.length > 0):
            raise ValueError(f"length is {self.length}; it must be a positive number")

    @property
    def batch_rows(self) -> int:
        return 1

    def prepare(self, *, dtype: torch.dtype, device: torch.device | str) -> PreparedFuzz:
        del dtype
        generator = torch.Generator().manual_seed(self.seed)
        target = self.length * rmu_direction(self.d_model, generator=generator)
        return PreparedFuzz(target.to(device))


@dataclass(frozen=True, eq=False)
class PreparedFuzz:
    """A `Fuzz` for one site: what is to be added so that the target stands there."""

    target: Float[Tensor, " d_model"]
    constant: None = None
    idle: bool = False
    reads_context: bool = False

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.target - x.float()
