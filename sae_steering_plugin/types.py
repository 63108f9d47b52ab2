"""The frozen records that cross rooms, and the two protocols they meet through.

Nothing here imports a host or another room. Axis words: `batch pos d_model d_sae example pair`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

Phase = Literal["all", "prefill", "decode"]
Unit = Literal["raw", "unit", "norm", "max_activation", "kl"]

UNITS: dict[str, str] = {
    "raw": "multiples of the vector as it was built",
    "unit": "Euclidean length in the residual stream",
    "norm": "multiples of the mean residual norm at the site",
    "max_activation": "multiples of the feature's maximum activation times its decoder row",
    "kl": "nats of KL divergence per token on a calibration text",
}


@dataclass(frozen=True)
class Positions:
    """Which tokens of a row are steered, counted over the row's real tokens (padding has no
    number).

    Token 0 is the row's first real token (the BOS when there is one). `start` and `stop` bound a
    half-open range; a negative bound counts back from the end of the prompt, so `start=-1` is the
    last prompt token. `phase` keeps the prompt, what is generated, or both. A leading BOS is left
    out unless `bos=True`; a BOS inside the text is an ordinary token.
    """

    start: int = 0
    stop: int | None = None
    phase: Phase = "all"
    bos: bool = False

    def __post_init__(self) -> None:
        if self.phase not in ("all", "prefill", "decode"):
            raise ValueError(f"phase is {self.phase!r}; it must be 'all', 'prefill' or 'decode'")
        same_side = self.stop is not None and (self.start < 0) == (self.stop < 0)
        if self.stop is not None and same_side and self.stop <= self.start:
            raise ValueError(f"Positions({self.start}, {self.stop}) holds no token")

    @property
    def everything(self) -> bool:
        """True when only padding and a leading BOS can be left out."""
        return self.start == 0 and self.stop is None and self.phase == "all"

    def keep(
        self,
        index: Int[Tensor, "batch pos"],
        prompt_length: Int[Tensor, " batch"],
        real: Bool[Tensor, "batch pos"],
        leading_bos: Bool[Tensor, "batch pos"],
    ) -> Bool[Tensor, "batch pos"]:
        """The mask over one chunk, from each token's number, each row's prompt length, and
        padding."""
        end = prompt_length.unsqueeze(-1)
        keep = real & (index >= (self.start if self.start >= 0 else end + self.start))
        if self.stop is not None:
            keep = keep & (index < (self.stop if self.stop >= 0 else end + self.stop))
        if self.phase == "prefill":
            keep = keep & (index < end)
        elif self.phase == "decode":
            keep = keep & (index >= end)
        return keep if self.bos else keep & ~leading_bos

    def __str__(self) -> str:
        named = {ALL: "all", PREFILL: "prefill", DECODE: "decode", LAST: "last"}
        if self in named:
            return named[self]
        stop = "" if self.stop is None else self.stop
        return f"{self.phase}[{self.start}:{stop}]" + ("+bos" if self.bos else "")


ALL = Positions()
PREFILL = Positions(phase="prefill")
DECODE = Positions(phase="decode")
LAST = Positions(start=-1, phase="prefill")
AFTER_PROMPT = Positions(start=-1)
"""CAA's rule: from the last prompt token onwards, so that the first new token is affected."""


def named_positions(word: str) -> Positions:
    """The position rule a command line names: all, prefill, decode, last, after_prompt."""
    table = dict(all=ALL, prefill=PREFILL, decode=DECODE, last=LAST, after_prompt=AFTER_PROMPT)
    if word not in table:
        raise ValueError(f"no position rule {word!r}; choose one of {', '.join(table)}")
    return table[word]


