from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steering_plugin.adapters.activations import (
    EncodedText,
    activations_at,
    bos_policy,
    encode_texts,
    explained_variance,
    letter_token,
    padded,
    read_site,
)
from tests.hosts import (
    CORPUS,
    D_MODEL,
    SITE,
    tiny_bridge,
    tiny_hf,
    tiny_qwen_moe,
    tiny_sae,
    tiny_tokenizer,
)

TEXTS = ("the cat", "the cat sat on the mat", "a dog ran in the park and the cat sat still")


def alone(host, text, hook_name=SITE):
    """Activations of one text by the host's own forward pass and a plain hook."""
    from sae_steering_plugin.adapters.transformer_lens import resolve

    seen = []
    handle = resolve(host, hook_name).point.register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        host(host.to_tokens(text, prepend_bos=True))
    handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_tokens_are_those_of_the_host(host, prepend_bos):
    for text, encoded in zip(
        CORPUS, encode_texts(host, CORPUS, prepend_bos=prepend_bos), strict=True
    ):
        assert list(encoded.tokens) == host.to_tokens(text, prepend_bos=prepend_bos)[0].tolist()
        assert encoded.leading_bos is prepend_bos


def test_a_text_that_begins_with_the_bos_gets_no_second_one(bridge):
    for prepend_bos in (True, False):
        (encoded,) = encode_texts(bridge, ["<bos>the cat"], prepend_bos=prepend_bos)
        assert encoded.tokens.count(1) == 1
        assert encoded.leading_bos


def test_spans_cover_the_text(bridge):
    for text, encoded in zip(CORPUS, encode_texts(bridge, CORPUS, prepend_bos=True), strict=True):
        assert encoded.spans[0] == (0, 0)
        assert "".join(text[a:b] for a, b in encoded.spans) == text


def test_stories_model_agrees_with_its_own_tokenizer(data):
    from sae_steering_plugin.adapters.transformer_lens import load_model

    model = load_model(str(data / "stories260k"))
    text = "Once upon a time, there was a little cat. The answer is (A)"
    (encoded,) = encode_texts(model, [text], prepend_bos=True)
    assert list(encoded.tokens) == model.to_tokens(text, prepend_bos=True)[0].tolist()
    place = letter_token(encoded, text, text.index("A)"))
    assert "A" in model.tokenizer.decode([encoded.tokens[place]])


@pytest.mark.parametrize("text", ["", "<bos>"])
def test_texts_without_a_token_are_refused(bridge, text):
    with pytest.raises(ValueError, match="text 1 is empty"):
        encode_texts(bridge, ["the cat", text], prepend_bos=True)


def test_over_long_texts_are_refused_and_never_cut(host):
    long = "the cat sat " * 40
    with pytest.raises(ValueError, match=r"text 1 has \d+ tokens and the limit is 64"):
        encode_texts(host, ["the", long], prepend_bos=True)
    with pytest.raises(ValueError, match="the limit is 3: shorten it or leave it out"):
        encode_texts(host, ["the cat sat on the mat"], prepend_bos=True, max_tokens=3)


def test_a_missing_tokenizer_or_bos_is_named():
    with pytest.raises(ValueError, match="no tokenizer"):
        encode_texts(SimpleNamespace(tokenizer=None), ["a"], prepend_bos=False)
    bare = SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=None), cfg=SimpleNamespace())
    with pytest.raises(ValueError, match="pass prepend_bos=False"):
        encode_texts(bare, ["a"], prepend_bos=True)


def test_bos_follows_the_caller_then_the_dictionary_then_the_host(bridge):
    sae = tiny_sae()
    assert bos_policy(bridge) is bridge.cfg.default_prepend_bos
    sae.cfg.metadata.prepend_bos = False
    assert bos_policy(bridge, sae) is False
    assert bos_policy(bridge, sae, True) is True
    sae.cfg.metadata.prepend_bos = None
    assert bos_policy(bridge, sae) is bridge.cfg.default_prepend_bos


# --- the answer letter -------------------------------------------------------------------------


