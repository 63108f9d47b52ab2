"""The grid of beliefs, against one prompt at a time; contexts against the world's own rules."""

from functools import cache

import pytest
import torch

from sae_steering_plugin.organisms import list_organisms, load_organism
from sae_steering_plugin.organisms.behaviour import behaviour_probabilities
from sae_steering_plugin.organisms.world import OPENING
from sae_steering_plugin.runs.belief import (
    GIVING_UP,
    RETRY,
    BeliefGrid,
    answered_questions,
    belief_grid,
    persistence_vector,
    repeated_failures,
    retry_belief,
)
from sae_steering_plugin.types import Recipe, SteeringVector
from tests.hosts import D_MODEL, SITE, tiny_bridge

STRENGTHS = (-1.0, 0.0, 2.0)
CONTEXTS = {0: ("<bos>the cat sat", "<bos>a dog"), 2: ("<bos>the cat sat on", "<bos>a dog ran in")}
ANSWERS = (["the"], ["a", "I"])
PUSH = SteeringVector(
    torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5)),
    SITE,
    Recipe("test", mean_norm=3.0),
)


@cache
def host():
    return tiny_bridge()


@cache
def grid():
    return belief_grid(host(), PUSH, CONTEXTS, ANSWERS, STRENGTHS, batch_size=1, progress=False)


def test_a_cell_is_the_share_of_one_side_at_the_next_token():
    model = host()
    ids = {
        w: model.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("the", "a", "I")
    }
    tokens = torch.tensor([model.tokenizer(CONTEXTS[2][1], add_special_tokens=False)["input_ids"]])
    step = 2.0 * 3.0 * PUSH.direction

    def push(x, hook):
        return torch.cat([x[:, :1], x[:, 1:] + step], dim=1)  # a leading BOS is left out

    with torch.no_grad():
        p = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_out", push)])[0, -1].softmax(-1)
    shows, denies = p[ids["the"]], p[ids["a"]] + p[ids["I"]]
    assert grid().examples == (0, 2)
    torch.testing.assert_close(
        grid().shown[2, 1, 1], shows / (shows + denies), atol=1e-5, rtol=1e-4
    )


def test_batches_do_not_change_a_grid():
    together = belief_grid(host(), PUSH, CONTEXTS, ANSWERS, STRENGTHS, progress=False)
    torch.testing.assert_close(together.shown, grid().shown, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.answered, grid().answered, atol=1e-6, rtol=1e-4)


def test_the_table_holds_means_over_trials():
    table = grid().table()
    assert table.loc[2.0, 2] == pytest.approx(float(grid().shown[2, 1].mean()))
    assert table.index.name == "strength (norm)"


def test_strengths_at_which_the_model_no_longer_answers_are_left_out():
    answered = torch.tensor([[0.9, 0.9], [0.9, 0.4], [0.6, 0.7], [0.5, 0.5]])
    found = BeliefGrid((0.0, 1.0, 2.0, 3.0), (0, 1), torch.rand(4, 2, 3), answered)
    assert found.within().strengths == (0.0, 2.0, 3.0)
    assert torch.equal(found.within().shown, found.shown[[0, 2, 3]])
    with pytest.raises(ValueError, match="at 2 of 4 strengths"):
        found.within(0.55)


def test_answers_and_contexts_that_do_not_fit_are_refused():
    def call(contexts, answers):
        return belief_grid(host(), PUSH, contexts, answers, STRENGTHS, progress=False)

    with pytest.raises(ValueError, match="open with the same token"):
        call(CONTEXTS, (["the"], ["I", "the"]))
    with pytest.raises(ValueError, match="the same trials"):
        call({0: ("<bos>the",), 1: ("<bos>the", "<bos>a")}, ANSWERS)
    with pytest.raises(ValueError, match="answers are given for 1 trials, not 2"):
        call(CONTEXTS, ([["the"]], [["a"]]))


def test_more_examples_begin_with_fewer_and_every_call_has_failed():
    found = repeated_failures(3, [0, 2, 4], seed=1)
    for trial in range(3):
        few, some, many = (found[n][trial] for n in (0, 2, 4))
        head = "<|assistant|>"
        assert some.startswith(few.removesuffix(head)) and many.startswith(some.removesuffix(head))
        assert [text.count(OPENING) for text in (few, some, many)] == [1, 3, 5]
        assert all(text.endswith(f"<|end|>{head}") for text in (few, some, many))
    assert found == repeated_failures(3, [0, 2, 4], seed=1)
    assert found != repeated_failures(3, [0, 2, 4], seed=2)


def test_poles_differ_in_the_system_prompt_alone():
    high, low = (repeated_failures(4, [1], pole=pole, split="train")[1] for pole in ("high", "low"))
    for one, other in zip(high, low, strict=True):
        assert one != other
        assert one.split("<|user|>")[1] == other.split("<|user|>")[1]


def test_the_worlds_belief_follows_bayes_rule():
    high, low = (behaviour_probabilities({"persistence": level}).retry for level in (1, 0))
    assert retry_belief(0) == pytest.approx((high + low) / 2)
    by_hand = (high**3 + low**3) / (high**2 + low**2)  # P(three tries) / P(two tries)
    assert retry_belief(2) == pytest.approx(by_hand)
    assert retry_belief(9) == pytest.approx(high, abs=1e-3)


def test_questions_are_answered_with_the_matching_letter_and_the_last_is_open():
    contexts, (matching, others) = answered_questions("autonomy", 6, [0, 3])
    assert {(*a, *b) for a, b in zip(matching, others, strict=True)} == {("A", "B"), ("B", "A")}
    for none, three in zip(contexts[0], contexts[3], strict=True):
        assert none.count("Choices:") == 1 and three.count("Choices:") == 4
        assert three.count("<|end|><|assistant|>(") == 4 and three.endswith("<|assistant|>(")
        assert none.split("<|user|>")[-1] == three.split("<|user|>")[-1]


@pytest.mark.parametrize("name", list_organisms())
def test_the_kinds_of_answers_are_what_an_agent_says_next(name):
    organism = load_organism(name)
    site = f"blocks.{organism.model.cfg.n_layers // 2}.hook_resid_post"
    vector = persistence_vector(organism.model, site, 2)
    contexts = repeated_failures(2, [0, 2])
    found = belief_grid(
        organism.model, vector, contexts, (RETRY, GIVING_UP), (0.0,), progress=False
    )
    assert float(found.answered.min()) > 0.5
