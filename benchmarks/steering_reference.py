"""The measured steering reference of stories260k, again, through both hosts.

`python benchmarks/steering_reference.py [--quick] [--data FOLDER] [--json FILE]`

FOLDER holds `stories260k/` and `saes-stories260k/` (default: `$SAE_STEERING_DATA`, else
`../shared/data`). For each row of `steering_reference.json` a decoder row of the real SAE, times a
coefficient, is added at all positions but the first while 256 continuations of 60 tokens are
sampled; the share that holds the feature's word and the nats per token under the unsteered model
are set beside the reference. Two samples of 256 differ by chance: `p` is Fisher's exact test of the
two shares, `z` the difference of the two NLLs in its standard errors. The answers agree when no
Holm-adjusted p of a host is below 0.01.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

HOSTS = ("bridge", "hooked")
SAE_NAME = "l2-resid-post-standard"
ALPHA = 0.01


@dataclass(frozen=True)
class Arm:
    """One row of the reference; `coefficient` 0 is the unsteered model."""

    feature: int
    coefficient: float
    word: str
    share: float
    nll: float


@dataclass(frozen=True)
class Found:
    """What one host gave for one arm: share with a 95 % Wilson interval, NLL with its error."""

    host: str
    arm: Arm
    n: int
    share: float
    low: float
    high: float
    p_share: float
    nll: float
    nll_error: float
    p_nll: float
    displacement: float
    texts: tuple[str, ...]

    @property
    def z(self) -> float:
        return (self.nll - self.arm.nll) / (2**0.5 * self.nll_error)


def reference(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "saes-stories260k" / "steering_reference.json").read_text())


def arms(found: dict[str, Any]) -> list[Arm]:
    """The unsteered arm once per word, then every row."""
    rows = found["rows"]
    bases = {r["word"]: r["share_base"] for r in rows}
    nothing = [Arm(0, 0.0, word, share, found["baseline"]["nll"]) for word, share in bases.items()]
    return nothing + [
        Arm(r["feature"], r["coefficient"], r["word"], r["share_steered"], r["nll"]) for r in rows
    ]


def stories260k(folder: Path, host: str) -> Any:
    """The real model through one of the hosts. HookedTransformer takes no local folder, so its
    weights come through TransformerLens's own Llama conversion."""
    from sae_steering_plugin.adapters.transformer_lens import load_model

    place = folder / "stories260k"
    if host == "bridge":
        return load_model(str(place))
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fields = json.loads((place / "hooked_transformer_config.json").read_text())
    config = HookedTransformerConfig(**fields)
    model = HookedSAETransformer(config, tokenizer=AutoTokenizer.from_pretrained(place))
    weights = convert_llama_weights(AutoModelForCausalLM.from_pretrained(place), config)
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    return model.eval()


def measure(
    model: Any,
    host: str,
    chosen: Sequence[Arm],
    rows: Tensor,
    found: dict[str, Any],
    *,
    n: int = 256,
    seed: int = 0,
) -> list[Found]:
    """All `chosen` arms as rows of one batch: `n` continuations each, a vector per row."""
    from sae_steering_plugin.adapters.engine import generate
    from sae_steering_plugin.edits import Add
    from sae_steering_plugin.types import Edit

    steps = torch.stack([rows[arm.feature] * arm.coefficient for arm in chosen])
    edit = Edit(Add(steps.repeat_interleave(n, dim=0)), found["hook"])
    out = generate(
        model,
        [found["prompt"]] * (n * len(chosen)),
        [edit] if bool(steps.any()) else [],
        max_new_tokens=found["new_tokens"],
        temperature=found["temperature"],
        top_p=found["top_p"],
        seed=seed,
        stop_at_eos=False,
    )
    nats = nats_per_token(model, out.tokens, found["new_tokens"]).reshape(len(chosen), n)
    results = []
    for i, arm in enumerate(chosen):
        texts = out.texts[i * n : (i + 1) * n]
        results.append(_beside(host, arm, texts, nats[i], found["samples"], out.record))
    return results


@torch.no_grad()
def nats_per_token(model: Any, tokens: Tensor, new: int) -> Tensor:
    """Mean nats per new token of each row under the unsteered model, `[batch]`."""
    scores = []
    for chunk in tokens.split(256):
        logs = model(chunk)[:, :-1].float().log_softmax(-1)
        scores.append(-logs.gather(-1, chunk[:, 1:, None])[:, -new:, 0].mean(dim=1))
    return torch.cat(scores)


