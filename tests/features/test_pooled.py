"""Pooled codes: one sparse table, its slices, its file."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_steering_plugin.features import PooledCodes


def planted(n=9, width=6, seed=0):
    table = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).clamp(min=0)
    table[:, 2] = 0
    return table


def test_dense_matrix_and_counts_agree_with_the_table():
    table = planted()
    codes = PooledCodes.from_dense(table, sae_id="s", hook_name="h")
    assert torch.equal(codes.dense(), table)
    assert torch.equal(torch.from_numpy(codes.matrix().toarray()).float(), table)
    assert torch.equal(codes.counts, (table > 0).sum(0))
    assert (len(codes), codes.n_features, codes.signed) == (9, 6, False)


@given(st.permutations(range(9)), st.integers(1, 9))
def test_a_slice_is_the_slice_of_the_table(order, size):
    chosen = list(order)[:size]
    assert torch.equal(PooledCodes.from_dense(planted()).of(chosen).dense(), planted()[chosen])


def test_saved_codes_come_back_bit_for_bit(tmp_path):
    codes = PooledCodes.from_dense(planted(), sae_id="s", hook_name="h", pooling="max")
    codes.save(tmp_path)
    again = PooledCodes.load(tmp_path)
    assert torch.equal(again.dense(), codes.dense())
    assert (again.pooling, again.sae_id, again.hook_name) == ("max", "s", "h")
    about = json.loads((tmp_path / "codes.json").read_text())
    (tmp_path / "codes.json").write_text(json.dumps({**about, "format": "else"}))
    with pytest.raises(ValueError, match="holds no pooled codes of this version"):
        PooledCodes.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": torch.tensor([0, 2, 3])}, "from 0 to the number of stored values"),
        ({"starts": torch.tensor([0, 3, 2])}, "must not descend"),
        ({"examples": torch.tensor([0, 4])}, "names a text outside 0..2"),
        ({"values": torch.tensor([1.0, float("nan")])}, "not finite"),
        ({"values": torch.tensor([1.0, 2.0], dtype=torch.float64)}, "are float32"),
    ],
)
def test_a_table_that_cannot_be_is_refused(change, message):
    fine = {
        "values": torch.tensor([1.0, 2.0]),
        "examples": torch.tensor([0, 1]),
        "starts": torch.tensor([0, 1, 2]),
        "n_tokens": torch.tensor([1, 1, 1]),
    }
    with pytest.raises(ValueError, match=message):
        PooledCodes(**{**fine, **change}, pooling="max", sae_id="", hook_name="")


def test_a_text_named_twice_is_refused():
    with pytest.raises(ValueError, match="named twice"):
        PooledCodes.from_dense(planted()).of([1, 1])
