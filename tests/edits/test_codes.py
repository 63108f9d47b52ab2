import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY

import sae_steering_plugin.adapters.sae_lens as ours
from sae_steering_plugin.edits import Ablate, Clamp, Exchange, Scale, SparseAdd
from sae_steering_plugin.edits.codes import codes_of, constant_step, prepare_together
from sae_steering_plugin.types import Recipe, SparseCodes, SteeringVector
from tests.hosts import D_MODEL, SITE, tiny_sae
from tests.oracles import algorithm_2, decoded, own_rule, unchecked

ours.register()
D_SAE = 32
CPU = torch.device("cpu")
F32 = {"dtype": torch.float32, "device": CPU}
ARCHITECTURES = sorted(SAE_CLASS_REGISTRY)
TRANSCODERS = [word for word in ARCHITECTURES if word.endswith("transcoder")]
RUN_TIME = ("layer_norm", "constant_norm_rescale")
FOLDED = ("none", "expected_average_only_in", "covariance_whitening")
DENSE = [word for word in ARCHITECTURES if word not in ("topk", "abstopk", "matching_pursuit")]


def sae_of(word, *, seed=0, **options):
    """A random SAE whose decoder bias matters; matching pursuit needs rows of length 1."""
    if word.endswith("transcoder"):
        options |= {"apply_b_dec_to_input": False, "d_out": D_MODEL}
    if word == "temporal":
        options.setdefault("kval_topk", 6)
    sae = tiny_sae(word, d_sae=D_SAE, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        if word != "steering":
            sae.b_dec.copy_(torch.randn(len(sae.b_dec), generator=generator) * 0.2)
        if word == "matching_pursuit":
            sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
    return sae


def cases():
    for word in ARCHITECTURES:
        kinds = FOLDED[:1] if word == "steering" else (*FOLDED, *RUN_TIME)
        kinds = [k for k in kinds if not (word == "temporal" and k == "covariance_whitening")]
        for kind in kinds:
            for subtract in (True, False):
                if not (subtract and (word in TRANSCODERS or word == "steering")):
                    yield word, {"normalize_activations": kind, "apply_b_dec_to_input": subtract}
    for word in ("topk", "abstopk"):
        for kind in ("none", *RUN_TIME):
            yield word, {"normalize_activations": kind, "rescale_acts_by_decoder_norm": True}
    yield (
        "temporal",
        {
            "normalize_activations": "constant_scalar_rescale",
            "activation_normalization_factor": 0.37,
        },
    )
    yield "temporal", {"sae_diff_type": "relu", "kval_topk": None}
    yield "temporal", {"tied_weights": False}


def spelled(case):
    word, options = case
    return "-".join([word, *(f"{k[:9]}={v}" for k, v in options.items())])


every_dictionary = pytest.mark.parametrize("case", list(cases()), ids=spelled)


def residual(seed=0, batch=2, pos=5):
    return torch.randn(batch, pos, D_MODEL, generator=torch.Generator().manual_seed(seed)) * 2


def signed_vector(seed=0, support=7, size=1.5):
    generator = torch.Generator().manual_seed(seed)
    vector = torch.zeros(D_SAE)
    chosen = torch.randperm(D_SAE, generator=generator)[:support]
    vector[chosen] = torch.randn(support, generator=generator) * size
    return vector


def lasting(sae):
    """What an encode leaves on an SAE under run-time normalisation."""
    return {"ln_mu", "ln_std", "x_norm_coeff"} & set(vars(sae))


@every_dictionary
@pytest.mark.parametrize("strength", [1.0, -1.0])
def test_sparse_add_is_algorithm_2(case, strength):
    sae = sae_of(case[0], **case[1])
    x, vector = residual(), signed_vector()
    ours = x + SparseAdd(sae, vector, strength).prepare(**F32)(x)
    # two float32 decodings are subtracted in the direct form: 1e-5 of values near 10
    torch.testing.assert_close(ours, algorithm_2(sae, x, strength * vector), rtol=1e-4, atol=1e-4)
    assert (ours - x).abs().max() > 0.05


@every_dictionary
def test_clamp_scale_and_ablate_are_edits_of_the_dictionarys_own_codes(case):
    sae = sae_of(case[0], **case[1])
    x = residual()
    sae_codes = sae.encode(x).detach()
    features = sae_codes.abs().sum(dim=(0, 1)).topk(3).indices.tolist()
    assert (sae_codes[..., features] != 0).any()
    for change, edited in (
        (Clamp(sae, features, torch.tensor([0.5, -1.0, 3.0])), torch.tensor([0.5, -1.0, 3.0])),
        (Scale(sae, features, 2.5), sae_codes[..., features] * 2.5),
        (Ablate(sae, features), 0.0),
    ):
        wanted = sae_codes.clone()
        wanted[..., features] = edited
        delta = decoded(sae, x, wanted) - decoded(sae, x, sae_codes)
        torch.testing.assert_close(change.prepare(**F32)(x), delta, rtol=1e-4, atol=1e-4)


@every_dictionary
def test_partial_codes_are_the_dictionarys_codes_and_nothing_is_left_on_it(case):
    sae = sae_of(case[0], **case[1])
    x, features = residual(), [3, 17, 0, 30]
    torch.testing.assert_close(
        codes_of(sae, features, x), sae.encode(x)[..., features].detach(), rtol=1e-4, atol=1e-5
    )
    for name in lasting(sae):
        delattr(sae, name)
    SparseAdd(sae, signed_vector()).prepare(**F32)(x)
    codes_of(sae, features, x)
    assert not lasting(sae)


@every_dictionary
def test_codes_edits_at_rest_are_idle(case):
    sae = sae_of(case[0], **case[1])
    vector = signed_vector()
    for change in (
        SparseAdd(sae, vector, 0.0),
        SparseAdd(sae, torch.zeros(D_SAE)),
        SparseAdd(sae, vector, torch.zeros(2)),
        Scale(sae, [3, 4], 1.0),
        Scale(sae, [3, 4], torch.ones(2, 2)),
    ):
        assert change.prepare(**F32).idle
    assert not SparseAdd(sae, vector, torch.tensor([0.0, 1.0])).prepare(**F32).idle


@pytest.mark.parametrize("word", ["standard", "jumprelu", "topk", "abstopk", "matching_pursuit"])
def test_a_zero_row_among_steered_rows_changes_nothing_at_all(word):
    sae, x = sae_of(word), residual()
    change = SparseAdd(sae, signed_vector(), torch.tensor([0.0, 1.0])).prepare(**F32)(x)
    assert torch.equal(x[0] + change[0], x[0])
    assert (change[1] != 0).any()


@pytest.mark.parametrize("word", ["standard", "gated", "jumprelu", "topk", "temporal"])
@pytest.mark.parametrize("strength", [0.3, 1.0, 5.0, -5.0])
def test_edited_codes_are_codes_the_dictionary_allows_and_the_error_is_kept(word, strength):
    sae, x, vector = sae_of(word), residual(1), signed_vector(1)
    out = x + SparseAdd(sae, vector, strength).prepare(**F32)(x)
    codes = sae.encode(x).detach()
    edited = torch.stack(
        [torch.stack([own_rule(sae, t) for t in row]) for row in codes + strength * vector]
    )
    assert (edited >= 0).all()
    if word == "topk":
        assert ((edited != 0).sum(-1) <= sae.cfg.k).all()
    if word == "jumprelu":
        assert ((edited == 0) | (edited > sae.threshold)).all()
    torch.testing.assert_close(
        x - decoded(sae, x, codes), out - decoded(sae, x, edited), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("word", ["standard", "gated", "transcoder"])
def test_non_negative_amounts_on_relu_codes_are_a_constant_step(word):
    sae, x = sae_of(word), residual()
    vector = signed_vector().abs()
    change = SparseAdd(sae, vector, 0.7)
    step = constant_step(change, CPU)
    assert step is not None
    torch.testing.assert_close(step[0], 0.7 * vector @ sae.W_dec.detach())
    torch.testing.assert_close(change.prepare(**F32)(x), step.expand_as(x), rtol=1e-5, atol=5e-6)
    assert constant_step(SparseAdd(sae, vector, -0.7), CPU) is None
    assert constant_step(SparseAdd(sae, signed_vector(), 0.7), CPU) is None


@pytest.mark.parametrize("kind", RUN_TIME)
def test_under_run_time_normalisation_no_step_is_constant(kind):
    sae = sae_of("standard", normalize_activations=kind)
    assert constant_step(SparseAdd(sae, signed_vector().abs()), CPU) is None
    x = residual()
    change = SparseAdd(sae, signed_vector().abs()).prepare(**F32)(x)
    row = change[0, 0] / change[0, 0].norm()
    scale = x.std(dim=-1) if kind == "layer_norm" else x.norm(dim=-1) / D_MODEL**0.5
    wanted = scale * (signed_vector().abs() @ sae.W_dec.detach()).norm()
    torch.testing.assert_close(change.norm(dim=-1), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(change @ row, wanted, rtol=1e-4, atol=1e-4)


def test_jumprelu_is_a_constant_step_only_above_every_threshold():
    sae, x = sae_of("jumprelu"), residual()
    vector = torch.zeros(D_SAE)
    vector[[4, 9]] = sae.threshold.detach()[[4, 9]] * 2
    above, below = SparseAdd(sae, vector, 0.51), SparseAdd(sae, vector, 0.49)
    step = constant_step(above, CPU)
    assert step is not None
    torch.testing.assert_close(above.prepare(**F32)(x), step.expand_as(x), rtol=1e-5, atol=5e-6)
    assert constant_step(below, CPU) is None
    off = (sae.encode(x)[..., [4, 9]] == 0).all(dim=-1)
    assert off.any()
    assert (below.prepare(**F32)(x)[off] == 0).all()


@pytest.mark.parametrize("share, moves", [(0.999, False), (1.001, True)])
def test_an_inactive_jumprelu_latent_switches_on_at_its_threshold(share, moves):
    sae, x = sae_of("jumprelu"), residual()
    codes = sae.encode(x).detach()
    token, latent = (codes[0] == 0).nonzero()[0].tolist()
    vector = torch.zeros(D_SAE)
    vector[latent] = 1.0
    amount = float(sae.threshold.detach()[latent]) * share
    change = SparseAdd(sae, vector, amount).prepare(**F32)(x)[0, token]
    wanted = amount * sae.W_dec[latent].detach() if moves else torch.zeros(D_MODEL)
    torch.testing.assert_close(change, wanted, rtol=1e-5, atol=0)


def test_topk_evicts_and_weak_pushes_vanish():
    sae, x = sae_of("topk"), residual()
    codes = sae.encode(x).detach()
    token = codes[0, 0]
    smallest = float(token[token > 0].min())
    latent = int((token == 0).nonzero()[0])
    vector = torch.zeros(D_SAE)
    vector[latent] = 1.0
    weak = SparseAdd(sae, vector, smallest * 0.99).prepare(**F32)(x)[0, 0]
    strong = SparseAdd(sae, vector, smallest * 1.01).prepare(**F32)(x)[0, 0]
    evicted = int((token == smallest).nonzero()[0])
    rows = sae.W_dec.detach()
    assert (weak == 0).all()
    torch.testing.assert_close(
        strong, smallest * 1.01 * rows[latent] - smallest * rows[evicted], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("word", ["standard", "jumprelu"])
def test_a_negative_vector_leaves_latents_at_zero_and_saturates(word):
    sae, x = sae_of(word), residual()
    codes = sae.encode(x).detach()
    latent = int((codes > 0).float().mean(dim=(0, 1)).sub(0.5).abs().argmin())
    vector = torch.zeros(D_SAE)
    vector[latent] = -1.0
    off = codes[..., latent] == 0
    assert off.any() and not off.all()
    small = SparseAdd(sae, vector, 0.05).prepare(**F32)(x)
    assert (small[off] == 0).all()
    assert (small[~off] != 0).any()
    enough = 2 * float(codes.max())
    most = SparseAdd(sae, vector, enough).prepare(**F32)(x)
    assert torch.equal(most, SparseAdd(sae, vector, 10 * enough).prepare(**F32)(x))
    torch.testing.assert_close(
        most, -codes[..., latent, None] * sae.W_dec[latent].detach(), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(most, -SparseAdd(sae, vector, -enough).prepare(**F32)(x))


@settings(max_examples=25, deadline=None)
@given(
    word=st.sampled_from(["standard", "jumprelu", "topk", "abstopk", "gated"]),
    seed=st.integers(0, 10_000),
    amounts=st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
)
def test_additions_of_two_vectors_are_one_edit_whatever_their_order(word, seed, amounts):
    sae, x = _cached_sae(word), residual(seed)
    one, two = signed_vector(seed), signed_vector(seed + 1)
    edits = [SparseAdd(sae, one, amounts[0]), SparseAdd(sae, two, amounts[1])]
    forth = prepare_together(edits, **F32)(x)
    back = prepare_together(edits[::-1], **F32)(x)
    together = SparseAdd(sae, amounts[0] * one + amounts[1] * two).prepare(**F32)(x)
    torch.testing.assert_close(forth, back, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(forth, together, rtol=1e-4, atol=1e-4)


_saes = {}


def _cached_sae(word):
    return _saes.setdefault(word, sae_of(word))


def test_additions_come_before_scale_clamp_and_ablate_which_act_in_the_order_given():
    sae, x = sae_of("standard"), residual()
    vector = torch.zeros(D_SAE)
    vector[5] = 2.0
    codes = sae.encode(x).detach()
    edits = [Scale(sae, 5, 3.0), SparseAdd(sae, vector), Clamp(sae, 6, 1.0), Ablate(sae, 6)]
    wanted = codes.clone()
    wanted[..., 5] = (codes[..., 5] + 2.0) * 3.0
    wanted[..., 6] = 0.0
    delta = decoded(sae, x, wanted) - decoded(sae, x, codes)
    torch.testing.assert_close(prepare_together(edits, **F32)(x), delta, rtol=1e-4, atol=1e-4)
    wanted[..., 6] = 1.0
    delta = decoded(sae, x, wanted) - decoded(sae, x, codes)
    edits = [edits[0], edits[1], edits[3], edits[2]]
    torch.testing.assert_close(prepare_together(edits, **F32)(x), delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("word", ["standard", "topk", "matching_pursuit"])
def test_each_edit_of_a_group_keeps_its_own_tokens(word):
    sae, x = sae_of(word), residual()
    codes = sae.encode(x).detach()
    features = codes.sum(dim=(0, 1)).topk(2).indices.tolist()
    first, second = torch.zeros(2, 5, 1, dtype=torch.bool), torch.zeros(2, 5, 1, dtype=torch.bool)
    first[0, 1:3] = True
    second[:, 2:] = True
    edits = [Clamp(sae, features[0], 4.0), Scale(sae, features[1], -1.0)]
    change = prepare_together(edits, **F32)(x, [first, second])
    wanted = codes.clone()
    wanted[..., features[0]] = torch.where(first[..., 0], 4.0, codes[..., features[0]])
    wanted[..., features[1]] = codes[..., features[1]] * torch.where(second[..., 0], -1.0, 1.0)
    delta = decoded(sae, x, wanted) - decoded(sae, x, codes)
    torch.testing.assert_close(change, delta, rtol=1e-4, atol=1e-4)


def test_clamp_values_can_differ_by_row_and_feature():
    sae, x = sae_of("standard"), residual()
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    together = Clamp(sae, [2, 8], values)
    assert together.batch_rows == 2
    change = together.prepare(**F32)(x)
    for i in range(2):
        alone = Clamp(sae, [2, 8], values[i]).prepare(**F32)(x[i : i + 1])
        torch.testing.assert_close(change[i : i + 1], alone)


def test_relu_can_replace_the_rule_of_a_topk_dictionary():
    sae, x, vector = sae_of("topk"), residual(), signed_vector()
    for rule, function in (("relu", torch.relu), ("none", lambda codes: codes)):
        ours = x + SparseAdd(sae, vector, nonlinearity=rule).prepare(**F32)(x)
        wanted = algorithm_2(sae, x, vector, lambda sae, codes, f=function: f(codes))
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    most = (torch.relu(sae.encode(x) + vector) != 0).sum(-1).max()
    assert most > sae.cfg.k


@pytest.mark.parametrize("word", ["standard", "jumprelu", "topk"])
def test_codes_are_computed_in_float32_whatever_the_activation(word):
    sae, x, vector = sae_of(word), residual(), signed_vector()
    half = x.bfloat16()
    change = SparseAdd(sae, vector).prepare(dtype=torch.bfloat16, device=CPU)(half)
    assert change.dtype == torch.float32
    assert torch.equal(change, SparseAdd(sae, vector).prepare(**F32)(half.float()))


def test_hooks_left_on_the_dictionary_are_neither_run_nor_counted():
    x, runs = residual(), []
    for word in ("standard", "matching_pursuit", "temporal"):
        sae = sae_of(word)
        clean = Scale(sae, [1, 2], 3.0).prepare(**F32)(x)
        sae.hook_sae_input.add_hook(lambda acts, hook: runs.append(1) or acts * 5)
        assert torch.equal(Scale(sae, [1, 2], 3.0).prepare(**F32)(x), clean)
        assert not runs
        sae.encode(x)
        assert runs.pop()


def test_a_temporal_dictionary_says_that_it_reads_earlier_tokens():
    assert Ablate(sae_of("temporal"), 3).prepare(**F32).reads_context
    assert not Ablate(sae_of("matching_pursuit"), 3).prepare(**F32).reads_context


def test_a_vector_with_codes_is_applied_as_its_codes():
    sae, x = sae_of("standard"), residual()
    dense = signed_vector()
    found = dense.nonzero().reshape(-1)
    codes = SparseCodes(found, dense[found], D_SAE, ours.sae_id(sae))
    vector = SteeringVector(dense @ sae.W_dec.detach(), SITE, Recipe("sas"), "v", codes)
    wanted = SparseAdd(sae, dense).prepare(**F32)(x)
    for given_as in (codes, vector):
        torch.testing.assert_close(SparseAdd(sae, given_as).prepare(**F32)(x), wanted)
    assert SparseAdd(sae, vector).hook_name == SITE


@pytest.mark.parametrize("word", ["standard", "jumprelu", "topk", "gated"])
def test_a_vector_fits_its_dictionary_after_both_were_saved_and_loaded(word, tmp_path):
    sae, x, dense = sae_of(word), residual(), signed_vector()
    found = dense.nonzero().reshape(-1)
    codes = SparseCodes(found, dense[found], D_SAE, ours.sae_id(sae))
    vector = SteeringVector(dense @ sae.W_dec.detach(), SITE, Recipe("sas"), "v", codes)
    sae.save_model(tmp_path / "sae")
    ours.SteeringDictionary.from_vectors([vector]).save_model(tmp_path / "vectors")
    loaded = SAE.load_from_disk(str(tmp_path / "sae"), device="cpu")
    again = SAE.load_from_disk(str(tmp_path / "vectors"), device="cpu").vectors()[0]
    wanted = SparseAdd(sae, vector, -1.5).prepare(**F32)(x)
    assert torch.equal(SparseAdd(loaded, again, -1.5).prepare(**F32)(x), wanted)
    with pytest.raises(ValueError, match="was built in .* Load the SAE it was built in"):
        SparseAdd(sae_of(word, seed=7), again)


def test_a_vector_of_another_dictionary_is_refused():
    sae, other = sae_of("standard"), sae_of("standard", seed=5)
    codes = SparseCodes(torch.tensor([1]), torch.ones(1), D_SAE, ours.sae_id(other))
    with pytest.raises(ValueError, match="was built in .* Load the SAE it was built in"):
        SparseAdd(sae, codes)
    with pytest.raises(ValueError, match="the vector has 31 latents, the dictionary 32"):
        SparseAdd(sae, torch.ones(31))
    with pytest.raises(ValueError, match="has no codes: build it with sas_vector, or use Add"):
        SparseAdd(sae, SteeringVector(torch.ones(D_MODEL), SITE, Recipe("x"), "plain"))


@pytest.mark.parametrize(
    "make", [Ablate, lambda s, f: Scale(s, f, 1.0), lambda s, f: Clamp(s, f, 1.0)]
)
def test_features_outside_or_twice_or_none_are_refused(make):
    sae = sae_of("standard")
    with pytest.raises(ValueError, match=r"feature 32 is outside 0\.\.31 of this dictionary"):
        make(sae, 32)
    with pytest.raises(ValueError, match="is outside"):
        make(sae, [3, -1])
    with pytest.raises(ValueError, match=r"a feature stands twice in \(3, 3\)"):
        make(sae, [3, 3])
    with pytest.raises(ValueError, match="no feature is named"):
        make(sae, [])


def test_features_may_come_as_whatever_an_argmax_gives():
    import numpy as np

    sae, one = sae_of("standard"), torch.tensor(3)
    with unchecked():
        for given_as in (3, np.int64(3), one, one[None], np.array([3]), [np.int64(3)], range(3, 4)):
            assert Ablate(sae, given_as).support == (3,)


def test_bad_amounts_are_refused():
    sae = sae_of("standard")
    with pytest.raises(ValueError, match=r"values have shape \(3,\); give one number, \[2\] or"):
        Clamp(sae, [1, 2], torch.ones(3))
    with pytest.raises(ValueError, match="a clamp value is not finite"):
        Clamp(sae, [1, 2], float("nan"))
    with pytest.raises(ValueError, match="strength is not finite"):
        SparseAdd(sae, torch.ones(D_SAE), float("inf"))
    with pytest.raises(ValueError, match="give one strength, or one per batch row"):
        SparseAdd(sae, torch.ones(D_SAE), torch.ones(2, 2))
    refused = pytest.raises(ValueError, match="nonlinearity is 'tanh'; use 'own', 'relu' or 'none'")
    with unchecked(), refused:
        SparseAdd(sae, torch.ones(D_SAE), nonlinearity="tanh")


@pytest.mark.parametrize("word", ["standard", "jumprelu", "topk"])
def test_a_conditional_clamp_is_the_attached_form_and_leaves_other_tokens_alone(word):
    sae, x = sae_of(word), residual(batch=4)
    codes = sae.encode(x)
    features = codes.sum((0, 1)).topk(3).indices.tolist()
    wanted = codes.clone()
    on = codes[..., features] > 0.1
    wanted[..., features] = torch.where(on, -50.0, codes[..., features])
    change = Clamp(sae, features, -50.0, above=0.1).prepare(**F32)(x)
    torch.testing.assert_close(change, (wanted - codes) @ sae.W_dec, atol=1e-4, rtol=1e-5)
    silent = ~on.any(-1)
    assert silent.any() and on.any()
    assert torch.equal((x + change)[silent], x[silent])
    # one feature at a time: a code that is off stays off beside one that is on
    mixed = on.any(-1) & ~on.all(-1)
    assert mixed.any()


def test_a_conditional_clamp_with_no_condition_to_meet_does_nothing():
    sae, x = sae_of("standard"), residual()
    never = Clamp(sae, [1, 2], -50.0, above=1e6).prepare(**F32)(x)
    assert not never.any()
    with pytest.raises(ValueError, match="above is inf; it must be a finite number"):
        Clamp(sae, 1, 0.0, above=float("inf"))


def test_edits_that_cannot_be_one_are_refused():
    sae = sae_of("standard")
    with pytest.raises(ValueError, match="these edits belong to different dictionaries"):
        prepare_together([Ablate(sae, 1), Ablate(sae_of("standard"), 1)], **F32)
    pair = [SparseAdd(sae, torch.ones(D_SAE)), SparseAdd(sae, torch.ones(D_SAE), 1.0, "none")]
    with pytest.raises(ValueError, match="disagree on the nonlinearity"):
        prepare_together(pair, **F32)


# --- Exchange


def exchange_vector(sae, values=(2.0, -1.5, 0.7, -4.0)):
    indices = torch.tensor([1, 5, 9, 20])
    return SparseCodes(indices, torch.tensor(values), D_SAE, ours.sae_id(sae))


UNSIGNED = [word for word in ARCHITECTURES if word not in ("abstopk", "steering", "temporal")]


@pytest.mark.parametrize("word", UNSIGNED)
@pytest.mark.parametrize("strength", [1.0, 2.0, -1.0])
def test_an_exchange_tops_up_what_is_missing_and_takes_no_more_than_there_is(word, strength):
    sae = sae_of(word)
    vector = exchange_vector(sae)
    x = torch.randn(2, 3, D_MODEL, generator=torch.Generator().manual_seed(7)) * 2
    with torch.no_grad():
        codes = sae.encode(x)
        codes = codes.to_dense() if codes.is_sparse else codes
        change = Exchange(sae, vector, strength).prepare(**F32)(x)
        before = codes_of(sae, vector.indices.tolist(), x)
    wanted = vector.values * strength
    # the paper's form: minus min(f, z_remove), plus max(z_add - f, 0), each on its own latents
    removed = torch.minimum(before, (-wanted).clamp_min(0)) * (wanted < 0)
    added = (wanted - before).clamp_min(0) * (wanted > 0)
    moved = torch.zeros_like(codes)
    moved[..., vector.indices] = added - removed
    with torch.no_grad():
        expected = decoded(sae, x, codes + moved) - decoded(sae, x, codes)
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)
    after = before + added - removed
    assert (after >= 0).all()
    assert (after >= wanted)[..., wanted > 0].all()


def test_exchange_of_strength_zero_is_idle_and_rows_may_differ():
    sae = sae_of("standard")
    vector = exchange_vector(sae)
    assert Exchange(sae, vector, 0.0).prepare(**F32).idle
    x = torch.randn(3, 2, D_MODEL, generator=torch.Generator().manual_seed(7)) * 2
    strengths = torch.tensor([0.0, 1.0, -2.0])
    together = Exchange(sae, vector, strengths)
    assert together.batch_rows == 3
    rows = together.prepare(**F32)(x)
    assert not rows[0].any()
    for i in (1, 2):
        alone = Exchange(sae, vector, float(strengths[i])).prepare(**F32)(x[i : i + 1])
        torch.testing.assert_close(rows[i], alone[0])


def test_exchange_is_clamping_where_the_code_is_short_and_scaling_where_it_runs_out():
    sae = sae_of("standard")
    x = torch.randn(1, 6, D_MODEL, generator=torch.Generator().manual_seed(3)) * 2
    short = float(codes_of(sae, [1], x).max()) + 1
    up = SparseCodes(torch.tensor([1]), torch.tensor([short]), D_SAE, "")
    clamp = Clamp(sae, 1, short).prepare(**F32)(x)
    torch.testing.assert_close(Exchange(sae, up).prepare(**F32)(x), clamp)
    out = SparseCodes(torch.tensor([1]), torch.tensor([-short]), D_SAE, "")
    ablate = Ablate(sae, 1).prepare(**F32)(x)
    torch.testing.assert_close(Exchange(sae, out).prepare(**F32)(x), ablate)


def test_exchange_refuses_codes_that_can_be_negative_and_other_dictionaries():
    with pytest.raises(ValueError, match="codes of architecture 'abstopk' can be negative"):
        Exchange(sae_of("abstopk"), exchange_vector(sae_of("abstopk")))
    sae = sae_of("standard")
    foreign = SparseCodes(torch.tensor([1]), torch.ones(1), D_SAE, "another/sae")
    with pytest.raises(ValueError, match="built in 'another/sae'"):
        Exchange(sae, foreign)
