import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steering_plugin.features.stream import ARRAYS, FeatureStream, bins_per_octave

EXACT = ("count", "active", "largest", "bins", "top_values", "top_ids")


def dense(n, features, *, density=0.3, seed=0):
    """Activations [position, feature], many of them zero, the last feature dead."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, features, generator=generator).exp()
    silent = torch.rand(n, features, generator=generator) > density
    silent[:, -1] = True
    return values.masked_fill(silent, 0)


def fed(table, *, batch=7, top=0, first=0, into=None):
    stream = FeatureStream.empty(table.shape[1], top=top) if into is None else into
    for start in range(0, len(table), batch):
        some = table[start : start + batch]
        rows, features = some.nonzero(as_tuple=True)
        stream.update(features, some[rows, features], len(some), ids=rows + first + start)
    return stream


def test_every_column_equals_the_dense_formula():
    table = dense(400, 9)
    z = table.double().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        share = z / z.sum(0)
        spread = -np.where(z > 0, share * np.log(share), 0).sum(0) / math.log(len(z))
        away = z - z.mean(0)
        kurtosis = (away**4).mean(0) / z.var(0) ** 2
    p = (z > 1e-6).mean(0)
    alive = p > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        binary = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    found = fed(table).columns("token", shape=True)
    for name, expected in {
        "token_act_freq": p,
        "token_mean": z.mean(0),
        "token_std": z.std(0),
        "token_max": z.max(0),
    }.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-12, atol=1e-15)
    for name, expected in {
        "activation_entropy_norm": spread,
        "kurtosis": kurtosis,
        "binary_entropy": binary,
    }.items():
        np.testing.assert_allclose(found[name][alive], expected[alive], rtol=1e-11)
        assert np.isnan(found[name][~alive]).all() and (~alive).sum() == 1


@pytest.mark.parametrize("q", [0.0, 0.5, 0.69, 0.9, 0.95, 1.0])
def test_a_quantile_is_within_one_bin_of_the_exact_one(q):
    table = dense(1000, 6)
    stream = fed(table)
    exact = np.quantile(table.double().numpy(), q, axis=0, method="lower")
    above = np.quantile(table.double().numpy(), q, axis=0, method="higher")
    width = 1 / bins_per_octave(6)
    found = stream.quantile(q)
    assert (found <= above * (1 + width)).all() and (found >= exact * (1 - width)).all()
    assert (found[exact == 0][above[exact == 0] == 0] == 0).all()
    assert (found <= stream.maximum()).all()


def test_planted_shapes_have_their_textbook_figures():
    n = 4096
    table = torch.zeros(n, 4)
    table[:, 0] = 2.5
    table[17, 1] = 3.0
    table[: n // 2, 2] = 1.0
    found = fed(table, batch=100).columns("token", shape=True)
    assert found["activation_entropy_norm"][0] == pytest.approx(1.0)
    assert found["activation_entropy_norm"][1] == 0.0
    assert found["binary_entropy"][2] == pytest.approx(math.log(2))
    assert found["kurtosis"][2] == pytest.approx(1.0)  # a +-1 pattern, moved and scaled
    assert np.isnan(found["kurtosis"][0])  # no variance
    assert np.isnan(found["kurtosis"][3])


def test_a_sign_pattern_has_kurtosis_one_and_a_gaussian_three():
    signs = torch.ones(2000, 1)
    signs[::2] = -1
    assert fed(signs).kurtosis()[0] == pytest.approx(1.0)
    gaussian = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    # the standard error of the kurtosis of n normal values is sqrt(24 / n)
    assert abs(fed(gaussian, batch=5000).kurtosis()[0] - 3) < 5 * math.sqrt(24 / 200_000)


def test_moments_survive_a_mean_that_dwarfs_the_spread():
    away = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0))
    large = (4096 + away).float()
    exact = large.double().numpy()
    centred = exact - exact.mean()
    kurtosis = (centred**4).mean() / (centred**2).mean() ** 2
    assert fed(large, batch=64).kurtosis()[0] == pytest.approx(float(kurtosis), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 3), st.integers(0, 10_000))
def test_two_halves_merge_into_the_whole(a, b, top, seed):
    table = dense(a + b, 5, seed=seed)
    whole = fed(table, batch=4, top=top)
    left, right = fed(table[:a], batch=3, top=top), fed(table[a:], batch=9, top=top, first=a)
    for both in (left.merge(right), right.merge(left)):
        assert both.n == whole.n
        for name in EXACT:
            assert np.array_equal(getattr(both, name), getattr(whole, name)), name
        for name in set(ARRAYS) - set(EXACT):
            np.testing.assert_allclose(getattr(both, name), getattr(whole, name), 1e-11, 1e-12)


def test_a_stream_taken_up_again_is_bit_for_bit_the_one_that_ran_through():
    table = dense(200, 6)
    whole = fed(table, batch=10, top=3)
    half = FeatureStream.from_state(fed(table[:100], batch=10, top=3).state())
    again = fed(table[100:], batch=10, first=100, into=half)
    for name in ARRAYS:
        assert np.array_equal(getattr(again, name), getattr(whole, name)), name


def test_merging_leaves_both_halves_as_they_were():
    left, right = fed(dense(50, 4), top=2), fed(dense(50, 4, seed=1), top=2)
    before = {name: getattr(left, name).copy() for name in ARRAYS}
    left.merge(right)
    assert all(np.array_equal(getattr(left, name), before[name]) for name in ARRAYS)


def test_top_examples_are_the_largest_with_their_positions():
    table = dense(300, 5)
    stream = fed(table, top=4)
    expected = table.sort(dim=0, descending=True, stable=True)
    assert np.array_equal(stream.top_values[:4], expected.values[:4, :4].T.numpy())
    assert np.array_equal(stream.top_ids[:4], expected.indices[:4, :4].T.numpy())
    assert (stream.top_ids[4] == -1).all()


def test_activations_at_or_below_the_limit_are_no_activity_but_count_in_the_mean():
    table = torch.tensor([[1e-6], [2e-6], [0.0]])
    stream = fed(table)
    assert stream.active[0] == 1 and stream.count[0] == 2
    assert stream.moments()[0][0] == pytest.approx(1e-6)


def test_bins_are_finer_where_features_are_few_and_never_coarser_than_four():
    assert bins_per_octave(512) == 64
    assert bins_per_octave(131_072) == 4 == bins_per_octave(10**7)


def test_wrong_input_is_refused():
    stream = FeatureStream.empty(3)
    one = torch.tensor([1])
    with pytest.raises(ValueError, match="not finite"):
        stream.update(one, torch.tensor([float("nan")]), 1)
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        stream.update(torch.tensor([3]), torch.tensor([1.0]), 1)
    with pytest.raises(ValueError, match="more activations than the 1 positions"):
        stream.update(torch.tensor([1, 1]), torch.ones(2), 1)
    with pytest.raises(ValueError, match="give ids"):
        FeatureStream.empty(3, top=1).update(one, torch.ones(1), 1)
    with pytest.raises(ValueError, match="does not merge"):
        stream.merge(FeatureStream.empty(4))
    with pytest.raises(ValueError, match="a stream needs features"):
        FeatureStream.empty(0)
    with pytest.raises(ValueError, match="q is 2"):
        stream.quantile(2.0)
    with pytest.raises(ValueError, match="this is no stream"):
        FeatureStream.from_state({"n": torch.tensor(0)})
    with pytest.raises(ValueError, match="differ in length"):
        FeatureStream.from_state({**stream.state(), "m2": torch.zeros(2)})