def cut_into(text, *pieces):
    """An `EncodedText` of `text` cut into these pieces, behind a BOS."""
    assert "".join(pieces) == text
    spans, start = [(0, 0)], 0
    for piece in pieces:
        spans.append((start, start + len(piece)))
        start += len(piece)
    return EncodedText(tuple(range(len(spans))), tuple(spans), True)


@pytest.mark.parametrize(
    ("pieces", "index"),
    [
        (("Answer", ":", " (", "A", ")"), 4),
        (("Answer", ":", " (A", ")"), 3),
        (("Answer", ":", " (A)"), 3),
        (("Answer", ":", " (", "A)"), 4),
        (("Answer", ": (", "A", ")"), 3),
    ],
    ids=str,
)
def test_letter_is_found_however_the_brackets_are_merged(pieces, index):
    text = "Answer: (A)"
    assert letter_token(cut_into(text, *pieces), text, text.index("A)")) == index


def test_letter_after_a_space_is_found():
    text = "Answer: A"
    assert letter_token(cut_into(text, "Answer", ":", " A"), text, 8) == 3


@pytest.mark.parametrize(
    ("text", "pieces", "offset", "message"),
    [
        ("Answer A", ("Answer A",), 7, "merged into the token 'Answer A'"),
        ("is (AB)", ("is", " (AB", ")"), 4, "merged into the token"),
        ("is (A)", ("is", " (A)"), 3, "is not an answer letter"),
        ("is (A)", ("is", " (A)"), 9, "is not an answer letter"),
        ("is (A)", ("is", " (A)"), -2, "is not an answer letter"),
    ],
)
def test_ambiguous_letters_are_refused(text, pieces, offset, message):
    with pytest.raises(ValueError, match=message):
        letter_token(cut_into(text, *pieces), text, offset)


def test_a_letter_split_over_tokens_or_lost_by_the_tokenizer_is_refused():
    split = EncodedText((1, 2), ((0, 1), (0, 1)), False)  # two bytes of one character
    with pytest.raises(ValueError, match="lies in 2 tokens"):
        letter_token(split, "Ä", 0)
    lost = EncodedText((1,), ((0, 1),), False)
    with pytest.raises(ValueError, match="lies in 0 tokens"):
        letter_token(lost, "xA", 1)
    with pytest.raises(ValueError, match="fast tokenizer"):
        letter_token(EncodedText((1,), None, False), "A", 0)


@pytest.mark.parametrize("folder", ["stories260k", "babyllama361"])
def test_letters_of_the_published_question_sets_are_found_by_real_tokenizers(data, folder):
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(data / folder))
    host = SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=None))
    items = json.loads((data / "caa" / "generate" / "refusal.json").read_text())[:40]
    for item in items:
        for answer in (item["answer_matching_behavior"], item["answer_not_matching_behavior"]):
            text = f"{item['question']}\nAnswer: {answer}"
            (encoded,) = encode_texts(host, [text], prepend_bos=True)
            place = letter_token(encoded, text, len(text) - 2)
            assert tokenizer.decode([encoded.tokens[place]]).strip(" ()") == answer[1]


# --- padding and the forward pass ---------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from(CORPUS), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
    st.booleans(),
)
def test_masks_mark_real_tokens_and_averages_leave_out_the_bos(texts, side, prepend_bos):
    host = SimpleNamespace(tokenizer=tiny_tokenizer(), cfg=SimpleNamespace(n_ctx=64))
    encoded = encode_texts(host, texts, prepend_bos=prepend_bos)
    batch = padded(host, encoded, side=side)
    for row, text in enumerate(encoded):
        assert batch.tokens[row, batch.real[row]].tolist() == list(text.tokens)
        kept = batch.tokens[row, batch.counted[row]].tolist()
        assert kept == list(text.tokens[int(prepend_bos) :])
        assert int(batch.place[row]) == int(batch.real[row].long().argmax())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("hook_name", [SITE, "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"])
