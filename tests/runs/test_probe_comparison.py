"""Raw probes beside SAE probes, on data whose concept is known."""

import copy

import numpy as np
import pytest
import torch

from sae_steering_plugin.effects.intervals import Interval
from sae_steering_plugin.runs.probe_comparison import (
    Inputs,
    ProbeComparison,
    ProbeScore,
    area_interval,
    compare_probes,
    largest_gaps,
    logistic,
    mean_nonzero,
    quiver_of_arrows,
    random_codes,
)
from tests.directions.planted import labelled_of, orthonormal_sae
from tests.hosts import D_MODEL

CHOSEN = 3


def sparse_codes(n, *, seed, share=0.2):
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(n, D_MODEL, generator=generator) < share
    return fires * (0.5 + torch.rand(n, D_MODEL, generator=generator)), generator


def one_latent(n, *, seed, **options):
    """Label 1 where the chosen latent fires; an orthonormal dictionary that codes it exactly."""
    sae = orthonormal_sae()
    codes, generator = sparse_codes(n, seed=seed)
    labels = (torch.rand(n, generator=generator) < 0.5).long()
    codes[:, CHOSEN] = labels * (1 + 0.2 * torch.rand(n, generator=generator))
    return sae, labelled_of(codes @ sae.W_dec.detach(), labels, **options)


@pytest.fixture(scope="module")
def planted():
    sae, rows = one_latent(400, seed=0)
    _, other = one_latent(200, seed=9)
    return sae, compare_probes(rows, sae, shifted=other)


def test_a_single_latent_is_found_and_reads_as_well_as_the_raw_probe(planted):
    _, table = planted
    assert table["SAE top-1"].settings["columns"] == [CHOSEN]
    assert table["SAE top-1"].test == 1.0
    assert table["SAE top-1"].test >= table["raw logistic"].test
    assert table["SAE reconstruction"].test > 0.99


def test_shifted_rows_of_the_same_law_score_alike_and_the_random_dictionary_does_not(planted):
    _, table = planted
    assert table["SAE top-1"].shifted == 1.0
    assert table["random SAE top-1"].test < table["SAE top-1"].test - 0.1
    assert set(table.n.values()) == {240, 80, 200}
    assert len(table.table()) == len(table.scores)


def test_random_directions_fire_as_often_as_the_features_they_stand_for():
    rng = np.random.default_rng(0)
    raw = Inputs(rng.standard_normal((60, 5)) + 3.0, rng.standard_normal((7, 5)))
    rates = np.array([0.0, 0.1, 0.5, 1.0, 0.3, 0.25, 0.9])
    codes = Inputs(np.where(rng.random((60, 7)) < rates, 1.0, 0.0), None)
    train = np.arange(0, 60, 2)
    found = random_codes(raw, codes, train, 3)
    assert np.array_equal((found.rows[train] > 0).sum(0), (codes.rows[train] > 0).sum(0))
    assert found.shifted.shape == (7, 7) and (found.rows >= 0).all()
    again, other = (random_codes(raw, codes, train, seed).rows for seed in (3, 4))
    assert np.array_equal(found.rows, again) and not np.array_equal(found.rows, other)


def test_words_that_say_nothing_leave_the_text_baseline_at_chance(planted):
    _, table = planted
    assert abs(table["bag of words"].test - 0.5) < 0.2


def test_a_random_dense_direction_is_read_by_the_raw_probe_and_not_by_one_latent():
    sae = orthonormal_sae()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, D_MODEL, generator=generator)
    direction = torch.ones(D_MODEL) @ sae.W_dec.detach()  # equal weight on every latent
    table = compare_probes(labelled_of(x, (x @ direction > 0).long()), sae)
    assert table["raw logistic"].test > 0.97
    assert table["raw logistic"].test > table["SAE top-1"].test + 0.1


def test_a_concept_outside_the_dictionary_is_in_the_error_and_not_in_codes_or_reconstruction():
    sae = orthonormal_sae()
    half = D_MODEL // 2
    with torch.no_grad():
        sae.W_enc[:, half:] = 0.0
        rows = sae.W_dec.detach().clone()
        sae.W_dec[half:] = 0.0
    generator = torch.Generator().manual_seed(4)
    codes, _ = sparse_codes(1000, seed=4)
    codes[:, half:] = 0.0
    labels = (torch.rand(1000, generator=generator) < 0.5).long()
    table = compare_probes(labelled_of(codes @ rows + labels[:, None] * rows[-1], labels), sae)
    assert table["raw logistic"].test > 0.999 and table["SAE error"].test > 0.999
    assert abs(table["SAE all, L1"].test - 0.5) < 0.12
    assert abs(table["SAE reconstruction"].test - 0.5) < 0.12


def test_shuffled_labels_score_at_chance_on_average():
    sae = orthonormal_sae()
    found = []
    for seed in range(6):
        codes, generator = sparse_codes(400, seed=seed)
        labels = (torch.rand(400, generator=generator) < 0.5).long()
        found.append(
            compare_probes(labelled_of(codes @ sae.W_dec.detach(), labels), sae, top_k=(5,))
        )
    for name in ("raw logistic", "SAE top-5", "SAE all, L1", "DiffMean"):
        # 6 AUROCs of 80 rows have a standard error of 0.065 / sqrt(6) = 0.027
        assert abs(np.mean([one[name].test for one in found]) - 0.5) < 0.1


