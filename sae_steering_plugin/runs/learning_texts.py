"""Training texts from files: one source per file, or per side of a file of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sae_steering_plugin.runs.contrast_files import checked_text
from sae_steering_plugin.runs.labelled_texts import text_records


def read_sources(paths: Sequence[str | Path]) -> tuple[list[str], list[str]]:
    """Texts and the source of each, in the order of the files.

    `.txt`: every line that is not blank is a text. CSV, JSONL, parquet: the column `text`, or the
    columns `positive` and `negative` (a file of pairs), which become two sources. A source is named
    like its file. Raises FileNotFoundError and ValueError with file and line.
    """
    texts: list[str] = []
    sources: list[str] = []
    for path in map(Path, paths):
        found = _lines(path) if path.suffix.lower() == ".txt" else _rows(path)
        if not found:
            raise ValueError(f"{path} holds no text")
        for name, text in found:
            texts.append(text)
            sources.append(name)
    if not texts:
        raise ValueError("no file of texts is given")
    return texts, sources


def _lines(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    content = path.read_text(encoding="utf-8-sig")
    return [(path.stem, line.strip()) for line in content.splitlines() if line.strip()]


def _rows(path: Path) -> list[tuple[str, str]]:
    out = []
    for record in text_records(path):
        names = [name for name in ("text", "positive", "negative") if name in record.values]
        if names not in (["text"], ["positive", "negative"]):
            raise ValueError(
                f"{record.place}: a row needs a field 'text', or 'positive' and 'negative'; it has "
                f"{', '.join(record.values) or 'none'}"
            )
        for name in names:
            source = path.stem if name == "text" else f"{path.stem}: {name}"
            out.append((source, checked_text(record.values[name], name, record.place)))
    return out
