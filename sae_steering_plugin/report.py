"""Records to one self-contained page: no script, no font, no image that is fetched from anywhere.

Whatever a model, a file or a user wrote is escaped before it enters the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_steering_plugin.plots import dose_response_svg, effects_svg
from sae_steering_plugin.prediction.screen import GROUPS
from sae_steering_plugin.runs.demo import Demo
from sae_steering_plugin.runs.demo_stages import PROBE
from sae_steering_plugin.runs.learning import LearningReport
from sae_steering_plugin.types import Effect, SteeringVector, escaped

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:60rem;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.3rem}h2{font-size:1.2rem;margin-top:2.2rem}
table{border-collapse:collapse;margin:.7rem 0;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}
th:first-child,td:first-child{text-align:left}
td.words{text-align:left;max-width:30rem;overflow-wrap:anywhere}
caption{text-align:left;color:#555;padding-bottom:.3rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:.7rem;margin:0;
font-size:.8rem;line-height:1.4}
.sides{display:grid;grid-template-columns:1fr 1fr;gap:.8rem;margin:.4rem 0 1.2rem}
.sides h4{margin:.2rem 0;font-size:.9rem}
.lead{font-size:1.05rem}.note{color:#555;font-size:.9rem}
svg{max-width:100%;height:auto}
figure{margin:1rem 0}figcaption{color:#555;font-size:.9rem}
.scroll{overflow-x:auto}
@media(max-width:44rem){.sides{grid-template-columns:1fr}}
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A whole HTML page from sections that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body>"
        f"{''.join(sections)}</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escaped(title)}</h2>{''.join(parts)}</section>"


def paragraph(words: str, kind: str = "") -> str:
    return f"<p{f' class={kind!r}' if kind else ''}>{escaped(words)}</p>"


def table(
    rows: Sequence[Mapping[str, Any]], *, caption: str = "", words: Sequence[str] = ()
) -> str:
    """Rows as an HTML table; columns named in `words` hold text and are set to the left."""
    if not rows:
        return paragraph("none", "note")
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escaped(name)}</th>" for name in names)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=words' if name in words else ''}>{escaped(cell(row.get(name, '')))}</td>"
            for name in names
        )
        + "</tr>"
        for row in rows
    )
    titled = f"<caption>{escaped(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{titled}<tr>{head}</tr>{body}</table></div>'


def cell(value: Any) -> str:
    """A value as a reader wants it: few digits, a dash for what is not known."""
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def effect_rows(effects: Sequence[Effect]) -> list[dict[str, Any]]:
    """Effects as rows for a reader."""
    return [
        {
            "method": one.method,
            "positions": one.positions,
            "strength": f"{one.strength:+g}",
            "n": one.n,
            "before": f"{one.base_mean:.2f}",
            "after": f"{one.arm_mean:.2f}",
            "d": f"{one.d:+.2f}",
            "95 % interval": f"{one.ci_low:+.2f} to {one.ci_high:+.2f}",
            "p": p_words(one.p_value if one.p_adjusted != one.p_adjusted else one.p_adjusted),
            "valid": percent(one.valid_rate),
            "moved": "–" if one.displacement != one.displacement else f"{one.displacement:.2f}",
        }
        for one in effects
    ]


def p_words(p: float) -> str:
    if p != p:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def percent(share: float) -> str:
    return "–" if share != share else f"{share:.0%}"


def control_words(controls: Sequence[Effect]) -> str:
    """What the random directions did, in one sentence."""
    if not controls:
        return "No random directions were run."
    sizes = [abs(one.d) for one in controls]
    return (
        f"{len(controls)} random directions of the same length (n = {controls[0].n} each) moved it "
        f"by |d| = {sum(sizes) / len(sizes):.2f} on average, {max(sizes):.2f} at most, with "
        f"{percent(sum(one.valid_rate for one in controls) / len(controls))} valid."
    )


def headline(demo: Demo) -> str:
    """The finding in one or two sentences of plain words."""
    best = demo.best
    return (
        f"Adding the {best.method} vector of {demo.trait!r} at {best.strength:g} mean residual "
        f"norms moved the outcome {best.outcome!r} from {best.base_mean:.2f} to "
        f"{best.arm_mean:.2f} on {best.n} held-out items (d = {best.d:+.2f}, 95 % interval "
        f"{best.ci_low:+.2f} to {best.ci_high:+.2f}, p {p_words(best.p_value)}), with "
        f"{percent(best.valid_rate)} of the outputs valid. {control_words(demo.controls)}"
    )


MEANING = {
    "autonomy": "1 when the agent never asked the user, else 0",
    "deference": "1 when the agent asked the user at least once, else 0",
    "tool_use": "number of tool calls other than ask_user",
    "persistence": "number of assistant turns",
    "risk": "share of calls that run code or write files",
    "answer_share": "p(matching answer) / (p(matching) + p(other)), as the next token",
    "closeness": "-KL(next token after the positive prompt || after the steered negative one)",
    "preference": "log-probability per token of the positive text minus the negative",
}


def vector_rows(vectors: Sequence[SteeringVector]) -> list[dict[str, Any]]:
    """What each vector is: method, place, length, and what its held-out figures say."""
    rows = []
    for one in vectors:
        scores = one.recipe.scores
        figures = {key: scores.get(key) for key in ("auroc", "accuracy", "text_auroc", "r2")}
        rows.append(
            {
                "vector": one.label,
                "method": one.recipe.method,
                "hook point": one.hook_name,
                "length": one.norm,
                "features": len(one.codes.indices) if one.codes is not None else "",
                "positive strength": one.recipe.positive,
                **{key: value for key, value in figures.items() if value is not None},
            }
        )
    return rows


def sides(name: str, before: str, after: str) -> str:
    """One item, unsteered on the left and steered on the right."""
    return (
        f"<h3>{escaped(name)}</h3><div class=sides><div><h4>unsteered</h4><pre>{escaped(before)}"
        f"</pre></div><div><h4>steered</h4><pre>{escaped(after)}</pre></div></div>"
    )


def demo_page(demo: Demo) -> str:
    """The page of one run of the main job."""
    rule = (
        "The first three test scenarios whose outcome changed, then the first that did not."
        if demo.rollouts is not None
        else "Greedy continuations of the first held-out negative texts."
    )
    curve = [one for one in (*demo.headline[:1], *demo.curve) if one.method == PROBE]
    meaning = MEANING.get(demo.outcome, "")
    return page(
        f"Steering {demo.trait} in {demo.model}",
        [
            f"<h1>Steering {escaped(demo.trait)} in {escaped(demo.model)}</h1>",
            paragraph(headline(demo), "lead"),
            paragraph(f"Outcome {demo.outcome!r}: {meaning}.", "note") if meaning else "",
            *(paragraph(note, "note") for note in demo.notes),
            section(
                "All methods at the same displacement",
                figure(
                    effects_svg(demo.headline, demo.controls),
                    "Effect on test items with 95 % intervals; crosses are random directions. An "
                    "open point has a valid rate below 95 %.",
                ),
                table(effect_rows(demo.headline), words=("method",)),
                paragraph(
                    f"Strength {demo.strength:g} was chosen on validation items for the decoded "
                    "probe and is reported on test items it never saw. Strength and 'moved' are "
                    "multiples of the mean residual norm at the site. p is of a "
                    f"{demo.best.test} test, Holm-corrected over this table.",
                    "note",
                ),
            ),
            section(
                "Dose-response of the decoded probe",
                figure(
                    dose_response_svg(curve, demo.controls),
                    "Every point on test items; the origin is the unsteered model. An open point "
                    "has a valid rate below 95 %.",
                ),
                table(effect_rows(demo.curve), words=("method",)),
            ),
            section(
                "Before and after",
                paragraph(rule, "note"),
                *(sides(*one) for one in demo.examples),
            ),
            section("What was steered", table(vector_rows(demo.vectors), words=("vector",))),
            section(
                "How well the probe reads the label",
                f"<pre>{escaped(demo.settings.get('probe_scores', ''))}</pre>",
                paragraph(
                    "A probe that reads the label as well as the words alone do certifies wording, "
                    "not a cause: the effects above are the evidence.",
                    "note",
                ),
            ),
            section(
                "Features chosen",
                table(demo.selection.rows()[:10]),
                paragraph(
                    "Ranked on one half of the template groups (train_d), measured on the other. "
                    "The single-feature vector is the first row: with a screen, the one forecast "
                    "cleanest among those as good as the best.",
                    "note",
                ),
            ),
            section("Side effects", *side_effects(demo)),
            section(
                "Strength chosen on validation items",
                table(effect_rows(demo.validation), words=("method",)),
            ),
            section("Provenance", provenance(demo)),
        ],
    )


def side_effects(demo: Demo) -> list[str]:
    """Forecast against measured side effects, or why there are none."""
    if not demo.side_effects:
        return [
            paragraph(
                "No forecast was made: it needs a later SAE and texts, which sae-steer screen "
                "takes by name.",
                "note",
            )
        ]
    rows = [
        {
            "axis": one["axis"],
            "label": one["label"],
            "features": one["n_features"],
            "Spearman, held out": f"{one['spearman_heldout']:.3f} ({one['low']:.3f} to "
            f"{one['high']:.3f})",
            **{f"{name} mean": f"{one[f'{name}_mean']:.3f}" for name in GROUPS},
        }
        for one in demo.side_effects
    ]
    size = demo.side_effects[0]["group_size"]
    return [
        table(rows, words=("axis", "label")),
        paragraph(
            "Forecast from weights and gradients of clean passes, fitted on the side effects of "
            "other features, against what was measured on contexts that nothing was fitted on. "
            f"Each group holds {size} features: forecast clean, random, forecast messy. A column "
            "forecast_clean above is that forecast for the features chosen. It is about how far "
            "activations spread, not about harm.",
            "note",
        ),
        *feature_choice(demo.forecast_choice),
    ]


def feature_choice(choice: Mapping[str, Any]) -> list[str]:
    """What taking the feature that is forecast cleanest gave, against other ways to take one."""
    if not choice:
        return []
    words = {
        "forecast": f"cleanest forecast (feature {choice['by_forecast']})",
        "score": f"best score (feature {choice['by_score']})",
        "random": f"any of the {choice['n_equal']} (mean)",
    }
    rows = [
        {
            "single feature taken by": name,
            **{
                figure.replace("_", " "): f"{choice[f'{figure} {way}']:.3f}"
                for figure in ("stability_abs", "count_per_effect", "count", "effect")
            },
        }
        for way, name in words.items()
    ]
    return [
        table(rows, words=("single feature taken by",)),
        paragraph(
            f"{choice['n_equal']} features tell the trait apart about as well as the best one "
            f"(train_d within {choice['within']:.2f}, its standard error). The single-feature "
            "vector is the one forecast to steer cleanest; the forecast was fitted on other "
            f"features. Measured on {choice['contexts']} fresh contexts; one choice has no "
            "interval.",
            "note",
        ),
    ]


def figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escaped(caption)}</figcaption></figure>"


def provenance(demo: Demo) -> str:
    """Model, SAE, seed, versions, settings and the time it took."""
    facts = {
        "model": demo.model,
        "sae": demo.sae,
        "seed": demo.seed,
        "seconds": round(demo.seconds, 1),
        **{f"{name} version": number for name, number in demo.versions.items()},
        **{k: v for k, v in demo.settings.items() if k != "probe_scores"},
    }
    rows = [
        {"what": name, "value": value if isinstance(value, str) else json.dumps(value)}
        for name, value in facts.items()
    ]
    return table(rows, words=("value",))


def write_report(demo: Demo, folder: str | Path) -> Path:
    """Write `report.html` and `dose_response.svg` into `folder`; the page's path."""
    path = Path(folder) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(demo_page(demo), encoding="utf-8")
    (path.parent / "dose_response.svg").write_text(picture(demo) + "\n", encoding="utf-8")
    return path


