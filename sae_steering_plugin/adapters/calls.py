"""What the host is computing right now: which rows, which absolute tokens, which part is the
prompt.

No hook of either host sees the attention mask, and while decoding a hook sees one token. So one
observer per model watches the host's own calls (mask, cache length, token ids, `generate`) and
every edit asks it which of the tokens in front of it are wanted.

The prompt of a sequence is
- inside `generate`, `generate_stream`, `hf_generate` (and the wrapped model's own `generate`): that
  call's input, also when it is prefilled in chunks or fed again at each step without a cache;
- in a bare forward pass: the tokens of the call that found an empty cache; later calls on that
cache decode;
- or what `prompt_lengths` says, which overrides both (a manual loop, a conversation that grows).
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sae_steering_plugin.adapters.transformer_lens import (
    Model,
    bos_token,
    is_bridge,
    pad_token,
    stop_tokens,
)
from sae_steering_plugin.types import Positions

GENERATORS = ("generate", "hf_generate")
STREAMS = ("generate_stream",)


@dataclass(eq=False)
class Sequence:
    """The batch of texts behind one cache (or one uncached call): what each row has been fed so
    far.

    `real` covers the columns fed up to the last call that was not a plain decode step; every later
    column is real. `prompt_length` counts real prompt tokens per row.
    """

    rows: int
    real: Tensor
    columns: int
    prompt_columns: int
    prompt_length: Tensor
    stop_ids: tuple[int, ...] = ()
    fed: list[Tensor] = field(default_factory=list)
    _counted: tuple[Tensor | None, int, int] = (None, 0, 0)

    def numbers(self, columns: int) -> tuple[int, int]:
        """The smallest and the largest number, over rows, of the real token that follows
        `columns` columns, which reach at least to the last column of `real`."""
        counted, fewest, most = self._counted
        if counted is not self.real:
            counts = self.real.sum(dim=1)
            fewest, most = int(counts.min()), int(counts.max())
            self._counted = (self.real, fewest, most)
        later = columns - self.real.shape[1]
        return fewest + later, most + later

    def real_so_far(self, columns: int) -> Tensor:
        known = self.real[:, :columns]
        missing = columns - known.shape[1]
        if missing <= 0:
            return known
        return torch.cat([known, known.new_ones(self.rows, missing)], dim=1)

    def alive(self) -> Tensor:
        """`[batch, step]`: False once a row has been fed a stop token after its prompt."""
        steps = torch.cat(self.fed, dim=1)
        stopped = torch.isin(steps, torch.tensor(self.stop_ids, device=steps.device))
        return stopped.cumsum(dim=1) == 0


@dataclass(eq=False)
class Scope:
    """One `generate` call. `embedded` are the ids a HookedTransformer has embedded in it so far."""

    prompt_columns: int | None = None
    prompt_real: Tensor | None = None
    stop_ids: tuple[int, ...] = ()
    sequence: Sequence | None = None
    embedded: list[Tensor] = field(default_factory=list)


def wanted_number(positions: Positions, first: int, last: int) -> bool | None:
    """Whether decoded tokens numbered `first` to `last`, one per row, are wanted; None when it
    differs among the rows. No decoded token is a leading BOS unless `first` is 0."""
    stop = positions.stop
    if positions.phase == "prefill" or (stop is not None and stop < 0):
        return False
    if positions.start > last or (stop is not None and stop <= first):
        return False
    if first > 0 and positions.start <= first and (stop is None or stop > last):
        return True
    return None


def behind_every_prompt(real: Tensor, prompt_length: Tensor) -> int:
    """The column from which on every token of every row is decoded, as far as `real` tells.

    A row without a real token may go on with padding, so no column is known while there is one.
    """
    counts = real.sum(dim=1)
    if not bool(counts.all()):
        return sys.maxsize
    return real.shape[1] + max(0, int((prompt_length - counts).max()))


def behind_prompt(positions: Positions) -> bool | None:
    """Whether every decoded token is wanted (True) or none (False); None when it depends on which.

    A negative start counts from the prompt's end, so every decoded token lies behind it.
    """
    if positions.start > 0 or positions.stop is not None:
        return None
    return positions.phase != "prefill"


@dataclass(eq=False)
class Frame:
    """One forward pass of the host. Positions are worked out when the first edit asks.

    `member[b]` is the row that stands for row b of the batch, when identical rows are computed
    once; positions are then those of the batch.
    """

    observer: Observer
    scope: Scope | None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    cache: Any = None
    cached: int = 0
    whole: bool = True
    first_layer: int | None = None
    member: Tensor | None = None
    fired: set[Any] = field(default_factory=set)
    captured: dict[str, Tensor] = field(default_factory=dict)
    sequence: Sequence | None = None
    decode_step: bool = False
    finished: bool = False
    _shape: tuple[int, int] | None = None
    _index: Tensor | None = None
    _real: Tensor | None = None
    _bos: Tensor | None = None
    _kept: dict[Any, Any] = field(default_factory=dict)

    def keep(
        self, positions: Positions, rows: tuple[int, ...] | None, x: Tensor, prompts: Tensor | None
    ) -> Tensor | bool:
        """The tokens of `x` that are wanted: True for all, False for none, or `[batch, pos, 1]`."""
        self.locate(x, prompts)
        key = (positions, rows)
        if key not in self._kept:
            self._kept[key] = self._find(positions, rows, x)
        return self._kept[key]

    def locate(self, x: Tensor, prompts: Tensor | None) -> None:
        """Find the sequence that this pass, whose activation is `x`, goes on with."""
        shape = x.shape
        known = self._shape
        if known is None:
            if self.tokens is not None and self.tokens.shape != shape[:2]:
                raise ValueError(
                    f"the activation has shape {tuple(shape)} in a pass over "
                    f"{tuple(self.tokens.shape)} tokens: an edit needs a site that holds "
                    "[batch, pos, ...]"
                )
            self._locate((shape[0], shape[1]), x.device, prompts)
        elif known[0] != shape[0] or known[1] != shape[1]:
            raise RuntimeError(
                f"a hook fired on a tensor of {tuple(shape[:2])} tokens inside a forward pass of "
                f"{known}: positions are unknown outside the model's own forward pass"
            )

    def _find(self, positions: Positions, rows: tuple[int, ...] | None, x: Tensor) -> Tensor | bool:
        assert self.sequence is not None
        if rows is not None and (outside := [r for r in rows if not -x.shape[0] <= r < x.shape[0]]):
            raise IndexError(f"row {outside[0]} is outside this batch of {x.shape[0]} rows")
        wanted: Tensor | bool | None = None
        if self.decode_step and x.shape[1] == 1:
            wanted = behind_prompt(positions)
            if wanted is None and self.sequence.real.shape[1] <= self.cached:
                wanted = wanted_number(positions, *self.sequence.numbers(self.cached))
        if wanted is None:
            wanted = self._mask(positions, x)
        if rows is None or wanted is False:
            return wanted
        chosen = torch.zeros(x.shape[0], 1, 1, dtype=torch.bool, device=x.device)
        chosen[list(rows)] = True
        if wanted is True:
            return chosen.expand(x.shape[0], x.shape[1], 1)
        return wanted & chosen

    def _mask(self, positions: Positions, x: Tensor) -> Tensor | bool:
        assert self.sequence is not None
        index, real, bos = self.tensors(x)
        kept = positions.keep(index, self.sequence.prompt_length.to(x.device), real, bos)
        if bool(kept.all()):
            return True
        return kept.unsqueeze(-1) if bool(kept.any()) else False

    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per token of the chunk: its number in the row, whether it is real, whether a leading
        BOS."""
        if self._index is None:
            assert self.sequence is not None
            n = x.shape[1]
            everything = self.sequence.real_so_far(self.cached + n).to(x.device)
            index = everything.long().cumsum(dim=1) - 1
            self._index, self._real = index[:, -n:], everything[:, -n:]
            first = (self._index == 0) & self._real
            bos = self.observer.bos
            if bos is None or not bool(first.any()):
                self._bos = torch.zeros_like(first)
            elif self.tokens is None or self.tokens.shape[1] != n:
                self._bos = first if self.observer.prepends_bos else torch.zeros_like(first)
            else:
                self._bos = first & (self.tokens.to(x.device) == bos)
        assert self._index is not None and self._real is not None and self._bos is not None
        return self._index, self._real, self._bos

    def _locate(self, shape: tuple[int, int], device: torch.device, prompts: Tensor | None) -> None:
        """Find or make the sequence this pass belongs to, and extend it by this chunk."""
        self._shape = shape
        batch, n = shape
        scope = self.scope
        known = self.observer.sequence_of(self.cache) if self.cached else None
        if known is not None and known.rows != batch:
            known = None
        # in a loop of one's own a single column may still be padding in some row
        mask = self.mask if scope is None and n == 1 else None
        padded = mask is not None and mask.ndim == 2 and not bool(mask[:, -1].all())
        if known is not None and n == 1 and self.cached >= known.prompt_columns and not padded:
            self._advance(known, n)
            return
        real = self._real_now(shape, device, known)
        if known is None:
            known = self._begin(real, batch, n, scope, prompts)
        else:
            known.real = torch.cat([known.real_so_far(self.cached), real[:, -n:]], dim=1)
            if self.cached < known.prompt_columns and (prompts is not None or scope is None):
                known.prompt_columns = behind_every_prompt(known.real, known.prompt_length)
        self._advance(known, n, padded=padded)

    def _advance(self, sequence: Sequence, n: int, *, padded: bool = False) -> None:
        self.sequence = sequence
        self.decode_step = self.cached >= sequence.prompt_columns and self.cached > 0 and not padded
        sequence.columns = self.cached + n
        if self.decode_step and self.tokens is not None and n == 1:
            sequence.fed.append(self.tokens)
        if self.scope is not None:
            self.scope.sequence = sequence

    def _real_now(
        self, shape: tuple[int, int], device: torch.device, known: Sequence | None
    ) -> Tensor:
        """`[batch, cached + pos]` or `[batch, pos]`: False on padding."""
        batch, n = shape
        mask = self.mask
        total = self.cached + n
        if mask is not None and mask.ndim == 2 and mask.shape[1] in (n, total):
            real = mask.to(device).bool().expand(batch, -1)
            if real.shape[1] == n and self.cached and known is None:
                real = torch.cat([real.new_ones(batch, self.cached), real], dim=1)
        elif known is None and self.cached:
            real = torch.ones(batch, total, dtype=torch.bool, device=device)
        else:
            real = torch.ones(batch, n, dtype=torch.bool, device=device)
        tokens = self.tokens
        started = known.real.any(dim=1).to(device) if known is not None else None
        # a single pad id behind a text that has begun is a finished row being fed on, or text
        single = n == 1 and self.cached > 0
        begun = single and (started is None or bool(started.all()))
        if tokens is not None and tokens.shape == (batch, n) and not begun:
            pads = self.observer.padding(tokens.to(device), started, mask is not None)
            if pads is not None:
                if single and started is not None:
                    pads = pads & ~started.unsqueeze(1)
                real = real.clone()
                real[:, -n:] &= ~pads
        return real

    def _begin(
        self, real: Tensor, batch: int, n: int, scope: Scope | None, prompts: Tensor | None
    ) -> Sequence:
        columns = n if not self.cached else self.cached
        prompt_real = real[:, :columns]
        stop_ids: tuple[int, ...] = ()
        if scope is not None:
            stop_ids = scope.stop_ids
            if scope.prompt_columns is None:
                scope.prompt_columns = self.cached + n
                scope.prompt_real = real
            columns = scope.prompt_columns
            prompt_real = real[:, :columns]
            given = scope.prompt_real
            if given is not None and given.shape[1] == columns and batch % given.shape[0] == 0:
                prompt_real = given.to(real.device).repeat_interleave(
                    batch // given.shape[0], dim=0
                )
            if not self.cached and n > columns:
                real = self._without_finished(real, columns, stop_ids)
        length = prompt_real.sum(dim=1) + (columns - prompt_real.shape[1])
        if prompts is not None:
            length = prompts.to(real.device).expand(batch)
        if prompts is not None or (scope is None and not bool(real.any(dim=1).all())):
            columns = behind_every_prompt(real, length)
        return Sequence(
            rows=batch,
            real=real,
            columns=0,
            prompt_columns=columns,
            prompt_length=length,
            stop_ids=stop_ids,
        )

    def _without_finished(self, real: Tensor, columns: int, stop_ids: tuple[int, ...]) -> Tensor:
        """Uncached generation feeds finished rows again: what follows their stop token is not
        text."""
        if not stop_ids or self.tokens is None or self.tokens.shape[1] != real.shape[1]:
            return real
        stopped = torch.isin(self.tokens, torch.tensor(stop_ids, device=self.tokens.device))
        stopped[:, :columns] = False
        return real & (stopped.cumsum(dim=1) == 0).to(real.device)


