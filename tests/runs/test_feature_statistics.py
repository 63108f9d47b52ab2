from functools import partial

import numpy as np
import pytest
import torch
from sae_lens.saes.sae import SAEMetadata

from sae_steering_plugin import (
    coactivation,
    feature_statistics,
    gradient_statistics,
    logit_footprint,
)
from sae_steering_plugin.adapters.activations import activations_at, encode_texts, padded
from sae_steering_plugin.adapters.engine import generate
from sae_steering_plugin.adapters.sae_parts import whole_codes
from sae_steering_plugin.adapters.transformer_lens import resolve
from sae_steering_plugin.organisms import list_organisms, load_organism
from sae_steering_plugin.prediction import PREDICTOR_SETS
from sae_steering_plugin.runs import feature_statistics as module
from sae_steering_plugin.runs.feature_statistics import FeatureRecorder, record_statistics
from sae_steering_plugin.runs.subject import open_subject
from tests.adapters.test_active_codes import ARCHITECTURES
from tests.hosts import CORPUS, D_MODEL, SITE, tiny_hooked, tiny_sae, tiny_tokenizer

TEXTS = [*CORPUS, "the cat", "a park and the mat and a dog and a cat"]
ACTIVATION = ("activation", "coactivation")


def keep(seen, module, inputs, output):  # noqa: ARG001
    seen[SITE] = output.detach().clone()


def dense_codes(model, sae, texts, *, bos=True):
    """Codes of every text by itself: unpadded, BOS dropped."""
    out = []
    for text in texts:
        ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([[1, *ids] if bos else ids])
        seen = {}
        with torch.no_grad():
            handle = resolve(model, SITE).point.register_forward_hook(partial(keep, seen))
            model(tokens)
            handle.remove()
        out.append(whole_codes(sae, seen[SITE])[0, int(bos) :].detach().double())
    return out


def quiet(model, sae, data, **options):
    return feature_statistics(model, sae, data, progress=False, **options)


@pytest.mark.parametrize("word,options", ARCHITECTURES, ids=lambda x: str(x))
def test_statistics_of_texts_are_those_of_each_text_alone(bridge, word, options):
    sae = tiny_sae(word, **options)
    found = quiet(bridge, sae, TEXTS, families=("activation",), batch_size=4)
    codes = dense_codes(bridge, sae, TEXTS)
    everything, last = torch.cat(codes), torch.stack([c[-1] for c in codes])
    assert found.settings["n_tokens"] == len(everything)
    assert found.settings["n_final"] == len(TEXTS)
    for form, table in (("token", everything), ("final", last)):
        # activations of a padded batch and of a text alone differ by float32 rounding
        for name, values in {
            "mean": table.mean(0),
            "std": table.std(0, unbiased=False),
            "max": table.amax(0),
        }.items():
            column = found.table[f"{form}_{name}"].to_numpy()
            np.testing.assert_allclose(column, values.numpy(), rtol=2e-4, atol=2e-5)
        rate = (table.abs() > 1e-6).double().mean(0).numpy()
        near = (table.abs() > 0) & (table.abs() < 1e-5)
        sure = ~near.any(0).numpy()
        np.testing.assert_array_equal(found.table[f"{form}_act_freq"].to_numpy()[sure], rate[sure])


def test_both_hosts_and_tokens_or_texts_give_one_table(host):
    sae = tiny_sae("jumprelu")
    texts = quiet(host, sae, TEXTS, families=ACTIVATION)
    ids = [[1, *tiny_tokenizer()(t, add_special_tokens=False)["input_ids"]] for t in TEXTS]
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    given = quiet(host, sae, tokens, real=tokens != 0, families=ACTIVATION)
    assert texts.table.equals(given.table)
    left = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    other = quiet(host, sae, left, real=left != 0, families=ACTIVATION)
    for name in texts.columns:
        np.testing.assert_allclose(other.table[name], texts.table[name], rtol=1e-3, atol=1e-5)


