"""Finished updates against planted changes: of activations, of weights, of low-rank factors."""

import pytest
import torch

from sae_steering_plugin.adapters.activations import encode_texts, padded
from sae_steering_plugin.adapters.learning import learning_logits
from sae_steering_plugin.adapters.training_hooks import (
    ConceptGradientEdit,
    linear_decoder,
    training_hooks,
)
from sae_steering_plugin.concepts import LowRankDelta
from sae_steering_plugin.runs.learning import gradients, learning_report
from sae_steering_plugin.runs.learning_losses import next_token_loss
from sae_steering_plugin.runs.updates import (
    Leak,
    changed,
    update_report,
    weight_deltas,
    weight_report,
)
from tests.hosts import CORPUS, D_MODEL, SITE, tiny_bridge, tiny_hooked, tiny_sae

TEXTS = list(CORPUS)


def batch_of(model, texts):
    return padded(model, encode_texts(model, texts, prepend_bos=True))


def test_after_one_step_on_the_bias_activations_move_by_the_push():
    """Second exact link: after a step of size eta, dh.d = -eta sum g.d at every position."""
    before, after = tiny_hooked(), tiny_hooked()
    sae = tiny_sae()
    report = learning_report(before, sae, TEXTS, progress=False)
    batch = batch_of(before, TEXTS)
    _, ((_, g),) = gradients(before, [SITE], batch, next_token_loss)
    eta = 0.01
    with torch.no_grad():
        after.blocks[0].mlp.b_out -= eta * g.sum((0, 1))
    update = update_report(before, after, sae, TEXTS)
    unit = torch.nn.functional.normalize(linear_decoder(sae)[0], dim=1)
    expected = -eta * (g.sum((0, 1)) @ unit.T)
    moved = torch.tensor(update.table["moved"].to_numpy()).float()
    assert torch.allclose(moved, expected, atol=1e-5)
    assert update.size == pytest.approx(eta * float(g.sum((0, 1)).norm()), rel=1e-4)
    ranks = torch.corrcoef(torch.stack([moved.double(), report.sums.push]))[0, 1]
    assert float(ranks) > 0.9
    assert "before" in update._repr_html_()
    assert len(update.top(3)) == 3


def test_a_model_compared_with_itself_has_not_changed(bridge):
    update = update_report(bridge, bridge, tiny_sae("topk"), TEXTS)
    assert update.size == 0.0
    assert update.error_before == update.error_after
    assert (update.table["rate_before"] == update.table["rate_after"]).all()
    with pytest.raises(ValueError, match="must tokenise the texts alike"):
        changed(torch.zeros(3, D_MODEL), torch.zeros(4, D_MODEL), tiny_sae())


def test_the_leak_names_what_moves_although_it_was_held():
    """SGD on the bias alone cannot leak; a change elsewhere along the row is seen as one."""
    model, sae = tiny_hooked(), tiny_sae()
    leak = Leak(model, sae, [5], TEXTS)
    batch = batch_of(model, TEXTS)
    model.requires_grad_(False)
    model.blocks[0].mlp.b_out.requires_grad_(True)
    with training_hooks(model, ConceptGradientEdit(sae, {5: 0.0})):
        next_token_loss(learning_logits(model, batch), batch).backward()
    with torch.no_grad():
        model.blocks[0].mlp.b_out -= 0.01 * model.blocks[0].mlp.b_out.grad
    record = leak.measure(1)
    assert record["size"] > 0.01
    assert abs(record["latent 5"]) < 1e-4 * record["size"]
    assert record["share"] < 1e-4
    with torch.no_grad():
        model.blocks[0].mlp.b_out += linear_decoder(sae)[0][5]
    assert leak.measure(2)["share"] > 0.5
    assert leak.table()["step"].tolist() == [1.0, 2.0]


def test_several_sites_and_labels_of_an_update():
    before, after = tiny_hooked(), tiny_hooked(seed=1)
    upper = tiny_sae("topk", seed=1)
    upper.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    lower = tiny_sae()
    both = update_report(before, after, [lower, upper], TEXTS, labels={3: "tides"})
    assert list(both) == [SITE, "blocks.1.hook_resid_post"]
    alone = update_report(before, after, upper, TEXTS)
    assert torch.equal(both["blocks.1.hook_resid_post"].mean_change, alone.mean_change)
    assert both[SITE].table["label"][3] == "tides"
    with pytest.raises(ValueError, match="two SAEs read one site"):
        update_report(before, after, [lower, lower], TEXTS)