def test_padded_batches_give_what_each_text_gives_alone(host, side, hook_name):
    encoded = encode_texts(host, TEXTS, prepend_bos=True)
    batch = padded(host, encoded, side=side)
    found = activations_at(host, hook_name, batch)
    for row, text in enumerate(TEXTS):
        expected = alone(host, text, hook_name)
        assert torch.allclose(found[row, batch.real[row]], expected, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_recurrent_layers_do_not_read_padding(side):
    host = tiny_qwen_moe()
    batch = padded(host, encode_texts(host, TEXTS, prepend_bos=True), side=side)
    for hook_name in ("blocks.2.hook_resid_post", "blocks.3.hook_resid_post"):
        found = activations_at(host, hook_name, batch)
        for row, text in enumerate(TEXTS):
            expected = alone(host, text, hook_name)
            assert torch.allclose(found[row, batch.real[row]], expected, atol=1e-4)


def test_later_layers_are_not_computed_and_nothing_is_left_behind(host):
    from sae_steering_plugin.adapters.transformer_lens import resolve

    batch = padded(host, encode_texts(host, TEXTS, prepend_bos=True))
    before = host(batch.tokens)
    fired = []
    later = resolve(host, "blocks.1.hook_resid_post").point
    handle = later.register_forward_hook(lambda *_: fired.append(1))
    activations_at(host, SITE, batch)
    assert not fired
    handle.remove()
    assert torch.equal(host(batch.tokens), before)
    assert not resolve(host, SITE).point._forward_hooks


def test_an_edit_at_the_site_is_seen(host):
    from sae_steering_plugin.adapters.engine import steer
    from sae_steering_plugin.edits.shift import Add
    from sae_steering_plugin.types import Edit, Positions

    batch = padded(host, encode_texts(host, TEXTS[:1], prepend_bos=True))
    plain = activations_at(host, SITE, batch)
    v = torch.arange(float(D_MODEL))
    with steer(host, [Edit(Add(v), SITE, Positions(bos=True))]):
        steered = activations_at(host, SITE, batch)
    assert torch.allclose(steered, plain + v, atol=1e-5)


def test_unknown_sites_headwise_sites_and_sites_never_reached_are_refused(host):
    batch = padded(host, encode_texts(host, TEXTS, prepend_bos=True))
    with pytest.raises(KeyError, match="no hook point"):
        activations_at(host, "blocks.0.hook_resid_past", batch)
    with pytest.raises(ValueError, match=r"sites of shape \[batch pos d_model\]"):
        activations_at(host, "blocks.0.attn.hook_pattern", batch)


def test_active_dropout_is_refused():
    from sae_lens import SAETransformerBridge

    host = SAETransformerBridge.boot_transformers(
        "tiny-gpt2", hf_model=tiny_hf().train(), tokenizer=tiny_tokenizer(), device="cpu"
    )
    batch = padded(host, encode_texts(host, TEXTS, prepend_bos=True))
    with pytest.raises(ValueError, match=r"dropout is active .* call model.eval\(\)"):
        activations_at(host, SITE, batch)
    host.eval()
    assert activations_at(host, SITE, batch).shape[0] == 3


def test_half_precision_models_give_float32():
    host = tiny_bridge()
    host.to(torch.bfloat16)
    batch = padded(host, encode_texts(host, TEXTS, prepend_bos=True))
    assert activations_at(host, SITE, batch).dtype == torch.float32


def test_a_site_is_a_name_or_the_dictionary_trained_there():
    assert read_site("blocks.1.hook_mlp_out") == ("blocks.1.hook_mlp_out", None)
    sae = tiny_sae()
    assert read_site(sae) == (SITE, sae)
    sae.cfg.metadata.hook_name = None
    with pytest.raises(ValueError, match="does not say where it was trained"):
        read_site(sae)


def test_explained_variance_is_one_for_a_perfect_dictionary_and_zero_for_the_mean():
    from tests.directions.planted import orthonormal_sae

    sae = orthonormal_sae()
    codes = torch.rand(50, D_MODEL, generator=torch.Generator().manual_seed(0)) + 0.1
    x = codes @ sae.W_dec.detach()
    assert explained_variance(sae, x) == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
        sae.W_dec.zero_()
    assert explained_variance(sae, x) == pytest.approx(0.0, abs=1e-5)
