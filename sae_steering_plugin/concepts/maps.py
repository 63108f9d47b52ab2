"""The linear map that rescales chosen concepts of a gradient and leaves everything else alone.

Least-squares coordinates of a gradient g over rows D of a dictionary are (D D')^-1 D g. The map
M = I + D' diag(s - 1) (D D')^-1 D multiplies them by s and keeps the orthogonal complement, also
for rows that are not orthogonal, where subtracting (g . d) d row by row is wrong. Source:
shared/methods/gradient_projection section 5.1 (algebra; no paper gives the edit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

CONDITION = 1e4
"""Above this condition number of D D' rows are taken for copies of one another and dropped."""


@dataclass(frozen=True, eq=False)
class ConceptBasis:
    """Unit decoder rows `[concept d_model]` that are independent, and their dual rows.

    `dual @ g` are the least-squares coordinates of g, and `rows.T @ (dual @ g)` its part in the
    span of the rows. `kept` are the positions of these rows among those given, `dropped` those
    left out as near-copies; `condition` is the condition number of `rows @ rows.T`.
    """

    rows: Float[Tensor, "concept d_model"]
    dual: Float[Tensor, "concept d_model"]
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    condition: float

    def coordinates(self, g: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch concept"]:
        """How much of g is made of each concept, given the others."""
        return g @ self.dual.T.to(g)

    def orthonormal(self) -> Float[Tensor, "d_model concept"]:
        """An orthonormal basis of the span, as columns."""
        return torch.linalg.qr(self.rows.T.double()).Q.to(self.rows)


def concept_basis(
    rows: Float[Tensor, "concept d_model"], *, condition: float = CONDITION
) -> ConceptBasis:
    """The basis of these decoder rows, brought to length 1; near-copies are dropped by pivoted QR.

    Raises ValueError for no row, a row of length 0, and more rows than half the width: coordinates
    of so many concepts say little (gradient_projection 3.4).
    """
    rows = rows.detach().double()
    count, width = rows.shape
    if not count:
        raise ValueError("no concept is given")
    if count > width // 2:
        raise ValueError(
            f"{count} concepts in {width} dimensions: at most half of them have coordinates that "
            "mean something; choose fewer"
        )
    lengths = rows.norm(dim=1)
    if bool((lengths == 0).any()):
        place = int((lengths == 0).nonzero()[0])
        raise ValueError(f"decoder row {place} of those given is zero: it names no concept")
    unit = rows / lengths[:, None]
    kept = independent_rows(unit, condition)
    chosen = unit[list(kept)]
    gram = chosen @ chosen.T
    dual = torch.linalg.solve(gram, chosen)
    dropped = tuple(sorted(set(range(count)) - set(kept)))
    return ConceptBasis(chosen, dual, kept, dropped, float(torch.linalg.cond(gram)))


def independent_rows(unit: Float[Tensor, "concept d_model"], condition: float) -> tuple[int, ...]:
    """Positions of rows, in their own order, whose Gram matrix has at most this condition number.

    Rows are taken by pivoted QR, the one farthest from the span of those taken first.
    """
    from scipy.linalg import qr

    _, _, order = qr(unit.T.numpy(), mode="economic", pivoting=True)
    for count in range(len(unit), 0, -1):
        chosen = sorted(int(i) for i in order[:count])
        part = unit[chosen]
        if float(torch.linalg.cond(part @ part.T)) <= condition:
            return tuple(chosen)
    return (int(order[0]),)


def edited(
    g: Float[Tensor, "*batch d_model"],
    basis: ConceptBasis,
    scales: Sequence[float] | Float[Tensor, "*batch concept"],
) -> Float[Tensor, "*batch d_model"]:
    """g with its coordinates over the basis multiplied by `scales` (0 suppresses, 1 leaves).

    One scale per concept, or one per concept and position.
    """
    factors = torch.as_tensor(scales, dtype=g.dtype, device=g.device)
    return g + (basis.coordinates(g) * (factors - 1)) @ basis.rows.to(g)


def scale_map(basis: ConceptBasis, scales: Sequence[float]) -> Float[Tensor, "d_model d_model"]:
    """M itself, for small widths: `M @ g == edited(g, basis, scales)`."""
    identity = torch.eye(basis.rows.shape[1], dtype=basis.rows.dtype)
    return edited(identity, basis, scales).T
