import math

import pytest
import torch

from sae_steering_plugin.effects.manifold import hellinger_distances, off_manifold_ratio


def ring(n, radius=1.0, turn=0.0):
    angle = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n + turn
    return radius * torch.stack([angle.cos(), angle.sin()], dim=1)


def test_the_unit_is_a_held_out_points_own_distance():
    natural, held = ring(100), ring(100, turn=math.pi / 100)
    ratio = off_manifold_ratio(torch.cat([held, natural]), natural, held)
    torch.testing.assert_close(ratio[:100], torch.ones(100).double(), atol=1e-5, rtol=0)
    assert ratio[100:].max() < 1e-3
    centre = off_manifold_ratio(torch.zeros(1, 2).double(), natural, held)
    assert float(centre) == pytest.approx(1 / (2 * math.sin(math.pi / 200)), rel=1e-4)
    with pytest.raises(ValueError, match="held-out points are natural points themselves"):
        off_manifold_ratio(natural, natural, natural)


def test_hellinger_distances_of_known_distributions():
    eye = torch.eye(3)
    assert hellinger_distances(eye, eye).tolist() == [0, 0, 0]
    half = torch.tensor([[0.5, 0.5, 0.0]])
    assert float(hellinger_distances(half, eye)) == pytest.approx(math.sqrt(1 - math.sqrt(0.5)))
    # mass on none of the outcomes is far from all of them
    assert float(hellinger_distances(torch.zeros(1, 3), eye)) == 1
