"""AxBench's three ratings of a text, concept, instruct and fluency, whoever gives them.

A language model gives them through the judges of this room: three rubrics, each reply read strictly
and kept in the cache. The rubrics of this project are worded by it; only with AxBench's own prompts
(read from files) may a result carry the name of AxBench's judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..canonical import content_key
from .protocol import Item, Judge, judge_identity

Ratings = tuple[float | None, float | None, float | None]
"""(concept, instruct, fluency) from 0 to 2; None where the judge gave none."""
RUBRIC_WORDS = ("concept", "instruction", "fluency")

AXBENCH_EVALUATOR = "LMJudgeEvaluator"
LLM_EVALUATOR = "OwnPromptLMJudgeEvaluator"
PROXY_EVALUATOR = "OfflineProxyEvaluator"
PROXY_LINE = "offline proxy score, not an AxBench score"
LLM_LINE = "language-model score under this project's own prompts, not an AxBench score"
AXBENCH_LINE = "language-model score under AxBench's prompts"


@runtime_checkable
class ThreeRatings(Protocol):
    """Rates texts three times. Equal `fingerprint` means equal ratings of equal texts.

    `is_llm` says that a language model reads the text, `axbench_prompts` that it is asked in
    AxBench's own words. `rate_all` takes (instruction, text) pairs of one concept.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def is_llm(self) -> bool: ...

    @property
    def axbench_prompts(self) -> bool: ...

    def rate_all(
        self, concept_id: int, concept: str, pairs: Sequence[tuple[str, str]]
    ) -> list[Ratings]: ...


@dataclass(frozen=True)
class RatedBy:
    """Who rated: what every row and file of ratings carries, and the key they are written under."""

    name: str
    version: str
    fingerprint: str
    is_llm: bool
    axbench_prompts: bool = False

    def __post_init__(self) -> None:
        if self.axbench_prompts and not self.is_llm:
            raise ValueError(f"{self.name} is no language model, so it was asked in nobody's words")
        if not self.fingerprint:
            raise ValueError(f"the judge {self.name!r} has no fingerprint")

    @classmethod
    def of(cls, judge: ThreeRatings) -> RatedBy:
        return cls(
            judge.name, judge.version, judge.fingerprint, judge.is_llm, judge.axbench_prompts
        )

    @property
    def evaluator(self) -> str:
        """The evaluator key: AxBench's own for a language model under AxBench's prompts alone."""
        if self.axbench_prompts:
            return AXBENCH_EVALUATOR
        return LLM_EVALUATOR if self.is_llm else PROXY_EVALUATOR

    @property
    def line(self) -> str:
        """What stands over every table of these ratings."""
        if self.axbench_prompts:
            return AXBENCH_LINE
        return LLM_LINE if self.is_llm else PROXY_LINE

    def fields(self) -> dict[str, Any]:
        return {
            "judge_name": self.name,
            "judge_version": self.version,
            "judge_fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, eq=False)
class LLMRatings:
    """Three judges of `runs.judges`, one per rating, in the order concept, instruct, fluency."""

    judges: tuple[Judge, Judge, Judge]
    axbench_prompts: bool = False

    @classmethod
    def open(
        cls,
        word: str,
        *,
        prompts: str | Path | None = None,
        cache: str | Path | None = None,
        **options: Any,
    ) -> LLMRatings:
        """The ratings of `api:MODEL@URL` or `model:FOLDER` (see `open_judge`).

        `prompts` is a folder with AxBench's own prompts as `concept.json`, `instruction.json` and
        `fluency.json` (`read_rubric`); without it this project's own wording is asked, and results
        are not written under AxBench's key. Raises ValueError for a judge that asks no model.
        """
        from .opening import open_judge

        if word.partition(":")[0] not in ("api", "model"):
            raise ValueError(
                f"{word!r} asks no language model; write api:MODEL@BASE_URL or model:FOLDER"
            )
        asked = [one if prompts is None else Path(prompts) / f"{one}.json" for one in RUBRIC_WORDS]
        found = [open_judge(word, rubric=one, cache=cache, **options) for one in asked]
        return cls((found[0], found[1], found[2]), axbench_prompts=prompts is not None)

    @property
    def name(self) -> str:
        return self.judges[0].name.rpartition("/")[0] or self.judges[0].name

    @property
    def version(self) -> str:
        return ", ".join(one.version for one in self.judges)

    @property
    def fingerprint(self) -> str:
        """A hash of all three judges: model, settings and the wording of each prompt."""
        return content_key([judge_identity(one) for one in self.judges])

    @property
    def is_llm(self) -> bool:
        return True

    def rate_all(
        self, concept_id: int, concept: str, pairs: Sequence[tuple[str, str]]
    ) -> list[Ratings]:
        """The ratings of (instruction, text) pairs; an empty text is 0 throughout, unasked."""
        del concept_id
        written = [number for number, (_, text) in enumerate(pairs) if text.strip()]
        items = [Item(pairs[number][1], pairs[number][0], concept) for number in written]
        columns = [[one.score for one in judge.score(items)] for judge in self.judges]
        found: list[Ratings] = [(0.0, 0.0, 0.0)] * len(pairs)
        for place, number in enumerate(written):
            found[number] = (columns[0][place], columns[1][place], columns[2][place])
        return found
