"""Training-time hooks on both hosts: exact values, exact gradients, nothing left behind."""

import warnings
from contextlib import ExitStack

import pytest
import torch

from sae_steering_plugin.adapters.training_hooks import (
    ConceptAblation,
    ConceptGradientEdit,
    PreventativeSteering,
    linear_decoder,
    training_callback,
    training_hooks,
)
from sae_steering_plugin.adapters.transformer_lens import resolve
from sae_steering_plugin.concepts import concept_basis, edited
from sae_steering_plugin.types import Recipe, SteeringVector
from tests.hosts import D_MODEL, SITE, tiny_bridge, tiny_hooked, tiny_sae, tokens_of_length

TOKENS = tokens_of_length(3, 7)


def loss_of(model):
    logits = model(TOKENS)
    return -torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, TOKENS[:, 1:, None]).mean()


def gradients_of(model, hooks=()):
    """Loss, the gradient at the site below any hook, and every parameter's gradient."""
    model.zero_grad()
    seen = []

    def keep(module, inputs, output):  # noqa: ARG001
        output.retain_grad() if output.requires_grad else None
        seen.append(output)

    handle = resolve(model, SITE).point.register_forward_hook(keep)
    try:
        if hooks:
            with training_hooks(model, hooks):
                loss = loss_of(model)
                loss.backward()
        else:
            loss = loss_of(model)
            loss.backward()
    finally:
        handle.remove()
    found = {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }
    return float(loss.detach()), seen[0].grad, found


def at_block(name, block):
    return f"blocks.{block}." in name or f".h.{block}." in name or f"layers.{block}." in name


def test_scale_one_changes_nothing_and_the_value_never_changes(host):
    sae = tiny_sae()
    plain, site, weights = gradients_of(host)
    for scales in ({3: 1.0, 8: 1.0}, {3: 0.0, 8: 2.0}):
        value, _, _ = gradients_of(host, [ConceptGradientEdit(sae, scales)])
        assert value == plain
    _, same, again = gradients_of(host, [ConceptGradientEdit(sae, {3: 1.0, 8: 1.0})])
    assert torch.equal(same, site)
    for name, grad in weights.items():
        assert (grad is None) == (again[name] is None)
        assert grad is None or torch.equal(grad, again[name]), name


def test_the_gradient_below_is_taken_through_the_map_and_above_is_not_touched(host):
    sae = tiny_sae()
    _, site, weights = gradients_of(host)
    scales = {3: 0.0, 8: 2.0, 11: -1.0}
    _, new, changed = gradients_of(host, [ConceptGradientEdit(sae, scales)])
    basis = concept_basis(linear_decoder(sae)[0][list(scales)])
    assert torch.allclose(new, edited(site, basis, list(scales.values())), atol=1e-6)
    # the last position has no next token, and so no gradient
    ratio = (basis.coordinates(new) / basis.coordinates(site))[:, :-1]
    assert torch.allclose(ratio.mean((0, 1)), torch.tensor([0.0, 2.0, -1.0]), atol=1e-3)
    above = [n for n in weights if at_block(n, 1) and weights[n] is not None]
    below = [n for n in weights if at_block(n, 0) and weights[n] is not None]
    assert above and below
    assert all(torch.equal(weights[name], changed[name]) for name in above)
    assert any(not torch.allclose(weights[name], changed[name]) for name in below)


def test_nested_edits_compose_as_the_product_of_their_maps(host):
    sae = tiny_sae()
    _, site, _ = gradients_of(host)
    first, second = {3: 0.0}, {8: 3.0}
    _, new, _ = gradients_of(
        host, [ConceptGradientEdit(sae, first), ConceptGradientEdit(sae, second)]
    )
    rows = linear_decoder(sae)[0]
    # The hook registered last is the first that the gradient meets on its way back.
    expected = edited(site, concept_basis(rows[[8]]), [3.0])
    expected = edited(expected, concept_basis(rows[[3]]), [0.0])
    assert torch.allclose(new, expected, atol=1e-6)


