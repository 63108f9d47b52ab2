"""Pictures of effects: Plotly figures for notebooks, and small SVG drawings for pages and READMEs.

Every picture shows the interval of each effect and the random directions of equal length beside it.
An SVG drawing is a few kilobytes of text without scripts, so a page that holds it stays
self-contained; the same figure in Plotly costs four megabytes of JavaScript.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sae_steering_plugin.types import UNITS, Effect, escaped

if TYPE_CHECKING:
    import pandas as pd

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c00")
"""The Okabe-Ito palette, told apart by most colour-blind readers; yellow is darkened."""

GREY = "#8a8a8a"

DASHES = ("solid", "dash", "dot", "dashdot")
STROKES = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "8 3 2 3"}


def effect_table(effects: Sequence[Effect], controls: Sequence[Effect] = ()) -> pd.DataFrame:
    """One row per effect as a person reads it, and one row for all random directions of a place.

    Columns: method, positions, strength, n, mean before and after, d with its interval, p (adjusted
    where a correction was made), valid rate, |d| of the random directions at that place.
    """
    import pandas as pd

    rows = []
    for one in effects:
        crowd = [abs(c.d) for c in beside(one, controls)]
        rows.append(
            {
                "method": one.method,
                "positions": one.positions,
                "strength": one.strength,
                "n": one.n,
                "before": one.base_mean,
                "after": one.arm_mean,
                "d": one.d,
                "interval": f"{one.ci_low:+.2f} to {one.ci_high:+.2f}",
                "p": one.p_value if math.isnan(one.p_adjusted) else one.p_adjusted,
                "valid": one.valid_rate,
                "random |d|": sum(crowd) / len(crowd) if crowd else math.nan,
            }
        )
    return pd.DataFrame(rows)


def beside(effect: Effect, controls: Sequence[Effect]) -> list[Effect]:
    """The controls at the positions and size of strength of `effect`."""
    return [
        one
        for one in controls
        if one.positions == effect.positions and abs(one.strength) == abs(effect.strength)
    ]


def lines(effects: Sequence[Effect]) -> dict[tuple[str, str], list[Effect]]:
    """Effects by method and positions, each in order of strength."""
    found: dict[tuple[str, str], list[Effect]] = {}
    for one in effects:
        found.setdefault((one.method, one.positions), []).append(one)
    return {key: sorted(line, key=lambda one: one.strength) for key, line in found.items()}


def line_name(key: tuple[str, str], keys: Sequence[tuple[str, str]]) -> str:
    """The method, with its positions where the picture shows several."""
    return key[0] if len({positions for _, positions in keys}) == 1 else f"{key[0]}, {key[1]}"


def styles(keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
    """A colour per method (or, of one method, per position rule) and a dash per position rule."""
    methods = list(dict.fromkeys(method for method, _ in keys))
    places = list(dict.fromkeys(positions for _, positions in keys))
    hue = (methods, 0) if len(methods) > 1 else (places, 1)
    return {
        key: (
            COLOURS[hue[0].index(key[hue[1]]) % len(COLOURS)],
            DASHES[places.index(key[1]) % len(DASHES)],
        )
        for key in keys
    }


VALID = 0.95
"""Valid rate below which a point is drawn open: its effect is bought with broken output."""


def broken(one: Effect) -> bool:
    return one.valid_rate < VALID


def strength_axis(effects: Sequence[Effect]) -> str:
    """What a strength means, from the unit the effects share."""
    units = list(dict.fromkeys(one.unit for one in effects))
    return f"strength ({UNITS.get(units[0], units[0])})" if len(units) == 1 else "strength"


def outcome_axis(effects: Sequence[Effect]) -> str:
    names = ", ".join(dict.fromkeys(one.outcome for one in effects))
    return f"effect on {names} (Cohen's d)"


# Plotly -----------------------------------------------------------------------------------------


def dose_response_figure(
    effects: Sequence[Effect], controls: Sequence[Effect] = (), *, title: str = ""
) -> Any:
    """A Plotly figure of d against strength: a line per method and position rule, with intervals.

    Random directions are grey crosses; hovering shows n, p and the valid rate. A line passes
    through d = 0 at strength 0, which is the unsteered model itself.
    """
    require_effects(effects)
    import plotly.graph_objects as go

    found = lines(effects)
    style = styles(list(found))
    figure = go.Figure()
    for key, line in found.items():
        colour, dash = style[key]
        points = with_origin(line) if len(line) > 1 else [(line[0].strength, line[0])]
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[0.0 if one is None else one.d for _, one in points],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [0.0 if one is None else one.ci_high - one.d for _, one in points],
                "arrayminus": [0.0 if one is None else one.d - one.ci_low for _, one in points],
                "thickness": 1.2,
            },
            mode="markers" if len(line) == 1 else "lines+markers",
            name=line_name(key, list(found)),
            line={"color": colour, "dash": dash},
            marker={
                "size": 8,
                "symbol": [
                    "circle-open" if one is not None and broken(one) else "circle"
                    for _, one in points
                ],
            },
            hovertext=["unsteered" if one is None else hover(one) for _, one in points],
            hoverinfo="text",
        )
    if controls:
        figure.add_scatter(
            x=[one.strength for one in controls],
            y=[one.d for one in controls],
            mode="markers",
            name="random directions",
            marker={"color": GREY, "symbol": "x-thin", "line": {"color": GREY, "width": 1.5}},
            hovertext=[hover(one) for one in controls],
            hoverinfo="text",
        )
    figure.add_hline(y=0, line_width=1, line_color="#bbbbbb")
    figure.update_layout(
        title=title or None,
        xaxis_title=strength_axis(effects),
        yaxis_title=outcome_axis(effects),
        template="plotly_white",
        legend={"orientation": "h", "y": -0.2},
    )
    return figure


def effects_figure(
    effects: Sequence[Effect], controls: Sequence[Effect] = (), *, title: str = ""
) -> Any:
    """A Plotly figure with one row per effect: d, its interval, and the random directions."""
    require_effects(effects)
    import plotly.graph_objects as go

    names = row_names(effects)
    figure = go.Figure()
    if controls:
        figure.add_scatter(
            x=[one.d for one in controls],
            y=["random directions"] * len(controls),
            mode="markers",
            marker={"color": GREY, "symbol": "x-thin", "line": {"color": GREY, "width": 1.5}},
            hovertext=[hover(one) for one in controls],
            hoverinfo="text",
            name="random directions",
        )
    figure.add_scatter(
        x=[one.d for one in reversed(effects)],
        y=list(reversed(names)),
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [one.ci_high - one.d for one in reversed(effects)],
            "arrayminus": [one.d - one.ci_low for one in reversed(effects)],
        },
        mode="markers",
        marker={
            "color": COLOURS[0],
            "size": 9,
            "symbol": ["circle-open" if broken(one) else "circle" for one in reversed(effects)],
        },
        hovertext=[hover(one) for one in reversed(effects)],
        hoverinfo="text",
        name="effects",
    )
    figure.add_vline(x=0, line_width=1, line_color="#bbbbbb")
    figure.update_layout(
        title=title or None,
        xaxis_title=outcome_axis(effects),
        template="plotly_white",
        showlegend=False,
    )
    return figure


def hover(one: Effect) -> str:
    return (
        f"{escaped(one.method)} at {one.strength:+g} ({escaped(one.positions)})<br>"
        f"d = {one.d:+.2f} [{one.ci_low:+.2f}, {one.ci_high:+.2f}], n = {one.n}<br>"
        f"{one.base_mean:.2f} to {one.arm_mean:.2f}, p = {one.p_value:.2g}, "
        f"valid {one.valid_rate:.0%}"
    )


def with_origin(line: Sequence[Effect]) -> list[tuple[float, Effect | None]]:
    """The points of a line with strength 0 added, where steering is the identity."""
    points: list[tuple[float, Effect | None]] = [(one.strength, one) for one in line]
    if all(x for x, _ in points):
        points.append((0.0, None))
    return sorted(points, key=lambda point: point[0])


def row_names(effects: Sequence[Effect]) -> list[str]:
    """A name per effect that says no more than what tells the rows apart."""
    several_places = len({one.positions for one in effects}) > 1
    several_strengths = len({one.strength for one in effects}) > 1
    return [
        one.method
        + (f", {one.positions}" if several_places else "")
        + (f", {one.strength:+g}" if several_strengths else "")
        for one in effects
    ]


def require_effects(effects: Sequence[Effect]) -> None:
    if not effects:
        raise ValueError("there is no effect to draw")


# SVG --------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT = 720.0, 64.0, 16.0
CHARACTER = 6.6
"""Width of a character of the drawing's text, for leaving room; it is drawn at 12 pixels."""


