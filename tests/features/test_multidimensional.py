import math

import pytest
import torch

from sae_steering_plugin.features.multidimensional import (
    BINS,
    group_shape,
    mixture,
    neighbour_groups,
    separability,
    spectral_groups,
)

N = 20_000


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(name):
    g = draws()
    noise = torch.randn(N, 2, generator=g, dtype=torch.float64)
    u, side = torch.rand(N, generator=g, dtype=torch.float64), torch.rand(N, generator=g) < 0.5
    if name in ("circle", "seven"):
        angle = 2 * math.pi * (u if name == "circle" else (u * 7).floor() / 7)
        width = 0.05 if name == "circle" else 0.1
        return torch.stack([angle.cos(), angle.sin()], dim=1) + width * noise
    if name == "gaussian":
        return noise
    if name == "product":
        return torch.stack([u * 3, noise[:, 0]], dim=1)
    one = torch.randn(N, generator=g, dtype=torch.float64)
    return torch.stack([one * side, one * ~side], dim=1) + 0.05 * noise


# S of shared/methods/neighbouring_systems d.1 was taken without the correction, (20 - 1)^2 / 2 N =
# 0.009; the draws are others.
@pytest.mark.parametrize(
    ("name", "expected"),
    [("circle", 0.71), ("seven", 0.83), ("gaussian", 0.007), ("product", 0.003)],
)
def test_separability_of_planted_shapes(name, expected):
    assert separability(planted(name)) == pytest.approx(expected - 0.009, abs=0.015)


def test_only_shapes_of_two_dimensions_score():
    shapes = ("circle", "seven", "mixture", "gaussian", "product")
    s = {name: separability(planted(name)) for name in shapes}
    m = {name: mixture(planted(name)[:4000]) for name in shapes}
    score = {name: (1 - m[name]) * s[name] for name in shapes}
    assert min(score["circle"], score["seven"]) > 2 * score["mixture"]
    assert s["mixture"] > 0.2 and m["mixture"] > 0.4  # separability alone lets a mixture pass
    assert max(score["gaussian"], score["product"]) < 0.02


def test_the_mixture_index_is_the_share_near_the_best_line():
    points = planted("mixture")[:200]
    points = (points - points.mean(0)) / (points - points.mean(0)).square().sum(1).mean().sqrt()
    angles = torch.arange(180).double() * math.pi / 180
    lines = torch.stack([angles.cos(), angles.sin()])
    far = (points @ lines)[:, None, :] + torch.linspace(-2.5, 2.5, 201).double()[:, None]
    most = float((far.abs() < 0.1 * far.square().mean(0).sqrt()).double().mean(0).max())
    assert mixture(points) == pytest.approx(most, abs=1 / 200)


def test_neither_index_changes_when_the_plane_is_turned_or_scaled():
    points = planted("seven")[:4000]
    c, s = math.cos(math.pi * 0.3), math.sin(math.pi * 0.3)
    turned = 7 * points @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64) + 3
    # thirty of the hundred turns: the same grid
    assert separability(turned) == pytest.approx(separability(points), abs=1e-3)
    assert mixture(turned) == pytest.approx(mixture(points), abs=1e-3)


def test_few_points_give_no_separability():
    assert math.isnan(separability(planted("circle")[: BINS**2 - 1]))
    # independent coordinates at the fewest points that are taken: the correction holds
    found = [separability(torch.randn(BINS**2, 2, generator=draws(seed))) for seed in range(5)]
    assert max(found) < 0.05


def rows_with_a_circle(d=64):
    g = draws(1)
    frame = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    angles = torch.arange(8) * math.pi / 4
    circle = torch.stack([angles.cos(), angles.sin()], dim=1) @ frame[:2]
    return torch.cat([frame[2:22], circle, frame[22:42]])


def test_the_planted_circle_is_the_one_component():
    rows = rows_with_a_circle()
    assert neighbour_groups(rows) == [tuple(range(20, 28))]
    assert neighbour_groups(rows, least=0.9) == []


def test_spectral_groups_are_the_planted_bundles():
    g = draws(3)
    bundles = torch.randn(5, 16, generator=g).repeat_interleave(4, 0)
    rows = bundles + 0.2 * torch.randn(20, 16, generator=g)
    assert spectral_groups(rows, 5) == [tuple(range(4 * i, 4 * i + 4)) for i in range(5)]
    with pytest.raises(ValueError, match="1 groups cannot be made of 20 rows"):
        spectral_groups(rows, 1)


def test_a_group_is_scored_where_it_acts():
    rows, g = rows_with_a_circle(), draws(2)
    angle = 2 * math.pi * torch.rand(6000, generator=g)
    towards = torch.stack([angle.cos(), angle.sin()], dim=1) @ torch.linalg.pinv(
        rows[20:28] @ torch.linalg.qr(rows[20:28].T).Q[:, :2]
    )
    codes = torch.cat([towards, torch.zeros(1000, 8)])
    found = group_shape(range(20, 28), codes, rows[20:28])
    assert found.points == 6000 and found.latents == tuple(range(20, 28))
    assert found.score > 0.5 and sum(found.variance) == pytest.approx(1)
    alone = group_shape([0, 1], torch.randn(6000, 2, generator=g), rows[:2])
    assert alone.score < 0.02 < found.score
    few = group_shape([0, 1], torch.randn(50, 2, generator=g), rows[:2])
    assert math.isnan(few.score) and few.points == 50
    flat = group_shape([0, 1], torch.randn(6000, 1, generator=g).expand(-1, 2), rows[:2])
    assert math.isnan(flat.score) and len(flat.variance) == 1
