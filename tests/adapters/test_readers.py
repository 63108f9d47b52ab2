"""Reading matrices, with the norm in front, against what the model itself computes from them."""

import pytest
import torch

from sae_steering_plugin.adapters.parameters import slots_of
from sae_steering_plugin.adapters.readers import folded, norm_map, readers_of, side_of
from sae_steering_plugin.concepts import LowRankDelta
from tests.hosts import (
    tiny_bridge,
    tiny_gemma2,
    tiny_hooked,
    tiny_llama,
    tiny_neox,
    tiny_olmo2,
    tiny_qwen3,
    tiny_qwen_moe,
    tokens_of_length,
)

HOSTS = [
    tiny_bridge,
    tiny_neox,
    tiny_llama,
    tiny_qwen3,
    tiny_gemma2,
    tiny_qwen_moe,
    tiny_olmo2,
]


def with_scales(model):
    """The model with norms that scale every dimension differently."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and ("norm" in name or "ln" in name):
            new = torch.rand(parameter.shape, generator=generator) + 0.5
            parameter.data.copy_(new if "bias" not in name else new / 5)
    return model


@pytest.mark.parametrize("made", HOSTS, ids=lambda made: made.__name__)
def test_a_reader_with_its_norm_folded_in_is_what_the_model_computes(made):
    """Differences between tokens, so that the norm's bias drops out: (n_p - n_q) W equals
    (h_p / len_p - h_q / len_q) F."""
    model = with_scales(made())
    seen = {}
    handles = [
        one.module.register_forward_pre_hook(
            lambda module, given, name=name: seen.update({name: given[0].detach()})
        )
        for name, one in readers_of(model).items()
    ]
    middle = "hook_in" if model.cfg.parallel_attn_mlp else "ln2.hook_in"
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens_of_length(1, 6), use_cache=True)
    for handle in handles:
        handle.remove()
    readers = readers_of(model)
    assert set(seen) == set(readers) and len(readers) > 2 * 3
    for name, one in readers.items():
        block, part = name.rpartition(".")[0].rpartition(".")[::2]
        places = {"mlp": f"{block}.{middle}", "unembed": f"blocks.{len(model.blocks) - 1}.hook_out"}
        bare = made is tiny_olmo2 and part != "unembed"
        h = seen[name][0] if bare else cache[places.get(part, f"{block}.hook_in")][0]
        if bare and part == "attn":
            assert torch.equal(h, cache[f"{block}.hook_in"][0])
        if made in (tiny_bridge, tiny_neox):
            h = h - h.mean(-1, keepdim=True)
        if not bare:
            h = h / h.square().mean(-1, keepdim=True).sqrt()
        wanted = (seen[name][0] - seen[name][0, :1]) @ one.matrix
        found = (h - h[:1]) @ one.folded(one.matrix)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
        assert float(wanted.abs().max()) > 0.1


def test_folding_equals_transformer_lens_s_own():
    model = with_scales(tiny_hooked())
    found = {name: one.folded(one.matrix) for name, one in readers_of(model).items()}
    model.process_weights_(center_writing_weights=False, center_unembed=False)
    theirs = readers_of(model)
    assert set(found) == set(theirs) and "blocks.1.attn.W_K" in found
    for name, matrix in found.items():
        torch.testing.assert_close(matrix, theirs[name].matrix, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(matrix, theirs[name].folded(theirs[name].matrix))


@pytest.mark.parametrize("made", [tiny_bridge, tiny_llama, tiny_gemma2], ids=lambda m: m.__name__)
def test_a_bridge_that_folds_by_itself_is_read_the_same(made):
    model = with_scales(made())
    found = {name: one.folded(one.matrix) for name, one in readers_of(model).items()}
    model.enable_compatibility_mode(disable_warnings=True)
    for name, one in readers_of(model).items():
        if name != "unembed.W_U":  # centred over the words besides
            torch.testing.assert_close(one.folded(one.matrix), found[name])


@pytest.mark.parametrize("width", [7, 16])
def test_a_norm_is_read_off_its_outputs(width):
    scale, bias = torch.rand(width) + 0.5, torch.randn(width)
    centring, plain = torch.nn.LayerNorm(width), torch.nn.RMSNorm(width)
    with torch.no_grad():
        centring.weight.copy_(scale)
        centring.bias.copy_(bias)
        plain.weight.copy_(-scale)
    for norm, wanted, centred in ((centring, scale, True), (plain, -scale, False)):
        found, mean_taken = norm_map(norm, width)
        torch.testing.assert_close(found, wanted)
        assert mean_taken is centred


def test_low_rank_factors_fold_as_their_product_does():
    pytest.importorskip("peft", reason="peft is not installed: pip install .[lora]")
    from sae_steering_plugin.adapters.peft import low_rank_adapter, low_rank_deltas

    model = with_scales(tiny_llama())
    target = r"\.(?P<layer>\d+)\.(self_attn\.[qv]_proj|mlp\.(up|down)_proj)"
    adapter = low_rank_adapter(model, rank=2, alpha=4, dropout=0.0, target=target)
    for one in adapter.parameters():
        torch.nn.init.normal_(one, generator=torch.Generator().manual_seed(1))
    factors = low_rank_deltas(adapter)
    dense = {name: one.scale * one.down @ one.up for name, one in factors.items()}
    found, wanted = folded(model, factors), folded(model, dense)
    assert len(found) == 8
    for name, one in found.items():
        assert isinstance(one, LowRankDelta) and one.up is factors[name].up
        torch.testing.assert_close(one.scale * one.down @ one.up, wanted[name])
        left_alone = name.endswith("down_proj")
        assert torch.equal(one.down, factors[name].down) is left_alone
    with adapter.applied(), pytest.raises(KeyError, match=r"no reading matrix 'model\.layers\.0"):
        folded(model, factors)


def test_names_say_which_side_of_the_residual_a_matrix_is_on():
    for name in readers_of(tiny_qwen_moe()):
        assert side_of(name) == "read"
    for made in (tiny_hooked, tiny_bridge, tiny_llama):
        assert all(side_of(name) == "write" for name in slots_of(made()))
    assert side_of("model.layers.3.self_attn.q_proj") == "read"
    assert side_of("transformer.h.0.attn.c_proj") == "write"
    assert side_of("gpt_neox.layers.0.mlp.dense_h_to_4h") == "read"
    assert side_of("layers.0.router") is None
