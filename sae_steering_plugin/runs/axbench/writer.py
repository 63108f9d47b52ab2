"""The files AxBench's own analysis opens, written from this package's rows, and read back.

    RESULTS/NAME_METHOD/inference/latent_data.parquet, steering_data.parquet
    RESULTS/NAME_METHOD/evaluate/latent.jsonl, steering.jsonl, steering_test.jsonl, *_data.parquet

One folder per method, as AxBench leaves them. Ratings stand under AxBench's evaluator key only when
a language model gave them under AxBench's prompts; every other judge has a key of its own and its
name, version and fingerprint beside the ratings, and no file ever holds two judges.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..canonical import content_key
from ..demo import finite
from ..judges.three import AXBENCH_EVALUATOR, RatedBy
from ..parts import write_whole
from .detection import Detection
from .files import EVAL_COLUMNS, ConceptSet, json_lines, write_text
from .ratings import ASPECTS, harmonic_mean, mean_of, selection_half

if TYPE_CHECKING:
    import pandas as pd

MODES = {"steering": True, "steering_test": False}
"""Evaluation files, and whether they hold the half that factors are chosen on."""
RATING_NAMES = {
    "concept": "relevance_concept_ratings",
    "instruct": "relevance_instruction_ratings",
    "fluency": "fluency_ratings",
}
JUDGE_COLUMNS = ("judge_name", "judge_version", "judge_fingerprint", "is_llm", "axbench_prompts")
AXBENCH_NAMES: Mapping[str, str] = {
    "diff_mean": "DiffMean",
    "pca": "PCA",
    "lat": "LAT",
    "probe": "LinearProbe",
    "ssv": "SteeringVector",
    "reft_r1": "LsReFT",
    "sae": "GemmaScopeSAE",
    "sae_auroc": "GemmaScopeSAEMaxAUC",
    "loreft": "LoReFT",
    "lora": "LoRA",
    "prompt": "PromptSteering",
    "bow": "BoW",
}
"""AxBench's names of methods that this package has under another name; any other keeps its own."""


def axbench_name(method: str) -> str:
    """The name AxBench's analysis knows a method by."""
    return AXBENCH_NAMES.get(method, method)


def judge_of(rows: pd.DataFrame) -> RatedBy:
    """The one judge behind rated rows.

    Raises ValueError for rows of two judges (a language model's ratings and a stand-in's are never
    in one table), without a fingerprint, or of unrated rows.
    """
    if missing := [name for name in JUDGE_COLUMNS if name not in rows.columns]:
        raise ValueError(f"these rows are not rated: no column {missing[0]!r}")
    found = rows[list(JUDGE_COLUMNS)].drop_duplicates()
    if len(found) != 1:
        named = "; ".join(f"{row.judge_name} ({row.judge_version})" for row in found.itertuples())
        raise ValueError(
            f"one table holds the ratings of one judge, and here are {len(found)}: "
            f"{named or 'no rows'}"
        )
    row = found.iloc[0]
    return RatedBy(
        str(row["judge_name"]),
        str(row["judge_version"]),
        str(row["judge_fingerprint"]),
        bool(row["is_llm"]),
        bool(row["axbench_prompts"]),
    )


def published_beside(judge: RatedBy) -> None:
    """Raise ValueError unless AxBench's published scores may stand beside this judge's."""
    if not judge.axbench_prompts:
        raise ValueError(
            f"published AxBench scores stand beside no score of {judge.name}: {judge.line}"
        )


# Writing ------------------------------------------------------------------------------------------


def write_results(
    folder: str | Path,
    name: str,
    concepts: ConceptSet,
    rated: pd.DataFrame,
    latent: pd.DataFrame,
    detections: Mapping[tuple[int, str], Detection],
    *,
    instructions: int,
) -> list[Path]:
    """Write every method's folder under `folder`; the paths.

    `rated` are steering rows with their ratings, `latent` the detection rows of each method, and
    `detections` what is read off them per (concept, method). Either frame may be empty. Raises
    ValueError as `judge_of` does, and when a method's folder already holds another judge's ratings.
    """
    judge = judge_of(rated) if len(rated) else None
    methods = list(dict.fromkeys([*rated.get("method", ()), *latent.get("method", ())]))
    written: list[Path] = []
    for method in methods:
        place = Path(folder) / f"{name}_{method}"
        steering = rated[rated["method"] == method] if len(rated) else rated
        if len(steering) and judge is not None:
            refuse_other_judge(place, judge)
            written += write_steering(place, concepts, steering, judge, instructions)
        rows = latent[latent["method"] == method] if len(latent) else latent
        if len(rows):
            found = {c: one for (c, own), one in detections.items() if own == method}
            written += write_latent(place, concepts, rows, found)
    return written


