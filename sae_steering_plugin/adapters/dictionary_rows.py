"""The record beside each row of a steering dictionary, as JSON and safetensors can hold it.

SAELens keeps an open bag of metadata that answers None to any misspelt name, casts every stored
tensor to one dtype, and turns tuples into lists. These functions read strictly and give back what
was stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sae_steering_plugin.types import ALL, SMALLEST_NORM, Positions, Recipe, SteeringVector

FORMAT = 1
"""Version of the record under `metadata.steering`."""


@dataclass(frozen=True)
class Row:
    """What rides beside one decoder row. `base_id` names the SAE its codes belong to, if any."""

    label: str
    recipe: Recipe
    positions: Positions = ALL
    base_id: str = ""
    base_width: int = 0

    def to_dict(self) -> dict[str, Any]:
        positions = {field.name: getattr(self.positions, field.name) for field in fields(Positions)}
        return {
            "label": self.label,
            "recipe": plain(self.recipe.to_dict(), f"the recipe of {self.label!r}"),
            "positions": positions,
            "base_id": self.base_id,
            "base_width": self.base_width,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        known = [field.name for field in fields(cls)]
        check_words(values, known, "a row of metadata.steering")
        check_words(values["positions"], [field.name for field in fields(Positions)], "positions")
        recipe, positions = restored(values["recipe"]), Positions(**values["positions"])
        return cls(**{**values, "recipe": Recipe.from_dict(recipe), "positions": positions})


def metadata_record(rows: Sequence[Row]) -> dict[str, Any]:
    """What stands under `metadata.steering` for these rows."""
    return {"format": FORMAT, "rows": [row.to_dict() for row in rows]}


def rows_of(metadata: Mapping[str, Any], n: int) -> tuple[Row, ...]:
    """The `n` rows that a dictionary's metadata describes.

    Metadata without a record (a dictionary made by hand) gives unnamed rows. Raises ValueError for
    a record of another format or size, and for any unknown or missing word, with the nearest one.
    """
    if "steering" not in metadata:
        near = get_close_matches("steering", metadata, n=1, cutoff=0.8)
        if near:
            raise ValueError(f"metadata holds {near[0]!r}; it must be called 'steering'")
        return tuple(Row("", Recipe("unknown")) for _ in range(n))
    record = metadata["steering"]
    check_words(record, ["format", "rows"], "metadata.steering")
    if record["format"] != FORMAT:
        raise ValueError(
            f"this steering dictionary has format {record['format']!r}; this version of the plugin "
            f"reads {FORMAT}"
        )
    rows = tuple(Row.from_dict(row) for row in record["rows"])
    if len(rows) != n:
        raise ValueError(f"metadata describes {len(rows)} rows, the weights have {n}")
    return rows


def read_out(rows: Float[Tensor, "row d_in"]) -> Float[Tensor, "d_in row"]:
    """Columns `v / (v @ v)`, so that `a * v` reads `a`; a row without length reads nothing."""
    wide = rows.float()
    square = wide.square().sum(dim=-1, keepdim=True)
    inverse = torch.where(square > SMALLEST_NORM**2, square.reciprocal(), torch.zeros_like(square))
    return (wide * inverse).T.contiguous().to(rows.dtype)


def index_bytes(indices: Int[Tensor, " support"]) -> UInt8[Tensor, "support 4"]:
    """Four bytes per index: numbers up to 255 survive the cast to any dtype SAELens loads in."""
    shifts = torch.tensor([0, 8, 16, 24], device=indices.device)
    return ((indices.long().unsqueeze(-1) >> shifts) & 255).to(torch.uint8)


def indices_from_bytes(stored: Tensor) -> Int[Tensor, " support"]:
    """The indices that `index_bytes` wrote, from tensors of any dtype."""
    if stored.ndim != 2 or stored.shape[1] != 4:
        raise ValueError(
            f"code_indices has shape {tuple(stored.shape)}; four bytes per index expected"
        )
    shifts = torch.tensor([0, 8, 16, 24], device=stored.device)
    return (stored.long() << shifts).sum(dim=-1)


def plain(value: Any, where: str) -> Any:
    """`value` as JSON can hold it; tuples are marked, so that `restored` gives them back."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value) or "tuple" in value:
            raise TypeError(f"{where} holds a mapping whose keys are not plain words")
        return {key: plain(item, where) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"tuple": [plain(item, where) for item in value]}
    if isinstance(value, list):
        return [plain(item, where) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return plain(value.tolist(), where)
    raise TypeError(
        f"{where} holds a {type(value).__name__}, which JSON cannot store: make it plain"
    )


def restored(value: Any) -> Any:
    """The value that `plain` was given."""
    if isinstance(value, Mapping):
        if set(value) == {"tuple"}:
            return tuple(restored(item) for item in value["tuple"])
        return {key: restored(item) for key, item in value.items()}
    return [restored(item) for item in value] if isinstance(value, list) else value


def check_words(values: Any, known: Sequence[str], where: str) -> None:
    """Raise ValueError unless `values` is a mapping with exactly the keys `known`."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping, not {type(values).__name__}")
    for word in values:
        if word not in known:
            near = get_close_matches(str(word), known, n=1) or known
            raise ValueError(f"{where} has no field {word!r}; did you mean {', '.join(near)}?")
    missing = [word for word in known if word not in values]
    if missing:
        raise ValueError(f"{where} lacks {missing[0]!r}")


def spread_out(positions: Positions | Sequence[Positions], n: int) -> list[Positions]:
    """One position rule per row."""
    if isinstance(positions, Positions):
        return [positions] * n
    if len(positions) != n:
        raise ValueError(f"positions has {len(positions)} entries, not {n}")
    return list(positions)


def first_of(
    vectors: Sequence[SteeringVector], what: str, read: Callable[[SteeringVector], Any]
) -> SteeringVector:
    """The first vector, after asking that all agree in `read`."""
    if not vectors:
        raise ValueError("a steering dictionary needs at least one vector")
    found = list(dict.fromkeys(read(v) for v in vectors))
    if len(found) > 1:
        raise ValueError(
            f"vectors of one dictionary share one {what}; these have {found}: make several"
        )
    return vectors[0]


def only_model(vectors: Sequence[SteeringVector]) -> str:
    """The model the recipes name. Raises ValueError when they name several."""
    names = sorted({v.recipe.model_name for v in vectors if v.recipe.model_name})
    if len(names) > 1:
        raise ValueError(
            f"the recipes name the models {names}: pass model_name= to say whose these are"
        )
    return names[0] if names else ""
