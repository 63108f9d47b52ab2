"""What is known of the features of a dictionary, and which of them belong to a concept."""

from .causal import (
    CausalScores,
    generation_success,
    input_score,
    rank_average,
    successful_factor,
)
from .forget import forget_features
from .labels import label_features
from .lens import Lens
from .pooled import PooledCodes
from .probes import Probes, fit_probes, top_k_accuracy
from .scores import SCORES, ScoreTable, score_features

__all__ = [
    "SCORES",
    "CausalScores",
    "Lens",
    "PooledCodes",
    "Probes",
    "ScoreTable",
    "fit_probes",
    "forget_features",
    "generation_success",
    "input_score",
    "label_features",
    "rank_average",
    "score_features",
    "successful_factor",
    "top_k_accuracy",
]