@pytest.mark.parametrize("made", [tiny_hooked, tiny_bridge])
def test_a_weight_written_along_one_row_is_found_there(made):
    before, after, sae = made(), made(), tiny_sae()
    rows = torch.nn.functional.normalize(linear_decoder(sae)[0], dim=1)
    mlp = after.blocks[0].mlp
    with torch.no_grad():
        bias = mlp.b_out if made is tiny_hooked else mlp.out._original_component.bias
        bias += 0.5 * rows[5]
    deltas = weight_deltas(before, after)
    changed_names = [name for name, delta in deltas.items() if delta.abs().max() > 0]
    assert changed_names == ["blocks.0.mlp.b_out"]
    report = weight_report(deltas, sae, labels={5: "tides"})
    top = report.top(1).iloc[0]
    assert (top["latent"], top["label"]) == (5, "tides")
    assert top["write"] == pytest.approx(0.5, rel=1e-4)
    assert top["share"] == pytest.approx(1.0, rel=1e-4)
    assert top["times"] == pytest.approx(D_MODEL, rel=1e-4)
    assert report.table("blocks.0.mlp.b_out")["write"][5] == pytest.approx(0.5, rel=1e-4)
    assert float(report.table("blocks.1.mlp.b_out")["share"].abs().max()) == 0.0
    with pytest.raises(KeyError, match="no matrix 'blocks.9'"):
        report.table("blocks.9")


def reader_weights(model):
    """The live parameter of block 1's MLP input, `[d_model, out]`."""
    mlp = model.blocks[1].mlp
    return mlp.W_in if hasattr(mlp, "W_in") else mlp._modules["in"]._original_component.weight


@pytest.mark.parametrize("made", [tiny_hooked, tiny_bridge])
def test_a_matrix_taught_to_read_one_row_names_that_latent(made):
    """The planted rank-one change stands behind a norm that centres and scales."""
    before, after, sae = made(), made(), tiny_sae()
    unit = torch.nn.functional.normalize(linear_decoder(sae)[0], dim=1)[5]
    unit = unit - unit.mean()
    scale = torch.linspace(0.5, 2.0, D_MODEL)
    for model in (before, after):
        norm = model.blocks[1].ln2
        owner = norm if made is tiny_hooked else norm._original_component
        next(owner.parameters()).data.copy_(scale)
    with torch.no_grad():
        weights = reader_weights(after)
        planted = torch.outer(unit, torch.randn(weights.shape[1]))
        weights += planted / scale[:, None]
    deltas = weight_deltas(before, after, side="read")
    assert [n for n, delta in deltas.items() if delta.abs().max() > 1e-6] == ["blocks.1.mlp.W_in"]
    torch.testing.assert_close(deltas["blocks.1.mlp.W_in"], planted, atol=1e-5, rtol=1e-5)
    report = weight_report(deltas, sae, side="read", labels={5: "tides"})
    top = report.top(1).iloc[0]
    assert (top["latent"], top["label"]) == (5, "tides")
    assert top["share"] == pytest.approx(float(unit.square().sum()), rel=1e-4)
    assert top["read"] == pytest.approx(float(planted.norm() * unit.norm()), rel=1e-4)
    assert "changes that read the residual" in report._repr_html_()
    assert float(report.table("blocks.0.attn.W_Q")["share"].abs().max()) == 0.0


def test_each_side_is_told_by_name_and_width():
    square = torch.randn(D_MODEL, D_MODEL)
    given = {
        "layers.0.q_proj": square,
        "layers.0.o_proj": square,
        "layers.0.router": torch.randn(D_MODEL, 3),
        "layers.0.bias": torch.randn(D_MODEL),
        "heads": torch.randn(2, D_MODEL, 8),
    }
    reads = weight_report(given, tiny_sae(), side="read")
    assert reads.names == ("layers.0.q_proj", "layers.0.router", "heads")
    assert reads.left_out == ("layers.0.o_proj", "layers.0.bias")
    writes = weight_report(given, tiny_sae())
    assert writes.names == ("layers.0.o_proj", "layers.0.bias")
    flat = given["heads"].permute(1, 0, 2).reshape(D_MODEL, -1)
    alone = weight_report({"heads": flat}, tiny_sae(), side="read")
    torch.testing.assert_close(reads.sizes[2], alone.sizes[0])
    with pytest.raises(ValueError, match="no change reads 16 numbers per token.*o_proj"):
        weight_report({"o_proj": square}, tiny_sae(), side="read")
    with pytest.raises(ValueError, match="side is 'read' or 'write', not 'both'"):
        weight_report(given, tiny_sae(), side="both")
    with pytest.raises(ValueError, match="side is 'read' or 'write', not 'both'"):
        weight_deltas(tiny_hooked(), tiny_hooked(), side="both")


