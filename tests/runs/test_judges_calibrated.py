"""Ratings by a planted rule: found again by calibration, and not when they are shuffled."""

import json
import random
from dataclasses import replace

import pytest

from sae_steering_plugin.runs.axbench.evaluation import open_ratings
from sae_steering_plugin.runs.judges.calibrated import (
    ASPECTS,
    STATISTICS,
    CalibratedRatings,
    Calibration,
    RatedText,
    calibrate,
    read_published,
    text_statistics,
)
from sae_steering_plugin.runs.judges.offline import ConceptWords
from sae_steering_plugin.runs.judges.three import PROXY_EVALUATOR, RatedBy, ThreeRatings
from tests.runs.axbench.sets import small_set

TOPICS = ("ships", "bread", "music", "trains", "gardens", "bridges")
FILLERS = ("slowly", "often", "together", "yesterday", "nearby", "perhaps", "again", "outside")


def planted(n: int = 240, seed: int = 0) -> list[RatedText]:
    """Fluency falls with repetition, instruct rises with the words of the instruction taken up."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        topic, place = rng.choice(TOPICS), rng.choice(TOPICS)
        asked = f"Tell me about {topic} and {place}."
        taken = rng.randrange(3)
        words = {0: [], 1: [topic], 2: [topic, place]}[taken]
        fluency = rng.randrange(3)
        filler = rng.sample(FILLERS, 6)
        body = {2: filler, 1: filler[:3] * 2, 0: filler[:1] * 6}[fluency]
        said = [*words, *body, "stands", "there"]
        rng.shuffle(said)
        if topic == place and taken == 1:
            taken = 2  # one word is all that was asked for
        found.append(RatedText(asked, " ".join(said), float(taken), float(fluency), f"g{i % 12}"))
    return found


@pytest.fixture(scope="module")
def calibrated():
    return calibrate(planted())


def test_a_planted_rule_is_found_again_on_groups_left_out_and_shuffled_ratings_are_not(calibrated):
    _, figures = calibrated
    for row in figures:
        assert row["accuracy"] > 0.85 > 0.6 > row["majority"]
        assert row["quadratic kappa"] > 0.85 and row["Spearman"] > 0.85
    assert [row["aspect"] for row in figures] == list(ASPECTS)
    texts = planted()
    order = random.Random(1).sample(range(len(texts)), len(texts))
    shuffled = [
        replace(one, instruct=texts[j].instruct, fluency=texts[j].fluency)
        for one, j in zip(texts, order, strict=True)
    ]
    for row in calibrate(shuffled)[1]:
        # kappa of independent ratings has a standard error of about 1 / sqrt(240) = .065
        assert abs(row["quadratic kappa"]) < 0.2


def test_statistics_are_the_thirteen_of_the_page():
    found = dict(
        zip(STATISTICS, text_statistics("Tell me of ships.", "a ship, a ship!"), strict=True)
    )
    assert found["distinct words"] == 0.5 and found["top word"] == 0.5
    assert found["stem recall"] == 0.0 and found["punctuation"] == 2 / 15  # "ships" is no "ship"
    assert found["function words"] == 0.0 and found["under three words"] == 0.0
    empty = text_statistics("Tell me of ships.", "")
    assert len(empty) == len(STATISTICS) == 13 and empty[1] == 1.0


def test_a_calibration_read_again_rates_alike_and_is_an_offline_proxy(calibrated, tmp_path):
    made, _ = calibrated
    path = made.save(tmp_path / "calibration.json")
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert Calibration.load(path) == made
    judge = CalibratedRatings({0: ConceptWords.of("sailing ships")}, made)
    assert isinstance(judge, ThreeRatings) and RatedBy.of(judge).evaluator == PROXY_EVALUATOR
    good = "music ships stands there slowly often together nearby perhaps again"
    bad = "often often often often often often stands there"
    pairs = [("Tell me about music and ships.", text) for text in (good, bad, "")]
    rated = judge.rate_all(0, "sailing ships", pairs)
    assert rated[0][1:] == (2.0, 2.0) and rated[1][1:] == (0.0, 0.0) and rated[2] == (0.0, 0.0, 0.0)
    other = replace(made, source="elsewhere")
    assert CalibratedRatings(judge.readers, other).fingerprint != judge.fingerprint
    with pytest.raises(KeyError, match="no concept reader for concept 1"):
        judge.rate_all(1, "music", [])
    opened = open_ratings(f"offline:{path}", small_set())
    assert opened.name == "offline-proxy-calibrated" and not opened.is_llm


def test_published_files_are_joined_by_feature_and_a_mismatch_is_named(tmp_path):
    texts = [f"text {i}" for i in range(5)]
    scores = {"fluency": [2, 1, 0, 2, None], "instruct": [0, 1, 2, 2, 1]}
    paths = {}
    for aspect, values in scores.items():
        paths[aspect] = tmp_path / f"{aspect}.json"
        paths[aspect].write_text(json.dumps({"20_7": {"scores": values, "responses": texts}}))
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"20_7": [f"do {i}" for i in range(10)]}))
    found = read_published(paths["fluency"], paths["instruct"], asked)
    assert [(one.instruction, one.instruct, one.fluency) for one in found] == [
        ("do 5", 0.0, 2.0), ("do 6", 1.0, 1.0), ("do 7", 2.0, 0.0), ("do 8", 2.0, 2.0),
    ]  # fmt: skip
    assert {one.group for one in found} == {"20_7"}
    other = {"20_7": {"scores": scores["instruct"], "responses": texts[::-1]}}
    paths["instruct"].write_text(json.dumps(other))
    with pytest.raises(ValueError, match="'20_7': the two files rate different responses"):
        read_published(paths["fluency"], paths["instruct"], asked)
    asked.write_text("{}")
    with pytest.raises(ValueError, match="'20_7' is in .* and not in both other files"):
        read_published(paths["fluency"], paths["instruct"], asked)


def test_what_cannot_be_calibrated_says_why(tmp_path):
    with pytest.raises(ValueError, match="10 texts of 10 groups: calibrating needs 50"):
        calibrate(planted(10))
    with pytest.raises(ValueError, match="fluency ratings are .* must be 0, 1 and 2"):
        calibrate([replace(one, fluency=1.5) for one in planted()])
    path = tmp_path / "bad.json"
    path.write_text('{"statistics": []}')
    with pytest.raises(ValueError, match="holds no calibration: it is fitted to other statistics"):
        Calibration.load(path)
