"""Edits put on a host's hook points: `steer` as a context manager, `fwd_hooks` as a list for the
host.

All edits of one site read the same, unedited activation, and what they add is summed, so their
order does not matter (`Scale`, `Clamp` and `Ablate` of one dictionary act on each other's result;
see `edits.codes`). Edits of different sites act where they stand.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sae_steering_plugin.adapters.calls import Frame, Observer, Scope, behind_prompt
from sae_steering_plugin.adapters.calls import Sequence as Fed
from sae_steering_plugin.adapters.gates import Gate, GateError, GateReader, require_order, ungated
from sae_steering_plugin.adapters.sae_parts import site_names
from sae_steering_plugin.adapters.transformer_lens import (
    Model,
    Site,
    layer_of,
    refuse_compiled,
    resolve,
    same_place,
    tell_of_a_branch,
)
from sae_steering_plugin.edits.codes import (
    CodeChange,
    PreparedCodes,
    constant_step,
    prepare_together,
)
from sae_steering_plugin.edits.gate import Gated
from sae_steering_plugin.edits.project import ProjectOut
from sae_steering_plugin.types import Change, Edit, PreparedChange, escaped

PER_PAIR = ("hook_pattern", "hook_attn_scores")
"""Hook points of shape `[batch, head, query, key]`, which no mask of tokens fits."""


class SteeringError(RuntimeError):
    """An edit did not act once and only once where it was told to."""


@dataclass(eq=False)
class EditRecord:
    """What one edit did: passes it fired in, tokens it steered, and how far it moved them.

    `mean_change` is the mean length of what was added and `mean_residual` the mean length of the
    activation before, both over the measured tokens: every forward pass and prompt, and the first
    decoded token where only decoding is steered. Rows that had ended are not counted. `gates` are
    the conditions of a gated edit, with the scores and decisions of each prompt.
    """

    edit: Edit
    site: str
    gates: tuple[GateReader, ...] = ()
    fired: int = 0
    _tokens: dict[Any, Tensor] = field(default_factory=dict)
    _steps: dict[Any, tuple[Fed, list[tuple[int, Tensor | None]]]] = field(default_factory=dict)
    _sums: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    @property
    def tokens_per_row(self) -> list[Tensor]:
        """Steered tokens per batch row, one tensor per generate call or bare sequence, in order."""
        found = {key: counts.clone() for key, counts in self._tokens.items()}
        for key, (fed, steps) in self._steps.items():
            alive = fed.alive() if fed.fed else None
            for step, keep in steps:
                counts = torch.ones(fed.rows, dtype=torch.long) if keep is None else keep.sum(dim=1)
                if alive is not None and step < alive.shape[1]:
                    counts = counts.cpu() * alive[:, step].long().cpu()
                found[key] = found.get(key, torch.zeros(fed.rows, dtype=torch.long)) + counts.cpu()
        return list(found.values())

    @property
    def tokens(self) -> int:
        """Steered tokens in all."""
        return sum(int(counts.sum()) for counts in self.tokens_per_row)

    @property
    def mean_change(self) -> float:
        return self._mean(0)

    @property
    def mean_residual(self) -> float:
        return self._mean(1)

    @property
    def displacement(self) -> float:
        """Mean length of the change in units of the mean residual length; NaN when nothing was
        steered."""
        return self.mean_change / self.mean_residual if self._sums else float("nan")

    def _mean(self, which: int) -> float:
        n = sum(float(sums[2]) for sums in self._sums)
        return sum(float(sums[which]) for sums in self._sums) / n if n else float("nan")

    def to_dict(self) -> dict[str, Any]:
        return {
            "change": type(self.edit.change).__name__,
            "site": self.site,
            "positions": str(self.edit.positions),
            "fired": self.fired,
            "tokens": self.tokens,
            "mean_change": self.mean_change,
            "mean_residual": self.mean_residual,
            "displacement": self.displacement,
        }


@dataclass(eq=False)
class SteeringRecord:
    """What happened inside one `steer` block, edit by edit."""

    edits: list[EditRecord]

    @property
    def sites(self) -> list[str]:
        return list(dict.fromkeys(edit.site for edit in self.edits))

    def to_dict(self) -> list[dict[str, Any]]:
        return [edit.to_dict() for edit in self.edits]

    def __repr__(self) -> str:
        lines = [
            f"  {e.to_dict()['change']} at {e.site}, {e.edit.positions}: {e.tokens} tokens in "
            f"{e.fired} passes, change {e.mean_change:.3g} on residual {e.mean_residual:.3g}"
            for e in self.edits
        ]
        return "\n".join(["SteeringRecord", *lines])

    def _repr_html_(self) -> str:
        rows = self.to_dict()
        if not rows:
            return "<p>no edit</p>"
        head = "".join(f"<th>{escaped(name)}</th>" for name in rows[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{escaped(_short(v))}</td>" for v in row.values()) + "</tr>"
            for row in rows
        )
        return f"<table><caption>SteeringRecord</caption><tr>{head}</tr>{body}</table>"


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


Single = tuple[int, Tensor | None, PreparedChange]
Group = tuple[tuple[int, ...], PreparedCodes, str | None]


@dataclass(eq=False)
class Program:
    """All edits of one site, prepared once per dtype and device, then called by the hook."""

    observer: Observer
    site: Site
    edits: list[Edit]
    records: list[EditRecord]
    prompts: Tensor | None
    measure: bool
    reads: dict[int, str]
    gates: list[Gate | None]
    _ready: tuple[torch.dtype, torch.device] | None = None
    _singles: list[Single] = field(default_factory=list)
    _groups: list[Group] = field(default_factory=list)
    _rows_checked: set[int] = field(default_factory=set)
    _rows: list[tuple[int, ...] | None] = field(default_factory=list)
    _decoding: list[Tensor | bool] | None = None
    _step: Tensor | None = None
    _constant: bool = False
    _noting: tuple[Any, Any, list[list[Any]]] = (None, None, [])

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor | None:
        del hook
        frame = self.observer.frame
        if frame is None:
            raise SteeringError(
                f"{self.site.name} fired outside a forward pass of the model: call the model "
                "itself, "
                "not one of its parts, or positions are unknown"
            )
        self._count(frame)
        if self._decoding is not None and frame.member is None:
            frame.locate(x, self.prompts)
            if frame.decode_step and self._fits(x) and self._noted(frame):
                if self._constant:
                    return None if self._step is None else x + self._step
                return self._sum(x, x, self._decoding, frame, {})
        flat = x.flatten(2) if x.ndim > 3 else x
        if self._ready is None or self._ready != (flat.dtype, flat.device):
            self._prepare(flat)
        if frame.member is not None:
            self._pass_by(flat[:1].expand(len(frame.member), *flat.shape[1:]), frame)
            return None
        if flat.shape[0] not in self._rows_checked:
            self._check_rows(flat.shape[0])
        keeps = self._keeps(frame, flat)
        changes: dict[int, Tensor | None] = {}
        self._note(frame, keeps, flat, changes)
        return self._sum(x, flat, keeps, frame, changes)

    def _fits(self, x: Tensor) -> bool:
        """True when everything prepared is right for this activation."""
        shape, ready = x.shape, self._ready
        return (
            ready is not None
            and len(shape) == 3
            and shape[1] == 1
            and shape[0] in self._rows_checked
            and x.dtype is ready[0]
            and x.device == ready[1]
        )

    def _noted(self, frame: Frame) -> bool:
        """Take note of a decode step in which each edit acts everywhere or nowhere.

        False when the records need more than a number: the lengths of a first decoded token.
        """
        fed, scope, lists = self._noting
        if fed is not frame.sequence or scope is not frame.scope:
            assert self._decoding is not None and frame.sequence is not None
            acting = [
                r for r, keep in zip(self.records, self._decoding, strict=True) if keep is True
            ]
            if self.measure and not all(r._sums for r in acting):
                return False
            fed = frame.sequence
            lists = [_steps_of(record, frame) for record in acting]
            self._noting = (fed, frame.scope, lists)
        step = (len(fed.fed) - 1, None)
        for steps in lists:
            steps.append(step)
        return True

    def _keeps(self, frame: Frame, flat: Tensor) -> list[Tensor | bool]:
        keeps = [
            frame.keep(edit.positions, rows, flat, self.prompts)
            for edit, rows in zip(self.edits, self._rows, strict=True)
        ]
        return [
            keep if gate is None else gate.keep(frame, keep, flat)
            for keep, gate in zip(keeps, self.gates, strict=True)
        ]

    def _pass_by(self, batch: Tensor, frame: Frame) -> None:
        """Take note of a pass whose rows stand for others, in which no token may be steered.

        Only the shape of `batch` means anything.
        """
        keeps = self._keeps(frame, batch)
        if any(keep is not False for keep in keeps):
            raise SteeringError(f"{self.site.name} would steer rows that were computed as one")
        self._note(frame, keeps, batch, {})

    def _count(self, frame: Frame) -> None:
        if self not in frame.fired:
            frame.fired.add(self)
            for record in self.records:
                record.fired += 1
        elif not frame.finished:
            raise SteeringError(
                f"{self.site.name} fired twice in one forward pass: the edit is attached twice "
                "(the same hooks in two contexts, or steer inside steer with the same list)"
            )

    def _sum(
        self,
        x: Tensor,
        flat: Tensor,
        keeps: list[Tensor | bool],
        frame: Frame,
        changes: dict[int, Tensor | None],
    ) -> Tensor | None:
        """`x` with all edits added; None when nothing moves. `changes` holds what of the edits has
        been worked out already, by the number of the edit."""
        out, moved = flat, False
        wide: Tensor | None = None
        for index, constant, prepared in self._singles:
            keep = keeps[index]
            if keep is False:
                continue
            if constant is not None:
                moved = True
                out = (
                    out + constant
                    if keep is True
                    else torch.addcmul(out, keep.to(out.dtype), constant)
                )
                continue
            found = changes.get(index)
            change = prepared(flat).float() if found is None else found
            change = change if keep is True else torch.where(keep, change, 0.0)
            wide = change if wide is None else wide + change
        for members, group, read in self._groups:
            part = changes.get(members[0])
            if part is None:
                part = self._group_change(members, group, read, keeps, flat, frame)
            if part is not None:
                wide = part if wide is None else wide + part
        if wide is not None:
            out = (out.float() + wide).to(flat.dtype)
        elif not moved:
            return None
        return out if out.shape == x.shape else out.reshape(x.shape)

    def _group_change(
        self,
        members: tuple[int, ...],
        group: PreparedCodes,
        read: str | None,
        keeps: list[Tensor | bool],
        flat: Tensor,
        frame: Frame,
    ) -> Tensor | None:
        wanted = [keeps[i] for i in members]
        if all(keep is False for keep in wanted):
            return None
        if group.reads_context and frame.cached:
            raise SteeringError(
                "a temporal SAE reads the earlier tokens of a text, which a cached forward pass "
                "does "
                "not carry: generate with use_past_kv_cache=False (generate(..., cached=False))"
            )
        source = flat if read is None else frame.captured[read]
        if all(keep is True for keep in wanted):
            return group(source.flatten(2) if source.ndim > 3 else source)
        blank = torch.zeros(*flat.shape[:2], 1, dtype=torch.bool, device=flat.device)
        masks = [None if k is True else (blank if k is False else k) for k in wanted]
        change = group(source.flatten(2) if source.ndim > 3 else source, masks)
        if any(mask is None for mask in masks):
            return change
        union = torch.stack([m for m in masks if m is not None]).any(dim=0)
        return torch.where(union, change, 0.0)

    def _prepare(self, flat: Tensor) -> None:
        """Make every change ready; outside inference mode, so that later passes may need
        gradients."""
        with torch.inference_mode(False):
            self._singles, self._groups = [], []
            self._rows = [_rows(edit) for edit in self.edits]
            grouped: dict[int, list[int]] = {}
            for i, edit in enumerate(self.edits):
                if isinstance(edit.change, CodeChange):
                    grouped.setdefault(id(edit.change.sae), []).append(i)
                    continue
                prepared = edit.change.prepare(dtype=flat.dtype, device=flat.device)
                if not prepared.idle:
                    self._singles.append((i, prepared.constant, prepared))
            for members in grouped.values():
                self._prepare_codes(members, flat)
        for _, constant, _prepared in self._singles:
            if constant is not None and constant.shape[-1] != flat.shape[-1]:
                raise ValueError(
                    f"the vector has {constant.shape[-1]} entries, the activation at "
                    f"{self.site.name} "
                    f"has {flat.shape[-1]}: it was built for another model or site"
                )
        with torch.inference_mode(False):
            self._decode_steps()
        self._ready = (flat.dtype, flat.device)

    def _decode_steps(self) -> None:
        """Find what every decode step does alike: which edits act, and the sum of constants."""
        acting = [behind_prompt(edit.positions) for edit in self.edits]
        self._decoding, self._step = None, None
        if any(keep is None for keep in acting) or any(rows is not None for rows in self._rows):
            return
        if any(gate is not None for gate in self.gates):
            return
        self._decoding = [bool(keep) for keep in acting]
        constants = [c for i, c, _ in self._singles if c is not None and acting[i]]
        for constant in constants:
            self._step = constant if self._step is None else self._step + constant
        self._constant = not self._groups and all(c is not None for _, c, _ in self._singles)

    def _prepare_codes(self, members: list[int], flat: Tensor) -> None:
        changes: list[CodeChange] = [self.edits[i].change for i in members]  # type: ignore[misc]
        prepared = prepare_together(changes, dtype=flat.dtype, device=flat.device)
        if prepared.idle:
            return
        read = self.reads.get(members[0])
        steps = [constant_step(change, flat.device) for change in changes]
        if all(step is not None for step in steps) and read is None:
            for i, step, change in zip(members, steps, changes, strict=True):
                if not change.idle and step is not None:
                    constant = step.to(flat.dtype).unsqueeze(1)
                    self._singles.append((i, constant, prepared))
            return
        self._groups.append((tuple(members), prepared, read))

    def _check_rows(self, batch: int) -> None:
        for edit in self.edits:
            if edit.change.batch_rows not in (1, batch):
                raise ValueError(
                    f"{type(edit.change).__name__} was written for {edit.change.batch_rows} batch "
                    "rows, "
                    f"and this batch has {batch}: give one strength per row of the batch"
                )
        self._rows_checked.add(batch)

    def _note(
        self,
        frame: Frame,
        keeps: list[Tensor | bool],
        flat: Tensor,
        changes: dict[int, Tensor | None],
    ) -> None:
        """Write down which tokens are steered, and how far where that is measured."""
        assert frame.sequence is not None
        key = frame.scope if frame.scope is not None else frame.sequence
        for index, (record, keep) in enumerate(zip(self.records, keeps, strict=True)):
            if frame.decode_step:
                if keep is not False:
                    _steps_of(record, frame).append(_step_note(frame, keep, flat))
            else:
                counts = _counts(keep, flat)
                before = record._tokens.get(key) if frame.cached else None
                record._tokens[key] = counts if before is None else before + counts
            if self.measure and keep is not False and (not frame.decode_step or not record._sums):
                change = self._change_of(index, flat, keep, frame, changes)
                record._sums.append(_lengths(change, flat, keep))

    def _change_of(
        self,
        index: int,
        flat: Tensor,
        keep: Tensor | bool,
        frame: Frame,
        changes: dict[int, Tensor | None],
    ) -> Tensor | None:
        """What one edit adds; kept in `changes` where that is part of the sum as it stands."""
        for i, constant, prepared in self._singles:
            if i == index:
                if constant is not None:
                    return constant
                changes[i] = prepared(flat).float()
                return changes[i]
        for members, group, read in self._groups:
            if index in members:
                keeps: list[Tensor | bool] = [False] * len(self.edits)
                keeps[index] = keep
                change = self._group_change(members, group, read, keeps, flat, frame)
                if len(members) == 1:
                    changes[index] = change
                return change
        return None

    def check(self, frame: Frame) -> None:
        """After a whole forward pass: the site must have fired once in it."""
        if not frame.whole or self in frame.fired:
            return
        layer = layer_of(self.site.name)
        if frame.first_layer is not None and (layer is None or layer < frame.first_layer):
            return
        hint = ""
        if layer is None and frame.scope is not None:
            hint = " (HookedTransformer.generate embeds by itself: use blocks.0.hook_resid_pre)"
        raise SteeringError(f"{self.site.name} did not fire in a whole forward pass{hint}")

    def alive(self) -> None:
        if not self.site.live:
            raise SteeringError(
                f"the hook point {self.site.name} was replaced inside the steering block (SAELens "
                "does "
                "so when an SAE is attached or detached): attach SAEs outside, steer inside"
            )


def _steps_of(record: EditRecord, frame: Frame) -> list[Any]:
    """The decode steps that `record` has noted for the text of this pass."""
    assert frame.sequence is not None
    key = frame.scope if frame.scope is not None else frame.sequence
    return record._steps.setdefault(key, (frame.sequence, []))[1]


def _lengths(
    change: Tensor | None, flat: Tensor, keep: Tensor | bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed lengths of the change and of the residual over the steered tokens, and their
    number."""
    with torch.no_grad():
        before = flat.float().norm(dim=-1, keepdim=True)
        moved = torch.zeros_like(before[:1, :1])
        if change is not None:
            moved = change.float().norm(dim=-1, keepdim=True)
        if keep is True:
            number = torch.tensor(float(before.numel()))
            return moved.expand_as(before).sum(), before.sum(), number
        weights = torch.as_tensor(keep, device=flat.device).float()
        return (moved * weights).sum(), (before * weights).sum(), weights.sum()


