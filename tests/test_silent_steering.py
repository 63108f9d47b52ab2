"""Every known way in which a host steers nothing, or twice, and says nothing: we steer exactly
once or raise.

One test per row of the table, with the host's own behaviour shown where it is the trap.
"""

import warnings

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata

from sae_steering_plugin.adapters.columns import ContextRows
from sae_steering_plugin.adapters.engine import generate
from sae_steering_plugin.adapters.steering import SteeringError, fwd_hooks, steer
from sae_steering_plugin.adapters.training_hooks import PreventativeSteering, training_hooks
from sae_steering_plugin.adapters.transformer_lens import is_bridge, resolve
from sae_steering_plugin.edits import Add, Clamp
from sae_steering_plugin.runs.learning import captured
from sae_steering_plugin.types import Edit, Recipe, SteeringVector
from tests.hosts import D_MODEL, SITE, tiny_bridge, tiny_hooked, tiny_sae, tokens_of_length
from tests.oracles import leftovers

PUSH = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5)) * 3
TOKENS = tokens_of_length(2, 7)
both = pytest.mark.parametrize("make", [tiny_bridge, tiny_hooked])
EDIT = Edit(Add(PUSH), SITE)


@torch.no_grad()
def assert_steered_once(model, edit=EDIT, tokens=TOKENS, push=PUSH):
    """The residual that the next block reads has moved by the push, in one recorded pass."""
    with seen_by_next_block(model) as before:
        model(tokens)
    with steer(model, edit) as record, seen_by_next_block(model) as after:
        model(tokens)
    # an attached SAE adds its error term back to its reconstruction: one more rounding
    torch.testing.assert_close(after[0], before[0] + push, rtol=1e-5, atol=1e-5)
    assert record.edits[0].fired == 1


class seen_by_next_block:
    def __init__(self, model):
        self.point, self.seen = resolve(model, "blocks.1.hook_resid_pre").point, []

    def __enter__(self):
        self.handle = self.point.register_forward_hook(lambda m, a, x: self.seen.append(x.clone()))
        return self.seen

    def __exit__(self, *error):
        self.handle.remove()


def counting():
    runs = []
    return runs, lambda x, hook: runs.append(hook.name) and None


# row 1: an unknown or misspelt name on a bridge is ignored by the host


def test_a_misspelt_name_is_an_error_with_the_nearest_names():
    model = tiny_bridge()
    runs, count = counting()
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pots", count)]), torch.no_grad():
        model(TOKENS)
    assert runs == []  # the trap
    for name in ("blocks.0.hook_resid_pots", "blocks.0.hook_residpost"):
        for use in (steer, fwd_hooks):
            with pytest.raises(KeyError, match="no hook point .* nearest are .*hook_resid_post"):
                _enter(use(model, Edit(Add(PUSH), name)))
    assert leftovers(model) == []


@both
def test_a_layer_that_does_not_exist_is_named_with_the_depth(make):
    model = make()
    with pytest.raises(KeyError, match=r"the model has blocks 0 to 1"):
        _enter(steer(model, Edit(Add(PUSH), "blocks.7.hook_resid_post")))


def _enter(context):
    if hasattr(context, "__enter__"):
        with context:
            pass


# row 2: an alias on a fresh SAETransformerBridge fires 0 times


def test_an_alias_on_a_fresh_bridge_steers_once():
    model = tiny_bridge()
    runs, count = counting()
    with model.hooks(fwd_hooks=[(SITE, count)]), torch.no_grad():
        model(TOKENS)
    assert runs == []  # the trap
    assert_steered_once(model)
    with torch.no_grad():
        with steer(model, EDIT):
            wanted = model(TOKENS)
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=fwd_hooks(model, EDIT)), wanted)


# rows 3 and 4: after an SAE was attached and detached


@both
@pytest.mark.parametrize("times", [1, 2])
def test_a_site_that_held_an_sae_steers_once(make, times):
    model = make()
    for _ in range(times):
        with model.saes(saes=[tiny_sae()]), torch.no_grad():
            model(TOKENS)
    for name in {SITE, resolve(model, SITE).name}:
        assert_steered_once(model, Edit(Add(PUSH), name))
        with torch.no_grad():
            with steer(model, Edit(Add(PUSH), name)):
                wanted = model(TOKENS)
            pairs = fwd_hooks(model, Edit(Add(PUSH), name))
            assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=pairs), wanted)


def compatible():
    model = tiny_bridge()
    model.enable_compatibility_mode(disable_warnings=True)
    return model