def refuse_other_judge(place: Path, judge: RatedBy) -> None:
    """Raise ValueError when a folder holds ratings under another key or fingerprint."""
    for mode in MODES:
        path = place / "evaluate" / f"{mode}.jsonl"
        if not path.is_file():
            continue
        for _, line in json_lines(path):
            for key, methods in line["results"].items():
                if not key.endswith(("JudgeEvaluator", "ProxyEvaluator")):
                    continue
                prints = {one.get("judge_fingerprint") for one in methods.values()}
                if key != judge.evaluator or prints != {judge.fingerprint}:
                    raise ValueError(
                        f"{path} holds ratings under {key} of another judge than {judge.name} "
                        f"({judge.fingerprint[:12]}): two judges do not share a table; write to "
                        "another folder"
                    )


def write_steering(
    place: Path, concepts: ConceptSet, rows: pd.DataFrame, judge: RatedBy, instructions: int
) -> list[Path]:
    rows = rows.sort_values(["concept_id", "input_id", "factor"], kind="stable")
    frame = steering_frame(concepts, rows)
    written = [write_frame(frame, place / "inference" / "steering_data.parquet")]
    rated = pd_concat_columns(frame, rating_columns(rows, judge))
    half = selection_half(rows["input_id"].tolist(), instructions)
    for mode, selecting in MODES.items():
        kept = half if selecting else ~half
        lines = [
            {"concept_id": int(number), "results": steering_results(part, judge)}
            for number, part in rows[kept].groupby("concept_id", sort=True)
        ]
        written.append(write_lines(lines, place / "evaluate" / f"{mode}.jsonl"))
        written.append(write_frame(rated[kept], place / "evaluate" / f"{mode}_data.parquet"))
    return written


def steering_frame(concepts: ConceptSet, rows: pd.DataFrame) -> pd.DataFrame:
    """`steering_data.parquet` of one method."""
    import pandas as pd

    method = axbench_name(str(rows["method"].iloc[0]))
    known = {one.concept_id: one for one in concepts.concepts}
    listed = [known[int(number)] for number in rows["concept_id"]]
    addresses = [one.address for one in listed]
    return pd.DataFrame(
        {
            "dataset_name": rows["dataset_name"].tolist(),
            "concept_id": rows["concept_id"].tolist(),
            "input_concept": [one.text for one in listed],
            "input_id": rows["input_id"].tolist(),
            "factor": rows["factor"].tolist(),
            "original_prompt": rows["original_prompt"].tolist(),
            "steered_input": rows["steered_input"].tolist(),
            "input": rows["input"].tolist(),
            "sae_link": [one.ref for one in listed],
            "sae_id": [-1 if one is None else one.feature for one in addresses],
            f"{method}_steered_generation": rows["generation"].tolist(),
            f"{method}_perplexity": rows["perplexity"].tolist(),
            f"{method}_strength": rows["strength"].tolist(),
        }
    )


def rating_columns(rows: pd.DataFrame, judge: RatedBy) -> pd.DataFrame:
    """The rating columns of `steering_data.parquet` under evaluation, with the judge's name."""
    import pandas as pd

    method, key = axbench_name(str(rows["method"].iloc[0])), judge.evaluator
    found: dict[str, Any] = {f"{method}_{key}": overall(rows).tolist()}
    for aspect, name in RATING_NAMES.items():
        found[f"{method}_{key}_{name}"] = rows[aspect].tolist()
    return pd.DataFrame({**found, **{k: [v] * len(rows) for k, v in judge.fields().items()}})


def overall(rows: pd.DataFrame) -> np.ndarray:
    return harmonic_mean(rows[list(ASPECTS)].to_numpy(dtype=np.float64))


