"""Side effects of many features as a plan: units of a block of features, through any runner.

plan = SideEffectPlan(ModelRef.of("agent-gpt2"), SAERef.of("agent-gpt2", "l2-topk-512"),
                      TokensRef.write(tokens, "contexts.safetensors"), features,
                      downstream=SAERef.of("agent-gpt2", "l3-topk-512"))
InProcess().run(plan, "effects")
effects = side_effects_of(plan, "effects")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..effects.spread import TAUS
from .canonical import content_key
from .contexts import TokensRef
from .parts import collect
from .plan import Unit
from .references import ModelRef
from .runner import with_smaller_batches
from .sas_protocol import SAERef
from .side_effects import (
    PANEL,
    PER_KIND,
    ROWS,
    SideEffects,
    measure_side_effects,
    survey_contexts,
)

if TYPE_CHECKING:
    import pandas as pd

MEASURE = "side effects 1"
"""Name and version of what a part holds."""


OPTIONS = (
    "strengths",
    "unit",
    "contexts",
    "per_kind",
    "panel",
    "taus",
    "controls",
    "full",
    "seed",
    "rows",
)


@dataclass(frozen=True)
class SideEffectPlan:
    """`measure_side_effects` of `features` with these options, `block` features a unit.

    Raises ValueError without features or for a block below 1.
    """

    model: ModelRef
    sae: SAERef
    tokens: TokensRef
    features: tuple[int, ...]
    downstream: SAERef | None = None
    strengths: tuple[float, ...] = (1.0,)
    unit: str = "raw"
    contexts: str = "mixed"
    per_kind: int = PER_KIND
    panel: int = PANEL
    taus: tuple[float, ...] = TAUS
    controls: int = 0
    full: bool = False
    seed: int = 0
    rows: int = ROWS
    block: int = 64
    worker: ClassVar[str] = f"{__name__}:SideEffectWorker"
    title: ClassVar[str] = "side effects"

    def __post_init__(self) -> None:
        if not self.features or self.block < 1:
            raise ValueError("name at least one feature, and blocks of at least one")

    def options(self) -> dict[str, Any]:
        """The keyword options of `measure_side_effects`."""
        return {name: getattr(self, name) for name in OPTIONS}

    def units(self) -> Sequence[Unit]:
        """Blocks of features in the order given."""
        inputs = {
            "measure": MEASURE,
            "model": self.model.identity(),
            "sae": self.sae.fingerprint,
            "downstream": None if self.downstream is None else self.downstream.fingerprint,
            "tokens": self.tokens.fingerprint,
            "options": self.options(),
        }
        starts = range(0, len(self.features), self.block)
        blocks = [self.features[start : start + self.block] for start in starts]
        return [
            Unit.of({"features": [start, start + len(part)]}, of=content_key(part), **inputs)
            for start, part in zip(starts, blocks, strict=True)
        ]


class SideEffectWorker:
    """Runs units of a `SideEffectPlan`; model, dictionaries and the clean pass are loaded once."""

    def __init__(self, plan: SideEffectPlan) -> None:
        self.plan = plan
        self.model = plan.model.open().model
        self.sae = plan.sae.open(plan.model)
        self.downstream = None if plan.downstream is None else plan.downstream.open(plan.model)
        self.tokens = plan.tokens.load()
        self.survey = survey_contexts(
            self.model,
            self.sae,
            self.tokens,
            downstream=self.downstream,
            panel=plan.panel,
            rows=plan.rows,
            progress=False,
        )

    def run(self, unit: Unit) -> pd.DataFrame:
        """The rows of `SideEffects.table` for the unit's features, with the rows that fitted."""
        start, stop = unit.coordinates["features"]
        found, rows = with_smaller_batches(
            lambda size: self.measured(start, stop, size), self.plan.rows
        )
        return found.table.assign(rows=rows)

    def measured(self, start: int, stop: int, rows: int) -> SideEffects:
        return measure_side_effects(
            self.model,
            self.sae,
            self.plan.features[start:stop],
            self.tokens,
            downstream=self.downstream,
            survey=self.survey,
            progress=False,
            **{**self.plan.options(), "rows": rows},
        )


def side_effects_of(plan: SideEffectPlan, out: str | Path) -> SideEffects:
    """The complete plan's table as `measure_side_effects` gives it."""
    from ..adapters.sae_lens import sae_id

    def name(one: SAERef | None) -> str | None:
        return None if one is None else sae_id(one.open(plan.model))

    settings = {
        **plan.options(),
        "sae_id": name(plan.sae),
        "downstream_id": name(plan.downstream),
        "model": asdict(plan.model),
        "positions": "last token",
    }
    return SideEffects(collect(plan, out).to_pandas(), settings)


__all__ = ["SideEffectPlan", "SideEffectWorker", "side_effects_of"]
