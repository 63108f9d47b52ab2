"""What does choosing by forecast buy? Equally good features of the world's concepts, steered.

`python -m benchmarks.forecast_choice [--quick] [--json FILE] [--page FILE] [--only NAME]`

Per dictionary: for each concept of an embedded agent's world, the features that tell its texts
apart as well as the best one (AUROC of mean-pooled codes on training wordings, within a margin).
A screen is fitted on *other* features (none of these is labelled). Among equals the cleanest
forecast, the best score, or any at random is taken; all equals are then steered on contexts that
neither selection nor forecast has seen, and the three ways are compared over concepts. Nothing
passes or fails: the figures are printed, written to the JSON file and, as tables, to the page.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks import studies

SAES = ("topk-512", "standard-512", "jumprelu-512", "topk-1024")
COLUMNS = {
    "full_no_magnitude": "the paper's predictors (full set without magnitudes)",
    "tangent_only": "gradients of clean passes (ours)",
}
WITHIN = 0.02
"""AUROC; about its standard error on the training texts at a prevalence of one in ten."""
CANDIDATES = 20
TEXTS = 900
SHOWN = ("stability_abs", "count_per_effect", "count", "effect")


class Unknown:
    """A forecaster that knows nothing: it lets a selection say which features are equally good."""

    def forecast_of(self, features: Sequence[int]) -> dict[int, float]:
        return dict.fromkeys(features, float("nan"))


def jobs() -> Iterator[tuple[str, str]]:
    from sae_steering_plugin.organisms import list_organisms

    for model in list_organisms():
        for kind in SAES:
            yield model, f"l2-{kind}"


def statements(n: int, seed: int = 0) -> tuple[list[str], dict[str, Any]]:
    """Statements of the world's training wordings, and 1/0 per concept."""
    import random

    import numpy as np

    from sae_steering_plugin.runs.axbench.world import drawn_statement, known_concepts

    rng = random.Random(f"forecast choice {seed}")
    rows = [drawn_statement(rng, "train") for _ in range(n)]
    labels = {
        f"{one.kind} {one.value}": np.array([float(one.holds(row)) for row in rows])
        for one in known_concepts()
    }
    return [row["text"] for row in rows], labels


def components(sets: Sequence[Sequence[int]]) -> list[int]:
    """A number per set; sets that share a feature, directly or through others, have one number."""
    number = list(range(len(sets)))
    owner: dict[int, int] = {}
    for i, features in enumerate(sets):
        for feature in features:
            old, new = number[i], number[owner.setdefault(feature, i)]
            number = [new if one == old else one for one in number]
    return number


