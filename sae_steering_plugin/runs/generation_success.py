"""How strong must a feature be pushed to be heard? Lens tokens written, against perplexity.

The protocol of arXiv 2505.20063: texts sampled under one feature at several factors, the feature's
own lens tokens counted in them, perplexity under the unsteered model, and the factor with the most
success per perplexity. It needs neither labels nor a judge, and is a stand-in for neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_steering_plugin.adapters.activations import bos_policy
from sae_steering_plugin.adapters.engine import encode_prompts, generate
from sae_steering_plugin.adapters.sae_lens import sae_id
from sae_steering_plugin.directions.feature import feature_vector
from sae_steering_plugin.edits.shift import Add
from sae_steering_plugin.features.causal import generation_success, successful_factor
from sae_steering_plugin.features.lens import LENS_TOKENS, Lens
from sae_steering_plugin.runs.causal_scores import feature_lens
from sae_steering_plugin.runs.open_ended import unsteered_nll
from sae_steering_plugin.types import AFTER_PROMPT, Edit

FACTORS = (0.2, 0.4, 0.8, 1.2, 1.6, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 20.0)
"""Multiples of a_max (arXiv 2505.20063)."""
NEW_TOKENS, TEMPERATURE = 20, 0.7
LARGEST_LOSS = 700.0
"""Nats per token whose exponential is still a number."""


@dataclass(frozen=True)
class FactorSuccess:
    """One feature's success and perplexity per factor; `unsteered` is the success without it.

    `factor` is the chosen one, None when every factor is degenerate. Success is the mean number of
    lens tokens per text, perplexity the mean over texts.
    """

    feature: int
    factors: tuple[float, ...]
    success: tuple[float, ...]
    perplexity: tuple[float, ...]
    unsteered: float
    factor: float | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def rows(self) -> list[dict[str, float | int]]:
        """One row per factor, the unsteered texts first at factor 0."""
        head = {"feature": self.feature, "factor": 0.0, "success": self.unsteered}
        return [head] + [
            {"feature": self.feature, "factor": f, "success": s, "perplexity": p}
            for f, s, p in zip(self.factors, self.success, self.perplexity, strict=True)
        ]


def success_of_features(
    model: Any,
    sae: Any,
    features: Sequence[int],
    prompts: Sequence[str],
    a_max: float | Sequence[float],
    *,
    factors: Sequence[float] = FACTORS,
    k: int = LENS_TOKENS,
    lens: Lens | None = None,
    max_new_tokens: int = NEW_TOKENS,
    temperature: float = TEMPERATURE,
    prepend_bos: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[FactorSuccess]:
    """GenSuccess@k of each feature at each factor on `prompts`, and the factor to take.

    factor x `a_max` (one number, or one per feature) times the decoder row is added at the prompt's
    last token and at every new one. All factors and prompts are rows of one batch and all texts
    have `max_new_tokens` tokens. Perplexity is of the new tokens under the unsteered model.
    Raises ValueError without prompts, for factors that are not positive and for a wrong number of
    a_max.
    """
    if not prompts or not factors or min(factors) <= 0:
        raise ValueError("at least one prompt and one factor above 0 are needed")
    largest = [float(a_max)] * len(features) if isinstance(a_max, int | float) else list(a_max)
    if len(largest) != len(features):
        raise ValueError(f"a_max has {len(largest)} entries for {len(features)} features")
    bos = bos_policy(model, sae, prepend_bos)
    lens = feature_lens(model, sae, features, k=k) if lens is None else lens
    tokens, mask = encode_prompts(model, list(prompts), prepend_bos=bos)

    def written(edits: Any, copies: int) -> tuple[list[Tensor], list[float]]:
        """Texts in the order prompts x copies, and their perplexities."""
        rows, real = (one.repeat_interleave(copies, dim=0) for one in (tokens, mask))
        out = generate(
            model, rows, edits, attention_mask=real, max_new_tokens=max_new_tokens,
            temperature=temperature, seed=seed, stop_at_eos=False,
        )  # fmt: skip
        listed = [row[kept.bool()].tolist() for row, kept in zip(rows, real, strict=True)]
        losses = unsteered_nll(model, listed, [one.tolist() for one in out.new_tokens])
        return list(out.new_tokens), [math.exp(min(loss, LARGEST_LOSS)) for loss in losses]

    base, _ = written((), 1)
    found = []
    for feature, size in zip(
        tqdm(features, desc="success", unit="feature", disable=not progress), largest, strict=True
    ):
        vector = feature_vector(sae, int(feature), max_activation=size)
        amounts = torch.tensor([float(one) for one in factors]).repeat(len(prompts))
        edit = Edit(Add(vector, amounts, unit="max_activation"), positions=AFTER_PROMPT)
        texts, costs = written(edit, len(factors))
        promoted = lens.of([feature])[0]
        counts = generation_success(texts, promoted).reshape(len(prompts), len(factors)).mean(0)
        means = torch.tensor(costs).reshape(len(prompts), len(factors)).mean(0)
        chosen: float | None
        try:
            chosen = float(factors[successful_factor(counts.tolist(), means.tolist())])
        except LookupError:
            chosen = None
        found.append(
            FactorSuccess(
                int(feature),
                tuple(map(float, factors)),
                tuple(counts.tolist()),
                tuple(means.tolist()),
                float(generation_success(base, promoted).mean()),
                chosen,
                {
                    "k": lens.k,
                    "a_max": size,
                    "prompts": len(prompts),
                    "seed": seed,
                    "max_new_tokens": max_new_tokens,
                    "temperature": temperature,
                    "sae_id": sae_id(sae),
                },
            )
        )
    return found
