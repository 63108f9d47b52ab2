"""Are side effects forecast before steering? Every embedded agent, three SAE architectures, widths.

`python -m benchmarks.forecast [--quick] [--json FILE] [--page FILE] [--only MODEL]`

Per dictionary: labels of features of all firing rates (arXiv 2606.08365's protocol, strict), their
reproducibility over disjoint halves of the contexts, cross-validated forecasts from three predictor
sets with their differences, before and after residualisation, the same on random directions of
equal length and at another strength, a held-out screen, and predictors from gradients that are not
the paper's (`--gradients` adds these alone to an earlier JSON file). Nothing passes or fails: the
figures are printed, written to the JSON file and, as tables, to the page.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import studies

TARGETS = (
    "stability_abs",
    "stability_signed",
    "pairwise_abs",
    "effect_cv",
    "count_0.05",
    "count_per_effect",
    "moved_l2",
    "effective_moved",
    "clean",
)
"""The paper's primary targets, and the score that screens."""

SAES = ("topk-512", "standard-512", "jumprelu-512", "topk-256", "topk-1024")
"""Three architectures, and one of them at three widths."""

OTHER_STRENGTH = 8.0
GRADIENT_CONTEXTS = 256
OURS = (
    "full_no_magnitude",
    "full_with_curvature",
    "full_with_gradients",
    "curvature_only",
    "tangent_only",
)
"""The paper's full set, and sets with predictors from gradients."""
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """A dictionary under study, with the one behind it, and where contexts come from."""

    model: str
    sae: str
    downstream: str
    texts: str | None = None
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def jobs() -> Iterator[Job]:
    from sae_steering_plugin.organisms import list_organisms
    from sae_steering_plugin.runs.screen_job import downstream_word

    for model in list_organisms():
        for kind in SAES:
            word = f"l2-{kind}"
            yield Job(model, word, downstream_word(model, word), name=f"{model} {word}")
    data = Path(os.environ.get("SAE_STEERING_DATA", ROOT.parent / "shared" / "data"))
    model = data / "stories260k"
    stories = data / "tinystories" / "train.jsonl"
    if model.is_dir() and stories.is_file():
        saes = data / "saes-stories260k"
        for kind in ("topk", "standard", "jumprelu"):
            yield Job(
                str(model),
                str(saes / f"l2-resid-post-{kind}"),
                str(saes / "l3-resid-post-topk"),
                texts=str(stories),
                name=f"stories260k l2-resid-post-{kind}",
            )


@dataclass(frozen=True, eq=False)
class Measured:
    """A dictionary with its contexts, features, statistics of all of them, and labels."""

    subject: Any
    later: Any
    tokens: Any
    fresh: Any
    survey: Any
    features: Any
    table: Any
    labels: Any
    size: int

    def again(self, tokens: Any, **options: Any) -> Any:
        """Labels of the same features on these contexts."""
        from sae_steering_plugin.runs.side_effects import measure_side_effects

        return measure_side_effects(
            self.subject.model,
            self.subject.sae,
            self.features,
            tokens,
            downstream=self.later,
            progress=False,
            **options,
        )


def measured(job: Job, *, quick: bool) -> Measured:
    from sae_steering_plugin.runs.feature_statistics import feature_statistics
    from sae_steering_plugin.runs.screen_job import Sizes, contexts_for, open_downstream
    from sae_steering_plugin.runs.side_effects import sample_features, survey_contexts
    from sae_steering_plugin.runs.subject import open_subject

    sizes = Sizes(192, 64, 60, 8, 24) if quick else Sizes(768, 128, 150, 20)
    subject = open_subject(job.model, job.sae)
    sae = subject.sae
    later = open_downstream(subject, job.downstream, device="cpu", dtype="float32")
    tokens, fresh = contexts_for(subject, sizes, texts=job.texts)
    survey = survey_contexts(subject.model, sae, tokens, downstream=later, progress=False)
    features = sample_features(survey, sizes.features)
    table = feature_statistics(subject.model, sae, tokens, progress=False)
    found = Measured(subject, later, tokens, fresh, survey, features, table, None, sizes.group)
    labels = found.again(tokens, survey=survey, strengths=(1.0, OTHER_STRENGTH), controls=1)
    return replace(found, labels=labels)


