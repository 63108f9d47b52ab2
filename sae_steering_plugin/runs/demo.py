"""The main job: build one trait's vectors in several ways, prove what they do, keep the records.

On an embedded organism the proof is agent rollouts on held-out scenarios. On any other model, with
a contrast file, it is next-token probabilities on held-out pairs. Either way the strength is chosen
on validation items and reported on test items, all methods are applied at the same displacement,
and random directions of that length stand beside them.
"""

from __future__ import annotations

import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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
    score_table,
)
from sae_steering_plugin.edits import Add, SparseAdd
from sae_steering_plugin.effects import compare, corrected
from sae_steering_plugin.runs.collect import collect_contrast, encode_labelled
from sae_steering_plugin.runs.contrast_files import ContrastFile, read_contrast_file
from sae_steering_plugin.runs.contrast_outcomes import outcome_word, run_contrast
from sae_steering_plugin.runs.demo_screen import demo_screen
from sae_steering_plugin.runs.rollouts import Arm, random_vector, run_rollouts
from sae_steering_plugin.runs.screen_job import Sizes
from sae_steering_plugin.runs.subject import Subject, open_subject, world_contrast
from sae_steering_plugin.runs.transcripts import Rollouts
from sae_steering_plugin.types import (
    ALL,
    DECODE,
    PREFILL,
    SMALLEST_NORM,
    Contrast,
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


@dataclass(frozen=True, eq=False)
class Demo:
    """Everything the main job found, before any of it is written.

    `headline` are all methods at the chosen strength, `curve` the decoded probe at every strength
    and position rule, `controls` the random directions, `validation` what the strength was chosen
    from. `examples` are (item, unsteered text, steered text); `rollouts` is None without scenarios.
    `side_effects` and `forecast_choice` are those of `demo_screen.DemoScreen`.
    """

    model: str
    sae: str
    trait: str
    outcome: str
    strength: float
    seed: int
    vectors: tuple[SteeringVector, ...]
    selection: Selection
    headline: tuple[Effect, ...]
    curve: tuple[Effect, ...]
    controls: tuple[Effect, ...]
    validation: tuple[Effect, ...]
    examples: tuple[tuple[str, str, str], ...]
    rollouts: Rollouts | None
    seconds: float
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    side_effects: tuple[dict[str, Any], ...] = ()
    forecast_choice: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Effect:
        """The decoded probe at the chosen strength on the test items."""
        return self.headline[0]

    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`: stable keys, no NaN."""
        return finite(
            {
                "versions": dict(self.versions),
                "seed": self.seed,
                "model": self.model,
                "sae": self.sae,
                "seconds": round(self.seconds, 1),
                "trait": self.trait,
                "outcome": self.outcome,
                "chosen_strength": self.strength,
                "dose_response": [row(one) for one in (*self.headline, *self.curve)],
                "controls": [row(one) for one in self.controls],
                "side_effects": list(self.side_effects),
                "forecast_choice": dict(self.forecast_choice),
                "selection": self.selection.rows(),
                "settings": dict(self.settings),
                "notes": list(self.notes),
            }
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write summary.json, tables as parquet and vectors/ into `folder`; the paths written."""
        import pandas as pd

        from sae_steering_plugin.adapters.sae_lens import SteeringDictionary

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "summary.json", folder / "effects.parquet", folder / "features.parquet"]
        text = json.dumps(self.summary(), indent=2, allow_nan=False, ensure_ascii=False)
        written[0].write_text(text + "\n", encoding="utf-8")
        stages = {
            "headline": self.headline,
            "curve": self.curve,
            "control": self.controls,
            "validation": self.validation,
        }
        rows = [
            {"stage": stage, **one.to_dict()} for stage, found in stages.items() for one in found
        ]
        pd.DataFrame(rows).to_parquet(written[1], index=False)
        pd.DataFrame(self.selection.rows()).to_parquet(written[2], index=False)
        if self.rollouts is not None:
            written.append(folder / "rollouts.parquet")
            self.rollouts.save(written[-1])
        dictionary = SteeringDictionary.from_vectors(self.vectors)
        dictionary.save_model(folder / "vectors")
        return [*written, folder / "vectors"]


def row(one: Effect) -> dict[str, Any]:
    """An effect as `summary.json` lists it."""
    return {
        "method": one.method,
        "trait": one.trait,
        "strength": one.strength,
        "positions": one.positions,
        "n": one.n,
        "effect_d": one.d,
        "ci_low": one.ci_low,
        "ci_high": one.ci_high,
        "p_value": one.p_value,
        "valid_rate": one.valid_rate,
        "p_adjusted": one.p_adjusted,
        "test": one.test,
        "outcome": one.outcome,
        "base_mean": one.base_mean,
        "arm_mean": one.arm_mean,
        "displacement": one.displacement,
    }


def finite(value: Any) -> Any:
    """`value` with null for every number JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_demo(
    *,
    model: str = "agent-gpt2",
    sae: str | None = None,
    contrast: str | Path | None = None,
    trait: str = "autonomy",
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    budget: Budget | None = None,
    allow_unbalanced_letters: bool = False,
    progress: bool = True,
) -> Demo:
    """The main job on an organism (agent rollouts), or on any model with a contrast file.

    Raises ValueError for a bad contrast file or options that do not fit, before a model is loaded.
    """
    started = time.perf_counter()
    budget = budget or Budget()
    file = None
    if contrast is not None:
        file = read_contrast_file(contrast, allow_unbalanced_letters=allow_unbalanced_letters)
        if len(set(file.groups)) < 3 and file.groups:
            raise ValueError(
                f"{contrast}: field 'group' names {len(set(file.groups))} groups; three are "
                "needed, for building, choosing the strength, and reporting"
            )
    else:
        require_organism(model)
    subject = open_subject(model, sae, device=device, dtype=dtype)
    if subject.sae is None:
        raise ValueError("the main job builds vectors in an SAE: pass --sae")
    if file is None:
        found = agent_job(subject, trait, seed=seed, budget=budget, progress=progress)
    else:
        found = contrast_job(subject, file, seed=seed, budget=budget, progress=progress)
    return replace(found, seconds=time.perf_counter() - started)


def require_organism(model: str) -> None:
    """Raise ValueError for a model without agent scenarios."""
    from sae_steering_plugin.organisms import list_organisms

    if model not in list_organisms():
        raise ValueError(
            f"{model!r} is not an embedded organism ({', '.join(list_organisms())}), so it needs "
            "texts to steer by: pass --contrast FILE"
        )


# Vectors ----------------------------------------------------------------------------------------


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


# Stages -----------------------------------------------------------------------------------------

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


# Agents -----------------------------------------------------------------------------------------


def agent_job(subject: Subject, trait: str, *, seed: int, budget: Budget, progress: bool) -> Demo:
    """The main job on an organism: rollouts on held-out scenarios of its world, on one thread."""
    with one_thread():
        return agent_evidence(subject, trait, seed=seed, budget=budget, progress=progress)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices of a small model are too small to share: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def agent_evidence(
    subject: Subject, trait: str, *, seed: int, budget: Budget, progress: bool
) -> Demo:
    """Vectors from training wordings, strength from validation scenarios, effects on test ones."""
    contrast = world_contrast(subject, trait, budget.pairs, split="train", seed=seed)
    labelled = collect_contrast(
        subject.model, contrast, subject.sae, batch_size=64, progress=progress
    )
    codes = encode_labelled(subject.sae, labelled)
    ranked = ranked_features(codes, labelled, trait=trait, seed=seed)
    screened = demo_screen(subject, ranked, budget.screen, seed=seed, progress=progress)
    selection = screened.selection
    vectors = build_vectors(labelled, subject.sae, codes, selection, trait=trait, seed=seed)
    sizes = {"validation": budget.validation, "test": budget.test}
    items = {
        split: subject.world.scenarios(n, split=split, seed=seed) for split, n in sizes.items()
    }
    known: dict[str, Rollouts] = {}

    def run(split: str, arms: Sequence[Arm], n: int | None) -> dict[str, Rollouts]:
        """Rollouts of the arms; the unsteered arm of a split runs once."""
        scenarios = items[split] if n is None else items[split][:n]
        wanted = {one.id for one in scenarios}
        fresh = [arm for arm in arms if arm.name != BASE or split not in known]
        if not fresh:
            return {}
        found = run_rollouts(
            subject.model,
            scenarios,
            arms=fresh,
            max_turns=budget.max_turns,
            max_new_tokens=budget.max_new_tokens,
            batch_size=budget.batch_size,
            seed=seed,
            progress=progress,
        )
        for arm in fresh:
            if arm.name == BASE:
                known[split] = found.arm(BASE)
        results = {arm.name: only(found.arm(arm.name), wanted) for arm in fresh}
        return {**results, BASE: only(known[split], wanted)}

    def sparse(strength: float) -> Arm | None:
        texts = contrast.positive[:8] + contrast.negative[:8]
        return sparse_arm(subject, vectors[SAS], texts, strength, labelled.mean_norm, trait=trait)

    stages = run_stages(
        run,
        vectors,
        outcome=trait if trait in OUTCOME_OF_TRAIT else "autonomy",
        mean_norm=labelled.mean_norm,
        trait=trait,
        seed=seed,
        budget=budget,
        curve_positions=(ALL, PREFILL, DECODE),
        sparse=sparse,
    )
    rollouts = joined(stages.test.values())
    return Demo(
        model=subject.name,
        sae=subject.sae_name,
        trait=trait,
        outcome=stages.headline[0].outcome,
        strength=stages.strength,
        seed=seed,
        vectors=tuple(stages.vectors.values()),
        selection=selection,
        headline=stages.headline,
        curve=stages.curve,
        controls=stages.controls,
        validation=stages.validation,
        examples=transcript_pairs(
            stages.test[BASE], stages.test[stages.steered_name], stages.headline[0].outcome
        ),
        rollouts=rollouts,
        seconds=0.0,
        versions=versions(),
        notes=stages.notes,
        settings=settings_of(budget, labelled, contrast, stages.vectors),
        side_effects=screened.axes,
        forecast_choice=screened.choice,
    )


OUTCOME_OF_TRAIT = ("autonomy", "tool_use", "persistence", "risk", "deference")


def only(rollouts: Rollouts, scenarios: set[str]) -> Rollouts:
    """The rollouts of the named scenarios."""
    kept = tuple(one for one in rollouts if one.scenario in scenarios)
    return replace(rollouts, rollouts=kept)


def joined(parts: Iterable[Rollouts]) -> Rollouts:
    """All arms in one record."""
    whole: Rollouts | None = None
    for one in parts:
        whole = one if whole is None else whole + one
    assert whole is not None
    return whole


EXAMPLES = 4


def transcript_pairs(
    base: Rollouts, arm: Rollouts, outcome: str
) -> tuple[tuple[str, str, str], ...]:
    """The first three scenarios whose outcome changed, then the first whose outcome did not."""
    before, after = base.table().set_index("scenario"), arm.table().set_index("scenario")
    changed = [s for s in before.index if before.loc[s, outcome] != after.loc[s, outcome]]
    same = [s for s in before.index if s not in set(changed)]
    texts = [{one.scenario: transcript(one.messages) for one in side} for side in (base, arm)]
    return tuple((s, texts[0][s], texts[1][s]) for s in [*changed[: EXAMPLES - 1], *same[:1]])


def transcript(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as a person reads it: one block per message, calls as name(arguments)."""
    blocks = []
    for one in messages:
        text = str(one.get("content") or "").strip()
        for call in one.get("tool_calls") or ():
            function = call["function"]
            given = ", ".join(f"{k}={v!r}" for k, v in function["arguments"].items())
            text += ("\n" if text else "") + f"-> {function['name']}({given})"
        name = f"{one['role']} {one['name']}" if one.get("name") else one["role"]
        blocks.append(f"[{name}] {text}")
    return "\n".join(blocks)


# Contrast files ---------------------------------------------------------------------------------


def contrast_job(
    subject: Subject, file: ContrastFile, *, seed: int, budget: Budget, progress: bool
) -> Demo:
    """The main job on any model: next-token probabilities on held-out pairs of the file."""
    whole = file.contrast(subject.render if file.chat else None)
    parts = split_contrast(whole, seed=seed)
    trait = file.name
    labelled = collect_contrast(subject.model, parts["train"], subject.sae, progress=progress)
    codes = encode_labelled(subject.sae, labelled)
    selection = ranked_features(codes, labelled, trait=trait, seed=seed)
    vectors = build_vectors(labelled, subject.sae, codes, selection, trait=trait, seed=seed)
    outcome = outcome_word(whole, chat=file.chat, answers=bool(file.answers))
    kept = {"validation": budget.validation, "test": budget.test}
    items = {split: first_pairs(parts[split], n) for split, n in kept.items()}
    bos = subject.sae.cfg.metadata.prepend_bos

    def run(split: str, arms: Sequence[Arm], n: int | None) -> Results:
        chosen = items[split] if n is None else first_pairs(items[split], n)
        return run_contrast(
            subject.model, chosen, arms, outcome=outcome, prepend_bos=bos, progress=progress
        )

    def sparse(strength: float) -> Arm | None:
        texts = parts["train"].positive[:8] + parts["train"].negative[:8]
        return sparse_arm(subject, vectors[SAS], texts, strength, labelled.mean_norm, trait=trait)

    stages = run_stages(
        run,
        vectors,
        outcome=outcome,
        mean_norm=labelled.mean_norm,
        trait=trait,
        seed=seed,
        budget=budget,
        curve_positions=(ALL,),
        sparse=sparse,
    )
    notes = (
        "Without agent scenarios the outcome is computed from next-token probabilities on held-out "
        f"pairs ({outcome}); nothing is sampled, so it says what steering does to the model's "
        "predictions, not what it would go on to do.",
        *stages.notes,
    )
    return Demo(
        model=subject.name,
        sae=subject.sae_name,
        trait=trait,
        outcome=outcome,
        strength=stages.strength,
        seed=seed,
        vectors=tuple(stages.vectors.values()),
        selection=selection,
        headline=stages.headline,
        curve=stages.curve,
        controls=stages.controls,
        validation=stages.validation,
        examples=continuations(
            subject,
            items["test"].negative,
            stages.vectors[PROBE],
            stages.strength,
            labelled.mean_norm,
        ),
        rollouts=None,
        seconds=0.0,
        versions=versions(),
        notes=notes,
        settings=settings_of(budget, labelled, whole, stages.vectors),
    )


SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


def split_contrast(contrast: Contrast, *, seed: int) -> dict[str, Contrast]:
    """Three parts that share no group, about 60, 20 and 20 % of the groups.

    Unpaired sets are split side by side by their own groups. Raises ValueError with fewer than
    three groups, or when a part lacks one side.
    """
    n, m = len(contrast.positive), len(contrast.negative)
    groups = contrast.groups or tuple(f"pair {i}" for i in range(n if contrast.paired else n + m))
    names = sorted(set(groups))
    if len(names) < 3:
        raise ValueError(f"{contrast.name!r} has {len(names)} groups; a split in three needs three")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, round(SHARES["test"] * len(names)))
    part = {names[i]: "test" if rank < held else "validation" if rank < 2 * held else "train"
            for rank, i in enumerate(order)}  # fmt: skip
    of_positive = groups[:n]
    of_negative = groups if contrast.paired else groups[n:]
    found = {}
    for split in SHARES:
        first = [i for i in range(n) if part[of_positive[i]] == split]
        second = [i for i in range(m) if part[of_negative[i]] == split]
        if not first or not second:
            raise ValueError(
                f"{contrast.name!r}: the {split} part lacks texts on one side; more groups needed"
            )
        found[split] = chosen(contrast, groups, first, second)
    return found


def chosen(
    contrast: Contrast, groups: Sequence[str], first: Sequence[int], second: Sequence[int]
) -> Contrast:
    """The named texts of both sides, with their groups and letters."""
    n = len(contrast.positive)
    named = [groups[i] for i in first]
    if not contrast.paired:
        named += [groups[n + i] for i in second]
    of_positive, of_negative = contrast.letters
    return replace(
        contrast,
        positive=tuple(contrast.positive[i] for i in first),
        negative=tuple(contrast.negative[i] for i in second),
        groups=tuple(named),
        letters=(
            tuple(of_positive[i] for i in first) if of_positive else (),
            tuple(of_negative[i] for i in second) if of_negative else (),
        ),
    )


def first_pairs(contrast: Contrast, n: int) -> Contrast:
    """The first n pairs (or the first n texts of each side)."""
    k, m = min(n, len(contrast.positive)), min(n, len(contrast.negative))
    groups = contrast.groups or ("",) * (
        len(contrast) if contrast.paired else len(contrast.positive) + len(contrast.negative)
    )
    return chosen(contrast, groups, range(k), range(m))


def continuations(
    subject: Subject,
    texts: Sequence[str],
    vector: SteeringVector,
    strength: float,
    mean_norm: float,
    *,
    n: int = 3,
    max_new_tokens: int = 32,
) -> tuple[tuple[str, str, str], ...]:
    """Greedy continuations of the first n held-out negative texts, unsteered and steered."""
    from sae_steering_plugin.adapters.engine import generate

    prompts = list(texts[:n])
    bos = subject.sae.cfg.metadata.prepend_bos
    arm = shift(PROBE, vector, strength, mean_norm)
    sides = [
        generate(
            subject.model, prompts, edits, max_new_tokens=max_new_tokens, prepend_bos=bos
        ).texts
        for edits in ((), arm.bound())
    ]
    return tuple(
        (f"pair {i}: {prompt}", before, after)
        for i, (prompt, before, after) in enumerate(zip(prompts, *sides, strict=True))
    )


# Provenance -------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """This package, its hosts and the interpreter."""
    names = ("sae-steering-plugin", "torch", "transformer-lens", "sae-lens", "transformers")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            from sae_steering_plugin import __version__

            found[name] = __version__ if name == "sae-steering-plugin" else "unknown"
    return found


def settings_of(
    budget: Budget,
    labelled: Labelled,
    contrast: Contrast,
    vectors: Mapping[str, SteeringVector],
) -> dict[str, Any]:
    """What the numbers depend on, for the report and `summary.json`."""
    return {
        "examples": len(labelled),
        "groups": len(set(labelled.groups)),
        "contrast": contrast.source,
        "hook_name": labelled.hook_name,
        "mean_residual_norm": labelled.mean_norm,
        "validation_items": budget.validation,
        "test_items": budget.test,
        "curve_items": budget.curve_items,
        "control_items": budget.control_items,
        "controls": budget.controls,
        "strengths": list(budget.strengths),
        "finer_strengths": budget.finer,
        "unit": "norm",
        "valid_floor": f"{budget.valid:g} and one standard error, on validation items",
        "max_turns": budget.max_turns,
        "max_new_tokens": budget.max_new_tokens,
        "interval": "95 % bootstrap over items",
        "correction": "Holm, within each family (headline, curve, validation)",
        "probe": vectors[PROBE].recipe.settings["probe"],
        "probe_scores": str(score_table(vectors[PROBE])),
    }