def _step_note(frame: Frame, keep: Tensor | bool, flat: Tensor) -> tuple[int, Tensor | None]:
    """Number of the decode step and the tokens steered in it; None stands for one in every row.

    A turn of several tokens on a cache is no step of decoding, and no earlier stop token ends it.
    """
    assert frame.sequence is not None
    if flat.shape[1] == 1:
        return len(frame.sequence.fed) - 1, None if keep is True else _plane(keep, flat)
    return sys.maxsize, _plane(keep, flat)


def _plane(keep: Tensor | bool, flat: Tensor) -> Tensor:
    """The mask `[batch, pos]` of the steered tokens."""
    if isinstance(keep, bool):
        return torch.full(flat.shape[:2], keep, dtype=torch.bool)
    return keep[..., 0]


def _counts(keep: Tensor | bool, flat: Tensor) -> Tensor:
    if isinstance(keep, bool):
        return torch.full((flat.shape[0],), flat.shape[1] if keep else 0, dtype=torch.long)
    return keep[..., 0].sum(dim=1).cpu()


def _rows(edit: Edit) -> tuple[int, ...] | None:
    return None if edit.rows is None else tuple(int(r) for r in edit.rows)


def as_edits(edits: Edit | Change | Sequence[Edit | Change]) -> list[Edit]:
    """A list of edits from one edit, one change, or a mixed list. Raises TypeError for anything
    else."""
    listed = [edits] if not isinstance(edits, list | tuple) else list(edits)
    found = []
    for item in listed:
        if isinstance(item, Edit):
            found.append(item)
        elif isinstance(item, Change):
            found.append(Edit(item))
        else:
            raise TypeError(
                f"{type(item).__name__} is not an edit: pass Edit(Add(vector)), or a change such "
                "as "
                "Add(vector), Clamp(sae, feature, value), SparseAdd(sae, vector)"
            )
    return found


