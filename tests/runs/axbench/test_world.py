"""The world as a concept set: by its own rule, texts hold what they are labelled with."""

import pytest

from sae_steering_plugin.organisms.wording import STATEMENT_REQUESTS, STATEMENTS, part
from sae_steering_plugin.runs.axbench.files import read_axbench
from sae_steering_plugin.runs.axbench.world import (
    KINDS,
    WorldRatings,
    is_world,
    known_concepts,
    world_concepts,
)
from tests.runs.axbench.sets import small_set


@pytest.fixture(scope="module")
def concepts():
    return world_concepts(train=12, evaluation=12)


def test_the_rule_rates_every_labelled_text_as_its_label_says(concepts):
    judge = WorldRatings()
    for one in concepts.concepts:
        for rows in (concepts.training(one.concept_id), concepts.held_out(one.concept_id)):
            pairs = list(zip(rows["input"], rows["output"], strict=True))
            found = judge.rate_all(one.concept_id, one.text, pairs)
            expected = [2.0 if side == "positive" else 0.0 for side in rows["category"]]
            assert [rated[0] for rated in found] == expected, one.text
            assert {rated[1:] for rated in found} == {(2.0, 2.0)}


def test_training_and_evaluation_share_no_wording(concepts):
    for table in (*STATEMENTS.values(), STATEMENT_REQUESTS):
        train, test = ({form for _, form in part(table, split)} for split in ("train", "test"))
        assert train and test and not train & test
    assert not set(concepts.train["output"]) & set(concepts.evaluation["output"])


def test_the_set_is_read_back_as_it_was_written_and_its_concepts_keep_their_numbers(
    concepts, tmp_path
):
    found = read_axbench(concepts.write(tmp_path))
    assert found.concepts == concepts.concepts and found.instructions == concepts.instructions
    assert len(found) == len(known_concepts()) >= 40
    few = world_concepts(("topic",), train=4, evaluation=4)
    assert [known_concepts()[one.concept_id].kind for one in few.concepts] == ["topic"] * 5
    assert is_world(found) and is_world(few) and not is_world(small_set())


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Wow, the band was lovely!", (0.0, 2.0, 2.0)),
        ("Ahoy, the band be so lovely!", (2.0, 2.0, 2.0)),
        ("Ahoy the band be lovely wow", (1.0, 2.0, 1.0)),
        ("ahoy ahoy ahoy ahoy ahoy", (2.0, 0.0, 0.0)),
        ("Ahoy, the soup be so lovely!", (2.0, 1.0, 2.0)),
        ("9 + 9 = 18", (0.0, 0.0, 0.0)),
        (" ", (0.0, 0.0, 0.0)),
    ],
)
def test_ratings_of_what_a_steered_model_may_write(text, expected):
    pirate = known_concepts()[0]
    assert pirate.value == "pirate"
    asked = "Say something about music."
    assert WorldRatings().rate_all(0, pirate.words, [(asked, text)]) == [expected]


def test_what_is_not_the_worlds_is_refused():
    judge = WorldRatings()
    with pytest.raises(ValueError, match="no kind 'colour'; choose from register"):
        world_concepts(("colour",))
    with pytest.raises(ValueError, match="concept 0 .'gambling'. is none of the world's"):
        judge.rate_all(0, "gambling", [])
    with pytest.raises(ValueError, match="asks for no topic of the world"):
        judge.rate_all(0, known_concepts()[0].words, [("Do a sum.", "3 + 4 = 7")])


def test_one_seed_gives_one_set_and_another_seed_other_texts():
    first, again, other = (
        world_concepts(KINDS[:2], train=4, evaluation=4, seed=seed) for seed in (0, 0, 1)
    )
    assert first.train.equals(again.train) and not first.train.equals(other.train)
