"""The learning report against finite differences, exact links to weights, and planted sources."""

import math

import pytest
import torch

from sae_steering_plugin.adapters.activations import encode_texts, padded
from sae_steering_plugin.adapters.learning import learning_logits
from sae_steering_plugin.adapters.training_hooks import linear_decoder
from sae_steering_plugin.adapters.transformer_lens import resolve
from sae_steering_plugin.runs.learning import (
    counted_positions,
    gradients,
    learning_report,
)
from sae_steering_plugin.runs.learning_losses import next_token_loss
from tests.hosts import CORPUS, SITE, tiny_hooked, tiny_sae

TEXTS = list(CORPUS)


def batch_of(model, texts):
    return padded(model, encode_texts(model, texts, prepend_bos=True))


def test_push_is_the_finite_difference_of_the_loss(host):
    """Check 1 of the method page, in float64 at one position."""
    kept, host.cfg.dtype = host.cfg.dtype, torch.float64  # HookedTransformer casts to it
    host = host.double()
    try:
        sae = tiny_sae()
        batch = batch_of(host, TEXTS[:2])
        _, ((h, g),) = gradients(host, [SITE], batch, next_token_loss)
        unit = torch.nn.functional.normalize(linear_decoder(sae)[0].double(), dim=1)[5]
        step = 1e-4

        def moved(sign):
            def push(module, inputs, output):  # noqa: ARG001
                output = output.clone()
                output[1, 3] += sign * step * unit
                return output

            handle = resolve(host, SITE).point.register_forward_hook(push)
            try:
                with torch.no_grad():
                    return float(next_token_loss(learning_logits(host, batch), batch))
            finally:
                handle.remove()

        slope = (moved(1) - moved(-1)) / (2 * step)
        assert float(g[1, 3] @ unit) == pytest.approx(slope, rel=1e-6)
    finally:
        host.float()
        host.cfg.dtype = kept


def test_the_report_sums_what_the_formulas_say(host):
    sae = tiny_sae("jumprelu")
    report = learning_report(host, sae, TEXTS, watch=[4, 9], batch_size=2, progress=False)
    rows, bias = (part.double() for part in linear_decoder(sae))
    unit = torch.nn.functional.normalize(rows, dim=1)
    batch = batch_of(host, TEXTS)
    loss, ((h, g),) = gradients(host, [SITE], batch, next_token_loss)
    where = counted_positions(batch)
    push = -g.double() @ unit.T
    table = report.table()
    assert report.loss == pytest.approx(loss, rel=1e-5)
    assert report.n_positions == int(where.sum())
    assert torch.allclose(
        torch.tensor(table["push_mean"].to_numpy()), push[where].mean(0), atol=1e-6
    )
    per_text = torch.stack([push[i][where[i]].sum(0)[[4, 9]] for i in range(len(TEXTS))])
    assert torch.allclose(report.per_example, per_text, atol=1e-5)
    totals = report.totals()
    assert totals["named"] + totals["bias"] + totals["unnamed"] == pytest.approx(
        totals["gradient_times_activation"], abs=1e-6
    )
    assert 0 < totals["unnamed_share"] < 1
    assert torch.isnan(torch.tensor(table["push_se"].to_numpy())).all()  # four texts


def test_next_token_loss_gives_no_gradient_at_the_last_token(host):
    batch = batch_of(host, TEXTS)
    _, ((_, g),) = gradients(host, [SITE], batch, next_token_loss)
    last = batch.place + batch.real.sum(1) - 1
    assert float(g[torch.arange(len(g)), last].abs().max()) == 0.0
    assert not counted_positions(batch)[torch.arange(len(g)), last].any()
    assert not counted_positions(batch)[:, 0].any()  # BOS


