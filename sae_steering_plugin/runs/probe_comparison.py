"""Probes on raw activations beside probes on a dictionary's codes, on the same splits.

    table = compare_probes(collect_labelled(...), sae, shifted=collect_labelled(...))
    quiver_of_arrows([table, ...])

Reported elsewhere (arXiv 2502.16681): SAE probes do not beat raw ones on average, in or out of
distribution. Good detection is not good steering, and the reverse: never choose a way to steer by
these figures. A high AUROC of the SAE error does not show either that the dictionary misses the
concept: threshold shrinkage leaves part of every firing feature in it; read it beside the codes'.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..adapters.sae_lens import sae_id
from ..adapters.sae_parts import site_names, whole_codes
from ..directions.codes import same_site
from ..directions.heldout import auroc, grouped_folds
from ..directions.recipe import require_two_sides
from ..effects.intervals import Draws, Interval, bootstrap, mean_interval, superiority_interval
from ..types import Labelled
from .axbench.detection import bag_of_words_scores
from .pooled_codes import blocks

PENALTIES = tuple(10.0**power for power in range(-4, 3))
"""Inverse penalties C tried; the validation rows choose (neighbouring systems page, g.2)."""
TOP_K = (1, 5, 20)
MOST_ITERATIONS = 2000
FOLDS = 5
"""One fold tests, one chooses, the others fit."""

KINDS = ("raw", "sae", "text", "control")
Rows = Float[np.ndarray, "example column"]


@dataclass(frozen=True)
class ProbeScore:
    """One probe: AUROC on the fitted, the choosing, the test and (NaN without) the shifted rows.

    `settings` hold what the validation rows chose. `converged` is False when the fit ran into
    `MOST_ITERATIONS`.
    """

    name: str
    kind: str
    train: float
    validation: float
    test: float
    interval: Interval
    shifted: float = float("nan")
    shifted_interval: Interval | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    converged: bool = True


@dataclass(frozen=True, eq=False)
class ProbeComparison:
    """All probes of one data set on one split, in the order of `compare_probes`."""

    scores: tuple[ProbeScore, ...]
    name: str
    n: Mapping[str, int]
    sae_id: str
    seed: int

    def __getitem__(self, name: str) -> ProbeScore:
        for one in self.scores:
            if one.name == name:
                return one
        raise KeyError(f"no probe {name!r}; there are {', '.join(s.name for s in self.scores)}")

    def of_kind(self, *kinds: str) -> list[ProbeScore]:
        return [one for one in self.scores if one.kind in kinds]

    def table(self) -> Any:
        """The figures as a pandas table, a row per probe."""
        import pandas as pd

        return pd.DataFrame(
            {
                "probe": one.name,
                "kind": one.kind,
                "train": one.train,
                "validation": one.validation,
                "test": one.test,
                "low": one.interval.low,
                "high": one.interval.high,
                "shifted": one.shifted,
                "shifted_low": one.shifted_interval.low if one.shifted_interval else math.nan,
                "shifted_high": one.shifted_interval.high if one.shifted_interval else math.nan,
                "converged": one.converged,
            }
            for one in self.scores
        )

    def _repr_html_(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.n.items())
        return f"<p>{counts}</p>" + self.table().to_html(index=False, float_format="%.3f")


@dataclass(frozen=True, eq=False)
class Inputs:
    """What probes of one kind read: the labelled rows, and the shifted ones where there are."""

    rows: Rows
    shifted: Float[np.ndarray, "shifted column"] | None


@dataclass(frozen=True, eq=False)
class Split:
    """Row numbers that fit, choose and test."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @classmethod
    def of(cls, labelled: Labelled, seed: int) -> Split:
        """Groups stay whole. Raises ValueError when a part lacks one of the labels."""
        if len(set(labelled.groups)) < 3:
            raise ValueError(
                f"{len(set(labelled.groups))} groups cannot be split in three: name the template "
                "behind each example in groups"
            )
        folds = grouped_folds(labelled.labels, labelled.groups, n_folds=FOLDS, seed=seed)
        test, validation = folds[0][1].numpy(), folds[1][1].numpy()
        held = np.concatenate([test, validation])
        train = np.setdiff1d(np.arange(len(labelled)), held)
        for part, rows in (("train", train), ("validation", validation), ("test", test)):
            if len(set(labelled.labels[rows].tolist())) < 2:
                raise ValueError(
                    f"the {part} rows hold one label only: more groups, or another seed, are needed"
                )
        return cls(train, validation, test)


