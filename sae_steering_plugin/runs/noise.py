"""Gumbel noise for sampling that depends on the item and the step, and on nothing else.

The largest of `logits / temperature + Gumbel noise` is a sample from the softmax. Noise keyed by
(seed, item, turn, step) makes a row's sample independent of the batch it runs in and of the other
arms, and gives every arm the same noise on the same item (common random numbers), which is what
makes the paired comparison of two arms sharp.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt32
from torch import Tensor

NoiseKey = int


def noise_key(seed: int, *parts: Hashable) -> NoiseKey:
    """A 128-bit key from a seed and the names of what is sampled."""
    text = "\0".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def philox_words(key: NoiseKey, step: int, count: int) -> UInt32[np.ndarray, " count"]:
    """Random 32-bit words for one row at one step.

    They come from the counter-based generator Philox, whose stream NumPy guarantees, with the step
    in the upper half of the counter, so any step is reached without drawing those before it.
    """
    source = np.random.Philox(key=key, counter=step << 128)
    return source.random_raw((count + 1) // 2).view(np.uint32)[:count]


def gumbel(words: UInt32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Standard Gumbel noise from random words; float64 inside, so that it is always finite."""
    uniform = (words + 0.5) * 2.0**-32  # strictly inside 0..1
    return (-np.log(-np.log(uniform))).astype(np.float32)


def gumbel_noise(
    keys: Sequence[NoiseKey], d_vocab: int
) -> Callable[[int], Float[Tensor, "batch d_vocab"]]:
    """A function from the step (0 for the first new token) to noise for a batch of keyed rows.

    Rows with one key share their noise, which is drawn once.
    """
    distinct = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    places = [distinct[key] for key in keys]

    def noise(step: int) -> Float[Tensor, "batch d_vocab"]:
        words = np.stack([philox_words(key, step, d_vocab) for key in distinct])
        return torch.from_numpy(gumbel(words))[places]

    return noise
