"""A constant shift of the residual stream, one vector for the batch or one per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steering_plugin.types import SMALLEST_NORM, UNITS, SteeringVector, Unit


@dataclass(frozen=True, eq=False)
class Add:
    """Add `strength` times a vector.

    `vector` is a `SteeringVector`, a bare tensor `[d_model]`, or one row per batch row
    `[batch, d_model]`. `strength` is one number or one per batch row. `unit` says what 1.0 means
    (see `UNITS`): `raw` the vector as built, `unit` a Euclidean length, `norm` the mean residual
    norm at the site, `max_activation` the feature's maximum activation times its row, `kl` nats per
    token (needs `calibrate_strength`). Bare tensors know only `raw` and `unit`.

    A vector that requires grad is read anew at each call, so it can be trained in place.
    Source: Rimsky et al., arXiv 2312.06681; unit convention of arXiv 2603.16335, section 3.5 of its
    code.
    """

    vector: SteeringVector | Tensor
    strength: float | Tensor = 1.0
    unit: Unit = "raw"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"no strength unit {self.unit!r}; choose one of {', '.join(UNITS)}")
        values = torch.as_tensor(self.strength)
        if values.ndim > 1:
            raise ValueError(
                f"strength has shape {tuple(values.shape)}; give one number or one per batch row"
            )
        if not torch.isfinite(values).all():
            raise ValueError("strength is not finite")
        if not isinstance(self.vector, SteeringVector):
            if self.vector.ndim not in (1, 2):
                raise ValueError(
                    f"vector has shape {tuple(self.vector.shape)}; give [d_model] or [batch, "
                    "d_model]"
                )
            if not torch.isfinite(self.vector).all():
                raise ValueError("the vector holds a value that is not finite")
            if self.unit not in ("raw", "unit"):
                raise ValueError(
                    f"a bare tensor has no recipe, so strength cannot be in {self.unit!r}; "
                    "use unit='raw' or 'unit', or pass a SteeringVector"
                )
            rows = self.vector.reshape(-1, self.vector.shape[-1]).shape[0]
            if values.numel() > 1 and rows not in (1, values.numel()):
                raise ValueError(
                    f"{values.numel()} strengths were given for {rows} vectors: give one strength, "
                    "or one per row"
                )
        self._multiplier()

    @property
    def hook_name(self) -> str | None:
        return self.vector.hook_name if isinstance(self.vector, SteeringVector) else None

    @property
    def batch_rows(self) -> int:
        """How many batch rows the change was written for; 1 fits any batch."""
        rows = (
            1
            if isinstance(self.vector, SteeringVector)
            else self.vector.reshape(-1, self.vector.shape[-1]).shape[0]
        )
        return max(rows, torch.as_tensor(self.strength).numel())

    def _multiplier(self) -> Tensor:
        """The factor on the vector as stored, `[]` or `[batch]`, float32."""
        strength = torch.as_tensor(self.strength, dtype=torch.float32)
        if self.unit == "raw" or not bool((strength != 0).any()):
            return strength
        if not isinstance(self.vector, SteeringVector):
            norms = self.vector.detach().float().norm(dim=-1)
            if bool((norms <= SMALLEST_NORM).any()):
                raise ValueError("a vector of length zero has no direction; use unit='raw'")
            return strength / norms.to(strength.device)
        length = self.vector.norm
        if length <= SMALLEST_NORM:
            raise ValueError(
                f"vector {self.vector.label!r} has length {length:.1e}: it has no direction, so "
                f"its strength cannot be set in {self.unit!r}"
            )
        lengths = [self.vector.displacement(float(s), self.unit) for s in strength.reshape(-1)]
        return torch.tensor(lengths).reshape(strength.shape) / length

    def step(self) -> Float[Tensor, "rows d_model"]:
        """The displacement itself, float32: one row, or one per batch row."""
        stored = self.vector.vector if isinstance(self.vector, SteeringVector) else self.vector
        factor = self._multiplier().to(stored.device).reshape(-1, 1)
        return factor * stored.float().reshape(-1, stored.shape[-1])

    def prepare(self, *, dtype: torch.dtype, device: torch.device | str) -> PreparedShift:
        stored = self.vector.vector if isinstance(self.vector, SteeringVector) else self.vector
        if stored.requires_grad:
            return PreparedShift(None, idle=False, source=self, dtype=dtype, device=device)
        step = self.step().to(dtype=dtype, device=device).unsqueeze(1)
        return PreparedShift(
            step, idle=not bool(step.any()), source=self, dtype=dtype, device=device
        )


@dataclass(frozen=True, eq=False)
class PreparedShift:
    """A shift for one site: `constant` is `[1 or batch, 1, d_model]`, or None while it is
    trained."""

    constant: Tensor | None
    idle: bool
    source: Add
    dtype: torch.dtype
    device: torch.device | str
    reads_context: bool = False

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Tensor:
        del x
        if self.constant is not None:
            return self.constant
        return self.source.step().to(dtype=self.dtype, device=self.device).unsqueeze(1)
