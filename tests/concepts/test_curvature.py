import pytest
import torch

from sae_steering_plugin.concepts.curvature import (
    KroneckerFactors,
    curvature_split,
    row_curvature,
    singular_split,
)


def planted(mu, lam, seed=0):
    """A and G with these eigenvalues in random frames, the frames, and a random W."""
    g = torch.Generator().manual_seed(seed)

    def frame(n):
        return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q

    left, right = frame(len(mu)), frame(len(lam))
    A = left @ torch.diag(torch.tensor(mu).double()) @ left.T
    G = right @ torch.diag(torch.tensor(lam).double()) @ right.T
    return torch.randn(len(mu), len(lam), generator=g), A, G, left, right


MU = [100.0, 10.0, 1.0, 0.1, 0.01]
LAM = [50.0, 40.0, 1.0, 0.5, 0.1, 0.01]


def test_rho_one_gives_the_matrix_back():
    W, A, G, *_ = planted(MU, LAM)
    split = curvature_split(W, A, G, 1.0)
    assert (split.pairs, split.of) == (30, 30) and split.mass == pytest.approx(1)
    assert float((split.kept - W).norm() / W.norm()) < 1e-12
    # also where pairs have no mass at all, which no sum can tell from the whole
    split = curvature_split(W, A * 0 + torch.diag(torch.tensor([1.0, 0, 0, 0, 0])), G, 1.0)
    assert split.pairs == 30
    torch.testing.assert_close(split.kept, W.double())


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9, 0.99, 0.9999])
def test_the_pairs_kept_are_the_fewest_that_reach_rho(rho):
    W, A, G, left, right = planted(MU, LAM)
    mass = torch.tensor(MU).double()[:, None] * torch.tensor(LAM).double()
    ranked = sorted(mass.flatten().tolist(), reverse=True)
    count = next(n for n in range(1, 31) if sum(ranked[:n]) >= rho * float(mass.sum()))
    split = curvature_split(W, A, G, rho)
    assert split.pairs == count
    coordinates = left.T @ split.kept @ right
    torch.testing.assert_close(
        coordinates, (left.T @ W.double() @ right) * (mass >= ranked[count - 1])
    )
    assert split.mass == pytest.approx(sum(ranked[:count]) / float(mass.sum()))


def test_ties_stop_at_the_first_pair_that_reaches_rho():
    W, A, G, *_ = planted([1.0] * 4, [1.0] * 4)
    assert curvature_split(W, A, G, 0.5).pairs == 8


def test_a_planted_memory_in_flat_directions_is_what_is_dropped():
    _, A, G, left, right = planted(MU, LAM)
    shared = left[:, :1] @ right[:, :1].T
    memory = left[:, 4:] @ right[:, 5:].T
    split = curvature_split(shared + 5 * memory, A, G, 0.9)
    torch.testing.assert_close(split.kept, shared)
    # the memory is the larger part of W: a cut by size keeps it instead
    torch.testing.assert_close(singular_split(shared + 5 * memory, 0.9).kept, 5 * memory)


def test_a_singular_cut_is_the_best_of_its_rank():
    W = planted(MU, LAM)[0]
    split = singular_split(W, 0.8)
    sizes = torch.linalg.svdvals(W.double()).square()
    assert split.energy >= 0.8 > float(sizes[: split.pairs - 1].sum() / sizes.sum())
    lost = float((W.double() - split.kept).square().sum())
    assert lost == pytest.approx(float(sizes[split.pairs :].sum()))
    torch.testing.assert_close(singular_split(W, 1.0).kept, W.double())


def test_factors_are_means_over_tokens_in_any_parts():
    g = torch.Generator().manual_seed(0)
    x, grad = torch.randn(50, 4, generator=g), torch.randn(50, 3, generator=g)
    factors = KroneckerFactors.empty(4, 3)
    for part in (slice(0, 20), slice(20, 50)):
        factors.add(x[part], grad[part])
    assert factors.tokens == 50
    torch.testing.assert_close(factors.A, (x.double().T @ x.double()) / 50)
    torch.testing.assert_close(factors.G, (grad.double().T @ grad.double()) / 50)
    with pytest.raises(ValueError, match="no token was seen"):
        _ = KroneckerFactors.empty(4, 3).A


def test_row_curvature_is_the_eigenvalue_over_the_mean_one():
    _, _, G, _, right = planted(MU, LAM)
    found = row_curvature(3 * right.T, G)
    torch.testing.assert_close(found, torch.tensor(LAM).double() / (sum(LAM) / 6))
    assert float(found.mean()) == pytest.approx(1)
    assert row_curvature(torch.zeros(1, 6), G).isnan().all()


def test_what_cannot_be_split_is_refused():
    W, A, G, *_ = planted(MU, LAM)
    for rho in (0.0, 1.5):
        with pytest.raises(ValueError, match="rho is .*; it must lie above 0 and not above 1"):
            curvature_split(W, A, G, rho)
    with pytest.raises(ValueError, match="energy is 0.0"):
        singular_split(W, 0.0)
    with pytest.raises(ValueError, match="there is no curvature"):
        curvature_split(W, A * 0, G, 0.5)
