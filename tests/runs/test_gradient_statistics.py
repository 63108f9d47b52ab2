import numpy as np
import pytest
import torch

from sae_steering_plugin import gradient_statistics
from sae_steering_plugin.adapters.sae_parts import decoder_rows
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.edits import Add
from sae_steering_plugin.organisms import list_organisms, load_organism
from sae_steering_plugin.runs.side_effects import measure_side_effects
from sae_steering_plugin.types import LAST, Edit
from tests.hosts import SITE, tiny_sae, tokens_of_length


def test_first_order_effects_are_those_of_small_steps(host):
    tokens, sae = tokens_of_length(64, 6), tiny_sae()
    found = gradient_statistics(host, sae, tokens, sketches=300, progress=False).table
    measured = measure_side_effects(
        host, sae, None, tokens, strengths=(0.01,), contexts="shared", progress=False
    )
    small = measured.of().table
    # 300 sketches leave (2 / 300)^.5 / 2 on a length and 300^-.5 on a cosine; three times that
    ratio = found["tangent_effect"] / (small["effect"] / 0.01)
    assert (ratio - 1).abs().max() < 0.123
    for name in ("stability_abs", "stability_signed"):
        assert (found[f"tangent_{name}"] - small[name]).abs().max() < 0.174, name


def test_curvature_is_twice_the_divergence_of_a_small_step(host):
    tokens, sae = tokens_of_length(16, 6), tiny_sae()
    found = gradient_statistics(host, sae, tokens, draws=400, progress=False).table
    step = 0.05
    for feature in (0, 9):
        edit = Edit(Add(decoder_rows(sae, [feature])[0] * step), SITE, positions=LAST)
        before, after = (
            steered_logits(host, tokens, e, last_only=True).double().log_softmax(-1)
            for e in ((), edit)
        )
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        assert found["fisher_curvature"][feature] == pytest.approx(2 * kl / step**2, rel=0.15)


def test_nothing_is_written_and_the_seed_decides(host):
    tokens, sae = tokens_of_length(8, 6), tiny_sae()
    before = steered_logits(host, tokens)
    one, again = (gradient_statistics(host, sae, tokens, progress=False) for _ in range(2))
    assert one.table.equals(again.table)
    other = gradient_statistics(host, sae, tokens, batch_size=3, seed=0, progress=False)
    np.testing.assert_allclose(
        other.table["tangent_effect"], one.table["tangent_effect"], rtol=1e-4
    )
    assert torch.equal(steered_logits(host, tokens), before)
    assert not any(p.grad is not None for p in host.parameters())
    with pytest.raises(ValueError, match="1 contexts, 16 sketches, 4 draws"):
        gradient_statistics(host, sae, tokens[:1])


@pytest.mark.parametrize("name", list_organisms())
def test_the_organisms_rows_have_gradients(name):
    organism = load_organism(name, saes=("l2-topk-512",))
    tokens = torch.randint(5, 100, (4, 8), generator=torch.Generator().manual_seed(0))
    found = gradient_statistics(
        organism.model, organism.saes["l2-topk-512"], tokens, progress=False
    )
    assert len(found) == 512 and (found.table["tangent_effect"] > 0).all()
    assert found.table["tangent_stability_abs"].between(0, 1.0001).all()
