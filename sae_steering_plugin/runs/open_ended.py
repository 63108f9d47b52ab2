"""Open-ended questions under steering: free text, judged, with fluency and repetition beside it.

    found = evaluate_open_ended(
        model, read_open_ended("test_open_ended/sycophancy.json"),
        lambda strength: SparseAdd(sae, vector, strength),
        judges=[open_judge("lexicon:pirate")], strengths=(-1.0, 0.0, 1.0),
    )
    found.summary()

The judges are those of `runs.judges`: their names stand in every row, and a text that a judge could
not score is counted, not scored 0. Source: CAA, arXiv 2312.06681, section 4.2 and SAS, arXiv
2503.00177, which both ask a language model; a local judge is a stand-in and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from sae_steering_plugin.adapters.engine import encode_prompts, generate
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.runs.choice_items import ChoiceItem, refuse_built
from sae_steering_plugin.runs.choices import (
    Steering,
    Strength,
    check_strengths,
    described,
    left_padded,
    row_strengths,
)
from sae_steering_plugin.runs.contrast_files import (
    json_document,
    listed,
    text_field,
    whole_text,
)
from sae_steering_plugin.runs.judges.protocol import Item, Judge, judge_identity
from sae_steering_plugin.runs.noise import gumbel_noise, noise_key
from sae_steering_plugin.types import Contrast, Labelled

if TYPE_CHECKING:
    import pandas as pd

    from sae_steering_plugin.runs.contrast_files import Render

REPEATED = 3
"""Length of the word pieces whose repetition is counted."""


def read_open_ended(path: str | Path) -> tuple[ChoiceItem, ...]:
    """The questions of a CAA `test_open_ended` file: a JSON list of objects with `question`.

    Raises ValueError that names file and line for anything else.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise ValueError(f"{path}: open-ended questions are read from a .json list")
    text, _ = whole_text(path)
    records = listed(json_document(text, path), path)
    return tuple(open_item(text_field(record, "question")) for record in records)


def open_item(question: str, *, system: str = "", group: str = "") -> ChoiceItem:
    """A question that lists no options."""
    return ChoiceItem(question, "A", "B", stem=question, system=system, group=group)


def world_requests(
    world: Any, n: int, *, split: str = "test", seed: int = 0
) -> tuple[ChoiceItem, ...]:
    """Requests for a sentence about a topic, under neutral system prompts of an organism's world.

    Raises ValueError when the split has fewer than `n` system prompts with tasks.
    """
    from ..organisms.wording import STATEMENT_REQUESTS, TOPICS, part

    prompts = world.scenarios(n, split=split, seed=seed)
    asked = [
        (f"request-{number:02d}", words.format(topic=topic))
        for number, words in part(STATEMENT_REQUESTS, split)
        for topic in TOPICS
    ]
    return tuple(
        open_item(asked[i % len(asked)][1], system=one.system, group=asked[i % len(asked)][0])
        for i, one in enumerate(prompts)
    )


def open_prompt(item: ChoiceItem, render: Render | None) -> str:
    """The question as the model gets it: a chat turn, or the text as it stands."""
    if render is None:
        return "\n\n".join(part for part in (item.system, item.question) if part)
    messages = [{"role": "user", "content": item.question}]
    if item.system:
        messages.insert(0, {"role": "system", "content": item.system})
    return render(messages, ())


def evaluate_open_ended(
    model: Any,
    items: Sequence[ChoiceItem],
    steering: Steering | None = None,
    *,
    judges: Sequence[Judge],
    strengths: Sequence[Strength] = (-1.0, 0.0, 1.0),
    concept: str = "",
    render: Render | None = None,
    built_from: Sequence[ChoiceItem] | Contrast | Labelled = (),
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    prepend_bos: bool | None = None,
    progress: bool = False,
    name: str = "",
) -> OpenEnded:
    """Every question continued under every strength, and each text scored by every judge.

    Beside the scores: `nll`, the mean negative log-probability per new token under the *unsteered*
    model (nats; NaN without a token), and `repetition`, the share of three-token pieces that occur
    before in the same text (NaN under three tokens). Sampling noise depends on (seed, item) alone,
    so all strengths of an item share it. `batch_size` counts rows (items x strengths). Raises
    ValueError without judges or items, and for items that the vector was built from.
    """
    if not judges:
        raise ValueError('open-ended texts need a judge, for example open_judge("lexicon:pirate")')
    if len({judge.name for judge in judges}) < len(judges):
        raise ValueError("two judges have one name")
    refuse_built(items, built_from)
    doses: tuple[Strength, ...] = tuple(strengths) if steering is not None else (0.0,)
    rows = steered_texts(
        model,
        items,
        steering,
        strengths=doses,
        render=render,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        prepend_bos=prepend_bos,
        progress=progress,
        name=name,
    )
    judged = [
        {**row, **verdict}
        for judge in judges
        for row, verdict in zip(rows, verdicts(judge, rows, concept), strict=True)
    ]
    return OpenEnded(tuple(judged), doses, name, tuple(judge.name for judge in judges))


