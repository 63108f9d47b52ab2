import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_steering_plugin.features.geometry import nearest_rows, unit_rows
from sae_steering_plugin.features.sieve import (
    OUTPUT,
    SievedProduct,
    exact_products,
    floor_bits,
    rounded,
    slack,
)


@given(st.lists(st.floats(0, 3.0e38, allow_subnormal=False), min_size=1, max_size=20))
def test_floor_bits_order_as_the_numbers_and_never_lie_above(values):
    bars = np.array(values)
    bits = floor_bits(bars)
    back = (bits.astype(np.int32) << 16).view(np.float32).astype(np.float64)
    assert (back <= bars).all()
    above = ((bits.astype(np.int32) + 1) << 16).view(np.float32).astype(np.float64)
    assert (above > bars).all()
    assert (floor_bits(np.array([-1.0, -np.inf])) == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 200), st.integers(0, 9999))
def test_no_cosine_falls_short_by_more_than_the_slack(d, seed):
    rows = unit_rows(torch.randn(40, d, generator=torch.Generator().manual_seed(seed)))
    narrow, off = rounded(rows)
    product = (narrow @ narrow.T).float().abs().double()
    exact = (rows.double() @ rows.double().T).abs()
    least = (exact - torch.from_numpy(slack(off, off, d))[:, None]) * (1 - OUTPUT)
    assert (product >= least).all()


def test_near_ties_around_the_last_place_are_not_lost():
    """Rows that differ by less than bfloat16 can tell: the sieve must let all of them through."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 64, generator=generator)
    rows = unit_rows(base + 3e-4 * torch.randn(200, 64, generator=generator))
    found, _ = nearest_rows(rows, 7, sieve=True)
    exact = (rows.double() @ rows.double().T).abs().fill_diagonal_(-1).topk(7, dim=1).values
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-7)


def test_few_pairs_are_worked_out_again():
    rows = unit_rows(torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)))
    from sae_steering_plugin.features.largest import Largest

    product = SievedProduct(rows)
    bars = np.full(1000, 0.45, dtype=np.float32)
    product.offer(torch.arange(1000), 1000, 2000, Largest(5, bars), Largest(5, bars.copy()))
    true = int(((rows[:1000] @ rows[1000:].T).abs() >= 0.45).sum())
    assert 0 < true <= product.survivors <= 1.5 * true + 20


def test_single_products_are_those_of_the_whole():
    one, other = torch.randn(5, 8), torch.randn(6, 8)
    rows, columns = torch.tensor([0, 4, 4]), torch.tensor([5, 0, 1])
    found = exact_products(one, other, rows, columns)
    torch.testing.assert_close(found, (one @ other.T)[rows, columns])
    assert len(exact_products(one, other, rows[:0], columns[:0])) == 0
