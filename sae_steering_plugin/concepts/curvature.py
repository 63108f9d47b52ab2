"""Curvature of the loss around one linear map, by Kronecker factors. Experimental.

For y = x W with W `[in, out]` and g the gradient of the loss by y,

    A = E[x x'],  G = E[g g'],   A = U_A diag(mu) U_A',  G = U_G diag(lam) U_G'
    C = U_A' W U_G,   mass_ij = mu_i lam_j,   W = sum_ij C_ij u_i v_j'

Directions that many texts share have large mass, those that serve a few memorised texts a small
one. Source: Merullo et al., arXiv 2510.24256 (memorised recitation 99.9 to 3.4 %, arithmetic kept
at 66 to 74 %). That a feature's decoder row lies in directions of high or low curvature is an
inference of this project.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SLACK = 1e-9
"""Share of the whole mass by which a sum may fall short of rho = 1 through rounding."""


@dataclass(eq=False)
class KroneckerFactors:
    """Running sums of x x' and g g' over tokens, float64; `add` takes tokens in."""

    inputs: Float[Tensor, "in in"]
    outputs: Float[Tensor, "out out"]
    tokens: int = 0

    @classmethod
    def empty(cls, d_in: int, d_out: int) -> KroneckerFactors:
        wide = torch.float64
        return cls(torch.zeros(d_in, d_in, dtype=wide), torch.zeros(d_out, d_out, dtype=wide))

    def add(self, x: Float[Tensor, "token in"], g: Float[Tensor, "token out"]) -> None:
        """Count tokens: what the map read, and the gradient of their loss by what it wrote."""
        x, g = x.detach().double().cpu(), g.detach().double().cpu()
        self.inputs = self.inputs + x.T @ x
        self.outputs = self.outputs + g.T @ g
        self.tokens += len(x)

    @property
    def A(self) -> Float[Tensor, "in in"]:
        """Mean of x x'. Raises ValueError before the first token."""
        return self._mean(self.inputs)

    @property
    def G(self) -> Float[Tensor, "out out"]:
        """Mean of g g'. Raises ValueError before the first token."""
        return self._mean(self.outputs)

    def _mean(self, total: Tensor) -> Tensor:
        if not self.tokens:
            raise ValueError("no token was seen, so there is no curvature")
        return total / self.tokens


@dataclass(frozen=True, eq=False)
class SplitWeight:
    """A matrix cut in two that add up to it: what is kept, and how much that is.

    `pairs` are the numbers of pairs (of directions, or of ranks) kept, of `of`; `energy` is the
    share of |W|^2 kept, `mass` the share of curvature (NaN for a cut that does not know it).
    """

    kept: Float[Tensor, "in out"]
    pairs: int
    of: int
    energy: float
    mass: float


def curvature_split(
    W: Float[Tensor, "in out"], A: Float[Tensor, "in in"], G: Float[Tensor, "out out"], rho: float
) -> SplitWeight:
    """W with only the pairs of largest curvature, up to the first at which their mass reaches
    `rho` of the whole; float64.

    rho = 1 keeps every pair and gives W back. Raises ValueError for a rho outside (0, 1] and where
    there is no curvature at all. Source: arXiv 2510.24256.
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho is {rho}; it must lie above 0 and not above 1")
    mu, left = torch.linalg.eigh(A.double())
    lam, right = torch.linalg.eigh(G.double())
    mass = mu.clamp_min(0)[:, None] * lam.clamp_min(0)
    whole = float(mass.sum())
    if not whole > 0:
        raise ValueError("there is no curvature: every input or every gradient is zero")
    sizes, order = mass.flatten().sort(descending=True, stable=True)
    reached = sizes.cumsum(0) >= (rho - SLACK) * whole
    count = mass.numel() if rho == 1 else int(reached.long().argmax()) + 1
    mask = torch.zeros(mass.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    mask = mask.reshape(mass.shape)
    coordinates = left.T @ W.double() @ right
    cut = coordinates * mask
    return SplitWeight(
        left @ cut @ right.T, count, mass.numel(),
        float(cut.square().sum() / coordinates.square().sum()), float(mass[mask].sum() / whole),
    )  # fmt: skip


def singular_split(W: Float[Tensor, "in out"], energy: float) -> SplitWeight:
    """W with only its largest singular values, up to the first at which they reach `energy` of
    |W|^2: what a cut of the same size does that knows no data. float64."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}; it must lie above 0 and not above 1")
    left, sizes, right = torch.linalg.svd(W.double(), full_matrices=False)
    share = sizes.square().cumsum(0) / sizes.square().sum()
    count = len(sizes) if energy == 1 else int((share >= energy - SLACK).long().argmax()) + 1
    kept = (left[:, :count] * sizes[:count]) @ right[:count]
    return SplitWeight(kept, count, len(sizes), float(share[count - 1]), float("nan"))


def row_curvature(
    rows: Float[Tensor, "latent d_model"], G: Float[Tensor, "d_model d_model"]
) -> Float[Tensor, " latent"]:
    """d' G d per decoder row, at length 1, in units of the mean over all directions (tr G / d).

    Above 1 the loss bends more along the feature than along a random direction. NaN for a zero row.
    """
    wide = rows.detach().double()
    form = G.double()
    bent = ((wide @ form) * wide).sum(1) / wide.square().sum(1)
    return bent / (form.trace() / len(form))
