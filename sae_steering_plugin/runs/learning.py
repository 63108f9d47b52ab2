"""What a model is about to learn from texts, in the concepts of an SAE.

`learning_report` reads the gradient of a loss at the SAE's hook point, `preference_report` does so
for pairs of a chosen and a rejected text. What a finished update did is in `runs.updates`; a report
of a training loop while it runs, in `runs.learning_record`. Source:
shared/methods/gradient_projection (the identities; no paper states the report).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from sae_steering_plugin.adapters.activations import (
    TokenBatch,
    bos_policy,
    encode_texts,
    padded,
    refuse_dropout,
)
from sae_steering_plugin.adapters.learning import learning_logits
from sae_steering_plugin.adapters.sae_lens import sae_id
from sae_steering_plugin.adapters.sae_parts import site_names, whole_codes
from sae_steering_plugin.adapters.training_hooks import gradient_site, linear_decoder
from sae_steering_plugin.adapters.transformer_lens import Model, refuse_compiled
from sae_steering_plugin.concepts import GradientSums
from sae_steering_plugin.runs.collect import require_fit
from sae_steering_plugin.runs.learning_losses import (
    BETA,
    Loss,
    next_token_loss,
    preference_loss,
    single,
)
from sae_steering_plugin.types import Contrast, escaped

MIN_ACTIVE = 0.01
"""A latent is ranked when it fires at this share of the positions; others may be `emerging`."""


@dataclass(frozen=True, eq=False)
class LearningReport:
    """How texts push a model along each concept of one SAE; see `learning_report`.

    `table()` has a row per latent: `push_mean` (positive: the step wants more of it), its standard
    error over examples, `push_abs`, `agreement` (|sum| / sum of sizes), `amount_mean` (push
    where it is active), `attribution_mean` (loss saved by scaling it up there; CAFT sorts by the
    opposite sign), `active_share`. Means are over all counted positions.
    `per_example[i]` is the summed push of text i on each of `watch`; `top_of_examples` the latents
    that text i pushes most. `groups` are the sources of the texts.
    """

    sums: GradientSums
    hook_name: str
    sae_id: str
    loss: float
    groups: tuple[str, ...]
    by_group: Mapping[str, GradientSums]
    watch: tuple[int, ...]
    labels: Mapping[int, str] = field(default_factory=dict)
    min_active: float = MIN_ACTIVE
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_positions(self) -> int:
        return self.sums.positions

    @property
    def n_examples(self) -> int:
        return self.sums.examples

    @property
    def per_example(self) -> Float[Tensor, "example watched"]:
        return torch.stack(self.sums.watched)

    @property
    def top_of_examples(self) -> list[list[tuple[int, float]]]:
        """For each text the latents it pushes most, with their summed push."""
        return [
            [(int(latent), float(value)) for latent, value in zip(*pair, strict=True)]
            for pair in zip(self.sums.top_latents, self.sums.top_values, strict=True)
        ]

    def table(self, group: str | None = None) -> Any:
        """All latents as a pandas table, of everything or of one source."""
        import pandas as pd

        sums = self.sums if group is None else self._of(group)
        n = sums.positions
        found = pd.DataFrame(
            {
                "latent": range(len(sums.push)),
                "push_mean": sums.push / n,
                "push_se": sums.standard_errors(),
                "push_abs": sums.push_abs / n,
                "agreement": sums.push.abs() / sums.push_abs.clamp_min(1e-300),
                "amount_mean": sums.amount / n,
                "attribution_mean": sums.attribution / n,
                "active_share": sums.active / n,
            }
        )
        if self.labels:
            found["label"] = [self.labels.get(j, "") for j in found["latent"]]
        return found

    def top(self, k: int = 20, by: str = "push", *, group: str | None = None) -> Any:
        """The k concepts most pushed among those that fire: |mean push| x agreement by default.

        `by` is "push" or a column of `table`, sorted by size.
        """
        found = self.table(group)
        found = found[found["active_share"] >= self.min_active]
        return self._sorted(found, by).head(k).reset_index(drop=True)

    def emerging(self, k: int = 20, *, group: str | None = None) -> Any:
        """Concepts that hardly fire and are pushed: behaviour that is being installed."""
        found = self.table(group)
        found = found[(found["active_share"] < self.min_active) & (found["push_mean"] > 0)]
        return self._sorted(found, "push").head(k).reset_index(drop=True)

    @staticmethod
    def _sorted(found: Any, by: str) -> Any:
        if by != "push" and by not in found.columns:
            raise KeyError(f"no column {by!r}; choose 'push' or one of {', '.join(found.columns)}")
        size = found["push_mean"].abs() * found["agreement"] if by == "push" else found[by].abs()
        return found.loc[size.sort_values(ascending=False, kind="stable").index]

    def compare(self, group: str, other: str) -> Any:
        """Mean push of one source minus that of another, its standard error and z, per latent."""
        first, second = self.table(group), self.table(other)
        gap = first["push_mean"] - second["push_mean"]
        error = (first["push_se"] ** 2 + second["push_se"] ** 2) ** 0.5
        found = first[["latent"]].assign(difference=gap, se=error, z=gap / error)
        return found.loc[gap.abs().sort_values(ascending=False, kind="stable").index]

    def totals(self) -> dict[str, float]:
        """The exact split g.h = named + bias + unnamed, summed, and what share has no name.

        `unnamed_share` is sum |g.err| over the sum of sizes of the three parts.
        """
        sums = self.sums
        sizes = sums.named_abs + sums.biased_abs + sums.unnamed_abs
        return {
            "gradient_times_activation": sums.total,
            "named": sums.named,
            "bias": sums.biased,
            "unnamed": sums.unnamed,
            "unnamed_share": sums.unnamed_abs / sizes if sizes else float("nan"),
        }

    def energy(self, k: int = 20, *, seeds: int = 10) -> dict[str, float]:
        """Share of |g|^2 in the span of the k top concepts, and of k random decoder rows.

        Without the second figure (mean over `seeds` draws) the first says nothing.
        """
        top = [int(j) for j in self.top(k)["latent"]]
        draws = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(int(self.settings.get("seed", 0)) + seed)
            rows = torch.randperm(len(self.sums.rows), generator=generator)[: len(top)]
            draws.append(self.sums.energy(self.sums.rows[rows]))
        return {"top": self.sums.energy(self.sums.rows[top]), "random": sum(draws) / len(draws)}

    def to_dict(self, k: int = 20) -> dict[str, Any]:
        """What a page needs: totals, energy, the top and the emerging concepts."""
        return {
            "sae": self.sae_id,
            "hook_name": self.hook_name,
            "loss": self.loss,
            "n_examples": self.n_examples,
            "n_positions": self.n_positions,
            "totals": self.totals(),
            "energy": self.energy(k),
            "top": self.top(k).to_dict("records"),
            "emerging": self.emerging(k).to_dict("records"),
            "settings": dict(self.settings),
        }

    def _of(self, group: str) -> GradientSums:
        if group not in self.by_group:
            raise KeyError(f"no source {group!r}; there are {', '.join(self.by_group)}")
        return self.by_group[group]

    def summary(self) -> str:
        """One sentence: how much was counted, and how much of it the SAE can name."""
        totals, energy = self.totals(), self.energy()
        return (
            f"{self.n_examples} texts, {self.n_positions} positions at {self.hook_name}; "
            f"the SAE cannot name {totals['unnamed_share']:.0%} of the signal; the top 20 concepts "
            f"hold {energy['top']:.0%} of its energy (as many random rows: {energy['random']:.0%})"
        )

    def _repr_html_(self) -> str:
        tables = "".join(
            f"<h4>{name}</h4>{found.to_html(index=False, float_format='%.4g')}"
            for name, found in (("pushed", self.top(10)), ("emerging", self.emerging(10)))
        )
        return f"<p>{escaped(self.summary())}</p>{tables}"


def learning_report(
    model: Model,
    saes: Any,
    texts: Sequence[str],
    *,
    groups: Sequence[str] = (),
    loss: Loss = next_token_loss,
    counted: Callable[[TokenBatch], Tensor] | None = None,
    watch: Sequence[int] = (),
    labels: Mapping[int, str] | None = None,
    min_active: float = MIN_ACTIVE,
    max_tokens: int | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 8,
    keep: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """What one step of gradient descent on `texts` pushes a model towards, concept by concept.

    `saes` is one SAE, or a list of them at different sites (then a dict by hook name comes back);
    no weight is changed and nothing upstream of the first site is differentiated. `loss` takes
    logits and the tokens to a *sum*; its last real position and the BOS are left out of the count,
    because next-token losses give no gradient there; `counted` may mark other positions (batch to a
    mask `[batch pos]`), those at which an answer is decided for instance. `groups` names the source
    of each text: sources are also summed apart. `watch` keeps every text's push on these latents.
    `seed` draws the random rows that `energy` compares with.

    Raises ValueError for an SAE whose decode is not linear at its site, for an attached SAE (it
    corrupts gradients), for active dropout, and for a loss that is no single number.
    """
    wanted = list(saes) if isinstance(saes, Sequence) else [saes]
    if not wanted:
        raise ValueError("no SAE is given")
    if not len(texts):
        raise ValueError("there are no texts")
    if groups and len(groups) != len(texts):
        raise ValueError(f"groups has {len(groups)} entries for {len(texts)} texts")
    sources = tuple(groups) or ("",) * len(texts)
    sites = [site_names(sae)[0] for sae in wanted]
    if len(set(sites)) != len(sites):
        raise ValueError("two SAEs read one site: report on them one after the other")
    decoders = [tuple(part.double() for part in linear_decoder(sae)) for sae in wanted]
    refuse_compiled(model)
    refuse_dropout(model)
    policies = {bos_policy(model, sae, prepend_bos) for sae in wanted}
    if len(policies) > 1:
        raise ValueError("the SAEs were trained with and without BOS: pass prepend_bos")
    encoded = encode_texts(model, texts, prepend_bos=policies.pop(), max_tokens=max_tokens)
    sums = [
        {name: GradientSums(rows, bias, tuple(watch), keep) for name in dict.fromkeys(sources)}
        for rows, bias in decoders
    ]
    total = 0.0
    with tqdm(total=len(texts), desc="gradients", unit="text", disable=not progress) as bar:
        for start in range(0, len(texts), batch_size):
            batch = padded(model, encoded[start : start + batch_size])
            value, seen = gradients(model, sites, batch, loss)
            total += value
            marked = (counted or counted_positions)(batch)
            for place, (h, g) in enumerate(seen):
                if start == 0:
                    require_fit(wanted[place], sites[place], h[marked.to(h.device)], None)
                with torch.no_grad():
                    z = whole_codes(wanted[place], h)
                for row in range(len(h)):
                    where = marked[row].to(h.device)
                    source = sums[place][sources[start + row]]
                    source.add(g[row][where], h[row][where], z[row][where])
            bar.update(len(batch.tokens))
    reports = {
        site: LearningReport(
            together(sums[place], sources),
            site,
            sae_id(wanted[place]),
            total,
            sources,
            sums[place],
            tuple(watch),
            dict(labels or {}),
            min_active,
            {"loss": getattr(loss, "__name__", "given"), "batch_size": batch_size, "seed": seed},
        )
        for place, site in enumerate(sites)
    }
    return reports if isinstance(saes, Sequence) else reports[sites[0]]


def preference_report(
    model: Model,
    saes: Any,
    contrast: Contrast,
    *,
    beta: float = BETA,
    reference: Model | None = None,
    batch_size: int = 8,
    **options: Any,
) -> Any:
    """A learning report of DPO on pairs: `contrast.positive` is chosen, `contrast.negative` not.

    The sides are summed apart (`table("chosen")`, `compare("chosen", "rejected")`), because their
    gradients point opposite ways and their sum hides both. Text 2i is the chosen and 2i + 1 the
    rejected one of pair i. `options` are those of `learning_report`. Raises ValueError for a
    contrast without pairs, an odd batch size, and as `preference_loss`.
    """
    if not contrast.paired:
        raise ValueError("preferences need pairs: this contrast holds two lists apart")
    if batch_size % 2:
        raise ValueError(f"batch_size is {batch_size}: pairs need an even one")
    pairs = zip(contrast.positive, contrast.negative, strict=True)
    return learning_report(
        model,
        saes,
        [text for pair in pairs for text in pair],
        groups=["chosen", "rejected"] * len(contrast.positive),
        loss=preference_loss(beta=beta, reference=reference),
        batch_size=batch_size,
        **options,
    )


def together(by_source: Mapping[str, GradientSums], sources: Sequence[str]) -> GradientSums:
    """The sums of all sources, what is kept per text back in the order of the texts."""
    whole = reduce(GradientSums.merge, by_source.values())
    apart = [i for name in by_source for i, source in enumerate(sources) if source == name]
    order = sorted(range(len(apart)), key=apart.__getitem__)
    for kept in ("top_latents", "top_values", "watched"):
        values = getattr(whole, kept)
        setattr(whole, kept, [values[place] for place in order])
    return whole


def counted_positions(batch: TokenBatch) -> Bool[Tensor, "batch pos"]:
    """Real tokens but a leading BOS and each text's last, which predicts nothing."""
    kept = batch.counted.clone()
    lengths = batch.real.sum(dim=1)
    kept[torch.arange(len(kept)), batch.place + lengths - 1] = False
    return kept


