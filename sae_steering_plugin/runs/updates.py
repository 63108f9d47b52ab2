"""What a finished update did, in the concepts of an SAE: to activations, and in the weights.

`update_report` runs two models on the same texts, `weight_report` reads a change of weights without
running anything, `Leak` follows edited concepts while training goes on. Source:
shared/methods/gradient_projection, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steering_plugin.adapters.activations import (
    TokenBatch,
    activations_at,
    bos_policy,
    encode_texts,
    padded,
)
from sae_steering_plugin.adapters.parameters import slots_of
from sae_steering_plugin.adapters.readers import WORDS, readers_of, side_of
from sae_steering_plugin.adapters.sae_parts import site_names, whole_codes
from sae_steering_plugin.adapters.training_hooks import linear_decoder
from sae_steering_plugin.adapters.transformer_lens import Model
from sae_steering_plugin.concepts import (
    LowRankDelta,
    lora_write,
    moved_along,
    unit_rows,
    write_share,
)
from sae_steering_plugin.types import escaped

# Activations --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class UpdateReport:
    """What changed at an SAE's site between two models on the same texts; see `update_report`.

    Columns of `table`: `moved` (mean change of the activation along the unit row, residual units),
    `code_change` (mean change of the code), `rate_before`, `rate_after` (share of positions that
    fire). `error_before` and `error_after` are shares of variance the SAE leaves unexplained: when
    the second is much larger, the SAE no longer fits.
    """

    table: Any
    hook_name: str
    mean_change: Float[Tensor, " d_model"]
    error_before: float
    error_after: float
    n_positions: int

    @property
    def size(self) -> float:
        """Length of the mean change, residual units."""
        return float(self.mean_change.norm())

    def top(self, k: int = 20, by: str = "moved") -> Any:
        order = self.table[by].abs().sort_values(ascending=False, kind="stable").index
        return self.table.loc[order].head(k).reset_index(drop=True)

    def _repr_html_(self) -> str:
        head = (
            f"{self.n_positions} positions at {self.hook_name}; mean change {self.size:.3g}; "
            f"variance the SAE leaves out: {self.error_before:.1%} before, {self.error_after:.1%} "
            "after"
        )
        body = self.top(10).to_html(index=False, float_format="%.4g")
        return f"<p>{escaped(head)}</p>{body}"


def update_report(
    before: Model,
    after: Model,
    saes: Any,
    texts: Sequence[str],
    *,
    labels: Mapping[int, str] | None = None,
    counted: Callable[[TokenBatch], Tensor] | None = None,
    max_tokens: int | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
) -> Any:
    """Activations and codes of the same texts in two models, both read by the base model's SAE.

    `saes` is one SAE, or a list at different sites (then a dict by hook name comes back). All real
    tokens but a leading BOS are read, or those that `counted` marks (batch to `[batch pos]`). Pass
    two models: one object whose weights changed in between compares with itself. Without any text,
    the change of the weights themselves is read by `weight_report`. Raises ValueError when the two
    tokenise differently.
    """
    wanted = list(saes) if isinstance(saes, Sequence) else [saes]
    reports = {}
    for sae in wanted:
        first, second = (
            kept_activations(one, sae, texts, max_tokens, prepend_bos, batch_size, counted)
            for one in (before, after)
        )
        reports[site_names(sae)[0]] = changed(first, second, sae, labels=labels)
    if len(reports) != len(wanted):
        raise ValueError("two SAEs read one site: report on them one after the other")
    return reports if isinstance(saes, Sequence) else reports[site_names(saes)[0]]


def kept_activations(
    model: Model,
    sae: Any,
    texts: Sequence[str],
    max_tokens: int | None,
    prepend_bos: bool | None,
    batch_size: int,
    counted: Callable[[TokenBatch], Tensor] | None = None,
) -> Float[Tensor, "pos d_model"]:
    """Activations of all counted positions of the texts at the SAE's site."""
    bos = bos_policy(model, sae, prepend_bos)
    encoded = encode_texts(model, texts, prepend_bos=bos, max_tokens=max_tokens)
    found = []
    for start in range(0, len(encoded), batch_size):
        batch = padded(model, encoded[start : start + batch_size])
        x = activations_at(model, site_names(sae)[0], batch)
        marked = batch.counted if counted is None else counted(batch)
        found.append(x[marked.to(x.device)].cpu())
    return torch.cat(found)