def studied(job: Job, *, quick: bool) -> dict[str, Any]:
    """Everything that is reported of one dictionary."""
    from sae_steering_plugin.prediction import CONTROLS
    from sae_steering_plugin.runs.screening import screen

    started = time.perf_counter()
    found = measured(job, quick=quick)
    tokens, table, labels = found.tokens, found.table, found.labels
    half = len(tokens) // 2
    halves = [found.again(part).of().table for part in (tokens[:half], tokens[half:])]
    main = labels.of(1.0)
    screened = screen(
        found.subject.model,
        found.subject.sae,
        tokens,
        found.fresh,
        downstream=found.later,
        features=found.features,
        statistics=table,
        size=found.size,
        progress=False,
    )
    return {
        "name": job.name,
        "features": len(found.features),
        "contexts": len(tokens),
        "fresh": len(found.fresh),
        "residual_norm": found.survey.mean_norm,
        "row_norm": float(main.table["displacement"].median()),
        "medians": {
            arm: {t: float(labels.of(1.0, arm=arm).table[t].median()) for t in TARGETS[:-1]}
            for arm in ("feature", "random 1")
        },
        "reproducibility": reproducibility(*halves),
        "forecasts": [
            *compared(table, main, "feature, strength 1"),
            *compared(table, main, "feature, strength 1", controls=CONTROLS),
            *compared(table, labels.of(OTHER_STRENGTH), f"feature, strength {OTHER_STRENGTH:g}"),
            *compared(table, labels.of(1.0, arm="random 1"), "random direction, strength 1"),
        ],
        "partial": partials(table, main),
        "axes": list(screened.axes),
        "differences": list(screened.rows),
        "screen": dict(screened.groups.settings),
        "gradients": with_gradients(found),
        "seconds": time.perf_counter() - started,
    }


def with_gradients(found: Measured) -> dict[str, Any]:
    """Do predictors from gradients (ours) add to the paper's? CV Spearman and the difference to the
    full set without them, per label and arm, and the held-out screen that the tangent ones make."""
    from sae_steering_plugin import gradient_statistics
    from sae_steering_plugin.prediction import CONTROLS, cross_validate, difference
    from sae_steering_plugin.runs.screening import screen

    gradients = gradient_statistics(
        found.subject.model, found.subject.sae, found.tokens[:GRADIENT_CONTEXTS], progress=False
    )
    table = found.table.join(gradients)
    rows = []
    for arm, labels, controls in (
        ("strength 1", found.labels.of(1.0), ()),
        ("strength 1, residual", found.labels.of(1.0), CONTROLS),
        (f"strength {OTHER_STRENGTH:g}", found.labels.of(OTHER_STRENGTH), ()),
        ("random direction", found.labels.of(1.0, arm="random 1"), ()),
    ):
        for target in ("stability_abs", "effect", "count_0.05", "count_per_effect", "clean"):
            if target == "effect" and controls:
                continue  # the effect is one of the controls
            sets = {
                name: cross_validate(table, labels, target, columns=name, controls=controls)
                for name in OURS
            }
            base = sets[OURS[0]]
            gaps = {name: difference(sets[name], base) for name in OURS[1:]}
            rows.append(
                {
                    "arm": arm,
                    "target": target,
                    "sets": {n: [one.spearman, one.low, one.high] for n, one in sets.items()},
                    "gaps": {n: [g.difference, g.low, g.high] for n, g in gaps.items()},
                }
            )
    screened = screen(
        found.subject.model,
        found.subject.sae,
        found.tokens,
        found.fresh,
        downstream=found.later,
        features=found.features,
        statistics=table,
        columns="tangent_only",
        size=found.size,
        progress=False,
    )
    return {"rows": rows, "axes": list(screened.axes), "differences": list(screened.rows)}


def reproducibility(one: Any, other: Any) -> dict[str, float]:
    """Rank correlation of each label with itself on disjoint contexts."""
    from sae_steering_plugin.prediction import spearman
    from sae_steering_plugin.prediction.predictors import label_values

    found = {}
    for target in TARGETS:
        a, b = (label_values(table, target) for table in (one, other))
        kept = (a == a) & (b == b)
        found[target] = spearman(a[kept], b[kept])
    return found


