"""What benchmarks that write a page share: their options, one thread, and where results go."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sae_steering_plugin.runs.canonical import finite
from sae_steering_plugin.runs.environment import versions


def asked(about: str, models: Sequence[str] = ()) -> argparse.Namespace:
    """`--quick`, `--json`, `--table`, and `--models` where there are several, of the command line;
    the hosts' warnings off."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    if models:
        parser.add_argument("--models", nargs="*", default=list(models))
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--table", type=Path, help="write the Markdown page to this file")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return parser.parse_args()


def table_lines(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table, a line per row."""
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def give(options: argparse.Namespace, results: Mapping[str, Any], page: str) -> None:
    """Print the page and write what was asked for, with versions beside the figures."""
    sys.stdout.write(page)
    if options.json:
        content = {"versions": versions(), "quick": options.quick, **results}
        options.json.write_text(json.dumps(finite(content), indent=1) + "\n", encoding="utf-8")
    if options.table:
        options.table.write_text(page, encoding="utf-8")
