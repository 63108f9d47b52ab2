import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sae_steering_plugin.effects.intervals import (
    bootstrap,
    d_interval,
    item_draws,
    mean_interval,
    resample_counts,
    resampled_d,
    share_interval,
    superiority_interval,
    won,
)
from sae_steering_plugin.effects.sizes import cohens_d, superiority

from .samples import binary, binomial_band, columns, null_pairs


def test_the_vectorised_resampling_is_a_loop_over_resamples():
    generator = np.random.default_rng(6)
    base, arm = generator.normal(size=(2, 15)) * 3 + 100
    counts = resample_counts(np.random.default_rng(7), 15, 20)
    assert (counts.sum(axis=1) == 15).all()
    for ddof in (0, 1):
        fast = resampled_d(base, arm, counts, counts, ddof=ddof)
        slow = [
            cohens_d(np.repeat(base, row.astype(int)), np.repeat(arm, row.astype(int)), ddof=ddof)
            for row in counts
        ]
        assert fast == pytest.approx(slow)


def test_the_paired_interval_agrees_with_scipy_s_bootstrap():
    base, arm = null_pairs(1, 60, seed=8)[0]
    arm = arm + 0.5
    ours = d_interval(base, arm, resamples=6000)
    theirs = stats.bootstrap(
        (base, arm),
        lambda x, y: cohens_d(x, y),
        paired=True,
        vectorized=False,
        n_resamples=1500,
        method="percentile",
        rng=np.random.default_rng(9),
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05)


def test_pairing_narrows_the_interval_where_the_items_agree():
    generator = np.random.default_rng(10)
    shared = generator.normal(size=100)
    base, arm = shared, shared + 0.3 + 0.1 * generator.normal(size=100)
    paired, unpaired = d_interval(base, arm), d_interval(base, arm, paired=False)
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


@pytest.mark.parametrize("kind", ["normal", "binary"])
def test_the_interval_covers_the_true_d(kind):
    count, items, gap = 400, 80, 0.5
    pairs = null_pairs(count, items, seed=11)
    pairs[:, 1] += gap
    true = gap / math.sqrt(2)
    if kind == "binary":
        pairs = (pairs > 0).astype(float)
        low, high = 0.5, stats.norm.cdf(gap / math.sqrt(2))
        true = (high - low) / math.sqrt((low * (1 - low) + high * (1 - high)) / 2)
    inside = 0
    for base, arm in pairs:
        interval = d_interval(base, arm, resamples=600)
        inside += interval.low <= true <= interval.high
    # binomial 99.8 % band around 95 %, widened by one point for the percentile interval's own bias
    assert stats.binom.ppf(0.001, count, 0.94) <= inside <= stats.binom.ppf(0.999, count, 0.96)


def test_an_interval_is_the_same_for_the_same_seed_and_in_any_block_size(monkeypatch):
    base, arm = null_pairs(1, 30, seed=12)[0]
    first = d_interval(base, arm, seed=3)
    unpaired = d_interval(base, arm, paired=False, seed=3)
    assert first == d_interval(base, arm, seed=3)
    assert first != d_interval(base, arm, seed=4)
    monkeypatch.setattr("sae_steering_plugin.effects.intervals.BLOCK", 30 * 100)
    assert d_interval(base, arm, seed=3) == first
    assert d_interval(base, arm, paired=False, seed=3) == unpaired


def test_complete_separation_gives_a_finite_interval():
    base, arm = np.zeros(20), np.array([1.0] * 19 + [0.0])
    interval = d_interval(base, arm)
    assert 0 < interval.low < cohens_d(base, arm)
    assert interval.high == pytest.approx(cohens_d(base, arm))  # the largest finite d
    assert d_interval(np.zeros(5), np.ones(5)).high == 0
    with pytest.raises(ValueError, match="between 0 and 1"):
        d_interval(base, arm, level=95.0)


# BCa


@pytest.mark.parametrize("paired", [True, False])
def test_bca_agrees_with_scipy_s(paired):
    base, arm = np.exp(null_pairs(1, 50, seed=20)[0])  # skewed, so that BCa differs
    theirs = stats.bootstrap(
        (base, arm),
        lambda x, y: (y.mean() - x.mean()) / math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2),
        paired=paired,
        vectorized=False,
        n_resamples=3000,
        method="BCa",
        rng=np.random.default_rng(21),
    ).confidence_interval
    ours = d_interval(base, arm, paired=paired, method="bca", resamples=12_000)
    plain = d_interval(base, arm, paired=paired, method="percentile", resamples=12_000)
    # both ends are quantiles of 3,000 draws: standard error about 0.02 at this deviation
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.06)
    assert ours.method == "bca"
    assert abs(ours.low - plain.low) > 0.005


def test_bca_of_a_skewed_mean_is_shifted_towards_the_tail():
    values = np.random.default_rng(22).exponential(size=30)
    plain, bca = (mean_interval(values, method=name) for name in ("percentile", "bca"))
    assert bca.low > plain.low
    assert bca.high > plain.high