def test_ablation_equals_projecting_out_and_steering_equals_adding(host):
    sae = tiny_sae()
    latents = [3, 8]
    q = concept_basis(linear_decoder(sae)[0][latents]).orthonormal().float()
    vector = SteeringVector(torch.randn(D_MODEL), SITE, Recipe("given"), label="v")

    def by_hand(change):
        handle = resolve(host, SITE).point.register_forward_hook(lambda m, i, o: change(o))
        try:
            with torch.no_grad():
                return host(TOKENS)
        finally:
            handle.remove()

    for hook, change in (
        (ConceptAblation(sae, latents), lambda x: x - (x @ q) @ q.T),
        (PreventativeSteering(vector, 0.5, "raw"), lambda x: x + 0.5 * vector.vector),
    ):
        with training_hooks(host, hook):
            found = host(TOKENS)
        assert torch.allclose(found, by_hand(change), atol=1e-5)


def test_an_evaluation_inside_the_block_warns(host):
    with (
        training_hooks(host, ConceptAblation(tiny_sae(), [3])),
        pytest.warns(UserWarning, match="evaluate outside the block"),
        torch.no_grad(),
    ):
        host(TOKENS)
    with torch.no_grad():
        host(TOKENS)  # the warning went with the block


@pytest.mark.parametrize("reentrant", [False, True])
def test_hooks_act_in_the_recomputation_of_a_checkpointed_pass(reentrant):
    from torch.utils.checkpoint import checkpoint

    model, sae = tiny_hooked(), tiny_sae()
    edit = ConceptGradientEdit(sae, {3: 0.0, 8: 2.0})
    _, _, plain = gradients_of(model)
    _, _, expected = gradients_of(model, [edit])
    model.zero_grad()
    asks = torch.ones(1, requires_grad=True)  # the reentrant form needs an input that asks
    with warnings.catch_warnings(), training_hooks(model, edit) as (live,):
        warnings.simplefilter("ignore")  # its first pass runs without gradients
        checkpoint(lambda one: loss_of(model) * one, asks, use_reentrant=reentrant).backward()
    assert live.fired == 2
    found = {name: p.grad for name, p in model.named_parameters()}
    moved = 0.0
    for name, grad in expected.items():
        if grad is not None:
            assert torch.allclose(found[name], grad, atol=1e-6), name
            moved = max(moved, float((grad - plain[name]).abs().max()))
    assert moved > 1e-3


def test_a_low_rank_adapter_learns_through_the_edit(bridge):
    """peft's matrices below the site get the edited gradient; those above are not touched."""
    pytest.importorskip("peft", reason="peft is not installed: pip install .[lora]")
    from sae_steering_plugin.adapters.peft import low_rank_adapter

    sae = tiny_sae()
    adapter = low_rank_adapter(bridge, rank=2, alpha=4, dropout=0.0)
    with torch.no_grad():
        for one in adapter.parameters():
            one.copy_(0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(3)))

    def learned(*hooks):
        for one in adapter.parameters():
            one.grad = None
        with adapter.applied(learning=True), ExitStack() as stack:
            if hooks:
                stack.enter_context(training_hooks(bridge, hooks))
            loss_of(bridge).backward()
        return [one.grad.clone() for one in adapter.parameters()]

    plain = learned()
    edited_ = learned(ConceptGradientEdit(sae, {j: 0.0 for j in range(8)}))
    layers = [int(name.split(".")[2]) for name in adapter.names for _ in range(2)]
    assert sorted(set(layers)) == [0, 1]
    for layer, before, after in zip(layers, plain, edited_, strict=True):
        assert torch.equal(before, after) == (layer == 1)


def test_only_marked_positions_and_examples_are_edited(host):
    sae = tiny_sae()
    _, site, _ = gradients_of(host)
    basis = concept_basis(linear_decoder(sae)[0][[3]])
    for where in (torch.tensor([[True], [False], [True]]), torch.arange(7).repeat(3, 1) < 4):
        host.zero_grad()
        seen = []
        handle = resolve(host, SITE).point.register_forward_hook(
            lambda m, i, o, seen=seen: (o.retain_grad(), seen.append(o))[1]
        )
        with training_hooks(host, ConceptGradientEdit(sae, {3: 0.0})) as (live,):
            live.where = where
            loss_of(host).backward()
        handle.remove()
        everywhere = where.expand(3, 7)[..., None]
        expected = torch.where(everywhere, edited(site, basis, [0.0]), site)
        assert torch.allclose(seen[0].grad, expected, atol=1e-6)


