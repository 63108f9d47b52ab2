"""Rank-one edits and vectors of low-rank updates, on tiny hosts."""

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from sae_steering_plugin.adapters.peft import low_rank_adapter, low_rank_deltas
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.adapters.weights import EVERYWHERE, NotConvertible, to_bias_edit
from sae_steering_plugin.concepts import LowRankDelta
from sae_steering_plugin.edits import Add
from sae_steering_plugin.runs.export import export_checkpoint
from sae_steering_plugin.runs.weights import inputs_of, lora_vector, matrix_of, rank_one_edit
from sae_steering_plugin.types import Edit
from tests.hosts import (
    CORPUS,
    D_MODEL,
    tiny_bridge,
    tiny_gemma2,
    tiny_hooked_like,
    tiny_llama,
    tiny_qwen3,
    tiny_qwen_moe,
    tokens_of_length,
)

HOSTS = {
    "gpt2": tiny_bridge,
    "llama": tiny_llama,
    "qwen3": tiny_qwen3,
    "gemma2": tiny_gemma2,
    "hooked": tiny_hooked_like,
    "moe": tiny_qwen_moe,
}
PUSH = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5))
TEXTS = [*CORPUS, "the dog sat", "a cat ran in the park"]


@cache
def model_of(name):
    return HOSTS[name]()


def at(site):
    return Edit(Add(PUSH), site, EVERYWHERE)


@pytest.mark.parametrize(
    "name, site, matrix",
    [
        ("qwen3", "blocks.0.hook_resid_post", "blocks.0.mlp.W_out"),
        ("llama", "blocks.1.hook_attn_out", "blocks.1.attn.W_O"),
        ("gpt2", "blocks.0.hook_mlp_out", "blocks.0.mlp.W_out"),
        ("hooked", "blocks.1.hook_attn_out", "blocks.1.attn.W_O"),
    ],
)
def test_a_rank_one_edit_adds_the_vector_on_average_and_its_factors_are_reported(
    name, site, matrix
):
    model = model_of(name)
    found = rank_one_edit(model, at(site), TEXTS)
    assert found.weights.names == (matrix,)
    slot = matrix_of(model, matrix)
    delta = found.weights.deltas[0][1].reshape(-1, D_MODEL)
    fit, held = (inputs_of(model, slot, TEXTS[i::2], None, 16) for i in (0, 1))
    torch.testing.assert_close((fit @ delta).mean(0), PUSH, atol=1e-4, rtol=1e-4)
    (told,) = found.residuals
    errors = (held @ delta - PUSH).norm(dim=1) / PUSH.norm()
    assert told.error == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-3)
    assert told.low <= told.mean <= told.high
    assert (told.n_fit, told.n_held) == (len(fit), len(held))


