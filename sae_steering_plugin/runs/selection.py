"""Features for concepts, chosen with labels: score, support, causal filter, held-out figures.

Steps and order follow shared/methods/supervised_feature_selection, section 3.5: support -> score
on the training split -> the best M candidates -> output score of those -> cut -> the best k.
Everything is fitted on train; validation and test figures are measured with the training threshold.
Sources: arXiv 2605.31183 (second-hand, see that page), 2505.20063 (output score).
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_steering_plugin.adapters.activations import bos_policy, encode_texts, model_name
from sae_steering_plugin.adapters.sae_lens import SteeringDictionary, sae_id
from sae_steering_plugin.directions.feature import feature_vector
from sae_steering_plugin.features.causal import CausalScores, rank_average
from sae_steering_plugin.features.lens import LENS_TOKENS
from sae_steering_plugin.features.pooled import PooledCodes
from sae_steering_plugin.features.scores import PRIOR, ScoreTable, label_table, score_features
from sae_steering_plugin.prediction.choice import Forecaster, cleanest_first, equally_good
from sae_steering_plugin.runs.causal_scores import PROMPT, STRENGTH, output_scores
from sae_steering_plugin.runs.collect import collect_labelled
from sae_steering_plugin.runs.forecast_choice import Equals
from sae_steering_plugin.runs.pooled_codes import collect_codes
from sae_steering_plugin.runs.splits import SPLITS, checked_splits, grouped_splits, linked_groups
from sae_steering_plugin.types import Selection, SteeringVector

SUPPORT = 50
"""Texts that a concept needs (arXiv 2605.31183, reported second-hand)."""
CUT = 1e-3
"""Least output score of the causal variant (the same source). Absolute cuts do not carry over from
one model to another: the final norm caps the score."""
CANDIDATES, KEPT = 50, 5
WITHIN = 0.02
"""Features whose training score lies at most this far below the best one's are equally good to a
screen's forecast."""
DENSE = 0.5
"""A feature that fires on more tokens than this is flagged."""
FEWEST_TOKENS = 16
"""Texts shorter than this have a coarse firing frequency."""
NORM_TEXTS = 64
"""Training texts that the mean residual norm is measured on."""
LEXICON = 12
"""Tokens kept per concept as its lexicon."""
VARIANTS = {"full": True, "interpretability": False}
ORDERS = ("score", "equals", "output", "product")