def changed(
    first: Float[Tensor, "pos d_model"],
    second: Float[Tensor, "other d_model"],
    sae: Any,
    *,
    labels: Mapping[int, str] | None = None,
) -> UpdateReport:
    """The report of two sets of activations at the same positions."""
    import pandas as pd

    if first.shape != second.shape:
        raise ValueError(
            f"activations of {tuple(first.shape)} and {tuple(second.shape)}: both models must "
            "tokenise the texts alike"
        )
    rows, bias = linear_decoder(sae)
    sums: list[tuple[Tensor, Tensor]] = []
    errors = []
    for x in (first, second):
        code, fires, left = torch.zeros(len(rows)), torch.zeros(len(rows)), 0.0
        for start in range(0, len(x), 1024):
            block = x[start : start + 1024]
            with torch.no_grad():
                z = whole_codes(sae, block[:, None])[:, 0].cpu()
            code += z.sum(0)
            fires += (z != 0).sum(0)
            left += float((block - z @ rows - bias).square().sum())
        sums.append((code / len(x), fires / len(x)))
        errors.append(left / float((x - x.mean(0)).square().sum()))
    table = pd.DataFrame(
        {
            "latent": range(len(rows)),
            "moved": moved_along(first, second, rows),
            "code_change": (sums[1][0] - sums[0][0]).double(),
            "rate_before": sums[0][1].double(),
            "rate_after": sums[1][1].double(),
        }
    )
    if labels:
        table["label"] = [labels.get(j, "") for j in table["latent"]]
    mean = (second.double() - first.double()).mean(0).float()
    return UpdateReport(table, site_names(sae)[0], mean, errors[0], errors[1], len(first))


# Weights ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class WeightReport:
    """What a change of weights writes along each latent's unit row, or reads from it; see
    `weight_report`.

    `sizes[m, f]` is |dW d_f| of matrix m (|d_f' dW| where `side` is "read"), `squares[m]` its
    |dW|^2. `left_out` names changes that do not end, or begin, in the space of the SAE.
    """

    names: tuple[str, ...]
    sizes: Float[Tensor, "matrix latent"]
    squares: Float[Tensor, " matrix"]
    width: int
    left_out: tuple[str, ...] = ()
    labels: Mapping[int, str] = field(default_factory=dict)
    side: str = "write"

    def table(self, name: str | None = None) -> Any:
        """A row per latent, of all matrices or of one: `write` or `read`, `share` of |dW|^2, and
        `times`.

        `times` is the share against that of a random direction (1 / d_model): above 1 the update
        writes along the concept, or reads it, more than a direction taken at random.
        """
        import pandas as pd

        if name is not None and name not in self.names:
            raise KeyError(f"no matrix {name!r}; there are {', '.join(self.names)}")
        chosen = list(range(len(self.names))) if name is None else [self.names.index(name)]
        squares = self.sizes[chosen].square().sum(0)
        whole = float(self.squares[chosen].sum())
        share = squares / whole if whole else torch.zeros_like(squares)
        found = pd.DataFrame(
            {
                "latent": range(len(share)),
                self.side: squares.sqrt(),
                "share": share,
                "times": share * self.width,
            }
        )
        if self.labels:
            found["label"] = [self.labels.get(j, "") for j in found["latent"]]
        return found

    def top(self, k: int = 20, name: str | None = None) -> Any:
        """The k latents that the update writes, or reads, most."""
        found = self.table(name).sort_values(self.side, ascending=False, kind="stable")
        return found.head(k).reset_index(drop=True)

    def _repr_html_(self) -> str:
        left = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        does = "write to" if self.side == "write" else "read"
        head = f"{len(self.names)} changes that {does} the residual{left}"
        body = self.top(10).to_html(index=False, float_format="%.4g")
        return f"<p>{escaped(head)}</p>{body}"


