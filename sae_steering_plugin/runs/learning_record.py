"""A learning report of a training loop while it runs: its own batches, its own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_steering_plugin.adapters.sae_lens import sae_id
from sae_steering_plugin.adapters.sae_parts import site_names, whole_codes
from sae_steering_plugin.adapters.training_hooks import Change, linear_decoder
from sae_steering_plugin.concepts import GradientSums
from sae_steering_plugin.runs.learning import MIN_ACTIVE, LearningReport, together
from sae_steering_plugin.runs.learning_losses import single


@dataclass(eq=False)
class GradientRecord:
    """A training hook that changes nothing and adds up what flows back: `training_hooks(model,
    GradientRecord(sae))` around a loop, then `report()`.

    Every backward pass adds its rows as examples, so accumulated batches sum to what one large
    batch gives, whatever the loss and its scale: a loss that is a mean over n tokens gives pushes
    1/n as large as one that is a sum. Under activation checkpointing a pass is counted once.
    `loss_scale` is what the loss is multiplied by before `backward` (`scaler.get_scale` of a
    GradScaler): gradients are divided by it. Rows whose gradient is not finite, as in steps that a
    GradScaler skips, are left out and counted in `overflowed`.

    Counted are the positions that the live hook's `where` marks; without it those that get a
    gradient at all, a BOS among them. Set `sources` before a forward pass to name the source of
    each of its rows. Several hooks of one site act in order: a record in front of an edit sees the
    edited gradient, one behind it the gradient as the loss gives it.

    Raises ValueError for an SAE whose decode is not linear at its site.
    """

    sae: Any
    watch: Sequence[int] = ()
    loss_scale: float | Callable[[], float] = 1.0
    keep: int = 10
    sources: Sequence[str] | None = None
    overflowed: int = field(default=0, init=False)
    _by_source: dict[str, GradientSums] = field(default_factory=dict, init=False)
    _seen: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._decoder = tuple(part.double() for part in linear_decoder(self.sae))

    @property
    def hook_name(self) -> str:
        return site_names(self.sae)[0]

    def prepare(self, *, dtype: torch.dtype, device: torch.device) -> Change:  # noqa: ARG002
        def change(x: Tensor, where: Tensor | None) -> Tensor:
            if not torch.is_grad_enabled():
                return x
            # A node of its own: what leaves this hook, whoever else holds the activation. Below a
            # frozen part nothing asks for gradients, so it asks itself.
            flowing = x.view_as(x) if x.requires_grad else x.detach().requires_grad_(True)
            h, sources = x.detach(), self.sources
            # A pass that is recomputed never gets a gradient: its hook stays silent.
            flowing.register_hook(lambda g: self._add(g, h, where, sources))
            return flowing

        return change

    def _add(
        self,
        g: Float[Tensor, "batch pos d_model"],
        h: Float[Tensor, "batch pos d_model"],
        where: Bool[Tensor, "batch _"] | None,
        sources: Sequence[str] | None,
    ) -> None:
        if sources is not None and len(sources) != len(g):
            raise ValueError(f"sources has {len(sources)} entries for {len(g)} rows")
        scale = self.loss_scale() if callable(self.loss_scale) else self.loss_scale
        g, h = single(g) / scale, single(h)
        counted = (g != 0).any(-1) if where is None else where.expand(g.shape[:2]).to(g.device)
        with torch.no_grad():
            z = whole_codes(self.sae, h)
        for row, source in enumerate(sources or [""] * len(g)):
            if not torch.isfinite(g[row]).all():
                self.overflowed += 1
                continue
            here = counted[row]
            if source not in self._by_source:
                rows, bias = self._decoder
                self._by_source[source] = GradientSums(rows, bias, tuple(self.watch), self.keep)
            self._by_source[source].add(g[row][here], h[row][here], z[row][here])
            self._seen.append(source)

    def report(
        self, *, labels: Mapping[int, str] | None = None, min_active: float = MIN_ACTIVE
    ) -> LearningReport:
        """All rows so far; `loss` is NaN, because a record does not see it.

        Raises RuntimeError when no backward pass was recorded.
        """
        if not self._seen:
            raise RuntimeError(
                f"nothing was recorded at {self.hook_name!r}"
                + (f": {self.overflowed} rows overflowed" if self.overflowed else "")
            )
        return LearningReport(
            together(self._by_source, self._seen),
            self.hook_name,
            sae_id(self.sae),
            float("nan"),
            tuple(self._seen),
            dict(self._by_source),
            tuple(self.watch),
            dict(labels or {}),
            min_active,
            {"loss": "the loop's own", "overflowed": self.overflowed},
        )

    def reset(self) -> None:
        """Forget everything, for the report of the next stretch of training."""
        self._by_source, self._seen, self.overflowed = {}, [], 0
