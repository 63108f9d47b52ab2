import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sae_lens import SAE

from sae_steering_plugin import SteeringDictionary, decoder_geometry, keep_table, kept_table
from sae_steering_plugin.adapters.feature_metadata import packed, unpacked
from sae_steering_plugin.adapters.sae_lens import load_sae
from tests.hosts import tiny_sae

KINDS = ["<f8", "<f4", "<i8", "<i4", "|b1", ">f4"]


@given(st.sampled_from(KINDS).flatmap(lambda kind: arrays.arrays(kind, st.integers(0, 40))))
def test_a_packed_column_comes_back_bit_for_bit_through_json(values):
    again = unpacked(json.loads(json.dumps(packed(values))))
    assert again.dtype == values.dtype.newbyteorder("<")
    np.testing.assert_array_equal(again, values)


@pytest.mark.parametrize("architecture", ["standard", "topk", "transcoder"])
def test_a_saved_dictionary_brings_its_table_along(architecture, tmp_path):
    options = {"d_out": 16, "apply_b_dec_to_input": False} if architecture == "transcoder" else {}
    sae = tiny_sae(architecture, **options)
    table = decoder_geometry(sae, features=[7, 2, 30], k=3)
    keep_table(sae, table)
    sae.save_model(tmp_path)
    for loaded in (load_sae(tmp_path), SAE.load_from_disk(tmp_path)):
        again = kept_table(loaded)
        pd.testing.assert_frame_equal(again.table, table.table, check_exact=True)
        assert (again.sae_id, again.settings) == (table.sae_id, table.settings)
        assert torch.equal(loaded.W_dec, sae.W_dec)


def test_steering_rows_bring_the_figures_of_their_features(tmp_path):
    sae = tiny_sae()
    table = decoder_geometry(sae, features=[7, 2], k=3)
    made = SteeringDictionary.from_features(sae, [7, 2])
    keep_table(made, table, columns=["decoder_norm"])
    made.save_model(tmp_path)
    loaded = SteeringDictionary.load_from_disk(tmp_path)
    again = kept_table(loaded)
    assert again.columns == ("decoder_norm",) and list(again.table.index) == [7, 2]
    assert [v.norm for v in loaded.vectors()] == pytest.approx(list(again.table["decoder_norm"]))


def test_what_does_not_belong_is_refused():
    sae = tiny_sae()
    table = decoder_geometry(sae, k=3)
    with pytest.raises(ValueError, match="this table is about"):
        keep_table(tiny_sae(seed=1), table)
    with pytest.raises(KeyError, match="no column 'kurtosis'; the table has decoder_norm"):
        keep_table(sae, table, columns=["kurtosis"])
    words = type(table)(table.table.assign(words="x"), table.sae_id)
    with pytest.raises(ValueError, match="column 'words' holds no plain numbers"):
        keep_table(sae, words)
    with pytest.raises(ValueError, match="holds no table of features"):
        kept_table(sae)
    keep_table(sae, table)
    record = sae.cfg.metadata["feature_table"]
    with torch.no_grad():
        sae.W_dec.mul_(-1)
    with pytest.raises(ValueError, match="its table is about"):
        kept_table(sae)
    with torch.no_grad():
        sae.W_dec.mul_(-1)
    record["columns"]["decoder_norm"] = packed(np.zeros(3))
    with pytest.raises(ValueError, match="differ in length"):
        kept_table(sae)
    bomb = {**packed(np.zeros(10_000)), "length": 2}
    with pytest.raises(ValueError, match="holds 17 bytes, not 16"):
        unpacked(bomb)
    with pytest.raises(ValueError, match="none that was written here"):
        unpacked({**bomb, "dtype": "|O"})
