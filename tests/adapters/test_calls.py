from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sae_steering_plugin.adapters.calls import Sequence, wanted_number
from sae_steering_plugin.adapters.steering import steer
from sae_steering_plugin.adapters.transformer_lens import is_bridge
from sae_steering_plugin.edits import Add, Clamp
from sae_steering_plugin.types import ALL, DECODE, LAST, PREFILL, Edit, Positions
from tests.hosts import D_MODEL, SITE, tiny_sae
from tests.oracles import (
    BOS,
    fed_by_hand,
    hooked_cache,
    kept_batch,
    padded_batch,
    shared_host,
    tapped,
)

hosts = pytest.mark.parametrize("name", ["bridge", "hooked"])
EXAMPLES = 60
PUSH = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5)) * 3
SAE = tiny_sae("standard")


@dataclass(frozen=True)
class Feeding:
    """A padded batch, how it is fed, and where its prompts end."""

    tokens: torch.Tensor
    mask: torch.Tensor
    prompt_columns: int
    widths: list[int]

    @property
    def prompt_lengths(self):
        return self.mask[:, : self.prompt_columns].sum(dim=1).tolist()


@st.composite
def feedings(draw, *, chunked=True, sides=("left", "right")):
    """Rows of 1 to 6 prompt tokens, BOS first or not, then 0 to 3 tokens for every row."""
    text = st.sampled_from([BOS, 2, 5, 6, 7, 40])
    rows = draw(st.lists(st.lists(text, min_size=1, max_size=6), min_size=1, max_size=3))
    if draw(st.booleans()):
        rows = [[BOS, *row[1:]] for row in rows]
    prompt, mask = padded_batch(rows, draw(st.sampled_from(sides)))
    columns, steps = prompt.shape[1], draw(st.integers(0, 3))
    new = torch.tensor(draw(st.lists(text, min_size=len(rows) * steps, max_size=len(rows) * steps)))
    tokens = torch.cat([prompt, new.long().reshape(len(rows), steps)], dim=1)
    mask = torch.cat([mask, mask.new_ones(len(rows), steps)], dim=1)
    cuts = draw(st.sets(st.integers(1, columns - 1))) if chunked and columns > 1 else set()
    ends = [*sorted(cuts), columns, *range(columns + 1, columns + steps + 1)]
    widths = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    return Feeding(tokens, mask, columns, widths)


@st.composite
def rules(draw):
    try:
        return Positions(
            draw(st.integers(-4, 4)),
            draw(st.none() | st.integers(-4, 5)),
            draw(st.sampled_from(["all", "prefill", "decode"])),
            draw(st.booleans()),
        )
    except ValueError:
        assume(False)


def run(name, feeding, edit, *, mask=True, cached=True, prompt_lengths=None):
    """Activations at the site before and after the edit, `[batch, pos]`, and the record."""
    model = shared_host(name)
    with tapped(model) as before:
        steered = steer(model, edit, prompt_lengths=prompt_lengths, require=False)
        with steered as record, tapped(model) as after:
            given_mask = feeding.mask if mask else None
            fed_by_hand(model, feeding.tokens, feeding.widths, given_mask, cached=cached)
    if not cached:
        return before[-1], after[-1], record
    return torch.cat(before, dim=1), torch.cat(after, dim=1), record


def assert_pushed(before, after, kept):
    wanted = torch.where(kept[..., None], before + PUSH, before)
    assert torch.equal(after, wanted)  # not one bit of an unwanted token moves


@hosts
@settings(max_examples=EXAMPLES, deadline=None)
@given(feeding=feedings(), rule=rules())
def test_a_chunked_cached_text_is_steered_where_a_slow_loop_says(name, feeding, rule):
    lengths = feeding.prompt_lengths
    kept = kept_batch(rule, feeding.tokens, feeding.mask, lengths)
    before, after, record = run(name, feeding, Edit(Add(PUSH), SITE, rule), prompt_lengths=lengths)
    assert_pushed(before, after, kept)
    found = record.edits[0]
    assert found.fired == len(feeding.widths)
    assert found.tokens == int(kept.sum())
    assert sum(found.tokens_per_row).tolist() == kept.sum(dim=1).tolist()


@hosts
@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(feeding=feedings(chunked=False), rule=rules())
def test_the_first_pass_on_an_empty_cache_is_the_prompt(name, feeding, rule):
    kept = kept_batch(rule, feeding.tokens, feeding.mask, feeding.prompt_lengths)
    before, after, record = run(name, feeding, Edit(Add(PUSH), SITE, rule))
    assert_pushed(before, after, kept)
    assert record.edits[0].tokens == int(kept.sum())