@dataclass(frozen=True)
class Recipe:
    """How a vector was made: enough to make it again and to know what its strength means.

    `positive` says in words what a positive strength is fitted to do (the label orientation).
    `unit` is the strength unit that `strength=1.0` was reported in. `mean_norm` is the mean
    residual norm at the site and `max_activation` the feature's largest activation, both measured
    on the data the vector was built from; None when not measured. `kl_curve` holds pairs (signed
    length, nats per token) that `calibrate_strength` measured. `scores` holds held-out figures
    (never training figures without `train` in their name), `settings` every option of the method.
    """

    method: str
    positive: str = ""
    model_name: str = ""
    sae_id: str = ""
    n: int = 0
    seed: int | None = None
    unit: Unit = "raw"
    mean_norm: float | None = None
    max_activation: float | None = None
    row_norm: float | None = None
    kl_curve: tuple[tuple[float, float], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "settings": dict(self.settings), "scores": dict(self.scores)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"a recipe has no field {unknown[0]!r}")
        curve = tuple((float(a), float(b)) for a, b in values.get("kl_curve", ()))
        return cls(**{**values, "kl_curve": curve})


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """A vector written in a dictionary: `values[i]` on latent `indices[i]` of `sae_id`."""

    indices: Int[Tensor, " support"]
    values: Float[Tensor, " support"]
    d_sae: int
    sae_id: str

    def __post_init__(self) -> None:
        if len(self.indices) != len(self.values):
            raise ValueError("indices and values differ in length")
        if (
            len(self.indices)
            and not 0 <= int(self.indices.min()) <= int(self.indices.max()) < self.d_sae
        ):
            raise ValueError(f"a latent index lies outside 0..{self.d_sae - 1}")
        if not torch.isfinite(self.values).all():
            raise ValueError("codes hold a value that is not finite")

    def dense(self) -> Float[Tensor, " d_sae"]:
        codes = torch.zeros(self.d_sae, dtype=self.values.dtype, device=self.values.device)
        return codes.index_put((self.indices.long(),), self.values)


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A vector of the residual stream at one hook point, with the recipe that made it.

    `vector` is kept in float32 and has its own length; `direction` is the unit vector. `codes` is
    the sparse form of a vector built in a dictionary's latent space (SAS); it is None otherwise.
    """

    vector: Float[Tensor, " d_model"]
    hook_name: str
    recipe: Recipe
    label: str = ""
    codes: SparseCodes | None = None

    def __post_init__(self) -> None:
        if not torch.isfinite(self.vector).all():
            raise ValueError(f"vector {self.label!r} holds a value that is not finite")

    @property
    def norm(self) -> float:
        return float(self.vector.norm())

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        if self.norm <= SMALLEST_NORM:
            raise ValueError(
                f"vector {self.label!r} has length {self.norm:.1e}: it has no direction"
            )
        return self.vector / self.vector.norm()

    def length_of(self, unit: Unit) -> float:
        """Displacement, in residual units, of strength 1.0 in `unit`.

        Raises ValueError when the recipe lacks the measurement that the unit needs. `kl` has no
        fixed length: see `displacement`.
        """
        recipe = self.recipe
        if unit == "raw":
            return self.norm
        if unit == "unit":
            return 1.0
        if unit == "norm" and recipe.mean_norm is not None:
            return recipe.mean_norm
        if unit == "max_activation" and recipe.max_activation is not None:
            return recipe.max_activation * (recipe.row_norm if recipe.row_norm is not None else 1.0)
        if unit not in UNITS:
            raise ValueError(f"no strength unit {unit!r}; choose one of {', '.join(UNITS)}")
        raise ValueError(
            f"vector {self.label!r} cannot be measured in {unit!r} ({UNITS[unit]}): its recipe "
            "lacks that figure. Build it from data with collect_contrast, or use "
            "calibrate_strength."
        )

    def displacement(self, strength: float, unit: Unit) -> float:
        """Signed length, in residual units, of `strength` given in `unit`.

        A KL budget is read off the measured curve: length is interpolated in the square root of
        the nats, because KL grows with the square of a small step. Its sign is the direction.
        """
        if unit != "kl":
            return strength * self.length_of(unit)
        lengths, roots = self._kl_side(strength)
        if abs(strength) ** 0.5 > roots[-1]:
            raise ValueError(
                f"{abs(strength):g} nats lies beyond the measured curve "
                f"({roots[-1] ** 2:.3g} nats): calibrate with a larger budget"
            )
        return math.copysign(interpolate(abs(strength) ** 0.5, roots, lengths), strength)

    def convert(self, strength: float, unit: Unit, to: Unit) -> float:
        """The same displacement written in another unit; any two units convert."""
        length = self.displacement(strength, unit)
        if to != "kl":
            return length / self.length_of(to)
        lengths, roots = self._kl_side(length)
        if abs(length) > lengths[-1]:
            raise ValueError(
                f"length {abs(length):.3g} lies beyond the measured KL curve ({lengths[-1]:.3g})"
            )
        return math.copysign(interpolate(abs(length), lengths, roots) ** 2, length)

    def _kl_side(self, sign: float) -> tuple[list[float], list[float]]:
        """Measured lengths and square roots of nats on one side, from zero upwards."""
        side = sorted((abs(a), max(b, 0.0)) for a, b in self.recipe.kl_curve if a * sign > 0)
        if sign and not side:
            raise ValueError(
                f"vector {self.label!r} has no KL curve on that side: run calibrate_strength first"
            )
        lengths, roots = [0.0], [0.0]
        for length, nats in side:
            lengths.append(length)
            roots.append(max(roots[-1], nats**0.5))
        return lengths, roots

    def with_recipe(self, **changes: Any) -> SteeringVector:
        return replace(self, recipe=replace(self.recipe, **changes))

    def __repr__(self) -> str:
        return (
            f"SteeringVector({self.label or self.recipe.method!r}, {self.hook_name}, "
            f"norm {self.norm:.3g}, {self.recipe.method})"
        )

    def _repr_html_(self) -> str:
        rows = {
            "label": self.label,
            "hook point": self.hook_name,
            "length": f"{self.norm:.4g}",
            **{k: v for k, v in self.recipe.to_dict().items() if v not in ("", None, {}, 0)},
        }
        cells = "".join(
            f"<tr><th>{escaped(k)}</th><td>{escaped(v)}</td></tr>" for k, v in rows.items()
        )
        return f"<table><caption>SteeringVector</caption>{cells}</table>"


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Linear interpolation of y at x on ascending `xs`; the last y beyond their end."""
    for i in range(1, len(xs)):
        if x <= xs[i]:
            step = xs[i] - xs[i - 1]
            return ys[i] if step == 0 else ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / step
    return ys[-1]