def holds(text: str, word: str) -> bool:
    """True when `word` stands in the text as a whole word, capitals or not."""
    return re.search(rf"\b{word}\b", text.lower()) is not None


def _beside(
    host: str, arm: Arm, texts: Sequence[str], nats: Tensor, n_reference: int, record: Any
) -> Found:
    from scipy.stats import binomtest, fisher_exact, norm

    n, held = len(texts), sum(holds(text, arm.word) for text in texts)
    told = round(arm.share * n_reference)
    interval = binomtest(held, n).proportion_ci(method="wilson")
    error = float(nats.std()) / n**0.5
    z = (float(nats.mean()) - arm.nll) / (2**0.5 * error)
    return Found(
        host=host,
        arm=arm,
        n=n,
        share=held / n,
        low=float(interval.low),
        high=float(interval.high),
        p_share=float(fisher_exact([[held, n - held], [told, n_reference - told]]).pvalue),
        nll=float(nats.mean()),
        nll_error=error,
        p_nll=float(2 * norm.sf(abs(z))),
        displacement=0.0 if record is None else record.edits[0].displacement,
        texts=tuple(texts),
    )


def disagreements(results: Sequence[Found], *, alpha: float = ALPHA) -> list[str]:
    """What differs by more than sampling allows, Holm-adjusted over all figures of one host."""
    found = []
    for host in dict.fromkeys(r.host for r in results):
        tested = [(r.p_share, r.arm, "share") for r in results if r.host == host]
        tested += [(r.p_nll, r.arm, "NLL") for r in results if r.host == host]
        largest = 0.0
        for i, (p, arm, figure) in enumerate(sorted(tested, key=lambda item: item[0])):
            largest = max(largest, p * (len(tested) - i))
            if largest < alpha:
                found.append(f"{host} {arm} {figure}: adjusted p {largest:.2g}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one strength of each feature")
    parser.add_argument("--data", type=Path, help="folder with stories260k/ and saes-stories260k/")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = options.data or os.environ.get("SAE_STEERING_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "saes-stories260k").is_dir():
        print(f"no saes-stories260k/ in {folder}: pass --data FOLDER", file=sys.stderr)
        return 2
    from sae_lens import SAE

    found = reference(folder)
    sae = SAE.load_from_disk(str(folder / "saes-stories260k" / SAE_NAME), device="cpu")
    chosen = arms(found)
    if options.quick:
        chosen = [a for i, a in enumerate(chosen) if i < 4 or i % 4 == 1]
    results: list[Found] = []
    print(
        f"{'host':7}{'feature':>8}{'coefficient':>12}  {'word':9}{'share':>7}{'95 %':>16}"
        f"{'reference':>10}{'p':>7}{'nats':>8}{'reference':>10}{'z':>6}"
    )
    for host in HOSTS:
        model = stories260k(folder, host)
        started = time.perf_counter()
        for i in range(0, len(chosen), 4):
            part = measure(
                model, host, chosen[i : i + 4], sae.W_dec.detach(), found, seed=options.seed + i
            )
            results += part
            for r in part:
                print(
                    f"{host:7}{r.arm.feature:8}{r.arm.coefficient:12.3f}  {r.arm.word:9}"
                    f"{r.share:7.3f}{f'{r.low:.3f} to {r.high:.3f}':>16}{r.arm.share:10.3f}"
                    f"{r.p_share:7.2f}{r.nll:8.3f}{r.arm.nll:10.3f}{r.z:6.1f}",
                    flush=True,
                )
        print(f"{host}: {time.perf_counter() - started:.0f} s")
    wrong = disagreements(results)
    same = _same_texts(results)
    print(f"the two hosts gave the same text from the same seed in {same:.1%} of the samples")
    print("\n".join(wrong) if wrong else "every figure lies within its sampling error")
    if options.json:
        options.json.write_text(json.dumps([_row(r) for r in results], indent=1) + "\n")
    return 1 if wrong else 0


def _same_texts(results: Sequence[Found]) -> float:
    texts = [[t for r in results if r.host == host for t in r.texts] for host in HOSTS]
    return sum(a == b for a, b in zip(*texts, strict=True)) / len(texts[0])


def _row(result: Found) -> dict[str, Any]:
    fields = asdict(result)
    del fields["texts"]
    return {**fields, "z_nll": result.z}


if __name__ == "__main__":
    sys.exit(main())
