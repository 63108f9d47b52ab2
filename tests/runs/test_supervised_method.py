"""Supervised selection as a steering method: what it takes, and what it refuses."""

import pytest

from sae_steering_plugin.runs.steering_methods import ConceptData, find_method
from sae_steering_plugin.runs.subject import Subject
from sae_steering_plugin.runs.tuned.supervised import SupervisedSettings, nearly_all_train
from tests.hosts import tiny_bridge, tiny_sae

DATA = ConceptData(
    "cats",
    tuple((f"say {i}", "the cat sat on the mat") for i in range(6)),
    tuple((f"say {i}", "a dog ran in the park") for i in range(6)),
)


@pytest.fixture(scope="module")
def subject():
    return Subject(tiny_bridge(), "tiny", tiny_sae())


def test_it_takes_a_feature_that_tells_the_texts_apart_and_says_how(subject):
    fitted = find_method("supervised_detect").fit(subject, DATA, seed=0)
    recipe = fitted.vector.recipe
    assert recipe.settings["chosen_by"] == "select_features"
    assert recipe.settings["variant"] == "interpretability"
    assert recipe.scores["train_f1"] > 0.6
    again = find_method("supervised_detect").fit(subject, DATA, seed=0)
    assert (again.vector.vector == fitted.vector.vector).all()


def test_a_cut_that_nothing_passes_is_no_feature(subject):
    with pytest.raises(LookupError, match="supervised: "):
        find_method("supervised", cut=1e9).fit(subject, DATA, seed=0)


def test_an_unknown_variant_and_a_missing_sae_are_refused(subject):
    with pytest.raises(ValueError, match="variant is 'half'; choose one of full"):
        SupervisedSettings("half")
    bare = Subject(subject.model, "tiny")
    with pytest.raises(ValueError, match="supervised needs an SAE"):
        find_method("supervised").fit(bare, DATA)


def test_all_texts_but_two_distinct_ones_choose():
    found = nearly_all_train(["a", "b", "b", "c", "d"])
    assert found == ["train", "train", "train", "validation", "test"]
    with pytest.raises(ValueError, match="three texts at least, two of them different"):
        nearly_all_train(["a", "a", "a"])


def test_options_are_chosen_on_held_out_training_texts_and_said_in_the_recipe(subject):
    more = [" and" * (i % 3) for i in range(24)]
    data = ConceptData(
        "cats",
        tuple((f"say {i}", f"the cat sat on the mat{one}") for i, one in enumerate(more)),
        tuple((f"say {i}", f"a dog ran in the park{one}") for i, one in enumerate(more)),
    )
    grid = {"prior": (1e-2,), "pooling": ("max", "mean"), "cut": (0.0, 1e-9), "order": ("score",)}
    method = find_method("supervised_chosen", **grid, strengths=(1.0,), controls=2)
    found = method.fit(subject, data, seed=0).vector.recipe
    assert found.settings["combinations"] == 4
    assert all(found.settings[name] in values for name, values in grid.items())
    assert found.settings["validation_gain"] == found.settings["validation_gain"]
    few = method.fit(subject, DATA, seed=0).vector.recipe.settings  # too few prompts to choose on
    assert few["combinations"] == 0 and [few[name] for name in grid] == [
        v[0] for v in grid.values()
    ]
