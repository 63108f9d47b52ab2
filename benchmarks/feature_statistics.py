"""One pass of activation statistics over all features, against `sae.encode` and dense reductions.

`python -m benchmarks.feature_statistics [--quick] [--json FILE]`

Rows 4a to 4d of the target table. A GPT-2-small-sized random bridge is read at layer 8; the
dictionaries are random unit rows with JumpReLU thresholds for an L0 near 64. "forward + encode" is
the clean pass to the layer and `sae.encode`, without keeping anything; the pass, which all ways
share, is timed once and added to each. The targets of row 4b (bfloat16 sieve) are for machines
with AMX; the ceilings below the table say what this one does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.dictionaries import jumprelu, peak_of
from benchmarks.timing import Report, exponent, interleaved, whole
from sae_steering_plugin.adapters.activations import TokenBatch, activations_at
from sae_steering_plugin.adapters.active_codes import active_encoder
from sae_steering_plugin.features.coactivation import ActiveCodes, coactivation_of
from sae_steering_plugin.runs.feature_statistics import FeatureRecorder
from tests.hosts import tiny_tokenizer

SITE, LAYERS, D, WORDS = "blocks.7.hook_resid_post", 8, 768, 50_257
ROWS, LENGTH = 16, 64
ROUNDS = 3


def host() -> Any:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, n_embd=D, n_head=12, vocab_size=WORDS)
    model = GPT2LMHeadModel(config).eval()
    return TransformerBridge.boot_transformers(
        "gpt2", hf_model=model, tokenizer=tiny_tokenizer(), device="cpu"
    )


def batch_of(seed: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(WORDS, (ROWS, LENGTH), generator=generator)
    real = torch.ones_like(tokens, dtype=torch.bool)
    nothing = torch.zeros(ROWS, dtype=torch.long)
    return TokenBatch(tokens, real, nothing, nothing.bool())


def seen(recorder: FeatureRecorder, x: Tensor, batch: TokenBatch) -> None:
    final = torch.zeros_like(batch.real)
    final[:, -1] = True
    recorder.see(x, batch.counted, final)


def measure(report: Report) -> None:
    widths = (2048, 16_384) if report.quick else (16_384, 32_768, 131_072)
    model, batch = host(), batch_of(1)
    x = activations_at(model, SITE, batch)
    forward = interleaved({"f": whole(lambda: activations_at(model, SITE, batch))}, rounds=ROUNDS)
    encoder_seconds = []
    for width in widths:
        sae = jumprelu(D, width, x.flatten(0, 1), hook_name=SITE)
        with torch.no_grad():
            codes = sae.encode(x).flatten(0, 1)
        recorder = FeatureRecorder.of(sae, together=False, sieve=False)
        seen(recorder, x, batch)
        mean, second, _, _ = recorder.tokens.moments()
        error = report.agree(
            f"means at {width}", torch.from_numpy(mean), codes.double().mean(0), 1e-6
        )
        report.agree(
            f"second moments at {width}",
            torch.from_numpy(second),
            codes.double().var(0, unbiased=False),
            1e-5,
        )
        l0 = float((codes > 0).sum(1).float().mean())
        shapes = f"{ROWS * LENGTH} tokens x {width}, L0 {l0:.0f}"
        del codes

        def encode(sae: Any = sae) -> None:
            with torch.no_grad():
                sae.encode(x)

        def dense(sae: Any = sae) -> None:
            with torch.no_grad():
                z = sae.encode(x).flatten(0, 1)
                z.sum(0), (z > 1e-6).sum(0), z.square().sum(0), z.amax(0)

        def product(sae: Any = sae) -> None:
            flat, out = x.flatten(0, 1), torch.empty(ROWS * LENGTH, 4096)
            with torch.no_grad():
                for first in range(0, sae.W_enc.shape[1], 4096):
                    some = sae.W_enc[:, first : first + 4096]
                    torch.mm(flat, some, out=out[:, : some.shape[1]])

        def ours(recorder: FeatureRecorder = recorder) -> None:
            seen(recorder, x, batch)

        sieving = FeatureRecorder.of(sae, together=False, sieve=True)
        seen(sieving, x, batch)
        near = _same_codes(report, sae, x, batch)

        def sieved(recorder: FeatureRecorder = sieving) -> None:
            seen(recorder, x, batch)

        variants = {"ours": ours, "sieved": sieved, "encode": encode, "dense": dense}
        variants["product"] = product
        times = interleaved({k: whole(v) for k, v in variants.items()}, rounds=ROUNDS)
        encoder_seconds.append(times.seconds("ours"))
        lower = forward.seconds("f")

        def against(
            one: str, other: str, times: timing.Times = times, lower: float = lower
        ) -> float:
            return (lower + times.seconds(one)) / (lower + times.seconds(other))

        report.add(
            "4a", f"statistics pass at {width}, over forward + encode", against("ours", "encode"),
            target=1.0, error=error, shapes=shapes, seconds=lower + times.seconds("ours"),
        )  # fmt: skip
        what = f"the same over forward + bare encoder product, {width}"
        report.add("4a", what, against("ours", "product"), target=1.1, shapes=shapes)
        report.add("4a", f"dense statistics at {width}", against("dense", "encode"))
        report.add(
            "4b", f"bfloat16 sieve at {width}, over forward + encode",
            against("sieved", "encode"), target={32_768: 0.7, 131_072: 0.4}.get(width),
            error=near, shapes=shapes,
        )  # fmt: skip
        what = f"without the forward pass: statistics at {width}, over encode"
        report.compare("4a", what, times, "ours", "encode")
        _together(report, sae, x, batch, lower + times.seconds("encode"), shapes)
        if width == widths[-1]:

            def fresh(sae: Any = sae) -> None:
                seen(FeatureRecorder.of(sae, together=False, sieve=False), x, batch)

            used = peak_of(fresh)
            what = f"memory beyond model and SAE at {width}, in units of 150 MB"
            report.add("4c", what, used / 150, target=1.0, shapes=f"{used:.0f} MB, both forms")
    growth = exponent(widths, encoder_seconds)
    what = "growth of encoder and statistics in the width"
    report.add("4a", what, growth, exponent=growth)
    report.notes.append(f"forward to layer {LAYERS}: {forward.seconds('f'):.2f} s a batch")


def _same_codes(report: Report, sae: Any, x: Tensor, batch: TokenBatch) -> float:
    """The sieved codes are those of the float32 product; where one has a code and the other has
    none, the float64 pre-activation lies at the threshold to rounding. Gives the largest difference
    of a code, relative to the longest activation."""
    plain, sieved = (active_encoder(sae, sieve=sieve)(x, batch.counted) for sieve in (False, True))
    width = sae.W_enc.shape[1]
    keys = [(hits.tokens * width + hits.features).numpy() for hits in (plain, sieved)]
    _, one, other = np.intersect1d(*keys, return_indices=True)
    alone = torch.from_numpy(np.setxor1d(*keys))
    rows, columns = x.flatten(0, 1).double(), sae.W_enc.detach()
    margins = [
        float((rows[key // width] - sae.b_dec.double()) @ columns[:, key % width].double())
        - float(sae.threshold[key % width])
        for key in alone.tolist()
    ]
    scale = float(rows.norm(dim=1).max())
    what = f"thresholds of {len(alone)} codes on one side only, {width}"
    report.agree(what, torch.tensor(margins + [0.0]) / scale, torch.zeros(len(margins) + 1), 4e-6)
    return report.agree(
        f"sieved codes at {width}", sieved.values[other] / scale, plain.values[one] / scale, 4e-6
    )


def _together(
    report: Report, sae: Any, x: Tensor, batch: TokenBatch, base: float, shapes: str
) -> None:
    """What co-activation adds per token: keeping the codes and counting them at the end."""
    recorder = FeatureRecorder.of(sae)
    seen(recorder, x, batch)
    codes = recorder.codes
    assert codes is not None
    copies = 32 if not report.quick else 4
    generator = torch.Generator().manual_seed(3)
    many = ActiveCodes(codes.n_features)
    table = codes.matrix()
    tokens = table.shape[0]
    for _ in range(copies):  # the same batch in other orders stands for further ones
        order = torch.randperm(tokens, generator=generator).numpy()
        some = table[order].tocoo()
        many.add(torch.from_numpy(some.row), torch.from_numpy(some.col), tokens)
    times = interleaved(
        {
            "panel": whole(lambda: coactivation_of(many)),
            "pairs": whole(lambda: coactivation_of(many, panel=None)),
            "add": whole(lambda: seen(FeatureRecorder.of(sae, sieve=False), x, batch)),
            "without": whole(
                lambda: seen(FeatureRecorder.of(sae, together=False, sieve=False), x, batch)
            ),
        },
        rounds=3,
    )
    kept = max(0.0, times.seconds("add") - times.seconds("without"))
    for name, target in (("panel", 0.05), ("pairs", 0.15)):
        share = (times.seconds(name) / copies + kept) / base
        micro = 1e6 * times.seconds(name) / copies / tokens
        what = f"co-activation ({name}) on top of forward + encode"
        report.add("4d", what, share, target=target, shapes=f"{shapes}, {micro:.0f} us/token")


if __name__ == "__main__":
    timing.main("feature_statistics", measure, full_size=("4a", "4b", "4c", "4d"))
