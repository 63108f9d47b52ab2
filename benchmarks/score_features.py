"""Scores of every feature of a dictionary against the one-feature-at-a-time ways.

`python -m benchmarks.score_features [--quick] [--json FILE]`

Rows 7a to 7d of the target table: exact AUROC of all features against a scikit-learn loop and
against SciPy's `rankdata` on dense blocks, fifty concepts against one, mutual information against
a scikit-learn loop, and L2 logistic probes against scikit-learn's. A loop over all features takes
minutes to hours, so it is run on a random sample of them and scaled; the answers are compared on
that sample. scikit-learn's probes are one fit, scaled to fifty; its objective is compared there.
Codes are drawn at random: heavily tied values, 48 texts per feature on average, as a dictionary of
32k features and an L0 near 400 per text gives.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import torch

from benchmarks import timing
from benchmarks.timing import Report, Times, exponent, interleaved, whole
from sae_steering_plugin.features import PooledCodes, fit_probes, score_features

TEXTS, FEATURES, FIRING, CONCEPTS = 4096, 32_768, 48, 50
SAMPLE = 48
EXACT = 1e-12


def drawn(texts: int, features: int, firing: float, *, seed: int = 0) -> PooledCodes:
    """Random pooled codes whose values are rounded, so that most of them tie with another."""
    rng = np.random.default_rng(seed)
    counts = np.minimum(rng.poisson(firing, size=features), texts)
    examples = np.concatenate([np.sort(rng.choice(texts, c, replace=False)) for c in counts])
    values = np.maximum(np.round(rng.exponential(size=len(examples)), 1), 0.1)
    return PooledCodes(
        torch.from_numpy(values.astype(np.float32)),
        torch.from_numpy(examples),
        torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
        torch.ones(texts, dtype=torch.long),
        "max",
        "drawn",
        "blocks.0.hook_resid_post",
    )


def labels_of(texts: int, concepts: int, *, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).random((texts, concepts)) < 0.2).astype(np.float64)


def column(codes: PooledCodes, feature: int) -> np.ndarray:
    out = np.zeros(len(codes), dtype=np.float32)
    inside = slice(int(codes.starts[feature]), int(codes.starts[feature + 1]))
    out[codes.examples[inside].numpy()] = codes.values[inside].numpy()
    return out


def scaled(times: Times, slow: str, share: float) -> Times:
    """The times of `slow`, which did only `share` of the work, as if it had done all of it."""
    grown = {
        kind: {
            name: [t / share if name == slow else t for t in found]
            for name, found in getattr(times, kind).items()
        }
        for kind in ("cpu", "wall")
    }
    return Times(grown["cpu"], grown["wall"])


def auroc_rows(report: Report, codes: PooledCodes, labels: np.ndarray, rounds: int) -> None:
    from scipy.stats import rankdata
    from sklearn.metrics import roc_auc_score

    y = labels[:, 0]
    sample = np.random.default_rng(2).choice(codes.n_features, SAMPLE, replace=False)
    dense = [column(codes, int(feature)) for feature in sample]
    sparse = codes.matrix()[:, sample]

    def ours() -> Any:
        return score_features(codes, y).values["auroc"][:, 0]

    def loop() -> Any:
        return torch.tensor([float(roc_auc_score(y, x)) for x in dense], dtype=torch.float64)

    def ranked() -> np.ndarray:
        ranks = rankdata(np.ascontiguousarray(sparse.toarray().T), axis=1)
        n_pos = y.sum()
        total = ranks[:, y == 1].sum(axis=1) - n_pos * (n_pos + 1) / 2
        return total / (n_pos * (len(y) - n_pos))

    found = ours()[torch.from_numpy(sample)]
    error = report.agree("AUROC and scikit-learn", found, loop(), EXACT)
    report.agree("AUROC and SciPy's ranks", found, torch.from_numpy(ranked()), EXACT)
    times = interleaved(
        {"ours": whole(ours), "loop": whole(loop), "ranks": whole(ranked)}, rounds=rounds
    )
    share = SAMPLE / codes.n_features
    shapes = f"{codes.n_features} features x {len(codes)} texts, {len(codes.values)} stored"
    for other, what, target in (
        ("loop", f"AUROC: ours / scikit-learn loop (scaled from {SAMPLE} features)", 1 / 300),
        ("ranks", f"AUROC: ours / rankdata on dense blocks (scaled from {SAMPLE})", 1 / 40),
    ):
        report.compare(
            "7a", what, scaled(times, other, share), "ours", other,
            target=target, shapes=shapes, error=error,
        )  # fmt: skip


def concept_rows(report: Report, codes: PooledCodes, labels: np.ndarray, rounds: int) -> None:
    def one() -> Any:
        return score_features(codes, labels[:, 0]).values["auroc"]

    def all_of_them() -> Any:
        return score_features(codes, labels).values["auroc"]

    error = report.agree("fifty concepts and one", all_of_them()[:, :1], one(), EXACT)
    times = report.judged(
        lambda: interleaved({"one": whole(one), "all": whole(all_of_them)}, rounds=rounds),
        "all", "one", 1.5,
    )  # fmt: skip
    report.compare(
        "7b", f"AUROC: {labels.shape[1]} concepts / one", times, "all", "one",
        target=1.5, shapes=f"{codes.n_features} features", error=error,
    )  # fmt: skip


def information_rows(report: Report, codes: PooledCodes, labels: np.ndarray, rounds: int) -> None:
    from sklearn.metrics import mutual_info_score

    sample = np.random.default_rng(3).choice(codes.n_features, SAMPLE, replace=False)
    fires = [column(codes, int(feature)) > 0 for feature in sample]

    def ours() -> Any:
        return score_features(codes, labels, scores=("mutual_information",)).values[
            "mutual_information"
        ]

    def loop() -> Any:
        found = [float(mutual_info_score(labels[:, 0], x)) for x in fires]
        return torch.tensor(found, dtype=torch.float64)

    found = ours()[torch.from_numpy(sample), 0]
    error = report.agree(
        "mutual information and scikit-learn",
        found,
        loop(),
        EXACT,
    )
    times = interleaved({"ours": whole(ours), "loop": whole(loop)}, rounds=rounds)
    share = SAMPLE / (codes.n_features * labels.shape[1])
    report.compare(
        "7c", f"mutual information: ours / scikit-learn loop (scaled from {SAMPLE} pairs)",
        scaled(times, "loop", share), "ours", "loop", target=1 / 1000,
        shapes=f"{codes.n_features} features x {labels.shape[1]} concepts", error=error,
    )  # fmt: skip


def probe_rows(report: Report, codes: PooledCodes, labels: np.ndarray, rounds: int) -> None:
    """Against scikit-learn given the dense table and given the sparse one, with one target: which
    of them the target was measured on is not written down, and sparse is the stronger rival."""
    from sklearn.linear_model import LogisticRegression

    sparse = codes.matrix().tocsr()
    dense = sparse.toarray()
    y = labels[:, 0]

    def ours() -> Any:
        return fit_probes(codes, labels)

    def theirs(matrix: Any) -> Any:
        return LogisticRegression(C=1.0, max_iter=1000).fit(matrix, y)

    fit, reference = ours(), theirs(sparse)
    logits = sparse @ reference.coef_[0] + reference.intercept_[0]
    value = 0.5 * (reference.coef_**2).sum() + (np.logaddexp(0, logits) - y * logits).sum()
    above = float(fit.objective[0]) - value
    report.same("a probe's objective is not above scikit-learn's", above <= 0)
    times = interleaved(
        {
            "ours": whole(ours),
            "dense": whole(lambda: theirs(dense)),
            "sparse": whole(lambda: theirs(sparse)),
        },
        rounds=rounds,
        warm_up=0,
    )
    for other in ("dense", "sparse"):
        report.compare(
            "7d",
            f"{labels.shape[1]} L2 probes: ours / scikit-learn, {other} (one fit, scaled)",
            scaled(times, other, 1 / labels.shape[1]), "ours", other, target=1 / 20,
            shapes=f"{len(codes)} texts x {codes.n_features} features, objective {above:+.1e}",
            error=max(above, 0.0),
        )  # fmt: skip


def growth_rows(report: Report) -> None:
    """AUROC in the texts at fixed density, and in the width at fixed stored values."""
    for what, sizes in (
        ("texts at fixed density", [(n, 8192, n * 48 / 4096) for n in (1024, 2048, 4096, 8192)]),
        ("width at fixed stored values", [
            (TEXTS, width, 48 * 32_768 / width) for width in (16_384, 32_768, 65_536, 131_072)
        ]),
    ):  # fmt: skip
        seconds = []
        for texts, width, firing in sizes:
            codes, y = drawn(texts, width, firing), labels_of(texts, 1)
            run = whole(lambda codes=codes, y=y: score_features(codes, y))
            seconds.append(interleaved({"one": run}, rounds=3).seconds("one"))
        axis = [size[0] if "texts" in what else size[1] for size in sizes]
        report.add(
            "growth", f"AUROC in {what}", seconds[-1] / seconds[0], seconds=seconds[-1],
            exponent=exponent(axis, seconds), shapes=f"{axis[0]} to {axis[-1]}",
        )  # fmt: skip


def memory_note(report: Report, codes: PooledCodes, labels: np.ndarray) -> None:
    tracemalloc.start()
    score_features(codes, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    stored = sum(t.nbytes for t in (codes.values, codes.examples, codes.starts))
    report.notes.append(
        f"AUROC of {codes.n_features} features x {labels.shape[1]} concepts: peak "
        f"{peak / 1e6:.0f} MB beyond the codes ({stored / 1e6:.0f} MB)"
    )


def measure(report: Report) -> None:
    rounds = 2 if report.quick else timing.ROUNDS
    features = FEATURES // 8 if report.quick else FEATURES
    codes, labels = drawn(TEXTS, features, FIRING), labels_of(TEXTS, CONCEPTS)
    auroc_rows(report, codes, labels, rounds)
    concept_rows(report, codes, labels, rounds)
    information_rows(report, codes, labels, rounds)
    for texts in (1024,) if report.quick else (2048, 4096):
        probe_rows(report, codes.of(range(texts)), labels[:texts], 1 if report.quick else 3)
    if not report.quick:
        growth_rows(report)
    memory_note(report, codes, labels)


if __name__ == "__main__":
    timing.main("score_features", measure, full_size=("7a", "7b", "7c", "7d"))
