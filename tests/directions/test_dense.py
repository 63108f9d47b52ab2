import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steering_plugin.directions.dense import (
    caa_vector,
    class_difference,
    diff_mean_vector,
    first_component,
    pca_vector,
)
from tests.directions.planted import labelled_of
from tests.hosts import SITE

PLANTED = torch.tensor([0.0, 3.0, 0.0, -4.0, 0.0, 0.0])


def pairs_of(n=30, *, seed=0, gap=1.0, **options):
    """Pairs that differ by `gap * PLANTED` and a little noise; contexts vary much more."""
    generator = torch.Generator().manual_seed(seed)
    context = 5 * torch.randn(n, 6, generator=generator)
    noise = 0.1 * torch.randn(2, n, 6, generator=generator)
    positive = context + gap * PLANTED / 2 + noise[0]
    negative = context - gap * PLANTED / 2 + noise[1]
    return labelled_of(
        torch.cat([positive, negative]),
        [1] * n + [0] * n,
        pairs=[*range(n), *range(n)],
        groups=[f"pair {i}" for i in [*range(n), *range(n)]],
        **options,
    )


def test_difference_of_means_is_the_planted_shift():
    v = diff_mean_vector(pairs_of(200))
    assert torch.allclose(v.vector, PLANTED, atol=0.05)  # noise 0.1 * sqrt(2 / 200) = 0.01
    assert v.hook_name == SITE
    assert v.recipe.mean_norm == pytest.approx(float(pairs_of(200).activations.norm(dim=1).mean()))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_paired_and_unpaired_mean_differences_agree_in_any_row_order(n, seed):
    labelled = pairs_of(n, seed=seed)
    order = torch.randperm(2 * n, generator=torch.Generator().manual_seed(seed))
    shuffled = labelled_of(
        labelled.activations[order],
        labelled.labels[order],
        pairs=labelled.pairs[order].tolist(),
        groups=[labelled.groups[i] for i in order],
    )
    assert torch.allclose(caa_vector(shuffled).vector, diff_mean_vector(labelled).vector, atol=1e-4)


@pytest.mark.parametrize("build", [diff_mean_vector, caa_vector, pca_vector])
def test_labels_fix_the_orientation(build):
    labelled = pairs_of(20)
    flipped = labelled_of(
        labelled.activations,
        1 - labelled.labels,
        pairs=labelled.pairs.tolist(),
        groups=labelled.groups,
    )
    v, w = build(labelled), build(flipped)
    assert torch.allclose(v.vector, -w.vector, atol=1e-5)
    assert float(v.vector @ class_difference(labelled)) > 0


def test_component_of_pairs_finds_the_shift_that_contexts_hide():
    """Contexts vary 5 per axis, the shift is 5 long: pair midpoints remove what hides it."""
    labelled = pairs_of(200)
    v = pca_vector(labelled)
    assert float(v.direction @ PLANTED / PLANTED.norm()) > 0.999
    assert v.norm == pytest.approx(5.0, abs=0.1)
    assert v.recipe.settings["centre"] == "pair"
    assert v.recipe.settings["explained_variance"] > 0.9
    blind = pca_vector(labelled, centre="mean")
    assert abs(float(blind.direction @ PLANTED / PLANTED.norm())) < 0.99


def test_component_does_not_depend_on_the_order_within_pairs():
    """Swapping the members of a pair turns its difference round, which the component ignores."""
    generator = torch.Generator().manual_seed(0)
    differences = torch.randn(30, 6, generator=generator, dtype=torch.float64) + PLANTED
    signs = (torch.rand(30, 1, generator=generator) < 0.5).double() * 2 - 1
    one, share = first_component(differences)
    two, same = first_component(differences * signs)
    assert torch.allclose(one, two * torch.sign(one @ two), atol=1e-5)
    assert share == pytest.approx(same)


def test_unpaired_examples_get_a_component_about_their_mean():
    generator = torch.Generator().manual_seed(0)
    labels = [1] * 40 + [0] * 25
    x = torch.randn(65, 6, generator=generator) * 0.3
    x[:40] += PLANTED
    v = pca_vector(labelled_of(x, labels))
    assert v.recipe.settings["centre"] == "mean"
    assert float(v.direction @ PLANTED / 5) > 0.99


