"""What a learning report costs beside plain training, in time and memory, and how that grows.

`python -m benchmarks.learning_report [--quick] [--json FILE]`

The model is `agent-gpt2`, the texts are its world's, the dictionaries are random TopK SAEs of
several widths at the output of block 2. A plain step is forward, backward to all weights and AdamW
on a batch; a report reads the same batches. The naive formulation keeps every gradient, forms all
pushes of all positions at once in float64 and sums them: answers must agree. Memory is the growth
of a fresh process's peak while it works.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.timing import Report, exponent, interleaved, whole
from sae_steering_plugin import GradientRecord, learning_report, training_hooks
from sae_steering_plugin.adapters.activations import TokenBatch, encode_texts, padded
from sae_steering_plugin.adapters.learning import learning_logits
from sae_steering_plugin.adapters.sae_parts import whole_codes
from sae_steering_plugin.adapters.training_hooks import linear_decoder
from sae_steering_plugin.adapters.transformer_lens import resolve
from sae_steering_plugin.runs.learning import counted_positions
from sae_steering_plugin.runs.learning_losses import next_token_loss

SITE, WIDTH = "blocks.2.hook_resid_post", 128
BATCH, TEXTS, FEW = 8, 64, 16
"""Texts a batch, and texts in all, in full and quickly."""
WIDTHS = (512, 2048, 8192)
TOKENS = (64, 16, 8)
"""Numbers of texts between which growth is measured, largest first."""
TOLERANCE = 1e-5
"""Share of the largest sum: gradients are float32, everything after them float64."""


def dictionary(d_sae: int) -> Any:
    """A random TopK SAE at the site."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name=SITE, model_name="agent-gpt2", prepend_bos=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=d_sae, k=24, metadata=metadata)).eval()
        with torch.no_grad():
            sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn_like(sae.W_dec), dim=1))
            sae.W_enc.copy_(sae.W_dec.T)
    return sae


class Subject:
    """The model with texts of one length, so that growth in texts is growth in tokens."""

    def __init__(self, n: int) -> None:
        from sae_steering_plugin import load_organism

        organism = load_organism("agent-gpt2", saes=())
        self.model = organism.model
        found = encode_texts(
            self.model, organism.world.texts(6 * n, split="test"), prepend_bos=False
        )
        found = [one for one in found if len(one) >= 64][:n]
        decode = self.model.tokenizer.decode
        self.texts = [decode(one.tokens[:64]) for one in found]
        encoded = encode_texts(self.model, self.texts, prepend_bos=False)
        self.batches = [
            padded(self.model, encoded[i : i + BATCH]) for i in range(0, len(encoded), BATCH)
        ]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)

    def step(self, batch: TokenBatch) -> None:
        """Forward, backward, AdamW; the learning rate is 0, so that all rounds see one model."""
        self.optimizer.zero_grad()
        next_token_loss(learning_logits(self.model, batch), batch).backward()
        self.optimizer.step()

    def steps(self) -> None:
        for batch in self.batches:
            self.step(batch)

    def recorded_steps(self, sae: Any) -> GradientRecord:
        record = GradientRecord(sae)
        with training_hooks(self.model, record) as (live,):
            for batch in self.batches:
                live.where = counted_positions(batch)
                self.step(batch)
        return record

    def report(self, sae: Any, texts: int | None = None) -> Any:
        return learning_report(
            self.model, sae, self.texts[:texts], batch_size=BATCH, prepend_bos=False, progress=False
        )

    def naive(self, sae: Any) -> dict[str, torch.Tensor]:
        """Backward to everything, all pushes at once."""
        seen: list[torch.Tensor] = []

        def keep(module: Any, inputs: Any, output: torch.Tensor) -> None:  # noqa: ARG001
            output.retain_grad()
            seen.append(output)

        handle = resolve(self.model, SITE).point.register_forward_hook(keep)
        try:
            for batch in self.batches:
                next_token_loss(learning_logits(self.model, batch), batch).backward()
        finally:
            handle.remove()
        where = [counted_positions(batch) for batch in self.batches]
        g = torch.cat([one.grad[w] for one, w in zip(seen, where, strict=True)]).double()
        rows = linear_decoder(sae)[0].double()
        with torch.no_grad():
            z = torch.cat([whole_codes(sae, one)[w] for one, w in zip(seen, where, strict=True)])
        along = g @ rows.T
        push = -along / rows.norm(dim=1)
        return {
            "push": push.sum(0),
            "push_abs": push.abs().sum(0),
            "attribution": -(along * z.double()).sum(0),
            "active": (z != 0).sum(0).double(),
        }


