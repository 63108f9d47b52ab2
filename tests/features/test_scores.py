"""Scores of all features and concepts: against scikit-learn, identities, planted truth."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, mutual_info_score, roc_auc_score

from sae_steering_plugin.features import SCORES, PooledCodes, score_features
from sae_steering_plugin.features.scores import QUANTILES

NONLINEAR = [name for name in SCORES if name != "logistic"]


def drawn(n=80, width=12, concepts=3, seed=0):
    """Heavily tied sparse codes with one dead feature, and labels."""
    rng = np.random.default_rng(seed)
    table = np.round(np.maximum(rng.normal(size=(n, width)) - 0.8, 0) * 4) / 4
    table[:, 5] = 0
    labels = (rng.random((n, concepts)) < 0.3).astype(float)
    labels[0], labels[1] = 0, 1
    return table, labels


def pooled(table):
    return PooledCodes.from_dense(torch.as_tensor(np.asarray(table), dtype=torch.float32))


def each(table, labels, name, oracle, *, live_only=False, **options):
    """Compare a score with an oracle of (codes of one feature, labels of one concept)."""
    found = score_features(pooled(table), labels, scores=(name,), **options).values[name]
    for feature in range(table.shape[1]):
        if live_only and not table[:, feature].any():
            continue
        for concept in range(labels.shape[1]):
            expected = oracle(table[:, feature], labels[:, concept])
            assert float(found[feature, concept]) == pytest.approx(expected, abs=1e-12), feature


def test_auroc_is_scikit_learn_s_on_tied_codes():
    each(*drawn(), "auroc", lambda x, y: roc_auc_score(y, x))


def test_auroc_of_signed_codes_is_scikit_learn_s():
    table, labels = drawn()
    each(table - 0.25 * (table > 1), labels, "auroc", lambda x, y: roc_auc_score(y, x))
    signed = np.where(np.arange(table.shape[0])[:, None] % 3 == 0, -table, table)
    each(signed, labels, "auroc", lambda x, y: roc_auc_score(y, x))


def test_mutual_information_is_scikit_learn_s():
    each(*drawn(), "mutual_information", lambda x, y: mutual_info_score(y, x > 0))


def test_mean_difference_and_its_standardised_forms():
    table, labels = drawn()

    def gap(x, y):
        return x[y == 1].mean() - x[y == 0].mean()

    def d(x, y):
        a, b = x[y == 1], x[y == 0]
        spread = (len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)
        return gap(x, y) / math.sqrt(spread / (len(x) - 2))

    each(table, labels, "mean_difference", gap)
    each(table, labels, "cohens_d", d, live_only=True)
    each(table, labels, "welch_t", lambda x, y: stats.ttest_ind(
        x[y == 1], x[y == 0], equal_var=False).statistic, live_only=True)  # fmt: skip
    each(table, labels, "correlation", lambda x, y: np.corrcoef(x, y)[0, 1], live_only=True)


def test_max_activation_is_over_the_concept_s_texts():
    table, labels = drawn()
    each(table, labels, "max_activation", lambda x, y: x[y == 1].max())
    each(-table, labels, "max_activation", lambda x, y: x[y == 1].max())


def best_f1(x, y, thresholds, prior):
    share = y.mean()
    prior = share if prior is None else prior
    cost = share * (1 - prior) / (prior * (1 - share))
    best = (-1.0, 0.0)
    for tau in thresholds:
        says = x > tau
        hits, false = (says & (y == 1)).sum(), (says & (y == 0)).sum()
        value = 2 * hits / (2 * hits + cost * false + (y.sum() - hits))
        best = max(best, (value, -tau))
    return best[0], -best[1]


@pytest.mark.parametrize("prior", [None, 1e-2, 1e-3])
@pytest.mark.parametrize("quantiles", ["nonzero", "all"])
def test_calibrated_f1_and_its_threshold_equal_a_plain_loop(prior, quantiles):
    table, labels = drawn()
    found = score_features(pooled(table), labels, scores=("f1",), prior=prior, quantiles=quantiles)
    for feature in range(table.shape[1]):
        x = table[:, feature]
        base = x[x > 0] if quantiles == "nonzero" else x
        cuts = [0.0, *np.quantile(base, QUANTILES)] if len(base) else [0.0]
        for concept in range(labels.shape[1]):
            value, tau = best_f1(x, labels[:, concept], cuts, prior)
            assert float(found.values["f1"][feature, concept]) == pytest.approx(value, abs=1e-12)
            assert float(found.tau[feature, concept]) == pytest.approx(tau, abs=1e-12)


def test_f1_at_the_label_s_own_prevalence_is_the_plain_one():
    table, labels = drawn(concepts=1)
    found = score_features(pooled(table), labels, scores=("f1",), prior=None)
    plain = score_features(pooled(table), labels, scores=("f1",), prior=float(labels.mean()))
    assert torch.allclose(found.values["f1"], plain.values["f1"], atol=1e-12)
    feature = int(found.values["f1"][:, 0].argmax())
    says = table[:, feature] > float(found.tau[feature, 0])
    assert f1_score(labels[:, 0], says) == pytest.approx(float(found.values["f1"][feature, 0]))


def test_f1_does_not_hang_on_how_many_negatives_were_collected():
    """Counts of positives and negatives multiplied by two constants leave it unchanged."""
    table, labels = drawn(concepts=1)
    y = labels[:, 0]
    again = np.concatenate([table[y == 1]] * 2 + [table[y == 0]] * 5)
    truth = np.concatenate([np.ones(2 * int(y.sum())), np.zeros(5 * int((1 - y).sum()))])
    first = score_features(pooled(table), y, scores=("f1",), quantiles="nonzero")
    cuts = {float(v) for v in np.unique(table)}
    for feature in range(table.shape[1]):
        one, _ = best_f1(table[:, feature], y, sorted(cuts), 1e-3)
        two, _ = best_f1(again[:, feature], truth, sorted(cuts), 1e-3)
        assert one == pytest.approx(two, abs=1e-12)
    assert float(first.values["f1"].max()) <= 1


def test_precise_features_rank_above_broad_ones_by_f1_and_below_by_auroc():
    """Rank order of shared/methods/supervised_feature_selection, table 6.1."""
    rng = np.random.default_rng(0)
    n = 4000
    y = (rng.random(n) < 0.053).astype(float)
    rates = {"precise": (0.6, 0.0005), "middle": (0.8, 0.004), "broad": (0.95, 0.03)}
    columns = [
        np.where(rng.random(n) < np.where(y == 1, hit, false), 1 + rng.random(n), 0)
        for hit, false in rates.values()
    ]
    found = score_features(pooled(np.stack(columns, 1)), y, scores=("f1", "auroc"))
    f1, auroc = (found.values[name][:, 0] for name in ("f1", "auroc"))
    assert f1[0] > f1[1] > f1[2]
    assert auroc[0] < auroc[1] < auroc[2]


def test_a_dense_feature_is_found_by_its_size_and_lost_at_threshold_zero():
    rng = np.random.default_rng(1)
    n = 2000
    y = (rng.random(n) < 0.1).astype(float)
    fires = np.where(y == 1, True, rng.random(n) < 0.5)
    dense = np.where(fires, rng.random(n) + 4 * y, 0)
    found = score_features(pooled(dense[:, None]), y, scores=("f1",))
    assert float(found.values["f1"][0, 0]) > 0.5
    only_zero, _ = best_f1(dense, y, [0.0], 1e-3)
    assert only_zero < 0.05


def test_the_cost_of_a_false_positive_is_the_page_s():
    """c(0.053, 1e-3) = 55.9 (supervised_feature_selection, check 5)."""
    n, hits = 1000, 53
    y = np.zeros(n)
    y[:hits] = 1
    x = y.copy()
    x[hits] = 1  # one false positive
    found = score_features(pooled(x[:, None]), y, scores=("f1",))
    cost = 2 * hits / float(found.values["f1"][0, 0]) - 2 * hits
    assert cost == pytest.approx(55.9, abs=0.2)


def test_an_unknown_label_is_the_same_as_a_text_that_is_not_there():
    table, labels = drawn()
    holes = labels.copy()
    holes[3:20, 0] = np.nan
    holes[40:50, 1] = np.nan
    found = score_features(pooled(table), holes, scores=list(SCORES))
    for concept in range(3):
        known = ~np.isnan(holes[:, concept])
        alone = score_features(pooled(table[known]), holes[known, concept], scores=list(SCORES))
        for name in SCORES:
            mine, theirs = found.values[name][:, concept], alone.values[name][:, 0]
            assert torch.allclose(mine, theirs, atol=1e-9, equal_nan=True), name
    assert found.support["concept 0"] == (
        int((holes[:, 0] == 1).sum()), int((holes[:, 0] == 0).sum())
    )  # fmt: skip


def test_hard_negatives_marked_unknown_stay_out_of_the_auroc():
    """AxBench's SAE-A counts them as negatives nowhere: a feature that fires on them keeps its
    rank, and would lose it."""
    y = np.array([1.0] * 20 + [0.0] * 40 + [np.nan] * 20)
    x = np.concatenate([np.linspace(1, 2, 20), np.zeros(40), np.linspace(3, 4, 20)])[:, None]
    assert float(score_features(pooled(x), y).values["auroc"][0, 0]) == 1.0
    counted = score_features(pooled(x), np.nan_to_num(y, nan=0.0)).values["auroc"][0, 0]
    assert float(counted) == pytest.approx(40 / 60, abs=1e-12)


def test_one_concept_s_positives_may_be_another_s_negatives():
    table, labels = drawn(concepts=2)
    shared = {"a": labels[:, 0], "b": 1 - labels[:, 0]}
    found = score_features(pooled(table), shared).values["auroc"]
    assert torch.allclose(found[:, 0] + found[:, 1], torch.ones(len(found), dtype=torch.float64))


@pytest.mark.parametrize("n_pos", [3, 7, 100])
def test_a_code_without_spread_has_no_finite_effect_size(n_pos):
    y = np.array([1.0] * n_pos + [0.0] * 611)
    same = [np.full(len(y), value) for value in np.linspace(0.1, 3, 40)]
    split = np.where(y == 1, 0.7, 0.3)
    names = ("cohens_d", "welch_t", "correlation")
    table = pooled(np.stack([*same, split, -split], 1))
    found = {
        name: v[:, 0].tolist() for name, v in score_features(table, y, scores=names).values.items()
    }
    for name in names[:2]:
        assert found[name] == [0.0] * 40 + [math.inf, -math.inf], name
    assert found["correlation"] == pytest.approx([0.0] * 40 + [1.0, -1.0], abs=1e-9)


@given(st.integers(0, 50), st.permutations(range(40)), st.permutations(range(6)))
@settings(max_examples=25, deadline=None)
def test_the_order_of_texts_and_features_changes_nothing(seed, texts, features):
    table, labels = drawn(40, 6, 2, seed)
    found = score_features(pooled(table), labels, scores=NONLINEAR)
    moved = score_features(
        pooled(table[list(texts)][:, list(features)]), labels[list(texts)], scores=NONLINEAR
    )
    for name in NONLINEAR:
        expected = found.values[name][list(features)]
        assert torch.allclose(moved.values[name], expected, atol=1e-9), name


def test_many_concepts_together_equal_each_alone():
    table, labels = drawn()
    together = score_features(pooled(table), labels, scores=list(SCORES))
    for concept in range(labels.shape[1]):
        alone = score_features(pooled(table), labels[:, concept], scores=list(SCORES))
        for name in SCORES:
            assert torch.equal(together.values[name][:, concept], alone.values[name][:, 0]), name


def test_shuffled_labels_score_as_chance_does():
    rng = np.random.default_rng(3)
    table, _ = drawn(400, 30, 1)
    labels = (rng.random((400, 40)) < 0.3).astype(float)
    found = score_features(pooled(table), labels).values["auroc"]
    live = score_features(pooled(table), labels).live
    assert float(found[live].mean()) == pytest.approx(0.5, abs=0.01)
    assert torch.equal(found[~live], torch.full_like(found[~live], 0.5))


def test_sparse_logistic_weights_are_scikit_learn_s():
    table, labels = drawn(concepts=1)
    table[:, 1] += 2 * labels[:, 0]
    found = score_features(pooled(table), labels, scores=("logistic",)).values["logistic"][:, 0]
    scaled = table / np.maximum(table.max(0), 1e-30)
    expected = LogisticRegression(l1_ratio=1.0, solver="liblinear", random_state=0)
    expected.fit(scaled, labels[:, 0])
    assert np.allclose(found.numpy(), expected.coef_[0], atol=1e-3)
    assert int(found.argmax()) == 1


def test_dead_features_are_counted_and_never_rank_above_live_ones():
    table, labels = drawn(concepts=1)
    table[:, 0] = 1 - labels[:, 0]  # fires on the others only: AUROC 0, below the dead one's 1/2
    found = score_features(pooled(table), labels)
    assert found.n_dead == 1
    order = found.top("concept 0", "auroc", 12)
    assert 5 not in order and order[-1] == 0 and len(order) == 11


def test_a_concept_of_one_class_is_named_and_the_others_are_scored():
    table, labels = drawn()
    labels[:, 1] = 0
    found = score_features(pooled(table), labels, concepts=["a", "b", "c"])
    assert found.unscored == {"b": "0 positive and 80 negative texts; both are needed"}
    assert torch.isnan(found.values["auroc"][:, 1]).all()
    assert set(found.table(2)["concept"]) == {"a", "c"}
    assert "b: 0 positive" in found._repr_html_()
    with pytest.raises(ValueError, match="'b' has no scores: 0 positive"):
        found.top("b", "auroc")
    with pytest.raises(ValueError, match="no concept can be scored"):
        score_features(pooled(table), np.ones(80))


def test_labels_come_as_columns_of_a_table_or_by_name():
    table, labels = drawn()
    names = ["a", "b", "c"]
    frame = pd.DataFrame(labels, columns=names)
    by_array = score_features(pooled(table), labels, concepts=names)
    for given_ in (frame, {name: labels[:, i] for i, name in enumerate(names)}):
        found = score_features(pooled(table), given_)
        assert found.concepts == ("a", "b", "c")
        assert torch.equal(found.values["auroc"], by_array.values["auroc"])
    one = found.scores("b", "auroc")
    assert (one.concept, one.name) == ("b", "auroc")
    assert torch.equal(one.values, found.values["auroc"][:, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": ("auc",)}, "no score \\['auc'\\]; choose among auroc, f1"),
        ({"scores": "auroc"}, "no score 'auroc'"),
        ({"scores": ()}, "no score"),
        ({"quantiles": "most"}, "choose 'nonzero' or 'all'"),
        ({"prior": 1.0}, "must lie between 0 and 1"),
        ({"concepts": ["a"]}, "1 names for 3 concepts"),
        ({"concepts": ["a", "a", "b"]}, "'a' is named twice"),
        ({"labels": np.zeros(7)}, "labels have shape \\(7, 1\\) for 80 texts"),
        ({"labels": {"a": np.zeros(7)}}, "labels of 'a' have shape"),
        ({"labels": {}}, "there are no concepts"),
        ({"labels": np.full(80, 2.0)}, "label of text 0, concept 'concept 0', is 2.0"),
        ({"labels": {"a": np.ones(80)}, "concepts": ["a"]}, "leave out concepts"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    table, labels = drawn()
    options = {"labels": labels, **change}
    with pytest.raises(ValueError, match=message):
        score_features(pooled(table), options.pop("labels"), **options)


def test_f1_of_signed_codes_is_refused():
    table, labels = drawn()
    with pytest.raises(ValueError, match="some codes here are negative"):
        score_features(pooled(-table), labels, scores=("f1",))


def test_a_feature_table_holds_every_feature_of_one_concept():
    table, labels = drawn()
    found = score_features(pooled(table), labels, concepts=["a", "b", "c"], scores=("f1", "auroc"))
    frame = found.feature_table("b").table
    assert list(frame.columns) == ["f1", "auroc", "tau", "live"]
    assert np.array_equal(frame["auroc"], found.values["auroc"][:, 1].numpy())
    assert frame.index[~frame["live"]].tolist() == [5]
    assert found.feature_table("b").settings["concept"] == "b"


def test_unknown_names_list_the_known_ones():
    table, labels = drawn()
    found = score_features(pooled(table), labels)
    with pytest.raises(KeyError, match="no concept 'x'; there are concept 0"):
        found.scores("x", "auroc")
    with pytest.raises(KeyError, match="no score 'f1' here; there are auroc"):
        found.scores("concept 0", "f1")
