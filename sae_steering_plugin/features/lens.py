"""Which tokens each feature promotes directly: the k largest logits of its decoder row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

LENS_TOKENS = 20
"""Tokens kept per feature (arXiv 2505.20063)."""


@dataclass(frozen=True, eq=False)
class Lens:
    """The k tokens that the decoder row of `features[i]` promotes most, best first.

    Tokens are kept as the paper does, without merging " dog" and "dog". A row of length zero
    promotes what the final norm's bias promotes; such features are in `settings["zero_rows"]`.
    """

    features: Int[Tensor, " feature"]
    tokens: Int[Tensor, "feature k"]
    logits: Float[Tensor, "feature k"]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def k(self) -> int:
        return self.tokens.shape[1]

    def of(self, features: Sequence[int] | Tensor) -> Int[Tensor, "feature k"]:
        """The tokens of these features. Raises KeyError for one that the lens lacks."""
        place = {int(feature): i for i, feature in enumerate(self.features)}
        missing = [int(feature) for feature in features if int(feature) not in place]
        if missing:
            raise KeyError(f"the lens was not computed for feature {missing[0]}")
        return self.tokens[[place[int(feature)] for feature in features]]


def top_tokens(
    features: Sequence[int] | Tensor,
    blocks: Iterable[Float[Tensor, "_ d_vocab"]],
    *,
    k: int = LENS_TOKENS,
    settings: Mapping[str, Any] | None = None,
) -> Lens:
    """The lens from logits that come a block of features at a time.

    Equal logits go to the smaller token id. Raises ValueError when k exceeds the vocabulary or the
    blocks do not make up the features.
    """
    tokens, logits = [], []
    for block in blocks:
        if not 1 <= k <= block.shape[1]:
            raise ValueError(f"k is {k}; it must lie in 1..{block.shape[1]}, the vocabulary")
        found = block.sort(dim=1, descending=True, stable=True)
        tokens.append(found.indices[:, :k].clone())
        logits.append(found.values[:, :k].clone())
    numbers = torch.as_tensor(features, dtype=torch.long)
    if sum(map(len, tokens)) != len(numbers):
        raise ValueError(f"{sum(map(len, tokens))} rows of logits for {len(numbers)} features")
    return Lens(numbers, torch.cat(tokens), torch.cat(logits), dict(settings or {}))
