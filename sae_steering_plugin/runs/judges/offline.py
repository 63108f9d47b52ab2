"""A deterministic stand-in for AxBench's judges: concept, instruction, fluency, each 0, 1 or 2.

    judge = OfflineRatings.of({3: fit_stems(positive_texts, negative_texts)}, reference=texts)
    judge.rate(3, "references to dates", "Tell me about Rome.", "Rome was founded in 753.")

Word statistics, no model, no draw: one input has one rating on any machine. The ratings of a
language model that they could be calibrated with (arXiv 2505.20063) are not among this project's
data, so they are *not* calibrated, and the name says so. They order methods on planted tasks and
notice regressions; their level means nothing, and they are never called AxBench scores.
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..canonical import content_key
from .local import hashed_version, youden_cut
from .three import Ratings

OFFLINE_NAME = "offline-proxy-uncalibrated"
CODE_VERSION = 1
"""Raised when any rating can change for an equal input."""

WORD = re.compile(r"[a-z]+")
STEM = 5
LEAST_TEXTS, LONGEST = 4, 40
SMOOTHING = 0.5
"""Letters of a stem; a lexicon's least document frequency and length; smoothing. With these figures
the lexicon's mean AUROC on the held-out texts of AxBench's concept10 is .93 and .95 (2B L10, 9B
L20; the concept's own words reach .83 and .89)."""
UPPER = 0.75
"""Quantile of the positive training texts from which a concept counts as clearly present."""

FUNCTION_WORDS = frozenset(
    WORD.findall(
        """
about above after again against all also although among and any are around because been before
being below between both but can could did does doing down during each either else ever every few
for from further get had has have having her here hers him his how however into its itself just
let like made make many may might more most much must neither nor not now off once one only onto
other our ours out over own per please rather same shall she should some such than that the their
theirs them then there these they this those through thus too two under until upon use using very
via was way were what when where whether which while who whom whose why will with within without
would yet you your yours give given tell write create describe explain provide list say something
thing
        """
    )
)
"""Words that carry no topic; the verbs at the end are what instructions ask with."""


def words_of(text: str) -> list[str]:
    """Runs of the letters a to z of the case-folded NFC text."""
    return WORD.findall(unicodedata.normalize("NFC", text).casefold())


def stems_of(text: str) -> frozenset[str]:
    """The distinct stems (first five letters) of a text's words."""
    return frozenset(word[:STEM] for word in words_of(text))


def content_stems(text: str) -> frozenset[str]:
    """Stems of the words that carry a topic: longer than two letters, no function word."""
    return frozenset(
        word[:STEM] for word in words_of(text) if len(word) > 2 and word not in FUNCTION_WORDS
    )


def recall(asked: frozenset[str], text: str) -> float | None:
    """Share of the asked stems that the text holds; None when nothing is asked."""
    return len(asked & stems_of(text)) / len(asked) if asked else None


@dataclass(frozen=True)
class Graded:
    """What the three judges share: a rating is how many of two ascending cuts a score reaches."""

    cuts: tuple[float, float]

    def __post_init__(self) -> None:
        if not self.cuts[0] <= self.cuts[1]:
            raise ValueError(f"cuts {self.cuts} must ascend")

    def grade(self, score: float) -> float:
        return float(sum(score >= cut for cut in self.cuts))


# Concept ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StemLexicon(Graded):
    """Stems that tell texts with a concept from others, with weights; the score is their sum.

    Built from labelled texts by `fit_stems`.
    """

    weights: Mapping[str, float]

    def score_text(self, text: str) -> float:
        """Sum of the weights of the distinct stems present."""
        return math.fsum(self.weights[stem] for stem in sorted(stems_of(text) & set(self.weights)))


@dataclass(frozen=True)
class ConceptWords(Graded):
    """The content stems of a concept's own words, for concepts without labelled texts.

    The score is the share of them that is present; any reaches 1, half of them 2.
    """

    stems: tuple[str, ...]

    @classmethod
    def of(cls, concept: str) -> ConceptWords:
        """Raises ValueError when the concept has no word that carries a topic."""
        found = content_stems(concept)
        if not found:
            raise ValueError(f"the concept {concept!r} has no content word to look for")
        return cls((1e-9, 0.5), tuple(sorted(found)))

    def score_text(self, text: str) -> float:
        return recall(frozenset(self.stems), text) or 0.0


def fit_stems(positives: Sequence[str], negatives: Sequence[str]) -> StemLexicon:
    """The lexicon of a concept from texts with it and texts without it.

    A stem weighs ln((df+ + .5) / (n+ + 1)) - ln((df- + .5) / (n- + 1)); the 40 largest of those
    that stand in at least 4 positive texts are kept, of positive weight only. The cuts are Youden's
    on these texts and the 75th percentile of the positive ones, or Youden's where that is higher.
    Raises ValueError when no stem qualifies, or when every text scores alike.
    """
    import numpy as np

    sides = [[stems_of(text) for text in side] for side in (positives, negatives)]
    counts = [Counter(stem for text in side for stem in text) for side in sides]

    def share(side: int, stem: str) -> float:
        return math.log((counts[side][stem] + SMOOTHING) / (len(sides[side]) + 1))

    weights = {s: share(0, s) - share(1, s) for s, n in counts[0].items() if n >= LEAST_TEXTS}
    kept = sorted((s for s in weights if weights[s] > 0), key=lambda s: (-weights[s], s))[:LONGEST]
    if not kept:
        raise ValueError(
            f"no stem stands in {LEAST_TEXTS} of the {len(positives)} positive texts and more "
            "often there than in the negative ones: give more texts, or use ConceptWords"
        )
    draft = StemLexicon((0.0, 0.0), {stem: weights[stem] for stem in kept})
    high, low = ([draft.score_text(text) for text in side] for side in (positives, negatives))
    cut = youden_cut(high, low)
    upper = max(cut, float(np.quantile(high, UPPER)))
    return StemLexicon((cut, upper), draft.weights)


def concept_reader(
    concept: str, positives: Sequence[str] = (), negatives: Sequence[str] = ()
) -> StemLexicon | ConceptWords:
    """A fitted lexicon where the texts give one, else the concept's own words.

    Raises ValueError when neither says anything.
    """
    if len(positives) >= LEAST_TEXTS and negatives:
        try:
            return fit_stems(positives, negatives)
        except ValueError:
            return ConceptWords.of(concept)
    return ConceptWords.of(concept)


# Instruction --------------------------------------------------------------------------------------

INSTRUCT_CUTS = (1e-9, 0.1)
"""Recall of the instruction's stems: none is 0, under a tenth 1. From this project's notes on
AxBench, chosen in sample there on texts of 16 words; not validated on longer ones."""


@dataclass(frozen=True)
class StemRecall(Graded):
    """How much of the instruction's topic words a text takes up."""

    cuts: tuple[float, float] = INSTRUCT_CUTS

    def score_text(self, instruction: str, text: str) -> float | None:
        """Recall of content stems; of all stems where the instruction has no content word; None
        where it has no word at all."""
        return recall(content_stems(instruction) or stems_of(instruction), text)


# Fluency ------------------------------------------------------------------------------------------

WINDOW = 20
RUN = 4
LEAST_WORDS = 3
GRAM = 4


def fluency_statistics(text: str) -> dict[str, float]:
    """Signs of degeneration, each 0 in good text and growing: repeated word triples, words repeated
    within windows of 20, zlib's gain beyond a third, characters in runs of 4 and more, and
    characters outside ASCII.
    """
    words = words_of(text)
    triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    windows = [words[i : i + WINDOW] for i in range(max(1, len(words) - WINDOW + 1))]
    raw = text.encode()
    runs = sum(len(m[0]) for m in re.finditer(rf"([^\s=_*#.-])\1{{{RUN - 1},}}", text))
    packed = len(zlib.compress(raw, 9)) / len(raw) if len(raw) > 200 else 1.0
    return {
        "repeated_triples": 1 - len(set(triples)) / len(triples) if triples else 0.0,
        "repeated_words": max(1 - len(set(one)) / len(one) for one in windows) if words else 0.0,
        "compressed": max(0.0, 1 / 3 - packed),
        "runs": runs / max(1, len(text)),
        "non_ascii": sum(ord(one) > 127 for one in text) / max(1, len(text)),
    }


FAULTS: Mapping[str, tuple[float, float]] = {
    "repeated_triples": (0.15, 0.4),
    "repeated_words": (0.6, 0.8),
    "compressed": (0.03, 0.13),
    "runs": (0.02, 0.1),
    "non_ascii": (0.15, 0.5),
    "surprise": (1.0, 2.0),
}
"""From where a statistic costs one grade, and two. Set by hand; the notes' own hand-set thresholds
agreed with a language model's ratings at a quadratic kappa of about .41."""


@dataclass(frozen=True)
class Grams:
    """A character model of order four over reference texts, with add-1/2 smoothing.

    `surprise(text)` is (mean negative log-probability - `middle`) / (`upper` - `middle`): 0 for a
    typical reference text, 1 at the 99th percentile of reference texts that were left out.
    """

    contexts: Mapping[str, int] = field(repr=False)
    grams: Mapping[str, int] = field(repr=False)
    symbols: int
    middle: float
    upper: float

    @classmethod
    def of(cls, texts: Sequence[str]) -> Grams:
        """Counts from every second text, percentiles from the others. ValueError under 20 texts."""
        import numpy as np

        if len(texts) < 20:
            raise ValueError(f"a character model needs 20 reference texts, not {len(texts)}")
        grams: Counter[str] = Counter()
        for text in texts[::2]:
            spaced = plain_characters(text)
            grams.update(spaced[i : i + GRAM] for i in range(len(spaced) - GRAM + 1))
        contexts: Counter[str] = Counter()
        for gram, count in grams.items():
            contexts[gram[:-1]] += count
        symbols = len({gram[-1] for gram in grams})
        draft = cls(dict(contexts), dict(grams), symbols, 0.0, 1.0)
        values = [draft.surprise(text) for text in texts[1::2]]
        middle, upper = (float(one) for one in np.quantile(values, (0.5, 0.99)))
        return cls(draft.contexts, draft.grams, symbols, middle, max(upper, middle + 0.1))

    def surprise(self, text: str) -> float:
        spaced = plain_characters(text)
        pieces = [spaced[i : i + GRAM] for i in range(len(spaced) - GRAM + 1)]
        if not pieces:
            return 0.0
        losses = [
            math.log(
                (self.contexts.get(piece[:-1], 0) + SMOOTHING * self.symbols)
                / (self.grams.get(piece, 0) + SMOOTHING)
            )
            for piece in pieces
        ]
        return (math.fsum(losses) / len(losses) - self.middle) / (self.upper - self.middle)


def plain_characters(text: str) -> str:
    """Case-folded NFC with every run of other signs as one space, and three spaces in front."""
    folded = unicodedata.normalize("NFC", text).casefold()
    return "   " + re.sub(r"[^a-z]+", " ", folded).strip()


@dataclass(frozen=True)
class Fluency:
    """2 less the grades that the worst statistic costs; 0 under three words.

    With a character model of reference texts, text unlike them is faulty too.
    """

    grams: Grams | None = None

    def rating(self, text: str) -> tuple[float, str]:
        """The rating and the statistic that decided it (empty for a 2)."""
        if len(words_of(text)) < LEAST_WORDS:
            return 0.0, f"under {LEAST_WORDS} words"
        found = fluency_statistics(text)
        if self.grams is not None:
            found["surprise"] = self.grams.surprise(text)
        costs = {name: sum(value >= cut for cut in FAULTS[name]) for name, value in found.items()}
        worst = max(costs, key=lambda name: (costs[name], name))
        return 2.0 - costs[worst], f"{worst} {found[worst]:.3f}" if costs[worst] else ""


# All three ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OfflineRatings:
    """The three stand-in ratings of a text. `readers` holds one concept reader per concept number.

    `is_llm` is False: no result of it may carry the key of AxBench's own judge.
    """

    readers: Mapping[int, StemLexicon | ConceptWords]
    instruct: StemRecall = StemRecall()
    fluency: Fluency = Fluency()
    name: str = OFFLINE_NAME
    is_llm: bool = False
    axbench_prompts: bool = False

    @classmethod
    def of(
        cls, readers: Mapping[int, StemLexicon | ConceptWords], *, reference: Sequence[str] = ()
    ) -> OfflineRatings:
        """With a character model of `reference` texts (20 at least) where they are given."""
        return cls(readers, fluency=Fluency(Grams.of(reference) if reference else None))

    @property
    def version(self) -> str:
        return hashed_version(CODE_VERSION, self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """A hash of the code's version, the lexicons, the cuts and the character model."""
        grams = self.fluency.grams
        readers = {
            str(number): [type(one).__name__, one] for number, one in sorted(self.readers.items())
        }
        fluency = None if grams is None else [content_key(grams), grams.middle, grams.upper]
        return content_key([CODE_VERSION, self.name, readers, self.instruct, fluency, FAULTS])

    def rate_all(
        self, concept_id: int, concept: str, pairs: Sequence[tuple[str, str]]
    ) -> list[Ratings]:
        """`rate` for each (instruction, text)."""
        return [self.rate(concept_id, concept, one, text) for one, text in pairs]

    def rate(
        self, concept_id: int, concept: str, instruction: str, text: str
    ) -> tuple[float, float, float]:
        """(concept, instruct, fluency) of one text; all 0 for an empty one.

        Raises KeyError for a concept without a reader, ValueError for an instruction without words.
        """
        if concept_id not in self.readers:
            raise KeyError(f"no concept reader for concept {concept_id} ({concept!r})")
        if not text.strip():
            return 0.0, 0.0, 0.0
        reader = self.readers[concept_id]
        taken_up = self.instruct.score_text(instruction, text)
        if taken_up is None:
            raise ValueError(f"the instruction {instruction!r} has no word to look for")
        return (
            reader.grade(reader.score_text(text)),
            self.instruct.grade(taken_up),
            self.fluency.rating(text)[0],
        )
