"""Identical rows computed once equal rows computed one by one: tokens, logits, caches, records.

The tolerance covers matrix products of another batch size: a few rounding errors of float32 on
logits of size ten.
"""

from typing import Any

import pytest
import torch

from sae_steering_plugin.adapters.calls import Observer
from sae_steering_plugin.adapters.engine import generate
from sae_steering_plugin.adapters.sharing import (
    bridge_forward,
    bridge_prompt,
    hooked_prompt,
    last_position_only,
    sharing_of,
    steered_logits,
)
from sae_steering_plugin.adapters.steering import SteeringError, steer
from sae_steering_plugin.edits import Add, Clamp, SparseAdd
from sae_steering_plugin.types import ALL, DECODE, LAST, PREFILL, Edit, Positions
from tests.hosts import (
    D_MODEL,
    tiny_bridge,
    tiny_hooked,
    tiny_qwen_moe,
    tiny_sae,
    tokens_of_length,
)

ROUNDING = dict(rtol=1e-5, atol=2e-5)
STRENGTHS = torch.tensor([0.0, 1.0, -2.0, 4.0])
RULES = [ALL, PREFILL, DECODE, LAST, Positions(2, 9), Positions(-3)]


@pytest.fixture(params=["bridge", "hooked", "qwen"])
def model(request: pytest.FixtureRequest) -> Any:
    return {"bridge": tiny_bridge, "hooked": tiny_hooked, "qwen": tiny_qwen_moe}[request.param]()


def top_site(model: Any) -> str:
    return f"blocks.{model.cfg.n_layers - 1}.hook_resid_pre"


def loud(rows: torch.Tensor | float = STRENGTHS, seed: int = 0) -> Add:
    generator = torch.Generator().manual_seed(seed)
    return Add(torch.randn(D_MODEL, generator=generator) * 2, rows)


def forward_passes(model: Any, block: int) -> list[int]:
    """Batch rows of each pass through a block, filled while the model runs."""
    rows: list[int] = []
    part = getattr(model.blocks[block], "original_component", model.blocks[block])
    part.register_forward_pre_hook(lambda _m, arguments: rows.append(len(arguments[0])))
    return rows


@pytest.mark.parametrize("positions", RULES, ids=str)
def test_strengths_as_rows_share_their_prompt_and_say_what_separate_runs_say(
    model: Any, positions: Positions
) -> None:
    prompt = tokens_of_length(1, 7)
    shared = generate(
        model,
        prompt.repeat(len(STRENGTHS), 1),
        [Edit(loud(), top_site(model), positions)],
        max_new_tokens=5,
        stop_at_eos=False,
    )
    for row, strength in enumerate(STRENGTHS):
        alone = generate(
            model,
            prompt,
            [Edit(loud(float(strength)), top_site(model), positions)],
            max_new_tokens=5,
            stop_at_eos=False,
            require=False,
        )
        assert torch.equal(shared.tokens[row], alone.tokens[0])
    assert len({tuple(row.tolist()) for row in shared.tokens}) > 1


@pytest.mark.parametrize("positions", RULES, ids=str)
def test_the_record_is_the_same_shared_and_unshared(model: Any, positions: Positions) -> None:
    prompts = tokens_of_length(2, 6).repeat_interleave(2, dim=0)
    runs = [
        generate(
            model,
            prompts,
            [Edit(loud(), top_site(model), positions)],
            max_new_tokens=4,
            stop_at_eos=False,
            share=share,
        )
        for share in (True, False)
    ]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    first, second = (run.record.edits[0] for run in runs)
    assert first.fired == second.fired
    assert torch.equal(first.tokens_per_row[0], second.tokens_per_row[0])
    assert first.displacement == pytest.approx(second.displacement, rel=1e-5)


def test_identical_rows_run_the_lower_layers_once(model: Any) -> None:
    below = forward_passes(model, 0)
    above = forward_passes(model, model.cfg.n_layers - 1)
    prompts = tokens_of_length(2, 6).repeat_interleave(2, dim=0)
    generate(model, prompts, [Edit(loud(), top_site(model))], max_new_tokens=3, stop_at_eos=False)
    assert below == [2, 4, 4]
    assert above == [4, 4, 4]


def test_decode_only_edits_and_no_edits_share_the_whole_prompt(model: Any) -> None:
    above = forward_passes(model, model.cfg.n_layers - 1)
    prompts = tokens_of_length(1, 6).repeat(4, 1)
    edit = Edit(loud(), top_site(model), DECODE)
    generate(model, prompts, [edit], max_new_tokens=3, stop_at_eos=False)
    generate(model, prompts, max_new_tokens=2, stop_at_eos=False)
    assert above == [1, 4, 4, 1, 4]


