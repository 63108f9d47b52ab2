"""Side-effect labels of many features against one forward pass per (feature, context).

`python -m benchmarks.side_effects [--quick] [--json FILE]`

A random model of GPT-2-small's size on the bridge, hook after layer 8 of 12, downstream dictionary
after layer 10, panel of 2,048. The naive way adds the row in a hook, takes all logits and encodes
the whole downstream dictionary, once per pair; it is timed on some pairs and scaled. Ours is
`measure_side_effects` on shared contexts: the price of a further feature (the difference of two
calls), and a whole call with its clean pass and layout. Labels are compared on sampled pairs before
anything is timed.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks import timing
from benchmarks.timing import Clock, Report, exponent, interleaved

TOLERANCE = 1e-5
"""Relative to the label's size (or 1): float32 rounding of products of other shapes."""


def host(quick: bool) -> tuple[Any, int, str, str]:
    """Model, words, site and downstream site."""
    from benchmarks.hook_overhead import bridge

    layers, width, words = (4, 128, 5000) if quick else (12, 768, 50257)
    model = bridge(layers, width, words).model.eval()
    at, later = (layers * 2) // 3, (layers * 5) // 6
    return model, words, f"blocks.{at}.hook_resid_pre", f"blocks.{later}.hook_resid_pre"


def residuals(model: Any, site: str, tokens: Any) -> Any:
    import torch

    from sae_steering_plugin.adapters.activations import TokenBatch, activations_at

    real = torch.ones_like(tokens, dtype=torch.bool)
    start = torch.zeros(len(tokens))
    return activations_at(
        model, site, TokenBatch(tokens, real, start.long(), start.bool())
    ).flatten(0, 1)


def relu(d_in: int, d_sae: int, x: Any, *, hook_name: str) -> Any:
    """A ReLU SAE that fires about 64 times: a code that jumps at its threshold could differ by the
    threshold where two ways of computing differ by rounding."""
    import torch
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    from benchmarks.dictionaries import jumprelu

    jumping = jumprelu(d_in, d_sae, x, hook_name=hook_name)
    sae = StandardSAE(
        StandardSAEConfig(d_in=d_in, d_sae=d_sae, metadata=SAEMetadata(hook_name=hook_name))
    )
    with torch.no_grad():
        sae.W_enc.copy_(jumping.W_enc)
        sae.W_dec.copy_(jumping.W_dec)
        sae.b_enc.copy_(-jumping.threshold)
    return sae.eval()


class Naive:
    """One forward pass per pair, as one writes it: a hook, all logits, the whole dictionary."""

    def __init__(self, model: Any, sae: Any, later: Any, site: str, read: str, panel: Any) -> None:
        from sae_steering_plugin.adapters.transformer_lens import resolve

        self.model, self.sae, self.later, self.panel = model, sae, later, panel
        self.site, self.read = (resolve(model, name).name for name in (site, read))

    def one(self, tokens: Any, row: Any) -> tuple[Any, Any]:
        """Last logits and watched codes of one context with `row` added at its last token."""
        import torch

        held: list[Any] = []

        def push(x: Any, hook: Any) -> Any:  # noqa: ARG001
            x = x.clone()
            x[:, -1] += row
            return x

        def read(x: Any, hook: Any) -> None:  # noqa: ARG001
            held.append(x)

        with torch.no_grad():
            logits = self.model.run_with_hooks(
                tokens[None], fwd_hooks=[(self.site, push), (self.read, read)]
            )
            codes = self.later.encode(held[-1])[0, -1, self.panel]
        return logits[0, -1], codes


