"""Does this machine multiply bfloat16 fast enough for a sieve to pay? Asked once, then known."""

from __future__ import annotations

import time
from functools import cache

import torch

PAYS = 1.5
"""How many times faster than float32 a product has to be: sieving leaves pairs to work out again.
With AMX it is 6 to 7 times, with AVX512_BF16 alone it is slower (performance notes, section 0)."""

SIZE = 1024


@cache
def bfloat16_gain(device: str = "cpu") -> float:
    """Speed of a bfloat16 product over a float32 one of the same size, on this machine."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(SIZE, SIZE, device=device).to(dtype)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            a @ a
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times[1:])

    with torch.random.fork_rng():
        return seconds(torch.float32) / seconds(torch.bfloat16)


def sieving(asked: bool | None, device: torch.device | str) -> bool:
    """What was asked for; without a wish, whether bfloat16 is `PAYS` times faster here."""
    return asked if asked is not None else bfloat16_gain(str(device)) >= PAYS


__all__ = ["PAYS", "bfloat16_gain", "sieving"]
