import json
import math
import warnings

import numpy as np
import pytest

from sae_steering_plugin.effects.contrast import (
    benjamini_hochberg,
    cohens_d,
    corrected,
    d_interval,
    effect,
    hedges_g,
    mann_whitney,
    mcnemar,
    paired_d,
    paired_permutation,
    permutation,
    superiority,
    superiority_interval,
)

from .samples import binary


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
    with pytest.raises(ValueError, match="choose one of holm, bh, bonferroni, none"):
        corrected([], correction="sidak")


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


def test_the_row_holds_both_tests_and_every_size():
    base, arm = binary(27), binary(46)
    one = effect(base, arm, method="m", outcome="o")
    assert (one.test, one.unpaired_test) == ("paired permutation", "mann-whitney")
    assert one.p_value == paired_permutation(base, arm)
    assert one.unpaired_p == mann_whitney(base, arm)
    assert (one.hedges_g, one.superiority) == (hedges_g(base, arm), superiority(base, arm))
    around = superiority_interval(base, arm)
    assert (one.superiority_low, one.superiority_high) == (around.low, around.high)
    assert (one.n, one.n_base, one.interval, one.note) == (50, 50, "bootstrap bca", "")
    other = effect(base, arm, method="m", outcome="o", unpaired_test="permutation", paired=False)
    assert other.p_value == other.unpaired_p == permutation(base, arm)


def test_the_interval_is_the_one_named():
    base, arm = binary(27), binary(46)
    one = effect(base, arm, method="m", outcome="o", interval="bca", level=0.9)
    around = d_interval(base, arm, method="bca", level=0.9)
    assert (one.ci_low, one.ci_high, one.interval) == (around.low, around.high, "bootstrap bca")


def test_constant_arms_say_why_they_have_no_interval():
    one = effect([1] * 9, [1] * 9, method="m", outcome="o")
    assert (one.d, one.interval, one.note) == (0, "none", "all values are equal")


def test_clusters_reach_the_interval_and_the_test():
    generator = np.random.default_rng(40)
    names = np.repeat(list("abcdefghijkl"), 5)
    base = generator.normal(size=60)
    arm = base + np.repeat(generator.normal(size=12), 5)
    flat = effect(base, arm, method="m", outcome="o")
    grouped = effect(base, arm, method="m", outcome="o", clusters=names)
    assert grouped.n_clusters == 12
    assert grouped.d == flat.d
    assert grouped.ci_high - grouped.ci_low > flat.ci_high - flat.ci_low
    assert grouped.p_value == paired_permutation(base, arm, clusters=names)
    assert math.isnan(grouped.unpaired_p)
    with pytest.raises(ValueError, match="'wilcoxon' takes items for independent"):
        effect(base, arm, method="m", outcome="o", clusters=names, test="wilcoxon")
    with pytest.raises(ValueError, match="'wilcoxon' pairs the items"):
        effect(base, arm, method="m", outcome="o", unpaired_test="wilcoxon")


def test_the_record_is_a_page_and_a_dictionary():
    one = effect(binary(27), binary(46), method="<b>", outcome="asks", strength=2, unit="norm")
    page = one._repr_html_()
    for words in ("&lt;b&gt;", "asks", "2 norm", "0.54 to 0.92", "0.938", "bootstrap bca"):
        assert words in page
    assert "nan" not in page
    assert json.loads(json.dumps(one.to_dict()))["d"] == one.d
