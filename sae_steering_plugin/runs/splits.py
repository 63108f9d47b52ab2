"""Train, validation and test splits of labelled texts that keep groups and repeated texts whole."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

SPLITS = ("train", "validation", "test")
SHARES = (0.6, 0.2, 0.2)


def same_text(text: str) -> str:
    """What two texts must share to count as one: their words, without case and spacing."""
    return " ".join(text.casefold().split())


def linked_groups(texts: Sequence[str], groups: Sequence[str] = ()) -> list[int]:
    """A number per text; texts of one group, and equal texts, have one number."""
    if groups and len(groups) != len(texts):
        raise ValueError(f"groups has {len(groups)} entries for {len(texts)} texts")
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, text in enumerate(texts):
        keys = [("text", same_text(text))] + ([("group", groups[i])] if groups else [])
        for key in keys:
            j = root(first.setdefault(key, i))
            parent[max(root(i), j)] = min(root(i), j)
    return [root(i) for i in range(len(texts))]


def grouped_splits(
    texts: Sequence[str],
    groups: Sequence[str] = (),
    *,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> list[str]:
    """The split of every text: groups whole, sizes as near to `shares` as the groups allow.

    Groups are placed in random order, larger ones first, each where most room is left. Raises
    ValueError with fewer groups than splits.
    """
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares are {tuple(shares)}; give three positive ones that sum to 1")
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(linked_groups(texts, groups)):
        members[group].append(i)
    if len(members) < len(SPLITS):
        raise ValueError(
            f"{len(texts)} texts make up {len(members)} groups: train, validation and test need "
            "three"
        )
    order = sorted(members)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: -len(members[group]))
    room = [share * len(texts) for share in shares]
    found = [""] * len(texts)
    for group in order:
        place = max(range(3), key=lambda s: room[s] / shares[s])
        room[place] -= len(members[group])
        for i in members[group]:
            found[i] = SPLITS[place]
    return found


def checked_splits(texts: Sequence[str], splits: Sequence[str]) -> list[str]:
    """Splits that a caller gives. ValueError for unknown words and one text in two of them."""
    if len(splits) != len(texts):
        raise ValueError(f"splits has {len(splits)} entries for {len(texts)} texts")
    unknown = sorted(set(splits) - set(SPLITS))
    if unknown or set(SPLITS) - set(splits):
        raise ValueError(f"splits must be {', '.join(SPLITS)}, each at least once; found {unknown}")
    where: dict[str, int] = {}
    for i, text in enumerate(texts):
        j = where.setdefault(same_text(text), i)
        if splits[i] != splits[j]:
            raise ValueError(
                f"text {i} ({splits[i]}) repeats text {j} ({splits[j]}): a repeated text must "
                f"stay in one split; it begins {text[:60]!r}"
            )
    return list(splits)
