"""Vectors of the autonomy protocol: controls keep what they claim to keep, sets are made once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_steering_plugin.adapters.sae_lens import load_sae
from sae_steering_plugin.runs import autonomy_vectors
from sae_steering_plugin.runs.autonomy_vectors import (
    DIFF_MEAN,
    KINDS,
    PERMUTED,
    PROBE,
    RANDOM_WEIGHTS,
    RAW_RIDGE,
    VectorSettings,
    dealt_weights,
    raw_ridge_vector,
    saved_vectors,
    swapped_labels,
    trait_files,
    weights_fingerprint,
)
from sae_steering_plugin.types import Labelled
from tests.local import model_folder, sae_folder, traits_file

SETTINGS = VectorSettings(("autonomy", "risk"), pairs=12, draws=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model, its SAE and a folder of contrast files as a user has them."""
    root = tmp_path_factory.mktemp("place")
    files = root / "contrasts"
    files.mkdir()
    traits_file(files / "autonomy.jsonl")
    traits_file(files / "risk_calibration.jsonl", n=15)
    return {
        "model": str(model_folder(root / "model")),
        "sae": str(sae_folder(root / "sae")),
        "contrasts": str(files),
    }


@pytest.fixture(scope="module")
def made(place: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return saved_vectors(settings=SETTINGS, folder=tmp_path_factory.mktemp("out"), **place)


def test_every_kind_of_every_trait_is_there(made: Any) -> None:
    counts = {kind: [one.trait for one in made.of(kind)] for kind in KINDS}
    twice = ["autonomy", "autonomy", "risk", "risk"]
    assert counts == {
        PROBE: ["autonomy", "risk"],
        RANDOM_WEIGHTS: twice,
        PERMUTED: twice,
        DIFF_MEAN: ["autonomy", "risk"],
        RAW_RIDGE: ["autonomy", "risk"],
    }
    assert list(made.probes) == ["autonomy", "risk"]
    with pytest.raises(ValueError, match="no kind 'magic'; choose one of decoded probe"):
        made.of("magic")


def test_one_strength_is_one_displacement_for_all_of_them(made: Any) -> None:
    lengths = {one.reference.load().displacement(0.5, "norm") for one in made.vectors}
    assert lengths == {0.5 * made.mean_norm}
    assert {one.reference.load().hook_name for one in made.vectors} == {made.hook_name}


def test_random_weights_stay_in_the_decoder_s_span_of_the_probe(
    made: Any, place: dict[str, str]
) -> None:
    """Control (b) is a combination of the same rows with the same norm of w: its recipe says so."""
    for trait in ("autonomy", "risk"):
        for one in made.of(RANDOM_WEIGHTS):
            if one.trait == trait:
                vector = one.reference.load()
                rows = load_sae(place["sae"]).W_dec.detach()
                unit = (rows / rows.norm(dim=1, keepdim=True)).double()
                solved = torch.linalg.lstsq(unit.T, vector.vector.double()).solution
                assert torch.allclose(unit.T @ solved, vector.vector.double(), atol=1e-5)
                assert vector.recipe.settings["weight_norm"] > 0


def test_a_set_is_built_once_and_read_back(
    place: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = saved_vectors(settings=SETTINGS, folder=tmp_path, **place)
    with monkeypatch.context() as patched:
        patched.setattr(autonomy_vectors, "build", lambda *_: pytest.fail("built again"))
        again = saved_vectors(settings=SETTINGS, folder=tmp_path, **place)
    assert again == first
    other = saved_vectors(settings=replace(SETTINGS, draws=1), folder=tmp_path, **place)
    assert len(other.vectors) < len(first.vectors)
    assert other.probes["risk"].fingerprint == first.probes["risk"].fingerprint
    assert len(list(tmp_path.glob("vectors-*"))) == 2


def test_the_same_inputs_build_the_same_bits_elsewhere(
    made: Any, place: dict[str, str], tmp_path: Path
) -> None:
    again = saved_vectors(settings=SETTINGS, folder=tmp_path, **place)
    assert [one.reference.fingerprint for one in again.vectors] == [
        one.reference.fingerprint for one in made.vectors
    ]
    assert again.scores == made.scores


def test_a_build_that_was_killed_leaves_nothing_that_counts(
    place: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_steering_plugin.adapters.sae_lens import SteeringDictionary

    def stop(self: Any, folder: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SteeringDictionary, "save_model", stop)
        with pytest.raises(KeyboardInterrupt):
            saved_vectors(settings=SETTINGS, folder=tmp_path, **place)
    assert list(tmp_path.iterdir()) == []
    whole = saved_vectors(settings=SETTINGS, folder=tmp_path / "x", **place)
    (folder,) = (tmp_path / "x").iterdir()
    dead = tmp_path / "y" / f".building-{folder.name}-999999999"
    dead.mkdir(parents=True)
    assert saved_vectors(settings=SETTINGS, folder=tmp_path / "y", **place).scores == whole.scores
    assert not dead.exists()


def test_a_folder_that_is_no_set_is_refused(place: dict[str, str], tmp_path: Path) -> None:
    saved_vectors(settings=SETTINGS, folder=tmp_path, **place)
    (folder,) = tmp_path.iterdir()
    (folder / "traits.json").write_text(json.dumps({"vectors": []}))
    with pytest.raises(ValueError, match="is no set of trait vectors"):
        saved_vectors(settings=SETTINGS, folder=tmp_path, **place)


def test_what_cannot_be_built_is_said_before_anything_is_collected(
    place: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="decoded probes need an SAE: pass --sae"):
        saved_vectors(place["model"], SETTINGS, tmp_path, contrasts=place["contrasts"])
    wrong = replace(SETTINGS, traits=("mood",))
    with pytest.raises(ValueError, match="has no file for 'mood'; it has autonomy, risk"):
        saved_vectors(settings=wrong, folder=tmp_path, **place)
    with pytest.raises(ValueError, match="holds no contrast file"):
        trait_files(tmp_path)
    without = {k: v for k, v in place.items() if k != "contrasts"}
    with pytest.raises(ValueError, match="is no organism, so it has no world"):
        saved_vectors(settings=SETTINGS, folder=tmp_path, **without)
    assert list(tmp_path.iterdir()) == []


# Controls -----------------------------------------------------------------------------------------


def test_dealt_weights_keep_norm_sparsity_and_concentration() -> None:
    weights = torch.randn(200, dtype=torch.float64) * (torch.arange(200) % 3 == 0)
    dealt = dealt_weights(weights, torch.Generator().manual_seed(0))
    assert torch.equal(dealt.abs().sort().values, weights.abs().sort().values)
    assert abs(float(dealt @ weights) / float(weights @ weights)) < 0.5
    again = dealt_weights(weights, torch.Generator().manual_seed(0))
    assert torch.equal(dealt, again)
    assert not torch.equal(dealt, dealt_weights(weights, torch.Generator().manual_seed(1)))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def test_swapped_labels_stay_one_of_each_in_a_pair_and_know_nothing_of_the_truth() -> None:
    n = 500
    labels, pairs = torch.tensor([1] * n + [0] * n), torch.arange(n).repeat(2)
    swapped = swapped_labels(labels, pairs, torch.Generator().manual_seed(0))
    assert torch.equal(swapped[:n] + swapped[n:], torch.ones(n, dtype=labels.dtype))
    assert correlation(swapped, labels) == 0.0
    other = swapped_labels(labels, pairs, torch.Generator().manual_seed(1))
    assert not torch.equal(other, swapped)


@pytest.mark.parametrize(("ones", "zeros"), [(500, 500), (30, 90), (1, 7)])
def test_unpaired_labels_keep_their_number_and_know_nothing_of_the_truth(ones, zeros) -> None:
    labels, pairs = torch.tensor([1] * ones + [0] * zeros), torch.full((ones + zeros,), -1)
    drawn = swapped_labels(labels, pairs, torch.Generator().manual_seed(0))
    assert int(drawn.sum()) == ones
    one_example = len(labels) / (ones * zeros)  # what the place of one label is worth
    assert abs(correlation(drawn, labels)) <= 0.5 * one_example + 1e-12


def labelled(n: int = 40, width: int = 6) -> Labelled:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2 * n) % 2
    x = torch.randn(2 * n, width, generator=generator)
    x[:, 0] += 2.0 * labels
    return Labelled(
        x + 5.0,
        labels,
        "blocks.0.hook_resid_post",
        tuple(f"g{i // 4}" for i in range(2 * n)),
        torch.arange(n).repeat_interleave(2),
        tuple(f"text {i}" for i in range(2 * n)),
        3.0,
    )


def test_raw_ridge_is_scikit_learn_s_on_centred_rows() -> None:
    from sklearn.linear_model import Ridge

    data = labelled()
    vector = raw_ridge_vector(data, label="x")
    model = Ridge(alpha=vector.recipe.settings["strength"])
    oracle = model.fit(data.activations.double().numpy(), data.labels.double().numpy()).coef_
    assert np.allclose(vector.vector.numpy(), oracle, atol=1e-6)
    assert int(vector.vector.abs().argmax()) == 0


def test_an_sae_s_fingerprint_is_that_of_its_weights(place: dict[str, str]) -> None:
    one, other = load_sae(place["sae"]), load_sae(place["sae"])
    assert weights_fingerprint(one) == weights_fingerprint(other)
    with torch.no_grad():
        other.W_dec[0, 0] += 1e-3
    assert weights_fingerprint(one) != weights_fingerprint(other)
