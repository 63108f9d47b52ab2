"""Contexts of one length from texts, and which contexts a feature is tried on.

Source of the packing: arXiv 2606.08365 and its scripts (texts tokenised without special tokens,
joined by EOS, cut into pieces, BOS in front).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..adapters.activations import bos_policy
from ..adapters.transformer_lens import bos_token, stop_tokens

LENGTH = 48
"""Tokens of a context, the BOS included (arXiv 2606.08365)."""


def packed_contexts(
    model: Any,
    texts: Sequence[str],
    *,
    n: int | None = None,
    length: int = LENGTH,
    sae: Any = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> Int[Tensor, "context pos"]:
    """Contexts of `length` tokens without padding: distinct texts shuffled, joined by EOS, cut.

    With a BOS (as `sae` was trained, unless `prepend_bos` says) each begins with it (the EOS where
    the tokenizer has no BOS). `n` contexts, or all whole ones. Raises ValueError when the texts
    give fewer.
    """
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("this model has no tokenizer: give tokens [context, pos]")
    distinct = list(dict.fromkeys(" ".join(text.split()) for text in texts))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
    ends = stop_tokens(model)
    stream: list[int] = []
    bos = bos_policy(model, sae, prepend_bos)
    size = length - int(bos)
    for place in order.tolist():
        found = model.tokenizer(distinct[place], add_special_tokens=False, verbose=False)
        stream += [*found["input_ids"], *ends[:1]]
        if n is not None and len(stream) >= n * size:
            break
    whole = len(stream) // size
    if whole < (n or 1):
        raise ValueError(f"{len(distinct)} texts give {whole} contexts of {length} tokens, not {n}")
    pieces = torch.tensor(stream[: (n or whole) * size]).reshape(-1, size)
    if not bos:
        return pieces
    opening = bos_token(model)
    if opening is None and not ends:
        raise ValueError("the tokenizer has neither BOS nor EOS: pass prepend_bos=False")
    first = torch.full((len(pieces), 1), ends[0] if opening is None else opening)
    return torch.cat([first, pieces], dim=1)


def mixed_contexts(
    values: Float[Tensor, " context"], per_kind: int, *, generator: torch.Generator
) -> Int[Tensor, " chosen"]:
    """`per_kind` contexts with the largest values, as many with the smallest, as many at random.

    Ties are broken at random, so that features which are mostly zero do not share their "lowest"
    contexts. The random ones come from the rest. Sorted, each once; fewer when there are not
    enough.
    """
    shuffled = torch.randperm(len(values), generator=generator)
    order = shuffled[values[shuffled].argsort(stable=True)]
    low, high = order[:per_kind], order[max(len(order) - per_kind, 0) :]
    rest = order[per_kind : max(len(order) - per_kind, per_kind)]
    chosen = rest[torch.randperm(len(rest), generator=generator)[:per_kind]]
    return torch.cat([low, high, chosen]).unique()


@dataclass(frozen=True)
class TokensRef:
    """Contexts in a safetensors file, and a hash of them."""

    path: str
    fingerprint: str
    count: int

    @classmethod
    def write(cls, tokens: Int[Tensor, "context pos"], path: str | Path) -> TokensRef:
        """Write contexts where a plan can name them."""
        from safetensors.torch import save_file

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({"tokens": tokens.long().contiguous()}, str(path))
        return cls.of(path)

    @classmethod
    def of(cls, path: str | Path) -> TokensRef:
        tokens = _read_tokens(path)
        return cls(str(Path(path).resolve()), tokens_fingerprint(tokens), len(tokens))

    def load(self) -> Int[Tensor, "context pos"]:
        """The contexts. Raises ValueError when others lie there than when the plan was made."""
        tokens = _read_tokens(self.path)
        if tokens_fingerprint(tokens) != self.fingerprint:
            raise ValueError(f"the contexts in {self.path} have changed: make the plan again")
        return tokens


def _read_tokens(path: str | Path) -> Tensor:
    from safetensors.torch import load_file

    found = load_file(str(path))
    if set(found) != {"tokens"} or found["tokens"].ndim != 2:
        raise ValueError(f"{path} holds no tensor 'tokens' of shape [context, pos]")
    return found["tokens"].long()


def tokens_fingerprint(tokens: Int[Tensor, "context pos"]) -> str:
    """SHA-256 over the shape and the ids."""
    digest = hashlib.sha256(f"{tuple(tokens.shape)}\0".encode())
    digest.update(tokens.cpu().long().contiguous().numpy().tobytes())
    return digest.hexdigest()
