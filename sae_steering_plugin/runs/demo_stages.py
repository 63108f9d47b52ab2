"""The stages of the main job, whatever its items are: vectors, strength, effects, controls.

Probe and strength are chosen on validation items; everything is reported on test items, at one
displacement, beside random directions of that length.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sae_steering_plugin.directions import (
    FiredCodes,
    diff_mean_vector,
    feature_vector,
    pca_vector,
    probe_vector,
    rank_features,
    sas_vector,
)
from sae_steering_plugin.edits import Add, SparseAdd
from sae_steering_plugin.effects import compare, corrected
from sae_steering_plugin.runs.rollouts import Arm, random_vector
from sae_steering_plugin.runs.screen_job import Sizes
from sae_steering_plugin.runs.subject import Subject
from sae_steering_plugin.types import (
    ALL,
    SMALLEST_NORM,
    Edit,
    Effect,
    Labelled,
    Positions,
    Selection,
    SteeringVector,
)


@dataclass(frozen=True)
class Budget:
    """How much the main job runs. Strengths are multiples of the mean residual norm at the site.

    All methods run on all `test` items at the chosen strength; `controls` random directions on the
    first `control_items` of them, the dose curve and the position rules on the first `curve_items`.
    `finer` is how many strengths are tried between the best of `strengths` and the next larger one,
    where validity usually breaks. `screen` is how much the forecast of side effects runs.
    """

    pairs: int = 400
    validation: int = 50
    test: int = 200
    controls: int = 10
    control_items: int = 40
    curve_items: int = 30
    strengths: tuple[float, ...] = (0.15, 0.25, 0.35, 0.5, 0.65, 0.8)
    finer: int = 2
    valid: float = 0.95
    max_new_tokens: int = 64
    max_turns: int = 5
    batch_size: int = 128
    screen: Sizes = Sizes(contexts=256, fresh=64, features=100, group=10)


BASE = "unsteered"


PROBE = "decoded probe"
"""The decoded probe that the validation items chose among those of `PROBE_KINDS`."""


PROBE_KINDS = {
    "decoded probe (ridge)": "ridge",
    "decoded probe (mean difference)": "mean_difference",
}
"""Read-outs that are tried. Held-out R2 does not choose between them: it says which one reads the
label best, and arXiv 2603.16335 (code) found that this is not the one that steers best."""


SAS = "SAS"
"""The method: sparse codes, added through the SAE."""


SAS_DENSE = "SAS, decoded"


FEATURE = "single feature"


DIFF_MEAN, PCA = "DiffMean", "PCA"


def ranked_features(codes: FiredCodes, labelled: Labelled, *, trait: str, seed: int) -> Selection:
    """The features that are larger on the positive side, best first. ValueError without any."""
    selection = rank_features(codes, labelled.labels, labelled.groups, concept=trait, seed=seed)
    if not selection.features:
        raise ValueError(
            f"no feature of this SAE is larger on the positive side of {labelled.name!r}: check "
            "the contrast set, the site and the SAE"
        )
    return selection


def build_vectors(
    labelled: Labelled,
    sae: Any,
    codes: FiredCodes,
    selection: Selection,
    *,
    trait: str,
    seed: int,
) -> dict[str, SteeringVector]:
    """The vectors of one trait from the same examples, by method; `selection` says which feature.

    A construction that finds nothing (an empty SAS vector) is left out with a warning.
    """
    made = {
        **{
            name: probe_vector(
                labelled, sae, probe=kind, codes=codes, label=f"{trait} {kind} probe", seed=seed
            )
            for name, kind in PROBE_KINDS.items()
        },
        SAS: first_sas_vector(labelled, sae, codes, label=f"{trait} SAS", seed=seed),
        FEATURE: feature_vector(
            sae,
            selection.features[0],
            labelled=labelled,
            label=f"{trait} feature {selection.features[0]}",
        ),
        DIFF_MEAN: diff_mean_vector(labelled, label=f"{trait} DiffMean", seed=seed),
        PCA: pca_vector(labelled, label=f"{trait} PCA", seed=seed),
    }
    return {name: one for name, one in made.items() if usable(name, one)}


TAUS = (0.7, 0.6, 0.5, 0.4, 0.3)
"""Activation frequencies tried for SAS, strictest first; the papers use 0.7."""


def first_sas_vector(
    labelled: Labelled, sae: Any, codes: FiredCodes, *, label: str, seed: int
) -> SteeringVector:
    """The SAS vector at the strictest frequency of `TAUS` that leaves a latent to raise.

    A vector of negative entries alone can only suppress latents that fire anyway, so it cannot be
    brought to a given displacement; the last of `TAUS` is taken when there is nothing to raise.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no latent is left at tau")
        for tau in TAUS:
            vector = sas_vector(labelled, sae, tau=tau, codes=codes, label=label, seed=seed)
            if vector.codes is not None and bool((vector.codes.values > 0).any()):
                break
    return vector