def test_compatibility_mode_after_attach_and_detach_steers_once():
    model = compatible()
    assert_steered_once(model)
    with model.saes(saes=[tiny_sae()]), torch.no_grad():
        model(TOKENS)
    runs, count = counting()
    with model.hooks(fwd_hooks=[(SITE, count)]), torch.no_grad():
        model(TOKENS)
    assert len(runs) == 2  # the trap: double strength
    for name in (SITE, "blocks.0.hook_out"):
        assert_steered_once(model, Edit(Add(PUSH), name))
        with torch.no_grad():
            with steer(model, Edit(Add(PUSH), name)):
                wanted = model(TOKENS)
            pairs = fwd_hooks(model, Edit(Add(PUSH), name))
            assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=pairs), wanted)


# row 5: hooks added before add_sae / saes() at that point are lost


@both
def test_an_sae_attached_inside_the_block_raises_instead_of_losing_the_edit(make):
    model = make()
    with (
        pytest.raises(
            SteeringError, match="replaced inside the steering block .* attach SAEs outside"
        ),
        steer(model, EDIT),
        torch.no_grad(),
    ):
        model(TOKENS)
        with model.saes(saes=[tiny_sae()]):
            model(TOKENS)
    with (
        pytest.raises(SteeringError, match="replaced inside the steering block"),
        steer(model, EDIT),
        torch.no_grad(),
    ):
        with model.saes(saes=[tiny_sae()]):
            pass
        model(TOKENS)
    model.reset_saes()
    assert_steered_once(model)


@both
def test_pairs_made_before_an_sae_was_attached_give_a_warning(make):
    model = make()
    pairs = fwd_hooks(model, EDIT)
    with torch.no_grad():
        wanted = model.run_with_hooks(TOKENS, fwd_hooks=pairs)
        model.add_sae(tiny_sae(), use_error_term=True)
        with pytest.warns(
            UserWarning, match="no longer fire: the host has put another object there"
        ):
            model(TOKENS)
        model(TOKENS)  # once is enough
        pairs = fwd_hooks(model, EDIT)
        torch.testing.assert_close(
            model.run_with_hooks(TOKENS, fwd_hooks=pairs), wanted, rtol=1e-4, atol=1e-4
        )


@both
def test_edits_inside_an_attached_sae_with_error_term_steer_once(make):
    model, sae = make(), tiny_sae()
    with model.saes(saes=[sae], use_error_term=True):
        assert_steered_once(model)
        assert_steered_once(model, Edit(Add(PUSH), resolve(model, SITE).name))
        with torch.no_grad(), steer(model, Edit(Clamp(sae, 3, 9.0))) as record:
            inside = model(TOKENS)
        assert record.edits[0].fired == 1
    with torch.no_grad(), steer(model, Edit(Clamp(sae, 3, 9.0))):
        torch.testing.assert_close(inside, model(TOKENS), rtol=1e-4, atol=1e-4)


@both
def test_a_vector_acts_once_on_what_an_sae_without_error_term_lets_through(make):
    model, sae = make(), tiny_sae()
    with model.saes(saes=[sae], use_error_term=False):
        assert_steered_once(model)
        with pytest.raises(
            ValueError, match="attached at .* without its error term.*use_error_term"
        ):
            _enter(steer(model, Edit(Clamp(sae, 3, 9.0))))


# row 6: add_sae on a missing hook only warns


@both
def test_a_dictionary_of_a_missing_site_is_an_error(make):
    model, sae = make(), tiny_sae()
    sae.cfg.metadata = SAEMetadata(hook_name="blocks.9.hook_resid_post", model_name="tiny")
    with pytest.raises(KeyError, match="the model has blocks 0 to 1"):
        _enter(steer(model, Edit(Clamp(sae, 3, 9.0))))


# row 7: a hook left on a detached SAE stays inside the SAE object


@both
def test_a_hook_left_on_a_detached_sae_does_not_reach_our_edits(make):
    model, sae = make(), tiny_sae()
    edit = Edit(Clamp(sae, 3, 9.0))
    with torch.no_grad():
        with steer(model, edit):
            clean = model(TOKENS)
        model.add_sae(sae)
        wrapped = resolve(model, SITE).name.removesuffix(".hook_sae_output")
        model.add_hook(f"{wrapped}.hook_sae_acts_post", lambda acts, hook: acts * 0 + 50.0)
        model.reset_saes()
        sae_is_dirty = (sae.encode(torch.zeros(1, D_MODEL)) == 50.0).all()
        assert sae_is_dirty  # the trap
        with steer(model, edit) as record:
            assert torch.equal(model(TOKENS), clean)
    assert record.edits[0].fired == 1


@both
def test_an_edit_on_a_dictionary_that_was_detached_acts_on_the_model(make):
    model, sae = make(), tiny_sae()
    with (
        model.saes(saes=[sae], use_error_term=True),
        torch.no_grad(),
        steer(model, Edit(Clamp(sae, 3, 9.0))),
    ):
        inside = model(TOKENS)
    with torch.no_grad(), steer(model, Edit(Clamp(sae, 3, 9.0))) as record:
        torch.testing.assert_close(model(TOKENS), inside, rtol=1e-4, atol=1e-4)
    assert record.edits[0].fired == 1


