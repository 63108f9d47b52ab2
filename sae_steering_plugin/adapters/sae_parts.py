"""What an edit or a decoded probe needs of one SAELens dictionary: rows, partial codes, its
nonlinearity.

Architectures are told apart by the word SAELens registers them under. Codes are computed in float32
from the dictionary's weights, so hooks that somebody left on the SAE are neither run nor counted,
and no scale is left behind in the SAE object (SAELens stores one per `encode` under run-time
normalisation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Kind = Literal["pointwise", "topk", "whole"]

RECTIFIED = {"standard", "gated", "transcoder", "skip_transcoder"}
THRESHOLDED = {"jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"}
RANKED = {"topk", "abstopk"}
LINEAR = {"steering"}
WHOLE = {"matching_pursuit", "temporal"}
KNOWN = RECTIFIED | THRESHOLDED | RANKED | LINEAR | WHOLE
TRANSCODERS = {"transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"}

RUN_TIME_SCALES = ("layer_norm", "constant_norm_rescale", "constant_scalar_rescale")
"""SAELens's normalisations that stand at run time; the others are folded into the weights."""

LAYER_NORM_EPS = 1e-5
"""SAELens adds this to the (unbiased) standard deviation on the way in and not on the way out."""


def architecture(sae: Any) -> str:
    """The word SAELens registers the dictionary's class under."""
    return str(sae.cfg.architecture())


def site_names(sae: Any) -> tuple[str, str]:
    """Hook names the dictionary reads from and writes to; they differ for transcoders only.

    Raises ValueError when the metadata names no hook point: a dictionary without one fits nowhere.
    """
    read = sae.cfg.metadata.hook_name
    if not read:
        raise ValueError(
            f"this {type(sae).__name__} does not say where it was trained: set "
            "sae.cfg.metadata.hook_name to the TransformerLens hook point of its training data"
        )
    return str(read), str(sae.cfg.metadata.hook_name_out or read)


def decoder_rows(
    sae: Any, indices: Sequence[int] | Tensor | None = None
) -> Float[Tensor, "latent d_out"]:
    """The rows `decode` really multiplies codes with, in float32.

    They are `W_dec[j]`, or `W_dec[j] / ||W_dec[j]||` under `rescale_acts_by_decoder_norm`. Under
    run-time input normalisation a unit of code moves the residual by the row times `output_scale`.
    """
    rows = sae.W_dec.detach()
    if indices is not None:
        rows = rows[torch.as_tensor(indices, dtype=torch.long, device=rows.device)]
    rows = rows.float()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        rows = rows / rows.norm(dim=-1, keepdim=True)
    return rows


def normalised(
    sae: Any, x: Float[Tensor, "*batch d_in"]
) -> tuple[Float[Tensor, "*batch d_in"], Float[Tensor, "*batch 1"] | None]:
    """`x` as the encoder sees it, and the per-token factor `decode` puts back (None when it is
    1)."""
    kind = sae.cfg.normalize_activations
    if kind == "layer_norm":
        centred = x - x.mean(dim=-1, keepdim=True)
        deviation = centred.std(dim=-1, keepdim=True)
        seen, scale = centred / (deviation + LAYER_NORM_EPS), deviation
    elif kind == "constant_norm_rescale":
        scale = x.norm(dim=-1, keepdim=True) / sae.cfg.d_in**0.5
        seen = x / scale
    elif kind == "constant_scalar_rescale":
        factor = float(sae.cfg.activation_normalization_factor)
        seen, scale = x * factor, torch.full_like(x[..., :1], 1 / factor)
    else:
        seen, scale = x, None
    if sae.cfg.apply_b_dec_to_input:
        seen = seen - sae.b_dec.detach().float().to(x.device)
    return seen, None if architecture(sae) in TRANSCODERS else scale


