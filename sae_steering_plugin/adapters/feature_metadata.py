"""A feature table kept in an SAELens dictionary: saved with it, read back bit for bit.

SAELens writes `cfg.metadata` into `cfg.json` whatever it holds, so figures of features (statistics,
measured side effects, forecasts) can travel with the weights they are about, or with the steering
vectors made of them. Columns are packed: their bytes, compressed, in base64.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..types import FeatureTable
from .sae_lens import SteeringDictionary, content_hash, sae_id

FIELD = "feature_table"
FORMAT = "sae-steering-plugin packed feature table 1"
LARGEST = 1 << 31
"""Bytes of a column that is read: a file cannot ask for more memory than that."""


def keep_table(sae: Any, table: FeatureTable, *, columns: Sequence[str] = ()) -> None:
    """Put `table` (or those `columns`) into the dictionary's metadata, in place of an earlier one.

    The table is about this SAE, or, for a steering dictionary, about the SAE whose features its
    rows are. Numbers and booleans only. Raises ValueError for a table of another dictionary, a
    column that holds anything else (token lists, words), and KeyError for one that is not there.
    """
    if missing := [name for name in columns if name not in table.columns]:
        raise KeyError(f"no column {missing[0]!r}; the table has {', '.join(table.columns)}")
    if hash_of(table.sae_id) not in hashes_about(sae):
        raise ValueError(f"this table is about {table.sae_id!r}, the dictionary is {sae_id(sae)!r}")
    named = {name: table.table[name].to_numpy() for name in columns or table.columns}
    for name, values in named.items():
        if values.dtype.kind not in "biuf":
            raise ValueError(f"column {name!r} holds no plain numbers: leave it out with columns=")
    sae.cfg.metadata[FIELD] = {
        "format": FORMAT,
        "sae_id": table.sae_id,
        "settings": json.loads(json.dumps(dict(table.settings))),
        "features": packed(table.table.index.to_numpy(np.int64)),
        "columns": {name: packed(values) for name, values in named.items()},
    }


def kept_table(sae: Any) -> FeatureTable:
    """The table that `keep_table` put into the dictionary. Raises ValueError when there is none, or
    when it is about other weights."""
    import pandas as pd

    metadata = dict(sae.cfg.metadata.items())
    record = metadata.get(FIELD)
    if not isinstance(record, Mapping) or record.get("format") != FORMAT:
        raise ValueError(f"this dictionary holds no table of features ({FORMAT!r})")
    if hash_of(record["sae_id"]) not in hashes_about(sae):
        raise ValueError(
            f"its table is about {record['sae_id']!r}, but the dictionary is {sae_id(sae)!r}"
        )
    index = pd.Index(unpacked(record["features"]), name="feature")
    columns = {name: unpacked(one) for name, one in record["columns"].items()}
    if wrong := [name for name, values in columns.items() if len(values) != len(index)]:
        raise ValueError(f"column {wrong[0]!r} and the features differ in length")
    return FeatureTable(
        pd.DataFrame(columns, index=index), record["sae_id"], dict(record["settings"])
    )


def hashes_about(sae: Any) -> set[str]:
    """Content hashes of the dictionary and of those its rows were taken from."""
    found = {content_hash(sae)}
    if isinstance(sae, SteeringDictionary):
        found |= {hash_of(row.recipe.sae_id) for row in sae.rows() if row.recipe.sae_id}
    return found


def hash_of(identity: str) -> str:
    return identity.rpartition("#")[2]


def packed(values: np.ndarray) -> dict[str, Any]:
    """A column as JSON can hold it: dtype, length, compressed little-endian bytes in base64."""
    flat = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False))
    words = base64.b64encode(zlib.compress(flat.tobytes(), 6)).decode()
    return {"dtype": flat.dtype.str, "length": len(flat), "bytes": words}


def unpacked(record: Mapping[str, Any]) -> np.ndarray:
    """The column that `packed` was given. Raises ValueError for bytes that do not fit."""
    kind, length = np.dtype(record["dtype"]), int(record["length"])
    if kind.kind not in "biuf" or not 0 <= length * kind.itemsize <= LARGEST:
        raise ValueError(f"a packed column of {length} {kind} is none that was written here")
    # never more than the promised size is unpacked, whatever the file says
    reader = zlib.decompressobj()
    found = reader.decompress(base64.b64decode(record["bytes"]), length * kind.itemsize + 1)
    if len(found) != length * kind.itemsize:
        raise ValueError(f"a packed column holds {len(found)} bytes, not {length * kind.itemsize}")
    return np.frombuffer(found, dtype=kind).copy()


__all__ = ["keep_table", "kept_table"]