def _programs(
    model: Model,
    edits: list[Edit],
    observer: Observer,
    prompt_lengths: int | Sequence[int] | Tensor | None,
    measure: bool,
) -> tuple[list[Program], list[GateReader], list[tuple[str, Site]], SteeringRecord]:
    """One program per site, gates' readers, read sites of transcoders, and the empty record."""
    prompts = None if prompt_lengths is None else torch.as_tensor(prompt_lengths, dtype=torch.long)
    by_site: dict[int, Program] = {}
    captures: dict[str, Site] = {}
    readers: dict[int, GateReader] = {}
    records = []
    for given in edits:
        edit = ungated(given)
        site = _one_vector_per_token(model, edit.site)
        if not _projected_after(edit, edits):
            tell_of_a_branch(edit.site, site)
        gate = _gate(model, given, site, observer, prompts, readers)
        read = _read_site(model, edit, site)
        if read is not None:
            captures[read.name] = read
        program = by_site.get(id(site.point))
        if program is None:
            program = by_site[id(site.point)] = Program(
                observer, site, [], [], prompts, measure, {}, []
            )
        if read is not None:
            program.reads[len(program.edits)] = read.name
        record = EditRecord(given, site.name, () if gate is None else gate.readers)
        program.edits.append(edit)
        program.gates.append(gate)
        program.records.append(record)
        records.append(record)
    programs = list(by_site.values())
    return programs, list(readers.values()), list(captures.items()), SteeringRecord(records)


