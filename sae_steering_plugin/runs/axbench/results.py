"""What a run's rows say: detections, ratings, scores per concept, tables and paired tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...effects.contrast import corrected, effect
from ...effects.intervals import mean_interval
from ..judges.offline import OfflineRatings, concept_reader
from ..judges.three import RatedBy, ThreeRatings
from .detection import Detection, detect
from .files import ConceptSet
from .ratings import (
    ASPECTS,
    Missing,
    SteeringScore,
    as_array,
    hm_of_means,
    mean_of,
    perplexity,
    selection_half,
    steering_score,
    uncovered,
    winrate,
)
from .writer import judge_of, write_results

if TYPE_CHECKING:
    import pandas as pd

    from ...types import Effect

Rows = list[dict[str, Any]]
REFERENCES = ("sae", "sae_named")
"""What winrates are against: the feature of the concept's label, or the one named like it."""
FALLBACK = "diff_mean"
"""The method that steers where another found nothing to steer with, in a column of its own."""


def offline_ratings(concepts: ConceptSet) -> OfflineRatings:
    """The stand-in judge of a concept set: a lexicon per concept from its training texts, and a
    character model of the negative training texts where there are enough."""
    readers = {}
    for one in concepts.concepts:
        rows = concepts.training(one.concept_id) if len(concepts.train) else concepts.train
        positive, negative = (
            rows[rows["category"] == side]["output"].tolist() for side in ("positive", "negative")
        )
        readers[one.concept_id] = concept_reader(one.text, positive, negative)
    negatives = concepts.train[concepts.train["category"] == "negative"]["output"].tolist()
    return OfflineRatings.of(readers, reference=negatives if len(negatives) >= 20 else ())


