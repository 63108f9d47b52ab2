"""Stand-in ratings fitted to a language model's published ones: instruct and fluency.

    texts = read_published(fluency_json, instruct_json, instructions_json)
    calibration, figures = calibrate(texts)
    calibration.save("calibration.json")        # then --judge offline:calibration.json

The files are those of arXiv 2505.20063 (`data/axbench_llm_scores` and `data/axbench_instructions`
of its repository); they are not part of this package. Thirteen statistics of a text that need no
corpus go into a multinomial logistic regression per aspect. How far it agrees is measured in folds
that keep a feature's texts together. It stays a stand-in: published texts are one sentence long, so
agreement on longer ones is unknown, and the concept rating is not calibrated at all (no published
ratings of it are at hand).
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ..canonical import content_key
from .local import hashed_version
from .offline import (
    FUNCTION_WORDS,
    ConceptWords,
    OfflineRatings,
    StemLexicon,
    content_stems,
    recall,
    words_of,
)
from .three import Ratings

CALIBRATED_NAME = "offline-proxy-calibrated"
CODE_VERSION = 1
ASPECTS = ("instruct", "fluency")
GRADES = (0.0, 1.0, 2.0)
FOLDS = 5
LEAST_TEXTS = 50
NEVER = -1e9
"""The intercept of a grade that no text was given."""
RATED = slice(5, 10)
"""Of a feature's ten instructions the last five have rated texts."""


@dataclass(frozen=True)
class RatedText:
    """A text behind an instruction, a language model's two ratings of it, and what it is one of."""

    instruction: str
    text: str
    instruct: float
    fluency: float
    group: str


def text_statistics(instruction: str, text: str) -> list[float]:
    """The thirteen corpus-free statistics, in the order of `STATISTICS`."""
    words = words_of(text)
    triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    raw, size = text.encode(), max(1, len(text))
    asked = content_stems(instruction)
    asked_words = {w for w in words_of(instruction) if len(w) > 2 and w not in FUNCTION_WORDS}
    return [
        math.log1p(len(words)),
        float(len(words) < 3),
        len(set(words)) / max(1, len(words)),
        len(set(triples)) / max(1, len(triples)),
        min(2.0, len(zlib.compress(raw, 9)) / max(1, len(raw))),
        sum(one.isspace() for one in text) / size,
        sum(ord(one) > 127 for one in text) / size,
        sum(not one.isalnum() and not one.isspace() for one in text) / size,
        sum(word in FUNCTION_WORDS for word in words) / max(1, len(words)),
        min(15.0, sum(map(len, words)) / max(1, len(words))),
        max(Counter(words).values(), default=0) / max(1, len(words)),
        len(asked_words & set(words)) / max(1, len(asked_words)),
        recall(asked, text) or 0.0,
    ]


