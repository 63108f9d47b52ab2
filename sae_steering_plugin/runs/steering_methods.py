"""Every way to steer for a concept that AxBench compares, by name.

    fitted = find_method("diff_mean").fit(subject, ConceptData("pirate speech", texts, others))
    fitted.max_activation = 30.0
    with fitted.applied(), steer(model, fitted.edits(0.8)):
        ...

A fitted method steers by edits, by a prompt, or by weights, and detects where it can. Good
detection is not good steering, and the reverse (AxBench: the probe is second of twelve at
detection and eleventh at steering).
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from .tuned import dense, features, loreft, prompts, supervised, vectors, weights
from .tuned.records import ConceptData, Fitted, SteeringMethod

METHODS: dict[str, SteeringMethod] = {
    one.name: one
    for one in (
        SteeringMethod("diff_mean", dense.diff_mean),
        SteeringMethod("pca", dense.pca, dense.Component()),
        SteeringMethod("lat", dense.lat, dense.Component()),
        SteeringMethod("probe", dense.probe, dense.ProbeSettings()),
        SteeringMethod("ssv", vectors.ssv, vectors.SSVSettings()),
        SteeringMethod("reft_r1", vectors.reft_r1, vectors.ReFTr1Settings()),
        SteeringMethod("loreft", loreft.loreft, loreft.LoReFTSettings()),
        SteeringMethod("lora", weights.lora, weights.LoRASettings()),
        SteeringMethod("prompt", prompts.prompt),
        SteeringMethod("sae_named", features.by_row("sae_named"), features.Chosen("name")),
        *(
            SteeringMethod(f"{word}{way}", build(f"{word}{way}"), features.Chosen(by))
            for word, by in (("sae", "label"), ("sae_auroc", "auroc"))
            for way, build in (
                ("", features.by_row),
                ("_clamp", features.by_clamp),
                ("_min_clamp", features.by_min_clamp),
            )
        ),
        *(
            SteeringMethod(word, supervised.supervised(word), settings)
            for word, settings in (
                ("supervised", supervised.SupervisedSettings()),
                ("supervised_detect", supervised.SupervisedSettings("interpretability")),
                ("supervised_output", supervised.SupervisedSettings(order="output")),
            )
        ),
        SteeringMethod(
            "supervised_chosen",
            supervised.supervised_chosen("supervised_chosen"),
            supervised.ChosenSettings(),
        ),
    )
}


def find_method(word: str, **settings: Any) -> SteeringMethod:
    """The method of that name, with some of its settings changed. Raises ValueError for an unknown
    word or setting, listing the known ones."""
    if word not in METHODS:
        near = get_close_matches(word, METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no method {word!r}; {hint}known are {', '.join(METHODS)}")
    return METHODS[word].having(**settings)


__all__ = ["METHODS", "ConceptData", "Fitted", "SteeringMethod", "find_method"]
