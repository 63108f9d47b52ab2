"""A screen from words: a model, its SAE, a later SAE, and texts or an organism's world."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from .contexts import LENGTH, packed_contexts
from .screening import Screen, screen
from .subject import Subject, open_subject

TOKENS_OF_A_TEXT = 60
"""A world's texts have more tokens than this on average."""

DOWNSTREAM_WIDTH = 512
"""The width that every architecture has behind the site of an organism's primary SAE."""


@dataclass(frozen=True)
class Sizes:
    """How much a screen works with. The defaults are the paper's (arXiv 2606.08365), GPT-2."""

    contexts: int = 2048
    fresh: int = 512
    features: int = 300
    group: int = 50
    length: int = LENGTH
    per_kind: int = 16
    panel: int = 2048


def downstream_word(model: str, sae: str) -> str:
    """The SAE behind `sae` in an organism: same architecture, and same width if there is one.

    Raises ValueError when there is none: name one with --downstream.
    """
    from ..organisms import data_folder, list_organisms, read_card

    if model in list_organisms():
        folder = data_folder(model)
        behind = f"l{read_card(folder)['downstream_layer']}"
        layer, _, rest = sae.partition("-")
        kind = rest.rpartition("-")[0]
        for word in (f"{behind}-{rest}", f"{behind}-{kind}-{DOWNSTREAM_WIDTH}"):
            if layer != behind and (folder / "saes" / word).is_dir():
                return word
    raise ValueError(f"no SAE behind {sae!r} is known for {model!r}: pass --downstream")


def open_downstream(subject: Subject, word: str, *, device: str, dtype: str) -> Any:
    """The later SAE that a word names, for a model that is loaded."""
    from ..adapters.sae_lens import load_sae
    from ..organisms import data_folder, list_organisms
    from .subject import DTYPES

    folder = Path(word)
    if subject.name in list_organisms() and not folder.is_dir() and ":" not in word:
        folder = data_folder(subject.name) / "saes" / word
        if not folder.is_dir():
            known = sorted(one.name for one in folder.parent.iterdir())
            raise ValueError(f"{subject.name} has no SAE {word!r}; it has {', '.join(known)}")
        word = str(folder)
    return load_sae(word, device=device, dtype=DTYPES[dtype])


def world_contexts(
    subject: Subject, sae: Any, n: int, *, split: str, length: int = LENGTH, seed: int = 0
) -> Int[Tensor, "context pos"]:
    """`n` contexts of an organism's texts of one split."""
    texts = subject.world.texts(max(64, n * length // TOKENS_OF_A_TEXT + 64), split=split)
    return packed_contexts(subject.model, texts, n=n, length=length, sae=sae, seed=seed)


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file: one per line, or the field `text` of every line of JSON.

    Raises ValueError for a line of JSON without it, and for a file without texts.
    """
    place = Path(path)
    lines = [line for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
    if place.suffix == ".jsonl":
        found = [json.loads(line) for line in lines]
        for number, one in enumerate(found, 1):
            if not isinstance(one, dict) or not isinstance(one.get("text"), str):
                raise ValueError(f"{path}:{number}: no field 'text'")
        lines = [one["text"] for one in found]
    if not lines:
        raise ValueError(f"{path} holds no text")
    return lines


def screen_subject(
    model: str,
    sae: str | None = None,
    downstream: str | None = None,
    *,
    texts: str | Path | None = None,
    fresh: str | Path | None = None,
    sizes: Sizes | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> tuple[Screen, Subject]:
    """Open what the words name and screen it; `options` are those of `screen`.

    An organism's contexts come from its world (training texts for labels, test texts as fresh
    ones). Any other model needs `texts`; without `fresh` its last fifth is kept as fresh.
    """
    amount = sizes or Sizes()
    subject = open_subject(model, sae, device=device, dtype=dtype)
    if subject.sae is None:
        raise ValueError("screening needs a dictionary: pass --sae")
    word = downstream or downstream_word(model, subject.sae_name)
    later = open_downstream(subject, word, device=device, dtype=dtype)
    known, new = contexts_for(subject, amount, texts=texts, fresh=fresh, seed=seed)
    found = screen(
        subject.model,
        subject.sae,
        known,
        new,
        downstream=later,
        n_features=amount.features,
        size=amount.group,
        per_kind=amount.per_kind,
        panel=amount.panel,
        seed=seed,
        progress=progress,
        **options,
    )
    return found, subject


def contexts_for(
    subject: Subject,
    sizes: Sizes,
    *,
    texts: str | Path | None = None,
    fresh: str | Path | None = None,
    seed: int = 0,
) -> tuple[Int[Tensor, "context pos"], Int[Tensor, "fresh pos"]]:
    """Label contexts and fresh ones, which share no text."""
    if texts is None:
        if subject.world is None:
            raise ValueError(f"{subject.name} is no organism: pass --texts FILE")
        return tuple(  # type: ignore[return-value]
            world_contexts(subject, subject.sae, n, split=split, length=sizes.length, seed=seed)
            for n, split in ((sizes.contexts, "train"), (sizes.fresh, "test"))
        )
    known = list(dict.fromkeys(read_texts(texts)))
    if fresh is not None:
        new = [text for text in read_texts(fresh) if text not in set(known)]
    else:
        cut = max(1, len(known) * 4 // 5)
        known, new = known[:cut], known[cut:]

    def packed(found: Sequence[str], n: int) -> Tensor:
        return packed_contexts(
            subject.model, found, n=n, length=sizes.length, sae=subject.sae, seed=seed
        )

    return packed(known, sizes.contexts), packed(new, sizes.fresh)


def difference_rows(found: Screen) -> list[dict[str, Any]]:
    """The group differences as a table that a person reads."""
    return [
        {
            "metric": row["metric"],
            "groups": row["groups"],
            "n": f"{row['n'][0]}, {row['n'][1]}",
            "means": f"{row['means'][0]:.3f}, {row['means'][1]:.3f}",
            "difference": f"{row['difference']:+.3f}",
            "95 % interval": f"{row['low']:+.3f} to {row['high']:+.3f}",
            "p": f"{row['p_value']:.2g}",
            "p (Holm)": f"{row['p_holm']:.2g}",
        }
        for row in found.rows
    ]


def axis_table(found: Screen) -> list[dict[str, Any]]:
    """The axes as a table that a person reads."""
    return [
        {
            "axis": row["axis"],
            "label": row["label"],
            "features": row["n_features"],
            "forecast against measured": f"{row['spearman_heldout']:+.3f} "
            f"({row['low']:+.3f} to {row['high']:+.3f})",
            **{name: f"{row[f'{name}_mean']:.3f}" for name in ("clean", "random", "messy")},
        }
        for row in found.axes
    ]


__all__ = ["Sizes", "axis_table", "contexts_for", "difference_rows", "screen_subject"]
