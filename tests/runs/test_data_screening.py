"""Data screened before training: planted shifts, exchange of sides, padding, boundaries."""

import pytest
import torch

from sae_steering_plugin.adapters.activations import activations_at, encode_texts, padded
from sae_steering_plugin.adapters.training_hooks import linear_decoder
from sae_steering_plugin.adapters.transformer_lens import resolve
from sae_steering_plugin.runs.data_screening import preference_disparity, projection_difference
from sae_steering_plugin.types import Recipe, SteeringVector
from tests.hosts import D_MODEL, SITE, tiny_sae

PROMPTS = ["the cat sat", "a dog ran in the park", "I believe"]
GIVEN = [" on the mat", " and the cat sat still", " the answer is (A)"]
OWN = [" still", " on the mat and the mat", " not"]
QUIET = dict(progress=False, prepend_bos=True)


def vector(seed=0):
    one = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(one, SITE, Recipe("given"), label="tides")


def test_the_difference_is_that_of_means_over_answers(host):
    sae = tiny_sae()
    found = projection_difference(host, sae, PROMPTS, GIVEN, own=OWN, batch_size=2, **QUIET)
    unit = torch.nn.functional.normalize(linear_decoder(sae)[0].double(), dim=1)

    def mean(prompt, answer):
        (text,) = encode_texts(host, [prompt + answer], prepend_bos=True)
        first = next(i for i, span in enumerate(text.spans) if i and span[0] >= len(prompt))
        return activations_at(host, SITE, padded(host, [text]))[0, first:].double().mean(0)

    for i in range(3):
        gap = mean(PROMPTS[i], GIVEN[i]) - mean(PROMPTS[i], OWN[i])
        assert torch.allclose(found.per_sample[i], gap @ unit.T, atol=1e-5)
    top = found.top(3)
    assert top["mean"].abs().is_monotonic_decreasing
    order = found.ranked(int(top["concept"][0]))
    values = found.per_sample[order, int(top["concept"][0])]
    assert torch.equal(values, values.sort(descending=True).values)
    assert "3 samples" in found._repr_html_()


def test_an_answer_moved_along_a_vector_differs_by_that_much(bridge):
    """A hook adds 0.3 along v to the answers of one run: the difference is 0.3 along v."""
    v = vector()
    texts = [x + y for x, y in zip(PROMPTS, OWN, strict=True)]
    batch = padded(bridge, encode_texts(bridge, texts, prepend_bos=True))
    plain = projection_difference(bridge, v, PROMPTS, OWN, own=OWN, **QUIET)
    assert float(plain.per_sample.abs().max()) == 0.0
    assert plain.labels == {0: "tides"}
    passes = []

    def push(module, inputs, output):
        passes.append(1)
        return output + 0.3 * v.direction if len(passes) == 1 else output

    handle = resolve(bridge, SITE).point.register_forward_hook(push)
    try:  # the first pass reads the given answers, the second the model's own
        moved = projection_difference(bridge, v, PROMPTS, OWN, own=OWN, **QUIET)
    finally:
        handle.remove()
    assert len(passes) == 2 and batch.real.any()
    assert moved.per_sample[:, 0].tolist() == pytest.approx([0.3] * 3, abs=1e-5)
    assert moved.table()["se"][0] == pytest.approx(0.0, abs=1e-5)


def test_without_own_answers_the_prompt_s_last_token_takes_their_place(bridge):
    found = projection_difference(bridge, [vector(), vector(1)], PROMPTS, GIVEN, **QUIET)
    same = projection_difference(
        bridge, [vector(), vector(1)], PROMPTS, GIVEN, batch_size=1, **QUIET
    )
    assert torch.allclose(found.per_sample, same.per_sample, atol=1e-6)  # padding is ignored
    assert "last token" in found.what
    (text,) = encode_texts(bridge, [PROMPTS[0] + GIVEN[0]], prepend_bos=True)
    x = activations_at(bridge, SITE, padded(bridge, [text]))[0].double()
    first = next(i for i, span in enumerate(text.spans) if i and span[0] >= len(PROMPTS[0]))
    expected = (x[first:].mean(0) - x[first - 1]) @ vector().direction.double()
    assert float(found.per_sample[0, 0]) == pytest.approx(float(expected), abs=1e-5)


def test_disparity_changes_its_sign_with_the_sides(bridge):
    sae = tiny_sae("jumprelu")
    found = preference_disparity(bridge, sae, PROMPTS, GIVEN, OWN, least_rate=0.3, **QUIET)
    back = preference_disparity(bridge, sae, PROMPTS, OWN, GIVEN, least_rate=0.3, **QUIET)
    assert torch.equal(found.per_sample, -back.per_sample)
    assert set(found.per_sample.unique().tolist()) == {-1.0, 0.0, 1.0}
    same = preference_disparity(bridge, sae, PROMPTS, OWN, OWN, **QUIET)
    assert float(same.per_sample.abs().max()) == 0.0


def test_bad_input_is_refused(bridge):
    with pytest.raises(ValueError, match="own has 1 answers for 3 prompts"):
        projection_difference(bridge, vector(), PROMPTS, GIVEN, own=OWN[:1], **QUIET)
    with pytest.raises(ValueError, match="2 given answers for 3 prompts"):
        projection_difference(bridge, vector(), PROMPTS, GIVEN[:2], **QUIET)
    with pytest.raises(ValueError, match="nothing is left to pool of text 1"):
        projection_difference(bridge, vector(), PROMPTS, [" on", "", " the"], **QUIET)
    with pytest.raises(ValueError, match="prompt 0 has no token in front of its answer"):
        projection_difference(bridge, vector(), [""], ["on"], progress=False, prepend_bos=False)
    other = SteeringVector(torch.ones(D_MODEL), "blocks.1.hook_resid_post", Recipe("given"))
    with pytest.raises(ValueError, match="vectors of one site"):
        projection_difference(bridge, [vector(), other], PROMPTS, GIVEN, **QUIET)
    with pytest.raises(ValueError, match="2 rejected answers for 3 prompts"):
        preference_disparity(bridge, tiny_sae(), PROMPTS, GIVEN, OWN[:2], **QUIET)