def studied(model: str, word: str, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Everything that is reported of one dictionary, by predictor set."""
    from sae_steering_plugin import select_features
    from sae_steering_plugin.runs.screen_job import (
        Sizes,
        contexts_for,
        downstream_word,
        open_downstream,
    )
    from sae_steering_plugin.runs.subject import open_subject

    started = time.perf_counter()
    sizes = Sizes(192, 64, 60, 8) if quick else Sizes(512, 128, 150, 20)
    subject = open_subject(model, word)
    later = open_downstream(subject, downstream_word(model, word), device="cpu", dtype="float32")
    texts, labels = statements(300 if quick else TEXTS)
    found = select_features(
        subject.model,
        subject.sae,
        texts,
        labels,
        variant="interpretability",
        score="auroc",
        pooling="mean",
        support=20,
        candidates=CANDIDATES,
        k=CANDIDATES,
        screen=Unknown(),
        within=WITHIN,
        progress=False,
    )
    tokens, fresh = contexts_for(subject, sizes)
    for columns in COLUMNS:
        yield {
            "columns": columns,
            **chosen_by(columns, subject, later, found, tokens, fresh, sizes),
            "seconds": time.perf_counter() - started,
        }
        started = time.perf_counter()


def chosen_by(
    columns: str, subject: Any, later: Any, found: Any, tokens: Any, fresh: Any, sizes: Any
) -> dict[str, Any]:
    """What choosing by the forecast from these predictors gave."""
    import numpy as np

    from sae_steering_plugin.runs.forecast_choice import Equals, gain_rows, measured_gain
    from sae_steering_plugin.runs.screening import screen

    asked = {f for one in found.equals.values() for f in one.features}
    name = f"{subject.name} {subject.sae_name}"
    screened = screen(
        subject.model,
        subject.sae,
        tokens,
        fresh,
        downstream=later,
        n_features=sizes.features,
        without=sorted(asked),
        columns=columns,
        size=sizes.group,
        progress=False,
    )
    equals = [
        Equals(c, one.features, screened.forecast_of(one.features))
        for c, one in found.equals.items()
    ]
    gain = measured_gain(
        subject.model, subject.sae, equals, fresh, downstream=later, progress=False
    )
    table = gain.table
    sets = {one.concept: one.features for one in equals}
    linked = components([sets[c] for c in table["concept"]])
    clusters = [f"{name} {number}" for number in linked]
    test = {
        c: dict(zip(s.features, s.scores["test_auroc"], strict=True))
        for c, s in found.selections.items()
    }
    for way in ("forecast", "score"):
        table[f"test_auroc {way}"] = [
            test[c][f] for c, f in zip(table["concept"], table[f"by_{way}"], strict=True)
        ]
    (axis,) = (row for row in screened.axes if row["axis"] == "clean")
    return {
        "name": name,
        "concepts": len(equals),
        "several": len(table),
        "clusters": len(set(linked)),
        "n_equal": float(np.median(table["n_equal"])),
        "changed": int(table["changed"].sum()),
        "fitted": len(screened.groups.train),
        "forecast": [axis["spearman_heldout"], axis["low"], axis["high"]],
        "fresh": len(fresh),
        "rows": gain_rows(table, clusters=clusters),
        "table": table.assign(cluster=clusters).to_dict("records"),
    }


def pooled(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The comparison over the concepts of all dictionaries."""
    import pandas as pd

    from sae_steering_plugin.runs.forecast_choice import gain_rows

    table = pd.DataFrame([row for one in found for row in one["table"]])
    return gain_rows(table, clusters=table["cluster"].tolist())


def page(found: Sequence[dict[str, Any]]) -> str:
    """The tables, as text that a reader of the repository sees."""
    lines = [
        "# What choosing by forecast buys",
        "",
        "Written by `python -m benchmarks.forecast_choice --json "
        "benchmarks/results/forecast_choice.json --page docs/forecast_choice.md`; every figure is "
        "in that JSON file.",
        "",
        "For each concept of the world, several features of a dictionary tell its texts apart "
        f"equally well: their AUROC on {TEXTS} texts of the training wordings is within {WITHIN:g} "
        "of the best one's. A forecast fitted on the side effects of *other* features (their "
        "statistics need no steered pass) takes one of them; so does the best score; drawing one "
        "at random gives the mean over all. All were then steered (raw decoder row, last token) "
        f"on {found[0]['fresh']} contexts that neither selection nor forecast has seen. "
        "Differences are paired over concepts, with 95 % bootstrap intervals and sign-flip tests; "
        "concepts that share a feature are resampled and flipped together. Higher stability and "
        "fewer features moved per effect are cleaner.",
    ]
    for columns, words in COLUMNS.items():
        some = [one for one in found if one["columns"] == columns]
        if some:
            lines += ["", f"## Forecast from {words}", "", *compared(some)]
    lines += [
        "",
        "`count_per_effect` falls when the effect grows: read it beside `effect`. One last token, "
        "one strength, one corpus; cleaner means less activation spread, not less harm.",
        "",
    ]
    return "\n".join(lines)


def compared(found: Sequence[dict[str, Any]]) -> list[str]:
    """The tables of one predictor set and what they say."""
    lines = [
        "| dictionary | concepts with a choice | groups that share no feature | equal features, "
        "median | forecast took another than score | forecast fitted on | forecast against "
        "measured, pool |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        rho, low, high = one["forecast"]
        lines.append(
            f"| {one['name']} | {one['several']} of {one['concepts']} | {one['clusters']} | "
            f"{one['n_equal']:g} | {one['changed']} | {one['fitted']} | "
            f"{rho:+.2f} ({low:+.2f} to {high:+.2f}) |"
        )
    for other, words in (("random", "any of the equals"), ("score", "the best score")):
        lines += [
            "",
            f"### Cleanest forecast minus {words}",
            "",
            "| dictionary | " + " | ".join(name.replace("_", " ") for name in SHOWN) + " |",
            "| --- | " + " | ".join("---" for _ in SHOWN) + " |",
        ]
        for name, rows in [
            *((one["name"], one["rows"]) for one in found),
            ("**all dictionaries**", pooled(found)),
        ]:
            kept = {row["figure"]: row for row in rows if row["against"] == other}
            cells = [cell(kept[figure]) for figure in SHOWN]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, "", *reading(found)]


def cell(row: dict[str, Any]) -> str:
    return (
        f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}), "
        f"p {row['p_value']:.2g} [{row['other_mean']:.3f}]"
    )


