"""Targeted probe perturbation (TPP) and spurious correlation removal (SCR) for one dictionary.

    pooled = collect_pooled(model, sae, texts, groups=groups)
    perturb_probes(pooled, {"food": ..., "music": ..., "sport": ...})
    remove_spurious(pooled, {"pirate": ..., "formal": ...}, [("pirate", "formal")])

Random directions of the same width and firing rates go through everything beside the dictionary.
Reported elsewhere: new seeds alone move TPP by 23-39 % and SCR of many features can run against the
planted truth (arXiv 2605.18229), so nothing is scored on one seed.

Source: arXiv 2503.09532 and its code. Different here: splits keep groups whole; the probe is the
minimum of SAEBench's own objective (mean cross-entropy plus 0.001 |w|_1, by liblinear, which
penalises the intercept a little too) in place of 20 epochs of Adam; test accuracy is the mean over
sides (SCR: over the four cells), which is what SAEBench's equal draws give on average; a biased
probe and the clean ones read equally many texts; codes count in units of the decoder row, so that
run-time normalisation changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..adapters.activations import bos_policy
from ..adapters.sae_parts import (
    TRANSCODERS,
    architecture,
    decoder_rows,
    normalised,
    whole_codes,
)
from ..effects.intervals import Interval, mean_interval
from ..features.perturbation import (
    balanced_accuracy,
    class_gaps,
    largest_effects,
    removal_score,
    spurious_effects,
    targeted_effects,
    targeted_scores,
    without_features,
)
from ..features.pooled import PooledCodes
from ..features.scores import label_table
from .pooled_codes import blocks, by_feature, first_token, pooled_pass, shortened_texts
from .probe_comparison import logistic, random_directions
from .splits import linked_groups

N_FEATURES = (2, 5, 10, 20, 50)
HEADLINE = 20
"""SAEBench's own figure of merit is taken at this many features."""
PENALTY = 1e-3
FOLDS = 4
"""One fold tests, the others fit."""
DICTIONARY, RANDOM = "dictionary", "random directions"


@dataclass(frozen=True, eq=False)
class PooledTexts:
    """Residuals and codes of texts, averaged over their tokens; the tokens for the control.

    `codes` are in units of the decoder `rows`; `frequency` holds the share of tokens that fire.
    Text i owns `tokens[bounds[i]:bounds[i + 1]]`. Texts of one number in `groups` stay in one
    split. `cut` numbers the texts that were shortened.
    """

    activations: Float[np.ndarray, "text d_model"]
    codes: PooledCodes
    frequency: PooledCodes
    rows: Float[np.ndarray, "feature d_model"]
    tokens: Float[np.ndarray, "token d_model"]
    bounds: Int[np.ndarray, " bound"]
    groups: tuple[int, ...]
    cut: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.activations)


