"""Tables over all features of a dictionary that need no text: geometry and direct logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_steering_plugin.adapters.activations import model_name
from sae_steering_plugin.adapters.narrow_products import sieving
from sae_steering_plugin.adapters.sae_lens import sae_id
from sae_steering_plugin.adapters.sae_parts import decoder_rows, site_names
from sae_steering_plugin.adapters.unembedding import unembedding
from sae_steering_plugin.features.footprint import SHARES, footprint_moments, footprints
from sae_steering_plugin.features.geometry import CROWDING_K, geometry_columns
from sae_steering_plugin.types import SMALLEST_NORM, FeatureTable


def decoder_geometry(
    sae: Any,
    *,
    features: Sequence[int] | Tensor | None = None,
    k: int = CROWDING_K,
    sieve: bool | None = None,
    progress: bool = False,
) -> FeatureTable:
    """Length, crowding and encoder agreement of decoder rows, among *all* rows of the dictionary.

    Columns: `decoder_norm`, `encoder_norm`, `encoder_decoder_cos`, `crowding_max_abs_cos` (largest
    |cos(d_f, d_j)| over j other than f), `crowding_topk_mean_abs_cos` (mean of the k largest),
    `crowding_nearest` (that j), `cos_mean` and `cos_var` (of the signed cosines with every other
    row). Rows are those `decode` multiplies codes with. A zero row has NaN angles and -1 for its
    nearest; `settings["zero_rows"]` counts such rows. A transcoder whose input has another width
    has no `encoder_decoder_cos`.

    Cost: w^2 d operations for all w rows (each pair once), and a third more; memory: two copies of
    the rows, 1 kB a row and 32 MB. `sieve` multiplies in bfloat16 first and works out in float32
    what could be near (`features.sieve`): the same figures to rounding, with half a copy of the
    rows and 2 kB a row more; None decides by how fast this machine is at it, and
    `settings["sieve"]` says what was done. Raises ValueError when k is
    not between 1 and the number of other rows, IndexError for a feature the dictionary lacks.
    Source: arXiv 2606.08365, code.
    """
    rows = decoder_rows(sae)
    chosen = chosen_features(features, len(rows))
    encoder = sae.W_enc.detach().T
    narrow = sieving(sieve, rows.device)
    found = geometry_columns(rows, encoder, chosen, k=k, sieve=narrow, progress=progress)
    zero = int((rows.norm(dim=1) <= SMALLEST_NORM).sum())
    return table_of(sae, chosen, found, {"crowding_k": k, "zero_rows": zero, "sieve": narrow})


def logit_footprint(
    model: Any,
    sae: Any,
    *,
    features: Sequence[int] | Tensor | None = None,
    basis: str = "logits",
    shares: Sequence[int] = SHARES,
    top: int = 10,
    progress: bool = False,
) -> FeatureTable:
    """What one raw decoder row does to the logits directly, over the whole vocabulary.

    Columns: `direct_logit_l2`, `direct_logit_linf`, `direct_logit_entropy` (nats),
    `direct_logit_effective_vocab`, `direct_topK_abs_mass_frac` for each K of `shares`,
    `direct_logit_mean`, `direct_logit_var`, and with `top` the lists `promoted`, `promoted_logits`,
    `suppressed`, `suppressed_logits` (token ids and logits, strongest first).

    `basis` "logits" applies the final norm's gain and centring and centres logits over the
    vocabulary, so that one model gives one footprint however it was loaded; "loaded" is d_f W_U as
    the weights stand (the code of arXiv 2606.08365). Sizes are not comparable under a soft cap.
    `settings` say what was applied: `basis`, `folded`, `norm_gain`, `centred_row`,
    `centred_vocabulary`, `soft_cap`, `model_name`.

    Cost: 2 w d V operations and half as much again; memory: the rows and 20 MB. Raises ValueError
    when the SAE writes to another width than the residual stream's, or `top` exceeds the
    vocabulary.
    """
    rows = decoder_rows(sae)
    if rows.shape[1] != model.cfg.d_model:
        raise ValueError(
            f"decoder rows have {rows.shape[1]} entries and the residual stream "
            f"{model.cfg.d_model}: this dictionary (at {site_names(sae)[1]!r}) has no direct logits"
        )
    head = unembedding(model, basis=basis)
    chosen = chosen_features(features, len(rows))
    seen = head.read(rows[chosen.to(rows.device)])
    weight = head.weight.detach()
    words = weight.shape[1]
    with torch.no_grad():
        found = footprints(
            seen, weight, centre=head.mean_word, shares=shares, top=top, progress=progress
        )
        moments = footprint_moments(seen, weight, centre=head.mean_word)
    columns: dict[str, Any] = {
        **found.columns,
        "direct_logit_mean": moments["direct_logit_mean"],
        "direct_logit_var": moments["direct_logit_var"],
    }
    if top:
        for name in ("promoted", "promoted_logits", "suppressed", "suppressed_logits"):
            columns[name] = list(getattr(found, name).numpy())
    settings = {**head.settings, "model_name": model_name(model), "d_vocab": words}
    return table_of(sae, chosen, columns, settings)


def chosen_features(features: Sequence[int] | Tensor | None, n: int) -> Tensor:
    """The features asked for, all when None. Raises IndexError for one that is not there."""
    if features is None:
        return torch.arange(n)
    chosen = torch.as_tensor(features, dtype=torch.long).cpu()
    if not len(chosen):
        raise ValueError("no feature was asked for")
    if not 0 <= int(chosen.min()) <= int(chosen.max()) < n:
        raise IndexError(f"feature {int(chosen.max())} lies outside 0..{n - 1} of this dictionary")
    return chosen


def table_of(
    sae: Any, features: Tensor, columns: Mapping[str, Any], settings: Mapping[str, Any]
) -> FeatureTable:
    """Columns, one entry per feature, as a table of the dictionary `sae`."""
    import pandas as pd

    plain = {
        name: values.numpy() if isinstance(values, Tensor) else values
        for name, values in columns.items()
    }
    index = pd.Index(features.numpy().astype(np.int64), name="feature")
    return FeatureTable(pd.DataFrame(plain, index=index), sae_id(sae), dict(settings))


__all__ = ["chosen_features", "decoder_geometry", "logit_footprint", "table_of"]