@hosts
@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(feeding=feedings(), rule=rules(), cached=st.booleans(), data=st.data())
def test_a_prompt_may_end_anywhere_the_caller_says(name, feeding, rule, cached, data):
    rows = len(feeding.tokens)
    lengths = data.draw(st.lists(st.integers(1, 10), min_size=rows, max_size=rows))
    kept = kept_batch(rule, feeding.tokens, feeding.mask, lengths)
    edit = Edit(Add(PUSH), SITE, rule)
    before, after, _ = run(name, feeding, edit, cached=cached, prompt_lengths=lengths)
    assert_pushed(before, after, kept)


@hosts
@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(feeding=feedings(), rule=rules())
def test_uncached_feeding_steers_the_tokens_that_cached_feeding_steers(name, feeding, rule):
    lengths = feeding.prompt_lengths
    kept = kept_batch(rule, feeding.tokens, feeding.mask, lengths)
    edit = Edit(Add(PUSH), SITE, rule)
    before, after, _ = run(name, feeding, edit, cached=False, prompt_lengths=lengths)
    assert_pushed(before, after, kept)


@hosts
@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(feeding=feedings(sides=("left",)), rule=rules())
def test_padding_is_found_without_a_mask(name, feeding, rule):
    lengths = feeding.prompt_lengths
    kept = kept_batch(rule, feeding.tokens, feeding.mask, lengths)
    edit = Edit(Add(PUSH), SITE, rule)
    before, after, _ = run(name, feeding, edit, mask=False, prompt_lengths=lengths)
    assert_pushed(before, after, kept)


@hosts
@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(feeding=feedings(), rule=rules())
def test_an_edit_of_codes_moves_only_wanted_tokens(name, feeding, rule):
    lengths = feeding.prompt_lengths
    kept = kept_batch(rule, feeding.tokens, feeding.mask, lengths)
    edit = Edit(Clamp(SAE, [3, 8], 50.0), SITE, rule)
    before, after, _ = run(name, feeding, edit, prompt_lengths=lengths)
    assert torch.equal(after[~kept], before[~kept])
    assert (after[kept] - before[kept]).norm(dim=-1).gt(1).all()


@settings(max_examples=200, deadline=None)
@given(feeding=feedings(), rule=rules(), data=st.data())
def test_prefill_and_decode_part_every_rule_and_padding_is_in_none(feeding, rule, data):
    real = feeding.mask.bool()
    index = real.long().cumsum(dim=1) - 1
    bos = (index == 0) & real & (feeding.tokens == BOS)
    lengths = torch.tensor(feeding.prompt_lengths)

    def keep(phase):
        wanted = Positions(rule.start, rule.stop, phase, rule.bos)
        return wanted.keep(index, lengths, real, bos)

    prefill, decode, everything = keep("prefill"), keep("decode"), keep("all")
    assert not (prefill & decode).any()
    assert torch.equal(prefill | decode, everything)
    assert not (everything & ~real).any()
    slow = kept_batch(rule, feeding.tokens, feeding.mask, feeding.prompt_lengths)
    assert torch.equal(keep(rule.phase), slow)


@hosts
@pytest.mark.parametrize("rule", [ALL, PREFILL, DECODE, LAST], ids=str)
def test_a_one_token_prompt_is_a_prompt(name, rule):
    tokens = torch.tensor([[9, 10, 11]])
    feeding = Feeding(tokens, torch.ones_like(tokens), 1, [1, 1, 1])
    kept = kept_batch(rule, tokens, feeding.mask, [1])
    before, after, _ = run(name, feeding, Edit(Add(PUSH), SITE, rule))
    assert_pushed(before, after, kept)


@hosts
def test_a_row_that_begins_late_is_padding_until_then(name):
    tokens, mask = padded_batch([[BOS, 5], [BOS, 5, 6, 7, 8, 9]], "left")
    feeding = Feeding(tokens, mask, 1, [1] * 6)
    for rule, lengths in ((ALL, None), (ALL, [1, 1]), (DECODE, [2, 3]), (PREFILL, [1, 4])):
        kept = kept_batch(rule, tokens, mask, [0, 1] if lengths is None else lengths)
        edit = Edit(Add(PUSH), SITE, rule)
        before, after, record = run(name, feeding, edit, prompt_lengths=lengths)
        assert_pushed(before, after, kept)
        assert record.edits[0].tokens == int(kept.sum())


