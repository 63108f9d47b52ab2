import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from sae_steering_plugin.effects.contrast import (
    CORRECTIONS,
    TESTS,
    benjamini_hochberg,
    cohens_d,
    corrected,
    d_interval,
    effect,
    hedges_g,
    holm,
    mann_whitney,
    mcnemar,
    moved_wrong,
    paired_d,
    paired_permutation,
    resample_counts,
    resampled_d,
    superiority,
    wilcoxon,
)

columns = st.lists(st.integers(-5, 5).map(float), min_size=3, max_size=12)


def binary(ones: int, n: int = 50) -> np.ndarray:
    return np.array([1.0] * ones + [0.0] * (n - ones))


def null_pairs(count: int, items: int, *, seed: int) -> np.ndarray:
    """Pairs of correlated arms that share mean and deviation: `[count 2 items]`."""
    generator = np.random.default_rng(seed)
    own = generator.normal(size=(count, 2, items))
    return own + generator.normal(size=(count, 1, items))


# Effect sizes


def test_the_page_s_two_proportions_give_its_d_and_its_p():
    base, arm = binary(27), binary(46)
    assert cohens_d(base, arm) == pytest.approx(0.9375, abs=5e-5)
    assert cohens_d(base, arm, ddof=0) == pytest.approx(0.9470, abs=5e-5)
    assert mann_whitney(base, arm) == pytest.approx(2.10e-5, abs=5e-8)


def test_a_hand_example_of_d():
    # variances 1 and 1, means 2 and 4
    assert cohens_d([1, 2, 3], [3, 4, 5]) == pytest.approx(2.0)


@given(columns)
def test_the_two_ddof_differ_by_the_square_root_of_n_over_n_minus_one(base):
    arm = [value * 2 + 1 for value in base]
    n = len(base)
    wanted = cohens_d(base, arm) * math.sqrt(n / (n - 1))
    assert cohens_d(base, arm, ddof=0) == pytest.approx(wanted)


@given(columns, columns)
def test_swapping_the_arms_changes_the_sign_of_d_and_mirrors_superiority(base, arm):
    assert cohens_d(base, arm) == pytest.approx(-cohens_d(arm, base))
    assert superiority(base, arm) == pytest.approx(1 - superiority(arm, base))


@given(columns, columns, st.floats(0.1, 10), st.floats(-10, 10))
def test_d_does_not_depend_on_the_scale_or_origin_of_the_outcome(base, arm, scale, origin):
    def moved(values):
        return [value * scale + origin for value in values]

    assert cohens_d(moved(base), moved(arm)) == pytest.approx(cohens_d(base, arm), abs=1e-6)


def test_zero_pooled_deviation_gives_zero():
    assert cohens_d([1, 1, 1], [1, 1, 1]) == 0
    assert cohens_d([0, 0, 0], [1, 1, 1]) == 0
    assert cohens_d([0.1] * 7, [0.3] * 7) == 0  # rounding of the mean is not a spread
    assert paired_d([0.1, 0.2, 0.4], [0.2, 0.3, 0.5]) == 0


def test_hedges_factor_is_its_textbook_approximation():
    base, arm = binary(20), binary(31)
    assert hedges_g(base, arm) == pytest.approx(
        cohens_d(base, arm) * (1 - 3 / (4 * 98 - 1)), rel=1e-4
    )


def test_superiority_counts_pairs():
    base, arm = [0, 1, 2, 2], [2, 1, 3]
    pairs = [(x > y) + 0.5 * (x == y) for x in arm for y in base]
    assert superiority(base, arm) == pytest.approx(sum(pairs) / len(pairs))


def test_items_that_stay_are_not_moved_the_wrong_way():
    assert moved_wrong([0, 1, 1, 0], [1, 0, 1, 0]) == 0.25
    assert moved_wrong([0, 1, 1, 0], [1, 0, 1, 1], sign=-1) == 0.5


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.tensor])
def test_any_column_of_numbers_is_accepted(kind):
    assert cohens_d(kind([True, False, False]), kind([True, True, False])) > 0


