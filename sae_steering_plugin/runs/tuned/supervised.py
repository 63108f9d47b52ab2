"""SAE features chosen with supervision: for telling a concept apart, and for causing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..selection import CANDIDATES, CUT, SUPPORT, VARIANTS, select_features
from ..subject import Subject
from .features import Chosen, by_row, prefix_end
from .records import ConceptData, Fitted
from .texts import ResponseTexts, about_texts


@dataclass(frozen=True)
class SupervisedSettings:
    """Options of `select_features`; `support` is lowered to the texts there are, since a protocol
    fixes their number. `order` ranks what passes the cut."""

    variant: str = "full"
    score: str = "f1"
    order: str = "score"
    pooling: str = "frequency"
    candidates: int = CANDIDATES
    cut: float = CUT

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; choose one of {', '.join(VARIANTS)}")


Build = Callable[[Subject, ConceptData, SupervisedSettings, int], Fitted]


def supervised(name: str) -> Build:
    """The method that adds the decoder row of the best feature `select_features` finds.

    All training texts but two choose, as with every other method; nothing is reported on them.
    The causal variant also asks what the feature makes the model say. LookupError where no feature
    is left.
    """

    def build(
        subject: Subject, data: ConceptData, settings: SupervisedSettings, seed: int
    ) -> Fitted:
        if subject.sae is None:
            raise ValueError(f"{name} needs an SAE: open the subject with one")
        data.require("positives", "negatives")
        form = ResponseTexts.of(subject, data.positives).form
        pairs = data.positives + data.negatives
        texts = [form.text(asked, said) for asked, said in pairs]
        labels = [1.0] * len(data.positives) + [0.0] * len(data.negatives)
        found = select_features(
            subject.model,
            subject.sae,
            texts,
            {data.concept: labels},
            splits=nearly_all_train(texts),
            support=min(SUPPORT, len(data.positives)),
            starts=[prefix_end(form, text) for text in texts],
            prepend_bos=form.bos,
            k=1,
            seed=seed,
            progress=False,
            **asdict(settings),
        )
        if data.concept in found.missing:
            raise LookupError(f"{name}: {found.missing[data.concept]}")
        selection = found.selections[data.concept]
        fitted = by_row(name)(
            subject, replace(data, feature=selection.features[0]), Chosen("label"), seed
        )
        scores = {key: values[0] for key, values in selection.scores.items()}
        return renamed(fitted, data, {"chosen_by": "select_features", **asdict(settings)}, scores)

    return build


def nearly_all_train(texts: Sequence[str]) -> list[str]:
    """ "train" for all texts but the last two that occur once: `select_features` holds out one text
    each for its own figures, which are not used here. ValueError under three distinct texts."""
    counts = Counter(texts)
    once = [i for i, text in enumerate(texts) if counts[text] == 1][-2:]
    if len(once) < 2 or len(texts) < 3:
        raise ValueError("choosing features needs three texts at least, two of them different")
    held = dict(zip(once, ("validation", "test"), strict=True))
    return [held.get(i, "train") for i in range(len(texts))]


def renamed(
    fitted: Fitted, data: ConceptData, about: dict[str, Any], scores: dict[str, Any]
) -> Fitted:
    """The same fit with a recipe that says how its feature was chosen."""
    assert fitted.vector is not None
    settings = {**fitted.vector.recipe.settings, **about_texts(data), **about}
    fitted.vector = fitted.vector.with_recipe(settings=settings, scores=scores)
    return fitted