def test_repeated_texts_do_not_leak_through_the_split():
    sae = orthonormal_sae()
    areas = []
    for seed in range(6):
        codes, generator = sparse_codes(40, seed=seed)
        labels = (torch.rand(40, generator=generator) < 0.5).long()
        again = torch.arange(40).repeat_interleave(5)
        rows = labelled_of(
            (codes @ sae.W_dec.detach())[again],
            labels[again],
            groups=[f"t{i}" for i in again.tolist()],
        )
        areas.append(compare_probes(rows, sae, top_k=(1,))["raw logistic"].test)
    # 8 test texts: an AUROC of 4 against 4 at chance has a standard error of 0.22
    assert np.mean(areas) < 0.5 + 3 * 0.22 / 6**0.5


def test_logistic_fits_meet_their_optimality_conditions():
    rng = np.random.default_rng(0)
    rows, y = rng.standard_normal((120, 6)), (rng.random(120) < 0.5).astype(int)
    score, converged = logistic(rows, y, 0.5, l1=False)
    assert converged
    intercept = score(np.zeros((1, 6)))[0]
    w = score(np.eye(6)) - intercept
    p = 1 / (1 + np.exp(-score(rows)))
    assert np.abs(w + 0.5 * rows.T @ (p - y)).max() < 1e-3  # L-BFGS stops at 1e-6 of the objective
    assert abs((p - y).sum()) < 1e-2


def test_separable_data_reach_an_area_of_one():
    rng = np.random.default_rng(1)
    y = np.arange(60) % 2
    rows = rng.standard_normal((60, 4)) + 8 * y[:, None]
    score, _ = logistic(rows, y, 1.0, l1=True)
    assert score(rows)[y == 1].min() > score(rows)[y == 0].max()


def test_scaling_a_latent_changes_the_plain_choice_and_not_the_normalised_one():
    rng = np.random.default_rng(3)
    y = np.arange(80) % 2
    rows = (rng.random((80, 6)) < 0.5) * rng.random((80, 6))
    rows[:, 2] = y * (1 + rng.random(80))
    louder = rows * np.array([1000.0, 1, 1, 1, 1, 1])
    assert largest_gaps(rows, y, 1).tolist() == [2]
    assert largest_gaps(louder, y, 1).tolist() == [0]
    assert (
        largest_gaps(louder / mean_nonzero(louder), y, 6).tolist()
        == largest_gaps(rows / mean_nonzero(rows), y, 6).tolist()
    )


def comparison(*scores, name="set"):
    made = [
        ProbeScore(probe, kind, 1.0, validation, test, Interval(0.0, 1.0))
        for probe, kind, validation, test in scores
    ]
    return ProbeComparison(tuple(made), name, {}, "sae", 0)


def test_the_quiver_chooses_by_validation_alone():
    rows = [("a", "raw", 0.9, 0.8), ("b", "raw", 0.7, 0.95), ("s", "sae", 0.85, 0.99)]
    kept = quiver_of_arrows([comparison(*rows)])
    assert (kept.choices[0].baseline, kept.choices[0].extended) == ("a", "a")
    assert kept.improvement == 0 and kept.chosen_share == 0
    better = copy.deepcopy(rows)
    better[2] = ("s", "sae", 0.85, 1.0)  # better on test only
    assert quiver_of_arrows([comparison(*better)]).choices == kept.choices
    better[2] = ("s", "sae", 0.95, 0.7)  # better on validation only: chosen, to its loss
    found = quiver_of_arrows([comparison(*better)] * 3)
    assert found.choices[0].extended == "s" and found.chosen_share == 1
    assert found.improvement == pytest.approx(-0.1)


def test_what_cannot_be_compared_says_why():
    sae, rows = one_latent(60, seed=1)
    with pytest.raises(ValueError, match="2 groups cannot be split in three"):
        compare_probes(one_latent(4, seed=1, groups=["a", "a", "b", "b"])[1], sae)
    with pytest.raises(ValueError, match="collect them at the SAE's site"):
        compare_probes(one_latent(60, seed=1, hook_name="blocks.1.hook_resid_post")[1], sae)
    with pytest.raises(ValueError, match="give numbers of columns"):
        compare_probes(rows, sae, top_k=())
    one = comparison(("a", "raw", 0.9, 0.8), ("s", "sae", 0.8, 0.8))
    with pytest.raises(ValueError, match="no kind of probe 'dense'"):
        quiver_of_arrows([one], baseline=("dense",))
    with pytest.raises(ValueError, match="pass shifted= to compare_probes"):
        quiver_of_arrows([one], part="shifted")


def test_an_interval_over_groups_is_wider_than_one_over_their_repeated_rows():
    rng = np.random.default_rng(5)
    truth = np.arange(40) % 2 == 0
    scores = rng.standard_normal(40) + truth
    again = np.repeat(np.arange(40), 6)
    grouped = area_interval(scores[again], truth[again], [str(i) for i in again], 0)
    alone = area_interval(scores[again], truth[again], [str(i) for i in range(240)], 0)
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)
