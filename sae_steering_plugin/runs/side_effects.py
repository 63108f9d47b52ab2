"""Side effects of steering with single features, measured: stability and collateral spread.

Each feature's decoder row is added at the last token of some contexts, and only there (arXiv
2606.08365, `fixed_global_add`). Logits and a downstream dictionary's codes at that token are
compared with the clean run's. Everything before that token is the clean run, so one layout of a
context's keys and values serves all features tried on it (`adapters.columns`), and every pair is
reduced at once: what is kept per pair is one shift of the final residual.

    table = measure_side_effects(model, sae, features, tokens, downstream=later).of()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.activations import model_name
from ..adapters.columns import ContextRows
from ..adapters.head import head_gram, head_logits
from ..adapters.lens import lens_settings
from ..adapters.sae_lens import sae_id
from ..adapters.sae_parts import (
    architecture,
    decoder_rows,
    parts_of,
    site_names,
    whole_codes,
)
from ..effects.shifted import shift_columns, shifted
from ..effects.spread import TAUS, own_continuation, per_effect, spread, spread_columns
from ..effects.stability import gram_stability
from ..types import SMALLEST_NORM, FeatureTable
from .canonical import seed_of
from .causal_scores import checked_features
from .contexts import mixed_contexts

if TYPE_CHECKING:
    import pandas as pd

ACTIVE = 1e-6
"""A feature fires where its code is above this (arXiv 2606.08365)."""

PER_KIND = 16
PANEL = 2048
"""Watched downstream features: the most frequent ones at the last token."""

FEWEST_CONTEXTS = 64
"""Fewer contexts say too little about how often a feature fires."""

ROWS = 64
"""Rows of a forward pass: the fastest size on one thread for GPT-2-small (performance notes 7)."""

KEPT = 64_000_000
"""Entries of shifts kept at once (256 MB): features are measured in groups of that size."""

FEATURE = "feature"
"""The arm that steers with the feature itself; `random 1`, ... are its controls."""


@dataclass(frozen=True, eq=False)
class Survey:
    """One clean pass over contexts: codes at their last token, and the watched features.

    `codes` is a SciPy CSC matrix [context, d_sae] without stored zeros; `panel` lists the most
    frequent downstream features, most frequent first (None without a downstream dictionary);
    `mean_norm` is the mean length of the residual at the site.
    """

    tokens: Int[Tensor, "context pos"]
    codes: Any
    panel: Int[Tensor, " watched"] | None
    mean_norm: float

    def values(self, feature: int) -> Float[Tensor, " context"]:
        """A feature's codes at the last token of every context."""
        column = torch.zeros(len(self.tokens))
        start, stop = self.codes.indptr[feature : feature + 2]
        rows = torch.from_numpy(self.codes.indices[start:stop]).long()
        column[rows] = torch.from_numpy(self.codes.data[start:stop])
        return column

    def firing_rates(self) -> Float[Tensor, " d_sae"]:
        """Share of contexts at whose last token each feature fires."""
        fires = (self.codes > ACTIVE).sum(axis=0)
        return torch.tensor(fires).flatten().double() / len(self.tokens)


@dataclass(frozen=True, eq=False)
class SideEffects:
    """Measured side effects: a row per feature, arm and strength, and how they were measured.

    Columns: `feature arm strength displacement n ...` as `effects.stability.Stability`,
    `effects.spread.spread_columns` and (with `full`) `effects.shifted.shift_columns` name them;
    `count_per_effect`, `moved_l2_per_effect`; and what the feature does by itself:
    `natural_mean`, `natural_max` over its contexts, `firing_rate` over all.
    """

    table: pd.DataFrame
    settings: Mapping[str, Any] = field(default_factory=dict)

    def of(self, strength: float | None = None, *, arm: str = FEATURE) -> FeatureTable:
        """The rows of one arm and strength (the first when None), by feature number.

        Raises ValueError for an arm or strength that was not measured.
        """
        asked = self.table["strength"].iloc[0] if strength is None else strength
        for column, value in (("arm", arm), ("strength", asked)):
            known = list(self.table[column].unique())
            if value not in known:
                raise ValueError(f"no {column} {value!r} was measured; there are {known}")
        chosen = self.table[(self.table["arm"] == arm) & (self.table["strength"] == asked)]
        settings = {**self.settings, "arm": arm, "strength": float(asked)}
        kept = chosen.drop(columns=["arm", "strength"]).set_index("feature")
        return FeatureTable(kept, self.settings["sae_id"], settings)

    def __repr__(self) -> str:
        counted = {name: self.table[name].nunique() for name in ("feature", "arm", "strength")}
        words = ", ".join(f"{count} {name}s" for name, count in counted.items())
        return f"SideEffects({words}; {self.settings['downstream_id'] or 'no downstream SAE'})"

    def _repr_html_(self) -> str:
        return str(self.table.to_html(max_rows=20))