def weight_report(
    change: Mapping[str, Tensor | LowRankDelta],
    sae: Any,
    *,
    side: str = "write",
    labels: Mapping[int, str] | None = None,
) -> WeightReport:
    """What each changed matrix writes along the SAE's latents, or reads from them, without a
    forward pass.

    `change` maps names to what was added to a matrix, or to the factors of a low-rank update, which
    are never multiplied out: `weight_deltas(before, after)` and `low_rank_deltas(model)` give both.
    A matrix that writes is `[in, d_model]` (`[head, d_head, d_model]`, or a bias `[d_model]`, count
    as such); one that reads (`side="read"`: query, key, value, MLP in, gate) is `[d_model, out]` or
    `[head, d_model, d_head]`, with the norm in front of it folded in: `weight_deltas` does so, and
    `adapters.readers.folded(model, change)` for factors. Latents count by the decoder's rows on
    both sides: where the concept is in the residual, not what the encoder detects it by.

    A change of another width than the SAE, or whose name says that it is of the other side, is left
    out and named. Raises ValueError when nothing is left, and for another side.
    """
    refuse_other_sides(side)
    rows, _ = linear_decoder(sae)
    width = rows.shape[1]
    names, sizes, squares, left_out = [], [], [], []
    for name, given in change.items():
        delta = given
        if side == "read" and len(given.shape) > 1:
            delta = given.mT
        elsewhere = side_of(name) not in (None, side) or (side == "read" and len(given.shape) < 2)
        if elsewhere or delta.shape[-1] != width:
            left_out.append(name)
            continue
        if isinstance(delta, LowRankDelta):
            size, _ = lora_write(delta, rows)
            square = delta.square
        else:
            size, _ = write_share(delta.reshape(-1, width), rows)
            square = float(delta.double().square().sum())
        names.append(name)
        sizes.append(size)
        squares.append(square)
    if not names:
        raise ValueError(
            f"no change {side}s {width} numbers per token, as the SAE's site has"
            + (f"; left out: {', '.join(left_out)}" if left_out else "")
        )
    whole = torch.tensor(squares, dtype=torch.float64)
    return WeightReport(
        tuple(names), torch.stack(sizes), whole, width, tuple(left_out), dict(labels or {}), side
    )


def weight_deltas(before: Model, after: Model, *, side: str = "write") -> dict[str, Tensor]:
    """After minus before of every parameter that writes to the residual, by TransformerLens name;
    or of every matrix that reads it, `[d_model, out]`, the norm in front folded in on both sides.

    A block with experts has no single output matrix and is not among them, nor are what its experts
    read with. Raises ValueError for models of different shapes, and for another side.
    """
    refuse_other_sides(side)
    first, second = (values_of(model, side) for model in (before, after))
    if set(first) != set(second):
        odd = sorted(set(first) ^ set(second))
        raise ValueError(f"one model has {odd[0]} and the other has not")
    out = {}
    for name, old in first.items():
        new = second[name]
        if old.shape != new.shape:
            raise ValueError(f"{name} has shape {tuple(old.shape)} and {tuple(new.shape)}")
        out[name] = new.cpu() - old.cpu()
    return out


def values_of(model: Model, side: str) -> dict[str, Tensor]:
    """The parameters of one side, as they act on the residual itself."""
    if side == "write":
        return {name: slot.value() for name, slot in slots_of(model).items()}
    return {name: one.folded(one.matrix) for name, one in readers_of(model).items()}


def refuse_other_sides(side: str) -> None:
    if side not in WORDS:
        raise ValueError(f"side is {' or '.join(map(repr, WORDS))}, not {side!r}")


# While it is trained ------------------------------------------------------------------------------


@dataclass(eq=False)
class Leak:
    """Follows how far chosen concepts move while a model is trained, edits or not.

    Made before training; `measure(step)` after some steps. Each record holds the mean movement
    along every latent's unit row (residual units) and `share`, the part of the mean change that
    lies in their span. A suppressed concept that moves all the same has leaked.
    """

    model: Model
    sae: Any
    latents: Sequence[int]
    texts: Sequence[str]
    batch_size: int = 16
    records: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rows = unit_rows(linear_decoder(self.sae)[0][list(self.latents)])
        self._start = self._now()

    def measure(self, step: int) -> dict[str, float]:
        """One record: the movement since the start."""
        change = (self._now().double() - self._start.double()).mean(0)
        basis = torch.linalg.qr(self._rows.T).Q
        size = float(change.norm())
        record = {"step": float(step), "size": size}
        for latent, value in zip(self.latents, (self._rows @ change).tolist(), strict=True):
            record[f"latent {latent}"] = value
        record["share"] = float((basis.T @ change).norm()) / size if size else 0.0
        self.records.append(record)
        return record

    def table(self) -> Any:
        import pandas as pd

        return pd.DataFrame(self.records)

    def _now(self) -> Tensor:
        return kept_activations(self.model, self.sae, self.texts, None, None, self.batch_size)
