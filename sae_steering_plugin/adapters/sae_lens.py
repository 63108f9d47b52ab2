"""SAELens as a host: steering vectors as one of its dictionaries, and its SAEs loaded and named.

A `SteeringDictionary` is an ordinary SAELens `SAE` of architecture `"steering"`. Its decoder rows
are the vectors, its codes are their signed coordinates, and `save_model`, `SAE.load_from_disk` and
attaching to a model are SAELens's own. Importing this module registers the architecture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig, register_sae_class
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor, nn

from sae_steering_plugin.adapters.dictionary_rows import (
    Row,
    first_of,
    index_bytes,
    indices_from_bytes,
    metadata_record,
    only_model,
    read_out,
    rows_of,
    spread_out,
)
from sae_steering_plugin.adapters.sae_parts import architecture, decoder_rows, site_names
from sae_steering_plugin.types import ALL, Positions, Recipe, SparseCodes, SteeringVector, escaped

ARCHITECTURE = "steering"
HASHED_ROWS = 64
"""Decoder rows, evenly spaced, that the content hash of `sae_id` reads."""


@dataclass
class SteeringDictionaryConfig(SAEConfig):
    """An SAELens config; `codes_per_row[i]` counts the base latents that row i is written in.

    SAELens builds it from JSON, so `metadata` may arrive as a mapping and counts as a list.
    """

    apply_b_dec_to_input: bool = False
    metadata: Any = field(default_factory=SAEMetadata)
    codes_per_row: Sequence[int] = ()

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.codes_per_row = tuple(int(count) for count in self.codes_per_row)
        if self.normalize_activations != "none":
            raise ValueError(
                f"a steering dictionary has normalize_activations='none', not "
                f"{self.normalize_activations!r}: its rows are added to the residual as they are"
            )
        if len(self.codes_per_row) not in (0, self.d_sae) or min(self.codes_per_row, default=0) < 0:
            raise ValueError(f"codes_per_row must count the codes of each of {self.d_sae} rows")


class SteeringDictionary(SAE[SteeringDictionaryConfig]):
    """Steering vectors of one hook point as an SAELens dictionary of architecture `"steering"`.

    `W_dec[i]` is vector i with its own length, so adding `a` to code i at `hook_sae_acts_post` adds
    `a` times the vector: the unit of a code is `raw`. Code i reads `x @ v_i / (v_i @ v_i)`, signed,
    which is `a` for `x = a * v_i` whatever the other rows are; rows that are not orthogonal see
    each other. Attach with `use_error_term=True`, and in the model's dtype: without an edit the
    model is then unchanged (to the rounding of one addition), whatever the rows.

    Labels, recipes and positions live in `cfg.metadata.steering`; `stability` and `spread` are
    buffers of one float per row, NaN where not measured. `code_indices` and `code_values` hold the
    sparse form of SAS vectors, row after row.
    """

    b_enc: nn.Parameter
    stability: Tensor
    spread: Tensor
    code_indices: Tensor
    code_values: Tensor

    @classmethod
    def from_vectors(
        cls,
        vectors: Sequence[SteeringVector],
        *,
        positions: Positions | Sequence[Positions] = ALL,
        stability: Sequence[float] | None = None,
        spread: Sequence[float] | None = None,
        model_name: str | None = None,
        prepend_bos: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> SteeringDictionary:
        """The dictionary whose rows are `vectors`; `.vectors()` gives them back bit for bit.

        All vectors belong to one hook point and have one width. `positions` (one for all, or one
        each) records where they are meant to act. `model_name` is read from the recipes when they
        agree. Raises ValueError for no vectors, several sites, widths or models, repeated labels.
        """
        vectors = list(vectors)
        labels = [v.label for v in vectors if v.label]
        if len(set(labels)) < len(labels):
            raise ValueError(f"labels of one dictionary must differ; given are {labels}")
        rows = [
            Row(v.label, v.recipe, where, *((v.codes.sae_id, v.codes.d_sae) if v.codes else ()))
            for v, where in zip(vectors, spread_out(positions, len(vectors)), strict=True)
        ]
        config = SteeringDictionaryConfig(
            d_in=len(first_of(vectors, "width", lambda v: len(v.vector)).vector),
            d_sae=len(vectors),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            codes_per_row=tuple(len(v.codes.indices) if v.codes else 0 for v in vectors),
            metadata=SAEMetadata(
                hook_name=first_of(vectors, "hook point", lambda v: v.hook_name).hook_name,
                model_name=model_name or only_model(vectors),
                prepend_bos=prepend_bos,
                steering=metadata_record(rows),
            ),
        )
        dictionary = cls(config)
        coded = [v.codes for v in vectors if v.codes]
        state = {"W_dec": torch.stack([v.vector for v in vectors])}
        if coded:
            state["code_indices"] = index_bytes(torch.cat([codes.indices for codes in coded]))
            state["code_values"] = torch.cat([codes.values for codes in coded])
        for name, figures in (("stability", stability), ("spread", spread)):
            if figures is not None:
                state[name] = torch.tensor(list(figures))
                if len(state[name]) != len(vectors):
                    raise ValueError(f"{name} has {len(state[name])} entries, not {len(vectors)}")
        dictionary.process_state_dict_for_loading(state)
        dictionary.load_state_dict(state)
        return dictionary

    @classmethod
    def from_features(
        cls, sae: Any, features: Sequence[int], *, labels: Sequence[str] = (), **options: Any
    ) -> SteeringDictionary:
        """The dictionary of decoder rows `features` of `sae`, at the hook point the SAE writes to.

        Rows are those `decode` multiplies codes with. `options` are those of `from_vectors`. Raises
        IndexError for a feature the SAE lacks.
        """
        width = int(sae.cfg.d_sae)
        outside = [feature for feature in features if not 0 <= feature < width]
        if outside:
            raise IndexError(f"feature {outside[0]} lies outside 0..{width - 1} of this SAE")
        if labels and len(labels) != len(features):
            raise ValueError(f"labels has {len(labels)} entries, not {len(features)}")
        name, identity = sae.cfg.metadata.model_name or "", sae_id(sae)
        rows = decoder_rows(sae, list(features)).cpu() if features else ()
        vectors = [
            SteeringVector(
                vector=row.clone(),
                hook_name=site_names(sae)[1],
                label=labels[i] if labels else f"feature {features[i]}",
                recipe=Recipe(
                    method="feature",
                    model_name=name,
                    sae_id=identity,
                    row_norm=float(row.norm()),
                    settings={"feature": int(features[i])},
                ),
            )
            for i, row in enumerate(rows)
        ]
        return cls.from_vectors(vectors, **options)

    def initialize_weights(self) -> None:
        """Zero rows that read and write nothing, of the sizes the config gives."""
        d_in, d_sae = self.cfg.d_in, self.cfg.d_sae
        kw: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in, **kw))
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae, **kw))
        self.b_dec = nn.Parameter(torch.zeros(d_in, **kw))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, **kw))
        self.register_buffer("stability", torch.full((d_sae,), torch.nan, **kw))
        self.register_buffer("spread", torch.full((d_sae,), torch.nan, **kw))
        n_codes = sum(self.cfg.codes_per_row)
        self.register_buffer(
            "code_indices", torch.zeros(n_codes, dtype=torch.long, device=self.device)
        )
        self.register_buffer("code_values", torch.zeros(n_codes, **kw))
        self.rows()  # a file whose metadata does not describe its rows stops here

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return nn.Identity()

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Signed coordinates: code i of `a * v_i` is `a`."""
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(self.activation_fn(pre))

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """The sum of the rows, each times its code."""
        out = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """Refused with NotImplementedError, as SAELens does where folding changes a meaning."""
        raise NotImplementedError(
            "the rows of a steering dictionary keep their lengths, because these are the unit of "
            "its codes; for unit rows build it from vectors whose .vector is v.direction"
        )

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        state_dict["code_indices"] = index_bytes(state_dict["code_indices"])

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Complete a state that holds at least `W_dec`, after SAELens cast it all to one dtype."""
        if "code_indices" in state_dict:
            state_dict["code_indices"] = indices_from_bytes(state_dict["code_indices"])
        if "W_dec" not in state_dict:
            return
        rows = state_dict["W_dec"]
        nothing = torch.full_like(rows[:, 0], torch.nan)
        state_dict.setdefault("W_enc", read_out(rows))
        state_dict.setdefault("b_dec", torch.zeros_like(rows[0]))
        state_dict.setdefault("b_enc", torch.zeros_like(rows[:, 0]))
        state_dict.setdefault("stability", nothing)
        state_dict.setdefault("spread", nothing.clone())
        if not sum(self.cfg.codes_per_row):
            state_dict.setdefault("code_indices", torch.zeros_like(rows[0, :0], dtype=torch.long))
            state_dict.setdefault("code_values", torch.zeros_like(rows[0, :0]))

    def rows(self) -> tuple[Row, ...]:
        """The record beside each row. Raises ValueError where the metadata does not fit them."""
        return rows_of(dict(self.cfg.metadata.items()), self.cfg.d_sae)

    def vectors(self) -> list[SteeringVector]:
        """The rows as steering vectors, in float32, with their labels, recipes and sparse codes."""
        hook_name = site_names(self)[1]
        weights = self.W_dec.detach().float()
        starts = [0]
        for count in self.cfg.codes_per_row or (0,) * self.cfg.d_sae:
            starts.append(starts[-1] + count)
        return [
            SteeringVector(
                weights[i].clone(), hook_name, row.recipe, row.label, self._codes(row, *span)
            )
            for i, (row, span) in enumerate(
                zip(self.rows(), zip(starts, starts[1:], strict=False), strict=True)
            )
        ]

    def vector(self, label: str) -> SteeringVector:
        """The vector of that label. Raises KeyError with the nearest labels."""
        labels = [row.label for row in self.rows()]
        if label not in labels:
            near = get_close_matches(label, labels, n=3) or labels[:5]
            raise KeyError(f"no vector labelled {label!r} in this dictionary; nearest are {near}")
        return self.vectors()[labels.index(label)]

    def _codes(self, row: Row, start: int, stop: int) -> SparseCodes | None:
        if not row.base_id:
            return None
        return SparseCodes(
            indices=self.code_indices[start:stop].clone(),
            values=self.code_values[start:stop].detach().float().clone(),
            d_sae=row.base_width,
            sae_id=row.base_id,
        )

    def _repr_html_(self) -> str:
        cells = ""
        for i, (row, vector) in enumerate(zip(self.rows(), self.vectors(), strict=True)):
            shown = [
                *(str(i), row.label, row.recipe.method, f"{vector.norm:.4g}", row.recipe.unit),
                *(str(row.positions), row.base_id if vector.codes else ""),
                *("" if f.isnan() else f"{f:.3g}" for f in (self.stability[i], self.spread[i])),
            ]
            cells += "<tr>" + "".join(f"<td>{escaped(value)}</td>" for value in shown) + "</tr>"
        names = ["row", "label", "method", "length", "unit", "positions", "codes of"]
        names += ["stability", "spread"]
        head = "".join(f"<th>{name}</th>" for name in names)
        caption = f"SteeringDictionary at {escaped(self.cfg.metadata.hook_name)}"
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{cells}</table>"


def sae_id(sae: Any) -> str:
    """A name that stays with an SAE however it was loaded: `where it comes from#content hash`.

    The part before `#` is for people: the release and id that `load_sae` noted, `metadata.sae_id`,
    or architecture and hook point. The hash reads the size and up to `HASHED_ROWS` decoder rows
    (rounded to bfloat16, so that either dtype gives one id). Two ids mean one SAE when their hashes
    agree: compare with `same_sae`.
    """
    metadata = sae.cfg.metadata
    name = metadata.sae_id or f"{architecture(sae)}@{metadata.hook_name}"
    return f"{f'{metadata.release}:{name}' if metadata.release else name}#{content_hash(sae)}"


def content_hash(sae: Any) -> str:
    """Twelve hexadecimal digits of SHA-256 over the size and a sample of the decoder rows."""
    rows = sae.W_dec.detach()
    if rows.is_meta:
        raise ValueError("this SAE has no weights yet (device 'meta'), so it has no identity")
    step = max(1, len(rows) // HASHED_ROWS)
    sample = rows[::step][:HASHED_ROWS].to("cpu", torch.bfloat16).contiguous()
    digest = hashlib.sha256(repr(tuple(rows.shape)).encode())
    digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:12]


def same_sae(one: str, other: str) -> bool:
    """True when two ids of `sae_id` name the same weights."""
    return one.rpartition("#")[2] == other.rpartition("#")[2]


def load_sae(spec: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The SAE that `spec` names, by SAELens's own loaders, in evaluation mode.

    `spec` is a folder written by `save_model`, or `release:sae_id` of SAELens's list (or
    `owner/repository:folder` on the hub). `dtype` defaults to the file's own, for a release to
    float32. Raises FileNotFoundError when the SAE is neither on disk nor reachable, ValueError for
    a name that does not exist, with the nearest ones.
    """
    word = None if dtype is None else str(dtype).removeprefix("torch.")
    if Path(spec).is_dir():
        return saved_sae(Path(spec), device, word)
    release, colon, name = str(spec).partition(":")
    if not colon or not name:
        raise FileNotFoundError(
            f"{str(spec)!r} is no folder here and not of the form release:sae_id, for example "
            "gpt2-small-res-jb:blocks.8.hook_resid_pre"
        )
    return released_sae(release, name, device, word or "float32")


