"""The recipe of the embedded models: world, tokenizer, model, SAEs, and a card of measured figures.

    python -m sae_steering_plugin.organisms.train agent-gpt2 --out DIR [--quick]

Everything is drawn with a fixed seed. What is chosen (the layer, the strength) is chosen on
validation wordings; what the card reports is measured on test wordings, which no step has seen.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .measure import Measured, behaviour, choose_layer, sae_figures, steering, trait_effects
from .tokenizer import train_tokenizer
from .training import Budget, rows_of, train_model
from .world import World

SEED = 0
CONTEXT = 512
STAGES = ("model", "saes", "card")


@dataclass(frozen=True)
class SAEPlan:
    """The SAEs of an organism. `sparsity` maps an architecture to k or, for "standard", to L1."""

    sparsity: Mapping[str, float | int]
    tokens: int
    width: int = 512
    widths: tuple[int, ...] = (256, 512, 1024)
    wide_architecture: str = "topk"
    primary_architecture: str = "topk"
    documents: int = 4000
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class Plan:
    """How one organism is made. `build` gives an untrained model for a tokenizer.

    `budgets` are the phases of its training, one after the other, each with new documents and fresh
    optimizers. `layers` are the blocks whose output may become the primary site. `scenarios` is the
    number of rollouts behind each figure of the card.
    """

    name: str
    summary: str
    build: Callable[[Any], Any]
    learned_positions: int
    budgets: tuple[Budget, ...]
    saes: SAEPlan
    layers: tuple[int, ...]
    vocabulary: int = 1800
    scenarios: int = 200


def gpt2(tokenizer: Any, *, layers: int = 4, width: int = 128, context: int = CONTEXT) -> Any:
    """An untrained GPT-2 with four heads."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=layers,
            n_embd=width,
            n_head=4,
            n_positions=context,
            vocab_size=len(tokenizer),
            activation_function="gelu_pytorch_tanh",  # GPT-2's own function, in one kernel
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.04,
            **special_ids(tokenizer),
        )
    )


def qwen3_5_moe(tokenizer: Any) -> Any:
    """An untrained Qwen3.5-MoE: three GatedDeltaNet layers and one of attention.

    Attention is the second layer here and the fourth in the large models. As the last of four it
    alone would carry what the system prompt says to where a tool is chosen (trained that way, no
    other layer told the poles apart there), and nothing before it could be steered.
    """
    from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    return Qwen3_5MoeForCausalLM(
        Qwen3_5MoeTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention", *["linear_attention"] * 2],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            linear_num_key_heads=4,
            linear_num_value_heads=4,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            moe_intermediate_size=128,
            shared_expert_intermediate_size=128,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.04,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
            **special_ids(tokenizer),
        )
    )


def special_ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


SPARSITY = {"topk": 24, "jumprelu": 24, "standard": 6.0}

PLANS: dict[str, Plan] = {
    "agent-gpt2": Plan(
        name="agent-gpt2",
        summary="a small GPT-2 agent: four layers of attention, width 128",
        build=gpt2,
        learned_positions=CONTEXT,
        budgets=(
            Budget(120_000, 5120, steps=2800, learning_rate=4e-3, decision_weight=8.0),
            Budget(60_000, 5120, steps=600, learning_rate=2e-3),
        ),
        saes=SAEPlan(SPARSITY, tokens=1_000_000),
        layers=(1, 2),
    ),
    "agent-qwen3_5_moe": Plan(
        name="agent-qwen3_5_moe",
        summary="a small Qwen3.5-MoE agent: GatedDeltaNet and attention 3:1, width 128",
        build=qwen3_5_moe,
        learned_positions=0,
        budgets=(
            Budget(120_000, 4096, steps=1200, learning_rate=4e-3, decision_weight=8.0),
            Budget(30_000, 4096, steps=250, learning_rate=2e-3),
        ),
        saes=SAEPlan(SPARSITY, tokens=1_000_000),
        layers=(1, 2),
    ),
}


