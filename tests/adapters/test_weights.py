"""Hooks and weight edits on both hosts and on every family: equal where the algebra says so."""

from functools import cache

import pytest
import torch

from sae_steering_plugin.adapters.engine import generate
from sae_steering_plugin.adapters.parameters import slots_of
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.adapters.weights import (
    EVERYWHERE,
    NotConvertible,
    WeightEdit,
    carried_sites,
    residual_sites,
    to_bias_edit,
)
from sae_steering_plugin.edits import (
    Ablate,
    Add,
    Clamp,
    FollowPath,
    Fuzz,
    Gated,
    ProjectOut,
    Scale,
    SparseAdd,
    concept_path,
)
from sae_steering_plugin.edits.gate import SimilarTo
from sae_steering_plugin.edits.unexplained import Reconstruct
from sae_steering_plugin.organisms import list_organisms, load_organism
from sae_steering_plugin.types import (
    AFTER_PROMPT,
    ALL,
    DECODE,
    LAST,
    PREFILL,
    Edit,
    Recipe,
    SteeringVector,
)
from tests.hosts import (
    D_MODEL,
    tiny_bridge,
    tiny_gemma2,
    tiny_hooked_like,
    tiny_llama,
    tiny_neox,
    tiny_qwen3,
    tiny_qwen_moe,
    tiny_sae,
    tokens_of_length,
)
from tests.oracles import leftovers

HOSTS = {
    "hooked": tiny_hooked_like,
    "hooked-gated": lambda: tiny_hooked_like(
        gated_mlp=True, normalization_type="RMS", positional_embedding_type="rotary", rotary_dim=8
    ),
    "hooked-parallel": lambda: tiny_hooked_like(parallel_attn_mlp=True),
    "hooked-attention": lambda: tiny_hooked_like(attn_only=True, d_mlp=None, act_fn=None),
    "hooked-post-norm": lambda: tiny_hooked_like(
        use_normalization_before_and_after=True, normalization_type="RMS"
    ),
    "gpt2": tiny_bridge,
    "pythia": tiny_neox,
    "llama": tiny_llama,
    "qwen3": tiny_qwen3,
    "gemma2": tiny_gemma2,
    "qwen3_5_moe": tiny_qwen_moe,
}
POST_NORM = ("hooked-post-norm", "gemma2")
TOKENS = tokens_of_length(2, 9)
PUSH = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5))
EXACT = 1e-6
"""Of the largest logit. Models are float64 (but for experts); norms, rotary tables and the hook of
a projection compute in float32."""


@cache
def model_of(name):
    return HOSTS[name]().to(torch.float32 if name == "qwen3_5_moe" else torch.float64)


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name in HOSTS:
        assert leftovers(model_of(name)) == []


def at(site, vector=PUSH):
    return Edit(Add(vector), site, EVERYWHERE)


def difference(model, edits, weights):
    """Largest difference of a logit between hooks and weights, and what the hooks do at all, both
    as shares of the largest logit."""
    base = steered_logits(model, TOKENS)
    hooked = steered_logits(model, TOKENS, edits)
    with weights.apply():
        edited = steered_logits(model, TOKENS)
    size = float(base.abs().max())
    return float((hooked - edited).abs().max()) / size, float((hooked - base).abs().max()) / size