def test_bca_without_resamples_on_both_sides_falls_back_and_says_so():
    # the number of different items drawn is below its value on the data in every resample
    draws = item_draws(30, 30, paired=True)
    options = {"resamples": 200, "seed": 1}
    found = {
        name: bootstrap(lambda rows, _: (rows > 0).sum(axis=1) * 1.0, draws, method=name, **options)
        for name in ("bca", "percentile")
    }
    assert found["bca"].method == "percentile"
    assert "all resamples on one side" in found["bca"].note
    assert found["bca"].low == found["percentile"].low
    assert found["percentile"].note == ""


# Degenerate data has a named answer


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(
    ("base", "arm", "says"),
    [
        ([2, 2, 2], [2, 2, 2], "all values are equal"),
        ([0, 0, 0], [1, 1, 1], "each arm is constant"),
    ],
)
def test_data_that_do_not_vary_get_an_interval_that_says_so(base, arm, says, paired, method):
    interval = d_interval(base, arm, paired=paired, method=method)
    assert (interval.low, interval.high, interval.method) == (0, 0, "none")
    assert says in interval.note


def test_one_item_leaves_everything_open():
    assert d_interval([1], [2]).note == "one item: nothing to resample"
    assert d_interval([1], [2]).low == -math.inf
    assert d_interval([1], [2, 3, 4], paired=False).high == math.inf
    share = superiority_interval([1], [2])
    assert (share.low, share.high, share.method) == (0, 1, "none")
    grouped = d_interval([1, 2, 3], [2, 3, 5], clusters=["a", "a", "a"])
    assert grouped.note == "one cluster: nothing to resample"
    assert mean_interval([3.0]).high == math.inf


def test_a_mean_that_cannot_vary_is_a_point_and_says_why():
    interval = mean_interval([2.0, 2.0, 2.0])
    assert (interval.low, interval.high) == (2, 2)
    assert interval.note == "every resample gives the same value"


@given(columns, columns, st.booleans(), st.sampled_from(["percentile", "bca"]))
@settings(max_examples=60, deadline=None)
def test_no_data_make_an_interval_nan_or_inverted(base, arm, paired, method):
    if paired:
        arm = (arm * 4)[: len(base)]
    interval = d_interval(base, arm, paired=paired, method=method, resamples=60)
    assert interval.low <= interval.high
    share = superiority_interval(base, arm, paired=paired)
    assert 0 <= share.low <= superiority(base, arm) <= share.high <= 1


@given(columns, st.floats(0.1, 10), st.floats(-10, 10))
@settings(max_examples=30, deadline=None)
def test_units_and_arm_order_move_the_interval_as_they_move_d(base, scale, origin):
    arm = [value**2 - 2 for value in base]
    interval = d_interval(base, arm, resamples=99)
    moved = d_interval(
        [scale * value + origin for value in base],
        [scale * value + origin for value in arm],
        resamples=99,
    )
    swapped = d_interval(arm, base, resamples=99)
    assert (moved.low, moved.high) == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert (swapped.low, swapped.high) == pytest.approx((-interval.high, -interval.low), abs=1e-9)


def test_words_and_numbers_that_make_no_interval_are_refused():
    with pytest.raises(ValueError, match="choose one of percentile, bca"):
        d_interval([1, 2], [2, 3], method="normal")
    with pytest.raises(ValueError, match="at least 1 is needed"):
        d_interval([1, 2], [2, 4], resamples=0)
    with pytest.raises(ValueError, match="7 of 5 is no share"):
        share_interval(7, 5)


# Clusters


def test_every_item_a_cluster_is_the_ordinary_interval():
    base, arm = null_pairs(1, 30, seed=23)[0]
    grouped = d_interval(base, arm, clusters=range(30))
    assert (grouped.low, grouped.high) == (d_interval(base, arm).low, d_interval(base, arm).high)


def test_clusters_are_drawn_whole():
    draws = item_draws(6, 6, paired=True, clusters="aabbbc")
    counts = [np.array([[2.0, 0.0, 1.0]])]
    rows, columns = draws.weights(counts)
    assert rows.tolist() == columns.tolist() == [[2, 2, 0, 0, 0, 1]]
    apart = item_draws(3, 2, paired=False, clusters=(list("aab"), list("xy")))
    assert apart.sizes == (2, 2)
    together = item_draws(3, 2, paired=False, clusters=(list("aab"), list("ba")))
    rows, columns = together.weights([np.array([[3.0, 1.0]])])
    assert (rows.tolist(), columns.tolist()) == ([[3, 3, 1]], [[1, 3]])
    with pytest.raises(ValueError, match="cluster 'b' occurs in one arm only while 'a'"):
        item_draws(3, 2, paired=False, clusters=(list("aab"), list("ax")))
    with pytest.raises(ValueError, match=r"unpaired arms need clusters=\(names of base"):
        item_draws(3, 2, paired=False, clusters="aab")


