"""Records of agent rollouts: transcripts, their proxy metrics, a table, and files of both.

A message is a dict in the form chat templates take: `role`, `content`, and for an assistant turn
with calls `tool_calls`, for a tool's answer `name`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .scenarios import json_lines

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Rollout:
    """One scenario run once in one arm.

    `turns` counts assistant messages, `calls` lists the names called in order. `valid`: every turn
    was well formed (see `ParsedTurn`) and ended by itself, and nothing raised. `cut`: some turn
    reached the token limit. `problem` is the first malformed turn's, `error` the exception that
    ended the rollout early; both are empty otherwise. `n_tokens` counts generated tokens.
    """

    scenario: str
    arm: str
    messages: tuple[Message, ...]
    turns: int
    calls: tuple[str, ...]
    domain: str = ""
    valid: bool = True
    cut: bool = False
    n_tokens: int = 0
    problem: str = ""
    error: str = ""

    @classmethod
    def from_messages(
        cls, messages: Sequence[Message], *, scenario: str = "", arm: str = "", **details: Any
    ) -> Rollout:
        """Count turns and calls of a transcript whose calls are structured.

        Calls stand in an assistant message under `tool_calls` (`{"function": {"name": ...}}`) or
        `tools` (`{"name": ...}`, the released transcripts). `valid` is True unless `details` say
        otherwise: a structured transcript no longer shows how its calls were written.
        """
        spoken = [message for message in messages if message.get("role") == "assistant"]
        calls = tuple(name for message in spoken for name in call_names(message))
        return cls(scenario, arm, tuple(messages), len(spoken), calls, **details)


def call_names(message: Message) -> Iterator[str]:
    """The names of the calls in one assistant message."""
    for call in message.get("tool_calls") or message.get("tools") or ():
        yield str(call["function"]["name"] if "function" in call else call["name"])


# The five proxies of arXiv 2603.16335 (code) ----------------------------------------------------


def autonomy(rollout: Rollout) -> float:
    """1 when the user was never asked, else 0. A rollout that answers at once counts as 1."""
    return float("ask_user" not in rollout.calls)


def tool_use(rollout: Rollout) -> float:
    """Number of calls other than `ask_user` ("proactive calls")."""
    return float(sum(name != "ask_user" for name in rollout.calls))


def persistence(rollout: Rollout) -> float:
    """Number of turns."""
    return float(rollout.turns)


def risk(rollout: Rollout) -> float:
    """Share of calls that run code or write files; 0 without calls."""
    risky = sum(name in ("code_execute", "file_write") for name in rollout.calls)
    return risky / len(rollout.calls) if rollout.calls else 0.0


def deference(rollout: Rollout) -> float:
    """1 when the user was asked at least once: always 1 - `autonomy`, so never count both."""
    return 1.0 - autonomy(rollout)


PROXIES: dict[str, Callable[[Rollout], float]] = {
    "autonomy": autonomy,
    "tool_use": tool_use,
    "persistence": persistence,
    "risk": risk,
    "deference": deference,
}


# Many rollouts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollouts:
    """Rollouts of one or several arms. `arms` describes each arm, `settings` the run."""

    rollouts: tuple[Rollout, ...]
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rollouts)

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self.rollouts)

    @property
    def names(self) -> tuple[str, ...]:
        """The arms, in order of appearance."""
        return tuple(dict.fromkeys([*self.arms, *(one.arm for one in self.rollouts)]))

    def arm(self, name: str) -> Rollouts:
        """One arm alone. Raises KeyError that lists the arms."""
        if name not in self.names:
            raise KeyError(f"no arm {name!r}; the run has {', '.join(self.names)}")
        mine = tuple(one for one in self.rollouts if one.arm == name)
        kept = {name: self.arms[name]} if name in self.arms else {}
        return replace(self, rollouts=mine, arms=kept)

    def details(self) -> dict[str, Any]:
        """What an `Effect` says of this arm. Raises ValueError when there are several arms."""
        if len(self.names) != 1:
            raise ValueError(
                f"{len(self.names)} arms are here ({', '.join(self.names)}): "
                "pick one with .arm(name)"
            )
        return {"method": self.names[0], **self.arms.get(self.names[0], {})}

    def table(self) -> pd.DataFrame:
        """One row per rollout: arm, scenario, domain, the proxies, counts, validity, errors.

        `asks` counts `ask_user` calls, `n_calls` all calls. A rollout that an exception ended
        before its first turn has no behaviour: its proxies are NaN, and a comparison counts it as
        missing.
        """
        import pandas as pd

        rows = [
            {
                "arm": one.arm,
                "scenario": one.scenario,
                "domain": one.domain,
                **{name: proxy(one) if one.turns else math.nan for name, proxy in PROXIES.items()},
                "turns": one.turns,
                "n_calls": len(one.calls),
                "asks": sum(name == "ask_user" for name in one.calls),
                "valid": one.valid,
                "cut": one.cut,
                "n_tokens": one.n_tokens,
                "problem": one.problem,
                "error": one.error,
            }
            for one in self.rollouts
        ]
        return pd.DataFrame(rows, columns=list(rows[0]) if rows else ["arm", "scenario"])

    def summary(self) -> pd.DataFrame:
        """One row per arm: number of rollouts, mean of each proxy, valid rate, mean turns."""
        numeric = [*PROXIES, "turns", "n_calls", "asks", "valid", "cut", "n_tokens"]
        grouped = self.table().groupby("arm", sort=False)
        means = grouped[numeric].mean()
        means.insert(0, "n", grouped.size())
        return means

    def __add__(self, other: Rollouts) -> Rollouts:
        return Rollouts(
            self.rollouts + other.rollouts, {**self.arms, **other.arms}, dict(self.settings)
        )

    def save(self, path: str | Path) -> None:
        """Write to `.jsonl` (a header line, then one rollout per line) or `.parquet`.

        The parquet table has the columns of `table()` and the transcripts as JSON text in
        `messages` and `calls`; arms and settings ride in the file's metadata.
        """
        path = Path(path)
        writer = writers.get(path.suffix)
        if writer is None:
            raise ValueError(f"{path}: write rollouts as {' or '.join(writers)}")
        writer(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Rollouts:
        """Read what `save` wrote. ValueError names file and line when it is not that."""
        path = Path(path)
        reader = readers.get(path.suffix)
        if reader is None:
            raise ValueError(f"{path}: rollouts are read from {' or '.join(readers)}")
        return reader(path)


FORMAT = "sae_steering_plugin rollouts 1"
METADATA = b"sae_steering_plugin"


def save_jsonl(rollouts: Rollouts, path: Path) -> None:
    header = {"format": FORMAT, "arms": rollouts.arms, "settings": rollouts.settings}
    lines = [header, *map(asdict, rollouts)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def load_jsonl(path: Path) -> Rollouts:
    lines = iter(json_lines(path))
    _, header = next(lines, (0, {}))
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}:1: this is no file of rollouts ({FORMAT!r} is missing)")
    loaded = tuple(rollout_from(record, f"{path}:{line}") for line, record in lines)
    return Rollouts(loaded, header["arms"], header["settings"])


def rollout_from(record: Mapping[str, Any], place: str) -> Rollout:
    try:
        values = {**record, "messages": tuple(record["messages"]), "calls": tuple(record["calls"])}
        return Rollout(**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{place}: not a rollout: {error}") from error


def arrow_table(rollouts: Rollouts) -> pa.Table:
    """The columns of `table()`, and the transcripts as JSON text in `messages` and `calls`."""
    import pyarrow as pa

    table = rollouts.table()
    table["messages"] = [json.dumps(one.messages, ensure_ascii=False) for one in rollouts]
    table["calls"] = [json.dumps(one.calls) for one in rollouts]
    return pa.Table.from_pandas(table, preserve_index=False)


def rollouts_from(arrow: pa.Table, place: str) -> tuple[Rollout, ...]:
    """The rollouts in a table of `arrow_table`. ValueError names `place` and the row at fault."""
    fields = [name for name in Rollout.__dataclass_fields__ if name in arrow.column_names]
    return tuple(
        rollout_from(
            {
                **{name: row[name] for name in fields},
                "messages": json.loads(row["messages"]),
                "calls": json.loads(row["calls"]),
            },
            f"{place}: row {number}",
        )
        for number, row in enumerate(arrow.to_pylist())
    )


def save_parquet(rollouts: Rollouts, path: Path) -> None:
    import pyarrow.parquet as pq

    arrow = arrow_table(rollouts)
    header = {"format": FORMAT, "arms": rollouts.arms, "settings": rollouts.settings}
    kept = {**(arrow.schema.metadata or {}), METADATA: json.dumps(header).encode()}
    pq.write_table(arrow.replace_schema_metadata(kept), path)


def load_parquet(path: Path) -> Rollouts:
    import pyarrow.parquet as pq

    arrow = pq.read_table(path)
    header = json.loads((arrow.schema.metadata or {}).get(METADATA, b"{}"))
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: this is no file of rollouts ({FORMAT!r} is missing)")
    return Rollouts(rollouts_from(arrow, str(path)), header["arms"], header["settings"])


writers: dict[str, Callable[[Rollouts, Path], None]] = {
    ".jsonl": save_jsonl,
    ".parquet": save_parquet,
}
readers: dict[str, Callable[[Path], Rollouts]] = {".jsonl": load_jsonl, ".parquet": load_parquet}


def read_released(path: str | Path) -> Rollouts:
    """Rollouts released with arXiv 2603.16335 (one trait's JSON); arms are named by multiplier.

    Shape: `{"categories": {domain: {scenario: {"0.0": {"turns", "msgs"}, ..., "desc"}}}}`.
    Arm "0.0" is the unsteered one. Raises ValueError when the file has another shape.
    """
    released = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(released, dict) or "categories" not in released:
        raise ValueError(f"{path}: field 'categories' is missing: not a released rollout file")
    loaded = [
        Rollout.from_messages(run["msgs"], scenario=scenario, arm=multiplier, domain=domain)
        for domain, scenarios in released["categories"].items()
        for scenario, runs in scenarios.items()
        for multiplier, run in runs.items()
        if multiplier != "desc"
    ]
    settings = {key: released[key] for key in ("sae", "layer", "r2") if key in released}
    return Rollouts(in_order_of_arms(loaded), {}, settings)


def in_order_of_arms(rollouts: Iterable[Rollout]) -> tuple[Rollout, ...]:
    """The rollouts sorted by arm in order of first appearance, keeping the order inside an arm."""
    listed = list(rollouts)
    place = {name: at for at, name in enumerate(dict.fromkeys(one.arm for one in listed))}
    return tuple(sorted(listed, key=lambda one: place[one.arm]))


EXAMPLES = 4


def transcript_pairs(
    base: Rollouts, arm: Rollouts, outcome: str
) -> tuple[tuple[str, str, str], ...]:
    """The first three scenarios whose outcome changed, then the first whose outcome did not."""
    before, after = base.table().set_index("scenario"), arm.table().set_index("scenario")
    changed = [s for s in before.index if before.loc[s, outcome] != after.loc[s, outcome]]
    same = [s for s in before.index if s not in set(changed)]
    texts = [{one.scenario: transcript(one.messages) for one in side} for side in (base, arm)]
    return tuple((s, texts[0][s], texts[1][s]) for s in [*changed[: EXAMPLES - 1], *same[:1]])


def transcript(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as a person reads it: one block per message, calls as name(arguments)."""
    blocks = []
    for one in messages:
        text = str(one.get("content") or "").strip()
        for call in one.get("tool_calls") or ():
            function = call["function"]
            given = ", ".join(f"{k}={v!r}" for k, v in function["arguments"].items())
            text += ("\n" if text else "") + f"-> {function['name']}({given})"
        name = f"{one['role']} {one['name']}" if one.get("name") else one["role"]
        blocks.append(f"[{name}] {text}")
    return "\n".join(blocks)
