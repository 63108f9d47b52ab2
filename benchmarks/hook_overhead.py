"""What steering costs: decode and prefill of each kind of edit against the unsteered model, the
hook a researcher would write, and SAELens attached; several strengths as rows of one batch.

    python benchmarks/hook_overhead.py [--quick] [--json FILE]

Rows are those of the target table in the performance notes: 1a-1c additive vector, 2a-2c edits of
codes, 3a-3b strengths as rows. Models are random, of GPT-2-small size and tiny; dictionaries have
random unit rows with JumpReLU thresholds that let about 64 latents fire. `--quick` takes a
small model instead of GPT-2-small size, for which the targets of rows 1a, 2 and 3 do not hold: it
checks answers and shows the order of magnitude.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tempfile  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from contextlib import AbstractContextManager, contextmanager, nullcontext  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any  # noqa: E402

from tqdm.auto import tqdm  # noqa: E402

from benchmarks.timing import Clock, Report, Times, Variant, exponent, interleaved, main, whole

SCRATCH = tempfile.TemporaryDirectory()
Context = Callable[[], AbstractContextManager[Any]]
L0 = 64
EDITED = 16
TOLERANCE = 2e-3
"""On logits: the same sums in another order, float32, through the upper half of a random model."""


@dataclass(frozen=True, eq=False)
class Host:
    """A model, and one cached pass through it: `(tokens, cache or None) -> logits, cache`."""

    model: Any
    forward: Callable[[Any, Any], tuple[Any, Any]]
    name: str
    layers: int
    width: int
    words: int

    @property
    def site(self) -> str:
        return f"blocks.{self.layers // 2}.hook_resid_pre"

    @property
    def shape(self) -> str:
        return f"{self.name} {self.layers} layers, width {self.width}, {self.words} words"


def word_tokenizer(words: int) -> Any:
    """A tokenizer that never meets text here; the hosts want one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    table = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, words)}}
    inner = Tokenizer(models.WordLevel(table, unk_token="<pad>"))
    folder = f"{SCRATCH.name}/{words}"
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def gpt2(layers: int, width: int, words: int) -> Any:
    """A random Hugging Face GPT-2."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    heads = max(1, width // 64)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            vocab_size=words,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def bridge(layers: int, width: int, words: int) -> Host:
    from sae_lens import SAETransformerBridge

    model = SAETransformerBridge.boot_transformers(
        "random-gpt2",
        hf_model=gpt2(layers, width, words),
        tokenizer=word_tokenizer(words),
        device="cpu",
    )
    inner = model.original_model

    def forward(tokens: Any, cache: Any) -> tuple[Any, Any]:
        output = inner(tokens, past_key_values=cache, use_cache=True)
        return output.logits, output.past_key_values

    return Host(model, forward, "bridge", layers, width, words)


def hooked(layers: int, width: int, words: int) -> Host:
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    config = HookedTransformerConfig(
        n_layers=layers,
        d_model=width,
        d_head=64,
        n_heads=width // 64,
        d_mlp=4 * width,
        n_ctx=512,
        d_vocab=words,
        act_fn="gelu_new",
        normalization_type="LN",
        seed=0,
        device="cpu",
    )
    model = HookedSAETransformer(config, tokenizer=word_tokenizer(words)).eval()

    def forward(tokens: Any, cache: Any) -> tuple[Any, Any]:
        if cache is None:
            cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
        return model(tokens, past_kv_cache=cache), cache

    return Host(model, forward, "HookedTransformer", layers, width, words)


def some_tokens(host: Host, length: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, host.words, (1, length), generator=generator)


def dictionary(host: Host, d_sae: int, architecture: str = "jumprelu") -> tuple[Any, float]:
    """A random SAE at the host's site, and its measured L0 on the host's residuals."""
    import torch
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    generator = torch.Generator().manual_seed(1)
    sae_class, config_class = get_sae_class(architecture)
    options = {"k": 32} if architecture == "topk" else {}
    metadata = SAEMetadata(hook_name=canonical(host), model_name="random", prepend_bos=False)
    config = config_class(d_in=host.width, d_sae=d_sae, metadata=metadata, **options)
    with torch.no_grad():
        sae = sae_class(config).eval()
        rows = torch.randn(d_sae, host.width, generator=generator)
        sae.W_dec.copy_(rows / rows.norm(dim=-1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        for bias in (sae.b_enc, sae.b_dec):
            bias.zero_()
        if architecture == "topk":
            return sae, 32.0
        seen = residuals(host) @ sae.W_enc
        sae.b_enc.copy_(-seen.mean(dim=0))
        seen += sae.b_enc
        rates = torch.randn(d_sae, generator=generator).exp()
        rates = (rates * L0 / rates.sum()).clamp(1e-6, 0.4)
        theta = seen.std(dim=0) * torch.special.ndtri(1 - rates)
        low, high = 0.3, 3.0
        for _ in range(12):
            middle = (low * high) ** 0.5
            active = float((seen > theta * middle).sum() / len(seen))
            low, high = (middle, high) if active > L0 else (low, middle)
        sae.threshold.copy_(theta * low)
        return sae, float((seen > sae.threshold).sum() / len(seen))


def canonical(host: Host) -> str:
    from sae_steering_plugin.adapters.transformer_lens import resolve

    return resolve(host.model, host.site).name


def residuals(host: Host) -> Any:
    """Residuals `[token, width]` at the host's site on random text."""
    import torch

    found = []

    def keep(x: Any, hook: Any) -> None:
        del hook
        found.append(x[0])

    with (
        torch.no_grad(),
        hooks(host, keep)(),
    ):
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            host.forward(torch.randint(3, host.words, (1, 128), generator=generator), None)
    return torch.cat(found)


