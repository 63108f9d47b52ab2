import pytest
import torch

from sae_steering_plugin.directions.lat import lat_direction


def states(n: int = 400) -> torch.Tensor:
    """Noise with one coordinate of ten times the spread."""
    drawn = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    drawn[:, 5] *= 10
    return drawn + 3


def direction(rows: torch.Tensor, seed: int = 1, **options) -> tuple[torch.Tensor, float]:
    return lat_direction(rows, generator=torch.Generator().manual_seed(seed), **options)


def test_the_coordinate_that_varies_most_is_found_whatever_the_mean():
    for rows in (states(), states() + 100):
        found, share = direction(rows)
        assert abs(float(found[5])) > 0.99
        assert float(found.norm()) == pytest.approx(1, abs=1e-6)
        assert 1 / 8 < share <= 1


def test_it_is_scikit_learns_component_of_the_same_normed_differences():
    from sklearn.decomposition import PCA

    rows = states(61)  # an odd number leaves the last shuffled row out
    order = torch.randperm(61, generator=torch.Generator().manual_seed(1))
    gaps = (rows[order[:30]] - rows[order[30:60]]).double()
    reference = PCA(1).fit((gaps / gaps.norm(dim=1, keepdim=True)).numpy())
    found, share = direction(rows)
    assert abs(float(found.double() @ torch.from_numpy(reference.components_[0]))) > 1 - 1e-6
    assert share == pytest.approx(float(reference.explained_variance_ratio_[0]), abs=1e-9)


def test_the_length_of_a_difference_has_no_say():
    rows = torch.zeros(40, 3)
    rows[0, 0] = 1000.0  # one enormous pair among twenty
    rows[:, 1] = torch.randn(40, generator=torch.Generator().manual_seed(2))
    found, _ = direction(rows, centre=False)
    assert abs(float(found[1])) > 0.99


def test_equal_states_count_as_no_difference_and_too_few_are_refused():
    found, share = direction(torch.ones(10, 4))
    assert not found.any() and share == 0
    with pytest.raises(ValueError, match="3 states make 1 pairs"):
        direction(torch.randn(3, 4))
