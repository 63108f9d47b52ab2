"""What training teaches, in the concepts of a dictionary: gradients and finished updates."""

from .gradient import GradientSums
from .maps import ConceptBasis, concept_basis, edited, scale_map
from .update import lora_write, moved_along, read_share, unit_rows, write_share

__all__ = [
    "ConceptBasis",
    "GradientSums",
    "concept_basis",
    "edited",
    "lora_write",
    "moved_along",
    "read_share",
    "scale_map",
    "unit_rows",
    "write_share",
]