def _one_vector_per_token(model: Model, name: str) -> Site:
    """The site a name means. Raises ValueError for one that holds something else per token."""
    site = resolve(model, name)
    if site.attribute in PER_PAIR:
        raise ValueError(
            f"{name!r} holds attention between pairs of tokens, not one vector per token: "
            "edit the residual stream, or attn.hook_z"
        )
    refuse_compiled(model, site.name)
    return site


def _projected_after(edit: Edit, edits: Iterable[Edit]) -> bool:
    """Whether a projection out of the stream is repeated at the end of its block: then what the
    middle of the block misses on a bridge is taken out there (`residual_sites` names both)."""
    end = edit.site.replace("hook_resid_mid", "hook_resid_post")
    return isinstance(edit.change, ProjectOut) and any(
        isinstance(other.change, ProjectOut) and other.site == end for other in edits
    )


def _gate(
    model: Model,
    edit: Edit,
    site: Site,
    observer: Observer,
    prompts: Tensor | None,
    readers: dict[int, GateReader],
) -> Gate | None:
    """The gate of an edit at `site`; a condition that edits share gets one reader."""
    if not isinstance(edit.change, Gated):
        return None
    for condition in edit.change.listed:
        read = _one_vector_per_token(model, condition.site)
        require_order(edit, condition, read.name, site.name)
        if id(condition) not in readers:
            readers[id(condition)] = GateReader(observer, condition, read, prompts)
    found = tuple(readers[id(condition)] for condition in edit.change.listed)
    return Gate(found, edit.change.rule)


