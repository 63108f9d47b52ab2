"""The command line of studies that end in a page: dictionaries one after the other, each on disk as
soon as it is done."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing

Records = list[dict[str, Any]]


def options(what: str) -> argparse.ArgumentParser:
    """`--quick --json --page --only --tables`."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--quick", action="store_true", help="one dictionary, small")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--only", help="part of a dictionary's name")
    parser.add_argument("--tables", type=Path, help="only the page, from an earlier --json file")
    return parser


def quietly() -> None:
    """One thread, no warnings."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def run(
    arguments: argparse.Namespace,
    named: Iterable[tuple[str, Callable[[], Records]]],
    page: Callable[[Sequence[dict[str, Any]]], str],
    where: str,
) -> None:
    """Study what `named` lists (only the first when quick), write the JSON file after each, print
    the page and write it to `--page`; with `--tables`, only the page (to `where` by default)."""
    if arguments.tables:
        told = json.loads(arguments.tables.read_text())["dictionaries"]
        (arguments.page or Path(where)).write_text(page(told))
        return
    listed = [one for one in named if not arguments.only or arguments.only in one[0]]
    found: Records = []
    for name, studied in listed[:1] if arguments.quick else listed:
        found += studied()
        print(f"{name}: {found[-1]['seconds']:.0f} s", flush=True)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            about = {"versions": timing.versions(), "dictionaries": found}
            arguments.json.write_text(json.dumps(about, indent=1) + "\n")
    text = page(found)
    if arguments.page:
        arguments.page.write_text(text)
    print(text)
