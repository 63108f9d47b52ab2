"""Features to unlearn with: those that fire on what is to be forgotten and rarely elsewhere."""

from __future__ import annotations

import warnings

from sae_steering_plugin.types import FeatureTable, Selection

RETAIN_BELOW = (0.001, 0.01)
"""SAEBench's grid of the largest firing rate on the texts to retain."""
CHOSEN = (10, 20)
"""SAEBench's grid of how many features are taken."""


def forget_features(
    forget: FeatureTable,
    retain: FeatureTable,
    *,
    retain_below: float = RETAIN_BELOW[1],
    n: int = CHOSEN[1],
) -> Selection:
    """The `n` features that fire most often on the forget texts among those rare on the others.

    Both tables hold `token_act_freq` (`feature_statistics(..., families=("activation",))` of either
    set: integer counts over tokens without padding and BOS). Kept are features with a retain rate
    below `retain_below` that fire on the forget texts at all. Fewer than `n` warn, none are an
    empty selection. Raises ValueError for tables of two dictionaries, or without the column.
    Source: SAEBench's unlearning evaluation (code; the sets' token counts differ there as here).
    """
    if forget.sae_id.rpartition("#")[2] != retain.sae_id.rpartition("#")[2]:
        raise ValueError(
            f"one table is about {forget.sae_id!r} and the other about {retain.sae_id!r}"
        )
    for table in (forget, retain):
        if "token_act_freq" not in table.columns:
            raise ValueError(
                "a table lacks token_act_freq: make it with feature_statistics(model, sae, texts, "
                "families=('activation',))"
            )
    if n < 1 or not 0 < retain_below <= 1:
        raise ValueError(f"n is {n} and retain_below {retain_below}; give n >= 1 and a rate")
    rates = forget.table["token_act_freq"], retain.table["token_act_freq"]
    kept = rates[0][(rates[1] < retain_below) & (rates[0] > 0)]
    best = kept.sort_values(ascending=False, kind="stable").head(n)
    features = tuple(int(feature) for feature in best.index)
    if 0 < len(features) < n:
        warnings.warn(
            f"only {len(features)} of {n} features fire on the forget texts and at less than "
            f"{retain_below} of the retain tokens",
            stacklevel=2,
        )
    scores = {
        "forget_rate": tuple(float(rates[0][feature]) for feature in features),
        "retain_rate": tuple(float(rates[1][feature]) for feature in features),
    }
    settings = {"retain_below": retain_below, "n": n}
    return Selection(features, scores, "forget", forget.sae_id, settings)
