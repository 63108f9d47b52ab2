"""A planted world: which feature detects each label and which one causes it is known.

shared/methods/supervised_feature_selection, section 8: 600 texts of 20 tokens, six labels of
prevalence about .1, a two-layer HookedTransformer of width 64 whose attention and MLPs write
nothing (so that the residual is the embedding), and an SAE with, per label, an *input twin*
(encoder on what the label's tokens share, decoder nearly silent) and an *output twin* (encoder and
decoder on the direction that the unembedding reads), and 20 random features.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

LABELS, OWN, BACKGROUND, RANDOM = 6, 5, 60, 20
D_MODEL, N_TEXTS, LENGTH = 64, 600, 20
SITE = "blocks.0.hook_resid_post"
PROMPT = "word0 word1 word2 word3"


@dataclass(frozen=True)
class Planted:
    """`inputs[l]` and `outputs[l]` are the twins of label l; the rest of the SAE is random."""

    model: Any
    sae: Any
    texts: tuple[str, ...]
    labels: dict[str, np.ndarray]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tokens: dict[str, tuple[int, ...]]

    @property
    def random(self) -> tuple[int, ...]:
        return tuple(range(2 * LABELS, 2 * LABELS + RANDOM))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>"]
    words += [f"own{label}x{i}" for label in range(LABELS) for i in range(OWN)]
    words += [f"word{i}" for i in range(BACKGROUND)]
    table = {word: number for number, word in enumerate(words)}
    model = Tokenizer(models.WordLevel(table, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tempfile.mkdtemp(prefix="planted_tokenizer_")
    PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def directions(generator: torch.Generator) -> torch.Tensor:
    """Orthonormal rows without a mean, so that the final norm's centring leaves them alone."""
    drawn = torch.randn(D_MODEL, D_MODEL - 1, generator=generator)
    drawn = drawn - drawn.mean(dim=0, keepdim=True)
    return torch.linalg.qr(drawn)[0].T[: D_MODEL - 2]


def drawn_texts(seed: int = 0) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    holds = rng.random((N_TEXTS, LABELS)) < 0.1
    texts = []
    for row in holds:
        words = []
        for _ in range(LENGTH):
            hit = [label for label in range(LABELS) if rng.random() < (0.2 if row[label] else 0.01)]
            words.append(
                f"own{hit[0]}x{rng.integers(OWN)}" if hit else f"word{rng.integers(BACKGROUND)}"
            )
        texts.append(" ".join(words))
    return tuple(texts), {f"label {i}": holds[:, i].astype(float) for i in range(LABELS)}


@cache
def planted() -> Planted:
    from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from transformer_lens import HookedTransformerConfig

    words = tokenizer()
    config = HookedTransformerConfig(
        n_layers=2, d_model=D_MODEL, n_ctx=32, d_head=16, n_heads=2, d_mlp=32,
        d_vocab=len(words), act_fn="gelu", normalization_type="LN", seed=0, device="cpu",
    )  # fmt: skip
    model = HookedSAETransformer(config, tokenizer=words).eval()
    generator = torch.Generator().manual_seed(0)
    basis = directions(generator)
    read, write, null, rest = basis[:6], basis[6:12], basis[12], basis[13:]
    embed = torch.randn(len(words), len(rest), generator=generator) @ rest * 0.4
    unembed = torch.randn(len(words), len(rest), generator=generator) @ rest
    unembed = 0.6 * unembed / unembed.norm(dim=1, keepdim=True)
    own = {}
    for label in range(LABELS):
        first = 3 + label * OWN
        own[f"label {label}"] = tuple(range(first, first + OWN))
        embed[first : first + OWN] = 3.0 * read[label] + 0.1 * write[label]
        unembed[first : first + OWN] = write[label] * 0.6
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn" in name or "mlp" in name:
                parameter.zero_()
        model.pos_embed.W_pos.zero_()
        model.embed.W_E.copy_(embed)
        model.unembed.W_U.copy_(unembed.T)
        model.unembed.b_U.zero_()
    d_sae = 2 * LABELS + RANDOM
    sae = StandardSAE(
        StandardSAEConfig(
            d_in=D_MODEL, d_sae=d_sae, apply_b_dec_to_input=False,
            metadata=SAEMetadata(hook_name=SITE, model_name="planted", prepend_bos=True),
        )
    ).eval()  # fmt: skip
    noise = torch.randn(2, RANDOM, len(rest), generator=generator) @ rest
    noise = noise / noise.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([read, write, noise[0]]).T)
        sae.W_dec.copy_(torch.cat([0.1 * write + 0.995 * null, write, noise[1]]))
        sae.b_enc.copy_(torch.cat([torch.full((2 * LABELS,), -1e-3), torch.full((RANDOM,), -0.3)]))
        sae.b_dec.zero_()
    texts, labels = drawn_texts()
    inputs, outputs = tuple(range(LABELS)), tuple(range(LABELS, 2 * LABELS))
    return Planted(model, sae, texts, labels, inputs, outputs, own)