def compare_probes(
    labelled: Labelled,
    sae: Any,
    *,
    shifted: Labelled | None = None,
    top_k: Sequence[int] = TOP_K,
    seed: int = 0,
) -> ProbeComparison:
    """AUROC of every probe on the same grouped split: 3/5 of the groups fit, 1/5 choose, 1/5 test.

    `shifted` are rows of another distribution; nothing is fitted or chosen on them. Probes, by
    kind:

    - raw: "raw logistic" (L2, standardised), "raw top-k" (dimensions of largest mean difference),
      "DiffMean".
    - sae: "SAE top-k" (codes over their mean nonzero value, then the k of largest mean difference;
      L1), "SAE top-k, as coded" (the plain difference), "SAE all, L1", "SAE reconstruction" and
      "SAE error" (L2, as raw).
    - text: "bag of words", which reads no activation.
    - control: "random SAE top-k" and "random SAE all, L1": random directions in the place of the
      dictionary's, as many, each firing on as many training rows (`random_codes`).

    The penalty and nothing else is chosen, by validation AUROC (the strongest on ties). Intervals
    are of the test AUROC alone: DeLong, or bootstrap over groups where groups hold several rows.
    Raises ValueError for activations of another site than the SAE's, one label, or too few groups.
    Source: arXiv 2502.16681 and its code.
    """
    require_two_sides(labelled)
    for rows in (labelled, *([shifted] if shifted is not None else [])):
        require_site(rows, sae)
    if not top_k or min(top_k) < 1:
        raise ValueError(f"top_k is {tuple(top_k)}; give numbers of columns from 1")
    split = Split.of(labelled, seed)
    x = as_numbers(labelled.activations)
    other = None if shifted is None else as_numbers(shifted.activations)
    raw = Inputs(x, other)
    codes, kept, error = dictionary_inputs(sae, raw)
    random = random_codes(raw, codes, split.train, seed)
    fit = Fit(labelled, shifted, split, seed)
    found = [fit.chosen("raw logistic", "raw", raw, dense_logistic)]
    found += [fit.chosen(f"raw top-{k}", "raw", raw, top_columns(k, "standard")) for k in top_k]
    found.append(fit.diff_mean(raw))
    for k in top_k:
        found.append(fit.chosen(f"SAE top-{k}", "sae", codes, top_columns(k, "nonzero", l1=True)))
        found.append(
            fit.chosen(f"SAE top-{k}, as coded", "sae", codes, top_columns(k, "none", l1=True))
        )
    found += [
        fit.chosen("SAE all, L1", "sae", codes, top_columns(None, "nonzero", l1=True)),
        fit.chosen("SAE reconstruction", "sae", kept, dense_logistic),
        fit.chosen("SAE error", "sae", error, dense_logistic),
        fit.bag_of_words(),
    ]
    found += [
        fit.chosen(f"random SAE top-{k}", "control", random, top_columns(k, "nonzero", l1=True))
        for k in top_k
    ]
    found.append(
        fit.chosen("random SAE all, L1", "control", random, top_columns(None, "nonzero", l1=True))
    )
    n = {
        "train": len(split.train),
        "validation": len(split.validation),
        "test": len(split.test),
        "shifted": 0 if shifted is None else len(shifted),
    }
    return ProbeComparison(tuple(found), labelled.name, n, sae_id(sae), seed)


def require_site(labelled: Labelled, sae: Any) -> None:
    read = site_names(sae)[0]
    if not same_site(labelled.hook_name, read):
        raise ValueError(
            f"activations come from {labelled.hook_name!r} and the SAE reads {read!r}: collect "
            "them at the SAE's site"
        )
    if labelled.activations.shape[1] != sae.cfg.d_in:
        raise ValueError(
            f"activations have {labelled.activations.shape[1]} dimensions, the SAE {sae.cfg.d_in}"
        )


def as_numbers(x: Tensor) -> Rows:
    return x.detach().double().cpu().numpy()


# Inputs -------------------------------------------------------------------------------------------


