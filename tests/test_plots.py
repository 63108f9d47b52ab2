import math
import xml.etree.ElementTree as ET

import pytest

from sae_steering_plugin.plots import (
    SCREENED,
    dose_response_figure,
    dose_response_svg,
    effect_table,
    effects_figure,
    effects_svg,
    groups_svg,
    scatter_svg,
    ticks,
)
from sae_steering_plugin.types import Effect

NS = "{http://www.w3.org/2000/svg}"


def effect(
    method: str = "probe", strength: float = 1.0, d: float = 1.0, **details: object
) -> Effect:
    known = {
        "outcome": "autonomy",
        "unit": "norm",
        "positions": "all",
        "n": 200,
        "base_mean": 0.5,
        "arm_mean": 0.9,
        "ci_low": d - 0.2,
        "ci_high": d + 0.2,
        "p_value": 0.01,
        "test": "paired permutation",
        "valid_rate": 0.99,
        **details,
    }
    return Effect(method=method, strength=strength, d=d, **known)  # type: ignore[arg-type]


LINE = [effect(strength=s, d=s * 1.5) for s in (0.2, 0.4, 0.8)]
CROWD = [effect("random", 0.4, d) for d in (-0.1, 0.0, 0.2)]


def tips(drawing: str, kind: str) -> list[str]:
    return [e.findtext(f"{NS}title", "") for e in ET.fromstring(drawing).iter(f"{NS}{kind}")]


@pytest.mark.parametrize("draw", [dose_response_svg, effects_svg])
def test_every_effect_and_every_control_has_its_mark(draw: object) -> None:
    drawing = draw(LINE, CROWD, title="t")  # type: ignore[operator]
    assert len(tips(drawing, "circle")) == len(LINE)
    assert sum("random at" in tip for tip in tips(drawing, "path")) == len(CROWD)


def test_the_height_of_a_point_is_linear_in_d() -> None:
    root = ET.fromstring(dose_response_svg(LINE))
    at = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.iter(f"{NS}circle")]
    (x1, y1), (x2, y2), (x3, y3) = at
    assert (y3 - y1) / (x3 - x1) == pytest.approx((y2 - y1) / (x2 - x1), rel=0.02)
    assert y1 > y2 > y3  # larger d stands higher


def test_a_broken_arm_is_drawn_open() -> None:
    root = ET.fromstring(effects_svg([effect(), effect("loud", valid_rate=0.5)]))
    assert [c.get("fill") for c in root.iter(f"{NS}circle")][1:] == ["#fff"]
    figure = effects_figure([effect(), effect("loud", valid_rate=0.5)])
    assert list(figure.data[-1].marker.symbol) == ["circle-open", "circle"]


def test_words_in_a_drawing_are_escaped() -> None:
    drawing = effects_svg([effect('<script>"x"</script>')], title="<b>")
    assert "<script" not in drawing and "<b>" not in drawing
    ET.fromstring(drawing)


def test_infinite_ends_stay_inside_the_drawing() -> None:
    root = ET.fromstring(dose_response_svg([effect(ci_high=math.inf), effect(strength=0.5)]))
    ends = [float(line.get(a, 0)) for line in root.iter(f"{NS}line") for a in ("y1", "y2")]
    assert all(0 <= end <= 400 for end in ends)


def test_lines_of_one_method_differ_by_colour_and_dash() -> None:
    drawing = dose_response_svg(
        [*LINE, *(effect(strength=s, positions="decode") for s in (0.2, 0.4))]
    )
    lines = list(ET.fromstring(drawing).iter(f"{NS}polyline"))
    assert len({line.get("stroke") for line in lines}) == 2
    assert len({line.get("stroke-dasharray") for line in lines}) == 2


def test_the_figure_passes_through_the_unsteered_model() -> None:
    figure = dose_response_figure(LINE, CROWD)
    line = figure.data[0]
    assert dict(zip(line.x, line.y, strict=True))[0.0] == 0.0
    assert len(figure.data[1].x) == len(CROWD)
    assert list(line.error_y.array)[1:] == pytest.approx([0.2] * 3)


def test_the_table_shows_the_adjusted_p_and_the_random_directions_of_that_place() -> None:
    table = effect_table([effect(strength=0.4, p_adjusted=0.04), effect(strength=0.8)], CROWD)
    assert list(table["p"]) == [0.04, 0.01]
    assert table["random |d|"][0] == pytest.approx(0.1)
    assert math.isnan(table["random |d|"][1])


@pytest.mark.parametrize(
    "draw", [dose_response_svg, effects_svg, dose_response_figure, effects_figure]
)
def test_no_effect_is_an_error(draw: object) -> None:
    with pytest.raises(ValueError, match="no effect to draw"):
        draw([])  # type: ignore[operator]


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-3.2, 0.1), (0.0, 0.0), (5.0, 5.0001), (-1e-4, 1e4)])
def test_ticks_cover_their_range_evenly(ends: tuple[float, float]) -> None:
    found = ticks(*ends)
    assert found[0] <= min(ends) + 1e-9 and found[-1] >= max(ends) - 1e-9
    assert 2 <= len(found) <= 12
    steps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)


def test_a_scatter_shows_every_defined_point_in_its_groups_colour_and_counts_the_others():
    points = [(0.0, 1.0, "clean", "a<b"), (1.0, 2.0, "messy", ""), (math.nan, 0.0, "rest", "")]
    root = ET.fromstring(scatter_svg(points, across="forecast", up="measured", title="one"))
    dots = [c.get("fill") for c in root.iter(f"{NS}circle") if c.get("r") == "4"]
    shown = dots[: len(dots) - 2]  # the legend has one of each, at the end
    assert sorted(shown) == sorted([SCREENED["clean"], SCREENED["messy"]])
    words = " ".join(t.text or "" for t in root.iter(f"{NS}text"))
    assert "forecast (1 undefined left out)" in words and "measured" in words
    with pytest.raises(ValueError, match="no point to draw"):
        scatter_svg(points[2:], across="", up="")


def test_groups_are_rows_with_their_means():
    drawing = groups_svg({"clean": [0.0, 1.0], "messy": [3.0, math.nan]}, across="stability")
    root = ET.fromstring(drawing)
    bars = [r for r in root.iter(f"{NS}line") if r.get("stroke-width") == "4"]
    assert len(bars) == 2 and float(bars[0].get("x1")) < float(bars[1].get("x1"))
    assert "messy (1)" in drawing and "clean (2)" in drawing
    with pytest.raises(ValueError, match="no point to draw"):
        groups_svg({"clean": []}, across="")
