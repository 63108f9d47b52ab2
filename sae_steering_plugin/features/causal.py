"""What a feature detects and what it causes: input and output score, confidence, success.

Pure arithmetic on tokens and next-token distributions; the forward passes are in
`runs.causal_scores`. Sources: Arad, Mueller, Belinkov, arXiv 2505.20063 (input and output score);
Wang et al., arXiv 2510.03659 (change of token confidence); formulas in
shared/methods/causal_feature_scores, sections 3 and 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .lens import Lens

FEWEST_TEXTS, MOST_TEXTS = 20, 100
"""Texts a feature must fire in for an input score, and how many are counted (paper; code: 10)."""


MOST_SUCCESS = 3.0
"""Lens tokens per text from which a factor counts as degenerate repetition (arXiv 2505.20063)."""


@dataclass(frozen=True, eq=False)
class Peaks:
    """Where features fire hardest: entry e says feature, text, token there and its code."""

    features: Int[Tensor, " entry"]
    texts: Int[Tensor, " entry"]
    tokens: Int[Tensor, " entry"]
    codes: Float[Tensor, " entry"]


def input_score(
    peaks: Peaks, lens: Lens, *, fewest: int = FEWEST_TEXTS, most: int = MOST_TEXTS
) -> tuple[Float[Tensor, " feature"], Int[Tensor, " feature"]]:
    """Share of a feature's texts whose strongest token its decoder promotes, and how many texts.

    S_in(i) = |{n : tok_n in lens_i}| / N over the `most` texts with the largest codes (equal codes:
    the earlier text). NaN, not 0, for a feature that fires in fewer than `fewest` texts.
    """
    scores = torch.full((len(lens.features),), torch.nan)
    counts = torch.zeros(len(lens.features), dtype=torch.long)
    for i, feature in enumerate(lens.features):
        here = (peaks.features == feature).nonzero().flatten()
        counts[i] = len(here)
        if len(here) < max(fewest, 1):
            continue
        here = here[torch.argsort(peaks.texts[here])]
        strongest = here[torch.argsort(peaks.codes[here], descending=True, stable=True)[:most]]
        scores[i] = torch.isin(peaks.tokens[strongest], lens.tokens[i]).float().mean()
    return scores, counts


def lens_probability(
    logp: Float[Tensor, "row d_vocab"], tokens: Int[Tensor, "row k"]
) -> Float[Tensor, " row"]:
    """(1 - r / V) p of the likeliest of a feature's lens tokens; r counts strictly likelier ones.

    The token of least rank has the largest probability, so the paper's formula (p of the best
    ranked token) and its code (largest p of the k) are one. Float64.
    """
    p = logp.double().exp()
    best = p.gather(1, tokens).amax(1)
    rank = (p > best[:, None]).sum(1).double()
    return (1 - rank / logp.shape[1]) * best


def generation_success(
    texts: Sequence[Int[Tensor, " _"]], tokens: Int[Tensor, " k"]
) -> Float[Tensor, " text"]:
    """GenSuccess@k: how many of each text's generated tokens are among a feature's lens tokens.

    A count, not a share: texts of one length compare. Where features were chosen by their output
    score it is circular (the same tokens): choose with it, and report with a learned lexicon.
    Source: arXiv 2505.20063, section 3.5 of the notes.
    """
    counts = [int(torch.isin(text, tokens).sum()) for text in texts]
    return torch.tensor(counts, dtype=torch.float64)


def successful_factor(
    success: Sequence[float], perplexity: Sequence[float], *, most: float = MOST_SUCCESS
) -> int:
    """The place of the factor with the most success per perplexity, each as a share of its largest.

    argmax (success / max success) / (perplexity / max perplexity) over factors whose success is at
    most `most`; the first on ties, so the gentlest where nothing succeeds. Raises ValueError for
    perplexities that are not positive and LookupError when every factor is beyond `most`.
    Source: arXiv 2505.20063.
    """
    found, cost = (np.asarray(v, dtype=np.float64) for v in (success, perplexity))
    if len(found) != len(cost) or not (cost > 0).all():
        raise ValueError("one positive perplexity per factor is needed")
    usable = found <= most
    if not usable.any():
        raise LookupError(f"at every factor more than {most:g} lens tokens are written per text")
    # Both maxima are common to all factors, so they do not move the argmax.
    return int(np.argmax(np.where(usable, found / cost, -np.inf)))


def confidence(logp: Float[Tensor, "row d_vocab"], k: int = 1) -> Float[Tensor, " row"]:
    """C_k = -(1/k) sum of the k largest log-probabilities: it falls as a model grows confident."""
    if not 1 <= k <= logp.shape[1]:
        raise ValueError(f"k is {k}; it must lie in 1..{logp.shape[1]}, the vocabulary")
    return -logp.double().topk(k, dim=1).values.mean(1)


def rank_average(*scores: Float[Tensor, " feature"]) -> Float[Tensor, " feature"]:
    """Mean of the mid-ranks of several scores, as shares in (0, 1]; NaN ranks below everything."""
    from scipy.stats import rankdata

    ranks = [
        rankdata(torch.nan_to_num(s.double(), nan=-torch.inf, neginf=-torch.inf).numpy())
        for s in scores
    ]
    return torch.as_tensor(sum(ranks) / (len(ranks) * len(scores[0])))


@dataclass(frozen=True, eq=False)
class CausalScores:
    """What amplifying each feature does to the next token of one neutral prompt.

    `steered` and `base` are P = (1 - r / V) p of the feature's lens tokens with and without the
    edit; the paper computes `steered` and defines `output_score`, their difference. `confidence`
    is Delta C_k: negative when the edit makes the model more confident. `settings` hold every
    choice that changes a number: prompt, strength, k, position and a_max rules, error term.
    """

    features: Int[Tensor, " feature"]
    steered: Float[Tensor, " feature"]
    base: Float[Tensor, " feature"]
    confidence: Float[Tensor, " feature"]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output_score(self) -> Float[Tensor, " feature"]:
        """S_out with the base term subtracted, the default; `steered` is the one without."""
        return self.steered - self.base

    def of(self, feature: int) -> tuple[float, float, float]:
        """Output score, steered term alone and Delta C_k of one feature."""
        found = (self.features == feature).nonzero().flatten()
        if not len(found):
            raise KeyError(f"feature {feature} has no causal scores here")
        i = int(found[0])
        return float(self.output_score[i]), float(self.steered[i]), float(self.confidence[i])

    def table(self) -> Any:
        """One row per feature, as a pandas table."""
        import pandas as pd

        return pd.DataFrame(
            {
                "feature": self.features.tolist(),
                "output_score": self.output_score.tolist(),
                "output_score_unsubtracted": self.steered.tolist(),
                "base_term": self.base.tolist(),
                "delta_confidence": self.confidence.tolist(),
            }
        )
