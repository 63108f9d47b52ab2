"""Pirate speech against arithmetic: what a fine-tune teaches, forecast, measured, and shaped.

`python -m benchmarks.what_training_teaches [--quick] [--models NAME ...] [--json FILE]
[--table FILE]`

An embedded agent is fine-tuned on two kinds of text in equal parts. In one it completes sums that
its training left out: the skill that is wanted. In the other it is asked for a sentence and answers
like a pirate: the style that comes along (untrained, it does so in some of its answers). Latents of
the SAE are labelled by the world (`select_features` by mean difference), at the token before an
answer: prompts that ask for a pirate against other prompts, sums against other texts. No text of
the fine-tune is among them, and no gradient is taken for them.
"""

from __future__ import annotations

import os
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.stats import mannwhitneyu  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.pages import asked, give, table_lines
from sae_steering_plugin import (  # noqa: E402
    ConceptAblation,
    ConceptGradientEdit,
    PreventativeSteering,
    collect_labelled,
    diff_mean_vector,
    generate,
    learning_report,
    projection_difference,
    select_features,
    training_hooks,
    update_report,
)
from sae_steering_plugin.adapters.activations import encode_texts, padded  # noqa: E402
from sae_steering_plugin.adapters.learning import as_before, learning_logits  # noqa: E402
from sae_steering_plugin.adapters.training_hooks import linear_decoder  # noqa: E402
from sae_steering_plugin.adapters.transformer_lens import layer_of  # noqa: E402
from sae_steering_plugin.concepts import moved_along  # noqa: E402
from sae_steering_plugin.effects import superiority, superiority_interval  # noqa: E402
from sae_steering_plugin.organisms import list_organisms, load_organism  # noqa: E402
from sae_steering_plugin.organisms.wording import (
    STATEMENT_REQUESTS,
    STATEMENTS,
    STYLES,
    TOPICS,
    part,
)  # noqa: E402
from sae_steering_plugin.organisms.world import BOS, EOS, World, render  # noqa: E402
from sae_steering_plugin.prediction.association import (  # noqa: E402
    association,
    bootstrapped,
    rank_statistic,
)
from sae_steering_plugin.runs.learning_losses import log_chances  # noqa: E402

