"""What the autonomy protocol found, as records, tables, files and a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..effects.axis import Axis, VectorGeometry
from ..effects.cross import CrossTraitMatrix, Selectivity
from ..effects.dose import DoseReading
from ..effects.tiers import Tier
from ..types import Effect, escaped
from .autonomy_arms import RANDOM, middle
from .autonomy_vectors import DIFF_MEAN, PERMUTED, RANDOM_WEIGHTS, RAW_RIDGE, TraitVectors
from .protocols import Rows
from .trait_structure import TraitStructure
from .transcripts import PROXIES, Rollouts


@dataclass(frozen=True)
class ArmEffect:
    """An effect with what its arm did besides: mean turns, calls and questions, and the share of
    rollouts cut at the token limit, each beside the base's."""

    arm: str
    effect: Effect
    turns: float
    base_turns: float
    calls: float
    base_calls: float
    asks: float
    base_asks: float
    cut: float

    def to_dict(self) -> dict[str, Any]:
        own = asdict(self)
        del own["effect"]
        return {**own, **self.effect.to_dict()}

    def side(self) -> dict[str, Any]:
        """The arm's turns, calls and validity as a table shows them."""
        return {
            "turns": round(self.turns, 2),
            "calls": round(self.calls, 2),
            "asks": round(self.asks, 2),
            "valid": round(self.effect.valid_rate, 3),
        }