DODGE = 8.0
"""Pixels between the points of methods that were run at one strength only."""


def dose_response_svg(
    effects: Sequence[Effect], controls: Sequence[Effect] = (), *, title: str = ""
) -> str:
    """The dose-response as an SVG element: lines with intervals, random directions as crosses.

    A method that was run at one strength is a point, moved aside so that several can be told apart.
    """
    require_effects(effects)
    found = lines(effects)
    style, keys = styles(list(found)), list(found)
    entries = [
        *(
            (
                line_name(key, keys),
                style[key][0],
                "point" if len(found[key]) == 1 else style[key][1],
            )
            for key in keys
        ),
        *([("random directions", GREY, "cross")] if controls else []),
    ]
    legend, legend_height = legend_svg(entries)
    everything = [*effects, *controls]
    x_ticks = ticks(0.0, *(one.strength for one in everything))
    y_ticks = ticks(
        0.0,
        *(end for one in effects for end in (one.ci_low, one.ci_high)),
        *(c.d for c in controls),
    )
    top, bottom = (34.0 if title else 12.0), 300.0
    height = bottom + 46 + legend_height
    x = scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    y = scale(y_ticks[0], y_ticks[-1], bottom, top)
    parts = [grid_x(x, x_ticks, top, bottom), grid_y(y, y_ticks)]
    for one in controls:
        parts.append(cross(x(one.strength), y(one.d), describe(one)))
    single = [key for key, line in found.items() if len(line) == 1]
    for key, line in found.items():
        colour, dash = style[key]
        dodge = DODGE * (1 + single.index(key)) if key in single and len(found) > 1 else 0.0
        if key not in single:
            path = " ".join(
                f"{x(s):.1f},{y(0.0 if one is None else one.d):.1f}" for s, one in with_origin(line)
            )
            pattern = f' stroke-dasharray="{STROKES[dash]}"' if STROKES[dash] else ""
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"'
                f"{pattern}/>"
            )
        for one in line:
            at = x(one.strength) + dodge
            parts.append(whisker(at, y(one.ci_low), at, y(one.ci_high), colour))
            parts.append(dot(at, y(one.d), colour, describe(one), hollow=broken(one)))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(text(middle, bottom + 38, strength_axis(effects), anchor="middle"))
    parts.append(turned(16.0, (top + bottom) / 2, outcome_axis(effects)))
    parts.append(f'<g transform="translate({LEFT:.0f},{bottom + 52:.0f})">{legend}</g>')
    return svg(height, title, parts)


