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
    ("transcoder", {"apply_b_dec_to_input": False, "d_out": 24}),
    ("skip_transcoder", {"apply_b_dec_to_input": False, "d_out": D_MODEL}),
    ("jumprelu_transcoder", {"apply_b_dec_to_input": False, "d_out": 24}),
]


def dense_of(hits, d_sae):
    out = torch.zeros(hits.n, d_sae)
    assert len(hits.tokens) == len(
        set(zip(hits.tokens.tolist(), hits.features.tolist(), strict=True))
    )
    out[hits.tokens, hits.features] = hits.values
    return out


SIEVED = [(word, options) for word, options in ARCHITECTURES if word in ("standard", "jumprelu")]
TRANSCODER = {"apply_b_dec_to_input": False, "d_out": 24}
SIEVED += [("transcoder", TRANSCODER), ("jumprelu_transcoder", TRANSCODER)]


@pytest.mark.parametrize("columns", [4096, 7], ids=["one", "many"])
@pytest.mark.parametrize("word,options", SIEVED, ids=lambda x: str(x))
def test_a_sieve_loses_no_code_and_adds_none(word, options, columns, monkeypatch):
    monkeypatch.setattr(active_codes, "COLUMNS", columns)
    sae = tiny_sae(word, **options)
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-0.3, 0.3, len(sae.b_dec)))
        sae.b_enc.copy_(torch.linspace(-2, 2, len(sae.b_enc)))  # bars on both sides of zero
    x = 3 * torch.randn(4, 50, D_MODEL, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(4, 50, dtype=torch.bool)
    plain, sieved = (active_encoder(sae, sieve=sieve)(x, keep) for sieve in (False, True))
    one, other = dense_of(plain, len(sae.b_enc)), dense_of(sieved, len(sae.b_enc))
    assert one.any() and not one.all()
    differ = (one > 0) != (other > 0)
    bar = sae.threshold.clamp_min(0) if "jumprelu" in word else torch.zeros(len(sae.b_enc))
    # on one side only where the code is within rounding of the threshold
    assert (torch.maximum(one, other) - bar)[differ].abs().lt(1e-5).all()
    torch.testing.assert_close(one[~differ], other[~differ], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("blocks", [(4096, 1024, 1024), (7, 5, 8)], ids=["one", "many"])
@pytest.mark.parametrize("word,options", ARCHITECTURES, ids=lambda x: str(x))
def test_the_hits_are_the_codes_that_encode_gives(word, options, blocks, monkeypatch):
    for name, value in zip(("COLUMNS", "TOKENS", "SAMPLED"), blocks, strict=True):
        monkeypatch.setattr(active_codes, name, value)
    sae = tiny_sae(word, **options)
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-0.3, 0.3, len(sae.b_dec)))
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
