"""How well each feature of a dictionary tells each concept's texts from the others.

All features and all concepts at once, from one sparse table of pooled codes: the sort is paid once,
and every score is a sparse product with the labels. Formulas: shared/methods pages
`supervised_feature_selection` (3.3, 3.8), `axbench_protocol` (6) and `causal_feature_scores` (8);
the calibrated F1 is that of Siblini et al., arXiv 1909.02827.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_steering_plugin.types import FeatureTable, Scores

from .pooled import PooledCodes
from .ranks import mid_ranks

PRIOR = 1e-3
"""Reference prevalence of the calibrated F1 (arXiv 2605.31183, reported second-hand). With fewer
than some thousand negatives one false positive decides it: 1e-2 is the better choice then."""

QUANTILES = np.arange(0.05, 0.951, 0.05)

CONSTANT = float(np.finfo(np.float32).eps) ** 2
"""A variance below this share of the mean square is rounding: codes are float32."""

EXACT_HALVES = 2**23
"""Multiples of 1/2 up to here are float32 numbers."""

ROUNDING = 1e-13
"""Relative error that sums of some million float64 terms may have."""


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores `values[name][feature, concept]`, larger is better; NaN for a concept in `unscored`.

    `live[j]` is False for a feature that is zero in every text; it never ranks above a live one.
    `tau` holds the threshold of "f1". `support` counts positive and negative texts per concept.
    """

    values: Mapping[str, Float[Tensor, "feature concept"]]
    concepts: tuple[str, ...]
    live: Bool[Tensor, " feature"]
    support: Mapping[str, tuple[int, int]]
    unscored: Mapping[str, str]
    sae_id: str
    tau: Float[Tensor, "feature concept"] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_dead(self) -> int:
        return int((~self.live).sum())

    def column(self, concept: str) -> int:
        if concept not in self.concepts:
            raise KeyError(f"no concept {concept!r}; there are {', '.join(self.concepts[:12])}")
        return self.concepts.index(concept)

    def scores(self, concept: str, name: str) -> Scores:
        """One score of one concept, for every feature."""
        return Scores(
            self._named(name)[:, self.column(concept)],
            name=name,
            concept=concept,
            sae_id=self.sae_id,
            settings=self.settings,
        )

    def top(self, concept: str, name: str, k: int = 5) -> list[int]:
        """The k best live features, best first; equal scores by feature number.

        Raises ValueError for a concept without scores.
        """
        column = self.column(concept)
        if concept in self.unscored:
            raise ValueError(f"{concept!r} has no scores: {self.unscored[concept]}")
        values = self._named(name)[:, column].double().clone()
        values[~self.live] = -math.inf
        order = torch.argsort(values, descending=True, stable=True)[:k]
        return [int(feature) for feature in order if bool(self.live[feature])]

    def feature_table(self, concept: str) -> FeatureTable:
        """Every score of one concept, for every feature of the dictionary, dead ones marked."""
        import pandas as pd

        column = self.column(concept)
        values = {name: found[:, column].numpy() for name, found in self.values.items()}
        if self.tau is not None:
            values["tau"] = self.tau[:, column].numpy()
        frame = pd.DataFrame({**values, "live": self.live.numpy()})
        frame.index.name = "feature"
        return FeatureTable(frame, self.sae_id, {**self.settings, "concept": concept})

    def table(self, k: int = 5, *, by: str | None = None) -> Any:
        """The k best features of each concept as a pandas table, all scores beside each other."""
        import pandas as pd

        by = by or next(iter(self.values))
        rows = []
        for concept in self.concepts:
            if concept in self.unscored:
                continue
            column = self.column(concept)
            for rank, feature in enumerate(self.top(concept, by, k), 1):
                row = {"concept": concept, "rank": rank, "feature": feature}
                row |= {name: float(v[feature, column]) for name, v in self.values.items()}
                if self.tau is not None:
                    row["tau"] = float(self.tau[feature, column])
                positive, negative = self.support[concept]
                rows.append({**row, "n_positive": positive, "n_negative": negative})
        return pd.DataFrame(rows)

    def _named(self, name: str) -> Tensor:
        if name not in self.values:
            raise KeyError(f"no score {name!r} here; there are {', '.join(self.values)}")
        return self.values[name]

    def _repr_html_(self) -> str:
        from html import escape

        left = "".join(f"<li>{escape(f'{c}: {why}')}</li>" for c, why in self.unscored.items())
        head = f"{len(self.live)} features, {self.n_dead} dead, {len(self.concepts)} concepts"
        body = self.table(3).to_html(index=False, float_format="%.3f", escape=True)
        return f"<p>{head}</p>{body}" + (f"<p>not scored:</p><ul>{left}</ul>" if left else "")


