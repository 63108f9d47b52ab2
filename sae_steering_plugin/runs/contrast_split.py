"""A contrast in three parts that share no group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sae_steering_plugin.types import Contrast

SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


def split_contrast(contrast: Contrast, *, seed: int) -> dict[str, Contrast]:
    """Three parts that share no group, about 60, 20 and 20 % of the groups.

    Unpaired sets are split side by side by their own groups. Raises ValueError with fewer than
    three groups, or when a part lacks one side.
    """
    n, m = len(contrast.positive), len(contrast.negative)
    groups = contrast.groups or tuple(f"pair {i}" for i in range(n if contrast.paired else n + m))
    names = sorted(set(groups))
    if len(names) < 3:
        raise ValueError(f"{contrast.name!r} has {len(names)} groups; a split in three needs three")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, round(SHARES["test"] * len(names)))
    part = {names[i]: "test" if rank < held else "validation" if rank < 2 * held else "train"
            for rank, i in enumerate(order)}  # fmt: skip
    of_positive = groups[:n]
    of_negative = groups if contrast.paired else groups[n:]
    found = {}
    for split in SHARES:
        first = [i for i in range(n) if part[of_positive[i]] == split]
        second = [i for i in range(m) if part[of_negative[i]] == split]
        if not first or not second:
            raise ValueError(
                f"{contrast.name!r}: the {split} part lacks texts on one side; more groups needed"
            )
        found[split] = chosen(contrast, groups, first, second)
    return found


def chosen(
    contrast: Contrast, groups: Sequence[str], first: Sequence[int], second: Sequence[int]
) -> Contrast:
    """The named texts of both sides, with their groups and letters."""
    n = len(contrast.positive)
    named = [groups[i] for i in first]
    if not contrast.paired:
        named += [groups[n + i] for i in second]
    of_positive, of_negative = contrast.letters
    return replace(
        contrast,
        positive=tuple(contrast.positive[i] for i in first),
        negative=tuple(contrast.negative[i] for i in second),
        groups=tuple(named),
        letters=(
            tuple(of_positive[i] for i in first) if of_positive else (),
            tuple(of_negative[i] for i in second) if of_negative else (),
        ),
    )


def first_pairs(contrast: Contrast, n: int) -> Contrast:
    """The first n pairs (or the first n texts of each side)."""
    k, m = min(n, len(contrast.positive)), min(n, len(contrast.negative))
    groups = contrast.groups or ("",) * (
        len(contrast) if contrast.paired else len(contrast.positive) + len(contrast.negative)
    )
    return chosen(contrast, groups, range(k), range(m))