def test_when_active_edits_only_where_the_latent_fires(bridge):
    sae = tiny_sae("jumprelu")
    hook = ConceptGradientEdit(sae, {3: 0.0}, when_active=True)
    change = hook.prepare(dtype=torch.float32, device=torch.device("cpu"))
    x = torch.randn(2, 5, D_MODEL, requires_grad=True)
    y = change(x, None)
    assert torch.equal(y, x)
    g = torch.randn_like(x)
    y.backward(g)
    fires = sae.encode(x.detach())[..., 3] > 0
    assert 0 < int(fires.sum()) < fires.numel()
    expected = edited(g, concept_basis(linear_decoder(sae)[0][[3]]), [0.0])
    assert torch.allclose(x.grad, torch.where(fires[..., None], expected, g), atol=1e-6)


def test_nothing_is_left_after_the_block_or_an_exception(host):
    sae = tiny_sae()
    point = resolve(host, SITE).point
    before = len(point._forward_hooks)
    with training_hooks(host, ConceptAblation(sae, [3])) as (live,):
        host(TOKENS)
        assert len(point._forward_hooks) == before + 1
    assert live.fired == 1
    with pytest.raises(KeyError, match="inside"), training_hooks(host, ConceptAblation(sae, [3])):
        raise KeyError("inside")
    assert len(point._forward_hooks) == before


def test_what_cannot_act_is_an_error(host):
    sae = tiny_sae()
    edit = ConceptGradientEdit(sae, {3: 0.0})
    with pytest.raises(RuntimeError, match="never fired"), training_hooks(host, edit):
        pass
    with pytest.raises(ValueError, match="no training hook"), training_hooks(host, []):
        pass
    with (
        pytest.raises(RuntimeError, match="leave inference_mode"),
        training_hooks(host, edit),
        torch.inference_mode(),
    ):
        host(TOKENS)
    with training_hooks(host, edit) as (live,):
        host(TOKENS)
        live.where = torch.ones(2, 7, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"where is \(2, 7\) and the activation"):
            host(TOKENS)
    with pytest.raises(ValueError, match="latent 99 is outside 0..31"):
        ConceptGradientEdit(sae, {99: 0.0})
    with pytest.raises(ValueError, match="named twice"):
        ConceptAblation(sae, [3, 3])
    with pytest.raises(ValueError, match="no latent is given"):
        ConceptGradientEdit(sae, {})
    twins = tiny_sae()
    with torch.no_grad():
        twins.W_dec[5] = twins.W_dec[3]
    with pytest.raises(ValueError, match="nearly the rows of others"):
        ConceptGradientEdit(twins, {3: 0.0, 5: 2.0})


def test_an_attached_sae_is_refused(bridge):
    sae = tiny_sae()
    with (
        bridge.saes([sae]),
        pytest.raises(ValueError, match="an SAE is attached"),
        training_hooks(bridge, ConceptAblation(sae, [3])),
    ):
        pass


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_the_linear_decode_is_the_sae_s_own(architecture):
    sae = tiny_sae(architecture)
    with torch.no_grad():
        sae.b_dec.normal_()
        z = sae.encode(torch.randn(6, D_MODEL))
        rows, bias = linear_decoder(sae)
        assert torch.allclose(z @ rows + bias, sae.decode(z), atol=1e-5)


def test_dictionaries_without_a_linear_decode_are_refused():
    with pytest.raises(ValueError, match="normalises activations at run time \\(layer_norm\\)"):
        linear_decoder(tiny_sae(normalize_activations="layer_norm"))
    with pytest.raises(ValueError, match="'temporal' has no linear decode"):
        linear_decoder(tiny_sae("temporal"))


def test_a_trainer_keeps_the_hooks_while_it_trains(tmp_path):
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainingArguments

    bridge = tiny_bridge()
    hook = PreventativeSteering(
        SteeringVector(torch.randn(D_MODEL), SITE, Recipe("given"), label="v"), 0.5, "raw"
    )
    callback = training_callback(bridge, hook)

    class Rows(Dataset):
        def __len__(self):
            return len(TOKENS)

        def __getitem__(self, i):
            return {"input_ids": TOKENS[i], "labels": TOKENS[i]}

    point = resolve(bridge, SITE).point
    before = len(point._forward_hooks)
    trainer = Trainer(
        bridge.original_model,
        TrainingArguments(
            str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
            save_strategy="no", logging_strategy="no",
        ),
        train_dataset=Rows(),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert callback.live[0].fired == 2
    assert len(point._forward_hooks) == before


# What training under the hooks learns ---------------------------------------------------------


def toy(layers, *, seed=0):
    """A HookedTransformer without norms, and a one-row SAE along a token's centred unembedding."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=layers, d_model=32, n_ctx=8, d_head=16, n_heads=2, d_mlp=64, d_vocab=16,
        act_fn="gelu", normalization_type=None, seed=seed, device="cpu",
    )  # fmt: skip
    return HookedSAETransformer(config)


def along_token(model, token, hook_name):
    """Unit vector that raises this token's logit against the mean of all."""
    W_U = model.W_U.detach()
    row = W_U[:, token] - W_U.mean(1)
    vector = SteeringVector(row / row.norm(), hook_name, Recipe("given"), label="token")
    sae = tiny_sae_of(row / row.norm(), hook_name)
    return vector, sae


def tiny_sae_of(row, hook_name):
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name=hook_name, model_name="toy", prepend_bos=False)
    sae = StandardSAE(StandardSAEConfig(d_in=len(row), d_sae=2, metadata=metadata)).eval()
    with torch.no_grad():
        sae.W_dec[0] = row
    return sae


