import numpy as np
import pandas as pd
import pytest
import torch

from sae_steering_plugin import FeatureTable, decoder_geometry, logit_footprint
from sae_steering_plugin.adapters.sae_lens import sae_id
from tests.hosts import D_MODEL, tiny_sae


def test_geometry_of_chosen_features_is_that_among_all_rows():
    sae = tiny_sae()
    everything = decoder_geometry(sae, k=5)
    some = decoder_geometry(sae, features=[9, 2], k=5)
    assert list(some.table.index) == [9, 2] and some.sae_id == sae_id(sae)
    pd.testing.assert_frame_equal(some.table, everything.of([9, 2]).table)
    size = torch.cosine_similarity(sae.W_dec[9], sae.W_dec, dim=1).abs().detach()
    size[9] = -1
    row = some.table.loc[9]
    assert row["crowding_max_abs_cos"] == pytest.approx(float(size.max()), rel=1e-5)
    assert row["crowding_nearest"] == int(size.argmax())
    assert row["decoder_norm"] == pytest.approx(float(sae.W_dec[9].detach().norm()))


def test_the_footprint_as_loaded_is_the_plain_product(host):
    sae = tiny_sae()
    table = logit_footprint(host, sae, features=[3, 0], basis="loaded", shares=(10,), top=2)
    logits = (sae.W_dec[[3, 0]] @ host.W_U).detach()
    assert table.settings["basis"] == "loaded"
    found = table.table
    assert list(found["direct_logit_l2"]) == pytest.approx(logits.norm(dim=1).tolist(), rel=1e-5)
    assert found.loc[3, "promoted"].tolist() == logits[0].topk(2).indices.tolist()
    assert found.loc[0, "suppressed"].tolist() == (-logits[1]).topk(2).indices.tolist()


def test_a_zero_row_is_counted():
    sae = tiny_sae()
    with torch.no_grad():
        sae.W_dec[4] = 0
    table = decoder_geometry(sae, k=3)
    assert table.settings["zero_rows"] == 1
    assert table.table["cos_mean"].isna().sum() == 1


def test_tables_go_through_parquet_and_join(host, tmp_path):
    sae = tiny_sae()
    geometry, logits = decoder_geometry(sae, k=3), logit_footprint(host, sae, shares=(10,), top=3)
    both = geometry.join(logits)
    assert both.columns == (*geometry.columns, *logits.columns)
    assert both.settings == {**geometry.settings, **logits.settings}
    both.to_parquet(tmp_path / "deep" / "features.parquet")
    again = FeatureTable.from_parquet(tmp_path / "deep" / "features.parquet")
    assert (again.sae_id, again.settings) == (both.sae_id, both.settings)
    assert again.table.index.equals(both.table.index)
    for name in both.columns:
        one, other = list(both.table[name]), list(again.table[name])
        assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def test_joins_that_would_mix_things_up_are_refused(host):
    sae = tiny_sae()
    table = decoder_geometry(sae, k=3)
    logits = logit_footprint(host, sae, top=0)
    with pytest.raises(ValueError, match="one table is about"):
        table.join(logit_footprint(host, tiny_sae(seed=1), top=0))
    with pytest.raises(ValueError, match="features are in one table only"):
        table.join(logits.of([0, 1]))
    with pytest.raises(ValueError, match="both tables have a column 'cos_mean'"):
        table.join(table)
    with pytest.raises(ValueError, match="differ in setting 'crowding_k'"):
        table.join(FeatureTable(logits.table, logits.sae_id, {"crowding_k": 4}))
    with pytest.raises(KeyError, match="feature 99 is not in this table"):
        table.of([99])


def test_a_parquet_file_of_somebody_else_is_refused(tmp_path):
    decoder_geometry(tiny_sae(), k=3).table.to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match="is no feature table"):
        FeatureTable.from_parquet(tmp_path / "plain.parquet")


def test_features_that_are_not_there_and_other_widths_are_refused(host):
    sae = tiny_sae()
    with pytest.raises(IndexError, match=r"feature 32 lies outside 0\.\.31"):
        decoder_geometry(sae, features=[1, 32])
    with pytest.raises(ValueError, match="no feature was asked for"):
        decoder_geometry(sae, features=[])
    sae.W_dec = torch.nn.Parameter(torch.randn(32, D_MODEL + 1))
    with pytest.raises(ValueError, match="has no direct logits"):
        logit_footprint(host, sae)