# row 8: a compiled model ignores later hooks


@both
def test_a_compiled_model_is_refused(make):
    model = make()
    wrapped = torch.compile(model, backend="eager")
    for use in (steer, fwd_hooks):
        with pytest.raises(
            RuntimeError, match="this model is compiled, and a compiled model ignores"
        ):
            _enter(use(wrapped, EDIT))
    with pytest.raises(RuntimeError, match="this model is compiled"):
        generate(wrapped, TOKENS, EDIT)
    inner = model.original_model if is_bridge(model) else model
    inner.compile(backend="eager")
    with pytest.raises(RuntimeError, match="steer the uncompiled model"):
        _enter(steer(model, EDIT))


def test_a_block_compiled_in_place_is_refused():
    model = tiny_hooked()
    model.blocks[0].compile(backend="eager")
    with pytest.raises(RuntimeError, match="this model is compiled"):
        _enter(steer(model, EDIT))


# row 9: hook_embed under HookedTransformer.generate never fires


def test_the_embedding_under_generate_of_a_hooked_transformer_raises():
    model = tiny_hooked()
    refused = pytest.raises(
        SteeringError, match="did not fire in a whole forward pass .*hook_resid_pre"
    )
    with refused, steer(model, Edit(Add(PUSH), "hook_embed")):
        model.generate(TOKENS, max_new_tokens=2, verbose=False)
    with steer(model, Edit(Add(PUSH), "blocks.0.hook_resid_pre")) as record:
        model.generate(TOKENS, max_new_tokens=2, verbose=False, stop_at_eos=False)
    assert record.edits[0].fired == 2


@both
def test_the_embedding_in_a_bare_pass_and_in_our_generate_steers_once(make):
    model, edit = make(), Edit(Add(PUSH), "hook_embed")
    with steer(model, edit) as record, torch.no_grad():
        model(TOKENS)
    assert record.edits[0].fired == 1
    out = generate(model, TOKENS, edit, max_new_tokens=3, stop_at_eos=False)
    assert out.record.edits[0].fired == 3
    with steer(model, edit) as record:
        for _ in model.generate_stream(
            TOKENS[:1], max_new_tokens=3, stop_at_eos=False, verbose=False
        ):
            pass
    assert record.edits[0].fired == 3


# row 10: matching-pursuit feature hooks never fire; skip transcoders lose W_skip when attached


@both
def test_a_matching_pursuit_dictionary_steers_in_the_delta_form(make):
    model, sae = make(), tiny_sae("matching_pursuit")
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
        base = model(TOKENS)
        with model.saes(saes=[sae], use_error_term=True):
            runs, count = counting()
            wrapped = resolve(model, SITE).name.removesuffix(".hook_sae_output")
            with model.hooks(fwd_hooks=[(f"{wrapped}.hook_sae_acts_post", count)]):
                model(TOKENS)
        assert runs == []  # the trap
        with steer(model, Edit(Clamp(sae, 3, 9.0))) as record:
            assert not torch.allclose(model(TOKENS), base, atol=1e-2)
    assert record.edits[0].fired == 1


@both
def test_a_skip_transcoder_in_the_delta_form_keeps_everything_but_its_features(make):
    model = make()
    sae = tiny_sae("skip_transcoder", apply_b_dec_to_input=False, d_out=D_MODEL)
    sae.cfg.metadata = SAEMetadata(
        hook_name="blocks.0.ln2.hook_normalized", hook_name_out="blocks.0.hook_mlp_out"
    )
    codes = torch.zeros(sae.cfg.d_sae)
    codes[[2, 9]] = torch.tensor([2.0, 3.0])  # on relu codes a positive push is a constant step
    from sae_steering_plugin.edits import SparseAdd

    step = (codes @ sae.W_dec).detach()
    assert_steered_once(model, Edit(SparseAdd(sae, codes)), push=step)


# row 11: exclude_special_tokens has no effect under generate


@both
def test_bos_is_left_out_of_generate_whatever_the_host_does(make):
    model = make()
    tokens = TOKENS.clone()
    tokens[:, 0] = 1
    seen = []
    with steer(model, EDIT) as record:
        handle = resolve(model, SITE).point.register_forward_hook(lambda m, a, x: seen.append(x))
        model.generate(tokens, max_new_tokens=2, verbose=False, stop_at_eos=False)
        handle.remove()
    with torch.no_grad():
        handle = resolve(model, SITE).point.register_forward_hook(lambda m, a, x: seen.append(x))
        model(tokens)
        handle.remove()
    assert torch.equal(seen[0][:, 0], seen[-1][:, 0])
    assert record.edits[0].tokens == 2 * (6 + 1)


