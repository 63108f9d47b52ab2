import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steering_plugin.adapters.engine import generate
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.edits.path import ConceptPath, FollowPath, concept_path, second_derivatives
from sae_steering_plugin.effects.manifold import off_manifold_ratio
from sae_steering_plugin.types import ALL, DECODE, LAST, Edit
from tests.hosts import D_MODEL, SITE, tiny_bridge, tiny_hooked, tokens_of_length
from tests.oracles import unchecked

F32 = {"dtype": torch.float32, "device": torch.device("cpu")}
TURN = 2 * math.pi


def circle(n, turn=0.0):
    angles = torch.arange(n, dtype=torch.float64) * TURN / n + turn
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def planted(n=7, seed=0, shuffled=True, noise=0.0, per_class=3):
    """Activations whose class means lie on a circle in a random plane; labels are shuffled."""
    g = torch.Generator().manual_seed(seed)
    plane = torch.linalg.qr(torch.randn(D_MODEL, 2, generator=g, dtype=torch.float64)).Q
    offset = torch.randn(D_MODEL, generator=g, dtype=torch.float64) * 3
    names = torch.randperm(n, generator=g) if shuffled else torch.arange(n)
    means = 5 * circle(n, 0.3) @ plane.T + offset
    rows = means.repeat_interleave(per_class, 0)
    spread = noise * torch.randn(len(rows), D_MODEL, generator=g, dtype=torch.float64)
    return (rows + spread).float(), names.repeat_interleave(per_class), names.tolist()


def unit_circle_path():
    knots = torch.arange(7, dtype=torch.float64) * TURN / 7
    points = circle(7)
    return ConceptPath(
        torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), knots, points,
        second_derivatives(knots, points, TURN), tuple(range(7)), TURN,
    )  # fmt: skip


def test_a_periodic_spline_through_seven_points_stays_on_the_circle_and_chords_do_not():
    path = unit_circle_path()
    radius = path.at(torch.linspace(0, TURN, 2001)).norm(dim=-1)
    # with m = -c p at every knot the system reads c h^2 (4 + 2 cos h) / 6 = 2 - 2 cos h, and half
    # way between two knots the radius is cos(h / 2) (1 + c h^2 / 8): 0.99795
    h = TURN / 7
    bend = 6 * (2 - 2 * math.cos(h)) / (4 + 2 * math.cos(h))
    middle = math.cos(h / 2) * (1 + bend / 8)
    assert float(radius.min()) == pytest.approx(middle, abs=1e-6)
    assert round(middle, 3) == 0.998 and radius.max() <= 1 + 1e-9
    for steps in (1, 2, 3):
        inner = path.chord(0, steps).at(torch.linspace(0, 1, 2001)).norm(dim=-1).min()
        assert float(inner) == pytest.approx(abs(math.cos(steps * math.pi / 7)), abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(4, 9), seed=st.integers(0, 999), periodic=st.booleans())
def test_the_spline_is_scipys(n, seed, periodic):
    from scipy.interpolate import CubicSpline

    g = torch.Generator().manual_seed(seed)
    knots = (torch.rand(n, generator=g, dtype=torch.float64) + 0.2).cumsum(0)
    points = torch.randn(n, 3, generator=g, dtype=torch.float64)
    period = float(knots[-1] - knots[0]) + 0.7 if periodic else None
    path = ConceptPath(
        torch.zeros(3), torch.eye(3), knots, points, second_derivatives(knots, points, period),
        tuple(range(n)), period,
    )  # fmt: skip
    if periodic:
        end = torch.cat([knots, knots[:1] + period])
        oracle = CubicSpline(end, torch.cat([points, points[:1]]), bc_type="periodic")
    else:
        end, oracle = knots, CubicSpline(knots, points, bc_type="natural")
    t = torch.linspace(float(end[0]), float(end[-1]), 50, dtype=torch.float64)
    torch.testing.assert_close(path.at(t), torch.from_numpy(oracle(t.numpy())))


