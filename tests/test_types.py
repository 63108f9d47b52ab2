import itertools
import json
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sae_steering_plugin.types import (
    AFTER_PROMPT,
    ALL,
    DECODE,
    LAST,
    PREFILL,
    UNITS,
    Change,
    Contrast,
    Dictionary,
    Edit,
    Labelled,
    Positions,
    PreparedChange,
    Recipe,
    Selection,
    SparseCodes,
    SteeringVector,
    interpolate,
    named_positions,
)
from tests.oracles import unchecked

SITE = "blocks.0.hook_resid_post"


def vector(*, length=3.0, **recipe):
    values = torch.tensor([1.0, -2.0, 2.0]) / 3 * length
    return SteeringVector(values, SITE, Recipe("test", **recipe), "v")


@st.composite
def curves(draw):
    """A measured curve: nats rise with length on both sides, faster on some than on others."""
    points = []
    for side in (-1, 1):
        lengths = sorted(draw(st.sets(st.floats(0.05, 50), min_size=1, max_size=5)))
        steps = draw(st.lists(st.floats(0.01, 2), min_size=len(lengths), max_size=len(lengths)))
        nats = list(itertools.accumulate(steps))
        points += [(side * a, b) for a, b in zip(lengths, nats, strict=True)]
    return tuple(sorted(points))


@settings(max_examples=200, deadline=None)
@given(
    curve=curves(),
    share=st.floats(0.01, 1.0),
    side=st.sampled_from([-1, 1]),
    units=st.tuples(st.sampled_from(sorted(UNITS)), st.sampled_from(sorted(UNITS))),
    length=st.floats(0.01, 100),
    mean_norm=st.floats(0.1, 100),
    most=st.floats(0.1, 50),
    row_norm=st.none() | st.floats(0.1, 5),
)
def test_any_two_units_convert_there_and_back(
    curve, share, side, units, length, mean_norm, most, row_norm
):
    v = vector(
        length=length, mean_norm=mean_norm, max_activation=most, row_norm=row_norm, kl_curve=curve
    )
    one, other = units
    # a strength whose displacement lies inside the measured curve
    reach = max(abs(a) for a, _ in curve if a * side > 0)
    strength = v.convert(side * share * reach * 0.999, "unit", one)
    there = v.convert(strength, one, other)
    assert there * side > 0
    assert v.convert(there, other, one) == pytest.approx(strength, rel=1e-5)
    assert v.displacement(there, other) == pytest.approx(v.displacement(strength, one), rel=1e-5)


def test_one_of_each_unit_is_what_its_line_says():
    v = vector(mean_norm=5.0, max_activation=2.0, row_norm=1.5, kl_curve=((1.0, 0.1), (2.0, 0.4)))
    lengths = {unit: v.displacement(0.4 if unit == "kl" else 1.0, unit) for unit in UNITS}
    wanted = {"raw": 3.0, "unit": 1.0, "norm": 5.0, "max_activation": 3.0, "kl": 2.0}
    assert lengths == {unit: pytest.approx(wanted[unit]) for unit in UNITS}
    assert v.displacement(0.0, "kl") == v.convert(0.0, "unit", "kl") == 0.0
    rowless = vector(max_activation=2.0)
    assert rowless.length_of("max_activation") == 2.0


def test_nats_are_read_off_in_their_square_root():
    v = vector(kl_curve=((1.0, 0.1), (2.0, 0.4), (4.0, 1.6)))
    for length in (0.3, 1.5, 3.7):
        assert v.convert(length, "unit", "kl") == pytest.approx(0.1 * length**2)
    flat = vector(kl_curve=((1.0, 0.1), (2.0, 0.05), (4.0, 1.6)))  # noise: a dip is levelled
    assert flat.displacement(0.1, "kl") == 1.0
    assert flat.displacement(0.4, "kl") > 2.0


