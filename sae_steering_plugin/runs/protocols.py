"""Protocols by name: what `sae-steer evaluate NAME` runs.

A protocol is a function from plain options to an `Evaluation`. The command line is made from its
signature: an option per parameter, `Annotated[type, "help"]` or `Annotated[list[type], "--name",
"help"]`, with the docstring as its help. A parameter called `out` is given the run's folder. To add
one, write the function and name it in `PROTOCOLS`; one that is not in the table runs under its
import path, `sae-steer evaluate my_lab.study:sweep`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .canonical import imported
from .plan import Plan

if TYPE_CHECKING:
    from .parts import Collected

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A plan, and what to show of its table once it is complete.

    `tables` gives, per title, the rows to print; they are also written to `summary.json`. It must
    be pure, so that it may be called on the same table again. `save` writes what else the protocol
    leaves into the run's folder and gives the paths. `then` is what follows once the table is
    written, in one process: the name of a folder inside the run's, and a function from the run's
    folder to the next evaluation (judging, which must not hold the workers of a plan of texts).
    """

    plan: Plan
    tables: Callable[[Collected], Mapping[str, Rows]]
    save: Callable[[Collected, Path], Sequence[Path]] | None = None
    then: tuple[str, Callable[[Path], Evaluation]] | None = None


@dataclass(frozen=True)
class Protocol:
    """Where a protocol's function is, and what it shows, without importing it."""

    path: str
    summary: str
    example: str


PROTOCOLS: dict[str, Protocol] = {
    "axbench": Protocol(
        "sae_steering_plugin.runs.axbench.evaluation:axbench",
        "AxBench: concept detection and steering, every method on the same concepts.",
        "sae-steer evaluate axbench --concept 0 --concept 3 --factor 0.4 --factor 0.8 "
        "--methods diff_mean --methods sae_auroc --max-new-tokens 24 --out axbench",
    ),
    "autonomy": Protocol(
        "sae_steering_plugin.runs.autonomy:autonomy",
        "Five traits, one axis? 50 scenarios x 36 conditions, with controls.",
        "sae-steer evaluate autonomy --items 8 --controls 2 --out autonomy",
    ),
    "rollouts": Protocol(
        "sae_steering_plugin.runs.rollout_evaluation:rollouts",
        "Agent rollouts under steering: vectors x strengths x positions, and the base.",
        "sae-steer build --trait autonomy --out autonomy\n"
        "sae-steer evaluate rollouts --vectors autonomy --items 8 --strength 0.5 --out rollouts",
    ),
    "choices": Protocol(
        "sae_steering_plugin.runs.choice_evaluation:choices",
        "Multiple choice under sparse activation steering, with baselines and ablations.",
        "sae-steer evaluate choices --behaviour autonomy --items 20 --out choices",
    ),
    "open-ended": Protocol(
        "sae_steering_plugin.runs.open_evaluation:open_ended",
        "Open-ended texts under sparse activation steering, judged as a second plan.",
        "sae-steer evaluate open-ended --items 12 --judge lexicon:pirate --out texts",
    ),
    "judge": Protocol(
        "sae_steering_plugin.runs.open_evaluation:judge",
        "Judge the texts of a finished run, or of any parquet table.",
        "sae-steer evaluate open-ended --items 12 --out texts\n"
        "sae-steer evaluate judge --texts texts --judge rule:/arr/ --out judged",
    ),
    "capability": Protocol(
        "sae_steering_plugin.runs.capability_evaluation:capability",
        "TruthfulQA (MC1, MC2) and two-choice sets of knowledge, steered and unsteered.",
        "sae-steer evaluate capability --data world --items 20 --out capability",
    ),
}
"""The protocols of the package. Reading this table imports none of them."""


def find_protocol(name: str) -> Callable[..., Evaluation]:
    """The function behind a name or import path. Raises ValueError that lists the names."""
    if ":" in name:
        return imported(name)
    if name not in PROTOCOLS:
        near = get_close_matches(name, PROTOCOLS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"no protocol {name!r}{hint}; known are {', '.join(PROTOCOLS)}, or an import path "
            "package.module:function"
        )
    return imported(PROTOCOLS[name].path)