def test_low_rank_readers_equal_the_dense_change():
    down, up = torch.randn(D_MODEL, 2), torch.randn(2, 24)
    low = weight_report({"q_proj": LowRankDelta(down, up, 0.7)}, tiny_sae(), side="read")
    full = weight_report({"q_proj": 0.7 * down @ up}, tiny_sae(), side="read")
    assert torch.allclose(low.sizes, full.sizes, rtol=1e-5)
    assert torch.allclose(low.squares, full.squares, rtol=1e-5)


@pytest.mark.parametrize("side", ["write", "read"])
def test_times_of_a_random_change_is_one_on_average(side):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, D_MODEL, generator=generator)
    noise = noise if side == "write" else noise.T
    times = weight_report({"noise": noise}, tiny_sae(), side=side).table()["times"]
    assert times.mean() == pytest.approx(1.0, abs=0.03)  # four deviations of a share at this size


def test_a_change_outside_the_site_s_space_is_named():
    given = {"wide": torch.ones(3, 2 * D_MODEL), "fits": torch.ones(3, D_MODEL)}
    report = weight_report(given, tiny_sae())
    assert report.names == ("fits",) and report.left_out == ("wide",)
    assert "left out: wide" in report._repr_html_()
    with pytest.raises(ValueError, match="no change writes 16 numbers per token.*wide"):
        weight_report({"wide": given["wide"]}, tiny_sae())


def test_a_real_adapter_is_read_in_factors_and_equals_the_dense_change(bridge):
    """Check 8 of the method page, on a peft adapter in the model."""
    pytest.importorskip("peft", reason="peft is not installed: pip install .[lora]")
    from sae_steering_plugin.adapters.peft import low_rank_adapter, low_rank_deltas

    adapter = low_rank_adapter(bridge, rank=2, alpha=4, dropout=0.0)
    with torch.no_grad():
        for one in adapter.parameters():
            one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(3)))
    factors = low_rank_deltas(adapter)
    assert set(factors) == set(adapter.names)
    assert all(isinstance(one, LowRankDelta) and one.down.shape[1] == 2 for one in factors.values())
    dense = {
        # peft's own product, in the layout of the layer: a Linear keeps [out, in], a Conv1D not
        one.name: delta.T if isinstance(one.own, torch.nn.Linear) else delta
        for one in adapter.projections
        for delta in [one.layer.get_delta_weight("default").detach()]
    }
    low, full = weight_report(factors, tiny_sae()), weight_report(dense, tiny_sae())
    assert torch.allclose(low.sizes, full.sizes, atol=1e-6)
    assert torch.allclose(low.squares, full.squares, rtol=1e-6)
    with adapter.applied():
        inside = low_rank_deltas(bridge.original_model)
    assert all(torch.equal(inside[name].up, factors[name].up) for name in factors)
    with pytest.raises(ValueError, match="holds no LoRA layer named 'other'"):
        low_rank_deltas(adapter, adapter="other")


def test_the_change_of_a_peft_model_is_read_from_what_the_adapter_writes(bridge):
    """An adapter whose `up` is one decoder row moves activations along it and nowhere else."""
    pytest.importorskip("peft", reason="peft is not installed: pip install .[lora]")
    from sae_steering_plugin.adapters.peft import low_rank_adapter, low_rank_deltas

    sae = tiny_sae()
    unit = torch.nn.functional.normalize(linear_decoder(sae)[0], dim=1)[5]
    adapter = low_rank_adapter(bridge, rank=1, alpha=1, dropout=0.0, layers=(0,))
    down, up = adapter.parameters()
    with torch.no_grad():
        up.copy_(unit[:, None])
        down.fill_(0.1)
    share = weight_report(low_rank_deltas(adapter), sae).table()["share"]
    assert share[5] == pytest.approx(1.0, abs=1e-6)
    base = tiny_bridge()
    with adapter.applied():
        change = update_report(base, bridge, sae, TEXTS).mean_change
    assert float(change.norm()) > 0


def test_weights_of_different_models_are_refused():
    with pytest.raises(ValueError, match="one model has"):
        weight_deltas(tiny_hooked(), tiny_bridge_without_positions())


def tiny_bridge_without_positions():
    from tests.hosts import tiny_llama

    return tiny_llama()


def test_only_the_positions_asked_for_are_compared():
    before, after, sae = tiny_hooked(), tiny_hooked(seed=1), tiny_sae()

    def first(batch):
        marked = torch.zeros_like(batch.real)
        marked[:, 1] = True
        return marked

    found = update_report(before, after, sae, TEXTS, counted=first)
    assert found.n_positions == len(TEXTS)
    batch = batch_of(before, TEXTS)
    from sae_steering_plugin.adapters.activations import activations_at

    gap = [activations_at(one, SITE, batch)[:, 1].mean(0) for one in (after, before)]
    assert torch.allclose(found.mean_change, gap[0] - gap[1], atol=1e-5)