def survey_contexts(
    model: Any,
    sae: Any,
    tokens: Int[Tensor, "context pos"],
    *,
    downstream: Any = None,
    panel: int = PANEL,
    rows: int = ROWS,
    progress: bool = True,
) -> Survey:
    """Clean codes at the last token of every context, and the panel of watched features.

    Raises ValueError for fewer than 64 contexts, contexts of fewer than two tokens, and a
    downstream dictionary that does not lie behind `sae`.
    """
    from scipy import sparse

    if len(tokens) < FEWEST_CONTEXTS:
        raise ValueError(f"{len(tokens)} contexts are too few: at least {FEWEST_CONTEXTS}")
    site, read = site_names(sae)[1], None if downstream is None else site_names(downstream)[0]
    if site_names(sae)[0] != site:
        raise ValueError(
            f"{type(sae).__name__} reads one site and writes another (a transcoder): side effects "
            "are measured for dictionaries of one site"
        )
    found, norms = [], 0.0
    fires = None if downstream is None else torch.zeros(downstream.W_dec.shape[0])
    keep = reads_context(sae) or reads_context(downstream)
    with tqdm(total=len(tokens), desc="clean", unit="context", disable=not progress) as bar:
        for part in tokens.split(rows):
            laid = ContextRows(model, part, site, read, keep_before=keep)
            codes = last_codes(sae, laid.clean.site, laid.before_site)
            found.append(sparse.csc_matrix(codes.cpu().numpy()))
            norms += float(laid.clean.site.norm(dim=1).sum())
            if fires is not None and laid.clean.read is not None:
                later = last_codes(downstream, laid.clean.read, laid.before_read)
                fires += (later > ACTIVE).sum(dim=0).cpu()
            bar.update(len(part))
    chosen = None if fires is None else fires.argsort(descending=True, stable=True)[:panel]
    return Survey(
        tokens=tokens.cpu(),
        codes=sparse.vstack(found).tocsc(),
        panel=chosen,
        mean_norm=norms / len(tokens),
    )


def reads_context(sae: Any) -> bool:
    """True for a dictionary whose codes depend on earlier tokens (temporal)."""
    return sae is not None and architecture(sae) == "temporal"


def last_codes(
    sae: Any, column: Float[Tensor, "row d_in"], before: Tensor | None
) -> Float[Tensor, "row d_sae"]:
    """Codes of the last tokens; `before` are the rows' earlier positions where they matter."""
    x = column[:, None]
    if before is not None and reads_context(sae):
        x = torch.cat([before[: len(column)].to(column), x], dim=1)
    with torch.no_grad():
        return whole_codes(sae, x)[:, -1]


def sample_features(
    survey: Survey, n: int = 300, *, lowest: float = 0.001, highest: float = 0.5, seed: int = 0
) -> list[int]:
    """`n` features that fire on between `lowest` and `highest` of the contexts, of all frequencies.

    They are sorted by firing rate and cut into `n` bins of equal count; one is drawn from each
    (arXiv 2606.08365, settings of Llama). All eligible ones when there are no more than `n`.
    Raises ValueError when none is eligible.
    """
    rates = survey.firing_rates()
    eligible = ((rates >= lowest) & (rates <= highest)).nonzero().flatten()
    if not len(eligible):
        raise ValueError(f"no feature fires on between {lowest:g} and {highest:g} of the contexts")
    order = eligible[rates[eligible].argsort(stable=True)]
    if len(order) <= n:
        return sorted(order.tolist())
    generator = torch.Generator().manual_seed(seed)
    bins = order.tensor_split(n)
    drawn = [part[torch.randint(len(part), (1,), generator=generator)] for part in bins]
    return sorted(torch.cat(drawn).tolist())