SMALLEST_NORM = 1e-8
"""Below this length a vector is numerical noise and is never normalised (arXiv 2603.16335,
code)."""


def escaped(value: object) -> str:
    """`value` as text that is safe inside a page."""
    from html import escape

    return escape(str(value))


@dataclass(frozen=True)
class Contrast:
    """Texts in pairs or in two unpaired lists, with the group each was made from.

    `positive[i]` pairs with `negative[i]` when `paired`. `groups` name the template behind each
    pair (or, unpaired, of positives then negatives) and keep held-out splits free of leaks.
    `letters` are character offsets of the token to read in (positive, negative) texts; empty means
    the last real token.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    groups: tuple[str, ...] = ()
    letters: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    paired: bool = True
    name: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if not self.positive or not self.negative:
            raise ValueError(f"contrast {self.name!r} lacks texts on one side")
        if self.paired and len(self.positive) != len(self.negative):
            raise ValueError(
                f"contrast {self.name!r} has {len(self.positive)} positive and "
                f"{len(self.negative)} "
                "negative texts; pass paired=False for lists that do not pair up"
            )
        expected = len(self.positive) if self.paired else len(self.positive) + len(self.negative)
        if self.groups and len(self.groups) != expected:
            raise ValueError(
                f"contrast {self.name!r} has {len(self.groups)} groups, not {expected}"
            )
        for side, offsets in zip((self.positive, self.negative), self.letters, strict=True):
            if offsets and len(offsets) != len(side):
                raise ValueError(f"contrast {self.name!r} lacks a letter offset for some text")

    def __len__(self) -> int:
        return max(len(self.positive), len(self.negative))


@dataclass(frozen=True, eq=False)
class Labelled:
    """Activations read at one hook point, one row per example, with a label and a group.

    `labels` is 1 for positive and 0 for negative rows. `pairs[i]` is the row's pair number, -1
    without one. `groups` are template ids. `mean_norm` is the mean residual norm over all real
    non-BOS tokens seen while collecting. `texts` are kept for the text-only baseline. `letters[i]`
    is the answer letter the row was read at; empty when rows were read at the last token.
    """

    activations: Float[Tensor, "example d_model"]
    labels: Int[Tensor, " example"]
    hook_name: str
    groups: tuple[str, ...]
    pairs: Int[Tensor, " example"]
    texts: tuple[str, ...]
    mean_norm: float
    model_name: str = ""
    name: str = ""
    letters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.activations)
        if self.letters and len(self.letters) != n:
            raise ValueError(f"letters has {len(self.letters)} entries, not {n}")
        for field_name in ("labels", "groups", "pairs", "texts"):
            if len(getattr(self, field_name)) != n:
                raise ValueError(
                    f"{field_name} has {len(getattr(self, field_name))} entries, not {n}"
                )
        if not torch.isfinite(self.activations).all():
            raise ValueError("collected activations hold a value that is not finite")

    @property
    def positive(self) -> Float[Tensor, "example d_model"]:
        return self.activations[self.labels == 1]

    @property
    def negative(self) -> Float[Tensor, "example d_model"]:
        return self.activations[self.labels == 0]

    def __len__(self) -> int:
        return len(self.labels)


FEATURE_TABLE_FORMAT = "sae-steering-plugin feature table 1"


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """One row per feature of a dictionary; `table.index` holds the feature numbers.

    `settings` say how every column was made; they travel with the table into its parquet file.
    """

    table: pd.DataFrame
    sae_id: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(map(str, self.table.columns))

    def of(self, features: Sequence[int] | Tensor) -> FeatureTable:
        """The rows of `features`, in that order. Raises KeyError for one the table lacks."""
        wanted = [int(feature) for feature in features]
        known = set(self.table.index)
        missing = [feature for feature in wanted if feature not in known]
        if missing:
            raise KeyError(f"feature {missing[0]} is not in this table of {len(self)} features")
        return replace(self, table=self.table.loc[wanted])

    def join(self, other: FeatureTable) -> FeatureTable:
        """Both tables' columns side by side, in this table's order of features.

        Raises ValueError when they describe two dictionaries (two `sae_id` whose content hashes
        differ), other features, a column twice, or one setting in two ways.
        """
        if self.sae_id.rpartition("#")[2] != other.sae_id.rpartition("#")[2]:
            raise ValueError(
                f"one table is about {self.sae_id!r} and the other about {other.sae_id!r}"
            )
        if set(self.table.index) != set(other.table.index):
            only = set(self.table.index) ^ set(other.table.index)
            raise ValueError(
                f"{len(only)} features are in one table only (feature {min(only)}, for one): take "
                "the same ones with .of(features) first"
            )
        twice = sorted(set(self.columns) & set(other.columns))
        if twice:
            raise ValueError(f"both tables have a column {twice[0]!r}")
        for name in set(self.settings) & set(other.settings):
            if self.settings[name] != other.settings[name]:
                raise ValueError(
                    f"the tables differ in setting {name!r}: {self.settings[name]!r} and "
                    f"{other.settings[name]!r}"
                )
        table = self.table.join(other.table.loc[self.table.index])
        return FeatureTable(table, self.sae_id, {**self.settings, **other.settings})

    def to_parquet(self, path: str | Path) -> None:
        """Write the table, its `sae_id` and its settings into one parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        about = {
            "format": FEATURE_TABLE_FORMAT,
            "sae_id": self.sae_id,
            "settings": dict(self.settings),
        }
        table = pa.Table.from_pandas(self.table.rename_axis(index="feature"), preserve_index=True)
        kept = {**(table.schema.metadata or {}), FEATURE_TABLE_KEY: json.dumps(about).encode()}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(kept), path)

    @classmethod
    def from_parquet(cls, path: str | Path) -> FeatureTable:
        """Read what `to_parquet` wrote. Raises ValueError for any other parquet file."""
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {}).get(FEATURE_TABLE_KEY, b"{}"))
        if about.get("format") != FEATURE_TABLE_FORMAT:
            raise ValueError(f"{path} is no feature table ({FEATURE_TABLE_FORMAT!r})")
        return cls(table.to_pandas(), about["sae_id"], about["settings"])


