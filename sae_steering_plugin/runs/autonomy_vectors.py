"""The vectors of the autonomy protocol: a decoded probe per trait, and the controls beside it.

All act at one SAE's site and are measured against one residual norm (the mean over the traits'
examples), so that one strength is one displacement. The controls of arXiv 2603.16335's protocol:

    random weights    the probe's own |w| dealt to other latents with random signs, then decoded:
                      same norm, sparsity and concentration of w, and the span the decoder favours
    permuted labels   the same probe fitted after half of the pairs, drawn at random, swapped labels
    DiffMean, ridge   dense vectors of the same examples, without the SAE

(Random unit vectors need no building: `rollout_plan.random_arms`.)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..directions import diff_mean_vector, probe_vector
from ..directions.codes import FiredCodes
from ..directions.figures import Penalties, chosen_strength, design_of
from ..directions.fits import PROBES, fitted_weights
from ..directions.probe import STRENGTHS, decoded, unit_row_design
from ..directions.recipe import recipe_of
from ..types import Contrast, Labelled, SteeringVector
from .canonical import content_key, seed_of
from .collect import collect_contrast, encode_labelled
from .contrast_files import read_contrast_file
from .parts import is_running
from .references import VectorRef, model_fingerprint
from .subject import Subject, one_thread, open_subject, world_contrast

PROBE = "decoded probe"
RANDOM_WEIGHTS = "random weights, decoded"
PERMUTED = "probe on permuted labels"
DIFF_MEAN = "DiffMean"
RAW_RIDGE = "ridge on activations"
KINDS = (PROBE, RANDOM_WEIGHTS, PERMUTED, DIFF_MEAN, RAW_RIDGE)

MEASURE = "autonomy vectors 2"
"""Raised when a change here can give another vector for the same inputs."""

FILE_NAMES = {"risk_calibration": "risk", "tool_use_eagerness": "tool_use"}
"""Names of the released contrast files, and the proxy their trait belongs to."""


@dataclass(frozen=True)
class VectorSettings:
    """What the vectors are built from, besides model and SAE. `draws` is the number of random
    weights and of label permutations per trait."""

    traits: tuple[str, ...]
    pairs: int = 400
    probe: str = "ridge"
    draws: int = 2
    seed: int = 0


@dataclass(frozen=True)
class TraitVector:
    """One vector of the set: whose trait, which kind, which draw, and where it lies."""

    trait: str
    kind: str
    draw: int
    reference: VectorRef


@dataclass(frozen=True)
class TraitVectors:
    """The saved set. `mean_norm` is the residual norm that a strength of 1 stands for; `scores` are
    the held-out figures of each trait's probe, words alone and raw activations beside it."""

    vectors: tuple[TraitVector, ...]
    mean_norm: float
    hook_name: str
    sae: str
    scores: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]

    def of(self, kind: str) -> tuple[TraitVector, ...]:
        """The vectors of one kind, in the traits' order. ValueError lists the kinds."""
        if kind not in KINDS:
            raise ValueError(f"no kind {kind!r}; choose one of {', '.join(KINDS)}")
        return tuple(one for one in self.vectors if one.kind == kind)

    @property
    def probes(self) -> dict[str, VectorRef]:
        """The decoded probe of each trait."""
        return {one.trait: one.reference for one in self.of(PROBE)}


