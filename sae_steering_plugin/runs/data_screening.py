"""Data looked at before training: along which concepts it differs from what the model does anyway.

`projection_difference` compares given answers with the model's own, `preference_disparity` the two
sides of preference pairs; both tell it per concept and per sample, without gradients. Sources:
persona vectors, arXiv 2507.21509; Anatomy of Post-Training, arXiv 2606.12360 (from a reading note).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_steering_plugin.adapters.activations import (
    activations_at,
    bos_policy,
    encode_texts,
    padded,
    read_site,
)
from sae_steering_plugin.adapters.training_hooks import linear_decoder
from sae_steering_plugin.concepts import disparity, shift_along
from sae_steering_plugin.runs.pooled_codes import collect_codes, first_token
from sae_steering_plugin.types import SteeringVector, escaped


@dataclass(frozen=True, eq=False)
class DataScreen:
    """One number per sample and concept; `what` says which.

    Concepts are latents of an SAE, or the steering vectors asked for. `table` gives mean over
    samples, its standard error and the mean in standard errors (`z`).
    """

    per_sample: Float[Tensor, "sample concept"]
    what: str
    labels: Mapping[int, str] = field(default_factory=dict)

    @property
    def mean(self) -> Float[Tensor, " concept"]:
        return self.per_sample.mean(0)

    def table(self) -> Any:
        import pandas as pd

        n = len(self.per_sample)
        error = self.per_sample.std(0) / n**0.5 if n > 1 else torch.full_like(self.mean, torch.nan)
        found = pd.DataFrame(
            {
                "concept": range(len(self.mean)),
                "mean": self.mean,
                "se": error,
                "z": self.mean / torch.where(error > 0, error, torch.nan),
            }
        )
        if self.labels:
            found["label"] = [self.labels.get(j, "") for j in found["concept"]]
        return found

    def top(self, k: int = 20) -> Any:
        """The k concepts with the largest mean, in size."""
        found = self.table()
        order = found["mean"].abs().sort_values(ascending=False, kind="stable").index
        return found.loc[order].head(k).reset_index(drop=True)

    def ranked(self, concept: int) -> list[int]:
        """Numbers of the samples, those that would teach the concept most first."""
        return self.per_sample[:, concept].argsort(descending=True, stable=True).tolist()

    def _repr_html_(self) -> str:
        body = self.top(10).to_html(index=False, float_format="%.4g")
        return f"<p>{escaped(self.what)}, {len(self.per_sample)} samples</p>{body}"


def projection_difference(
    model: Any,
    along: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    own: Sequence[str] | None = None,
    labels: Mapping[int, str] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> DataScreen:
    """How far answers lie from the model's own along each concept, in residual units.

    Per sample (a(x, y) - a(x, y')) . d / |d|: a is the mean activation over the tokens of an
    answer, y the given one and y' `own`, what the model itself answers to x (`generate`). Without
    `own` the activation of the prompt's last token takes the place of a(x, y'), which costs no
    generation. `along` is an SAE (every latent's row) or a list of steering vectors of one site.
    Source: arXiv 2507.21509 (per direction; that an SAE's rows take the direction's place, and the
    cheaper variant, are this project's).

    Raises ValueError for lists of unequal length, an answer without a token, and as
    `linear_decoder` for an SAE.
    """
    if own is not None and len(own) != len(prompts):
        raise ValueError(f"own has {len(own)} answers for {len(prompts)} prompts")
    rows, hook_name, sae = directions(along)
    bos = bos_policy(model, sae, prepend_bos)
    texts = Answers(model, prompts, responses, hook_name, bos, batch_size, progress)
    data, last = texts.means()
    if own is None:
        base, what = last, "projection of answers less that of the prompt's last token"
    else:
        other = Answers(model, prompts, own, hook_name, bos, batch_size, progress)
        base, what = other.means()[0], "projection of answers less that of the model's own"
    return DataScreen(shift_along(data, base, rows), what, names_of(along, labels))


def preference_disparity(
    model: Any,
    sae: Any,
    prompts: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str],
    *,
    least_rate: float = 0.0,
    labels: Mapping[int, str] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> DataScreen:
    """Which latents fire in chosen and not in rejected answers: 1, 0 or -1 per pair and latent.

    A latent counts for an answer when more than `least_rate` of its tokens fire it; the mean over
    pairs is u_f of arXiv 2606.12360 (there per cluster of latents). Raises ValueError for lists of
    unequal length and an answer without a token.
    """
    sides = []
    for name, answers in (("chosen", chosen), ("rejected", rejected)):
        require_equal(prompts, answers, name)
        found = collect_codes(
            model,
            sae,
            [x + y for x, y in zip(prompts, answers, strict=True)],
            poolings=("frequency",),
            starts=[len(x) for x in prompts],
            prepend_bos=prepend_bos,
            batch_size=batch_size,
            progress=progress,
        )
        sides.append(found["frequency"].dense())
    what = f"fires in more than {least_rate:.0%} of the chosen answer's tokens, less the rejected's"
    return DataScreen(disparity(*sides, least_rate=least_rate), what, dict(labels or {}))


def directions(along: Any) -> tuple[Float[Tensor, "concept d_model"], str, Any]:
    """Rows, hook name and SAE (None for vectors) of what is projected on."""
    if isinstance(along, SteeringVector):
        along = [along]
    if not isinstance(along, Sequence):
        return linear_decoder(along)[0], *read_site(along)
    sites = sorted({one.hook_name for one in along})
    if len(sites) != 1:
        raise ValueError(
            f"vectors of one site are projected on at a time, given: {', '.join(sites) or 'none'}"
        )
    return torch.stack([one.vector for one in along]), sites[0], None


def names_of(along: Any, labels: Mapping[int, str] | None) -> dict[int, str]:
    """Labels as given, else those of the vectors."""
    if isinstance(along, SteeringVector):
        along = [along]
    if labels is None and isinstance(along, Sequence):
        return {i: one.label for i, one in enumerate(along)}
    return dict(labels or {})


def require_equal(prompts: Sequence[str], answers: Sequence[str], name: str) -> None:
    if not prompts or len(prompts) != len(answers):
        raise ValueError(f"{len(answers)} {name} answers for {len(prompts)} prompts")


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers behind their prompts, read at one site."""

    model: Any
    prompts: Sequence[str]
    answers: Sequence[str]
    hook_name: str
    bos: bool
    batch_size: int
    progress: bool

    def means(self) -> tuple[Float[Tensor, "sample d_model"], Float[Tensor, "sample d_model"]]:
        """Mean activation over each answer's tokens, and that of its prompt's last token."""
        require_equal(self.prompts, self.answers, "given")
        texts = [x + y for x, y in zip(self.prompts, self.answers, strict=True)]
        encoded = encode_texts(self.model, texts, prepend_bos=self.bos)
        starts = [len(x) for x in self.prompts]
        firsts = [first_token(text, i, starts) for i, text in enumerate(encoded)]
        if 0 in firsts:
            raise ValueError(f"prompt {firsts.index(0)} has no token in front of its answer")
        means, lasts = [], []
        with tqdm(total=len(texts), desc="answers", unit="text", disable=not self.progress) as bar:
            for start in range(0, len(texts), self.batch_size):
                batch = padded(self.model, encoded[start : start + self.batch_size])
                x = activations_at(self.model, self.hook_name, batch).cpu()
                for row, first in enumerate(firsts[start : start + self.batch_size]):
                    means.append(x[row, first:][batch.real[row, first:]].double().mean(0))
                    lasts.append(x[row, first - 1].double())
                bar.update(len(x))
        return torch.stack(means), torch.stack(lasts)
