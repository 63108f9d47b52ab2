"""LAT: the main direction in which random pairs of token states differ."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steering_plugin.directions.dense import first_component


def lat_direction(
    states: Float[Tensor, "token d_model"], *, generator: torch.Generator, centre: bool = True
) -> tuple[Float[Tensor, " d_model"], float]:
    """First principal component of the normed differences of random pairs, and its share.

    Rows are shuffled and the first half is paired with the second; a pair of equal rows counts as
    zero. `centre` subtracts the mean difference, as AxBench's code does through scikit-learn's PCA.
    The sign is arbitrary. Raises ValueError for fewer than two pairs.
    Source: representation engineering, arXiv 2310.01405; AxBench, arXiv 2501.17148, and its code.
    """
    half = len(states) // 2
    if half < 2:
        raise ValueError(f"{len(states)} states make {half} pairs: LAT needs two pairs at least")
    order = torch.randperm(len(states), generator=generator)
    gaps = states[order[:half]].double() - states[order[half : 2 * half]].double()
    lengths = gaps.norm(dim=1, keepdim=True)
    unit = torch.where(lengths > 0, gaps / lengths.clamp_min(1e-300), 0.0)
    return first_component(unit - unit.mean(0) if centre else unit)