STATISTICS = (
    "log(1 + words)", "under three words", "distinct words", "distinct triples", "zlib ratio",
    "whitespace", "non-ASCII", "punctuation", "function words", "word length", "top word",
    "word recall", "stem recall",
)  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """One multinomial logistic regression per aspect over standardised statistics.

    `weights[aspect][grade]` and `intercepts[aspect][grade]` belong to `GRADES`; `middle` and
    `spread` standardise. `source` names the ratings it was fitted to.
    """

    middle: tuple[float, ...]
    spread: tuple[float, ...]
    weights: Mapping[str, tuple[tuple[float, ...], ...]]
    intercepts: Mapping[str, tuple[float, ...]]
    source: str

    @property
    def fingerprint(self) -> str:
        return content_key([CODE_VERSION, self.to_dict()])

    def to_dict(self) -> dict[str, Any]:
        return {
            "statistics": list(STATISTICS),
            "middle": list(self.middle),
            "spread": list(self.spread),
            "weights": {k: [list(row) for row in v] for k, v in self.weights.items()},
            "intercepts": {k: list(v) for k, v in self.intercepts.items()},
            "source": self.source,
        }

    def save(self, path: str | Path) -> Path:
        target = Path(path)
        target.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Raises ValueError for a file of another form or other statistics."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if tuple(found["statistics"]) != STATISTICS:
                raise ValueError("it is fitted to other statistics")
            made = cls(
                tuple(map(float, found["middle"])),
                tuple(map(float, found["spread"])),
                {a: tuple(tuple(map(float, row)) for row in found["weights"][a]) for a in ASPECTS},
                {a: tuple(map(float, found["intercepts"][a])) for a in ASPECTS},
                str(found["source"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no calibration: {error}") from error
        return made

    def grade(
        self, aspect: str, statistics: Float[np.ndarray, "text statistic"]
    ) -> Float[np.ndarray, " text"]:
        """The likeliest grade of each text, from its statistics."""
        scaled, weights = (statistics - self.middle) / self.spread, np.asarray(self.weights[aspect])
        logits = scaled @ weights.T + np.asarray(self.intercepts[aspect])
        return np.asarray(GRADES)[logits.argmax(axis=1)]


def read_published(
    fluency: str | Path, instruct: str | Path, instructions: str | Path
) -> list[RatedText]:
    """The rated texts of arXiv 2505.20063's three files, joined by feature.

    Each key (`layer_feature`) holds `scores` and `responses` of five texts in the rating files and
    ten instructions in the other, of which the last five are rated. Raises ValueError, with the
    key, for entries that do not fit together.
    """
    ratings = [json.loads(Path(one).read_text(encoding="utf-8")) for one in (fluency, instruct)]
    asked = json.loads(Path(instructions).read_text(encoding="utf-8"))
    found: list[RatedText] = []
    for key, first in ratings[0].items():
        second = ratings[1].get(key)
        if second is None or key not in asked:
            raise ValueError(f"{key!r} is in {fluency} and not in both other files")
        texts = first["responses"]
        if texts != second["responses"]:
            raise ValueError(f"{key!r}: the two files rate different responses")
        rows = list(zip(asked[key][RATED], texts, second["scores"], first["scores"], strict=True))
        for instruction, text, taken_up, fluent in rows:
            if taken_up is None or fluent is None:
                continue
            found.append(
                RatedText(str(instruction), str(text), float(taken_up), float(fluent), key)
            )
    return found


def calibrate(
    texts: Sequence[RatedText], *, source: str = "arXiv 2505.20063", seed: int = 0
) -> tuple[Calibration, list[dict[str, Any]]]:
    """The calibration, and per aspect how well it agrees on texts of groups it was not fitted to.

    Figures: share of equal grades (and of the most frequent grade), quadratic kappa, Spearman's rho
    per text and of the groups' means, over `FOLDS` grouped folds. Raises ValueError for fewer than
    `LEAST_TEXTS` texts, fewer groups than folds, ratings that are no grade and one grade alone.
    """
    from scipy.stats import spearmanr
    from sklearn.metrics import cohen_kappa_score
    from sklearn.model_selection import GroupKFold

    groups = np.array([one.group for one in texts], dtype=object)
    if len(texts) < LEAST_TEXTS or len(set(groups)) < FOLDS:
        raise ValueError(
            f"{len(texts)} texts of {len(set(groups))} groups: calibrating needs {LEAST_TEXTS} "
            f"texts of {FOLDS} groups"
        )
    rows = np.array([text_statistics(one.instruction, one.text) for one in texts])
    targets = {a: np.array([getattr(one, a) for one in texts]) for a in ASPECTS}
    for aspect, values in targets.items():
        if not set(values) <= set(GRADES) or len(set(values)) < 2:
            raise ValueError(f"{aspect} ratings are {sorted(set(values))}; they must be 0, 1 and 2")
    whole = fitted(rows, targets, source)
    folds = GroupKFold(FOLDS, shuffle=True, random_state=seed)
    guesses = {a: np.zeros(len(texts)) for a in ASPECTS}
    for train, test in folds.split(rows, groups=groups):
        part = fitted(rows[train], {a: v[train] for a, v in targets.items()}, source)
        for aspect in ASPECTS:
            guesses[aspect][test] = part.grade(aspect, rows[test])
    figures = []
    for aspect, truth in targets.items():
        guess = guesses[aspect]
        names = sorted(set(groups))
        means = [[v[groups == g].mean() for g in names] for v in (truth, guess)]
        figures.append(
            {
                "aspect": aspect,
                "texts": len(texts),
                "groups": len(names),
                "accuracy": float((guess == truth).mean()),
                "majority": max(float((truth == g).mean()) for g in GRADES),
                "quadratic kappa": float(
                    cohen_kappa_score(truth.astype(int), guess.astype(int), weights="quadratic")
                ),
                "Spearman": float(spearmanr(truth, guess).statistic),
                "Spearman of group means": float(spearmanr(*means).statistic),
            }  # fmt: skip
        )
    return whole, figures


def fitted(rows: np.ndarray, targets: Mapping[str, np.ndarray], source: str) -> Calibration:
    """The regressions on all rows. A grade that no row has is never given."""
    from sklearn.linear_model import LogisticRegression

    middle, spread = rows.mean(axis=0), rows.std(axis=0)
    spread = np.where(spread > 1e-12, spread, 1.0)
    weights: dict[str, tuple[tuple[float, ...], ...]] = {}
    intercepts: dict[str, tuple[float, ...]] = {}
    for aspect, values in targets.items():
        model = LogisticRegression(C=1.0, max_iter=2000).fit((rows - middle) / spread, values)
        coefficients, offsets = model.coef_, model.intercept_
        if len(model.classes_) == 2:  # scikit-learn keeps the second grade's alone
            coefficients = np.concatenate([-coefficients, coefficients]) / 2
            offsets = np.concatenate([-offsets, offsets]) / 2
        place = {float(grade): i for i, grade in enumerate(model.classes_)}
        weights[aspect] = tuple(
            tuple(coefficients[place[g]].tolist()) if g in place else (0.0,) * rows.shape[1]
            for g in GRADES
        )
        intercepts[aspect] = tuple(
            float(offsets[place[g]]) if g in place else NEVER for g in GRADES
        )
    return Calibration(tuple(middle.tolist()), tuple(spread.tolist()), weights, intercepts, source)


@dataclass(frozen=True, eq=False)
class CalibratedRatings:
    """The stand-in's concept rating with instruct and fluency by a calibration; no language model,
    so its results are offline proxy scores and no AxBench scores."""

    readers: Mapping[int, StemLexicon | ConceptWords]
    calibration: Calibration
    name: str = CALIBRATED_NAME
    is_llm: bool = False
    axbench_prompts: bool = False

    @classmethod
    def of(cls, offline: OfflineRatings, path: str | Path) -> CalibratedRatings:
        """The concept readers of the uncalibrated stand-in, with the calibration of a file."""
        return cls(offline.readers, Calibration.load(path))

    @property
    def version(self) -> str:
        return hashed_version(CODE_VERSION, self.fingerprint)

    @property
    def fingerprint(self) -> str:
        readers = {str(n): [type(one).__name__, one] for n, one in sorted(self.readers.items())}
        return content_key([CODE_VERSION, self.name, readers, self.calibration.to_dict()])

    def rate_all(
        self, concept_id: int, concept: str, pairs: Sequence[tuple[str, str]]
    ) -> list[Ratings]:
        """Ratings of (instruction, text) pairs; an empty text is 0 throughout. Raises KeyError for
        a concept without a reader."""
        if concept_id not in self.readers:
            raise KeyError(f"no concept reader for concept {concept_id} ({concept!r})")
        reader, found = self.readers[concept_id], [(0.0, 0.0, 0.0)] * len(pairs)
        written = [i for i, (_, text) in enumerate(pairs) if text.strip()]
        if not written:
            return list(found)
        rows = np.array([text_statistics(*pairs[i]) for i in written])
        grades = [self.calibration.grade(aspect, rows) for aspect in ASPECTS]
        for place, i in enumerate(written):
            concept_grade = reader.grade(reader.score_text(pairs[i][1]))
            found[i] = (concept_grade, float(grades[0][place]), float(grades[1][place]))
        return list(found)
