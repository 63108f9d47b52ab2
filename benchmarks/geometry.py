"""Nearest decoder rows and moments of all cosines against the dense ways.

`python -m benchmarks.geometry [--quick] [--json FILE]`

Rows 5a to 5d of the target table, and the cosine half of 6c. The floor is the blocked float32
product of all rows with all rows, timed beside; the naive way is that product with `topk` per
block. At 65k and 131k features only some blocks of rows are computed (each against every row), and
the time of both ways is for those. Each pair once (5b) needs all rows: at 16,384 of them it runs
whole, and `decoder_geometry` works so at any width. The target of the bfloat16 sieve (5c) is for
machines with AMX; the ceilings below the table say what this one does, and the row what came of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.dictionaries import peak_of, unit
from benchmarks.timing import Report, exponent, interleaved, whole
from sae_steering_plugin.features.geometry import COLUMNS, ROWS, cosine_moments, nearest_rows

D, K = 768, 32
BLOCKS = 2
"""Blocks of 1024 rows that are timed at each width."""


def products(rows: Tensor, some: Tensor, each: Callable[[Tensor, Tensor, int], None]) -> None:
    buffer = torch.empty(ROWS * COLUMNS)
    for chosen in some.split(ROWS):
        own = rows[chosen]
        for first in range(0, len(rows), COLUMNS):
            others = rows[first : first + COLUMNS]
            out = buffer[: len(own) * len(others)].view(len(own), -1)
            each(torch.mm(own, others.T, out=out), chosen, first)


def dense(rows: Tensor, some: Tensor) -> Tensor:
    """Blocks of the product, `topk` of each, and `topk` of those."""
    found: dict[int, list[Tensor]] = {}

    def best(block: Tensor, chosen: Tensor, first: int) -> None:
        sizes = block.abs()
        inside = (chosen >= first) & (chosen < first + block.shape[1])
        sizes[inside.nonzero().flatten(), chosen[inside] - first] = -1
        found.setdefault(int(chosen[0]), []).append(sizes.topk(K, dim=1).values)

    products(rows, some, best)
    return torch.cat([torch.cat(parts, 1).topk(K, dim=1).values for parts in found.values()])


def measure(report: Report) -> None:
    widths = (4096, 8192, 32_768) if report.quick else (16_384, 32_768, 65_536, 131_072)
    rounds = 3 if report.quick else 5
    seconds: dict[str, list[float]] = {"ours": [], "GEMM": []}
    for width in widths:
        rows = unit(width, D)
        step = max(1, width // (BLOCKS * ROWS))
        some = torch.arange(0, width, step)[: BLOCKS * ROWS]
        ours, _ = nearest_rows(rows, K, features=some)
        error = report.agree(f"neighbours at {width}", ours, dense(rows, some), 2e-6)
        variants: dict[str, Any] = {
            "ours": whole(lambda r=rows, s=some: nearest_rows(r, K, features=s)),
            "GEMM": whole(lambda r=rows, s=some: products(r, s, lambda *_: None)),
            "topk": whole(lambda r=rows, s=some: dense(r, s)),
            "sieve": whole(lambda r=rows, s=some: nearest_rows(r, K, features=s, sieve=True)),
        }
        sieved, _ = nearest_rows(rows, K, features=some, sieve=True)
        near = report.agree(f"sieved neighbours at {width}", sieved, ours, 1e-6)

        def timed(variants: dict[str, Any] = variants) -> timing.Times:
            return interleaved(variants, rounds=rounds)

        times = report.judged(timed, "ours", "GEMM", 1.15)
        for name in seconds:
            seconds[name].append(times.seconds(name) * width / len(some))
        shapes = f"{len(some)} of {width} rows x {D}, k = {K}"
        target = 1.15 if width >= 32_768 else None
        what = f"nearest rows at {width}, over the blocked product"
        report.compare("5a", what, times, "ours", "GEMM", target=target, error=error, shapes=shapes)
        report.compare("5a", f"dense topk at {width}, the same", times, "topk", "GEMM")
        what = f"bfloat16 sieve at {width}, over the blocked float32 product"
        amx = {32_768: 0.45, 131_072: 0.30}.get(width)
        report.compare("5c", what, times, "sieve", "GEMM", target=amx, error=near, shapes=shapes)
        if width == widths[-1]:
            used = peak_of(lambda r=rows, s=some: nearest_rows(r, K, features=s))
            what = f"memory beyond the dictionary at {width}, in units of 500 MB"
            report.add("5d", what, used / 500, target=1.0, shapes=f"{used:.0f} MB")
            moments = interleaved(
                {"moments": whole(lambda r=rows: cosine_moments(r))}, rounds=rounds
            )
            share = moments.seconds("moments") / seconds["GEMM"][-1]
            what = f"mean and variance of all cosines at {width}, over the whole product (scaled)"
            report.add("6c", what, share, target=0.05, shapes=f"{width} x {D}")
    _each_pair_once(report)
    mean, variance = cosine_moments(unit(2048, D))
    full = (unit(2048, D).double() @ unit(2048, D).double().T).fill_diagonal_(torch.nan)
    report.agree("mean of cosines", mean, full.nanmean(1), 1e-7)
    square = (full**2).nanmean(1) - full.nanmean(1) ** 2
    report.agree("variance of cosines, relative", variance / square, torch.ones(2048), 1e-6)
    for name, found in seconds.items():
        growth = exponent(widths, found)
        report.add("5a", f"growth of {name} in the width", growth, exponent=growth)


def _each_pair_once(report: Report) -> None:
    """All rows at a width that can be run whole: half the product, with the sieve and without."""
    width = 4096 if report.quick else 16_384
    rows, everything = unit(width, D), torch.arange(width)
    plain, _ = nearest_rows(rows, K, features=everything)
    found = {sieve: nearest_rows(rows, K, sieve=sieve)[0] for sieve in (False, True)}
    errors = {
        sieve: report.agree(f"each pair once, sieve {sieve}", values, plain, 1e-6)
        for sieve, values in found.items()
    }
    variants: dict[str, Any] = {
        "once": whole(lambda: nearest_rows(rows, K)),
        "sieve": whole(lambda: nearest_rows(rows, K, sieve=True)),
        "GEMM": whole(lambda: products(rows, everything, lambda *_: None)),
    }
    times = interleaved(variants, rounds=3)
    used = peak_of(lambda: nearest_rows(rows, K))
    what = "memory of each pair once, scaled to 131072 rows, in units of 500 MB"
    share = used * 131_072 / width / 500
    report.add("5d", what, share, target=1.0, shapes=f"{used:.0f} MB at {width}")
    shapes = f"all of {width} rows x {D}, k = {K}"
    for row, what, name, target, sieve in (
        ("5b", "each pair once, over the whole product", "once", 0.75, False),
        ("5c", "each pair once and sieved, the same", "sieve", None, True),
    ):
        report.compare(
            row, what, times, name, "GEMM", target=target, error=errors[sieve], shapes=shapes
        )


if __name__ == "__main__":
    timing.main("geometry", measure, full_size=("5a", "5b", "5c", "5d", "6c"))