def test_same_call_same_table_and_another_batch_size_to_rounding(bridge):
    sae = tiny_sae("topk")
    one, again = quiet(bridge, sae, TEXTS), quiet(bridge, sae, TEXTS)
    assert one.table.equals(again.table) and one.settings == again.settings
    other = quiet(bridge, sae, TEXTS, batch_size=2)
    for name in one.columns:
        np.testing.assert_allclose(other.table[name], one.table[name], rtol=1e-5, atol=1e-5)


def test_a_stopped_pass_goes_on_and_gives_the_same_table(bridge, tmp_path, monkeypatch):
    sae, file = tiny_sae(), tmp_path / "pass.safetensors"
    whole = quiet(bridge, sae, TEXTS, batch_size=1, top=2)
    seen = []
    read = module.activations_at

    def stops(model, hook_name, batch):
        seen.append(batch)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return read(model, hook_name, batch)

    monkeypatch.setattr(module, "activations_at", stops)
    with pytest.raises(KeyboardInterrupt):
        quiet(bridge, sae, TEXTS, batch_size=1, top=2, file=file, save_every=2)
    resumed = quiet(bridge, sae, TEXTS, batch_size=1, top=2, file=file)
    assert len(seen) == 4 + len(TEXTS) - 2  # two batches were on disk
    third = quiet(bridge, sae, TEXTS, batch_size=1, top=2, file=file)
    assert len(seen) == 4 + len(TEXTS) - 2
    for table in (resumed, third):
        for name in whole.columns:
            np.testing.assert_array_equal(
                np.stack(table.table[name]), np.stack(whole.table[name]), err_msg=name
            )
    with pytest.raises(ValueError, match="belongs to another run"):
        quiet(bridge, sae, TEXTS[:-1], batch_size=1, top=2, file=file)


def test_a_sieved_pass_gives_the_same_table_and_goes_on_as_it_began(bridge, tmp_path, monkeypatch):
    sae, file = tiny_sae("jumprelu"), tmp_path / "pass.safetensors"
    plain, sieved = (quiet(bridge, sae, TEXTS, sieve=sieve) for sieve in (False, True))
    for name in plain.columns:
        np.testing.assert_allclose(sieved.table[name], plain.table[name], rtol=1e-5, atol=1e-6)
    assert (plain.settings["sieve"], sieved.settings["sieve"]) == (False, True)
    quiet(bridge, sae, TEXTS, sieve=True, file=file)
    monkeypatch.setattr(module, "sieving", lambda asked, _: bool(asked))  # a slow machine
    assert quiet(bridge, sae, TEXTS, families=ACTIVATION, file=file).settings["sieve"] is True
    assert quiet(bridge, sae, TEXTS, families=ACTIVATION).settings["sieve"] is False


def test_two_recorders_of_two_halves_merge(bridge):
    sae = tiny_sae()
    halves = []
    for texts in (TEXTS[:3], TEXTS[3:]):
        with record_statistics(bridge, sae) as recorder:
            for text in texts:
                bridge(bridge.to_tokens(text, prepend_bos=True))
        halves.append(recorder)
    both = halves[0].merge(halves[1]).table()
    whole = quiet(bridge, sae, TEXTS, families=ACTIVATION, batch_size=1)
    for name in both.columns:
        np.testing.assert_allclose(both.table[name], whole.table[name], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="do not merge"):
        halves[0].merge(FeatureRecorder.of(tiny_sae(seed=3)))


def test_a_recording_of_generation_sees_every_token_once(host):
    sae = tiny_sae()
    tables = []
    for cached in (True, False):
        with record_statistics(host, sae) as recorder:
            out = generate(host, TEXTS[:2], max_new_tokens=4, cached=cached, seed=0)
        tables.append((recorder, out))
    (recorder, out), (uncached, _) = tables
    prompts = sum(
        len(tiny_tokenizer()(t, add_special_tokens=False)["input_ids"]) for t in TEXTS[:2]
    )
    assert prompts < recorder.tokens.n <= prompts + 2 * 4
    assert recorder.finals.n == 2
    assert uncached.tokens.n >= recorder.tokens.n


