import pytest
import torch

from sae_steering_plugin.concepts import LowRankDelta, factors, rank_one, unexplained, written

G = torch.Generator().manual_seed(0)
INPUTS = torch.randn(200, 6, generator=G) + torch.tensor([2.0, 0, 0, -1, 0, 0])
VECTOR = torch.randn(4, generator=G)


def test_the_mean_of_what_a_rank_one_change_adds_is_the_vector():
    delta = rank_one(VECTOR, INPUTS.mean(0))
    assert torch.linalg.matrix_rank(delta) == 1
    torch.testing.assert_close((INPUTS @ delta).mean(0), VECTOR, atol=1e-6, rtol=1e-6)


def test_factors_say_how_often_each_token_gets_the_vector():
    mean = INPUTS.mean(0)
    torch.testing.assert_close(
        INPUTS @ rank_one(VECTOR, mean), torch.outer(factors(INPUTS, mean), VECTOR)
    )
    assert float(factors(INPUTS, mean).mean()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(factors(mean.expand(3, -1), mean), torch.ones(3))


def test_no_rank_one_change_stands_for_a_constant_where_inputs_average_out():
    with pytest.raises(ValueError, match="mean input is zero"):
        rank_one(VECTOR, torch.zeros(6))


def test_low_rank_factors_write_what_their_product_writes():
    low = LowRankDelta(torch.randn(6, 2, generator=G), torch.randn(2, 4, generator=G), 0.5)
    product = 0.5 * low.down @ low.up
    torch.testing.assert_close(written(INPUTS, low), written(INPUTS, product))


def test_what_a_constant_leaves_of_a_planted_mixture():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(100_000, 4, generator=generator)
    outputs = VECTOR + noise - noise.mean(0)
    left, variance = unexplained(outputs, VECTOR)
    assert left == pytest.approx(4 / (4 + float(VECTOR.square().sum())), rel=0.01)
    assert variance == pytest.approx(1)
    assert unexplained(VECTOR.expand(5, -1), VECTOR)[0] == 0
    assert unexplained(outputs, torch.zeros(4))[0] == 1
    assert unexplained(outputs, 2 * VECTOR)[1] > 1
    assert all(value != value for value in unexplained(torch.zeros(3, 4), torch.zeros(4)))