def learn(model, loss_of, parameters, hooks, *, steps):
    model.requires_grad_(False)
    for one in parameters:
        one.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        with ExitStack() as stack:
            if hooks:
                stack.enter_context(training_hooks(model, hooks))
            loss_of(model, step).backward()
        optimizer.step()


STYLE, EQUALS = 15, 14


def test_suppression_holds_where_every_path_passes_the_edit_and_escapes_elsewhere():
    """Check 6 of the method page: sums with a style token behind them, edited at the last residual.

    A frozen unembedding leaves the style unlearned; a trainable one learns it past the edit.
    """
    a, b = (grid.flatten() for grid in torch.meshgrid(*[torch.arange(10)] * 2, indexing="ij"))
    rows = torch.stack([a, b, torch.full_like(a, EQUALS), (a + b) % 10, torch.full_like(a, STYLE)])
    tokens = rows.T.contiguous()

    def losses(model):
        chances = torch.log_softmax(model(tokens[:, :-1]), -1)
        each = -chances.gather(-1, tokens[:, 1:, None])[..., 0]
        return each[:, 2].mean(), each[:, 3].mean()

    found = {}
    for name in ("frozen", "trainable"):
        model = toy(2)
        _, sae = along_token(model, STYLE, "blocks.1.hook_resid_post")
        held = {id(model.unembed.W_U), id(model.unembed.b_U)} if name == "frozen" else set()
        weights = [one for one in model.parameters() if id(one) not in held]
        edit = ConceptGradientEdit(sae, {0: 0.0})
        learn(model, lambda one, step: sum(losses(one)), weights, edit, steps=100)
        with torch.no_grad():
            found[name] = [float(one) for one in losses(model)]
    assert found["frozen"][1] > 2.0
    assert found["trainable"][1] < 0.1
    assert found["frozen"][0] < 2.0  # the wanted task is learned all the same (uniform: 2.77)


def test_a_vector_added_in_training_need_not_be_learned():
    """Check e.3 of the neighbouring systems: p(trait) falls with the strength, the task stays."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 14, (90, 16, 8), generator=generator)
    trait = torch.rand(tokens.shape, generator=generator) < 0.5
    wanted = torch.where(trait, STYLE, (tokens + 1) % 14)
    shares, accuracy = [], []
    for strength in (0.0, 0.5, 1.0):
        model = toy(3)
        vector, _ = along_token(model, STYLE, "blocks.1.hook_resid_post")
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens[0], names_filter=vector.hook_name)
        vector = vector.with_recipe(mean_norm=float(cache[vector.hook_name].norm(dim=-1).mean()))
        hooks = [PreventativeSteering(vector, strength)] if strength else []
        weights = list(model.blocks[0].mlp.parameters()) + list(model.blocks[1].mlp.parameters())

        def loss(one, step):
            chances = torch.log_softmax(one(tokens[step]), -1)
            return -chances.gather(-1, wanted[step][..., None]).mean()

        learn(model, loss, weights, hooks, steps=len(tokens))
        with torch.no_grad():
            logits = model(tokens[0])
        shares.append(float(logits.softmax(-1)[..., STYLE].mean()))
        said = logits[..., :14].argmax(-1)
        accuracy.append(float((said == (tokens[0] + 1) % 14).float().mean()))
    assert shares[0] > 0.3
    assert shares[0] > shares[1] > shares[2]
    assert min(accuracy) > max(accuracy) - 0.02
