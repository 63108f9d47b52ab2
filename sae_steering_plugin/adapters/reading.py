"""Reading a hook point during forward passes that happen anyway: `reading(model, site, see)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sae_steering_plugin.adapters.calls import Observer
from sae_steering_plugin.adapters.transformer_lens import Model, refuse_compiled, resolve
from sae_steering_plugin.types import ALL, LAST

See = Callable[[Tensor, Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"]], None]
"""`see(x, counted, final)`: activations, real tokens but a leading BOS, last tokens of prompts."""


@contextmanager
def reading(model: Model, hook_name: str, see: See) -> Iterator[None]:
    """Inside the block, every forward pass of the model hands what flows past the site to `see`.

    Nothing is changed. Padding and a leading BOS are not counted; every token is seen once, with
    and without cache. Edits that were put on the site before the block are seen in effect. Raises
    what `resolve` raises for a bad name; RuntimeError, in the pass, when the site fires outside the
    model's own forward pass or on rows that stand for others.
    """
    refuse_compiled(model)
    point = resolve(model, hook_name).point
    observer = Observer.of(model)
    observer.hold()

    def read(module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
        frame = observer.frame
        if frame is None or frame.member is not None:
            raise RuntimeError(
                f"{hook_name} fired outside a forward pass of the model, or on rows computed once "
                "for several: call the model itself"
            )
        masks = [_mask(frame.keep(rule, None, output, None), output) for rule in (ALL, LAST)]
        see(output.detach(), *masks)

    handle = point.register_forward_hook(read)
    try:
        yield
    finally:
        handle.remove()
        observer.release()


def _mask(keep: Tensor | bool, x: Tensor) -> Tensor:
    if isinstance(keep, bool):
        return torch.full(x.shape[:2], keep, device=x.device)
    return keep[..., 0]


__all__ = ["See", "reading"]