@dataclass(frozen=True, eq=False)
class SelectedFeatures:
    """The features of every concept, best first, with all scores that chose them.

    `selections[c]` is a `Selection`; `missing[c]` says why concept c has no feature: it counts with
    the fallback, no steering and an effect of 0. `vectors[c]` are the chosen decoder rows as
    steering vectors, in the unit `max_activation`. `lexicon[c]` are tokens of the concept learned
    on the validation split, which had no part in the choice. `splits` holds one word per text.
    """

    selections: Mapping[str, Selection]
    missing: Mapping[str, str]
    vectors: Mapping[str, tuple[SteeringVector, ...]]
    lexicon: Mapping[str, tuple[int, ...]]
    splits: tuple[str, ...]
    causal: CausalScores | None
    sae_id: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    equals: Mapping[str, Equals] = field(default_factory=dict)

    @property
    def concepts(self) -> tuple[str, ...]:
        return (*self.selections, *self.missing)

    @property
    def coverage(self) -> tuple[int, int]:
        """Concepts with a feature, and all concepts asked for."""
        return len(self.selections), len(self.concepts)

    def to_vectors(self, k: int = 1) -> list[SteeringVector]:
        """The k best features of each concept that has one, labelled by concept and rank."""
        return [vector for found in self.vectors.values() for vector in found[:k]]

    def to_dictionary(self, k: int = 1) -> SteeringDictionary:
        """The same as an SAELens dictionary, whose `save_model` writes a folder."""
        return SteeringDictionary.from_vectors(self.to_vectors(k))

    def table(self) -> Any:
        """One row per concept and rank, with every score; a concept without feature has rank 0."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for concept, selection in self.selections.items():
            for rank, row in enumerate(selection.rows(), 1):
                rows.append({"concept": concept, "rank": rank, **row, "note": ""})
        for concept, why in self.missing.items():
            rows.append({"concept": concept, "rank": 0, "note": f"{why}; fallback: unsteered"})
        frame = pd.DataFrame(rows)
        if "feature" in frame:
            frame["feature"] = frame["feature"].astype("Int64")
        return frame

    def best(self) -> list[dict[str, str]]:
        """The best feature of each concept as short words, for a terminal; "-" where none is."""
        names = [f"train_{self.settings['score']}", f"test_{self.settings['score']}"]
        names += ["test_auroc", "output_score", "delta_confidence", "a_max", "density", "support"]
        rows = []
        for concept in self.concepts:
            scores = self.selections[concept].scores if concept in self.selections else {}
            feature = str(self.selections[concept].features[0]) if scores else "-"
            row = {"concept": concept, "feature": feature}
            for name in dict.fromkeys(names):
                row[name] = f"{scores[name][0]:.3g}" if name in scores else "-"
            rows.append(row)
        return rows

    def save(self, folder: str | Path) -> list[Path]:
        """Write features.csv, selection.json and vectors/ (when there are any); their paths."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        written = [target / "features.csv", target / "selection.json"]
        self.table().to_csv(written[0], index=False)
        about = {
            "sae_id": self.sae_id,
            "settings": dict(self.settings),
            "coverage": list(self.coverage),
            "missing": dict(self.missing),
            "notes": list(self.notes),
            "concepts": {c: selection.rows() for c, selection in self.selections.items()},
            "causal": dict(self.causal.settings) if self.causal is not None else None,
        }
        written[1].write_text(json.dumps(finite(about), indent=1) + "\n", encoding="utf-8")
        if self.selections:
            self.to_dictionary(max(len(found) for found in self.vectors.values())).save_model(
                target / "vectors"
            )
            written.append(target / "vectors")
        return written

    def _repr_html_(self) -> str:
        from html import escape

        got, asked = self.coverage
        head = f"{got} of {asked} concepts have a feature in {self.sae_id}"
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        body = self.table().to_html(index=False, float_format="%.3g", escape=True)
        return f"<p>{escape(head)}</p>{body}<ul>{notes}</ul>"


