import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from sae_steering_plugin.adapters.sae_lens import sae_id
from sae_steering_plugin.directions.codes import fired_codes
from sae_steering_plugin.directions.sparse import sas_codes, sas_vector
from tests.directions.planted import fired_of, labelled_of, orthonormal_sae
from tests.hosts import D_MODEL, SITE, tiny_sae

POSITIVE = torch.tensor([[2.0, 1, 0, 3], [4, 1, 0, 0], [0, 1, 5, 0], [6, 1, 0, 3]])
NEGATIVE = torch.tensor([[0.0, 2, 7, 0], [0, 2, 7, 0], [1, 2, 0, 0], [0, 2, 7, 9]])

code_tables = arrays(
    "float32",
    array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=8).map(lambda s: (s[0], 5)),
    elements=st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.5]),
).map(torch.from_numpy)
taus = st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0])


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(0.25, [0, 0, 0, 0]), (0.5, [4, 0, -7, 3]), (0.75, [4, 0, -7, 0]), (1.0, [0, 0, 0, 0])],
)
def test_hand_example_of_the_method_page(tau, expected):
    assert sas_codes(POSITIVE, NEGATIVE, tau=tau).values.tolist() == expected


def by_loop(positive, negative, tau):
    """Algorithm 1, step by step, one latent at a time."""
    out = []
    for column in range(positive.shape[1]):
        parts = []
        for side in (positive, negative):
            active = [float(x) for x in side[:, column] if x != 0]
            share = len(active) / len(side)
            parts.append(sum(active) / len(active) if active and share >= tau else 0.0)
        out.append(0.0 if parts[0] and parts[1] else parts[0] - parts[1])
    return torch.tensor(out)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@settings(max_examples=60, deadline=None)