def test_nothing_is_steered_and_later_layers_are_not_run(bridge):
    """A model whose later layers raise still gives statistics: no pass goes beyond the site."""

    def refuse(*_):
        raise AssertionError("a pass went beyond the site")

    handle = bridge.blocks[1].register_forward_pre_hook(refuse)
    try:
        quiet(bridge, tiny_sae(), TEXTS)
    finally:
        handle.remove()


def test_statistics_never_write_a_hook(host, monkeypatch):
    """A model in which every edit and every steered column raises still gives all statistics."""

    def refuse(*_arguments, **_named):
        raise AssertionError("something was steered")

    for place in ("steering.steer", "steering.fwd_hooks", "columns.ContextRows.__init__"):
        monkeypatch.setattr(f"sae_steering_plugin.adapters.{place}", refuse)
    points = [p for p in host.modules() if type(p).__name__ == "HookPoint"]
    kept = [dict(point._forward_hooks) for point in points]
    weights = [p.clone() for p in host.parameters()]
    found = quiet(host, tiny_sae(), TEXTS)
    assert set(PREDICTOR_SETS["full_all"]) <= set(found.columns)
    assert gradient_statistics(host, tiny_sae(), torch.ones(2, 3).long(), progress=False)
    assert [dict(point._forward_hooks) for point in points] == kept
    assert all(torch.equal(*pair) for pair in zip(weights, host.parameters(), strict=True))


def test_a_dead_feature_keeps_its_row_and_has_no_shape(bridge):
    sae = tiny_sae()
    with torch.no_grad():
        sae.b_enc[5] = -1e4
    found = quiet(bridge, sae, TEXTS)
    row = found.table.loc[5]
    assert found.settings["dead"] >= 1 and len(found) == 32
    assert row["token_act_freq"] == row["token_mean"] == row["final_max"] == 0
    undefined = ["binary_entropy", "activation_entropy_norm", "kurtosis", "coact_entropy_norm"]
    assert row[undefined].isna().all()
    assert row[["decoder_norm", "direct_logit_l2"]].notna().all()


def test_coactivation_counts_over_evenly_spaced_tokens(bridge):
    sae = tiny_sae()
    some = quiet(bridge, sae, TEXTS, families=("coactivation",), counted_together=20)
    assert some.settings["coactivation_tokens"] == 20
    assert all(name.startswith("coact_") for name in some.columns)


def test_pairs_of_features_are_those_of_the_dense_codes(bridge):
    sae = tiny_sae("topk")
    found = coactivation(bridge, sae, TEXTS, k=3, progress=False)
    z = (torch.cat(dense_codes(bridge, sae, TEXTS)) > 1e-6).double()
    together, own = z.T @ z, z.sum(0)
    together.fill_diagonal_(0)
    assert found.settings["n_tokens"] == len(z)
    alive = (own > 0).numpy()
    degree = (together > 0).double().sum(1).numpy()
    np.testing.assert_array_equal(found.table["coact_degree"][alive], degree[alive])
    jaccard = (together / (own[:, None] + own - together)).nan_to_num(0)
    best = np.stack(found.table["partner_similarity"])[:, 0]
    np.testing.assert_allclose(np.nan_to_num(best), jaccard.amax(1).numpy(), rtol=1e-12)
    assert list(coactivation(bridge, sae, TEXTS, features=[4], progress=False).table.index) == [4]


@pytest.mark.parametrize("name", list_organisms())
def test_the_organisms_tables_are_whole(name):
    organism = load_organism(name)
    texts = ["the agent will search the web and then answer"] * 3
    for sae in (organism.saes["l2-topk-512"], organism.saes["l2-jumprelu-512"]):
        found = quiet(organism.model, sae, texts)
        assert len(found) == 512
        assert found.settings["dead"] < 512
        assert found.table["token_act_freq"].between(0, 1).all()