def _read_site(model: Model, edit: Edit, site: Site) -> Site | None:
    """Checks that a code edit stands where its dictionary belongs; the input site of a
    transcoder."""
    if not isinstance(edit.change, CodeChange):
        return None
    read, write = site_names(edit.change.sae)
    if not same_place(model, edit.site, write):
        raise ValueError(
            f"this dictionary was trained at {write!r}; an edit of its codes at {edit.site!r} "
            "would "
            "read activations it has never seen"
        )
    if site.sae is not None and not site.sae_error_term:
        raise ValueError(
            f"an SAE is attached at {edit.site!r} without its error term, so its reconstruction "
            "has "
            "already replaced the activation: attach it with use_error_term=True, or call "
            "reset_saes()"
        )
    return None if read == write else resolve(model, read)


@contextmanager
def steer(
    model: Model,
    edits: Edit | Change | Sequence[Edit | Change],
    *,
    prompt_lengths: int | Sequence[int] | Tensor | None = None,
    require: bool = True,
    measure: bool = True,
) -> Iterator[SteeringRecord]:
    """Apply edits to everything the model computes inside the block; yields the record of what
    happened.

    Works for forward passes, `run_with_cache`, `generate`, `hf_generate` and loops of one's own,
    cached or not. Names are resolved before the first pass (KeyError), SAE sites are checked
    (ValueError), a compiled model is refused (RuntimeError). `prompt_lengths` (real tokens per row,
    BOS included) says where the prompt ends when the host's calls cannot: in a loop of one's own
    without a cache, or in a conversation whose first prompt alone counts as prompt. At exit an edit
    that never fired or steered no token raises `SteeringError`, unless `require=False`. Nothing is
    left on the model.
    """
    refuse_compiled(model, "")
    observer = Observer.of(model)
    programs, readers, captures, record = _programs(
        model, as_edits(edits), observer, prompt_lengths, measure
    )
    handles = []
    observer.hold()
    try:
        for reader in readers:  # ahead of the edits: a condition reads what flows in
            handles.append(reader.site.point.register_forward_hook(_reading(reader)))
        for program in programs:
            handles.append(program.site.point.register_forward_hook(_hook(program)))
            observer.checks.append(program.check)
            observer.before.append(program.alive)
        for name, site in captures:  # behind the edits: a transcoder reads what flows on
            handles.append(site.point.register_forward_hook(_capturing(observer, name)))
        yield record
        if require:
            _insist(record)
    finally:
        for handle in handles:
            handle.remove()
        for program in programs:
            if program.check in observer.checks:
                observer.checks.remove(program.check)
            if program.alive in observer.before:
                observer.before.remove(program.alive)
        observer.release()