def test_rows_that_differ_or_share_false_run_one_by_one(model: Any) -> None:
    below = forward_passes(model, 0)
    edit = Edit(loud(), top_site(model))
    generate(model, tokens_of_length(4, 6), [edit], max_new_tokens=1, stop_at_eos=False)
    same = tokens_of_length(1, 6).repeat(4, 1)
    generate(model, same, [edit], max_new_tokens=1, stop_at_eos=False, share=False)
    assert below == [4, 4]


def test_the_cache_of_a_shared_prompt_holds_every_layer_for_every_row(model: Any) -> None:
    tokens = tokens_of_length(2, 6)[torch.tensor([0, 1, 0, 0])]
    mask = torch.ones_like(tokens)
    observer = Observer.of(model)
    edit = Edit(loud(), top_site(model))
    found = []
    for distinct in (True, False):
        sharing = sharing_of(model, tokens, mask, [edit])
        assert sharing is not None and sharing.depth == model.cfg.n_layers - 1
        with steer(model, edit), observer.generating(tokens, mask) as scope, torch.no_grad():
            if hasattr(model, "original_model"):
                forward = bridge_forward(model)
                if distinct:
                    logits, cache = bridge_prompt(model, observer, forward, tokens, mask, sharing)
                else:
                    output = forward(tokens, mask)
                    logits, cache = output.logits, output.past_key_values
                found.append((logits, *states(cache)))
            else:
                logits, cache = hooked_prompt(model, observer, scope, tokens, mask, sharing)
                if not distinct:
                    cache = type(cache).init_cache(model.cfg, "cpu", len(tokens))
                    logits = model(tokens, attention_mask=mask, past_kv_cache=cache)
                keys = [entry.past_keys for entry in cache.entries]
                values = [entry.past_values for entry in cache.entries]
                found.append((logits, *keys, *values, cache.previous_attention_mask))
    for shared, plain in zip(*found, strict=True):
        assert shared.shape == plain.shape
        torch.testing.assert_close(shared, plain, **ROUNDING)