def usable(name: str, vector: SteeringVector) -> bool:
    if vector.norm > SMALLEST_NORM:
        return True
    warnings.warn(f"the {name} vector is empty and is left out", stacklevel=2)
    return False


def shift(
    name: str,
    vector: SteeringVector,
    strength: float,
    mean_norm: float,
    *,
    positions: Positions = ALL,
    trait: str = "",
    method: str = "",
) -> Arm:
    """An arm that moves the residual by `strength` mean norms along `vector`."""
    edit = Edit(
        Add(vector, strength=strength * mean_norm, unit="unit"), vector.hook_name, positions
    )
    return Arm(
        f"{name} {strength:+g} {positions}",
        (edit,),
        method=method or name,
        strength=float(strength),
        unit="norm",
        positions=str(positions),
        displacement=abs(strength),
        trait=trait,
    )


def sparse_arm(
    subject: Subject,
    vector: SteeringVector,
    texts: Sequence[str],
    strength: float,
    mean_norm: float,
    *,
    trait: str,
) -> Arm | None:
    """SAS through the SAE, its lambda set so that the mean displacement on `texts` is `strength`.

    None when the SAE's nonlinearity does not let the residual move that far.
    """
    wanted = strength * mean_norm
    factor, reached = matching_strength(subject, vector, texts, wanted)
    if factor is None:
        return None
    edit = Edit(SparseAdd(subject.sae, vector, factor), vector.hook_name, ALL)
    return Arm(
        f"{SAS} {strength:+g} {ALL}",
        (edit,),
        method=SAS,
        strength=float(strength),
        unit="norm",
        positions=str(ALL),
        displacement=reached / mean_norm,
        trait=trait,
    )


def matching_strength(
    subject: Subject, vector: SteeringVector, texts: Sequence[str], wanted: float
) -> tuple[float | None, float]:
    """The lambda at which `SparseAdd` moves the residual of `texts` by `wanted` on average.

    Bisection to 2 % on the measured mean change; the second number is the change reached.
    """
    from sae_steering_plugin.adapters.activations import bos_policy, encode_texts, padded
    from sae_steering_plugin.adapters.steering import steer

    model = subject.model
    encoded = encode_texts(model, texts, prepend_bos=bos_policy(model, subject.sae))
    batch = padded(model, encoded)
    device = next(model.parameters()).device

    def change(factor: float) -> float:
        edit = Edit(SparseAdd(subject.sae, vector, factor), vector.hook_name, ALL)
        with torch.no_grad(), steer(model, edit) as record:
            model(batch.tokens.to(device), attention_mask=batch.real.long().to(device))
        return float(record.edits[0].mean_change)

    low, high = 0.0, 1.0
    while change(high) < wanted:
        low, high = high, high * 2
        if high > 1024:
            return None, math.nan
    for _ in range(12):
        middle = (low + high) / 2
        reached = change(middle)
        if abs(reached - wanted) <= 0.02 * wanted:
            return middle, reached
        low, high = (middle, high) if reached < wanted else (low, middle)
    return high, change(high)


Results = Mapping[str, Any]
"""Arm name -> an arm's results, as `effects.compare` takes them."""


Run = Callable[[str, Sequence[Arm], int | None], Results]
"""(split, arms, how many of its items) -> results."""


def effects_of(
    results: Results, arms: Iterable[Arm], *, outcome: str, seed: int, base: Any = None
) -> list[Effect]:
    """Each arm against the unsteered one on the same items, uncorrected."""
    unsteered = results[BASE] if base is None else base
    return [
        compare(
            unsteered,
            results[arm.name],
            outcome=outcome,
            sign=1 if arm.strength >= 0 else -1,
            seed=seed,
        )
        for arm in arms
    ]


def chosen_effect(effects: Sequence[Effect], *, valid: float) -> Effect:
    """The largest effect that clears the valid rate `valid` by a standard error.

    A rate seen on few items is uncertain: without the margin, the strength that just passes on
    validation items fails on test items about half of the time. When none clears it, the most valid
    one, so that the report can say so.
    """
    fit = [
        one
        for one in effects
        if not one.valid_rate < valid + math.sqrt(valid * (1 - valid) / one.n)
    ]
    if not fit:
        return max(effects, key=lambda one: (one.valid_rate, -abs(one.strength)))
    return max(fit, key=lambda one: one.d)


