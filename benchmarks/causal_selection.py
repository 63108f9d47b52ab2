"""Does the causal filter find what acts where detection ties? Synthetic twins, and the world.

`python -m benchmarks.causal_selection [--quick] [--models NAME ...] [--json FILE] [--table FILE]`

`sae_lens.synthetic`: every concept has two features that fire on the same tokens; the unembedding
reads one of them (the *output* feature) and not the other. An SAE matches them up to noise, which
is varied, so that no figure rests on one difficulty. Recall is of the output feature. World: nobody
knows a planted feature there, so each way of choosing is judged by what its features do: the gain
of the concept's lexicon over random features of the same length, on openings of other wordings.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.pages import asked, give  # noqa: E402
from benchmarks.selection_recall import labelled  # noqa: E402
from sae_steering_plugin import load_organism, select_features  # noqa: E402
from sae_steering_plugin.effects.contrast import corrected, effect  # noqa: E402
from sae_steering_plugin.effects.intervals import mean_interval, share_interval  # noqa: E402
from sae_steering_plugin.organisms import list_organisms  # noqa: E402
from sae_steering_plugin.runs.axbench.world import known_concepts  # noqa: E402
from sae_steering_plugin.runs.causal_scores import output_scores  # noqa: E402
from sae_steering_plugin.runs.choice_evaluation import primary_sae  # noqa: E402
from sae_steering_plugin.runs.option_choice import (  # noqa: E402
    choose_options,
    measured_gains,
    openings,
)
from sae_steering_plugin.runs.pooled_codes import collect_codes  # noqa: E402
from sae_steering_plugin.runs.selection import SelectedFeatures, needed_poolings  # noqa: E402

CONCEPTS, OWN, BACKGROUND, WIDTH, LENGTH = 48, 5, 60, 128, 24
IN_CONCEPT, ELSEWHERE, PREVALENCE = 0.2, 0.002, 0.1
"""Share of a concept's tokens in its own texts and in others; share of texts that hold it."""
NOISES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
BIAS = -0.4
SITE, PROMPT = "blocks.0.hook_resid_post", "word0 word1 word2 word3"
PRIOR = 1e-2
WAYS: Mapping[str, Mapping[str, Any]] = {
    "interpretability": {"variant": "interpretability"},
    "full, cut 1e-3": {"cut": 1e-3},
    "output among equals": {"cut": 0.0, "order": "equals"},
    "product of ranks": {"cut": 0.0, "order": "product"},
    "output score": {"cut": 0.0, "order": "output"},
}
GRID = {"cut": (1e-3, 1e-2, 1e-1), "order": ("score", "equals", "product")}
CHOSEN = "chosen on validation"
STRENGTHS = (1.0, 2.0, 5.0)
"""Multiples of a_max that the gain chooses among, on half of the prompts."""


# sae_lens.synthetic -------------------------------------------------------------------------------


def twins(noise: float, n: int, concepts: int, *, seed: int) -> dict[str, Any]:
    """Model, SAE, texts and labels; `outputs` and `inputs` are each concept's two latents.

    The model is an embedding and an unembedding: a concept's tokens are the sum of its two
    features, and only the second is what the unembedding of those tokens reads.
    """
    from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.synthetic import FeatureDictionary, init_sae_to_match_feature_dict
    from transformer_lens import HookedTransformerConfig

    count = 2 * concepts + BACKGROUND
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        words = tokenizer(concepts, folder)
        features = FeatureDictionary(count, WIDTH, seed=seed)
        known = features.feature_vectors.detach()
        model = HookedSAETransformer(
            HookedTransformerConfig(
                n_layers=1, d_model=WIDTH, n_ctx=LENGTH + 2, d_head=16, n_heads=2, d_mlp=16,
                d_vocab=len(words), act_fn="gelu", normalization_type="LN", seed=seed,
                device="cpu",
            ),
            tokenizer=words,
        ).eval()  # fmt: skip
        sae = StandardSAE(
            StandardSAEConfig(
                d_in=WIDTH, d_sae=count, apply_b_dec_to_input=False,
                metadata=SAEMetadata(hook_name=SITE, model_name="twins", prepend_bos=True),
            )
        ).eval()  # fmt: skip
        order = torch.randperm(count)
        init_sae_to_match_feature_dict(sae, features, noise, order)
        sae.b_enc.data.fill_(BIAS)
        embed, unembed = torch.zeros(len(words), WIDTH), 0.3 * torch.randn(len(words), WIDTH)
    unembed = unembed / unembed.norm(dim=1, keepdim=True)
    for c in range(concepts):
        own = slice(3 + c * OWN, 3 + (c + 1) * OWN)
        embed[own] = 2 * known[c] + 2 * known[concepts + c]
        unembed[own] = known[concepts + c]
    embed[3 + concepts * OWN :] = 2 * known[2 * concepts :]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn" in name or "mlp" in name:
                parameter.zero_()
        model.pos_embed.W_pos.zero_()
        model.embed.W_E.copy_(embed)
        model.unembed.W_U.copy_(unembed.T)
        model.unembed.b_U.zero_()
    texts, labels = drawn_texts(n, concepts, seed)
    place = torch.argsort(order).tolist()  # latent i is feature order[i]
    return {
        "model": model, "sae": sae, "texts": texts, "labels": labels,
        "inputs": place[:concepts], "outputs": place[concepts : 2 * concepts],
    }  # fmt: skip


