"""What steering vectors do to the latents of generated text: the data of SAE-TS and FGAA.

Unit vectors are injected at the strength that raises the loss on general texts by the same amount,
prompts are continued under each, and the *unsteered* model then reads the texts: the effect is the
mean code over generated tokens less that of unsteered continuations. Source: arXiv 2411.02193
(14 prompts, 32 new tokens, top-k 50, top-p 0.3; strengths interpolated to a loss of 4 on Gemma-2-2B
and 3.5 on 9B). Here the target is a rise over the model's own loss, because models differ in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_steering_plugin.adapters.activations import (
    TokenBatch,
    activations_at,
    bos_policy,
    encode_texts,
    model_name,
    padded,
)
from sae_steering_plugin.adapters.engine import encode_prompts, generate
from sae_steering_plugin.adapters.sae_parts import decoder_rows, site_names, whole_codes
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.directions.codes import identity
from sae_steering_plugin.directions.heldout import r2, sample_folds
from sae_steering_plugin.directions.sae_ts import EffectMap, fit_effects
from sae_steering_plugin.edits.shift import Add
from sae_steering_plugin.types import Edit

GRID = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Lengths tried, in mean residual norms, on the way to the target loss."""

LOSS_INCREASE = 1.0
"""Nats per token by which every vector raises the loss on the corpus texts."""

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 3.0, 10.0, 100.0)
"""Ridge penalties of the map that are tried, in `fit_effects`'s unit.

The large ones are for few vectors: with about as many vectors as dimensions the inner folds want
more than the vectors' own variance, up to a map that knows hardly more than the mean effect.
"""

KEPT_LOGITS = 32_000_000
"""Logits of one pass over the corpus texts are kept below this many numbers (128 MB)."""

N_VECTORS = 256
"""Decoder rows drawn when no vectors are given."""


def collect_effects(
    model: Any,
    sae: Any,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    vectors: Float[Tensor, "vector d_model"] | None = None,
    n_vectors: int = N_VECTORS,
    loss_increase: float = LOSS_INCREASE,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float | None = 0.3,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> EffectMap:
    """The affine effect map of a model and SAE, with latent densities on `texts`.

    `vectors` are scaled to length 1; without them `n_vectors` decoder rows are drawn with `seed`.
    `texts` are a small general corpus: strengths are matched on it and densities measured. A vector
    that does not reach the target loss within `GRID` is left out and counted (`settings
    ["unreached"]`). `scores` hold the map's R2 on vectors that had no part in the fit. Raises
    ValueError without prompts or texts, for a transcoder (its codes are not read where a vector is
    added), and when fewer than two vectors are left.
    """
    if not prompts or not texts:
        raise ValueError("give at least one prompt to continue and one corpus text")
    if loss_increase <= 0:
        raise ValueError(f"loss_increase is {loss_increase}; it must be above 0 nats")
    read, write = site_names(sae)
    if read != write:
        raise ValueError(
            "a transcoder reads and writes at two places; effects need one: use an SAE"
        )
    corpus = Corpus.read(model, sae, texts)
    given = drawn_rows(sae, n_vectors, seed) if vectors is None else vectors.detach().float().cpu()
    units = given / given.norm(dim=1, keepdim=True)
    if not bool(torch.isfinite(units).all()):
        raise ValueError("a steering vector has length zero")
    rows = min(batch_size, KEPT_LOGITS // (corpus.tokens.shape[1] * int(model.cfg.d_vocab)))
    texts_each, prompts_each = max(1, rows // len(texts)), max(1, batch_size // len(prompts))
    with tqdm(total=2 * len(units), desc="effects", unit="vector", disable=not progress) as bar:
        lengths = []
        for part in units.split(texts_each):
            lengths.append(corpus.matched(model, write, part, loss_increase))
            bar.update(len(part))
        strength = torch.cat(lengths)
        reached = torch.isfinite(strength)
        bar.update(int((~reached).sum()))
        if int(reached.sum()) < 2:
            raise ValueError(
                f"{int(reached.sum())} of {len(units)} vectors raise the loss by {loss_increase:g} "
                f"nats within {GRID[-1]:g} mean residual norms: choose a smaller loss_increase"
            )
        units, strength = units[reached], strength[reached]
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
        }
        base = mean_codes(model, sae, prompts, (), 1, **options)
        found = []
        for part, size in zip(units.split(prompts_each), strength.split(prompts_each), strict=True):
            steps = (part * size[:, None]).repeat_interleave(len(prompts), dim=0)
            edit = Edit(Add(steps.to(next(model.parameters()).device)), write)
            found.append(mean_codes(model, sae, prompts, (edit,), len(part), **options) - base)
            bar.update(len(part))
    effects = torch.cat(found)
    blank = torch.isnan(effects).any(dim=1)
    units, effects = units[~blank], effects[~blank]
    penalty = chosen_penalty(units, effects, seed=seed)
    weight, bias = fit_effects(units, effects, penalty=penalty)
    return EffectMap(
        weight=weight,
        bias=bias,
        hook_name=write,
        sae_id=identity(sae),
        model_name=model_name(model),
        mean_norm=corpus.mean_norm,
        density=corpus.density,
        bos=corpus.bos,
        settings={
            "vectors": len(units),
            "unreached": int((~reached).sum()),
            "silent": int(blank.sum()),
            "prompts": len(prompts),
            "corpus_texts": len(texts),
            "base_loss": corpus.loss,
            "loss_increase": loss_increase,
            "median_length": float(strength.median()),
            "penalty": penalty,
            **options,
        },
        scores=heldout_fit(units, effects, seed=seed),
    )


def drawn_rows(sae: Any, n: int, seed: int) -> Float[Tensor, "vector d_model"]:
    """`n` decoder rows of non-zero length, drawn without replacement; all of them when fewer."""
    rows = decoder_rows(sae).cpu()
    usable = (rows.norm(dim=1) > 0).nonzero().flatten()
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))
    return rows[usable[order[:n]]]


