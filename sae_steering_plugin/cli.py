"""The command `sae-steer`: thin callers of the package's own names.

Nothing heavy is imported before a command runs, so `--help` answers at once. A mistake of the
caller is one line on standard error and exit code 2; `--debug` shows where it came from.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
import typer.core
import typer.main

from sae_steering_plugin import __version__

if TYPE_CHECKING:
    from sae_steering_plugin.types import Unit

app = typer.Typer(
    name="sae-steer",
    help="Steer language models with SAE features: build vectors, apply them, prove what they do.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str, typer.Option("--model", help="Organism name, local folder, or a name on the hub.")
]
SAEOption = Annotated[
    str | None,
    typer.Option("--sae", help="An organism's SAE name, a local folder, or release:sae_id."),
]
DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:0, mps.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ContrastOption = Annotated[
    Path | None,
    typer.Option(
        help="JSONL/CSV with positive, negative[, group]; CAA JSON; evals or trait JSONL."
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format", help="pairs, caa, evals, statements, persona or traits; found if not given."
    ),
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--allow-unbalanced-letters", help="Take question sets that favour one answer letter."
    ),
]


def shown_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"sae-steering-plugin {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=shown_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn what a caller can cause into one line and exit code 2; with `debug` let it through."""
    try:
        yield
    except (ValueError, KeyError, IndexError, OSError, TypeError, NotImplementedError) as error:
        if debug:
            raise
        words = error.args[0] if isinstance(error, KeyError) and error.args else error
        typer.echo("error: " + " ".join(str(words).split()), err=True)
        raise typer.Exit(2) from None


def quiet_hosts() -> None:
    """Keep the hosts' notices about themselves off a table that a person reads."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="\\nThis SAE has non-empty model_from_pretrained")
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def known_unit(word: str) -> Unit:
    """The strength unit a word names. Raises ValueError that lists them."""
    from sae_steering_plugin.types import UNITS

    if word not in UNITS:
        raise ValueError(f"no strength unit {word!r}; choose one of {', '.join(UNITS)}")
    return cast("Unit", word)


def chosen_site(subject: Any, layer: int | None, hook_name: str | None) -> Any:
    """The hook name that was asked for, else the SAE's own site."""
    if layer is not None and hook_name is not None:
        raise ValueError("--layer and --hook-name are two ways to say one thing: give one")
    if layer is not None:
        return f"blocks.{layer}.hook_resid_post"
    if hook_name is not None:
        return hook_name
    if subject.sae is None:
        raise ValueError("where to read? pass --sae, --layer or --hook-name")
    return subject.sae


@app.command(
    epilog="\b\nExample:\n  sae-steer demo --out sae-steer-demo",
)
def demo(
    model: ModelOption = "agent-gpt2",
    sae: SAEOption = None,
    contrast: ContrastOption = None,
    trait: Annotated[str, typer.Option(help="Trait of the organism's world.")] = "autonomy",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="Folder for report, tables and vectors.")] = Path(
        "sae-steer-demo"
    ),
    items: Annotated[int, typer.Option(min=8, help="Held-out test items.")] = 200,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Controls and curves on all items: minutes.")
    ] = False,
    allow_unbalanced_letters: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """The main job: vectors of one trait in several ways, dose-response with controls, a report.

    Without --contrast the model is an organism and the evidence is agent rollouts. With it, any
    model is judged by next-token probabilities on held-out pairs of the file.
    """
    with one_line_errors(debug):
        quiet_hosts()
        from dataclasses import replace

        from sae_steering_plugin.report import effect_rows, headline, write_report
        from sae_steering_plugin.runs.demo import run_demo
        from sae_steering_plugin.runs.demo_stages import Budget

        budget = replace(Budget(), test=items)
        if thorough:
            budget = replace(budget, validation=100, control_items=items, curve_items=items)
        found = run_demo(
            model=model,
            sae=sae,
            contrast=contrast,
            trait=trait,
            device=device,
            dtype=dtype,
            seed=seed,
            budget=budget,
            allow_unbalanced_letters=allow_unbalanced_letters,
        )
        written = [write_report(found, out), *found.save(out)]
        shown(
            effect_rows(found.headline),
            f"{found.trait} in {found.model}: all methods at the same displacement",
        )
        shown(effect_rows(found.curve), "decoded probe: strengths and positions")
        typer.echo(headline(found))
        for note in found.notes:
            typer.echo(f"note: {note}")
        typer.echo(f"{found.seconds:.0f} s. Wrote {', '.join(str(path) for path in written)}")