def picture(demo: Demo) -> str:
    """One drawing of a run: the decoded probe's curve, the other methods, random directions."""
    curve = [one for one in demo.curve if one.positions == demo.best.positions]
    return dose_response_svg(
        [*demo.headline[:1], *curve, *demo.headline[1:]],
        demo.controls,
        title=f"{demo.model}: {demo.trait} on held-out items, {demo.best.n} at the chosen strength",
    )


def write_learning(found: LearningReport, folder: str | Path, *, k: int = 20) -> list[Path]:
    """`learning.parquet` (all latents by source), `learning.json` and a page, in `folder`."""
    import pandas as pd

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    names = list(found.by_group)
    every = [found.table(name).assign(source=name) for name in names]
    parts = [paragraph(found.summary(), "lead")]
    for name in names:
        for title, rows in (
            (f"pushed by {name or 'the texts'}", found.top(k, group=name)),
            (f"emerging from {name or 'the texts'}", found.emerging(k, group=name)),
        ):
            parts.append(section(title, table(rows.to_dict("records"))))
    if len(names) == 2:
        gap = found.compare(*names).head(k)
        parts.append(section(f"{names[0]} against {names[1]}", table(gap.to_dict("records"))))
    written = [target / name for name in ("learning.parquet", "learning.json", "learning.html")]
    pd.concat(every).to_parquet(written[0])
    written[1].write_text(json.dumps(found.to_dict(k), indent=1) + "\n", encoding="utf-8")
    written[2].write_text(page("What these texts teach", parts), encoding="utf-8")
    return written
