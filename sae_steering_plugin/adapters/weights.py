"""Steering as a change of weights: where a hook and an edit of parameters are the same function.

    place of the edit, every position                     parameter that takes it
    blocks.l.hook_resid_post, blocks.l+1.hook_resid_pre   blocks.l.mlp.b_out
    the same, parallel block or block without an MLP      blocks.l.attn.b_O serves too
    blocks.l.hook_resid_mid, blocks.l.hook_attn_out       blocks.l.attn.b_O
    blocks.l.hook_mlp_out                                 blocks.l.mlp.b_out
    blocks.0.hook_resid_pre                               each row of W_pos; of W_E without one
    blocks.l.attn.hook_z, v [head, d_head]                blocks.l.attn.b_O += sum_h v_h W_O[h]
    ProjectOut at every stage of the residual             all that write to it, times (I - Q Q')

A bias depends on neither token nor position, so nothing else converts. Source: algebra of
shared/methods/neighbouring_systems, section a.4. What the rules above give is run once beside the
hooks on a short text before it is handed out, so that an architecture which does more to an output
than they know of is refused and not converted wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_steering_plugin.adapters.parameters import (
    Place,
    Slot,
    carried_sites,
    child,
    exact,
    place_of,
    post_norm,
    residual_sites,
    slots_of,
    writer_of,
)
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.adapters.steering import as_edits
from sae_steering_plugin.adapters.transformer_lens import (
    Model,
    bos_token,
    layer_of,
    refuse_compiled,
    resolve,
)
from sae_steering_plugin.edits.codes import CodeChange, constant_step
from sae_steering_plugin.edits.gate import Gated
from sae_steering_plugin.edits.project import PreparedProjection, ProjectOut
from sae_steering_plugin.edits.shift import Add
from sae_steering_plugin.types import Change, Edit, Positions, SteeringVector

EVERYWHERE = Positions(bos=True)
"""Every token of a text, its leading BOS too: where a bias acts."""
Steering = SteeringVector | Edit | Change | Sequence[SteeringVector | Edit | Change]

CHECK_TOKENS = 12
"""Tokens of the text that an edit is checked on."""
SAME_SHARE = 1e-3
"""An edit of weights may miss this share of what the hook does to the logits, besides rounding."""


class NotConvertible(ValueError):
    """No change of parameters is the same function as the edit; the message says why."""


@dataclass(eq=False)
class WeightEdit:
    """Deltas for named parameters of one model, in TransformerLens's names and layouts.

    `apply()` puts them in and gives the edit back, so that `with edit.apply(): ...` takes them out
    again; `revert()` does so by hand. The model then holds the very parameters it held before.
    Parameters that were changed in between are left alone, with RuntimeError.
    """

    model: Model = field(repr=False)
    deltas: tuple[tuple[str, Tensor], ...]
    _held: list[tuple[Slot, nn.Parameter | None, nn.Parameter]] | None = field(
        default=None, repr=False
    )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.deltas)

    def apply(self) -> WeightEdit:
        """The same edit, in effect. Raises RuntimeError when it is already, or for a compiled
        model."""
        if self._held is not None:
            raise RuntimeError("this weight edit is applied already: revert() it first")
        refuse_compiled(self.model)
        slots = slots_of(self.model)
        moved = [(slots[name], slots[name].moved(delta)) for name, delta in self.deltas]
        self._held = [(slot, slot.held, new) for slot, new in moved]
        for slot, new in moved:
            slot.put(new)
        return self

    def revert(self) -> None:
        """Every parameter as it was, bit for bit (the same objects)."""
        if self._held is None:
            raise RuntimeError("this weight edit is not applied: nothing to revert")
        for slot, _, new in self._held:
            if slot.held is not new:
                raise RuntimeError(
                    f"{slot.name} was replaced after this edit: revert the later edits first"
                )
        for slot, old, _ in self._held:
            slot.put(old)
        self._held = None

    def __enter__(self) -> WeightEdit:
        return self if self._held is not None else self.apply()

    def __exit__(self, *error: object) -> None:
        self.revert()

    def as_state_dict(self) -> dict[str, Tensor]:
        """The edited parameters, at least float32: `load_state_dict(..., strict=False)` of a
        `HookedTransformer` of the same weights takes them."""
        before = {slot.name: (slot, old) for slot, old, _ in self._held or ()}
        slots, out = slots_of(self.model), {}
        for name, delta in self.deltas:
            slot, old = before.get(name, (slots[name], slots[name].held))
            base = torch.zeros(()) if old is None else slot.from_host(exact(old))
            out[name] = (base + delta.to(base.device)).contiguous()
        return out

    def __repr__(self) -> str:
        listed = ", ".join(f"{name} {tuple(delta.shape)}" for name, delta in self.deltas)
        return f"WeightEdit({'applied, ' if self._held is not None else ''}{listed})"


def to_bias_edit(model: Model, edits: Steering) -> WeightEdit:
    """The change of the model's parameters that is the same function as `edits`, for every text.

    `edits` is a `SteeringVector` (added once, at every token), an `Edit`, or several. An `Edit`
    must act at every token, the leading BOS too: `Edit(Add(vector),
    positions=Positions(bos=True))`. Edits of one place are summed; edits of several places go into
    several parameters. Projections convert as a whole: `ProjectOut` of one basis, strength 1, at
    all of `residual_sites(model)`.

    Raises NotConvertible, with the reason, for everything else, and with the sites that do convert
    where the architecture is the reason; KeyError for an unknown hook point. Costs three forward
    passes over twelve tokens.
    """
    listed = everywhere(model, edits)
    projections = [edit for edit in listed if isinstance(edit.change, ProjectOut)]
    if projections and len(projections) < len(listed):
        raise NotConvertible(
            "projections and additions do not commute: convert one of them, apply() it, and "
            "convert the other on the model as it is then"
        )
    deltas = projected(model, listed) if projections else added(model, listed)
    found = WeightEdit(model, tuple(deltas.items()))
    require_same(model, listed, found)
    return found


def everywhere(model: Model, edits: Steering) -> list[Edit]:
    """`edits` as a list that acts at every token of every row, or NotConvertible."""
    given = [edits] if isinstance(edits, SteeringVector | Edit | Change) else list(edits)
    listed = as_edits(
        [Edit(Add(e), positions=EVERYWHERE) if isinstance(e, SteeringVector) else e for e in given]
    )
    if not listed:
        raise ValueError("there is no edit to convert")
    for edit in listed:
        _refuse_conditions(model, edit)
    return listed


def _refuse_conditions(model: Model, edit: Edit) -> None:
    name = type(edit.change).__name__
    if isinstance(edit.change, Gated):
        raise NotConvertible(
            "a gated edit acts only where its conditions hold; weights act on every text"
        )
    whole = edit.positions.everything and (edit.positions.bos or bos_token(model) is None)
    if not whole:
        raise NotConvertible(
            f"{name} acts at positions {edit.positions}, and weights act at every token, a leading "
            "BOS and padding among them: give the edit positions=Positions(bos=True)"
        )
    if edit.rows is not None or edit.change.batch_rows != 1:
        raise NotConvertible(f"{name} differs between batch rows; weights are the same for all")


def constant_of(edit: Edit) -> Float[Tensor, " width"]:
    """What the edit adds wherever it acts, float32; NotConvertible when that depends on the
    activation."""
    change, step = edit.change, None
    if isinstance(change, Add):
        step = change.step()
    elif isinstance(change, CodeChange):
        step = constant_step(change, "cpu")
    else:
        step = change.prepare(dtype=torch.float32, device="cpu").constant
    if step is not None:
        return step.detach().float().cpu().reshape(-1)
    name = type(change).__name__
    if isinstance(change, ProjectOut):
        raise NotConvertible(
            "what a projection removes depends on the activation; it is one of weights only at all "
            "of residual_sites(model) together, with strength 1"
        )
    raise NotConvertible(
        f"what {name} adds depends on the activation it meets (the codes, or the length, at that "
        "token); a bias is the same for every token"
    )


def added(model: Model, edits: Sequence[Edit]) -> dict[str, Tensor]:
    """The deltas of constant additions, summed per parameter."""
    slots, deltas = slots_of(model), dict[str, Tensor]()
    for edit in edits:
        step = constant_of(edit)
        slot, place = target_of(model, slots, edit.site)
        if place.kind == "z":
            matrix = slots[slot.name.replace("b_O", "W_O")].value().flatten(0, -2).cpu()
            _refuse_width(step, len(matrix), edit.site)
            step = step.to(matrix.dtype) @ matrix
        _refuse_width(step, slot.shape[-1], edit.site)
        rows = step.expand(slot.shape)
        deltas[slot.name] = deltas[slot.name] + rows if slot.name in deltas else rows
    return deltas


def _refuse_width(step: Tensor, width: int, site: str) -> None:
    if len(step) != width:
        raise ValueError(
            f"the vector has {len(step)} entries, the activation at {site} has {width}: it was "
            "built for another model or site"
        )


def target_of(model: Model, slots: Mapping[str, Slot], hook_name: str) -> tuple[Slot, Place]:
    """The parameter that stands for a hook point, and the place that it is; or NotConvertible."""
    if resolve(model, hook_name).sae is not None:
        raise NotConvertible(
            f"an SAE is spliced in at {hook_name}, and what flows on is its reconstruction: call "
            "model.reset_saes() first"
        )
    place = place_of(model, hook_name)
    slot = None if place is None else writer_of(model, slots, place)
    if place is not None and slot is not None:
        return slot, place
    layer = layer_of(hook_name)
    why = "no parameter is added to the residual there"
    if layer is not None and post_norm(model, model.blocks[layer]):
        why = "the block normalises what it adds, and a bias would pass through that norm"
    elif place is not None and place.kind == "mid":
        why = "on a bridge it is the input of the MLP's norm alone, so what is added there goes no "
        why += "further (hook_attn_out adds to the residual itself)"
    elif place is not None:
        why = "the block has no single output projection there (experts)"
    sites = carried_sites(model)
    near = [site for site in sites if layer_of(site) == layer] or sites
    raise NotConvertible(f"{hook_name}: {why}. Sites that convert: {', '.join(near)}")


def projected(model: Model, edits: Sequence[Edit]) -> dict[str, Tensor]:
    """The deltas W (I - Q Q') - W of every parameter that writes to the residual."""
    basis: Tensor | None = None
    for edit in edits:
        one = edit.change.prepare(dtype=torch.float32, device="cpu")
        assert isinstance(one, PreparedProjection)
        other = one.basis.double()
        basis = other if basis is None else basis
        if bool((one.strength != 1).any()):
            raise NotConvertible(
                f"a projection of strength {float(one.strength.flatten()[0]):g} acts again at "
                "every stage of the residual; only strength 1, which acts once, is one of weights"
            )
        if not torch.allclose(other @ other.T, basis @ basis.T, atol=1e-5):
            raise NotConvertible("the projections remove different subspaces: give one basis")
    assert basis is not None
    _require_every_stage(model, edits)
    slots = slots_of(model)
    for layer, block in enumerate(model.blocks):
        writers = [f"blocks.{layer}.{part}" for part in ("attn.W_O", "linear_attn.W_out")]
        wanted = [[name for name in writers if name in slots]]
        if child(block, "mlp") is not None:
            wanted.append([n for n in [f"blocks.{layer}.mlp.W_out"] if n in slots])
        if post_norm(model, block) or not all(wanted):
            reason = "normalises its outputs" if post_norm(model, block) else "has other writers"
            raise NotConvertible(
                f"block {layer} {reason} (experts, or an output norm): its weights cannot take the "
                "projection"
            )
    deltas = {}
    for name, slot in slots.items():
        if slot.held is not None:
            value = slot.value().double()
            delta = -(value @ basis.to(value.device)) @ basis.T.to(value.device)
            deltas[name] = delta.to(slot.value().dtype)
    return deltas


def _require_every_stage(model: Model, edits: Sequence[Edit]) -> None:
    places = {site: place_of(model, site) for site in residual_sites(model)}
    given = [place_of(model, edit.site) for edit in edits]
    missing = [site for site, place in places.items() if place not in given]
    if missing:
        raise NotConvertible(
            f"the projection is not made at {missing[0]} ({len(missing)} of {len(places)} stages "
            "of the residual lack it): put it at all of residual_sites(model)"
        )
    odd = [e.site for e, place in zip(edits, given, strict=True) if place not in places.values()]
    if odd:
        raise NotConvertible(f"{odd[0]} is no stage of the residual stream: leave it out")


def require_same(model: Model, edits: Sequence[Edit], found: WeightEdit) -> None:
    """Raise NotConvertible unless hooks and weights give the same logits on one short text."""
    tokens = check_text(model)
    plain = steered_logits(model, tokens)
    hooked = steered_logits(model, tokens, list(edits), require=False)
    with found.apply():
        weighed = steered_logits(model, tokens)
    missed = float((hooked - weighed).abs().max())
    rounding = 64 * torch.finfo(plain.dtype).eps * float(plain.abs().max())
    allowed = SAME_SHARE * float((hooked - plain).abs().max()) + rounding
    if not missed <= allowed:
        raise NotConvertible(
            f"hooks and weights differ by {missed:.3g} in a logit on a test text ({allowed:.3g} "
            "would be rounding): this architecture does more to the output than adding it"
            + ("; the model is in training mode: call model.eval()" if model.training else "")
        )


def check_text(model: Model) -> Int[Tensor, "1 pos"]:
    """The text that conversions are checked on: random tokens, the same in every call."""
    length = min(CHECK_TOKENS, model.cfg.n_ctx or CHECK_TOKENS)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.cfg.d_vocab, (1, length), generator=generator)


__all__ = [
    "EVERYWHERE",
    "NotConvertible",
    "WeightEdit",
    "carried_sites",
    "constant_of",
    "everywhere",
    "residual_sites",
    "to_bias_edit",
]