def heldout_r2(units: Tensor, effects: Tensor, penalty: float | None, *, seed: int) -> float:
    """R2 of effects, over all latents at once, on vectors left out of the fit; five folds.

    Deviations are from each latent's own mean effect, so a map without direction scores about 0.
    Without a penalty it is chosen on the training vectors of each fold.
    """
    guess = torch.zeros_like(effects)
    for train, test in sample_folds(len(units), seed=seed):
        x, y = units[train], effects[train]
        chosen = chosen_penalty(x, y, seed=seed) if penalty is None else penalty
        weight, bias = fit_effects(x, y, penalty=chosen)
        guess[test] = units[test] @ weight + bias
    level = effects.mean(0)
    return r2((effects - level).flatten(), (guess - level).flatten())


def chosen_penalty(units: Tensor, effects: Tensor, *, seed: int) -> float:
    """The penalty of `PENALTIES` that predicts left-out vectors best; the largest with under
    five."""
    if len(units) < 5:
        return PENALTIES[-1]
    found = {p: heldout_r2(units, effects, p, seed=seed) for p in PENALTIES}
    return max(found, key=lambda p: (found[p] if found[p] == found[p] else -torch.inf, p))


def heldout_fit(units: Tensor, effects: Tensor, *, seed: int) -> dict[str, float]:
    """The map's held-out R2 as a score; none with fewer than ten vectors or constant effects."""
    found = heldout_r2(units, effects, None, seed=seed) if len(units) >= 10 else float("nan")
    return {"effect_r2": found} if found == found else {}


@dataclass(frozen=True, eq=False)
class Corpus:
    """General texts as one padded batch, with the model's loss on them and the SAE's densities."""

    tokens: Tensor
    mask: Tensor
    loss: float
    mean_norm: float
    density: Float[Tensor, " d_sae"]
    bos: tuple[int, ...]

    @classmethod
    def read(cls, model: Any, sae: Any, texts: Sequence[str]) -> Corpus:
        encoded = encode_texts(model, texts, prepend_bos=bos_policy(model, sae))
        batch = padded(model, encoded, side="left")
        mask = batch.real.long()
        x = activations_at(model, site_names(sae)[0], batch)
        with torch.no_grad():
            codes = whole_codes(sae, x).cpu()
        counted = batch.counted
        first = torch.zeros_like(counted)
        rows = batch.leading_bos.nonzero().flatten()
        first[rows, batch.place[rows]] = True
        fires = codes != 0
        return cls(
            tokens=batch.tokens,
            mask=mask,
            loss=float(
                losses(
                    steered_logits(model, batch.tokens, attention_mask=mask), batch.tokens, mask, 1
                )
            ),  # fmt: skip
            mean_norm=float(x.cpu()[counted].norm(dim=-1).mean()),
            density=fires[counted].float().mean(0),
            bos=tuple(int(j) for j in fires[first].any(0).nonzero().flatten()) if len(rows) else (),
        )

    def matched(
        self, model: Any, site: str, units: Float[Tensor, "vector d_model"], rise: float
    ) -> Float[Tensor, " vector"]:
        """The length at which each vector first raises the loss by `rise`, between grid points by
        straight lines; infinity for one that never does."""
        found = torch.full((len(units),), torch.inf)
        before = torch.full((len(units),), self.loss)
        shorter = 0.0
        tokens = self.tokens.repeat(len(units), 1)
        mask = self.mask.repeat(len(units), 1)
        device = next(model.parameters()).device
        for share in GRID:
            length = share * self.mean_norm
            steps = (units * length).repeat_interleave(len(self.tokens), dim=0).to(device)
            logits = steered_logits(
                model, tokens, Edit(Add(steps), site), attention_mask=mask, share=False
            )
            now = losses(logits, tokens, mask, len(units))
            crossed = (now >= self.loss + rise) & torch.isinf(found)
            slope = (self.loss + rise - before) / (now - before).clamp_min(1e-12)
            place = shorter + slope.clamp(0, 1) * (length - shorter)
            found = torch.where(crossed, place, found)
            if bool(torch.isfinite(found).all()):
                break
            before, shorter = now, length
        return found


