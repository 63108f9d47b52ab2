"""Sparse activation steering (SAS): a vector built inside a dictionary's codes.

Source: Algorithm 1 of arXiv 2503.00177. A latent enters when it fires in at least the share `tau`
of one side's examples and, after that filter, on that side only; its entry is its mean over the
examples in which it fires. The support is not monotone in `tau`: lowering it admits latents on both
sides, and a latent admitted on both is dropped.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steering_plugin.directions.codes import FiredCodes, codes_or_encoded
from sae_steering_plugin.directions.heldout import projection_scores
from sae_steering_plugin.directions.recipe import (
    recipe_of,
    require_balanced_letters,
    require_choice,
    require_two_sides,
)
from sae_steering_plugin.types import Labelled, SparseCodes, SteeringVector

MeanOver = Literal["active", "all"]
Shared = Literal["drop", "keep_difference"]
Parts = Literal["both", "positive", "negative"]

TAU = 0.7
"""Default activation-frequency threshold: the stronger of the two settings reported for arXiv
2503.00177."""


@dataclass(frozen=True, eq=False)
class SideCodes:
    """What one side's examples do: how often each latent fires and its mean where it does."""

    n: int
    count: Int[Tensor, " latent"]
    total: Float[Tensor, " latent"]

    @property
    def frequency(self) -> Float[Tensor, " latent"]:
        """Share of examples in which each latent fires, in float64: 55 of 100 is 0.55 exactly."""
        return self.count.double() / self.n

    def mean(self, over: MeanOver) -> Float[Tensor, " latent"]:
        """Mean code over the examples in which the latent fires, or over all; 0 where it never
        does."""
        divisor = self.count.double() if over == "active" else torch.full_like(self.total, self.n)
        return torch.where(self.count > 0, self.total / divisor.clamp_min(1), 0.0)


@dataclass(frozen=True, eq=False)
class SASCodes:
    """The result of Algorithm 1: `v = positive - negative`, both non-negative, disjoint
    supports."""

    values: Float[Tensor, " latent"]
    frequency: tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]
    kept: tuple[int, int]
    shared: int

    @property
    def positive(self) -> Float[Tensor, " latent"]:
        return self.values.clamp_min(0)

    @property
    def negative(self) -> Float[Tensor, " latent"]:
        return (-self.values).clamp_min(0)


def side_codes(codes: Tensor) -> SideCodes:
    """Counts and sums of one side's codes `[n, latent]`, dense or torch sparse (COO or CSR).

    Explicit zeros of a sparse tensor do not count as firing. Raises ValueError for negative or
    non-finite codes and for an empty side.
    """
    n, width = codes.shape
    if n == 0:
        raise ValueError("one side has no examples")
    if codes.layout == torch.strided:
        count, total = (codes != 0).sum(0), codes.double().sum(0)
        least = codes.min() if codes.numel() else torch.zeros(())
    else:
        listed = codes.to_sparse_coo().coalesce()
        column, values = listed.indices()[1], listed.values().double()
        total = values.new_zeros(width).index_add(0, column, values)
        count = torch.zeros(width, dtype=torch.long).index_add(0, column, (values != 0).long())
        least = values.min() if len(values) else torch.zeros(())
    if not torch.isfinite(total).all():
        raise ValueError("codes hold a value that is not finite")
    if least < 0:
        raise ValueError(
            "codes hold negative values; SAS needs a dictionary whose codes are non-negative (not "
            "abstopk or a steering dictionary)"
        )
    return SideCodes(n, count, total)


def sas_codes(
    positive: Tensor,
    negative: Tensor,
    *,
    tau: float | tuple[float, float] = TAU,
    mean_over: MeanOver = "active",
    shared: Shared = "drop",
    parts: Parts = "both",
    top_n: int | None = None,
) -> SASCodes:
    """Algorithm 1 on two code matrices `[n, latent]`, dense or sparse; their row numbers may
    differ.

    1. keep a latent on a side if it fires in a share of at least `tau` of that side's rows
       (`tau` may be a pair: positive side, negative side);
    2. its entry is the mean over the rows in which it fires (`mean_over="all"`: over all rows);
    3. latents kept on both sides are set to 0 (`shared="keep_difference"`: positive minus
    negative);
    4. v = v+ - v-, of which `parts` and then the `top_n` largest entries by size are kept.
    """
    limits = tau if isinstance(tau, tuple) else (tau, tau)
    if not all(0 < limit <= 1 for limit in limits):
        raise ValueError(
            f"tau is {tau}; it must lie in (0, 1]: a share of the examples of one side"
        )
    for given, known, name in (
        (mean_over, ("active", "all"), "mean_over"),
        (shared, ("drop", "keep_difference"), "shared"),
        (parts, ("both", "positive", "negative"), "parts"),
    ):
        require_choice(name, given, known)
    if top_n is not None and top_n < 1:
        raise ValueError(f"top_n is {top_n}; it must be at least 1")
    if positive.shape[1] != negative.shape[1]:
        raise ValueError(f"codes are {positive.shape[1]} and {negative.shape[1]} latents wide")
    sides = side_codes(positive), side_codes(negative)
    # count / n, not tau * n: 0.55 * 100 is 55.00000000000001 in floating point
    kept = [side.frequency >= limit for side, limit in zip(sides, limits, strict=True)]
    v = [
        torch.where(keep, side.mean(mean_over), 0.0) for side, keep in zip(sides, kept, strict=True)
    ]
    both = (v[0] != 0) & (v[1] != 0)
    values = v[0] - v[1]
    if shared == "drop":
        values = torch.where(both, 0.0, values)
    if parts != "both":
        values = values.clamp_min(0) if parts == "positive" else values.clamp_max(0)
    if top_n is not None:
        order = values.abs().sort(descending=True, stable=True).indices
        values = values.index_fill(0, order[top_n:], 0.0)
    return SASCodes(
        values=values.float(),
        frequency=(sides[0].frequency, sides[1].frequency),
        kept=(int(kept[0].sum()), int(kept[1].sum())),
        shared=int(both.sum()),
    )