def finite(value: Any) -> Any:
    """`value` with null in place of numbers JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def usable_concepts(
    labels: Any, n: int, concepts: Sequence[str] = (), *, support: int = SUPPORT
) -> tuple[tuple[str, ...], np.ndarray, dict[str, str]]:
    """Names, table of 1/0/NaN, and why some concepts have too few texts; needs no model.

    Raises ValueError when no concept has `support` texts with it and some without.
    """
    names, table = label_table(labels, n, concepts)
    missing = {}
    for name, column in zip(names, table.T, strict=True):
        positive, negative = int((column == 1).sum()), int((column == 0).sum())
        if positive < support:
            missing[name] = f"{positive} texts, support asks for {support}"
        elif negative < support:
            missing[name] = f"{negative} texts without it, support asks for {support}"
    if len(missing) == len(names):
        name, why = next(iter(missing.items()))
        raise ValueError(
            f"no concept has enough texts ({name!r}: {why}); label more or lower support"
        )
    return names, table, missing


def select_features(
    model: Any,
    sae: Any,
    texts: Sequence[str],
    labels: Any,
    *,
    concepts: Sequence[str] = (),
    groups: Sequence[str] = (),
    splits: Sequence[str] = (),
    variant: str = "full",
    score: str = "f1",
    order: str = "score",
    pooling: str = "frequency",
    prior: float | None = PRIOR,
    support: int = SUPPORT,
    candidates: int = CANDIDATES,
    cut: float = CUT,
    k: int = KEPT,
    prompt: str = PROMPT,
    strength: float = STRENGTH,
    lens_k: int = LENS_TOKENS,
    starts: Sequence[int] = (),
    codes: Mapping[str, PooledCodes] | None = None,
    causal: CausalScores | None = None,
    screen: Forecaster | None = None,
    within: float = WITHIN,
    prepend_bos: bool | None = None,
    cut_texts: bool = False,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> SelectedFeatures:
    """The features that belong to each concept, and can be steered with.

    `texts` with `labels` as in `score_features`: 1, 0, NaN for unknown. `variant` is "full", with
    the causal filter (output score >= `cut`), or "interpretability", without it and without any
    steered pass. `score` names a score of `score_features` computed on texts pooled by `pooling`
    (firing frequency by default: it favours dense features less than max, but is itself sensitive
    to sparsity; run comparisons of dictionaries with "mean" too). Among the best `candidates`,
    `order` ranks by that "score", by "output" score, by "product", the average of both ranks, or by
    "equals": by score, but features at most `within` below the best are equally good, and among
    them the largest output score comes first (the output score alone is about no concept).
    `prompt`, `strength` and `lens_k` are those of `output_scores`. `codes` (of `collect_codes` on
    these texts, with `needed_poolings(pooling)`) and `causal` spare their passes where they are at
    hand.

    With a `screen` (see `screening.screen`; anything with `forecast_of`), features whose training
    score is at most `within` below the best one's count as equally good, and among them the one
    forecast to steer cleanest comes first; the score `forecast` holds the forecasts.

    Texts are split 60/20/20 with `groups` and repeated texts kept whole, or as `splits` says. The
    score, its threshold and a_max (largest code over training tokens without BOS) come from train;
    `validation_` and `test_` figures use the training threshold. The best of many candidates is
    flattered on train: report the test figure. Raises ValueError, before the model runs, for labels
    and options that do not fit, and when no concept has `support` texts.
    """
    check_options(variant, score, order, pooling, candidates, k)
    if screen is not None and order != "score":
        raise ValueError(f"a screen chooses among equal scores: order is {order!r}, not 'score'")
    names, table, missing = usable_concepts(labels, len(texts), concepts, support=support)
    given = checked_splits(texts, splits) if splits else grouped_splits(texts, groups, seed=seed)
    rows = {s: torch.tensor([i for i, word in enumerate(given) if word == s]) for s in SPLITS}
    asked = [c for c in names if c not in missing]
    pooled = codes or collect_codes(
        model,
        sae,
        texts,
        poolings=needed_poolings(pooling),
        starts=starts,
        prepend_bos=prepend_bos,
        cut=cut_texts,
        batch_size=batch_size,
        progress=progress,
    )
    check_codes(pooled, needed_poolings(pooling), len(texts), sae)
    column = {name: table[:, i] for i, name in enumerate(names)}
    asked = [c for c in asked if _both(column[c][rows["train"]], c, missing)]
    if not asked:
        raise ValueError(f"no concept has both kinds of texts in the training split: {missing}")
    scored = _scored(pooled[pooling].of(rows["train"]), column, asked, rows["train"], score, prior)
    best = {
        c: [f for f in scored.top(c, score, candidates) if _worth(scored, c, score, f)]
        for c in asked
    }
    if not VARIANTS[variant]:
        causal = None
    elif causal is None:
        causal = output_scores(
            model,
            sae,
            sorted({feature for found in best.values() for feature in found}),
            prompt=prompt,
            strength=strength,
            k=lens_k,
            prepend_bos=prepend_bos,
            progress=progress,
        )
    equals: dict[str, Equals] = {}
    for c in asked:
        ranked, why = filtered(
            c, best[c], scored, score, causal, cut=cut, order=order, within=within
        )
        if ranked and screen is not None:
            values = scored.scores(c, score).values[ranked].tolist()
            equal = equally_good(ranked, values, within=within)
            equals[c] = Equals(c, equal, screen.forecast_of(equal))
            ranked = cleanest_first(ranked, equal, equals[c].forecast)
        best[c] = ranked[:k]
        if not ranked:
            missing[c] = why
    chosen = [c for c in asked if best[c]]
    figures = _figures(pooled, pooling, rows, column, scored, score, prior, causal, best, chosen)
    if screen is not None:
        for c in chosen:
            forecast = screen.forecast_of(best[c])
            figures[c]["forecast"] = tuple(forecast[f] for f in best[c])
    whole = [int(i) for i in rows["train"] if int(i) not in set(pooled[pooling].settings["cut"])]
    few = [texts[i] for i in whole[:NORM_TEXTS]]
    vectors = _vectors(model, sae, few, figures, best, len(rows["train"]), prepend_bos)
    settings = {
        "variant": variant,
        "score": score,
        "order": order,
        "pooling": pooling,
        "prior": prior,
        "support": support,
        "candidates": candidates,
        "cut": cut if causal is not None else None,
        "k": k,
        "within": within if screen is not None or order == "equals" else None,
        "seed": seed,
        "texts": len(texts),
        "splits": dict(Counter(given)),
        "dead": scored.n_dead,
        "fallback": "unsteered",
        "model_name": model_name(model),
    }
    notes = _notes(texts, pooled, pooling, rows, score, prior, best, figures, missing)
    notes += _screened(equals, within)
    return SelectedFeatures(
        selections={
            c: Selection(tuple(best[c]), figures[c], c, sae_id(sae), settings) for c in chosen
        },
        missing=missing,
        vectors=vectors,
        lexicon=lexicons(model, sae, texts, column, rows["validation"], chosen, prepend_bos),
        splits=tuple(given),
        causal=causal,
        sae_id=sae_id(sae),
        settings=settings,
        notes=tuple(notes),
        equals=equals,
    )


def needed_poolings(*poolings: str) -> tuple[str, ...]:
    """What selection by these poolings reads: density and a_max come from two more."""
    return tuple(dict.fromkeys((*poolings, "frequency", "max")))


def check_codes(codes: Mapping[str, PooledCodes], needed: Sequence[str], n: int, sae: Any) -> None:
    """Raise ValueError for codes that lack a pooling, or are of other texts or another SAE."""
    for name in needed:
        if name not in codes:
            raise ValueError(f"codes lack the pooling {name!r}; they hold {', '.join(codes)}")
        if len(codes[name]) != n or codes[name].sae_id != sae_id(sae):
            raise ValueError(
                f"codes are of {len(codes[name])} texts in {codes[name].sae_id!r}, and asked for "
                f"are {n} texts in {sae_id(sae)!r}"
            )


def check_options(
    variant: str, score: str, order: str, pooling: str, candidates: int, k: int
) -> None:
    """Raise ValueError for words that are not known and options that exclude each other."""
    from sae_steering_plugin.features.scores import SCORES
    from sae_steering_plugin.runs.pooled_codes import check_poolings

    for what, word, known in (
        ("variant", variant, tuple(VARIANTS)),
        ("score", score, tuple(SCORES)),
        ("order", order, ORDERS),
    ):
        if word not in known:
            raise ValueError(f"no {what} {word!r}; choose among {', '.join(known)}")
    check_poolings((pooling,))
    if order != "score" and not VARIANTS[variant]:
        raise ValueError(f"order {order!r} needs output scores: take variant 'full'")
    if not 1 <= k <= candidates:
        raise ValueError(f"k is {k} and candidates {candidates}; 1 <= k <= candidates is needed")


def filtered(
    concept: str,
    features: Sequence[int],
    scored: ScoreTable,
    score: str,
    causal: CausalScores | None,
    *,
    cut: float,
    order: str,
    within: float = WITHIN,
) -> tuple[list[int], str]:
    """Candidates that pass the cut, in the order asked for, and why none is left, if so."""
    if not features:
        return [], "no feature tells it from the other texts"
    if causal is None:
        return list(features), ""
    output = {f: causal.of(f)[0] for f in features}
    kept = [f for f in features if output[f] >= cut]
    if not kept:
        largest = max(output.values())
        return [], (
            f"none of {len(features)} candidates has an output score of {cut:g} (largest "
            f"{largest:.2g})"
        )
    if order == "score":
        return kept, ""
    if order == "equals":
        values = scored.scores(concept, score).values[kept].tolist()
        equal = equally_good(kept, values, within=within)
        return sorted(kept, key=lambda f: -output[f] if f in equal else 1.0), ""
    outputs = torch.tensor([output[f] for f in kept])
    ranks = rank_average(outputs)
    if order == "product":
        ranks = rank_average(scored.scores(concept, score).values[kept], outputs)
    return [kept[int(i)] for i in torch.argsort(ranks, descending=True, stable=True)], ""


def heldout_f1(fires: np.ndarray, labels: np.ndarray, prior: float | None) -> float:
    """Calibrated F1 of a prediction at the labels' own prevalence; NaN without both classes."""
    known = ~np.isnan(labels)
    y, guess = labels[known] == 1, fires[known]
    share = float(y.mean()) if len(y) else 0.0
    if not 0 < share < 1:
        return float("nan")
    reference = share if prior is None else prior
    cost = share * (1 - reference) / (reference * (1 - share))
    hits, false = float((y & guess).sum()), float((~y & guess).sum())
    return 2 * hits / (2 * hits + cost * false + float((y & ~guess).sum()))


