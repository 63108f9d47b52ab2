"""Hooks for training: what flows through a hook point, or flows back through it, is changed while a
model learns, and nothing stays behind afterwards.

                            forward                backward
    ConceptGradientEdit     unchanged              concepts' share rescaled
    ConceptAblation         concepts taken out     concepts taken out
    PreventativeSteering    a vector added         unchanged

All three are put on a host's own `HookPoint`s, so they work in a plain training loop, under peft
and inside a Hugging Face `Trainer` (`training_callback`). Sources: CAFT, arXiv 2507.16795
(ablation); persona vectors, arXiv 2507.21509 (preventative steering); section 5 of
shared/methods/gradient_projection (gradient edit, no paper has it). Editing a gradient suppresses a
concept only where every path from trained weights to the loss passes the edited place; what leaks
past it is measured by `runs.updates.Leak`, and what a loop teaches while it runs is recorded by
`runs.learning_record.GradientRecord`, a hook of the same kind.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_steering_plugin.adapters.sae_parts import (
    LINEAR,
    RANKED,
    RECTIFIED,
    RUN_TIME_SCALES,
    THRESHOLDED,
    TRANSCODERS,
    architecture,
    decoder_rows,
    site_names,
    whole_codes,
)
from sae_steering_plugin.adapters.transformer_lens import (
    Model,
    Site,
    is_bridge,
    refuse_compiled,
    resolve,
    tell_of_a_branch,
)
from sae_steering_plugin.concepts.maps import ConceptBasis, concept_basis
from sae_steering_plugin.types import SteeringVector, Unit

Change = Callable[[Tensor, Tensor | None], Tensor]
"""`(activation, where) -> activation`; `where` [batch pos] marks positions, None all of them."""


@runtime_checkable
class TrainingHook(Protocol):
    """Something that changes what flows through one hook point while a model is trained."""

    @property
    def hook_name(self) -> str: ...

    def prepare(self, *, dtype: torch.dtype, device: torch.device) -> Change: ...


@dataclass(frozen=True, eq=False)
class ConceptGradientEdit:
    """Rescales concepts of the gradient that flows back through the SAE's hook point.

    `scales` gives a factor per latent: 0 suppresses, 1 leaves, 2 doubles, -1 reverses. The forward
    value does not change. Correlated rows are handled by least-squares coordinates
    (`concept_basis`): the part of the gradient outside their span is untouched. With `when_active`
    a latent's factor acts only at positions where it fires.

    Raises ValueError for a latent outside the SAE, more latents than half the width, and rows so
    alike that their factors contradict one another.
    """

    sae: Any
    scales: Mapping[int, float]
    when_active: bool = False

    def __post_init__(self) -> None:
        latents = list(self.scales)
        dropped = basis_of(self.sae, latents).dropped
        if dropped:
            names = ", ".join(str(latents[place]) for place in dropped)
            raise ValueError(
                f"latents {names} have nearly the rows of others in the set: leave them out"
            )

    @property
    def hook_name(self) -> str:
        return site_names(self.sae)[1]

    def prepare(self, *, dtype: torch.dtype, device: torch.device) -> Change:
        latents = list(self.scales)
        basis = basis_of(self.sae, latents)
        rows, dual = (part.to(dtype=dtype, device=device) for part in (basis.rows, basis.dual))
        less = torch.tensor([self.scales[j] - 1 for j in latents], dtype=dtype, device=device)

        def change(x: Tensor, where: Tensor | None) -> Tensor:
            # Zero in value; its gradient is the gradient that flows back, taken through the map.
            echo = x - x.detach()
            factors = less
            if self.when_active:
                with torch.no_grad():
                    fires = whole_codes(self.sae, x.detach().float())[..., latents] != 0
                factors = less * fires.to(dtype)
            if where is not None:
                factors = factors * where[..., None].to(dtype)
            return x.detach() + echo + ((echo @ rows.T) * factors) @ dual

        return change


@dataclass(frozen=True, eq=False)
class ConceptAblation:
    """Takes the span of some decoder rows out of the activation: Concept Ablation Fine-Tuning.

    h <- h - (h Q) Q' with Q an orthonormal basis of the rows (arXiv 2507.16795), forward and
    backward. Raises ValueError as `ConceptGradientEdit` does.
    """

    sae: Any
    latents: Sequence[int]

    def __post_init__(self) -> None:
        basis_of(self.sae, self.latents)

    @property
    def hook_name(self) -> str:
        return site_names(self.sae)[1]

    def prepare(self, *, dtype: torch.dtype, device: torch.device) -> Change:
        q = basis_of(self.sae, self.latents).orthonormal().to(dtype=dtype, device=device)

        def change(x: Tensor, where: Tensor | None) -> Tensor:
            taken = (x @ q) @ q.T
            return x - (taken if where is None else taken * where[..., None].to(dtype))

        return change


@dataclass(frozen=True, eq=False)
class PreventativeSteering:
    """Adds a vector while the model is trained, so that training need not install what it names.

    The unwanted direction is added during training and left out afterwards (arXiv 2507.21509).
    `strength` is in `unit`, as everywhere.
    """

    vector: SteeringVector
    strength: float
    unit: Unit = "norm"

    def __post_init__(self) -> None:
        self.vector.displacement(self.strength, self.unit)

    @property
    def hook_name(self) -> str:
        return self.vector.hook_name

    def prepare(self, *, dtype: torch.dtype, device: torch.device) -> Change:
        length = self.vector.displacement(self.strength, self.unit)
        step = (self.vector.direction * length).to(dtype=dtype, device=device)

        def change(x: Tensor, where: Tensor | None) -> Tensor:
            return x + (step if where is None else step * where[..., None].to(dtype))

        return change


@dataclass(eq=False)
class LiveHook:
    """A hook that is on a model. `where` [batch pos], or [batch 1] for whole examples, limits it.

    Set `where` before a forward pass, None for all positions again. `fired` counts the passes.
    """

    hook: TrainingHook
    site: str
    where: Bool[Tensor, "batch pos"] | None = None
    fired: int = 0
    _changes: dict[tuple[torch.dtype, torch.device], Change] = field(default_factory=dict)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        if torch.is_inference_mode_enabled():
            raise RuntimeError("training hooks act on a model that learns: leave inference_mode")
        key = (output.dtype, output.device)
        if key not in self._changes:
            self._changes[key] = self.hook.prepare(dtype=output.dtype, device=output.device)
        where = self.where
        if where is not None:
            if where.shape[0] != output.shape[0] or where.shape[1] not in (1, output.shape[1]):
                raise ValueError(
                    f"where is {tuple(where.shape)} and the activation {tuple(output.shape)}: give "
                    "[batch pos] or [batch 1]"
                )
            where = where.to(output.device)
        self.fired += 1
        return self._changes[key](output, where)


def gradient_site(model: Model, hook_name: str) -> Site:
    """The live site of a hook point that gradients are read or changed at.

    Warns where that is a branch of the stream (`tell_of_a_branch`). Raises ValueError where an SAE
    is attached: its error term cuts the gradient (shared/methods/gradient_projection section 9).
    """
    site = resolve(model, hook_name)
    if site.sae is not None:
        raise ValueError(
            f"an SAE is attached at {site.name!r}: gradients do not pass its error term; detach it "
            "first"
        )
    tell_of_a_branch(hook_name, site)
    return site


@contextmanager
def training_hooks(
    model: Model, hooks: TrainingHook | Sequence[TrainingHook]
) -> Iterator[list[LiveHook]]:
    """Put training-time hooks on a model for as long as the block lasts.

    Yields one `LiveHook` per hook, in order; hooks of one site act one after another. Everything is
    taken off at the end, also after an exception. The block belongs around forward *and* backward
    (activation checkpointing runs the forward pass again), and not around an evaluation: a pass
    without gradients warns. Raises RuntimeError for a compiled model and for
    a hook that never fired, ValueError where an SAE is attached at the site: its error term cuts
    the gradient (shared/methods/gradient_projection section 9).
    """
    refuse_compiled(model)
    wanted = [hooks] if not isinstance(hooks, Sequence) else list(hooks)
    if not wanted:
        raise ValueError("no training hook is given")
    live = []
    with ExitStack() as stack:
        for hook in wanted:
            site = gradient_site(model, hook.hook_name)
            one = LiveHook(hook, site.name)
            stack.callback(site.point.register_forward_hook(one).remove)
            live.append(one)
        inner = model.original_model if is_bridge(model) else model
        stack.callback(inner.register_forward_pre_hook(warn_without_gradients).remove)
        yield live
    silent = [one.site for one in live if not one.fired]
    if silent:
        raise RuntimeError(f"the training hook at {silent[0]!r} never fired: no forward pass ran")


def warn_without_gradients(module: nn.Module, inputs: Any) -> None:  # noqa: ARG001
    """Warn of a pass that nothing can learn from: an evaluation belongs outside the block."""
    if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        warnings.warn(
            "a forward pass without gradients ran under training hooks: evaluate outside the block",
            stacklevel=2,
        )


def training_callback(
    model: Model,
    hooks: TrainingHook | Sequence[TrainingHook],
    *,
    measure: Callable[[int], Any] | None = None,
    every: int = 50,
) -> Any:
    """A Hugging Face `TrainerCallback` that keeps the hooks on `model` while it is trained.

    `model` is the bridge; the trainer gets `model.original_model`, in which the bridge's hook
    points live. `measure(step)`, such as that of `runs.updates.Leak`, is called after every `every`
    steps with the hooks off. The hooks come off when training ends or `callback.close()` is called.
    """
    from transformers import TrainerCallback

    class TrainingHooks(TrainerCallback):
        def __init__(self) -> None:
            self.stack = ExitStack()
            self.live: list[LiveHook] = []
            self.off = True

        def on_train_begin(self, *arguments: Any, **named: Any) -> None:  # noqa: ARG002
            self.live = self.stack.enter_context(training_hooks(model, hooks))
            self.off = False

        def on_step_begin(self, *arguments: Any, **named: Any) -> None:  # noqa: ARG002
            if self.off:
                self.on_train_begin()

        def on_step_end(self, args: Any, state: Any, *others: Any, **named: Any) -> None:  # noqa: ARG002
            if measure is None or state.global_step % every:
                return
            self.close()
            inner = model.original_model if is_bridge(model) else model
            learning = inner.training
            inner.eval()
            measure(state.global_step)
            inner.train(learning)

        def on_train_end(self, *arguments: Any, **named: Any) -> None:  # noqa: ARG002
            self.close()

        def close(self) -> None:
            self.off = True
            self.stack.close()

    return TrainingHooks()


def basis_of(sae: Any, latents: Sequence[int]) -> ConceptBasis:
    """The basis of the latents' decoder rows.

    Raises ValueError for no latent, a repeated one, one outside the SAE, and as `concept_basis`.
    """
    width, latents = sae.W_dec.shape[0], list(latents)
    if not latents:
        raise ValueError("no latent is given")
    if len(set(latents)) != len(latents):
        raise ValueError("a latent is named twice")
    wrong = [j for j in latents if not 0 <= j < width]
    if wrong:
        raise ValueError(f"latent {wrong[0]} is outside 0..{width - 1} of this SAE")
    return concept_basis(decoder_rows(sae, latents).cpu())


def linear_decoder(sae: Any) -> tuple[Float[Tensor, "latent d_model"], Float[Tensor, " d_model"]]:
    """Rows and bias with which `decode(z) = z @ rows + bias`, on the CPU in float32.

    Raises ValueError for a dictionary whose decode is not that: run-time normalisation,
    transcoders, and codes that hang on other positions.
    """
    word, kind = architecture(sae), sae.cfg.normalize_activations
    if kind in RUN_TIME_SCALES:
        raise ValueError(
            f"this SAE normalises activations at run time ({kind}): its codes are not linear "
            "coordinates of the residual; fold the scale (sae.fold_activation_norm_scaling_factor) "
            "or use another SAE"
        )
    if word in TRANSCODERS or word not in RECTIFIED | THRESHOLDED | RANKED | LINEAR:
        raise ValueError(f"a dictionary of architecture {word!r} has no linear decode at its site")
    return decoder_rows(sae).cpu(), sae.b_dec.detach().float().cpu()