def test_a_unit_without_its_figure_says_what_is_missing():
    v = vector()
    for unit in ("norm", "max_activation"):
        with pytest.raises(
            ValueError, match=f"'v' cannot be measured in '{unit}' .*collect_contrast"
        ):
            v.length_of(unit)
    with pytest.raises(
        ValueError, match="'v' has no KL curve on that side: run calibrate_strength"
    ):
        v.displacement(0.1, "kl")
    one_sided = vector(kl_curve=((1.0, 0.1),))
    with pytest.raises(ValueError, match="no KL curve on that side"):
        one_sided.displacement(-0.1, "kl")
    with pytest.raises(ValueError, match=r"0.2 nats lies beyond the measured curve \(0.1 nats\)"):
        one_sided.displacement(0.2, "kl")
    with pytest.raises(ValueError, match=r"length 1.5 lies beyond the measured KL curve \(1\)"):
        one_sided.convert(1.5, "unit", "kl")
    with (
        unchecked(),
        pytest.raises(ValueError, match="no strength unit 'sigma'; choose one of raw"),
    ):
        v.length_of("sigma")
    with pytest.raises(ValueError, match="cannot be measured in 'kl'"):
        v.length_of("kl")


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(-5, 5)), min_size=1, max_size=6))
def test_interpolation_meets_its_points_and_stays_between_them(points):
    xs = sorted({x for x, _ in points})
    assume(all(b - a > 1e-6 for a, b in itertools.pairwise(xs)))
    ys = [y for _, y in points][: len(xs)]
    for x, y in zip(xs, ys, strict=True):
        if len(xs) > 1:
            assert interpolate(x, xs, ys) == pytest.approx(y, abs=1e-6)
    for a, b in itertools.pairwise(range(len(xs))):
        middle = interpolate((xs[a] + xs[b]) / 2, xs, ys)
        assert min(ys[a], ys[b]) - 1e-6 <= middle <= max(ys[a], ys[b]) + 1e-6
    assert interpolate(xs[-1] + 1, xs, ys) == ys[-1]


def test_a_direction_needs_a_length():
    v = vector()
    assert math.isclose(float(v.direction.norm()), 1.0, rel_tol=1e-6)
    with pytest.raises(ValueError, match=r"'v' has length 1.0e-09: it has no direction"):
        _ = vector(length=1e-9).direction
    with pytest.raises(ValueError, match="vector 'x' holds a value that is not finite"):
        SteeringVector(torch.tensor([float("nan")]), SITE, Recipe("test"), "x")


def test_a_recipe_survives_json():
    recipe = Recipe("probe", positive="asks less", kl_curve=((-1.0, 0.2), (0.5, 0.1)), n=3)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with pytest.raises(ValueError, match="a recipe has no field 'colour'"):
        Recipe.from_dict({"method": "probe", "colour": 1})
    assert vector().with_recipe(mean_norm=2.0).length_of("norm") == 2.0


def test_a_vector_shows_itself_as_a_safe_page():
    v = SteeringVector(torch.ones(3), SITE, Recipe("test", positive="<b>bold</b>"), "<script>")
    assert "<script>" not in v._repr_html_() and "<b>" not in v._repr_html_()
    assert "norm 1.73" in repr(v)


def test_sparse_codes_are_checked_and_dense_again():
    codes = SparseCodes(torch.tensor([4, 1]), torch.tensor([2.0, -1.0]), 6, "sae")
    assert codes.dense().tolist() == [0, -1, 0, 0, 2, 0]
    with pytest.raises(ValueError, match=r"a latent index lies outside 0\.\.3"):
        SparseCodes(torch.tensor([4]), torch.ones(1), 4, "sae")
    with pytest.raises(ValueError, match="codes hold a value that is not finite"):
        SparseCodes(torch.tensor([1]), torch.tensor([float("inf")]), 4, "sae")
    with unchecked(), pytest.raises(ValueError, match="indices and values differ in length"):
        SparseCodes(torch.tensor([1, 2]), torch.ones(1), 4, "sae")