def strengths_above(chosen: float, grid: Sequence[float], n: int) -> list[float]:
    """`n` strengths that divide the gap between `chosen` and the next larger one of `grid`."""
    larger = [s for s in grid if s > chosen]
    if not larger:
        return []
    gap = (min(larger) - chosen) / (n + 1)
    return [round(chosen + gap * (i + 1), 4) for i in range(n)]


@dataclass(frozen=True, eq=False)
class Stages:
    """The effects of all stages, the vectors with the chosen probe first, the test results."""

    strength: float
    vectors: Mapping[str, SteeringVector]
    headline: tuple[Effect, ...]
    curve: tuple[Effect, ...]
    controls: tuple[Effect, ...]
    validation: tuple[Effect, ...]
    test: Results
    steered_name: str
    notes: tuple[str, ...]


def run_stages(
    run: Run,
    vectors: Mapping[str, SteeringVector],
    *,
    outcome: str,
    mean_norm: float,
    trait: str,
    seed: int,
    budget: Budget,
    curve_positions: Sequence[Positions],
    sparse: Callable[[float], Arm | None],
) -> Stages:
    """Choose probe and strength on validation items; report everything at it on test items."""
    notes: list[str] = []

    def arm(name: str, vector: SteeringVector, s: float, **options: Any) -> Arm:
        return shift(name, vector, s, mean_norm, trait=trait, **options)

    probes = {name: vectors[name] for name in PROBE_KINDS if name in vectors}
    if not probes:
        raise ValueError("no probe found a direction: the labels carry no signal in these codes")
    tried = [arm(name, probe, s) for name, probe in probes.items() for s in budget.strengths]
    results = run("validation", [Arm(BASE), *tried], None)
    coarse = effects_of(results, tried, outcome=outcome, seed=seed)
    at_best = chosen_effect(coarse, valid=budget.valid)
    between = [
        arm(at_best.method, vectors[at_best.method], s)
        for s in strengths_above(at_best.strength, budget.strengths, budget.finer)
    ]
    refined = run("validation", [Arm(BASE), *between], None) if between else {}
    fine = effects_of(refined, between, outcome=outcome, seed=seed)
    validation = corrected([*coarse, *fine])
    at_best = chosen_effect(validation, valid=budget.valid)
    strength, probe = at_best.strength, vectors[at_best.method]
    vectors = {PROBE: probe, **{k: v for k, v in vectors.items() if k != at_best.method}}
    if at_best.valid_rate < budget.valid:
        notes.append(
            f"No strength kept {budget.valid:.0%} of the validation items valid; the most valid "
            f"one ({strength:g}) is reported."
        )
    through_sae = sparse(strength) if SAS in vectors else None
    if SAS in vectors and through_sae is None:
        notes.append(
            "SAS through the SAE cannot move the residual this far (its nonlinearity limits the "
            "change); only its decoded vector is compared."
        )
    methods = [
        arm(SAS_DENSE if name == SAS else name, vector, strength)
        for name, vector in vectors.items()
    ]
    main = run("test", [Arm(BASE), *methods], None)
    if through_sae is not None:
        # By itself: a shift is one addition for a whole batch, code edits are not.
        main = {**main, **run("test", [Arm(BASE), through_sae], None)}
        methods.insert(1, through_sae)
    headline = corrected(effects_of(main, methods, outcome=outcome, seed=seed))
    curve_arms = [
        arm(PROBE, probe, s, positions=rule)
        for rule in curve_positions
        for s in (-strength, *budget.strengths)
        if not (rule == ALL and s == strength)
    ]
    crowd = [
        replace(arm(f"random {i}", random_vector(probe, i), strength), method="random")
        for i in range(budget.controls)
    ]
    curve = run("test", [Arm(BASE), *curve_arms], budget.curve_items)
    random = run("test", [Arm(BASE), *crowd], budget.control_items) if crowd else {}
    return Stages(
        strength,
        vectors,
        headline,
        corrected(effects_of(curve, curve_arms, outcome=outcome, seed=seed)),
        tuple(effects_of(random, crowd, outcome=outcome, seed=seed)),
        validation,
        main,
        methods[0].name,
        tuple(notes),
    )
