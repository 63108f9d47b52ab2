"""Side effects on a model in which they are known, against whole forward passes, and as a plan."""

import math

import pandas as pd
import pytest
import torch
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata

from sae_steering_plugin.adapters.head import head_logits
from sae_steering_plugin.adapters.sae_parts import decoder_rows, whole_codes
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.edits import Add
from sae_steering_plugin.effects.stability import stability
from sae_steering_plugin.runs import side_effects
from sae_steering_plugin.runs.contexts import TokensRef, mixed_contexts, packed_contexts
from sae_steering_plugin.runs.parts import collect
from sae_steering_plugin.runs.references import ModelRef
from sae_steering_plugin.runs.runner import InProcess, run_shard
from sae_steering_plugin.runs.sas_protocol import SAERef
from sae_steering_plugin.runs.side_effect_plan import SideEffectPlan, side_effects_of
from sae_steering_plugin.runs.side_effects import (
    dealt,
    measure_side_effects,
    sample_features,
    survey_contexts,
)
from sae_steering_plugin.types import LAST, Edit
from tests.hosts import (
    SITE,
    tiny_bridge,
    tiny_gemma2,
    tiny_hooked,
    tiny_qwen_moe,
    tiny_sae,
    tokens_of_length,
)
from tests.local import model_folder
from tests.runs.linear import basis, contexts, linear_model, primary, watched

LATER = "blocks.1.hook_resid_post"
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated", "matching_pursuit", "temporal")


def later_sae(architecture="standard", hook_name=LATER, **options):
    sae = tiny_sae(architecture, d_sae=24, seed=5, **options)
    sae.cfg.metadata.hook_name = hook_name
    return sae


def measured(model, sae, features, tokens, **options):
    return measure_side_effects(model, sae, features, tokens, progress=False, **options)


@pytest.fixture(scope="module")
def linear():
    return linear_model()


# Known answers ------------------------------------------------------------------------------------


def test_a_linear_model_is_perfectly_stable_and_its_effect_is_the_footprint(linear):
    found = measured(linear, primary(), [0, 3], contexts(), strengths=(1.0, 2.0)).of(1.0).table
    footprint = (basis() @ linear.W_U.detach()).norm(dim=1)
    for feature in (0, 3):
        row = found.loc[feature]
        assert row["stability_signed"] == pytest.approx(1.0, abs=1e-5)
        assert row["stability_abs"] == pytest.approx(1.0, abs=1e-5)
        assert row["effect_cv"] == pytest.approx(0.0, abs=1e-5)
        assert row["effect"] == pytest.approx(float(footprint[feature]), rel=1e-5)


def test_collateral_counts_are_those_of_the_watched_rows(linear):
    found = measured(linear, primary(), [0, 1, 4, 9], contexts(), downstream=watched()).of().table
    assert found["count_0.05"].tolist() == [4, 1, 1, 0]
    # Q0's and Q4's own continuations are watched; the row that latent 1 moves is its own, too
    assert found["count_ex_self"].tolist()[:3] == [3, 0, 0]


def test_a_threshold_above_the_strength_counts_nothing(linear):
    found = measured(linear, primary(), [0], contexts(), downstream=watched(), taus=(1.5,))
    assert found.of().table["count_1.5"].tolist() == [0]


def test_twice_the_strength_doubles_the_effect_and_keeps_the_stability(linear):
    both = measured(linear, primary(), [2], contexts(), strengths=(1.0, 2.0))
    once, twice = both.of(1.0).table.loc[2], both.of(2.0).table.loc[2]
    assert twice["effect"] == pytest.approx(2 * once["effect"], rel=1e-5)
    assert twice["stability_signed"] == pytest.approx(once["stability_signed"], abs=1e-5)
    assert twice["displacement"] == pytest.approx(2 * once["displacement"])