def dictionary_inputs(sae: Any, raw: Inputs) -> tuple[Inputs, Inputs, Inputs]:
    """Codes, reconstruction and error of the rows, each a row for itself."""

    def parts(rows: Rows) -> tuple[Rows, Rows, Rows]:
        x = torch.from_numpy(rows).to(sae.W_dec.device, sae.dtype)[:, None]
        with torch.no_grad():
            codes, again = whole_codes(sae, x)[:, 0], sae(x)[:, 0]
        return as_numbers(codes), as_numbers(again), rows - as_numbers(again)

    own = parts(raw.rows)
    other = parts(raw.shifted) if raw.shifted is not None else (None, None, None)
    codes, kept, error = (Inputs(a, b) for a, b in zip(own, other, strict=True))
    return codes, kept, error


@dataclass(frozen=True, eq=False)
class RandomDirections:
    """Unit directions as columns, and codes of rows: the projection above a threshold of each."""

    directions: Float[np.ndarray, "column feature"]
    middle: Float[np.ndarray, " column"]
    threshold: Float[np.ndarray, " feature"]

    def codes(self, rows: Rows) -> Float[np.ndarray, "example feature"]:
        return np.maximum((rows - self.middle) @ self.directions - self.threshold, 0.0)


def random_directions(rows: Rows, fires: np.ndarray, seed: int) -> RandomDirections:
    """As many directions as `fires` has entries, drawn uniformly; direction j fires on `fires[j]`
    of the rows."""
    rng = np.random.default_rng([seed, 1])
    middle = rows.mean(0)
    drawn = rng.standard_normal((rows.shape[1], len(fires)))
    drawn /= np.linalg.norm(drawn, axis=0)
    below = len(rows) - 1 - fires  # the largest value that does not pass
    threshold = np.empty(len(fires))
    for some in blocks(len(fires), len(rows)):
        rising = np.sort((rows - middle) @ drawn[:, some], axis=0)
        passed = np.take_along_axis(rising, np.maximum(below[some], 0)[None], axis=0)[0]
        threshold[some] = np.where(below[some] < 0, rising[0] - 1.0, passed)
    return RandomDirections(drawn, middle, threshold)


def random_codes(raw: Inputs, codes: Inputs, train: np.ndarray, seed: int) -> Inputs:
    """Codes of random directions that fire as often as the dictionary's features do.

    Each code is the projection above a threshold that as many training rows pass as fire the
    feature in whose place it stands. So width and sparsity are the dictionary's, and what was
    learned is not.
    """
    fires = (codes.rows[train] != 0).sum(axis=0)
    drawn = random_directions(raw.rows[train], fires, seed)
    return Inputs(drawn.codes(raw.rows), None if raw.shifted is None else drawn.codes(raw.shifted))


# Probes -------------------------------------------------------------------------------------------

Scorer = Callable[[Rows], np.ndarray]
Probe = Callable[[Rows, np.ndarray, float], tuple[Scorer, bool, dict[str, Any]]]
"""(training rows, their labels, C) -> scores of rows, whether the fit converged, and settings."""


def spread_of(rows: Rows) -> np.ndarray:
    """Standard deviation per column; infinite for a constant one, which then weighs nothing."""
    deviation = rows.std(axis=0)
    return np.where(deviation > 1e-12, deviation, np.inf)


def mean_nonzero(rows: Rows) -> np.ndarray:
    """Mean of the nonzero entries per column; infinite for a column of zeros."""
    fires = (rows != 0).sum(axis=0)
    size = np.abs(rows.sum(axis=0)) / np.maximum(fires, 1)
    return np.where(size > 1e-12, size, np.inf)


def largest_gaps(rows: Rows, y: np.ndarray, k: int | None) -> np.ndarray:
    """The k columns (None: all) of largest |mean difference|, largest first; ties by number."""
    gap = np.abs(rows[y == 1].mean(0) - rows[y == 0].mean(0))
    order = np.argsort(-gap, kind="stable")
    return order if k is None else order[:k]