def lexicons(
    model: Any,
    sae: Any,
    texts: Sequence[str],
    column: Mapping[str, np.ndarray],
    rows: Tensor,
    concepts: Sequence[str],
    prepend_bos: bool | None = None,
    n: int = LEXICON,
) -> dict[str, tuple[int, ...]]:
    """Tokens that mark each concept's texts: the n largest log odds of occurring in a text.

    log((p + .5) / (P + 1)) - log((q + .5) / (Q + 1)) over texts with (p of P) and without the
    concept (q of Q) that hold the token; tokens in fewer than three of its texts do not count.
    """
    encoded = encode_texts(
        model, texts, prepend_bos=bos_policy(model, sae, prepend_bos), max_tokens=2**62
    )
    holds = {int(i): set(encoded[int(i)].tokens[int(encoded[int(i)].leading_bos) :]) for i in rows}
    out = {}
    for concept in concepts:
        counts = {value: Counter[int]() for value in (1.0, 0.0)}
        total = Counter[float]()
        for i, tokens in holds.items():
            value = float(column[concept][i])
            if value == value:
                counts[value].update(tokens)
                total[value] += 1
        odds = {
            token: math.log((p + 0.5) / (total[1.0] + 1))
            - math.log((counts[0.0][token] + 0.5) / (total[0.0] + 1))
            for token, p in counts[1.0].items()
            if p >= 3
        }
        marks = sorted((t for t in odds if odds[t] > 0), key=lambda t: (-odds[t], t))
        out[concept] = tuple(marks[:n])
    return out


