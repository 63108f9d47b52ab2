"""Days and months of calendar-gpt2, steered along circle and chord; groups of latents.

`python -m benchmarks.curved_concepts [--quick] [--json FILE] [--table FILE]`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.pages import asked, give
from sae_steering_plugin.edits import Add, ConceptPath, FollowPath, concept_path
from sae_steering_plugin.effects.intervals import mean_interval
from sae_steering_plugin.effects.manifold import (
    hellinger_distances,
    off_manifold_ratio,
)
from sae_steering_plugin.features.multidimensional import (
    neighbour_groups,
    spectral_groups,
)
from sae_steering_plugin.organisms import CALENDAR, load_organism
from sae_steering_plugin.runs.curved import (
    final_activations,
    group_shapes,
    said_along,
)

SITES = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
PER_STEP = 4
"""Waypoints per step from one name to the next; every fourth stands at a name."""
RANDOM_SEEDS = 10
GROUPS, LABELLED = 24, 10


class Circle:
    """One circle of the world at one site: its path, natural activations and natural behaviour.

    Classes are answers. Even sums (in the world's order) fit the path and are the natural
    activations, odd ones are steered and set the unit of the off-manifold ratio.
    """

    def __init__(self, organism: Any, unit: str, site: str, prompts: int) -> None:
        self.model, self.site, self.unit = organism.model, site, unit
        sums = organism.world.sums(unit, "train")
        fit, self.held = sums[::2], sums[1::2]
        self.names = fit[0].names
        self.words = organism.tokenizer.convert_tokens_to_ids(list(self.names))
        self.natural = self.activations(fit)
        self.held_activations = self.activations(self.held)
        labels = torch.tensor([one.answer for one in fit])
        self.path = concept_path(self.natural, labels, hook_name=site)
        self.ordered = concept_path(
            self.natural, labels, order=range(len(self.names)), hook_name=site
        )
        self.prompts = prompts
        self.behaviour = self.behaviour_curve(organism)

    def activations(self, sums: Sequence[Any]) -> Tensor:
        return final_activations(self.model, self.site, [one.prompt for one in sums])

    def behaviour_curve(self, organism: Any) -> Tensor:
        """Square roots of what unsteered prompts say, joined by a spline in the world's order."""
        labels = torch.tensor([one.answer for one in self.held])
        still = Add(torch.zeros(organism.model.cfg.d_model))
        said = said_along(self.model, [one.prompt for one in self.held], still, self.words,
                          hook_name=self.site)[:, 0]  # fmt: skip
        curve = concept_path(said.sqrt(), labels, order=range(len(self.names)))
        fine = curve.at(torch.linspace(0, 2 * np.pi, 50 * len(self.names)))
        roots = (fine @ curve.basis + curve.mean).clamp_min(0)
        p = roots.square()
        return p / p.sum(1, keepdim=True).clamp_min(1)

    def is_circular(self) -> bool:
        """Whether the angles put the names in the world's order, either way round."""
        n, start = len(self.names), self.path.order.index(0)
        turned = [self.path.order[(start + i) % n] for i in range(n)]
        return turned in ([*range(n)], [0, *range(n - 1, 0, -1)])

    def way(self, start: int, stop: int) -> list[int]:
        """The names from one to the other, the shorter way round."""
        n = len(self.names)
        steps = (stop - start) % n
        sign, count = (1, steps) if steps <= n - steps else (-1, n - steps)
        return [(start + sign * i) % n for i in range(count + 1)]

    def arms(self, start: int, stop: int, seeds: int) -> dict[str, list[Any]]:
        """The changes of one pair by arm; each has a row per waypoint."""
        way = self.way(start, stop)
        n = PER_STEP * (len(way) - 1) + 1
        share = torch.linspace(0, 1, n, dtype=torch.float64)
        chord = self.path.chord(start, stop)
        straight = ((chord.points[1] - chord.points[0]) @ self.path.basis).float()
        found: dict[str, list[Any]] = {
            "path": [FollowPath(self.path, along(self.path, way))],
            "path, shift": [FollowPath(self.path, along(self.path, way), "shift")],
            "path, order given": [FollowPath(self.ordered, along(self.ordered, way))],
            "chord": [FollowPath(chord, share)],
            "add difference": [Add(straight, share.float())],
            "random": [],
        }
        for seed in range(seeds):
            g = torch.Generator().manual_seed(seed)
            drawn = torch.randn(len(straight), generator=g)
            found["random"].append(Add(drawn / drawn.norm() * straight.norm(), share.float()))
        return found

    def measured(self, start: int, stop: int, seeds: int) -> dict[str, dict[str, float]]:
        """Per arm the figures of one ordered pair, means over its prompts (and seeds)."""
        asked = [one for one in self.held if one.answer == start][: self.prompts]
        h = self.activations(asked)
        way = self.way(start, stop)
        at_names = list(range(0, PER_STEP * (len(way) - 1) + 1, PER_STEP))
        between = at_names[1:-1]
        out: dict[str, dict[str, float]] = {}
        for arm, changes in self.arms(start, stop, seeds).items():
            rows = []
            for number, change in enumerate(changes):
                # each of several random vectors is tried on one prompt, in turn
                some = slice(None) if len(changes) == 1 else slice(number % len(h), None, len(h))
                said = said_along(self.model, [one.prompt for one in asked[some]], change,
                                  self.words, hook_name=self.site)  # fmt: skip
                made = change.prepare(dtype=torch.float32, device="cpu")
                steps = change.batch_rows
                moved = torch.stack([
                    x + made(x.expand(steps, 1, -1)).expand(steps, 1, -1)[:, 0]
                    for x in h[some]
                ])  # fmt: skip
                ratio = off_manifold_ratio(moved.flatten(0, 1), self.natural, self.held_activations)
                inside = off_manifold_ratio(*(
                    self.path.coordinates(x.double())
                    for x in (moved.flatten(0, 1), self.natural, self.held_activations)
                ))  # fmt: skip
                far = hellinger_distances(said.flatten(0, 1), self.behaviour)
                inner = said[:, between, :]
                right = inner[:, range(len(between)), way[1:-1]] if between else inner[..., 0]
                off = 1 - said[:, :, way].sum(-1)
                rows.append({
                    "p_goal": float(said[:, -1, stop].mean()),
                    "p_between": float(right.mean()) if between else float("nan"),
                    "off_way": float(off.mean()),
                    "energy": float(far.mean()),
                    "off_manifold": float(ratio.mean()),
                    "off_in_plane": float(inside.mean()),
                })  # fmt: skip
            out[arm] = {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
        return out


def along(path: ConceptPath, way: Sequence[int]) -> Tensor:
    """Waypoints from name to name along a way."""
    parts = [path.waypoints(a, b, PER_STEP + 1) for a, b in zip(way, way[1:], strict=False)]
    return torch.cat([parts[0], *(part[1:] for part in parts[1:])])


FIGURES = ("p_goal", "p_between", "off_way", "energy", "off_manifold", "off_in_plane")


def steering_rows(organism: Any, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for site in SITES[:1] if quick else SITES:
        for unit in ("days",) if quick else ("days", "months"):
            circle = Circle(organism, unit, site, prompts=2 if quick else 3)
            pairs = list(combinations(range(len(circle.names)), 2))
            pairs = pairs[:: 7 if quick else 1]
            found = [
                (len(circle.way(a, b)) - 1, circle.measured(a, b, 2 if quick else RANDOM_SEEDS))
                for a, b in pairs
            ]
            far = max(steps for steps, _ in found)
            for name, kept in (
                ("adjacent", [one for steps, one in found if steps == 1]),
                ("between", [one for steps, one in found if 1 < steps < far]),
                ("opposite", [one for steps, one in found if steps == far > 1]),
            ):
                if kept:
                    common = {"site": site, "unit": unit, "pairs": name, "n": len(kept),
                              "circular": circle.is_circular()}  # fmt: skip
                    rows += [{**common, **row} for row in summary(kept)]
    return rows


def summary(kept: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """A row per arm: means over pairs, and the interval of the difference from the path."""
    rows = []
    for arm in kept[0]:
        row: dict[str, Any] = {"arm": arm}
        for figure in FIGURES:
            values = np.array([one[arm][figure] for one in kept])
            row[figure] = float(values.mean())
            less = values - np.array([one["path"][figure] for one in kept])
            if arm != "path" and np.isfinite(less).all():
                interval = mean_interval(less.tolist())
                row[f"{figure}_less_path"] = [float(less.mean()), interval.low, interval.high]
        rows.append(row)
    return rows


def group_rows(organism: Any, quick: bool) -> list[dict[str, Any]]:
    """The best groups of each dictionary and variant, random groups of the same sizes beside."""
    texts = [one.text for one in organism.world.documents(300 if quick else 3000, seed=3)]
    rows = []
    for name, sae in organism.saes.items():
        W = sae.W_dec
        variants = {
            "neighbours": neighbour_groups(W),
            "spectral": spectral_groups(W, GROUPS),
        }
        for unit in ("days", "months"):
            variants[f"labelled {unit}"] = [labelled_group(organism, sae, unit)]
        g = torch.Generator().manual_seed(0)
        variants["random"] = [
            tuple(torch.randperm(len(W), generator=g)[: len(group)].tolist())
            for group in variants["spectral"]
        ]
        for variant, groups in variants.items():
            if not groups:
                rows.append({"sae": name, "variant": variant, "groups": 0})
                continue
            shapes = group_shapes(organism.model, sae, texts, groups)
            scored = [one for one in shapes if one.score == one.score]
            for rank, one in enumerate(scored[:3]):
                rows.append({
                    "sae": name, "variant": variant, "groups": len(groups), "scored": len(scored),
                    "rank": rank + 1, "latents": len(one.latents), "points": one.points,
                    "separability": one.separability, "mixture": one.mixture, "score": one.score,
                    "reads": kinds_read(organism, sae, one.latents, texts[:300]),
                })  # fmt: skip
    return rows


def labelled_group(organism: Any, sae: Any, unit: str) -> tuple[int, ...]:
    """The latents that the world's own labels name: most active at the last token of a circle's
    sums, against the sums of the other circle."""
    means = {}
    for one in ("days", "months"):
        prompts = [item.prompt for item in organism.world.sums(one, "train")]
        x = final_activations(organism.model, sae.cfg.metadata.hook_name, prompts)
        with torch.no_grad():
            means[one] = sae.encode(x).mean(0)
    other = "months" if unit == "days" else "days"
    best = (means[unit] - means[other]).topk(LABELLED).indices
    return tuple(sorted(best.tolist()))


def kinds_read(organism: Any, sae: Any, latents: Sequence[int], texts: Sequence[str]) -> str:
    """The two words of the world at which the group acts most, with their share of its mass."""
    from sae_steering_plugin.adapters.activations import activations_at, encode_texts, padded

    tokens: dict[str, float] = {}
    encoded = encode_texts(organism.model, texts, prepend_bos=True)
    batch = padded(organism.model, encoded)
    x = activations_at(organism.model, sae.cfg.metadata.hook_name, batch)
    with torch.no_grad():
        mass = sae.encode(x)[..., list(latents)].sum(-1) * batch.counted
    classes = {**dict.fromkeys(organism.world.vocabulary, "other word"), "is": "is", ":": ":"}
    from sae_steering_plugin.organisms import calendar as world

    for words, kind in (
        (world.DAYS, "day"), (world.MONTHS, "month"), (world.NUMBERS, "number"),
        (world.DIGITS, "digit"), (world.LETTERS, "letter"),
    ):  # fmt: skip
        classes |= dict.fromkeys(words, kind)
    for row, ids in enumerate(batch.tokens.tolist()):
        words = organism.tokenizer.convert_ids_to_tokens(ids)
        for place, word in enumerate(words):
            kind = classes[word]
            tokens[kind] = tokens.get(kind, 0.0) + float(mass[row, place])
    whole = sum(tokens.values()) or 1.0
    best = sorted(tokens.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{kind} {value / whole:.0%}" for kind, value in best)


def shown(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"


def in_short(found: Mapping[str, Any]) -> list[str]:
    """Opposite pairs, path against chord, and the best groups of each variant, in a line each."""
    lines = []
    opposite = [row for row in found["steering"] if row["pairs"] == "opposite"]
    for site, unit in dict.fromkeys((row["site"], row["unit"]) for row in opposite):
        arms = {r["arm"]: r for r in opposite if (r["site"], r["unit"]) == (site, unit)}
        told = "; ".join(
            f"{arm}: names between {arms[arm]['p_between']:.2f}, off the way "
            f"{arms[arm]['off_way']:.2f}, off manifold {arms[arm]['off_manifold']:.2f}"
            for arm in ("path", "path, order given", "chord")
        )
        lines.append(f"- {unit}, `{site}`, opposite names. {told}.")
    for name in dict.fromkeys(row["sae"] for row in found["groups"]):
        first = [r for r in found["groups"] if r["sae"] == name and r.get("rank") == 1]
        best = {r["variant"]: r["score"] for r in first}
        told = ", ".join(f"{variant} {score:.2f}" for variant, score in best.items())
        lines.append(f"- {name}, score of the best group: {told}.")
    return lines


def page(found: Mapping[str, Any]) -> str:
    """The results as the page in docs/."""
    lines = [
        "# Steering along a circle, and finding circles",
        "",
        "Written by `python -m benchmarks.curved_concepts --json "
        "benchmarks/results/curved_concepts.json --table docs/curved_concepts.md` on "
        "`calendar-gpt2` (sums such as `three days after friday is monday`; the circles are the "
        "world's own).",
        "",
        "In short (what the words mean stands below):",
        "",
        *in_short(found),
        "",
        "## Path against chord",
        "",
        "The last token of a sum whose answer is the first name is moved to the second name in "
        f"{PER_STEP} waypoints per step, the shorter way round. Path and chord run through means "
        "of the other half of the sums, in the subspace of those means; `add difference` adds t "
        f"times the difference of the two means; `random` adds {RANDOM_SEEDS} random vectors of "
        "that length, each on one prompt. p goal: probability of the second name at the end. "
        "p between: probability of each name on the way when the way is there. Off way: "
        "probability of anything not on the way, over all waypoints. Energy: mean Hellinger "
        "distance of what is said to the "
        "closed curve through what unsteered sums say (a definition of this project; the paper's "
        "may differ in scale). Off manifold: distance to the nearest natural activation, 1 is that "
        "of unsteered held-out ones, in the whole space and in the space of the class "
        "means. `order given`: knots evenly spaced in the world's order instead of by the angles. "
        "Brackets: difference from the path, 95 % bootstrap over "
        "unordered pairs of names.",
        "",
    ]
    heads = ("p goal", "p between", "off way", "energy", "off manifold", "in the means' space")
    for key in dict.fromkeys((r["site"], r["unit"]) for r in found["steering"]):
        rows = [r for r in found["steering"] if (r["site"], r["unit"]) == key]
        order = "in the world's order" if rows[0]["circular"] else "NOT in the world's order"
        lines += [
            f"### {key[1].capitalize()} at `{key[0]}` (angles put the names {order})", "",
            "| pairs | arm | " + " | ".join(heads) + " |",
            "| --- | --- | " + " | ".join(["---"] * len(heads)) + " |",
        ]  # fmt: skip
        for row in rows:
            cells = []
            for figure in FIGURES:
                cell = shown(row[figure])
                if f"{figure}_less_path" in row:
                    _, low, high = row[f"{figure}_less_path"]
                    cell += f" [{low:+.3f}, {high:+.3f}]"
                cells.append(cell)
            lines.append(f"| {row['pairs']} ({row['n']}) | {row['arm']} | {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "## Groups of latents",
        "",
        "Groups of decoder rows by variant 1 (nearest rows above cosine 0.5, connected) and "
        f"variant 2 (spectral, {GROUPS} clusters), and random groups of the sizes of variant 2; "
        "the three best of each by (1 - mixture) separability. `labelled`: not found but named by "
        f"the world's labels, the {LABELLED} latents most active at the end of one circle's sums "
        "against the other's. Reads: where in the world's texts a group's "
        "activation mass lies.",
        "",
        "| SAE | variant | groups (scored) | rank | latents | tokens | separability | mixture | "
        "score | reads |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in found["groups"]:
        if not row["groups"]:
            lines.append(f"| {row['sae']} | {row['variant']} | 0 | - | - | - | - | - | - | - |")
            continue
        lines.append(
            f"| {row['sae']} | {row['variant']} | {row['groups']} ({row['scored']}) | "
            f"{row['rank']} | {row['latents']} | {row['points']} | "
            f"{shown(row['separability'])} | {shown(row['mixture'])} | {shown(row['score'])} | "
            f"{row['reads']} |"
        )
    return "\n".join(lines) + "\n"


def measure(quick: bool) -> dict[str, Any]:
    organism = load_organism(CALENDAR)
    return {"steering": steering_rows(organism, quick), "groups": group_rows(organism, quick)}


if __name__ == "__main__":
    options = asked(__doc__ or "")
    results = measure(options.quick)
    give(options, results, page(results))
