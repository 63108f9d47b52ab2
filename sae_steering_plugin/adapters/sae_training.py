"""Training SAEs on a model's residual stream by SAELens's own runner.

The residuals are computed once per model and shared by all SAEs: each text stands alone in its
row, padding and BOS are left out, and the order is shuffled. The runner replaces the handlers of
SIGINT and SIGTERM; they are put back.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SAESpec:
    """One SAE to train: where, which architecture, how wide, how sparse, for how long.

    `architecture` is "topk", "jumprelu" (trained as BatchTopK and saved as JumpReLU) or "standard"
    (ReLU with an L1 penalty). `sparsity` is k for the first two, the L1 coefficient for the last.
    """

    name: str
    hook_name: str
    architecture: str
    d_sae: int
    sparsity: float | int
    tokens: int
    learning_rate: float = 1e-3
    batch_tokens: int = 1024


def residuals(
    model: Any, rows: Sequence[Sequence[int]], hook_names: Sequence[str], *, batch_size: int = 32
) -> dict[str, Float[Tensor, "token d_model"]]:
    """The residuals of every token but BOS of each row, row after row, at each hook point.

    Rows are run in batches of like length, so tokens come in order of row length.
    """
    from .transformer_lens import bos_token, resolve

    bos, ordered = bos_token(model), sorted(rows, key=len)
    sites = {name: resolve(model, name) for name in hook_names}
    kept: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        real = torch.zeros(len(batch), longest, dtype=torch.bool)
        for place, row in enumerate(batch):
            ids[place, : len(row)] = torch.tensor(row)
            real[place, : len(row)] = True
        real &= ids != bos
        caught: dict[str, Tensor] = {}

        def catch(x: Tensor, hook: Any, caught: dict[str, Tensor] = caught) -> None:
            caught[hook.name] = x

        with torch.no_grad(), model.hooks(fwd_hooks=[(s.name, catch) for s in sites.values()]):
            model(ids, return_type=None)
        for name, site in sites.items():
            kept[name].append(caught[site.name][real].float())
    return {name: torch.cat(parts) for name, parts in kept.items()}


class Recorded(Iterator[Tensor]):
    """Endless shuffled batches of recorded residuals: what the runner's activation store gives."""

    exclude_special_tokens = None

    def __init__(self, x: Float[Tensor, "token d_model"], batch_tokens: int, seed: int) -> None:
        self.x, self.batch_tokens = x, min(batch_tokens, len(x))
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def __next__(self) -> Float[Tensor, "token d_model"]:
        if len(self.order) < self.batch_tokens:
            self.order = torch.randperm(len(self.x), generator=self.generator)
        taken, self.order = self.order[: self.batch_tokens], self.order[self.batch_tokens :]
        return self.x[taken]


def training_config(spec: SAESpec, d_in: int) -> Any:
    """SAELens's training config for a spec. Raises ValueError for another architecture."""
    from sae_lens import (
        BatchTopKTrainingSAEConfig,
        StandardTrainingSAEConfig,
        TopKTrainingSAEConfig,
    )

    size = {"d_in": d_in, "d_sae": spec.d_sae}
    if spec.architecture == "topk":
        return TopKTrainingSAEConfig(**size, k=int(spec.sparsity))
    if spec.architecture == "jumprelu":
        return BatchTopKTrainingSAEConfig(**size, k=spec.sparsity)
    if spec.architecture == "standard":
        return StandardTrainingSAEConfig(**size, l1_coefficient=spec.sparsity, l1_warm_up_steps=100)
    raise ValueError(
        f"no recipe for architecture {spec.architecture!r}; choose topk, jumprelu or standard"
    )


def train_sae(
    spec: SAESpec,
    x: Float[Tensor, "token d_model"],
    folder: str | Path,
    *,
    model: Any,
    model_name: str,
    seed: int,
) -> None:
    """Train one SAE on recorded residuals and save it to `folder` as SAELens does.

    The decoder bias starts at the mean residual. `model` is only looked at for its hook point.
    """
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
    )

    context = 8
    steps = -(-spec.tokens // spec.batch_tokens)
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as scratch, kept_signal_handlers(), quiet():
        config = LanguageModelSAERunnerConfig(
            sae=training_config(spec, x.shape[1]),
            model_name=model_name,
            model_class_name="TransformerBridge",
            hook_name=spec.hook_name,
            dataset_path="sae_steering_plugin.organisms.world",
            streaming=False,
            is_dataset_tokenized=True,
            context_size=context,
            prepend_bos=True,
            training_tokens=steps * spec.batch_tokens,
            train_batch_size_tokens=spec.batch_tokens,
            store_batch_size_prompts=1,
            n_batches_in_buffer=-(-spec.batch_tokens // context),
            lr=spec.learning_rate,
            lr_warm_up_steps=min(100, steps // 10),
            lr_decay_steps=steps // 3,
            dead_feature_window=200,
            feature_sampling_window=500,
            seed=seed,
            device="cpu",
            logger=LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=scratch,
            verbose=False,
            model_from_pretrained_kwargs={},
        )
        torch.manual_seed(seed)
        runner = LanguageModelSAETrainingRunner(
            config,
            override_dataset=Dataset.from_dict({"input_ids": [[0] * context] * 2}),
            override_model=model,
        )
        runner.cfg.model_from_pretrained_kwargs = {}
        runner.activations_store = Recorded(x, spec.batch_tokens, seed)
        with torch.no_grad():
            runner.sae.b_dec.copy_(x.mean(0))
        runner.run()
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("cfg.json", "sae_weights.safetensors"):
            (folder / name).write_bytes((Path(scratch) / name).read_bytes())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what the runner says of datasets and models that are passed in as objects."""
    import sae_lens

    level = sae_lens.logger.level
    sae_lens.logger.setLevel("ERROR")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The training dataset contains fewer samples")
            yield
    finally:
        sae_lens.logger.setLevel(level)


@contextlib.contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """Put the handlers of SIGINT and SIGTERM back on the way out."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def quality(
    sae: Any, x: Float[Tensor, "token d_model"], *, batch_tokens: int = 8192
) -> Mapping[str, float]:
    """Explained variance, mean L0 and share of latents that never fire, on recorded residuals.

    Explained variance is 1 - sum |x - decoded|^2 / sum |x - mean(x)|^2 over all tokens.
    """
    errors, active, fired = 0.0, 0.0, torch.zeros(sae.W_dec.shape[0], dtype=torch.bool)
    with torch.no_grad():
        for part in x.split(batch_tokens):
            codes = sae.encode(part)
            errors += float((part - sae.decode(codes)).square().sum())
            active += float((codes != 0).sum())
            fired |= (codes != 0).any(0)
    spread = float((x - x.mean(0)).square().sum())
    return {
        "explained_variance": 1 - errors / spread,
        "l0": active / len(x),
        "dead_share": 1 - float(fired.float().mean()),
    }
