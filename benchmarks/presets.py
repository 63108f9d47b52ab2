"""The settings of arXiv 2606.08365 by SAELens release names, each one command.

    python -m benchmarks.presets                        # lists them
    python -m benchmarks.presets gpt2 --texts wiki.txt --fresh validation.txt --out screened
    python -m benchmarks.presets llama --compare llama-32x --texts wiki.txt --out widths
    python -m benchmarks.presets gpt2 --model agent-gpt2 --out screened
    python -m benchmarks.presets llama --compare llama-32x --model agent-gpt2 --out widths
    python -m benchmarks.presets gpt2 --model FOLDER --sae FOLDER --downstream FOLDER --texts FILE

Weights and texts are the user's (the paper used wikitext-103: train for labels, validation as fresh
contexts). With `--model` the same screen runs on an embedded agent in its own SAEs (the comparison
of widths in those it has at `AGENT_WIDTHS`), or on a local folder with the SAEs named.
`--compare` runs a second preset on the same texts and puts the axes side by side: the paper's
comparison of widths.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A model, its primary and downstream SAE, and what the paper's scripts chose for it."""

    model: str
    sae: str
    downstream: str
    dtype: str = "float32"
    contexts: int = 2048
    fresh: int = 512
    features: int = 300
    group: int = 50
    panel: int = 2048
    lowest: float = 0.001
    band: tuple[float, float] = (10.0, 90.0)
    train_share: float = 0.6
    target: str = "clean_log_count_per_effect"
    columns: str = "full_no_magnitude"


def llama(width: str) -> Preset:
    """Llama Scope at layer 16, read at layer 20; `width` 8x (32,768) or 32x (131,072)."""
    return Preset(
        "meta-llama/Llama-3.1-8B",
        f"llama_scope_lxr_{width}:l16r_{width}",
        f"llama_scope_lxr_{width}:l20r_{width}",
        dtype="bfloat16",
        fresh=256,
        group=25,
        panel=1024,
        lowest=0.005,
        train_share=0.7,
        target="clean",
    )


PRESETS: dict[str, Preset] = {
    "gpt2": Preset(
        "gpt2",
        "gpt2-small-res-jb:blocks.8.hook_resid_pre",
        "gpt2-small-res-jb:blocks.10.hook_resid_pre",
        lowest=0.002,
        columns="geometry_only",
    ),
    "pythia": Preset(
        "EleutherAI/pythia-70m-deduped",
        "pythia-70m-deduped-res-sm:blocks.4.hook_resid_post",
        "pythia-70m-deduped-res-sm:blocks.5.hook_resid_post",
        group=30,
        band=(5.0, 95.0),
    ),
    "gemma": Preset(
        "google/gemma-2-2b",
        "gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical",
        "gemma-scope-2b-pt-res-canonical:layer_16/width_16k/canonical",
        dtype="bfloat16",
        fresh=256,
        group=25,
        band=(5.0, 95.0),
    ),
    "llama": llama("8x"),
    "llama-32x": llama("32x"),
}


AGENT_WIDTHS = {"llama": "l2-topk-512", "llama-32x": "l2-topk-1024"}
"""What stands for the two widths in an embedded agent."""


def run(name: str, arguments: argparse.Namespace, out: Path) -> Any:
    """One preset's screen, written to `out`."""
    from sae_steering_plugin.runs.screen_job import Sizes, screen_subject

    one = PRESETS[name]
    embedded = arguments.model is not None
    sae = arguments.sae or (AGENT_WIDTHS.get(name) if arguments.compare else None)
    scale = 8 if arguments.quick else 1
    found, subject = screen_subject(
        arguments.model if embedded else one.model,
        sae if embedded else one.sae,
        arguments.downstream if embedded else one.downstream,
        texts=arguments.texts,
        fresh=arguments.fresh,
        sizes=Sizes(
            max(64, one.contexts // scale),
            max(64, one.fresh // scale),
            max(60, one.features // scale),
            one.group,
            panel=one.panel,
        ),
        device=arguments.device,
        dtype="float32" if embedded else one.dtype,
        seed=arguments.seed,
        lowest=one.lowest,
        band=one.band,
        train_share=one.train_share,
        target=one.target,
        columns=one.columns,
        protocol="paper" if arguments.paper else "strict",
    )
    found.save(out, subject.sae)
    return found


def widths_table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Axis by axis, what each preset's forecast and groups came to."""
    return [
        {"axis": row["axis"], "preset": name, "features": row["features"], **row}
        for rows in zip(*([(n, r) for r in t] for n, t in found.items()), strict=True)
        for name, row in rows
    ]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="presets of arXiv 2606.08365")
    parser.add_argument("preset", nargs="?", choices=tuple(PRESETS))
    parser.add_argument("--compare", choices=tuple(PRESETS), help="a second preset, side by side")
    parser.add_argument("--model", help="an embedded agent or a folder in place of the preset's")
    parser.add_argument("--sae", help="with --model: its SAE (an agent's own by default)")
    parser.add_argument("--downstream", help="with --model: the later SAE")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--fresh", type=Path)
    parser.add_argument("--paper", action="store_true", help="the paper's protocol, not the strict")
    parser.add_argument("--quick", action="store_true", help="an eighth of the sizes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("preset"))
    arguments = parser.parse_args(words)
    if arguments.preset is None:
        for name, one in PRESETS.items():
            print(f"{name:10s} {one.model:32s} {one.sae}  ->  {one.downstream}")
        return
    from sae_steering_plugin.runs.screen_job import axis_table, difference_rows

    names = [name for name in (arguments.preset, arguments.compare) if name]
    axes = {}
    for name in names:
        out = arguments.out / name if len(names) > 1 else arguments.out
        found = run(name, arguments, out)
        axes[name] = axis_table(found)
        for row in difference_rows(found):
            print(name, json.dumps(row, ensure_ascii=False))
    for row in widths_table(axes):
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
