"""Numbers from two arms: effect sizes, intervals, paired tests, corrections."""

from .compare import compare
from .contrast import benjamini_hochberg, cohens_d, corrected, d_interval, effect, holm

__all__ = ["benjamini_hochberg", "cohens_d", "compare", "corrected", "d_interval", "effect", "holm"]
