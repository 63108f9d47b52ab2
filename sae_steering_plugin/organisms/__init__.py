"""The embedded models: two small agents trained on a world whose latents are known.

`load_organism("agent-gpt2")` gives the model, its SAEs, its tokenizer and its world. The weights
lie in `organisms/data/`; `python -m sae_steering_plugin.organisms.train NAME --out DIR` makes them.

Beside them `load_organism("calendar-gpt2")` gives a far smaller model of two circular concepts and
a planted set of memorised strings (`organisms.calendar`, made by `organisms.train_calendar`). It is
no agent and not in `list_organisms()`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Organism", "data_folder", "list_organisms", "load_organism"]

DATA = Path(__file__).resolve().parent / "data"
CALENDAR = "calendar-gpt2"
CALENDAR_DATA = DATA.parent / "calendar_data"


@dataclass(frozen=True, eq=False)
class Organism:
    """An embedded model with everything that was made for it.

    `model` is a `SAETransformerBridge` in eval mode, `saes` maps names to SAELens SAEs (the primary
    one first), `world` is the generator it was trained on (a `World`; a `Calendar` for
    "calendar-gpt2"), `card` what the recipe measured.
    """

    name: str
    model: Any
    saes: Mapping[str, Any]
    world: Any
    tokenizer: Any
    card: Mapping[str, Any]

    @property
    def primary_sae(self) -> Any:
        """The SAE to steer with by default. Raises KeyError when it was not loaded."""
        return self.sae(self.card["primary_sae"])

    def sae(self, name: str) -> Any:
        """One of the loaded SAEs by name. Raises KeyError that lists them."""
        if name not in self.saes:
            raise KeyError(f"no SAE {name!r} is loaded; loaded: {', '.join(self.saes) or 'none'}")
        return self.saes[name]

    def __repr__(self) -> str:
        size = self.card.get("parameters", 0) / 1e6
        return f"Organism({self.name!r}, {size:.1f} M parameters, SAEs: {', '.join(self.saes)})"

    def _repr_html_(self) -> str:
        from ..types import escaped

        measured = self.card.get("saes", {})
        caption = f"{self.name}: {self.card.get('summary', '')}"
        rows = "".join(
            f"<tr><td>{escaped(name)}</td><td>{escaped(sae.cfg.metadata.hook_name)}</td>"
            f"<td>{sae.cfg.d_sae}</td>"
            f"<td>{escaped(measured.get(name, {}).get('l0', ''))}</td>"
            f"<td>{escaped(measured.get(name, {}).get('explained_variance', ''))}</td></tr>"
            for name, sae in self.saes.items()
        )
        return (
            f"<table><caption>{escaped(caption)}</caption>"
            "<tr><th>SAE</th><th>hook point</th><th>latents</th><th>L0</th>"
            f"<th>explained variance</th></tr>{rows}</table>"
        )


def list_organisms() -> list[str]:
    """The agents that `load_organism` takes by name."""
    return sorted(folder.parent.name for folder in DATA.glob("*/config.json"))


def data_folder(name: str) -> Path:
    """The folder of an embedded model: a Hugging Face checkpoint, with SAEs under `saes/`.

    Raises ValueError that lists the known names.
    """
    names = [*list_organisms(), CALENDAR]
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no organism {name!r}{hint}; embedded are {', '.join(names)}")
    return CALENDAR_DATA if name == CALENDAR else DATA / name


def load_organism(
    name: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    saes: Sequence[str] | None = None,
) -> Organism:
    """An embedded model with its SAEs, loaded by the hosts' own loaders; no network is needed.

    `saes` names the SAEs to load: all when None, none when empty. `dtype` is float32 when None and
    holds for the model and its SAEs. Raises ValueError for an unknown organism or SAE.
    """
    return read_organism(data_folder(name), device=device, dtype=dtype, saes=saes)


def read_organism(
    folder: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    saes: Sequence[str] | None = None,
) -> Organism:
    """An organism from a folder that the recipe wrote, named after its card."""
    import torch

    from ..adapters.sae_lens import load_sae
    from ..adapters.transformer_lens import load_model
    from .calendar import Calendar
    from .world import World

    dtype = torch.float32 if dtype is None else dtype
    card = read_card(folder)
    found = sorted(path.parent.name for path in folder.glob("saes/*/cfg.json"))
    known = sorted(found, key=lambda one: one != card.get("primary_sae"))
    wanted = known if saes is None else list(saes)
    if missing := [one for one in wanted if one not in known]:
        raise ValueError(f"{folder.name} has no SAE {missing[0]!r}; it has {', '.join(known)}")
    model = load_model(str(folder), device=device, dtype=dtype)
    loaded = {one: load_sae(folder / "saes" / one, device=device, dtype=dtype) for one in wanted}
    generator = Calendar if card.get("world") == "calendar" else World
    world = generator(seed=int(card.get("world_seed", 0)))
    name = str(card.get("name", folder.name))
    return Organism(name, model, loaded, world, model.tokenizer, card)


def read_card(folder: Path) -> dict[str, Any]:
    """What the recipe measured; empty for a model that has no card yet."""
    path = folder / "card.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
