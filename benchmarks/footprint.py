"""Direct-logit footprints of all features against dense blocks and against one at a time.

`python -m benchmarks.footprint [--quick] [--json FILE]`

Rows 6a to 6c of the target table at GPT-2's vocabulary. The floor is the blocked float32 product of
the rows with the unembedding, timed beside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.dictionaries import unit
from benchmarks.timing import Report, exponent, interleaved, whole
from sae_steering_plugin.features.footprint import (
    COLUMNS,
    ROWS,
    SHARES,
    footprint_moments,
    footprints,
)

D, WORDS, FEATURES = 768, 50_257, 1024


def product(rows: Tensor, unembed: Tensor) -> None:
    buffer = torch.empty(ROWS * COLUMNS)
    for some in rows.split(ROWS):
        for first in range(0, unembed.shape[1], COLUMNS):
            words = unembed[:, first : first + COLUMNS]
            torch.mm(some, words, out=buffer[: len(some) * words.shape[1]].view(len(some), -1))


def dense(rows: Tensor, unembed: Tensor, step: int = 256) -> dict[str, Tensor]:
    """The page's formulas, a block of whole footprints at a time."""
    found: dict[str, list[Tensor]] = {}
    for some in rows.split(step):
        r = some @ unembed
        sizes = r.abs()
        s = sizes / sizes.sum(1, keepdim=True)
        tops = s.topk(max(SHARES), dim=1).values
        figures = {
            "direct_logit_l2": r.norm(dim=1),
            "direct_logit_linf": sizes.amax(1),
            "direct_logit_entropy": -(s * s.clamp_min(1e-30).log()).sum(1),
            **{f"direct_top{k}_abs_mass_frac": tops[:, :k].sum(1) for k in SHARES},
        }
        for name, values in figures.items():
            found.setdefault(name, []).append(values)
    return {name: torch.cat(parts) for name, parts in found.items()}


def dense_words(rows: Tensor, unembed: Tensor) -> tuple[Tensor, Tensor]:
    parts = [(some @ unembed) for some in rows[:256].split(256)]
    return parts[0].topk(10, dim=1).values, (-parts[0]).topk(10, dim=1).values


def measure(report: Report) -> None:
    n, words = (512, 8192) if report.quick else (FEATURES, WORDS)
    rounds = 3 if report.quick else 5
    rows, unembed = unit(n, D), unit(words, D, seed=2).T.contiguous()
    expected = dense(rows, unembed)
    ours = footprints(rows, unembed, top=0)
    error = max(
        report.agree(name, ours.columns[name] / values, torch.ones(n), 5e-6)
        for name, values in expected.items()
    )
    listed = footprints(rows[:256], unembed, shares=(), top=10)
    up, down = dense_words(rows, unembed)
    listing = report.agree("promoted logits", listed.promoted_logits, up, 1e-6)
    report.agree("suppressed logits", -listed.suppressed_logits, down, 1e-6)
    shapes = f"{n} rows x {D} x {words} words"
    times = report.judged(
        lambda: interleaved(
            {
                "ours": whole(lambda: footprints(rows, unembed, top=0)),
                "words": whole(lambda: footprints(rows, unembed, shares=(), top=10)),
                "GEMM": whole(lambda: product(rows, unembed)),
                "dense": whole(lambda: dense(rows, unembed)),
                "single": whole(lambda: dense(rows[:16], unembed, 1)),
                "moments": whole(lambda: footprint_moments(rows, unembed)),
            },
            rounds=rounds,
        ),
        "ours",
        "GEMM",
        1.5,
    )
    what = "lengths, entropy and top shares, over the blocked product"
    report.compare("6a", what, times, "ours", "GEMM", target=1.5, error=error, shapes=shapes)
    report.compare("6a", "dense blocks with topk, the same", times, "dense", "GEMM")
    single = times.ratio("single", "GEMM") * n / 16
    report.add("6a", "one feature at a time, the same (16 features, scaled)", single)
    what = "top 10 promoted and suppressed words with lengths and entropy, over the product"
    report.compare("6b", what, times, "words", "GEMM", target=1.25, error=listing, shapes=shapes)
    growth_rows = [n // 8, n // 4, n // 2, n]
    per = interleaved(
        {str(m): whole(lambda m=m: footprint_moments(rows[:m], unembed)) for m in growth_rows},
        rounds=rounds,
    )
    # the Gram matrix of the unembedding is paid once per model, the rest per feature
    each = (per.seconds(str(n)) - per.seconds(str(n // 8))) / (n - n // 8)
    share = each / (times.seconds("GEMM") / n)
    exact = rows.double() @ unembed.double()
    moments = footprint_moments(rows, unembed)
    worst = report.agree(
        "l2, relative", moments["direct_logit_l2"] / exact.norm(dim=1), torch.ones(n), 1e-6
    )
    report.agree("mean", moments["direct_logit_mean"], exact.mean(1), 1e-6)
    what = "length, mean and variance per feature from the Gram matrix, over the product"
    report.add("6c", what, share, target=0.05, error=worst, shapes=shapes)
    whole_table = interleaved(
        {str(m): whole(lambda m=m: footprints(rows[:m], unembed, top=0)) for m in growth_rows},
        rounds=rounds,
    )
    growth = exponent(growth_rows, [whole_table.seconds(str(m)) for m in growth_rows])
    report.add("6a", "growth in the number of features", growth, exponent=growth)


if __name__ == "__main__":
    timing.main("footprint", measure, full_size=("6a", "6b", "6c"))