def test_a_rank_one_edit_acts_on_the_model_as_its_matrix_says():
    model, tokens = model_of("qwen3"), tokens_of_length(1, 9)
    found = rank_one_edit(model, at("blocks.1.hook_resid_post"), TEXTS)
    with found.weights:
        edited = steered_logits(model, tokens)
    slot = matrix_of(model, "blocks.1.mlp.W_out")
    module = slot.module
    step = slot.to_host(found.weights.deltas[0][1])
    handle = module.register_forward_hook(
        lambda module, arguments, output: output + arguments[0] @ step.T
    )
    wanted = steered_logits(model, tokens)
    handle.remove()
    torch.testing.assert_close(edited, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(edited, steered_logits(model, tokens), atol=1e-2)


def test_a_rank_one_edit_is_saved_where_no_bias_exists(tmp_path):
    model, site = model_of("qwen3"), "blocks.1.hook_resid_post"
    with pytest.raises(NotConvertible, match="down_proj has no bias"):
        export_checkpoint(model, at(site), tmp_path / "bias")
    weights = rank_one_edit(model, at(site), TEXTS).weights
    saved = AutoModelForCausalLM.from_pretrained(
        export_checkpoint(model, weights, tmp_path / "rank one")
    )
    tokens = tokens_of_length(1, 9)
    with weights, torch.no_grad():
        torch.testing.assert_close(
            saved(tokens).logits, steered_logits(model, tokens), atol=1e-5, rtol=1e-5
        )


def test_a_constant_update_is_its_vector_and_nothing_is_left():
    model, matrix = model_of("llama"), "blocks.0.mlp.W_out"
    inputs = inputs_of(model, matrix_of(model, matrix), TEXTS[:1], None, 16)
    reads = torch.linalg.lstsq(inputs, torch.ones(len(inputs), 1)).solution  # tokens < d_mlp
    found = lora_vector(model, matrix, LowRankDelta(reads, PUSH[None]), [TEXTS[0], TEXTS[0]])
    torch.testing.assert_close(found.vector.vector, PUSH, atol=1e-4, rtol=1e-4)
    assert found.left < 1e-8


def test_an_update_with_no_mean_leaves_everything():
    model, matrix = model_of("llama"), "blocks.0.mlp.W_out"
    fit = inputs_of(model, matrix_of(model, matrix), TEXTS[::2], None, 16)
    reads = torch.randn(fit.shape[1], 1, generator=torch.Generator().manual_seed(2))
    mean = fit.mean(0)
    reads -= (mean @ reads) / (mean @ mean) * mean[:, None]
    found = lora_vector(model, matrix, LowRankDelta(reads, PUSH[None]), TEXTS)
    assert found.left == pytest.approx(1, abs=1e-4)
    assert found.vector.norm < 1e-4


def test_the_vector_of_a_trained_adapter_is_the_mean_of_what_it_adds():
    model = tiny_bridge()
    adapter = low_rank_adapter(model, rank=2, alpha=4, dropout=0.0, layers=[1])
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    ((name, delta),) = low_rank_deltas(adapter).items()
    found = lora_vector(model, name, delta, TEXTS)
    assert found.vector.hook_name == "blocks.1.hook_attn_out"
    product = delta.scale * delta.down @ delta.up
    by_matrix = lora_vector(model, "blocks.1.attn.W_O", product.reshape(2, 8, D_MODEL), TEXTS)
    torch.testing.assert_close(found.vector.vector, by_matrix.vector.vector, atol=1e-4, rtol=1e-4)
    assert found.left == pytest.approx(by_matrix.left, rel=1e-3)
    assert found.left > 0 and found.variance >= 1 - 1e-6
    assert to_bias_edit(model, found.vector).names == ("blocks.1.attn.b_O",)


def test_the_site_of_an_update_lies_in_front_of_an_output_norm():
    delta = LowRankDelta(torch.ones(32, 1), PUSH[None])
    found = lora_vector(model_of("gemma2"), "blocks.1.mlp.W_out", delta, TEXTS)
    assert found.vector.hook_name == "blocks.1.mlp.hook_out"


def test_places_and_texts_that_cannot_be_used_are_refused():
    model, delta = model_of("gpt2"), LowRankDelta(torch.ones(32, 1), PUSH[None])
    with pytest.raises(NotConvertible, match="table of embeddings"):
        rank_one_edit(model, at("blocks.0.hook_resid_pre"), TEXTS)
    with pytest.raises(NotConvertible, match="is no hook point"):
        rank_one_edit(model_of("moe"), at("blocks.0.linear_attn.hook_out"), TEXTS)
    with pytest.raises(ValueError, match="at least two texts"):
        rank_one_edit(model, at("blocks.0.hook_mlp_out"), TEXTS[:1])
    with pytest.raises(KeyError, match=r"no output matrix.*blocks\.0\.attn\.W_O"):
        lora_vector(model, "blocks.0.mlp.W_in", delta, TEXTS)
    with pytest.raises(ValueError, match=r"shape \(32, 16\).*\(16, 16\)"):
        lora_vector(model, "blocks.0.attn.W_O", delta, TEXTS)