def saved_vectors(
    model: str,
    settings: VectorSettings,
    folder: str | Path,
    *,
    sae: str | None = None,
    contrasts: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> TraitVectors:
    """The vectors, read from `folder` when the same inputs made them before, else built there.

    They stand in `vectors-<key>`, which appears at once and whole: a build that was killed leaves
    nothing that a later one would take for finished. `contrasts` is a folder with one file per
    trait (`autonomy.jsonl`, ...); without it the model is an organism and its world is asked.
    Raises ValueError for a model without SAE, for a trait without a file, and for examples of one
    trait that lie at another site.
    """
    subject = open_subject(model, sae, device=device, dtype=dtype)
    if subject.sae is None:
        raise ValueError("decoded probes need an SAE: pass --sae")
    found = trait_contrasts(subject, settings, contrasts)
    key = content_key(
        {
            "measure": MEASURE,
            "model": model_fingerprint(model),
            "dtype": dtype,
            "device": device.partition(":")[0],
            "sae": weights_fingerprint(subject.sae),
            "settings": settings,
            "texts": {trait: [one.positive, one.negative, one.groups] for trait, one in found},
        }
    )
    target = Path(folder).expanduser().resolve() / f"vectors-{key[:16]}"
    if not (target / ABOUT).is_file():
        build(subject, settings, dict(found), target)
    return read_vectors(target)


ABOUT = "traits.json"


def weights_fingerprint(sae: Any) -> str:
    """SHA-256 over the names and values of an SAE's weights."""
    digest = hashlib.sha256()
    for name, weights in sorted(sae.state_dict().items()):
        values = weights.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(f"{name}\0{tuple(values.shape)}\0".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def trait_contrasts(
    subject: Subject, settings: VectorSettings, folder: str | Path | None
) -> list[tuple[str, Contrast]]:
    """Each trait's examples: the organism's world, or the files of a folder."""
    if folder is None:
        return [
            (trait, world_contrast(subject, trait, settings.pairs, seed=settings.seed))
            for trait in settings.traits
        ]
    files = trait_files(folder)
    found = []
    for trait in settings.traits:
        if trait not in files:
            raise ValueError(f"{folder} has no file for {trait!r}; it has {', '.join(files)}")
        file = read_contrast_file(files[trait])
        found.append((trait, file.contrast(subject.render if file.chat else None)))
    return found


def trait_files(folder: str | Path) -> dict[str, Path]:
    """The contrast files of a folder by trait, released names included. ValueError without any."""
    paths = [path for path in sorted(Path(folder).glob("*")) if path.suffix in FILE_KINDS]
    if not paths:
        raise ValueError(f"{folder} holds no contrast file ({', '.join(FILE_KINDS)})")
    return {FILE_NAMES.get(path.stem, path.stem): path for path in paths}


FILE_KINDS = (".jsonl", ".json", ".csv")


# Building -----------------------------------------------------------------------------------------


def build(
    subject: Subject, settings: VectorSettings, contrasts: Mapping[str, Contrast], target: Path
) -> None:
    """Build every vector and give the folder its name once it is whole."""
    from ..adapters.sae_lens import SteeringDictionary

    with one_thread():
        made = list(built_vectors(subject, settings, contrasts))
    norms = [one.recipe.mean_norm for _, kind, _, one in made if kind == PROBE]
    norm = sum(float(one or 0.0) for one in norms) / len(norms)
    vectors = [one.with_recipe(mean_norm=norm) for *_, one in made]
    about = {
        "mean_norm": norm,
        "hook_name": vectors[0].hook_name,
        "sae": subject.sae_name,
        "settings": asdict(settings),
        "vectors": [
            {"label": one.label, "trait": trait, "kind": kind, "draw": draw}
            for (trait, kind, draw, _), one in zip(made, vectors, strict=True)
        ],
        "scores": {
            trait: {**one.recipe.scores, "penalty": one.recipe.settings["strength"]}
            for trait, kind, _, one in made
            if kind == PROBE
        },
    }
    for leftover in target.parent.glob(f".building-{target.name}-*"):
        if not is_running(int(leftover.name.rpartition("-")[2])):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = target.with_name(f".building-{target.name}-{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        SteeringDictionary.from_vectors(vectors).save_model(temporary)
        (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        if not target.exists():  # another shard may have been faster; its vectors are the same
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_vectors(folder: Path) -> TraitVectors:
    """The set that `build` wrote. Raises ValueError for a folder that is not one."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        references = {one.label: one for one in VectorRef.all_of(folder)}
        return TraitVectors(
            tuple(
                TraitVector(one["trait"], one["kind"], one["draw"], references[one["label"]])
                for one in about["vectors"]
            ),
            about["mean_norm"],
            about["hook_name"],
            about["sae"],
            about["scores"],
            about["settings"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is no set of trait vectors ({error!r}): delete it") from error


Made = tuple[str, str, int, SteeringVector]


def built_vectors(
    subject: Subject, settings: VectorSettings, contrasts: Mapping[str, Contrast]
) -> Iterator[Made]:
    """(trait, kind, draw, vector) of every vector, trait by trait."""
    from tqdm.auto import tqdm

    for trait, contrast in tqdm(contrasts.items(), desc="vectors", unit="trait"):
        labelled = collect_contrast(
            subject.model, contrast, subject.sae, batch_size=64, progress=False
        )
        codes = encode_labelled(subject.sae, labelled)
        probe = probe_vector(
            labelled,
            subject.sae,
            probe=settings.probe,
            codes=codes,
            label=trait,
            positive=f"more {trait}",
            seed=settings.seed,
        )
        yield trait, PROBE, 0, probe
        yield from decoded_controls(trait, probe, labelled, codes, settings)
        yield trait, DIFF_MEAN, 0, diff_mean_vector(labelled, label=f"{trait}: {DIFF_MEAN}")
        yield trait, RAW_RIDGE, 0, raw_ridge_vector(labelled, label=f"{trait}: {RAW_RIDGE}")


def decoded_controls(
    trait: str,
    probe: SteeringVector,
    labelled: Labelled,
    codes: FiredCodes,
    settings: VectorSettings,
) -> Iterator[Made]:
    """Random weights and permuted labels, `settings.draws` of each, from the probe's own design."""
    X, rows = unit_row_design(codes, unit_rows=True)
    penalty = float(probe.recipe.settings["strength"])

    def fitted(labels: Int[Tensor, " example"]) -> Float[Tensor, " feature"]:
        way = PROBES[settings.probe]
        return fitted_weights(X, labels, way, penalty, center=True, standardize=False)

    weights = fitted(labelled.labels)
    for draw in range(settings.draws):
        for kind in (RANDOM_WEIGHTS, PERMUTED):
            generator = torch.Generator().manual_seed(seed_of(settings.seed, trait, kind, draw))
            if kind == RANDOM_WEIGHTS:
                drawn = dealt_weights(weights, generator)
            else:
                drawn = fitted(swapped_labels(labelled.labels, labelled.pairs, generator))
            recipe = recipe_of(
                labelled,
                kind,
                positive="nothing: a control",
                seed=draw,
                sae_id=codes.sae_id,
                settings={"weight_norm": float(drawn.norm()), "penalty": penalty},
                source="arXiv 2603.16335",
            )
            vector = SteeringVector(
                decoded(drawn, rows), codes.hook_name, recipe, label=f"{trait}: {kind} {draw}"
            )
            yield trait, kind, draw, vector


def dealt_weights(
    weights: Float[Tensor, " feature"], generator: torch.Generator
) -> Float[Tensor, " feature"]:
    """The same |w| dealt to the latents in a random order with random signs."""
    order = torch.randperm(len(weights), generator=generator)
    signs = torch.randint(0, 2, (len(weights),), generator=generator) * 2 - 1
    return weights.abs()[order] * signs


def swapped_labels(
    labels: Int[Tensor, " example"], pairs: Int[Tensor, " example"], generator: torch.Generator
) -> Int[Tensor, " example"]:
    """Labels that know nothing of the trait: a random half of the pairs exchange their two;
    without pairs, each label's share of positives stays that of the whole (to rounding).

    Exchanging inside pairs keeps what the two texts share (task, role, template) balanced, so that
    only the trait's pole is forgotten. Exactly half, because a coin per pair leaves a correlation
    with the truth of order 1 / sqrt(n), which a vector brought to length no longer hides: such a
    "permuted" probe had a cosine of up to 0.9 with the real one.
    """
    if bool((pairs < 0).any()):
        return _reassigned(labels, generator)
    n_pairs = int(pairs.max()) + 1
    exchanged = torch.zeros(n_pairs, dtype=torch.bool)
    exchanged[torch.randperm(n_pairs, generator=generator)[: n_pairs // 2]] = True
    return torch.where(exchanged[pairs], 1 - labels, labels)


def _reassigned(
    labels: Int[Tensor, " example"], generator: torch.Generator
) -> Int[Tensor, " example"]:
    """As many ones as before, spread over true ones and true zeros in proportion."""
    ones = int(labels.sum())
    kept = round(ones * ones / len(labels))
    drawn = torch.zeros_like(labels)
    for truth, count in ((1, kept), (0, ones - kept)):
        there = torch.nonzero(labels == truth).flatten()
        drawn[there[torch.randperm(len(there), generator=generator)[:count]]] = 1
    return drawn


def raw_ridge_vector(labelled: Labelled, *, label: str, seed: int = 0) -> SteeringVector:
    """Ridge weights on raw activations, centred, the penalty chosen as the probe's is: on grouped
    folds, within one standard error of the best."""
    X = labelled.activations.double()
    penalties, everything = Penalties(STRENGTHS), torch.arange(len(labelled))
    design = design_of(X, standardize=False)
    value = chosen_strength(
        design,
        labelled.labels,
        labelled.groups,
        everything,
        PROBES["ridge"],
        penalties,
        center=True,
        seed=seed,
    )
    penalty = penalties.penalty(value, design(everything), everything, center=True)
    weights = fitted_weights(
        X, labelled.labels, PROBES["ridge"], penalty, center=True, standardize=False
    )
    recipe = recipe_of(
        labelled, "raw_ridge", positive="", seed=seed, settings={"strength": penalty}
    )
    return SteeringVector(weights.float(), labelled.hook_name, recipe, label=label)


def kinds_of(vectors: Sequence[TraitVector]) -> tuple[str, ...]:
    """The kinds that occur, in the order of `KINDS`."""
    there = {one.kind for one in vectors}
    return tuple(kind for kind in KINDS if kind in there)