class Observer:
    """Watches one model's calls while at least one user holds it."""

    def __init__(self, model: Model) -> None:
        self.model = weakref.ref(model)
        self.bridge = is_bridge(model)
        self.bos = bos_token(model)
        self.pad = pad_token(model)
        self.eos = stop_tokens(model)
        self.prepends_bos = bool(getattr(model.cfg, "default_prepend_bos", True))
        self.frame: Frame | None = None
        self.member: Tensor | None = None
        self.scopes: list[Scope] = []
        self.users = 0
        self.installed = 0
        self.checks: list[Callable[[Frame], None]] = []
        self.before: list[Callable[[], None]] = []
        self.on_generate: list[Callable[[], None]] = []
        self._undo: list[Callable[[], None]] = []
        self._sequences: dict[int, tuple[Any, Sequence]] = {}

    @classmethod
    def of(cls, model: Model) -> Observer:
        found = _observers.get(model)
        if found is None:
            found = _observers[model] = cls(model)
        return found

    def hold(self) -> None:
        if self.users == 0:
            self._install()
        self.users += 1

    def release(self) -> None:
        self.users -= 1
        if self.users == 0:
            while self._undo:
                self._undo.pop()()
            self.frame = None
            self.scopes.clear()
            self._sequences.clear()

    @contextmanager
    def generating(
        self, tokens: Tensor, mask: Tensor, stop_ids: tuple[int, ...] = ()
    ) -> Iterator[Scope]:
        """What runs inside continues this left-padded prompt."""
        scope = Scope(prompt_columns=tokens.shape[1], prompt_real=mask.bool(), stop_ids=stop_ids)
        self.hold()
        self.scopes.append(scope)
        try:
            yield scope
        finally:
            self.scopes.remove(scope)
            self.release()

    @contextmanager
    def standing_for(self, member: Tensor) -> Iterator[None]:
        """The rows computed inside stand for the batch `rows[member]`; no edit may act on them."""
        self.member = member
        try:
            yield
        finally:
            self.member = None

    def sequence_of(self, cache: Any) -> Sequence | None:
        found = self._sequences.get(id(cache))
        if found is None:
            return None
        reference, sequence = found
        return sequence if reference() is cache else None

    def remember(self, cache: Any, sequence: Sequence | None) -> None:
        if cache is None or sequence is None:
            return
        found = self._sequences.get(id(cache))
        if found is not None and found[1] is sequence and found[0]() is cache:
            return
        try:
            reference: Any = weakref.ref(cache)
        except TypeError:
            reference = functools.partial(_same, cache)
        self._sequences = {k: v for k, v in self._sequences.items() if v[0]() is not None}
        self._sequences[id(cache)] = (reference, sequence)

    def padding(self, tokens: Tensor, started: Tensor | None, masked: bool) -> Tensor | None:
        """Runs of the pad id at either end of a row; None when the tokenizer pads with nothing.

        A pad id that is also BOS or EOS may be text, so it counts only in batches without a mask,
        and the last of a leading run is then taken for the BOS.
        """
        if self.pad is None:
            return None
        shared = self.pad == self.bos or self.pad in self.eos
        if shared and (masked or tokens.shape[0] == 1):
            return None
        blank = tokens == self.pad
        if not bool(blank.any()):
            return None
        leading = (~blank).cumsum(dim=1) == 0
        trailing = (~blank).flip(1).cumsum(dim=1).flip(1) == 0
        if started is not None:
            leading = leading & ~started.to(leading.device).unsqueeze(1)
        if self.pad == self.bos:
            last = leading & ~torch.nn.functional.pad(leading, (0, 1))[:, 1:]
            leading = leading & ~last
            trailing = trailing & ~last
        return leading | trailing

    def _install(self) -> None:
        self.installed += 1
        model = self.model()
        assert model is not None
        if self.bridge:
            inner = model.original_model
            first = inner.register_forward_pre_hook(self._enter_inner, with_kwargs=True)
            last = inner.register_forward_hook(self._leave_inner)
            self._undo += [first.remove, last.remove]
            self._shadow(inner, "generate", self._scoped)
        else:
            handle = model.embed.register_forward_pre_hook(self._embedding)
            self._undo.append(handle.remove)
            self._shadow(model, "forward", self._watched)
        for name in GENERATORS:
            self._shadow(model, name, self._scoped)
        for name in STREAMS:
            self._shadow(model, name, self._streamed)

    def _shadow(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        """Put a wrapped method on the instance; taking it away uncovers the class's own."""
        original = getattr(owner, name, None)
        if original is None:
            return
        before = owner.__dict__.get(name)
        owner.__dict__[name] = wrap(original)

        def undo() -> None:
            if before is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before

        self._undo.append(undo)

    def _scope(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Scope:
        for check in self.on_generate:
            check()
        scope = Scope()
        if named.get("stop_at_eos", True):
            given = named.get("eos_token_id")
            listed = given if isinstance(given, list | tuple) else [given]
            scope.stop_ids = tuple(int(i) for i in listed if i is not None) or self.eos
        ids = arguments[0] if arguments else named.get("input_ids", named.get("inputs"))
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
            mask = named.get("attention_mask")
            if self.bridge:
                scope.prompt_columns = ids.shape[1]
            if isinstance(mask, Tensor) and mask.shape == ids.shape:
                scope.prompt_real = mask.bool()
        return scope

    def _scoped(self, original: Any) -> Any:
        @functools.wraps(original)
        def generate(*arguments: Any, **named: Any) -> Any:
            self.scopes.append(self._scope(arguments, named))
            try:
                return original(*arguments, **named)
            finally:
                self.scopes.pop()

        return generate

    def _streamed(self, original: Any) -> Any:
        @functools.wraps(original)
        def generate_stream(*arguments: Any, **named: Any) -> Iterator[Any]:
            scope = self._scope(arguments, named)
            stream = original(*arguments, **named)
            installed = self.installed
            while True:
                if self.users == 0 or self.installed != installed:
                    raise RuntimeError(
                        "the steering block in which this stream began is over, and the rest would "
                        "be unsteered: take all of the stream inside the block"
                    )
                self.scopes.append(scope)
                try:
                    item = next(stream)
                except StopIteration:
                    return
                finally:
                    self.scopes.remove(scope)
                yield item

        return generate_stream

    def _begin(self, frame: Frame) -> None:
        for check in self.before:
            check()
        if self.member is not None:
            frame.member = self.member
            frame.tokens = None if frame.tokens is None else frame.tokens[self.member]
            frame.mask = None if frame.mask is None else frame.mask[self.member]
        self.frame = frame

    def _end(self, frame: Frame, cache: Any) -> None:
        self.remember(cache, frame.sequence)
        frame.finished = True
        for check in self.checks:
            check(frame)

    def _enter_inner(self, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        del module
        ids = arguments[0] if arguments else named.get("input_ids")
        mask = named.get("attention_mask")
        cache: Any = named.get("past_key_values")
        length = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        self._begin(
            Frame(
                self,
                self.scopes[-1] if self.scopes else None,
                tokens=ids if isinstance(ids, Tensor) and ids.ndim == 2 else None,
                mask=mask if isinstance(mask, Tensor) else None,
                cache=cache,
                cached=length,
            )
        )

    def _leave_inner(self, module: Any, arguments: Any, output: Any) -> None:
        del module, arguments
        frame = self.frame
        if frame is not None:
            cache = getattr(output, "past_key_values", None)
            self._end(frame, cache if cache is not None else frame.cache)

    def _embedding(self, module: Any, arguments: tuple[Any, ...]) -> None:
        """A HookedTransformer embeds inside `forward`, or in `generate` ahead of it."""
        del module
        ids = arguments[0] if arguments else None
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return
        frame = self.frame
        if frame is not None and not frame.finished and frame.tokens is None:
            frame.tokens = ids if frame.member is None else ids[frame.member]
        elif self.scopes:
            self.scopes[-1].embedded.append(ids)

    def _watched(self, original: Any) -> Any:
        @functools.wraps(original)
        def forward(*arguments: Any, **named: Any) -> Any:
            cache = named.get("past_kv_cache")
            cached = int(cache[0].past_keys.shape[1]) if cache is not None else 0
            scope = self.scopes[-1] if self.scopes else None
            start = named.get("start_at_layer")
            frame = Frame(
                self,
                scope,
                mask=named.get("attention_mask"),
                cache=cache,
                cached=cached,
                whole=named.get("stop_at_layer") is None,
                first_layer=None if start is None or scope is not None else int(start),
            )
            if start is not None and scope is not None and scope.embedded:
                residual = arguments[0] if arguments else named["input"]
                frame.tokens = torch.cat(scope.embedded, dim=1)[:, -residual.shape[1] :]
            self._begin(frame)
            out = original(*arguments, **named)
            self._end(frame, cache)
            return out

        return forward


def _same(value: Any) -> Any:
    """Stands in for a weak reference to an object that allows none."""
    return value


_observers: WeakKeyDictionary[Any, Observer] = WeakKeyDictionary()