def test_strength_zero_and_a_zero_row_move_nothing_and_have_no_stability(bridge):
    sae = tiny_sae()
    with torch.no_grad():
        sae.W_dec[3] = 0
    tokens = tokens_of_length(64, 6)
    found = measured(
        bridge, sae, [3, 4], tokens, downstream=later_sae(), strengths=(1.0, 0.0)
    ).table.set_index(["feature", "strength"])
    for still in ((3, 1.0), (3, 0.0), (4, 0.0)):
        row = found.loc[still]
        assert row["effect"] == 0 and row["n_moved"] == 0 and row["moved_l1"] == 0
        assert math.isnan(row["stability_signed"])
    assert found.loc[(4, 1.0), "effect"] > 0


def test_earlier_positions_are_exactly_those_of_the_clean_run(linear):
    tokens = contexts(4)
    edit = Edit(Add(decoder_rows(primary(), [0])[0]), SITE, positions=LAST)
    clean, steered = (steered_logits(linear, tokens, e, share=False) for e in ((), edit))
    assert torch.equal(clean[:, :-1], steered[:, :-1])
    effect = (steered - clean)[:, -1].norm(dim=1)
    found = measured(linear, primary(), [0], contexts()).of().table
    assert effect.mean() == pytest.approx(found.loc[0, "effect"], rel=1e-4)


def test_a_topk_dictionary_counts_the_latent_that_is_pushed_out_too(linear):
    """Watched latents 0 (along Q0) and 1 (along Q1, higher by a bias) compete for one place."""
    q = basis()
    rows = torch.stack([q[0], q[1]])
    sae_class, config_class = get_sae_class("topk")
    metadata = SAEMetadata(hook_name=LATER, prepend_bos=False)
    later = sae_class(config_class(d_in=16, d_sae=2, k=1, metadata=metadata)).eval()
    with torch.no_grad():
        later.W_enc.copy_(rows.T)
        later.W_dec.copy_(rows)
        later.b_enc.copy_(torch.tensor([500.0, 520.0]))
        later.b_dec.zero_()
    strong = measured(linear, primary(), [0], contexts(), downstream=later, strengths=(100.0,))
    weak = measured(linear, primary(), [0], contexts(), downstream=later, strengths=(1e-4,))
    assert strong.of().table.loc[0, "count_0.05"] == 2  # one comes in, one is pushed out
    assert weak.of().table.loc[0, "count_0.05"] == 0


# Against whole forward passes ---------------------------------------------------------------------


def by_hand(model, sae, later, feature, tokens, *, cap=None, norm=None):
    """One forward pass per context, full logits, whole downstream encode."""
    row = decoder_rows(sae, [feature])[0]
    step = row if norm is None else row / row.norm() * norm
    shifts, counts = [], []
    for one in tokens:
        edit = Edit(Add(step), SITE, positions=LAST)
        clean, steered = (
            steered_logits(model, one[None], e, last_only=True, share=False) for e in ((), edit)
        )
        shifts.append(steered - clean)
        if later is not None:
            codes = [codes_at(model, later, one, e) for e in ((), edit)]
            counts.append(float(((codes[1] - codes[0]).abs() > 0.05).sum()))
    return stability(torch.cat(shifts)), sum(counts) / len(tokens)


def codes_at(model, later, tokens, edits):
    from sae_steering_plugin.adapters.transformer_lens import resolve

    held = []
    point = resolve(model, later.cfg.metadata.hook_name).point
    handle = point.register_forward_hook(lambda _m, _i, out: held.append(out.detach()))
    try:
        steered_logits(model, tokens[None], edits, last_only=True, share=False)
    finally:
        handle.remove()
    return whole_codes(later, held[-1].float())[0, -1]


