from typing import Any

import pytest
import torch

from sae_steering_plugin.adapters.dialogue import Dialogue, common_length, keeps_turns
from sae_steering_plugin.adapters.engine import generate
from sae_steering_plugin.edits.shift import Add
from sae_steering_plugin.runs.agent_loop import left_padded
from sae_steering_plugin.runs.noise import gumbel_noise, noise_key
from sae_steering_plugin.types import DECODE, Edit
from tests.hosts import D_MODEL, SITE, tiny_bridge

STOPS = tuple(range(3, 40))  # many stop tokens, so that rows end at different steps


def afresh(
    model: Any, prompts: list[list[int]], edits: list[Edit], **options: Any
) -> list[list[int]]:
    tokens, mask = left_padded(prompts, pad=0)
    made = generate(
        model, tokens, edits, attention_mask=mask, stop_ids=STOPS, require=False, **options
    )
    return [row.tolist() for row in made.new_tokens]


def shifts(rows: int) -> list[Edit]:
    vectors = 2 * torch.randn(rows, D_MODEL, generator=torch.Generator().manual_seed(3))
    return [Edit(Add(vectors), SITE)]


def words(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(40, 300, (length,), generator=generator).tolist()


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_turns_with_a_kept_cache_equal_turns_computed_afresh(steered, temperature):
    model = tiny_bridge(n_ctx=256)
    dialogue = Dialogue(model)
    rows = [0, 1, 2, 3]
    prompts = [[1, *words(row, 3 + 4 * row)] for row in rows]
    lengths = set()
    for turn in range(4):
        edits = [Edit(Add(shifts(4)[0].change.vector[rows]), SITE)] if steered else []
        noise = gumbel_noise([noise_key(0, row, turn) for row in rows], model.cfg.d_vocab)
        options = {"max_new_tokens": 6, "temperature": temperature}
        if temperature:
            options["noise"] = noise
        kept = dialogue.answer(prompts, edits, stop_ids=STOPS, **options)
        new = [row.tolist() for row in kept.new_tokens]
        assert new == afresh(model, prompts, edits, **options)
        lengths |= set(map(len, new))
        prompts = [
            p + n + [3, *words(9 * turn + r, 2 + r)]
            for p, n, r in zip(prompts, new, rows, strict=True)
        ]
        if turn == 1:  # a row leaves, two others swap
            prompts, rows = [prompts[3], prompts[0], prompts[2]], [3, 0, 2]
            dialogue.keep([3, 0, 2])
        if turn == 2:  # an ending is rendered otherwise than it was written
            prompts[1] = prompts[1][:-4] + words(77, 5)
    assert len(lengths) > 1


def test_only_new_tokens_are_fed():
    model = tiny_bridge(n_ctx=256)
    fed: list[int] = []
    handle = model.original_model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(args[0].shape[1]), with_kwargs=True
    )
    dialogue = Dialogue(model)
    prompt = [1, *words(0, 30)]
    (first,) = dialogue.answer([prompt], max_new_tokens=4).new_tokens
    longer = prompt + first.tolist() + words(1, 5)
    dialogue.answer([longer], max_new_tokens=1)
    handle.remove()
    assert fed == [31, 1, 1, 1, 6]  # the last new token was never fed
    dialogue.answer([longer], max_new_tokens=1)  # nothing new: the last token is fed again
    assert [len(ids) for ids in dialogue.ids] == [len(longer)]


def test_the_record_counts_what_was_steered(bridge):
    dialogue = Dialogue(bridge)
    kept = dialogue.answer([[1, *words(0, 4)]], shifts(1), max_new_tokens=3)
    assert kept.record is not None
    assert kept.record.edits[0].tokens == 4 + 2


def test_rows_cannot_change_unnoticed(bridge):
    dialogue = Dialogue(bridge)
    dialogue.answer([[1, 50], [1, 60]], max_new_tokens=1)
    with pytest.raises(ValueError, match="1 prompts for a dialogue of 2 rows: call keep"):
        dialogue.answer([[1, 50]], max_new_tokens=1)
    with pytest.raises(ValueError, match="needs noise"):
        dialogue.answer([[1, 50], [1, 60]], max_new_tokens=1, temperature=1.0)


def test_only_plain_caches_and_edits_at_every_position_are_kept(bridge, hooked):
    assert keeps_turns(bridge, [])
    assert keeps_turns(bridge, shifts(1))
    assert not keeps_turns(bridge, [Edit(Add(torch.ones(D_MODEL)), SITE, DECODE)])
    assert not keeps_turns(hooked, [])


def test_common_length_by_hand():
    assert common_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_length([1, 2], [1, 2, 3]) == 2
    assert common_length([], [1]) == 0
