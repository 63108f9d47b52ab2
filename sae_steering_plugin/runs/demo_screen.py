"""The main job's screen: side effects forecast, used to choose a feature, and checked.

The features that separate a trait as well as the best one are kept out of the forecast's training
and of its pool; the one forecast to steer cleanest is taken, and all are steered on fresh contexts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..prediction.choice import cleanest_first, equally_good
from ..types import Selection
from .forecast_choice import Equals, measured_gain
from .screen_job import Sizes, contexts_for, downstream_word, open_downstream
from .screening import screen
from .subject import Subject

COLUMNS = "tangent_only"
"""The predictors that ranked unseen features best (docs/side_effects.md): gradients of clean
passes, for four seconds of the main job."""


@dataclass(frozen=True, eq=False)
class DemoScreen:
    """`axes` as in `Screen`; `selection` with the forecasts and the cleanest equal first; `choice`
    what each way of choosing was measured to give (empty when one feature stood alone)."""

    selection: Selection
    axes: tuple[dict[str, Any], ...] = ()
    choice: dict[str, Any] = field(default_factory=dict)


def one_error_below(selection: Selection) -> float:
    """The standard error of the best feature's standardised difference: (2/n + d^2/4n)^.5 for n
    rows a side. Features closer than that to the best are as good as it."""
    n, d = selection.settings["train_rows"] / 2, selection.scores["train_d"][0]
    return float((2 / n + d**2 / (4 * n)) ** 0.5)


def demo_screen(
    subject: Subject, selection: Selection, sizes: Sizes, *, seed: int, progress: bool
) -> DemoScreen:
    """Screen the agent's SAE and let the forecast choose among the best features of `selection`.

    Nothing is done for an SAE without a later one of the agent's own.
    """
    device, dtype = str(subject.sae.W_dec.device), str(subject.sae.dtype).removeprefix("torch.")
    try:
        word = downstream_word(subject.name, subject.sae_name)
    except ValueError:
        return DemoScreen(selection)
    later = open_downstream(subject, word, device=device, dtype=dtype)
    known, fresh = contexts_for(subject, sizes, seed=seed)
    within = one_error_below(selection)
    equal = equally_good(selection.features, selection.scores["train_d"], within=within)
    found = screen(
        subject.model,
        subject.sae,
        known,
        fresh,
        downstream=later,
        n_features=sizes.features,
        without=equal,
        columns=COLUMNS,
        size=sizes.group,
        seed=seed,
        progress=progress,
    )
    scores = found.forecast_of(selection.features)
    kept = {**selection.scores, "forecast_clean": tuple(scores[f] for f in selection.features)}
    order = cleanest_first(selection.features, equal, scores)
    place = [selection.features.index(feature) for feature in order]
    chosen = replace(
        selection,
        features=tuple(order),
        scores={name: tuple(values[i] for i in place) for name, values in kept.items()},
        settings={**selection.settings, "equally_good_within": within},
    )
    if len(equal) < 2:
        return DemoScreen(chosen, found.axes)
    gain = measured_gain(
        subject.model,
        subject.sae,
        [Equals(selection.concept, equal, {f: scores[f] for f in equal})],
        fresh,
        downstream=later,
        seed=seed,
        progress=progress,
    )
    (row,) = gain.table.to_dict("records")
    return DemoScreen(chosen, found.axes, {**row, "contexts": len(fresh), "within": within})


__all__ = ["DemoScreen", "demo_screen", "one_error_below"]