@pytest.mark.parametrize(
    "make", [tiny_bridge, tiny_hooked, tiny_qwen_moe, tiny_gemma2], ids=lambda make: make.__name__
)
def test_figures_equal_one_forward_pass_per_pair(make):
    model, sae = make(), tiny_sae()
    later = later_sae(hook_name=f"blocks.{model.cfg.n_layers - 1}.hook_resid_post")
    tokens = tokens_of_length(64, 6)
    place = torch.tensor([3, 5, 11])
    found = measured(model, sae, [1, 7], tokens, downstream=later, contexts=place).of().table
    for feature in (1, 7):
        wanted, count = by_hand(model, sae, later, feature, tokens[place])
        row = found.loc[feature]
        assert row["count_0.05"] == pytest.approx(count, abs=1e-9)
        for name, value in wanted.to_dict().items():
            assert row[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_steer_and_be_watched(architecture, bridge):
    sae, later = tiny_sae(architecture), later_sae(architecture)
    tokens, place = tokens_of_length(64, 5), torch.tensor([0, 9])
    found = measured(bridge, sae, [2], tokens, downstream=later, contexts=place).of().table.loc[2]
    row = decoder_rows(sae, [2])[0]
    changes = []
    for one in tokens[place]:
        edit = Edit(Add(row), SITE, positions=LAST)
        before, after = (codes_at(bridge, later, one, e) for e in ((), edit))
        changes.append(float((after - before).abs().sum().detach()))
    assert found["moved_l1"] == pytest.approx(sum(changes) / 2, rel=1e-4, abs=1e-5)


def test_logits_formed_or_not_give_the_same_stability(host):
    tokens = tokens_of_length(64, 6)
    short, long = (
        measured(host, tiny_sae(), [0, 5], tokens, full=full).of().table for full in (False, True)
    )
    shared = list(short.columns)
    pd.testing.assert_frame_equal(short, long[shared], rtol=1e-5, atol=1e-6)
    assert (long["kl_clean_steered"] > 0).all()


def test_the_divergence_is_that_of_the_logits(bridge):
    tokens, place = tokens_of_length(64, 6), torch.tensor([4])
    sae = tiny_sae()
    found = measured(bridge, sae, [0], tokens, contexts=place, full=True).of().table.loc[0]
    edit = Edit(Add(decoder_rows(sae, [0])[0]), SITE, positions=LAST)
    before, after = (
        steered_logits(bridge, tokens[place], e, last_only=True).log_softmax(-1) for e in ((), edit)
    )
    kl = float((before.exp() * (before - after)).sum())
    assert found["kl_clean_steered"] == pytest.approx(kl, rel=1e-4)


def test_a_length_in_residual_norms_is_the_same_for_every_feature(bridge):
    tokens = tokens_of_length(64, 6)
    found = measured(bridge, tiny_sae(), [0, 5, 9], tokens, unit="norm", strengths=(0.5,)).table
    survey = survey_contexts(bridge, tiny_sae(), tokens, progress=False)
    assert found["displacement"].to_numpy() == pytest.approx(0.5 * survey.mean_norm, rel=1e-5)


# What may not matter ------------------------------------------------------------------------------


def test_the_same_call_gives_the_same_table_and_batches_do_not_matter(bridge):
    tokens, sae, later = tokens_of_length(70, 6), tiny_sae(), later_sae()
    one, again, other = (
        measured(bridge, sae, [0, 3, 8], tokens, downstream=later, rows=rows, controls=1).table
        for rows in (64, 64, 7)
    )
    pd.testing.assert_frame_equal(one, again, check_exact=True)
    pd.testing.assert_frame_equal(one, other, rtol=1e-5, atol=1e-5)


def test_memory_is_bounded_by_groups_that_change_nothing(bridge, monkeypatch):
    tokens, sae = tokens_of_length(64, 6), tiny_sae()
    whole = measured(bridge, sae, range(9), tokens).table
    monkeypatch.setattr(side_effects, "KEPT", 1)
    pd.testing.assert_frame_equal(
        whole, measured(bridge, sae, range(9), tokens).table, rtol=1e-5, atol=1e-5
    )


def test_a_feature_keeps_its_contexts_and_controls_in_any_company(bridge):
    tokens, sae = tokens_of_length(64, 6), tiny_sae()
    alone = measured(bridge, sae, [8], tokens, controls=2).table
    among = measured(bridge, sae, [1, 8, 2], tokens, controls=2).table
    among = among[among["feature"] == 8].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, among, rtol=1e-5, atol=1e-5)


def test_the_clean_model_is_neither_changed_nor_hooked_afterwards(host):
    tokens = tokens_of_length(64, 6)
    before = steered_logits(host, tokens[:2])
    measured(host, tiny_sae(), [0], tokens, downstream=later_sae())
    assert torch.equal(steered_logits(host, tokens[:2]), before)