def steered_texts(
    model: Any,
    items: Sequence[ChoiceItem],
    steering: Steering | None,
    *,
    strengths: Sequence[Strength],
    render: Render | None = None,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    prepend_bos: bool | None = None,
    progress: bool = False,
    name: str = "",
    first: int = 0,
) -> list[dict[str, Any]]:
    """The texts of `evaluate_open_ended` before any judge, one row per item and strength.

    `first` is the number of the first item where a long list is cut into parts: number and noise
    are those of the whole list. Raises ValueError without items or for strengths given twice.
    """
    if not items:
        raise ValueError("there are no questions to ask")
    doses = tuple(strengths)
    check_strengths(doses)
    size = max(1, batch_size // len(doses))
    rows: list[dict[str, Any]] = []
    for start in tqdm(range(0, len(items), size), desc=f"open-ended {name}", disable=not progress):
        chosen = range(start, min(start + size, len(items)))
        prompts = [open_prompt(items[i], render) for i in chosen]
        repeated = [prompt for prompt in prompts for _ in doses]
        noise = None
        if temperature > 0:
            keys = [noise_key(seed, "open-ended", first + i) for i in chosen for _ in doses]
            noise = gumbel_noise(keys, model.cfg.d_vocab)
        out = generate(
            model,
            repeated,
            () if steering is None else steering(row_strengths(doses, len(prompts))),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            noise=noise,
            prepend_bos=prepend_bos,
        )
        tokens, mask = encode_prompts(model, repeated, prepend_bos=prepend_bos)
        known = [row[kept.bool()].tolist() for row, kept in zip(tokens, mask, strict=True)]
        fluent = unsteered_nll(model, known, [row.tolist() for row in out.new_tokens])
        for number, text in enumerate(out.texts):
            i, dose = chosen[number // len(doses)], doses[number % len(doses)]
            new = out.new_tokens[number].tolist()
            rows.append(
                {
                    **described(first + i, items[i], dose),
                    "question": items[i].question,
                    "text": text,
                    "new_tokens": len(new),
                    "ended": out.ended[number],
                    "nll": fluent[number],
                    "repetition": repeated_share(new),
                }
            )
    for row in rows:
        del row["matching_first"]
    return rows


def verdicts(judge: Judge, rows: Sequence[dict[str, Any]], concept: str) -> list[dict[str, Any]]:
    """Score (NaN for none), reason and the judge's identity per text."""
    items = [Item(row["text"], row["question"], concept) for row in rows]
    identity = judge_identity(judge)
    return [
        {
            "score": nan if one.score is None else float(one.score),
            "valid": one.score is not None,
            "reason": one.reason,
            **identity,
        }
        for one in judge.score(items)
    ]


def repeated_share(tokens: Sequence[int], n: int = REPEATED) -> float:
    """Share of the `n`-token pieces that stood before in the same text; NaN for a shorter text."""
    pieces = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else nan


def unsteered_nll(
    model: Any, prompts: Sequence[list[int]], new: Sequence[list[int]]
) -> list[float]:
    """Mean negative log-probability per new token without any edit; NaN for a row without one."""
    rows = [prompt + tokens for prompt, tokens in zip(prompts, new, strict=True)]
    tokens, mask = left_padded(model, rows, False)
    logits = steered_logits(model, tokens, attention_mask=mask)
    out = []
    for row, own in zip(logits, new, strict=True):
        if not own:
            out.append(nan)
            continue
        chance = row[-len(own) - 1 : -1].float().log_softmax(dim=-1)
        target = torch.tensor(own, device=chance.device)
        out.append(-float(chance.gather(-1, target[:, None]).double().mean()))
    return out


@dataclass(frozen=True, eq=False)
class OpenEnded:
    """The judged texts: one row per judge, item and strength."""

    rows: tuple[dict[str, Any], ...] = field(repr=False)
    strengths: tuple[Strength, ...]
    name: str
    judges: tuple[str, ...]

    def table(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    def arm(self, strength: Strength, judge: str = "") -> OpenArm:
        """One judge's rows of one strength, as `compare(..., item="item")` takes them.

        The judge may be left out when there is one. Raises ValueError that lists what there is.
        """
        chosen = judge or self.judges[0]
        if (not judge and len(self.judges) > 1) or chosen not in self.judges:
            raise ValueError(f"name one of the judges: {', '.join(self.judges)}")
        if strength not in self.strengths:
            raise ValueError(f"strength {strength} was not run; there are {list(self.strengths)}")
        parts = strength if isinstance(strength, tuple) else (strength,)
        names = [f"strength{'' if i == 0 else f'_{i + 1}'}" for i in range(len(parts))]
        kept = [
            row
            for row in self.rows
            if row["judge"] == chosen
            and all(row[name] == part for name, part in zip(names, parts, strict=True))
        ]
        return OpenArm(tuple(kept), self.name or "open-ended", parts[0], chosen)

    def summary(self) -> pd.DataFrame:
        """One row per judge and strength: mean score over the scored texts, how many were not, and
        the means of fluency, repetition and length."""
        import pandas as pd

        table = self.table()
        keys = ["judge", *(name for name in table.columns if name.startswith("strength"))]
        return pd.DataFrame(
            [
                {**dict(zip(keys, key, strict=True)), **summarised_texts(part)}
                for key, part in table.groupby(keys)
            ]
        )


def summarised_texts(table: pd.DataFrame) -> dict[str, Any]:
    """Means over the texts of one arm and judge."""
    return {
        "n": len(table),
        "unscored": int((~table["valid"]).sum()),
        "score": float(table["score"].mean()),
        "nll": float(table["nll"].mean()),
        "repetition": float(table["repetition"].mean()),
        "new_tokens": float(table["new_tokens"].mean()),
        "ended": float(table["ended"].mean()),
        "stand_in": bool(table["stand_in"].iloc[0]),
    }


@dataclass(frozen=True, eq=False)
class OpenArm:
    """One strength of an `OpenEnded` under one judge, in the form that `effects.compare` reads."""

    rows: tuple[dict[str, Any], ...] = field(repr=False)
    name: str
    strength: float
    judge: str

    def table(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    def details(self) -> dict[str, Any]:
        return {"method": self.name, "strength": self.strength, "judge": self.judge}
