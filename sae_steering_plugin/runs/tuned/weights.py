"""LoRA: the model's own weights, moved by low-rank matrices while a block is open."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ...adapters.learning import learning_logits
from ...adapters.peft import low_rank_adapter
from ..subject import Subject
from .descent import Schedule, summary
from .records import ConceptData, Fitted
from .texts import ResponseBatch, ResponseTexts
from .vectors import learned


@dataclass(frozen=True)
class LoRASettings:
    """AxBench's values for 2B: the attention outputs of `layers`, all blocks when empty (AxBench
    takes four, {5, 10, 15, 20} of 26)."""

    schedule: Schedule = Schedule(18, 2, 24, 9e-4)
    rank: int = 4
    alpha: int = 32
    dropout: float = 0.05
    layers: tuple[int, ...] = ()


def lora(subject: Subject, data: ConceptData, settings: LoRASettings, seed: int) -> Fitted:
    """An adapter that minimises the loss of the positive responses; on inside `applied()` only.

    Raises what `low_rank_adapter` raises: TypeError for a HookedTransformer, ImportError without
    peft.
    """
    data.require("positives")
    adapter = low_rank_adapter(
        subject.model,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        layers=settings.layers,
        seed=seed,
    )
    texts = ResponseTexts.of(subject, data.positives)
    generator = torch.Generator().manual_seed(seed)

    def loss_of(batch: ResponseBatch, progress: float) -> Tensor:
        del progress
        with adapter.applied(learning=True):
            return batch.loss(learning_logits(subject.model, batch.tokens))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout draws from the global generator
        losses = learned(
            subject,
            texts,
            list(adapter.parameters()),
            loss_of,
            settings.schedule,
            generator,
            desc="LoRA",
        )
    for one in adapter.parameters():
        one.requires_grad_(False)
    details = {
        **asdict(settings),
        "projections": adapter.names,
        "loss": summary(losses),
        "seed": seed,
    }
    return Fitted("lora", data.concept, weights=adapter.applied, has_factor=False, details=details)