def steering_results(rows: pd.DataFrame, judge: RatedBy) -> dict[str, Any]:
    """What `steering.jsonl` says of one concept: lists over factors, in the factors' order."""
    method = axbench_name(str(rows["method"].iloc[0]))
    groups = [part for _, part in rows.groupby("factor", sort=True)]
    factors = [float(part["factor"].iloc[0]) for part in groups]

    def means(values: Sequence[np.ndarray]) -> list[float]:
        return [mean_of(np.asarray(one, dtype=np.float64)) for one in values]

    rated: dict[str, Any] = {"lm_judge_rating": means([overall(part) for part in groups])}
    for aspect, name in RATING_NAMES.items():
        rated[name] = means([part[aspect].to_numpy() for part in groups])
        rated[f"raw_{name}"] = rows[aspect].tolist()
        rated[name.replace("_ratings", "_completions")] = [""] * len(rows)
    rated |= {"raw_aggregated_ratings": overall(rows).tolist(), "factor": factors}
    if judge.evaluator != AXBENCH_EVALUATOR:
        rated["note"] = judge.line
    return {
        "PerplexityEvaluator": {
            method: {
                "perplexity": [float(part["perplexity"].mean()) for part in groups],
                "median_perplexity": [float(part["perplexity"].median()) for part in groups],
                "strength": [float(part["strength"].mean()) for part in groups],
                "factor": factors,
            }
        },
        judge.evaluator: {method: {**rated, **judge.fields()}},
    }


def write_latent(
    place: Path, concepts: ConceptSet, rows: pd.DataFrame, found: Mapping[int, Detection]
) -> list[Path]:
    method = axbench_name(str(rows["method"].iloc[0]))
    frame = latent_frame(concepts, rows)
    lines = [
        {
            "concept_id": int(number),
            "results": {key: {method: value} for key, value in one.fields().items()},
        }
        for number, one in sorted(found.items())
    ]
    return [
        write_frame(frame, place / "inference" / "latent_data.parquet"),
        write_lines(lines, place / "evaluate" / "latent.jsonl"),
        write_frame(frame, place / "evaluate" / "latent_data.parquet"),
    ]


def latent_frame(concepts: ConceptSet, rows: pd.DataFrame) -> pd.DataFrame:
    """`latent_data.parquet` of one method: the evaluation rows, with scores instead of `input`."""
    import pandas as pd

    method = axbench_name(str(rows["method"].iloc[0]))
    own = rows[rows["row"] >= 0]
    parts = []
    for number, part in own.groupby("concept_id", sort=True):
        texts = concepts.held_out(int(number)).iloc[part["row"].tolist()].reset_index(drop=True)
        scores = part.reset_index(drop=True)
        texts["input"] = scores["input"]
        texts["tokens"] = scores["tokens"]
        texts[f"{method}_acts"] = scores["acts"]
        texts[f"{method}_max_act"] = scores["score"]
        texts[f"{method}_max_act_idx"] = scores["max_index"]
        texts[f"{method}_max_token"] = scores["max_token"]
        parts.append(texts)
    return pd.concat(parts, ignore_index=True)


def pd_concat_columns(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    return pd.concat([left.reset_index(drop=True), right], axis=1)


def write_frame(frame: pd.DataFrame, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, lambda path: frame.to_parquet(path, index=False))
    return target


def write_lines(lines: Sequence[Mapping[str, Any]], target: Path) -> Path:
    """JSON lines as AxBench reads them; a number that is not finite is null."""
    target.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(finite(line), ensure_ascii=False) + "\n" for line in lines)
    write_text(target, text)
    return target


# Reading back -------------------------------------------------------------------------------------


def read_evaluation(path: str | Path) -> dict[int, dict[str, Any]]:
    """An `evaluate/*.jsonl`: results by concept. Raises ValueError that names the line."""
    found: dict[int, dict[str, Any]] = {}
    for number, line in json_lines(Path(path)):
        if not isinstance(line.get("results"), dict) or not isinstance(line.get("concept_id"), int):
            raise ValueError(f"{path}, line {number}: 'concept_id' and 'results' are needed")
        found[line["concept_id"]] = line["results"]
    return found


def results_fingerprint(path: str | Path) -> str:
    """A hash of an evaluation file's content, whatever the order of its lines."""
    return content_key({str(k): v for k, v in read_evaluation(path).items()})


def missing_columns(frame: pd.DataFrame, method: str, kind: str) -> list[str]:
    """The documented columns (`latent` or `steering`) that a frame lacks."""
    name = axbench_name(method)
    per_method = {
        "latent": ["acts", "max_act", "max_act_idx", "max_token"],
        "steering": ["steered_generation", "perplexity", "strength"],
    }
    shared = {
        "latent": [*EVAL_COLUMNS, "tokens"],
        "steering": [
            "dataset_name",
            "concept_id",
            "input_concept",
            "input_id",
            "factor",
            "original_prompt",
            "steered_input",
            "input",
            "sae_link",
            "sae_id",
        ],
    }
    wanted = [*shared[kind], *(f"{name}_{one}" for one in per_method[kind])]
    return [one for one in wanted if one not in frame.columns]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
