"""Random dictionaries with thresholds that give a realistic L0, for the benchmarks of features."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def jumprelu(d_in: int, d_sae: int, x: Tensor, *, hook_name: str, l0: int = 64) -> Any:
    """A JumpReLU SAE of unit rows that fires about `l0` times on `x`, features unequally often."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    generator = torch.Generator().manual_seed(0)
    sae = JumpReLUSAE(
        JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, metadata=SAEMetadata(hook_name=hook_name))
    )
    with torch.no_grad():
        rows = unit(d_sae, d_in)
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        for first in range(0, d_sae, 4096):
            pre = x @ sae.W_enc[:, first : first + 4096]
            rates = torch.randn(pre.shape[1], generator=generator).exp()
            rates = (rates * l0 / d_sae / rates.mean()).clamp(max=0.5)
            # rates below one in len(x) have no order statistic: take the normal quantile
            bars = pre.mean(0) + pre.std(0) * torch.special.ndtri(1 - rates.double()).float()
            sae.threshold[first : first + 4096] = bars.clamp_min(1e-3)
    return sae.eval()


def unit(n: int, d: int, *, seed: int = 1) -> Tensor:
    """Random unit rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


def peak_of(work: Callable[[], Any]) -> float:
    """Megabytes by which the process's peak resident memory rose: a bound from above for `work`."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is still held would hide the rise
    before = resident()
    reset_peak()
    work()
    return max(0.0, peak() - before)


def resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def reset_peak() -> None:
    """Ask the kernel to forget the peak; without leave to, the peak of the process stands."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return


def peak() -> float:
    with open("/proc/self/status") as file:
        found = next(line for line in file if line.startswith("VmHWM"))
    return int(found.split()[1]) / 1e3