def effects_svg(
    effects: Sequence[Effect], controls: Sequence[Effect] = (), *, title: str = ""
) -> str:
    """Effects as rows of an SVG element: d, its interval, random directions in the last row."""
    require_effects(effects)
    names = [*row_names(effects), *(["random directions"] if controls else [])]
    left = max(LEFT, 16 + CHARACTER * max(map(len, names)))
    x_ticks = ticks(
        0.0,
        *(end for one in effects for end in (one.ci_low, one.ci_high)),
        *(c.d for c in controls),
    )
    top = 34.0 if title else 12.0
    bottom = top + 26 * len(names) + 6
    x = scale(x_ticks[0], x_ticks[-1], left, WIDTH - RIGHT - 10)
    parts = [grid_x(x, x_ticks, top, bottom)]
    for row, name in enumerate(names):
        at = top + 26 * row + 18
        parts.append(text(left - 10, at + 4, name, anchor="end"))
        if row < len(effects):
            one = effects[row]
            parts.append(
                whisker(x(one.ci_low), at, x(one.ci_high), at, COLOURS[0])
                + dot(x(one.d), at, COLOURS[0], describe(one), hollow=broken(one))
            )
        else:
            parts += [cross(x(one.d), at, describe(one)) for one in controls]
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(text(middle, bottom + 36, outcome_axis(effects), anchor="middle"))
    return svg(bottom + 46, title, parts)


