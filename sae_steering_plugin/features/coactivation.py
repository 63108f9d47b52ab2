"""How often features fire together, counted from sparse codes; the pair matrix is never held.

With codes A (tokens x features, 1 where active), the counts C = A'A are worked out for some rows at
a time, reduced to a few figures per feature, and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

PANEL = 2048
"""Features that others are counted against: the most frequent ones (arXiv 2606.08365, code)."""

TOP_MASS = 20
"""`coact_top20_mass` is the share of so many partners (arXiv 2606.08365, Llama script)."""

ROWS = 1024
"""Features whose counts are held at once."""


@dataclass(eq=False)
class ActiveCodes:
    """Which features are active at which tokens: `features[starts[t] : starts[t + 1]]` at token t.

    Grows by `add`; no value is kept, four bytes per active feature.
    """

    n_features: int
    _features: list[np.ndarray] = field(default_factory=list)
    _counts: list[np.ndarray] = field(default_factory=list)

    def add(self, tokens: Int[Tensor, " hit"], features: Int[Tensor, " hit"], n: int) -> None:
        """Take in `n` further tokens; `tokens[i]` in 0..n-1 has `features[i]` active."""
        rows, names = tokens.cpu().numpy(), features.cpu().numpy()
        if len(rows) and (rows.min() < 0 or rows.max() >= n or names.max() >= self.n_features):
            raise ValueError(f"an active feature lies outside {n} tokens x {self.n_features}")
        order = np.lexsort((names, rows))
        self._features.append(names[order].astype(np.int32))
        self._counts.append(np.bincount(rows, minlength=n).astype(np.int32))

    def merge(self, other: ActiveCodes) -> ActiveCodes:
        """The tokens of this one, then those of the other."""
        if self.n_features != other.n_features:
            raise ValueError(f"codes of {self.n_features} and {other.n_features} features")
        features, counts = self._features + other._features, self._counts + other._counts
        return ActiveCodes(self.n_features, features, counts)

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self._counts))

    def matrix(self) -> Any:
        """Tokens x features as a `scipy.sparse.csr_array` of 32-bit ones."""
        from scipy.sparse import csr_array

        features = np.concatenate(self._features) if self._features else np.empty(0, np.int32)
        counts = np.concatenate(self._counts) if self._counts else np.empty(0, np.int32)
        starts = np.concatenate([[0], counts.cumsum(dtype=np.int64)])
        if starts[-1] < 2**31:
            starts = starts.astype(np.int32)  # SciPy keeps 32-bit indices only when both are
        shape = (len(counts), self.n_features)
        return csr_array((np.ones(len(features), dtype=np.int32), features, starts), shape=shape)

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors for a safetensors file."""
        names = np.concatenate([np.empty(0, np.int32), *self._features])
        counts = np.concatenate([np.empty(0, np.int32), *self._counts])
        return {"features": torch.from_numpy(names), "counts": torch.from_numpy(counts)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], n_features: int) -> ActiveCodes:
        """The codes that `state` was taken of."""
        return cls(n_features, [state["features"].numpy()], [state["counts"].numpy()])

    @classmethod
    def from_dense(cls, active: Tensor) -> ActiveCodes:
        """From a boolean table [token, feature]."""
        found = cls(active.shape[1])
        rows, features = active.nonzero(as_tuple=True)
        found.add(rows, features, len(active))
        return found


@dataclass(frozen=True, eq=False)
class Coactivation:
    """Figures per feature, and its closest partners: `partners[i]` with `similarity[i]`, best
    first (-1 and NaN where there are fewer)."""

    columns: dict[str, Tensor]
    partners: Int[Tensor, "feature k"]
    similarity: Tensor
    settings: dict[str, Any]


