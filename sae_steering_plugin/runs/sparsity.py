"""Does a dictionary have to be sparse to steer? One layer, several dictionaries, same everything.

Firing frequency is itself sensitive to sparsity (a dense feature fires everywhere), so every
dictionary is scored with firing frequency *and* with mean activation; a trend that only one of them
shows is the pooling's. Source: shared/methods/supervised_feature_selection, sections 4.1 and 6.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sae_steering_plugin.adapters.sae_parts import architecture, site_names
from sae_steering_plugin.runs.pooled_codes import collect_codes
from sae_steering_plugin.runs.selection import select_features
from sae_steering_plugin.runs.splits import grouped_splits
from sae_steering_plugin.runs.validation import STRENGTHS, validate_selection

POOLINGS = ("frequency", "mean")


def sparsity_study(
    model: Any,
    saes: Mapping[str, Any],
    texts: Sequence[str],
    labels: Mapping[str, Any],
    prompts: Sequence[str],
    *,
    groups: Sequence[str] = (),
    poolings: Sequence[str] = POOLINGS,
    strengths: Sequence[float] = STRENGTHS,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """A row per dictionary and pooling: l0, selection and steering, with intervals over concepts.

    `auroc` is the held-out AUROC of the best feature per concept and `gain` what it adds to its
    lexicon's probability over random features of the same length; a concept without a feature
    counts 0.5 and 0. `_low` and `_high` are 95 % bootstrap intervals over concepts, and
    `gain_less_sparsest` the paired difference to the dictionary of least l0 with the same pooling.
    Splits, prompts, strengths and controls are the same throughout. `options` go to
    `select_features`. Raises ValueError for dictionaries of several sites.
    """
    sites = {site_names(sae) for sae in saes.values()}
    if len(sites) != 1:
        raise ValueError(f"one layer at a time: these dictionaries belong to {sorted(sites)}")
    splits = grouped_splits(texts, groups, seed=seed)
    found = []
    for name, sae in saes.items():
        pooled = collect_codes(model, sae, texts, poolings=("frequency",), progress=False)
        codes = pooled["frequency"]
        fired = codes.values.double() * codes.n_tokens[codes.examples]
        for pooling in poolings:
            selected = select_features(
                model, sae, texts, labels, splits=splits, pooling=pooling, k=1, seed=seed,
                progress=False, **options,
            )  # fmt: skip
            outcome = validate_selection(
                model, sae, selected, prompts, strengths=strengths, seed=seed, progress=progress
            )
            areas = [
                selected.selections[c].scores["test_auroc"][0] if c in selected.selections else 0.5
                for c in labels
            ]
            gains = [outcome.gains.get(c, 0.0) for c in labels]
            found.append(
                {
                    "sae": name,
                    "architecture": architecture(sae),
                    "width": int(sae.W_dec.shape[0]),
                    "l0": float(fired.sum() / codes.n_tokens.sum()),
                    "pooling": pooling,
                    "concepts": len(labels),
                    "with_feature": len(selected.selections),
                    "areas": np.array(areas),
                    "gains": np.array(gains),
                }
            )
    return [with_intervals(row, found, resamples, seed) for row in found]


def with_intervals(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], resamples: int, seed: int
) -> dict[str, Any]:
    """The row with means and bootstrap intervals in place of its values per concept."""
    sparsest = min((r for r in rows if r["pooling"] == row["pooling"]), key=lambda r: r["l0"])
    out = {key: value for key, value in row.items() if key not in ("areas", "gains")}
    columns = {
        "auroc": row["areas"],
        "gain": row["gains"],
        "gain_less_sparsest": row["gains"] - sparsest["gains"],
    }
    for name, values in columns.items():
        known = values[np.isfinite(values)]
        low, high = bootstrap_mean(known, resamples, seed)
        out |= {name: float(known.mean()), f"{name}_low": low, f"{name}_high": high}
    return out


def bootstrap_mean(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean over items."""
    drawn = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
