"""LoReFT: a low-rank edit of the prompt's states at several layers, trained on the responses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...adapters.learning import learning_logits
from ...types import PREFILL, Edit, PreparedChange
from ..subject import Subject
from .descent import Schedule, summary
from .records import ConceptData, Fitted
from .texts import ResponseBatch, ResponseTexts
from .vectors import learned


@dataclass(frozen=True)
class LoReFTSettings:
    """AxBench's schedule and rank for 2B; `layers` are blocks, the site's own when empty.

    AxBench edits the first and last five tokens of the prompt; here all of them are edited, because
    those two ranges overlap in a short prompt.
    """

    schedule: Schedule = Schedule(18, 2, 24, 9e-4)
    rank: int = 4
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class LowRankChange:
    """R'(W h + b - R h), with the rows of R orthonormal.

    Source: LoReFT, arXiv 2404.03592, equation 2. `basis` is any matrix of full rank; its QR factor
    is R, so that it can be trained freely.
    """

    basis: Float[Tensor, "d_model rank"]
    weight: Float[Tensor, "rank d_model"]
    bias: Float[Tensor, " rank"]
    hook_name: None = None
    batch_rows: int = 1

    def prepare(self, *, dtype: torch.dtype, device: torch.device | str) -> PreparedChange:
        del dtype
        return PreparedLowRank(self, device)


@dataclass(frozen=True, eq=False)
class PreparedLowRank:
    """`LowRankChange` at work; its parameters are read anew at each call, so they can be
    trained."""

    source: LowRankChange
    device: torch.device | str
    constant: None = None
    idle: bool = False
    reads_context: bool = False

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Tensor:
        change = self.source
        R = torch.linalg.qr(change.basis).Q.to(self.device)
        target = x.float() @ change.weight.to(self.device).T + change.bias.to(self.device)
        return ((target - x.float() @ R) @ R.T).to(x.dtype)


def loreft(subject: Subject, data: ConceptData, settings: LoReFTSettings, seed: int) -> Fitted:
    """Low-rank edits that minimise the loss of the positive responses; they have no factor.

    An edit starts as none: W = R, b = 0. Raises ValueError for a layer the model lacks.
    """
    data.require("positives")
    if settings.rank < 1:
        raise ValueError(f"rank is {settings.rank}; it must be at least 1")
    sites = layer_sites(subject, data, settings.layers)
    generator = torch.Generator().manual_seed(seed)
    device = next(subject.model.parameters()).device
    changes = [
        new_change(int(subject.model.cfg.d_model), settings.rank, generator, device) for _ in sites
    ]
    edits = tuple(Edit(change, site, PREFILL) for change, site in zip(changes, sites, strict=True))
    parameters = [one for change in changes for one in (change.basis, change.weight, change.bias)]
    for one in parameters:
        one.requires_grad_()
    texts = ResponseTexts.of(subject, data.positives)

    def loss_of(batch: ResponseBatch, progress: float) -> Tensor:
        del progress
        return batch.loss(
            learning_logits(subject.model, batch.tokens, edits, prompt_lengths=batch.prompts)
        )

    losses = learned(
        subject, texts, parameters, loss_of, settings.schedule, generator, desc="LoReFT"
    )
    for one in parameters:
        one.requires_grad_(False)
    return Fitted(
        "loreft",
        data.concept,
        steering=lambda _amounts: edits,
        has_factor=False,
        details={"sites": sites, "loss": summary(losses), "seed": seed},
    )


def new_change(
    width: int, rank: int, generator: torch.Generator, device: torch.device
) -> LowRankChange:
    """A change of nothing: W equals the orthonormal rows."""
    basis = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q.to(device)
    exact = torch.linalg.qr(basis).Q
    return LowRankChange(basis, exact.T.clone(), torch.zeros(rank, device=device))


def layer_sites(subject: Subject, data: ConceptData, layers: tuple[int, ...]) -> tuple[str, ...]:
    """The data's site, or the outputs of these blocks."""
    if not layers:
        return (data.site(subject),)
    depth = int(subject.model.cfg.n_layers)
    if outside := [layer for layer in layers if not 0 <= layer < depth]:
        raise ValueError(f"no layer {outside[0]}: the model has blocks 0 to {depth - 1}")
    return tuple(f"blocks.{layer}.hook_resid_post" for layer in layers)