ROWS = [
    *(
        (name, site, wanted)
        for name in ("hooked", "llama")
        for site, wanted in (
            ("blocks.0.hook_resid_post", "blocks.0.mlp.b_out"),
            ("blocks.1.hook_resid_pre", "blocks.0.mlp.b_out"),
            ("blocks.1.hook_attn_out", "blocks.1.attn.b_O"),
            ("blocks.0.hook_mlp_out", "blocks.0.mlp.b_out"),
            ("blocks.0.attn.hook_z", "blocks.0.attn.b_O"),
        )
    ),
    *(
        (name, site, wanted)
        for name in ("gpt2", "qwen3")
        for site, wanted in (
            ("blocks.1.hook_resid_post", "blocks.1.mlp.b_out"),
            ("blocks.0.hook_attn_out", "blocks.0.attn.b_O"),
            ("blocks.1.attn.hook_z", "blocks.1.attn.b_O"),
        )
    ),
    ("hooked-gated", "blocks.1.hook_resid_post", "blocks.1.mlp.b_out"),
    ("hooked", "blocks.1.hook_resid_mid", "blocks.1.attn.b_O"),
    ("hooked-gated", "blocks.0.hook_resid_mid", "blocks.0.attn.b_O"),
    ("hooked-parallel", "blocks.0.hook_resid_post", "blocks.0.mlp.b_out"),
    ("hooked-parallel", "blocks.1.hook_attn_out", "blocks.1.attn.b_O"),
    ("hooked-attention", "blocks.0.hook_resid_post", "blocks.0.attn.b_O"),
    ("hooked-post-norm", "blocks.1.attn.hook_z", "blocks.1.attn.b_O"),
    ("hooked-post-norm", "blocks.0.hook_resid_pre", "pos_embed.W_pos"),
    ("hooked", "blocks.0.hook_resid_pre", "pos_embed.W_pos"),
    ("hooked-gated", "blocks.0.hook_resid_pre", "embed.W_E"),
    ("gpt2", "blocks.0.hook_resid_pre", "pos_embed.W_pos"),
    ("pythia", "blocks.0.hook_resid_post", "blocks.0.mlp.b_out"),
    ("pythia", "blocks.0.hook_attn_out", "blocks.0.attn.b_O"),
    ("pythia", "blocks.0.hook_resid_pre", "embed.W_E"),
    ("llama", "blocks.0.hook_resid_pre", "embed.W_E"),
    ("gemma2", "blocks.0.hook_resid_pre", "embed.W_E"),
    ("gemma2", "blocks.0.attn.hook_z", "blocks.0.attn.b_O"),
    ("gemma2", "blocks.0.attn.hook_out", "blocks.0.attn.b_O"),
    ("gemma2", "blocks.1.mlp.hook_out", "blocks.1.mlp.b_out"),
    ("qwen3_5_moe", "blocks.1.linear_attn.hook_out", "blocks.1.linear_attn.b_out"),
    ("qwen3_5_moe", "blocks.3.hook_attn_out", "blocks.3.attn.b_O"),
]


@pytest.mark.parametrize("name, site, wanted", ROWS)
def test_hook_and_weight_edit_are_one_function(name, site, wanted):
    model = model_of(name)
    edits = to_bias_edit(model, at(site))
    assert edits.names == (wanted,)
    assert site in carried_sites(model)
    missed, effect = difference(model, at(site), edits)
    assert missed < EXACT
    assert effect > 1e-2


@pytest.mark.parametrize("name", ["hooked", "hooked-parallel", "hooked-attention", "pythia"])
def test_attention_bias_serves_the_block_output_only_where_no_mlp_reads_it(name):
    model = model_of(name)
    wrong = WeightEdit(model, (("blocks.0.attn.b_O", PUSH),))
    missed, _ = difference(model, at("blocks.0.hook_resid_post"), wrong)
    assert missed > 1e-2 if name == "hooked" else missed < EXACT


@pytest.mark.filterwarnings("ignore:.*the input of the MLP's norm")
@pytest.mark.parametrize("name", POST_NORM)
@pytest.mark.parametrize("site", ["hook_resid_post", "hook_resid_mid", "hook_attn_out"])
def test_a_bias_behind_an_output_norm_is_wrong_and_refused(name, site):
    model = model_of(name)
    with pytest.raises(NotConvertible, match=r"normalises what it adds.*blocks\.1\.attn\.hook_z"):
        to_bias_edit(model, at(f"blocks.1.{site}"))
    bias = "blocks.1.mlp.b_out" if site == "hook_resid_post" else "blocks.1.attn.b_O"
    missed, _ = difference(model, at(f"blocks.1.{site}"), WeightEdit(model, ((bias, PUSH),)))
    assert missed > 1e-2


@pytest.mark.parametrize(
    "name",
    ["hooked", "hooked-gated", "hooked-parallel", "hooked-attention", "gpt2", "pythia"]
    + ["llama", "qwen3"],
)
def test_a_projection_at_every_stage_is_one_of_weights(name):
    model = model_of(name)
    basis = torch.stack([PUSH, PUSH.roll(3)])
    edits = [Edit(ProjectOut(basis), site, EVERYWHERE) for site in residual_sites(model)]
    weights = to_bias_edit(model, edits)
    slots = slots_of(model)
    assert set(weights.names) == {n for n, slot in slots.items() if slot.held is not None}
    assert all(slot.shape == slot.value().shape for slot in slots.values())
    missed, effect = difference(model, edits, weights)
    assert missed < EXACT
    assert effect > 1e-2


