from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pytest

from sae_steering_plugin.effects import cohens_d, compare


@dataclass
class Items:
    rows: dict[str, Any]
    says: dict[str, Any] = field(default_factory=lambda: {"method": "probe"})

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)

    def details(self) -> dict[str, Any]:
        return self.says


def items(scenario, outcome, valid=None, **says):
    valid = [True] * len(scenario) if valid is None else valid
    return Items(dict(scenario=scenario, asked=outcome, valid=valid), {"method": "probe", **says})


def test_items_are_matched_by_name_not_by_place():
    base = items(["a", "b", "c", "d"], [0, 1, 0, 1])
    arm = items(["d", "c", "b", "a"], [1, 1, 1, 0])
    one = compare(base, arm, outcome="asked")
    assert (one.n, one.n_missing, one.moved_wrong) == (4, 0, 0)
    assert one.d == cohens_d([0, 1, 0, 1], [0, 1, 1, 1])
    assert one.p_value == 1  # one item moved


def test_missing_items_are_counted_and_named():
    base = items(["a", "b", "c", "d"], [0, 1, 0, 1])
    arm = items(["a", "b", "c", "e"], [0, 1, float("nan"), 1])
    with pytest.warns(UserWarning, match="3 of 5 items lack 'asked' in one arm .*: c, d, e"):
        one = compare(base, arm, outcome="asked")
    assert (one.n, one.n_missing) == (2, 3)


def test_valid_rates_stand_beside_the_effect():
    base = items(list("abcd"), [0, 1, 0, 1], valid=[True, True, True, False])
    arm = items(
        list("abcd"), [0, 1, 1, 1], valid=[True, False, False, False], strength=2.0, unit="norm"
    )
    one = compare(base, arm, outcome="asked", trait="autonomy")
    assert (one.base_valid_rate, one.valid_rate) == (0.75, 0.25)
    assert (one.strength, one.unit, one.trait) == (2.0, "norm", "autonomy")


def test_wrong_tables_are_refused():
    base, arm = items(list("abc"), [0, 1, 0]), items(list("xyz"), [0, 1, 0])
    with pytest.raises(ValueError, match="share no item"):
        compare(base, arm, outcome="asked")
    with pytest.raises(KeyError, match="no column 'risk'; the table has scenario, asked, valid"):
        compare(base, base, outcome="risk")
    with pytest.raises(ValueError, match="'a' occurs more than once"):
        compare(base, items(["a", "a"], [1, 0]), outcome="asked")


def test_independent_arms_need_no_shared_items():
    base, arm = items(list("abc"), [0, 1, 0]), items(list("xyzw"), [0, 1, 1, 1])
    assert compare(base, arm, outcome="asked", paired=False).test == "mann-whitney"


def test_clusters_are_matched_with_their_items():
    names = [f"s{i}" for i in range(12)]
    base = items(names, [0, 1] * 6)
    arm = items(list(reversed(names)), [1, 1, 0, 1] * 3)
    base.rows["template"] = [f"t{i // 2}" for i in range(12)]
    one = compare(base, arm, outcome="asked", clusters="template")
    assert one.n_clusters == 6
    assert one.note == "6 clusters: the interval is too narrow"
    with pytest.raises(KeyError, match="no column 'group'"):
        compare(base, arm, outcome="asked", clusters="group")


def test_the_row_of_a_table_is_complete():
    one = compare(
        items(list("abcd"), [0, 1, 0, 1]), items(list("abcd"), [1, 1, 1, 0]), outcome="asked"
    )
    missing = [
        name
        for name, value in one.to_dict().items()
        if value != value and name not in ("strength", "displacement", "p_adjusted")
    ]
    assert missing == []
    assert (one.unpaired_test, one.interval) == ("mann-whitney", "bootstrap bca")