# Controls, contexts, samples ----------------------------------------------------------------------


def test_controls_have_the_features_length_and_other_directions(bridge):
    found = measured(bridge, tiny_sae(), [0, 4], tokens_of_length(64, 6), controls=2)
    lengths = found.table.groupby("feature")["displacement"].agg(["min", "max"])
    assert lengths["min"].to_numpy() == pytest.approx(lengths["max"].to_numpy())
    arms = [found.of(arm=arm).table["effect"] for arm in ("feature", "random 1", "random 2")]
    assert len({round(float(arm[0]), 6) for arm in arms}) == 3
    with pytest.raises(ValueError, match="no arm 'random 3' was measured"):
        found.of(arm="random 3")
    with pytest.raises(ValueError, match="no strength 7.0 was measured"):
        found.of(7.0)


def test_mixed_contexts_hold_the_strongest_the_weakest_and_others():
    values = torch.arange(100).float()
    found = mixed_contexts(values, 5, generator=torch.Generator().manual_seed(0)).tolist()
    assert found[:5] == [0, 1, 2, 3, 4] and found[-5:] == [95, 96, 97, 98, 99]
    assert len(found) == 15 and all(5 <= place < 95 for place in found[5:-5])


def test_sparse_features_do_not_share_their_weakest_contexts():
    values = torch.zeros(200)
    first, second = (
        set(mixed_contexts(values, 16, generator=torch.Generator().manual_seed(seed)).tolist())
        for seed in range(2)
    )
    assert len(first & second) < 40


def test_few_contexts_are_used_once_and_counted(bridge):
    tokens = tokens_of_length(64, 5)
    found = measured(bridge, tiny_sae(), [0], tokens, per_kind=40).of().table
    assert found.loc[0, "n"] == 64
    few = mixed_contexts(torch.zeros(10), 16, generator=torch.Generator().manual_seed(0))
    assert few.tolist() == list(range(10))


def test_pairs_are_dealt_once_each_and_rows_shrink_from_the_end():
    where = [torch.tensor([0, 1, 2]), torch.tensor([2, 3]), torch.tensor([2])]
    seen = []
    for block in dealt(where, 4):
        left = len(block.member) + 1
        for job, slot in block.rounds():
            assert len(job) <= left
            left = len(job)
            member = block.contexts[block.member[: len(job)]].tolist()
            pairs = list(zip(job.tolist(), slot.tolist(), strict=True))
            assert [int(where[j][s]) for j, s in pairs] == member
            seen += pairs
    assert sorted(seen) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]


def test_features_are_sampled_over_all_frequencies(bridge):
    survey = survey_contexts(bridge, tiny_sae(d_sae=64), tokens_of_length(256, 6), progress=False)
    rates = survey.firing_rates()
    for feature in (0, 17):
        assert rates[feature] == float((survey.values(feature) > 1e-6).double().mean())
    found = sample_features(survey, 10, lowest=0.01, highest=0.9)
    eligible = rates[(rates >= 0.01) & (rates <= 0.9)]
    chosen = rates[found]
    assert len(set(found)) == 10 and (chosen >= 0.01).all() and (chosen <= 0.9).all()
    assert (chosen < eligible.median()).sum() == pytest.approx(5, abs=1)
    with pytest.raises(ValueError, match="no feature fires"):
        sample_features(survey, lowest=1.1, highest=1.2)


def test_the_panel_holds_the_most_frequent_downstream_features(bridge):
    later = later_sae()
    survey = survey_contexts(
        bridge, tiny_sae(), tokens_of_length(128, 6), downstream=later, panel=5, progress=False
    )
    other = survey_contexts(bridge, later, tokens_of_length(128, 6), progress=False)
    rates = other.firing_rates()
    assert rates[survey.panel].tolist() == sorted(rates.tolist(), reverse=True)[:5]


