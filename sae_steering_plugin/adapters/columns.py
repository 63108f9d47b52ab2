"""The last column of given texts, computed again and again under changes that only it receives.

A change at the last token leaves everything before it, at every layer, as in the clean run. So the
tokens before are run once and their keys and values are laid out with room for one more column;
each call then writes the new column and runs only it, from the changed block upwards, without the
unembedding. One layout serves every direction that is tried on these texts.

Work per row, with n layers, the change entering block l and T tokens: (n - l) / (n T) of a forward
pass, plus attention over the T - 1 cached tokens. Where a block keeps a state instead of keys and
values (GatedDeltaNet, a sliding window) that state is copied for each call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_steering_plugin.adapters.activations import refuse_dropout
from sae_steering_plugin.adapters.sharing import (
    bridge_forward,
    hooked_cache,
    layers_carry_only_the_residual,
    lowest_foreign_hook,
    replaced,
)
from sae_steering_plugin.adapters.transformer_lens import (
    Model,
    is_bridge,
    layer_of,
    refuse_compiled,
    resolve,
    same_place,
    tell_of_a_branch,
)

BEFORE, AFTER = ("hook_resid_pre", "hook_in"), ("hook_resid_post", "hook_out")
"""Hook points at the two boundaries of a block."""


@dataclass(frozen=True, eq=False)
class Columns:
    """The last position of each row: at the changed site, at the read site, and what is unembedded.

    `read` is None when no read site was named; `final` is the output of the final norm, float32.
    """

    site: Float[Tensor, "row d_model"]
    read: Float[Tensor, "row d_read"] | None
    final: Float[Tensor, "row d_model"]


class ContextRows:
    """Texts laid out as rows whose last column can be run under a change at `site`.

    `member[row]` is the text that row holds. `clean` is the unchanged last column of every row.
    `before_site` and `before_read` hold what flows past the sites at earlier positions when
    `keep_before`. Nothing may be hooked on the model. Raises ValueError for fewer than two tokens,
    a hooked or recurrent-in-depth model, and a `read` site that does not lie behind `site`.
    """

    def __init__(
        self,
        model: Model,
        tokens: Int[Tensor, "text pos"],
        site: str,
        read: str | None = None,
        *,
        member: Int[Tensor, " row"] | None = None,
        keep_before: bool = False,
    ) -> None:
        _check(model, tokens)
        self.model = model
        place = resolve(model, site)
        tell_of_a_branch(site, place)
        self.site = place.name
        self.read = None if read is None else resolve(model, read).name
        if self.read is not None:
            check_behind(model, self.site, self.read)
        self.depth, self.at_boundary = _entrance(model, self.site)
        device = next(model.parameters()).device
        self.member = (torch.arange(len(tokens)) if member is None else member).to(device)
        self.tokens = tokens.to(device)
        self.width = tokens.shape[1]
        self.before_site: Tensor | None = None
        self.before_read: Tensor | None = None
        self._single = False
        with torch.no_grad():
            cache, before = self._prefix(keep_before)
            if keep_before:
                self.before_site = before[self.site][self.member]
                self.before_read = None if self.read is None else before[self.read][self.member]
            self._cache = _laid_out(model, cache, self.member)
            self._entering = torch.empty(0)
            self.clean = self._run(len(self.member), None)

    def __len__(self) -> int:
        return len(self.member)

    def under(self, steps: Float[Tensor, "row d_model"]) -> Columns:
        """The last column of the first `len(steps)` rows, `steps[row]` added to row at the site."""
        if not 0 < len(steps) <= len(self):
            raise ValueError(f"{len(steps)} steps for {len(self)} rows")
        with torch.no_grad():
            return self._run(len(steps), steps)

    def _prefix(self, keep: bool) -> tuple[Any, dict[str, Tensor]]:
        """The cache of all tokens but the last, and what flowed past the sites on the way."""
        model, chunk = self.model, self.tokens[:, :-1]
        with _captured(model, [self.site, self.read] if keep else []) as seen, _unembedded(model):
            if is_bridge(model):
                with replaced(model.blocks[0], self._watched(model.blocks[0].forward)):
                    cache = bridge_forward(model)(chunk, torch.ones_like(chunk)).past_key_values
            else:
                cache = hooked_cache(model, len(chunk))
                model(chunk, past_kv_cache=cache, attention_mask=torch.ones_like(chunk))
        return cache, {name: held[-1].float() for name, held in seen.items()}

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward that notes whether blocks hand on a tuple."""

        def forward(*arguments: Any, **named: Any) -> Any:
            output = original(*arguments, **named)
            self._single = isinstance(output, tuple)
            return output

        return forward

    def _run(self, rows: int, steps: Tensor | None) -> Columns:
        model = self.model
        clean = steps is None
        wanted = [name for name in (self.read,) if name is not None]
        if clean and not self.at_boundary:
            wanted.append(self.site)
        with ExitStack() as stack:
            if not self.at_boundary and not clean:
                stack.enter_context(_pushed(model, self.site, steps))
            seen = stack.enter_context(_captured(model, wanted))
            final = stack.enter_context(_unembedded(model))
            if clean:
                entering = self._from_the_start(rows)
                self._entering = entering
            else:
                residual = self._entering[:rows]
                if self.at_boundary:
                    residual = residual + steps.to(residual.device, residual.dtype)  # type: ignore[union-attr]
                self._from_entrance(residual)
        found = {name: held[-1][:, -1].float() for name, held in seen.items()}
        here = self._entering[:rows].float() if self.at_boundary else found.get(self.site)
        return Columns(
            site=self._site(here, rows, steps),
            read=None if self.read is None else found[self.read],
            final=final[-1][:, -1].float(),
        )

    def _site(self, here: Tensor | None, rows: int, steps: Tensor | None) -> Tensor:
        clean = self.clean.site[:rows] if here is None else here
        return clean if steps is None else clean + steps.to(clean.device, clean.dtype)

    def _from_the_start(self, rows: int) -> Float[Tensor, "row d_model"]:
        """Runs the clean last column through every block; what entered block `depth`."""
        model, last = self.model, self.tokens[self.member[:rows], -1:]
        held: list[Tensor] = []
        if not is_bridge(model):
            cache = _view(model, self._cache, rows)
            mask = torch.ones_like(last)
            residual = model(
                last, past_kv_cache=cache, attention_mask=mask, stop_at_layer=self.depth
            )[:, -1]
            self._from_entrance(residual)
            return residual
        target = self._target()
        original = target.forward

        def forward(hidden: Tensor, *arguments: Any, **named: Any) -> Any:
            held.append(hidden.detach())
            return original(hidden, *arguments, **named)

        with replaced(target, forward):
            self._bridge(rows)
        return held[-1][:, -1]

    def _from_entrance(self, residual: Float[Tensor, "row d_model"]) -> None:
        """Runs a last column from block `depth` upwards."""
        model = self.model
        if not is_bridge(model):
            cache = _view(model, self._cache, len(residual))
            model(residual[:, None], start_at_layer=self.depth, past_kv_cache=cache)
            return
        stored = residual[:, None]
        target = self._target()
        original = target.forward

        def entrance(_hidden: Tensor, *arguments: Any, **named: Any) -> Any:
            return original(stored, *arguments, **named)

        def hand_on(hidden: Tensor, *_arguments: Any, **_named: Any) -> Any:
            return (hidden,) if self._single else hidden

        with ExitStack() as stack:
            stack.enter_context(replaced(target, entrance))
            for block in model.blocks[: self.depth]:
                stack.enter_context(replaced(block, hand_on))
            self._bridge(len(residual))

    def _target(self) -> nn.Module:
        """The first part that runs under a change."""
        blocks = self.model.blocks
        return blocks[self.depth] if self.depth < len(blocks) else self.model.ln_final

    def _bridge(self, rows: int) -> None:
        last = self.tokens[self.member[:rows], -1:]
        mask = torch.ones(rows, self.width, dtype=torch.long, device=last.device)
        bridge_forward(self.model)(last, mask, _view(self.model, self._cache, rows))