def test_position_rules_have_words():
    words = dict(all=ALL, prefill=PREFILL, decode=DECODE, last=LAST, after_prompt=AFTER_PROMPT)
    for word, rule in words.items():
        assert named_positions(word) == rule
    assert [str(rule) for rule in (ALL, PREFILL, DECODE, LAST)] == [
        "all",
        "prefill",
        "decode",
        "last",
    ]
    assert str(Positions(2, 4, bos=True)) == "all[2:4]+bos"
    assert str(AFTER_PROMPT) == "all[-1:]"
    assert ALL.everything and not AFTER_PROMPT.everything and not DECODE.everything
    known = "no position rule 'suffix'; choose one of all, prefill, decode, last, after_prompt"
    with pytest.raises(ValueError, match=known):
        named_positions("suffix")
    with (
        unchecked(),
        pytest.raises(ValueError, match="phase is 'both'; it must be 'all', 'prefill'"),
    ):
        Positions(phase="both")


def test_contrasts_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="contrast 'x' lacks texts on one side"):
        Contrast((), ("a",), name="x")
    with pytest.raises(ValueError, match="has 2 positive and 1 negative texts; pass paired=False"):
        Contrast(("a", "b"), ("c",), name="x")
    assert len(Contrast(("a", "b"), ("c",), paired=False)) == 2
    with pytest.raises(ValueError, match="has 1 groups, not 2"):
        Contrast(("a", "b"), ("c", "d"), groups=("g",), name="x")
    with pytest.raises(ValueError, match="has 2 groups, not 3"):
        Contrast(("a", "b"), ("c",), groups=("g", "h"), paired=False)
    with pytest.raises(ValueError, match="lacks a letter offset for some text"):
        Contrast(("a", "b"), ("c", "d"), letters=((0,), ()))


def test_labelled_rows_agree_in_number():
    def labelled(**changes):
        fields = dict(
            activations=torch.zeros(2, 3),
            labels=torch.tensor([1, 0]),
            hook_name=SITE,
            groups=("a", "b"),
            pairs=torch.tensor([0, 0]),
            texts=("x", "y"),
            mean_norm=1.0,
        )
        return Labelled(**{**fields, **changes})

    rows = labelled(activations=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert rows.positive.tolist() == [[1, 2]] and rows.negative.tolist() == [[3, 4]]
    assert len(rows) == 2
    with pytest.raises(ValueError, match="groups has 1 entries, not 2"):
        labelled(groups=("a",))
    with pytest.raises(ValueError, match="letters has 1 entries, not 2"):
        labelled(letters=("A",))
    with pytest.raises(ValueError, match="collected activations hold a value that is not finite"):
        labelled(activations=torch.full((2, 3), float("nan")))


def test_a_selection_lists_its_features_with_their_scores():
    found = Selection((7, 3), {"auroc": (0.9, 0.8)}, "speech", "sae")
    assert found.rows() == [{"feature": 7, "auroc": 0.9}, {"feature": 3, "auroc": 0.8}]


def test_changes_and_dictionaries_are_recognised():
    from sae_steering_plugin.edits import Add, ProjectOut
    from tests.hosts import tiny_sae

    for change in (Add(torch.ones(3)), ProjectOut(torch.ones(3))):
        assert isinstance(change, Change)
        prepared = change.prepare(dtype=torch.float32, device="cpu")
        assert isinstance(prepared, PreparedChange)
    assert isinstance(tiny_sae(), Dictionary)
    assert not isinstance(torch.ones(3), Change)


def test_an_edit_stands_where_its_change_belongs_unless_told():
    from sae_steering_plugin.edits import Add

    assert Edit(Add(vector())).site == SITE
    assert Edit(Add(vector()), "elsewhere").site == "elsewhere"
    with pytest.raises(
        ValueError, match="Add does not know its hook point: pass hook_name= to Edit"
    ):
        _ = Edit(Add(torch.ones(3))).site
