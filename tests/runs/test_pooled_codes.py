"""Texts pooled to sparse rows, against one text at a time through the host and the SAE's encode."""

import pytest
import torch

from sae_steering_plugin.adapters.activations import activations_at, encode_texts, padded
from sae_steering_plugin.features import PooledCodes, score_features
from sae_steering_plugin.runs.pooled_codes import POOLINGS, collect_codes, pool
from tests.hosts import CORPUS, tiny_sae

ARCHITECTURES = (
    "standard",
    "jumprelu",
    "topk",
    "abstopk",
    "gated",
    "temporal",
    "matching_pursuit",
)
TEXTS = (*CORPUS, "the cat")


def by_hand(model, sae, text, start=0):
    """Codes [token feature] of the text's own tokens, by a pass of its own and `sae.encode`."""
    (encoded,) = encode_texts(model, [text], prepend_bos=True)
    batch = padded(model, [encoded])
    x = activations_at(model, sae.cfg.metadata.hook_name, batch)
    with torch.no_grad():
        codes = sae.encode(x)
    codes = codes.to_dense() if codes.is_sparse else codes
    begins = [begin for begin, _ in encoded.spans]
    kept = [i for i in range(1, len(encoded)) if begins[i] >= start]
    return codes[0, kept]


def expected(codes, name):
    fires = (codes != 0).float()
    return {
        "max": codes.gather(0, codes.abs().argmax(0, keepdim=True))[0],
        "mean": codes.mean(0),
        "last": codes[-1],
        "frequency": fires.mean(0),
        "any": fires.amax(0),
    }[name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_pooling_equals_the_texts_one_by_one(bridge, architecture):
    sae = tiny_sae(architecture)
    found = collect_codes(bridge, sae, TEXTS, poolings=POOLINGS, batch_size=3, progress=False)
    for name in POOLINGS:
        dense = found[name].dense()
        for row, text in zip(dense, TEXTS, strict=True):
            assert torch.allclose(row, expected(by_hand(bridge, sae, text), name), atol=1e-5), name


def test_both_hosts_and_any_batch_give_the_same(host):
    sae = tiny_sae("jumprelu")
    one, many = (
        collect_codes(host, sae, TEXTS, batch_size=size, progress=False)["max"]
        for size in (1, len(TEXTS))
    )
    assert torch.allclose(one.dense(), many.dense(), atol=1e-5)
    assert torch.equal(one.n_tokens, many.n_tokens)
    for row, text in zip(one.dense(), TEXTS, strict=True):
        assert torch.allclose(row, by_hand(host, sae, text).amax(0), atol=1e-5)


def test_a_prefix_is_left_out_by_its_characters(bridge):
    sae = tiny_sae()
    starts = [text.index(" ") for text in TEXTS]
    found = collect_codes(bridge, sae, TEXTS, starts=starts, progress=False)["max"]
    for row, text, start in zip(found.dense(), TEXTS, starts, strict=True):
        assert torch.allclose(row, by_hand(bridge, sae, text, start).amax(0), atol=1e-5)
    assert found.settings["prefix_left_out"]


def test_long_texts_raise_or_are_cut_and_named(bridge):
    sae = tiny_sae()
    with pytest.raises(ValueError, match="text 1 has .* tokens and the limit is 6"):
        collect_codes(bridge, sae, ["the cat", TEXTS[1]], max_tokens=6, progress=False)
    found = collect_codes(
        bridge, sae, ["the cat", TEXTS[1]], max_tokens=6, cut=True, progress=False
    )["max"]
    assert found.settings["cut"] == [1]
    assert int(found.n_tokens[1]) == 5
    assert torch.allclose(found.dense()[1], by_hand(bridge, sae, TEXTS[1])[:5].amax(0), atol=1e-5)


def test_blocks_of_rows_change_nothing(bridge, monkeypatch):
    sae = tiny_sae("topk")
    whole = collect_codes(bridge, sae, TEXTS, progress=False)["max"]
    monkeypatch.setattr("sae_steering_plugin.runs.pooled_codes.DENSE", 1)
    assert torch.allclose(
        collect_codes(bridge, sae, TEXTS, progress=False)["max"].dense(), whole.dense(), atol=1e-6
    )


def test_frequency_loses_a_dense_feature_and_the_mean_keeps_it():
    """Rank pattern of shared/methods/supervised_feature_selection, table 6.2: the same feature with
    its threshold lowered step by step, so that it fires on ever more tokens."""
    generator = torch.Generator().manual_seed(0)
    texts, tokens = 1200, 20
    holds = torch.rand(texts, generator=generator) < 0.1
    share = torch.where(holds, 0.2, 0.01)[:, None]
    of_concept = torch.rand(texts, tokens, generator=generator) < share
    signal = of_concept * 3.0 + 0.5 * torch.randn(texts, tokens, generator=generator)
    thresholds = torch.tensor([1.5, 0.6, 0.2, 0.0])
    codes = torch.where(signal[..., None] > thresholds, signal[..., None], 0.0)
    everywhere = torch.ones(texts, tokens, dtype=torch.bool)
    best, at_zero = {}, {}
    for name in ("frequency", "mean", "max"):
        pooled = PooledCodes.from_dense(pool(name, codes, everywhere))
        best[name] = score_features(pooled, holds, scores=("f1",)).values["f1"][:, 0]
        fires = PooledCodes.from_dense((pooled.dense() > 0).float())
        at_zero[name] = score_features(fires, holds, scores=("f1",)).values["f1"][:, 0]
    assert best["frequency"][0] > 0.5 and (best["frequency"][1:] < 0.25).all()
    assert best["frequency"][-1] < 0.05
    assert best["mean"].min() > 0.5
    assert best["max"].max() < 0.1
    assert max(float(found.max()) for found in at_zero.values()) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"poolings": ("sum",)}, "no pooling \\['sum'\\]; choose among max, mean, last"),
        ({"poolings": "max"}, "poolings is a list of names"),
        ({"poolings": ()}, "no pooling"),
        ({"starts": [0]}, "starts has 1 entries for 5 texts"),
        ({"starts": [0, 0, 0, 0, 99]}, "nothing is left to pool of text 4"),
        ({"texts": []}, "no texts to encode"),
        ({"texts": ["the cat", ""]}, "text 1 is empty"),
    ],
)
def test_bad_input_is_refused_before_any_pass(bridge, options, message):
    texts = options.pop("texts", TEXTS)
    with pytest.raises(ValueError, match=message):
        collect_codes(bridge, tiny_sae(), texts, progress=False, **options)
