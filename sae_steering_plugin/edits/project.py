"""Taking a subspace out of the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steering_plugin.types import SteeringVector

RANK_TOLERANCE = 1e-5
"""A basis vector whose part outside the others is shorter than this share of it adds no
dimension."""


@dataclass(frozen=True, eq=False)
class ProjectOut:
    """Remove `strength` of the component along `basis`: x - strength * Q Q' x, Q orthonormal.

    `basis` is one vector or several (`[k, d_model]`, or SteeringVectors of one site); they need not
    be orthogonal but must be independent. `strength` is one number or one per batch row; 1 removes
    the subspace, 2 reflects it. Source: directional ablation, Arditi et al., arXiv 2406.11717.
    """

    basis: SteeringVector | Sequence[SteeringVector] | Tensor
    strength: float | Tensor = 1.0

    def __post_init__(self) -> None:
        self._orthonormal()
        strength = torch.as_tensor(self.strength)
        if strength.ndim > 1:
            raise ValueError("give one strength, or one per batch row")
        if not torch.isfinite(strength).all():
            raise ValueError("strength is not finite")

    @property
    def hook_name(self) -> str | None:
        names = {v.hook_name for v in self._vectors()}
        if len(names) > 1:
            raise ValueError(f"basis vectors belong to different hook points: {sorted(names)}")
        return names.pop() if names else None

    @property
    def batch_rows(self) -> int:
        """How many batch rows the change was written for; 1 fits any batch."""
        return torch.as_tensor(self.strength).numel()

    def _vectors(self) -> list[SteeringVector]:
        if isinstance(self.basis, SteeringVector):
            return [self.basis]
        return [] if isinstance(self.basis, Tensor) else list(self.basis)

    def _orthonormal(self) -> Float[Tensor, "d_model k"]:
        if isinstance(self.basis, Tensor):
            rows = self.basis.detach().float().reshape(-1, self.basis.shape[-1])
        else:
            rows = torch.stack([v.vector.float() for v in self._vectors()])
        if not torch.isfinite(rows).all():
            raise ValueError("the basis holds a value that is not finite")
        lengths = rows.norm(dim=-1, keepdim=True)
        q, r = torch.linalg.qr((rows / lengths.clamp_min(torch.finfo(torch.float32).tiny)).T)
        if bool((r.diagonal().abs() < RANK_TOLERANCE).any()):
            raise ValueError(
                f"the {len(rows)} basis vectors are not independent (or one is zero): drop one"
            )
        return q

    def prepare(self, *, dtype: torch.dtype, device: torch.device | str) -> PreparedProjection:
        del dtype
        strength = torch.as_tensor(self.strength, dtype=torch.float32, device=device)
        return PreparedProjection(
            basis=self._orthonormal().to(device),
            strength=strength.reshape(-1, 1, 1),
            idle=not bool(strength.any()),
        )


@dataclass(frozen=True, eq=False)
class PreparedProjection:
    """A projection for one site; computed in float32 whatever the activation's dtype."""

    basis: Float[Tensor, "d_model k"]
    strength: Tensor
    idle: bool
    constant: None = None
    reads_context: bool = False

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return -self.strength * ((x.float() @ self.basis) @ self.basis.T)