@hosts
def test_interleaved_texts_keep_their_own_counts(name):
    model = shared_host(name)
    one = torch.tensor([[BOS, 5, 6, 7]])
    two = torch.tensor([[8, 9, 10, 11, 12, 13], [14, 15, 16, 17, 18, 19]])
    edit = Edit(Add(PUSH), SITE, Positions(2, 4))
    with steer(model, edit) as record, torch.no_grad():
        runs = [_started(model, one[:, :3]), _started(model, two[:, :1])]
        for step in range(4):
            if step < 1:
                runs[0](one[:, 3 + step : 4 + step])
            runs[1](two[:, 1 + step : 2 + step])
    assert [counts.tolist() for counts in record.edits[0].tokens_per_row] == [[2], [2, 2]]


def _started(model, tokens):
    """A text on its own cache; calling it feeds more tokens."""
    if is_bridge(model):
        state = {"cache": model.original_model(tokens, use_cache=True).past_key_values}

        def more(chunk):
            out = model.original_model(chunk, past_key_values=state["cache"], use_cache=True)
            state["cache"] = out.past_key_values

        return more
    cache = hooked_cache(model, len(tokens))
    model(tokens, past_kv_cache=cache)
    return lambda chunk: model(chunk, past_kv_cache=cache)


@hosts
def test_a_conversation_that_grows_keeps_the_prompt_it_was_told(name):
    model = shared_host(name)
    tokens = torch.tensor([[BOS, *range(5, 14)]])
    edit = Edit(Add(PUSH), SITE, DECODE)
    with (
        tapped(model) as before,
        steer(model, edit, prompt_lengths=3),
        tapped(model) as after,
        torch.no_grad(),
    ):
        for turn in (4, 7, 10):  # each turn feeds the whole conversation again
            model(tokens[:, :turn])
    for turn, b, a in zip((4, 7, 10), before, after, strict=True):
        assert_pushed(b, a, torch.tensor([[i >= 3 for i in range(turn)]]))


@hosts
def test_turns_on_one_cache_are_prompt_only_where_told(name):
    tokens = torch.tensor([[BOS, *range(5, 14)]])
    feeding = Feeding(tokens, torch.ones_like(tokens), 3, [3, 3, 4])
    for rule in (PREFILL, DECODE):
        kept = kept_batch(rule, tokens, feeding.mask, [3])
        before, after, _ = run(name, feeding, Edit(Add(PUSH), SITE, rule))
        assert_pushed(before, after, kept)
    kept = kept_batch(PREFILL, tokens, feeding.mask, [6])
    edit = Edit(Add(PUSH), SITE, PREFILL)
    before, after, _ = run(name, feeding, edit, prompt_lengths=[6])
    assert_pushed(before, after, kept)


def test_a_rule_that_holds_no_token_is_refused():
    for start, stop in ((3, 3), (5, 2), (-1, -1), (-1, -3)):
        with pytest.raises(ValueError, match=rf"Positions\({start}, {stop}\) holds no token"):
            Positions(start, stop)
    assert Positions(2, -1).stop == -1  # the sides differ: known only when the prompt is


@settings(deadline=None)
@given(
    rule=rules(),
    lengths=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    step=st.integers(0, 6),
)
def test_decoded_tokens_told_apart_by_number_are_those_the_mask_keeps(rule, lengths, step):
    prompt = torch.tensor(lengths)
    index = (prompt + step)[:, None]
    real = torch.ones_like(index, dtype=torch.bool)
    bos = index == 0
    kept = rule.keep(index, prompt, real, bos)
    told = wanted_number(rule, int(index.min()), int(index.max()))
    if told is not None:
        assert bool(kept.all() if told else not kept.any())
    elif len(set(lengths)) == 1:
        assert int(index.min()) == 0  # only a leading BOS needs a look at the tokens


@settings(deadline=None)
@given(padding=st.lists(st.integers(0, 5), min_size=1, max_size=4), more=st.integers(0, 3))
def test_a_sequence_numbers_its_next_token_by_its_real_ones(padding, more):
    real = torch.arange(6)[None] >= torch.tensor(padding)[:, None]
    text = Sequence(len(padding), real, 6, 6, real.sum(dim=1))
    counts = [6 - pads + more for pads in padding]
    assert text.numbers(6 + more) == (min(counts), max(counts))
    text.real = torch.cat([real, real[:, -1:]], dim=1)
    assert text.numbers(7 + more) == (min(counts) + 1, max(counts) + 1)