def test_few_clusters_are_named():
    base, arm = null_pairs(1, 40, seed=24)[0]
    names = np.repeat(np.arange(5), 8)
    assert d_interval(base, arm, clusters=names).note == "5 clusters: the interval is too narrow"


# Coverage

COUNT = 400


def coverage(intervals, true: float) -> float:
    return float(np.mean([true in interval for interval in intervals]))


@pytest.mark.parametrize("paired", [True, False])
def test_bca_intervals_cover_the_true_d(paired):
    # 99 % binomial band around 95 % over 400 data sets: 92.0 to 97.5 %
    gap, items = 0.5, 60
    pairs = null_pairs(COUNT, items, seed=25)
    if not paired:
        pairs = np.random.default_rng(26).normal(size=(COUNT, 2, items)) * math.sqrt(2)
    pairs[:, 1] += gap
    found = coverage(
        (d_interval(*arms, paired=paired, method="bca", resamples=500) for arms in pairs),
        gap / math.sqrt(2),
    )
    low, high = binomial_band(COUNT, 0.95)
    assert low <= found <= high


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("shape", ["normal", "counts"])
def test_superiority_intervals_cover_the_true_chance(paired, shape):
    items, gap, count = 60, 0.6, 1000
    generator = np.random.default_rng(27)
    data = generator.normal(size=(count, 2, items))
    if paired:
        data += generator.normal(size=(count, 1, items))
    data[:, 1] += gap
    if shape == "normal":
        true = stats.norm.cdf(gap / math.sqrt(4 if paired else 2))
    else:
        data = np.round(data)
        deviation = math.sqrt(2 if paired else 1)
        grid = np.arange(-12, 13)

        def chances(mean):
            return np.diff(stats.norm.cdf(np.append(grid - 0.5, 12.5), mean, deviation))

        true = chances(0) @ won(grid * 1.0, grid * 1.0) @ chances(gap)
    found = coverage((superiority_interval(*arms, paired=paired) for arms in data), true)
    # 99 % binomial band around 95 % over 1,000 data sets: 93.1 to 96.7 %
    low, high = binomial_band(count, 0.95)
    assert low <= found <= high


def test_superiority_s_three_intervals_agree_on_ordinary_data():
    base, arm = null_pairs(1, 80, seed=28)[0]
    arm = arm + 0.4
    ends = [
        superiority_interval(base, arm, method=name) for name in ("delong", "percentile", "bca")
    ]
    for other in ends[1:]:
        assert (other.low, other.high) == pytest.approx((ends[0].low, ends[0].high), abs=0.02)


def test_arms_that_do_not_overlap_have_a_superiority_interval_with_a_width():
    interval = superiority_interval(np.arange(20), np.arange(20) + 100)
    assert interval.high == 1
    assert 0.8 < interval.low < 0.95
    assert (interval.method, "do not overlap" in interval.note) == ("newcombe", True)
    mirrored = superiority_interval(np.arange(20) + 100, np.arange(20))
    assert (mirrored.low, mirrored.high) == pytest.approx((0, 1 - interval.low))


def test_newcombe_s_interval_solves_its_equation():
    # 10 items that all beat 10: (1 - t)^2 = z^2 V(t), s = 9
    t = superiority_interval(np.zeros(10), np.ones(10), paired=False).low
    z, s = stats.norm.ppf(0.975), 9
    variance = t * (1 - t) * (1 + s * (1 - t) / (2 - t) + s * t / (1 + t)) / 100
    assert (1 - t) ** 2 == pytest.approx(z**2 * variance)


def test_clustered_intervals_cover_where_flat_ones_do_not():
    # 40 templates of 5 items that share most of their difference
    names = np.repeat(np.arange(40), 5)
    generator = np.random.default_rng(29)
    count = 300
    moved = generator.normal(size=(count, 40))[:, names] + 0.3 * generator.normal(size=(count, 200))
    flat = coverage((mean_interval(row, resamples=300) for row in moved), 0.0)
    grouped = coverage((mean_interval(row, resamples=300, clusters=names) for row in moved), 0.0)
    # the bootstrap over 40 units loses about 1.5 points; 99 % band over 300 data sets around that
    low, high = binomial_band(count, 0.935)
    assert low <= grouped <= high
    assert flat < 0.75


def test_the_wilson_interval_of_none_and_all_has_a_width():
    none, every = share_interval(0, 50), share_interval(50, 50)
    assert none.low == 0
    assert none.high == pytest.approx(
        stats.norm.ppf(0.975) ** 2 / (50 + stats.norm.ppf(0.975) ** 2)
    )
    assert every.low == pytest.approx(1 - none.high)
    assert binary(27).mean() in share_interval(27, 50)
    few = share_interval(3, 50)  # statsmodels 0.15, proportion_confint
    assert (few.low, few.high) == pytest.approx((0.02061497035, 0.16217091688), abs=1e-11)