def losses(
    logits: Float[Tensor, "row pos d_vocab"], tokens: Tensor, mask: Tensor, groups: int
) -> Float[Tensor, " group"]:
    """Mean next-token cross-entropy, in nats, of each run of rows, over pairs of real tokens."""
    logp = logits[:, :-1].float().log_softmax(-1).cpu()
    taken = -logp.gather(-1, tokens.cpu()[:, 1:, None])[..., 0]
    real = (mask.cpu()[:, 1:] * mask.cpu()[:, :-1]).float()
    total, number = (taken * real).sum(1), real.sum(1)
    return total.reshape(groups, -1).sum(1) / number.reshape(groups, -1).sum(1)


def mean_codes(
    model: Any, sae: Any, prompts: Sequence[str], edits: Sequence[Edit], copies: int, **options: Any
) -> Float[Tensor, "copy d_sae"]:
    """Mean code over the tokens that all prompts were continued with, per copy of the prompts.

    Read by the unsteered model; in the unit-row convention. NaN for a copy that wrote nothing.
    """
    bos = bos_policy(model, sae)
    tokens, mask = encode_prompts(model, list(prompts), prepend_bos=bos)
    written = generate(
        model,
        tokens.repeat(copies, 1),
        edits,
        attention_mask=mask.repeat(copies, 1),
        **options,
    )
    start = tokens.shape[1]
    own = torch.zeros_like(written.tokens, dtype=torch.bool)
    for row, new in enumerate(written.new_tokens):
        own[row, start : start + len(new)] = True
    real = own.clone()
    real[:, :start] = mask.bool().repeat(copies, 1)
    pooled, number = summed_codes(model, sae, written.tokens, real, own)
    total = pooled.reshape(copies, len(prompts), -1).sum(1)
    count = number.reshape(copies, len(prompts)).sum(1, keepdim=True)
    mean = torch.where(count > 0, total / count.clamp_min(1), torch.nan)
    return mean * decoder_rows(sae).norm(dim=1).cpu()


def summed_codes(
    model: Any,
    sae: Any,
    tokens: Tensor,
    real: Bool[Tensor, "row pos"],
    chosen: Bool[Tensor, "row pos"],
    *,
    batch_size: int = 64,
) -> tuple[Float[Tensor, "row d_sae"], Float[Tensor, " row"]]:
    """Sum of codes over the chosen tokens of each row, and their number."""
    sums = []
    for codes, kept in token_codes(model, sae, tokens, real, chosen, batch_size=batch_size):
        sums.append((codes * kept[..., None]).sum(1))
    return torch.cat(sums), chosen.sum(1).float()


def token_codes(
    model: Any, sae: Any, tokens: Tensor, real: Tensor, chosen: Tensor, *, batch_size: int
) -> Iterator[tuple[Float[Tensor, "row pos d_sae"], Bool[Tensor, "row pos"]]]:
    """Codes of every token and the mask of chosen ones, a batch of rows at a time, unsteered."""
    read = site_names(sae)[0]
    for start in range(0, len(tokens), batch_size):
        part = slice(start, start + batch_size)
        place = real[part].float().argmax(dim=1)
        batch = TokenBatch(tokens[part], real[part], place, torch.zeros(len(place)).bool())
        x = activations_at(model, read, batch)
        with torch.no_grad():
            yield whole_codes(sae, x).cpu(), chosen[part]


def save_effects(effects: EffectMap, path: str | Path) -> None:
    """Write an effect map as safetensors, its words as JSON in the header."""
    from safetensors.torch import save_file

    tensors = {"weight": effects.weight.contiguous(), "bias": effects.bias.contiguous()}
    if effects.density is not None:
        tensors["density"] = effects.density.contiguous()
    words = {
        "hook_name": effects.hook_name,
        "sae_id": effects.sae_id,
        "model_name": effects.model_name,
        "mean_norm": effects.mean_norm,
        "bos": list(effects.bos),
        "settings": dict(effects.settings),
        "scores": dict(effects.scores),
    }
    save_file(tensors, str(path), metadata={"effect_map": json.dumps(words)})


def load_effects(path: str | Path) -> EffectMap:
    """An effect map that `save_effects` wrote.

    Raises FileNotFoundError, and ValueError for a file of anything else.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file; collect_effects and save_effects make one")
    try:
        with safe_open(str(path), framework="pt") as file:
            words = json.loads((file.metadata() or {})["effect_map"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no effect map of save_effects") from error
    return EffectMap(
        weight=tensors["weight"],
        bias=tensors["bias"],
        density=tensors.get("density"),
        **{**words, "bos": tuple(words["bos"])},
    )