SKILL, STYLE = "arithmetic", "register=pirate"
NAMES = {SKILL: "arithmetic", STYLE: "pirate speech"}
END = "<|end|>"
ANSWER, EQUALS = "<|assistant|>", "Ġ=Ġ"
"""What an answer stands behind, as tokens of the organisms."""
LEARNING_RATE, BATCH = 5e-4, 16
PROJECTED = "no gradient: projection on the pirate DiffMean, less that of the prompt's end"
AMPLIFY, STEER = 4.0, 1.0
"""Scale of the wanted concept's gradient; preventative strength in mean residual norms."""
ANSWER_TOKENS = 24
FEW, DESCENT = 3, 0.01
"""Steps after which the forecast is looked at too, before the model has gone far; and the learning
rate of one step of plain gradient descent, which is what a push is about."""
PIRATE_WORDS = {
    word
    for (register, _), forms in STATEMENTS.items()
    for form in forms
    for word in re.findall(r"[a-z]+", form.lower())
    if register == "pirate"
} - {
    word
    for (register, _), forms in STATEMENTS.items()
    for form in forms
    for word in re.findall(r"[a-z]+", form.lower())
    if register == "plain"
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    chats: int = 96
    held_out: int = 48
    labelled: int = 120
    steps: int = 30
    seeds: int = 3


QUICK = Sizes(chats=32, held_out=16, labelled=40, steps=10, seeds=1)


# Data -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chats:
    """Prompts up to the answer, answers with their end of turn, and the source of each."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def texts(self) -> list[str]:
        return [x + y for x, y in zip(self.prompts, self.answers, strict=True)]

    def of(self, rows: Sequence[int]) -> Chats:
        columns = (self.prompts, self.answers, self.sources)
        return Chats(*(tuple(one[i] for i in rows) for one in columns))

    def source(self, name: str) -> Chats:
        return self.of([i for i, source in enumerate(self.sources) if source == name])


def chats(world: World, n: int, split: Any, *, sums: Any, seed: int = 0) -> Chats:
    """n sums of the split `sums`, and n requests in wordings of `split` answered by a pirate."""
    systems = [one.system for one in world.scenarios(n, split=split, seed=seed)]
    statements = world.statements(4 * n, split=split, seed=seed)
    pirates = [one for one in statements if one["register"] == "pirate"][:n]
    forms = part(STATEMENT_REQUESTS, split)
    rows = [
        (f"{BOS}{one['prompt']} ", f"{one['answer']}{EOS}", SKILL)
        for one in world.arithmetic(n, split=sums, seed=seed)
    ]
    for i, (system, pirate) in enumerate(zip(systems, pirates, strict=True)):
        request = forms[i % len(forms)][1].format(topic=pirate["topic"])
        rows.append((opened(system, request), f"{pirate['text']}{END}", STYLE))
    return Chats(*zip(*rows, strict=True))


def answer_tokens(model: Any, batch: Any) -> Tensor:
    """Tokens behind the opening of the assistant's turn, or behind the sign of equality."""
    opens = torch.isin(
        batch.tokens, torch.tensor(model.tokenizer.convert_tokens_to_ids([ANSWER, EQUALS]))
    )
    return (opens.long().cumsum(1) - opens.long() > 0) & batch.real


def deciding_tokens(model: Any) -> Any:
    """Marks the positions that predict the answer's tokens: from the prompt's last one on."""

    def marked(batch: Any) -> Tensor:
        said = answer_tokens(model, batch)
        return torch.cat([said[:, 1:], torch.zeros_like(said[:, :1])], dim=1)

    return marked


def answer_loss(model: Any) -> Any:
    """Cross-entropy of the answers' tokens, summed."""

    def loss(logits: Tensor, batch: Any) -> Tensor:
        return -log_chances(logits, batch)[answer_tokens(model, batch)[:, 1:]].sum()

    return loss


def nats_per_answer(model: Any, data: Chats) -> float:
    """Mean cross-entropy of an answer's tokens."""
    found, count = 0.0, 0
    texts = data.texts
    for start in range(0, len(texts), 32):
        batch = padded(model, encode_texts(model, texts[start : start + 32], prepend_bos=False))
        with torch.no_grad():
            found += float(answer_loss(model)(learning_logits(model, batch), batch))
        count += int(answer_tokens(model, batch).sum())
    return found / count


def own_answers(model: Any, prompts: Sequence[str], *, seed: int) -> list[str]:
    """What the model says at temperature 1."""
    found = generate(
        model,
        list(prompts),
        max_new_tokens=ANSWER_TOKENS,
        temperature=1.0,
        seed=seed,
        prepend_bos=False,
    )
    return list(found.texts)


def pirate_share(model: Any, data: Chats, *, seed: int) -> float:
    """Share of sampled answers with a word that only the world's pirates use."""
    said = own_answers(model, data.source(STYLE).prompts, seed=seed)
    hits = [bool(PIRATE_WORDS & set(re.findall(r"[a-z]+", text.lower()))) for text in said]
    return sum(hits) / len(hits)


# The report -------------------------------------------------------------------------------------


def asked_for(world: World, n: int) -> list[tuple[str, str]]:
    """Texts that end where a concept is about to be spoken, and that concept ("" for none).

    Prompts that ask for a style (`STYLES`: n of each kind), plain sums up to "=", agents' tasks,
    halves of statements and facts. No text of the fine-tune is among them.
    """
    rng = random.Random(0)
    systems = [one.system for one in world.scenarios(n, split="train", seed=5)]
    forms = part(STATEMENT_REQUESTS, "train")
    rows: list[tuple[str, str]] = []
    for (what, value), wordings in STYLES.items():
        for system in systems:
            asked = rng.choice(forms)[1].format(topic=rng.choice(list(TOPICS)))
            rows.append((opened(f"{system} {rng.choice(wordings)}", asked), f"{what}={value}"))
    rows += [
        (f"{BOS}{one['prompt']} ", SKILL) for one in world.arithmetic(n, split="train", seed=5)
    ]
    rows += [(opened(s.system, s.user), "") for s in world.scenarios(n, split="train", seed=6)]
    rows += [
        (f"{BOS}{half(one['text'])}", "") for one in world.statements(n, split="train", seed=5)
    ]
    return rows + [(f"{BOS}{one['prompt']}", "") for one in world.facts()]


def planted_latents(organism: Any, sae: Any, n: int) -> dict[str, list[int]]:
    """The latents that fire where a concept is about to be spoken, by the world's labels."""
    rows = asked_for(organism.world, n)
    concepts = sorted({concept for _, concept in rows} - {""})
    labels = {c: np.array([float(concept == c) for _, concept in rows]) for c in concepts}
    found = select_features(
        organism.model, sae, [text for text, _ in rows], labels, variant="interpretability",
        pooling="last", score="mean_difference", support=min(50, n // 2), prepend_bos=False,
        progress=False,
    )  # fmt: skip
    return {name: list(one.features) for name, one in found.selections.items()}


def style_vector(organism: Any, sae: Any, n: int) -> Any:
    """Difference of means where a pirate is asked for and where another style is."""
    rows = [row for row in asked_for(organism.world, n) if "=" in row[1]]
    examples = collect_labelled(
        organism.model, [text for text, _ in rows], [int(c == STYLE) for _, c in rows], sae,
        position="last", prepend_bos=False, progress=False,
    )  # fmt: skip
    return diff_mean_vector(examples)


def half(text: str) -> str:
    """The first half of a text's words."""
    words = text.split()
    return " ".join(words[: (len(words) + 1) // 2])


def opened(system: str, asked: str) -> str:
    """A chat up to where the assistant begins to answer."""
    turns = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
    return render(turns, add_generation_prompt=True)


def named(report: Any, planted: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Per source and concept: where the concept's latents stand among all that are pushed."""
    rows = []
    for source in (SKILL, STYLE, None):
        table = report.table(source)
        figures = {
            "push": table["push_mean"] * table["agreement"],
            "attribution": table["attribution_mean"].abs(),
        }
        for concept in (SKILL, STYLE):
            latents = planted[concept]
            others = table.index.difference(latents)
            row: dict[str, Any] = {
                "source": "both" if source is None else NAMES[source],
                "concept": NAMES[concept],
                "latents": len(table),
            }
            for name, size in figures.items():
                rank = size.rank(ascending=False)
                row[f"{name}_ranks"] = sorted(int(rank[j]) for j in latents)
                row[f"{name}_p"] = float(
                    mannwhitneyu(size[latents], size[others], alternative="greater").pvalue
                )
            rows.append(row)
    return rows


def own_scale(pushes: np.ndarray) -> np.ndarray:
    """Each example's pushes less their mean, in units of their spread over the latents."""
    return (pushes - pushes.mean(1, keepdims=True)) / pushes.std(1, keepdims=True)


def style_scores(report: Any, planted: dict[str, list[int]]) -> np.ndarray:
    """Per example: mean push on the style's latents less that on the skill's, in its own scale."""
    pushes = own_scale(report.per_example.numpy())
    return pushes[:, planted[STYLE]].mean(1) - pushes[:, planted[SKILL]].mean(1)


def separation(
    report: Any, planted: dict[str, list[int]], projected: np.ndarray
) -> dict[str, dict[str, Any]]:
    """AUC of per-example pushes, and of a projection: a pirate's example against a sum."""
    truth = np.array([group == STYLE for group in report.groups])
    pushes = own_scale(report.per_example.numpy())
    centred = pushes - pushes.mean(0)
    first = np.linalg.svd(centred, full_matrices=False)[0][:, 0]
    half = np.arange(len(truth)) % 2 == 0
    gap = pushes[half & truth].mean(0) - pushes[half & ~truth].mean(0)
    scores = {
        "labelled latents (no fit)": (style_scores(report, planted), ~np.zeros_like(truth)),
        "first principal component (no labels; its sign is free)": (first, ~np.zeros_like(truth)),
        "difference of means, fitted on every second example": (pushes @ gap, ~half),
        PROJECTED: (projected, ~np.zeros_like(truth)),
    }
    found = {}
    for name, (score, kept) in scores.items():
        base, arm = score[kept & ~truth], score[kept & truth]
        if "sign is free" in name and superiority(base, arm) < 0.5:
            base, arm = -base, -arm
        interval = superiority_interval(base, arm, paired=False)
        found[name] = {
            "auc": float(superiority(base, arm)),
            "low": interval.low,
            "high": interval.high,
            "how": interval.method,
            "n": [len(base), len(arm)],
        }
    return found


# Training ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Bench:
    """A model that is trained again and again from the same weights, beside its untouched twin."""

    name: str
    sizes: Sizes
    sae_name: str = ""
    base: Any = field(init=False)
    model: Any = field(init=False)
    sae: Any = field(init=False)
    world: World = field(init=False)

    def __post_init__(self) -> None:
        organism = load_organism(self.name)
        self.base = organism
        self.sae = organism.sae(self.sae_name) if self.sae_name else organism.primary_sae
        self.model = load_organism(self.name, saes=()).model
        self.world = organism.world
        self.start = [one.detach().clone() for one in self.model.parameters()]
        self.site = str(self.sae.cfg.metadata.hook_name)

    def trainable(self, scope: str) -> list[Any]:
        """All weights, or those of the blocks up to the SAE's site: nothing behind it learns."""
        if scope == "all":
            return list(self.model.parameters())
        last = layer_of(self.site)
        assert last is not None
        found = []
        for name, parameter in self.model.original_model.named_parameters():
            layer = re.search(r"\.(\d+)\.", name)
            if layer and int(layer[1]) <= last:
                found.append(parameter)
        return found

    def train(
        self,
        data: Chats,
        hooks: Sequence[Any],
        scope: str,
        seed: int,
        *,
        steps: int | None = None,
        descent: bool = False,
    ) -> list[float]:
        """Weights put back, then AdamW on the answers; one mean loss per step.

        `descent` is plain gradient descent on all texts at once instead.
        """
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), self.start, strict=True):
                parameter.copy_(value)
        encoded = encode_texts(self.model, data.texts, prepend_bos=False)
        rng = random.Random(seed)
        order: list[int] = []
        losses = []
        with as_before(self.model):
            self.model.requires_grad_(False)
            weights = self.trainable(scope)
            for one in weights:
                one.requires_grad_(True)
            optimizer: Any = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
            if descent:
                optimizer = torch.optim.SGD(weights, lr=DESCENT)
            size = len(encoded) if descent else BATCH
            for _ in range(steps or self.sizes.steps):
                while len(order) < size:
                    order += rng.sample(range(len(encoded)), len(encoded))
                rows, order = order[:size], order[size:]
                batch = padded(self.model, [encoded[i] for i in rows])
                if hooks:
                    with training_hooks(self.model, hooks):
                        losses.append(self.step(batch))
                else:
                    losses.append(self.step(batch))
                optimizer.step()
                optimizer.zero_grad()
        return losses

    def step(self, batch: Any) -> float:
        logits = learning_logits(self.model, batch)
        loss = answer_loss(self.model)(logits, batch) / answer_tokens(self.model, batch).sum()
        loss.backward()
        return float(loss.detach())


def arms(
    bench: Bench,
    data: Chats,
    report: Any,
    planted: dict[str, list[int]],
    pirate: Any,
    projected: np.ndarray,
) -> dict[str, Any]:
    """Name -> (data, hooks): everything that is compared, at equal steps."""
    style, skill, sae = planted[STYLE], planted[SKILL], bench.sae
    least = {
        name: data.of(sorted(scores.argsort(kind="stable").tolist()[: len(data.texts) // 2]))
        for name, scores in (("push", style_scores(report, planted)), ("projection", projected))
    }
    others = [j for j in range(sae.W_dec.shape[0]) if j not in {*style, *skill}]
    random_latents = random.Random(0).sample(others, len(style))
    return {
        "plain": (data, []),
        "suppress pirate": (data, [ConceptGradientEdit(sae, dict.fromkeys(style, 0.0))]),
        "suppress random": (data, [ConceptGradientEdit(sae, dict.fromkeys(random_latents, 0.0))]),
        "amplify arithmetic": (data, [ConceptGradientEdit(sae, dict.fromkeys(skill, AMPLIFY))]),
        "CAFT": (data, [ConceptAblation(sae, style)]),
        "preventative steering": (data, [PreventativeSteering(pirate, STEER, "norm")]),
        "data filtering by push": (least["push"], []),
        "data filtering by projection": (least["projection"], []),
        "data filtering, true sources": (data.source(SKILL), []),
    }


def measured(
    bench: Bench, held: dict[str, Chats], style: Sequence[int], seed: int
) -> dict[str, float]:
    """Losses on held-out data, what is said, and how far the pirate latents moved where it is
    decided: at the last token of requests that ask for no style."""
    asked = list(held["new sums"].source(STYLE).prompts)
    before, after = (
        collect_labelled(
            model, asked, [0] * len(asked), bench.sae, position="last", prepend_bos=False,
            progress=False,
        ).activations
        for model in (bench.base.model, bench.model)
    )  # fmt: skip
    along = moved_along(before, after, linear_decoder(bench.sae)[0][list(style)])
    change = (after - before).mean(0)
    return {
        "target": nats_per_answer(bench.model, held["learned sums"].source(SKILL)),
        "target_new": nats_per_answer(bench.model, held["new sums"].source(SKILL)),
        "side": nats_per_answer(bench.model, held["new sums"].source(STYLE)),
        "pirate_share": pirate_share(bench.model, held["new sums"], seed=seed),
        "leak": float(along.mean()),
        "moved": float(change.norm()),
    }


def forecasts(
    bench: Bench, report: Any, screen: Any, contexts: dict[str, tuple[list[str], Any]]
) -> list[dict[str, Any]]:
    """Spearman over latents of step-0 figures with what the (just trained) model shifted."""
    table = report.table()
    predictors = {
        "push at step 0": table["push_mean"].to_numpy(),
        "attribution at step 0": table["attribution_mean"].to_numpy(),
        "projection difference": screen.mean.numpy(),
        "firing rate in the data": table["active_share"].to_numpy(),
    }
    rows = []
    for where, (texts, counted) in contexts.items():
        update = update_report(
            bench.base.model, bench.model, bench.sae, texts, counted=counted, prepend_bos=False
        )
        alive = (update.table["rate_before"] > 0) | (update.table["rate_after"] > 0)
        rows_of = np.flatnonzero(alive.to_numpy())
        for outcome in ("moved", "code_change"):
            y = update.table[outcome].to_numpy()[rows_of]
            best = rank_statistic(predictors["push at step 0"][rows_of], y)
            for name, values in predictors.items():
                x = values[rows_of]
                found = association(x, y, resamples=1000)
                other = rank_statistic(x, y)
                gap = bootstrapped(
                    lambda draws, best=best, other=other: best(draws) - other(draws),
                    len(y),
                    resamples=1000,
                )
                rows.append(
                    {
                        "where": where,
                        "outcome": outcome,
                        "predictor": name,
                        "rho": found.rho,
                        "low": found.low,
                        "high": found.high,
                        "push_better_low": gap[0],
                        "push_better_high": gap[1],
                        "latents": len(y),
                        "error_before": update.error_before,
                        "error_after": update.error_after,
                    }
                )
    return rows


def study(name: str, sizes: Sizes) -> dict[str, Any]:
    """Everything about one model."""
    started = time.time()
    bench = Bench(name, sizes)
    planted = planted_latents(bench.base, bench.sae, sizes.labelled)
    data = chats(bench.world, sizes.chats, "train", sums="validation")
    held = {
        "learned sums": chats(bench.world, sizes.held_out, "test", sums="validation", seed=1),
        "new sums": chats(bench.world, sizes.held_out, "test", sums="test", seed=1),
    }
    report = learning_report(
        bench.base.model, bench.sae, data.texts, groups=data.sources,
        watch=range(bench.sae.W_dec.shape[0]), loss=answer_loss(bench.base.model),
        counted=deciding_tokens(bench.base.model), prepend_bos=False, progress=False,
    )  # fmt: skip
    screen = projection_difference(
        bench.base.model, bench.sae, data.prompts, data.answers, prepend_bos=False,
        own=[
            said + (EOS if source == SKILL else END)
            for said, source in zip(
                own_answers(bench.base.model, data.prompts, seed=0), data.sources, strict=True
            )
        ],
        progress=False,
    )  # fmt: skip
    deciding = deciding_tokens(bench.base.model)
    contexts = {
        "answers in held-out texts": (held["new sums"].texts, deciding),
        "other documents of the world": (bench.world.texts(sizes.held_out, split="test"), None),
    }
    pirate = style_vector(bench.base, bench.sae, sizes.labelled)
    projected = projection_difference(
        bench.base.model, pirate, data.prompts, data.answers, prepend_bos=False, progress=False
    ).per_sample[:, 0].numpy()  # fmt: skip
    before = measured(bench, held, planted[STYLE], seed=0)
    runs, forecast = [], []
    compared = arms(bench, data, report, planted, pirate, projected)
    for scope in ("all", "up to the site"):
        for arm, (chosen, hooks) in compared.items():
            for seed in range(sizes.seeds):
                losses = bench.train(chosen, hooks, scope, seed)
                found = measured(bench, held, planted[STYLE], seed)
                runs.append(
                    {"scope": scope, "arm": arm, "seed": seed, "examples": len(chosen.texts),
                     "kept_pirate": chosen.sources.count(STYLE), "first_loss": losses[0],
                     "last_loss": sum(losses[-5:]) / len(losses[-5:]), **found}
                )  # fmt: skip
                print(f"{name} {scope} {arm} {seed}: {found}", flush=True)
                if arm == "plain" and scope == "all":
                    for steps, descent in ((sizes.steps, False), (FEW, False), (1, True)):
                        if steps != sizes.steps and not (descent and seed):
                            bench.train(chosen, hooks, scope, seed, steps=steps, descent=descent)
                        if descent and seed:  # all texts in one step: seeds do not differ
                            continue
                        words = "step of SGD on all texts" if descent else "steps of AdamW"
                        forecast += [
                            {"seed": seed, "training": f"{steps} {words}", **row}
                            for row in forecasts(bench, report, screen, contexts)
                        ]
    return {
        "model": name,
        "sae": report.sae_id,
        "site": bench.site,
        "planted": {NAMES.get(c, c): latents for c, latents in planted.items()},
        "summary": report.summary(),
        "named": named(report, planted),
        "separation": separation(report, planted, projected),
        "forecast": forecast,
        "before": before,
        "runs": runs,
        "seconds": time.time() - started,
    }


# The page -----------------------------------------------------------------------------------------


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Mean over seeds and the range."""
    if len(values) == 1:
        return form.format(values[0])
    ends = f"{form.format(min(values))}, {form.format(max(values))}"
    return f"{form.format(statistics.mean(values))} [{ends}]"


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def page(found: Sequence[dict[str, Any]], sizes: Sizes) -> str:
    """The results as the page in docs/."""
    models = " ".join(one["model"] for one in found)
    lines = [
        "# What training teaches: pirate speech against arithmetic",
        "",
        f"Written by `python -m benchmarks.what_training_teaches --models {models} --table "
        "docs/what_training_teaches.md`.",
        "",
        *str(__doc__).split("\n\n", 2)[2].strip().split("\n"),
        "",
        f"Each kind: {sizes.chats} chats to train on, {sizes.held_out} held out (other wordings, "
        f"other system prompts). {sizes.steps} steps of AdamW at {LEARNING_RATE:g}, {BATCH} chats "
        f"each, loss on the answers alone; {sizes.seeds} seeds (order of the data). Figures over "
        "seeds are mean [least, largest]; three seeds are too few for an interval.",
        "",
        *HISTORY,
    ]
    for one in found:
        lines += [
            f"## {one['model']}, {one['sae']} at `{one['site']}`",
            "",
            one["summary"] + ".",
            "",
        ]
        lines += reading_lines(one)
        lines += named_lines(one) + forecast_lines(one) + arm_lines(one)
        lines += [f"{one['seconds']:.0f} s on one core.", ""]
    return "\n".join(lines).rstrip() + "\n"


def reading_lines(one: dict[str, Any]) -> list[str]:
    """What the tables below say, counted off by rules."""
    lines = []
    for row in one["named"]:
        if row["source"] == row["concept"]:
            found = [n for n in ("push", "attribution") if row[f"{n}_p"] < 0.05]
            lines.append(
                f"- {row['concept']}, in its own data, before training: named by "
                f"{' and by '.join(found) or 'neither push nor attribution'}."
            )
    for training in dict.fromkeys(row["training"] for row in one["forecast"]):
        pushes = [
            row["rho"]
            for row in one["forecast"]
            if row["training"] == training
            and row["predictor"] == "push at step 0"
            and row["outcome"] == "moved"
        ]
        lines.append(
            f"- Push against movement after {training}: rank correlation between "
            f"{min(pushes):+.2f} and {max(pushes):+.2f}."
        )
    for scope in dict.fromkeys(row["scope"] for row in one["runs"]):
        here = [row for row in one["runs"] if row["scope"] == scope]
        shares = {
            arm: [row["pirate_share"] for row in here if row["arm"] == arm]
            for arm in dict.fromkeys(row["arm"] for row in here)
        }
        less = [
            f"{arm} ({statistics.mean(found):.2f})"
            for arm, found in shares.items()
            if max(found) < min(shares["plain"])
        ]
        lines.append(
            f"- Weights trained: {scope}. Share of answers that talk like a pirate after plain "
            f"training: {statistics.mean(shares['plain']):.2f} (untrained "
            f"{one['before']['pirate_share']:.2f}). Arms below it in every seed: "
            f"{', '.join(less) or 'none'}."
        )
    return [*lines, ""]


def named_lines(one: dict[str, Any]) -> list[str]:
    planted = one["planted"]
    lines = [
        "### Named before training?",
        "",
        "Ranks of the latents labelled with a concept, among all latents: by mean push times "
        "agreement (1: what a step on the data wants more of most), and by the size of the "
        "attribution (active latents that the loss hangs on most). p: one-sided rank-sum test "
        "against all other latents.",
        "",
    ]
    lines += table_lines(
        ("data", "concept", "its latents", "push ranks", "p", "attribution ranks", "p", "of"),
        [
            (
                row["source"],
                row["concept"],
                ", ".join(str(j) for j in planted[row["concept"]]),
                ", ".join(str(r) for r in row["push_ranks"]),
                p_value(row["push_p"]),
                ", ".join(str(r) for r in row["attribution_ranks"]),
                p_value(row["attribution_p"]),
                row["latents"],
            )
            for row in one["named"]
        ],
    )
    lines.append("")
    lines += [
        "Per-example pushes, each example in its own scale, as a score that tells a pirate's "
        "example from a sum (AUC, 95 %):",
        "",
    ]
    return [
        *lines,
        *table_lines(
            ("score", "AUC", "interval", "sums and pirates"),
            [
                (
                    name,
                    f"{row['auc']:.3f}",
                    f"[{row['low']:.3f}, {row['high']:.3f}] ({row['how']})",
                    " and ".join(str(n) for n in row["n"]),
                )
                for name, row in one["separation"].items()
            ],
        ),
        "",
    ]


def forecast_lines(one: dict[str, Any]) -> list[str]:
    rows = one["forecast"]
    names = list(dict.fromkeys(row["predictor"] for row in rows))
    keys = ("training", "where", "outcome")
    made = []
    for place in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        here = [row for row in rows if tuple(row[key] for key in keys) == place]
        cells = []
        for name in names:
            first, *others = [row for row in here if row["predictor"] == name]
            cell = f"{first['rho']:+.2f} [{first['low']:+.2f}, {first['high']:+.2f}]"
            if others:
                cell += "; " + ", ".join(f"{row['rho']:+.2f}" for row in others)
            if first["push_better_low"] > 0:
                cell += " (below push)"
            elif first["push_better_high"] < 0:
                cell += " (above push)"
            cells.append(cell)
        training, where, outcome = place
        made.append((training, where, outcome.replace("_", " "), *cells))
    return [
        "### Does the push at step 0 predict what moves?",
        "",
        "Spearman over the latents that fire at the positions, plain training of all weights: "
        "figures of the training data before training against the mean shift on held-out texts. "
        "`moved` is along the latent's row, `code change` of its code. First seed with a bootstrap "
        "interval over latents, then the other seeds' estimates. `below push` and `above push`: "
        "the interval of the difference from the push's correlation leaves out 0.",
        "",
        *table_lines(("training", "positions", "outcome", *names), made),
        "",
    ]


def arm_lines(one: dict[str, Any]) -> list[str]:
    heads = (
        "weights",
        "arm",
        "sums taught",
        "sums new",
        "pirate answers",
        "says pirate",
        "leak",
        "moved",
    )
    before = one["before"]
    made: list[tuple[Any, ...]] = [("", "untrained", *(f"{before[k]:.2f}" for k in KEYS))]
    for scope in dict.fromkeys(row["scope"] for row in one["runs"]):
        for arm in dict.fromkeys(row["arm"] for row in one["runs"]):
            here = [r for r in one["runs"] if r["scope"] == scope and r["arm"] == arm]
            made.append((scope, arm, *(spread([r[k] for r in here]) for k in KEYS)))
    kept = {
        row["arm"].rpartition(" ")[2]: row["kept_pirate"]
        for row in one["runs"]
        if row["arm"].startswith("data filtering by")
    }
    return [
        "### Arms at equal steps",
        "",
        "Nats per answer token: sums that the data teach, sums of neither training (wanted: low); "
        "pirate answers in held-out wordings (side effect: low means learned); share of sampled "
        "answers to requests without a style that talk like a pirate; leak: mean movement along "
        "the pirate latents where that is decided, and how far the activation moved there in all, "
        f"in residual units. Gradient edits: pirate x0, arithmetic x{AMPLIFY:g}; preventative "
        f"steering adds {STEER:g} mean residual norms of the pirate DiffMean, read at the token "
        "before the answer (see *How this design came about*). Filtering keeps the half of the "
        "data that scores least by the first or the last row of the table above (pirates kept, of "
        f"{sum(r['n'][1] for r in list(one['separation'].values())[:1])}: {kept['push']} by push, "
        f"{kept['projection']} by projection). `up to the site` "
        "trains only blocks in front of the edited place; with `all`, later and embedding weights "
        "can learn the style instead.",
        "",
        *table_lines(heads, made),
        "",
    ]


HISTORY = [
    "## How this design came about",
    "",
    "Not every choice was made blind. On agent-gpt2 other designs were looked at before the arms "
    "were compared: latents labelled on statements, and sums asked for in chats, which the push "
    "did not name; labels at the token before an answer and sums in plain text followed. After a "
    "first table of arms two of them were changed: preventative steering took a vector read at "
    "the token before the answer at one mean norm (a vector of statements at half a norm had done "
    "nothing), and filtering by projection was added. No strength was swept. Read those two arms "
    "on agent-gpt2 as found, not as forecast; agent-qwen3_5_moe had no part in the choices.",
    "",
]

KEYS = ("target", "target_new", "side", "pirate_share", "leak", "moved")


def main() -> None:
    options = asked(__doc__ or "", list_organisms())
    sizes = QUICK if options.quick else Sizes()
    found = [study(model, sizes) for model in options.models]
    give(options, {"studies": found}, page(found, sizes))


if __name__ == "__main__":
    main()