def states(cache: Any) -> list[torch.Tensor]:
    """Keys and values of attention layers, conv and recurrent states of linear ones, in order."""
    found = []
    for layer in cache.layers:
        if hasattr(layer, "keys"):
            found += [layer.keys, layer.values]
        else:
            found += [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return found


@pytest.mark.parametrize("last_only", [False, True])
def test_teacher_forced_logits_equal_those_of_separate_passes(model: Any, last_only: bool) -> None:
    texts = tokens_of_length(2, 7)
    site = top_site(model)
    together = steered_logits(
        model, texts, [Edit(loud(torch.cat([STRENGTHS, STRENGTHS])), site)], copies=4,
        last_only=last_only,
    )  # fmt: skip
    for i in range(2):
        for j, strength in enumerate(STRENGTHS):
            with steer(model, Edit(loud(float(strength)), site), require=False), torch.no_grad():
                alone = model(texts[i : i + 1])[0]
            torch.testing.assert_close(
                together[4 * i + j], alone[-1] if last_only else alone, **ROUNDING
            )


def test_edits_at_several_sites_share_below_the_lowest(model: Any) -> None:
    below = forward_passes(model, 0)
    edits = [
        Edit(loud(seed=1), "blocks.1.hook_resid_pre", PREFILL),
        Edit(loud(0.5, seed=2), "blocks.1.hook_resid_post"),
        Edit(loud(1.0, seed=3), top_site(model), rows=[1, 2]),
    ]
    texts = tokens_of_length(1, 6)
    shared, plain = (steered_logits(model, texts, edits, copies=4, share=s) for s in (True, False))
    torch.testing.assert_close(shared, plain, **ROUNDING)
    assert below == [1, 4]


@pytest.mark.parametrize("host", [tiny_bridge, tiny_hooked])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_code_edits_share_below_their_dictionary(host: Any, architecture: str) -> None:
    model = host()
    sae = tiny_sae(architecture)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    amounts = torch.zeros(32)
    amounts[[3, 8]] = torch.tensor([1.0, -1.0])
    edits = [SparseAdd(sae, amounts, STRENGTHS), Clamp(sae, 5, 2.0)]
    texts = tokens_of_length(1, 6)
    shared, plain = (steered_logits(model, texts, edits, copies=4, share=s) for s in (True, False))
    torch.testing.assert_close(shared, plain, **ROUNDING)
    assert (shared[0] - shared[3]).abs().max() > 1e-3


def test_left_padded_prompts_share(model: Any) -> None:
    tokens = tokens_of_length(2, 7)
    mask = torch.ones_like(tokens)
    tokens[1, :3], mask[1, :3] = 0, 0
    tokens, mask = tokens.repeat(2, 1), mask.repeat(2, 1)
    runs = [
        generate(
            model,
            tokens,
            [Edit(loud(), top_site(model), Positions(1, 6))],
            attention_mask=mask,
            max_new_tokens=4,
            stop_at_eos=False,
            share=share,
        )
        for share in (True, False)
    ]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert runs[0].record.to_dict()[0]["tokens"] == runs[1].record.to_dict()[0]["tokens"]


def test_sampled_rows_draw_the_same_tokens_shared_and_unshared(model: Any) -> None:
    options: dict[str, Any] = dict(temperature=1.0, seed=3, max_new_tokens=6, stop_at_eos=False)
    prompts = tokens_of_length(1, 5).repeat(4, 1)
    edit = Edit(loud(), top_site(model))
    runs = [generate(model, prompts, edit, share=share, **options) for share in (True, False)]
    assert torch.equal(runs[0].tokens, runs[1].tokens)


def test_a_hook_of_the_user_sees_every_row(model: Any) -> None:
    rows: list[int] = []
    prompts = tokens_of_length(1, 5).repeat(4, 1)
    name = "blocks.0.hook_in" if hasattr(model, "original_model") else "blocks.0.hook_resid_pre"
    with model.hooks(fwd_hooks=[(name, lambda x, hook: rows.append(len(x)))]):
        generate(model, prompts, Edit(loud(), top_site(model)), max_new_tokens=2, stop_at_eos=False)
        generate(
            model,
            prompts,
            Edit(loud(), top_site(model), DECODE),
            max_new_tokens=2,
            stop_at_eos=False,
        )
    assert rows == [4] * 4


def test_an_outer_steering_block_keeps_its_rows(model: Any) -> None:
    prompts = tokens_of_length(1, 5).repeat(4, 1)
    found = []
    for share in (True, False):
        with steer(model, Edit(loud(seed=5), "blocks.0.hook_resid_pre", PREFILL)) as record:
            out = generate(
                model,
                prompts,
                Edit(loud(), top_site(model), DECODE),
                max_new_tokens=3,
                stop_at_eos=False,
                share=share,
            )
        found.append((out.tokens, record.edits[0].tokens_per_row[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].tolist() == [5] * 4


def test_prompt_lengths_inside_the_prompt_are_not_shared_over(model: Any) -> None:
    prompts = tokens_of_length(1, 6).repeat(4, 1)
    runs = [
        generate(
            model,
            prompts,
            Edit(loud(), top_site(model), DECODE),
            prompt_lengths=3,
            max_new_tokens=3,
            stop_at_eos=False,
            share=share,
        )
        for share in (True, False)
    ]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert runs[0].record.edits[0].tokens_per_row[0].tolist() == [5] * 4


def forwards(model: Any) -> list[str]:
    """Parts whose `forward` hides that of their class (HookedTransformer itself has such parts)."""
    return [name for name, part in model.named_modules() if "forward" in part.__dict__]


def test_nothing_is_left_on_the_model_after_a_failure(model: Any) -> None:
    prompts = tokens_of_length(1, 6).repeat(4, 1)
    wrong = Edit(Add(torch.ones(D_MODEL + 1), STRENGTHS), top_site(model))
    own = forwards(model)
    before = generate(model, prompts, max_new_tokens=3, stop_at_eos=False).tokens
    with pytest.raises(ValueError, match="built for another model or site"):
        generate(model, prompts, wrong, max_new_tokens=3)
    assert forwards(model) == own
    assert Observer.of(model).member is None and Observer.of(model).users == 0
    after = generate(model, prompts, max_new_tokens=3, stop_at_eos=False).tokens
    assert torch.equal(before, after)


def test_a_compiled_model_is_refused_before_anything_is_shared(model: Any) -> None:
    wrapped = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match="this model is compiled"):
        steered_logits(wrapped, tokens_of_length(1, 4), Edit(loud(), top_site(model)), copies=4)


def test_last_only_refuses_right_padding(model: Any) -> None:
    mask = torch.tensor([[1, 1, 1, 0]])
    with pytest.raises(ValueError, match="pad on the left"):
        steered_logits(model, tokens_of_length(1, 4), attention_mask=mask, last_only=True)


def test_an_edit_that_steers_nothing_is_still_an_error(model: Any) -> None:
    edit = Edit(loud(), top_site(model), DECODE)
    with pytest.raises(SteeringError, match="steered no token"):
        steered_logits(model, tokens_of_length(1, 4), edit, copies=4)


def test_the_whole_sequence_is_unembedded_for_a_hook_on_the_unembedding() -> None:
    model = tiny_bridge()
    columns: list[int] = []
    with model.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: columns.append(x.shape[1]))]):
        with last_position_only(model), torch.no_grad():
            assert model(tokens_of_length(1, 4)).shape[1] == 4
        generate(model, tokens_of_length(1, 4), max_new_tokens=2, stop_at_eos=False)
    assert columns == [4, 4, 1]
