"""One loop of gradient descent for every trained method: AdamW, learning rate linear to zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...types import SMALLEST_NORM


@dataclass(frozen=True)
class Schedule:
    """Texts per batch, batches per step, epochs, first learning rate, weight decay, largest
    gradient norm (None: no bound)."""

    batch_size: int
    accumulation: int
    epochs: int
    learning_rate: float
    weight_decay: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if min(self.batch_size, self.accumulation, self.epochs) < 1 or self.learning_rate <= 0:
            raise ValueError(
                "batch_size, accumulation and epochs are at least 1 and learning_rate above 0; "
                f"this is {self}"
            )


def descend(
    parameters: Sequence[Tensor],
    n: int,
    loss_of: Callable[[list[int], float], Tensor],
    schedule: Schedule,
    generator: torch.Generator,
    *,
    unit_rows: bool = False,
    desc: str = "fit",
    progress: bool = True,
) -> list[float]:
    """Minimise `loss_of(rows, share of steps done)` over `parameters`, in place; one loss per step.

    Texts are drawn in a new random order each epoch. With `unit_rows` the part of each gradient
    along its vector is taken out before a step, and the vector is put back to length 1 after it.
    Raises ValueError when a loss is not finite.
    """
    optimiser = torch.optim.AdamW(
        list(parameters), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    per_epoch = -(-n // schedule.batch_size)
    total = schedule.epochs * -(-per_epoch // schedule.accumulation)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: max(0.0, 1 - step / total))
    losses: list[float] = []
    with tqdm(total=total, desc=desc, unit="step", disable=not progress, leave=False) as bar:
        for _ in range(schedule.epochs):
            order = torch.randperm(n, generator=generator).tolist()
            batches = [
                order[start : start + schedule.batch_size]
                for start in range(0, n, schedule.batch_size)
            ]
            for first in range(0, len(batches), schedule.accumulation):
                held = batches[first : first + schedule.accumulation]
                value = 0.0
                for rows in held:
                    loss = loss_of(rows, len(losses) / total) / len(held)
                    loss.backward()
                    value += float(loss.detach())
                if value != value or abs(value) == float("inf"):
                    raise ValueError(
                        f"{desc}: the loss is {value} at step {len(losses)}; lower learning_rate "
                        f"({schedule.learning_rate})"
                    )
                if unit_rows:
                    leave_length_alone(parameters)
                if schedule.clip is not None:
                    torch.nn.utils.clip_grad_norm_(list(parameters), schedule.clip)
                optimiser.step()
                rate.step()
                optimiser.zero_grad()
                if unit_rows:
                    back_to_unit(parameters)
                losses.append(value)
                bar.update(1)
    return losses


def leave_length_alone(parameters: Sequence[Tensor]) -> None:
    """Take the component along each (unit) vector out of its gradient."""
    for w in parameters:
        assert w.grad is not None
        with torch.no_grad():
            w.grad -= (w.grad @ w) * w


def back_to_unit(parameters: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for w in parameters:
            w /= w.norm().clamp_min(SMALLEST_NORM)


def summary(losses: Sequence[float]) -> dict[str, float | int]:
    """The loss curve in four numbers: steps, and means over its first, its last and all steps."""
    part = max(1, len(losses) // 10)
    return {
        "steps": len(losses),
        "first": sum(losses[:part]) / part,
        "last": sum(losses[-part:]) / part,
        "mean": sum(losses) / len(losses),
    }