FEATURE_TABLE_KEY = b"sae_steering_plugin"
"""Where the parquet schema holds what a feature table says besides its columns."""


@dataclass(frozen=True, eq=False)
class Scores:
    """A score per feature for one concept: `values[j]` belongs to feature j, larger is better."""

    values: Float[Tensor, " feature"]
    name: str
    concept: str = ""
    sae_id: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Selection:
    """Features chosen for a concept, best first, with the scores that chose them."""

    features: tuple[int, ...]
    scores: Mapping[str, tuple[float, ...]]
    concept: str
    sae_id: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One record per feature, as `summary.json` lists them."""
        return [
            {"feature": feature, **{name: values[i] for name, values in self.scores.items()}}
            for i, feature in enumerate(self.features)
        ]


@dataclass(frozen=True)
class Effect:
    """What one arm did to one outcome, against its base arm on the same items.

    `d` is Cohen's d with pooled deviation (`ddof`), positive when the arm is larger; the interval
    is a bootstrap over items at `level`. `p_value` belongs to `test`. `valid_rate` is the share of
    the arm's outputs that were well formed. `moved_wrong` is the share of items moved against the
    intended sign. `displacement` is the mean length of the change against the mean residual norm.
    `d_z` is the paired effect size. `n_missing` items lacked a value in one arm and are not in `n`.
    `p_adjusted` is the p value after `correction` over the family it was reported with.

    `interval` names how the interval was made and `note` what is odd about it (empty for ordinary
    data). `superiority` is P(arm > base) + P(equal) / 2 with its own interval; `hedges_g` is d
    without its small-sample bias. `unpaired_p` forgets the pairing. `n_base` items stand in the
    base arm; `n_clusters` is 0 unless items were resampled in clusters.
    """

    method: str
    outcome: str
    strength: float
    unit: str
    positions: str
    n: int
    base_mean: float
    arm_mean: float
    d: float
    ci_low: float
    ci_high: float
    p_value: float
    test: str
    ddof: int = 1
    level: float = 0.95
    trait: str = ""
    valid_rate: float = float("nan")
    base_valid_rate: float = float("nan")
    moved_wrong: float = float("nan")
    displacement: float = float("nan")
    model: str = ""
    judge: str = "rule"
    d_z: float = float("nan")
    n_missing: int = 0
    p_adjusted: float = float("nan")
    correction: str = "none"
    n_base: int = 0
    n_clusters: int = 0
    interval: str = "bootstrap bca"
    note: str = ""
    hedges_g: float = float("nan")
    superiority: float = float("nan")
    superiority_low: float = float("nan")
    superiority_high: float = float("nan")
    unpaired_p: float = float("nan")
    unpaired_test: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _repr_html_(self) -> str:
        known = {
            "arm": " ".join(str(part) for part in (self.method, self.positions) if part),
            "outcome": self.outcome,
            "strength": f"{self.strength:g} {self.unit}" if self.strength == self.strength else "",
            "items": f"{self.n}" + (f", {self.n_missing} missing" if self.n_missing else ""),
            "means": f"{self.base_mean:.4g} to {self.arm_mean:.4g}",
            f"d (ddof {self.ddof})": f"{self.d:.3f}",
            f"{self.level:.1%} interval": f"{self.ci_low:.3f} to {self.ci_high:.3f} "
            f"({self.interval})",
            f"p ({self.test})": f"{self.p_value:.3g}",
        }
        optional = {
            f"p adjusted ({self.correction})": (self.p_adjusted, ".3g"),
            f"p ({self.unpaired_test}, unpaired)": (self.unpaired_p, ".3g"),
            "d_z": (self.d_z, ".3f"),
            "superiority": (self.superiority, ".3f"),
            "moved the wrong way": (self.moved_wrong, ".1%"),
            "valid, base": (self.base_valid_rate, ".1%"),
            "valid, arm": (self.valid_rate, ".1%"),
        }
        known |= {name: f"{x:{form}}" for name, (x, form) in optional.items() if x == x}
        known |= {"judge": self.judge, "note": self.note}
        cells = "".join(
            f"<tr><th>{escaped(k)}</th><td>{escaped(v)}</td></tr>" for k, v in known.items() if v
        )
        return f"<table><caption>Effect</caption>{cells}</table>"


@dataclass(frozen=True)
class Scenario:
    """One task for the agent loop: neutral system prompt, a user task, and cached tool results.

    `responses[tool]` are given out in order of the calls to that tool; when they run out the loop
    answers with rotating transient errors. Nothing is ever executed.
    """

    id: str
    domain: str
    system: str
    user: str
    tools: tuple[str, ...]
    responses: Mapping[str, tuple[str, ...]]
    traits: tuple[str, ...] = ()


@runtime_checkable
class Dictionary(Protocol):
    """What the maths rooms need of an SAE; every SAELens `SAE` satisfies it."""

    W_dec: Tensor

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, feature_acts: Tensor) -> Tensor: ...


@runtime_checkable
class Change(Protocol):
    """What to add to an activation. `hook_name` is where its vector or dictionary belongs, if
    known.

    `batch_rows` is the number of batch rows it was written for (per-row strengths); 1 fits any
    batch.
    """

    @property
    def hook_name(self) -> str | None: ...

    @property
    def batch_rows(self) -> int: ...

    def prepare(self, *, dtype: torch.dtype, device: torch.device | str) -> PreparedChange: ...


@runtime_checkable
class PreparedChange(Protocol):
    """A change made ready for one site, dtype and device: `x -> what to add to x`.

    The result broadcasts against `x`. `constant` is that result when it does not depend on `x`
    (shape `[1 or batch, 1, d_model]`), else None; `idle` is True when it is zero for every `x`.
    `reads_context` is True when it needs all earlier tokens in the same call (a temporal SAE).
    """

    @property
    def constant(self) -> Tensor | None: ...

    @property
    def idle(self) -> bool: ...

    @property
    def reads_context(self) -> bool: ...

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Edit:
    """A change, the hook point it is made at, the tokens, and the batch rows.

    `hook_name` defaults to the place the change belongs to. `rows` are batch rows (all when None).
    """

    change: Change
    hook_name: str | None = None
    positions: Positions = ALL
    rows: Sequence[int] | None = None

    @property
    def site(self) -> str:
        name = self.hook_name or self.change.hook_name
        if not name:
            raise ValueError(
                f"{type(self.change).__name__} does not know its hook point: pass hook_name= to "
                "Edit"
            )
        return name