def collect_pooled(
    model: Any,
    sae: Any,
    texts: Sequence[str],
    *,
    groups: Sequence[str] = (),
    max_tokens: int | None = None,
    cut: bool = False,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> PooledTexts:
    """Mean residuals and mean codes of every text at the dictionary's site, in one pass.

    Padding and a leading BOS never count. `groups`, `max_tokens` and `cut` as in `collect_codes`;
    equal texts share a group. Every token's residual is kept: 4 bytes x tokens x d_model. Raises
    ValueError for a transcoder, which does not write where it reads, and for an SAE of another
    width than the site.
    """
    if architecture(sae) in TRANSCODERS:
        raise ValueError("a transcoder does not rebuild what it reads: pass an SAE of one site")
    if not len(texts):
        raise ValueError("there are no texts to encode")
    encoded, shortened = shortened_texts(
        model, texts, bos_policy(model, sae, prepend_bos), max_tokens, cut
    )
    first = [first_token(text, number, ()) for number, text in enumerate(encoded)]
    tokens: dict[int, Tensor] = {}

    def keep(number: int, x: Tensor) -> None:
        tokens[number] = x.cpu()

    codes = pooled_pass(
        model,
        sae,
        encoded,
        first,
        ("mean", "frequency"),
        settings={},
        batch_size=batch_size,
        progress=progress,
        codes_of=codes_in_rows,
        see=keep,
    )
    return PooledTexts(
        torch.stack([tokens[i].double().mean(0) for i in range(len(texts))]).numpy(),
        codes["mean"],
        codes["frequency"],
        decoder_rows(sae).double().cpu().numpy(),
        torch.cat([tokens[i] for i in range(len(texts))]).numpy(),
        np.cumsum([0, *(len(tokens[i]) for i in range(len(texts)))]),
        tuple(linked_groups(texts, groups)),
        tuple(shortened),
    )


def codes_in_rows(sae: Any, x: Tensor) -> Tensor:
    """Codes in units of the decoder row, whatever is normalised while the SAE runs."""
    codes, scale = whole_codes(sae, x), normalised(sae, x)[1]
    return codes if scale is None else codes * scale


# Results ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassPerturbed:
    """What its own probe and the others lose when the features of one class are taken out.

    `features` were taken: fewer than `n` where fewer have an effect. `score` is `own` - `others`.
    """

    seed: int
    dictionary: str
    n: int
    name: str
    features: int
    clean: float
    own: float
    others: float
    score: float


@dataclass(frozen=True)
class ConfoundRemoved:
    """A probe that was fitted on texts where two concepts agree, tested for one of them, `name`.

    `biased` is its accuracy for `name`, `ablated` that without the features of the `spurious`
    concept, `clean` that of a probe whose texts were balanced. `reported` marks the direction of
    the pair with the lower `biased`.
    """

    seed: int
    dictionary: str
    n: int
    name: str
    spurious: str
    features: int
    biased: float
    ablated: float
    clean: float
    reported: bool
    score: float


@dataclass(frozen=True, eq=False)
class Perturbation:
    """TPP or SCR of a dictionary and of random directions, per seed, number of features and item.

    Intervals are over seeds: other splits, probes and directions from the same texts, not other
    texts; from few seeds they are somewhat too narrow. `converged` is the share of probes whose fit
    ended before its limit.
    """

    metric: str
    rows: tuple[ClassPerturbed, ...] | tuple[ConfoundRemoved, ...]
    sae_id: str
    converged: float

    def values(self, dictionary: str, n: int) -> Float[np.ndarray, " seed"]:
        """The metric of each seed: the mean over classes, or over the pairs' reported directions.

        `dictionary` is "dictionary" or "random directions"; KeyError for what was not measured.
        """
        found: dict[int, list[float]] = {}
        for row in self.rows:
            if row.dictionary == dictionary and row.n == n and getattr(row, "reported", True):
                found.setdefault(row.seed, []).append(row.score)
        if not found:
            raise KeyError(f"no {self.metric} of {n} features of {dictionary!r}")
        return np.array([np.mean(scores) for scores in found.values()])

    def lead(self, n: int) -> tuple[float, Interval]:
        """How far the dictionary is above random directions, and its interval over seeds."""
        gap = self.values(DICTIONARY, n) - self.values(RANDOM, n)
        return float(gap.mean()), mean_interval(gap, seed=0)

    def table(self) -> Any:
        """A row per number of features: means and 95 % intervals over seeds, as a pandas table.

        `taken` is the mean number of features that really were taken out.
        """
        import pandas as pd

        listed = []
        for n in dict.fromkeys(row.n for row in self.rows):
            line: dict[str, Any] = {"n": n}
            for name, dictionary in (("dictionary", DICTIONARY), ("random", RANDOM)):
                values = self.values(dictionary, n)
                interval = mean_interval(values, seed=0)
                taken = [r.features for r in self.rows if r.n == n and r.dictionary == dictionary]
                line |= {name: values.mean(), f"{name}_low": interval.low}
                line |= {f"{name}_high": interval.high, f"{name}_taken": np.mean(taken)}
            lead, interval = self.lead(n)
            listed.append(line | {"lead": lead, "lead_low": interval.low} |
                          {"lead_high": interval.high})  # fmt: skip
        return pd.DataFrame(listed)

    def details(self) -> Any:
        """Every measurement, as a pandas table."""
        import pandas as pd

        return pd.DataFrame([vars(row) for row in self.rows])

    def _repr_html_(self) -> str:
        seeds = len({row.seed for row in self.rows})
        about = f"<p>{self.metric}, {self.sae_id}, {seeds} seeds</p>"
        return about + self.table().to_html(index=False, float_format="%.3f")


# Measures -----------------------------------------------------------------------------------------


def perturb_probes(
    pooled: PooledTexts,
    labels: Any,
    *,
    n_features: Sequence[int] = N_FEATURES,
    seeds: Sequence[int] = range(5),
) -> Perturbation:
    """TPP(n): does taking the n top features of a class out break its own probe and no other?

    Per class a probe on as many texts without it as with it; its features in the order of
    `targeted_effects`; the loss of accuracy of its probe less the mean loss of the others. 0 for
    features that all classes share; 0.5 is the most where all probes are perfect. `labels` as in
    `score_features`, complete, two classes or more; classes that say the same (a concept and its
    opposite) lose together and cannot score. Raises ValueError for fewer, and where a split leaves
    a class without one of its sides.
    """
    names, table = complete_labels(labels, len(pooled))
    if len(names) < 2:
        raise ValueError("TPP compares the probe of a class with others: give two classes or more")
    check_numbers(n_features)
    found, fits = [], []
    for seed in seeds:
        train, test = split(pooled, table, seed)
        rng = np.random.default_rng([seed, 2])
        probes = []
        for name, y in zip(names, table.T, strict=True):
            require_both(y[test], f"test texts of {name!r} (seed {seed})")
            probes.append(fit(pooled, sides(y, train, rng, f"{name!r} (seed {seed})")))
        fits += [probe.converged for probe in probes]
        clean = np.array(
            [probe.accuracy(pooled.activations, y, y, test)
             for probe, y in zip(probes, table.T, strict=True)]
        )  # fmt: skip
        for dictionary, codes, rows in dictionaries(pooled, train, seed):
            effects = [
                targeted_effects(class_gaps(codes, *p.sides), p.weight, rows) for p in probes
            ]
            for n in n_features:
                taken = [largest_effects(one, n) for one in effects]
                drops = np.array(
                    [
                        [
                            before - probe.accuracy(left, y, y, test)
                            for before, probe, y in zip(clean, probes, table.T, strict=True)
                        ]
                        for left in (
                            without_features(pooled.activations, codes, rows, some)
                            for some in taken
                        )
                    ]
                )
                scores = targeted_scores(drops)
                found += [
                    ClassPerturbed(
                        seed, dictionary, n, name, len(taken[i]), float(clean[i]),
                        float(drops[i, i]), float(drops[i, i] - scores[i]), float(scores[i]),
                    )
                    for i, name in enumerate(names)
                ]  # fmt: skip
    return Perturbation("TPP", tuple(found), pooled.codes.sae_id, float(np.mean(fits)))


def remove_spurious(
    pooled: PooledTexts,
    labels: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    n_features: Sequence[int] = N_FEATURES,
    seeds: Sequence[int] = range(5),
) -> Perturbation:
    """SCR(n): does taking n features of a confound out free a probe that was fitted on both?

    Per pair of concepts a biased probe is fitted on texts where both hold or neither does. For
    either concept it is tested on all four kinds of texts, before and after the n features of the
    other concept are taken out, in the order of `spurious_effects` on a probe of that other
    concept; the score is `removal_score`. A pair counts in the direction where the biased probe
    starts lower (the first on ties); `details()` has both.

    `labels` as in `score_features`, complete. Raises ValueError for a concept without labels, and
    where a split leaves one of the four kinds empty.
    """
    names, table = complete_labels(labels, len(pooled))
    columns = dict(zip(names, table.T, strict=True))
    if unknown := sorted({name for pair in pairs for name in pair} - set(names)):
        raise ValueError(f"no labels of {unknown[0]!r}; there are {', '.join(names)}")
    if not pairs:
        raise ValueError("there is no pair of concepts to tell apart")
    check_numbers(n_features)
    concerned = np.stack([columns[name] for name in dict.fromkeys(sum(map(tuple, pairs), ()))], 1)
    found, fits = [], []
    for seed in seeds:
        train, test = split(pooled, concerned, seed)
        both = list(dictionaries(pooled, train, seed))
        for pair in pairs:
            truth = np.stack([columns[name] for name in pair], axis=1)
            about = f"{pair[0]!r} and {pair[1]!r} (seed {seed})"
            biased, clean = paired_probes(pooled, truth, train, test, seed, about)
            fits += [biased.converged, *(probe.converged for probe in clean)]
            cells = truth @ (2, 1)
            before, best = (
                [
                    probe.accuracy(pooled.activations, truth[:, side], cells, test)
                    for side, probe in enumerate(probes)
                ]
                for probes in ((biased, biased), clean)
            )
            for (dictionary, codes, rows), side in product(both, (0, 1)):
                other = clean[1 - side]
                effects = spurious_effects(class_gaps(codes, *other.sides), other.weight, rows)
                for n in n_features:
                    taken = largest_effects(effects, n)
                    left = without_features(pooled.activations, codes, rows, taken)
                    after = biased.accuracy(left, truth[:, side], cells, test)
                    found.append(
                        ConfoundRemoved(
                            seed, dictionary, n, pair[side], pair[1 - side], len(taken),
                            before[side], after, best[side], side == int(before[1] < before[0]),
                            removal_score(after, before[side], best[side]),
                        )
                    )  # fmt: skip
    return Perturbation("SCR", tuple(found), pooled.codes.sae_id, float(np.mean(fits)))


# Probes -------------------------------------------------------------------------------------------

Sides = tuple[np.ndarray, np.ndarray]
"""Numbers of the texts with and without a concept."""


@dataclass(frozen=True, eq=False)
class MeanProbe:
    """A linear probe on mean residuals, and the texts it was fitted on."""

    weight: Float[np.ndarray, " d_model"]
    intercept: float
    sides: Sides
    converged: bool

    def accuracy(
        self, activations: np.ndarray, y: np.ndarray, cells: np.ndarray, test: np.ndarray
    ) -> float:
        guess = activations[test] @ self.weight + self.intercept > 0
        return balanced_accuracy(guess == (y[test] == 1), cells[test])


def fit(pooled: PooledTexts, chosen: Sides) -> MeanProbe:
    """The probe of least mean cross-entropy + `PENALTY` |w|_1 on these texts."""
    rows = np.concatenate(chosen)
    y = np.repeat([1, 0], [len(side) for side in chosen])
    score, converged = logistic(pooled.activations[rows], y, 1 / (PENALTY * len(rows)), l1=True)
    width = pooled.activations.shape[1]
    intercept = float(score(np.zeros((1, width)))[0])
    return MeanProbe(score(np.eye(width)) - intercept, intercept, chosen, converged)


def paired_probes(
    pooled: PooledTexts,
    truth: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    seed: int,
    about: str,
) -> tuple[MeanProbe, tuple[MeanProbe, MeanProbe]]:
    """The biased probe of a pair, and a clean one of either concept, each on as many texts."""
    cells = truth @ (2, 1)
    kinds = [train[cells[train] == kind] for kind in range(4)]
    least = min(map(len, kinds))
    if least < 2 or len(np.unique(cells[test])) < 4:
        raise ValueError(
            f"{about} do not occur in all four combinations on both sides of the split: more "
            "texts or groups are needed"
        )
    rng = np.random.default_rng([seed, 3])
    kinds = [rng.permutation(kind) for kind in kinds]
    half = least // 2
    neither, second, first, both = (kind[:half] for kind in kinds)
    biased = fit(pooled, (kinds[3][: 2 * half], kinds[0][: 2 * half]))
    clean = tuple(
        fit(pooled, (np.concatenate([one, both]), np.concatenate([other, neither])))
        for one, other in ((first, second), (second, first))
    )
    return biased, (clean[0], clean[1])


def sides(y: np.ndarray, train: np.ndarray, rng: np.random.Generator, about: str) -> Sides:
    """As many training texts without the class as with it, drawn from the larger side."""
    require_both(y[train], f"training texts of {about}")
    kinds = [rng.permutation(train[y[train] == value]) for value in (1, 0)]
    least = min(map(len, kinds))
    return kinds[0][:least], kinds[1][:least]


def require_both(y: np.ndarray, about: str) -> None:
    if len(set(y.tolist())) < 2:
        raise ValueError(f"the {about} hold one label only: more texts or groups are needed")


def complete_labels(labels: Any, n: int) -> tuple[tuple[str, ...], np.ndarray]:
    names, table = label_table(labels, n)
    if np.isnan(table).any():
        name = names[int(np.argwhere(np.isnan(table))[0][1])]
        raise ValueError(f"{name!r} has unknown labels: leave those texts out")
    return names, table.astype(int)


def check_numbers(n_features: Sequence[int]) -> None:
    if not n_features or min(n_features) < 1:
        raise ValueError(f"n_features is {tuple(n_features)}; give numbers of features from 1")


def split(pooled: PooledTexts, table: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and the test texts: groups whole, combinations of labels spread."""
    from sklearn.model_selection import StratifiedGroupKFold

    if len(set(pooled.groups)) < FOLDS:
        raise ValueError(
            f"{len(set(pooled.groups))} groups cannot be split in {FOLDS}: name the template "
            "behind each text in groups"
        )
    kinds = np.unique(table, axis=0, return_inverse=True)[1].ravel()
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rare combinations; both sides are checked
        train, test = next(folds.split(kinds, kinds, pooled.groups))
    return train, test


# Dictionaries -------------------------------------------------------------------------------------


def dictionaries(
    pooled: PooledTexts, train: np.ndarray, seed: int
) -> Iterator[tuple[str, PooledCodes, np.ndarray]]:
    """Name, mean codes and decoder rows of the dictionary and of its control."""
    yield DICTIONARY, pooled.codes, pooled.rows
    yield RANDOM, *random_dictionary(pooled, train, seed)


def random_dictionary(
    pooled: PooledTexts, train: np.ndarray, seed: int
) -> tuple[PooledCodes, Float[np.ndarray, "feature d_model"]]:
    """Mean codes of random directions, each firing on as many training tokens as a feature does."""
    lengths = np.diff(pooled.bounds)
    member = np.repeat(np.isin(np.arange(len(pooled)), train), lengths)
    weight = np.zeros(len(pooled))
    weight[train] = lengths[train]
    fires = np.rint(pooled.frequency.matrix().T @ weight).astype(int)
    drawn = random_directions(pooled.tokens[member].astype(np.float64), fires, seed)
    entries = []
    for part in blocks(len(pooled), int(lengths.max()) * len(fires)):
        begin, end = part.start, min(part.stop, len(pooled))
        own = pooled.bounds[begin : end + 1]
        fired = drawn.codes(pooled.tokens[own[0] : own[-1]].astype(np.float64))
        mean = np.add.reduceat(fired, own[:-1] - own[0]) / lengths[begin:end, None]
        text, feature = mean.nonzero()
        entries.append(
            [torch.from_numpy(one) for one in (feature, text + begin, mean[text, feature])]
        )
    features, texts, values = (torch.cat(one) for one in zip(*entries, strict=True))
    codes = by_feature(
        features,
        texts,
        values.float(),
        width=len(fires),
        n_tokens=torch.from_numpy(lengths),
        pooling="mean",
        sae_id=RANDOM,
        hook_name=pooled.codes.hook_name,
    )
    return codes, drawn.directions.T


__all__ = ["Perturbation", "PooledTexts", "collect_pooled", "perturb_probes", "remove_spurious"]
