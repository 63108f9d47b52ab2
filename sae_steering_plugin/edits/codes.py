"""Edits written in a dictionary's codes, in the delta form that keeps what the SAE cannot express.

    change(x) = (edited(f(x)) - f(x)) @ rows * scale(x)

`f` is the SAE's encoder, `rows` what its decoder multiplies with, `scale` the per-token factor of
run-time normalisation (1 otherwise). This equals SAELens's attached form with the error term, but
only the edited latents are computed where the nonlinearity is pointwise, so its cost does not grow
with the dictionary's width. Top-k dictionaries need every pre-activation, because membership is a
competition.

Edits of one dictionary at one site are carried out together, in this order: all `SparseAdd` amounts
are summed and pass the nonlinearity once, then `Scale`, `Clamp`, `Ablate` and `Exchange` act in
the order given. Source: Algorithm 2 of arXiv 2503.00177; delta form derived in
shared/methods/sparse_activation_steering.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steering_plugin.adapters.sae_parts import (
    SAEParts,
    architecture,
    decoder_rows,
    own_nonlinearity,
    parts_of,
    site_names,
)
from sae_steering_plugin.types import SparseCodes, SteeringVector

Nonlinearity = Literal["own", "relu", "none"]


def as_features(features: int | Sequence[int] | Tensor) -> tuple[int, ...]:
    """Feature numbers as a tuple. Raises ValueError when there are none or one stands twice."""
    try:
        return (operator.index(features),)  # type: ignore[arg-type]
    except TypeError:
        listed = tuple(int(j) for j in features)  # type: ignore[union-attr]
    if not listed:
        raise ValueError("no feature is named")
    if len(set(listed)) != len(listed):
        raise ValueError(f"a feature stands twice in {listed}")
    return listed


def require_features(sae: Any, features: tuple[int, ...]) -> None:
    """Raises ValueError for a feature outside the dictionary."""
    d_sae = sae.W_dec.shape[0]
    outside = [j for j in features if not 0 <= j < d_sae]
    if outside:
        raise ValueError(f"feature {outside[0]} is outside 0..{d_sae - 1} of this dictionary")


@dataclass(frozen=True, eq=False)
class Clamp:
    """Set the codes of `features` to `values`, whatever they were, in the code's own units.

    `values` is one number, one per feature `[feature]`, or one per row and feature
    `[batch, feature]`. The nonlinearity is not applied again: a value the SAE could not have
    produced is set all the same, as an edit of `hook_sae_acts_post` would.

    With `above` only codes larger than it are set, each feature by itself: the conditional clamp of
    unlearning (values -300 above 1e-4 in arXiv 2503.11127, -25 to -200 above 0 in SAEBench). A
    token at which no code is that large is bit-identical.
    """

    sae: Any
    features: int | Sequence[int]
    values: float | Tensor
    above: float | None = None

    def __post_init__(self) -> None:
        require_features(self.sae, as_features(self.features))
        values = torch.as_tensor(self.values, dtype=torch.float32)
        n = len(as_features(self.features))
        if values.ndim > 2 or (values.ndim and values.shape[-1] not in (1, n)):
            raise ValueError(
                f"values have shape {tuple(values.shape)}; give one number, [{n}] or [batch, {n}]"
            )
        if not torch.isfinite(values).all():
            raise ValueError("a clamp value is not finite")
        if self.above is not None and not math.isfinite(self.above):
            raise ValueError(f"above is {self.above}; it must be a finite number")

    @property
    def hook_name(self) -> str:
        return site_names(self.sae)[1]

    @property
    def support(self) -> tuple[int, ...]:
        return as_features(self.features)

    @property
    def idle(self) -> bool:
        return False

    @property
    def batch_rows(self) -> int:
        return _rows_in(self.values)

    def on(self, device: torch.device | str) -> Clamp:
        return replace(self, values=_on(self.values, device))

    def edited(self, codes: Tensor) -> Tensor:
        values = _per_row(self.values, codes).expand_as(codes)
        return values if self.above is None else torch.where(codes > self.above, values, codes)

    def prepare(self, *, dtype: torch.dtype, device: torch.device | str) -> PreparedCodes:
        return prepare_together([self], dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiply the codes of `features` by `factor`; 1 changes nothing, 0 ablates.

    `factor` is one number, `[feature]` or `[batch, feature]`. A feature that does not fire stays
    off.
    """

    sae: Any
    features: int | Sequence[int]
    factor: float | Tensor

    def __post_init__(self) -> None:
        Clamp(self.sae, self.features, self.factor)

    @property
    def hook_name(self) -> str:
        return site_names(self.sae)[1]

    @property
    def support(self) -> tuple[int, ...]:
        return as_features(self.features)

    @property
    def idle(self) -> bool:
        return bool((torch.as_tensor(self.factor) == 1).all())

    @property
    def batch_rows(self) -> int:
        return _rows_in(self.factor)

    def on(self, device: torch.device | str) -> Scale:
        return replace(self, factor=_on(self.factor, device))

    def edited(self, codes: Tensor) -> Tensor:
        return codes * _per_row(self.factor, codes)

    def prepare(self, *, dtype: torch.dtype, device: torch.device | str) -> PreparedCodes:
        return prepare_together([self], dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class Ablate:
    """Set the codes of `features` to zero, keeping the reconstruction error."""

    sae: Any
    features: int | Sequence[int]

    def __post_init__(self) -> None:
        require_features(self.sae, as_features(self.features))

    @property
    def hook_name(self) -> str:
        return site_names(self.sae)[1]

    @property
    def support(self) -> tuple[int, ...]:
        return as_features(self.features)

    @property
    def idle(self) -> bool:
        return False

    @property
    def batch_rows(self) -> int:
        return 1

    def on(self, device: torch.device | str) -> Ablate:
        del device
        return self

    def edited(self, codes: Tensor) -> Tensor:
        return torch.zeros_like(codes)

    def prepare(self, *, dtype: torch.dtype, device: torch.device | str) -> PreparedCodes:
        return prepare_together([self], dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class SparseAdd:
    """Add `strength` times a sparse code vector and let the SAE's own nonlinearity have the last
    word.

    `vector` is a `SteeringVector` with codes (from `sas_vector`), bare `SparseCodes`, or a dense
    tensor `[d_sae]`. `strength` is one number or one per batch row; its unit is the vector's own
    code values (lambda of the paper). `nonlinearity` is the SAE's own rule, `relu`, or `none`.
    Raises ValueError when the vector was built in another dictionary.
    Source: Algorithm 2 of arXiv 2503.00177 (SAS).
    """

    sae: Any
    vector: SteeringVector | SparseCodes | Tensor
    strength: float | Tensor = 1.0
    nonlinearity: Nonlinearity = "own"

    def __post_init__(self) -> None:
        codes = self.codes
        if codes.d_sae != self.sae.W_dec.shape[0]:
            raise ValueError(
                f"the vector has {codes.d_sae} latents, the dictionary {self.sae.W_dec.shape[0]}"
            )
        if codes.sae_id:
            from sae_steering_plugin.adapters.sae_lens import sae_id, same_sae

            if not same_sae(sae_id(self.sae), codes.sae_id):
                raise ValueError(
                    f"this vector was built in {codes.sae_id!r}, not in {sae_id(self.sae)!r}: its "
                    "latents mean something else here. Load the SAE it was built in."
                )
        if self.nonlinearity not in ("own", "relu", "none"):
            raise ValueError(f"nonlinearity is {self.nonlinearity!r}; use 'own', 'relu' or 'none'")
        if torch.as_tensor(self.strength).ndim > 1:
            raise ValueError("give one strength, or one per batch row")
        if not torch.isfinite(torch.as_tensor(self.strength)).all():
            raise ValueError("strength is not finite")

    @property
    def codes(self) -> SparseCodes:
        if isinstance(self.vector, SteeringVector):
            if self.vector.codes is None:
                raise ValueError(
                    f"vector {self.vector.label!r} has no codes: build it with sas_vector, or use "
                    "Add"
                )
            return self.vector.codes
        if isinstance(self.vector, SparseCodes):
            return self.vector
        found = self.vector.nonzero().reshape(-1)
        return SparseCodes(found, self.vector[found].float(), len(self.vector), "")

    @property
    def hook_name(self) -> str:
        return site_names(self.sae)[1]

    @property
    def support(self) -> tuple[int, ...]:
        return tuple(int(j) for j in self.codes.indices)

    @property
    def idle(self) -> bool:
        return not bool(torch.as_tensor(self.strength).any()) or not bool(self.codes.values.any())

    @property
    def batch_rows(self) -> int:
        return torch.as_tensor(self.strength).numel()

    def amounts(self, device: torch.device | str) -> Float[Tensor, "rows 1 support"]:
        strength = torch.as_tensor(self.strength, dtype=torch.float32, device=device)
        return strength.reshape(-1, 1, 1) * self.codes.values.float().to(device)

    def prepare(self, *, dtype: torch.dtype, device: torch.device | str) -> PreparedCodes:
        return prepare_together([self], dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class Exchange:
    """Top codes up to what the vector adds, and take away at most what they hold.

        f_j <- max(f_j, s v_j)      where s v_j > 0
        f_j <- max(f_j + s v_j, 0)  where s v_j < 0

    `vector` is a `SteeringVector` with codes (from `spare_vector`), or bare `SparseCodes`;
    `strength` s is one number or one per batch row (SpARE's edit degree: about 2). A negative
    strength swaps the roles. SpARE edits the last prompt token: `Edit(..., positions=LAST)`. Raises
    ValueError when the vector was built in another dictionary, and for dictionaries whose codes can
    be negative. Source: arXiv 2410.15999 and its code.
    """

    sae: Any
    vector: SteeringVector | SparseCodes
    strength: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if architecture(self.sae) in ("abstopk", "steering"):
            raise ValueError(
                f"codes of architecture {architecture(self.sae)!r} can be negative, "
                "so there is no least value to take them down to: use SparseAdd"
            )
        SparseAdd(self.sae, self.vector, self.strength)

    @property
    def codes(self) -> SparseCodes:
        return SparseAdd(self.sae, self.vector).codes

    @property
    def hook_name(self) -> str:
        return site_names(self.sae)[1]

    @property
    def support(self) -> tuple[int, ...]:
        return tuple(int(j) for j in self.codes.indices)

    @property
    def idle(self) -> bool:
        return not bool(torch.as_tensor(self.strength).any()) or not bool(self.codes.values.any())

    @property
    def batch_rows(self) -> int:
        return torch.as_tensor(self.strength).numel()

    def on(self, device: torch.device | str) -> Exchange:
        codes = self.codes
        moved = replace(codes, values=codes.values.to(device))
        return replace(self, vector=moved, strength=_on(self.strength, device))

    def edited(self, codes: Tensor) -> Tensor:
        strength = _on(self.strength, codes.device).reshape(-1, 1, 1)
        amount = strength * self.codes.values.float().to(codes.device)
        found = torch.where(amount > 0, torch.maximum(codes, amount), torch.relu(codes + amount))
        return torch.where(amount == 0, codes, found)

    def prepare(self, *, dtype: torch.dtype, device: torch.device | str) -> PreparedCodes:
        return prepare_together([self], dtype=dtype, device=device)


CodeChange = Clamp | Scale | Ablate | SparseAdd | Exchange
"""The changes that are carried out together when they share a dictionary."""


def _rows_in(values: float | Tensor) -> int:
    """Batch rows that values `[batch, feature]` were written for; 1 fits any batch."""
    values = torch.as_tensor(values)
    return values.shape[0] if values.ndim == 2 else 1


def _on(values: float | Tensor, device: torch.device | str) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=device)


def _per_row(values: float | Tensor, codes: Tensor) -> Tensor:
    """Values shaped against codes `[batch, pos, feature]`."""
    values = _on(values, codes.device)
    return values.unsqueeze(1) if values.ndim == 2 else values


@dataclass(frozen=True, eq=False)
class PreparedCodes:
    """Code edits of one dictionary, ready for one device.

    Called with the activation and, per change, the mask of tokens it applies to (None: all of them,
    otherwise `[batch, pos, 1]`); returns what to add, float32, already masked. `constant` is set
    when the whole edit is a fixed vector: additions that provably never meet the nonlinearity.
    """

    parts: SAEParts
    changes: tuple[CodeChange, ...]
    columns: tuple[Tensor | None, ...]
    amounts: tuple[Tensor | None, ...]
    added: Tensor | None
    rule: Callable[[Tensor], Tensor]
    nonlinearity: Nonlinearity
    idle: bool
    constant: Tensor | None
    reads_context: bool

    def __call__(
        self, x: Float[Tensor, "batch pos d_in"], keeps: Sequence[Tensor | None] | None = None
    ) -> Float[Tensor, "batch pos d_out"]:
        wide = x.float()
        added = self.added if keeps is None else self._added(keeps)
        if self.parts.kind == "topk":
            delta = self._ranked(wide, added, keeps)
        elif self.parts.kind == "whole":
            delta = self._whole(wide, added, keeps)
        else:
            codes = self.parts.encode_rows(wide)
            edited = codes if added is None else self.rule(codes + added)
            delta = (self._set(edited, keeps) - codes) @ self.parts.rows
        scale = self.parts.scale(wide)
        return delta if scale is None else delta * scale

    def _added(self, keeps: Sequence[Tensor | None]) -> Tensor | None:
        """The summed SparseAdd amounts over the support, `[batch or 1, pos or 1, support]`."""
        total: Tensor | None = None
        for amount, keep in zip(self.amounts, keeps, strict=True):
            if amount is not None:
                part = amount if keep is None else amount * keep
                total = part if total is None else total + part
        return total

    def _set(self, codes: Tensor, keeps: Sequence[Tensor | None] | None) -> Tensor:
        """Scale, Clamp and Ablate over codes of the support, in the order given."""
        for i, (change, column) in enumerate(zip(self.changes, self.columns, strict=True)):
            if isinstance(change, SparseAdd):
                continue
            before = codes if column is None else codes[..., column]
            after = change.edited(before)
            keep = None if keeps is None else keeps[i]
            if keep is not None:
                after = torch.where(keep.bool(), after, before)
            if column is None:
                codes = after
            else:
                codes = codes.clone()
                codes[..., column] = after
        return codes

    def _ranked(
        self, x: Tensor, added: Tensor | None, keeps: Sequence[Tensor | None] | None
    ) -> Tensor:
        """Top-k: the members compete again with the added amounts among k + support candidates."""
        parts = self.parts
        width = len(parts.indices)
        if not width:
            return x.new_zeros(*x.shape[:-1], parts.rows.shape[-1])
        pre = parts.encode_rows(x)
        strongest = pre.abs() if parts.signed else pre
        chosen = torch.topk(strongest, parts.k, dim=-1, sorted=False).indices
        values = pre.gather(-1, chosen)
        values = values if parts.signed else torch.relu(values)
        slot = torch.searchsorted(parts.indices, chosen).clamp_max(width - 1)
        member = parts.indices[slot] == chosen
        # scatter the members' codes into the support; non-members land in a spare column
        support = x.new_zeros(*x.shape[:-1], width + 1, dtype=torch.float32)
        support.scatter_(-1, torch.where(member, slot, width), values)
        support = support[..., :width]
        edited = support
        outside = torch.zeros_like(values)
        if added is not None:
            edited, outside = self._compete(support, values, member, added)
        edited = self._set(edited, keeps)
        delta = (edited - support) @ parts.rows
        if added is None:
            return delta
        assert parts.table is not None
        return delta + _weighted_rows(parts.table, parts.norms, chosen, outside)

    def _compete(
        self, support: Tensor, values: Tensor, member: Tensor, added: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Codes of the support after the competition, and the loss of each evicted outsider."""
        rivals = support + added
        if self.nonlinearity != "own":
            return self.rule(rivals), torch.zeros_like(values)
        others = values.masked_fill(member, 0.0)
        candidates = torch.cat([others, rivals], dim=-1)
        strength = candidates.abs() if self.parts.signed else candidates
        winners = torch.topk(strength, self.parts.k, dim=-1, sorted=False).indices
        won = torch.zeros_like(candidates, dtype=torch.bool).scatter_(-1, winners, True)
        kept = torch.where(won, candidates, torch.zeros_like(candidates))
        kept = kept if self.parts.signed else torch.relu(kept)
        n = values.shape[-1]
        return kept[..., n:], kept[..., :n] - others

    def _whole(
        self, x: Tensor, added: Tensor | None, keeps: Sequence[Tensor | None] | None
    ) -> Tensor:
        """Any other architecture: its own encode, then the difference through its rows."""
        parts = self.parts
        codes = parts.encode_rows(x)
        support = codes[..., parts.indices]
        edited = support
        everywhere = None
        if added is not None:
            if self.nonlinearity == "own" and parts.k:
                everywhere = codes.clone()
                everywhere[..., parts.indices] = support + added
                winners = torch.topk(everywhere, parts.k, dim=-1).indices
                kept = torch.zeros_like(everywhere).scatter_(
                    -1, winners, everywhere.gather(-1, winners)
                )
                everywhere = torch.relu(kept)
                edited = everywhere[..., parts.indices]
            else:
                edited = self.rule(support + added)
        edited = self._set(edited, keeps)
        delta = (edited - support) @ parts.rows
        if everywhere is None:
            return delta
        lost = everywhere - codes
        lost[..., parts.indices] = 0.0
        return delta + lost @ decoder_rows(parts.sae).to(x.device)


def _weighted_rows(
    table: Float[Tensor, "d_sae d_out"],
    norms: Float[Tensor, " d_sae"] | None,
    chosen: Int[Tensor, "*token k"],
    weights: Float[Tensor, "*token k"],
) -> Float[Tensor, "*token d_out"]:
    """sum_c weights[..., c] * table[chosen[..., c]] / norms, without forming the gathered rows."""
    if norms is not None:
        weights = weights / norms[chosen]
    k = chosen.shape[-1]
    summed = torch.nn.functional.embedding_bag(
        chosen.reshape(-1, k), table, per_sample_weights=weights.reshape(-1, k), mode="sum"
    )
    return summed.reshape(*chosen.shape[:-1], -1)


def prepare_together(
    changes: Sequence[CodeChange], *, dtype: torch.dtype, device: torch.device | str
) -> PreparedCodes:
    """Code edits of one dictionary made ready to run as one. Raises ValueError when they
    conflict."""
    del dtype
    sae = changes[0].sae
    if any(change.sae is not sae for change in changes):
        raise ValueError("these edits belong to different dictionaries")
    rules: set[Nonlinearity] = {c.nonlinearity for c in changes if isinstance(c, SparseAdd)}
    if len(rules) > 1:
        raise ValueError(f"SparseAdd edits of one dictionary disagree on the nonlinearity: {rules}")
    support = sorted({j for change in changes for j in change.support})
    place = {j: i for i, j in enumerate(support)}
    parts = parts_of(sae, support, device)
    rule: Nonlinearity = rules.pop() if rules else "own"
    columns = [
        torch.tensor([place[j] for j in c.support], dtype=torch.long, device=device)
        for c in changes
    ]
    amounts = [
        _spread(c.amounts(device), column, len(support)) if isinstance(c, SparseAdd) else None
        for c, column in zip(changes, columns, strict=True)
    ]
    everywhere = [amount for amount in amounts if amount is not None]
    return PreparedCodes(
        parts=parts,
        changes=tuple(c if isinstance(c, SparseAdd) else c.on(device) for c in changes),
        columns=tuple(
            None if torch.equal(c, torch.arange(len(support), device=device)) else c
            for c in columns
        ),
        amounts=tuple(amounts),
        added=sum(everywhere[1:], everywhere[0]) if everywhere else None,
        rule=_rule(parts, rule) if everywhere else lambda codes: codes,
        nonlinearity=rule,
        idle=all(change.idle for change in changes),
        constant=None,
        reads_context=parts.reads_context,
    )


def _spread(
    amounts: Float[Tensor, "rows 1 feature"], column: Tensor, width: int
) -> Float[Tensor, "rows 1 support"]:
    """Amounts of one change written over the support of all."""
    spread = amounts.new_zeros(amounts.shape[0], 1, width)
    spread[..., column] = amounts
    return spread


def _rule(parts: SAEParts, nonlinearity: Nonlinearity) -> Callable[[Tensor], Tensor]:
    """Which codes are allowed; an architecture whose own rule is unknown is a ValueError."""
    if nonlinearity == "own":
        return own_nonlinearity(parts, architecture(parts.sae))
    return torch.relu if nonlinearity == "relu" else lambda codes: codes


def constant_step(
    change: CodeChange, device: torch.device | str
) -> Float[Tensor, "rows d_out"] | None:
    """The fixed vector a SparseAdd amounts to, when it provably never meets the nonlinearity.

    ReLU and gated codes are >= 0, so a non-negative addition stays; JumpReLU codes are 0 or above
    theta, so an addition above theta stays too. None in every other case, and under run-time
    normalisation, where the step depends on the token's scale.
    """
    if not isinstance(change, SparseAdd):
        return None
    parts = parts_of(change.sae, change.support, device)
    if parts.rescales:
        return None
    amounts = change.amounts(device).squeeze(1)
    plain = change.nonlinearity == "none" and parts.kind == "pointwise"
    passes = (amounts >= 0).all() and (
        parts.rectified or (parts.theta is not None and bool((amounts > parts.theta).all()))
    )
    if not (plain or (passes and change.nonlinearity in ("own", "relu"))):
        return None
    return amounts @ parts.rows


def codes_of(
    sae: Any, features: Sequence[int], x: Float[Tensor, "batch pos d_in"]
) -> Float[Tensor, "batch pos feature"]:
    """The present codes of chosen features at a site's activation, without encoding the others."""
    parts = parts_of(sae, features, x.device)
    if parts.kind == "pointwise":
        return parts.encode_rows(x.float())
    if parts.kind == "whole":
        return parts.encode_rows(x.float())[..., parts.indices]
    pre = parts.encode_rows(x.float())
    strongest = pre.abs() if parts.signed else pre
    bar = torch.topk(strongest, parts.k, dim=-1).indices
    kept = torch.zeros_like(pre).scatter_(-1, bar, pre.gather(-1, bar))
    kept = kept if parts.signed else torch.relu(kept)
    return kept[..., parts.indices]