# --- ways of steering -------------------------------------------------------------------------


def ours(host: Host, edits: Any) -> Context:
    from sae_steering_plugin.adapters.steering import steer

    return lambda: steer(host.model, edits, require=False)


def hooks(host: Host, hook: Any, name: str | None = None) -> Context:
    return lambda: host.model.hooks(fwd_hooks=[(name or canonical(host), hook)])


def naive_add(vector: Any) -> Any:
    """Mask, clone, add: as a researcher writes it for positions."""
    import torch

    def hook(x: Any, hook: Any) -> Any:
        del hook
        mask = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
        mask[:0] = 0
        steered = x.clone()
        steered += mask.reshape(1, -1, 1) * vector.to(x.device)
        return steered

    return hook


def plain_add(step: Any) -> Any:
    """The shortest hook there is: every position, every row."""

    def hook(x: Any, hook: Any) -> Any:
        del hook
        return x + step

    return hook


def naive_clamp(sae: Any, latents: Any, value: float) -> Any:
    """One encode, two decodes: the delta form over the whole dictionary."""

    def hook(x: Any, hook: Any) -> Any:
        del hook
        codes = sae.encode(x)
        edited = codes.clone()
        edited[..., latents] = value
        return x + sae.decode(edited) - sae.decode(codes)

    return hook


def attached(host: Host, sae: Any, latents: Any, value: float) -> Context:
    """SAELens's own way: attach with the error term and edit `hook_sae_acts_post`."""

    def clamp(codes: Any, hook: Any) -> Any:
        del hook
        codes[..., latents] = value
        return codes

    @contextmanager
    def around() -> Any:
        name = f"{canonical(host)}.hook_sae_acts_post"
        with (
            host.model.saes(saes=[sae], use_error_term=True),
            host.model.hooks(fwd_hooks=[(name, clamp)]),
        ):
            yield

    return around


# --- what is timed ----------------------------------------------------------------------------


def decoding(host: Host, around: Context, steps: int, *, per_step: bool = False) -> Variant:
    """`steps` decode steps on a cache; the block is entered once, or anew at every step."""
    import torch

    prompt, fed = some_tokens(host, 8), some_tokens(host, 1)

    def variant(clock: Clock) -> Any:
        with torch.no_grad(), nullcontext() if per_step else around():
            with around() if per_step else nullcontext():
                logits, cache = host.forward(prompt, None)
            for _ in range(steps):
                with clock, around() if per_step else nullcontext():
                    logits, cache = host.forward(fed, cache)
        return logits[:, -1]

    return variant


def prefilling(host: Host, around: Context, length: int = 64) -> Variant:
    import torch

    prompt = some_tokens(host, length)

    def variant(clock: Clock) -> Any:
        with torch.no_grad(), around(), clock:
            return host.forward(prompt, None)[0]

    return variant


