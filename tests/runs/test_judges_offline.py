"""The stand-in for AxBench's judges: exact on words, the same everywhere, named as what it is."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_steering_plugin.runs.axbench.detection import detect
from sae_steering_plugin.runs.axbench.files import read_axbench
from sae_steering_plugin.runs.axbench.results import offline_ratings
from sae_steering_plugin.runs.judges.offline import (
    OFFLINE_NAME,
    ConceptWords,
    Fluency,
    Grams,
    OfflineRatings,
    StemRecall,
    fit_stems,
    fluency_statistics,
)
from sae_steering_plugin.runs.judges.three import (
    LLM_EVALUATOR,
    PROXY_EVALUATOR,
    LLMRatings,
    RatedBy,
    ThreeRatings,
)
from tests.runs.axbench.sets import axbench_folder

LEXICON_AUROC = {"concept10/prod_2b_l10_v1": 0.92, "concept10/prod_9b_l20_v1": 0.94}
WORDS_AUROC = {"concept10/prod_2b_l10_v1": 0.836, "concept10/prod_9b_l20_v1": 0.888}
"""The second is measured by this project's notes, with another list of function words."""


def ratings(**options) -> OfflineRatings:
    return OfflineRatings({0: ConceptWords.of("the sailing of ships")}, **options)


def test_a_lexicon_holds_the_words_that_only_positive_texts_have():
    high = [f"the captain sails the ship {n}" for n in range(6)]
    low = [f"the cook bakes the bread {n}" for n in range(6)]
    found = fit_stems(high, low)
    assert set(found.weights) == {"capta", "sails", "ship"}
    assert all(found.grade(found.score_text(text)) >= 1 for text in high)
    assert all(found.grade(found.score_text(text)) == 0 for text in low)
    weight = np.log(6.5 / 7) - np.log(0.5 / 7)
    assert list(found.weights.values()) == pytest.approx([weight] * 3)


def test_a_concept_without_telling_texts_or_words_is_refused():
    with pytest.raises(ValueError, match="no stem stands in 4 of the 2 positive texts"):
        fit_stems(["a ship", "a ship"], ["a cook"])
    with pytest.raises(ValueError, match="has no content word"):
        ConceptWords.of("the of and")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Ships were sailing past the old harbour.", 2.0),
        ("Ships lay in the harbour for days.", 2.0),
        ("A cook baked bread for all of them.", 0.0),
    ],
)
def test_the_concept_is_read_by_the_share_of_its_words(text, expected):
    assert ratings().rate(0, "", "talk about it", text)[0] == expected


def test_the_instruction_is_rated_by_the_recall_of_its_topic_words():
    judge = StemRecall()
    asked = "Describe the history of Rome"
    assert judge.score_text(asked, "Rome has a long history.") == 1.0
    assert judge.score_text(asked, "Romes and histories") == 0.5  # stems are the first five letters
    assert judge.grade(judge.score_text(asked, "Bread and cheese.")) == 0.0
    assert judge.score_text("do it", "it is done") == 0.5  # no topic word: all words count
    assert judge.score_text("42", "anything") is None


@pytest.mark.parametrize(
    "text, statistic",
    [
        ("the ship the ship the ship the ship the ship the ship", "repeated"),
        ("good aaaaaaaaaaaaaaaaaaaaaaaa morning dear friends of mine", "runs"),
        ("доброе утро дорогие друзья and then we are going home", "non_ascii"),
        ("two words", "under 3 words"),
    ],
)
def test_degenerate_text_is_not_fluent_and_the_reason_is_named(text, statistic):
    rating, why = Fluency().rating(text)
    assert rating < 2.0 and why.startswith(statistic)


def test_ordinary_text_is_fluent_whatever_its_length():
    text = (
        "The harbour was quiet in the morning. Two boats had come in during the night, and their "
        "crews slept below deck while gulls walked along the pier looking for scraps of fish."
    )
    assert Fluency().rating(text)[0] == Fluency().rating(text[:60])[0] == 2.0
    assert max(fluency_statistics(text).values()) < 0.25


def test_text_unlike_the_reference_is_surprising():
    words = [
        "harbour",
        "morning",
        "boats",
        "night",
        "crew",
        "deck",
        "gulls",
        "pier",
        "fish",
        "sail",
    ]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 12)) for _ in range(60)]
    grams = Grams.of(texts)
    assert abs(grams.surprise(" ".join(rng.choice(words, 12)))) < 2
    assert grams.surprise("qzx vvk jjq wqx zzk qqj xkz vqj kkx zqv") > 2
    with pytest.raises(ValueError, match="needs 20 reference texts, not 3"):
        Grams.of(texts[:3])