def tokenizer(concepts: int, folder: str) -> Any:
    """A tokenizer of whole words, written to `folder`: the host reads it again from there."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>"]
    words += [f"own{c}x{i}" for c in range(concepts) for i in range(OWN)]
    words += [f"word{i}" for i in range(BACKGROUND)]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def drawn_texts(n: int, concepts: int, seed: int) -> tuple[list[str], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    holds = rng.random((n, concepts)) < PREVALENCE
    texts = []
    for row in holds:
        words = []
        for _ in range(LENGTH):
            fires = rng.random(concepts) < np.where(row, IN_CONCEPT, ELSEWHERE)
            hit = rng.permutation(np.flatnonzero(fires))[:1]
            words.append(
                f"own{hit[0]}x{rng.integers(OWN)}"
                if len(hit)
                else f"word{rng.integers(BACKGROUND)}"
            )
        texts.append(" ".join(words))
    return texts, {f"concept {c}": holds[:, c].astype(float) for c in range(concepts)}


def every_way(
    model: Any, sae: Any, texts: Sequence[str], labels: Any, **options: Any
) -> dict[str, SelectedFeatures]:
    """What each way of choosing selects from the same codes, splits and output scores."""
    codes = collect_codes(model, sae, texts, poolings=needed_poolings("mean"), progress=False)
    reading = {"prompt": options.pop("prompt")} if "prompt" in options else {}
    live = (codes["max"].counts > 0).nonzero().flatten().tolist()
    causal = output_scores(model, sae, live, k=options["lens_k"], progress=False, **reading)
    options |= {"codes": codes, "pooling": "mean", "prior": PRIOR, "progress": False}
    found = {
        name: select_features(
            model, sae, texts, labels, k=5,
            **{**options, **way, **({} if "variant" in way else {"causal": causal})},
        )
        for name, way in WAYS.items()
    }  # fmt: skip
    best = choose_options(
        model, sae, texts, labels, GRID, strengths=STRENGTHS, **reading, **options
    )
    found[CHOSEN] = select_features(
        model, sae, texts, labels, k=5, causal=causal, **options, **best.options
    )
    return found


def synthetic_rows(noise: float, n: int, concepts: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Recall@1 and @5 of the output feature by each way, and how often the twins stand together."""
    world = twins(noise, n, concepts, seed=seed)
    found = every_way(
        world["model"], world["sae"], world["texts"], world["labels"],
        prompt=PROMPT, lens_k=OWN, support=40, seed=seed,
    )  # fmt: skip
    rows = []
    for name, selected in found.items():
        row: dict[str, Any] = {"noise": noise, "way": name, "concepts": concepts}
        tops = [
            selected.selections[c].features if c in selected.selections else ()
            for c in world["labels"]
        ]
        for k in (1, 5):
            for kind in ("outputs", "inputs", "either"):
                twins_of = [{a, b} for a, b in zip(world["inputs"], world["outputs"], strict=True)]
                wanted = twins_of if kind == "either" else [{one} for one in world[kind]]
                hits = sum(bool(t & {*top[:k]}) for t, top in zip(wanted, tops, strict=True))
                interval = share_interval(hits, concepts)
                row |= {f"{kind}_{k}": hits / concepts, f"{kind}_{k}_low": interval.low,
                        f"{kind}_{k}_high": interval.high}  # fmt: skip
        rows.append(row)
    return rows


# The world ----------------------------------------------------------------------------------------


