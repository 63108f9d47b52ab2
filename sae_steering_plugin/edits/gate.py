"""A gate around any change: it acts in a row, or at a token, only where a condition holds.

A condition reads the activation at its own hook point and is decided there:

- `per="sequence"` once per prompt and batch row, from the prompt tokens that `read` names, in the
  pass that feeds the row's last prompt token. It then stands for the rest of that text, cached or
  not, and a new prompt decides anew. An edit of prompt tokens needs the decision while the prompt
  is computed, so it must lie behind the condition's hook point, and a prompt fed in chunks can be
  edited from its last chunk on.
- `per="token"` at every token by itself, in the same pass.

Source: conditional activation steering (CAST), arXiv 2409.05907, and its code
(IBM/activation-steering), which looks at batch row 0 only and names its comparison after the
threshold; here every row has its own decision, and `comparison` says what the score must be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_steering_plugin.adapters.sae_parts import architecture, site_names
from sae_steering_plugin.edits.codes import as_features, codes_of, require_features
from sae_steering_plugin.types import (
    PREFILL,
    SMALLEST_NORM,
    Change,
    Positions,
    PreparedChange,
    SteeringVector,
)

Per = Literal["sequence", "token"]
Comparison = Literal["above", "below"]
Rule = Literal["all", "any"]


@runtime_checkable
class Condition(Protocol):
    """What a gate asks: a score of the activation at `site`, and which scores open it.

    `gathered` adds a chunk's tokens to what a row has shown so far (None before the first), and
    `score` turns that into one number per row. Scores are float32, decisions exact in them.
    """

    @property
    def site(self) -> str: ...

    @property
    def read(self) -> Positions: ...

    @property
    def per(self) -> Per: ...

    def gathered(
        self,
        x: Float[Tensor, "batch pos d_model"],
        keep: Bool[Tensor, "batch pos"],
        before: Tensor | None,
    ) -> Tensor: ...

    def score(self, gathered: Tensor) -> Tensor: ...

    def token_scores(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos"]: ...

    def opens(self, score: Tensor) -> Tensor: ...


def _check(threshold: float, comparison: str, read: Positions, per: str) -> None:
    if not math.isfinite(threshold):
        raise ValueError(f"threshold is {threshold}; it must be a finite number")
    if comparison not in ("above", "below"):
        raise ValueError(f"comparison is {comparison!r}; choose 'above' or 'below'")
    if per not in ("sequence", "token"):
        raise ValueError(f"per is {per!r}; choose 'sequence' or 'token'")
    if per == "sequence" and read.phase != "prefill":
        raise ValueError(
            f"a sequence is decided on its prompt, and read={read} holds other tokens: use "
            "PREFILL, LAST, or Positions(..., phase='prefill')"
        )


def _opens(score: Tensor, threshold: float | Tensor, comparison: str) -> Tensor:
    return score > threshold if comparison == "above" else score < threshold


@dataclass(frozen=True, eq=False)
class SimilarTo:
    """CAST's condition: cos(h, tanh(p)) against a threshold, p the projection of h on `vector`.

    h is the mean activation over the prompt tokens that `read` names (`LAST` reads one), or the
    token's own with `per="token"`. `vector` is a `SteeringVector` or a tensor `[d_model]`, then
    with `hook_name`. The score does not change with the vector's length or sign.
    """

    vector: SteeringVector | Tensor
    threshold: float
    comparison: Comparison = "above"
    read: Positions = PREFILL
    per: Per = "sequence"
    hook_name: str | None = None

    def __post_init__(self) -> None:
        _check(self.threshold, self.comparison, self.read, self.per)
        if self._values().ndim != 1 or float(self._values().norm()) <= SMALLEST_NORM:
            raise ValueError("a condition needs one vector of some length, [d_model]")
        _ = self.site

    def _values(self) -> Tensor:
        return self.vector.vector if isinstance(self.vector, SteeringVector) else self.vector

    @property
    def site(self) -> str:
        name = self.hook_name
        if name is None and isinstance(self.vector, SteeringVector):
            name = self.vector.hook_name
        if not name:
            raise ValueError("where is the condition read? pass hook_name=")
        return name

    def gathered(self, x: Tensor, keep: Tensor, before: Tensor | None) -> Tensor:
        """Sum over kept tokens and their number, `[batch, d_model + 1]`, float64."""
        kept = torch.where(keep.unsqueeze(-1), x, 0.0).double().sum(dim=1)
        now = torch.cat([kept, keep.sum(dim=1, keepdim=True).double()], dim=1)
        return now if before is None else before + now

    def score(self, gathered: Tensor) -> Tensor:
        return self._similarity(gathered[:, :-1] / gathered[:, -1:])

    def token_scores(self, x: Tensor) -> Tensor:
        return self._similarity(x.double())

    def opens(self, score: Tensor) -> Tensor:
        return _opens(score, self.threshold, self.comparison)

    def _similarity(self, h: Tensor) -> Tensor:
        c = self._values().detach().to(device=h.device, dtype=h.dtype)
        projected = torch.tanh((h @ c / (c @ c)).unsqueeze(-1) * c)
        return torch.cosine_similarity(h, projected, dim=-1).float()


@dataclass(frozen=True, eq=False)
class FeatureFires:
    """The SAE's own condition: max over the read tokens of one latent's code, against a threshold.

    With several latents the largest of their codes counts. With `per="token"` the token's own code.
    Raises ValueError for a latent outside the dictionary and for a temporal dictionary, whose codes
    need every earlier token.
    """

    sae: Any
    feature: int | Sequence[int]
    threshold: float = 0.0
    comparison: Comparison = "above"
    read: Positions = PREFILL
    per: Per = "sequence"

    def __post_init__(self) -> None:
        _check(self.threshold, self.comparison, self.read, self.per)
        require_features(self.sae, as_features(self.feature))
        if architecture(self.sae) == "temporal":
            raise ValueError("a temporal dictionary reads earlier tokens, so it cannot be a gate")

    @property
    def site(self) -> str:
        return site_names(self.sae)[0]

    def gathered(self, x: Tensor, keep: Tensor, before: Tensor | None) -> Tensor:
        """Largest code so far, `[batch]`; minus infinity before a token was read."""
        codes = self.token_scores(x).masked_fill(~keep, -torch.inf)
        now = codes.amax(dim=1)
        return now if before is None else torch.maximum(before, now)

    def score(self, gathered: Tensor) -> Tensor:
        return gathered

    def token_scores(self, x: Tensor) -> Tensor:
        return codes_of(self.sae, as_features(self.feature), x).amax(dim=-1)

    def opens(self, score: Tensor) -> Tensor:
        return _opens(score, self.threshold, self.comparison)


@dataclass(frozen=True, eq=False)
class Gated:
    """`change` where the conditions hold: all of them, or any (`rule`); untouched elsewhere.

    Where the gate is shut the activation is bit-identical, where it is open the change is the plain
    one. Edit positions and rows apply as ever. Only `steer`, `fwd_hooks` and what is built on them
    can decide a gate.
    """

    change: Change
    conditions: Condition | Sequence[Condition]
    rule: Rule = "all"

    def __post_init__(self) -> None:
        if self.rule not in ("all", "any"):
            raise ValueError(f"rule is {self.rule!r}; choose 'all' or 'any'")
        if isinstance(self.change, Gated):
            raise ValueError("a gate stands inside a gate: give both conditions to one")
        if not isinstance(self.change, Change):
            raise TypeError(f"{type(self.change).__name__} is not a change: pass Add(vector), ...")
        listed = self.listed
        if not listed:
            raise ValueError("a gate needs a condition")
        wrong = [one for one in listed if not isinstance(one, Condition)]
        if wrong:
            raise TypeError(
                f"{type(wrong[0]).__name__} is not a condition: pass SimilarTo(...) or "
                "FeatureFires(...)"
            )

    @property
    def listed(self) -> tuple[Condition, ...]:
        if isinstance(self.conditions, Sequence):
            return tuple(self.conditions)
        return (self.conditions,)

    @property
    def hook_name(self) -> str | None:
        return self.change.hook_name

    @property
    def batch_rows(self) -> int:
        return self.change.batch_rows

    def prepare(self, *, dtype: torch.dtype, device: torch.device | str) -> PreparedChange:
        del dtype, device
        raise RuntimeError(
            "a gate is decided at its own hook point during a forward pass: put it on the model "
            "with steer(model, Edit(Gated(...)))"
        )


@dataclass(frozen=True)
class Threshold:
    """The cut that tells two groups of scores apart best, and its F1 on the scores it was chosen
    on."""

    threshold: float
    comparison: Comparison
    train_f1: float


def best_threshold(
    scores: Float[Tensor, " score"], labels: Bool[Tensor, " label"], *, step: float = 0.01
) -> Threshold:
    """The grid point and comparison of largest F1 for label True (the gate should open).

    The grid runs from the smallest score less a step to the largest in steps of `step` (0.01 in
    arXiv 2409.05907, for scores between -1 and 1). Ties: the middle of the run of best points, and
    "above" before "below". Raises ValueError unless both labels occur and `step` is positive.
    """
    if step <= 0:
        raise ValueError(f"step is {step}; it must be positive")
    truth = labels.bool()
    if len(scores) != len(truth) or bool(truth.all()) or not bool(truth.any()):
        raise ValueError("give one label per score, some True and some False")
    low, high = float(scores.min()) - step, float(scores.max()) + step
    grid = low + step * torch.arange(int((high - low) / step) + 1, dtype=torch.float64)
    best: Threshold | None = None
    comparisons: tuple[Comparison, ...] = ("above", "below")
    for comparison in comparisons:
        opened = _opens(scores.double()[None], grid[:, None], comparison)
        hits = (opened & truth).sum(1).double()
        f1 = 2 * hits / (opened.sum(1) + truth.sum())
        first = int(f1.argmax())
        last = first
        while last + 1 < len(f1) and f1[last + 1] == f1[first]:
            last += 1
        found = Threshold(float(grid[(first + last) // 2]), comparison, float(f1[first]))
        if best is None or found.train_f1 > best.train_f1:
            best = found
    assert best is not None
    return best