def score_features(
    codes: PooledCodes,
    labels: Any,
    *,
    concepts: Sequence[str] = (),
    scores: Sequence[str] = ("auroc",),
    prior: float | None = PRIOR,
    quantiles: str = "nonzero",
    inverse_penalty: float = 1.0,
) -> ScoreTable:
    """Scores of every feature for every concept.

    `labels` says which texts hold which concept: a mapping or a pandas table of columns, or an
    array `[example]` or `[example concept]` (then named by `concepts`), of 1/0 or booleans. NaN
    leaves a text out for that concept, exactly as if it were not in the table: hard negatives, for
    instance. `scores` are names of `SCORES`:

    - "auroc": exact, ties by mid-ranks.
    - "f1": the calibrated F1 at reference prevalence `prior` (None: the plain F1), best over the
      thresholds 0 and the 5 % to 95 % quantiles of a feature's nonzero codes (`quantiles="all"`:
      of all codes, the literal reading, which is 0 throughout for sparse features). Smallest best
      threshold in `tau`. Prediction: code > threshold.
    - "mean_difference"; "cohens_d" (pooled deviation, ddof 1) and "welch_t" of it.
    - "correlation": Pearson's r of code and label (point-biserial).
    - "mutual_information": of "fires" and the label, in nats.
    - "max_activation": the largest code over the concept's texts (label-free ranking of AxBench).
    - "logistic": weight of an L1 logistic regression on all features, C = `inverse_penalty`, each
      feature divided by its largest code (scikit-learn, liblinear); slow: one fit per concept.

    A concept with texts of one class only goes to `unscored`. Raises ValueError when none is left,
    for unknown names, for labels that are neither 0 nor 1, and for "f1" of codes that are negative.
    """
    names, table = label_table(labels, len(codes), concepts)
    unknown = sorted(set(scores) - set(SCORES))
    if isinstance(scores, str) or unknown or not scores:
        given = scores if isinstance(scores, str) else unknown
        raise ValueError(f"no score {given!r}; choose among {', '.join(SCORES)}")
    if quantiles not in ("nonzero", "all"):
        raise ValueError(f"quantiles is {quantiles!r}; choose 'nonzero' or 'all'")
    if prior is not None and not 0 < prior < 1:
        raise ValueError(f"prior is {prior}; it must lie between 0 and 1")
    if "f1" in scores and codes.signed:
        raise ValueError("f1 counts codes above a threshold, and some codes here are negative")
    options = {"prior": prior, "quantiles": quantiles, "inverse_penalty": inverse_penalty}
    support, unscored = supports(names, table)
    shape = (codes.n_features, len(names))
    values: dict[str, np.ndarray] = {}
    every = list(range(len(names)))

    def put(name: str, columns: list[int], found: np.ndarray) -> None:
        if columns == every:
            values[name] = found
            return
        if name not in values:
            values[name] = np.full(shape, np.nan)
        values[name][:, columns] = found

    for mask, columns in same_texts(table, [n not in unscored for n in names]):
        part = codes if mask.all() else codes.of(torch.from_numpy(np.flatnonzero(mask)))
        sparse = Columns(part, table[mask][:, columns].astype(np.float64), options)
        for name in scores:
            found = SCORES[name](sparse)
            if name == "f1":
                found, thresholds_of_best = found
                put("tau", columns, thresholds_of_best)
            put(name, columns, found)
    tau = values.pop("tau", None)
    return ScoreTable(
        {name: torch.from_numpy(values[name]) for name in scores},
        names,
        codes.counts > 0,
        support,
        unscored,
        codes.sae_id,
        None if tau is None else torch.from_numpy(tau),
        {"pooling": codes.pooling, "n": len(codes), **options},
    )