def test_recipes_hold_held_out_figures_and_settings():
    recipe = caa_vector(pairs_of(30), positive="more of it", seed=3).recipe
    assert (recipe.method, recipe.n, recipe.seed) == ("caa", 60, 3)
    assert recipe.positive == "more of it"
    # contexts are 5 per axis on both axes of the shift, which is 5 long: d' = 5 / 5 = 1
    assert 0.6 < recipe.scores["auroc"] < 0.95
    assert recipe.settings["groups"] == 30
    assert recipe.source == "arXiv 2312.06681"


def test_noise_does_not_score_on_held_out_rows():
    generator = torch.Generator().manual_seed(0)
    scores = [
        diff_mean_vector(
            labelled_of(torch.randn(60, 20, generator=generator), torch.arange(60) % 2)
        ).recipe.scores["auroc"]
        for _ in range(20)
    ]
    assert abs(sum(scores) / 20 - 0.5) < 0.06  # one set's AUROC varies by 0.08: 0.018 over twenty


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([0, 1, 0, -1], "row 3 belongs to no pair: use diff_mean_vector"),
        ([0, 0, 0, 1], "pair 0 has two rows of label 1"),
        ([0, 1, 0, 2], "pair 1 lacks its positive or its negative row"),
    ],
)
def test_rows_that_do_not_pair_up_are_refused(pairs, message):
    labelled = labelled_of(
        torch.randn(4, 3), [1, 1, 0, 0], pairs=pairs, groups=["one template"] * 4
    )
    with pytest.raises(ValueError, match=message):
        caa_vector(labelled)


def test_unbalanced_letters_are_refused_unless_allowed():
    letters = ["A"] * 10 + ["B"] * 10
    labelled = pairs_of(10, letters=letters)
    with pytest.raises(
        ValueError, match="100% of the positive rows answer 'A' and 0% of the negative"
    ):
        caa_vector(labelled)
    v = caa_vector(labelled, allow_unbalanced_letters=True)
    assert v.recipe.settings["letter_balance"] == 1.0
    balanced = pairs_of(10, letters=["A", "B"] * 10)
    assert caa_vector(balanced).recipe.settings["letter_balance"] == 0.5


@pytest.mark.parametrize("build", [diff_mean_vector, caa_vector, pca_vector])
def test_rows_that_do_not_differ_warn(build):
    labelled = labelled_of(
        torch.ones(4, 3), [1, 0, 1, 0], pairs=[0, 0, 1, 1], groups=["a", "a", "b", "b"]
    )
    with pytest.warns(UserWarning, match="does not separate the labels"):
        assert build(labelled).norm == 0


@pytest.mark.parametrize("build", [diff_mean_vector, caa_vector, pca_vector])
def test_one_label_alone_is_refused(build):
    with pytest.raises(ValueError, match="rows of label 1 and rows of label 0"):
        build(labelled_of(torch.randn(4, 3), [0] * 4, pairs=[0, 1, 2, 3]))


@pytest.mark.parametrize("build", [diff_mean_vector, caa_vector, pca_vector])
def test_pairs_that_a_split_would_part_are_refused(build):
    labelled = labelled_of(
        torch.randn(4, 3), [1, 0, 1, 0], pairs=[0, 0, 1, 1], groups=["a", "b"] * 2
    )
    with pytest.raises(ValueError, match="pair 0 has rows in the groups 'a' and 'b'"):
        build(labelled)


@pytest.mark.parametrize(
    ("positive", "negative", "fine"),
    [
        ("AAAABBBBBB", "BBBBAAAAAA", True),  # 40 %
        ("AAABBBBBBB", "BBBAAAAAAA", False),  # 30 %
        ("ABCABCABCA", "BCABCABCAB", True),  # three letters, evenly spread
        ("AAAAAAAAAA", "AAAAAAAAAA", True),  # one letter everywhere cancels
    ],
)
def test_letters_must_be_spread_alike_over_both_sides(positive, negative, fine):
    labelled = pairs_of(10, letters=[*positive, *negative])
    if fine:
        caa_vector(labelled)
    else:
        with pytest.raises(ValueError, match="30% of the positive rows answer 'A' and 70%"):
            caa_vector(labelled)
