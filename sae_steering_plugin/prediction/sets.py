"""Predictor sets by name, as explicit lists of columns of `feature_statistics` (the last four:
with those of `gradient_statistics`).

Source: arXiv 2606.08365 and its scripts, which build them by substring search; here each is
written out. Left out of the paper's lists: the sum of crowding cosines (20 times their mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

FREQUENCY = ("final_act_freq", "token_act_freq")
MAGNITUDE = tuple(
    f"{form}_{figure}" for form in ("final", "token") for figure in ("mean", "std", "max", "q95")
)
SHAPE = ("binary_entropy", "activation_entropy_norm", "kurtosis")
CROWDING = ("crowding_max_abs_cos", "crowding_topk_mean_abs_cos")
GEOMETRY = ("decoder_norm", "encoder_norm", "encoder_decoder_cos", *CROWDING)
COACTIVATION = ("coact_entropy_norm", "coact_count_mean", "coact_top20_mass")
LOGIT = (
    "direct_logit_l2",
    "direct_logit_linf",
    "direct_logit_entropy",
    "direct_logit_effective_vocab",
    "direct_top10_abs_mass_frac",
    "direct_top50_abs_mass_frac",
    "direct_top100_abs_mass_frac",
    "direct_top500_abs_mass_frac",
)
CURVATURE = ("fisher_curvature", "fisher_curvature_cv")
TANGENT = (
    "tangent_effect",
    "tangent_effect_cv",
    "tangent_stability_signed",
    "tangent_stability_abs",
)
"""`CURVATURE` and `TANGENT` are ours, from `gradient_statistics`; the others are the paper's."""
NO_MAGNITUDE = (*FREQUENCY, *SHAPE, *GEOMETRY, *COACTIVATION, *LOGIT)

PREDICTOR_SETS: dict[str, tuple[str, ...]] = {
    "freq_only": FREQUENCY,
    "activation_magnitude_only": MAGNITUDE,
    "activation_shape_only": SHAPE,
    "crowding_only": CROWDING,
    "geometry_only": GEOMETRY,
    "direct_logit_only": LOGIT,
    "coactivation_only": COACTIVATION,
    "full_no_magnitude": NO_MAGNITUDE,
    "compact_no_magnitude": (
        *FREQUENCY,
        *SHAPE,
        "coact_entropy_norm",
        "coact_count_mean",
        "decoder_norm",
        *CROWDING,
        "direct_logit_l2",
        "direct_logit_linf",
        "direct_logit_effective_vocab",
        "direct_top50_abs_mass_frac",
        "encoder_decoder_cos",
    ),
    "full_all": (*NO_MAGNITUDE, *MAGNITUDE),
    "curvature_only": CURVATURE,
    "tangent_only": TANGENT,
    "full_with_curvature": (*NO_MAGNITUDE, *CURVATURE),
    "full_with_gradients": (*NO_MAGNITUDE, *CURVATURE, *TANGENT),
}

PRIMARY = ("full_no_magnitude", "freq_only", "activation_magnitude_only")
"""The set whose worth is asked, and the two it has to beat."""


def named_columns(columns: str | Sequence[str]) -> tuple[str, ...]:
    """The columns of a set, or a list as it is. Raises ValueError for an unknown set, or none."""
    if not isinstance(columns, str):
        if not columns or len(set(columns)) < len(columns):
            raise ValueError(f"columns are {tuple(columns)}: at least one, and each once")
        return tuple(columns)
    if columns not in PREDICTOR_SETS:
        near = get_close_matches(columns, PREDICTOR_SETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"no predictor set {columns!r}{hint}; choose one of {', '.join(PREDICTOR_SETS)}"
        )
    return PREDICTOR_SETS[columns]
