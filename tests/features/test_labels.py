import math

import pytest
import torch

from sae_steering_plugin.features import PooledCodes, label_features, score_features


def codes():
    """Texts 0, 1 hold "a"; 2, 3 hold "b". Feature 0 tells a, 1 tells b, 2 nothing, 3 is dead."""
    table = torch.tensor([[2.0, 0, 1, 0], [2, 0, 1, 0], [0, 3, 1, 0], [0, 3, 2, 0], [0, 0, 1, 0]])
    return PooledCodes.from_dense(table, sae_id="planted")


LABELS = {"a": [1, 1, 0, 0, 0], "b": [0, 0, 1, 1, 0]}


def test_a_feature_is_named_after_what_it_tells_best():
    found = label_features(score_features(codes(), LABELS, scores=("f1", "auroc"), prior=None))
    table = found.table.set_index("feature")
    assert table.label[:2].tolist() == ["a", "b"]
    assert table.score[0] == 1.0
    assert table.confidence[0] == 1.0  # for "b" feature 0 has no hit at any threshold
    assert 3 not in table.index and found.settings["dead"] == 1
    assert table.best_for[0] == "a" and table.best_for[2] == ""


def test_synonyms_share_a_feature_and_are_named():
    labels = {**LABELS, "also a": LABELS["a"]}
    with pytest.warns(UserWarning, match="1 features are best for several .*0: a, also a"):
        found = label_features(score_features(codes(), labels, scores=("auroc",)))
    assert found.settings["shared"] == {0: ["a", "also a"]}
    assert found.table.set_index("feature").confidence[0] == 0


def test_one_concept_has_no_runner_up():
    found = label_features(score_features(codes(), {"a": LABELS["a"]}, scores=("auroc",)))
    assert math.isnan(found.table.confidence[0])