def world_rows(name: str, quick: bool) -> list[dict[str, Any]]:
    """Mean gain of each way over the world's concepts, paired with choosing by detection alone."""
    organism = load_organism(name)
    sae = organism.saes[primary_sae(name)]
    texts, table = labelled(400 if quick else 1500, "train", seed=0)
    few = 6 if quick else None
    labels = {c.words: table[:, i] for i, c in enumerate(known_concepts()[:few])}
    found = every_way(organism.model, sae, texts, labels, lens_k=20, support=15)
    prompts = openings(labelled(400, "test", seed=1)[0], 12 if quick else 24)
    gains, silent = measured_gains(
        organism.model, sae, list(found.values()), prompts,
        strengths=STRENGTHS, controls=5, seed=0,
    )  # fmt: skip
    counted = [c for c in labels if c not in silent]

    def gain(selected: SelectedFeatures, concept: str) -> float:
        if concept not in selected.selections:
            return 0.0
        return gains[concept, selected.selections[concept].features[0]]

    values = {way: [gain(one, c) for c in counted] for way, one in found.items()}
    base = values["interpretability"]
    tests = corrected(
        [
            effect(base, own, method=way, outcome="gain", judge="lexicon")
            for way, own in values.items()
            if own != base
        ]
    )
    known = {one.method: one for one in tests}
    rows = []
    for way, own in values.items():
        interval = mean_interval(own, seed=0)
        row = {
            "model": name, "way": way, "concepts": len(counted),
            "with_feature": sum(c in found[way].selections for c in counted),
            "same_feature": sum(
                found[way].selections[c].features[:1] == selection.features[:1]
                for c, selection in found["interpretability"].selections.items()
                if c in found[way].selections
            ),
            "gain": float(np.mean(own)), "low": interval.low, "high": interval.high,
            "without_lexicon": len(silent),
        }  # fmt: skip
        if way in known:
            difference = mean_interval([a - b for a, b in zip(own, base, strict=True)], seed=0)
            row |= {
                "difference": float(np.mean(own) - np.mean(base)), "difference_low": difference.low,
                "difference_high": difference.high, "p": known[way].p_value,
                "p_adjusted": known[way].p_adjusted,
            }  # fmt: skip
        rows.append(row)
    return rows


# The page -----------------------------------------------------------------------------------------


def page(synthetic: Sequence[Mapping[str, Any]], world: Sequence[Mapping[str, Any]]) -> str:
    """The results as the page in docs/."""
    said = str(__doc__).split("\n\n")
    lines = [
        "# Selection: does the causal filter find what acts?",
        "",
        "Written by `python -m benchmarks.causal_selection --table docs/causal_selection.md`.",
        "",
        said[2].strip(),
        "",
        f"Scores: calibrated F1 at prior {PRIOR:g} of mean-pooled codes. `output among equals`: by "
        "score, but among features at most 0.02 below the best by output score. "
        f"`{CHOSEN}` takes cut and "
        f"order from a grid ({', '.join(f'{k} {v}' for k, v in GRID.items())}) by their gain on "
        "openings of validation texts. Intervals: Wilson for recall, bootstrap over concepts for "
        "gains, 95 %; p by a paired permutation test, Holm over the rows of a model.",
        "",
        f"## sae_lens.synthetic: {synthetic[0]['concepts']} concepts, two features each that fire "
        "together",
        "",
        "| noise | way | output feature @1 | @5 | input feature @1 | either @1 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]

    def cell(row: Mapping[str, Any], name: str) -> str:
        return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"

    for row in synthetic:
        cells = [cell(row, name) for name in ("outputs_1", "outputs_5", "inputs_1", "either_1")]
        lines.append(f"| {row['noise']:g} | {row['way']} | {' | '.join(cells)} |")
    for name in dict.fromkeys(row["model"] for row in world):
        own = [row for row in world if row["model"] == name]
        lines += [
            "",
            f"## world, {name}: {own[0]['concepts']} concepts"
            + (f" ({own[0]['without_lexicon']} more lack a lexicon)"
               if own[0]["without_lexicon"] else ""),
            "",
            "| way | with a feature | same as detection | gain | less detection alone | p, Holm |",
            "| --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for row in own:
            away = ["", ""]
            if "difference" in row:
                away = [
                    f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, "
                    f"{row['difference_high']:+.3f}]",
                    f"{row['p_adjusted']:.2g}",
                ]
            lines.append(
                f"| {row['way']} | {row['with_feature']} | {row['same_feature']} | "
                f"{row['gain']:.3f} [{row['low']:.3f}, {row['high']:.3f}] | {' | '.join(away)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = asked(str(__doc__), list_organisms())
    quick = options.quick
    synthetic = [
        row
        for noise in (NOISES[1::2] if quick else NOISES)
        for row in synthetic_rows(noise, 500 if quick else 1500, 8 if quick else CONCEPTS)
    ]
    world = [row for name in options.models for row in world_rows(name, quick)]
    give(options, {"synthetic": synthetic, "world": world}, page(synthetic, world))


if __name__ == "__main__":
    main()
