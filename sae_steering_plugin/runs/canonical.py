"""Records as canonical JSON: one text for one content, its hash, and the record back from the text.

One content has one text: keys are sorted, nothing is indented, a whole number is written without
a decimal point (1.0 as 1), and text is ASCII with escapes. What has no such text (NaN, a set, an
open object) is refused by its place in the record.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

EXACT = 2**53
"""Whole floats up to here are written as integers: the largest range in which both are exact."""


def canonical_json(value: Any) -> str:
    """The one JSON text of a record, mapping, sequence, text, number, truth value or None.

    Frozen dataclasses count as mappings from their field names, tuples as lists. Raises ValueError
    for NaN and infinity and TypeError for what JSON cannot hold, naming the place.
    """
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain(value: Any, place: str = "value") -> Any:
    """`value` as dicts with text keys, lists, text, numbers, truth values and None."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return number(float(value), place)
    if is_dataclass(value) and not isinstance(value, type):
        return {
            one.name: plain(getattr(value, one.name), f"{place}.{one.name}")
            for one in fields(value)
        }
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{place} has a key {wrong[0]!r}: keys of a plan are text")
        return {str(key): plain(one, f"{place}.{key}") for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(one, f"{place}[{i}]") for i, one in enumerate(value)]
    raise TypeError(
        f"{place} is a {type(value).__name__}: a plan holds text, numbers, truth values, tuples, "
        "mappings and frozen dataclasses of these (a path as text, a tensor by its fingerprint)"
    )


def number(value: float, place: str) -> int | float:
    if not math.isfinite(value):
        raise ValueError(f"{place} is {value}: a plan holds finite numbers, or None")
    return int(value) if value.is_integer() and abs(value) <= EXACT else value


def content_key(value: Any) -> str:
    """SHA-256 of the canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def seed_of(seed: int, *coordinates: Any) -> int:
    """A seed in 0..2^63-1 that depends on the plan's seed and an item's coordinates only.

    Never on the order of execution: the same item draws the same numbers in every run.
    """
    return int(content_key([seed, *coordinates])[:16], 16) >> 1


# Back from JSON -----------------------------------------------------------------------------------


def import_path(named: Any) -> str:
    """`module:Name` of a class or function that another process can import.

    Raises ValueError for one defined in a notebook or script, or inside a function.
    """
    module, name = named.__module__, named.__qualname__
    if module == "__main__" or "<locals>" in name:
        where = "a notebook or script" if module == "__main__" else "a function"
        raise ValueError(
            f"{name} is defined in {where}, where another process cannot find it: move it to the "
            "top level of a module"
        )
    return f"{module}:{name}"


def imported(path: str) -> Any:
    """What `module:Name` names. Raises ValueError when it names nothing."""
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"{path!r} is no import path; write it as package.module:Name")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}") from error
    return found


def built(kind: Any, value: Any, place: str = "value") -> Any:
    """The value of type `kind` that canonical JSON was written from.

    Knows frozen dataclasses, `tuple[X, ...]`, `Mapping[str, X]`, `Literal`, unions with None, text,
    numbers and truth values. Raises ValueError that names the place and what was expected there.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return either(arguments, value, place)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{place} is {value!r}; it must be one of {arguments}")
        return value
    if is_dataclass(kind):
        return record(kind, value, place)
    if origin is tuple:
        expect(value, list, place)
        inner = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(inner) != len(value):
            raise ValueError(f"{place} has {len(value)} entries, not {len(inner)}")
        pairs = zip(inner, value, strict=True)
        return tuple(built(one, entry, f"{place}[{i}]") for i, (one, entry) in enumerate(pairs))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        expect(value, dict, place)
        return {key: built(arguments[1], one, f"{place}.{key}") for key, one in value.items()}
    return scalar(kind, value, place)


def either(kinds: Sequence[Any], value: Any, place: str) -> Any:
    """A union: None where it may be, else the first kind that fits."""
    if value is None and type(None) in kinds:
        return None
    problems = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return built(kind, value, place)
            except ValueError as error:
                problems.append(str(error))
    raise ValueError("; ".join(problems))


def record(kind: Any, value: Any, place: str) -> Any:
    expect(value, dict, place)
    hints = get_type_hints(kind)
    known = {one.name for one in fields(kind) if one.init}
    if unknown := sorted(set(value) - known):
        raise ValueError(f"{place}: {kind.__name__} has no field {unknown[0]!r}")
    given = {name: built(hints[name], one, f"{place}.{name}") for name, one in value.items()}
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{place}: {error}") from error


def scalar(kind: Any, value: Any, place: str) -> Any:
    if kind not in (str, int, float, bool, type(None)):
        raise ValueError(
            f"{place} is declared as {kind}: a record of a plan has fields of text, numbers, truth "
            "values, tuple[X, ...], Mapping[str, X] and frozen dataclasses"
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # whole numbers are written without a point
    expect(value, kind, place)
    return value


def expect(value: Any, kind: type, place: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{place} must be {kind.__name__}, not {type(value).__name__}")


def finite(value: Any) -> Any:
    """`value` with null for every number JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
