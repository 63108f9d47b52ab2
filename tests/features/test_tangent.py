import torch

from sae_steering_plugin.features.tangent import curvature_columns, tangent_columns

D, WORDS, CONTEXTS = 6, 200, 12


def jacobians(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CONTEXTS, WORDS, D, generator=generator)


def test_a_sketch_of_all_words_is_the_exact_first_order_shift():
    maps, rows = jacobians(), torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    exact = maps * WORDS**0.5  # w_r = unit words: J' w_r is a row of J, lengths scaled back
    found = tangent_columns(exact, rows)
    shifts = torch.einsum("xvd,fd->fxv", maps, rows)
    assert torch.allclose(found["tangent_effect"], shifts.norm(dim=2).mean(1), rtol=1e-5)
    for i, one in enumerate(shifts):
        cosines = torch.cosine_similarity(one, one.mean(0, keepdim=True), dim=1)
        torch.testing.assert_close(found["tangent_stability_signed"][i], cosines.mean())
        torch.testing.assert_close(found["tangent_stability_abs"][i], cosines.abs().mean())
        cv = one.norm(dim=1).std() / one.norm(dim=1).mean()
        torch.testing.assert_close(found["tangent_effect_cv"][i], cv)
    looks = torch.randn(400, WORDS, generator=torch.Generator().manual_seed(2))
    near = tangent_columns(torch.einsum("rv,xvd->xrd", looks, maps), rows)
    torch.testing.assert_close(near["tangent_effect"], found["tangent_effect"], rtol=0.1, atol=0)


def test_one_map_for_all_contexts_is_perfectly_stable_and_a_flipped_one_in_size_only():
    one = jacobians()[:1].expand(CONTEXTS, -1, -1)
    rows = torch.eye(D)
    found = tangent_columns(one, rows)
    torch.testing.assert_close(found["tangent_stability_signed"], torch.ones(D))
    signs = torch.ones(CONTEXTS, 1, 1)
    signs[:3] = -1
    flipped = tangent_columns(one * signs, rows)
    torch.testing.assert_close(flipped["tangent_stability_signed"], torch.full((D,), 0.5))
    torch.testing.assert_close(flipped["tangent_stability_abs"], torch.ones(D))


def test_a_row_that_moves_nothing_has_no_stability():
    found = tangent_columns(jacobians()[:, :4], torch.zeros(1, D))
    assert found["tangent_effect"] == 0 and found["tangent_stability_abs"].isnan().all()


def test_curvature_is_the_second_moment_along_the_row():
    scores = jacobians()[:, :30]
    rows = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    found = curvature_columns(scores, rows)
    flat = scores.flatten(0, 1)
    fisher = flat.T @ flat / len(flat)
    torch.testing.assert_close(
        found["fisher_curvature"], torch.einsum("fd,de,fe->f", rows, fisher, rows)
    )
    assert torch.allclose(
        curvature_columns(scores, 2 * rows)["fisher_curvature_cv"], found["fisher_curvature_cv"]
    )