@pytest.mark.parametrize("name", ["gemma2", "qwen3_5_moe", "hooked-post-norm"])
def test_a_projection_is_refused_where_other_weights_write(name):
    model = model_of(name)
    edits = [Edit(ProjectOut(PUSH), site, EVERYWHERE) for site in residual_sites(model)]
    with pytest.raises(NotConvertible, match=r"block 0 (normalises|has other writers)"):
        to_bias_edit(model, edits)


def test_projections_that_are_not_one_of_weights_are_refused():
    model = model_of("gpt2")
    sites = residual_sites(model)
    whole = [Edit(ProjectOut(PUSH), site, EVERYWHERE) for site in sites]
    with pytest.raises(NotConvertible, match=r"not made at blocks\.0\.hook_resid_mid \(1 of 5"):
        to_bias_edit(model, [*whole[:1], *whole[2:]])
    with pytest.raises(NotConvertible, match="strength 2 acts again"):
        to_bias_edit(model, [Edit(ProjectOut(PUSH, 2.0), s, EVERYWHERE) for s in sites])
    with pytest.raises(NotConvertible, match="different subspaces"):
        to_bias_edit(model, [*whole[1:], Edit(ProjectOut(PUSH.roll(1)), sites[0], EVERYWHERE)])
    with pytest.raises(NotConvertible, match=r"hook_attn_out is no stage"):
        to_bias_edit(model, [*whole, Edit(ProjectOut(PUSH), "blocks.0.hook_attn_out", EVERYWHERE)])
    with pytest.raises(NotConvertible, match="do not commute"):
        to_bias_edit(model, [*whole, at(sites[0])])


def test_two_additions_are_one_of_their_sum_and_places_are_kept_apart():
    model, other = model_of("llama"), PUSH.roll(1)
    both = to_bias_edit(
        model, [at("blocks.0.hook_resid_post"), at("blocks.1.hook_resid_pre", other)]
    )
    one = to_bias_edit(model, at("blocks.0.hook_resid_post", PUSH + other))
    assert both.names == one.names == ("blocks.0.mlp.b_out",)
    torch.testing.assert_close(both.deltas[0][1], one.deltas[0][1])
    edits = [at("blocks.0.hook_resid_post"), at("blocks.1.hook_attn_out", other)]
    several = to_bias_edit(model, edits)
    assert several.names == ("blocks.0.mlp.b_out", "blocks.1.attn.b_O")
    assert difference(model, edits, several)[0] < EXACT


def test_a_vector_converts_as_it_was_built_and_strengths_are_in_the_delta():
    model, site = model_of("gpt2"), "blocks.0.hook_resid_post"
    vector = SteeringVector(PUSH, site, Recipe("test", mean_norm=2.0))
    assert torch.equal(to_bias_edit(model, vector).deltas[0][1], PUSH)
    edit = Edit(Add(vector, 3.0, "norm"), positions=EVERYWHERE)
    delta = to_bias_edit(model, edit).deltas[0][1]
    torch.testing.assert_close(delta, 6 * PUSH / PUSH.norm())


def test_an_addition_of_codes_that_never_meets_the_nonlinearity_converts():
    model, sae = model_of("gpt2"), tiny_sae("standard")
    edit = Edit(SparseAdd(sae, torch.eye(32)[4] * 2.0), positions=EVERYWHERE)
    weights = to_bias_edit(model, edit)
    torch.testing.assert_close(weights.deltas[0][1], 2.0 * sae.W_dec[4].detach())


@pytest.mark.parametrize("rule", [ALL, PREFILL, DECODE, LAST, AFTER_PROMPT], ids=str)
def test_edits_of_some_positions_are_refused(rule):
    with pytest.raises(NotConvertible, match=r"BOS and padding.*positions=Positions\(bos=True\)"):
        to_bias_edit(model_of("gpt2"), Edit(Add(PUSH), "blocks.0.hook_resid_post", rule))


