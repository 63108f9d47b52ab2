"""Are steering and in-context examples one belief? The embedded agents, all shots x strengths.

`python -m benchmarks.belief_dynamics [--quick] [--models NAME ...] [--json FILE] [--table FILE]`

Grids of strength and number of examples, fitted with `fit_belief` and with the world's own form,
whole strengths held out. Examples: failed calls that were tried again (what the agents were trained
on), and answered questions about the assistant (the persona statements of arXiv 2511.00617, which
they were not). Controls: ten random directions of the same strengths. Nothing is timed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.pages import asked, give
from sae_steering_plugin.directions import diff_mean_vector
from sae_steering_plugin.effects.belief import correlation, entropy
from sae_steering_plugin.organisms import list_organisms
from sae_steering_plugin.runs.belief import (
    GIVING_UP,
    RETRY,
    BeliefGrid,
    answered_questions,
    belief_grid,
    persistence_vector,
    repeated_failures,
    retry_belief,
)
from sae_steering_plugin.runs.collect import collect_contrast
from sae_steering_plugin.runs.subject import open_subject, world_contrast
from sae_steering_plugin.types import Recipe, SteeringVector

STRENGTHS = (-1.6, -1.4, -1.2, -1.0, -0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4)
CONTROL_STRENGTHS = (-1.6, -0.8, 0.0)
"""Mean residual norms, at every token but a leading BOS."""
TRIES = (0, 1, 2, 3, 4)
"""A transcript of the world holds six calls at most, so a fifth try is no evidence any more."""
QUESTIONS = (0, 1, 2, 4, 6)
TRAIT = "autonomy"
SEEDS = 10


def random_vector(like: SteeringVector, seed: int) -> SteeringVector:
    """A direction that means nothing, at the same place and in the same unit."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(like.vector.shape, generator=generator)
    recipe = Recipe("random", mean_norm=like.recipe.mean_norm, seed=seed)
    return SteeringVector(drawn / drawn.norm() * like.norm, like.hook_name, recipe)


def by_bayes(grid: BeliefGrid) -> dict[str, float]:
    """The world's own form with a steered prior, held out as the curve is: sigma(a m + b) is the
    belief in high persistence, the evidence and both rates are the world's."""
    from scipy.optimize import minimize

    shares = grid.shown.double().mean(-1)
    strengths = torch.tensor(grid.strengths, dtype=torch.float64)

    def predicted(theta: Sequence[float], rows: torch.Tensor) -> torch.Tensor:
        prior = torch.sigmoid(theta[0] * strengths[rows] + theta[1]).clamp(1e-9, 1 - 1e-9).tolist()
        return torch.tensor(
            [[retry_belief(n, prior=p) for n in grid.examples] for p in prior], dtype=torch.float64
        )

    cells, slopes = [], []
    every = torch.arange(len(strengths))
    for i in range(len(strengths)):
        rest = every[every != i]
        found = minimize(
            lambda theta, rest=rest: entropy(predicted(theta, rest), shares[rest]),
            [1.0, 0.0],
            method="Nelder-Mead",
        )
        slopes.append(float(found.x[0]))
        cells.append(predicted(found.x, every[i : i + 1])[0])
    held = torch.stack(cells)
    return {
        "bayes_entropy": entropy(held, shares),
        "bayes_r": correlation(held, shares),
        "bayes_slope": sum(slopes) / len(slopes),
    }