def test_packed_contexts_have_no_padding_and_one_opening_bos(bridge):
    texts = [f"the cat sat on the mat {i}" for i in range(40)]
    tokens = packed_contexts(bridge, texts, n=20, length=12, prepend_bos=True)
    tokenizer = bridge.tokenizer
    assert tokens.shape == (20, 12)
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert not (tokens[:, 1:] == tokenizer.bos_token_id).any()
    assert not (tokens == tokenizer.pad_token_id).any()
    assert torch.equal(tokens, packed_contexts(bridge, texts, n=20, length=12, prepend_bos=True))
    with pytest.raises(ValueError, match="texts give"):
        packed_contexts(bridge, texts, n=9999, length=12)


# Refusals -----------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused(bridge):
    tokens, sae = tokens_of_length(64, 6), tiny_sae()
    with pytest.raises(ValueError, match="at least 64"):
        measured(bridge, sae, [0], tokens[:63])
    with pytest.raises(ValueError, match="does not lie behind"):
        measured(bridge, later_sae(), [0], tokens, downstream=sae)
    with pytest.raises(IndexError, match="feature 99 lies outside"):
        measured(bridge, sae, [99], tokens)
    with pytest.raises(ValueError, match="choose one of raw, norm"):
        measured(bridge, sae, [0], tokens, unit="kl")
    with pytest.raises(ValueError, match="choose one of mixed, shared"):
        measured(bridge, sae, [0], tokens, contexts="best")
    with pytest.raises(ValueError, match="at least one strength"):
        measured(bridge, sae, [0], tokens, strengths=())


def test_without_a_downstream_sae_collateral_is_absent_not_zero(bridge):
    found = measured(bridge, tiny_sae(), [0], tokens_of_length(64, 6)).table
    assert not [name for name in found if name.startswith(("count", "moved", "effective"))]


# The plan -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    model_folder(folder / "model")
    tiny_sae().save_model(folder / "sae")
    later_sae().save_model(folder / "later")
    source = str(folder / "model")
    return SideEffectPlan(
        ModelRef.of(source),
        SAERef.of(source, str(folder / "sae")),
        TokensRef.write(tokens_of_length(64, 6), folder / "contexts.safetensors"),
        tuple(range(10)),
        downstream=SAERef.of(source, str(folder / "later")),
        controls=1,
        block=4,
    )


def test_the_plans_table_equals_the_direct_measurement_and_two_shards(plan, tmp_path):
    report = InProcess().run(plan, tmp_path / "whole", progress=False)
    assert report.complete and report.done == 3
    for index in range(2):
        run_shard(plan, tmp_path / "shards", index, 2, progress=False)
    whole, shards = (collect(plan, tmp_path / name) for name in ("whole", "shards"))
    assert whole.digest == shards.digest
    model = plan.model.open().model
    direct = measured(
        model,
        plan.sae.open(plan.model),
        range(10),
        plan.tokens.load(),
        downstream=plan.downstream.open(plan.model),
        controls=1,
    )
    found = side_effects_of(plan, tmp_path / "whole")
    pd.testing.assert_frame_equal(
        found.table[direct.table.columns], direct.table, rtol=1e-5, atol=1e-5, check_dtype=False
    )


def test_an_edit_of_the_plan_changes_the_keys_it_touches(plan):
    from dataclasses import replace

    keys = {unit.key for unit in plan.units()}
    assert {unit.key for unit in replace(plan, features=tuple(range(8))).units()} < keys
    for change in ({"seed": 1}, {"taus": (0.2,)}, {"downstream": None}, {"rows": 32}):
        assert not keys & {unit.key for unit in replace(plan, **change).units()}
    with pytest.raises(ValueError, match="at least one feature"):
        replace(plan, features=())


def test_changed_contexts_are_refused(plan, tmp_path):
    kept = TokensRef.write(tokens_of_length(64, 6), tmp_path / "kept.safetensors")
    TokensRef.write(tokens_of_length(64, 6, seed=1), tmp_path / "kept.safetensors")
    with pytest.raises(ValueError, match="have changed"):
        kept.load()


def test_head_logits_are_the_models(host):
    final = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = host.unembed(final[:, None])[:, 0]
    assert torch.equal(head_logits(host, final), wanted)