def test_edits_that_depend_on_the_activation_or_the_row_are_refused():
    model, sae, site = model_of("gpt2"), tiny_sae(), "blocks.0.hook_resid_post"
    labels = torch.arange(5).repeat(2)
    circle = torch.stack([(labels * 1.2566).sin(), (labels * 1.2566).cos()], dim=1)
    path = concept_path(torch.nn.functional.pad(circle, (0, D_MODEL - 2)), labels, hook_name=site)
    changes = (Clamp(sae, 3, 5.0), Scale(sae, 3, 2.0), Ablate(sae, 3), FollowPath(path, 0.0))
    for change in (*changes, Clamp(sae, 3, -25.0, above=0.0), Fuzz(site, D_MODEL, 9.0)):
        with pytest.raises(NotConvertible, match=f"{type(change).__name__} adds depends on the ac"):
            to_bias_edit(model, Edit(change, positions=EVERYWHERE))
    splice = Reconstruct(sae, torch.eye(32)[4])
    with pytest.raises(NotConvertible, match="Reconstruct adds depends"):
        to_bias_edit(model, Edit(splice, positions=EVERYWHERE))
    gated = Gated(Add(PUSH), SimilarTo(PUSH, 0.1, hook_name=site))
    with pytest.raises(NotConvertible, match="gated edit"):
        to_bias_edit(model, Edit(gated, site, EVERYWHERE))
    with pytest.raises(NotConvertible, match="all of residual_sites"):
        to_bias_edit(model, [Edit(ProjectOut(PUSH), site, EVERYWHERE)])
    with pytest.raises(NotConvertible, match="between batch rows"):
        to_bias_edit(model, Edit(Add(PUSH, torch.ones(2)), site, EVERYWHERE))
    with pytest.raises(NotConvertible, match="between batch rows"):
        to_bias_edit(model, Edit(Add(PUSH), site, EVERYWHERE, rows=[0]))


def test_places_without_a_parameter_are_refused_with_those_that_have_one():
    with pytest.raises(NotConvertible, match=r"hook_resid_post: .*\(experts\).*linear_attn"):
        to_bias_edit(model_of("qwen3_5_moe"), at("blocks.0.hook_resid_post"))
    with pytest.raises(NotConvertible, match=r"input of the MLP's norm.*hook_attn_out"):
        to_bias_edit(model_of("llama"), at("blocks.0.hook_resid_mid"))
    with pytest.raises(NotConvertible, match=r"no parameter is added"):
        to_bias_edit(model_of("hooked"), at("blocks.0.mlp.hook_post", torch.ones(32)))
    with pytest.raises(KeyError, match="nearest"):
        to_bias_edit(model_of("hooked"), at("blocks.0.hook_resid_pots"))
    with pytest.raises(ValueError, match="4 entries"):
        to_bias_edit(model_of("hooked"), at("blocks.0.hook_resid_post", torch.ones(4)))
    with pytest.raises(ValueError, match="no edit"):
        to_bias_edit(model_of("hooked"), [])


def test_a_bridges_middle_hook_does_not_reach_the_residual_stream():
    model = model_of("gpt2")
    weights = WeightEdit(model, (("blocks.0.attn.b_O", PUSH),))
    with pytest.warns(UserWarning, match="input of the MLP's norm"):
        assert difference(model, at("blocks.0.hook_resid_mid"), weights)[0] > 1e-2


def test_a_spliced_sae_is_refused():
    model = tiny_bridge()
    model.add_sae(tiny_sae())
    with pytest.raises(NotConvertible, match=r"SAE is spliced in.*reset_saes"):
        to_bias_edit(model, at("blocks.0.hook_resid_post"))


def test_an_architecture_that_does_more_to_an_output_is_found_out():
    model = tiny_llama()
    handle = model.blocks[0].mlp.out._original_component.register_forward_hook(
        lambda module, arguments, output: 0.5 * output
    )
    with pytest.raises(NotConvertible, match="hooks and weights differ by"):
        to_bias_edit(model, at("blocks.0.hook_resid_post"))
    handle.remove()
    assert to_bias_edit(model, at("blocks.0.hook_resid_post"))