def measure(name: str, quick: bool) -> dict[str, Any]:
    """Everything about one agent."""
    subject = open_subject(name)
    model, site = subject.model, subject.sae.cfg.metadata.hook_name
    trials = 12 if quick else 100
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vector = persistence_vector(model, site, 4 * trials)
    answers = (RETRY, GIVING_UP)
    grid = belief_grid(model, vector, repeated_failures(trials, TRIES, seed=2), answers, STRENGTHS)
    kept = grid.within()
    fit = kept.fit()
    few = repeated_failures(max(6, trials // 5), TRIES, seed=1)
    slopes = [
        belief_grid(
            model, random_vector(vector, seed), few, answers, CONTROL_STRENGTHS, progress=False
        )
        .fit(resamples=2)
        .curve.a
        for seed in range(2 if quick else SEEDS)
    ]
    contexts, letters = answered_questions(TRAIT, trials, QUESTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contrast = world_contrast(subject, TRAIT, 4 * trials)
        persona = diff_mean_vector(collect_contrast(model, contrast, site, progress=False))
    asked = belief_grid(model, persona, contexts, letters, (-0.8, -0.4, 0.0, 0.4, 0.8))
    told = asked.within().fit()
    return {
        "model": name,
        "site": site,
        "trials": trials,
        "tries": about(grid, fit) | by_bayes(kept) | {"left_out": left_out(grid, kept)},
        "world": [retry_belief(n) for n in TRIES],
        "random_slopes": slopes,
        "questions": about(asked, told),
    }


def left_out(grid: BeliefGrid, kept: BeliefGrid) -> list[float]:
    return [m for m in grid.strengths if m not in kept.strengths]


def about(grid: BeliefGrid, fit: Any) -> dict[str, Any]:
    return {
        "strengths": grid.strengths,
        "examples": grid.examples,
        "shares": grid.shown.mean(-1).tolist(),
        "answered": float(grid.answered.min()),
        "curve": asdict(fit.curve),
        "errors": fit.errors,
        "heldout_r": fit.heldout_r,
        "heldout_entropy": fit.heldout_entropy,
        "examples_only": fit.examples_only,
        "floor": fit.floor,
        "heldout": [
            {name: None if math.isinf(x) else x for name, x in asdict(one).items()}
            for one in fit.heldout
        ],
        "worth": {str(n): fit.curve.exchange_rate(float(n)) for n in grid.examples if n},
    }


def page(rows: list[dict[str, Any]]) -> str:
    """The results as the page in docs/."""
    models = " ".join(row["model"] for row in rows)
    lines = [
        "# Steering and in-context examples as one belief",
        "",
        f"Written by `python -m benchmarks.belief_dynamics --models {models} --table "
        "docs/belief_dynamics.md`.",
        "",
        "    logit p(m, N) = a m + b + gamma N^(1 - alpha)",
        "",
        "p: probability of the answer that shows the concept among both kinds of answers, at the",
        "next token; m: strength in mean residual norms; N: examples in the context. The form is",
        "inferred from the abstract of arXiv 2511.00617, whose equations could not be read. Whole",
        "strengths are held out for every figure called held-out; standard errors resample trials.",
        "N* observed lies between cells on a straight line, so below N = 1 a chord stands against",
        "a curve.",
    ]
    for row in rows:
        lines += ["", f"## {row['model']}", "", *tries(row), "", *questions(row)]
    return "\n".join(lines) + "\n"


def tries(row: dict[str, Any]) -> list[str]:
    found, curve, errors = row["tries"], row["tries"]["curve"], row["tries"]["errors"]
    slopes = row["random_slopes"]
    largest = max(abs(a) for a in slopes)
    fitted = ", ".join(f"{n} {curve[n]:.3f} ({errors[n]:.3f})" for n in curve)
    dropped = ", ".join(f"{m:g}" for m in found["left_out"]) or "none"
    return [
        "### Examples: failed calls that were tried again",
        "",
        f"{row['trials']} conversations under neutral prompts, test wordings; DiffMean of",
        f"persistence prompts (train wordings) at {row['site']}. p: another try.",
        "",
        *grid_table(found, {"the world, by Bayes": row["world"]}),
        "",
        f"Both kinds of answers hold at least {found['answered']:.3f} of the probability in every",
        f"cell (strengths left out for less than 0.5: {dropped}).",
        "",
        f"Fit (standard error): {fitted}.",
        f"|a| of {len(slopes)} random directions of the same strengths: at most {largest:.3f}.",
        "",
        "| held-out | r | cross entropy |",
        "| --- | ---: | ---: |",
        f"| belief curve | {found['heldout_r']:.3f} | {found['heldout_entropy']:.4f} |",
        "| the world's form with a steered prior "
        f"| {found['bayes_r']:.3f} | {found['bayes_entropy']:.4f} |",
        f"| examples only (mean of the other strengths) | | {found['examples_only']:.4f} |",
        f"| the observed shares themselves | | {found['floor']:.4f} |",
        "",
        *crossovers(found),
        "",
        *falls(found),
        "A unit of strength at constant belief, in examples: "
        + ", ".join(f"{value:.2f} at N = {n}" for n, value in found["worth"].items())
        + ".",
    ]


def questions(row: dict[str, Any]) -> list[str]:
    found, curve, errors = row["questions"], row["questions"]["curve"], row["questions"]["errors"]
    fitted = ", ".join(f"{n} {curve[n]:.3f} ({errors[n]:.3f})" for n in curve)
    zero = found["strengths"].index(0.0)
    first, last = found["shares"][zero][0], found["shares"][zero][-1]
    return [
        f"### Examples: answered questions about {TRAIT}",
        "",
        "p: the letter of the matching choice, after questions answered as high autonomy would.",
        "",
        *grid_table(found, {}),
        "",
        f"Fit (standard error): {fitted}.",
        f"Held-out r {found['heldout_r']:.3f}; cross entropy {found['heldout_entropy']:.4f}, with",
        f"examples only {found['examples_only']:.4f}, observed shares {found['floor']:.4f}.",
        f"Unsteered, {found['examples'][-1]} examples move p from {first:.3f} to {last:.3f}.",
    ]


def grid_table(found: dict[str, Any], further: dict[str, list[float]]) -> list[str]:
    rows = {
        f"{m:+g}": shares for m, shares in zip(found["strengths"], found["shares"], strict=True)
    }
    head = " | ".join(f"N = {n}" for n in found["examples"])
    return [
        f"| strength | {head} |",
        "| --- |" + " ---: |" * len(found["examples"]),
        *(
            f"| {name} | " + " | ".join(f"{p:.3f}" for p in shares) + " |"
            for name, shares in {**rows, **further}.items()
        ),
    ]


def falls(found: dict[str, Any]) -> list[str]:
    """Where p falls with a further example, which no curve of this form can follow."""
    unsteered = found["shares"][found["strengths"].index(0.0)]
    return [
        f"Unsteered, p falls from {before:.3f} to {after:.3f} at N = {n}: no curve of this form "
        "can follow.\n"
        for before, after, n in zip(unsteered, unsteered[1:], found["examples"][1:], strict=False)
        if after < before - 0.01
    ]


def crossovers(found: dict[str, Any]) -> list[str]:
    rows = ["| strength | N* predicted without it | N* observed |", "| --- | ---: | ---: |"]
    last = found["examples"][-1]
    for one in found["heldout"]:
        predicted, observed = one["predicted"], one["observed"]
        expected = "infinite" if predicted is None else f"{predicted:.2f}"
        seen = f"more than {last}" if observed is None else f"{observed:.2f}"
        rows.append(f"| {one['strength']:+g} | {expected} | {seen} |")
    return rows


def main() -> None:
    options = asked(__doc__ or "", list_organisms())
    rows = [measure(model, options.quick) for model in options.models]
    give(options, {"rows": rows}, page(rows))


if __name__ == "__main__":
    main()
