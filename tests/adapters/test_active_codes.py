import pytest
import torch

from sae_steering_plugin.adapters import active_codes
from sae_steering_plugin.adapters.active_codes import active_encoder
from sae_steering_plugin.adapters.sae_parts import whole_codes
from tests.hosts import D_MODEL, tiny_sae

ARCHITECTURES = [
    ("standard", {}),
    ("standard", {"normalize_activations": "layer_norm"}),
    ("standard", {"normalize_activations": "constant_norm_rescale"}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("jumprelu", {}),
    ("jumprelu", {"normalize_activations": "layer_norm"}),
    ("gated", {}),
    ("topk", {"k": 4}),
    ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    ("topk", {"k": 30, "normalize_activations": "constant_norm_rescale"}),
    ("abstopk", {"k": 5}),
    ("matching_pursuit", {}),
    ("temporal", {}),
    ("steering", {}),
]


def dense_of(hits, d_sae):
    out = torch.zeros(hits.n, d_sae)
    assert len(hits.tokens) == len(
        set(zip(hits.tokens.tolist(), hits.features.tolist(), strict=True))
    )
    out[hits.tokens, hits.features] = hits.values
    return out


@pytest.mark.parametrize("blocks", [(4096, 1024, 1024), (7, 5, 8)], ids=["one", "many"])
@pytest.mark.parametrize("word,options", ARCHITECTURES, ids=lambda x: str(x))
def test_the_hits_are_the_codes_that_encode_gives(word, options, blocks, monkeypatch):
    for name, value in zip(("COLUMNS", "TOKENS", "SAMPLED"), blocks, strict=True):
        monkeypatch.setattr(active_codes, name, value)
    sae = tiny_sae(word, **options)
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-0.3, 0.3, D_MODEL))
    x = torch.randn(3, 11, D_MODEL, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(3, 11, dtype=torch.bool)
    keep[0, :4] = keep[2, -2:] = False
    hits = active_encoder(sae)(x, keep)
    exact = whole_codes(sae, x)[keep].detach()
    assert hits.n == int(keep.sum()) and (hits.values != 0).all()
    assert exact.any()
    # one float32 product per code; a code within rounding of its threshold may be lost, and is then
    # itself below the tolerance unless the rule jumps, which these random weights do not meet
    torch.testing.assert_close(dense_of(hits, exact.shape[1]), exact, rtol=1e-5, atol=2e-6)


def test_a_bfloat16_dictionary_is_read_in_float32():
    sae = tiny_sae("standard").to(torch.bfloat16)
    x = torch.randn(1, 5, D_MODEL)
    hits = active_encoder(sae)(x, torch.ones(1, 5, dtype=torch.bool))
    exact = torch.relu((x[0] - sae.b_dec.float()) @ sae.W_enc.float() + sae.b_enc.float())
    torch.testing.assert_close(dense_of(hits, 32), exact.detach(), rtol=1e-5, atol=2e-6)


def test_no_token_gives_no_hit():
    hits = active_encoder(tiny_sae())(torch.randn(2, 3, D_MODEL), torch.zeros(2, 3).bool())
    assert hits.n == 0 and not len(hits.values)
