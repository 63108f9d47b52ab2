"""The command line of studies that write a page: `[--quick] [--json FILE] [--table FILE]`."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def main(
    what: str,
    measure: Callable[[bool], Mapping[str, Any]],
    page: Callable[[Mapping[str, Any]], str],
) -> None:
    """Measure (quickly or in full), print the page, and write rows and page where asked to."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--quick", action="store_true", help="few settings, within a minute")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--table", type=Path, help="write the page to this file")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    found = measure(given.quick)
    text = page(found)
    print(text)
    for path, content in ((given.json, json.dumps(found, indent=1) + "\n"), (given.table, text)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