SCREENED = {"clean": "#009e73", "random": "#56b4e9", "messy": "#d55e00", "rest": "#8a8a8a"}
"""Colours of a screen's groups, and of the pool features in none of them."""


def scatter_svg(
    points: Sequence[tuple[float, float, str, str]], *, across: str, up: str, title: str = ""
) -> str:
    """Points (x, y, group, tip) as an SVG element, groups as `SCREENED` colours them.

    Points with an undefined coordinate are left out and counted below. ValueError without any.
    """
    drawn = [one for one in points if math.isfinite(one[0]) and math.isfinite(one[1])]
    if not drawn:
        raise ValueError("there is no point to draw")
    order = [name for name in SCREENED if any(one[2] == name for one in drawn)]
    entries = [(name, SCREENED[name], "point") for name in order]
    legend, tall = legend_svg(entries)
    top, bottom = (34.0 if title else 12.0), 330.0
    x_ticks, y_ticks = ticks(*(p[0] for p in drawn)), ticks(*(p[1] for p in drawn))
    x = scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT - 10)
    y = scale(y_ticks[0], y_ticks[-1], bottom, top)
    parts = [grid_x(x, x_ticks, top, bottom), grid_y(y, y_ticks)]
    for name in reversed(order):  # the groups lie on top of the rest
        parts += [
            dot(x(a), y(b), SCREENED[name], tip, hollow=name == "rest")
            for a, b, group, tip in drawn
            if group == name
        ]
    left_out = len(points) - len(drawn)
    words = across + (f" ({left_out} undefined left out)" if left_out else "")
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + 36, words, anchor="middle"))
    parts.append(turned(16.0, (top + bottom) / 2, up))
    parts.append(f'<g transform="translate({LEFT:.0f},{bottom + 50:.0f})">{legend}</g>')
    return svg(bottom + 56 + tall, title, parts)


def groups_svg(groups: Mapping[str, Sequence[float]], *, across: str, title: str = "") -> str:
    """Each group's values as a row of points with its mean as a bar, in an SVG element."""
    values = [v for found in groups.values() for v in found if math.isfinite(v)]
    if not values:
        raise ValueError("there is no point to draw")
    top = 34.0 if title else 12.0
    bottom = top + 34 * len(groups) + 4
    x_ticks = ticks(*values)
    x = scale(x_ticks[0], x_ticks[-1], LEFT + 40, WIDTH - RIGHT - 10)
    parts = [grid_x(x, x_ticks, top, bottom)]
    for row, (name, found) in enumerate(groups.items()):
        at, kept = top + 34 * row + 20, [v for v in found if math.isfinite(v)]
        colour = SCREENED.get(name, GREY)
        parts.append(text(LEFT + 30, at + 4, f"{name} ({len(kept)})", anchor="end"))
        parts += [dot(x(v), at, colour, f"{name} {v:.3f}", hollow=True) for v in kept]
        if kept:
            mean = sum(kept) / len(kept)
            parts.append(rule(x(mean), at - 12, x(mean), at + 12, colour, ' stroke-width="4"'))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + 36, across, anchor="middle"))
    return svg(bottom + 46, title, parts)


