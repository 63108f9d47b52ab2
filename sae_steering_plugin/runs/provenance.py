"""What a summary says about where its numbers come from, in words JSON has."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def finite(value: Any) -> Any:
    """`value` with null for every number JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """This package, its hosts and the interpreter."""
    names = ("sae-steering-plugin", "torch", "transformer-lens", "sae-lens", "transformers")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            from sae_steering_plugin import __version__

            found[name] = __version__ if name == "sae-steering-plugin" else "unknown"
    return found
