"""What training teaches, in the concepts of a dictionary: gradients and finished updates."""

from .gradient import GradientSums
from .maps import ConceptBasis, concept_basis, edited, scale_map
from .rank_one import factors, rank_one, unexplained, written
from .screening import disparity, shift_along
from .update import LowRankDelta, lora_write, moved_along, read_share, unit_rows, write_share

__all__ = [
    "ConceptBasis",
    "GradientSums",
    "LowRankDelta",
    "concept_basis",
    "disparity",
    "edited",
    "factors",
    "lora_write",
    "moved_along",
    "rank_one",
    "read_share",
    "scale_map",
    "shift_along",
    "unexplained",
    "unit_rows",
    "write_share",
    "written",
]