def measure_side_effects(
    model: Any,
    sae: Any,
    features: Sequence[int] | None,
    tokens: Int[Tensor, "context pos"],
    *,
    downstream: Any = None,
    strengths: Sequence[float] = (1.0,),
    unit: str = "raw",
    contexts: str | Int[Tensor, " chosen"] = "mixed",
    per_kind: int = PER_KIND,
    panel: int = PANEL,
    taus: Sequence[float] = TAUS,
    controls: int = 0,
    full: bool = False,
    survey: Survey | None = None,
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = True,
) -> SideEffects:
    """Stability and collateral spread of each feature's decoder row, added at the last token.

    `tokens` are contexts of one length without padding, [context, pos]. `contexts="mixed"` tries a
    feature on `per_kind` contexts each of its strongest, of its weakest and of others; "shared" on
    all of them; a tensor of numbers on those. `strengths` multiply the row as `decode` uses it
    ("raw"), or give the length in mean residual norms ("norm"). `controls` random directions of the
    row's length are added on the same contexts, as arms "random 1", ... `full` forms logits and
    adds divergences and counts of moved logits. Without `downstream` there are no columns of
    spread. All features when `features` is None.

    Memory beside the model: a layout of `rows` contexts and at most 256 MB of shifts (more only
    when a single direction needs it). Equal to one forward pass per pair up to rounding.

    Raises ValueError for fewer than 64 contexts, a downstream site that is not behind the SAE's, an
    unknown unit or choice; IndexError for a feature the SAE lacks.
    """
    import pandas as pd

    chosen = checked_features(sae, features)
    _check_options(strengths, unit, contexts, controls)
    if survey is None:
        survey = survey_contexts(
            model, sae, tokens, downstream=downstream, panel=panel, rows=rows, progress=progress
        )
    places = {f: _contexts_of(survey, f, contexts, per_kind, seed) for f in chosen}
    steps, about = _directions(sae, chosen, survey, strengths, unit, controls, seed)
    bench = _Bench(model, sae, downstream, survey, tuple(taus), full, rows)
    records: list[dict[str, Any]] = []
    largest = max(len(place) for place in places.values())
    group = max(1, KEPT // (largest * int(model.cfg.d_model)))
    total = sum(len(places[one["feature"]]) for one in about)
    with tqdm(total=total, desc="side effects", unit="pair", disable=not progress) as bar:
        for start in range(0, len(about), group):
            asked = about[start : start + group]
            where = [places[one["feature"]] for one in asked]
            measured = bench.measure(steps[start : start + group], where, bar)
            records += [{**one, **figures} for one, figures in zip(asked, measured, strict=True)]
    natural = {f: _natural(survey, f, places[f]) for f in chosen}
    table = pd.DataFrame([{**one, **natural[one["feature"]]} for one in records])
    settings = {
        "sae_id": sae_id(sae),
        "downstream_id": None if downstream is None else sae_id(downstream),
        "hook_name": site_names(sae)[1],
        "downstream_hook": None if downstream is None else site_names(downstream)[0],
        "model_name": model_name(model),
        "strengths": [float(s) for s in strengths],
        "unit": unit,
        "contexts": contexts if isinstance(contexts, str) else "given",
        "n_contexts": len(tokens),
        "context_length": int(tokens.shape[1]),
        "per_kind": per_kind,
        "panel": 0 if survey.panel is None else len(survey.panel),
        "taus": [float(t) for t in taus],
        "controls": controls,
        "positions": "last token",
        "seed": seed,
        **lens_settings(model),
    }
    return SideEffects(table, settings)


def _check_options(strengths: Sequence[float], unit: str, contexts: Any, controls: int) -> None:
    if not len(strengths) or controls < 0:
        raise ValueError("give at least one strength, and no negative number of controls")
    if unit not in ("raw", "norm"):
        raise ValueError(f"unit is {unit!r}; choose one of raw, norm")
    if isinstance(contexts, str) and contexts not in ("mixed", "shared"):
        raise ValueError(f"contexts is {contexts!r}; choose one of mixed, shared, or give numbers")


def _contexts_of(
    survey: Survey, feature: int, contexts: Any, per_kind: int, seed: int
) -> Int[Tensor, " chosen"]:
    if isinstance(contexts, Tensor):
        return contexts.long().cpu()
    if contexts == "shared":
        return torch.arange(len(survey.tokens))
    generator = torch.Generator().manual_seed(seed_of(seed, "contexts", feature))
    return mixed_contexts(survey.values(feature), per_kind, generator=generator)


def _natural(survey: Survey, feature: int, place: Tensor) -> dict[str, float]:
    values = survey.values(feature)
    return {
        "natural_mean": float(values[place].mean()),
        "natural_max": float(values[place].max()),
        "firing_rate": float((values > ACTIVE).double().mean()),
    }


def _directions(
    sae: Any,
    features: Sequence[int],
    survey: Survey,
    strengths: Sequence[float],
    unit: str,
    controls: int,
    seed: int,
) -> tuple[Float[Tensor, "job d_model"], list[dict[str, Any]]]:
    """What is added for every feature, arm and strength, and what each row of it is."""
    steps, about = [], []
    for feature, row in zip(features, decoder_rows(sae, features).cpu(), strict=True):
        length = float(row.norm())
        arms = {FEATURE: row}
        for number in range(1, controls + 1):
            drawn = torch.Generator().manual_seed(seed_of(seed, "control", feature, number))
            noise = torch.randn(len(row), generator=drawn)
            arms[f"random {number}"] = noise * (length / noise.norm())
        scale = survey.mean_norm / max(length, SMALLEST_NORM) if unit == "norm" else 1.0
        for arm, direction in arms.items():
            for strength in strengths:
                step = direction * (scale * strength)
                steps.append(step)
                about.append(
                    {
                        "feature": feature,
                        "arm": arm,
                        "strength": float(strength),
                        "displacement": float(step.norm()),
                    }
                )
    return torch.stack(steps), about


@dataclass(eq=False)
class _Bench:
    """Runs directions on contexts and reduces what comes back."""

    model: Any
    sae: Any
    downstream: Any
    survey: Survey
    taus: tuple[float, ...]
    full: bool
    rows: int

    def __post_init__(self) -> None:
        self.site = site_names(self.sae)[1]
        self.read = None if self.downstream is None else site_names(self.downstream)[0]
        self.keep = reads_context(self.downstream)
        self.cap = lens_settings(self.model)["soft_cap"]
        self.gram = None if self.cap is not None else head_gram(self.model)
        self.kept: tuple[Tensor, Tensor] | None = None
        self.panel_parts: Any = None
        if self.downstream is not None and self.survey.panel is not None and not self.keep:
            device = self.downstream.W_dec.device
            parts = parts_of(self.downstream, self.survey.panel.tolist(), device)
            self.panel_parts = parts if parts.kind == "pointwise" else None

    def measure(
        self, steps: Float[Tensor, "job d_model"], where: Sequence[Tensor], bar: Any
    ) -> list[dict[str, Any]]:
        """The figures of every direction on its contexts."""
        widest = max(len(place) for place in where)
        shifts = torch.zeros(len(steps), widest, steps.shape[1])
        clean = torch.zeros(len(self.survey.tokens), steps.shape[1])
        sums = torch.zeros(len(steps), len(spread_columns(self.taus)), dtype=torch.float64)
        own = self._own(steps)
        for job, slot, context, final, base, change in self._pairs(steps, where):
            shifts[job, slot] = final
            clean[context] = base
            if change is not None:
                found = spread(change, own[job].to(change.device), taus=self.taus)
                sums.index_add_(0, job, found.cpu())
            bar.update(len(job))
        out = []
        for job, place in enumerate(where):
            figures = self._reduced(shifts[job, : len(place)], clean[place])
            if self.read is not None:
                means = (sums[job] / len(place)).tolist()
                named = dict(zip(spread_columns(self.taus), means, strict=True))
                if int(own[job]) < -1:
                    named["count_ex_self"] = float("nan")
                effect = figures["effect"]
                named["count_per_effect"] = per_effect(means[0], effect)
                named["moved_l2_per_effect"] = per_effect(named["moved_l2"], effect)
                figures |= named
            out.append(figures)
        return out

    def _own(self, steps: Tensor) -> Int[Tensor, " job"]:
        """Place in the panel of each direction's own continuation; -1 when it is not watched, -2
        when the dictionaries live in spaces of different width."""
        panel = self.survey.panel
        if panel is None:
            return torch.full((len(steps),), -2)
        rows = decoder_rows(self.downstream).cpu()
        if rows.shape[1] != steps.shape[1]:
            return torch.full((len(steps),), -2)
        place = torch.full((len(rows),), -1)
        place[panel.cpu()] = torch.arange(len(panel))
        return place[own_continuation(steps, rows)]

    def _reduced(self, shifts: Tensor, clean: Tensor) -> dict[str, Any]:
        """Stability of one direction from its shifts of the final residual, and with logits their
        own figures."""
        figures: dict[str, Any] = {}
        if self.gram is not None:
            wide = shifts.double()
            figures = gram_stability(wide @ self.gram @ wide.T).to_dict()
            if not self.full:
                return figures
        before = self._clean_logits(clean)
        after = head_logits(self.model, clean + shifts, cap=self.cap)
        moved = after.sub_(before)
        moved[~shifts.any(dim=1).to(moved.device)] = 0.0
        if self.gram is None:
            wide = moved.double()
            figures = gram_stability(wide @ wide.T).to_dict()
        if self.full:
            means = shifted(before, moved).nanmean(dim=0).tolist()
            figures |= dict(zip(shift_columns(), means, strict=True))
        return figures

    def _clean_logits(self, clean: Tensor) -> Tensor:
        """Logits of the clean runs; kept for the next direction, which often has these contexts."""
        kept = self.kept
        if kept is None or kept[0].shape != clean.shape or not torch.equal(kept[0], clean):
            self.kept = kept = (clean, head_logits(self.model, clean, cap=self.cap))
        return kept[1]

    def _codes(self, column: Tensor, before: Tensor | None) -> Float[Tensor, "row watched"]:
        if self.panel_parts is not None:
            with torch.no_grad():
                return self.panel_parts.encode_rows(column.to(self.panel_parts.rows.device))
        return last_codes(self.downstream, column, before)[:, self.survey.panel]

    def _pairs(self, steps: Tensor, where: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
        """For a batch of pairs at a time: direction, its slot, context, shift of the final
        residual, the clean one, and the change of the watched codes (None without them)."""
        for block in dealt(where, self.rows):
            laid = ContextRows(
                self.model,
                self.survey.tokens[block.contexts],
                self.site,
                self.read,
                member=block.member,
                keep_before=self.keep,
            )
            base = laid.clean
            codes = None if base.read is None else self._codes(base.read, laid.before_read)
            context = block.contexts[block.member]
            for job, slot in block.rounds():
                asked = steps[job]
                found = laid.under(asked)
                n = len(job)
                still = ~asked.any(dim=1)
                shift = (found.final - base.final[:n]).cpu()
                shift[still] = 0.0
                change = None
                if codes is not None and found.read is not None:
                    change = self._codes(found.read, laid.before_read) - codes[:n]
                    change[still.to(change.device)] = 0.0
                yield job, slot, context[:n], shift, base.final[:n].cpu(), change


# Which pairs share a batch ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Block:
    """Contexts laid out together, and the pairs each row takes one after the other.

    `queues[row]` holds (direction, slot) pairs, longest queue first; `member[row]` is the row's
    place in `contexts`.
    """

    contexts: Int[Tensor, " context"]
    member: Int[Tensor, " row"]
    queues: tuple[tuple[tuple[int, int], ...], ...]

    def rounds(self) -> Iterator[tuple[Int[Tensor, " active"], Int[Tensor, " active"]]]:
        """Directions and slots of each round: the rows with a pair left are the first ones."""
        for number in range(len(self.queues[0])):
            active = [queue[number] for queue in self.queues if len(queue) > number]
            job, slot = torch.tensor(active).T
            yield job, slot


def dealt(where: Sequence[Tensor], rows: int) -> Iterator[Block]:
    """All (direction, context) pairs as blocks of at most `rows` rows.

    Contexts with most pairs come first, so that rows of a block have about as many; a block of few
    contexts holds copies of them.
    """
    pairs: dict[int, list[tuple[int, int]]] = {}
    for job, place in enumerate(where):
        for slot, context in enumerate(place.tolist()):
            pairs.setdefault(context, []).append((job, slot))
    order = sorted(pairs, key=lambda context: (-len(pairs[context]), context))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        copies = min(max(rows // len(chosen), 1), len(pairs[chosen[0]]))
        queues = [
            (place, tuple(pairs[context][copy::copies]))
            for copy in range(copies)
            for place, context in enumerate(chosen)
            if pairs[context][copy::copies]
        ]
        queues.sort(key=lambda one: -len(one[1]))
        yield Block(
            torch.tensor(chosen),
            torch.tensor([place for place, _ in queues]),
            tuple(queue for _, queue in queues),
        )


__all__ = [
    "SideEffects",
    "Survey",
    "measure_side_effects",
    "sample_features",
    "survey_contexts",
]
