from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_steering_plugin.runs.splits import checked_splits, grouped_splits, linked_groups

WORDS = st.lists(st.sampled_from([f"text {i}" for i in range(40)]), min_size=12, max_size=60)


@given(WORDS, st.integers(0, 5))
def test_a_repeated_text_stays_in_one_split(texts, seed):
    if len({*texts}) < 3:
        return
    found = grouped_splits(
        [t.upper() if i % 2 else f" {t} " for i, t in enumerate(texts)], seed=seed
    )
    where = {}
    for text, split in zip(texts, found, strict=True):
        assert where.setdefault(text, split) == split


def test_groups_stay_whole_and_shares_are_met():
    texts = [f"text {i}" for i in range(300)]
    groups = [str(i // 3) for i in range(300)]
    found = grouped_splits(texts, groups, seed=1)
    assert len({(g, s) for g, s in zip(groups, found, strict=True)}) == 100
    assert Counter(found) == {"train": 180, "validation": 60, "test": 60}
    assert found != grouped_splits(texts, groups, seed=2)
    assert found == grouped_splits(texts, groups, seed=1)


def test_a_shared_text_joins_two_groups():
    assert len(set(linked_groups(["a", "b", "B ", "c"], ["x", "x", "y", "y"]))) == 1
    assert len(set(linked_groups(["a", "b", "c", "d"], ["x", "x", "y", "y"]))) == 2


def test_given_splits_may_not_repeat_a_text():
    texts = ["a", "b", "c", " A"]
    assert checked_splits(texts[:3], ["train", "validation", "test"])
    with pytest.raises(ValueError, match=r"text 3 \(test\) repeats text 0 \(train\)"):
        checked_splits(texts, ["train", "validation", "test", "test"])
    with pytest.raises(ValueError, match="each at least once; found"):
        checked_splits(texts, ["train"] * 4)
    with pytest.raises(ValueError, match="splits has 1 entries for 4 texts"):
        checked_splits(texts, ["train"])


def test_impossible_splits_are_refused():
    with pytest.raises(ValueError, match="4 texts make up 1 groups"):
        grouped_splits(list("abcd"), list("xxxx"))
    with pytest.raises(ValueError, match="give three positive ones that sum to 1"):
        grouped_splits(list("abcd"), shares=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="groups has 1 entries for 4 texts"):
        grouped_splits(list("abcd"), ["x"])