def test_bad_values_are_refused_with_their_place():
    with pytest.raises(ValueError, match=r"arm\[1\] is nan: leave missing items out"):
        cohens_d([1, 2, 3], [1, float("nan"), 2])
    with pytest.raises(ValueError, match="one number per item"):
        cohens_d([[1, 2], [3, 4]], [1, 2])
    with pytest.raises(ValueError, match="same items in the same order"):
        paired_d([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="at least three values"):
        cohens_d([1], [2])
    with pytest.raises(ValueError, match="must be 0 or 1"):
        cohens_d([1, 2], [2, 3], ddof=2)
    with pytest.raises(ValueError, match="must be 1"):
        moved_wrong([1], [2], sign=0)


# Tests


@given(columns.filter(lambda values: len(values) <= 9), st.integers(0, 1000))
@example(base=[0.0, -4.0, -3.0, 0.0], seed=238)  # differences that cancel up to rounding
@settings(max_examples=30, deadline=None)
def test_the_permutation_p_is_scipy_s_exact_one(base, seed):
    arm = base + np.random.default_rng(seed).integers(-3, 4, size=len(base))
    if (arm == base).all():
        assert paired_permutation(base, arm) == 1
        return
    exact = stats.permutation_test(
        (np.asarray(base), arm),
        lambda x, y, axis: (y - x).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    ).pvalue
    assert paired_permutation(base, arm) == pytest.approx(exact)
    # the same pairs in other units: enumerated instead of convolved
    assert paired_permutation(np.asarray(base) / 7, arm / 7) == pytest.approx(exact)


def test_sampled_flips_agree_with_exact_ones():
    generator = np.random.default_rng(0)
    base = generator.integers(0, 5, size=40)
    arm = base + generator.integers(-2, 4, size=40)
    exact = paired_permutation(base, arm)
    sampled = paired_permutation(base / 7, arm / 7, resamples=20_000)
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact / 20_000))
    assert paired_permutation(base / 7, base / 7 + 1 / 7) == pytest.approx(1 / 10_000, abs=1e-12)


def test_on_binary_outcomes_the_permutation_test_is_mcnemar():
    generator = np.random.default_rng(1)
    for _ in range(20):
        base, arm = generator.integers(0, 2, size=(2, 60))
        assert paired_permutation(base, arm) == pytest.approx(mcnemar(base, arm))
    with pytest.raises(ValueError, match="0 or 1; use 'paired permutation'"):
        mcnemar([0, 2], [1, 1])


def test_no_change_gives_p_of_one_in_every_test():
    same = [0.0, 1.0, 1.0, 0.0]
    for test in TESTS.values():
        assert test.p_value(same, same) == 1
    assert mann_whitney([1, 1, 1], [1, 1]) == 1


def test_scipy_s_tests_are_passed_through():
    generator = np.random.default_rng(2)
    base, arm = generator.normal(size=(2, 30))
    assert wilcoxon(base, arm) == stats.wilcoxon(arm, base).pvalue
    assert mann_whitney(base, arm) == stats.mannwhitneyu(base, arm).pvalue


@pytest.mark.parametrize("name", list(TESTS))
def test_false_positives_are_nominal_on_null_data(name):
    # correlated binary pairs for McNemar, correlated normal pairs for the others; Mann-Whitney
    # assumes independent items and gets them
    count, items = 800, 40
    pairs = null_pairs(count, items, seed=3)
    if name == "mcnemar":
        pairs = (pairs > 0).astype(float)
    if name == "mann-whitney":
        pairs = np.random.default_rng(4).normal(size=(count, 2, items))
    test = TESTS[name].p_value
    if name == "paired permutation":
        pairs = np.round(pairs * 3)  # whole numbers: the exact null
    rate = np.mean([test(base, arm) <= 0.05 for base, arm in pairs])
    highest = stats.binom.ppf(0.999, count, 0.05) / count
    lowest = (
        0
        if name in ("mcnemar", "paired permutation")
        else stats.binom.ppf(0.001, count, 0.05) / count
    )
    assert lowest <= rate <= highest
    if name == "paired permutation":
        assert rate > 0.03


def test_the_tests_find_a_planted_effect():
    pairs = null_pairs(1, 200, seed=5)[0]
    for name, test in TESTS.items():
        base, arm = pairs[0], pairs[1] + 1.0
        values = (base > 0, arm > 0) if name == "mcnemar" else (base, arm)
        assert test.p_value(*values) < 1e-3


