"""Vectors trained through the model: SSV and ReFT-r1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...adapters.learning import fixed_weights, learning_logits
from ...edits.shift import Add
from ...types import Edit, PreparedChange
from ..subject import Subject
from .dense import EVERYWHERE, added, unit_start
from .descent import Schedule, descend, summary
from .records import ConceptData, Fitted
from .texts import ResponseBatch, ResponseTexts


@dataclass(frozen=True)
class SSVSettings:
    """AxBench's values for 2B."""

    schedule: Schedule = Schedule(6, 1, 3, 0.01)


@dataclass(frozen=True)
class ReFTr1Settings:
    """AxBench's values for 2B: `top_k` tokens carry the latent, `l1` weighs the others.

    `negatives` learns from the negative texts too.
    """

    schedule: Schedule = Schedule(6, 1, 3, 0.01, clip=1.0)
    top_k: int = 8
    l1: float = 0.005
    negatives: bool = False


def ssv(subject: Subject, data: ConceptData, settings: SSVSettings, seed: int) -> Fitted:
    """w minimises the loss of the positive responses under h + w; its length is free.

    The start is uniform between -1 and 1 over sqrt(d_model), as a linear layer's.
    """
    data.require("positives")
    generator = torch.Generator().manual_seed(seed)
    width = int(subject.model.cfg.d_model)
    start = (2 * torch.rand(width, generator=generator) - 1) / width**0.5
    w = start.to(next(subject.model.parameters()).device).requires_grad_()
    texts = ResponseTexts.of(subject, data.positives)
    edit = Edit(Add(w), data.site(subject), EVERYWHERE)

    def loss_of(batch: ResponseBatch, progress: float) -> Tensor:
        del progress
        return batch.loss(learning_logits(subject.model, batch.tokens, [edit]))

    losses = learned(subject, texts, [w], loss_of, settings.schedule, generator, desc="SSV")
    about = {**asdict(settings), "loss": summary(losses)}
    return added(
        "ssv",
        subject,
        data,
        w.detach(),
        seed=seed,
        settings=about,
        mean_norm=None,
        rectified=True,
        keep_length=True,
    )


def learned(
    subject: Subject,
    texts: ResponseTexts,
    parameters: list[Tensor],
    loss_of: Callable[[ResponseBatch, float], Tensor],
    schedule: Schedule,
    generator: torch.Generator,
    *,
    desc: str,
    unit_rows: bool = False,
) -> list[float]:
    """The losses of `descend` over texts, with the model's own weights held fixed."""
    with fixed_weights(subject.model):
        return descend(
            parameters,
            len(texts),
            lambda rows, progress: loss_of(texts.batch(rows), progress),
            schedule,
            generator,
            unit_rows=unit_rows,
            desc=desc,
        )


@dataclass(frozen=True, eq=False)
class TopKShift:
    """Adds mean(top-k of a) w at every position of `tokens`, with a = ReLU(h w).

    `outside` receives the latents that are not among the k, for the penalty; `tokens` marks the
    positions that count in each row. A row of fewer than k tokens takes all of them.
    """

    w: Float[Tensor, " d_model"]
    k: int
    tokens: Bool[Tensor, "batch pos"]
    outside: list[Tensor] = field(default_factory=list)
    hook_name: None = None
    batch_rows: int = 1

    def prepare(self, *, dtype: torch.dtype, device: torch.device | str) -> PreparedChange:
        del dtype, device
        return PreparedTopK(self)


@dataclass(frozen=True, eq=False)
class PreparedTopK:
    """`TopKShift` at work; it reads all tokens of a row at once."""

    source: TopKShift
    constant: None = None
    idle: bool = False
    reads_context: bool = True

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Tensor:
        shift, tokens = self.source, self.source.tokens.to(x.device)
        latent = (x.float() @ shift.w).relu() * tokens
        top = latent.topk(min(shift.k, latent.shape[1]), dim=1)
        carried = top.values.sum(1) / tokens.sum(1).clamp(min=1, max=shift.k)
        shift.outside.append(latent.scatter(1, top.indices, 0.0))
        return (carried[:, None, None] * shift.w * tokens[..., None]).to(x.dtype)


def reft_r1(subject: Subject, data: ConceptData, settings: ReFTr1Settings, seed: int) -> Fitted:
    """w detects and steers: h' = h + mean(top-k ReLU(h w)) w while it learns.

    Loss: the responses' cross-entropy under h', plus `l1` times the mean latent outside the top-k
    (summed over the batch's rows), ramped from 0. w keeps length 1. Source: AxBench, ReFT-r1.
    """
    data.require("positives", *(("negatives",) if settings.negatives else ()))
    generator = torch.Generator().manual_seed(seed)
    w = unit_start(int(subject.model.cfg.d_model), generator)
    w = w.to(next(subject.model.parameters()).device).requires_grad_()
    pairs = data.positives + (data.negatives if settings.negatives else ())
    texts, site = ResponseTexts.of(subject, pairs), data.site(subject)

    def loss_of(batch: ResponseBatch, progress: float) -> Tensor:
        tokens = batch.behind_prefix
        shift = TopKShift(w, settings.top_k, tokens)
        edit = Edit(shift, site, EVERYWHERE)
        loss = batch.loss(learning_logits(subject.model, batch.tokens, [edit]))
        outside = shift.outside[-1]
        penalty = (outside.sum(1) / tokens.sum(1).to(outside.device)).sum()
        return loss + progress * settings.l1 * penalty

    losses = learned(
        subject, texts, [w], loss_of, settings.schedule, generator, desc="ReFT-r1", unit_rows=True
    )
    about = {**asdict(settings), "loss": summary(losses)}
    return added(
        "reft_r1",
        subject,
        data,
        w.detach(),
        seed=seed,
        settings=about,
        mean_norm=None,
        rectified=True,
    )
