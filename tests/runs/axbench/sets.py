"""A concept set as small as the rules allow, and AxBench's own where it is at hand."""

from pathlib import Path

import pandas as pd
import pytest

from sae_steering_plugin.runs.axbench.files import SHARED, Concept, ConceptSet

LINK = "https://www.neuronpedia.org/tiny/0-test-res/{}"


def small_set(concepts: int = 2, n: int = 3) -> ConceptSet:
    """Concepts of genres text and code in turn, with shared negatives of both."""
    listed = tuple(
        Concept(i, f"concept {i}", ("text", "code")[i % 2 :][:1], LINK.format(i))
        for i in range(concepts)
    )
    train, held = [], []
    for genre in ("text", "code"):
        train += [row(SHARED, "EEEEE", genre, "negative", j) for j in range(n)]
    for one in listed:
        ids = {"sae_link": one.ref, "sae_id": one.concept_id}
        train += [row(one.concept_id, one.text, one.genre, "positive", j) for j in range(n)]
        for category in ("positive", "negative"):
            held += [
                {**row(one.concept_id, one.text, "text", category, j), **ids} for j in range(n)
            ]
        held.append({**row(one.concept_id, "a//b", "text", "hard negative", 0), **ids})
    return ConceptSet(listed, pd.DataFrame(train), pd.DataFrame(held))


def row(number: int, concept: str, genre: str, category: str, j: int) -> dict[str, object]:
    return {
        "input": f"say {j}",
        "output": f"{category} {concept} {genre} {j}",
        "output_concept": concept,
        "concept_genre": genre,
        "category": category,
        "dataset_category": "instruction",
        "concept_id": number,
    }


def axbench_folder(data: Path, name: str) -> Path:
    folder = data / "axbench" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder
