"""TPP and SCR on planted texts, and the subtraction against a dictionary that really runs."""

import numpy as np
import pytest
import torch

from sae_steering_plugin.features.perturbation import without_features
from sae_steering_plugin.features.pooled import PooledCodes
from sae_steering_plugin.runs import pooled_codes
from sae_steering_plugin.runs.probe_comparison import random_directions
from sae_steering_plugin.runs.probe_perturbation import (
    DICTIONARY,
    PENALTY,
    RANDOM,
    PooledTexts,
    collect_pooled,
    fit,
    perturb_probes,
    random_dictionary,
    remove_spurious,
)
from tests.hosts import D_MODEL, tiny_bridge, tiny_sae

WIDTH = 48
LENGTH = 6
TEXTS = ("a b c", "the cat", "one two three four", "the cat")


def orthonormal(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator).double())[0]


def planted(token_codes, *, error=None, rows=None):
    """Texts of `LENGTH` tokens whose residuals are their codes written in orthonormal rows."""
    n = len(token_codes)
    rows = orthonormal() if rows is None else rows
    x = token_codes.double() @ rows + (0 if error is None else error)
    return PooledTexts(
        x.mean(1).numpy(),
        PooledCodes.from_dense(token_codes.mean(1), pooling="mean", sae_id="planted"),
        PooledCodes.from_dense((token_codes != 0).float().mean(1), pooling="frequency",
                               n_tokens=torch.full((n,), LENGTH)),
        rows.numpy(),
        x.flatten(0, 1).float().numpy(),
        np.arange(n + 1) * LENGTH,
        tuple(range(n)),
    )  # fmt: skip


def background(n, *, seed):
    """Sparse codes that say nothing of any label."""
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(n, LENGTH, WIDTH, generator=generator) < 0.1
    return fires * torch.rand(n, LENGTH, WIDTH, generator=generator)


def one_of_four(n):
    kind = np.arange(n) % 4
    return kind, {f"class {c}": (kind == c).astype(float) for c in range(4)}


def exclusive(n=400):
    """Features 2c and 2c + 1 fire on every token of class c and on no other's."""
    kind, labels = one_of_four(n)
    codes = background(n, seed=1)
    codes[:, :, :8] = 0.0
    for i, c in enumerate(kind):
        codes[i, :, 2 * c : 2 * c + 2] = 1.0
    return codes, labels


@pytest.fixture(scope="module")
def tpp():
    codes, labels = exclusive()
    return perturb_probes(planted(codes), labels, n_features=(2, 5), seeds=(0, 1, 2))


def test_features_of_one_class_alone_give_targeted_perturbation_near_its_maximum(tpp):
    assert (tpp.values(DICTIONARY, 2) > 0.48).all()
    assert all(row.clean == 1.0 and row.features == 2 for row in tpp.rows if row.n == 2)


def test_random_directions_of_the_same_rates_give_a_tenth_of_it_at_most(tpp):
    assert abs(tpp.values(RANDOM, 2).mean()) <= 0.1 * tpp.values(DICTIONARY, 2).mean()
    lead, interval = tpp.lead(2)
    assert lead > 0.4 and interval.low > 0.4


def test_features_that_fire_for_every_class_alike_give_none():
    codes, labels = exclusive()
    written = codes.double()[:, :, :8] @ orthonormal()[:8]
    codes[:, :, :8] = 1.0  # these fire everywhere; what tells the classes apart is the error
    found = perturb_probes(planted(codes, error=written), labels, n_features=(8,), seeds=(0, 1))
    assert all(row.clean == 1.0 for row in found.rows)
    assert (np.abs(found.values(DICTIONARY, 8)) < 0.05).all()


def test_features_that_two_classes_share_break_both_probes_and_score_nothing():
    kind, _ = one_of_four(200)
    codes = background(200, seed=2)
    codes[:, :, 0] = torch.from_numpy(kind < 2)[:, None].float() * 2
    labels = {name: (kind < 2).astype(float) for name in ("one", "same")}
    found = perturb_probes(planted(codes), labels, n_features=(1,), seeds=(0,))
    rows = [row for row in found.rows if row.dictionary == DICTIONARY]
    assert all(row.own > 0.45 for row in rows)
    assert (np.abs(found.values(DICTIONARY, 1)) < 0.05).all()


def two_concepts(spoken, n=640):
    """Independent concepts a and b: latents 0 and 1 fire for a and its opposite in 80 % of the
    texts, 2 and 3, thrice as strong, for b and its opposite in the share `spoken` of them."""
    a, b = np.arange(n) % 2, np.arange(n) // 2 % 2
    codes = background(n, seed=3)
    first, second = np.random.default_rng(0).random((2, n)) < np.array([[0.8], [spoken]])
    for latent, fires in enumerate(
        (a * first, (1 - a) * first, 3 * b * second, 3 * (1 - b) * second)
    ):
        codes[:, :, latent] = torch.from_numpy(fires)[:, None].float()
    return planted(codes), {"a": a.astype(float), "b": b.astype(float)}


def test_a_spurious_probe_is_repaired_by_taking_the_confound_out():
    pooled, labels = two_concepts(0.95)
    found = remove_spurious(pooled, labels, [("a", "b")], n_features=(2,), seeds=(0, 1, 2))
    told = [row for row in found.rows if row.dictionary == DICTIONARY and row.reported]
    # The probe follows b where b is heard: tested for a it starts lower, and that is reported.
    assert len(told) == 3
    assert all(row.name == "a" and row.spurious == "b" and row.features == 2 for row in told)
    assert all(row.biased < 0.6 and row.clean > 0.85 for row in told)
    assert (found.values(DICTIONARY, 2) > 0.9).all()
    assert (found.values(RANDOM, 2) < 0.3).all()


def test_the_direction_with_the_lower_initial_accuracy_is_reported_whatever_the_order():
    pooled, labels = two_concepts(0.95)
    for pair in (("a", "b"), ("b", "a")):
        rows = remove_spurious(pooled, labels, [pair], n_features=(1,), seeds=(0,)).rows
        assert {row.reported for row in rows if row.name == "a"} == {True}
        assert {row.reported for row in rows if row.name == "b"} == {False}
        assert len(rows) == 4


def test_a_probe_that_was_not_misled_scores_0_whatever_ablation_does():
    pooled, labels = two_concepts(0.0)  # b is never heard, so the probe reads a
    rows = remove_spurious(pooled, labels, [("a", "b")], n_features=(1,), seeds=(0,)).rows
    assert all(row.clean - row.biased < 1e-3 and row.score == 0.0 for row in rows)
    assert any(row.ablated != row.biased for row in rows)


ARCHITECTURES = [
    ("standard", {}),
    ("standard", {"normalize_activations": "layer_norm"}),
    ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("abstopk", {}),
    ("gated", {}),
    ("matching_pursuit", {}),
    ("temporal", {}),
]


@pytest.fixture(scope="module")
def bridge():
    return tiny_bridge()


@pytest.mark.parametrize(("word", "options"), ARCHITECTURES, ids=lambda o: str(o))
def test_subtraction_equals_encoding_zeroing_and_decoding_every_token(bridge, word, options):
    sae = tiny_sae(word, **options)
    pooled = collect_pooled(bridge, sae, TEXTS, prepend_bos=False, progress=False)
    features = np.argsort(-pooled.frequency.counts.numpy(), kind="stable")[:3]
    found = without_features(pooled.activations, pooled.codes, pooled.rows, features)
    assert not np.allclose(found, pooled.activations, atol=1e-3)
    for i in range(len(TEXTS)):
        x = torch.from_numpy(pooled.tokens[pooled.bounds[i] : pooled.bounds[i + 1]])[None]
        with torch.no_grad():
            codes = sae.encode(x)
            whole = sae.decode(codes)
            zeroed = sae.encode(x).clone()
            zeroed[..., features] = 0.0
            left = x - whole + sae.decode(zeroed)
        assert np.allclose(found[i], left.mean(1)[0].numpy(), atol=2e-5)


def test_equal_texts_stay_in_one_split_and_tokens_are_those_pooled(bridge):
    pooled = collect_pooled(bridge, tiny_sae(), TEXTS, progress=False, batch_size=2)
    assert pooled.groups[1] == pooled.groups[3] and len(set(pooled.groups)) == 3
    assert len(pooled) == 4 and pooled.tokens.shape == (pooled.bounds[-1], D_MODEL)
    for i, mean in enumerate(pooled.activations):
        own = pooled.tokens[pooled.bounds[i] : pooled.bounds[i + 1]]
        assert np.allclose(own.mean(0), mean, atol=1e-6)
    assert np.array_equal(pooled.codes.n_tokens.numpy(), np.diff(pooled.bounds))


def test_the_control_is_the_mean_over_tokens_of_directions_that_fire_as_often():
    codes, _ = exclusive(40)
    pooled = planted(codes)
    train = np.arange(0, 40, 2)
    found, rows = random_dictionary(pooled, train, 5)
    member = np.repeat(np.arange(40) % 2 == 0, LENGTH)
    fires = (codes.numpy()[train] != 0).sum((0, 1))
    drawn = random_directions(pooled.tokens[member].astype(float), fires, 5)
    by_token = drawn.codes(pooled.tokens.astype(float))
    assert np.array_equal((by_token[member] > 0).sum(0), fires)
    mean = by_token.reshape(40, LENGTH, WIDTH).mean(1)
    assert np.allclose(found.dense().numpy(), mean, atol=1e-6)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1.0)


def test_the_control_does_not_depend_on_how_memory_is_parted(monkeypatch):
    pooled = planted(exclusive(40)[0])
    whole, _ = random_dictionary(pooled, np.arange(20), 1)
    monkeypatch.setattr(pooled_codes, "DENSE", 3 * LENGTH * WIDTH)
    parted, _ = random_dictionary(pooled, np.arange(20), 1)
    assert np.allclose(parted.dense().numpy(), whole.dense().numpy(), atol=1e-6)


def test_probes_are_at_the_minimum_of_the_papers_objective():
    rng = np.random.default_rng(0)
    codes = background(200, seed=4)
    codes[:, :, 0] += torch.from_numpy(rng.random(200) < 0.5)[:, None]
    pooled = planted(codes)
    noisy = rng.permutation(200)
    probe = fit(pooled, (noisy[:100], noisy[100:]))
    y = np.isin(np.arange(200), noisy[:100])
    p = 1 / (1 + np.exp(-(pooled.activations @ probe.weight + probe.intercept)))
    slope = pooled.activations.T @ (p - y) / 200
    used = probe.weight != 0
    assert used.any() and not used.all()
    assert np.abs(slope + PENALTY * np.sign(probe.weight))[used].max() < 0.02 * PENALTY
    assert np.abs(slope).max() < 1.02 * PENALTY


def test_the_result_shows_both_dictionaries_and_every_number_of_features(tpp):
    table = tpp.table()
    assert table["n"].tolist() == [2, 5]
    # Two features of a class have an effect; background noise may lend the third to fifth one.
    assert (table["dictionary_taken"] <= table["n"]).all()
    assert len(tpp.details()) == len(tpp.rows) == 3 * 2 * 2 * 4
    assert "TPP, planted, 3 seeds" in tpp._repr_html_() and tpp.converged == 1.0
    with pytest.raises(KeyError, match="no TPP of 7 features"):
        tpp.values(DICTIONARY, 7)


def test_what_cannot_be_measured_is_refused(bridge):
    codes, labels = exclusive(40)
    pooled = planted(codes)
    one = labels["class 0"]
    with pytest.raises(ValueError, match="two classes or more"):
        perturb_probes(pooled, {"a": one})
    with pytest.raises(ValueError, match="'a' has unknown labels"):
        perturb_probes(pooled, {"a": np.where(one == 1, np.nan, 0.0), "b": one})
    with pytest.raises(ValueError, match="numbers of features from 1"):
        perturb_probes(pooled, labels, n_features=(0,))
    rare = np.zeros(40)
    rare[0] = 1.0
    with pytest.raises(ValueError, match="'rare'.* hold one label only"):
        perturb_probes(pooled, {"rare": rare, "b": one})
    with pytest.raises(ValueError, match="no labels of 'c'; there are"):
        remove_spurious(pooled, labels, [("class 0", "c")])
    with pytest.raises(ValueError, match="no pair of concepts"):
        remove_spurious(pooled, labels, [])
    with pytest.raises(ValueError, match="all four combinations"):
        remove_spurious(pooled, labels, [("class 0", "class 1")])
    with pytest.raises(ValueError, match="3 groups cannot be split in 4"):
        perturb_probes(
            collect_pooled(bridge, tiny_sae(), TEXTS, progress=False),
            {"a": [1.0, 0.0, 1.0, 0.0], "b": [0.0, 1.0, 1.0, 1.0]},
        )
    with pytest.raises(ValueError, match="nothing is left to pool of text 0"):
        collect_pooled(bridge, tiny_sae(), TEXTS, max_tokens=1, cut=True, progress=False)
    with pytest.raises(ValueError, match="no texts"):
        collect_pooled(bridge, tiny_sae(), [])
    with pytest.raises(ValueError, match="a transcoder does not rebuild"):
        collect_pooled(bridge, tiny_sae("transcoder", apply_b_dec_to_input=False), TEXTS)