def top_columns(k: int | None, scale: str, *, l1: bool = False) -> Probe:
    """A logistic probe on the k columns of largest mean difference after scaling.

    `scale` is "standard" (deviation), "nonzero" (mean nonzero value) or "none".
    """

    def fit(rows: Rows, y: np.ndarray, c: float) -> tuple[Scorer, bool, dict[str, Any]]:
        size = {"standard": spread_of, "nonzero": mean_nonzero}.get(scale, unscaled)(rows)
        columns = largest_gaps(rows / size, y, k)
        score, converged = logistic(rows[:, columns] / size[columns], y, c, l1=l1)
        shown = [int(j) for j in columns[:20]] if k is not None else []
        return (
            lambda more: score(more[:, columns] / size[columns]),
            converged,
            {"columns": shown},
        )

    return fit


def unscaled(rows: Rows) -> np.ndarray:
    return np.ones(rows.shape[1])


def dense_logistic(rows: Rows, y: np.ndarray, c: float) -> tuple[Scorer, bool, dict[str, Any]]:
    """L2 logistic regression on standardised columns."""
    middle, size = rows.mean(0), spread_of(rows)
    score, converged = logistic((rows - middle) / size, y, c, l1=False)
    return lambda more: score((more - middle) / size), converged, {}


def logistic(rows: Rows, y: np.ndarray, c: float, *, l1: bool) -> tuple[Scorer, bool]:
    """scikit-learn's logistic regression, L2 by L-BFGS or L1 by liblinear, and its convergence."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    options: dict[str, Any] = (
        {"l1_ratio": 1.0, "solver": "liblinear", "random_state": 0} if l1 else {"tol": 1e-6}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # kept in `converged` instead
        model = LogisticRegression(C=c, max_iter=MOST_ITERATIONS, **options).fit(rows, y)
    return model.decision_function, int(np.max(model.n_iter_)) < MOST_ITERATIONS


@dataclass(frozen=True, eq=False)
class Fit:
    """One data set and its split; makes scores of probes."""

    labelled: Labelled
    shifted: Labelled | None
    split: Split
    seed: int

    def chosen(self, name: str, kind: str, inputs: Inputs, probe: Probe) -> ProbeScore:
        """The probe at the penalty of best validation AUROC."""
        y, train = self.labelled.labels.numpy(), self.split.train
        best: tuple[float, Scorer, bool, dict[str, Any]] | None = None
        for c in PENALTIES:  # ascending C: the strongest penalty wins ties
            score, converged, settings = probe(inputs.rows[train], y[train], c)
            area = area_of(score(inputs.rows[self.split.validation]), y[self.split.validation])
            if best is None or area > best[0]:
                best = (area, score, converged, {"C": c, **settings})
        assert best is not None
        _, score, converged, settings = best
        return self.scored(name, kind, inputs, score, settings, converged)

    def diff_mean(self, raw: Inputs) -> ProbeScore:
        """Projection on the training rows' difference of means; nothing is chosen."""
        y, train = self.labelled.labels.numpy(), self.split.train
        rows, truth = raw.rows[train], y[train]
        w = rows[truth == 1].mean(0) - rows[truth == 0].mean(0)
        return self.scored("DiffMean", "raw", raw, lambda more: more @ w, {}, True)

    def bag_of_words(self) -> ProbeScore:
        """AxBench's bag of words over the texts themselves."""
        train = self.split.train
        texts = [self.labelled.texts[i] for i in train]
        truth = (self.labelled.labels.numpy()[train] == 1).tolist()

        def listed(rows: Labelled) -> Rows:
            return np.array(bag_of_words_scores(texts, truth, rows.texts))[:, None]

        other = None if self.shifted is None else listed(self.shifted)
        scores = Inputs(listed(self.labelled), other)
        return self.scored(
            "bag of words", "text", scores, lambda more: more[:, 0], {"C": 100.0}, True
        )

    def scored(
        self,
        name: str,
        kind: str,
        inputs: Inputs,
        score: Scorer,
        settings: Mapping[str, Any],
        converged: bool,
    ) -> ProbeScore:
        y = self.labelled.labels.numpy()
        values = score(inputs.rows)
        split = self.split

        def area(rows: np.ndarray) -> float:
            return area_of(values[rows], y[rows])

        groups = [self.labelled.groups[i] for i in split.test]
        found = ProbeScore(
            name,
            kind,
            train=area(split.train),
            validation=area(split.validation),
            test=area(split.test),
            interval=area_interval(values[split.test], y[split.test] == 1, groups, self.seed),
            settings=settings,
            converged=converged,
        )
        if self.shifted is None or inputs.shifted is None:
            return found
        away, truth = score(inputs.shifted), self.shifted.labels.numpy()
        return replace(
            found,
            shifted=area_of(away, truth),
            shifted_interval=area_interval(away, truth == 1, self.shifted.groups, self.seed),
        )