# beyond the table: other ways to be silent


@both
@pytest.mark.parametrize(
    "site, flag",
    [
        ("blocks.0.attn.hook_result", "use_attn_result"),
        ("blocks.0.hook_mlp_in", "use_hook_mlp_in"),
        ("blocks.0.hook_attn_in", "use_attn_in"),
        ("blocks.0.hook_q_input", "use_split_qkv_input"),
    ],
)
def test_a_gated_hook_point_is_refused_until_its_flag_is_on(make, site, flag):
    model = make()
    with pytest.raises(
        (ValueError, KeyError), match=f"fires only when model.cfg.{flag} is on|no hook"
    ):
        _enter(steer(model, Edit(Add(PUSH), site)))
    if make is tiny_hooked and site.endswith("mlp_in"):
        getattr(model, f"set_{flag}")(True)
        with steer(model, Edit(Add(PUSH), site)) as record, torch.no_grad():
            model(TOKENS)
        assert record.edits[0].fired == 1


@both
def test_the_input_of_an_attached_transcoder_is_refused(make):
    model = make()
    transcoder = tiny_sae("transcoder", apply_b_dec_to_input=False, d_out=D_MODEL)
    read = "blocks.0.ln2.hook_normalized"
    transcoder.cfg.metadata = SAEMetadata(hook_name=read, hook_name_out="blocks.0.hook_mlp_out")
    with (
        model.saes(saes=[transcoder]),
        pytest.raises(ValueError, match="is the input of an attached transcoder"),
    ):
        _enter(steer(model, Edit(Add(PUSH), read)))
    with steer(model, Edit(Add(PUSH), read)) as record, torch.no_grad():
        model(TOKENS)
    assert record.edits[0].fired == 1


@both
def test_reset_hooks_inside_the_block_does_not_take_the_edit_away(make):
    model = make()
    with torch.no_grad(), steer(model, EDIT):
        wanted = model(TOKENS)
        model.reset_hooks(including_permanent=True)
        assert torch.equal(model(TOKENS), wanted)


@both
def test_a_site_that_a_pass_skips_is_noticed(make):
    model = make()
    head = resolve(model, "blocks.0.hook_mlp_out").point
    with (
        pytest.raises(SteeringError, match="did not fire in a whole forward pass"),
        steer(model, Edit(Add(PUSH), "blocks.0.hook_mlp_out")),
        torch.no_grad(),
    ):
        around = head.forward
        head.__class__.__call__, kept = (lambda self, x: x), head.__class__.__call__
        try:
            model(TOKENS)
        finally:
            head.__class__.__call__ = kept
            head.forward = around


def test_an_edit_between_attention_and_mlp_says_where_a_bridge_loses_it():
    """A bridge's hook_resid_mid is the input of the MLP's norm; a HookedTransformer's is the
    stream."""
    changed = {}
    for name, make in (("bridge", tiny_bridge), ("hooked", tiny_hooked)):
        model = make()
        for site in ("hook_resid_mid", "hook_attn_out"):
            with warnings.catch_warnings(record=True) as told, torch.no_grad():
                warnings.simplefilter("always")
                with steer(model, Edit(Add(PUSH), f"blocks.0.{site}")):
                    changed[name, site] = model(TOKENS)
            said = sum("input of the MLP's norm" in str(one.message) for one in told)
            assert said == (name == "bridge" and site == "hook_resid_mid")
    hooked = changed["hooked", "hook_resid_mid"] - changed["hooked", "hook_attn_out"]
    bridge = changed["bridge", "hook_resid_mid"] - changed["bridge", "hook_attn_out"]
    assert hooked.abs().max() < 1e-5 < 1e-1 < bridge.abs().max()


@pytest.mark.parametrize("what", ["side effects", "training", "gradients"])
def test_nothing_else_takes_a_bridges_middle_for_the_stream_either(what):
    site = "blocks.0.hook_resid_mid"

    def use(model):
        if what == "side effects":
            ContextRows(model, TOKENS, site)
        elif what == "training":
            vector = SteeringVector(PUSH, site, Recipe("given"))
            with training_hooks(model, PreventativeSteering(vector, 0.5, "raw")):
                model(TOKENS)
        else:
            with captured(model, [site]):
                pass

    with pytest.warns(UserWarning, match=r"input of the MLP's norm.*hook_attn_out"):
        use(tiny_bridge())
    use(tiny_hooked())  # a warning is an error here


def test_an_sae_attached_in_the_middle_is_no_branch():
    model = tiny_hooked()
    sae = tiny_sae()
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_mid"
    model.add_sae(sae)
    with steer(model, Edit(Add(PUSH), "blocks.0.hook_resid_mid")), torch.no_grad():
        model(TOKENS)
