"""What is known of the features of a dictionary, and which of them belong to a concept."""

from .pooled import PooledCodes
from .probes import Probes, fit_probes, top_k_accuracy
from .scores import SCORES, ScoreTable, score_features

__all__ = [
    "SCORES",
    "PooledCodes",
    "Probes",
    "ScoreTable",
    "fit_probes",
    "score_features",
    "top_k_accuracy",
]
