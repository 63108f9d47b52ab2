"""A `FeatureTable` -> a forecast of side effects, how good it is, and groups to steer with."""

from .association import Association, association, partial_spearman, pearson, spearman
from .predictors import (
    CONTROLS,
    CrossValidation,
    SideEffectPredictor,
    cross_validate,
    difference,
    fit_predictor,
)
from .screen import Groups, screen_groups, split_features
from .sets import PREDICTOR_SETS, named_columns

__all__ = [
    "CONTROLS",
    "PREDICTOR_SETS",
    "Association",
    "CrossValidation",
    "Groups",
    "SideEffectPredictor",
    "association",
    "cross_validate",
    "difference",
    "fit_predictor",
    "named_columns",
    "partial_spearman",
    "pearson",
    "screen_groups",
    "spearman",
    "split_features",
]
