import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steering_plugin.features.largest import Largest, sample_bars


def through_blocks(matrix, k, bars, *, step, sign=1.0):
    found = Largest(k, bars)
    for first in range(0, matrix.shape[1], step):
        found.offer(np.ascontiguousarray(matrix[:, first : first + step]), first, sign)
    return found.result()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 12), st.booleans(), st.integers(0, 9999)
)
def test_blocks_give_what_a_stable_sort_gives_with_ties_and_both_signs(rows, cols, k, neg, seed):
    rng = np.random.default_rng(seed)
    matrix = np.round(rng.normal(size=(rows, cols)), 1).astype(np.float32)
    k, sign = min(k, cols), -1.0 if neg else 1.0
    bars = np.full(rows, -np.inf, dtype=np.float32)
    values, columns, short = through_blocks(matrix, k, bars, step=5, sign=sign)
    best = torch.from_numpy(sign * matrix).sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, best.values[:, :k] + 0.0)
    assert torch.equal(columns, best.indices[:, :k])
    assert not len(short)


def test_a_row_whose_bar_was_too_high_is_named():
    matrix = np.arange(20, dtype=np.float32).reshape(2, 10)
    bars = np.array([8.5, -np.inf], dtype=np.float32)
    values, columns, short = through_blocks(matrix, 3, bars, step=4)
    assert short.tolist() == [0]
    assert values[0, 0] == 9 and values[0, 1:].isnan().all() and columns[0, 1:].eq(-1).all()
    assert columns[1].tolist() == [9, 8, 7]


def test_guessed_bars_seldom_fall_short_and_let_few_through():
    data = torch.randn(500, 20_000, generator=torch.Generator().manual_seed(0))
    bars = sample_bars(data[:, ::20], 50, 20_000)
    above = (data >= torch.from_numpy(bars)[:, None]).sum(1)
    # three deviations of a Poisson order statistic: a few in a thousand, so 10 of 500 is far out
    assert (above < 50).sum() < 10
    assert above.float().mean() < 8 * 50


def test_small_samples_put_up_no_bar():
    assert np.isneginf(sample_bars(torch.randn(3, 5), 4, 5)).all()


def test_too_many_rows_are_refused():
    with pytest.raises(ValueError, match="at most 1024"):
        Largest(1, np.zeros(1025, dtype=np.float32))