READS, WRITES = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"


@pytest.mark.parametrize("word", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
def test_a_transcoder_is_read_where_it_reads(word):
    hooked = tiny_hooked()
    sae = tiny_sae(word, apply_b_dec_to_input=False, d_out=D_MODEL)
    sae.cfg.metadata = SAEMetadata(hook_name=READS, hook_name_out=WRITES, prepend_bos=True)
    found = quiet(hooked, sae, TEXTS)
    rows = []
    for text in TEXTS:
        tokens = hooked.to_tokens(text, prepend_bos=True)
        _, cache = hooked.run_with_cache(tokens, names_filter=READS)
        rows.append(sae.encode(cache[READS])[0, 1:].detach())
    z = torch.cat(rows)
    np.testing.assert_allclose(found.table["token_mean"], z.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.table["token_max"], z.amax(0), rtol=1e-4, atol=1e-5)
    logits = (sae.W_dec @ hooked.W_U).detach()
    plain = logit_footprint(hooked, sae, basis="loaded").table["direct_logit_l2"]
    np.testing.assert_allclose(plain, logits.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("kind", ["topk", "standard", "jumprelu"])
def test_a_small_real_model_with_real_saes(kind, data):
    """stories260k: all families are defined for living features; activity is that of `encode`."""
    subject = open_subject(
        str(data / "stories260k"),
        str(data / "saes-stories260k" / f"l2-resid-post-{kind}"),
    )
    model, sae = subject.model, subject.sae
    texts = ["Once upon a time there was a little girl named Lily.", "Tom had a red ball."] * 2
    found = quiet(model, sae, texts)
    bos = bool(found.settings["prepend_bos"])
    z = []
    for text in texts:
        batch = padded(model, encode_texts(model, [text], prepend_bos=bos))
        x = activations_at(model, sae.cfg.metadata.hook_name, batch)
        z.append(whole_codes(sae, x)[batch.counted].detach())
    z = torch.cat(z)
    live = (z > 1e-6).any(0).numpy()
    differ = np.abs(found.table["token_act_freq"] * len(z) - (z > 1e-6).sum(0).numpy())
    near = torch.zeros(z.shape[1])
    if kind == "jumprelu":  # a code within rounding of its threshold may fall on either side
        near = ((z > 0) & (z - sae.threshold < 1e-4)).sum(0)
    assert (differ <= near.numpy() + 1e-6).all()
    columns = list(PREDICTOR_SETS["full_no_magnitude"])
    assert np.isfinite(found.table.loc[live, columns].to_numpy()).mean() > 0.99
    assert found.settings["dead"] == int((~live).sum())


def test_wrong_requests_are_refused(bridge):
    sae = tiny_sae()
    tokens = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="no family 'logits'; choose among activation"):
        quiet(bridge, sae, TEXTS, families=("logits",))
    with pytest.raises(ValueError, match="there are no texts"):
        quiet(bridge, sae, [])
    with pytest.raises(ValueError, match="real goes with tokens"):
        quiet(bridge, sae, TEXTS, real=tokens.bool())
    with pytest.raises(ValueError, match="tokens are taken as given"):
        quiet(bridge, sae, tokens, prepend_bos=True)
    with pytest.raises(ValueError, match=r"integers \[text, pos\]"):
        quiet(bridge, sae, torch.ones(3))
    with pytest.raises(ValueError, match=r"real has shape \(1, 3\)"):
        quiet(bridge, sae, tokens, real=tokens[:1].bool())
    with pytest.raises(ValueError, match="text 0 is empty"):
        quiet(bridge, sae, tokens, real=tokens == 0)
    with pytest.raises(ValueError, match="are at least 1"):
        quiet(bridge, sae, TEXTS, batch_size=0)
    with pytest.raises(ValueError, match="no token was seen"):
        FeatureRecorder.of(sae).table()
    with (
        pytest.raises(RuntimeError, match="nothing was recorded"),
        record_statistics(bridge, sae),
    ):
        pass