def coactivation_of(
    codes: ActiveCodes,
    *,
    panel: int | None = PANEL,
    k: int = 0,
    by: str = "jaccard",
    keep_self: bool = False,
) -> Coactivation:
    """How each feature's partners are spread, over the `panel` most frequent features or over all
    (None).

    c_fj counts tokens at which f and j are both active; f itself is left out unless `keep_self`.
    `coact_entropy_norm` = H(c_f / sum_j c_fj) / ln |R| with |R| the size of the panel,
    `coact_count_mean` = sum_j c_fj / tokens at which f is active, `coact_top20_mass` the share of
    its 20 most frequent partners, `coact_degree` the number of partners. All NaN for a feature that
    is never active; the entropy is NaN too for one that is always active alone.

    With `k`, the k best partners by Jaccard index (c / (n_f + n_j - c)) or lift
    (c T / (n_f n_j)); ties go to the smaller feature. Panel ties go to the smaller feature.

    Source: arXiv 2606.08365, code (there with `keep_self`, and 0 for a feature never active).
    """
    if by not in ("jaccard", "lift"):
        raise ValueError(f"by is {by!r}; choose 'jaccard' or 'lift'")
    n = codes.n_features
    if panel is not None and panel < 2:
        raise ValueError(f"the panel has {panel} features; a spread needs two")
    if not codes.n_tokens:
        raise ValueError("no token was counted")
    active = codes.matrix()
    counts = np.bincount(active.indices, minlength=n)
    chosen = np.arange(n)
    if panel is not None and panel < n:
        chosen = np.sort(np.argsort(-counts, kind="stable")[:panel])
    against = active if len(chosen) == n else active[:, chosen]
    by_feature = active.T.tocsr()
    parts = [
        _reduced(
            by_feature[first : first + ROWS] @ against,
            np.arange(first, min(first + ROWS, n)),
            chosen,
            counts,
            codes.n_tokens,
            keep_self,
            k,
            by,
        )
        for first in range(0, n, ROWS)
    ]
    columns = {
        name: torch.from_numpy(np.concatenate([part[0][name] for part in parts]))
        for name in parts[0][0]
    }
    settings: dict[str, Any] = {
        "coactivation_tokens": codes.n_tokens,
        "coactivation_panel": int(len(chosen)),
        "coactivation_self": keep_self,
    }
    if k:
        settings |= {"partners": k, "partners_by": by}
    return Coactivation(
        columns,
        torch.from_numpy(np.concatenate([part[1] for part in parts])),
        torch.from_numpy(np.concatenate([part[2] for part in parts])),
        settings,
    )


def _reduced(
    together: Any,
    rows: np.ndarray,
    panel: np.ndarray,
    counts: np.ndarray,
    n_tokens: int,
    keep_self: bool,
    k: int,
    by: str,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The figures of the features `rows` from their sparse counts against the panel."""
    row = np.repeat(np.arange(len(rows)), np.diff(together.indptr))
    column, c = panel[together.indices], together.data.astype(np.float64)
    if not keep_self:
        other = column != rows[row]
        row, column, c = row[other], column[other], c[other]
    m = len(rows)
    total = np.bincount(row, c, m)
    degree = np.bincount(row, minlength=m).astype(np.float64)
    own = counts[rows]
    with np.errstate(invalid="ignore", divide="ignore"):
        entropy = np.log(total) - np.bincount(row, c * np.log(c), m) / total
        entropy = np.clip(entropy, 0, None) / np.log(len(panel))
        order = np.lexsort((-c, row))
        rank = np.arange(len(c)) - np.searchsorted(row, np.arange(m))[row]
        biggest = rank < TOP_MASS
        mass = np.bincount(row[biggest], c[order][biggest], m) / total
        mean = total / own
    alone = total == 0
    columns = {
        "coact_entropy_norm": np.where(alone, np.nan, entropy),
        "coact_count_mean": np.where(own > 0, mean, np.nan),
        "coact_top20_mass": np.where(alone, np.nan, mass),
        "coact_degree": np.where(own > 0, degree, np.nan),
    }
    partners = np.full((m, k), -1, dtype=np.int64)
    similarity = np.full((m, k), np.nan)
    if k:
        n_f, n_j = own[row].astype(np.float64), counts[column]
        close = c / (n_f + n_j - c) if by == "jaccard" else c * n_tokens / (n_f * n_j)
        order = np.lexsort((column, -close, row))
        best = rank < k
        partners[row[best], rank[best]] = column[order][best]
        similarity[row[best], rank[best]] = close[order][best]
    return columns, partners, similarity
