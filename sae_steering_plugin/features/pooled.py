"""Codes of whole texts: one number per text and feature, stored without the zeros.

A text's tokens are pooled to one value per feature (`runs.pooled_codes.collect_codes`); what comes
out is mostly zero, so it is kept column by column (CSC), and every score of `scores.py` is one sort
or one sparse product over the values that are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

FORMAT = "sae-steering-plugin pooled codes 1"


@dataclass(frozen=True, eq=False)
class PooledCodes:
    """Texts x features, zeros not stored: feature j holds entries `starts[j]` to `starts[j + 1]`.

    `values[e]` is the pooled code of text `examples[e]`; within a feature `examples` ascend.
    `n_tokens[i]` is how many tokens text i was pooled over. `pooling` says how.
    """

    values: Float[Tensor, " stored"]
    examples: Int[Tensor, " stored"]
    starts: Int[Tensor, " bound"]
    n_tokens: Int[Tensor, " example"]
    pooling: str
    sae_id: str
    hook_name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        starts = self.starts
        if len(starts) < 2 or int(starts[0]) != 0 or int(starts[-1]) != len(self.values):
            raise ValueError("starts must run from 0 to the number of stored values")
        if bool((starts[1:] < starts[:-1]).any()):
            raise ValueError("starts must not descend")
        if len(self.examples) != len(self.values):
            raise ValueError(f"{len(self.values)} values and {len(self.examples)} examples")
        if len(self.examples) and not 0 <= int(self.examples.min()) <= int(
            self.examples.max()
        ) < len(self.n_tokens):
            raise ValueError(f"an entry names a text outside 0..{len(self.n_tokens) - 1}")
        if self.values.dtype != torch.float32:
            raise ValueError(f"pooled codes are float32, not {self.values.dtype}: ties are exact")
        if not torch.isfinite(self.values).all():
            raise ValueError(f"pooled codes in {self.sae_id!r} hold a value that is not finite")

    def __len__(self) -> int:
        return len(self.n_tokens)

    @property
    def n_features(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> Int[Tensor, " feature"]:
        """In how many texts each feature is not zero; a dead feature has 0."""
        return self.starts.diff()

    @property
    def signed(self) -> bool:
        """True when some pooled code is negative, as AbsTopK gives."""
        return bool((self.values < 0).any())

    def matrix(self) -> Any:
        """The same as a `scipy.sparse.csc_array` of float64, texts x features."""
        from scipy.sparse import csc_array

        return csc_array(
            (self.values.double().numpy(), *self.places()), shape=(len(self), self.n_features)
        )

    def places(self) -> tuple[Int[np.ndarray, " stored"], Int[np.ndarray, " bound"]]:
        """`examples` and `starts` in 32 bits where they fit: scikit-learn reads no others."""
        index = np.int32 if len(self.values) < 2**31 else np.int64
        return self.examples.numpy().astype(index), self.starts.numpy().astype(index)

    def dense(self) -> Float[Tensor, "example feature"]:
        """All of it; for small dictionaries only."""
        full = torch.zeros(len(self), self.n_features)
        full[self.examples, self.columns()] = self.values.float()
        return full

    def columns(self) -> Int[Tensor, " stored"]:
        """The feature of every stored value."""
        return torch.repeat_interleave(torch.arange(self.n_features), self.counts)

    def of(self, examples: Sequence[int] | Tensor) -> PooledCodes:
        """Only the texts `examples`, in that order."""
        chosen = torch.as_tensor(examples, dtype=torch.long)
        if len(chosen) != len(chosen.unique()):
            raise ValueError("a text is named twice")
        place = torch.full((len(self),), -1)
        place[chosen] = torch.arange(len(chosen))
        new = place[self.examples]
        kept = new >= 0
        columns = self.columns()[kept]
        order = torch.argsort(columns * len(chosen) + new[kept])
        return PooledCodes(
            self.values[kept][order],
            new[kept][order],
            starts_of(columns, self.n_features),
            self.n_tokens[chosen],
            self.pooling,
            self.sae_id,
            self.hook_name,
            self.settings,
        )

    @classmethod
    def from_dense(
        cls,
        codes: Float[Tensor, "example feature"],
        *,
        sae_id: str = "",
        hook_name: str = "",
        pooling: str = "given",
        n_tokens: Tensor | None = None,
    ) -> PooledCodes:
        """Pooled codes, or any features of texts, that stand in one table."""
        columns, examples = codes.T.nonzero(as_tuple=True)
        return cls(
            codes[examples, columns].float(),
            examples,
            starts_of(columns, codes.shape[1]),
            torch.ones(len(codes), dtype=torch.long) if n_tokens is None else n_tokens,
            pooling,
            sae_id,
            hook_name,
        )

    def save(self, folder: str | Path) -> None:
        """Write `codes.safetensors` and `codes.json` into `folder`."""
        from safetensors.torch import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: getattr(self, name).contiguous()
            for name in ("values", "examples", "starts", "n_tokens")
        }
        save_file(tensors, target / "codes.safetensors")
        about = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in ("pooling", "sae_id", "hook_name")},
            "settings": dict(self.settings),
        }
        (target / "codes.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> PooledCodes:
        """Read what `save` wrote. Raises ValueError for another format."""
        from safetensors.torch import load_file

        source = Path(folder)
        about = json.loads((source / "codes.json").read_text(encoding="utf-8"))
        if about.pop("format", None) != FORMAT:
            raise ValueError(f"{source} holds no pooled codes of this version ({FORMAT!r})")
        tensors: dict[str, Any] = load_file(source / "codes.safetensors")
        return cls(**tensors, **about)


def starts_of(columns: Int[Tensor, " stored"], n_features: int) -> Int[Tensor, " bound"]:
    """Where each feature's entries begin, from the (sorted) feature of every entry."""
    counts = torch.bincount(columns, minlength=n_features)
    return torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