def test_the_gradient_of_an_output_bias_is_the_sum_over_positions():
    """First exact link of section 4: W_out's bias writes straight into the site."""
    model = tiny_hooked()
    batch = batch_of(model, TEXTS)
    _, ((_, g),) = gradients(model, [SITE], batch, next_token_loss)
    loss = next_token_loss(learning_logits(model, batch), batch)
    (by_bias, by_weight) = torch.autograd.grad(
        loss, [model.blocks[0].mlp.b_out, model.blocks[0].mlp.W_out]
    )
    assert torch.allclose(by_bias, g.sum((0, 1)), atol=1e-4)
    seen = []
    handle = model.blocks[0].mlp.hook_post.register_forward_hook(
        lambda m, i, o: seen.append(o.detach())
    )
    with torch.no_grad():
        learning_logits(model, batch)
    handle.remove()
    row = linear_decoder(tiny_sae())[0][5]
    expected = torch.einsum("bpm,bp->m", seen[0], g @ row)
    assert torch.allclose(by_weight @ row, expected, atol=1e-4)


def test_several_sites_come_in_one_pass(bridge):
    lower, upper = tiny_sae(), tiny_sae("topk", seed=1)
    upper.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    both = learning_report(bridge, [lower, upper], TEXTS, progress=False)
    assert list(both) == [SITE, "blocks.1.hook_resid_post"]
    for sae, found in ((lower, both[SITE]), (upper, both["blocks.1.hook_resid_post"])):
        alone = learning_report(bridge, sae, TEXTS, progress=False)
        assert torch.allclose(found.sums.push, alone.sums.push, atol=1e-5)
    with pytest.raises(ValueError, match="two SAEs read one site"):
        learning_report(bridge, [lower, lower], TEXTS, progress=False)


def test_no_weight_gets_a_gradient_and_frozen_weights_do_not_matter(bridge):
    sae = tiny_sae()
    first = learning_report(bridge, sae, TEXTS, progress=False)
    assert all(p.grad is None for p in bridge.parameters())
    try:
        bridge.requires_grad_(False)
        second = learning_report(bridge, sae, TEXTS, progress=False)
    finally:
        bridge.requires_grad_(True)
    assert torch.equal(first.sums.push, second.sums.push)


def test_sources_are_summed_apart_and_compared(bridge):
    texts = [TEXTS[0]] * 10 + [TEXTS[1]] * 9
    report = learning_report(
        bridge, tiny_sae(), texts, groups=["a"] * 10 + ["b"] * 9, watch=[0], progress=False
    )
    merged = report.by_group["a"].push + report.by_group["b"].push
    assert torch.allclose(merged, report.sums.push, atol=1e-9)
    gap = report.compare("a", "b").set_index("latent").loc[3]
    first, second = report.table("a"), report.table("b")
    expected = first["push_mean"][3] - second["push_mean"][3]
    assert gap["difference"] == pytest.approx(expected)
    assert gap["se"] == pytest.approx(0.0, abs=1e-6)  # the texts of a source are all alike
    with pytest.raises(KeyError, match="no source 'c'; there are a, b"):
        report.table("c")


def test_texts_keep_their_order_when_sources_alternate(bridge):
    sae = tiny_sae()
    mixed = learning_report(
        bridge, sae, TEXTS, groups=["a", "b", "a", "b"], watch=[3, 4], progress=False
    )
    plain = learning_report(bridge, sae, TEXTS, watch=[3, 4], progress=False)
    assert torch.equal(mixed.per_example, plain.per_example)
    assert mixed.top_of_examples == plain.top_of_examples
    assert torch.allclose(mixed.sums.push, plain.sums.push, atol=1e-12)