def saved_sae(folder: Path, device: str, dtype: str | None) -> Any:
    """The SAE in a local folder."""
    missing = [n for n in ("cfg.json", "sae_weights.safetensors") if not (folder / n).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} holds no {missing[0]}: it is not a folder of save_model")
    try:
        kind = json.loads((folder / "cfg.json").read_text()).get("architecture", "standard")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'cfg.json'} is not a JSON object: {error}") from error
    if kind not in SAE_CLASS_REGISTRY:
        raise ValueError(
            f"{folder} holds an SAE of architecture {kind!r}; SAELens can run "
            f"{', '.join(sorted(SAE_CLASS_REGISTRY))}. A training checkpoint must be saved with "
            "save_inference_model first"
        )
    return SAE.load_from_disk(folder, device=device, dtype=dtype).eval()


def released_sae(release: str, name: str, device: str, dtype: str) -> Any:
    """The SAE of a SAELens release, from the hub or its local cache, marked with its origin."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    if release not in releases and "/" not in release:
        near = get_close_matches(release, releases, n=3)
        raise ValueError(f"SAELens knows no release {release!r}; nearest are {near}")
    if release in releases and name not in releases[release].saes_map:
        ids = releases[release].saes_map
        near = get_close_matches(name, ids, n=3) or list(ids)[:3]
        raise ValueError(f"release {release!r} has no SAE {name!r}; nearest are {near}")
    try:
        sae = SAE.from_pretrained(release, name, device=device, dtype=dtype).eval()
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise FileNotFoundError(
            f"{release}:{name} is not in the local Hugging Face cache and cannot be downloaded "
            "from here: fetch it where there is a network (unset HF_HUB_OFFLINE), or save it there "
            "with save_model and pass the folder"
        ) from error
    sae.cfg.metadata.release, sae.cfg.metadata.sae_id = release, name
    return sae


def register() -> None:
    """Make SAELens know the architecture; a reload of this module replaces its own older class."""
    known = SAE_CLASS_REGISTRY.get(ARCHITECTURE)
    if known is not None and known[0].__module__ != __name__:
        raise ValueError(
            f"{known[0].__module__} has already registered architecture {ARCHITECTURE!r}"
        )
    SAE_CLASS_REGISTRY.pop(ARCHITECTURE, None)
    register_sae_class(ARCHITECTURE, SteeringDictionary, SteeringDictionaryConfig)


register()