@given(code_tables, code_tables, taus)
def test_agrees_with_a_slow_loop_for_dense_and_sparse_codes(positive, negative, tau):
    expected = by_loop(positive, negative, tau)
    for form in (lambda x: x, torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr):
        found = sas_codes(form(positive), form(negative), tau=tau).values
        assert torch.allclose(found, expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(code_tables, code_tables, taus, st.randoms(use_true_random=False))
def test_swapping_sides_negates_and_row_order_or_repeats_do_not_matter(
    positive, negative, tau, random
):
    v = sas_codes(positive, negative, tau=tau).values
    assert torch.equal(sas_codes(negative, positive, tau=tau).values, -v)
    order = list(range(len(positive)))
    random.shuffle(order)
    assert torch.equal(sas_codes(positive[order], negative, tau=tau).values, v)
    twice = sas_codes(positive.repeat(2, 1), negative.repeat(2, 1), tau=tau).values
    assert torch.allclose(twice, v, atol=1e-6)
    assert not sas_codes(positive, positive, tau=tau).values.any()


@settings(max_examples=40, deadline=None)
@given(code_tables, code_tables, taus)
def test_parts_are_disjoint_and_kept_latents_pass_on_one_side_only(positive, negative, tau):
    result = sas_codes(positive, negative, tau=tau)
    assert (result.positive >= 0).all()
    assert (result.negative >= 0).all()
    assert not (result.positive * result.negative).any()
    assert torch.equal(result.positive - result.negative, result.values)
    q_positive, q_negative = result.frequency
    assert ((q_positive >= tau) & (q_negative < tau))[result.positive > 0].all()
    assert ((q_negative >= tau) & (q_positive < tau))[result.negative > 0].all()


def test_side_sets_are_nested_in_tau_but_the_support_is_not_monotone():
    generator = torch.Generator().manual_seed(0)
    sides = [(torch.rand(40, 64, generator=generator) < 0.5).float() for _ in range(2)]
    results = [sas_codes(*sides, tau=tau) for tau in (0.1, 0.3, 0.4, 0.5, 0.6, 0.7)]
    for side in (0, 1):
        kept = [result.kept[side] for result in results]
        assert kept == sorted(kept, reverse=True)
    support = [int((result.values != 0).sum()) for result in results]
    assert support != sorted(support, reverse=True)
    assert max(support) > support[0]


def test_a_latent_that_fires_in_exactly_the_share_tau_is_kept():
    positive = torch.zeros(100, 1)
    positive[:55] = 2.0
    assert sas_codes(positive, torch.zeros(100, 1), tau=0.55).values.tolist() == [2.0]
    positive[54] = 0.0
    assert sas_codes(positive, torch.zeros(100, 1), tau=0.55).values.tolist() == [0.0]


def test_mean_runs_over_the_examples_that_fire_or_over_all():
    over_all = sas_codes(POSITIVE, NEGATIVE, tau=0.5, mean_over="all").values
    assert over_all.tolist() == [3.0, 0.0, -5.25, 1.5]


def test_shared_latents_can_keep_their_difference():
    kept = sas_codes(POSITIVE, NEGATIVE, tau=0.5, shared="keep_difference").values
    assert kept.tolist() == [4.0, -1.0, -7.0, 3.0]


def test_parts_and_top_n_cut_the_vector():
    cut = {"tau": 0.5}
    assert sas_codes(POSITIVE, NEGATIVE, parts="positive", **cut).values.tolist() == [4, 0, 0, 3]
    assert sas_codes(POSITIVE, NEGATIVE, parts="negative", **cut).values.tolist() == [0, 0, -7, 0]
    assert sas_codes(POSITIVE, NEGATIVE, top_n=2, **cut).values.tolist() == [4, 0, -7, 0]
    assert sas_codes(POSITIVE, NEGATIVE, top_n=99, **cut).values.tolist() == [4, 0, -7, 3]


def test_each_side_can_have_its_own_tau_and_its_own_number_of_rows():
    values = sas_codes(POSITIVE, NEGATIVE[:3], tau=(0.75, 0.5)).values
    assert values.tolist() == [4.0, 0.0, -7.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, r"tau is 0.0; it must lie in \(0, 1\]"),
        ({"tau": (0.5, 1.5)}, "must lie in"),
        ({"top_n": 0}, "top_n is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sas_codes(POSITIVE, NEGATIVE, **options)


@pytest.mark.parametrize("form", [lambda x: x, torch.Tensor.to_sparse], ids=["dense", "sparse"])
def test_codes_that_are_negative_or_not_finite_are_refused(form):
    with pytest.raises(ValueError, match="non-negative"):
        sas_codes(form(-POSITIVE), form(NEGATIVE))
    with pytest.raises(ValueError, match="not finite"):
        sas_codes(form(POSITIVE / torch.tensor([0.0, 1, 1, 1])), form(NEGATIVE))


def test_empty_sides_and_other_widths_are_refused():
    with pytest.raises(ValueError, match="no examples"):
        sas_codes(POSITIVE[:0], NEGATIVE)
    with pytest.raises(ValueError, match="4 and 3 latents"):
        sas_codes(POSITIVE, NEGATIVE[:, :3])


def random_labelled(n=24, **options):
    generator = torch.Generator().manual_seed(3)
    labels = [i % 2 for i in range(n)]
    return labelled_of(torch.randn(n, D_MODEL, generator=generator) * 2, labels, **options)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {}),
        ("gated", {}),
        ("jumprelu", {}),
        ("topk", {}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("matching_pursuit", {}),
    ],
    ids=str,
)
def test_dense_form_is_what_decode_makes_of_the_sparse_form(architecture, options):
    sae = tiny_sae(architecture, **options)
    v = sas_vector(random_labelled(), sae, tau=0.3, shared="keep_difference")
    assert v.codes is not None
    assert len(v.codes.indices) > 0
    with torch.no_grad():
        codes = v.codes.dense()
        decoded = sae.decode(codes) - sae.decode(torch.zeros_like(codes))
    assert torch.allclose(v.vector, decoded, atol=1e-5)
    assert v.codes.sae_id == v.recipe.sae_id == sae_id(sae)


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_codes_of_every_normalisation_are_those_of_the_dictionary(norm):
    labelled = random_labelled()
    sae = tiny_sae("standard", normalize_activations=norm)
    v = sas_vector(labelled, sae, tau=0.4)
    with torch.no_grad():
        codes = sae.encode(labelled.activations)
    expected = sas_codes(codes[labelled.labels == 1], codes[labelled.labels == 0], tau=0.4)
    assert torch.allclose(v.codes.dense(), expected.values, atol=1e-5)


def planted_behaviour():
    """Latent 3 fires for positive rows only, latent 5 for negative rows only, latent 0 for all."""
    codes = torch.zeros(40, D_MODEL)
    labels = torch.arange(40) % 2
    codes[:, 0] = 1.0
    codes[labels == 1, 3] = 2.0
    codes[labels == 0, 5] = 1.5
    sae = orthonormal_sae()
    return labelled_of(codes @ sae.W_dec.detach(), labels), sae


