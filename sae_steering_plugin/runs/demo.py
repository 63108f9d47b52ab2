"""The main job: build one trait's vectors in several ways, prove what they do, keep the records.

On an embedded organism the proof is agent rollouts on held-out scenarios. On any other model, with
a contrast file, it is next-token probabilities on held-out pairs. Either way the strength is chosen
on validation items and reported on test items, all methods are applied at the same displacement,
and random directions of that length stand beside them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sae_steering_plugin.directions import score_table
from sae_steering_plugin.runs.canonical import finite
from sae_steering_plugin.runs.collect import collect_contrast, encode_labelled
from sae_steering_plugin.runs.contrast_files import ContrastFile, read_contrast_file
from sae_steering_plugin.runs.contrast_outcomes import outcome_word, run_contrast
from sae_steering_plugin.runs.contrast_split import first_pairs, split_contrast
from sae_steering_plugin.runs.demo_screen import demo_screen
from sae_steering_plugin.runs.demo_stages import (
    BASE,
    PROBE,
    SAS,
    Budget,
    Results,
    build_vectors,
    ranked_features,
    run_stages,
    shift,
    sparse_arm,
)
from sae_steering_plugin.runs.environment import versions
from sae_steering_plugin.runs.rollouts import Arm, run_rollouts
from sae_steering_plugin.runs.subject import Subject, one_thread, open_subject, world_contrast
from sae_steering_plugin.runs.transcripts import Rollouts, transcript_pairs
from sae_steering_plugin.types import (
    ALL,
    DECODE,
    PREFILL,
    Contrast,
    Effect,
    Labelled,
    Selection,
    SteeringVector,
)


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


# Agents -----------------------------------------------------------------------------------------


def agent_job(subject: Subject, trait: str, *, seed: int, budget: Budget, progress: bool) -> Demo:
    """The main job on an organism: rollouts on held-out scenarios of its world, on one thread."""
    with one_thread():
        return agent_evidence(subject, trait, seed=seed, budget=budget, progress=progress)


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