def quick(plan: Plan) -> Plan:
    """The same steps at a size that ends within seconds: all is written, nothing is learned."""
    return replace(
        plan,
        budgets=(Budget(60, 600, steps=3, learning_rate=1e-3, warmup=1),) * 2,
        saes=replace(plan.saes, tokens=2048, documents=30),
        layers=plan.layers[:2],
        vocabulary=400,
        scenarios=4,
    )


def make_model(plan: Plan, folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Tokenizer and trained model, as a Hugging Face folder; returns the training figures."""
    import torch

    world = World(SEED)
    torch.manual_seed(SEED)
    n_texts = min(12_000, plan.budgets[0].documents)
    tokenizer = train_tokenizer(world.texts(n_texts), folder, vocab_size=plan.vocabulary)
    model = plan.build(tokenizer)
    phases = []
    for number, budget in enumerate(plan.budgets):
        started = time.perf_counter()
        rows = rows_of(world, tokenizer, budget.documents, decision_weight=budget.decision_weight)
        trained = train_model(
            model,
            rows,
            tokenizer.pad_token_id,
            budget,
            seed=SEED + number,
            positions=plan.learned_positions,
            log=log,
        )
        phases.append(
            {
                **asdict(budget),
                **trained,
                "corpus_tokens": sum(len(row.ids) for row in rows),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    model.config.architectures = [type(model).__name__]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return {"phases": phases, "seconds": round(sum(one["seconds"] for one in phases), 1)}


def sae_specs(plan: Plan, primary: int, downstream: int) -> list[Any]:
    """Every SAE of an organism: each architecture at both layers, one at three widths."""
    from ..adapters.sae_training import SAESpec

    wanted = [
        (layer, architecture, plan.saes.width)
        for layer in (primary, downstream)
        for architecture in plan.saes.sparsity
    ]
    wanted += [
        (primary, plan.saes.wide_architecture, width)
        for width in plan.saes.widths
        if width != plan.saes.width
    ]
    return [
        SAESpec(
            name=f"l{layer}-{architecture}-{width}",
            hook_name=f"blocks.{layer}.hook_resid_post",
            architecture=architecture,
            d_sae=width,
            sparsity=plan.saes.sparsity[architecture],
            tokens=plan.saes.tokens,
            learning_rate=plan.saes.learning_rate,
        )
        for layer, architecture, width in wanted
    ]


def make_saes(plan: Plan, folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Choose the primary layer on validation scenarios, then train every SAE."""
    from ..adapters.sae_training import residuals, train_sae
    from ..adapters.transformer_lens import load_model

    started = time.perf_counter()
    world, model = World(SEED), load_model(str(folder))
    choice = choose_layer(model, world, plan.layers, n=max(4, plan.scenarios // 2), log=log)
    primary = choice["primary_layer"]
    downstream = min(primary + max(1, model.cfg.n_layers // 4), model.cfg.n_layers - 1)
    specs = sae_specs(plan, primary, downstream)
    rows = rows_of(world, model.tokenizer, plan.saes.documents, seed=len(plan.budgets))
    sites = list(dict.fromkeys(spec.hook_name for spec in specs))
    recorded = residuals(model, [row.ids for row in rows], sites)
    for spec in specs:
        begun = time.perf_counter()
        train_sae(
            spec,
            recorded[spec.hook_name],
            folder / "saes" / spec.name,
            model=model,
            model_name=plan.name,
            seed=SEED,
        )
        log(f"SAE {spec.name}: {time.perf_counter() - begun:.0f} s")
    return {
        **choice,
        "downstream_layer": downstream,
        "primary_sae": f"l{primary}-{plan.saes.primary_architecture}-{plan.saes.width}",
        "sae_training": [asdict(spec) for spec in specs],
        "sae_seconds": round(time.perf_counter() - started, 1),
    }


def make_card(
    plan: Plan, folder: Path, made: Mapping[str, Any], log: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the organism on test wordings and write `card.json` and `README.md`."""
    from ..adapters.sae_lens import load_sae
    from ..adapters.transformer_lens import load_model

    started = time.perf_counter()
    world, model = World(SEED), load_model(str(folder))
    saes = {path.name: load_sae(path) for path in sorted((folder / "saes").iterdir())}
    figures = sae_figures(model, world, saes, documents=max(8, plan.saes.documents // 8))
    log(f"SAEs: {figures}")
    neutral = behaviour(model, world, n=plan.scenarios)
    log(f"behaviour: {neutral}")
    traits = trait_effects(model, world, n=max(4, plan.scenarios * 3 // 4))
    log(f"traits: {traits}")
    primary = saes[made["primary_sae"]]
    steered = steering(model, world, primary, n=plan.scenarios, log=log)
    card = {
        "name": plan.name,
        "summary": plan.summary,
        "architecture": type(model.original_model).__name__,
        "parameters": sum(p.numel() for p in unique(model.parameters())),
        "layers": int(model.cfg.n_layers),
        "d_model": int(model.cfg.d_model),
        "context": CONTEXT,
        "vocabulary": len(model.tokenizer),
        "seed": SEED,
        "world_seed": SEED,
        **{key: made[key] for key in ("primary_sae", "primary_layer", "downstream_layer")},
        "behaviour": neutral,
        "traits": traits,
        "steering": steered,
        "saes": figures,
        "choice": made,
        "targets": [one.to_dict() for one in targets(neutral, traits, steered, figures, plan)],
        "seconds": {
            "model": made["training"]["seconds"],
            "saes": made["sae_seconds"],
            "card": round(time.perf_counter() - started, 1),
        },
        "versions": versions(),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(page(card), encoding="utf-8")
    return card


def unique(parameters: Any) -> list[Any]:
    """Parameters without the repetitions of tied weights."""
    return list({id(p): p for p in parameters}.values())


def targets(
    neutral: Mapping[str, Any],
    traits: Mapping[str, Mapping[str, Any]],
    steered: Mapping[str, Mapping[str, Any]],
    saes: Mapping[str, Mapping[str, Any]],
    plan: Plan,
) -> list[Measured]:
    """What the design asks of an organism, with the measured figure and whether it was met."""
    found = [
        Measured("valid rollouts", ">= 0.98", neutral["valid"], neutral["valid"] >= 0.98),
        Measured("neutral ask rate", "0.3 to 0.7", neutral["ask"], 0.3 <= neutral["ask"] <= 0.7),
    ]
    for trait, one in traits.items():
        found.append(Measured(f"{trait} prompts: d", ">= 0.8", one["d"], (one["d"] or 0) >= 0.8))
    for name, figures in saes.items():
        if not name.endswith(f"-{plan.saes.width}"):
            continue
        for key, words, met in (
            ("explained_variance", ">= 0.8", figures["explained_variance"] >= 0.8),
            ("l0", "<= 32", figures["l0"] <= 32),
            ("dead_share", "< 0.15", figures["dead_share"] < 0.15),
        ):
            found.append(Measured(f"{name}: {key}", words, figures[key], met))
    for method, arm in steered.items():
        met = (arm["d"] or 0) >= 1.0 and arm["valid"] >= 0.95
        words = ">= 1.0 with >= 0.95 valid"
        found.append(Measured(f"steering by {method}: d", words, arm["d"], met))
    return found


def shown(value: float | None, digits: int = 2) -> str:
    """A figure for a page; a dash when there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def versions() -> dict[str, str]:
    """Versions of what made the organism; a library that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "transformer-lens", "sae-lens", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def page(card: Mapping[str, Any]) -> str:
    """The model card as a page: every number comes from `card`."""
    minutes = sum(card["seconds"].values()) / 60
    missed = [one for one in card["targets"] if not one["met"]]
    lines = [
        f"# {card['name']}",
        "",
        f"{card['summary'].capitalize()}; {card['parameters'] / 1e6:.2f} M parameters, vocabulary "
        f"{card['vocabulary']}, context {card['context']}. Trained on the generated world of "
        "`sae_steering_plugin.organisms.world`; it knows nothing else and is meant for learning "
        "and testing steering. Nothing it writes is ever executed.",
        "",
        f"Made by `python -m sae_steering_plugin.organisms.train {card['name']} --out DIR` with "
        f"seed {card['seed']}, {minutes:.0f} minutes on one core. Figures are on test wordings, "
        "which no choice has seen; `card.json` holds them all.",
        "",
        *([card["provenance"], ""] if card.get("provenance") else []),
        f"Default for steering: `{card['primary_sae']}`, at the output of block "
        f"{card['primary_layer']} of {card['layers']} (chosen on validation scenarios); the "
        f"downstream site is block {card['downstream_layer']}.",
        "",
        "## Targets",
        "",
        *(
            [f"Missed: {'; '.join(one['what'] for one in missed)}.", ""]
            if missed
            else ["All met.", ""]
        ),
        "| what | target | measured | met |",
        "| --- | --- | --- | --- |",
        *(
            f"| {one['what']} | {one['target']} | {shown(one['value'], 3)} | "
            f"{'yes' if one['met'] else 'NO'} |"
            for one in card["targets"]
        ),
        "",
        "## Trait prompts",
        "",
        "High against low prompts on the same held-out scenarios.",
        "",
        "| trait | outcome | high | low | d | valid |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {trait} | {one['outcome']} | {shown(one['high'])} | {shown(one['low'])} | "
            f"{shown(one['d'])} | {shown(one['valid'])} |"
            for trait, one in card["traits"].items()
        ),
        "",
        "## Steering towards autonomy",
        "",
        "Outcome: the user was never asked. Strength in mean residual norms, at all tokens but "
        "BOS; chosen on validation scenarios.",
        "",
        "| method | strength | not asked | unsteered | d | valid | n |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {arm['strength']:.2f} | {arm['mean']:.2f} | {arm['base']:.2f} | "
            f"{arm['d']:.2f} | {arm['valid']:.2f} | {arm['n']} |"
            for name, arm in card["steering"].items()
        ),
        "",
        "## SAEs",
        "",
        "| SAE | latents | explained variance | L0 | dead |",
        "| --- | --- | --- | --- | --- |",
        *sae_rows(card),
        "",
        made_with(card),
    ]
    return "\n".join(lines) + "\n"


def sae_rows(card: Mapping[str, Any]) -> list[str]:
    """The lines of a card's table of SAEs: latents, explained variance, L0, dead share."""
    return [
        f"| {name} | {one['d_sae']} | {one['explained_variance']:.3f} | {one['l0']:.1f} | "
        f"{one['dead_share']:.3f} |"
        for name, one in card["saes"].items()
    ]


def made_with(card: Mapping[str, Any]) -> str:
    return "Made with " + ", ".join(f"{k} {v}" for k, v in card["versions"].items()) + "."


def make(
    plan: Plan,
    folder: Path,
    *,
    stages: Sequence[str] = STAGES,
    log: Callable[[str], None],
) -> None:
    """Run the stages of a plan; what they found is kept in `recipe.json` beside the model."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "recipe.json"
    made = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if "model" in stages:
        made = {"training": make_model(plan, folder, log)}
    if "saes" in stages:
        made = {**made, **make_saes(plan, folder, log)}
    record.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if "card" in stages:
        make_card(plan, folder, made, log)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: make one organism in a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m sae_steering_plugin.organisms.train",
        description="Make an embedded model: tokenizer, model, SAEs, a card of measured figures.",
        epilog="example: python -m sae_steering_plugin.organisms.train agent-gpt2 --out /tmp/a",
    )
    parser.add_argument("name", choices=sorted(PLANS))
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--quick", action="store_true", help="ends in seconds, learns nothing")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(given.threads)
    plan = PLANS[given.name]
    make(
        quick(plan) if given.quick else plan,
        given.out,
        stages=given.stages,
        log=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
    )


if __name__ == "__main__":
    main()