def area_of(scores: np.ndarray, y: np.ndarray) -> float:
    return auroc(torch.from_numpy(np.ascontiguousarray(scores)), torch.from_numpy(y))


def area_interval(
    scores: Float[np.ndarray, " row"],
    positive: Bool[np.ndarray, " row"],
    groups: Sequence[str],
    seed: int,
) -> Interval:
    """95 % interval of an AUROC: DeLong, or percentile bootstrap over groups of several rows."""
    base, arm = scores[~positive], scores[positive]
    if len(set(groups)) == len(groups):
        return superiority_interval(base, arm, paired=False)
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    unit = np.array([names[name] for name in groups])
    draws = Draws((len(names),), (0, unit[~positive]), (0, unit[positive]), clustered=True)
    wins = (arm[None, :] > base[:, None]) + 0.5 * (arm[None, :] == base[:, None])

    def statistic(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        pairs = rows.sum(axis=1) * columns.sum(axis=1)
        won = ((rows @ wins) * columns).sum(axis=1)
        return np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan)

    return bootstrap(statistic, draws, seed=seed, whole=(0.0, 1.0))


# Quiver of arrows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What validation chooses for one data set from each quiver, and what that scores on test."""

    name: str
    baseline: str
    baseline_test: float
    extended: str
    extended_test: float

    @property
    def improvement(self) -> float:
        return self.extended_test - self.baseline_test


@dataclass(frozen=True)
class Quiver:
    """Choices per data set; `improvement` is the mean gain in test AUROC from the added probes.

    `interval` is over data sets; `chosen_share` is the share of them where an added probe was
    chosen. The gain can be negative: each further probe is another noisy choice.
    """

    choices: tuple[Choice, ...]
    improvement: float
    interval: Interval
    chosen_share: float
    part: str


def quiver_of_arrows(
    comparisons: Sequence[ProbeComparison],
    *,
    baseline: Sequence[str] = ("raw",),
    added: Sequence[str] = ("sae",),
    part: str = "test",
    seed: int = 0,
) -> Quiver:
    """Does a practitioner with further probes in the quiver do better? Source: arXiv 2502.16681.

    Per data set the probe of best *validation* AUROC is taken from the kinds `baseline`, and from
    `baseline` with `added`; the earlier one on ties, so a baseline is never left without a gain.
    Compared is what the two choices score on `part`: "test" or "shifted". Raises ValueError for an
    unknown kind or part, and for comparisons without one of them.
    """
    if unknown := sorted({*baseline, *added} - set(KINDS)):
        raise ValueError(f"no kind of probe {unknown[0]!r}; choose from {', '.join(KINDS)}")
    if part not in ("test", "shifted"):
        raise ValueError(f"part is {part!r}; choose 'test' or 'shifted'")
    if not comparisons:
        raise ValueError("there is no comparison to choose in")
    choices = []
    for one in comparisons:
        first, more = one.of_kind(*baseline), one.of_kind(*added)
        if not first or not more:
            raise ValueError(
                f"{one.name!r} lacks probes of kind {baseline if not first else added}"
            )
        few = max(first, key=lambda s: s.validation)
        many = max([*first, *more], key=lambda s: s.validation)
        scores = getattr(few, part), getattr(many, part)
        if any(score != score for score in scores):
            raise ValueError(f"{one.name!r} has no {part} scores: pass shifted= to compare_probes")
        choices.append(Choice(one.name, few.name, scores[0], many.name, scores[1]))
    gains = [one.improvement for one in choices]
    moved = sum(one.baseline != one.extended for one in choices) / len(choices)
    return Quiver(
        tuple(choices),
        sum(gains) / len(gains),
        mean_interval(gains, seed=seed),
        moved,
        part,
    )


__all__ = [
    "Choice",
    "ProbeComparison",
    "ProbeScore",
    "Quiver",
    "compare_probes",
    "quiver_of_arrows",
]
