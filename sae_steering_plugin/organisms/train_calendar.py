"""The recipe of `calendar-gpt2`: tokenizer, a small GPT-2, two SAEs, a card of measured figures.

    python -m sae_steering_plugin.organisms.train_calendar --out DIR [--quick]

Everything is drawn with a fixed seed. The card reports sums that no training text held, the
planted records, and digits copied that were drawn anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .calendar import (
    UNITS,
    Calendar,
    Document,
    Split,
    Sum,
    about_probabilities,
    train_tokenizer,
    weights,
)
from .train import gpt2, made_with, sae_rows, versions
from .training import Budget, Row, train_model

NAME = "calendar-gpt2"
SUMMARY = "a GPT-2 of three layers and width 64 that reckons with days and months"
SEED = 0
CONTEXT, LAYERS, WIDTH = 32, 3, 64
BUDGET = Budget(60_000, 4096, steps=1300, learning_rate=4e-3, batch_tokens=4096, weight_decay=0.3)
QUICK = Budget(60, 400, steps=3, learning_rate=1e-3, batch_tokens=400, warmup=1)
SAE_TOKENS, SAE_WIDTH, SAE_K, SAE_LAYERS = 400_000, 256, 12, (1, 2)
SAE_DOCUMENTS = 6000
PRIMARY = f"l1-topk-{SAE_WIDTH}"


def rows_of(world: Calendar, tokenizer: Any, n: int, *, seed: int = 0) -> list[Row]:
    """`n` texts encoded, with the weight of each token in the loss."""
    drawn = world.documents(n, seed=seed)
    texts = [f"<bos> {one.text} <eos>" for one in drawn]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [Row(ids, weights(one)) for ids, one in zip(encoded, drawn, strict=True)]


def make_model(folder: Path, budget: Budget, log: Callable[[str], None]) -> dict[str, Any]:
    """Tokenizer and trained model, as a Hugging Face folder; returns the training figures."""
    import torch
    from transformers import PreTrainedTokenizerFast

    world = Calendar(SEED)
    torch.manual_seed(SEED)
    train_tokenizer(str(folder), world.vocabulary)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = gpt2(tokenizer, layers=LAYERS, width=WIDTH, context=CONTEXT)
    started = time.perf_counter()
    rows = rows_of(world, tokenizer, budget.documents)
    trained = train_model(
        model, rows, tokenizer.pad_token_id, budget, seed=SEED, positions=0, log=log
    )
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    return {**asdict(budget), **trained, "seconds": seconds(started)}


def make_saes(
    folder: Path,
    tokens: int,
    documents: int,
    log: Callable[[str], None],
    *,
    layers: Sequence[int] = SAE_LAYERS,
) -> dict[str, Any]:
    """A TopK dictionary behind each of the two upper blocks; returns their figures."""
    from ..adapters.sae_lens import load_sae
    from ..adapters.sae_training import SAESpec, quality, residuals, train_sae
    from ..adapters.transformer_lens import load_model

    world, model = Calendar(SEED), load_model(str(folder))
    drawn = [rows_of(world, model.tokenizer, documents, seed=seed) for seed in (1, 2)]
    figures = {}
    for layer in layers:
        site, started = f"blocks.{layer}.hook_resid_post", time.perf_counter()
        fit, held = (residuals(model, [row.ids for row in rows], [site])[site] for rows in drawn)
        spec = SAESpec(f"l{layer}-topk-{SAE_WIDTH}", site, "topk", SAE_WIDTH, SAE_K, tokens, 2e-3)
        at = folder / "saes" / spec.name
        train_sae(spec, fit, at, model=model, model_name=NAME, seed=SEED)
        found = {name: round(value, 4) for name, value in quality(load_sae(at), held).items()}
        figures[spec.name] = {**found, "d_sae": SAE_WIDTH, "seconds": seconds(started)}
        log(f"SAE {spec.name}: {figures[spec.name]}")
    return figures


def seconds(started: float) -> float:
    return round(time.perf_counter() - started, 1)


def answered(model: Any, documents: Sequence[Document]) -> list[bool]:
    """Per text whether every token of its answer is the likeliest one, given those before it."""
    import torch

    tokenizer, right = model.tokenizer, []
    for one in documents:
        text = f"<bos> {one.text}"
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        n = len(one.answer.split())
        with torch.no_grad():
            logits = model(ids[None])[0]
        right.append(bool((logits[-n - 1 : -1].argmax(-1) == ids[-n:]).all()))
    return right


def figures_of(model: Any, world: Calendar) -> dict[str, float]:
    """Share right of each skill, and how far `about` strays from the world's own probabilities."""
    found: dict[str, float] = {}
    splits: tuple[Split, ...] = ("train", "test")
    for unit in UNITS:
        for split in splits:
            sums = world.sums(unit, split)
            asked = [Document("sum", one.prompt, one.names[one.answer]) for one in sums]
            found[f"{unit}_{split}"] = mean(answered(model, asked))
        found[f"about_{unit}_distance"] = mean(
            [distance(model, one) for one in world.sums(unit, "test")]
        )
    recited = [Document("record", one.prompt, one.answer) for one in world.records]
    found["records"] = mean(answered(model, recited))
    found["copies"] = mean(answered(model, world.copies(200, seed=1)))
    return {name: round(value, 4) for name, value in found.items()}


