"""The model under study with its SAE: an embedded organism, a local folder, or a hub name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from sae_steering_plugin.runs.contrast_files import Render, chat_render
from sae_steering_plugin.types import Contrast

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The words a command line may use for a dtype."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded model; `sae` is None when none was asked for, `world` when it is no organism."""

    model: Any
    name: str
    sae: Any = None
    sae_name: str = ""
    world: Any = None

    @property
    def render(self) -> Render | None:
        """The chat template as a hook for contrast files; None for a tokenizer without one."""
        tokenizer = self.model.tokenizer
        return chat_render(tokenizer) if getattr(tokenizer, "chat_template", None) else None


def open_subject(
    model: str, sae: str | None = None, *, device: str = "cpu", dtype: str = "float32"
) -> Subject:
    """The model and SAE that two words name.

    `model` is an organism's name, a local Hugging Face folder, or a hub name. `sae` is one of an
    organism's SAE names (its primary one when None), a folder of `save_model`, or `release:sae_id`.
    Raises ValueError for an unknown dtype or SAE name, FileNotFoundError or OSError for what is
    not there.
    """
    from sae_steering_plugin.organisms import list_organisms

    if dtype not in DTYPES:
        raise ValueError(f"no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if model in list_organisms():
        return of_organism(model, sae, device=device, dtype=DTYPES[dtype])
    from sae_steering_plugin.adapters.sae_lens import load_sae
    from sae_steering_plugin.adapters.transformer_lens import load_model

    if not Path(model).is_dir():
        near = get_close_matches(model, list_organisms(), n=1)
        if near:
            raise ValueError(f"no organism {model!r}; did you mean {near[0]!r}?")
    dictionary = None if sae is None else load_sae(sae, device=device, dtype=DTYPES[dtype])
    loaded = load_model(model, device=device, dtype=DTYPES[dtype])
    return Subject(loaded, model, dictionary, sae or "")


def of_organism(name: str, sae: str | None, *, device: str, dtype: torch.dtype) -> Subject:
    """An embedded model with one of its SAEs (the card's primary one when None)."""
    from sae_steering_plugin.adapters.sae_lens import load_sae
    from sae_steering_plugin.organisms import data_folder, load_organism, read_card

    chosen = str(read_card(data_folder(name))["primary_sae"]) if sae is None else sae
    if ":" in chosen or (Path(chosen) / "cfg.json").is_file():
        organism = load_organism(name, device=device, dtype=dtype, saes=())
        dictionary = load_sae(chosen, device=device, dtype=dtype)
    else:
        organism = load_organism(name, device=device, dtype=dtype, saes=(chosen,))
        dictionary = organism.saes[chosen]
    return Subject(organism.model, name, dictionary, chosen, organism.world)


def world_contrast(
    subject: Subject, trait: str, n: int, *, split: str = "train", seed: int = 0
) -> Contrast:
    """Pairs of prompts of an organism's world that differ only in a trait's pole.

    They end where the assistant is about to name a tool (`World.decisions`).
    """
    if subject.world is None:
        raise ValueError(f"{subject.name} is no organism, so it has no world to draw from")
    found: Contrast = subject.world.decisions(trait, n, split=split, seed=seed)
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices of a small model are too small to share: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
