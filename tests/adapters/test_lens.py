import pytest
import torch

from sae_steering_plugin.adapters.lens import lens_logits, lens_settings
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.adapters.transformer_lens import resolve
from tests.hosts import D_MODEL, tiny_qwen_moe


def rows(n=7):
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(3))


def replaced_residual(model, row):
    """Logits when the last block's output is overwritten with `row`: the lens by another road."""
    tokens = torch.tensor([[1, 5, 9]])
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    point = resolve(model, name).point
    handle = point.register_forward_hook(lambda module, inputs, output: row.expand_as(output))
    try:
        return steered_logits(model, tokens, last_only=True)[0]
    finally:
        handle.remove()


def test_the_lens_is_the_models_own_head(host):
    found = torch.cat(list(lens_logits(host, rows())))
    for row, logits in zip(rows(), found, strict=True):
        assert torch.allclose(replaced_residual(host, row), logits, atol=1e-5)


def test_the_lens_reads_an_rmsnorm_model():
    model = tiny_qwen_moe()
    found = torch.cat(list(lens_logits(model, rows(2))))
    assert torch.allclose(replaced_residual(model, rows(2)[0]), found[0], atol=1e-5)


def test_blocks_change_nothing(host):
    whole = torch.cat(list(lens_logits(host, rows())))
    parts = list(lens_logits(host, rows(), block=2 * int(host.cfg.d_vocab)))
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)


def test_folding_the_norm_keeps_the_lens(bridge):
    before = torch.cat(list(lens_logits(bridge, rows())))
    assert lens_settings(bridge) == {"soft_cap": None, "folded": False}
    bridge.enable_compatibility_mode()
    after = torch.cat(list(lens_logits(bridge, rows())))
    assert lens_settings(bridge)["folded"]
    # centring W_U moves all logits of a row by one constant
    before, after = (x - x.mean(1, keepdim=True) for x in (before, after))
    assert torch.allclose(before, after, atol=1e-4)


def test_a_soft_cap_is_recorded(hooked):
    hooked.cfg.output_logits_soft_cap = 30.0
    assert lens_settings(hooked)["soft_cap"] == 30.0


def test_rows_of_another_width_are_refused(host):
    with pytest.raises(ValueError, match="rows have 3 entries and the residual stream 16"):
        next(lens_logits(host, torch.zeros(2, 3)))
    with pytest.raises(ValueError, match="Linear has no ln_final and unembed"):
        next(lens_logits(torch.nn.Linear(2, 2), torch.zeros(2, 3)))