def _check(model: Model, tokens: Tensor) -> None:
    refuse_compiled(model)
    refuse_dropout(model)
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"texts have shape {tuple(tokens.shape)}: [text, pos] with at least two tokens"
        )
    if not layers_carry_only_the_residual(model):
        raise ValueError("blocks of this model hand on more than their residual")
    if lowest_foreign_hook(model) <= len(model.blocks):
        raise ValueError(
            "something is hooked on this model: leave the steer block, or call model.reset_hooks()"
        )


def check_behind(model: Model, site: str, read: str) -> None:
    """Raise ValueError unless a change at `site` can reach `read`."""
    first, second = layer_of(site), layer_of(read)
    words = read.rsplit(".", 1)[-1], site.rsplit(".", 1)[-1]
    if first is None or second is None:
        raise ValueError(f"{site!r} and {read!r} must both lie in blocks")
    behind = second > first or (second == first and (words[0] in AFTER or words[1] in BEFORE))
    if not behind or same_place(model, site, read):
        raise ValueError(
            f"the read site {read!r} does not lie behind {site!r}: nothing could move there"
        )


def _entrance(model: Model, site: str) -> tuple[int, bool]:
    """The first block that a change at `site` reaches, and whether the site is its entrance."""
    layer, word = layer_of(site), site.rsplit(".", 1)[-1]
    if layer is None:
        raise ValueError(f"{site!r} lies in no block: changes enter at a hook point of a block")
    if word in AFTER and same_place(model, site, f"blocks.{layer}.hook_resid_post"):
        return layer + 1, True
    return layer, word in BEFORE