def answers(
    report: Report,
    what: str,
    variants: dict[str, Variant],
    base: str,
    tolerance: float = TOLERANCE,
) -> float:
    """The largest difference of any steered variant from `base`, after checking that it steered."""
    found = {name: variant(Clock()) for name, variant in variants.items()}
    report.same(
        f"{what}: steering changed nothing", bool((found[base] != found["unsteered"]).any())
    )
    others = [name for name in found if name not in (base, "unsteered")]
    errors = [report.agree(f"{what}: {n}", found[base], found[n], tolerance) for n in others]
    return max(errors, default=0.0)


def rounds_of(report: Report) -> int:
    return 5 if report.quick else 9


# --- rows -------------------------------------------------------------------------------------


def additive(report: Report, host: Host, row: str, steps: int, target: float) -> None:
    """Rows 1a and 1b."""
    import torch

    from sae_steering_plugin.edits import Add
    from sae_steering_plugin.types import Edit, Positions

    vector = torch.randn(host.width, generator=torch.Generator().manual_seed(2))
    add = Edit(Add(vector), host.site)
    naive = hooks(host, naive_add(vector))
    variants = {
        "unsteered": decoding(host, nullcontext, steps),
        "steer": decoding(host, ours(host, add), steps),
        "naive": decoding(host, naive, steps),
        "per step": decoding(host, naive, steps, per_step=True),
        "masked": decoding(
            host, ours(host, Edit(Add(vector), host.site, Positions(2, 10_000))), steps
        ),
    }
    # the naive hook steers the first two prompt tokens, which the masked rule leaves out
    error = answers(
        report, f"row {row}", {k: v for k, v in variants.items() if k != "masked"}, "naive"
    )
    times = report.judged(
        lambda: interleaved(variants, rounds=rounds_of(report)), "steer", "unsteered", target
    )
    fields: dict[str, Any] = dict(shapes=f"{host.shape}, {steps} steps")
    report.compare(
        row,
        "Add, decode / unsteered",
        times,
        "steer",
        "unsteered",
        target=target,
        error=error,
        **fields,
    )
    for name, what in (
        ("masked", "Add at Positions(2, 10000), decode"),
        ("naive", "naive hook (mask, clone), decode"),
        ("per step", "naive hook entered per step (run_with_hooks)"),
    ):
        report.compare(row, f"  {what} / unsteered", times, name, "unsteered", **fields)
    prefill = {
        "unsteered": prefilling(host, nullcontext),
        "steer": prefilling(host, ours(host, add)),
        "naive": prefilling(host, naive),
    }
    error = answers(report, f"row {row} prefill", prefill, "naive")
    times = interleaved(prefill, rounds=rounds_of(report))
    report.compare(
        row,
        "  Add, prefill of 64 / unsteered",
        times,
        "steer",
        "unsteered",
        error=error,
        shapes=host.shape,
    )
    report.compare(
        row,
        "  naive hook, prefill of 64 / unsteered",
        times,
        "naive",
        "unsteered",
        shapes=host.shape,
    )


