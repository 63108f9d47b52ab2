"""Every construction on one organism, at one displacement, on the same held-out scenarios.

Vectors come from the same training wordings, and each moves the residual by the same length, so the
table compares directions and nothing else; random directions of that length stand beside them.
Source of the rule: "comparisons between constructions are made at matched displacement", the common
acceptance check of shared/methods/other_sae_steering_constructions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_steering_plugin.directions import EffectMap, OutcomeCorrelation
from sae_steering_plugin.effects import corrected
from sae_steering_plugin.runs.collect import collect_contrast
from sae_steering_plugin.runs.construction import METHODS, construct_all
from sae_steering_plugin.runs.demo import require_organism
from sae_steering_plugin.runs.demo_stages import BASE, effects_of, shift
from sae_steering_plugin.runs.feature_effects import collect_effects
from sae_steering_plugin.runs.outcome_correlation import ScoredResponse, collect_outcomes
from sae_steering_plugin.runs.rollouts import Arm, random_vector, run_rollouts
from sae_steering_plugin.runs.subject import Subject, one_thread, open_subject, world_contrast
from sae_steering_plugin.runs.transcripts import PROXIES
from sae_steering_plugin.types import Effect, SteeringVector

CORPUS_TOKENS = 128
"""Longer texts are left out of the corpus on which strengths are matched."""


@dataclass(frozen=True)
class TableBudget:
    """How much the table runs. `vectors` are those whose effects on features are measured, from
    `prompts` continuations each (14 in arXiv 2411.02193); `outcomes` are unsteered rollouts that
    CorrSteer learns from."""

    pairs: int = 400
    items: int = 200
    controls: int = 10
    vectors: int = 128
    prompts: int = 14
    corpus: int = 6
    outcomes: int = 200
    new_tokens: int = 32
    batch_size: int = 128


@dataclass(frozen=True, eq=False)
class ConstructionTable:
    """Effects of all methods at one displacement (p values adjusted over them), and of random
    directions; `left_out` says why a method is missing."""

    model: str
    sae: str
    trait: str
    strength: float
    headline: tuple[Effect, ...]
    controls: tuple[Effect, ...]
    vectors: tuple[SteeringVector, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def compare_constructions(
    model: str = "agent-gpt2",
    sae: str | None = None,
    *,
    trait: str = "autonomy",
    methods: Sequence[str] = tuple(METHODS),
    strength: float = 0.35,
    budget: TableBudget | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ConstructionTable:
    """All named methods on an organism at `strength` mean residual norms.

    The strength is given, not chosen, so nothing is selected on the scenarios it is reported on.
    Raises ValueError for a model without scenarios or SAE and for a trait without an outcome.
    """
    budget = budget or TableBudget()
    require_organism(model)
    if trait not in PROXIES:
        raise ValueError(f"no outcome for trait {trait!r}; choose one of {', '.join(PROXIES)}")
    subject = open_subject(model, sae)
    if subject.sae is None:
        raise ValueError("constructions are built in an SAE: pass one")
    with one_thread():
        return _table(subject, trait, methods, strength, budget, seed, progress)


def _table(
    subject: Subject,
    trait: str,
    methods: Sequence[str],
    strength: float,
    budget: TableBudget,
    seed: int,
    progress: bool,
) -> ConstructionTable:
    contrast = world_contrast(subject, trait, budget.pairs, split="train", seed=seed)
    labelled = collect_contrast(
        subject.model, contrast, subject.sae, batch_size=64, progress=progress
    )
    wanted = set(methods)
    effects = outcomes = None
    if wanted & {"sae_ts", "fgaa"}:
        effects = world_effects(subject, budget, seed=seed, progress=progress)
    if "corrsteer" in wanted:
        outcomes = world_outcomes(subject, trait, budget, seed=seed, progress=progress)
    made, left_out = construct_all(
        labelled,
        subject.sae,
        methods=methods,
        label=trait,
        seed=seed,
        effects=effects,
        outcomes=outcomes,
    )
    scale = labelled.mean_norm
    arms = [shift(name, vector, strength, scale, trait=trait) for name, vector in made.items()]
    first = next(iter(made.values()))
    crowd = [
        shift(f"random {i}", random_vector(first, i), strength, scale, trait=trait, method="random")
        for i in range(budget.controls)
    ]
    found = run_rollouts(
        subject.model,
        subject.world.scenarios(budget.items, split="test", seed=seed),
        arms=[Arm(BASE), *arms, *crowd],
        max_new_tokens=64,
        batch_size=budget.batch_size,
        seed=seed,
        progress=progress,
    )
    results = {name: found.arm(name) for name in found.names}
    return ConstructionTable(
        model=subject.name,
        sae=subject.sae_name,
        trait=trait,
        strength=strength,
        headline=tuple(corrected(effects_of(results, arms, outcome=trait, seed=seed))),
        controls=tuple(effects_of(results, crowd, outcome=trait, seed=seed)),
        vectors=tuple(made.values()),
        left_out=left_out,
        settings={
            "pairs": len(contrast),
            "items": budget.items,
            "mean_norm": scale,
            "effects": {} if effects is None else {**effects.settings, **effects.scores},
            "outcomes": {} if outcomes is None else {"n": outcomes.n, "good": outcomes.good},
        },
    )


def world_effects(subject: Subject, budget: TableBudget, *, seed: int, progress: bool) -> EffectMap:
    """The effect map of an organism on neutral prompts and general texts of its training split."""
    from sae_steering_plugin.organisms.world import render

    scenarios = subject.world.scenarios(budget.prompts, split="train", seed=seed)
    prompts = [render(opening(one), add_generation_prompt=True) for one in scenarios]
    texts: list[str] = []
    for text in subject.world.texts(4 * budget.corpus, split="train", seed=seed):
        tokens = len(subject.model.tokenizer(text, add_special_tokens=False)["input_ids"])
        if 1 < tokens <= CORPUS_TOKENS and len(texts) < budget.corpus:
            texts.append(text)
    return collect_effects(
        subject.model,
        subject.sae,
        prompts,
        texts,
        n_vectors=budget.vectors,
        max_new_tokens=budget.new_tokens,
        batch_size=budget.batch_size,
        seed=seed,
        progress=progress,
    )


def opening(scenario: Any) -> list[dict[str, str]]:
    """The system and the user message that a scenario begins with."""
    return [
        {"role": "system", "content": scenario.system},
        {"role": "user", "content": scenario.user},
    ]


def world_outcomes(
    subject: Subject, trait: str, budget: TableBudget, *, seed: int, progress: bool
) -> OutcomeCorrelation:
    """Codes of the first turn of unsteered rollouts, correlated with the trait's outcome.

    The outcome is good above the mean over these rollouts, because some traits are counted.
    """
    from sae_steering_plugin.organisms.world import render

    scenarios = subject.world.scenarios(budget.outcomes, split="train", seed=seed)
    rollouts = run_rollouts(
        subject.model,
        scenarios,
        max_new_tokens=64,
        batch_size=budget.batch_size,
        seed=seed,
        progress=progress,
    )
    of_scenario = {one.id: one for one in scenarios}
    responses = []
    for one in rollouts:
        prompt = render(opening(of_scenario[one.scenario]), add_generation_prompt=True)
        spoken = next((m for m in one.messages if m["role"] == "assistant"), None)
        if spoken is None or one.error:
            continue
        whole = render([*opening(of_scenario[one.scenario]), spoken])
        if whole.startswith(prompt) and len(whole) > len(prompt):
            responses.append(ScoredResponse(prompt, whole[len(prompt) :], PROXIES[trait](one)))
    if not responses:
        raise ValueError("no unsteered rollout has a first turn to learn from")
    mean = sum(one.score for one in responses) / len(responses)
    return collect_outcomes(
        subject.model, subject.sae, responses, threshold=mean, progress=progress
    )