@pytest.mark.parametrize("name", ["hooked", "gpt2", "llama"])
def test_reverting_gives_back_the_same_parameters_bit_for_bit(name):
    model = model_of(name)
    before = {key: (value, value.detach().clone()) for key, value in model.named_parameters()}
    edit = to_bias_edit(model, [at("blocks.0.hook_resid_pre"), at("blocks.0.hook_resid_post")])
    with pytest.raises(RuntimeError, match="not applied"):
        edit.revert()
    with pytest.raises(KeyError, match="inside"), edit.apply():
        assert sum(value is not before.get(k, [None])[0] for k, value in model.named_parameters())
        with pytest.raises(RuntimeError, match="applied already"):
            edit.apply()
        raise KeyError("inside")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for key, (held, values) in before.items():
        assert after[key] is held
        assert torch.equal(held, values)


def test_edits_are_reverted_in_the_order_opposite_to_theirs():
    model = model_of("gpt2")
    first, second = (to_bias_edit(model, at("blocks.0.hook_resid_post")) for _ in range(2))
    first.apply()
    second.apply()
    with pytest.raises(RuntimeError, match="revert the later edits first"):
        first.revert()
    second.revert()
    first.revert()


def test_tied_embeddings_keep_their_unembedding():
    model = tiny_gemma2()
    table, head = model.embed._original_component, model.unembed._original_component
    assert table.weight is head.weight
    with to_bias_edit(model, at("blocks.0.hook_resid_pre")):
        assert table.weight is not head.weight
    assert table.weight is head.weight


def test_the_state_dict_loads_into_a_hooked_transformer():
    for name in ("hooked", "hooked-gated"):
        source, target = model_of(name), HOSTS[name]().to(torch.float64)
        edits = [at("blocks.0.hook_resid_pre"), at("blocks.1.hook_resid_post")]
        weights = to_bias_edit(source, edits)
        state = weights.as_state_dict()
        with weights.apply():
            assert all(torch.equal(state[k], v) for k, v in weights.as_state_dict().items())
        unknown = target.load_state_dict(state, strict=False).unexpected_keys
        assert not unknown
        hooked = steered_logits(source, TOKENS, edits)
        torch.testing.assert_close(steered_logits(target, TOKENS), hooked, atol=EXACT, rtol=0)


@pytest.mark.parametrize("name", ["hooked", "llama"])
def test_greedy_text_is_the_same(name):
    model, edit = model_of(name), at("blocks.0.hook_resid_post", 3 * PUSH)
    hooked = generate(model, TOKENS[:1], edit, max_new_tokens=32, stop_at_eos=False).tokens
    with to_bias_edit(model, edit):
        edited = generate(model, TOKENS[:1], max_new_tokens=32, stop_at_eos=False).tokens
    plain = generate(model, TOKENS[:1], max_new_tokens=4, stop_at_eos=False).tokens
    assert torch.equal(hooked, edited)
    assert not torch.equal(hooked[:, : plain.shape[1]], plain)


def test_processed_weights_of_a_bridge_take_the_edit_too():
    model = tiny_bridge()
    model.enable_compatibility_mode(disable_warnings=True)
    model = model.to(torch.float64)
    edit = at("blocks.0.hook_resid_post")
    assert difference(model, edit, to_bias_edit(model, edit))[0] < EXACT


def test_sixteen_bit_weights_keep_their_dtype():
    model = tiny_llama().to(torch.bfloat16)
    with to_bias_edit(model, at("blocks.0.hook_resid_post")):
        assert model.blocks[0].mlp.out._original_component.bias.dtype == torch.bfloat16
    assert model.blocks[0].mlp.out._original_component.bias is None


@pytest.mark.parametrize("name", list_organisms())
def test_every_agent_carries_a_vector_somewhere_and_its_text_is_the_hooks(name):
    model = load_organism(name, saes=()).model
    site = carried_sites(model)[-1]
    width = slots_of(model)["embed.W_E"].value().shape[1]
    edit = at(site, 5 * torch.randn(width, generator=torch.Generator().manual_seed(1)))
    prompt = "<bos><|user|>count the words<|end|><|assistant|>"
    hooked = generate(model, prompt, edit, max_new_tokens=8, stop_at_eos=False)
    with to_bias_edit(model, edit):
        edited = generate(model, prompt, max_new_tokens=8, stop_at_eos=False)
    assert torch.equal(hooked.tokens, edited.tokens)
