"""SAE features: chosen by label, by name or by AUROC, added by decoder row or clamped in codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...adapters.activations import model_name
from ...adapters.sae_lens import sae_id
from ...directions.feature import feature_vector
from ...edits.codes import Clamp, Exchange, codes_of
from ...edits.shift import Add
from ...features.scores import score_features
from ...types import Change, Edit, SparseCodes, SteeringVector
from ..axbench.texts import ChatForm
from ..causal_scores import firing_peaks
from ..judges.offline import content_stems, stems_of
from ..pooled_codes import collect_codes
from ..subject import Subject
from .dense import EVERYWHERE, SOURCE
from .records import ConceptData, Fitted
from .texts import about_texts


@dataclass(frozen=True)
class Chosen:
    """How the feature is chosen: "label" (`ConceptData.feature`), "auroc" on the training texts, or
    "name": the concept's words against what each feature fires on, whichever side the texts are of
    (a stand-in for labels that nobody wrote)."""

    by: str = "label"

    def __post_init__(self) -> None:
        if self.by not in ("label", "auroc", "name"):
            raise ValueError(f"by is {self.by!r}; choose 'label', 'auroc' or 'name'")


LEAST_PEAKS = 3
"""Texts that a feature must fire in to be named after its tokens."""
Build = Callable[[Subject, ConceptData, Chosen, int], Fitted]
Steering = Callable[[Any, int, SteeringVector, Tensor], Change]
"""(SAE, feature, its vector, amounts) -> the change."""


def by_row(name: str) -> Build:
    """The method that adds amount x decoder row of the feature."""
    return of_feature(name, lambda _sae, _feature, vector, amounts: Add(vector, amounts))


def by_clamp(name: str) -> Build:
    """The method that sets the feature's code to the amount, row by row; the error is kept."""
    return of_feature(
        name, lambda sae, feature, _vector, amounts: Clamp(sae, feature, amounts.reshape(-1, 1))
    )


def by_min_clamp(name: str) -> Build:
    """The method that raises the feature's code to the amount where it is smaller."""

    def raised(sae: Any, feature: int, vector: SteeringVector, amounts: Tensor) -> Change:
        del vector
        # SpARE's exchange of one feature upwards is max(code, amount)
        one = SparseCodes(torch.tensor([feature]), torch.ones(1), sae.W_dec.shape[0], sae_id(sae))
        return Exchange(sae, one, amounts)

    return of_feature(name, raised)


def of_feature(name: str, change: Steering) -> Build:
    """A method on one feature; it detects by the feature's code.

    Run-time normalisation's factor is left out of the row, as everywhere in `feature_vector`.
    """

    def build(subject: Subject, data: ConceptData, settings: Chosen, seed: int) -> Fitted:
        feature, about = chosen_feature(subject, data, settings, name)
        sae = subject.sae
        vector = feature_vector(
            sae,
            feature,
            max_activation=data.max_activation,
            positive=f"more of {data.concept!r}",
            label=f"{name}: {data.concept}",
        )
        settings_made = {**vector.recipe.settings, **about_texts(data), **about}
        vector = vector.with_recipe(
            method=name,
            model_name=model_name(subject.model),
            settings=settings_made,
            seed=seed,
            source=SOURCE,
        )

        def steering(amounts: Tensor) -> tuple[Edit, ...]:
            return (Edit(change(sae, feature, vector, amounts), positions=EVERYWHERE),)

        def detection(residual: Tensor) -> Tensor:
            return codes_of(sae, [feature], residual.to(sae.W_dec.device))[..., 0]

        return Fitted(
            name,
            data.concept,
            vector,
            steering,
            detection,
            max_activation=data.max_activation,
        )

    return build


def chosen_feature(
    subject: Subject, data: ConceptData, settings: Chosen, name: str
) -> tuple[int, dict[str, Any]]:
    """The feature and what its recipe says of the choice.

    Raises ValueError without an SAE, LookupError for a concept without a feature and when no
    feature fires on the training texts.
    """
    if subject.sae is None:
        raise ValueError(f"{name} needs an SAE: open the subject with one")
    if settings.by == "label":
        if data.feature is None:
            raise LookupError(f"{name}: no feature is labelled {data.concept!r}")
        return data.feature, {"chosen_by": "label"}
    return best_by_auroc(subject, data) if settings.by == "auroc" else named(subject, data)


def named(subject: Subject, data: ConceptData) -> tuple[int, dict[str, Any]]:
    """The feature whose strongest tokens are words of the concept's name most often.

    Labels of texts are not read: this is what a label made from a feature's activations could tell.
    A feature is named by the strongest token of each text it fires in, `LEAST_PEAKS` texts at
    least. Equal shares go to the feature with more such texts, then to the smaller number.
    LookupError where no feature fires on a word of the concept's name.
    """
    data.require("positives", "negatives")
    form, wanted = ChatForm.of(subject.model, subject.sae), singular(content_stems(data.concept))
    texts = [form.text(asked, said) for asked, said in data.positives + data.negatives]
    peaks = firing_peaks(subject.model, subject.sae, texts, prepend_bos=form.bos, progress=False)
    decode = subject.model.tokenizer.decode
    said = [t for t in peaks.tokens.unique().tolist() if singular(stems_of(decode([t]))) & wanted]
    width = int(subject.sae.W_dec.shape[0])
    fires = torch.bincount(peaks.features, minlength=width)
    hits = torch.bincount(
        peaks.features[torch.isin(peaks.tokens, torch.tensor(said))], minlength=width
    )
    share = torch.where(fires >= LEAST_PEAKS, hits / fires.clamp(min=1), 0.0)
    best = max(range(width), key=lambda f: (float(share[f]), int(fires[f]), -f))
    if share[best] == 0:
        raise LookupError(f"no feature fires on a word of {data.concept!r}")
    return best, {"chosen_by": "name", "share_of_texts": float(share[best])}


def singular(stems: frozenset[str]) -> frozenset[str]:
    return frozenset(stem.rstrip("s") for stem in stems)


def best_by_auroc(subject: Subject, data: ConceptData) -> tuple[int, dict[str, Any]]:
    """The live feature whose largest code behind the prefix tells the training texts apart best;
    equal ones by number."""
    data.require("positives", "negatives")
    form = ChatForm.of(subject.model, subject.sae)
    pairs = data.positives + data.negatives
    texts = [form.text(asked, said) for asked, said in pairs]
    starts = [prefix_end(form, text) for text in texts]
    codes = collect_codes(
        subject.model,
        subject.sae,
        texts,
        starts=starts,
        prepend_bos=form.bos,
        progress=False,
    )["max"]
    labels = [1.0] * len(data.positives) + [0.0] * len(data.negatives)
    table = score_features(codes, torch.tensor(labels).numpy(), concepts=(data.concept,))
    best = table.top(data.concept, "auroc", 1)
    if not best:
        raise LookupError(f"no feature fires on the training texts of {data.concept!r}")
    area = float(table.values["auroc"][best[0], 0])
    return best[0], {"chosen_by": "auroc", "train_auroc": area, "dead": table.n_dead}


def prefix_end(form: ChatForm, text: str) -> int:
    """The character at which the tokens behind the chat prefix begin."""
    encoded = form.encoded([text])[0]
    if encoded.spans is None:
        raise ValueError("choosing by AUROC needs a fast tokenizer, which knows each token's place")
    return encoded.spans[form.prefix_length][0]
