"""Feature tables with planted relations."""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_steering_plugin.prediction.sets import PREDICTOR_SETS
from sae_steering_plugin.types import FeatureTable

SAE = "topk@blocks.0.hook_resid_post#abc"


def statistics(n: int = 300, *, seed: int = 0, sae_id: str = SAE, **settings: Any) -> FeatureTable:
    """Independent normal columns of every set."""
    import pandas as pd

    rng = np.random.default_rng(seed)
    names = PREDICTOR_SETS["full_all"]
    table = pd.DataFrame(rng.normal(size=(n, len(names))), columns=list(names))
    return FeatureTable(table, sae_id, settings)


def effects(table: FeatureTable, *, seed: int = 1, noise: float = 0.3, **labels: Any) -> Any:
    """Labels of the features of `table`: independent ones unless given as arrays."""
    import pandas as pd

    rng = np.random.default_rng(seed)
    n = len(table.table)
    names = ("effect", "effect_cv", "stability_abs", "count_0.05", "natural_mean", "natural_max")
    found = {name: rng.uniform(1, 2, size=n) for name in (*names, "firing_rate")}
    for name, values in labels.items():
        found[name.replace("count_005", "count_0.05")] = np.asarray(values)
    frame = pd.DataFrame(found, index=table.table.index)
    return FeatureTable(frame, table.sae_id, {"strength": 1.0, "model_name": "tiny"})
