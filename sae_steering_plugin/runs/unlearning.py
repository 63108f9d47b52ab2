"""Unlearning arms that change weights, and the check whether a little training brings a topic back.

The arms without training are edits: `Clamp(..., above=)`, and `Fuzz` behind a gate, on features of
`features.forget.forget_features`. What is here trains in place; keep a copy of the weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_steering_plugin.adapters.activations import TokenBatch
from sae_steering_plugin.adapters.learning import as_before, learning_logits
from sae_steering_plugin.adapters.transformer_lens import Model, resolve
from sae_steering_plugin.concepts.curvature import KroneckerFactors
from sae_steering_plugin.edits.fuzz import rmu_direction
from sae_steering_plugin.types import Edit

RMU_ALPHA = 1200.0
"""Weight of the retain loss (defaults of a public replication of RMU, zephyr-7b)."""


@contextmanager
def captured(model: Model, hook_name: str) -> Iterator[dict[str, Tensor]]:
    """Inside, `["x"]` is what flowed past the hook point in the last forward pass, with its
    graph."""
    found: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: object) -> None:
        del hook
        found["x"] = x

    with model.hooks(fwd_hooks=[(resolve(model, hook_name).name, keep)]):
        yield found


def site_activations(
    model: Model, hook_name: str, batch: TokenBatch
) -> Float[Tensor, "token d_model"]:
    """Activations at a hook point with their graph, at real tokens but a leading BOS."""
    with captured(model, hook_name) as found:
        learning_logits(model, batch)
    return found["x"][batch.counted.to(found["x"].device)]


def train_rmu(
    model: Model,
    hook_name: str,
    forget: Sequence[TokenBatch],
    retain: Sequence[TokenBatch],
    parameters: Sequence[nn.Parameter],
    *,
    length: float = 6.5,
    alpha: float = RMU_ALPHA,
    steps: int = 250,
    learning_rate: float = 5e-5,
    seed: int = 0,
) -> Float[Tensor, " d_model"]:
    """Train `parameters` in place by RMU and give back the target u.

        loss = mean (h(forget) - u)^2 + alpha mean (h(retain) - h_0(retain))^2

    h is the activation at `hook_name`, h_0 that of the model as it came, u `length` mean norms of
    it long, in a random direction of the positive orthant, one for all tokens. Batches are taken in
    turn. Raises ValueError without batches or parameters, and for parameters the site does not
    depend on. Source: RMU (Li et al. 2024, WMDP) by the code of a public replication, where the
    parameters are the MLP down projections of the site's layer and the two before; measuring
    `length` in mean norms is this project's.
    """
    if not forget or not retain or not parameters:
        raise ValueError("RMU needs forget batches, retain batches and parameters to train")
    with torch.no_grad():
        before = [site_activations(model, hook_name, batch) for batch in retain]
    norm = float(torch.cat(before).norm(dim=1).mean())
    direction = rmu_direction(before[0].shape[1], generator=torch.Generator().manual_seed(seed))
    target = length * norm * direction.to(before[0])
    with as_before(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
        for step in range(steps):
            place = step % len(retain)
            scrambled = site_activations(model, hook_name, forget[step % len(forget)])
            if not scrambled.requires_grad:
                raise ValueError(f"{hook_name!r} does not depend on the parameters to train")
            kept = site_activations(model, hook_name, retain[place])
            loss = (scrambled - target).square().mean()
            loss = loss + alpha * (kept - before[place]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return target


def next_token_loss(
    model: Model, batch: TokenBatch, edits: Sequence[Edit] = ()
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the tokens after the first, with gradients, under edits."""
    logits = learning_logits(model, batch, edits)[:, :-1]
    wanted = batch.tokens[:, 1:].to(logits.device)
    real = batch.real[:, 1:].to(logits.device)
    return nn.functional.cross_entropy(logits[real], wanted[real])


def relearn(
    model: Model,
    batches: Sequence[TokenBatch],
    measure: Callable[[], float],
    *,
    edits: Sequence[Edit] = (),
    steps: int = 20,
    every: int = 5,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> dict[int, float]:
    """`measure()` before, during and after a few steps of fine-tuning on batches; step -> figure.

    All weights are trained by AdamW with the edits in place, and put back afterwards. What returns
    on texts that were not trained on was hidden, not gone.
    """
    if not batches:
        raise ValueError("relearning needs a batch")
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    rng, found = random.Random(seed), {0: measure()}
    try:
        with as_before(model):
            model.requires_grad_(True)
            optimizer = torch.optim.AdamW(
                list(model.parameters()), lr=learning_rate, weight_decay=0.0
            )
            for step in range(1, steps + 1):
                loss = next_token_loss(model, rng.choice(batches), edits)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if step % every == 0 or step == steps:
                    found[step] = measure()
    finally:
        model.load_state_dict(weights)
    return found


def collect_factors(
    layers: Mapping[str, nn.Module], losses: Iterator[tuple[Tensor, Tensor]]
) -> dict[str, KroneckerFactors]:
    """Curvature factors of linear layers over the passes behind `losses`. Experimental.

    Each item is a summed loss with its graph and a mask `[batch, pos]` of the tokens that count;
    the iterator makes the forward pass, this runs the backward one. Inputs and outputs of a layer
    are `[batch, pos, ...]`. Raises RuntimeError for a layer that no pass ran through, ValueError
    without a loss. Source: arXiv 2510.24256; its Fisher variant draws the labels from the model.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    gradients: dict[str, Tensor] = {}
    factors: dict[str, KroneckerFactors] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            del module
            seen[name] = (arguments[0].detach(), output)
            output.register_hook(lambda g: gradients.__setitem__(name, g.detach()))

        return keep

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        for loss, mask in losses:
            loss.backward()
            for name in layers:
                if name not in gradients:
                    raise RuntimeError(f"no gradient reached layer {name!r}")
                x, g = seen[name][0][mask], gradients[name][mask]
                if name not in factors:
                    factors[name] = KroneckerFactors.empty(x.shape[-1], g.shape[-1])
                factors[name].add(x, g)
            seen.clear()
            gradients.clear()
    finally:
        for handle in handles:
            handle.remove()
    if not factors:
        raise ValueError("no loss was given, so there is no curvature")
    return factors


def relative_score(score: float, before: float, chance: float = 0.0) -> float:
    """What is left of a score: 1 as before, 0 at chance; NaN when nothing was there before."""
    return (score - chance) / (before - chance) if before != chance else math.nan
