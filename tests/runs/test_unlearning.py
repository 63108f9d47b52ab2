import math

import pytest
import torch

from sae_steering_plugin.adapters.activations import TokenBatch
from sae_steering_plugin.adapters.learning import learning_logits
from sae_steering_plugin.edits import Add
from sae_steering_plugin.runs.unlearning import (
    collect_factors,
    next_token_loss,
    relative_score,
    relearn,
    site_activations,
    train_rmu,
)
from sae_steering_plugin.types import Edit
from tests.hosts import D_MODEL, SITE, tiny_bridge, tiny_hooked


def batch(first, last, *, seed=0, rows=8, length=8):
    """Rows of tokens of one range only: two such sets are two topics."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(first, last, (rows, length), generator=g)
    every = torch.ones(rows, length, dtype=torch.bool)
    none = torch.zeros(rows, dtype=torch.long)
    return TokenBatch(ids, every, none, none.bool())


FORGET, RETAIN = batch(3, 130), batch(140, 310)


@pytest.fixture(params=[tiny_hooked, tiny_bridge])
def model(request):
    return request.param()


def one_matrix(model):
    return next(p for n, p in model.named_parameters() if ".0." in n and "mlp" in n and p.ndim == 2)


def first_block(model):
    return [p for n, p in model.named_parameters() if "blocks.0." in n or ".h.0." in n]


def kl(model, tokens, before):
    with torch.no_grad():
        now = learning_logits(model, tokens).log_softmax(-1)
    return float((before.exp() * (before - now)).sum(-1).mean())


def test_rmu_scrambles_the_forget_set_and_spares_the_other():
    model = tiny_hooked()
    with torch.no_grad():
        logits = [learning_logits(model, one).log_softmax(-1) for one in (FORGET, RETAIN)]
        norm = float(site_activations(model, SITE, RETAIN).norm(dim=1).mean())
    trained = first_block(model)
    u = train_rmu(
        model, SITE, [FORGET], [RETAIN], trained,
        length=6.0, alpha=20.0, steps=50, learning_rate=3e-2,
    )  # fmt: skip
    assert float(u.norm()) == pytest.approx(6 * norm, rel=1e-4)
    with torch.no_grad():
        h = site_activations(model, SITE, FORGET)
    assert float(torch.cosine_similarity(h, u.expand_as(h)).mean()) > 0.9
    assert kl(model, FORGET, logits[0]) > 3 * kl(model, RETAIN, logits[1])


def test_rmu_trains_what_it_is_given_and_nothing_else(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = one_matrix(model)
    train_rmu(model, SITE, [FORGET], [RETAIN], [chosen], steps=2, learning_rate=1e-3)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {id(p) for n, p in model.named_parameters() if n in moved} == {id(chosen)}
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="RMU needs forget batches, retain batches"):
        train_rmu(model, SITE, [], [RETAIN], [chosen])
    unembedding = [list(model.parameters())[-1]]
    with pytest.raises(ValueError, match="does not depend on the parameters to train"):
        train_rmu(model, SITE, [FORGET], [RETAIN], unembedding, steps=1)


def test_relearning_lowers_the_loss_and_puts_the_weights_back(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    edit = Edit(Add(torch.ones(D_MODEL)), SITE)

    def measure():
        with torch.no_grad():
            return float(next_token_loss(model, FORGET, [edit]))

    found = relearn(model, [FORGET], measure, edits=[edit], steps=6, every=3, learning_rate=1e-2)
    assert list(found) == [0, 3, 6] and found[6] < found[3] < found[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="relearning needs a batch"):
        relearn(model, [], measure)


def test_factors_are_those_of_the_layers_own_inputs_and_gradients():
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(4, 3, bias=False)
    x = torch.randn(2, 5, 4, generator=g)
    weight = torch.randn(2, 5, 3, generator=g)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, -1] = False

    def losses():
        yield (layer(x) * weight).sum(), mask

    found = collect_factors({"one": layer}, losses())["one"]
    assert found.tokens == 8
    torch.testing.assert_close(found.A, x[mask].double().T @ x[mask].double() / 8)
    torch.testing.assert_close(found.G, weight[mask].double().T @ weight[mask].double() / 8)
    assert not layer._forward_hooks
    with pytest.raises(ValueError, match="no loss was given"):
        collect_factors({"one": layer}, iter(()))
    other = torch.nn.Linear(4, 3)
    with pytest.raises(RuntimeError, match="no gradient reached layer 'other'"):
        collect_factors({"other": other}, losses())


def test_a_relative_score_is_one_before_and_zero_at_chance():
    assert relative_score(0.5, 0.9, 0.1) == pytest.approx(0.5)
    assert relative_score(0.1, 0.9, 0.1) == 0 and math.isnan(relative_score(0.3, 0.1, 0.1))