def label_table(
    labels: Any, n: int, concepts: Sequence[str] = ()
) -> tuple[tuple[str, ...], Float[np.ndarray, "example concept"]]:
    """Concept names and a table of 1, 0 and NaN. Raises ValueError naming what does not fit."""
    if hasattr(labels, "columns"):  # a pandas table
        labels = {str(name): labels[name].to_numpy() for name in labels.columns}
    if isinstance(labels, Mapping):
        if concepts:
            raise ValueError("the labels name their concepts: leave out concepts")
        if not labels:
            raise ValueError("there are no concepts")
        names = tuple(str(name) for name in labels)
        columns = [np.asarray(column, dtype=np.float64) for column in labels.values()]
        for name, column in zip(names, columns, strict=True):
            if column.shape != (n,):
                raise ValueError(f"labels of {name!r} have shape {column.shape} for {n} texts")
        table = np.stack(columns, axis=1)
    else:
        table = np.asarray(labels, dtype=np.float64)
        table = table[:, None] if table.ndim == 1 else table
        if table.ndim != 2 or len(table) != n:
            raise ValueError(f"labels have shape {table.shape} for {n} texts")
        names = tuple(concepts) or tuple(f"concept {i}" for i in range(table.shape[1]))
        if len(names) != table.shape[1]:
            raise ValueError(f"{len(names)} names for {table.shape[1]} concepts")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"concept {twice!r} is named twice")
    wrong = ~(np.isnan(table) | (table == 0) | (table == 1))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"label of text {row}, concept {names[column]!r}, is {table[row, column]}; labels are "
            "1, 0 or NaN for unknown"
        )
    return names, table