def describe(one: Effect) -> str:
    """An effect in words, for the tooltip of its point."""
    return (
        f"{one.method} at {one.strength:+g}, positions {one.positions}: d {one.d:+.2f} "
        f"[{one.ci_low:+.2f}, {one.ci_high:+.2f}], n {one.n}, valid {one.valid_rate:.0%}"
    )


def ticks(*values: float) -> list[float]:
    """Round numbers that cover all finite values, four to nine of them."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = min(finite), max(finite)
    if low == high:
        low, high = low - 1, high + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def scale(low: float, high: float, start: float, stop: float) -> Any:
    """The map from `low..high` to `start..stop`; infinite values land on the nearer edge."""

    def place(value: float) -> float:
        kept = min(max(value, low), high) if not math.isnan(value) else low
        return start + (kept - low) / (high - low) * (stop - start)

    return place


def text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "") -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{bold}>{escaped(words)}</text>'


def turned(x: float, y: float, words: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" '
        f'transform="rotate(-90 {x:.1f} {y:.1f})">{escaped(words)}</text>'
    )


def rule(x1: float, y1: float, x2: float, y2: float, colour: str, style: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}"{style}/>'


def whisker(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return rule(x1, y1, x2, y2, colour, ' stroke-width="1.5"')


def dot(x: float, y: float, colour: str, tip: str, *, hollow: bool = False) -> str:
    fill = "#fff" if hollow else colour
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}" '
        'stroke-width="1.6">'
        f"<title>{escaped(tip)}</title></circle>"
    )


def cross(x: float, y: float, tip: str) -> str:
    return (
        f'<path d="M{x - 3.5:.1f},{y - 3.5:.1f}l7,7m0,-7l-7,7" stroke="{GREY}" stroke-width="1.3" '
        f'fill="none"><title>{escaped(tip)}</title></path>'
    )


def grid_colour(value: float) -> str:
    return "#9a9a9a" if value == 0 else "#e4e4e4"


def grid_x(x: Any, values: Sequence[float], top: float, bottom: float) -> str:
    return "".join(
        rule(x(v), top, x(v), bottom, grid_colour(v))
        + text(x(v), bottom + 16, f"{v:g}", anchor="middle")
        for v in values
    )


def grid_y(y: Any, values: Sequence[float]) -> str:
    return "".join(
        rule(LEFT, y(v), WIDTH - RIGHT, y(v), grid_colour(v))
        + text(LEFT - 8, y(v) + 4, f"{v:g}", anchor="end")
        for v in values
    )


def legend_svg(entries: Sequence[tuple[str, str, str]]) -> tuple[str, float]:
    """The legend, wrapped to the drawing's width, and its height."""
    parts: list[str] = []
    at_x, at_y = 0.0, 8.0
    for name, colour, dash in entries:
        wide = 34 + CHARACTER * len(name) + 14
        if at_x and at_x + wide > WIDTH - LEFT - RIGHT:
            at_x, at_y = 0.0, at_y + 20
        if dash == "cross":
            parts.append(cross(at_x + 13, at_y, name))
        elif dash == "point":
            parts.append(dot(at_x + 13, at_y, colour, name))
        else:
            pattern = f' stroke-dasharray="{STROKES[dash]}"' if STROKES[dash] else ""
            style = f' stroke-width="2"{pattern}'
            parts.append(rule(at_x, at_y, at_x + 26, at_y, colour, style))
        parts.append(text(at_x + 32, at_y + 4, name))
        at_x += wide
    return "".join(parts), at_y + 14


def svg(height: float, title: str, parts: Sequence[str]) -> str:
    """The element itself, on white, with its title as heading and as its accessible name."""
    heading = text(LEFT, 20.0, title, weight="bold") if title else ""
    box = f'width="{WIDTH:.0f}" height="{height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" '
        'role="img" font-family="system-ui, sans-serif" font-size="12" fill="#222">'
        f"<title>{escaped(title or 'effects')}</title>"
        f'<rect {box} fill="#fff"/>{heading}{"".join(parts)}</svg>'
    )
