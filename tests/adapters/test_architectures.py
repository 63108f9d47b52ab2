"""Steering on every family of models that the papers use, each random and tiny on the bridge."""

from functools import cache

import pytest
import torch

from sae_steering_plugin.adapters.engine import generate
from sae_steering_plugin.adapters.steering import steer
from sae_steering_plugin.edits import Add, Clamp, ProjectOut
from sae_steering_plugin.types import ALL, DECODE, LAST, PREFILL, Edit
from tests.hosts import (
    D_MODEL,
    SITE,
    tiny_gemma2,
    tiny_llama,
    tiny_neox,
    tiny_qwen_moe,
    tiny_sae,
    tiny_tokenizer,
)
from tests.oracles import BOS, kept_batch, leftovers, padded_batch, slow_greedy, tapped

FAMILIES = {
    "llama": tiny_llama,
    "gpt_neox": tiny_neox,
    "gemma2": tiny_gemma2,
    "qwen3_5_moe": tiny_qwen_moe,
}
PUSH = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5)) * 4
TEXTS = ["the cat sat", "a dog ran in the park and the cat sat still", "I believe"]
ROWS = [[BOS, *tiny_tokenizer()(t, add_special_tokens=False)["input_ids"]] for t in TEXTS]
STEPS = 5
family = pytest.mark.parametrize("name", FAMILIES)


@cache
def model_of(name):
    return FAMILIES[name]()


@pytest.fixture(autouse=True)
def nothing_is_left(name):
    yield
    assert leftovers(model_of(name)) == []


@family
@pytest.mark.parametrize("rule", [ALL, PREFILL, DECODE, LAST], ids=str)
def test_the_edit_moves_the_wanted_tokens_and_no_other(name, rule):
    model = model_of(name)
    tokens, mask = padded_batch(ROWS, "left")
    with (
        tapped(model) as before,
        steer(model, Edit(Add(PUSH), SITE, rule), require=False),
        tapped(model) as after,
        torch.no_grad(),
    ):
        model(tokens, attention_mask=mask)
    kept = kept_batch(rule, tokens, mask, [len(row) for row in ROWS])
    assert torch.equal(after[0], torch.where(kept[..., None], before[0] + PUSH, before[0]))


@family
@pytest.mark.parametrize("rule", [ALL, PREFILL, DECODE, LAST], ids=str)
def test_cached_equals_uncached_and_a_left_padded_batch_equals_single_rows(name, rule):
    model = model_of(name)
    edits = [Edit(Add(PUSH), SITE, rule)]
    settings = dict(max_new_tokens=STEPS, stop_at_eos=False)
    tokens, mask = padded_batch(ROWS, "left")
    cached = generate(model, tokens, edits, attention_mask=mask, **settings)
    uncached = generate(model, tokens, edits, attention_mask=mask, cached=False, **settings)
    assert torch.equal(cached.tokens, uncached.tokens)
    with uncached_allowed(model):
        alone = [slow_greedy(model, row, STEPS, PUSH, rule) for row in ROWS]
        plain = [slow_greedy(model, row, STEPS) for row in ROWS]
    assert [row.tolist() for row in cached.new_tokens] == alone
    assert alone != plain


class uncached_allowed:
    """The slow oracle runs the bridge without a cache; GatedDeltaNet needs one to be asked for."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        inner = self.model.original_model
        self.handle = inner.register_forward_pre_hook(
            lambda module, arguments, named: (arguments, {**named, "use_cache": True}),
            with_kwargs=True,
        )

    def __exit__(self, *error):
        self.handle.remove()


@family
def test_edits_of_codes_and_of_later_layers_agree_cached_uncached_and_by_the_host(name):
    model, sae = model_of(name), tiny_sae("topk")
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    edits = [Edit(Clamp(sae, [3, 8], 9.0)), Edit(ProjectOut(PUSH), last, DECODE)]
    settings = dict(max_new_tokens=STEPS, stop_at_eos=False)
    tokens, mask = padded_batch(ROWS, "left")
    cached = generate(model, tokens, edits, attention_mask=mask, **settings)
    uncached = generate(model, tokens, edits, attention_mask=mask, cached=False, **settings)
    assert torch.equal(cached.tokens, uncached.tokens)
    with steer(model, edits) as record:
        host = model.hf_generate(
            tokens,
            max_new_tokens=STEPS,
            do_sample=False,
            stop_at_eos=False,
            return_type="tokens",
            attention_mask=mask,
            pad_token_id=0,
        )
    assert torch.equal(host, cached.tokens)
    lengths = [len(row) - 1 for row in ROWS]
    assert sum(record.edits[0].tokens_per_row).tolist() == [n + STEPS - 1 for n in lengths]
    assert sum(record.edits[1].tokens_per_row).tolist() == [STEPS - 1] * 3


@family
def test_zero_strength_is_bit_identical(name):
    model = model_of(name)
    tokens, mask = padded_batch(ROWS, "left")
    with torch.no_grad():
        base = model(tokens, attention_mask=mask)
        edit = Edit(Add(PUSH, torch.tensor([0.0, 1.0, 0.0])), SITE)
        with steer(model, edit):
            steered = model(tokens, attention_mask=mask)
        with steer(model, Edit(Add(PUSH, 0.0), SITE)):
            idle = model(tokens, attention_mask=mask)
    assert torch.equal(idle, base)
    if name != "qwen3_5_moe":  # experts are fed tokens of all rows together
        assert torch.equal(steered[[0, 2]], base[[0, 2]])
    torch.testing.assert_close(steered[[0, 2]], base[[0, 2]], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steered[1], base[1], atol=0.1)


@family
def test_the_same_prompt_at_several_strengths_equals_separate_runs(name):
    model = model_of(name)
    site = "blocks.1.hook_resid_post"
    strengths = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    settings = dict(max_new_tokens=4, stop_at_eos=False)
    tokens = torch.tensor([ROWS[1]])
    for rule in (ALL, PREFILL, DECODE):
        edit = Edit(Add(PUSH, strengths), site, rule)
        together = generate(model, tokens.repeat(4, 1), edit, **settings)
        for i, strength in enumerate(strengths.tolist()):
            single = Edit(Add(PUSH, strength), site, rule)
            alone = generate(model, tokens, single, require=False, **settings)
            assert torch.equal(alone.new_tokens[0], together.new_tokens[i])


@family
def test_bfloat16_is_kept(name):
    model = FAMILIES[name]().to(torch.bfloat16)
    for change in (Add(PUSH), Clamp(tiny_sae("jumprelu"), 3, 5.0)):
        with tapped(model) as seen, torch.no_grad(), steer(model, Edit(change, SITE)):
            assert model(torch.tensor([ROWS[1]])).dtype == torch.bfloat16
        assert seen[0].dtype == torch.bfloat16