@dataclass(frozen=True, eq=False)
class AutonomyReport:
    """Everything the protocol found.

    `effects` hold every condition on every proxy; those of a trait's own proxy are corrected as one
    family (`p_adjusted`), the others stand uncorrected. `controls` are the control arms on every
    proxy, in no family. `matrix` is the cross-trait matrix at the middle strength, all tokens,
    corrected over its distinct cells. `doses` read each trait's own proxy at all and at prefill
    tokens, `tiers` at all tokens beside random directions. `behaviour` and `geometry` are the axis
    analyses of what vectors do and are; None for a single trait. `structure` compares with the
    world of an organism; None for other models and foreign scenarios. `notes` say what a reader
    must know.
    """

    model: str
    traits: tuple[str, ...]
    strengths: tuple[float, ...]
    n: int
    rollouts: Rollouts
    vectors: TraitVectors
    effects: tuple[ArmEffect, ...]
    controls: tuple[ArmEffect, ...]
    matrix: CrossTraitMatrix
    selectivity: tuple[Selectivity, ...]
    doses: tuple[DoseReading, ...]
    tiers: tuple[Tier, ...]
    behaviour: Axis | None
    geometry: VectorGeometry | None
    structure: TraitStructure | None
    power: Rows
    notes: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def own(self, trait: str) -> tuple[ArmEffect, ...]:
        """A trait's vector on its own proxy, in the order of the conditions."""
        return tuple(
            one
            for one in self.effects
            if one.effect.method == trait and one.effect.outcome == trait
        )

    def headline(self, vector: str, outcome: str) -> ArmEffect:
        """The cell of the matrix with its arm: middle strength, all tokens."""
        place = (vector, outcome, "all", middle(self.strengths))
        return next(one for one in self.effects if place_of(one.effect) == place)

    def control_row(self, trait: str) -> dict[str, Any]:
        """A trait's vector on its own proxy at the middle strength, beside every control there."""
        mine = self.headline(trait, trait).effect
        there = [
            one.effect
            for one in self.controls
            if one.effect.outcome == trait and one.effect.strength == mine.strength
        ]
        crowds = {
            "random direction": [one for one in there if one.method == RANDOM],
            "random weights": [one for one in there if one.method == RANDOM_WEIGHTS],
            "permuted labels": [one for one in there if one.method == PERMUTED],
        }
        row: dict[str, Any] = {"vector": trait, "d": round(mine.d, 2)}
        for name, crowd in crowds.items():
            sizes = [abs(one.d) for one in crowd]
            row[f"{name}: mean |d|"] = round(float(np.mean(sizes)), 2) if sizes else None
            row[f"{name}: largest"] = round(max(sizes), 2) if sizes else None
            larger = sum(size >= abs(mine.d) for size in sizes)
            row[f"{name}: p"] = round((1 + larger) / (1 + len(sizes)), 3) if sizes else None
        for kind in (DIFF_MEAN, RAW_RIDGE):
            own = [one.d for one in there if one.method == kind and one.trait == trait]
            row[kind] = round(own[0], 2) if own else None
        return row

    def tables(self) -> dict[str, Rows]:
        """What a person reads, title by title."""
        ddof = self.matrix.settings["ddof"]
        cells = self.matrix.significant()
        found: dict[str, Rows] = {
            "conditions": self.condition_rows(),
            f"cross-trait matrix: d (ddof {ddof}) at {middle(self.strengths):g} norms, all tokens; "
            "* Holm-adjusted p <= 0.05": self.matrix_rows(),
            "selectivity: own proxy against the largest other (mirrors left out)": [
                {
                    "vector": one.vector,
                    "ratio": round(one.ratio, 2),
                    "interval": f"{one.low:.2f} to {one.high:.2f}",
                    "strongest other": one.strongest_other,
                    "word": one.word,
                }
                for one in self.selectivity
            ],
            "evidence tiers (rules: effects.tiers.TierRules)": [
                {"vector": one.method, "tier": one.tier, "why": "; ".join(one.reasons)}
                for one in self.tiers
            ],
            f"dose-response on the own proxy (valid rate >= {self.settings['floor']:g})": [
                dose_row(one) for one in self.doses
            ],
            "axis": self.axis_rows(),
            "cosines of the vectors": self.cosine_rows(),
            "own proxy beside the controls": [
                self.control_row(trait)
                for trait in self.traits
                if self.controls and trait in PROXIES
            ],
            "probe beside text alone (held out by group)": self.probe_rows(),
            "world and measured structure": []
            if self.structure is None
            else self.structure.summary_rows(),
            "d by steering and by the world": []
            if self.structure is None
            else self.structure.rows(),
            "what so many scenarios can see (80 % power)": self.power,
            "notes": [{"note": note} for note in self.notes]
            + [{"note": f"matrix: {cells['corrected']} of {self.settings['distinct_cells']} "
                f"distinct cells after Holm, {cells['uncorrected']} of {cells['cells']} shown "
                "cells before"}],
        }  # fmt: skip
        return {title: rows for title, rows in found.items() if rows}

    def condition_rows(self) -> list[dict[str, Any]]:
        """Every condition on its trait's own proxy, with turns, calls and validity beside it."""
        return [
            {
                "vector": trait,
                "strength": one.strength,
                "positions": one.positions,
                "n": one.n,
                "base": round(one.base_mean, 2),
                "steered": round(one.arm_mean, 2),
                "d": round(one.d, 2),
                "interval": f"{one.ci_low:.2f} to {one.ci_high:.2f}",
                "p paired": figure(one.p_value),
                "p Mann-Whitney": figure(one.unpaired_p),
                "p adjusted": figure(one.p_adjusted),
                **row.side(),
            }
            for trait in self.traits
            for row in self.own(trait)
            for one in (row.effect,)
        ]

    def matrix_rows(self) -> list[dict[str, Any]]:
        """The matrix as text: d, a star where the corrected p is at most 0.05."""
        rows = []
        for vector in self.matrix.vectors:
            cells = {
                name: f"{one.d:+.2f}{'*' if one.p_adjusted <= 0.05 else ''}"
                for name in self.matrix.outcomes
                for one in (self.matrix.cell(vector, name),)
            }
            side = self.headline(vector, self.matrix.outcomes[0]).side()
            rows.append({"vector": vector, **cells, **side})
        return rows

    def axis_rows(self) -> list[dict[str, Any]]:
        """First components of behaviours and vectors beside their nulls."""
        rows = []
        named = {"behaviour (d)": self.behaviour}
        if self.geometry is not None:
            named["vectors"] = self.geometry.axis
        for what, axis in named.items():
            if axis is None:
                continue
            for one in axis.nulls.values():
                rows.append(
                    {
                        "what": what,
                        "first share": round(float(axis.shares[0]), 3),
                        "on one side": f"{axis.same_side:.0%}",
                        "null": one.says,
                        "null mean": round(float(one.mean[0]), 3),
                        f"null {one.quantile:.0%}": round(float(one.high[0]), 3),
                        "p": round(one.p_value, 4),
                        "components above": axis.n_above,
                    }
                )
        return rows

    def cosine_rows(self) -> list[dict[str, Any]]:
        if self.geometry is None:
            return []
        return [
            {"vector": name, **{other: round(float(x), 2) for other, x in zip(
                self.traits, row, strict=True)}}
            for name, row in zip(self.traits, self.geometry.cosines, strict=True)
        ]  # fmt: skip

    def probe_rows(self) -> list[dict[str, Any]]:
        """Each probe's held-out figures with the text-only baseline: control (e)."""
        keys = {
            "R2": "r2",
            "text only R2": "text_r2",
            "raw activations R2": "raw_r2",
            "permuted R2": "permuted_r2",
            "AUROC": "auroc",
            "text only AUROC": "text_auroc",
            "R2, split by sample": "sample_r2",
            "text only R2, split by sample": "text_sample_r2",
        }
        return [
            {
                "vector": trait,
                **{
                    name: None if scores.get(key) is None else round(scores[key], 3)
                    for name, key in keys.items()
                },
            }
            for trait, scores in self.vectors.scores.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the transcripts, as JSON takes it (numbers that are not finite: null)."""
        from .canonical import finite

        return finite(
            {
                "model": self.model,
                "traits": list(self.traits),
                "strengths": list(self.strengths),
                "n": self.n,
                "effects": [one.to_dict() for one in self.effects],
                "controls": [one.to_dict() for one in self.controls],
                "matrix": self.matrix.to_dict(),
                "selectivity": [one.to_dict() for one in self.selectivity],
                "doses": [one.to_dict() for one in self.doses],
                "tiers": [one.to_dict() for one in self.tiers],
                "behaviour_axis": self.behaviour and self.behaviour.to_dict(),
                "vector_axis": self.geometry and self.geometry.to_dict(),
                "structure": self.structure and self.structure.to_dict(),
                "probe_scores": {k: dict(v) for k, v in self.vectors.scores.items()},
                "power": [dict(row) for row in self.power],
                "notes": list(self.notes),
                "settings": dict(self.settings),
            }
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write autonomy.json (all numbers), autonomy.html (this page), effects.parquet and
        rollouts.parquet (transcripts); the paths written. The same report gives the same files."""
        import pandas as pd

        from .parts import write_whole

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        rows = [
            {"role": role, **one.to_dict()}
            for role, found in (("condition", self.effects), ("control", self.controls))
            for one in found
        ]
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        page = f"<!doctype html><meta charset='utf-8'><title>autonomy</title>{self._repr_html_()}\n"
        writers: dict[str, Callable[[Path], Any]] = {
            "autonomy.json": lambda path: path.write_text(text, encoding="utf-8"),
            "autonomy.html": lambda path: path.write_text(page, encoding="utf-8"),
            "effects.parquet": lambda path: pd.DataFrame(rows).to_parquet(path, index=False),
        }
        for name, write in writers.items():
            write_whole(place / name, write)
        self.rollouts.save(place / "rollouts.parquet")
        return [*(place / name for name in writers), place / "rollouts.parquet"]

    def _repr_html_(self) -> str:
        parts = [
            f"<h3>Autonomy protocol: {escaped(self.model)}, {self.n} scenarios x "
            f"{self.settings['conditions']} conditions</h3>",
            "<ul>" + "".join(f"<li>{escaped(note)}</li>" for note in self.notes) + "</ul>",
            self.matrix._repr_html_(),
            *(one._repr_html_() for one in self.tiers),
        ]
        for title, record in (
            ("What the vectors do", self.behaviour),
            ("What the vectors are", self.geometry),
            ("What the world says", self.structure),
        ):
            if record is not None:
                parts.append(f"<h4>{title}</h4>{record._repr_html_()}")
        shown = {k: v for k, v in self.tables().items() if k != "notes"}
        parts += [html_table(title, rows) for title, rows in shown.items()]
        return "".join(parts)


def place_of(one: Effect) -> tuple[str, str, str, float]:
    return one.method, one.outcome, one.positions, one.strength


def figure(value: float) -> float | None:
    """Two significant digits; None for what is not a number."""
    return float(f"{value:.2g}") if value == value else None


def html_table(title: str, rows: Rows) -> str:
    """Rows as a table; a missing number is an empty cell."""
    names = list(rows[0])
    head = "".join(f"<th>{escaped(name)}</th>" for name in names)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{escaped('' if row[n] is None else row[n])}</td>" for n in names)
        + "</tr>"
        for row in rows
    )
    return f"<table><caption>{escaped(title)}</caption><tr>{head}</tr>{body}</table>"


def dose_row(one: DoseReading) -> dict[str, Any]:
    def said(value: float | None) -> str:
        return "none" if value is None else f"{value:g}"

    return {
        "vector": one.method,
        "positions": one.positions,
        "onset": said(one.onset["up"]),
        "breakdown": said(one.breakdown["up"]),
        "peak": said(one.peak["up"]),
        "d at peak": round(one.peak_d["up"], 2),
        "Spearman": round(one.rise.rho, 2),
        "reversals": one.rise.reversals,
    }
