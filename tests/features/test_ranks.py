"""Mid-ranks of sparse columns against SciPy's on the dense table."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import rankdata

from sae_steering_plugin.features import PooledCodes
from sae_steering_plugin.features.ranks import mid_ranks, ordered_bits

tables = arrays(
    np.float32,
    st.tuples(st.integers(2, 12), st.integers(1, 5)),
    elements=st.sampled_from([0.0, 0.0, 0.0, 0.25, 0.25, 0.5, 3.0, -0.25, -2.0, 1e-30]),
)


@given(tables)
def test_stored_values_and_zeros_have_scipy_s_ranks(table):
    codes = PooledCodes.from_dense(torch.from_numpy(table))
    ranks = mid_ranks(codes.values.numpy(), codes.starts.numpy(), len(codes))
    for feature, column in enumerate(table.T):
        expected = rankdata(column)
        inside = slice(int(codes.starts[feature]), int(codes.starts[feature + 1]))
        found = ranks.lift[inside] + ranks.zero[feature]
        assert np.array_equal(found, expected[codes.examples[inside].numpy()])
        if (column == 0).any():
            assert ranks.zero[feature] == expected[column == 0][0]


@pytest.mark.parametrize("signed", [False, True])
def test_keys_without_room_for_a_place_are_sorted_alike(signed):
    rng = np.random.default_rng(0)
    counts = np.array([3, 0, 2000, 5])
    starts = np.concatenate([[0], np.cumsum(counts)])
    values = rng.integers(1, 9, counts.sum()).astype(np.float32)
    values *= np.where(rng.random(len(values)) < 0.3 * signed, -1, 1).astype(np.float32)
    wide = np.concatenate([starts, np.full(2**20, starts[-1])])  # room 11 + 32 + 21 bits: too many
    few, many = (mid_ranks(values, one, 2500) for one in (starts, wide))
    assert np.array_equal(few.lift, many.lift) and np.array_equal(few.zero, many.zero[:4])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2))
def test_ordered_bits_order_as_the_values_do(values):
    numbers = np.array(values, dtype=np.float32)
    numbers = numbers[numbers != 0]  # -0 and +0 differ in bits; neither is stored
    bits = ordered_bits(numbers)
    assert np.array_equal(np.argsort(bits, kind="stable"), np.argsort(numbers, kind="stable"))
    assert bits.size == 0 or 0 <= bits.min() <= bits.max() < 2**32


def test_a_stored_zero_is_refused():
    with pytest.raises(ValueError, match="a zero is stored"):
        mid_ranks(np.array([1.0, 0.0]), np.array([0, 2]), 4)
