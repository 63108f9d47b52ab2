"""Numbers from two arms: sizes, intervals, tests, corrections, power, and how to read them."""

from .agreement import Agreement, agreement
from .axis import Axis, VectorGeometry, behaviour_axis, vector_axis
from .belief import BeliefCurve, BeliefFit, fit_belief, observed_crossover
from .compare import compare
from .contrast import (
    Interval,
    benjamini_hochberg,
    bonferroni,
    cohens_d,
    corrected,
    d_interval,
    effect,
    hedges_g,
    holm,
    mann_whitney,
    mcnemar,
    mcnemar_chi2,
    moved_wrong,
    paired_d,
    paired_permutation,
    permutation,
    simultaneous_level,
    superiority,
    superiority_interval,
    wilcoxon,
)
from .cross import CrossTraitMatrix, Selectivity, cross_trait_matrix, mirrored, selectivity
from .dose import DoseReading, dose_reading
from .intervals import mean_interval, share_interval
from .power import d_z_from_d, detectable_d, detectable_d_z, paired_power, power
from .tiers import Tier, TierRules, evidence_tier

__all__ = [
    "Agreement",
    "Axis",
    "BeliefCurve",
    "BeliefFit",
    "CrossTraitMatrix",
    "DoseReading",
    "Interval",
    "Selectivity",
    "Tier",
    "TierRules",
    "VectorGeometry",
    "agreement",
    "behaviour_axis",
    "benjamini_hochberg",
    "bonferroni",
    "cohens_d",
    "compare",
    "corrected",
    "cross_trait_matrix",
    "d_interval",
    "d_z_from_d",
    "detectable_d",
    "detectable_d_z",
    "dose_reading",
    "effect",
    "evidence_tier",
    "fit_belief",
    "hedges_g",
    "holm",
    "mann_whitney",
    "mcnemar",
    "mcnemar_chi2",
    "mean_interval",
    "mirrored",
    "moved_wrong",
    "observed_crossover",
    "paired_d",
    "paired_permutation",
    "paired_power",
    "permutation",
    "power",
    "selectivity",
    "share_interval",
    "simultaneous_level",
    "superiority",
    "superiority_interval",
    "vector_axis",
    "wilcoxon",
]
