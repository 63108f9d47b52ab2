"""Names for features: the concept each one tells best, and by how much."""

from __future__ import annotations

import warnings
from collections import defaultdict

import numpy as np
import torch

from sae_steering_plugin.types import FeatureTable

from .scores import ScoreTable

SHOWN = 3


def label_features(table: ScoreTable, *, by: str | None = None) -> FeatureTable:
    """Each live feature with the concept it scores best for.

    Columns: feature, label, score, runner_up and confidence (score less the runner-up's; NaN with
    one concept), tau where the score has a threshold, and best_for: the concepts whose best feature
    it is. A feature that is best for several (synonyms, parent and child) is `shared`, and a
    warning names them. `by` is a score of the table, its first one by default. Equal scores go to
    the concept named first. Source: shared/methods/supervised_feature_selection, section 3.4.
    """
    import pandas as pd

    by = by or next(iter(table.values))
    scored = [c for c in table.concepts if c not in table.unscored]
    columns = [table.column(c) for c in scored]
    live = table.live.nonzero().flatten()
    values = table.scores(scored[0], by).values.new_empty((len(live), len(columns)))
    for i, concept in enumerate(scored):
        values[:, i] = table.scores(concept, by).values[live]
    best = values.argmax(1) if len(live) else torch.zeros(0, dtype=torch.long)
    ordered = values.sort(dim=1, descending=True).values
    several = len(scored) > 1
    winners: dict[int, list[str]] = defaultdict(list)
    for concept in scored:
        for feature in table.top(concept, by, 1):
            winners[feature].append(concept)
    shared = {feature: names for feature, names in winners.items() if len(names) > 1}
    frame = pd.DataFrame(
        {
            "feature": live.numpy(),
            "label": [scored[int(i)] for i in best],
            "score": ordered[:, 0].numpy(),
            "runner_up": [scored[int(i)] for i in _second(values)] if several else "",
            "confidence": (ordered[:, 0] - ordered[:, 1]).numpy() if several else np.nan,
            "best_for": ["; ".join(winners.get(int(f), ())) for f in live],
            "shared": [int(f) in shared for f in live],
        }
    )
    if table.tau is not None and by == "f1":
        frame["tau"] = [
            float(table.tau[f, columns[int(i)]]) for f, i in zip(live, best, strict=True)
        ]
    if shared:
        named = [f"{f}: {', '.join(names)}" for f, names in list(shared.items())[:SHOWN]]
        more = ", ..." if len(shared) > SHOWN else ""
        warnings.warn(
            f"{len(shared)} features are best for several concepts (synonyms, or a label that "
            f"contains another): {'; '.join(named)}{more}",
            stacklevel=2,
        )
    settings = {
        **table.settings,
        "by": by,
        "dead": table.n_dead,
        "unscored": dict(table.unscored),
        "shared": shared,
    }
    return FeatureTable(frame, table.sae_id, settings)


def _second(values: torch.Tensor) -> torch.Tensor:
    """The column of each row's second largest value, the first of equals."""
    first = values.argmax(1, keepdim=True)
    return values.scatter(1, first, -torch.inf).argmax(1)
