"""LoRA under the bridge: places, identity while new, and what is left behind."""

import sys

import pytest
import torch

from sae_steering_plugin.adapters.activations import encode_texts, padded
from sae_steering_plugin.adapters.learning import fixed_weights, learning_logits
from sae_steering_plugin.adapters.peft import low_rank_adapter
from sae_steering_plugin.adapters.sharing import steered_logits
from tests.hosts import tiny_bridge, tiny_hooked, tiny_llama, tiny_neox, tiny_qwen_moe

OPTIONS = dict(rank=2, alpha=8, dropout=0.0)


def batch_of(model):
    return padded(model, encode_texts(model, ["a dog ran", "the cat sat on"], prepend_bos=True))


def new(model, **options):
    pytest.importorskip("peft", reason="peft is not installed: pip install .[lora]")
    return low_rank_adapter(model, **(OPTIONS | options))


@pytest.mark.parametrize("made", [tiny_bridge, tiny_llama, tiny_neox, tiny_qwen_moe])
def test_every_block_has_a_place_and_a_new_adapter_changes_nothing(made):
    model = made()
    batch = batch_of(model)
    modules = list(model.modules())
    plain = learning_logits(model, batch)
    adapter = new(model)
    assert len(adapter.names) == model.cfg.n_layers
    with adapter.applied():
        assert torch.equal(learning_logits(model, batch), plain)
    with torch.no_grad():
        for one in adapter.parameters():
            one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(2)))
    with adapter.applied():
        assert not torch.allclose(learning_logits(model, batch), plain, atol=1e-3)
    assert torch.equal(learning_logits(model, batch), plain)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert not hasattr(model.original_model, "peft_config")


def test_two_adapters_of_one_model_do_not_meet(bridge):
    batch = batch_of(bridge)
    first, second = new(bridge), new(bridge, seed=1)
    with torch.no_grad():
        for one in first.parameters():
            one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(2)))
    plain = learning_logits(bridge, batch)
    with second.applied():
        assert torch.equal(learning_logits(bridge, batch), plain)
    with pytest.raises(RuntimeError, match="holds an adapter already"):  # noqa: SIM117
        with first.applied(), second.applied():
            pass
    assert torch.equal(learning_logits(bridge, batch), plain)


def test_layers_are_chosen_and_a_missing_one_is_named(bridge):
    assert new(bridge, layers=(1,)).names == ("transformer.h.1.attn.o",)
    with pytest.raises(ValueError, match="in layer 7"):
        new(bridge, layers=(1, 7))


def test_a_host_without_modules_and_a_missing_library_say_what_to_do(monkeypatch):
    with pytest.raises(TypeError, match="load the model with load_model"):
        low_rank_adapter(tiny_hooked(), **OPTIONS)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"sae-steering-plugin\[lora\]"):
        low_rank_adapter(tiny_bridge(), **OPTIONS)


def test_logits_to_learn_through_are_the_models_own(host):
    batch = batch_of(host)
    mask = batch.real.long()
    own = steered_logits(host, batch.tokens, attention_mask=mask)
    with fixed_weights(host):
        assert not any(one.requires_grad for one in host.parameters())
        learned = learning_logits(host, batch)
    assert torch.equal(learned[batch.real], own[batch.real])
    assert all(one.requires_grad for one in host.parameters())
