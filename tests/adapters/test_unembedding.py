import pytest
import torch

from sae_steering_plugin.adapters.unembedding import norm_of, unembedding
from sae_steering_plugin.features.footprint import footprints
from sae_steering_plugin.organisms import list_organisms, load_organism
from tests.hosts import D_MODEL, tiny_bridge, tiny_gemma2, tiny_hooked, tiny_llama

MODELS = [tiny_bridge, tiny_hooked, tiny_llama, tiny_gemma2]


def rescaled(model, seed=0):
    """The model with a final norm that is not all ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.ln_final.named_parameters():
            if name.endswith(("weight", "w")):
                parameter.copy_(0.5 + 1.5 * torch.rand(D_MODEL, generator=generator))
    return model


def logits_of(model, residual):
    with torch.no_grad():
        return model.unembed(model.ln_final(residual[:, None]))[:, 0].double()


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_the_footprint_is_the_slope_of_the_models_own_head(make):
    """Moving a residual along d, at fixed norm scale, moves the logits by the footprint: so does
    the head's derivative at a long residual orthogonal to the seen row, up to its scale."""
    model = rescaled(make())
    head = unembedding(model)
    rows = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(1))
    seen = head.read(rows)
    weight = head.weight.detach().float()
    predicted = (seen @ weight).double()
    residual = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2)) * 50
    centred = residual - residual.mean() if head.centres else residual
    flat = rows - rows.mean(1, keepdim=True) if head.centres else rows
    flat = flat - (flat @ centred)[:, None] * centred / centred.square().sum()
    scale = centred.square().mean().sqrt()
    base = residual[None].expand(5, -1)
    step = logits_of(model, base + flat * 0.01) - logits_of(model, base - flat * 0.01)
    slope = step / 0.02 * scale.double()
    expected = (head.read(flat) @ weight).double()
    torch.testing.assert_close(slope, expected, rtol=2e-2, atol=2e-2 * float(predicted.std()))


@pytest.mark.parametrize("make", [tiny_bridge, tiny_hooked], ids=lambda f: f.__name__)
def test_folding_and_centring_at_loading_change_no_footprint(make):
    rows = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(1))
    raw, folded = rescaled(make()), rescaled(make())
    if make is tiny_hooked:
        folded.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
    else:
        folded.enable_compatibility_mode()
    found = []
    for model in (raw, folded):
        head = unembedding(model)
        weight = head.weight.detach()
        found.append(footprints(head.read(rows), weight, centre=head.mean_word, shares=(10,)))
    assert unembedding(raw).settings["norm_gain"]
    assert not unembedding(folded).settings["norm_gain"]
    for name, values in found[0].columns.items():
        torch.testing.assert_close(values, found[1].columns[name], rtol=1e-4, atol=1e-6)
    assert torch.equal(found[0].promoted, found[1].promoted)
    as_loaded = [unembedding(m, basis="loaded") for m in (raw, folded)]
    one, other = (head.read(rows) @ head.weight for head in as_loaded)
    assert not torch.allclose(one, other, rtol=1e-2)


def test_the_norms_gain_and_centring_are_read_off():
    for make, centres, extra in (
        (tiny_bridge, True, 0),
        (tiny_llama, False, 0),
        (tiny_gemma2, False, 1),
    ):
        model = rescaled(make())
        (weight,) = [p for n, p in model.ln_final.named_parameters() if n.endswith("weight")]
        gain, found = norm_of(model.ln_final, model.W_U)
        torch.testing.assert_close(gain, weight.detach() + extra, rtol=1e-4, atol=1e-5)
        assert found is centres


def test_a_soft_cap_is_recorded_and_forbids_centring_over_the_vocabulary():
    head = unembedding(tiny_gemma2())
    assert head.settings["soft_cap"] == 30
    assert head.mean_word is None and head.settings["centred_vocabulary"] is False


def test_a_wrong_basis_and_a_model_without_a_head_are_refused():
    with pytest.raises(ValueError, match="choose 'logits' or 'loaded'"):
        unembedding(tiny_bridge(), basis="x")
    headless = tiny_bridge()
    del headless._modules["ln_final"]
    with pytest.raises(ValueError, match="has no ln_final and W_U"):
        unembedding(headless)


@pytest.mark.parametrize("name", list_organisms())
def test_the_organisms_heads_are_read(name):
    model = load_organism(name).model
    head = unembedding(model)
    assert head.weight.shape == (model.cfg.d_model, model.cfg.d_vocab)
    assert head.settings["folded"] is False