def supports(
    names: Sequence[str], table: Float[np.ndarray, "example concept"]
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Positive and negative texts per concept, and why a concept cannot be scored."""
    support = {
        name: (int((column == 1).sum()), int((column == 0).sum()))
        for name, column in zip(names, table.T, strict=True)
    }
    unscored = {
        name: f"{positive} positive and {negative} negative texts; both are needed"
        for name, (positive, negative) in support.items()
        if not positive or not negative
    }
    if len(unscored) == len(names):
        raise ValueError(f"no concept can be scored: {names[0]!r} has {unscored[names[0]]}")
    return support, unscored


def same_texts(
    table: Float[np.ndarray, "example concept"], wanted: Sequence[bool]
) -> list[tuple[np.ndarray, list[int]]]:
    """Concepts grouped by which texts they have labels for: the ranks of a group are shared."""
    groups: dict[bytes, tuple[np.ndarray, list[int]]] = {}
    for column, use in enumerate(wanted):
        if use:
            known = ~np.isnan(table[:, column])
            groups.setdefault(known.tobytes(), (known, []))[1].append(column)
    return list(groups.values())


# One group of concepts --------------------------------------------------------------------------


class Columns:
    """Pooled codes and complete labels of the same texts, and the sums that scores share."""

    def __init__(
        self,
        codes: PooledCodes,
        labels: Float[np.ndarray, "example concept"],
        options: Mapping[str, Any],
    ) -> None:
        self.codes, self.options = codes, options
        self.y = labels
        self.n = len(codes)
        self.examples, self.starts = codes.places()
        self.n_pos = labels.sum(axis=0)
        self.n_neg = self.n - self.n_pos
        self._sums: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @cached_property
    def values(self) -> Float[np.ndarray, " stored"]:
        """The stored codes in float64; ranks do without."""
        return self.codes.values.double().numpy()

    def product(self, data: Float[np.ndarray, " stored"]) -> Float[np.ndarray, "feature concept"]:
        """sum over texts of data x label, for stored `data` in the place of the codes."""
        return self._product(data, self.y)

    def _product(self, data: np.ndarray, labels: np.ndarray) -> np.ndarray:
        from scipy.sparse import csr_array

        # A column of the codes is a row here: the transposed table needs no conversion.
        transposed = csr_array(
            (data, self.examples, self.starts), shape=(len(self.starts) - 1, self.n)
        )
        return np.asarray(transposed @ labels)

    def product_of_halves(
        self, data: Float[np.ndarray, " stored"]
    ) -> Float[np.ndarray, "feature concept"]:
        """`product` of multiples of 1/2: in float32, at half the traffic, where no sum can round
        (up to 2^23 in total per feature), so that both ways give the same bits."""
        largest = max(data.max(initial=0.0), -data.min(initial=0.0))
        if largest * np.diff(self.starts).max(initial=0) > EXACT_HALVES:
            sums = np.add.reduceat(np.append(np.abs(data), 0.0), self.starts[:-1])
            if sums.max() > EXACT_HALVES:
                return self.product(data)
        return self._product(data.astype(np.float32), self.y.astype(np.float32)).astype(np.float64)

    def total(self, data: Float[np.ndarray, " stored"]) -> Float[np.ndarray, " feature"]:
        """sum over texts of stored `data`, per feature."""
        running = np.concatenate([[0.0], np.cumsum(data)])
        return running[self.starts[1:]] - running[self.starts[:-1]]

    def moments(self, power: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean of code^power over positives and over negatives, `[feature concept]` each."""
        if power not in self._sums:
            data = self.values**power
            positive = self.product(data)
            everywhere = np.add.reduceat(np.append(data, 0.0), self.starts[:-1])
            everywhere[np.diff(self.starts) == 0] = 0.0
            self._sums[power] = (
                positive / self.n_pos,
                (everywhere[:, None] - positive) / self.n_neg,
            )
        return self._sums[power]

    def variances(self) -> tuple[np.ndarray, np.ndarray]:
        """Variance of the codes over positives and negatives (ddof 1); 0 with one text.

        Codes are non-negative and mostly zero, so the mean is of the order of the deviation or
        below, and E[x^2] - E[x]^2 loses no digits that matter in float64.
        """
        out = []
        for first, second, n in zip(
            self.moments(1), self.moments(2), (self.n_pos, self.n_neg), strict=True
        ):
            spread = second - first**2
            spread = np.where(spread > CONSTANT * second, spread, 0.0)
            out.append(spread * n / np.maximum(n - 1, 1))
        return out[0], out[1]


def auroc(columns: Columns) -> Float[np.ndarray, "feature concept"]:
    """(rank sum of positives - n_pos (n_pos + 1) / 2) / (n_pos n_neg), ties by mid-ranks."""
    ranks = mid_ranks(columns.codes.values.numpy(), columns.starts, columns.n)
    found = columns.product_of_halves(ranks.lift)  # a rank sum, in place below
    found += np.outer(ranks.zero, columns.n_pos)
    found -= columns.n_pos * (columns.n_pos + 1) / 2
    found /= columns.n_pos * columns.n_neg
    return found


def calibrated_f1(
    columns: Columns,
) -> tuple[Float[np.ndarray, "feature concept"], Float[np.ndarray, "feature concept"]]:
    """2 TP / (2 TP + c FP + FN) at its best threshold, and that threshold.

    c = pi (1 - pi0) / (pi0 (1 - pi)) for a concept of prevalence pi and the reference pi0.
    """
    share = columns.n_pos / columns.n
    prior = share if columns.options["prior"] is None else columns.options["prior"]
    cost = share * (1 - prior) / (prior * (1 - share))
    best = np.full((len(columns.starts) - 1, columns.y.shape[1]), -1.0)
    tau = np.zeros_like(best)
    counts = np.diff(columns.starts)
    for threshold in thresholds(columns, columns.options["quantiles"]):
        fires = (columns.values > np.repeat(threshold, counts)).astype(np.float64)
        hits = columns.product(fires)
        false = columns.total(fires)[:, None] - hits
        below = 2 * hits + cost * false + (columns.n_pos - hits)
        value = 2 * hits / below  # below >= n_pos > 0
        better = value > best
        best = np.where(better, value, best)
        tau = np.where(better, threshold[:, None], tau)
    return best, tau


def thresholds(columns: Columns, how: str) -> list[Float[np.ndarray, " feature"]]:
    """0, then the quantiles of each feature's nonzero (or all) codes, ascending."""
    counts = np.diff(columns.starts)
    order = np.lexsort((columns.values, np.repeat(np.arange(len(counts)), counts)))
    ordered = np.append(columns.values[order], 0.0)
    zeros = (columns.n - counts) if how == "all" else np.zeros_like(counts)
    size = counts + zeros

    def at(place: np.ndarray) -> np.ndarray:
        inside = np.clip(columns.starts[:-1] + place - zeros, 0, len(ordered) - 1)
        return np.where((place < zeros) | (counts == 0), 0.0, ordered[inside])

    found = [np.zeros(len(counts))]
    for quantile in QUANTILES:
        reach = np.maximum(size - 1, 0) * quantile
        low = np.floor(reach).astype(np.int64)
        high = np.minimum(low + 1, np.maximum(size - 1, 0))
        weight = reach - low
        found.append(at(low) * (1 - weight) + at(high) * weight)
    return found


def mean_difference(columns: Columns) -> np.ndarray:
    """Mean code of the concept's texts minus that of the others; 0 where only rounding differs."""
    positive, negative = columns.moments(1)
    gap = positive - negative
    return np.where(np.abs(gap) > ROUNDING * (np.abs(positive) + np.abs(negative)), gap, 0.0)


def cohens_d(columns: Columns) -> np.ndarray:
    """Mean difference over the pooled deviation (ddof 1); infinite without any spread."""
    positive, negative = columns.variances()
    degrees = np.maximum(columns.n - 2, 1)
    pooled = (
        np.maximum(columns.n_pos - 1, 0) * positive + np.maximum(columns.n_neg - 1, 0) * negative
    )
    return over_spread(mean_difference(columns), pooled / degrees)


def welch_t(columns: Columns) -> np.ndarray:
    """Mean difference over sqrt(v_pos / n_pos + v_neg / n_neg); infinite without any spread."""
    positive, negative = columns.variances()
    error = positive / columns.n_pos + negative / columns.n_neg
    return over_spread(mean_difference(columns), error)


def correlation(columns: Columns) -> np.ndarray:
    """Pearson's r of code and label; 0 for a feature that does not vary."""
    positive, negative = columns.moments(1)
    squares = [moment * n for moment, n in zip(columns.moments(2), (columns.n_pos, columns.n_neg),
                                               strict=True)]  # fmt: skip
    share = columns.n_pos / columns.n
    mean = positive * share + negative * (1 - share)
    square = (squares[0] + squares[1]) / columns.n
    spread = np.where(square - mean**2 > CONSTANT * square, square - mean**2, 0.0)
    found = over_spread(mean_difference(columns) * np.sqrt(share * (1 - share)), spread)
    return np.where(np.isfinite(found), found, 0.0)


def over_spread(gap: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """gap / sqrt(variance); 0 where both are 0, infinite where only the variance is."""
    flat = variance <= 0
    endless = np.where(gap == 0, 0.0, np.copysign(np.inf, gap))
    return np.where(flat, endless, gap / np.sqrt(np.where(flat, 1.0, variance)))


def mutual_information(columns: Columns) -> np.ndarray:
    """Mutual information of "the feature fires" and the label, in nats."""
    fires = np.ones_like(columns.values)
    hits = columns.product(fires)
    firing = np.diff(columns.starts)[:, None].astype(np.float64)
    total = np.zeros_like(hits)
    for joint, row, column in (
        (hits, firing, columns.n_pos),
        (firing - hits, firing, columns.n_neg),
        (columns.n_pos - hits, columns.n - firing, columns.n_pos),
        (columns.n_neg - (firing - hits), columns.n - firing, columns.n_neg),
    ):
        there = joint > 0
        ratio = np.where(there, joint * columns.n, 1.0) / np.where(there, row * column, 1.0)
        total = total + joint / columns.n * np.log(ratio)
    return np.maximum(total, 0.0)


def max_activation(columns: Columns) -> np.ndarray:
    """The largest code over the concept's texts."""
    counts = np.diff(columns.starts)
    out = np.zeros((len(counts), columns.y.shape[1]))
    if not len(columns.values):
        return out
    filled = counts > 0
    for concept in range(columns.y.shape[1]):
        positive = columns.y[columns.examples, concept] > 0
        data = np.where(positive, columns.values, -np.inf)
        largest = np.maximum.reduceat(data, columns.starts[:-1][filled])
        # A text where the feature is silent counts as 0.
        hits = np.add.reduceat(positive, columns.starts[:-1][filled], dtype=np.int64)
        silent = columns.n_pos[concept] > hits
        out[filled, concept] = np.where(silent, np.maximum(largest, 0.0), largest)
    return out


def sparse_logistic(columns: Columns) -> np.ndarray:
    """Weights of an L1 logistic regression on the features, each divided by its largest code."""
    from scipy.sparse import csc_array, csr_array
    from sklearn import __version__
    from sklearn.linear_model import LogisticRegression

    # scikit-learn 1.8 says L1 by a ratio, earlier ones by name.
    newer = tuple(int(part) for part in __version__.split(".")[:2]) >= (1, 8)
    kind: dict[str, Any] = {"l1_ratio": 1.0} if newer else {"penalty": "l1"}

    counts = np.diff(columns.starts)
    largest = np.ones(len(counts))
    filled = counts > 0
    if filled.any():
        largest[filled] = np.maximum.reduceat(np.abs(columns.values), columns.starts[:-1][filled])
    data = columns.values / np.repeat(largest, counts)
    design = csr_array(
        csc_array((data, columns.examples, columns.starts), shape=(columns.n, len(counts)))
    )
    out = np.zeros((len(counts), columns.y.shape[1]))
    for concept in range(columns.y.shape[1]):
        fit = LogisticRegression(
            **kind, C=columns.options["inverse_penalty"], solver="liblinear", random_state=0
        )
        out[:, concept] = fit.fit(design, columns.y[:, concept]).coef_[0]
    return out


SCORES: dict[str, Callable[[Columns], Any]] = {
    "auroc": auroc,
    "f1": calibrated_f1,
    "mean_difference": mean_difference,
    "cohens_d": cohens_d,
    "welch_t": welch_t,
    "correlation": correlation,
    "mutual_information": mutual_information,
    "max_activation": max_activation,
    "logistic": sparse_logistic,
}