def whole_codes(sae: Any, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_sae"]:
    """All codes of `x` by the dictionary's own `encode`, hooks off, and no scale left behind."""
    hooks = {name: point._forward_hooks for name, point in sae.hook_dict.items()}
    kept = {name: dict(found) for name, found in hooks.items() if found}
    for name in kept:
        hooks[name].clear()
    try:
        codes = sae.encode(x.to(device=sae.W_dec.device, dtype=sae.dtype))
    finally:
        for name, found in kept.items():
            hooks[name].update(found)
        for attribute in ("ln_mu", "ln_std", "x_norm_coeff"):
            sae.__dict__.pop(attribute, None)
    if codes.is_sparse:
        codes = codes.to_dense()
    return codes.float().to(x.device)


@dataclass(frozen=True, eq=False)
class SAEParts:
    """One dictionary cut down to the latents `indices`, ready for one device.

    `kind` tells how codes are found: `pointwise` needs only these latents' encoder columns, `topk`
    needs every pre-activation (membership is decided among all latents), `whole` calls `encode`.
    Dictionaries that rank all latents also hold the whole decoder `table` and the row `norms` it is
    divided by (None: it is not). `theta` are JumpReLU thresholds; `signed` latents may be negative
    (AbsTopK, steering vectors). `rescales` is True under run-time normalisation.
    """

    sae: Any
    kind: Kind
    indices: Int[Tensor, " support"]
    rows: Float[Tensor, "support d_out"]
    encode_rows: Callable[[Tensor], Tensor]
    theta: Float[Tensor, " support"] | None
    k: int
    signed: bool
    rectified: bool
    rescales: bool
    table: Float[Tensor, "d_sae d_out"] | None
    norms: Float[Tensor, " d_sae"] | None
    reads_context: bool

    def scale(self, x: Tensor) -> Tensor | None:
        """The per-token factor of run-time normalisation; None where the SAE has none."""
        return normalised(self.sae, x)[1] if self.rescales else None


def parts_of(sae: Any, indices: Sequence[int], device: torch.device | str) -> SAEParts:
    """The parts of `sae` that an edit of `indices` needs, float32, on `device`.

    Raises ValueError for an index outside the dictionary. An architecture this module does not know
    is read through its own `encode`; edits that need its nonlinearity refuse it by name.
    """
    word = architecture(sae)
    support = torch.as_tensor(list(indices), dtype=torch.long)
    d_sae = sae.W_dec.shape[0]
    if len(support) and not 0 <= int(support.min()) <= int(support.max()) < d_sae:
        raise ValueError(
            f"feature {int(support.max())} is outside 0..{d_sae - 1} of this dictionary"
        )
    support = support.to(device)
    here = support.to(sae.W_dec.device)
    rows = decoder_rows(sae, here).to(device)
    theta, k, encode_rows = None, 0, None
    kind: Kind = "whole"
    if word in RECTIFIED | THRESHOLDED | LINEAR:
        kind = "pointwise"
        encode_rows = _pointwise(sae, word, here, device)
        if word in THRESHOLDED:
            theta = sae.threshold.detach().float()[here].to(device)
    elif word in RANKED:
        kind, k = "topk", int(sae.cfg.k)
        encode_rows = _pre_activations(sae, device)
    elif word == "temporal" and sae.cfg.sae_diff_type == "topk":
        k = int(sae.cfg.kval_topk)
    return SAEParts(
        sae=sae,
        kind=kind,
        indices=support,
        rows=rows,
        encode_rows=encode_rows if encode_rows is not None else lambda x: whole_codes(sae, x),
        theta=theta,
        k=k,
        signed=word in LINEAR or word == "abstopk",
        rectified=word in RECTIFIED,
        table=sae.W_dec.detach().float().to(device) if kind == "topk" else None,
        norms=row_norms(sae, device) if kind == "topk" else None,
        rescales=sae.cfg.normalize_activations in RUN_TIME_SCALES,
        reads_context=word == "temporal",
    )


def _pointwise(
    sae: Any, word: str, here: Tensor, device: torch.device | str
) -> Callable[[Tensor], Tensor]:
    """`x -> codes of the chosen latents`; the encoder columns are copied once, transposed."""
    columns = sae.W_enc.detach()[:, here].float().T.contiguous().to(device)
    fold = sae.b_dec.detach().float().to(device) if sae.cfg.apply_b_dec_to_input else None
    plain = sae.cfg.normalize_activations not in RUN_TIME_SCALES

    def bias(name: str) -> Tensor:
        values = getattr(sae, name).detach().float()[here].to(device)
        # b_dec is subtracted from x before the encoder; folded in here it costs nothing per token
        return values - columns @ fold if fold is not None and plain else values

    def seen(x: Tensor) -> Tensor:
        return x if plain else normalised(sae, x)[0]

    if word == "gated":
        gate, magnitude = bias("b_gate"), bias("b_mag")
        growth = sae.r_mag.detach().float()[here].to(device).exp()
        if fold is not None and plain:
            magnitude = sae.b_mag.detach().float()[here].to(device) - growth * (columns @ fold)

        def gated(x: Tensor) -> Tensor:
            product = torch.nn.functional.linear(seen(x), columns)
            return torch.relu(product * growth + magnitude) * (product + gate > 0)

        return gated
    offset = bias("b_enc")
    if word in LINEAR:
        return lambda x: torch.nn.functional.linear(seen(x), columns, offset)
    if word in THRESHOLDED:
        bar = sae.threshold.detach().float()[here].clamp_min(0).to(device)

        def jumped(x: Tensor) -> Tensor:
            pre = torch.nn.functional.linear(seen(x), columns, offset)
            return torch.where(pre > bar, pre, 0.0)

        return jumped
    return lambda x: torch.relu(torch.nn.functional.linear(seen(x), columns, offset))


def row_norms(sae: Any, device: torch.device | str) -> Tensor | None:
    """What activations are multiplied with and codes divided by; None without that option."""
    if not getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return None
    return sae.W_dec.detach().float().norm(dim=-1).to(device)


def _pre_activations(sae: Any, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """`x -> the pre-activation of every latent`, from which a top-k dictionary chooses its
    members."""
    encoder = sae.W_enc.detach().float().to(device)
    offset = sae.b_enc.detach().float().to(device)
    norms = row_norms(sae, device)

    def pre(x: Tensor) -> Tensor:
        hidden = normalised(sae, x)[0] @ encoder + offset
        return hidden if norms is None else hidden * norms

    return pre


def own_nonlinearity(parts: SAEParts, word: str) -> Callable[[Tensor], Tensor]:
    """The dictionary's own rule for codes of the chosen latents, given codes it might not allow.

    Pointwise rules only: top-k dictionaries decide among all their active latents (see
    `edits.codes`). Raises ValueError for an architecture whose rule is not known here.
    """
    if word not in KNOWN:
        raise ValueError(
            f"the nonlinearity of architecture {word!r} is not known here; pass "
            "nonlinearity='relu' or 'none' to say which codes are allowed"
        )
    if parts.theta is not None:
        bar = parts.theta.clamp_min(0)
        return lambda codes: torch.where(codes > bar, codes, 0.0)
    if parts.signed:
        return lambda codes: codes
    return torch.relu


__all__ = [
    "KNOWN",
    "SAEParts",
    "architecture",
    "decoder_rows",
    "normalised",
    "own_nonlinearity",
    "parts_of",
    "row_norms",
    "site_names",
    "whole_codes",
]
