import math

import pytest
import torch

from sae_steering_plugin.features import geometry
from sae_steering_plugin.features.geometry import (
    cosine_moments,
    geometry_columns,
    nearest_rows,
    unit_rows,
)


def rows_of(n=300, d=12, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def cosines(rows):
    unit = unit_rows(rows.double())
    found = unit @ unit.T
    return found.fill_diagonal_(-1)


@pytest.mark.parametrize("blocks", [(1024, 4096), (64, 50)])
def test_the_nearest_rows_are_those_of_the_dense_product(blocks, monkeypatch):
    monkeypatch.setattr(geometry, "ROWS", blocks[0])
    monkeypatch.setattr(geometry, "COLUMNS", blocks[1])
    rows = rows_of()
    found, which = nearest_rows(unit_rows(rows), 20)
    size = cosines(rows).abs().fill_diagonal_(-1)
    exact = size.topk(20, dim=1)
    torch.testing.assert_close(found.double(), exact.values, rtol=0, atol=1e-6)
    torch.testing.assert_close(size.gather(1, which), exact.values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sieve", [False, True])
@pytest.mark.parametrize("some", [False, True])
def test_every_way_to_multiply_gives_the_same_lists(some, sieve, monkeypatch):
    monkeypatch.setattr(geometry, "ROWS", 64)
    monkeypatch.setattr(geometry, "COLUMNS", 50)
    rows = unit_rows(rows_of(d=24))
    rows[7], rows[11] = rows[2], 0
    chosen = torch.arange(0, 300, 7) if some else None
    found, which = nearest_rows(rows, 20, features=chosen, sieve=sieve)
    size = cosines(rows).abs().fill_diagonal_(-1)[slice(None) if chosen is None else chosen]
    exact = size.topk(20, dim=1).values
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-7)
    torch.testing.assert_close(size.gather(1, which), exact, rtol=0, atol=5e-7)
    assert all(len(set(row)) == 20 for row in which.tolist())


def test_rows_that_fall_short_of_a_wrong_bar_are_worked_out_exactly(monkeypatch):
    rows = unit_rows(rows_of())
    expected = nearest_rows(rows, 5)
    monkeypatch.setattr(geometry, "sample_bars", lambda sample, k, n: sample.amax(1).numpy())
    found = nearest_rows(rows, 5)
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_crowding_of_the_planted_rows():
    q = torch.eye(16)
    root = math.sqrt(2)
    planted = [q[0], (q[0] + q[1]) / root, (q[0] + q[2]) / root, (q[0] - q[3]) / root, *q[4:8]]
    found = geometry_columns(torch.stack(planted), None, torch.tensor([0, 4]), k=3)
    assert found["crowding_topk_mean_abs_cos"][0] == pytest.approx(1 / root)
    assert found["crowding_max_abs_cos"][0] == pytest.approx(1 / root)
    assert found["crowding_max_abs_cos"][1] == 0
    assert found["encoder_norm"].isnan().all()


def test_a_duplicate_row_is_a_neighbour_and_the_row_itself_is_not():
    rows = rows_of(40)
    rows[7] = 3 * rows[2]
    found, which = nearest_rows(unit_rows(rows), 1)
    assert found[2, 0] == pytest.approx(1) and which[2, 0] == 7 and which[7, 0] == 2
    assert not (which[:, 0] == torch.arange(40)).any()


def test_mean_and_variance_of_all_cosines_need_no_product():
    rows = rows_of()
    full = cosines(rows)
    others = full[~torch.eye(len(full), dtype=torch.bool)].view(len(full), -1)
    mean, variance = cosine_moments(unit_rows(rows))
    torch.testing.assert_close(mean, others.mean(1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(variance, others.var(1, unbiased=False), rtol=1e-5, atol=1e-7)


def test_a_zero_row_has_no_angle_and_is_nobodys_neighbour():
    rows = rows_of(30)
    rows[3] = 0
    found = geometry_columns(rows, rows, torch.arange(30), k=2)
    for name in ("crowding_max_abs_cos", "crowding_topk_mean_abs_cos", "cos_mean", "cos_var"):
        assert found[name].isnan().nonzero().flatten().tolist() == [3], name
    assert found["encoder_decoder_cos"].isnan().nonzero().flatten().tolist() == [3]
    assert found["crowding_nearest"][3] == -1
    assert not (found["crowding_nearest"] == 3).any()
    kept = torch.cat([rows[:3], rows[4:]])
    without = geometry_columns(kept, None, torch.arange(29), k=2)
    torch.testing.assert_close(found["cos_mean"][4:], without["cos_mean"][3:])


def test_the_encoder_is_compared_with_its_own_decoder_row():
    rows, encoder = rows_of(20), rows_of(20, seed=1)
    found = geometry_columns(rows, encoder, torch.arange(20), k=2)
    exact = torch.cosine_similarity(rows, encoder)
    torch.testing.assert_close(found["encoder_decoder_cos"], exact)
    torch.testing.assert_close(found["encoder_norm"], encoder.norm(dim=1))


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="each of 5 rows has 4 others"):
        nearest_rows(unit_rows(rows_of(5)), 5)
    with pytest.raises(ValueError, match="two rows that have a length"):
        cosine_moments(torch.eye(1))
