"""Time per token of steering by a hook, by a change of weights, and of the plain model.

`python -m benchmarks.weight_edits [--quick] [--json FILE]`

One vector is added at every token, at one block's output or at every block's: by `steer`, and by
`to_bias_edit` applied. Models are random. GPT-2 has the biases that take the vector; Llama has
none, so that its weights gain them, and HookedTransformer keeps tensors of its own. Logits of hook
and weights are compared before anything is timed. Then: how the cost grows with width and with the
number of blocks that are steered, whole generations, and what the conversion itself costs.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from benchmarks import timing
from benchmarks.hook_overhead import (
    Host,
    answers,
    bridge,
    decoding,
    hooked,
    ours,
    prefilling,
    rounds_of,
    some_tokens,
    word_tokenizer,
)
from benchmarks.timing import Report, Variant, exponent, interleaved, whole
from sae_steering_plugin import Add, Edit, generate, to_bias_edit
from sae_steering_plugin.adapters.weights import EVERYWHERE

TARGET = 1.02
"""A bias that is there anyway costs nothing; one that was absent costs one addition a block."""
TOLERANCE = 1e-4
"""On logits: one sum in another order, float32, through the rest of a random model."""
PAIRS = (("steer", "unsteered"), ("weights", "unsteered"), ("weights", "steer"))


def llama(layers: int, width: int, words: int) -> Host:
    """A random Llama on the bridge: no projection has a bias."""
    from sae_lens import SAETransformerBridge
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(1, width // 64)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    inner = LlamaForCausalLM(config).eval()
    inner.config.architectures = ["LlamaForCausalLM"]
    model = SAETransformerBridge.boot_transformers(
        "random-llama", hf_model=inner, tokenizer=word_tokenizer(words), device="cpu"
    )

    def forward(tokens: Any, cache: Any) -> tuple[Any, Any]:
        output = model.original_model(tokens, past_key_values=cache, use_cache=True)
        return output.logits, output.past_key_values

    return Host(model, forward, "llama bridge", layers, width, words)


def edits_of(host: Host, blocks: int) -> list[Edit]:
    """A random vector of unit length per steered block, the last `blocks` of them."""
    generator = torch.Generator().manual_seed(2)
    vectors = torch.nn.functional.normalize(
        torch.randn(blocks, host.width, generator=generator), dim=1
    )
    first = host.layers - blocks
    return [
        Edit(Add(vector), f"blocks.{first + i}.hook_resid_post", EVERYWHERE)
        for i, vector in enumerate(vectors)
    ]


def three_ways(host: Host, blocks: int, work: Any, amount: int) -> dict[str, Variant]:
    """`work` (decoding or prefilling) on the plain model, with hooks, and with edited weights."""
    edits = edits_of(host, blocks)
    weights = to_bias_edit(host.model, edits)
    return {
        "unsteered": work(host, nullcontext, amount),
        "steer": work(host, ours(host, edits), amount),
        "weights": work(host, weights.apply, amount),
    }


def per_token(report: Report, row: str, host: Host) -> None:
    """Decode and prefill, one block and all."""
    for blocks in (1, host.layers):
        for word, work, amount in (
            ("decode", decoding, 6 if report.quick else 16),
            ("prefill", prefilling, 64),
        ):
            variants = three_ways(host, blocks, work, amount)
            what = f"{word}, {blocks} block{'s' * (blocks > 1)}"
            error = answers(report, f"{host.name}: {what}", variants, "steer", TOLERANCE)
            times = interleaved(variants, rounds=rounds_of(report))
            for one, other in PAIRS:
                report.compare(
                    row,
                    f"{what}: {one} / {other}",
                    times,
                    one,
                    other,
                    target=TARGET if (one, other) == PAIRS[1] else None,
                    error=error,
                    shapes=f"{host.shape}, {amount} tokens",
                )


def widening(report: Report) -> None:
    """Decode by width: how each way grows, and what hooks cost beside weights at each width."""
    widths = (64, 128, 256, 512) if report.quick else (64, 128, 256, 512, 1024)
    seconds: dict[str, list[float]] = {}
    for width in widths:
        host = bridge(4, width, 512)
        variants = three_ways(host, host.layers, decoding, 16)
        error = answers(report, f"width {width}", variants, "steer", TOLERANCE)
        times = interleaved(variants, rounds=rounds_of(report))
        for name in variants:
            seconds.setdefault(name, []).append(times.seconds(name))
        report.compare(
            "width",
            "decode, 4 blocks: weights / steer",
            times,
            "weights",
            "steer",
            error=error,
            exponent=exponent(widths, seconds["weights"]) if width == widths[-1] else None,
            shapes=host.shape,
        )
    report.notes.append(
        "growth of decode seconds with width: "
        + ", ".join(f"{name} {exponent(widths, found):+.2f}" for name, found in seconds.items())
    )


def deepening(report: Report) -> None:
    """Decode by the number of steered blocks of one model: seconds above the plain model's."""
    host = bridge(16, 64, 512)
    for blocks in (1, 4, 16):
        variants = three_ways(host, blocks, decoding, 16)
        error = answers(report, f"{blocks} blocks", variants, "steer", TOLERANCE)
        times = interleaved(variants, rounds=rounds_of(report))
        for one, other in PAIRS[:2]:
            report.compare(
                "blocks",
                f"decode, {blocks} of 16 blocks: {one} / {other}",
                times,
                one,
                other,
                error=error,
                shapes=host.shape,
            )


def generations(report: Report, host: Host) -> None:
    """Whole calls of `generate`, and the conversion beside one of them."""
    edits, prompt, steps = edits_of(host, 1), some_tokens(host, 8), 8 if report.quick else 32
    model, weights = host.model, to_bias_edit(host.model, edits)

    def text(*steering: Edit) -> Any:
        return generate(model, prompt, list(steering), max_new_tokens=steps, stop_at_eos=False)

    def with_weights() -> Any:
        with weights.apply():
            return text()

    report.same(f"{host.name}: text", torch.equal(with_weights().tokens, text(*edits).tokens))
    variants = {
        "unsteered": whole(text),
        "steer": whole(lambda: text(*edits)),
        "weights": whole(with_weights),
        "convert": whole(lambda: to_bias_edit(model, edits)),
        "apply": whole(lambda: weights.apply().revert()),
    }
    times = interleaved(variants, rounds=rounds_of(report))
    shapes = f"{host.shape}, {steps} new tokens"
    for one, other in (*PAIRS, ("convert", "unsteered"), ("apply", "unsteered")):
        report.compare("generate", f"generate: {one} / {other}", times, one, other, shapes=shapes)


def measure(report: Report) -> None:
    size = (2, 64, 512) if report.quick else (12, 768, 50257)
    small = bridge(*size)
    per_token(report, "gpt2", small)
    per_token(report, "llama", llama(*size))
    per_token(report, "hooked", hooked(*size))
    widening(report)
    deepening(report)
    generations(report, small)


if __name__ == "__main__":
    timing.main("weight_edits", measure, full_size=("gpt2", "llama", "hooked"))
