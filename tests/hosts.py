"""Tiny hosts, built on disk and in memory: no network, no weights, two layers, d_model 16."""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any

import torch

SITE = "blocks.0.hook_resid_post"
D_MODEL = 16
CORPUS = (
    "the cat sat on the mat",
    "a dog ran in the park and the cat sat still",
    "I believe the answer is (A) and not (B).",
    "Choices:\n (A) yes\n (B) no\nAnswer: (A)",
)


@cache
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer with <pad> 0, <bos> 1, <eos> 2, right padding; fast, with
    offsets."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    model.train_from_iterator([text for text in CORPUS for _ in range(9)], trainer)
    folder = tempfile.mkdtemp(prefix="tiny_tokenizer_")
    PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="right",
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)  # a reload gives the tokenizer its name_or_path


@cache
def gpt2_tokenizer() -> Any:
    """The tiny tokenizer with one token, id 1, for padding, begin and end, as GPT-2 has."""
    from transformers import AutoTokenizer

    shared = type(tiny_tokenizer()).from_pretrained(tiny_tokenizer().name_or_path)
    shared.pad_token = shared.eos_token = "<bos>"
    folder = tempfile.mkdtemp(prefix="tiny_tokenizer_")
    shared.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def tiny_hooked(*, n_ctx: int = 64, seed: int = 0) -> Any:
    """A HookedSAETransformer with random weights, learned positions and the tiny tokenizer."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2,
        d_model=D_MODEL,
        n_ctx=n_ctx,
        d_head=8,
        n_heads=2,
        d_mlp=32,
        d_vocab=len(tiny_tokenizer()),
        act_fn="gelu",
        normalization_type="LN",
        seed=seed,
        device="cpu",
        initializer_range=0.3,
    )
    return HookedSAETransformer(config, tokenizer=tiny_tokenizer()).eval()


def tiny_bridge(*, n_ctx: int = 64, seed: int = 0) -> Any:
    """An SAETransformerBridge around a random GPT-2 with the tiny tokenizer."""
    from sae_lens import SAETransformerBridge

    return SAETransformerBridge.boot_transformers(
        "tiny-gpt2",
        hf_model=tiny_hf(n_ctx=n_ctx, seed=seed),
        tokenizer=tiny_tokenizer(),
        device="cpu",
    )


def tiny_hf(*, n_ctx: int = 64, seed: int = 0) -> Any:
    """The random Hugging Face GPT-2 behind `tiny_bridge`, in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(
            n_layer=2,
            n_embd=D_MODEL,
            n_head=2,
            n_positions=n_ctx,
            vocab_size=len(tiny_tokenizer()),
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.3,
        )
        return GPT2LMHeadModel(config).eval()


def tiny_qwen_moe(*, n_ctx: int = 64, seed: int = 0) -> Any:
    """An SAETransformerBridge around a random Qwen3.5-MoE: three GatedDeltaNet layers, then one of
    attention."""
    from sae_lens import SAETransformerBridge
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen3_5MoeTextConfig(
            vocab_size=len(tiny_tokenizer()),
            hidden_size=D_MODEL,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            linear_num_value_heads=2,
            linear_num_key_heads=1,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=n_ctx,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.3,
        )
        model = Qwen3_5MoeForCausalLM(config).eval()
    model.config.architectures = ["Qwen3_5MoeForCausalLM"]
    return SAETransformerBridge.boot_transformers(
        "tiny-qwen-moe", hf_model=model, tokenizer=tiny_tokenizer(), device="cpu"
    )


def tiny_sae(
    architecture: str = "standard", *, d_sae: int = 32, seed: int = 0, **options: Any
) -> Any:
    """A random SAELens SAE of any architecture at `SITE`, with `options` for its config."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_class(architecture)
    metadata = SAEMetadata(hook_name=SITE, model_name="tiny", prepend_bos=True)
    if architecture in ("topk", "abstopk"):
        options.setdefault("k", 4)
    if architecture == "temporal":
        options.setdefault("n_heads", 2)
        options.setdefault("bottleneck_factor", 4)
    config = config_class(d_in=D_MODEL, d_sae=d_sae, metadata=metadata, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = sae_class(config)
        for name, parameter in sae.named_parameters():
            scale = 0.0 if name == "b_dec" else 0.3
            with torch.no_grad():
                parameter.copy_(torch.randn_like(parameter) * scale)
        if architecture.startswith("jumprelu"):
            with torch.no_grad():
                sae.threshold.copy_(torch.rand_like(sae.threshold) * 0.2 + 0.05)
    return sae.eval()


def tokens_of_length(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Random ordinary tokens `[batch length]` (never a special one)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, len(tiny_tokenizer()), (batch, length), generator=generator)


def tiny_llama(*, n_ctx: int = 64, seed: int = 0) -> Any:
    """An SAETransformerBridge around a random Llama with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _tiny_rotary(LlamaForCausalLM, LlamaConfig, n_ctx, seed)


def tiny_neox(*, n_ctx: int = 64, seed: int = 0) -> Any:
    """An SAETransformerBridge around a random GPT-NeoX (Pythia): parallel blocks."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return _tiny_rotary(GPTNeoXForCausalLM, GPTNeoXConfig, n_ctx, seed)


def tiny_gemma2(*, n_ctx: int = 64, seed: int = 0) -> Any:
    """An SAETransformerBridge around a random Gemma 2: a sliding window of 8, soft caps."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return _tiny_rotary(Gemma2ForCausalLM, Gemma2Config, n_ctx, seed, sliding_window=8, head_dim=8)


def tiny_olmo2(*, n_ctx: int = 64, seed: int = 0) -> Any:
    """An SAETransformerBridge around a random OLMo 2, which normalises what its blocks write and
    nothing that they read."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return _tiny_rotary(Olmo2ForCausalLM, Olmo2Config, n_ctx, seed)


def _tiny_rotary(model_class: Any, config_class: Any, n_ctx: int, seed: int, **options: Any) -> Any:
    from sae_lens import SAETransformerBridge

    if model_class.__name__ != "GPTNeoXForCausalLM":
        options["num_key_value_heads"] = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = config_class(
            vocab_size=len(tiny_tokenizer()),
            hidden_size=D_MODEL,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=n_ctx,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.3,
            **options,
        )
        model = model_class(config).eval()
    model.config.architectures = [model_class.__name__]
    return SAETransformerBridge.boot_transformers(
        f"tiny-{model_class.__name__.lower()}",
        hf_model=model,
        tokenizer=tiny_tokenizer(),
        device="cpu",
    )


def tiny_qwen3(*, n_ctx: int = 64, seed: int = 0) -> Any:
    """An SAETransformerBridge around a random Qwen 3: no biases, norms on queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _tiny_rotary(Qwen3ForCausalLM, Qwen3Config, n_ctx, seed, head_dim=8)


def tiny_hooked_like(**options: Any) -> Any:
    """A HookedSAETransformer of random weights, all biases among them, and any block shape."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    settings = dict(n_layers=2, d_model=D_MODEL, n_ctx=64, d_head=8, n_heads=2, d_mlp=32)
    settings |= dict(act_fn="gelu", normalization_type="LN", seed=0, initializer_range=0.3)
    config = HookedTransformerConfig(
        **{**settings, "d_vocab": len(tiny_tokenizer()), "device": "cpu", **options}
    )
    model = HookedSAETransformer(config, tokenizer=tiny_tokenizer()).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1].startswith("b_"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model
