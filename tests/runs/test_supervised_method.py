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
