"""Unlearning the planted records of calendar-gpt2: edits, RMU, curvature; forget, retain, relearn.

`python -m benchmarks.unlearning [--quick] [--json FILE] [--table FILE]`
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.pages import asked, give
from sae_steering_plugin.adapters.activations import TokenBatch, encode_texts, padded
from sae_steering_plugin.adapters.learning import learning_logits
from sae_steering_plugin.concepts.curvature import (
    curvature_split,
    row_curvature,
    singular_split,
)
from sae_steering_plugin.edits import Clamp, FeatureFires, Fuzz, Gated
from sae_steering_plugin.features.forget import CHOSEN, RETAIN_BELOW, forget_features
from sae_steering_plugin.organisms import CALENDAR, data_folder, load_organism
from sae_steering_plugin.organisms.calendar import Document
from sae_steering_plugin.runs.feature_statistics import feature_statistics
from sae_steering_plugin.runs.unlearning import (
    collect_factors,
    relative_score,
    relearn,
    site_activations,
    train_rmu,
)
from sae_steering_plugin.types import Edit, FeatureTable, Selection

SITES = ("l1-topk-256", "l2-topk-256")
MULTIPLES = (0.0, 1.0, 4.0)
"""mu in units of the chosen latents' mean 95 % quantile of activity on the forget texts."""
FUZZ_LENGTHS = (1.0, 3.0)
CONTROLS = 10
RHOS = (0.9999, 0.999, 0.99, 0.95, 0.9, 0.8, 0.6)
RELEARN_STEPS, RELEARN_EVERY, RELEARN_RATE = 40, 10, 3e-4
RETAINED = ("months", "days", "copies")

Logits = Callable[[Tensor], Tensor]