def sas_vector(
    labelled: Labelled,
    dictionary: Any,
    *,
    tau: float | tuple[float, float] = TAU,
    mean_over: MeanOver = "active",
    shared: Shared = "drop",
    parts: Parts = "both",
    top_n: int | None = None,
    codes: FiredCodes | None = None,
    positive: str = "",
    label: str = "",
    seed: int = 0,
    allow_unbalanced_letters: bool = False,
) -> SteeringVector:
    """The SAS vector of `labelled` in `dictionary`: sparse `codes`, and `vector` = codes @ decoder
    rows.

    Apply it with `SparseAdd` (the method: the dictionary's own nonlinearity decides per token) or
    as the dense `vector` (the baseline; the same thing for a ReLU dictionary and a non-negative
    vector). Unpaired sets of unequal size are legal. `codes` may be given to avoid encoding again.
    An empty vector warns with the frequency histogram. Raises ValueError for codes that can be
    negative and for letter sets where one letter is the matching answer in under 40 % or over 60 %
    of the rows. Held-out figures in the recipe are of `codes @ v`, built again on each training
    fold of groups.
    """
    require_two_sides(labelled)
    balance = require_balanced_letters(labelled, allow=allow_unbalanced_letters)
    fired = codes_or_encoded(dictionary, labelled, codes)

    def built(rows: Tensor) -> SASCodes:
        values, labels = fired.values[rows], labelled.labels[rows]
        return sas_codes(
            values[labels == 1],
            values[labels == 0],
            tau=tau,
            mean_over=mean_over,
            shared=shared,
            parts=parts,
            top_n=top_n,
        )

    def score(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
        weights = built(train).values
        return fired.values[train] @ weights, fired.values[test] @ weights

    result = built(torch.arange(len(labelled)))
    support = int((result.values != 0).sum())
    if support == 0:
        warnings.warn(empty_message(result, tau), stacklevel=2)
    sparse = fired.sparse(result.values)
    same = fired.hook_name == fired.read_name
    return SteeringVector(
        vector=(result.values.double() @ fired.rows.double()).float(),
        hook_name=fired.hook_name,
        recipe=recipe_of(
            labelled,
            "sas",
            positive=positive,
            seed=seed,
            sae_id=fired.sae_id,
            mean_norm=None if same else float("nan"),
            settings={
                "tau": list(tau) if isinstance(tau, tuple) else tau,
                "mean_over": mean_over,
                "shared": shared,
                "parts": parts,
                "top_n": top_n,
                "letter_balance": balance,
                "code_scale": fired.scale,
                "support_positive": int((result.values > 0).sum()),
                "support_negative": int((result.values < 0).sum()),
                "kept_positive": result.kept[0],
                "kept_negative": result.kept[1],
                "shared_latents": result.shared,
                "frequency_histogram": frequency_histogram(result),
            },
            scores=projection_scores(labelled, score, seed=seed) if support else {},
            source="arXiv 2503.00177, Algorithm 1",
        ),
        label=label or "sas",
        codes=SparseCodes(sparse.indices, sparse.values, sparse.d_sae, sparse.sae_id),
    )


def frequency_histogram(result: SASCodes) -> dict[str, list[int]]:
    """Latents per tenth of firing frequency on each side, from (0, 0.1] to (0.9, 1]; silent ones
    left out."""
    out = {}
    for side, frequency in zip(("positive", "negative"), result.frequency, strict=True):
        fired = frequency[frequency > 0]
        tenth = (fired * 10 - 1e-9).floor().clamp(0, 9).long()
        out[side] = torch.bincount(tenth, minlength=10).tolist()
    return out


def empty_message(result: SASCodes, tau: float | tuple[float, float]) -> str:
    """Why no latent was left, with the firing frequencies that a better `tau` can be read from."""
    table = frequency_histogram(result)
    lines = [f"  {side}: {counts}" for side, counts in table.items()]
    return (
        f"no latent is left at tau={tau}: {result.kept[0]} passed on the positive side, "
        f"{result.kept[1]} on the negative side, {result.shared} of them on both. Steering "
        "with this vector does nothing.\n"
        "Latents per firing frequency (0, 0.1], (0.1, 0.2], ... (0.9, 1]:\n" + "\n".join(lines)
    )
