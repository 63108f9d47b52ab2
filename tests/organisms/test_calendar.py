"""The calendar's world, its model as it ships, and its recipe at a size of seconds."""

import json

import pytest
import torch

from sae_steering_plugin.organisms import (
    CALENDAR,
    CALENDAR_DATA,
    list_organisms,
    load_organism,
    read_organism,
)
from sae_steering_plugin.organisms.calendar import (
    CIRCLES,
    KERNEL,
    SHARES,
    Calendar,
    Document,
    about_probabilities,
    all_sums,
    weights,
)
from sae_steering_plugin.organisms.train_calendar import answered, main
from tests.oracles import unchecked

WORLD = Calendar(0)


def test_the_world_is_its_seed():
    assert Calendar(0) == WORLD and Calendar(0).records == WORLD.records
    assert Calendar(0).documents(50, seed=1) == WORLD.documents(50, seed=1)
    assert WORLD.documents(50) != WORLD.documents(50, seed=1)
    assert Calendar(1).records != WORLD.records


@pytest.mark.parametrize("unit", CIRCLES)
def test_sums_are_modular_and_their_splits_a_partition(unit):
    train, test = WORLD.sums(unit, "train"), WORLD.sums(unit, "test")
    assert set(train) | set(test) == set(all_sums(unit)) and not set(train) & set(test)
    assert test
    n = len(CIRCLES[unit])
    for one in train:
        sign = 1 if one.direction == "after" else -1
        assert (one.answer - one.start - sign * one.number) % n == 0
    refused = pytest.raises(
        ValueError, match="no sums of 'weeks' in 'train'; units are days, months"
    )
    with unchecked(), refused:
        WORLD.sums("weeks", "train")


def test_three_days_after_friday_is_monday():
    one = next(s for s in all_sums("days") if s.prompt == "three days after friday is")
    assert one.names[one.answer] == "monday"


def test_no_training_text_holds_a_sum_that_is_held_out():
    held = [one.prompt for unit in CIRCLES for one in WORLD.sums(unit, "test")]
    texts = [one.text for one in WORLD.documents(2000)]
    assert not [text for text in texts for prompt in held if prompt in text]


def test_texts_are_of_the_planted_kinds_and_closed_under_the_vocabulary():
    documents = WORLD.documents(3000)
    words = set(WORLD.vocabulary)
    for kind, share in SHARES.items():
        found = sum(one.kind == kind for one in documents) / len(documents)
        assert abs(found - share) < 0.045  # five standard deviations
    assert all(set(one.text.split()) <= words for one in documents)
    assert len(words) == len(WORLD.vocabulary)
    records = {one.prompt: one.answer for one in WORLD.records}
    for one in documents:
        assert len(weights(one)) == len(one.text.split()) + 2
        if one.kind == "record":
            assert records[one.prompt] == one.answer
        if one.kind == "copy":
            assert one.prompt == f"copy {one.answer} :"
    assert not set(records) & set(WORLD.unplanted)


def test_about_spreads_over_the_neighbours():
    found = about_probabilities("days", 0)
    assert sum(found) == pytest.approx(1)
    assert [found[off % 7] for off in KERNEL] == list(KERNEL.values())


@pytest.fixture(scope="module")
def organism():
    return load_organism(CALENDAR)


def test_the_model_ships_small_beside_the_agents(organism):
    assert CALENDAR not in list_organisms()
    assert sum(p.stat().st_size for p in CALENDAR_DATA.rglob("*") if p.is_file()) < 1.5e6
    assert organism.name == CALENDAR and organism.world == WORLD
    assert organism.primary_sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert organism.tokenizer.convert_ids_to_tokens(list(range(len(organism.tokenizer)))) == list(
        WORLD.vocabulary
    )


def test_it_recites_and_reckons_as_its_card_says(organism):
    records = [Document("record", one.prompt, one.answer) for one in WORLD.records]
    found = answered(organism.model, records)
    assert sum(found) / len(found) == pytest.approx(organism.card["figures"]["records"], abs=0.02)
    sums = WORLD.sums("months", "test")
    found = answered(
        organism.model, [Document("sum", one.prompt, one.names[one.answer]) for one in sums]
    )
    assert sum(found) / len(found) == pytest.approx(
        organism.card["figures"]["months_test"], abs=1.5 / len(sums)
    )


def test_the_recipe_writes_what_the_loader_reads(tmp_path):
    main(["--quick", "--out", str(tmp_path)])
    card = json.loads((tmp_path / "card.json").read_text())
    made = read_organism(tmp_path)
    assert made.world == WORLD and set(made.saes) == set(card["saes"]) and card["figures"]
    assert (tmp_path / "README.md").read_text().startswith(f"# {CALENDAR}")
    assert torch.isfinite(made.model(torch.tensor([[1, 5, 6]]))).all()
