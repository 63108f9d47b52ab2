"""The real model stories260k with its real SAEs, through both hosts, against figures measured
elsewhere."""

import json
from functools import cache

import pytest
import torch
from sae_lens import SAE

from benchmarks.steering_reference import (
    arms,
    disagreements,
    measure,
    nats_per_token,
    reference,
    stories260k,
)
from sae_steering_plugin.adapters.engine import generate
from sae_steering_plugin.adapters.steering import steer
from sae_steering_plugin.adapters.transformer_lens import resolve
from sae_steering_plugin.edits import Ablate, Add, Clamp, Scale, SparseAdd
from sae_steering_plugin.edits.codes import codes_of
from sae_steering_plugin.types import DECODE, PREFILL, Edit
from tests.oracles import algorithm_2, leftovers

hosts = pytest.mark.parametrize("host", ["bridge", "hooked"])
SAES = ["l2-resid-post-standard", "l2-resid-post-jumprelu", "l2-resid-post-topk"]


@cache
def model_of(data, host):
    return stories260k(data, host)


@cache
def sae_of(data, name):
    return SAE.load_from_disk(str(data / "saes-stories260k" / name), device="cpu")


@pytest.fixture
def model(data, host):
    found = model_of(data, host)
    yield found
    assert leftovers(found) == []


@pytest.fixture(scope="session")
def expected(data):
    return json.loads((data / "stories260k" / "expected.json").read_text())


@hosts
def test_greedy_text_and_probabilities_are_those_measured(model, expected):
    ids = expected["greedy_ids"]
    length = len(expected["prompt_ids"])
    out = generate(model, expected["prompt"], max_new_tokens=len(ids) - length, stop_at_eos=False)
    assert out.tokens[0].tolist() == ids
    with torch.no_grad():
        last = model(torch.tensor([expected["probe_ids"]]))[0, -1].softmax(-1)
    names = model.tokenizer.convert_ids_to_tokens(last.topk(5).indices.tolist())
    for (name, share), found, p in zip(
        expected["top5_next"], names, last.topk(5).values.tolist(), strict=True
    ):
        assert (found, p) == (name, pytest.approx(share, abs=1e-3))


@hosts
def test_word_shares_and_nll_of_the_reference_are_reproduced(model, data, host):
    found = reference(data)
    rows = sae_of(data, SAES[0]).W_dec.detach()
    chosen = arms(found)
    picked = [chosen[0], chosen[5], chosen[13]]  # unsteered, and the best strength of two features
    assert [(a.word, a.coefficient) for a in picked[1:]] == [("friends", 1.446), ("mommy", 1.482)]
    results = measure(model, host, picked, rows, found, seed=3)
    assert not disagreements(results)
    base, steered = results[0], results[1]
    assert steered.low > base.high
    assert 0.1 < steered.displacement < 1.5


@hosts
def test_the_end_of_a_story_is_known_from_the_generation_config(model, data):
    found = reference(data)
    out = generate(
        model,
        [found["prompt"]] * 8,
        max_new_tokens=300,
        temperature=1.0,
        seed=1,
        stop_ids=[1, 2],
    )
    for row, text, ended in zip(out.new_tokens, out.texts, out.ended, strict=True):
        assert 1 not in row.tolist() and 2 not in row.tolist()
        assert ended is (len(row) < 300)
        assert text
    assert any(out.ended)


def test_a_bridge_reads_the_end_tokens_itself(data):
    from sae_steering_plugin.adapters.transformer_lens import stop_tokens

    assert set(stop_tokens(model_of(data, "bridge"))) == {1, 2}


@hosts
@pytest.mark.parametrize("name", SAES)
def test_edits_of_real_codes_are_algorithm_2(model, data, name):
    sae = sae_of(data, name)
    tokens = model.to_tokens("Once upon a time there was a little girl. She", prepend_bos=True)
    site = sae.cfg.metadata.hook_name
    seen = []
    handle = resolve(model, site).point.register_forward_hook(
        lambda m, a, x: seen.append(x.clone())
    )
    with torch.no_grad():
        model(tokens)
        codes = sae.encode(seen[0])
        features = codes[0, 1:].sum(dim=0).topk(3).indices.tolist()
        torch.testing.assert_close(codes_of(sae, features, seen[0]), codes[..., features])
        vector = torch.zeros(sae.cfg.d_sae)
        vector[features] = torch.tensor([1.0, -2.0, 3.0])
        vector[7] = 2.0
        for change, wanted in (
            (SparseAdd(sae, vector), algorithm_2(sae, seen[0], vector)),
            (Ablate(sae, features), _edited(sae, seen[0], features, lambda c: c * 0)),
            (Scale(sae, features, 2.0), _edited(sae, seen[0], features, lambda c: c * 2)),
            (Clamp(sae, features, 4.0), _edited(sae, seen[0], features, lambda c: c * 0 + 4)),
        ):
            with steer(model, change):
                handle.remove()
                point = resolve(model, site).point
                handle = point.register_forward_hook(lambda m, a, x: seen.append(x.clone()))
                model(tokens)
            torch.testing.assert_close(seen[-1][:, 1:], wanted[:, 1:], rtol=1e-4, atol=1e-4)
            assert torch.equal(seen[-1][:, 0], seen[0][:, 0])
    handle.remove()


def _edited(sae, x, features, change):
    codes = sae.encode(x)
    edited = codes.clone()
    edited[..., features] = change(codes[..., features])
    return x + sae.decode(edited) - sae.decode(codes)


@hosts
def test_cached_uncached_and_padded_texts_agree_on_a_real_model(model, data):
    rows = sae_of(data, SAES[0]).W_dec.detach()
    texts = ["Once upon a time", "Tom was very sad because his dog was", "The"]
    for rule in (PREFILL, DECODE):
        edit = Edit(Add(rows[34], 2.0), "blocks.2.hook_resid_post", rule)
        settings = dict(max_new_tokens=12, stop_at_eos=False)
        cached = generate(model, texts, edit, **settings)
        assert cached.texts == generate(model, texts, edit, cached=False, **settings).texts
        alone = tuple(generate(model, t, edit, require=False, **settings).texts[0] for t in texts)
        assert cached.texts == alone
        assert cached.texts != generate(model, texts, **settings).texts


def test_both_hosts_give_the_same_logits_under_an_edit(data):
    tokens = torch.randint(3, 512, (4, 60), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 1
    edit = Edit(Clamp(sae_of(data, SAES[2]), [34, 5], 3.0))
    logits = []
    for host in ("bridge", "hooked"):
        with torch.no_grad(), steer(model_of(data, host), edit):
            logits.append(model_of(data, host)(tokens))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    nats = nats_per_token(model_of(data, "bridge"), tokens, 20)
    assert nats.shape == (4,) and (nats > 1).all()
