"""Activation statistics of all features in one pass over texts, or during a run that happens
anyway."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_steering_plugin.adapters.activations import (
    TokenBatch,
    activations_at,
    bos_policy,
    encode_texts,
    model_name,
    padded,
)
from sae_steering_plugin.adapters.active_codes import Encoder, active_encoder
from sae_steering_plugin.adapters.narrow_products import sieving
from sae_steering_plugin.adapters.reading import reading
from sae_steering_plugin.adapters.sae_lens import sae_id
from sae_steering_plugin.adapters.sae_parts import site_names
from sae_steering_plugin.adapters.transformer_lens import bos_token
from sae_steering_plugin.features.coactivation import (
    PANEL,
    ActiveCodes,
    coactivation_of,
)
from sae_steering_plugin.features.stream import ACTIVE, FeatureStream
from sae_steering_plugin.runs.collect import require_fit
from sae_steering_plugin.runs.feature_tables import (
    chosen_features,
    decoder_geometry,
    logit_footprint,
    table_of,
)
from sae_steering_plugin.types import FeatureTable

FAMILIES = ("activation", "coactivation", "geometry", "logit")
"""Predictor families of arXiv 2606.08365; what each computes stands beside its function."""

FORMAT = "sae-steering-plugin feature statistics 1"

COUNTED_TOGETHER = 100_000
"""Tokens that co-activation is counted over, evenly spaced among all: 4 bytes per active feature
are kept of each."""


@dataclass(eq=False)
class FeatureRecorder:
    """What is known of the features so far: a stream over all tokens, one over final tokens, and
    which features were active together.

    `see` takes one batch of activations. Two recorders of two halves `merge` into that of the
    whole.
    """

    sae: Any
    encode: Encoder
    tokens: FeatureStream
    finals: FeatureStream
    codes: ActiveCodes | None
    sieve: bool = False

    @classmethod
    def of(
        cls, sae: Any, *, top: int = 0, together: bool = True, sieve: bool | None = None
    ) -> FeatureRecorder:
        """A recorder that has seen nothing; `together=False` leaves co-activation out. For `sieve`
        see `active_encoder`; None decides by how fast this machine is at bfloat16."""
        n = int(sae.W_dec.shape[0])
        codes = ActiveCodes(n) if together else None
        tokens, finals = FeatureStream.empty(n, top=top), FeatureStream.empty(n)
        narrow = sieving(sieve, sae.W_dec.device)
        encode = active_encoder(sae, sieve=narrow)
        return cls(sae, encode, tokens, finals, codes, narrow)

    def see(
        self,
        x: Tensor,
        counted: Bool[Tensor, "batch pos"],
        final: Bool[Tensor, "batch pos"],
        *,
        ids: Int[Tensor, "batch pos"] | None = None,
        kept: Callable[[int], bool] | None = None,
    ) -> None:
        """Take in one batch: activations [batch pos d], which tokens count, which are final.

        `ids` number the tokens for the top examples (default: in order of appearance). `kept` says
        of the i-th counted token of the stream whether co-activation counts it.
        """
        if not bool(counted.any()):
            return
        seen = self.tokens.n
        hits = self.encode(x, counted)
        features, values = hits.features.cpu(), hits.values.cpu()
        owner = hits.tokens.cpu()
        numbers = torch.arange(seen, seen + hits.n) if ids is None else ids[counted.to(ids.device)]
        self.tokens.update(features, values, hits.n, ids=numbers.cpu()[owner])
        last = final[counted.to(final.device)].cpu()
        if bool(last.any()):
            at_end = last[owner]
            self.finals.update(features[at_end], values[at_end], int(last.sum()))
        if self.codes is None:
            return
        active = values.abs() > ACTIVE
        owner, features = owner[active], features[active]
        if kept is None:
            self.codes.add(owner, features, hits.n)
            return
        chosen = torch.tensor([kept(seen + i) for i in range(hits.n)], dtype=torch.bool)
        place = chosen.long().cumsum(0) - 1
        here = chosen[owner]
        self.codes.add(place[owner[here]], features[here], int(chosen.sum()))

    def merge(self, other: FeatureRecorder) -> FeatureRecorder:
        """The recorder of both. Raises ValueError for one of another dictionary."""
        if sae_id(self.sae) != sae_id(other.sae):
            raise ValueError(f"{sae_id(self.sae)!r} and {sae_id(other.sae)!r} do not merge")
        if (self.codes is None) != (other.codes is None):
            raise ValueError("one recorder counts co-activation and the other does not")
        codes = None
        if self.codes is not None and other.codes is not None:
            codes = self.codes.merge(other.codes)
        streams = (self.tokens.merge(other.tokens), self.finals.merge(other.finals))
        return FeatureRecorder(self.sae, self.encode, *streams, codes, self.sieve)

    def columns(self, *, panel: int | None = PANEL) -> tuple[dict[str, Any], dict[str, Any]]:
        """The columns of the activation families, and their settings."""
        if not self.tokens.n:
            raise ValueError("no token was seen")
        found: dict[str, Any] = self.tokens.columns("token", shape=True)
        settings: dict[str, Any] = {"n_tokens": self.tokens.n, "n_final": self.finals.n}
        if self.finals.n:
            found |= self.finals.columns("final", shape=False)
        if self.codes is not None:
            together = coactivation_of(self.codes, panel=panel)
            settings |= together.settings
            found |= together.columns
        if self.tokens.top:
            values = self.tokens.top_values
            found["top_activations"] = list(np.where(np.isfinite(values), values, np.nan))
            found["top_tokens"] = list(self.tokens.top_ids)
        settings["dead"] = int((self.tokens.active == 0).sum())
        return found, settings

    def table(self, *, panel: int | None = PANEL) -> FeatureTable:
        """What was seen as a feature table."""
        columns, settings = self.columns(panel=panel)
        return table_of(self.sae, torch.arange(self.tokens.n_features), columns, settings)

    def save(self, path: Path, about: dict[str, str]) -> None:
        """Write everything to one safetensors file; a crash leaves the old file or the new one."""
        from safetensors.torch import save_file

        parts = {"tokens": self.tokens.state(), "finals": self.finals.state()}
        if self.codes is not None:
            parts["codes"] = self.codes.state()
        flat = {f"{part}.{k}": v.contiguous() for part, s in parts.items() for k, v in s.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        save_file(flat, new, metadata=about)
        new.replace(path)

    def load(self, path: Path) -> FeatureRecorder:
        """This recorder as it was when `path` was saved."""
        from safetensors.torch import load_file

        found = load_file(path)

        def part(name: str) -> dict[str, Tensor]:
            head = f"{name}."
            return {k.removeprefix(head): v for k, v in found.items() if k.startswith(head)}

        n = self.tokens.n_features
        codes = None if self.codes is None else ActiveCodes.from_state(part("codes"), n)
        tokens, finals = (FeatureStream.from_state(part(name)) for name in ("tokens", "finals"))
        return FeatureRecorder(self.sae, self.encode, tokens, finals, codes, self.sieve)


@contextmanager
def record_statistics(
    model: Any, sae: Any, *, top: int = 0, together: bool = True
) -> Iterator[FeatureRecorder]:
    """Statistics as a by-product of every forward pass inside the block, at the SAE's site.

    Gives the recorder; `recorder.table()` when done. Real tokens but a leading BOS count, once each
    with or without cache; "final" tokens are the last ones of prompts. Edits put on the site before
    are seen in effect. Raises RuntimeError at the end when no forward pass reached the site.
    """
    recorder = FeatureRecorder.of(sae, top=top, together=together)
    fired = False

    def see(x: Tensor, counted: Tensor, final: Tensor) -> None:
        nonlocal fired
        fired = True
        recorder.see(x.float(), counted, final)

    hook_name = site_names(sae)[0]
    with reading(model, hook_name, see):
        yield recorder
    if not fired:
        raise RuntimeError(f"no forward pass reached {hook_name!r}: nothing was recorded")


def feature_statistics(
    model: Any,
    sae: Any,
    data: Tensor | Sequence[str],
    *,
    real: Bool[Tensor, "text pos"] | None = None,
    families: Sequence[str] = FAMILIES,
    panel: int | None = PANEL,
    counted_together: int = COUNTED_TOGETHER,
    top: int = 0,
    prepend_bos: bool | None = None,
    max_tokens: int | None = None,
    batch_size: int = 16,
    sieve: bool | None = None,
    file: str | Path | None = None,
    save_every: int = 64,
    progress: bool = True,
) -> FeatureTable:
    """What forecasts are made from: a row per feature, from clean passes and weights alone.

    `data` are texts, or tokens [text, pos] (`real` marks what is no padding; all by default).
    Padding and a leading BOS never count. Families and their columns:

    - "activation": `token_act_freq`, `token_mean`, `token_std`, `token_max`, `token_q95` over all
      tokens, the same with `final_` over each text's last token; `binary_entropy`,
      `activation_entropy_norm`, `kurtosis` (not excess) over all tokens. A feature is active above
      1e-6. Quantiles come from a histogram (`features.stream.bins_per_octave`).
    - "coactivation": see `features.coactivation.coactivation_of`, over `counted_together` evenly
      spaced tokens and the `panel` most frequent features (None: all).
    - "geometry" and "logit": see `decoder_geometry` and `logit_footprint` (without word lists).

    A feature that is never active keeps its row; what is undefined for it is NaN, and
    `settings["dead"]` counts such features. `top` adds the largest activations and their tokens
    (`text * settings["longest"] + position`). With `file` the pass is saved every `save_every`
    batches; the same call goes on from there and gives the same table bit for bit. `sieve`
    multiplies in bfloat16 first (`active_encoder`, `decoder_geometry`); None decides by how fast
    this machine is at it.

    Memory does not grow with the data but for co-activation. Nothing is steered. Raises ValueError
    for an unknown family, no data, an SAE of another width, a text that is empty or too long, and a
    `file` of another run. Source: arXiv 2606.08365.
    """
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown or not families:
        raise ValueError(f"no family {(unknown or [''])[0]!r}; choose among {', '.join(FAMILIES)}")
    everything = torch.arange(int(sae.W_dec.shape[0]))
    table = table_of(sae, everything, {}, {"families": list(families)})
    if {"activation", "coactivation"} & set(families):
        passed = _Pass(model, sae, _texts(model, sae, data, real, prepend_bos, max_tokens))
        together = "coactivation" in families
        narrow = _begun_with(file) if sieve is None else sieve
        recorder = passed.run(
            FeatureRecorder.of(sae, top=top, together=together, sieve=narrow),
            counted_together,
            batch_size,
            None if file is None else Path(file),
            save_every,
            progress,
        )
        columns, settings = recorder.columns(panel=panel)
        settings["sieve"] = recorder.sieve
        if "activation" not in families:
            columns = {name: v for name, v in columns.items() if name.startswith("coact_")}
        table = table.join(table_of(sae, everything, columns, {**settings, **passed.settings()}))
    if "geometry" in families:
        table = table.join(decoder_geometry(sae, sieve=sieve, progress=progress))
    if "logit" in families:
        table = table.join(logit_footprint(model, sae, top=0, progress=progress))
    return table


def coactivation(
    model: Any,
    sae: Any,
    data: Tensor | Sequence[str],
    *,
    real: Bool[Tensor, "text pos"] | None = None,
    features: Sequence[int] | Tensor | None = None,
    panel: int | None = None,
    k: int = 10,
    by: str = "jaccard",
    keep_self: bool = False,
    prepend_bos: bool | None = None,
    max_tokens: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> FeatureTable:
    """Which features fire together, over all pairs (`panel=None`) or against the most frequent.

    Columns: those of `features.coactivation.coactivation_of`, and with `k` the lists `partners` and
    `partner_similarity`, best first (shorter lists are filled with -1 and NaN). The codes of every
    token are kept, 4 bytes per active feature; the pair matrix never is. For `data`, `real` and
    what counts see `feature_statistics`.
    """
    passed = _Pass(model, sae, _texts(model, sae, data, real, prepend_bos, max_tokens))
    recorder = passed.run(
        FeatureRecorder.of(sae), passed.texts.counted, batch_size, None, 1, progress
    )
    assert recorder.codes is not None
    found = coactivation_of(recorder.codes, panel=panel, k=k, by=by, keep_self=keep_self)
    columns: dict[str, Any] = dict(found.columns)
    if k:
        columns["partners"] = list(found.partners.numpy())
        columns["partner_similarity"] = list(found.similarity.numpy())
    everything = torch.arange(recorder.tokens.n_features)
    settings = {**found.settings, **passed.settings(), "n_tokens": recorder.tokens.n}
    table = table_of(sae, everything, columns, settings)
    return table if features is None else table.of(chosen_features(features, len(everything)))


@dataclass(frozen=True, eq=False)
class _Texts:
    """Texts as batches, in an order that keeps padding small; `counted` tokens in all."""

    batch: Callable[[Sequence[int]], TokenBatch]
    lengths: tuple[int, ...]
    counted: int
    prepend_bos: bool | None
    digest: str

    def batches(self, size: int) -> list[list[int]]:
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        return [order[first : first + size] for first in range(0, len(order), size)]


def _texts(
    model: Any,
    sae: Any,
    data: Tensor | Sequence[str],
    real: Tensor | None,
    prepend_bos: bool | None,
    max_tokens: int | None,
) -> _Texts:
    """Tokens or texts made ready, checked before the first forward pass."""
    if not len(data):
        raise ValueError("there are no texts to take statistics of")
    if isinstance(data, Tensor):
        if prepend_bos is not None or max_tokens is not None:
            raise ValueError("prepend_bos and max_tokens are for texts; tokens are taken as given")
        return _given_tokens(model, data, real)
    if real is not None:
        raise ValueError("real goes with tokens; texts know their own length")
    bos = bos_policy(model, sae, prepend_bos)
    encoded = encode_texts(model, data, prepend_bos=bos, max_tokens=max_tokens)
    digest = hashlib.sha256(repr([text.tokens for text in encoded]).encode())
    return _Texts(
        lambda chosen: padded(model, [encoded[i] for i in chosen]),
        tuple(map(len, encoded)),
        sum(len(text) - int(text.leading_bos) for text in encoded),
        bos,
        digest.hexdigest(),
    )


def _given_tokens(model: Any, tokens: Tensor, real: Tensor | None) -> _Texts:
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ValueError(f"tokens are integers [text, pos], not {tuple(tokens.shape)}")
    mask = torch.ones_like(tokens, dtype=torch.bool) if real is None else real.bool()
    if mask.shape != tokens.shape:
        raise ValueError(f"real has shape {tuple(mask.shape)} and tokens {tuple(tokens.shape)}")
    tokens, mask = tokens.cpu(), mask.cpu()
    place = mask.long().argmax(1)
    first = tokens.gather(1, place[:, None])[:, 0]
    bos = bos_token(model)
    leading = torch.zeros(len(tokens), dtype=torch.bool) if bos is None else first == bos
    lengths = mask.sum(1)
    empty = (lengths - leading.long() < 1).nonzero().flatten()
    if len(empty):
        raise ValueError(f"text {int(empty[0])} is empty: it has no token to read")
    digest = hashlib.sha256(tokens.numpy().tobytes() + mask.numpy().tobytes())

    def batch(chosen: Sequence[int]) -> TokenBatch:
        rows = torch.tensor(chosen)
        return TokenBatch(tokens[rows], mask[rows], place[rows], leading[rows])

    counted = int((lengths - leading.long()).sum())
    return _Texts(batch, tuple(lengths.tolist()), counted, None, digest.hexdigest())


@dataclass(frozen=True, eq=False)
class _Pass:
    """One pass over the texts into a recorder."""

    model: Any
    sae: Any
    texts: _Texts

    def settings(self) -> dict[str, Any]:
        return {
            "model_name": model_name(self.model),
            "hook_name": site_names(self.sae)[0],
            "n_texts": len(self.texts.lengths),
            "longest": max(self.texts.lengths),
            "prepend_bos": self.texts.prepend_bos,
            "texts": self.texts.digest,
        }

    def run(
        self,
        recorder: FeatureRecorder,
        together: int,
        batch_size: int,
        file: Path | None,
        save_every: int,
        progress: bool,
    ) -> FeatureRecorder:
        if batch_size < 1 or save_every < 1 or together < 1:
            raise ValueError("batch_size, save_every and counted_together are at least 1")
        hook_name = site_names(self.sae)[0]
        batches = self.texts.batches(batch_size)
        key = self._key(recorder, together, batch_size)
        recorder, done = self._begun(recorder, file, key)
        total = self.texts.counted
        every = None if together >= total else _evenly(together, total)
        longest = max(self.texts.lengths)
        with tqdm(
            total=len(self.texts.lengths), desc="statistics", unit="text", disable=not progress
        ) as bar:
            bar.update(sum(map(len, batches[:done])))
            for number, chosen in enumerate(batches[done:], done):
                batch = self.texts.batch(chosen)
                x = activations_at(self.model, hook_name, batch)
                if number == done:
                    require_fit(self.sae, hook_name, x.flatten(0, 1), None)
                numbers = batch.real.long().cumsum(1) - 1
                ids = torch.tensor(chosen)[:, None] * longest + numbers
                final = batch.real & (numbers == batch.real.sum(1, keepdim=True) - 1)
                recorder.see(x, batch.counted, final, ids=ids, kept=every)
                bar.update(len(chosen))
                finished = number + 1
                if file is not None and (finished % save_every == 0 or finished == len(batches)):
                    about = {"format": FORMAT, "key": key, "batches": str(finished)}
                    recorder.save(file, {**about, "sieve": str(recorder.sieve)})
        return recorder

    def _key(self, recorder: FeatureRecorder, together: int, batch_size: int) -> str:
        """A digest of whatever decides the figures."""
        options = [recorder.tokens.top, recorder.codes is not None, together, batch_size]
        about = [self.settings(), sae_id(self.sae), options]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def _begun(
        self, recorder: FeatureRecorder, file: Path | None, key: str
    ) -> tuple[FeatureRecorder, int]:
        """The recorder as the file left it, and the number of batches behind it."""
        if file is None or not file.exists():
            return recorder, 0
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
        if about.get("format") != FORMAT or about.get("key") != key:
            raise ValueError(
                f"{file} belongs to another run (other texts, dictionary or options): give another "
                "file, or remove it"
            )
        return recorder.load(file), int(about["batches"])


def _begun_with(file: str | Path | None) -> bool | None:
    """Whether the pass that `file` holds was sieved; None without one."""
    if file is None or not Path(file).exists():
        return None
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        word = (opened.metadata() or {}).get("sieve")
    return None if word is None else word == "True"


def _evenly(wanted: int, total: int) -> Callable[[int], bool]:
    """Says of each of `total` tokens whether it is among `wanted` evenly spaced ones."""
    return lambda i: (i + 1) * wanted // total > i * wanted // total


__all__ = [
    "FAMILIES",
    "FeatureRecorder",
    "coactivation",
    "feature_statistics",
    "record_statistics",
]