def _hook(program: Program) -> Callable[..., Tensor | None]:
    def run(module: Any, arguments: Any, output: Tensor) -> Tensor | None:
        del module, arguments
        return program(output)

    return run


def _reading(reader: GateReader) -> Callable[..., None]:
    def read(module: Any, arguments: Any, output: Tensor) -> None:
        del module, arguments
        reader(output)

    return read


def _reading_pair(reader: GateReader) -> Callable[..., None]:
    """A function of its own, so that it goes when the caller lets the list go: edits keep the
    reader."""

    def read(activation: Tensor, hook: Any = None) -> None:
        del hook
        reader(activation)

    return read


def _capturing(observer: Observer, name: str) -> Callable[..., None]:
    def capture(module: Any, arguments: Any, output: Tensor) -> None:
        del module, arguments
        if observer.frame is not None:
            observer.frame.captured[name] = output

    return capture


def _insist(record: SteeringRecord) -> None:
    for edit in record.edits:
        if not edit.fired:
            raise SteeringError(
                f"the edit at {edit.site} never fired: no forward pass of this model ran inside "
                "the "
                "block (pass require=False if that is meant)"
            )
        # a gate that was read and stayed shut has done its work
        if not edit.tokens and not (edit.gates and all(gate.fired for gate in edit.gates)):
            raise SteeringError(
                f"the edit at {edit.site} fired in {edit.fired} passes and steered no token: "
                f"positions {edit.edit.positions} hold none of the tokens seen"
                + (
                    " (the first new token comes from the prompt; decode needs max_new_tokens >= 2)"
                    if edit.edit.positions.phase == "decode"
                    else ""
                )
            )