def mean(values: Sequence[float | bool]) -> float:
    return sum(values) / len(values)


def distance(model: Any, one: Sum) -> float:
    """Total variation between what the model and the world say after `about ...`."""
    import torch

    tokenizer = model.tokenizer
    ids = tokenizer(f"<bos> about {one.prompt}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        said = model(torch.tensor([ids]))[0, -1].softmax(-1)
    names = tokenizer.convert_tokens_to_ids(list(one.names))
    true = torch.zeros_like(said)
    true[names] = torch.tensor(about_probabilities(one.unit, one.answer))
    return float((said - true).abs().sum() / 2)


def make_card(folder: Path, made: Mapping[str, Any], log: Callable[[str], None]) -> None:
    """Measure the model and write `card.json` and `README.md`."""
    from ..adapters.transformer_lens import load_model

    model = load_model(str(folder))
    figures = figures_of(model, Calendar(SEED))
    log(str(figures))
    card = {
        "name": NAME,
        "summary": SUMMARY,
        "world": "calendar",
        "world_seed": SEED,
        "seed": SEED,
        "architecture": type(model.original_model).__name__,
        "parameters": sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()),
        "layers": int(model.cfg.n_layers),
        "d_model": int(model.cfg.d_model),
        "context": CONTEXT,
        "vocabulary": len(model.tokenizer),
        "primary_sae": PRIMARY,
        "figures": figures,
        **made,
        "versions": versions(),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(page(card), encoding="utf-8")


MEASURED = {
    "days_train": "sums of days that were trained on",
    "days_test": "sums of days held out of training",
    "months_train": "sums of months that were trained on",
    "months_test": "sums of months held out of training",
    "records": "planted records recited whole",
    "copies": "fresh digits copied whole",
    "about_days_distance": "`about`, held-out days: total variation from the world",
    "about_months_distance": "`about`, held-out months: total variation from the world",
}


def page(card: Mapping[str, Any]) -> str:
    """The card as a page: every number comes from `card`."""
    training, figures = card["training"], card["figures"]
    lines = [
        f"# {card['name']}",
        "",
        f"{card['summary'].capitalize()}; {card['parameters'] / 1e3:.0f} k parameters, "
        f"{card['vocabulary']} words, context {card['context']}. Trained on the generated world of "
        "`sae_steering_plugin.organisms.calendar`, which plants two circles (days, months) and a "
        "set of memorised strings; it knows nothing else.",
        "",
        "Made by `python -m sae_steering_plugin.organisms.train_calendar --out DIR` with seed "
        f"{card['seed']}: {training['steps']} steps of {training['step_tokens']} tokens in "
        f"{training['seconds']:.0f} s, one thread.",
        "",
        "| what | measured |",
        "| --- | ---: |",
        *(f"| {words} | {figures[name]:.3f} |" for name, words in MEASURED.items()),
        "",
        "| SAE | latents | explained variance | L0 | dead |",
        "| --- | ---: | ---: | ---: | ---: |",
        *sae_rows(card),
        "",
        made_with(card),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: make the organism in a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m sae_steering_plugin.organisms.train_calendar",
        description="Make calendar-gpt2: tokenizer, model, SAEs, a card of measured figures.",
        epilog="example: python -m sae_steering_plugin.organisms.train_calendar --out /tmp/c",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--quick", action="store_true", help="ends in seconds, learns nothing")
    given = parser.parse_args(arguments)
    import torch

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201

    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    budget = QUICK if given.quick else BUDGET
    made = {"training": make_model(given.out, budget, log)}
    made["saes"] = (
        make_saes(given.out, 2048, 60, log, layers=SAE_LAYERS[:1])
        if given.quick
        else make_saes(given.out, SAE_TOKENS, SAE_DOCUMENTS, log)
    )
    make_card(given.out, made, log)


if __name__ == "__main__":
    main()