def gradients(
    model: Model, sites: Sequence[str], batch: TokenBatch, loss: Loss
) -> tuple[float, list[tuple[Tensor, Tensor]]]:
    """The loss of a batch, and activation and gradient at each site, in float32 or better.

    The first site of the pass becomes a leaf, so that nothing below it is differentiated and
    frozen weights do not matter; weights get no gradient.
    """
    with captured(model, sites) as seen:
        with torch.enable_grad():
            value = loss(learning_logits(model, batch), batch)
        if value.ndim:
            raise ValueError(f"the loss has shape {tuple(value.shape)}; it must be one number")
        tensors = [seen[site] for site in sites]
        found = torch.autograd.grad(value, tensors, allow_unused=True)
    out = []
    for site, h, g in zip(sites, tensors, found, strict=True):
        if g is None:
            raise ValueError(f"the loss does not hang on {site!r}")
        out.append((single(h.detach()), single(g.detach())))
    return float(value.detach()), out


@contextmanager
def captured(model: Model, sites: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep what flows past each site in the graph; the first one to come is made a leaf."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG001
            if name in seen:  # a second pass, of a loss that asks the model again
                return output
            flowing = output if seen else output.detach().requires_grad_(True)
            seen[name] = flowing
            return flowing

        return hook

    with ExitStack() as stack:
        for name in sites:
            site = gradient_site(model, name)
            stack.callback(site.point.register_forward_hook(keep(name)).remove)
        yield seen