def fwd_hooks(
    model: Model,
    edits: Edit | Change | Sequence[Edit | Change],
    *,
    prompt_lengths: int | Sequence[int] | Tensor | None = None,
) -> list[tuple[str, Callable[..., Tensor | None]]]:
    """`[(hook_name, function)]` for `model.hooks(fwd_hooks=...)` and `run_with_hooks`.

    Names are canonical, so they fire once whatever was attached before. Each edit's function
    carries `.record`; an edit of a transcoder's codes brings a second one that reads at its input,
    and a gate brings one per condition.
    Nothing checks at the end that it fired: `steer` does.
    """
    refuse_compiled(model, "")
    observer = Observer.of(model)
    programs, readers, captures, record = _programs(
        model, as_edits(edits), observer, prompt_lengths, True
    )
    pairs: list[tuple[str, Callable[..., Tensor | None]]] = [
        (reader.site.name, _reading_pair(reader)) for reader in readers
    ]
    for program in programs:
        function = _standing(program, record)
        pairs.append((program.site.name, function))
        notice = _Notice(program)
        observer.before.append(notice)
        weakref.finalize(function, observer.before.remove, notice)
    for name, _ in captures:
        capture = _capturing(observer, name)
        pairs.append((name, lambda x, hook, _capture=capture: _capture(hook, None, x)))
    for _, function in pairs:
        observer.hold()
        weakref.finalize(function, observer.release)
    return pairs


@dataclass(eq=False)
class _Notice:
    """Warns once when the host has put another object where a list of pairs points to."""

    program: Program
    given: bool = False

    def __call__(self) -> None:
        if not self.given and not self.program.site.live:
            self.given = True
            warnings.warn(
                f"fwd_hooks made for {self.program.site.name} no longer fire: the host has put "
                "another object there (SAELens does so when an SAE is attached or detached). Call "
                "fwd_hooks again after that",
                stacklevel=2,
            )


def _standing(program: Program, record: SteeringRecord) -> Callable[..., Tensor | None]:
    def edit(activation: Tensor, hook: Any = None) -> Tensor | None:
        program.alive()
        return program(activation, hook)

    edit.record = record  # type: ignore[attr-defined]
    return edit


__all__ = [
    "EditRecord",
    "GateError",
    "Scope",
    "SteeringError",
    "SteeringRecord",
    "as_edits",
    "fwd_hooks",
    "steer",
]