# Intervals


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
    assert first == d_interval(base, arm, seed=3)
    assert first != d_interval(base, arm, seed=4)
    monkeypatch.setattr("sae_steering_plugin.effects.contrast.BLOCK", 30 * 100)
    assert d_interval(base, arm, seed=3) == first


def test_complete_separation_gives_a_finite_interval():
    base, arm = np.zeros(20), np.array([1.0] * 19 + [0.0])
    interval = d_interval(base, arm)
    assert 0 < interval.low < cohens_d(base, arm)
    assert interval.high == pytest.approx(cohens_d(base, arm))  # the largest finite d
    assert d_interval(np.zeros(5), np.ones(5)).high == 0
    with pytest.raises(ValueError, match="between 0 and 1"):
        d_interval(base, arm, level=95.0)


# Corrections


def test_holm_and_bh_by_hand():
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert benjamini_hochberg(p) == pytest.approx([0.02, 0.04, 0.04, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_corrections_keep_the_order_and_never_lower_a_p(p):
    for adjust in CORRECTIONS.values():
        adjusted = adjust(p)
        assert (adjusted >= np.asarray(p) - 1e-12).all()
        assert (adjusted <= 1).all()
        assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= -1e-12).all()


def test_holm_keeps_the_family_wise_error_and_raw_p_values_do_not():
    p = np.random.default_rng(13).uniform(size=(2000, 20))
    errors = np.mean([holm(row).min() <= 0.05 for row in p])
    assert errors <= stats.binom.ppf(0.999, 2000, 0.05) / 2000
    assert (p.min(axis=1) <= 0.05).mean() > 0.5


def test_a_p_value_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="outside 0..1"):
        holm([0.5, 1.5])


# The record


def test_the_record_says_everything_it_was_computed_from():
    base, arm = binary(27), binary(46)
    one = effect(
        base,
        arm,
        method="probe",
        outcome="autonomy",
        strength=2,
        unit="unit",
        trait="autonomy",
        valid_rate=0.99,
        ddof=0,
        test="mcnemar",
    )
    assert (one.n, one.base_mean, one.arm_mean) == (50, 0.54, 0.92)
    assert one.d == cohens_d(base, arm, ddof=0)
    assert one.ci_low < one.d < one.ci_high
    assert (one.test, one.ddof, one.trait, one.valid_rate) == ("mcnemar", 0, "autonomy", 0.99)
    assert one.p_value == mcnemar(base, arm)
    assert one.d_z == paired_d(base, arm, ddof=0)
    assert one.moved_wrong == 0


def test_independent_arms_of_unequal_size_are_compared():
    one = effect([0, 1, 0, 1, 1], [1, 1, 1, 0], method="m", outcome="o", paired=False)
    assert (one.test, one.n) == ("mann-whitney", 4)
    assert math.isnan(one.d_z)
    assert math.isnan(one.moved_wrong)


def test_words_that_name_no_test_list_the_tests():
    with pytest.raises(ValueError, match="choose one of paired permutation, wilcoxon"):
        effect([1, 2, 3], [2, 3, 5], method="m", outcome="o", test="t-test")
    with pytest.raises(ValueError, match="needs paired items"):
        effect([1, 2, 3], [2, 3, 5], method="m", outcome="o", test="wilcoxon", paired=False)
    with pytest.raises(ValueError, match="choose one of holm, bh, none"):
        corrected([], correction="bonferroni")


def test_a_separation_without_spread_warns_instead_of_looking_like_no_effect():
    with pytest.warns(UserWarning, match="d has no value and is given as 0"):
        one = effect([0] * 9, [1] * 9, method="m", outcome="o")
    assert one.p_value == pytest.approx(2 / 2**9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        effect([1] * 9, [1] * 9, method="m", outcome="o")


def test_a_family_is_corrected_together_and_says_how():
    family = [
        effect(binary(27), binary(ones), method="m", outcome="o", resamples=50)
        for ones in (46, 30, 27)
    ]
    adjusted = corrected(family, correction="bh")
    assert [one.correction for one in adjusted] == ["bh"] * 3
    assert [one.p_adjusted for one in adjusted] == pytest.approx(
        list(benjamini_hochberg([one.p_value for one in family]))
    )
