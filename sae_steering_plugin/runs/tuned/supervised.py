"""SAE features chosen with supervision: for telling a concept apart, and for causing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..axbench.texts import ChatForm
from ..option_choice import choose_options
from ..pooled_codes import collect_codes
from ..selection import CANDIDATES, CUT, SUPPORT, VARIANTS, needed_poolings, select_features
from ..splits import grouped_splits
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


@dataclass(frozen=True)
class ChosenSettings:
    """Options that are chosen on a validation part of the training texts; see `choose_options`.

    `strengths` and `controls` measure the gain that chooses. A page of this project's notes asks
    for prior 1e-2 with few texts, so it stands first.
    """

    prior: tuple[float, ...] = (1e-2, 1e-3)
    pooling: tuple[str, ...] = ("frequency", "mean", "max")
    cut: tuple[float, ...] = (CUT, 1e-2, 1e-1)
    order: tuple[str, ...] = ("score", "product")
    strengths: tuple[float, ...] = (1.0, 2.0)
    controls: int = 5


LEAST_PROMPTS = 8
"""Different validation prompts that choosing options needs."""
Build = Callable[[Subject, ConceptData, Any, int], Fitted]


def supervised(name: str) -> Build:
    """The method that adds the decoder row of the best feature `select_features` finds.

    All training texts but two choose, as with every other method; nothing is reported on them.
    The causal variant also asks what the feature makes the model say. LookupError where no feature
    is left.
    """

    def build(
        subject: Subject, data: ConceptData, settings: SupervisedSettings, seed: int
    ) -> Fitted:
        reading = Reading.of(name, subject, data)
        return reading.fitted(name, asdict(settings), {}, seed)

    return build


def supervised_chosen(name: str) -> Build:
    """`supervised` with its options chosen per concept: a fifth of the training texts is held out,
    every combination selects on the rest, and the one whose feature raises the concept's lexicon
    most behind instructions and half responses of the held-out texts is fitted to all of them.
    """

    def build(subject: Subject, data: ConceptData, settings: ChosenSettings, seed: int) -> Fitted:
        reading = Reading.of(name, subject, data)
        codes = collect_codes(
            subject.model,
            subject.sae,
            reading.texts,
            poolings=needed_poolings(*settings.pooling),
            progress=False,
            **reading.how,
        )
        grid = {n: getattr(settings, n) for n in ("prior", "pooling", "cut", "order")}
        options: dict[str, Any] = {n: values[0] for n, values in grid.items()}
        about: dict[str, Any] = {"combinations": 0}
        splits = grouped_splits(reading.texts, seed=seed)
        prompts = reading.halves([i for i, word in enumerate(splits) if word == "validation"])
        if len(prompts) >= LEAST_PROMPTS:
            found = choose_options(
                subject.model,
                subject.sae,
                reading.texts,
                reading.labels,
                grid,
                splits=splits,
                prompts=prompts,
                strengths=settings.strengths,
                controls=settings.controls,
                seed=seed,
                progress=False,
                codes=codes,
                support=1,
                **reading.how,
            )
            gain = max(row["gain"] for row in found.rows)
            options = dict(found.options)
            about = {"combinations": len(found.rows), "validation_gain": gain}
        return reading.fitted(name, options, {**about, "grid": asdict(settings)}, seed, codes=codes)

    return build


@dataclass(frozen=True, eq=False)
class Reading:
    """A concept's training texts as `select_features` reads them: behind the chat prefix."""

    subject: Subject
    data: ConceptData
    form: ChatForm
    texts: tuple[str, ...]

    @classmethod
    def of(cls, name: str, subject: Subject, data: ConceptData) -> Reading:
        """Raises ValueError without an SAE and for a side without texts."""
        if subject.sae is None:
            raise ValueError(f"{name} needs an SAE: open the subject with one")
        data.require("positives", "negatives")
        form = ResponseTexts.of(subject, data.positives).form
        pairs = data.positives + data.negatives
        return cls(subject, data, form, tuple(form.text(asked, said) for asked, said in pairs))

    @property
    def labels(self) -> dict[str, list[float]]:
        sides = [1.0] * len(self.data.positives) + [0.0] * len(self.data.negatives)
        return {self.data.concept: sides}

    @property
    def how(self) -> dict[str, Any]:
        return {
            "starts": [prefix_end(self.form, text) for text in self.texts],
            "prepend_bos": self.form.bos,
        }

    def halves(self, rows: Sequence[int]) -> list[str]:
        """Instructions with the first half of their responses, in words, each once."""
        pairs = self.data.positives + self.data.negatives
        found = []
        for asked, said in (pairs[i] for i in rows):
            words = said.split()
            found.append(self.form.text(asked, " ".join(words[: len(words) // 2])))
        return list(dict.fromkeys(found))

    def fitted(
        self,
        name: str,
        options: dict[str, Any],
        about: dict[str, Any],
        seed: int,
        **at_hand: Any,
    ) -> Fitted:
        """The best feature's decoder row under `options`, chosen on all texts but two."""
        data = self.data
        found = select_features(
            self.subject.model,
            self.subject.sae,
            self.texts,
            self.labels,
            splits=nearly_all_train(self.texts),
            support=min(SUPPORT, len(data.positives)),
            k=1,
            seed=seed,
            progress=False,
            **self.how,
            **options,
            **at_hand,
        )
        if data.concept in found.missing:
            raise LookupError(f"{name}: {found.missing[data.concept]}")
        selection = found.selections[data.concept]
        chosen = replace(data, feature=selection.features[0])
        fitted = by_row(name)(self.subject, chosen, Chosen("label"), seed)
        scores = {key: values[0] for key, values in selection.scores.items()}
        return renamed(fitted, data, {"chosen_by": "select_features", **options, **about}, scores)


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