def test_planted_behaviour_is_found_and_moves_the_wired_logit_both_ways():
    from sae_steering_plugin.edits.codes import SparseAdd

    labelled, sae = planted_behaviour()
    v = sas_vector(labelled, sae)
    assert v.codes.indices.tolist() == [3, 5]
    assert torch.allclose(v.codes.values, torch.tensor([2.0, -1.5]), atol=1e-5)
    assert v.recipe.scores["auroc"] == 1.0
    logit = sae.W_dec.detach()[3]  # an unembedding column wired to decoder row 3
    x = labelled.positive[:1][None]

    def steered(strength):
        change = SparseAdd(sae, v, strength).prepare(dtype=torch.float32, device="cpu")
        return float((x + change(x))[0, 0] @ logit)

    plain = float(x[0, 0] @ logit)
    assert steered(1.0) == pytest.approx(plain + 2.0, abs=1e-4)
    assert steered(-1.0) == pytest.approx(plain - 2.0, abs=1e-4)


def test_recipe_says_what_was_done():
    labelled, sae = planted_behaviour()
    v = sas_vector(labelled, sae, tau=0.9, positive="asks less", label="autonomy")
    recipe = v.recipe
    assert (recipe.method, recipe.positive, recipe.n) == ("sas", "asks less", 40)
    assert recipe.mean_norm == pytest.approx(labelled.mean_norm)
    assert recipe.settings["tau"] == 0.9
    assert recipe.settings["support_positive"] == 1
    assert recipe.settings["support_negative"] == 1
    assert recipe.settings["shared_latents"] == 1
    assert v.hook_name == SITE
    assert v.label == "autonomy"


def test_an_empty_vector_warns_with_the_frequency_histogram():
    codes = torch.ones(8, 2)
    labelled = labelled_of(torch.ones(8, 3), [0, 1] * 4)
    with pytest.warns(UserWarning, match=r"2 of them on both(.|\n)*positive: \[0, .*, 2\]"):
        v = sas_vector(labelled, None, codes=fired_of(codes, torch.ones(2, 3)))
    assert v.norm == 0
    assert len(v.codes.indices) == 0


def test_unbalanced_answer_letters_are_refused_unless_allowed():
    letters = ["A", "B"] * 12  # rows alternate labels: A is always the negative row
    labelled = random_labelled(letters=letters)
    sae = tiny_sae("standard")
    with pytest.raises(
        ValueError, match="0% of the positive rows answer 'A' and 100% of the negative"
    ):
        sas_vector(labelled, sae)
    v = sas_vector(labelled, sae, allow_unbalanced_letters=True, tau=0.4)
    assert v.recipe.settings["letter_balance"] == 0.0


def test_balanced_letters_do_not_enter_the_vector():
    """A latent that marks the letter A fires in half of each side, under tau = 0.7 on both."""
    codes = torch.zeros(40, D_MODEL)
    labels = torch.arange(40) % 2
    letters = ["A" if (i // 2) % 2 else "B" for i in range(40)]
    codes[labels == 1, 3] = 1.0
    codes[[letter == "A" for letter in letters], 9] = 5.0
    sae = orthonormal_sae()
    labelled = labelled_of(codes @ sae.W_dec.detach(), labels, letters=letters)
    assert sas_vector(labelled, sae).codes.indices.tolist() == [3]


def test_given_codes_are_used_instead_of_encoding_again():
    labelled = random_labelled()
    sae = tiny_sae("jumprelu")
    codes = fired_codes(sae, labelled)
    again = sas_vector(labelled, sae, codes=codes, tau=0.3)
    assert torch.equal(again.vector, sas_vector(labelled, sae, tau=0.3).vector)
    with pytest.raises(ValueError, match="codes have 24 rows and there are 22 examples"):
        sas_vector(random_labelled(22), sae, codes=codes)


def test_unpaired_sides_of_unequal_size_are_legal():
    generator = torch.Generator().manual_seed(0)
    labelled = labelled_of(torch.randn(15, D_MODEL, generator=generator) * 2, [1] * 10 + [0] * 5)
    assert sas_vector(labelled, tiny_sae("standard"), tau=0.5).norm > 0


def test_one_label_alone_is_refused():
    labelled = labelled_of(torch.ones(4, D_MODEL), [1] * 4)
    with pytest.raises(ValueError, match="rows of label 1 and rows of label 0"):
        sas_vector(labelled, tiny_sae("standard"))
