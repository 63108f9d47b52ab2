"""Data to vectors: dense baselines, single features, sparse activation steering, decoded probes."""

from sae_steering_plugin.directions.codes import FiredCodes, fired_codes
from sae_steering_plugin.directions.dense import caa_vector, diff_mean_vector, pca_vector
from sae_steering_plugin.directions.feature import feature_vector, rank_features
from sae_steering_plugin.directions.probe import ScoreTable, probe_vector, score_table
from sae_steering_plugin.directions.sparse import sas_codes, sas_vector

__all__ = [
    "FiredCodes",
    "ScoreTable",
    "caa_vector",
    "diff_mean_vector",
    "feature_vector",
    "fired_codes",
    "pca_vector",
    "probe_vector",
    "rank_features",
    "sas_codes",
    "sas_vector",
    "score_table",
]
