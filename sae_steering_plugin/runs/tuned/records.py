"""What a method is fitted to, and what a fitted method can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...types import Edit, SteeringVector
from ..subject import Subject

Texts = tuple[tuple[str, str], ...]
"""(instruction, response) pairs."""


@dataclass(frozen=True)
class ConceptData:
    """A concept with its training texts, as (instruction, response) pairs.

    `feature` is the SAE feature that the concept's label belongs to, `max_activation` its published
    maximum. `hook_name` is the site of methods that need no SAE; empty means the SAE's own.
    `prompt` is the text that steers by prompting; without one a fixed sentence names the concept.
    """

    concept: str
    positives: Texts
    negatives: Texts = ()
    genre: str = "text"
    feature: int | None = None
    max_activation: float | None = None
    hook_name: str = ""
    prompt: str = ""

    def __post_init__(self) -> None:
        if not self.concept.strip():
            raise ValueError("the concept has no words")

    def site(self, subject: Subject) -> str:
        """The hook point to read and steer at."""
        if self.hook_name:
            return self.hook_name
        if subject.sae is None:
            raise ValueError("where to steer? give the subject an SAE or the data a hook_name")
        return str(subject.sae.cfg.metadata.hook_name)

    def require(self, *sides: str) -> None:
        """Raise ValueError for a side without texts."""
        for side in sides:
            if not getattr(self, side):
                raise ValueError(f"concept {self.concept!r} has no {side[:-1]} training text")


@dataclass(eq=False)
class Fitted:
    """A method fitted to one concept.

    `steering(amounts)` gives the edits for `amounts` = factor x `max_activation`, one number or one
    per batch row; a method without a factor ignores them. `detection` scores tokens. `weights`
    opens the block in which the model's weights are changed. `vector` is what is added, with its
    recipe; None when nothing is. `max_activation` is None until the caller has set it (AxBench: the
    largest score over the evaluation rows). `details` hold what a fit without a vector would keep
    in a recipe.
    """

    name: str
    concept: str
    vector: SteeringVector | None = None
    steering: Callable[[Tensor], tuple[Edit, ...]] | None = None
    detection: Callable[[Tensor], Tensor] | None = None
    weights: Callable[[], AbstractContextManager[Any]] | None = None
    prefix: str = ""
    has_factor: bool = True
    max_activation: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changes_weights(self) -> bool:
        return self.weights is not None

    def edits(self, factor: float | Tensor) -> tuple[Edit, ...]:
        """The edits at one factor, or at one factor per batch row.

        Raises ValueError while `max_activation` is not set, for a method that has a factor.
        """
        if self.steering is None:
            return ()
        amounts = torch.as_tensor(factor, dtype=torch.float32)
        if not self.has_factor:
            return self.steering(amounts)
        if self.max_activation is None:
            raise ValueError(
                f"{self.name}: set max_activation first; factors are multiples of it (AxBench: the "
                "largest token score over the evaluation texts)"
            )
        return self.steering(amounts * self.max_activation)

    def prompt(self, instruction: str) -> str:
        """The instruction as the model gets it."""
        return f"{self.prefix}\n\nQuestion: {instruction}" if self.prefix else instruction

    def applied(self) -> AbstractContextManager[Any]:
        """The block in which the model's weights are the fitted ones; empty for other methods."""
        return self.weights() if self.weights is not None else nullcontext()

    def token_scores(
        self, residual: Float[Tensor, "row pos d_model"]
    ) -> Float[Tensor, "row pos"] | None:
        """How much of the concept each token holds; None when the method does not detect."""
        if self.detection is None:
            return None
        with torch.no_grad():
            return self.detection(residual.float())


@dataclass(frozen=True)
class SteeringMethod:
    """A method by name: `build(subject, data, settings, seed)` with `settings` a frozen dataclass.

    `build` raises LookupError when it finds nothing to steer with.
    """

    name: str
    build: Callable[[Subject, ConceptData, Any, int], Fitted]
    settings: Any = None

    def fit(self, subject: Subject, data: ConceptData, *, seed: int = 0) -> Fitted:
        """The method fitted to a concept; the same seed gives the same fit, bit for bit."""
        return self.build(subject, data, self.settings, seed)

    def having(self, **changes: Any) -> SteeringMethod:
        """The same method under other settings. Raises ValueError, with the known ones, for an
        unknown setting."""
        known = {} if self.settings is None else self.settings.__dataclass_fields__
        if unknown := sorted(set(changes) - set(known)):
            raise ValueError(
                f"{self.name} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}"
            )
        return replace(self, settings=replace(self.settings, **changes)) if changes else self

    def identity(self) -> dict[str, Any]:
        """What of the method can change a number."""
        return {"method": self.name, "settings": self.settings}