@contextmanager
def _captured(model: Model, names: list[Any]) -> Iterator[dict[str, list[Tensor]]]:
    """What flows past the named sites inside the block, by name."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names if name is not None}
    with ExitStack() as stack:
        for name, held in seen.items():

            def read(_module: Any, _inputs: Any, output: Tensor, held: Any = held) -> None:
                held.append(output.detach())

            handle = resolve(model, name).point.register_forward_hook(read)
            stack.callback(handle.remove)
        yield seen


@contextmanager
def _pushed(model: Model, name: str, steps: Any) -> Iterator[None]:
    """`steps` are added at the site inside the block, one row each."""

    def push(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output + steps.to(output.device, output.dtype)[:, None]

    handle = resolve(model, name).point.register_forward_hook(push)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _unembedded(model: Model) -> Iterator[list[Tensor]]:
    """What would be unembedded inside the block; the unembedding itself does not run."""
    held: list[Tensor] = []

    def forward(residual: Tensor, *_arguments: Any, **_named: Any) -> Tensor:
        held.append(residual.detach())
        return residual[..., :1]

    with replaced(model.unembed, forward):
        yield held


# Caches with room for one column ------------------------------------------------------------------


def _laid_out(model: Model, cache: Any, member: Tensor) -> list[Any]:
    """Per layer, the state of the tokens before the last, on the rows that `member` names."""
    if not is_bridge(model):
        return [
            (_room(e.past_keys[member], 1), _room(e.past_values[member], 1)) for e in cache.entries
        ]
    cache.reorder_cache(member)
    return [
        (_room(layer.keys, 2), _room(layer.values, 2)) if _plain(layer) else layer
        for layer in cache.layers
    ]


def _plain(layer: Any) -> bool:
    from transformers.cache_utils import DynamicLayer

    return type(layer) is DynamicLayer and layer.is_initialized


def _room(held: Tensor, axis: int) -> Tensor:
    """`held` with one more place along the axis of positions."""
    shape = list(held.shape)
    shape[axis] += 1
    wide = held.new_zeros(shape)
    wide.narrow(axis, 0, held.shape[axis]).copy_(held)
    return wide


def _view(model: Model, laid_out: list[Any], rows: int) -> Any:
    """A cache of the first rows that can take one column; it may be used once."""
    if not is_bridge(model):
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        entries = [_HookedColumn(keys[:rows], values[:rows]) for keys, values in laid_out]
        keys = laid_out[0][0]
        mask = torch.ones((rows, keys.shape[1] - 1), dtype=torch.int, device=keys.device)
        return TransformerLensKeyValueCache(entries, mask)  # type: ignore[arg-type]
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    cache.layers = [
        _bridge_column(layer[0], layer[1], rows)
        if isinstance(layer, tuple)
        else _copied(layer, rows)
        for layer in laid_out
    ]
    return cache


class _HookedColumn:
    """One layer's cache entry of a HookedTransformer: the new column goes into the last place."""

    frozen = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.past_keys, self.past_values = keys[:, :-1], values[:, :-1]

    def append(self, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[:, -1:], self.values[:, -1:] = new_keys, new_values
        return self.keys, self.values


def _bridge_column(keys: Tensor, values: Tensor, rows: int) -> Any:
    """One layer of a Hugging Face cache: the new column goes into the last place."""
    from transformers.cache_utils import DynamicLayer

    class Column(DynamicLayer):
        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            del args, kwargs
            keys[:rows, :, -1:], values[:rows, :, -1:] = key_states, value_states
            return keys[:rows], values[:rows]

    layer = Column()
    layer.keys, layer.values = keys[:rows, :, :-1], values[:rows, :, :-1]
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    return layer


def _copied(layer: Any, rows: int) -> Any:
    """A layer's state of the first rows, sharing no tensor with the original."""

    def own(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (value[:rows] if value.ndim else value).clone()
        if isinstance(value, list):
            return [own(one) for one in value]
        if isinstance(value, dict):
            return {key: own(one) for key, one in value.items()}
        return value

    fresh = copy.copy(layer)
    for name, value in vars(layer).items():
        setattr(fresh, name, own(value))
    return fresh


__all__ = ["Columns", "ContextRows", "check_behind"]
