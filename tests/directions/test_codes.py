import pytest
import torch

from sae_steering_plugin.directions.codes import FiredCodes, fired_codes, same_site
from tests.directions.planted import fired_of, labelled_of
from tests.hosts import D_MODEL, SITE, tiny_sae


def random_rows(n=20, **options):
    generator = torch.Generator().manual_seed(1)
    return labelled_of(
        torch.randn(n, D_MODEL, generator=generator) * 2, [i % 2 for i in range(n)], **options
    )


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "abstopk"])
def test_codes_are_the_dictionarys_own(architecture, norm):
    sae = tiny_sae(architecture, normalize_activations=norm)
    labelled = random_rows()
    found = fired_codes(sae, labelled, batch_size=7)
    with torch.no_grad():
        expected = sae.encode(labelled.activations)
    assert torch.allclose(found.dense(), expected, atol=1e-5)
    assert torch.equal(found.latents, (expected != 0).any(0).nonzero().flatten())
    assert torch.equal(found.rows, sae.W_dec.detach()[found.latents])


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_no_scale_is_left_in_the_dictionary(norm):
    sae = tiny_sae("standard", normalize_activations=norm)
    fired_codes(sae, random_rows())
    with torch.no_grad(), pytest.raises(AttributeError):
        sae.decode(torch.zeros(1, 32))


def test_mean_scale_is_what_decode_multiplies_a_code_with():
    labelled = random_rows()
    assert fired_codes(tiny_sae("standard"), labelled).scale == 1.0
    sae = tiny_sae("standard", normalize_activations="constant_norm_rescale")
    expected = labelled.activations.norm(dim=-1).mean() / D_MODEL**0.5
    assert fired_codes(sae, labelled).scale == pytest.approx(float(expected), rel=1e-5)


def test_rows_are_those_that_decode_uses():
    sae = tiny_sae("topk", rescale_acts_by_decoder_norm=True)
    found = fired_codes(sae, random_rows())
    assert torch.allclose(found.rows.norm(dim=1), torch.ones(len(found.latents)))


def test_activations_of_another_site_are_refused():
    with pytest.raises(ValueError, match=f"come from 'blocks.1.*trained on '{SITE}'"):
        fired_codes(tiny_sae(), random_rows(hook_name="blocks.1.hook_resid_post"))


def test_other_names_of_the_same_site_are_accepted():
    for name in ("blocks.0.hook_out", "blocks.1.hook_resid_pre", "blocks.1.hook_in"):
        assert same_site(SITE, name)
        assert len(fired_codes(tiny_sae(), random_rows(hook_name=name))) == 20
    assert not same_site(SITE, "blocks.0.hook_resid_pre")
    assert not same_site("blocks.0.hook_mlp_out", SITE)


def test_activations_of_another_width_are_refused():
    labelled = labelled_of(torch.ones(2, 8), [0, 1])
    with pytest.raises(ValueError, match="are 8 wide, the dictionary reads 16"):
        fired_codes(tiny_sae(), labelled)


def test_temporal_dictionaries_are_refused():
    with pytest.raises(ValueError, match="temporal dictionary depend on all earlier tokens"):
        fired_codes(tiny_sae("temporal"), random_rows())


def test_sparse_form_keeps_what_is_not_zero():
    codes = fired_of(torch.rand(3, 4), torch.rand(4, 2))
    sparse = codes.sparse(torch.tensor([0.0, 2.0, 0.0, -1.0]))
    assert sparse.indices.tolist() == [1, 3]
    assert sparse.dense().tolist() == [0, 2, 0, -1]


def test_codes_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        FiredCodes(
            torch.tensor([[float("nan")]]), torch.tensor([0]), torch.ones(1, 2), 1, "x", SITE, SITE
        )