def _both(labels: np.ndarray, concept: str, missing: dict[str, str]) -> bool:
    """Whether both kinds of texts are there; if not, it is noted."""
    there = bool((labels == 1).any() and (labels == 0).any())
    if not there:
        missing[concept] = "the training split holds texts of one kind only"
    return there


def _scored(
    codes: PooledCodes,
    column: Mapping[str, np.ndarray],
    concepts: Sequence[str],
    rows: Tensor,
    score: str,
    prior: float | None,
) -> ScoreTable:
    return score_features(
        codes, {c: column[c][rows.numpy()] for c in concepts}, scores=(score,), prior=prior
    )


def _worth(scored: ScoreTable, concept: str, score: str, feature: int) -> bool:
    """A candidate must say something: more than chance for AUROC, more than zero elsewhere."""
    return float(scored.scores(concept, score).values[feature]) > (0.5 if score == "auroc" else 0.0)


def of_feature(codes: PooledCodes, feature: int) -> np.ndarray:
    """The pooled codes of one feature, one per text."""
    here = slice(int(codes.starts[feature]), int(codes.starts[feature + 1]))
    out = np.zeros(len(codes), dtype=np.float32)
    out[codes.examples[here].numpy()] = codes.values[here].numpy()
    return out


def _figures(
    pooled: Mapping[str, PooledCodes],
    pooling: str,
    rows: Mapping[str, Tensor],
    column: Mapping[str, np.ndarray],
    scored: ScoreTable,
    score: str,
    prior: float | None,
    causal: CausalScores | None,
    best: Mapping[str, Sequence[int]],
    chosen: Sequence[str],
) -> dict[str, dict[str, tuple[float, ...]]]:
    """Every figure of every chosen feature, by concept and name."""
    from sae_steering_plugin.directions.heldout import auroc

    tokens = pooled["frequency"].n_tokens.numpy()
    out = {}
    for c in chosen:
        found: dict[str, list[float]] = defaultdict(list)
        for f in best[c]:
            codes = of_feature(pooled[pooling], f)
            tau = float(scored.tau[f, scored.column(c)]) if scored.tau is not None else None
            found[f"train_{score}"].append(float(scored.scores(c, score).values[f]))
            for split in ("validation", "test"):
                here = rows[split].numpy()
                labels = column[c][here]
                known = ~np.isnan(labels)
                if tau is not None:
                    found[f"{split}_{score}"].append(heldout_f1(codes[here] > tau, labels, prior))
                area = auroc(
                    torch.from_numpy(codes[here][known]), torch.from_numpy(labels[known]).long()
                )
                found[f"{split}_auroc"].append(area)
            if tau is not None:
                found["tau"].append(tau)
            if causal is not None:
                output, plain, change = causal.of(f)
                found["output_score"].append(output)
                found["output_score_unsubtracted"].append(plain)
                found["delta_confidence"].append(change)
            largest = of_feature(pooled["max"], f)[rows["train"].numpy()]
            found["a_max"].append(float(np.abs(largest).max()))
            fires = of_feature(pooled["frequency"], f)
            found["density"].append(float((fires * tokens).sum() / tokens.sum()))
            found["support"].append(float((column[c] == 1).sum()))
        out[c] = {name: tuple(values) for name, values in found.items()}
    return out


