import pytest
import torch

from sae_steering_plugin.adapters.activations import encode_texts
from sae_steering_plugin.edits import Add
from sae_steering_plugin.runs.contrast_outcomes import (
    TOLERATED_NATS,
    ContrastResult,
    fork,
    outcome_word,
    run_contrast,
)
from sae_steering_plugin.runs.rollouts import Arm
from sae_steering_plugin.types import Contrast, Edit
from tests.hosts import D_MODEL, SITE

BASE = Arm("base")
QUESTION = "the cat sat?\n (A) yes\n (B) no\n\nAnswer: ("
ANSWERS = Contrast(
    positive=(QUESTION + "A", "a dog ran? " + QUESTION + "B"),
    negative=(QUESTION + "B", "a dog ran? " + QUESTION + "A"),
)
TEXTS = Contrast(
    positive=("the cat sat on the mat", "a dog ran", "the cat"),
    negative=("a dog", "the mat sat", "a dog ran in the park"),
)


def loud(strength: float = 4.0) -> Arm:
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5))
    return Arm("loud", (Edit(Add(vector, strength), SITE),), method="loud", strength=strength)


def alone(model, text: str) -> torch.Tensor:
    """Next-token probabilities of one text by itself: no batch, no padding, no mask."""
    tokens = torch.tensor([encode_texts(model, [text], prepend_bos=True)[0].tokens])
    with torch.no_grad():
        return model(tokens)[0].double().softmax(dim=-1)


def test_answer_share_is_the_matching_letters_part_of_both(host):
    found = run_contrast(host, ANSWERS, [BASE], outcome="answer_share", progress=False)["base"]
    for i in range(2):
        after = alone(host, ANSWERS.positive[i][:-1])[-1]
        a, b = (
            host.tokenizer(side[i][-1], add_special_tokens=False)["input_ids"][0]
            for side in (ANSWERS.positive, ANSWERS.negative)
        )
        assert float(found.values[i]) == pytest.approx(
            float(after[a] / (after[a] + after[b])), abs=1e-5
        )


def test_swapping_the_sides_swaps_the_share(host):
    swapped = Contrast(ANSWERS.negative, ANSWERS.positive)
    one, other = (
        run_contrast(host, c, [BASE, loud()], outcome="answer_share", progress=False)
        for c in (ANSWERS, swapped)
    )
    for name in ("base", "loud"):
        assert torch.allclose(one[name].values + other[name].values, torch.ones(2), atol=1e-5)


def test_preference_is_the_difference_of_mean_log_probabilities(host):
    found = run_contrast(host, TEXTS, [BASE], outcome="preference", progress=False)["base"]

    def mean(text: str) -> float:
        tokens = encode_texts(host, [text], prepend_bos=True)[0].tokens
        after = alone(host, text)
        return sum(float(after[i - 1, t].log()) for i, t in enumerate(tokens) if i) / (
            len(tokens) - 1
        )

    expected = [mean(a) - mean(b) for a, b in zip(TEXTS.positive, TEXTS.negative, strict=True)]
    assert found.values.tolist() == pytest.approx(expected, abs=1e-4)


def test_closeness_is_minus_kl_and_zero_for_one_text(host):
    same = Contrast(TEXTS.positive, TEXTS.positive)
    found = run_contrast(host, same, [BASE, loud()], outcome="closeness", progress=False)
    assert torch.allclose(found["base"].values, torch.zeros(3), atol=1e-5)
    assert (found["loud"].values < -1e-3).all()  # the positive prompt itself is never steered
    other = run_contrast(host, TEXTS, [BASE], outcome="closeness", progress=False)["base"]
    p, q = (alone(host, side[0])[-1] for side in (TEXTS.positive, TEXTS.negative))
    assert float(other.values[0]) == pytest.approx(-float((p * (p / q).log()).sum()), abs=1e-5)


@pytest.mark.parametrize("outcome", ["answer_share", "closeness", "preference"])
def test_batches_do_not_change_a_figure(host, outcome):
    contrast = ANSWERS if outcome == "answer_share" else TEXTS
    one, other = (
        run_contrast(host, contrast, [BASE, loud()], outcome=outcome, batch_size=b, progress=False)
        for b in (1, 8)
    )
    for name in ("base", "loud"):
        assert torch.allclose(one[name].values, other[name].values, atol=1e-5)


def test_zero_strength_changes_nothing(host):
    found = run_contrast(host, TEXTS, [BASE, loud(0.0)], outcome="preference", progress=False)
    assert torch.equal(found["loud"].values, found["base"].values)
    assert found["loud"].table()["valid"].all()


def test_an_item_whose_own_text_became_unlikely_is_not_valid():
    nats = torch.tensor([-1.0, -1.0 - TOLERATED_NATS - 0.01])
    result = ContrastResult(loud(), "preference", torch.zeros(2), nats, torch.tensor([-1.0, -1.0]))
    assert result.table()["valid"].tolist() == [True, False]
    assert result.details()["method"] == "loud"


def test_unpaired_lists_are_compared_as_far_as_the_shorter_goes(host):
    loose = Contrast(TEXTS.positive, TEXTS.negative[:2], paired=False)
    found = run_contrast(host, loose, [BASE], outcome="preference", progress=False)["base"]
    assert len(found.values) == 2


def test_what_cannot_be_compared_is_refused(host):
    with pytest.raises(ValueError, match="no outcome 'score'; choose one of answer_share"):
        run_contrast(host, TEXTS, [BASE], outcome="score")
    with pytest.raises(ValueError, match="needs one arm without edits; 0 were given"):
        run_contrast(host, TEXTS, [loud()], outcome="preference")
    with pytest.raises(ValueError, match="one text begins with the other"):
        run_contrast(host, Contrast(("the cat",), ("the cat sat",)), [BASE], outcome="answer_share")


def test_a_fork_is_the_first_token_that_differs(bridge):
    high, low = (encode_texts(bridge, [t], prepend_bos=True)[0] for t in ("the cat", "the mat"))
    at = fork(high, low)
    assert high.tokens[:at] == low.tokens[:at] and high.tokens[at] != low.tokens[at]


def test_the_outcome_fits_the_set():
    assert outcome_word(ANSWERS, chat=False, answers=True) == "answer_share"
    assert outcome_word(TEXTS, chat=True, answers=False) == "closeness"
    assert outcome_word(TEXTS, chat=False, answers=False) == "preference"