def test_the_closed_path_meets_itself_with_its_derivatives():
    path, h = unit_circle_path(), 1e-4
    around = torch.tensor([-2 * h, -h, 0.0, h, 2 * h], dtype=torch.float64)
    torch.testing.assert_close(path.at(around), path.at(around + TURN))
    left, right = path.at(around[:3]), path.at(around[2:])
    first = (left[2] - left[1]) / h, (right[1] - right[0]) / h
    second = [(p[0] - 2 * p[1] + p[2]) / h**2 for p in (left, right)]
    torch.testing.assert_close(first[0], first[1], atol=2e-4, rtol=0)
    torch.testing.assert_close(second[0], second[1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_classes_are_put_back_in_circular_order(seed):
    x, labels, names = planted(seed=seed, noise=0.05)
    path = concept_path(x, labels, components=2)
    start = names.index(path.order[0])
    forwards = tuple(names[(start + i) % 7] for i in range(7))
    backwards = tuple(names[(start - i) % 7] for i in range(7))
    assert path.order in (forwards, backwards)


def test_the_path_passes_through_every_class_mean_and_is_the_identity_there():
    x, labels, _ = planted(noise=0.3)
    path = concept_path(x, labels)
    for one in range(7):
        mean = x[labels == one].double().mean(0)
        back = path.at(path.knot_of(one)) @ path.basis + path.mean
        torch.testing.assert_close(back, mean, atol=1e-6, rtol=0)
        change = FollowPath(path, path.knot_of(one)).prepare(**F32)(mean.float()[None, None])
        assert change.abs().max() < 1e-5
        shifted = FollowPath(path, path.knot_of(one), "shift").prepare(**F32)(
            mean.float()[None, None]
        )
        assert shifted.abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["replace", "shift"])
def test_what_lies_outside_the_subspace_stays(mode):
    x, labels, _ = planted(noise=0.3)
    path = concept_path(x, labels, components=3)
    h = torch.randn(2, 4, D_MODEL, generator=torch.Generator().manual_seed(1))
    change = FollowPath(path, 1.0, mode).prepare(**F32)(h)
    outside = torch.eye(D_MODEL) - (path.basis.T @ path.basis).float()
    assert (change @ outside).abs().max() < 1e-5
    assert change.abs().max() > 0.1
    if mode == "replace":
        reached = path.coordinates((h + change).double())
        torch.testing.assert_close(reached, path.at(1.0).expand_as(reached), atol=1e-5, rtol=0)


def test_a_shift_keeps_the_offset_from_the_nearest_knot():
    x, labels, _ = planted(noise=0.3)
    path = concept_path(x, labels, components=2)
    own = torch.tensor([0.02, -0.03], dtype=torch.float64)
    h = ((path.points[2] + own) @ path.basis + path.mean).float()[None, None]
    moved = h + FollowPath(path, float(path.knots[5]), "shift").prepare(**F32)(h)
    torch.testing.assert_close(
        path.coordinates(moved.double())[0, 0], path.points[5] + own, atol=1e-5, rtol=0
    )


def test_waypoints_take_the_shorter_way_and_a_line_has_ends():
    path = unit_circle_path()
    assert path.waypoints(0, 6, 3).tolist() == pytest.approx([0, -TURN / 14, -TURN / 7])
    assert path.waypoints(5, 1, 2).diff().item() == pytest.approx(3 * TURN / 7)
    torch.testing.assert_close(path.at(path.waypoints(0, 6, 2))[1], path.points[6])
    line = concept_path(
        torch.arange(5.0)[:, None] * torch.ones(D_MODEL) + 1, torch.arange(5), periodic=False
    )
    assert line.order in (tuple(range(5)), tuple(range(4, -1, -1))) and line.period is None
    with pytest.raises(ValueError, match="t lies outside the path, which runs from"):
        FollowPath(line, 99.0)


def test_with_three_classes_the_path_is_straight_between_them():
    x, labels, _ = planted(n=3)
    path = concept_path(x, labels)
    ends = path.at(path.knots[:2])
    torch.testing.assert_close(path.at(path.knots[:2].mean()), ends.mean(0))


def test_an_order_that_is_given_spaces_the_knots_evenly():
    x, labels, names = planted()
    path = concept_path(x, labels, order=names)
    assert path.order == tuple(names)
    torch.testing.assert_close(path.knots.diff(), torch.full((6,), TURN / 7).double())


def test_what_makes_no_path_is_refused():
    x, labels, names = planted()
    with pytest.raises(ValueError, match="2 classes make no path: a line needs 2, a circle 3"):
        concept_path(x[labels < 2], labels[labels < 2])
    with pytest.raises(ValueError, match="9 components cannot be had: 7 class means span 2"):
        concept_path(x, labels, components=9)
    with pytest.raises(ValueError, match="order must hold each class once"):
        concept_path(x, labels, order=names[:-1])
    with pytest.raises(ValueError, match="two classes lie at one place of the path"):
        concept_path(torch.cat([x, x[labels == 1]]), torch.cat([labels, torch.full((3,), 9)]))
    ball = torch.randn(100, D_MODEL, generator=torch.Generator().manual_seed(0))
    ball[:, 3:] = 0
    ball = ball / ball.norm(dim=1, keepdim=True)
    with pytest.raises(ValueError, match="they lie on a surface or in another order"):
        concept_path(ball, torch.arange(100))
    path = concept_path(x, labels)
    with pytest.raises(ValueError, match="class 11 is not on this path; it holds"):
        path.knot_of(11)
    refused = pytest.raises(ValueError, match="mode is 'turn'; choose 'replace' or 'shift'")
    with unchecked(), refused:
        FollowPath(path, 0.0, "turn")
    with pytest.raises(ValueError, match="give one t, or one per batch row"):
        FollowPath(path, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="t holds a value that is not finite"):
        FollowPath(path, float("nan"))


@pytest.fixture(scope="module", params=[tiny_hooked, tiny_bridge])
def model(request):
    return request.param()


@pytest.mark.parametrize("mode", ["replace", "shift"])
@pytest.mark.parametrize("positions", [ALL, DECODE, LAST], ids=str)
def test_cached_generation_equals_uncached(model, mode, positions):
    x, labels, _ = planted(noise=0.3)
    edit = Edit(FollowPath(concept_path(x, labels), 2.0, mode), SITE, positions)
    ids = tokens_of_length(2, 5)
    runs = [
        generate(model, ids, edit, max_new_tokens=6, cached=cached).tokens
        for cached in (True, False)
    ]
    assert torch.equal(*runs)


def test_rows_can_stand_at_different_points(model):
    x, labels, _ = planted(noise=0.3)
    path = concept_path(x, labels, hook_name=SITE)
    ids = tokens_of_length(1, 5)
    together = steered_logits(model, ids, FollowPath(path, torch.tensor([0.5, 2.0])), copies=2)
    for row, t in enumerate((0.5, 2.0)):
        alone = steered_logits(model, ids, FollowPath(path, t))
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_between_opposite_classes_the_path_stays_near_the_planted_circle_and_the_chord_leaves_it():
    g = torch.Generator().manual_seed(0)
    angle = torch.rand(600, generator=g) * TURN
    plane = torch.linalg.qr(torch.randn(D_MODEL, 2, generator=g)).Q
    x = 5 * torch.stack([angle.cos(), angle.sin()], dim=1) @ plane.T
    x = x + 0.1 * torch.randn(x.shape, generator=g)
    labels = (angle / TURN * 7).long()
    path = concept_path(x, labels, components=2)
    ratio = {}
    for name, curve, t in (
        ("path", path, path.waypoints(0, 3, 9)),
        ("chord", path.chord(0, 3), torch.linspace(0, 1, 9)),
    ):
        h = x[labels == 0][:1].expand(9, -1)[:, None]
        moved = (h + FollowPath(curve, t).prepare(**F32)(h))[:, 0]
        ratio[name] = off_manifold_ratio(moved, x[:300], x[300:])
    assert ratio["path"].max() < 3 < ratio["chord"].max()
    assert ratio["path"].mean() < 0.5 * ratio["chord"].mean()