def reading(found: Sequence[dict[str, Any]]) -> list[str]:
    """What the tables say, counted."""
    import numpy as np

    def better(row: dict[str, Any]) -> bool:
        up = row["figure"] == "stability_abs"
        return row["low"] > 0 if up else row["high"] < 0

    def worse(row: dict[str, Any]) -> bool:
        up = row["figure"] == "stability_abs"
        return row["high"] < 0 if up else row["low"] > 0

    lines = ["### Reading", "", "In brackets the mean of the other way.", ""]
    for other in ("random", "score"):
        parts = []
        for figure in ("stability_abs", "count_per_effect"):
            rows = [
                row
                for one in found
                for row in one["rows"]
                if row["against"] == other and row["figure"] == figure
            ]
            parts.append(
                f"{figure} is cleaner in {sum(map(better, rows))} and less clean in "
                f"{sum(map(worse, rows))} of {len(rows)} dictionaries"
            )
        lines.append(
            f"- Against {other}, with an interval on one side of zero: {'; '.join(parts)}."
        )
    table = [row for one in found for row in one["table"]]
    lost = np.array([row["test_auroc forecast"] - row["test_auroc score"] for row in table])
    lost = lost[np.isfinite(lost)]
    lines.append(
        f"- Price: the feature taken by forecast has a held-out AUROC {lost.mean():+.3f} against "
        f"the one taken by score (mean over {len(lost)} concepts; other wordings)."
    )
    whole = {(row["figure"], row["against"]): row for row in pooled(found)}
    for other in ("random", "score"):
        words = ", ".join(
            f"{figure} {row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
            for figure in SHOWN
            if (row := whole[figure, other])
        )
        lines.append(f"- All dictionaries together, against {other}: {words}.")
    count = whole["count", "random"]
    fewer = (
        "fewer" if count["high"] < 0 else "more" if count["low"] > 0 else "neither more nor fewer"
    )
    lines.append(
        f"- The features taken by forecast move {fewer} downstream features in number than the "
        "equals do on average; what changes per effect comes with the size of the effect."
    )
    return lines


def main() -> None:
    arguments = studies.options("what choosing by forecast buys").parse_args()
    studies.quietly()
    named = (
        (f"{model} {word}", partial(records, model, word, arguments.quick))
        for model, word in jobs()
    )
    studies.run(arguments, named, page, "docs/forecast_choice.md")


def records(model: str, word: str, quick: bool) -> list[dict[str, Any]]:
    return list(studied(model, word, quick=quick))


if __name__ == "__main__":
    main()
