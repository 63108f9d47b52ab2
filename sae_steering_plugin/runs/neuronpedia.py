"""Feature labels from a local Neuronpedia export, checked against the SAE they were made for."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sae_steering_plugin.adapters.sae_lens import sae_id
from sae_steering_plugin.types import FeatureTable

FIELDS = ("modelId", "layer", "index", "description")
LARGEST = 4_000_000_000
"""Bytes of decompressed text that are read at most."""


def read_neuronpedia(
    path: str | Path, sae: Any, *, neuronpedia_id: str | None = None
) -> FeatureTable:
    """The labels of an export as a table of feature, label and explainer, a row per explanation.

    The file is a JSON list or JSON lines, plain or gzipped, of objects with modelId, layer, index
    and description (other fields are ignored). They must belong to the SAE: its metadata's
    `neuronpedia_id`, "model/layer", or the one given. Entries of other models or layers, and those
    without description, are counted in `settings`.

    Raises FileNotFoundError, and ValueError, with the entry, for a file of another form, an index
    that the SAE lacks, an SAE without an id, and a file without one label of this SAE.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    known = neuronpedia_id or sae.cfg.metadata.neuronpedia_id
    if not known or "/" not in str(known):
        raise ValueError(
            "this SAE does not say which Neuronpedia source it is: pass "
            'neuronpedia_id="model/layer", for example "gpt2-small/8-res-jb"'
        )
    model, _, layer = str(known).partition("/")
    width = int(sae.W_dec.shape[0])
    rows, others, blank = [], Counter[str](), 0
    for number, entry in enumerate(_entries(path), start=1):
        missing = [name for name in FIELDS if name not in entry]
        if missing:
            raise ValueError(f"{path}: entry {number} lacks the field {missing[0]!r}")
        if (str(entry["modelId"]), str(entry["layer"])) != (model, layer):
            others[f"{entry['modelId']}/{entry['layer']}"] += 1
            continue
        feature = _index(entry["index"], path, number)
        if feature >= width:
            raise ValueError(
                f"{path}: entry {number} labels feature {feature} and this SAE has {width}: it is "
                "another SAE"
            )
        label = entry["description"]
        if not isinstance(label, str) or not label.strip():
            blank += 1
            continue
        explainer = str(entry.get("explanationModelName") or "")
        rows.append({"feature": feature, "label": label.strip(), "explainer": explainer})
    if not rows:
        found = ", ".join(name for name, _ in others.most_common(3)) or "no entry"
        raise ValueError(f"{path} holds no label of {known}; it holds {found}")
    table = pd.DataFrame(rows).sort_values("feature", kind="stable", ignore_index=True)
    about = {
        "source": "neuronpedia export",
        "neuronpedia_id": str(known),
        "of_other_sources": dict(others),
        "without_description": blank,
        "unlabelled": width - int(table["feature"].nunique()),
    }
    return FeatureTable(table, sae_id(sae), about)


def _index(value: Any, path: Path, number: int) -> int:
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ValueError(f"{path}: entry {number} has the index {value!r}, no whole number")
    return int(value)


def _entries(path: Path) -> Iterator[Mapping[str, Any]]:
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as file:
                raw = file.read(LARGEST + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file: {error}") from error
    if len(raw) > LARGEST:
        raise ValueError(f"{path} holds more than {LARGEST:,} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from error
    if text.lstrip()[:1] == "[":
        found = _parsed(text, path, "the list")
    else:
        lines = enumerate(text.split("\n"), start=1)
        found = [_parsed(line, path, f"line {n}") for n, line in lines if line.strip()]
    for number, entry in enumerate(found, start=1):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: entry {number} is no JSON object")
        yield entry


def _parsed(text: str, path: Path, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {what} is not JSON: {error}") from error