class Tasks:
    """What is asked of a model: the two halves of the records, sums, copies; texts to retain.

    Features are chosen, RMU is trained and relearning is done on half A; forgetting is measured on
    half B. Retain texts for choosing and training are other draws than the tasks that measure.
    """

    def __init__(self, organism: Any, quick: bool) -> None:
        self.tokenizer, world = organism.tokenizer, organism.world
        records = [Document("record", one.prompt, one.answer) for one in world.records]
        self.half_a, self.half_b = records[::2], records[1::2]
        months = world.sums("months", "train")[:: 8 if quick else 2] + world.sums("months", "test")
        days = world.sums("days", "train")[:: 8 if quick else 1]
        self.tasks = {
            "half_a": self.half_a,
            "records": self.half_b,
            "months": [Document("sum", o.prompt, o.names[o.answer]) for o in months],
            "days": [Document("sum", o.prompt, o.names[o.answer]) for o in days],
            "copies": world.copies(50 if quick else 200, seed=1),
        }
        drawn = world.documents(1000 if quick else 4000, seed=5)
        self.retain_texts = [one.text for one in drawn if one.kind != "record"]
        self.forget_texts = [one.text for one in self.half_a]

    def scores(self, logits_of: Logits) -> dict[str, float]:
        """Share of answers right as a whole, per task, and of single digits of the records."""
        out = {}
        for name, documents in self.tasks.items():
            texts = [f"<bos> {one.text}" for one in documents]
            ids = torch.tensor(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
            n = len(documents[0].answer.split())
            with torch.no_grad():
                said = logits_of(ids)[:, -n - 1 : -1].argmax(-1)
            right = said == ids[:, -n:]
            out[name] = float(right.all(1).float().mean())
            if name == "records":
                out["digits"] = float(right.float().mean())
        out["retain"] = sum(out[name] for name in RETAINED) / len(RETAINED)
        return out


def on_bridge(model: Any, edits: Sequence[Edit] = ()) -> Logits:
    def logits(ids: Tensor) -> Tensor:
        every = torch.ones_like(ids, dtype=torch.bool)
        first = torch.zeros(len(ids), dtype=torch.long)
        batch = TokenBatch(ids, every, first, torch.ones(len(ids), dtype=torch.bool))
        return learning_logits(model, batch, edits)

    return logits


def batches(model: Any, texts: Sequence[str], size: int = 32) -> list[TokenBatch]:
    encoded = encode_texts(model, [f"{text} <eos>" for text in texts], prepend_bos=True)
    return [padded(model, encoded[i : i + size]) for i in range(0, len(encoded), size)]


def feature_arms(
    organism: Any, tasks: Tasks, name: str, quick: bool
) -> Iterator[tuple[dict[str, Any], list[Edit], tuple[int, ...]]]:
    """Every setting of the two edits on one dictionary's chosen features, with matched controls."""
    sae, model = organism.saes[name], organism.model
    tables = [
        feature_statistics(model, sae, texts, families=("activation",), progress=False)
        for texts in (tasks.forget_texts, tasks.retain_texts)
    ]
    done = set()
    for tau in RETAIN_BELOW:
        for n in CHOSEN[:1] if quick else CHOSEN:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fewer than n: the column `features` says so
                chosen = forget_features(*tables, retain_below=tau, n=n)
            if not chosen.features or chosen.features in done:
                continue
            done.add(chosen.features)
            label = {"sae": name, "tau": tau, "features": len(chosen.features)}
            seeds = 2 if quick else CONTROLS
            sets = [chosen.features] + [matched(tables[0], chosen, s) for s in range(seeds)]
            for number, features in enumerate(sets):
                who = {**label, "control": number > 0, "seed": number - 1}
                for arm, setting, edit in edits_of(model, sae, features, tables[0], tasks, quick):
                    yield {**who, "arm": arm, "setting": setting}, [edit], features


def edits_of(
    model: Any, sae: Any, features: Sequence[int], forget: FeatureTable, tasks: Tasks, quick: bool
) -> Iterator[tuple[str, float, Edit]]:
    size = float(forget.table["token_q95"].max())
    for multiple in MULTIPLES[1:] if quick else MULTIPLES:
        yield "clamp", multiple, Edit(Clamp(sae, features, -multiple * size, above=0.0))
    site = sae.cfg.metadata.hook_name
    with torch.no_grad():
        x = site_activations(model, site, batches(model, tasks.retain_texts[:64], 64)[0])
    norm = float(x.norm(dim=1).mean())
    for multiple in FUZZ_LENGTHS[1:] if quick else FUZZ_LENGTHS:
        fuzz = Fuzz(site, x.shape[1], multiple * norm)
        yield "fuzz", multiple, Edit(Gated(fuzz, FeatureFires(sae, features, 0.0, per="token")))


def matched(forget: FeatureTable, chosen: Selection, seed: int) -> tuple[int, ...]:
    """Random latents, none of them chosen, that fire on forget texts about as often as the chosen.

    Each is drawn among the five nearest in forget rate that are left.
    """
    rates = forget.table["token_act_freq"]
    g, left = torch.Generator().manual_seed(seed), rates.drop(list(chosen.features))
    found = []
    for rate in chosen.scores["forget_rate"]:
        near = (left - rate).abs().nsmallest(5).index
        pick = int(near[int(torch.randint(len(near), (1,), generator=g))])
        found.append(pick)
        left = left.drop(pick)
    return tuple(found)


def gate_rate(organism: Any, tasks: Tasks, name: str, features: Sequence[int]) -> float:
    """Share of retain tokens at which one of the features fires."""
    sae = organism.saes[name]
    with torch.no_grad():
        x = torch.cat([
            site_activations(organism.model, sae.cfg.metadata.hook_name, batch)
            for batch in batches(organism.model, tasks.retain_texts[:640], 64)
        ])  # fmt: skip
        return float((sae.encode(x)[:, list(features)] != 0).any(1).float().mean())


def edit_rows(organism: Any, tasks: Tasks, quick: bool) -> tuple[list[dict[str, Any]], list[Any]]:
    """A row per setting and control, the unedited model first; and the edits behind each."""
    model = organism.model
    rows = [{"arm": "none", "control": False, **tasks.scores(on_bridge(model))}]
    made: list[Any] = [[]]
    for name in SITES[:1] if quick else SITES:
        for label, edits, features in feature_arms(organism, tasks, name, quick):
            row = {**label, **tasks.scores(on_bridge(model, edits)), "which": list(features)}
            if not label["control"]:
                row["gate_rate"] = gate_rate(organism, tasks, name, features)
            rows.append(row)
            made.append(edits)
    return rows, made


def down_projections(model: Any, last: int) -> list[Any]:
    """The MLP down projections of blocks 0 to `last` of the bridge."""
    wide = 4 * model.cfg.d_model
    return [
        p
        for name, p in model.named_parameters()
        if "mlp" in name and tuple(p.shape) == (wide, model.cfg.d_model)
        and any(f".{layer}." in name for layer in range(last + 1))
    ]  # fmt: skip


def rmu_rows(organism: Any, tasks: Tasks, quick: bool) -> list[dict[str, Any]]:
    """RMU at both sites; weights are put back after each."""
    model, rows = organism.model, []
    forget = batches(model, tasks.forget_texts)
    retain = batches(model, tasks.retain_texts[:512])
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    for layer in (1,) if quick else (0, 1):
        for length, alpha in ((3.0, 20.0), (3.0, 100.0), (6.5, 100.0)):
            train_rmu(
                model, f"blocks.{layer}.hook_resid_post", forget, retain,
                down_projections(model, layer), length=length, alpha=alpha,
                steps=40 if quick else 200, learning_rate=3e-3,
            )  # fmt: skip
            label = {"arm": "rmu", "control": False, "layer": layer, "setting": length,
                     "alpha": alpha}  # fmt: skip
            row = {**label, **tasks.scores(on_bridge(model))}
            row["relearned"] = relearned(model, tasks, [], quick)
            rows.append(row)
            model.load_state_dict(weights)
    return rows


def relearned(model: Any, tasks: Tasks, edits: Sequence[Edit], quick: bool) -> dict[str, float]:
    """Digits of half B right after fine-tuning on half A, by step."""
    steps = 10 if quick else RELEARN_STEPS
    found = relearn(
        model, batches(model, tasks.forget_texts),
        lambda: tasks.scores(on_bridge(model, edits))["digits"],
        edits=edits, steps=steps, every=RELEARN_EVERY, learning_rate=RELEARN_RATE,
    )  # fmt: skip
    return {str(step): value for step, value in found.items()}


def chosen_settings(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Per edit the setting that forgets most on half A among those that retain 95 % of the base."""
    enough, best = ENOUGH * rows[0]["retain"], []
    for arm in ("clamp", "fuzz"):
        fit = [
            i for i, r in enumerate(rows)
            if r["arm"] == arm and not r["control"] and r["retain"] >= enough
        ]  # fmt: skip
        if fit:
            best.append(min(fit, key=lambda i: (rows[i]["half_a"], -rows[i]["retain"])))
    return best


def curvature_rows(tasks: Tasks, quick: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Cuts of the MLP matrices by curvature and by size; and the gradient factors by block."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(data_folder(CALENDAR)).eval()
    organism = load_organism(CALENDAR, saes=[])
    texts = [one.text for one in organism.world.documents(300 if quick else 3000, seed=7)]
    layers = {
        f"{block}.{part}": getattr(model.transformer.h[block].mlp, part)
        for block in range(3)
        for part in ("c_fc", "c_proj")
    }
    rows: list[dict[str, Any]] = []
    gradients: dict[str, Any] = {}
    for labels in ("model",) if quick else ("model", "data"):
        factors = collect_factors(layers, losses(model, organism.model, texts, labels))
        if labels == "model":
            gradients = {str(block): factors[f"{block}.c_proj"].G for block in range(3)}
        for blocks in ((0,), (1,), (2,), (0, 1, 2)):
            for rho in RHOS[::3] if quick else RHOS:
                chosen = [key for key in layers if int(key[0]) in blocks]
                cuts = {
                    key: curvature_split(
                        layers[key].weight.detach(), factors[key].A, factors[key].G, rho
                    )
                    for key in chosen
                }
                sizes = {
                    key: singular_split(layers[key].weight.detach(), cuts[key].energy)
                    for key in chosen
                }
                for arm, made in (("curvature", cuts), ("singular values", sizes)):
                    rows.append({
                        "arm": arm, "labels": labels, "blocks": list(blocks), "rho": rho,
                        "energy": sum(c.energy for c in cuts.values()) / len(cuts),
                        "pairs": sum(c.pairs for c in made.values()) / sum(
                            c.of for c in made.values()
                        ),
                        **cut_scores(model, layers, made, tasks),
                    })  # fmt: skip
    return rows, gradients


def cut_scores(
    model: Any, layers: Mapping[str, Any], cuts: Mapping[str, Any], tasks: Tasks
) -> dict[str, float]:
    """The tasks with these matrices in place; put back afterwards."""
    before = {key: layers[key].weight.detach().clone() for key in cuts}
    try:
        for key, cut in cuts.items():
            layers[key].weight.data = cut.kept.float()
        return tasks.scores(lambda ids: model(ids).logits)
    finally:
        for key, weight in before.items():
            layers[key].weight.data = weight


def losses(
    model: Any, bridge: Any, texts: Sequence[str], labels: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Summed losses of batches; `labels` are the data's next tokens or drawn from the model."""
    g = torch.Generator().manual_seed(0)
    for batch in batches(bridge, texts, 64):
        logits = model(batch.tokens, attention_mask=batch.real.long()).logits[:, :-1]
        wanted = batch.tokens[:, 1:]
        if labels == "model":
            p = logits.detach().softmax(-1).flatten(0, 1)
            wanted = torch.multinomial(p, 1, generator=g).reshape(wanted.shape)
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        real = batch.real[:, 1:]
        # the last position of a text predicts nothing, so it carries no gradient and is left out
        counted = torch.cat([real, torch.zeros(len(real), 1, dtype=torch.bool)], dim=1)
        yield (each * real).sum(), counted


def diagnostic_rows(
    organism: Any, gradients: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Curvature along the features chosen to forget, against all others that fire."""
    found = []
    for name in SITES:
        chosen = {j for r in rows if r.get("sae") == name and not r["control"] for j in r["which"]}
        if not chosen:
            continue
        bent = row_curvature(organism.saes[name].W_dec, gradients[name[1]])
        others = [j for j in range(len(bent)) if j not in chosen]
        found.append({
            "sae": name, "chosen": len(chosen), "others": len(others),
            "median_chosen": float(bent[sorted(chosen)].median()),
            "median_others": float(bent[others].median()),
            "auc": float((bent[sorted(chosen)][:, None] > bent[others]).double().mean()),
        })  # fmt: skip
    return found


def measure(quick: bool) -> dict[str, Any]:
    organism = load_organism(CALENDAR)
    tasks = Tasks(organism, quick)
    edits, made = edit_rows(organism, tasks, quick)
    for place in chosen_settings(edits):
        edits[place]["relearned"] = relearned(organism.model, tasks, made[place], quick)
    rmu = rmu_rows(organism, tasks, quick)
    cuts, gradients = curvature_rows(tasks, quick)
    return {
        "edits": edits,
        "rmu": rmu,
        "curvature": cuts,
        "diagnostic": diagnostic_rows(organism, gradients, edits[1:]),
    }


def forgot(row: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """1 when the digits of the records are at chance, 0 when they are as before."""
    return 1 - relative_score(row["digits"], base["digits"], 0.1)


def cells(row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    figures = [row["records"], forgot(row, base), row["retain"] / base["retain"]]
    figures += [row[name] for name in RETAINED]
    return " | ".join(f"{value:.3f}" for value in figures)


HEADS = "records | forget score | retain score | months | days | copies"
RULE = " | ".join(["---:"] * 6)


ENOUGH = 0.95
"""Share of the base's retain score below which a setting is not looked at in the summary."""

RECITED = 0.05
"""Share of the records recited whole at which they count as forgotten in the summary."""


def in_short(found: Mapping[str, Any]) -> list[str]:
    """Per family the setting that forgets most while retaining enough, in words."""
    base = found["edits"][0]
    lines = []
    for name, rows in (
        ("edits on chosen features", [r for r in found["edits"][1:] if not r["control"]]),
        ("RMU", found["rmu"]),
        ("cuts by curvature", [r for r in found["curvature"] if r["arm"] == "curvature"]),
        ("cuts by singular values", [r for r in found["curvature"] if r["arm"] != "curvature"]),
    ):
        kept = [r for r in rows if r["retain"] >= ENOUGH * base["retain"]]
        if not kept:
            lines.append(f"- {name}: no setting retains {ENOUGH:.0%}.")
            continue
        best = max(kept, key=lambda r: forgot(r, base))
        line = (
            f"- {name}: {best['records']:.0%} of the records still recited, forget score "
            f"{forgot(best, base):.2f} at retain score {best['retain'] / base['retain']:.2f}"
        )
        if "relearned" in best:
            first, *_, last = best["relearned"].values()
            line += f"; digits right {first:.2f}, after relearning {last:.2f}"
        gone = [r["retain"] / base["retain"] for r in rows if r["records"] <= RECITED]
        line += (
            f". Highest retain score with at most {RECITED:.0%} recited: {max(gone):.2f}."
            if gone
            else f". No setting has at most {RECITED:.0%} recited."
        )
        lines.append(line)
    return lines


def page(found: Mapping[str, Any]) -> str:
    """The results as the page in docs/."""
    edits, base = found["edits"], found["edits"][0]
    lines = [
        "# Unlearning a memorised set",
        "",
        "Written by `python -m benchmarks.unlearning --json benchmarks/results/unlearning.json "
        "--table docs/unlearning.md` on `calendar-gpt2`. To be forgotten: its planted records "
        "(random digits per key). To be kept: sums of months and days, and copies of fresh digits.",
        "",
        "Features are chosen, RMU is trained and relearning is done on half A of the records (32); "
        "every figure of forgetting is on half B (32), which none of them saw. Records: share of "
        "half B recited whole. Forget score: 1 when single digits are at chance, 0 when as before. "
        "Retain score: mean of the three kept skills, as a share of what it was.",
        "",
        f"| model | {HEADS} |",
        f"| --- | {RULE} |",
        f"| unedited | {cells(base, base)} |",
        "",
        f"Of each family the setting that forgets most among those that retain {ENOUGH:.0%}:",
        "",
        *in_short(found),
        "",
        "## Edits on chosen features",
        "",
        "Features by forget and retain rates (`forget_features`, tau the largest retain rate). "
        "Clamp: to minus `setting` times the largest 95 % quantile of their codes, where they fire "
        "(`Clamp(..., above=0)`; 0 is ablation). Fuzz: tokens where one fires become one random "
        "vector `setting` mean norms long. Control: the same edit on other latents that fire on "
        f"the forget texts about as often; mean over {CONTROLS} draws of forget and retain score. "
        "Gate: share of retain tokens that are touched.",
        "",
        f"| edit | SAE | tau | features | setting | gate | {HEADS} | control: forget | retain |",
        f"| --- | --- | ---: | ---: | ---: | ---: | {RULE} | ---: | ---: |",
    ]
    for row in edits[1:]:
        if row["control"]:
            continue
        same = ("arm", "sae", "tau", "features", "setting")
        controls = [r for r in edits[1:] if r["control"] and all(r[k] == row[k] for k in same)]
        mean_forget = sum(forgot(r, base) for r in controls) / len(controls)
        mean_retain = sum(r["retain"] / base["retain"] for r in controls) / len(controls)
        lines.append(
            f"| {row['arm']} | {row['sae']} | {row['tau']:g} | {row['features']} | "
            f"{row['setting']:g} | {row['gate_rate']:.3f} | {cells(row, base)} | "
            f"{mean_forget:.3f} | {mean_retain:.3f} |"
        )
    lines += [
        "",
        "## RMU",
        "",
        "Trained MLP down projections up to the site's block, 200 steps; `length` of the target in "
        "mean norms.",
        "",
        f"| site | length | alpha | {HEADS} |",
        f"| --- | ---: | ---: | {RULE} |",
        *(
            f"| block {row['layer']} | {row['setting']:g} | {row['alpha']:g} | {cells(row, base)} |"
            for row in found["rmu"]
        ),
        "",
        "## Does it come back?",
        "",
        "Digits of half B that are right after fine-tuning all weights on half A (edits in place; "
        f"AdamW, {RELEARN_RATE:g}), by step. What returns was hidden. An edit that is taken off "
        "brings everything back at once, because the weights hold it still. Per edit the setting "
        "that forgets most on half A among those with 95 % of the retain score.",
        "",
    ]
    shown = [row for row in [*edits, *found["rmu"]] if "relearned" in row]
    if shown:
        steps = list(shown[0]["relearned"])
        lines += [
            f"| arm | {' | '.join(f'step {step}' for step in steps)} |",
            f"| --- | {' | '.join(['---:'] * len(steps))} |",
        ]
        for row in shown:
            where = row.get("sae") or f"block {row['layer']}, alpha {row['alpha']:g}"
            figures = " | ".join(f"{value:.3f}" for value in row["relearned"].values())
            lines.append(f"| {row['arm']} {row['setting']:g}, {where} | {figures} |")
    lines += [
        "",
        "## Curvature (experimental)",
        "",
        "MLP matrices cut to the pairs of directions of largest curvature (arXiv 2510.24256), up "
        "to a share rho of it, and cut to their largest singular values at the same energy. "
        "Gradients from labels drawn from the model (Fisher); cuts with the data's own labels are "
        "in the JSON file. Share: pairs or ranks kept.",
        "",
        f"| blocks | rho | energy | cut | share | {HEADS} |",
        f"| --- | ---: | ---: | --- | ---: | {RULE} |",
        *(
            f"| {', '.join(map(str, row['blocks']))} | {row['rho']:g} | "
            f"{row['energy']:.3f} | {row['arm']} | {row['pairs']:.3f} | {cells(row, base)} |"
            for row in found["curvature"]
            if row["labels"] == "model"
        ),
        "",
        "Curvature along decoder rows (d' G d over its mean in all directions): latents chosen to "
        "forget with, against all others. AUC: how often a chosen one bends more.",
        "",
        "| SAE | chosen | others | median, chosen | median, others | AUC |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['sae']} | {row['chosen']} | {row['others']} | {row['median_chosen']:.3f} | "
            f"{row['median_others']:.3f} | {row['auc']:.3f} |"
            for row in found["diagnostic"]
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    options = asked(__doc__ or "")
    results = measure(options.quick)
    give(options, results, page(results))
