"""Does adding a chosen feature cause its concept? Held-out prompts, matched controls, intervals.

The edit adds `strength` x a_max x decoder row at every prompt token. Beside it stand random live
features and random directions pushed to the same length. Half of the prompts choose each concept's
strength, the other half reports it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_steering_plugin.adapters.activations import bos_policy
from sae_steering_plugin.adapters.engine import encode_prompts, generate
from sae_steering_plugin.adapters.sae_parts import decoder_rows
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.edits.shift import Add
from sae_steering_plugin.effects.contrast import corrected, effect
from sae_steering_plugin.runs.rollouts import random_vector
from sae_steering_plugin.runs.selection import SelectedFeatures
from sae_steering_plugin.types import ALL, SMALLEST_NORM, Edit, Effect, Positions, SteeringVector

STRENGTHS = (0.4, 1.0, 2.0, 5.0)
"""Multiples of a_max (a spread of AxBench's factor grid)."""

CONTROLS = 10
"""Random features, and random directions, of the same length."""

Judge = Callable[[str, Sequence[str]], Sequence[float]]
"""(concept, continuations) -> one number each, larger when the concept is there."""


@dataclass(frozen=True, eq=False)
class Validation:
    """Effects on held-out prompts: per concept and strength against three bases.

    `effects` compare the chosen feature with no steering, with the mean of random features and with
    the mean of random directions, paired by prompt (`Effect.method` says which, `trait` is the
    concept). `chosen[c]` is the strength that the other half of the prompts preferred; p values
    are corrected over the rows at chosen strengths, and apart from them over the other rows.
    `rank_p[c, strength]` says how often a control moves the outcome as far (both kinds together,
    (1 + as far) / (1 + controls)). Concepts in `missing` count as unsteered.
    """

    effects: tuple[Effect, ...]
    chosen: Mapping[str, float]
    rank_p: Mapping[tuple[str, float], float]
    gains: Mapping[str, float]
    missing: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def table(self, *, all_strengths: bool = False) -> Any:
        """One row per concept and comparison at the chosen strength (or at all of them)."""
        import pandas as pd

        rows = []
        for one in self.effects:
            if all_strengths or self.chosen.get(one.trait) == one.strength:
                rows.append(
                    {
                        "concept": one.trait,
                        "against": one.method,
                        "strength": one.strength,
                        "n": one.n,
                        "base_mean": one.base_mean,
                        "arm_mean": one.arm_mean,
                        "d": one.d,
                        "ci_low": one.ci_low,
                        "ci_high": one.ci_high,
                        "p_value": one.p_value,
                        "p_adjusted": one.p_adjusted,
                        "rank_p": self.rank_p[one.trait, one.strength],
                    }
                )
        rows += [{"concept": c, "against": "no feature: unsteered"} for c in self.missing]
        return pd.DataFrame(rows)

    def summary(self, *, resamples: int = 2000, seed: int = 0) -> dict[str, float]:
        """Mean gain over random features, at the chosen strengths: over all concepts, those without
        a feature at 0, and over survivors; with a bootstrap interval over concepts."""
        survivors = np.array([self.gains[c] for c in self.chosen])
        everyone = np.concatenate([survivors, np.zeros(len(self.missing))])
        drawn = np.random.default_rng(seed).integers(
            0, len(everyone), size=(resamples, len(everyone))
        )
        low, high = np.quantile(everyone[drawn].mean(axis=1), [0.025, 0.975])
        return {
            "concepts": float(len(everyone)),
            "survivors": float(len(survivors)),
            "mean_gain_all": float(everyone.mean()),
            "ci_low": float(low),
            "ci_high": float(high),
            "mean_gain_survivors": float(survivors.mean()) if len(survivors) else float("nan"),
        }

    def _repr_html_(self) -> str:
        return str(self.table().to_html(index=False, float_format="%.3g", escape=True))


def validate_selection(
    model: Any,
    sae: Any,
    selected: SelectedFeatures,
    prompts: Sequence[str],
    *,
    strengths: Sequence[float] = STRENGTHS,
    judge: Judge | None = None,
    tokens: Mapping[str, Sequence[int]] | None = None,
    controls: int = CONTROLS,
    positions: Positions = ALL,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    prepend_bos: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Validation:
    """The effect of each concept's best feature on `prompts` that selection never saw.

    The outcome is the probability of the concept's lexicon as the next token (`tokens[concept]`
    overrides the lexicon that was learned on the validation split), or, with a `judge`, its verdict
    on greedy (or sampled) continuations. The lexicon is a stand-in for a reader; so are offline
    judges. Strengths are multiples of the feature's a_max; controls are pushed to the same length:
    `controls` random features that fire and are nobody's choice, as many random directions.

    Raises ValueError with fewer than 8 prompts, for repeated prompts, and for a concept without
    tokens to measure.
    """
    if len(prompts) < 8 or len(set(prompts)) < len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts, {len(set(prompts))} of them different: give at least 8, each "
            "once; half choose the strength and half report it"
        )
    if not strengths or min(strengths) <= 0 or len(set(strengths)) < len(strengths):
        raise ValueError(f"strengths are {tuple(strengths)}; give positive numbers, each once")
    if controls < 1:
        raise ValueError("at least one control of each kind is needed")
    words = {c: tuple((tokens or {}).get(c, selected.lexicon[c])) for c in selected.selections}
    blank = [c for c, found in words.items() if not found]
    if blank and judge is None:
        raise ValueError(f"{blank[0]!r} has no lexicon: pass tokens= or a judge=")
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    choosing, reporting = np.array(order[::2]), np.array(order[1::2])
    bos = bos_policy(model, sae, prepend_bos)
    ids, mask = encode_prompts(model, list(prompts), prepend_bos=bos)
    used = {f for s in selected.selections.values() for f in s.features}

    def outcome(concept: str, steps: Float[Tensor, "arm d_model"] | None, site: str) -> np.ndarray:
        """One number per prompt and arm."""
        copies = 1 if steps is None else len(steps)
        edit: Any = ()
        if steps is not None:
            edit = Edit(Add(steps.repeat(len(prompts), 1)), site, positions=positions)
        if judge is None:
            logits = steered_logits(
                model, ids, edit, copies=copies, attention_mask=mask, last_only=True
            )
            mass = logits.float().softmax(-1)[:, list(words[concept])].sum(-1)
            return mass.cpu().double().numpy().reshape(len(prompts), copies)
        written = generate(
            model,
            ids.repeat_interleave(copies, dim=0),
            edit,
            attention_mask=mask.repeat_interleave(copies, dim=0),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        verdicts = np.asarray(judge(concept, written.texts), dtype=np.float64)
        if verdicts.shape != (len(written.texts),) or not np.isfinite(verdicts).all():
            raise ValueError(
                f"the judge gave {verdicts.shape} numbers for {len(written.texts)} texts"
            )
        return verdicts.reshape(len(prompts), copies)

    effects: list[Effect] = []
    chosen: dict[str, float] = {}
    rank_p: dict[tuple[str, float], float] = {}
    gains: dict[str, float] = {}
    for concept in tqdm(selected.selections, desc="validate", disable=not progress):
        vector = selected.vectors[concept][0]
        arms = arms_of(vector, sae, used, controls, seed)
        base = outcome(concept, None, vector.hook_name)[:, 0]
        found = {}
        for strength in strengths:
            length = vector.displacement(strength, "max_activation")
            found[strength] = outcome(concept, arms * length, vector.hook_name)
        # random features first among the controls, then random directions
        gain = {s: a[:, 0] - a[:, 1 : controls + 1].mean(axis=1) for s, a in found.items()}
        chosen[concept] = max(strengths, key=lambda s: (gain[s][choosing].mean(), -s))
        gains[concept] = float(gain[chosen[concept]][reporting].mean())
        for strength, values in found.items():
            held = values[reporting]
            bases = {
                "unsteered": base[reporting],
                "random features": held[:, 1 : controls + 1].mean(axis=1),
                "random directions": held[:, controls + 1 :].mean(axis=1),
            }
            means = held.mean(axis=0)
            as_far = int((means[1:] >= means[0]).sum())
            rank_p[concept, strength] = (1 + as_far) / (1 + 2 * controls)
            effects += [
                effect(
                    against,
                    held[:, 0],
                    method=name,
                    outcome="lexicon probability" if judge is None else "judge",
                    strength=strength,
                    unit="max_activation",
                    positions=str(positions),
                    trait=concept,
                    seed=seed,
                    judge="lexicon" if judge is None else str(getattr(judge, "name", "given")),
                )
                for name, against in bases.items()
            ]
    return Validation(
        effects=(
            *corrected([e for e in effects if chosen[e.trait] == e.strength]),
            *corrected([e for e in effects if chosen[e.trait] != e.strength]),
        ),
        chosen=chosen,
        rank_p=rank_p,
        gains=gains,
        missing=dict(selected.missing),
        settings={
            "prompts": len(prompts),
            "choosing": len(choosing),
            "reporting": len(reporting),
            "controls": controls,
            "strengths": tuple(strengths),
            "positions": str(positions),
            "seed": seed,
            "prepend_bos": bos,
            "judge": "lexicon" if judge is None else str(getattr(judge, "name", "given")),
            "fallback": "unsteered",
        },
    )


def arms_of(
    vector: SteeringVector, sae: Any, used: set[int], controls: int, seed: int
) -> Float[Tensor, "arm d_model"]:
    """Unit rows: the vector, then `controls` random features, then as many random directions.

    Random features are drawn among those that nobody chose and whose row has a length.
    """
    rows = decoder_rows(sae).cpu()
    free = [
        f for f in (rows.norm(dim=1) > SMALLEST_NORM).nonzero().flatten().tolist() if f not in used
    ]
    if len(free) < controls:
        raise ValueError(f"{len(free)} features are nobody's choice; {controls} controls are asked")
    drawn = rows[random.Random(seed).sample(free, controls)]
    directions = [random_vector(vector, seed + 1 + i).vector for i in range(controls)]
    arms = torch.stack([vector.vector, *drawn, *directions])
    return arms / arms.norm(dim=1, keepdim=True)