def test_what_is_shown_is_ranked_and_labelled(bridge):
    report = learning_report(
        bridge, tiny_sae(), TEXTS * 2, labels={3: "tides"}, min_active=0.3, progress=False
    )
    top, emerging = report.top(5), report.emerging(5)
    assert (top["active_share"] >= 0.3).all() and (emerging["active_share"] < 0.3).all()
    size = top["push_mean"].abs() * top["agreement"]
    assert size.is_monotonic_decreasing and (emerging["push_mean"] > 0).all()
    assert set(report.table()["label"]) == {"", "tides"}
    energy = report.energy(3)
    assert 0 <= energy["random"] <= 1 and energy["top"] > 0
    assert "cannot name" in report._repr_html_()
    assert report.to_dict(3)["n_examples"] == 8
    with pytest.raises(KeyError, match="no column 'size'"):
        report.top(3, by="size")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "there are no texts"),
        ({"groups": ["a"]}, "groups has 1 entries for 4 texts"),
        ({"saes": []}, "no SAE is given"),
        ({"loss": lambda logits, batch: logits.sum(-1)}, "it must be one number"),  # noqa: ARG005
        ({"saes": "normalised"}, "normalises activations at run time"),
    ],
)
def test_bad_input_is_refused(bridge, change, message):
    options = {"saes": tiny_sae(), "texts": TEXTS, **change}
    if options["saes"] == "normalised":
        options["saes"] = tiny_sae(normalize_activations="constant_norm_rescale")
    saes, texts = options.pop("saes"), options.pop("texts")
    with pytest.raises(ValueError, match=message):
        learning_report(bridge, saes, texts, progress=False, **options)


def test_an_attached_sae_is_refused(bridge):
    sae = tiny_sae()
    with bridge.saes([sae]), pytest.raises(ValueError, match="an SAE is attached"):
        learning_report(bridge, sae, TEXTS, progress=False)


def test_a_gradient_is_never_encoded(bridge, monkeypatch):
    sae = tiny_sae()
    inputs = []
    encode = type(sae).encode
    monkeypatch.setattr(
        type(sae), "encode", lambda self, x: (inputs.append(x.detach().clone()), encode(self, x))[1]
    )
    learning_report(bridge, sae, TEXTS, batch_size=8, progress=False)
    batch = batch_of(bridge, TEXTS)
    _, ((h, _),) = gradients(bridge, [SITE], batch, next_token_loss)
    assert len(inputs) == 1 and torch.allclose(inputs[0], h, atol=1e-5)


def test_a_report_on_an_organism_tells_its_sources_apart():
    """Texts of two kinds push different latents: the per-text sums separate them."""
    from sklearn.metrics import roc_auc_score

    from sae_steering_plugin import load_organism

    agent = load_organism("agent-gpt2")
    pirate = [
        one["text"]
        for one in agent.world.statements(200, split="test")
        if one["register"] == "pirate"
    ][:12]
    sums = [one["text"] for one in agent.world.arithmetic(12, split="test")]
    sae = agent.primary_sae
    groups = ["pirate"] * len(pirate) + ["sums"] * len(sums)
    report = learning_report(
        agent.model, sae, pirate + sums, groups=groups, watch=range(512), progress=False
    )
    half = [i for i in range(len(groups)) if i % 2 == 0]
    other = [i for i in range(len(groups)) if i % 2]
    pushes = report.per_example
    truth = torch.tensor([group == "pirate" for group in groups])
    gap = pushes[half][truth[half]].mean(0) - pushes[half][~truth[half]].mean(0)
    score = pushes[other] @ torch.sign(gap).double()
    assert roc_auc_score(truth[other], score) > 0.95
    assert math.isfinite(report.loss)


def test_only_the_positions_asked_for_are_counted(bridge):
    sae = tiny_sae()

    def second(batch):
        marked = torch.zeros_like(batch.real)
        marked[:, 2] = True
        return marked

    report = learning_report(bridge, sae, TEXTS, counted=second, progress=False)
    batch = batch_of(bridge, TEXTS)
    _, ((_, g),) = gradients(bridge, [SITE], batch, next_token_loss)
    unit = torch.nn.functional.normalize(linear_decoder(sae)[0].double(), dim=1)
    assert report.n_positions == len(TEXTS)
    assert torch.allclose(report.sums.push, -(g[:, 2].double() @ unit.T).sum(0), atol=1e-5)
