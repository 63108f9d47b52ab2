import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score, roc_auc_score

from sae_steering_plugin.directions.heldout import (
    auroc,
    grouped_folds,
    mean_defined,
    projection_scores,
    r2,
    sample_folds,
)
from tests.directions.planted import labelled_of

rows = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=4, max_size=40).filter(
    lambda items: len({group for _, group in items}) > 1
)


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(2, 6), st.integers(0, 5))
def test_folds_partition_the_rows_and_keep_groups_whole(items, n_folds, seed):
    labels = torch.tensor([label for label, _ in items])
    groups = [f"g{group}" for _, group in items]
    folds = grouped_folds(labels, groups, n_folds=n_folds, seed=seed)
    assert len(folds) == min(n_folds, len(set(groups)))
    held = torch.cat([test for _, test in folds])
    assert sorted(held.tolist()) == list(range(len(items)))
    for train, test in folds:
        assert len(test)
        assert not {groups[i] for i in train} & {groups[i] for i in test}
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(items)))


def test_groups_of_one_label_are_spread_so_that_every_fold_holds_both():
    labels = torch.tensor([g % 2 for g in range(20) for _ in range(3)])
    groups = [f"template {g}" for g in range(20) for _ in range(3)]
    for seed in range(10):
        for train, test in grouped_folds(labels, groups, seed=seed):
            assert set(labels[test].tolist()) == set(labels[train].tolist()) == {0, 1}


def test_seed_decides_the_folds():
    labels = torch.arange(30) % 2
    groups = [f"g{i // 2}" for i in range(30)]
    one, same, other = (
        [test.tolist() for _, test in grouped_folds(labels, groups, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_one_group_cannot_be_held_out():
    with pytest.raises(ValueError, match="name the template behind each example"):
        grouped_folds(torch.tensor([0, 1]), ["a", "a"])


def test_sample_folds_partition_the_rows():
    folds = sample_folds(11, n_folds=4, seed=0)
    assert sorted(torch.cat([test for _, test in folds]).tolist()) == list(range(11))
    assert all(len(train) + len(test) == 11 for train, test in folds)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=2, max_size=30))
def test_auroc_and_r2_agree_with_scikit_learn(items):
    scores = torch.tensor([float(score) for score, _ in items])
    labels = torch.tensor([label for _, label in items])
    if len(set(labels.tolist())) == 1:
        assert math.isnan(auroc(scores, labels))
        assert math.isnan(r2(labels.double(), scores.double()))
    else:
        assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
        expected = r2_score(labels.double(), scores.double())
        assert r2(labels.double(), scores.double()) == pytest.approx(expected)


def test_mean_of_defined_figures():
    assert mean_defined([1.0, float("nan"), 3.0]) == 2.0
    assert math.isnan(mean_defined([float("nan")]))


def test_projection_scores_leave_out_folds_of_one_label_and_say_nothing_of_one_group():
    labels = [1, 1, 0, 0]
    x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])

    def along(train, test):
        return x[train, 0], x[test, 0]

    one_label_per_group = labelled_of(x, labels, groups=["a", "a", "b", "b"])
    assert math.isnan(projection_scores(one_label_per_group, along)["auroc"])
    one_group = labelled_of(x, labels, groups=["a"] * 4)
    assert math.isnan(projection_scores(one_group, along)["accuracy"])
    mixed = labelled_of(x, labels, groups=["a", "b", "a", "b"])
    assert projection_scores(mixed, along) == {"auroc": 1.0, "accuracy": 1.0}
