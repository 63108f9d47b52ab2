"""A contrast in parts: no group shared, nothing lost."""

import pytest

from sae_steering_plugin.runs.contrast_split import first_pairs, split_contrast
from sae_steering_plugin.types import Contrast


@pytest.mark.parametrize("paired", [True, False])
def test_a_split_shares_no_group_and_loses_no_pair(paired):
    n = 30
    groups = tuple(f"g{i % 10}" for i in range(n if paired else 2 * n))
    contrast = Contrast(
        tuple(f"p{i}" for i in range(n)),
        tuple(f"n{i}" for i in range(n)),
        groups,
        letters=(tuple(range(n)), tuple(range(n))),
        paired=paired,
    )
    parts = split_contrast(contrast, seed=1)
    seen = [set(part.groups) for part in parts.values()]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert sorted(t for part in parts.values() for t in part.positive) == sorted(contrast.positive)
    for part in parts.values():
        assert [f"p{at}" for at in part.letters[0]] == list(part.positive)
        if paired:
            assert [t[1:] for t in part.positive] == [t[1:] for t in part.negative]
    assert len(parts["train"].positive) > len(parts["test"].positive)
    assert parts == split_contrast(contrast, seed=1)


def test_a_split_needs_three_groups():
    contrast = Contrast(("a", "b"), ("c", "d"), name="two")
    with pytest.raises(ValueError, match="'two' has 2 groups; a split in three needs three"):
        split_contrast(contrast, seed=0)


def test_first_pairs_keep_groups_and_letters():
    contrast = Contrast(("a", "b"), ("c", "d"), ("g", "h"), letters=((0, 0), (0, 0)))
    assert first_pairs(contrast, 1) == Contrast(("a",), ("c",), ("g",), letters=((0,), (0,)))
    assert first_pairs(contrast, 9) == contrast
