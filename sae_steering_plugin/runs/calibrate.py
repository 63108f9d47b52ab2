"""How strong is strong: the strength that spends a given KL budget on a calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_steering_plugin.adapters.engine import encode_prompts
from sae_steering_plugin.adapters.steering import steer
from sae_steering_plugin.edits.shift import Add
from sae_steering_plugin.types import ALL, Edit, Positions, SteeringVector

FIRST_SHARE = 0.02
"""The search begins at this share of the mean residual norm and doubles."""

LARGEST_SHARE = 64.0
"""Beyond this many residual norms a budget is called unreachable."""

KEPT_LOGITS = 64_000_000
"""Unsteered log-probabilities are kept between evaluations up to this many numbers (256 MB)."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """The strength that spends `nats` per token, and the curve that was measured on the way.

    `strength` multiplies the vector as built (unit `raw`). `vector` is the same vector with the
    curve in its recipe, so `Add(vector, 0.1, unit="kl")` and `vector.convert(...)` work from now
    on. `tokens` is how many tokens the mean runs over.
    """

    strength: float
    nats: float
    budget: float
    tokens: int
    vector: SteeringVector
    curve: tuple[tuple[float, float], ...]

    def __repr__(self) -> str:
        length = self.strength * self.vector.norm
        return (
            f"Calibration(strength {self.strength:.4g} raw = length {length:.4g}, "
            f"{self.nats:.4g} nats per token over {self.tokens} tokens)"
        )


def calibrate_strength(
    model: Any,
    vector: SteeringVector,
    texts: Sequence[str],
    budget: float,
    *,
    positions: Positions = ALL,
    tolerance: float = 0.02,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
    max_evaluations: int = 40,
) -> Calibration:
    """The strength at which mean KL(unsteered || steered) per steered token equals `budget` nats.

    The mean runs over the next-token distributions at the tokens `positions` steers (the effect of
    a steered token on later unsteered ones is not counted). A negative budget calibrates the
    opposite direction and returns a negative strength. The first crossing from zero is found by
    doubling, then by regula falsi in the square root of the KL, to a relative `tolerance`.

    Raises ValueError for a zero budget, no text, a vector without direction, or a budget that even
    `LARGEST_SHARE` residual norms do not spend.
    """
    if budget == 0 or not texts:
        raise ValueError("give a budget other than 0 nats and at least one calibration text")
    sign = 1.0 if budget > 0 else -1.0
    direction = vector.direction
    batches = [
        encode_prompts(model, texts[i : i + batch_size], prepend_bos=prepend_bos)
        for i in range(0, len(texts), batch_size)
    ]
    measure = _KL(model, vector.hook_name, direction * sign, batches, positions)
    goal = abs(budget)
    norm = measure(0.0)[1]
    unit = norm if norm > 0 else vector.norm
    length = FIRST_SHARE * unit
    points = [(0.0, 0.0), (length, measure(length)[0])]
    while points[-1][1] < goal:
        length *= 2
        if length > LARGEST_SHARE * unit:
            raise ValueError(
                f"{goal:g} nats are not reached with {LARGEST_SHARE:g} residual norms "
                f"({points[-1][1]:.3g} nats): choose a smaller budget"
            )
        points.append((length, measure(length)[0]))
    low, high = points[-2], points[-1]
    while abs(high[1] - goal) > tolerance * goal and len(points) < max_evaluations:
        middle = _between(low, high, goal)
        nats = measure(middle)[0]
        points.append((middle, nats))
        if nats < goal:
            low = (middle, nats)
        else:
            high = (middle, nats)
        if abs(low[1] - goal) <= tolerance * goal:
            high = low
    curve = tuple(
        sorted({(sign * a, b) for a, b in points if a > 0} | set(_other_side(vector, sign)))
    )
    known = vector.with_recipe(
        kl_curve=curve, mean_norm=vector.recipe.mean_norm if vector.recipe.mean_norm else norm
    )
    return Calibration(
        strength=sign * high[0] / vector.norm,
        nats=high[1],
        budget=budget,
        tokens=measure.tokens,
        vector=known,
        curve=curve,
    )


def _other_side(vector: SteeringVector, sign: float) -> list[tuple[float, float]]:
    return [(a, b) for a, b in vector.recipe.kl_curve if a * sign < 0]


def _between(low: tuple[float, float], high: tuple[float, float], goal: float) -> float:
    """A point inside the bracket: where the square roots of KL, taken as linear, meet the goal."""
    a, b = low[1] ** 0.5, high[1] ** 0.5
    share = 0.5 if b <= a else (goal**0.5 - a) / (b - a)
    return low[0] + (high[0] - low[0]) * min(max(share, 0.05), 0.95)


@dataclass(eq=False)
class _KL:
    """length -> (mean KL over steered tokens, mean residual norm); counts the tokens."""

    model: Any
    hook_name: str
    direction: Tensor
    batches: list[tuple[Tensor, Tensor]]
    positions: Positions
    tokens: int = 0
    _base: dict[int, Tensor] | None = None

    def __call__(self, length: float) -> tuple[float, float]:
        total, count, norms = 0.0, 0, 0.0
        device = next(self.model.parameters()).device
        with torch.no_grad():
            for i, (tokens, mask) in enumerate(self.batches):
                tokens, mask = tokens.to(device), mask.to(device)
                base = self._unsteered(i, tokens, mask)
                change = Add(self.direction * length)
                steered = Edit(change, self.hook_name, self.positions)
                with steer(self.model, steered) as record:
                    after = self._log_probabilities(tokens, mask)
                keep = self._steered_tokens(tokens, mask)
                kl = (base.exp() * (base - after)).sum(dim=-1)
                total += float(kl[keep].sum())
                count += int(keep.sum())
                norms += record.edits[0].mean_residual * int(keep.sum())
        self.tokens = count
        return max(total / count, 0.0), norms / count

    def _log_probabilities(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.model(tokens, attention_mask=mask).float().log_softmax(dim=-1)

    def _unsteered(self, i: int, tokens: Tensor, mask: Tensor) -> Tensor:
        kept = self._base if self._base is not None else {}
        self._base = kept
        if i in kept:
            return kept[i]
        base = self._log_probabilities(tokens, mask)
        if sum(b.numel() for b in kept.values()) + base.numel() <= KEPT_LOGITS:
            kept[i] = base
        return base

    def _steered_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        real = mask.bool()
        index = real.long().cumsum(dim=1) - 1
        bos = getattr(self.model.tokenizer, "bos_token_id", None)
        leading = (index == 0) & real & (tokens == (-1 if bos is None else bos))
        return self.positions.keep(index, real.sum(dim=1), real, leading)


__all__ = ["Calibration", "calibrate_strength"]
