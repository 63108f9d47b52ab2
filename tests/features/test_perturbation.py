"""Effects of features on probes, and what taking them out scores: small examples by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sae_steering_plugin.features.perturbation import (
    balanced_accuracy,
    class_gaps,
    largest_effects,
    removal_score,
    spurious_effects,
    targeted_effects,
    targeted_scores,
    without_features,
)
from sae_steering_plugin.features.pooled import PooledCodes

CODES = np.array([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 4.0]])
ROWS = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])
PROBE = np.array([2.0, 1.0])


def pooled(codes, pooling="mean"):
    return PooledCodes.from_dense(torch.from_numpy(codes), pooling=pooling)


def test_effects_of_a_small_example_are_those_worked_out_by_hand():
    gaps = class_gaps(pooled(CODES), np.array([0, 1]), np.array([2, 3]))
    assert np.array_equal(gaps, [2.0, -2.0, -2.0])
    # w . rows = (2, 2, -1)
    assert np.array_equal(targeted_effects(gaps, PROBE, ROWS), [4.0, 0.0, 0.0])
    assert np.array_equal(spurious_effects(gaps, PROBE, ROWS), [4.0, 4.0, 2.0])


def test_only_positive_effects_are_taken_in_order_and_ties_by_number():
    assert largest_effects(np.array([1.0, 0.0, 3.0, -2.0, 3.0]), 4).tolist() == [2, 4, 0]
    assert largest_effects(np.array([1.0, 0.0, 3.0, -2.0, 3.0]), 1).tolist() == [2]
    assert largest_effects(np.zeros(3), 2).tolist() == []


def test_taking_features_out_subtracts_what_they_wrote_and_no_more():
    x = np.arange(8.0).reshape(4, 2)
    found = without_features(x, pooled(CODES), ROWS, np.array([2, 0]))
    assert np.allclose(found, x - CODES[:, [0, 2]] @ ROWS[[0, 2]], atol=0, rtol=1e-15)
    assert np.array_equal(without_features(x, pooled(CODES), ROWS, np.array([], int)), x)


def test_pooling_that_is_not_linear_is_refused():
    with pytest.raises(ValueError, match="pooled by 'max'.* mean pooling only"):
        without_features(np.zeros((4, 2)), pooled(CODES, "max"), ROWS, np.array([0]))


def test_accuracy_weighs_cells_alike_however_many_texts_they_hold():
    right = np.array([True] * 9 + [False])
    assert balanced_accuracy(right, np.array([0] * 9 + [1])) == 0.5
    assert balanced_accuracy(right, np.zeros(10, int)) == 0.9


def test_targeted_score_is_the_own_drop_less_the_mean_of_the_others():
    drops = np.array([[0.5, 0.1, 0.3], [0.0, 0.4, 0.0], [0.2, 0.2, 0.2]])
    assert np.allclose(targeted_scores(drops), [0.3, 0.4, 0.0])


@given(
    arrays(float, (4, 4), elements=st.floats(-0.5, 0.5)),
    arrays(float, 4, elements=st.floats(-0.5, 0.5)),
)
def test_a_loss_that_all_probes_share_does_not_count(drops, shared):
    assert np.allclose(targeted_scores(drops + shared[:, None]), targeted_scores(drops))


def test_removal_is_the_share_of_the_lost_accuracy_that_comes_back():
    assert removal_score(0.75, 0.5, 1.0) == 0.5
    assert removal_score(1.0, 0.5, 1.0) == 1.0
    assert removal_score(0.25, 0.5, 1.0) == -0.5


@pytest.mark.parametrize("clean", [0.8, 0.8009, 0.7])
def test_removal_is_0_where_the_biased_probe_has_nothing_to_gain(clean):
    assert removal_score(0.9, 0.8, clean) == 0.0
    assert removal_score(0.9, 0.8, 0.8011) > 50