@app.command(
    epilog="\b\nExample:\n  sae-steer build --trait autonomy --method probe --out autonomy",
)
def build(
    model: ModelOption = "agent-gpt2",
    sae: SAEOption = None,
    contrast: ContrastOption = None,
    trait: Annotated[
        str | None, typer.Option(help="Instead of --contrast: a trait of the organism's world.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="probe, sas, feature, diff_mean, caa, pca, srs, sta, spare, sae_ts, fgaa or "
            "corrsteer."
        ),
    ] = "probe",
    layer: Annotated[int | None, typer.Option(help="Read blocks.LAYER.hook_resid_post.")] = None,
    hook_name: Annotated[str | None, typer.Option(help="Read this hook point.")] = None,
    feature: Annotated[
        int | None, typer.Option(help="With --method feature or sae_ts: which one.")
    ] = None,
    tau: Annotated[float, typer.Option(help="With --method sas: activation frequency.")] = 0.7,
    effects: Annotated[
        Path | None,
        typer.Option(help="With --method sae_ts or fgaa: an effect map that save_effects wrote."),
    ] = None,
    outcomes: Annotated[
        Path | None,
        typer.Option(help="With --method corrsteer: JSONL with prompt, response, score."),
    ] = None,
    label: Annotated[str, typer.Option(help="Name of the vector in the folder.")] = "",
    format: FormatOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="Folder for the SAELens dictionary.")] = Path(
        "sae-steer-vectors"
    ),
    allow_unbalanced_letters: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Build a vector from contrasting texts and save it as an SAELens folder."""
    with one_line_errors(debug):
        quiet_hosts()
        if (contrast is None) == (trait is None):
            raise ValueError("what to build from? pass either --contrast FILE or --trait NAME")
        from sae_steering_plugin.runs.construction import check_method, construct, scores_of
        from sae_steering_plugin.runs.contrast_files import read_contrast_file

        given = {"effects": effects, "outcomes": outcomes}
        kinds = [kind for kind, path in given.items() if path is not None]
        check_method(method, has_sae=True, given=kinds)
        from sae_steering_plugin.runs.feature_effects import load_effects
        from sae_steering_plugin.runs.outcome_correlation import collect_outcomes, read_scored

        effect_map = None if effects is None else load_effects(effects)
        scored = None if outcomes is None else read_scored(outcomes)
        file = None
        if contrast is not None:
            file = read_contrast_file(
                contrast, format=format, allow_unbalanced_letters=allow_unbalanced_letters
            )
        from sae_steering_plugin.adapters.sae_lens import SteeringDictionary
        from sae_steering_plugin.runs.collect import collect_contrast
        from sae_steering_plugin.runs.subject import open_subject, world_contrast

        subject = open_subject(model, sae, device=device, dtype=dtype)
        check_method(method, has_sae=subject.sae is not None, given=kinds)
        if file is not None:
            pairs = file.contrast(subject.render if file.chat else None)
        else:
            pairs = world_contrast(subject, str(trait), 400, seed=seed)
        labelled = collect_contrast(subject.model, pairs, chosen_site(subject, layer, hook_name))
        vector = construct(
            method,
            labelled,
            subject.sae,
            label=label or f"{pairs.name} {method}",
            seed=seed,
            feature=feature,
            tau=tau,
            effects=effect_map,
            outcomes=None
            if scored is None or method != "corrsteer"
            else collect_outcomes(subject.model, subject.sae, scored),
            allow_unbalanced_letters=allow_unbalanced_letters,
        )
        SteeringDictionary.from_vectors([vector]).save_model(out)
        if file is not None and file.answers:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in file.answers.items())
            typer.echo(f"matching answers: {shares}")
        table = scores_of(vector, labelled, seed=seed)
        typer.echo(str(table) if table else "one group of examples: nothing could be held out")
        own = {k: v for k, v in vector.recipe.scores.items() if k in ("auroc", "accuracy")}
        figures = ", ".join(f"{k} {v:.3f}" for k, v in own.items() if v is not None)
        norm = vector.recipe.mean_norm
        typer.echo(
            f"{vector.label!r}: {method} at {vector.hook_name}, length {vector.norm:.4g}"
            + (f" (mean residual norm {norm:.4g})" if norm else "")
            + (f"; held out by group: {figures}" if figures else "")
        )
        typer.echo(f"saved to {out}")


@app.command(
    epilog="\b\nExample:\n  sae-steer build --trait autonomy --out autonomy\n"
    '  sae-steer generate --vectors autonomy --prompt "Update notes.md." --strength 0.5',
)
def generate(
    vectors: Annotated[Path, typer.Option(help="Folder written by build or save_model.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be given again.")],
    strength: Annotated[float, typer.Option(help="How much of the vector, in --unit.")] = 1.0,
    unit: Annotated[str, typer.Option(help="raw, unit, norm, max_activation or kl.")] = "norm",
    positions: Annotated[
        str, typer.Option(help="all, prefill, decode, last or after_prompt.")
    ] = "all",
    label: Annotated[str | None, typer.Option(help="Which vector of the folder.")] = None,
    system: Annotated[
        str, typer.Option(help="System prompt, for models with a chat template.")
    ] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Do not use the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    model: ModelOption = "agent-gpt2",
    sae: SAEOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the texts here, as JSON.")] = None,
    debug: DebugOption = False,
) -> None:
    """Continue prompts unsteered and steered, side by side, with the record of what was changed."""
    with one_line_errors(debug):
        quiet_hosts()
        from sae_steering_plugin.types import named_positions

        rule = named_positions(positions)
        from sae_steering_plugin.runs.continuation import continued, load_vector

        vector = load_vector(vectors, label)
        scale = known_unit(unit)
        vector.displacement(strength, scale)  # an impossible unit stops here, before the model
        from sae_steering_plugin.runs.subject import open_subject

        subject = open_subject(model, sae, device=device, dtype=dtype)
        found = continued(
            subject,
            vector,
            prompt,
            strength=strength,
            unit=scale,
            positions=rule,
            system=system,
            raw=raw,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        side_by_side(found.rows())
        typer.echo(str(found.record))
        if out is not None:
            found.save(out)
            typer.echo(f"saved to {out}")


# Selection ----------------------------------------------------------------------------------------


@app.command(
    epilog="\b\nExample:\n  sae-steer select --world --prior 0.01 --out selected",
)
def select(
    labels: Annotated[
        Path | None, typer.Option(help="CSV, JSONL or parquet of texts with labels.")
    ] = None,
    world: Annotated[
        bool, typer.Option("--world", help="Instead of --labels: an organism's own statements.")
    ] = False,
    text: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label: Annotated[
        str | None, typer.Option(help="Column with one label, or a list of labels, per text.")
    ] = None,
    concept: Annotated[
        list[str] | None, typer.Option(help="Column of 1 and 0 for a concept; may be given again.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Column that names what must stay in one split.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="What separates several labels in one cell, such as |.")
    ] = None,
    variant: Annotated[
        str, typer.Option(help="full (with the causal filter) or interpretability.")
    ] = "full",
    score: Annotated[str, typer.Option(help="f1, auroc, mean_difference, cohens_d, ...")] = "f1",
    order: Annotated[
        str,
        typer.Option(help="score, equals (output score among equal scores), output or product."),
    ] = "score",
    pooling: Annotated[
        str, typer.Option(help="frequency, mean, max, last or any, over a text's tokens.")
    ] = "frequency",
    prior: Annotated[
        float, typer.Option(help="Reference prevalence of f1; 1e-2 for few texts.")
    ] = 1e-3,
    support: Annotated[int, typer.Option(min=1, help="Texts that a concept needs.")] = 50,
    cut: Annotated[float, typer.Option(help="Least output score, with --variant full.")] = 1e-3,
    k: Annotated[int, typer.Option(min=1, help="Features kept per concept.")] = 5,
    screened: Annotated[
        Path | None,
        typer.Option(help="Folder of sae-steer screen: its forecast chooses among equal features."),
    ] = None,
    cut_texts: Annotated[
        bool, typer.Option("--cut-texts", help="Cut texts at the model's context.")
    ] = False,
    model: ModelOption = "agent-gpt2",
    sae: SAEOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for table, JSON and SAELens dictionary.")
    ] = Path("sae-steer-selected"),
    debug: DebugOption = False,
) -> None:
    """Choose the features of concepts from labelled texts; write table, JSON and a SAELens folder.

    Labels are checked before the model is loaded: blank ones are unknown, anything else that is no
    label is refused with its line and column.
    """
    with one_line_errors(debug):
        quiet_hosts()
        if (labels is None) == (not world):
            raise ValueError("what to select for? pass either --labels FILE or --world")
        from sae_steering_plugin.runs.labelled_texts import read_labelled, world_statements
        from sae_steering_plugin.runs.selection import (
            check_options,
            select_features,
            usable_concepts,
        )

        check_options(variant, score, order, pooling, max(k, 50), k)
        if labels is not None:
            data = read_labelled(
                labels,
                text=text,
                label=label,
                concepts=tuple(concept or ()),
                group=group,
                separator=separator,
            )
        else:
            data = world_statements(seed=seed)
        usable_concepts(data.labels, len(data.texts), support=support)
        from sae_steering_plugin.runs.subject import open_subject

        subject = open_subject(model, sae, device=device, dtype=dtype)
        if subject.sae is None:
            raise ValueError("selection needs a dictionary: pass --sae")
        forecast = None
        if screened is not None:
            from sae_steering_plugin.runs.screening import Forecast

            forecast = Forecast.load(screened)
        found = select_features(
            subject.model,
            subject.sae,
            data.texts,
            data.labels,
            screen=forecast,
            groups=data.groups,
            variant=variant,
            score=score,
            order=order,
            pooling=pooling,
            prior=prior,
            support=support,
            candidates=max(k, 50),
            cut=cut,
            k=k,
            cut_texts=cut_texts,
            seed=seed,
        )
        written = found.save(out)
        shown(found.best(), "best feature of each concept")
        for note in (*data.notes, *found.notes):
            typer.echo(f"note: {note}")
        got, asked = found.coverage
        typer.echo(f"{got} of {asked} concepts have a feature; the others count as unsteered")
        typer.echo(f"wrote {', '.join(str(path) for path in written)}")


@app.command(
    epilog="\b\nExample:\n  sae-steer screen --features 100 --contexts 256 --out screened",
)
def screen(
    model: ModelOption = "agent-gpt2",
    sae: SAEOption = None,
    downstream: Annotated[
        str | None, typer.Option(help="A later SAE, where collateral is read; named as --sae.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts, one per line or JSONL with 'text'; not for agents.")
    ] = None,
    fresh: Annotated[
        Path | None, typer.Option(help="Texts of the fresh contexts; else a fifth of --texts.")
    ] = None,
    contexts: Annotated[int, typer.Option(min=64, help="Label contexts.")] = 1024,
    fresh_contexts: Annotated[int, typer.Option(min=64, help="Fresh contexts.")] = 128,
    features: Annotated[int, typer.Option(min=25, help="Features, of all firing rates.")] = 300,
    group: Annotated[int, typer.Option(min=2, help="Features of a group, at most.")] = 25,
    strength: Annotated[float, typer.Option(help="How much of each row is added.")] = 1.0,
    unit: Annotated[str, typer.Option(help="raw rows, or norm: mean residual norms.")] = "raw",
    columns: Annotated[str, typer.Option(help="Predictor set.")] = "full_no_magnitude",
    predictor: Annotated[str, typer.Option(help="ridge or trees.")] = "ridge",
    protocol: Annotated[
        str, typer.Option(help="strict (training statistics only) or paper.")
    ] = "strict",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="Folder for tables, forecasts and clean features.")] = (
        Path("sae-steer-screened")
    ),
    debug: DebugOption = False,
) -> None:
    """Forecast which features steer cleanly, and check the forecast on fresh contexts.

    Forecasts come from statistics without a steered pass, fitted on the side effects of some
    features. Groups of others, forecast clean and messy, are then steered and compared.
    """
    with one_line_errors(debug):
        quiet_hosts()
        from sae_steering_plugin.runs.screen_job import (
            Sizes,
            axis_table,
            difference_rows,
            screen_subject,
        )

        found, subject = screen_subject(
            model,
            sae,
            downstream,
            texts=texts,
            fresh=fresh,
            sizes=Sizes(contexts, fresh_contexts, features, group),
            device=device,
            dtype=dtype,
            seed=seed,
            strength=strength,
            unit=unit,
            columns=columns,
            predictor=predictor,
            protocol=protocol,
        )
        written = found.save(out, subject.sae)
        shown(axis_table(found), "forecast on fresh contexts, and group means")
        shown(difference_rows(found), "groups of pool features")
        typer.echo(f"wrote {', '.join(str(path) for path in written)}")


@app.command(
    epilog="\b\nExample:\n  sae-steer learn --texts pirate.txt --texts sums.txt --model agent-gpt2"
)
def learn(
    texts: Annotated[
        list[Path],
        typer.Option(help="Training texts: .txt lines, or text / positive+negative columns."),
    ],
    model: ModelOption = "agent-gpt2",
    sae: SAEOption = None,
    top: Annotated[int, typer.Option(min=1, help="Concepts shown.")] = 10,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Longest text.")] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="Folder for table, JSON and page.")] = Path(
        "sae-steer-learned"
    ),
    debug: DebugOption = False,
) -> None:
    """What a training step on these texts would push the model towards, in the SAE's concepts.

    Nothing is trained. Each file (each side of a file of pairs) is a source of its own, and the two
    sources are compared.
    """
    with one_line_errors(debug):
        quiet_hosts()
        from sae_steering_plugin.runs.learning_texts import read_sources

        words, sources = read_sources(texts)
        from sae_steering_plugin.report import write_learning
        from sae_steering_plugin.runs.learning import learning_report
        from sae_steering_plugin.runs.subject import open_subject

        subject = open_subject(model, sae, device=device, dtype=dtype)
        if subject.sae is None:
            raise ValueError("a learning report needs a dictionary: pass --sae")
        found = learning_report(
            subject.model, subject.sae, words, groups=sources, max_tokens=max_tokens, seed=seed
        )
        for name in dict.fromkeys(sources):
            shown(rounded(found.top(top, group=name)), f"pushed by {name}")
            shown(rounded(found.emerging(top, group=name)), f"emerging from {name}")
        written = write_learning(found, out, k=top)
        typer.echo(found.summary())
        typer.echo(f"wrote {', '.join(str(path) for path in written)}")


# Protocols ----------------------------------------------------------------------------------------


class ProtocolGroup(typer.core.TyperGroup):
    """The subcommands of `evaluate`: protocols by name or import path, imported when asked for."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        from sae_steering_plugin.runs.protocols import PROTOCOLS

        return list(PROTOCOLS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        with one_line_errors(debug=False):
            return protocol_command(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        from sae_steering_plugin.runs.protocols import PROTOCOLS

        with formatter.section("Protocols"):
            formatter.write_dl([(name, one.summary) for name, one in PROTOCOLS.items()])


app.add_typer(
    typer.Typer(rich_markup_mode=None, add_completion=False),
    name="evaluate",
    cls=ProtocolGroup,
    no_args_is_help=True,
    help="Run a protocol of many model runs as a sweep that can be killed at any moment: the same "
    "command goes on where it was. `sae-steer evaluate PROTOCOL --help` shows its options.",
    epilog="\b\nExample:\n  sae-steer evaluate rollouts --vectors autonomy --out rollouts "
    "--runner ray --workers 2",
    subcommand_metavar="PROTOCOL [OPTIONS]",
)


def run_options(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same folder goes on.")],
    runner: Annotated[str, typer.Option(help="in-process or ray.")] = "in-process",
    workers: Annotated[
        int | None, typer.Option(min=1, help="With ray: worker processes; one per core if none.")
    ] = None,
    gpus: Annotated[float, typer.Option(min=0, help="With ray: GPUs per worker, also 0.5.")] = 0.0,
    shard: Annotated[
        str | None,
        typer.Option(help="I/N, from 0/N: this part only. `env`: from SLURM or torchrun."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run units again that raised.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """The options that every protocol has beside its own; only its signature is used."""


def protocol_command(name: str) -> Any:
    """The command of a protocol: its function's parameters and `run_options` as options."""
    import inspect

    from sae_steering_plugin.runs.protocols import PROTOCOLS, find_protocol

    if ":" in name and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a module beside the user, as with python -m
    build = find_protocol(name)
    own = inspect.signature(build, eval_str=True).parameters
    shared = inspect.signature(run_options, eval_str=True).parameters
    options = [option_of(one) for one in own.values() if one.name not in shared]

    def command(**given: Any) -> None:
        mine = {key: given[key] for key in own}
        run_protocol(build, mine, **{key: given[key] for key in shared})

    command.__doc__ = build.__doc__
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*options, *shared.values()]
    )
    command.__annotations__ = {one.name: one.annotation for one in (*options, *shared.values())}
    made = typer.Typer(rich_markup_mode=None, add_completion=False)
    example = PROTOCOLS[name].example.replace("\n", "\n  ") if name in PROTOCOLS else ""
    made.command(name, epilog=f"\b\nExample:\n  {example}" if example else None)(command)
    return typer.main.get_command(made)


def option_of(parameter: Any) -> Any:
    """A protocol's parameter as an option: texts in its annotation are its name and its help."""
    from typing import get_args, get_origin

    kind, words = parameter.annotation, []
    if get_origin(kind) is Annotated:
        kind, *words = get_args(kind)
    names = [word for word in words if word.startswith("--")]
    help_text = " ".join(word for word in words if not word.startswith("--"))
    return parameter.replace(annotation=Annotated[kind, typer.Option(*names, help=help_text)])


def run_protocol(
    build: Any,
    options: dict[str, Any],
    *,
    out: Path,
    runner: str,
    workers: int | None,
    gpus: float,
    shard: str | None,
    retry_failed: bool,
    debug: bool,
) -> None:
    """Make the plan, run what its folder lacks, and show the tables once it is complete.

    Exit code 1 while a unit that was asked for is missing or failed, 130 when interrupted.
    """
    with one_line_errors(debug):
        chosen = chosen_runner(runner, workers, gpus)
        only = chosen_shard(shard)
        quiet_hosts()
        from sae_steering_plugin.runs.parts import todo

        evaluation = build(**options)
        complete = run_evaluation(evaluation, out, chosen, only, retry_failed, debug)
        while complete and evaluation.then is not None and not todo(evaluation.plan, out):
            name, following = evaluation.then
            evaluation, out = following(out), out / name
            complete = run_evaluation(
                evaluation, out, chosen_runner("in-process", None, 0.0), None, retry_failed, debug
            )
        if not complete:
            raise typer.Exit(1)


def run_evaluation(
    evaluation: Any, out: Path, runner: Any, only: Any, retry_failed: bool, debug: bool
) -> bool:
    """Run what `out` lacks of the plan; its tables are shown and written once it is whole.

    True when every unit that was asked for is there.
    """
    from sae_steering_plugin.runs.parts import collect, todo

    try:
        report = runner.run(evaluation.plan, out, only=only, retry_failed=retry_failed)
    except KeyboardInterrupt as stop:
        typer.echo(str(stop), err=True)
        raise typer.Exit(130) from None
    except (RuntimeError, ImportError) as error:
        if debug:
            raise
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(1) from None
    typer.echo(str(report))
    if report.complete and not report.elsewhere and not todo(evaluation.plan, out):
        from sae_steering_plugin.runs.summary import write_summary

        collected = collect(evaluation.plan, out)
        tables = evaluation.tables(collected)
        written = write_summary(evaluation.plan, report, collected, tables, out)
        if evaluation.save is not None:
            written += evaluation.save(collected, out)
        for title, rows in tables.items():
            shown([dict(row) for row in rows], title)
        typer.echo(f"{collected}. Wrote {', '.join(str(path) for path in written)}")
    return bool(report.complete)


def chosen_runner(word: str, workers: int | None, gpus: float) -> Any:
    """The runner a word names. Raises ValueError that lists them."""
    from sae_steering_plugin.runs.runner import InProcess, RayRunner

    if word == "ray":
        return RayRunner(workers="auto" if workers is None else workers, gpus=gpus)
    if word != "in-process":
        raise ValueError(f"no runner {word!r}; choose one of in-process, ray")
    if workers is not None or gpus:
        raise ValueError("--workers and --gpus need --runner ray; in one process there is one")
    return InProcess()


def chosen_shard(word: str | None) -> Any:
    """The units that `I/N` or `env` names; all when None. Raises ValueError for another word."""
    from sae_steering_plugin.runs.runner import in_shard, shard_from_environment

    if word is None:
        return None
    if word == "env":
        return in_shard(*shard_from_environment())
    index, slash, count = word.partition("/")
    if not slash or not index.isdigit() or not count.isdigit():
        raise ValueError(f"--shard is {word!r}; write it as I/N (0/4 to 3/4), or env")
    return in_shard(int(index), int(count))


# Tables -------------------------------------------------------------------------------------------


def shown(rows: list[dict[str, Any]], title: str) -> None:
    """Print rows as a table, as wide as it needs to be."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        table.add_column(name, justify="left" if name in LEFT_COLUMNS else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    width = None if sys.stdout.isatty() else 140
    Console(width=width, markup=False, highlight=False).print(table)


LEFT_COLUMNS = ("method", "positions", "arm", "judge", "set", "concept")


def rounded(table: Any) -> list[dict[str, Any]]:
    """Rows of a pandas table in few digits, as a page shows them."""
    from sae_steering_plugin.report import cell

    rows = table.to_dict("records")
    return [{name: cell(value) for name, value in row.items()} for row in rows]


def side_by_side(rows: list[tuple[str, str, str]]) -> None:
    """Print prompt, unsteered and steered text in columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for name in ("prompt", "unsteered", "steered"):
        table.add_column(name, ratio=1, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 140, markup=False).print(table)


def main() -> None:
    """The entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