@given(st.text(max_size=80))
def test_any_text_has_ratings_on_the_scale_and_the_same_in_every_normal_form(text):
    judge = ratings()
    found = judge.rate(0, "", "talk about ships", text)
    assert set(found) <= {0.0, 1.0, 2.0}
    forms = {
        judge.rate(0, "", "talk about ships", unicodedata.normalize(f, text))[:2]
        for f in ("NFC", "NFD")
    }
    assert len(forms) == 1


def test_empty_text_is_rated_zero_and_unknown_concepts_and_wordless_instructions_are_refused():
    assert ratings().rate(0, "", "talk", " \n") == (0.0, 0.0, 0.0)
    with pytest.raises(KeyError, match="no concept reader for concept 3"):
        ratings().rate(3, "", "talk", "text")
    with pytest.raises(ValueError, match="has no word to look for"):
        ratings().rate(0, "", "42", "some text here")


def test_the_name_says_that_it_is_uncalibrated_and_the_key_that_it_is_a_proxy():
    judge = ratings()
    assert isinstance(judge, ThreeRatings)
    assert judge.name == OFFLINE_NAME and "uncalibrated" in judge.name
    assert RatedBy.of(judge).evaluator == PROXY_EVALUATOR
    assert RatedBy.of(judge).line == "offline proxy score, not an AxBench score"


def test_the_fingerprint_follows_lexicon_cuts_and_reference():
    texts = [f"harbour morning {n} boats and gulls" for n in range(20)]
    prints = {
        ratings().fingerprint,
        OfflineRatings({0: ConceptWords.of("cooking")}).fingerprint,
        ratings(instruct=StemRecall((0.1, 0.5))).fingerprint,
        OfflineRatings.of(
            {0: ConceptWords.of("the sailing of ships")}, reference=texts
        ).fingerprint,
    }
    assert len(prints) == 4 and ratings().fingerprint == ratings().fingerprint


@pytest.mark.parametrize("name", LEXICON_AUROC)
def test_lexicons_of_axbench_concepts_tell_held_out_texts_apart(name, data):
    concepts = read_axbench(axbench_folder(data, name))
    judge = offline_ratings(concepts)
    fitted, words = [], []
    for one in concepts.concepts:
        held = concepts.held_out(one.concept_id)
        kinds, plain = held["category"].tolist(), ConceptWords.of(one.text)
        reader = judge.readers[one.concept_id]
        fitted.append(detect([reader.score_text(text) for text in held["output"]], kinds).auroc)
        words.append(detect([plain.score_text(text) for text in held["output"]], kinds).auroc)
    assert np.mean(fitted) > LEXICON_AUROC[name]
    assert np.mean(words) == pytest.approx(WORDS_AUROC[name], abs=0.01)
    fluent = [judge.fluency.rating(text)[0] for text in concepts.evaluation["output"]]
    assert np.mean(fluent) > 1.8


class Echo:
    """A judge that gives the number of words of what it is asked about, up to 2."""

    name, version, stand_in = "api:m@h/concept", "1", False

    def __init__(self) -> None:
        from sae_steering_plugin.runs.judges.rubric import RUBRICS

        self.scale, self.asked = RUBRICS["concept"].scale, []

    def score(self, items):
        from sae_steering_plugin.runs.judges import Verdict

        self.asked += items
        return [
            Verdict(None, "no rating", self.name, self.version)
            if "silent" in one.text
            else Verdict(min(2.0, float(len(one.text.split()))), "", self.name, self.version)
            for one in items
        ]


def test_a_language_models_ratings_keep_their_order_and_empty_texts_are_not_asked_about():
    judges = (Echo(), Echo(), Echo())
    found = LLMRatings(judges)
    pairs = [("do", "one two"), ("do", "  "), ("do", "one"), ("do", "silent")]
    assert found.rate_all(0, "a concept", pairs) == [
        (2.0, 2.0, 2.0),
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        (None, None, None),
    ]
    assert [one.text for one in judges[1].asked] == ["one two", "one", "silent"]
    assert judges[0].asked[0].concept == "a concept"
    assert RatedBy.of(found).evaluator == LLM_EVALUATOR
    assert RatedBy.of(LLMRatings(judges, axbench_prompts=True)).evaluator == "LMJudgeEvaluator"


def test_a_word_that_asks_no_model_is_refused():
    with pytest.raises(ValueError, match="asks no language model"):
        LLMRatings.open("lexicon:pirate")