def compared(
    table: Any, labels: Any, arm: str, *, controls: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Cross-validated Spearman of the three sets and the differences, per target."""
    from sae_steering_plugin.prediction import cross_validate, difference
    from sae_steering_plugin.prediction.sets import PRIMARY

    for target in TARGETS:
        found = {
            name: cross_validate(table, labels, target, columns=name, controls=controls)
            for name in PRIMARY
        }
        full, *others = (found[name] for name in PRIMARY)
        trees = cross_validate(
            table, labels, target, columns=PRIMARY[0], controls=controls, model="trees", resamples=0
        )
        yield {
            "arm": arm,
            "target": target,
            "residual": bool(controls),
            "n": full.n,
            "trees": trees.spearman,
            "sets": {
                name: [one.spearman, one.low, one.high, one.spearman_mean]
                for name, one in found.items()
            },
            "differences": {
                name: [gap.difference, gap.low, gap.high]
                for name, gap in zip(
                    PRIMARY[1:], (difference(full, one) for one in others), strict=True
                )
            },
        }


def partials(table: Any, labels: Any) -> list[dict[str, Any]]:
    """Spearman of each predictor with each label, plain and given the controls, Holm per label."""
    import numpy as np

    from sae_steering_plugin.effects import holm
    from sae_steering_plugin.prediction import CONTROLS, association, spearman
    from sae_steering_plugin.prediction.sets import NO_MAGNITUDE

    rows = []
    for target in ("stability_abs", "count_0.05", "count_per_effect"):
        y = labels.table[target].to_numpy(np.float64)
        z = labels.table[list(CONTROLS)].to_numpy(np.float64)
        family = []
        for name in NO_MAGNITUDE:
            x = table.table.loc[labels.table.index, name].to_numpy(np.float64)
            kept = np.isfinite(x) & np.isfinite(y) & np.isfinite(z).all(axis=1)
            plain = spearman(x[kept], y[kept])
            partial = association(x[kept], y[kept], z[kept], resamples=500)
            family.append(
                {"target": target, "predictor": name, "plain": plain, **partial.to_dict()}
            )
        defined = [row for row in family if row["p_value"] == row["p_value"]]
        for row, p in zip(defined, holm([row["p_value"] for row in defined]), strict=True):
            row["p_holm"] = float(p)
        rows += sorted(defined, key=lambda row: -abs(row["rho"]))[:3]
    return rows


# The page -----------------------------------------------------------------------------------------


def three(values: Sequence[float]) -> str:
    return f"{values[0]:+.2f} ({values[1]:+.2f} to {values[2]:+.2f})"


def page(found: Sequence[dict[str, Any]]) -> str:
    """The tables, as text that a reader of the repository sees."""
    lines = [
        "# Side effects: forecast against measured",
        "",
        "Written by `python -m benchmarks.forecast --json benchmarks/results/forecast.json --page "
        "docs/side_effects.md`; every figure is in that JSON file. Protocol: arXiv 2606.08365, "
        "strict (training statistics only). Strength 1 adds the raw decoder row at the last token. "
        "Intervals are 95 % bootstraps over features; CV is 5-fold, Spearman of pooled out-of-fold "
        "forecasts, ridge.",
        "",
        *in_short(found),
        "## What is studied, and how well labels repeat",
        "",
        "Reproducibility is the rank correlation of a label with itself on two disjoint halves of "
        'the contexts: no forecast can be expected to do better. It stands as "repeats" beside the '
        "correlations below.",
        "",
        "| dictionary | features | contexts | row / residual norm | stability | count | count per "
        "effect | clean | random direction: stability, count | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        again, drawn, own = (
            one["reproducibility"],
            one["medians"]["random 1"],
            one["medians"]["feature"],
        )
        lines.append(
            f"| {one['name']} | {one['features']} | {one['contexts']} | "
            f"{one['row_norm']:.2f} / {one['residual_norm']:.1f} | {again['stability_abs']:.2f} | "
            f"{again['count_0.05']:.2f} | {again['count_per_effect']:.2f} | {again['clean']:.2f} | "
            f"{drawn['stability_abs']:.2f} ({own['stability_abs']:.2f}), "
            f"{drawn['count_0.05']:.1f} ({own['count_0.05']:.1f}) | {one['seconds']:.0f} |"
        )
    lines += ["", "In brackets the median of the features themselves.", ""]
    for residual, words in (
        (False, "Cross-validated forecasts, before residualisation"),
        (
            True,
            "After residualisation on effect size, natural activation and firing rate (inside "
            "folds)",
        ),
    ):
        lines += [
            f"## {words}",
            "",
            "| dictionary | label | repeats | full, no magnitude | frequency only | magnitude only "
            "| full - frequency | full - magnitude | trees |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for one in found:
            for row in one["forecasts"]:
                if row["residual"] is residual and row["arm"] == "feature, strength 1":
                    sets, gaps = list(row["sets"].values()), list(row["differences"].values())
                    lines.append(
                        f"| {one['name']} | {row['target']} | "
                        f"{one['reproducibility'][row['target']]:.2f} | {three(sets[0])} | "
                        f"{sets[1][0]:+.2f} | {sets[2][0]:+.2f} | {three(gaps[0])} | "
                        f"{three(gaps[1])} | {row['trees']:+.2f} |"
                    )
        lines.append("")
    lines += [
        "## Controls: another strength, and random directions of equal length",
        "",
        "Full set, CV Spearman; the random direction is forecast from the statistics of the "
        "feature it stands beside, on the same contexts.",
        "",
        f"| dictionary | label | repeats | strength 1 | strength {OTHER_STRENGTH:g} | random "
        "direction |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        for target in ("stability_abs", "count_0.05", "count_per_effect", "clean"):
            cells = [
                three(next(iter(row["sets"].values())))
                for row in one["forecasts"]
                if row["target"] == target and not row["residual"]
            ]
            repeats = f"{one['reproducibility'][target]:.2f}"
            lines.append(f"| {one['name']} | {target} | {repeats} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Strongest single predictors given the controls",
        "",
        "| dictionary | label | repeats | predictor | Spearman | partial | p (Holm) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        for row in one["partial"]:
            lines.append(
                f"| {one['name']} | {row['target']} | "
                f"{one['reproducibility'][row['target']]:.2f} | {row['predictor']} | "
                f"{row['plain']:+.2f} | "
                f"{three([row['rho'], row['low'], row['high']])} | {row['p_holm']:.2g} |"
            )
    lines += [
        "",
        "## Held-out screening on fresh contexts",
        "",
        "| dictionary | axis | pool | forecast against measured | clean | random | messy | clean - "
        "messy, p (Holm) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        gaps = {r["metric"]: r for r in one["differences"] if r["groups"] == "clean - messy"}
        for row in one["axes"]:
            words = gap_words(gaps.get(row["label"]))
            lines.append(
                f"| {one['name']} | {row['axis']} | {row['n_features']} | "
                f"{three([row['spearman_heldout'], row['low'], row['high']])} | "
                f"{row['clean_mean']:.3f} | {row['random_mean']:.3f} | {row['messy_mean']:.3f} | "
                f"{words} |"
            )
    lines += ["", *gradient_section(found)]
    return "\n".join(lines)


def gap_words(gap: dict[str, Any] | None) -> str:
    if gap is None:
        return ""
    ends = f"({gap['low']:+.3f} to {gap['high']:+.3f})"
    return f"{gap['difference']:+.3f} {ends}, {gap['p_holm']:.2g}"


def gradient_section(found: Sequence[dict[str, Any]]) -> list[str]:
    """Predictors of our own beside the paper's full set."""
    told = [one for one in found if "gradients" in one]
    if not told:
        return []
    lines = [
        "## Predictors from gradients (ours, not the paper's)",
        "",
        "`gradient_statistics` reads gradients of clean passes, for all features at once and "
        "without a steered pass. Curvature: E (g . d)^2 with g the gradient of the log probability "
        "of a token drawn from the model (Fisher, for softmax the Gauss-Newton form, along the "
        "decoder row). Tangent: size and stability of the first-order logit shift J d, from 16 "
        f"random looks at the logits. {GRADIENT_CONTEXTS} of the label contexts; CV Spearman by "
        "ridge, and the difference to the full set without them.",
        "",
        "| dictionary | label | case | full | curvature alone | tangent alone | + curvature | "
        "+ curvature and tangent |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in told:
        for row in one["gradients"]["rows"]:
            sets, gaps = row["sets"], row["gaps"]
            lines.append(
                f"| {one['name']} | {row['target']} | {row['arm']} | "
                f"{sets[OURS[0]][0]:+.2f} | {sets['curvature_only'][0]:+.2f} | "
                f"{three(sets['tangent_only'])} | {three(gaps['full_with_curvature'])} | "
                f"{three(gaps['full_with_gradients'])} |"
            )
    lines += [
        "",
        "Held-out screens on fresh contexts, the same features and split, forecast by the tangent "
        "set alone (and by the full set, as below):",
        "",
        "| dictionary | axis | tangent: forecast against measured | full set | clean - messy by "
        "tangent, p (Holm) | by the full set |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in told:
        sides = (one["gradients"], one)
        gaps = [
            {r["metric"]: r for r in side["differences"] if r["groups"] == "clean - messy"}
            for side in sides
        ]
        for mine, full in zip(sides[0]["axes"], sides[1]["axes"], strict=True):
            rho = [three([r["spearman_heldout"], r["low"], r["high"]]) for r in (mine, full)]
            found_gaps = [gap_words(gap.get(mine["label"])) for gap in gaps]
            lines.append(
                f"| {one['name']} | {mine['axis']} | {rho[0]} | {rho[1]} | {found_gaps[0]} | "
                f"{found_gaps[1]} |"
            )
    return [*lines, ""]


def gradients_in_short(found: Sequence[dict[str, Any]]) -> list[str]:
    rows = [row for one in found for row in one.get("gradients", {}).get("rows", [])]
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        words = []
        for name in OURS[1:3]:
            up = sum(row["gaps"][name][1] > 0 for row in mine)
            down = sum(row["gaps"][name][2] < 0 for row in mine)
            words.append(f"{name} better in {up}, worse in {down} of {len(mine)}")
        lines.append(
            f"- Predictors from gradients beside the full set, {arm}: {', '.join(words)} "
            "(dictionary and label pairs whose interval excludes zero)."
        )
    return lines


def in_short(found: Sequence[dict[str, Any]]) -> list[str]:
    """What the tables below say, counted."""

    def counted(residual: bool, name: str) -> tuple[int, int]:
        rows = [
            row
            for one in found
            for row in one["forecasts"]
            if row["arm"] == "feature, strength 1" and row["residual"] is residual
        ]
        return sum(row["differences"][name][1] > 0 for row in rows), len(rows)

    def words(residual: bool) -> str:
        parts = []
        for name in ("freq_only", "activation_magnitude_only"):
            better, of = counted(residual, name)
            parts.append(f"{better} of {of} against `{name}`")
        return " and ".join(parts)

    kept = [
        row["sets"]["full_no_magnitude"][1] > 0
        for one in found
        for row in one["forecasts"]
        if row["residual"]
    ]
    left, of = sum(kept), len(kept)
    drawn = {
        target: [
            one["name"]
            for one in found
            for row in one["forecasts"]
            if row["arm"].startswith("random")
            and row["target"] == target
            and row["sets"]["full_no_magnitude"][1] > 0
        ]
        for target in ("stability_abs", "count_0.05", "clean")
    }
    drawn_words = "; ".join(
        f"{target} in {len(names)} of {len(found)} dictionaries"
        + (f" ({', '.join(names)})" if names else "")
        for target, names in drawn.items()
    )
    screens = [(one["name"], row) for one in found for row in one["axes"] if row["axis"] == "clean"]
    held = sum(row["low"] > 0 for _, row in screens)
    gaps = [
        r
        for one in found
        for r in one["differences"]
        if r["groups"] == "clean - messy" and r["metric"] in ("stability_abs", "count_per_effect")
    ]
    right = sum(
        (r["difference"] > 0) == (r["metric"] == "stability_abs") and r["p_holm"] < 0.05
        for r in gaps
    )
    return [
        "In short, counted over the tables below:",
        "",
        f"- The full set without magnitudes forecasts better, with an interval above zero, in "
        f"{words(False)} (dictionary and label pairs) before residualisation, and in {words(True)} "
        "after it.",
        f"- The screening score ranks held-out features on fresh contexts with an interval above "
        f"zero in {held} of {len(screens)} dictionaries; the clean group beats the messy one after "
        f"Holm in {right} of {len(gaps)} comparisons of stability and count per effect.",
        f"- After residualisation the full set's own interval stays above zero in {left} of {of} "
        "pairs; in the others nothing is shown beyond effect size, natural activation and firing "
        "rate.",
        f"- Random directions of equal length, forecast from the statistics of the feature beside "
        f"them, have an interval above zero for {drawn_words}. There a feature's forecast cannot "
        "be credited to its direction: row length (standard SAEs have rows of unequal length), the "
        "contexts, or chance would do.",
        "- A forecast is about one last token, one strength and one corpus, and about how far "
        "activations spread. It is no forecast of harm, and does not carry over to another "
        "dictionary.",
        *gradients_in_short(found),
        "",
    ]


def add_gradients(path: Path, only: str) -> None:
    """Measure the labels of the dictionaries in an earlier file again and add what gradients say.

    Labels, folds and seeds are those of the whole study, so the full set scores the same.
    """
    told = json.loads(path.read_text())
    known = {one["name"]: one for one in told["dictionaries"]}
    for job in jobs():
        if job.name in known and only in job.name:
            known[job.name]["gradients"] = with_gradients(measured(job, quick=False))
            path.write_text(json.dumps(told, indent=1) + "\n")
            print(job.name, flush=True)


def main() -> None:
    parser = studies.options("forecasts of side effects")
    parser.add_argument(
        "--gradients", action="store_true", help="only the gradient predictors, into --json FILE"
    )
    arguments = parser.parse_args()
    studies.quietly()
    if arguments.gradients:
        add_gradients(arguments.json, arguments.only or "")
        return
    named = ((job.name, partial(one_record, job, arguments.quick)) for job in jobs())
    studies.run(arguments, named, page, "docs/side_effects.md")


def one_record(job: Job, quick: bool) -> list[dict[str, Any]]:
    return [studied(job, quick=quick)]


if __name__ == "__main__":
    main()
