"""Which options select features that steer? Chosen on the validation split, by causal effect.

The prior of the calibrated F1, the pooling and the cut of the output score have no value that
carries over from one model or corpus to another. Every combination selects on the training split;
the features it finds are pushed on openings of validation texts, and the combination whose
features raise their concepts most is taken. Test texts and any other prompts are not touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sae_steering_plugin.effects.intervals import mean_interval
from sae_steering_plugin.runs.causal_scores import output_scores
from sae_steering_plugin.runs.pooled_codes import collect_codes
from sae_steering_plugin.runs.selection import (
    CANDIDATES,
    VARIANTS,
    SelectedFeatures,
    needed_poolings,
    select_features,
)
from sae_steering_plugin.runs.splits import checked_splits, grouped_splits
from sae_steering_plugin.runs.validation import STRENGTHS, validate_selection

GRID: Mapping[str, tuple[Any, ...]] = {
    "prior": (1e-3, 1e-2),
    "pooling": ("frequency", "mean"),
    "cut": (1e-3, 1e-2, 1e-1),
}
"""Options tried where none are named; the reported defaults stand first and win ties."""
OPENINGS = 24
READING = ("starts", "prepend_bos", "batch_size")
"""Options of `select_features` that say how texts are read."""


@dataclass(frozen=True, eq=False)
class OptionChoice:
    """The options that validation prefers, what they select, and every combination's figures.

    `rows` hold one combination each: its options, `with_feature` of `concepts`, the mean
    `validation_auroc` of the best features (0.5 for a concept without one), and `gain`, the mean
    over all concepts of what the best feature adds to its lexicon's probability over random
    features of the same length (0 for a concept without one), with a bootstrap interval.
    `without_lexicon` are concepts whose gain could not be measured; they count 0 everywhere.
    """

    options: Mapping[str, Any]
    selected: SelectedFeatures
    rows: tuple[Mapping[str, Any], ...]
    without_lexicon: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def table(self) -> Any:
        """The combinations as a pandas table, best first."""
        import pandas as pd

        return pd.DataFrame(list(self.rows)).sort_values("gain", ascending=False, kind="stable")


def choose_options(
    model: Any,
    sae: Any,
    texts: Sequence[str],
    labels: Any,
    grid: Mapping[str, Sequence[Any]] = GRID,
    *,
    groups: Sequence[str] = (),
    splits: Sequence[str] = (),
    prompts: Sequence[str] = (),
    strengths: Sequence[float] = STRENGTHS,
    controls: int = 5,
    seed: int = 0,
    progress: bool = True,
    **common: Any,
) -> OptionChoice:
    """The combination of `grid` whose features steer best on validation prompts.

    `grid` maps options of `select_features` to the values to try; `common` are its other options
    (`codes` too, where they are at hand).
    `prompts` default to the first halves of validation texts; pass others, and keep them out of
    whatever is reported later. Codes are read once and each (concept, feature) is measured once.
    The first of equal combinations is taken. Raises ValueError for an empty grid, for an option
    that stands in both, and what `select_features` and `validate_selection` raise.
    """
    listed = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not grid or not listed:
        raise ValueError("the grid names no option to choose")
    if twice := sorted(set(grid) & set(common)):
        raise ValueError(f"{twice[0]!r} is both in the grid and given")
    given = checked_splits(texts, splits) if splits else grouped_splits(texts, groups, seed=seed)
    if not prompts:
        prompts = openings(
            [t for t, word in zip(texts, given, strict=True) if word == "validation"]
        )
    poolings = {str({**common, **one}.get("pooling", "frequency")) for one in listed}
    common = dict(common)
    codes = common.pop("codes", None) or collect_codes(
        model,
        sae,
        texts,
        poolings=needed_poolings(*sorted(poolings)),
        cut=common.get("cut_texts", False),
        progress=progress,
        **{name: common[name] for name in READING if name in common},
    )
    shared = {"splits": given, "codes": codes, "seed": seed, "progress": False}
    causal = causal_of_candidates(model, sae, texts, labels, listed, {**common, **shared})
    found = [
        select_features(
            model, sae, texts, labels, **{**common, **shared, **one, "k": 1, "causal": causal}
        )
        for one in listed
    ]
    gains, silent = measured_gains(
        model, sae, found, prompts, strengths=strengths, controls=controls, seed=seed
    )
    rows = tuple(
        row_of(options, selected, gains, seed)
        for options, selected in zip(listed, found, strict=True)
    )
    best = max(range(len(rows)), key=lambda i: (rows[i]["gain"], -i))
    about = {"prompts": len(prompts), "strengths": tuple(strengths), "controls": controls}
    return OptionChoice(listed[best], found[best], rows, silent, about)


def openings(texts: Sequence[str], n: int = OPENINGS) -> list[str]:
    """The first halves of texts, in words, each once: the first `n` of them."""
    halves = (" ".join(text.split()[: max(1, len(text.split()) // 2)]) for text in texts)
    return list(dict.fromkeys(halves))[:n]


def causal_of_candidates(
    model: Any,
    sae: Any,
    texts: Sequence[str],
    labels: Any,
    listed: Sequence[Mapping[str, Any]],
    common: Mapping[str, Any],
) -> Any:
    """Output scores of every candidate of any combination; None where none asks for them."""
    asking = [one for one in listed if VARIANTS[{**common, **one}.get("variant", "full")]]
    if not asking:
        return None
    features: set[int] = set()
    detection = ("prior", "pooling", "score", "candidates")
    seen = {tuple((n, v) for n, v in one.items() if n in detection) for one in asking}
    for chosen in sorted(seen, key=str):
        options = {**common, **dict(chosen), "variant": "interpretability", "order": "score"}
        k = options.get("candidates", CANDIDATES)
        selected = select_features(model, sae, texts, labels, **{**options, "k": k})
        features |= {f for s in selected.selections.values() for f in s.features}
    if not features:
        return None
    names = {
        "prompt": "prompt",
        "strength": "strength",
        "lens_k": "k",
        "prepend_bos": "prepend_bos",
    }
    own = {to: common[name] for name, to in names.items() if name in common}
    return output_scores(model, sae, sorted(features), progress=False, **own)


def measured_gains(
    model: Any,
    sae: Any,
    found: Sequence[SelectedFeatures],
    prompts: Sequence[str],
    **options: Any,
) -> tuple[dict[tuple[str, int], float], tuple[str, ...]]:
    """The gain of every (concept, feature) that some combination prefers, each measured once, and
    concepts without a lexicon to measure by."""
    lexicon = {c: words for one in found for c, words in one.lexicon.items()}
    silent = tuple(c for c, words in lexicon.items() if not words)
    pairs: dict[str, dict[int, Any]] = {}
    for one in found:
        for concept, selection in one.selections.items():
            if concept not in silent:
                pairs.setdefault(concept, {}).setdefault(selection.features[0], one)
    gains: dict[tuple[str, int], float] = {}
    for place in range(max(map(len, pairs.values()), default=0)):
        picked = {c: list(own.items())[place] for c, own in pairs.items() if place < len(own)}
        merged = replace(
            found[0],
            selections={c: one.selections[c] for c, (_, one) in picked.items()},
            vectors={c: one.vectors[c] for c, (_, one) in picked.items()},
            lexicon=lexicon,
            missing={},
        )
        outcome = validate_selection(model, sae, merged, prompts, progress=False, **options)
        gains |= {(c, f): outcome.gains[c] for c, (f, _) in picked.items()}
    return gains, silent


def row_of(
    options: Mapping[str, Any],
    selected: SelectedFeatures,
    gains: Mapping[tuple[str, int], float],
    seed: int,
) -> dict[str, Any]:
    """One combination's figures over all concepts asked for."""
    first = {c: s.features[0] for c, s in selected.selections.items()}
    values = [gains.get((c, first.get(c, -1)), 0.0) for c in selected.concepts]
    areas = [
        selected.selections[c].scores["validation_auroc"][0] if c in first else 0.5
        for c in selected.concepts
    ]
    interval = mean_interval(values, seed=seed) if len(values) > 1 else None
    return {
        **options,
        "with_feature": len(first),
        "concepts": len(values),
        "validation_auroc": float(np.nanmean(areas)),
        "gain": float(np.mean(values)),
        "gain_low": float("nan") if interval is None else interval.low,
        "gain_high": float("nan") if interval is None else interval.high,
    }