@dataclass(frozen=True, eq=False)
class AxBenchResults:
    """The collected rows of a run over `concepts`, with `instructions` per concept."""

    rows: pd.DataFrame
    concepts: ConceptSet
    instructions: int
    name: str = "axbench"

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(self.rows["method"]))

    @cached_property
    def latent(self) -> pd.DataFrame:
        """Detection rows that hold a score (`row` -1: another concept's negative)."""
        rows = self.rows
        return rows[(rows["what"] == "detection") & rows["score"].notna()].astype({"row": "int64"})

    @cached_property
    def steered(self) -> pd.DataFrame:
        """Steering rows with a generation, and their perplexity."""
        rows = self.rows
        found = rows[(rows["what"] == "steering") & rows["input_id"].notna()]
        values = [
            perplexity(total, int(count))
            for total, count in zip(found["nll"], found["nll_tokens"], strict=True)
        ]
        return found.astype({"input_id": "int64"}).assign(perplexity=values, dataset_name=self.name)

    def uncovered(self) -> set[tuple[int, str]]:
        """(concept, method) pairs where the method had nothing to steer with."""
        rows = self.rows[self.rows["covered"].eq(False)]
        return {(int(c), m) for c, m in zip(rows["concept_id"], rows["method"], strict=True)}

    # Detection ------------------------------------------------------------------------------------

    @cached_property
    def detections(self) -> dict[tuple[int, str], Detection]:
        """What every method's scores say of every concept it detects."""
        found = {}
        for (number, method), part in self.latent.groupby(["concept_id", "method"], sort=False):
            own, more = part[part["row"] >= 0], part[part["row"] < 0]
            found[int(number), str(method)] = detect(
                own["score"].tolist(),
                own["category"].tolist(),
                further=more["score"].tolist(),
            )
        return found

    def detection_table(self) -> Rows:
        """One row per method: mean AUROC over concepts, its interval, and what stands beside."""
        table = []
        for method in self.methods:
            own = [one for (_, name), one in self.detections.items() if name == method]
            if not own:
                continue
            found = [one.auroc for one in own]
            hard = [one.hard_accuracy for one in own if one.hard_accuracy is not None]
            best = [one.best_f1 for one in own if one.best_f1 is not None]
            table.append(
                {
                    "method": method,
                    "concepts": len(own),
                    "AUROC": shown(float(np.mean(found))),
                    "95% interval": interval_of(found),
                    "hard negatives, accuracy": shown(mean_of(np.array(hard, dtype=float))),
                    "imbalanced F1": shown(mean_of(np.array(best, dtype=float))),
                }
            )
        return table

    # Steering -------------------------------------------------------------------------------------

    def rated(self, judge: ThreeRatings, *, missing: Missing = "left out") -> pd.DataFrame:
        """The steering rows with the judge's ratings and its name, version and fingerprint in each.

        A rating that was not given is NaN, or 0 with `missing="zero"` (AxBench's code).
        """
        identity = RatedBy.of(judge)
        parts = []
        for number, part in self.steered.groupby("concept_id", sort=False):
            pairs = list(zip(part["original_prompt"], part["generation"], strict=True))
            concept = self.concepts.concept(int(number)).text
            values = as_array(judge.rate_all(int(number), concept, pairs), missing)
            parts.append(part.assign(**dict(zip(ASPECTS, values.T, strict=True))))
        if not parts:
            raise ValueError("this run has no steered text to rate")
        import pandas as pd

        return pd.concat(parts, ignore_index=True).assign(
            **identity.fields(),
            is_llm=identity.is_llm,
            axbench_prompts=identity.axbench_prompts,
        )

    def scores(self, rated: pd.DataFrame) -> list[SteeringScore]:
        """One score per concept and method, of one judge. Raises ValueError as `judge_of` does."""
        judge_of(rated)
        found = [
            steering_score(
                int(number),
                str(method),
                part["factor"].tolist(),
                part["input_id"].tolist(),
                part[list(ASPECTS)].to_numpy(dtype=np.float64),
                instructions=self.instructions,
                has_factor=bool(part["has_factor"].all()),
            )
            for (number, method), part in rated.groupby(["concept_id", "method"], sort=False)
        ]
        steering = self.rows[self.rows["what"] == "steering"]
        tried = set(zip(steering["concept_id"], steering["method"], strict=True))
        return found + [uncovered(*one) for one in sorted(self.uncovered() & tried)]

    def steering_table(
        self, rated: pd.DataFrame, scores: Sequence[SteeringScore] | None = None
    ) -> Rows:
        """One row per method over all concepts, an uncovered one counting as 0.

        Ratings, perplexity and displacement are of the rows behind the score. Winrates are against
        the first of `REFERENCES` that was run. `with DiffMean` is the score when an uncovered
        concept falls back to that method instead of to nothing. `HM of means` is another paper's
        aggregation (`hm_of_means`).
        """
        scores = self.scores(rated) if scores is None else scores
        by_method = grouped(scores)
        against = next((by_method[one] for one in REFERENCES if one in by_method), None)
        instead = score_of(by_method.get(FALLBACK, ()))
        table = []
        for method in [one for one in self.methods if one in by_method]:
            own = by_method[method]
            behind = self.reported_rows(rated, own)
            values = [one.score for one in own]
            kept = [one for one in own if one.covered]
            table.append(
                {
                    "method": method,
                    "score": shown(float(np.mean(values))),
                    "95% interval": interval_of(values),
                    **{name: shown(mean_of(behind[name].to_numpy(float))) for name in ASPECTS},
                    "perplexity, median": shown(float(behind["perplexity"].median())),
                    "displacement": shown(float(behind["displacement"].mean())),
                    "factor, median": shown(median([one.factor for one in kept])),
                    "winrate vs sae": ""
                    if against is None
                    else shown(winrate(score_of(own), score_of(against)), 3),
                    "concepts": len(own),
                    "covered": len(kept),
                    "with DiffMean": fallen_back(own, instead),
                    "HM of means": shown(hm_of_means(own)),
                    "covered score": shown(mean_of(np.array([one.score for one in kept]))),
                    "fallback 50": behind[behind["fallback"].eq(True)]["concept_id"].nunique(),
                    "unrated": sum(one.unrated for one in own),
                }
            )
        return table

    def reported_rows(self, rated: pd.DataFrame, scores: Sequence[SteeringScore]) -> pd.DataFrame:
        """The rows behind one method's scores: its factor per concept, the reported half."""
        chosen = {one.concept_id: one.factor for one in scores if one.covered}
        rows = rated[rated["method"] == scores[0].method]
        half = selection_half(rows["input_id"].tolist(), self.instructions)
        at = [
            number in chosen and chosen[number] in (None, factor)
            for number, factor in zip(rows["concept_id"], rows["factor"], strict=True)
        ]
        return rows[~half & np.array(at, dtype=bool)]

    def compared(
        self, scores: Sequence[SteeringScore], pairs: Sequence[tuple[str, str]], *, judge: str
    ) -> tuple[Effect, ...]:
        """Each (method, reference) on the same concepts: paired tests, Holm over all of them.

        Pairs with a method that was not run are left out. Raises ValueError when two methods do not
        have the same concepts.
        """
        found, by_method = [], grouped(scores)
        for method, reference in pairs:
            if method not in by_method or reference not in by_method:
                continue
            arm, base = score_of(by_method[method]), score_of(by_method[reference])
            if set(arm) != set(base):
                raise ValueError(f"{method} and {reference} were not scored on the same concepts")
            if len(arm) > 1:
                order = sorted(arm)
                found.append(
                    effect(
                        [base[one] for one in order],
                        [arm[one] for one in order],
                        method=f"{method} against {reference}",
                        outcome="score",
                        judge=judge,
                    )
                )
        return corrected(found)

    def notes(self) -> Rows:
        """What was cut, not covered or given the fallback, counted."""
        found: Rows = []
        cut = self.latent[self.latent["row"] >= 0]
        if len(cut) and cut["cut"].fillna(False).any():
            first = cut[cut["method"] == cut["method"].iloc[0]]
            found.append(
                {
                    "what": f"{int(first['cut'].fillna(False).sum())} of {len(first)} evaluation "
                    "texts were longer than the model's bound and read up to it"
                }
            )
        for number, method in sorted(self.uncovered()):
            rows = self.rows
            chosen = rows[(rows["concept_id"] == number) & (rows["method"] == method)]
            found.append(
                {"what": f"{method}, concept {number}: not covered ({chosen['why'].iloc[0]})"}
            )
        empty = int((self.steered["generation"].str.strip() == "").sum())
        if empty:
            found.append({"what": f"{empty} of {len(self.steered)} generations are empty: all 0"})
        return found

    def write(self, folder: str | Path, rated: pd.DataFrame | None = None) -> list[Path]:
        """AxBench's files, one folder per method; see `writer`."""
        rows = self.steered.iloc[:0] if rated is None else rated
        found = dict(self.detections)
        return write_results(
            folder,
            self.name,
            self.concepts,
            rows,
            self.latent,
            found,
            instructions=self.instructions,
        )


def fallen_back(scores: Sequence[SteeringScore], instead: Mapping[int, float]) -> str:
    """The mean score with `instead` where nothing was found; empty where that was not run."""
    if not instead:
        return ""
    return shown(float(np.mean([s.score if s.covered else instead[s.concept_id] for s in scores])))


def grouped(scores: Sequence[SteeringScore]) -> dict[str, list[SteeringScore]]:
    found: dict[str, list[SteeringScore]] = {}
    for one in scores:
        found.setdefault(one.method, []).append(one)
    return found


def score_of(scores: Sequence[SteeringScore]) -> Mapping[int, float]:
    return {one.concept_id: one.score for one in scores}


def interval_of(values: Sequence[float]) -> str:
    """The bootstrap interval of a mean over concepts; empty for one concept."""
    if len(values) < 2:
        return ""
    found = mean_interval(values, seed=0)
    return f"{found.low:.3f} to {found.high:.3f}"


def median(values: Sequence[float | None]) -> float:
    kept = [one for one in values if one is not None]
    return float(np.median(kept)) if kept else math.nan


def shown(value: float, digits: int = 4) -> str:
    """A number as a table shows it; empty for none."""
    return "" if math.isnan(value) else f"{value:.{digits}g}"
