"""Changes: what to add to an activation. `x + keep[..., None] * change(x)` is the whole
intervention."""

from sae_steering_plugin.edits.codes import Ablate, Clamp, Exchange, Scale, SparseAdd
from sae_steering_plugin.edits.fuzz import Fuzz
from sae_steering_plugin.edits.gate import FeatureFires, Gated, SimilarTo, best_threshold
from sae_steering_plugin.edits.path import ConceptPath, FollowPath, concept_path
from sae_steering_plugin.edits.project import ProjectOut
from sae_steering_plugin.edits.shift import Add
from sae_steering_plugin.edits.unexplained import Reconstruct

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "ConceptPath",
    "Exchange",
    "FeatureFires",
    "FollowPath",
    "Fuzz",
    "Gated",
    "ProjectOut",
    "Reconstruct",
    "Scale",
    "SimilarTo",
    "SparseAdd",
    "best_threshold",
    "concept_path",
]
