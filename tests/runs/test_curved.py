import pytest
import torch

from sae_steering_plugin.adapters.activations import activations_at, encode_texts, padded
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.edits import Add, FollowPath, concept_path
from sae_steering_plugin.features.multidimensional import group_shape
from sae_steering_plugin.runs.curved import final_activations, group_shapes, said_along
from sae_steering_plugin.types import LAST, Edit
from tests.hosts import CORPUS, D_MODEL, SITE, tiny_bridge, tiny_hooked, tiny_sae

TEXTS = [text for text in CORPUS for _ in range(12)]


@pytest.fixture(scope="module", params=[tiny_hooked, tiny_bridge])
def model(request):
    return request.param()


def test_final_activations_are_those_of_each_prompt_alone(model):
    together = final_activations(model, SITE, CORPUS)
    for row, text in enumerate(CORPUS):
        alone = final_activations(model, SITE, [text])
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


def test_what_is_said_along_a_path_is_said_at_each_point_alone(model):
    x = torch.randn(12, D_MODEL, generator=torch.Generator().manual_seed(0))
    path = concept_path(x, torch.arange(12) % 5)
    t = torch.tensor([0.1, 2.0, 4.0], dtype=torch.float64)
    said = said_along(model, CORPUS[:2], FollowPath(path, t), [4, 5, 6], hook_name=SITE)
    assert said.shape == (2, 3, 3)
    for row, text in enumerate(CORPUS[:2]):
        ids = torch.tensor([encode_texts(model, [text], prepend_bos=True)[0].tokens])
        for step in range(3):
            edit = Edit(FollowPath(path, float(t[step])), SITE, LAST)
            alone = steered_logits(model, ids, edit)[0, -1].softmax(-1)[[4, 5, 6]]
            torch.testing.assert_close(said[row, step], alone, atol=1e-5, rtol=1e-4)
    still = said_along(model, CORPUS[:1], Add(torch.zeros(D_MODEL)), [4], hook_name=SITE)
    assert still.shape == (1, 1, 1)


def test_group_shapes_are_those_of_all_tokens_codes(model):
    sae = tiny_sae("topk")
    groups = [(1, 2, 5), (7, 9), (3, 30)]
    found = {one.latents: one for one in group_shapes(model, sae, TEXTS, groups, batch_size=7)}
    codes = []
    for one in encode_texts(model, TEXTS, prepend_bos=True):
        x = activations_at(model, SITE, padded(model, [one]))
        with torch.no_grad():
            codes.append(sae.encode(x)[0, 1:])
    every = torch.cat(codes)
    for group in groups:
        wanted = group_shape(group, every[:, list(group)], sae.W_dec.detach()[list(group)])
        assert found[group].points == wanted.points
        assert found[group].score == pytest.approx(wanted.score, abs=1e-6, nan_ok=True)
    with pytest.raises(ValueError, match="no group of latents is given"):
        group_shapes(model, sae, TEXTS, [])
