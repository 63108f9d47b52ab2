import pytest
import torch

from sae_steering_plugin.directions.codes import fired_codes
from sae_steering_plugin.directions.feature import (
    feature_vector,
    rank_features,
    standardised_difference,
)
from tests.directions.planted import fired_of, labelled_of, probe_toy
from tests.hosts import D_MODEL, SITE, tiny_sae


def random_rows(n=30, **options):
    generator = torch.Generator().manual_seed(4)
    x = 2 * torch.randn(n, D_MODEL, generator=generator)
    return labelled_of(x, [i % 2 for i in range(n)], **options)


@pytest.mark.parametrize("rescale", [False, True])
def test_vector_is_the_row_that_decode_uses(rescale):
    sae = tiny_sae("topk", rescale_acts_by_decoder_norm=rescale)
    v = feature_vector(sae, 5)
    code = torch.zeros(32)
    code[5] = 1.0
    with torch.no_grad():
        step = sae.decode(code) - sae.decode(torch.zeros(32))
    assert torch.allclose(v.vector, step, atol=1e-6)
    assert v.recipe.row_norm == pytest.approx(v.norm)
    assert v.hook_name == SITE
    assert v.label == "feature 5"
    assert v.recipe.model_name == "tiny"


def test_largest_activation_and_mean_norm_come_from_the_data():
    sae, labelled = tiny_sae("standard"), random_rows()
    v = feature_vector(sae, 3, labelled=labelled)
    with torch.no_grad():
        expected = float(sae.encode(labelled.activations)[:, 3].max())
    assert v.recipe.max_activation == pytest.approx(expected)
    assert v.recipe.mean_norm == pytest.approx(labelled.mean_norm)
    assert v.length_of("max_activation") == pytest.approx(expected * v.norm)
    assert v.recipe.settings["max_activation_over"] == "30 read positions"
    given = feature_vector(sae, 3, labelled=labelled, max_activation=9.0, mean_norm=2.0).recipe
    assert (given.max_activation, given.mean_norm) == (9.0, 2.0)


def test_a_unit_of_code_is_worth_the_mean_scale_under_run_time_normalisation():
    """At an input of mean length the step that decode makes is `row_norm` long."""
    sae = tiny_sae("standard", normalize_activations="constant_norm_rescale")
    labelled = random_rows()
    v = feature_vector(sae, 3, labelled=labelled)
    scale = float(labelled.activations.norm(dim=1).mean()) / D_MODEL**0.5
    assert v.recipe.row_norm == pytest.approx(v.norm * scale, rel=1e-5)


def test_a_feature_that_never_fired_has_no_largest_activation():
    sae = tiny_sae("standard")
    with torch.no_grad():
        sae.b_enc[3] = -1e6
    v = feature_vector(sae, 3, labelled=random_rows())
    assert v.recipe.max_activation is None
    with pytest.raises(ValueError, match="cannot be measured in 'max_activation'"):
        v.length_of("max_activation")


def test_transcoder_rows_belong_to_the_output_site():
    sae = tiny_sae("transcoder", apply_b_dec_to_input=False, d_out=D_MODEL)
    sae.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    v = feature_vector(sae, 2, labelled=random_rows())
    assert v.hook_name == "blocks.1.hook_mlp_out"
    assert v.recipe.mean_norm is None  # measured at the input, so it says nothing there


def test_features_outside_and_other_sites_are_refused():
    sae = tiny_sae("standard")
    with pytest.raises(ValueError, match="feature 32 is outside 0..31"):
        feature_vector(sae, 32)
    with pytest.raises(ValueError, match="trained on"):
        feature_vector(sae, 1, labelled=random_rows(hook_name="blocks.1.hook_resid_post"))
    with pytest.raises(ValueError, match="pass max_activation="):
        feature_vector(tiny_sae("temporal"), 1, labelled=random_rows())


def test_standardised_difference_is_cohens_d_of_each_column():
    values = torch.tensor([[1.0, 5, 2], [3, 5, 2], [0, 5, 1], [2, 5, 1]])
    labels = torch.tensor([1, 1, 0, 0])
    d = standardised_difference(values, labels)
    assert float(d[0]) == pytest.approx(1 / 2**0.5)
    assert float(d[1]) == 0.0
    assert float(d[2]) > 1e5
    with pytest.raises(ValueError, match="at least two examples"):
        standardised_difference(values[:3], labels[:3])


def test_planted_latent_ranks_first_and_holds_on_the_other_half():
    codes, labels, labelled = probe_toy(seed=0, n=200)
    best = rank_features(codes, labels, labelled.groups, top_n=5, concept="planted")
    assert best.features[0] == 7
    assert best.scores["heldout_auroc"][0] > 0.95
    assert best.scores["heldout_d"][0] > 2
    assert len(best.features) == 5
    assert best.concept == "planted"


def test_features_of_the_other_sign_are_ranked_only_when_asked_for():
    codes, labels, labelled = probe_toy(seed=0, n=200)
    against = 1 - labels
    plain = rank_features(codes, against, labelled.groups, top_n=64)
    assert 7 not in plain.features
    assert all(d > 0 for d in plain.scores["train_d"])
    signed = rank_features(codes, against, labelled.groups, top_n=64, both_signs=True)
    assert signed.features[0] == 7
    assert signed.scores["train_d"][0] < 0


def test_noise_is_chosen_on_one_half_and_fails_on_the_other():
    generator = torch.Generator().manual_seed(0)
    codes = fired_of(torch.rand(80, 500, generator=generator), torch.ones(500, 2))
    labels = torch.arange(80) % 2
    best = rank_features(codes, labels, [f"g{i // 2}" for i in range(80)], top_n=10)
    assert min(best.scores["train_d"]) > 0.5
    assert abs(sum(best.scores["heldout_auroc"]) / 10 - 0.5) < 0.1


def test_synthetic_features_of_saelens_are_recovered():
    """Labels are one true feature's firing; its latent in the matched dictionary ranks first."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.synthetic import (
        SyntheticModel,
        SyntheticModelConfig,
        ZipfianFiringProbabilityConfig,
        init_sae_to_match_feature_dict,
    )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        truth = SyntheticModel(
            SyntheticModelConfig(
                num_features=32,
                hidden_dim=32,
                seed=0,
                firing_probability=ZipfianFiringProbabilityConfig(max_prob=0.4, min_prob=0.1),
            )
        )
        hidden, features = truth.sample_with_features(400)
    metadata = SAEMetadata(hook_name=SITE, model_name="synthetic")
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=32, metadata=metadata))
    init_sae_to_match_feature_dict(sae, truth.feature_dict)
    sae.b_dec.data = truth.feature_dict.bias.data.clone()
    for chosen in (2, 9):
        labelled = labelled_of(hidden.detach(), (features[:, chosen] > 0).long())
        best = rank_features(fired_codes(sae, labelled), labelled.labels, labelled.groups)
        assert best.features[0] == chosen
        assert best.scores["heldout_auroc"][0] > 0.95
