"""The protocol `rollouts`: any saved vectors, in agent rollouts, against the unsteered arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from ..types import UNITS, Scenario
from ..types import Unit as StrengthUnit
from .protocols import Evaluation
from .references import ModelRef, VectorRef
from .rollout_plan import BASE, RolloutPlan, random_crowd, steering_arms
from .scenarios import TOOLS, read_scenarios, read_tools, tool_name
from .transcripts import PROXIES, Rollouts

if TYPE_CHECKING:
    from .parts import Collected


def rollouts(
    *,
    out: Path,
    vectors: Annotated[
        list[str], "Folder of build or save_model; again for more. None: the autonomy protocol."
    ] = [],  # noqa: B006
    model: Annotated[str, "Organism name, local folder, or a name on the hub."] = "agent-gpt2",
    scenarios: Annotated[
        str | None, "JSON-lines file; an organism's own test tasks if none."
    ] = None,
    tools: Annotated[
        str | None, "JSON file of tool schemas; the five default tools if none."
    ] = None,
    items: Annotated[int, "How many scenarios, from the first; 0 for all of the file."] = 50,
    strengths: Annotated[
        list[float], "--strength", "In --unit; may be given again. 0.5 if none, with --vectors."
    ] = [],  # noqa: B006
    unit: Annotated[str, "raw, unit, norm, max_activation or kl."] = "norm",
    positions: Annotated[
        list[str],
        "--positions",
        "all, prefill, decode, last or after_prompt; again for more. All if none.",
    ] = [],  # noqa: B006
    controls: Annotated[
        int | None, "Random directions per vector, at the same displacement."
    ] = None,
    outcome: Annotated[str, "The proxy to compare: " + ", ".join(PROXIES)] = "autonomy",
    max_turns: Annotated[int, "Assistant turns per rollout."] = 5,
    max_new_tokens: Annotated[
        int | None, "Tokens per turn; 256 with --vectors, 64 without."
    ] = None,
    temperature: Annotated[float, "0 is greedy."] = 0.6,
    block: Annotated[int, "Scenarios per unit: what a killed run loses at most."] = 50,
    batch_size: Annotated[int, "Rollouts per forward pass."] = 64,
    device: Annotated[str, "Where to run: cpu, cuda, mps."] = "cpu",
    dtype: Annotated[str, "float32, bfloat16 or float16."] = "float32",
    seed: Annotated[int, "Seed of everything that is drawn."] = 42,
) -> Evaluation:
    """Agent rollouts under saved vectors: vectors x strengths x positions, controls and the base.

    Prints the proxies per arm, and each arm's effect on --outcome against the unsteered arm on the
    same scenarios and sampling noise, corrected together (Holm). Without --vectors it is the whole
    autonomy protocol, as `evaluate autonomy`: five traits' vectors, 50 scenarios x 36 conditions.
    """
    if not vectors:
        if positions or unit != "norm" or outcome != "autonomy":
            raise ValueError(
                "--positions, --unit and --outcome need --vectors: the autonomy protocol has its "
                "own conditions (see evaluate autonomy --help)"
            )
        from .autonomy import STRENGTHS, autonomy

        return autonomy(
            out=out,
            model=model,
            scenarios=scenarios,
            tools=tools,
            items=items,
            strengths=strengths or list(STRENGTHS),
            controls=10 if controls is None else controls,
            max_turns=max_turns,
            max_new_tokens=64 if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            block=block,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            seed=seed,
        )
    strengths, positions = strengths or [0.5], positions or ["all"]
    controls = controls or 0
    if outcome not in PROXIES:
        raise ValueError(f"no outcome {outcome!r}; choose one of {', '.join(PROXIES)}")
    if unit not in UNITS:
        raise ValueError(f"no strength unit {unit!r}; choose one of {', '.join(UNITS)}")
    scale = cast("StrengthUnit", unit)
    named = named_vectors(vectors)
    schemas = TOOLS if tools is None else read_tools(tools)
    steered = steering_arms(named, strengths=strengths, unit=scale, positions=positions)
    crowd = random_crowd(
        named, seeds=range(controls), strengths=strengths, unit=scale, positions=positions
    )
    plan = RolloutPlan(
        ModelRef.of(model, device=device, dtype=dtype),
        chosen_scenarios(model, scenarios, items, [tool_name(schema) for schema in schemas]),
        (BASE, *steered, *crowd),
        seed=seed,
        max_turns=max_turns,
        max_new_tokens=256 if max_new_tokens is None else max_new_tokens,
        temperature=temperature,
        block=block,
        batch_size=batch_size,
        tools=schemas,
    )

    def tables(collected: Collected) -> dict[str, Sequence[Mapping[str, Any]]]:
        found = plan.rollouts(collected)
        every = {
            "rollouts per arm": summary_rows(found),
            f"{outcome} against the base (Holm over the vectors)": effect_rows(
                found, [arm.name for arm in steered], outcome, seed
            ),
            f"{outcome} under random directions, against the base": effect_rows(
                found, [arm.name for arm in crowd], outcome, seed
            ),
        }
        return {title: rows for title, rows in every.items() if rows}

    return Evaluation(plan, tables)


def named_vectors(folders: Sequence[str | Path]) -> dict[str, VectorRef]:
    """References to all vectors of some folders, by label. Raises ValueError for a label twice."""
    found: dict[str, VectorRef] = {}
    for folder in folders:
        for reference in VectorRef.all_of(folder):
            name = reference.label or Path(folder).name
            if name in found:
                raise ValueError(
                    f"two vectors are called {name!r}, in {found[name].folder} and in {folder}"
                )
            found[name] = reference
    return found


def chosen_scenarios(
    model: str, file: str | None, items: int, tools: Sequence[str]
) -> tuple[Scenario, ...]:
    """The first `items` scenarios of a file (0: all), or of an organism's held-out tasks.

    Raises ValueError for a file with fewer, and for a model that brings no scenarios of its own.
    """
    from ..organisms import data_folder, list_organisms, read_card
    from ..organisms.world import World

    if file is not None:
        found = read_scenarios(file, tools=tools)
        if items > len(found):
            raise ValueError(f"{file} holds {len(found)} scenarios, not {items}: pass --items 0")
        return found[: items or None]
    if model not in list_organisms():
        raise ValueError(f"{model} is no organism with tasks of its own: pass --scenarios FILE")
    if items < 1:
        raise ValueError("an organism's world makes as many tasks as asked for: pass --items")
    card = read_card(data_folder(model))
    return tuple(World(seed=int(card.get("world_seed", 0))).scenarios(items))


def summary_rows(found: Rollouts) -> list[dict[str, Any]]:
    """One row per arm: number of rollouts, valid rate, mean of each proxy."""
    table = found.summary().reset_index()
    return [
        {
            "arm": row["arm"],
            "n": int(row["n"]),
            "valid": round(float(row["valid"]), 3),
            **{name: round(float(row[name]), 3) for name in PROXIES},
        }
        for row in table.to_dict("records")
    ]


def effect_rows(
    found: Rollouts, arms: Sequence[str], outcome: str, seed: int
) -> list[dict[str, Any]]:
    """One row per arm: its effect against the base, corrected over these arms."""
    from ..effects.compare import compare
    from ..effects.contrast import corrected

    base = found.arm(BASE.name)
    effects = corrected(
        [compare(base, found.arm(name), outcome=outcome, seed=seed) for name in arms],
        correction="holm",
    )
    return [
        {
            "arm": name,
            "n": one.n,
            "base": round(one.base_mean, 3),
            "steered": round(one.arm_mean, 3),
            "d": round(one.d, 2),
            "interval": f"{one.ci_low:.2f} to {one.ci_high:.2f}",
            "p": float(f"{one.p_value:.3g}"),
            "p adjusted": float(f"{one.p_adjusted:.3g}"),
            "valid": round(one.valid_rate, 3),
        }
        for name, one in zip(arms, effects, strict=True)
    ]
