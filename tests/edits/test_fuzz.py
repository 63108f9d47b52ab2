import pytest
import torch

from sae_steering_plugin.adapters.engine import generate
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.adapters.steering import fwd_hooks
from sae_steering_plugin.adapters.transformer_lens import resolve
from sae_steering_plugin.edits import FeatureFires, Gated
from sae_steering_plugin.edits.codes import codes_of
from sae_steering_plugin.edits.fuzz import Fuzz, rmu_direction
from sae_steering_plugin.types import ALL, Edit
from tests.hosts import D_MODEL, SITE, tiny_bridge, tiny_hooked, tiny_sae, tokens_of_length

F32 = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(scope="module", params=[tiny_hooked, tiny_bridge])
def model(request):
    return request.param()


def test_every_token_becomes_the_one_vector_of_the_positive_orthant():
    x = torch.randn(2, 5, D_MODEL)
    fuzzed = x + Fuzz(SITE, D_MODEL, 7.0, seed=3).prepare(**F32)(x)
    wanted = 7 * rmu_direction(D_MODEL, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(fuzzed, wanted.expand_as(x), atol=1e-5, rtol=1e-5)
    assert bool((wanted >= 0).all()) and float(wanted.norm()) == pytest.approx(7)
    other = rmu_direction(D_MODEL, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(wanted / 7, other)


def test_a_length_that_is_none_is_refused():
    for length in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="length is .*; it must be a positive number"):
            Fuzz(SITE, D_MODEL, length)


def gated(sae, features):
    return Gated(Fuzz(SITE, D_MODEL, 20.0), FeatureFires(sae, features, 0.5, per="token"))


def test_behind_a_gate_only_tokens_with_one_of_the_features_are_fuzzed(model):
    sae, ids, features, seen = tiny_sae(), tokens_of_length(2, 6), [3, 8], {}
    site = resolve(model, SITE).name

    def keep(name):
        return lambda x, hook: seen.__setitem__(name, x.clone())

    with model.hooks(fwd_hooks=[(site, keep("before"))]):
        model(ids)
    edit = Edit(gated(sae, features))
    with model.hooks(fwd_hooks=[*fwd_hooks(model, edit), (site, keep("after"))]):
        model(ids)
    fires = codes_of(sae, features, seen["before"]).amax(-1) > 0.5
    fires[ids == 1] = False
    assert fires.any() and not fires.all()
    wanted = 20 * rmu_direction(D_MODEL, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen["after"][~fires], seen["before"][~fires])
    reached = seen["after"][fires]
    torch.testing.assert_close(reached, wanted.expand_as(reached), atol=1e-4, rtol=1e-4)
    assert not torch.equal(steered_logits(model, ids, edit), steered_logits(model, ids))


def test_cached_generation_equals_uncached(model):
    edit, ids = Edit(gated(tiny_sae(), [3, 8]), SITE, ALL), tokens_of_length(2, 5)
    runs = [generate(model, ids, edit, max_new_tokens=6, cached=c).tokens for c in (True, False)]
    assert torch.equal(*runs)