def answers(report: Report, subject: Subject, sae: Any) -> None:
    naive = subject.naive(sae)
    for name, found in (
        ("report", subject.report(sae).sums),
        ("record", subject.recorded_steps(sae).report().sums),
    ):
        for what, theirs in naive.items():
            ours = getattr(found, what)
            scale = float(theirs.abs().max())
            report.agree(f"{name}: {what}", ours / scale, theirs / scale, TOLERANCE)


def times(report: Report, subject: Subject, rounds: int) -> None:
    shapes = f"{len(subject.texts)} texts of 64 tokens, {BATCH} a batch"
    widths = WIDTHS[:2] if report.quick else WIDTHS
    variants: dict[str, Any] = {"steps": whole(subject.steps)}
    for width in widths:
        sae = dictionary(width)
        variants[f"report {width}"] = whole(lambda sae=sae: subject.report(sae))
        variants[f"record {width}"] = whole(lambda sae=sae: subject.recorded_steps(sae))
    variants["naive"] = whole(lambda: subject.naive(dictionary(widths[0])))
    found = interleaved(variants, rounds=rounds)
    for width in widths:
        report.compare(
            "report", f"report of {width} latents / plain training steps", found,
            f"report {width}", "steps", shapes=shapes,
        )  # fmt: skip
        report.compare(
            "record", f"steps with a record of {width} latents / plain steps", found,
            f"record {width}", "steps", shapes=shapes,
        )  # fmt: skip
    report.compare(
        "naive", f"report of {widths[0]} latents / naive formulation", found,
        f"report {widths[0]}", "naive", shapes=shapes,
    )  # fmt: skip
    if not report.quick:
        slope = exponent(widths, [found.seconds(f"report {width}") for width in widths])
        report.add("growth", "seconds of a report in latents", 0.0, exponent=slope, shapes=shapes)


def growth_in_tokens(report: Report, subject: Subject, rounds: int) -> None:
    sae = dictionary(WIDTHS[0])
    found = interleaved(
        {str(n): whole(lambda n=n: subject.report(sae, n)) for n in TOKENS}, rounds=rounds
    )
    slope = exponent([64 * n for n in TOKENS], [found.seconds(str(n)) for n in TOKENS])
    report.add("growth", "seconds of a report in tokens", 0.0, exponent=slope)


def memory(report: Report) -> None:
    """Growth of the peak of a fresh process for each kind of work."""
    widths = WIDTHS[:2] if report.quick else WIDTHS
    base = grown("steps", widths[0])
    for width in widths:
        size = grown("report", width)
        report.add(
            "memory", f"peak of a report of {width} latents / of plain steps", size / base,
            shapes=f"{size / 2**20:.0f} MB / {base / 2**20:.0f} MB",
        )  # fmt: skip


def grown(what: str, width: int) -> float:
    """Bytes by which the peak grows in a process that does only this."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.learning_report", CHILD, what, str(width)],
        env={**os.environ}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


CHILD = "--grown"


def child(what: str, width: int) -> None:
    torch.set_num_threads(1)
    subject, sae = Subject(FEW), dictionary(width)
    with torch.no_grad():  # what the first pass of a process allocates once
        learning_logits(subject.model, subject.batches[0])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is held now
    before = held("VmRSS")
    subject.steps() if what == "steps" else subject.report(sae)
    print(held("VmHWM") - before)


def held(what: str) -> int:
    """Bytes this process holds (VmRSS), or held at most since the peak was reset (VmHWM)."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


STATUS = Path("/proc/self/status")


def measure(report: Report) -> None:
    rounds = 3 if report.quick else timing.ROUNDS
    subject = Subject(FEW if report.quick else TEXTS)
    answers(report, subject, dictionary(WIDTHS[0]))
    times(report, subject, rounds)
    if not report.quick:
        growth_in_tokens(report, subject, rounds)
    if STATUS.exists():
        memory(report)
    else:
        report.notes.append("memory is measured on Linux only")


if __name__ == "__main__":
    if CHILD in sys.argv:
        child(sys.argv[-2], int(sys.argv[-1]))
    else:
        timing.main("learning_report", measure)
