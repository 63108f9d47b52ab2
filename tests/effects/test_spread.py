import math

import pytest
import torch

from sae_steering_plugin.effects.spread import (
    own_continuation,
    per_effect,
    spread,
    spread_columns,
)


def figures(change, own=-1, **options):
    found = spread(torch.tensor([change]), torch.tensor([own]), **options)[0].tolist()
    return dict(zip(spread_columns(**options), found, strict=True))


def test_counts_are_of_changes_beyond_each_tau_in_either_direction():
    found = figures([0.06, -0.06, 0.05, 0.02, 0.2])
    assert (found["count_0.05"], found["count_0.01"], found["count_0.1"]) == (3, 5, 1)


def test_its_own_continuation_is_left_out_only_where_it_moved():
    change = [0.5, 0.0, 0.5]
    assert figures(change, own=0)["count_ex_self"] == 1
    assert figures(change, own=1)["count_ex_self"] == 2
    assert figures(change, own=-1)["count_ex_self"] == 2


def test_norms_are_torchs():
    change = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    found = spread(change, torch.full((4,), -1))
    names = spread_columns()
    for order, name in ((1, "moved_l1"), (2, "moved_l2"), (math.inf, "moved_linf")):
        column = found[:, names.index(name)].float()
        torch.testing.assert_close(column, change.norm(p=order, dim=1))


def test_the_effective_number_is_that_of_equal_movers():
    assert figures([0.3] * 5 + [0.0] * 7)["effective_moved"] == pytest.approx(5)
    assert figures([0.0, 0.7])["effective_moved"] == pytest.approx(1)
    assert figures([0.0, 0.0])["effective_moved"] == 0


def test_per_effect_survives_an_effect_of_zero():
    assert per_effect(3.0, 2.0) == pytest.approx(1.5)
    assert math.isfinite(per_effect(3.0, 0.0))


def test_the_own_continuation_is_the_most_aligned_row_whatever_its_sign_or_length():
    rows = torch.tensor([[0.1, 0.0], [0.0, -9.0], [0.0, 0.0]])
    asked = torch.tensor([[2.0, 0.1], [0.1, 2.0]])
    assert own_continuation(asked, rows).tolist() == [0, 1]


def test_other_spaces_and_thresholds_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        own_continuation(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="none below 0"):
        spread(torch.zeros(1, 2), torch.tensor([-1]), taus=(-1.0,))