def _vectors(
    model: Any,
    sae: Any,
    texts: Sequence[str],
    figures: Mapping[str, Mapping[str, tuple[float, ...]]],
    best: Mapping[str, Sequence[int]],
    n: int,
    prepend_bos: bool | None,
) -> dict[str, tuple[SteeringVector, ...]]:
    """The chosen decoder rows with a_max, the mean residual norm and their held-out figures."""
    if not figures:
        return {}
    labelled = collect_labelled(
        model, texts, [0] * len(texts), sae, prepend_bos=prepend_bos, progress=False
    )
    out = {}
    for c in figures:
        found = []
        for rank, f in enumerate(best[c]):
            vector = feature_vector(
                sae,
                f,
                labelled=labelled,
                max_activation=figures[c]["a_max"][rank],
                positive=f"the concept {c!r}",
                label=c if rank == 0 else f"{c} #{rank + 1}",
                sae_id=sae_id(sae),
            )
            held = {name: values[rank] for name, values in figures[c].items()}
            held = {name: value for name, value in held.items() if value == value}
            found.append(vector.with_recipe(scores=held, n=n, unit="max_activation"))
        out[c] = tuple(found)
    return out


def _screened(equals: Mapping[str, Equals], within: float) -> list[str]:
    """How often the forecast had a choice, and how often it took another feature."""
    if not equals:
        return []
    several = [one.chosen for one in equals.values() if len(one.features) > 1]
    moved = sum(one["forecast"] != one["score"] for one in several)
    return [
        f"{len(several)} of {len(equals)} concepts have several features within {within:g} of the "
        f"best score; for {moved} of them the forecast took another one than the score"
    ]


def _notes(
    texts: Sequence[str],
    pooled: Mapping[str, PooledCodes],
    pooling: str,
    rows: Mapping[str, Tensor],
    score: str,
    prior: float | None,
    best: Mapping[str, Sequence[int]],
    figures: Mapping[str, Mapping[str, tuple[float, ...]]],
    missing: Mapping[str, str],
) -> list[str]:
    """What a reader should know of the choice, a sentence each."""
    out = []
    repeats = len(texts) - len(set(linked_groups(texts)))
    if repeats:
        out.append(f"{repeats} texts repeat another one; repeats stay in one split")
    short = int((pooled[pooling].n_tokens < FEWEST_TOKENS).sum())
    if short and pooling == "frequency":
        out.append(
            f"{short} of {len(texts)} texts have fewer than {FEWEST_TOKENS} tokens: their firing "
            "frequencies are coarse"
        )
    n = len(rows["train"])
    if score == "f1" and prior is not None and n * prior < 1:
        out.append(
            f"{n} training texts at prior {prior:g}: one false positive nearly decides the "
            "calibrated F1; with so few texts 1e-2 is the better prior"
        )
    dense = sorted(
        {best[c][i] for c in figures for i, d in enumerate(figures[c]["density"]) if d > DENSE}
    )
    if dense:
        out.append(f"features {dense} fire on more than half of the tokens: expect side effects")
    shared = [f for f, times in Counter(best[c][0] for c in figures).items() if times > 1]
    if shared:
        names = {f: [c for c in figures if best[c][0] == f] for f in shared}
        text = f"features that are best for several concepts: {names}"
        out.append(text)
        warnings.warn(text, stacklevel=3)
    out += [f"{c!r} has no feature: {why}" for c, why in missing.items()]
    return out