def measure(report: Report) -> None:
    import torch

    from sae_steering_plugin.adapters.columns import ContextRows
    from sae_steering_plugin.adapters.sae_parts import decoder_rows
    from sae_steering_plugin.effects.spread import spread, spread_columns
    from sae_steering_plugin.effects.stability import stability
    from sae_steering_plugin.runs.side_effects import measure_side_effects, survey_contexts

    quick = report.quick
    model, words, site, read = host(quick)
    width = 2048 if quick else 8192
    contexts, features, sampled = (64, 64, 2) if quick else (64, 96, 2)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, words, (contexts, 48), generator=generator)
    d = int(model.cfg.d_model)
    sae = relu(d, width, residuals(model, site, tokens[:16]), hook_name=site)
    later = relu(d, width, residuals(model, read, tokens[:16]), hook_name=read)
    panel = min(2048, width)
    strength = 5.0  # a unit row against random residuals; 1 moves rounding and little else

    def ours(n: int, *, full: bool, place: Any = "shared", survey: Any = None) -> Any:
        return measure_side_effects(
            model,
            sae,
            range(n),
            tokens,
            downstream=later,
            strengths=(strength,),
            contexts=place,
            panel=panel,
            full=full,
            survey=survey,
            progress=False,
        )

    survey = survey_contexts(model, sae, tokens, downstream=later, panel=panel, progress=False)
    naive = Naive(model, sae, later, site, read, survey.panel)
    few = torch.arange(4)
    for full in (False, True):
        found = ours(sampled, full=full, place=few, survey=survey).of().table
        for feature in range(sampled):
            row = strength * decoder_rows(sae, [feature])[0]
            pairs = [
                (naive.one(tokens[i], row), naive.one(tokens[i], 0.0 * row)) for i in few.tolist()
            ]
            shifts = torch.stack([steered[0] - clean[0] for steered, clean in pairs])
            moved = torch.stack([steered[1] - clean[1] for steered, clean in pairs])
            labels = {k: float(v) for k, v in stability(shifts).to_dict().items()}
            means = spread(moved, torch.full((len(moved),), -1)).mean(0).tolist()
            labels |= dict(zip(spread_columns(), means, strict=True))
            labels.pop("count_ex_self")
            wanted = torch.tensor(list(labels.values()))
            got = torch.tensor([float(found.loc[feature, name]) for name in labels])
            size = wanted.abs().clamp_min(1.0)
            error = report.agree(f"labels, full={full}", got / size, wanted / size, TOLERANCE)

    _thresholds(report, model, sae, site, read, tokens, width, strength)

    def loop(clock: Clock) -> None:
        with clock:
            for i in range(sampled):
                row = strength * decoder_rows(sae, [i])[0]
                for j in range(2):
                    naive.one(tokens[j], row)

    def labels(n: int, *, full: bool, known: Any = survey) -> Any:
        def variant(clock: Clock) -> None:
            with clock:
                ours(n, full=full, survey=known)

        return variant

    fewer, for_logits = 8, (4, 20)
    times = interleaved(
        {
            "naive": loop,
            "whole call": labels(features, full=False, known=None),
            "core": labels(features, full=False),
            "core, few": labels(fewer, full=False),
            "full": labels(for_logits[1], full=True),
            "full, few": labels(for_logits[0], full=True),
        },
        rounds=1 if quick else 2,
        warm_up=0,
    )

    def seconds(found: Any) -> dict[str, float]:
        """Seconds per pair: of the whole call, and of a further feature on contexts laid out."""
        at = {name: median(values) for name, values in found.items()}
        more = (features - fewer) * contexts, (for_logits[1] - for_logits[0]) * contexts
        return {
            "naive": at["naive"] / (sampled * 2),
            "whole call": at["whole call"] / (features * contexts),
            "core": (at["core"] - at["core, few"]) / more[0],
            "full": (at["full"] - at["full, few"]) / more[1],
        }

    cpu, wall = seconds(times.cpu), seconds(times.wall)
    shapes = f"{contexts} contexts x 48 tokens, {d} wide, {words} words, panel {panel}"
    for row, what, name, target in (
        ("8a", "a further feature with logits: KL, moved, shares", "full", 1 / 50),
        ("8b", "a further feature without forming logits", "core", 1 / 150),
        ("  all", f"{features} features, clean pass and layout included", "whole call", None),
    ):
        report.add(
            row,
            f"{what} / one forward per pair",
            cpu[name] / cpu["naive"],
            target=target,
            seconds=cpu[name],
            wall_ratio=wall[name] / wall["naive"],
            error=error,
            shapes=shapes,
        )
    lengths, grown = (16, 128), []
    steps = torch.randn(64, d, generator=generator)
    for length in lengths:
        drawn = torch.randint(3, words, (64, length), generator=generator)
        laid = ContextRows(model, drawn, site, read)
        clock = Clock()
        laid.under(steps)
        with clock:
            for _ in range(5 if quick else 20):
                laid.under(steps)
        grown.append(clock.cpu)
    report.add(
        "  growth",
        "one column of 64 rows, contexts of 16 to 128 tokens",
        grown[-1] / grown[0],
        exponent=exponent(lengths, grown),
        shapes=shapes,
    )


def _thresholds(
    report: Report,
    model: Any,
    sae: Any,
    site: str,
    read: str,
    tokens: Any,
    width: int,
    strength: float,
) -> None:
    """Labels under a JumpReLU dictionary, whose codes jump by the threshold where two ways of
    computing differ by rounding: every watched code agrees, but for those whose float64
    pre-activation lies at its threshold to rounding. These are counted."""
    import torch

    from benchmarks.dictionaries import jumprelu
    from sae_steering_plugin.adapters.columns import ContextRows
    from sae_steering_plugin.adapters.sae_parts import decoder_rows, parts_of

    d = int(model.cfg.d_model)
    later = jumprelu(d, width, residuals(model, read, tokens[:16]), hook_name=read)
    watched = torch.arange(min(2048, width))
    naive = Naive(model, sae, later, site, read, watched)
    parts = parts_of(later, watched.tolist(), "cpu")
    some = tokens[:8]
    laid = ContextRows(model, some, site, read)
    columns = later.W_enc.detach()[:, watched].double()
    at_threshold = compared = 0
    worst = torch.zeros(())
    for feature in range(2):
        row = strength * decoder_rows(sae, [feature])[0]
        column = laid.under(row.expand(len(some), -1)).read
        with torch.no_grad():
            ours = parts.encode_rows(column)
        theirs = torch.stack([naive.one(one, row)[1] for one in some])
        apart = (ours > 0) != (theirs > 0)
        pre = (column.double() - later.b_dec.double()) @ columns + later.b_enc[watched].double()
        scale = float(column.norm(dim=1).max())
        margin = (pre - later.threshold[watched].double())[apart] / scale
        if len(margin):
            zero = torch.zeros(len(margin))
            report.agree("margins of codes on one side only", margin, zero, 2e-5)
        same = torch.where(apart, 0.0, (ours - theirs) / scale)
        report.agree("codes on both sides", same, torch.zeros_like(same), TOLERANCE)
        worst = torch.maximum(worst, same.abs().max())
        at_threshold, compared = at_threshold + int(apart.sum()), compared + apart.numel()
    report.add(
        "  jump",
        "share of watched JumpReLU codes at their threshold to rounding, all others equal",
        at_threshold / compared,
        error=float(worst),
        shapes=f"{at_threshold} of {compared} codes",
    )


if __name__ == "__main__":
    timing.main("side_effects", measure, full_size=("8a", "8b"))