def peers(report: Report, host: Host, steps: int) -> None:
    """repeng on the bare Hugging Face model, where it is installed."""
    try:
        from repeng import ControlModel
    except (ImportError, AttributeError):  # its 0.4.0 names np.float_, which numpy 2 took away
        report.notes.append(
            "peers: repeng cannot be imported here (0.4.0 needs numpy < 2); steering-vectors "
            "0.12.2 needs transformers < 5 and cannot stand beside the hosts"
        )
        return
    import torch

    model = gpt2(host.layers, host.width, host.words)
    control = ControlModel(model, [host.layers // 2])
    vector = torch.randn(host.width, generator=torch.Generator().manual_seed(2))

    def forward(tokens: Any, cache: Any) -> tuple[Any, Any]:
        output = model(tokens, past_key_values=cache, use_cache=True)
        return output.logits, output.past_key_values

    bare = Host(model, forward, "bare HF model", host.layers, host.width, host.words)

    @contextmanager
    def steered() -> Any:
        control.set_raw_control({host.layers // 2: vector})
        try:
            yield
        finally:
            control.reset()

    times = interleaved(
        {"unsteered": decoding(bare, nullcontext, steps), "repeng": decoding(bare, steered, steps)},
        rounds=rounds_of(report),
    )
    report.compare(
        "1", "  repeng 0.4.0, decode / unsteered", times, "repeng", "unsteered", shapes=bare.shape
    )


def entering(report: Report, tiny: Host, small: Host) -> None:
    """Row 1c."""
    import torch

    from sae_steering_plugin.edits import Add
    from sae_steering_plugin.types import Edit

    times_in = 40 if report.quick else 100
    variants: dict[str, Variant] = {}
    for host in (tiny, small):
        vector = torch.ones(host.width)

        def often(around: Context) -> Callable[[], None]:
            def work() -> None:
                for _ in range(times_in):
                    with around():
                        pass

            return work

        depth = f"{host.layers} layers"
        variants[f"steer, {depth}"] = whole(often(ours(host, Edit(Add(vector), host.site))))
        variants[f"hooks(), {depth}"] = whole(often(hooks(host, naive_add(vector))))
    times = interleaved(variants, rounds=rounds_of(report))
    depths = (f"{tiny.layers} layers", f"{small.layers} layers")
    for depth in depths:
        seconds = times.seconds(f"steer, {depth}") / times_in
        report.add(
            "1c",
            "enter and leave steer / 0.1 ms",
            seconds / 1e-4,
            target=1.0,
            seconds=seconds,
            shapes=f"bridge {depth}",
        )
        report.compare(
            "1c",
            "  bridge.hooks() / steer",
            times,
            f"hooks(), {depth}",
            f"steer, {depth}",
            shapes=f"bridge {depth}",
        )
    report.compare(
        "1c",
        "  steer at the larger depth / at the smaller",
        times,
        f"steer, {depths[1]}",
        f"steer, {depths[0]}",
        shapes=f"bridge {depths[1]} / {depths[0]}",
    )


def one_call(report: Report, tiny: Host) -> None:
    """Section 2 of the notes: the hook alone, one row, decoding; 6 us above a bare point."""
    import torch

    from sae_steering_plugin.adapters.calls import Observer
    from sae_steering_plugin.adapters.steering import steer
    from sae_steering_plugin.adapters.transformer_lens import resolve
    from sae_steering_plugin.edits import Add
    from sae_steering_plugin.types import Edit

    n = 2000
    x, fed = torch.randn(1, 1, tiny.width), some_tokens(tiny, 1)
    point = resolve(tiny.model, tiny.site).point
    vector = torch.ones(tiny.width)

    def calls(clock: Clock) -> None:
        with torch.no_grad(), clock:
            for _ in range(n):
                point(x)

    def steered(clock: Clock) -> None:
        with torch.no_grad(), steer(tiny.model, Edit(Add(vector), tiny.site), require=False):
            _, cache = tiny.forward(some_tokens(tiny, 4), None)
            tiny.forward(fed, cache)
            frame = Observer.of(tiny.model).frame
            assert frame is not None
            with clock:
                for _ in range(n):
                    frame.fired.clear()
                    point(x)

    def plain(clock: Clock) -> None:
        with hooks(tiny, plain_add(vector))():
            calls(clock)

    times = interleaved({"bare": calls, "steer": steered, "plain": plain}, rounds=15)
    above = (times.seconds("steer") - times.seconds("bare")) / n
    report.add(
        "1",
        "one Add call above a bare hook point / 6 us",
        above / 6e-6,
        target=1.0,
        seconds=above,
        shapes="1 row, decoding",
    )
    plainly = (times.seconds("plain") - times.seconds("bare")) / n
    report.add(
        "1",
        "  lambda x, hook: x + v / 6 us",
        plainly / 6e-6,
        seconds=plainly,
        shapes="1 row, decoding",
    )


def kinds(report: Report, host: Host, steps: int) -> None:
    """Every kind of edit, decoding, on the tiny model, where Python is all that costs."""
    import torch

    from sae_steering_plugin.edits import Ablate, Add, Clamp, ProjectOut, Scale, SparseAdd
    from sae_steering_plugin.types import Edit

    sae, _ = dictionary(host, 4096)
    ranked, _ = dictionary(host, 4096, "topk")
    generator = torch.Generator().manual_seed(3)
    latents = list(range(EDITED))
    mixed = torch.zeros(4096)
    mixed[:EDITED] = torch.randn(EDITED, generator=generator)
    vector = torch.randn(host.width, generator=generator)
    edits = {
        "Add": Edit(Add(vector), host.site),
        "ProjectOut": Edit(ProjectOut(vector), host.site),
        "Clamp 16": Clamp(sae, latents, 2.0),
        "Scale 16": Scale(sae, latents, 3.0),
        "Ablate 16": Ablate(sae, latents),
        "SparseAdd 16": SparseAdd(sae, mixed),
        "Clamp 16, top-k": Clamp(ranked, latents, 2.0),
        "SparseAdd 16, top-k": SparseAdd(ranked, mixed),
    }
    variants = {"unsteered": decoding(host, nullcontext, steps)}
    variants |= {name: decoding(host, ours(host, edit), steps) for name, edit in edits.items()}
    times = interleaved(variants, rounds=rounds_of(report))
    for name in edits:
        report.compare(
            "1b",
            f"  {name}, decode / unsteered",
            times,
            name,
            "unsteered",
            shapes=f"{host.shape}, d_sae 4096",
        )


def codes_edited(report: Report, host: Host, widths: Sequence[int], main_width: int) -> None:
    """Rows 2a and 2b: decode and prefill, beside the naive ways at the main width."""
    import torch

    from sae_steering_plugin.edits import Clamp, SparseAdd

    steps = 6 if report.quick else 12
    value = 2.0
    for d_sae in widths:
        latents = list(range(0, d_sae, d_sae // EDITED))
        sae, active = dictionary(host, d_sae)
        clamp = Clamp(sae, latents, value)
        shapes = f"{host.shape}, d_sae {d_sae}, L0 {active:.0f}, {EDITED} latents"
        mixed = torch.zeros(d_sae)
        mixed[latents] = torch.randn(EDITED, generator=torch.Generator().manual_seed(4))
        ways: dict[str, Context] = {"unsteered": nullcontext, "steer": ours(host, clamp)}
        if d_sae == main_width:
            ways["attached"] = attached(host, sae, latents, value)
            ways["naive"] = hooks(host, naive_clamp(sae, latents, value))
        timed = {
            "2a": {name: decoding(host, way, steps) for name, way in ways.items()},
            "2b": {name: prefilling(host, way) for name, way in ways.items()},
        }
        for row, variants in timed.items():
            what = "decode" if row == "2a" else "prefill of 64"
            error = answers(report, f"row {row}, d_sae {d_sae}", variants, "steer")
            if d_sae == main_width:
                add = ours(host, SparseAdd(sae, mixed))
                variants["add"] = (
                    decoding(host, add, steps) if row == "2a" else prefilling(host, add)
                )

            def measure(variants: dict[str, Variant] = variants) -> Times:
                return interleaved(variants, rounds=rounds_of(report))

            times = report.judged(measure, "steer", "unsteered", 1.03)
            report.compare(
                row,
                f"Clamp {EDITED}, {what} / unsteered",
                times,
                "steer",
                "unsteered",
                target=1.03,
                error=error,
                shapes=shapes,
            )
            if d_sae == main_width:
                report.compare(
                    row,
                    f"SparseAdd {EDITED}, {what} / unsteered",
                    times,
                    "add",
                    "unsteered",
                    target=1.03,
                    shapes=shapes,
                )
                report.compare(
                    row,
                    f"  SAELens attached, error term, {what} / unsteered",
                    times,
                    "attached",
                    "unsteered",
                    shapes=shapes,
                )
                report.compare(
                    row,
                    f"  encode and two decodes, {what} / unsteered",
                    times,
                    "naive",
                    "unsteered",
                    shapes=shapes,
                )


def ranked_codes(report: Report, host: Host, d_sae: int) -> None:
    """Row 2c: a top-k dictionary, whose competition needs every pre-activation."""
    import torch

    from sae_steering_plugin.edits import Clamp, SparseAdd

    sae, _ = dictionary(host, d_sae, "topk")
    latents = list(range(EDITED))
    steps = 6 if report.quick else 12
    shapes = f"{host.shape}, top-k 32, d_sae {d_sae}, {EDITED} latents"
    mixed = torch.zeros(d_sae)
    mixed[latents] = torch.randn(EDITED, generator=torch.Generator().manual_seed(4))
    variants = {
        "unsteered": decoding(host, nullcontext, steps),
        "steer": decoding(host, ours(host, Clamp(sae, latents, 2.0)), steps),
        "attached": decoding(host, attached(host, sae, latents, 2.0), steps),
    }
    error = answers(report, "row 2c", variants, "steer")
    variants["add"] = decoding(host, ours(host, SparseAdd(sae, mixed)), steps)
    times = report.judged(
        lambda: interleaved(variants, rounds=rounds_of(report)), "steer", "unsteered", 1.2
    )
    report.compare(
        "2c",
        "Clamp 16, decode / unsteered",
        times,
        "steer",
        "unsteered",
        target=1.2,
        error=error,
        shapes=shapes,
    )
    report.compare(
        "2c",
        "SparseAdd 16, decode / unsteered",
        times,
        "add",
        "unsteered",
        target=1.2,
        shapes=shapes,
    )
    report.compare(
        "2c",
        "  SAELens attached, error term / unsteered",
        times,
        "attached",
        "unsteered",
        shapes=shapes,
    )
    hook_alone(report, sae, latents, mixed, shapes)


def hook_alone(report: Report, sae: Any, latents: list[int], mixed: Any, shapes: str) -> None:
    """The top-k edit without a model, one row: ours against two encodes and two decodes."""
    import torch

    from sae_steering_plugin.edits import Clamp, SparseAdd

    x = torch.randn(1, 1, sae.cfg.d_in, generator=torch.Generator().manual_seed(5))
    clamp = Clamp(sae, latents, 2.0).prepare(dtype=x.dtype, device="cpu")
    add = SparseAdd(sae, mixed).prepare(dtype=x.dtype, device="cpu")

    def route() -> Any:
        """What an attached SAE with error term computes: two encodes and two decodes."""
        error = x - sae.decode(sae.encode(x))
        codes = sae.encode(x)
        if codes.is_sparse:
            codes = codes.to_dense()
        codes[..., latents] = 2.0
        return sae.decode(codes) + error

    def many(work: Callable[[], Any]) -> Variant:
        def variant(clock: Clock) -> None:
            with torch.no_grad(), clock:
                for _ in range(5):
                    work()

        return variant

    with torch.no_grad():
        error = report.agree("row 2c hook alone", x + clamp(x), route(), 1e-4)
    times = interleaved(
        {
            "clamp": many(lambda: x + clamp(x)),
            "add": many(lambda: x + add(x)),
            "route": many(route),
        },
        rounds=rounds_of(report),
    )
    report.compare(
        "2c",
        "Clamp 16, hook alone / SAELens error-term route",
        times,
        "clamp",
        "route",
        target=0.33,
        error=error,
        shapes=shapes,
    )
    report.compare(
        "2c",
        "SparseAdd 16, hook alone / SAELens error-term route",
        times,
        "add",
        "route",
        target=0.33,
        shapes=shapes,
    )


def growth(report: Report, host: Host, widths: Sequence[int], main_width: int) -> None:
    """The edit without a model, 8 rows: its cost against the width and against edited latents."""
    import torch

    from sae_steering_plugin.edits import Clamp

    x = residuals(host)[:8].unsqueeze(1)
    by_width: dict[str, Variant] = {}
    by_latents: dict[str, Variant] = {}
    n = 200
    counts = [1, 4, 16, 64, 256, 1024]

    def ours_alone(sae: Any, latents: list[int]) -> Variant:
        prepared = Clamp(sae, latents, 2.0).prepare(dtype=x.dtype, device="cpu")

        def variant(clock: Clock) -> Any:
            with torch.no_grad(), clock:
                for _ in range(n):
                    out = x + prepared(x)
            return out

        return variant

    def naive_alone(sae: Any) -> Variant:
        hook = naive_clamp(sae, list(range(EDITED)), 2.0)

        def variant(clock: Clock) -> Any:
            with torch.no_grad(), clock:
                return hook(x, None)

        return variant

    for d_sae in widths:
        sae, _ = dictionary(host, d_sae)
        by_width[f"ours {d_sae}"] = ours_alone(sae, list(range(EDITED)))
        by_width[f"naive {d_sae}"] = naive_alone(sae)
        report.agree(
            f"edit alone, d_sae {d_sae}",
            by_width[f"ours {d_sae}"](Clock()),
            by_width[f"naive {d_sae}"](Clock()),
            1e-3,
        )
        if d_sae == main_width:
            by_latents = {str(m): ours_alone(sae, list(range(m))) for m in counts}
    times = interleaved(by_width, rounds=rounds_of(report))
    seconds = {
        "ours": [times.seconds(f"ours {d}") / n for d in widths],
        "naive": [times.seconds(f"naive {d}") for d in widths],
    }
    first, last = widths[0], widths[-1]
    shapes = f"8 rows, width {host.width}, {EDITED} latents"
    slope = exponent(widths, seconds["ours"])
    report.add(
        "2a",
        f"edit alone: d_sae {last} / d_sae {first}",
        times.ratio(f"ours {last}", f"ours {first}"),
        exponent=slope,
        target=(last / first) ** 0.05,
        seconds=seconds["ours"][-1],
        shapes=shapes,
    )
    report.add(
        "2a",
        "  encode and two decodes: the same",
        times.ratio(f"naive {last}", f"naive {first}"),
        exponent=exponent(widths, seconds["naive"]),
        seconds=seconds["naive"][-1],
        shapes=shapes,
    )
    faster = seconds["ours"][-1] / seconds["naive"][-1]
    report.add(
        "2a",
        f"  edit alone, ours / naive at d_sae {last}",
        faster,
        seconds=seconds["ours"][-1],
        shapes=shapes,
    )
    times = interleaved(by_latents, rounds=rounds_of(report))
    cost = [times.seconds(str(m)) / n for m in counts]
    upper = exponent(counts[3:], cost[3:])
    report.add(
        "2a",
        "edit alone: 1024 latents / 64",
        times.ratio("1024", "64"),
        exponent=upper,
        target=16**1.2,
        seconds=cost[-1],
        shapes=f"8 rows, d_sae {main_width}, {cost[2] * 1e6:.0f} us at 16",
    )
    report.add(
        "2a",
        "  edit alone: 64 latents / 1",
        times.ratio("64", "1"),
        exponent=exponent(counts[:4], cost[:4]),
        seconds=cost[3],
        shapes=f"8 rows, d_sae {main_width}",
    )


def strengths_generated(report: Report, host: Host) -> None:
    """Row 3a: generate for every strength on its own, or as rows of one batch."""
    import torch

    from sae_steering_plugin.adapters.engine import generate
    from sae_steering_plugin.edits import Add
    from sae_steering_plugin.types import ALL, DECODE, Edit, Positions

    vector = torch.randn(host.width, generator=torch.Generator().manual_seed(6))
    strengths, length, new = (4, 32, 8) if report.quick else (8, 64, 16)
    values = torch.linspace(-3, 3, strengths)
    prompt = some_tokens(host, length)
    options: dict[str, Any] = dict(max_new_tokens=new, stop_at_eos=False)

    def loop(positions: Positions) -> Any:
        edits = [Edit(Add(vector, float(s)), host.site, positions) for s in values]
        runs = [generate(host.model, prompt, e, require=False, **options) for e in edits]
        return torch.cat([run.tokens for run in runs])

    def rows(positions: Positions, share: bool = True) -> Any:
        batch = prompt.repeat(strengths, 1)
        edit = Edit(Add(vector, values), host.site, positions)
        return generate(host.model, batch, edit, share=share, **options).tokens

    shapes = f"{host.shape}, {strengths} strengths, prompt {length}, {new} new tokens"
    for positions, target in ((ALL, 0.45), (DECODE, 0.32)):
        separate = loop(positions)
        report.same(f"row 3a, {positions}: tokens", bool(torch.equal(separate, rows(positions))))
        variants = {
            "loop": whole(lambda p=positions: loop(p)),
            "shared": whole(lambda p=positions: rows(p)),
            "batch": whole(lambda p=positions: rows(p, share=False)),
        }
        times = interleaved(variants, rounds=5, warm_up=0)
        distinct = len({tuple(row.tolist()) for row in separate})
        report.compare(
            "3a",
            f"strengths as rows, {positions} / one run each",
            times,
            "shared",
            "loop",
            target=target,
            error=0.0,
            shapes=f"{shapes}, {distinct} distinct texts",
        )
        report.compare(
            "3a",
            f"  rows without sharing, {positions} / one run each",
            times,
            "batch",
            "loop",
            shapes=shapes,
        )


def strengths_forced(report: Report, host: Host, target: float) -> None:
    """Row 3b: logits of the last position of a given text, hook at half depth."""
    import torch

    from sae_steering_plugin.adapters.sharing import steered_logits
    from sae_steering_plugin.edits import Add
    from sae_steering_plugin.types import Edit

    vector = torch.randn(host.width, generator=torch.Generator().manual_seed(7))
    strengths, length = (4, 32) if report.quick else (8, 64)
    values = torch.linspace(-3, 3, strengths)
    prompt = some_tokens(host, length)
    model = host.model

    def loop() -> Any:
        found = []
        with torch.no_grad():
            for s in values:
                with hooks(host, naive_add(s * vector))():
                    found.append(model(prompt)[0, -1])
        return torch.stack(found)

    def batch() -> Any:
        with torch.no_grad(), hooks(host, plain_add(values[:, None, None] * vector))():
            return model(prompt.repeat(strengths, 1))[:, -1]

    def shared(last_only: bool) -> Any:
        edit = Edit(Add(vector, values), host.site)
        found = steered_logits(model, prompt, edit, copies=strengths, last_only=last_only)
        return found if last_only else found[:, -1]

    variants = {
        "loop": whole(loop),
        "batch": whole(batch),
        "shared": whole(lambda: shared(True)),
        "shared, all": whole(lambda: shared(False)),
    }
    base = loop()
    error = max(
        report.agree(f"row 3b {host.name}: {name}", base, variants[name](Clock()), TOLERANCE)
        for name in list(variants)[1:]
    )
    times = interleaved(variants, rounds=5, warm_up=0)
    shapes = f"{host.shape}, {strengths} strengths, {length} tokens"
    report.compare(
        "3b",
        "steered_logits, last position / one pass each",
        times,
        "shared",
        "loop",
        target=target,
        error=error,
        shapes=shapes,
    )
    report.compare(
        "3b",
        "  steered_logits, every position / one pass each",
        times,
        "shared, all",
        "loop",
        shapes=shapes,
    )
    report.compare("3b", "  one batch / one pass each", times, "batch", "loop", shapes=shapes)


def measure(report: Report) -> None:
    quick = report.quick
    size = (4, 512, 4096) if quick else (12, 768, 50257)
    widths = (2048, 4096, 8192, 16384) if quick else (4096, 16384, 32768, 65536, 131072)
    tiny_bridge, tiny_hooked = bridge(2, 64, 512), hooked(2, 64, 512)
    small = bridge(*size)
    main_width = 8192 if quick else 32768
    edited = (main_width,) if quick else (4096, main_width, 131072)
    parts: list[Callable[[], None]] = [
        lambda: entering(report, tiny_bridge, small),
        lambda: one_call(report, tiny_bridge),
        lambda: additive(report, small, "1a", 6 if quick else 12, 1.02),
        lambda: additive(report, tiny_bridge, "1b", 40 if quick else 80, 1.05),
        lambda: additive(report, tiny_hooked, "1b", 40 if quick else 80, 1.05),
        lambda: kinds(report, tiny_bridge, 20 if quick else 80),
        lambda: peers(report, tiny_bridge, 80),
        lambda: codes_edited(report, small, edited, main_width),
        lambda: ranked_codes(report, small, main_width),
        lambda: growth(report, small, widths, main_width),
        lambda: strengths_generated(report, small),
        lambda: strengths_forced(report, small, 0.45),
        lambda: strengths_forced(report, hooked(*size), 0.28),
    ]
    for part in tqdm(parts, desc="hook_overhead", leave=False):
        part()


if __name__ == "__main__":
    main("hook_overhead", measure, full_size=("1a", "2a", "2b", "2c", "3a", "3b"))
