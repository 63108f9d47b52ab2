import gc

import pytest
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

from sae_steering_plugin.adapters.steering import SteeringError, as_edits, fwd_hooks, steer
from sae_steering_plugin.adapters.transformer_lens import is_bridge, resolve
from sae_steering_plugin.edits import Ablate, Add, Clamp, ProjectOut, Scale, SparseAdd
from sae_steering_plugin.edits.codes import PreparedCodes
from sae_steering_plugin.types import ALL, DECODE, PREFILL, Edit, Positions, Recipe, SteeringVector
from tests.hosts import D_MODEL, SITE, tiny_bridge, tiny_hooked, tiny_sae, tokens_of_length
from tests.oracles import (
    BOS,
    fed_by_hand,
    kept_batch,
    leftovers,
    shared_host,
    tapped,
    unchecked,
)

LATER = "blocks.1.hook_resid_post"
PUSH = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5)) * 3
TOKENS = tokens_of_length(2, 7)
TOKENS[:, 0] = BOS
hosts = pytest.mark.parametrize("name", ["bridge", "hooked"])
fresh = pytest.mark.parametrize("make", [tiny_bridge, tiny_hooked])


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    for name in ("bridge", "hooked"):
        assert leftovers(shared_host(name)) == []


def vector(seed=0, **recipe):
    values = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(values, SITE, Recipe("test", **recipe), f"v{seed}")


@torch.no_grad()
def around(model, edits, tokens=TOKENS, site=SITE, **options):
    """Activations before and after the edits at a site, the logits, and the record."""
    with (
        tapped(model, site) as before,
        steer(model, edits, **options) as record,
        tapped(model, site) as after,
    ):
        logits = model(tokens)
    return before[0], after[0], logits, record


# --- what is added


@hosts
def test_the_change_has_the_length_its_unit_says_and_is_zero_elsewhere(name):
    model, v = shared_host(name), vector(mean_norm=6.5)
    for unit, length in (("unit", 2.0), ("norm", 2.0 * 6.5), ("raw", 2.0 * v.norm)):
        rule = Positions(2, 5)
        before, after, _, record = around(model, Edit(Add(v, -2.0, unit=unit), SITE, rule))
        moved = (after - before).norm(dim=-1)
        kept = kept_batch(rule, TOKENS, torch.ones_like(TOKENS), [7, 7])
        assert (moved[~kept] == 0).all()
        torch.testing.assert_close(moved[kept], torch.full((6,), length), rtol=1e-5, atol=1e-5)
        found = record.edits[0]
        assert found.mean_change == pytest.approx(length, rel=1e-5)
        assert found.mean_residual == pytest.approx(float(before[kept].norm(dim=-1).mean()))
        assert found.displacement == pytest.approx(found.mean_change / found.mean_residual)


@hosts
def test_opposite_strengths_mirror_each_other_at_the_site(name):
    model = shared_host(name)
    before, plus, _, _ = around(model, Add(vector(), 1.5))
    _, minus, _, _ = around(model, Add(vector(), -1.5))
    torch.testing.assert_close(plus - before, before - minus, rtol=1e-4, atol=1e-5)


@hosts
def test_edits_of_one_site_are_summed_whatever_their_order(name):
    model, sae = shared_host(name), tiny_sae("standard")
    edits = [
        Edit(Add(PUSH), SITE, Positions(1, 4)),
        Edit(Clamp(sae, [3], 9.0), SITE, Positions(3)),
        Edit(ProjectOut(PUSH), SITE),
        Edit(Add(PUSH.flip(0), torch.tensor([0.5, -1.0])), SITE, rows=[1]),
    ]
    alone = []
    for edit in edits:
        before, after, _, _ = around(model, edit)
        alone.append(after - before)
    for order in (edits, edits[::-1], [edits[2], edits[0], edits[3], edits[1]]):
        before, after, _, record = around(model, order)
        torch.testing.assert_close(after - before, sum(alone), rtol=1e-4, atol=1e-4)
        assert record.sites == [resolve(model, SITE).name]
    two = [Add(vector(1), 0.3), Add(vector(2), -2.0)]
    _, together, _, _ = around(model, two)
    joint = SteeringVector(
        0.3 * vector(1).vector - 2.0 * vector(2).vector, SITE, Recipe("test"), "sum"
    )
    torch.testing.assert_close(together, around(model, Add(joint))[1], rtol=1e-5, atol=1e-5)


@hosts
def test_edits_of_several_sites_each_act_where_they_stand(name):
    model, other = shared_host(name), PUSH.flip(0)
    edits = [Edit(Add(PUSH), SITE, PREFILL), Edit(ProjectOut(other), LATER)]
    with torch.no_grad(), steer(model, edits) as record, tapped(model, LATER) as seen:
        logits = model(TOKENS)
    wanted = plain_hooks(
        model,
        [
            (SITE, lambda x: torch.cat([x[:, :1], x[:, 1:] + PUSH], dim=1)),
            (LATER, lambda x: torch.cat([x[:, :1], without(x[:, 1:], other)], dim=1)),
        ],
    )
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert (seen[0][:, 1:] @ other).abs().max() < 1e-3
    assert len(record.sites) == 2
    assert [e.tokens for e in record.edits] == [12, 12]


def without(x, direction):
    unit = direction / direction.norm()
    return x - (x @ unit)[..., None] * unit


@torch.no_grad()
def plain_hooks(model, pairs, tokens=TOKENS):
    """Logits with plain functions at hook points, by PyTorch alone."""
    handles = [
        resolve(model, site).point.register_forward_hook(lambda m, a, x, f=f: f(x))
        for site, f in pairs
    ]
    try:
        return model(tokens)
    finally:
        for handle in handles:
            handle.remove()


@hosts
def test_nested_blocks_add_up_and_end_one_by_one(name):
    model = shared_host(name)
    with torch.no_grad():
        base = model(TOKENS)
        with steer(model, Edit(Add(PUSH), SITE)) as outer:
            once = model(TOKENS)
            with steer(model, Edit(Add(PUSH), SITE, DECODE), require=False):
                assert torch.equal(model(TOKENS), once)
            with steer(model, Edit(Add(PUSH, -1.0), SITE)) as inner:
                torch.testing.assert_close(model(TOKENS), base, rtol=1e-3, atol=1e-3)
            assert torch.equal(model(TOKENS), once)
        assert torch.equal(model(TOKENS), base)
    assert (outer.edits[0].fired, inner.edits[0].fired) == (4, 1)


@hosts
def test_a_heads_site_takes_a_vector_over_all_heads(name):
    model, site = shared_host(name), "blocks.1.attn.hook_z"
    with torch.no_grad():
        base = model(TOKENS)
        with steer(model, Edit(Add(PUSH), site, Positions(3, 5))) as record:
            logits = model(TOKENS)
    step = (PUSH @ model.blocks[1].attn.W_O.reshape(D_MODEL, D_MODEL)).detach()
    same = plain_hooks(
        model,
        [
            (
                "blocks.1.hook_attn_out",
                lambda x: torch.cat([x[:, :3], x[:, 3:5] + step, x[:, 5:]], 1),
            )
        ],
    )
    assert not torch.allclose(logits, base)
    torch.testing.assert_close(logits, same, rtol=1e-4, atol=1e-4)
    assert record.edits[0].tokens == 4


@hosts
def test_sites_that_do_not_hold_one_vector_per_token_are_refused(name):
    model = shared_host(name)
    for site in ("blocks.1.attn.hook_pattern", "blocks.0.attn.hook_attn_scores"):
        with pytest.raises(ValueError, match="holds attention between pairs of tokens, not one"):
            around(model, Edit(Add(PUSH), site), site=SITE)
    reshaped = resolve(model, SITE).point.register_forward_hook(lambda m, a, x: x.transpose(1, 2))
    refused = pytest.raises(ValueError, match=r"has shape \(2, 16, 7\) in a pass over \(2, 7\) tok")
    try:
        with refused, steer(model, Edit(Add(PUSH[:7]), SITE)), torch.no_grad():
            model(TOKENS)
    finally:
        reshaped.remove()


# --- dictionaries


@fresh
def test_a_dictionary_of_concatenated_heads_is_edited_in_the_delta_form(make):
    from sae_lens import StandardSAE, StandardSAEConfig

    model, site = make(), "blocks.1.attn.hook_z"
    where = SAEMetadata(hook_name=site, model_name="tiny")
    sae = StandardSAE(
        StandardSAEConfig(d_in=D_MODEL, d_sae=32, reshape_activations="hook_z", metadata=where)
    )

    def clamped(codes, hook):
        return torch.cat([codes[:, :1], codes[:, 1:].index_fill(-1, torch.tensor(3), 9.0)], dim=1)

    with torch.no_grad():
        base = model(TOKENS)
        with steer(model, Clamp(sae, 3, 9.0)) as record:
            ours = model(TOKENS)
        with model.saes(saes=[sae], use_error_term=True):
            held = resolve(model, site).name.removesuffix(".hook_sae_output")
            with model.hooks(fwd_hooks=[(f"{held}.hook_sae_acts_post", clamped)]):
                attached = model(TOKENS)
    torch.testing.assert_close(ours, attached, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours, base, atol=0.01)
    assert record.edits[0].tokens == 12


SIMPLE = [
    "standard",
    "gated",
    "jumprelu",
    "topk",
    "abstopk",
]


@hosts
@pytest.mark.parametrize("word", SIMPLE)
@pytest.mark.parametrize("kind", ["none", "layer_norm", "constant_norm_rescale"])
def test_delta_form_equals_the_attached_form_with_error_term(name, word, kind):
    sae = tiny_sae(word, normalize_activations=kind)
    model = {"bridge": tiny_bridge, "hooked": tiny_hooked}[name]()

    def edit_codes(codes, hook):
        codes = codes.clone()
        codes[:, 1:, 3] = 4.0
        codes[:, 1:, 8] *= -2.0
        return codes

    edits = [Edit(Clamp(sae, 3, 4.0), SITE), Edit(Scale(sae, 8, -2.0), SITE)]
    with torch.no_grad():
        with steer(model, edits):
            ours = model(TOKENS)
        with model.saes(saes=[sae], use_error_term=True):
            acts = (
                f"{resolve(model, SITE).name.removesuffix('.hook_sae_output')}.hook_sae_acts_post"
            )
            with model.hooks(fwd_hooks=[(acts, edit_codes)]):
                attached = model(TOKENS)
            with steer(model, edits) as record:
                inside = model(TOKENS)
        assert not torch.allclose(ours, model(TOKENS), atol=1e-2)
    torch.testing.assert_close(ours, attached, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(inside, ours, rtol=1e-3, atol=1e-3)
    assert [e.fired for e in record.edits] == [1, 1]
    assert leftovers(model) == []


TRANSCODERS = [word for word in sorted(SAE_CLASS_REGISTRY) if word.endswith("transcoder")]
READ, WRITE = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"


def tiny_transcoder(word, **options):
    transcoder = tiny_sae(word, apply_b_dec_to_input=False, d_out=D_MODEL, **options)
    transcoder.cfg.metadata = SAEMetadata(
        hook_name=READ, hook_name_out=WRITE, model_name="tiny", prepend_bos=True
    )
    return transcoder


@hosts
@pytest.mark.parametrize("word", TRANSCODERS)
def test_a_transcoder_is_read_at_its_input_and_written_at_its_output(name, word):
    model, transcoder = shared_host(name), tiny_transcoder(word)
    codes_vector = torch.zeros(transcoder.cfg.d_sae)
    codes_vector[[2, 9]] = torch.tensor([6.0, -3.0])
    seen = []

    def moved(x):
        codes = transcoder.encode(seen[-1])
        pushed = codes + codes_vector
        if word.startswith("jumprelu"):
            edited = pushed * (pushed > transcoder.threshold) * (pushed > 0)
        else:
            edited = torch.relu(pushed)
        delta = transcoder.decode(edited) - transcoder.decode(codes)
        return torch.cat([x[:, :1], (x + delta)[:, 1:]], dim=1)

    wanted = plain_hooks(model, [(READ, lambda x: seen.append(x)), (WRITE, moved)])
    change = SparseAdd(transcoder, codes_vector)
    _, _, logits, record = around(model, change, site=WRITE)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert record.edits[0].site == resolve(model, WRITE).name
    with steer(model, Edit(change, positions=Positions(4, 6))) as record:
        fed_by_hand(model, TOKENS, [3, 1, 1, 1, 1])
    assert record.edits[0].tokens == 4
    pairs = fwd_hooks(model, change)
    assert [name for name, _ in pairs] == [resolve(model, WRITE).name, resolve(model, READ).name]
    with torch.no_grad():
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=pairs), logits)


@hosts
def test_a_transcoder_reads_what_an_edit_of_its_input_lets_through(name):
    model, transcoder = shared_host(name), tiny_transcoder("transcoder")
    edits = [Edit(Add(PUSH), READ), Edit(Clamp(transcoder, [2, 9], 5.0))]
    seen = []

    def pushed(x):
        seen.append(torch.cat([x[:, :1], x[:, 1:] + PUSH], dim=1))
        return seen[-1]

    def moved(x):
        codes = transcoder.encode(seen[-1])
        edited = codes.clone()
        edited[..., [2, 9]] = 5.0
        delta = transcoder.decode(edited) - transcoder.decode(codes)
        return torch.cat([x[:, :1], (x + delta)[:, 1:]], dim=1)

    wanted = plain_hooks(model, [(READ, pushed), (WRITE, moved)])
    for order in (edits, edits[::-1]):
        torch.testing.assert_close(around(model, order)[2], wanted, rtol=1e-4, atol=1e-4)


@hosts
def test_an_edit_of_codes_must_stand_where_its_dictionary_was_trained(name):
    model, sae = shared_host(name), tiny_sae("standard")
    with (
        pytest.raises(
            ValueError, match=r"was trained at 'blocks.0.hook_resid_post'; an edit of its"
        ),
        steer(model, Edit(Ablate(sae, 3), LATER)),
    ):
        pass
    same_place = "blocks.1.hook_resid_pre"
    with torch.no_grad():
        with steer(model, Edit(Clamp(sae, 3, 5.0), same_place)):
            there = model(TOKENS)
        with steer(model, Edit(Clamp(sae, 3, 5.0))):
            here = model(TOKENS)
    torch.testing.assert_close(here, there)
    nowhere = tiny_sae("standard")
    nowhere.cfg.metadata = SAEMetadata()
    with (
        pytest.raises(ValueError, match="does not say where it was trained: set"),
        unchecked(),
        steer(model, Ablate(nowhere, 3)),
    ):
        pass


# --- what the host offers besides


@hosts
def test_run_with_cache_records_the_steered_value_and_can_stop_early(name):
    model = shared_host(name)
    here, later = resolve(model, SITE).name, resolve(model, LATER).name
    with torch.no_grad():
        _, clean = model.run_with_cache(TOKENS)
        with steer(model, Edit(Add(PUSH), SITE)) as record:
            _, cache = model.run_with_cache(TOKENS)
            part, _ = model.run_with_cache(TOKENS, stop_at_layer=1)
            whole = model(TOKENS)
    wanted = clean[here].clone()
    wanted[:, 1:] += PUSH
    assert torch.equal(cache[here], wanted)
    assert torch.equal(part, wanted)
    assert not torch.allclose(cache[later], clean[later])
    assert record.edits[0].fired == 3
    assert torch.equal(whole, model.unembed(model.ln_final(cache[later])))


@hosts
def test_fwd_hooks_are_the_hosts_own_pairs(name):
    model = shared_host(name)
    sae = tiny_sae("topk")
    edits = [Edit(Add(PUSH), SITE), Edit(Clamp(sae, 5, 8.0)), Edit(ProjectOut(PUSH), LATER, DECODE)]
    with torch.no_grad():
        with steer(model, edits, require=False):
            wanted = model(TOKENS)
        pairs = fwd_hooks(model, edits)
        assert [type(name) for name, _ in pairs] == [str, str]
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=pairs), wanted)
        with model.hooks(fwd_hooks=pairs):
            assert torch.equal(model(TOKENS), wanted)
            out = model.generate(
                TOKENS, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False
            )
        with steer(model, edits):
            same = model.generate(
                TOKENS, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False
            )
    assert torch.equal(out, same)
    record = pairs[0][1].record
    assert [e.fired for e in record.edits] == [5, 5, 5]
    del pairs, record


@hosts
def test_functions_that_are_let_go_leave_the_model_as_it_was(name):
    model = shared_host(name)
    pairs = fwd_hooks(model, Edit(Add(PUSH), SITE))
    assert leftovers(model)
    del pairs
    gc.collect()
    assert leftovers(model) == []


@hosts
def test_the_same_pairs_in_two_contexts_are_refused(name):
    model = shared_host(name)
    pairs = fwd_hooks(model, Edit(Add(PUSH), SITE))
    refused = pytest.raises(SteeringError, match="fired twice in one forward pass: the edit is")
    with refused, model.hooks(fwd_hooks=pairs), model.hooks(fwd_hooks=pairs), torch.no_grad():
        model(TOKENS)
    del pairs, refused
    gc.collect()  # the raised error's frames hold the functions


# --- gradients


@fresh
def test_a_vector_trains_through_the_edit_as_through_a_plain_hook(make):
    model = make()
    trained = torch.zeros(D_MODEL, requires_grad=True)
    optimiser = torch.optim.SGD([trained], lr=0.5)
    losses, gradients = [], []
    with steer(model, Edit(Add(trained), SITE)):
        for _ in range(4):
            loss = model(TOKENS)[:, -1, 7].mean().neg()
            optimiser.zero_grad()
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append(trained.grad.clone())
            optimiser.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    plain = torch.zeros(D_MODEL, requires_grad=True)
    handle = resolve(model, SITE).point.register_forward_hook(
        lambda m, a, x: torch.cat([x[:, :1], x[:, 1:] + plain], dim=1)
    )
    model(TOKENS)[:, -1, 7].mean().neg().backward()
    handle.remove()
    torch.testing.assert_close(gradients[0], plain.grad)


@fresh
@pytest.mark.parametrize("kind", ["add", "clamp", "project"])
def test_gradients_flow_through_edits_to_the_layers_below(make, kind):
    model, sae = make(), tiny_sae("standard")
    change = {
        "add": Add(PUSH),
        "clamp": Clamp(sae, [3, 8], 4.0),
        "project": ProjectOut(PUSH),
    }[kind]
    weight = model.blocks[0].mlp.W_out if make is tiny_hooked else None
    if weight is None:
        weight = model.original_model.transformer.h[0].mlp.out.weight
    weight.requires_grad_(True)

    def loss_of():
        with steer(model, Edit(change, SITE)):
            return model(TOKENS)[:, -1, 7].sum()

    loss_of().backward()
    gradient = weight.grad.clone()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-3
    with torch.no_grad():
        weight += step * direction
        up = loss_of()
        weight -= 2 * step * direction
        down = loss_of()
    slope = float((up - down) / (2 * step))
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.03, abs=0.02)


@hosts
def test_an_edit_first_used_in_inference_mode_can_carry_gradients_later(name):
    model = shared_host(name)
    embedded = torch.randn(1, 3, D_MODEL, requires_grad=True)
    replace = resolve(model, "blocks.0.hook_resid_pre").point.register_forward_hook(
        lambda m, a, x: embedded.expand_as(x) if torch.is_grad_enabled() else None
    )
    with steer(model, [Edit(Add(PUSH), SITE), Edit(ProjectOut(PUSH), LATER)]):
        with torch.inference_mode():
            model(TOKENS[:1, :3])
        model(TOKENS[:1, :3]).sum().backward()
    replace.remove()
    assert embedded.grad.abs().sum() > 0


def test_gradient_checkpointing_recomputes_the_edited_pass():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_bridge()
        inner = model.original_model.train()
        for module in inner.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            inner.activation_checkpointing_enable({"use_reentrant": False})
        trained = torch.ones(D_MODEL, requires_grad=True)
        with steer(model, Edit(Add(trained), SITE)):
            inner(TOKENS, use_cache=False).logits[:, -1, 7].sum().backward()
        gradients.append(trained.grad)
    torch.testing.assert_close(*gradients)


# --- errors, and nothing left behind


@hosts
def test_an_exception_in_the_block_comes_out_and_nothing_stays(name):
    model = shared_host(name)
    with torch.no_grad():
        base = model(TOKENS)
        for when in ("before", "during", "after"):
            with pytest.raises(ZeroDivisionError), steer(model, Edit(Add(PUSH), SITE)):
                if when == "before":
                    raise ZeroDivisionError
                if when == "during":
                    handle = resolve(model, LATER).point.register_forward_hook(failing)
                    try:
                        model(TOKENS)
                    finally:
                        handle.remove()
                model(TOKENS)
                raise ZeroDivisionError
            assert leftovers(model) == []
            assert torch.equal(model(TOKENS), base)
        with steer(model, Edit(Add(PUSH), SITE)):
            assert not torch.equal(model(TOKENS), base)


def failing(module, arguments, output):
    raise ZeroDivisionError


@hosts
def test_an_exception_in_generate_leaves_nothing(name):
    model = shared_host(name)
    with pytest.raises(ZeroDivisionError), steer(model, Edit(Add(PUSH), SITE)) as record:
        handle = resolve(model, LATER).point.register_forward_hook(failing)
        try:
            model.generate(TOKENS, max_new_tokens=3, verbose=False)
        except ZeroDivisionError:
            handle.remove()
            with torch.no_grad():
                model(TOKENS)  # a bare pass after a broken generate has its own prompt
            assert record.edits[0].tokens_per_row[-1].tolist() == [6, 6]
            raise
    assert leftovers(model) == []


@hosts
def test_an_edit_that_never_fired_or_steered_nothing_raises_at_exit(name):
    model = shared_host(name)
    with (
        pytest.raises(SteeringError, match="never fired: no forward pass of this model ran"),
        steer(model, Edit(Add(PUSH), SITE)),
    ):
        pass
    with pytest.raises(SteeringError, match=r"fired in 1 passes and steered no token: .*all\[9:\]"):
        around(model, Edit(Add(PUSH), SITE, Positions(9)))
    with pytest.raises(SteeringError, match="decode needs max_new_tokens >= 2"):
        around(model, Edit(Add(PUSH), SITE, DECODE))
    with steer(model, Edit(Add(PUSH), SITE), require=False) as record:
        pass
    assert record.edits[0].fired == record.edits[0].tokens == 0
    bos_only = torch.full((1, 1), BOS)
    with pytest.raises(SteeringError, match="steered no token"):
        around(model, Edit(Add(PUSH), SITE), bos_only)
    around(model, Edit(Add(PUSH), SITE, Positions(bos=True)), bos_only)


@hosts
def test_things_that_are_no_edits_are_refused(name):
    model = shared_host(name)
    with unchecked(), pytest.raises(TypeError, match="Tensor is not an edit: pass Edit"):
        as_edits([PUSH])
    with pytest.raises(
        ValueError, match="Add does not know its hook point: pass hook_name= to Edit"
    ):
        around(model, Add(PUSH))
    with pytest.raises(ValueError, match="the vector has 5 entries, the activation at .* has 16"):
        around(model, Edit(Add(torch.ones(5)), SITE))
    with pytest.raises(ValueError, match="written for 3 batch rows, and this batch has 2"):
        around(model, Edit(ProjectOut(PUSH, torch.ones(3)), SITE))
    with pytest.raises(IndexError, match="row 2 is outside this batch of 2 rows"):
        around(model, Edit(Add(PUSH), SITE, rows=(0, 2)))
    with pytest.raises(TypeError, match="Linear has no hook points: pass a TransformerBridge or"):
        around(torch.nn.Linear(2, 2), Edit(Add(PUSH), SITE))


@hosts
def test_a_part_of_the_model_called_alone_is_refused(name):
    model = shared_host(name)
    refused = pytest.raises(SteeringError, match="fired outside a forward pass of the model")
    with refused, steer(model, Edit(Add(PUSH), SITE)), torch.no_grad():
        resolve(model, SITE).point(torch.zeros(1, 2, D_MODEL))


@hosts
def test_prompt_lengths_are_one_or_one_per_row(name):
    model = shared_host(name)
    for given, wanted in ((3, [4, 4]), ([2, 5], [5, 2]), (torch.tensor([7, 1]), [0, 6])):
        with (
            torch.no_grad(),
            steer(model, Edit(Add(PUSH), SITE, DECODE), prompt_lengths=given) as r,
        ):
            model(TOKENS)
        assert sum(r.edits[0].tokens_per_row).tolist() == wanted


@hosts
def test_the_record_says_what_was_done(name):
    model = shared_host(name)
    _, _, _, record = around(model, [Edit(Add(PUSH), SITE), Edit(ProjectOut(PUSH), LATER, PREFILL)])
    first = record.to_dict()[0]
    assert first["change"] == "Add" and first["positions"] == "all"
    assert (first["fired"], first["tokens"]) == (1, 12)
    assert "12 tokens in 1 passes" in repr(record)
    assert record._repr_html_().count("<tr>") == 3
    assert record.edits[1].displacement == pytest.approx(
        record.edits[1].mean_change / record.edits[1].mean_residual
    )


@hosts
def test_a_tokenizer_without_bos_has_no_token_to_leave_out(name):
    make = {"bridge": tiny_bridge, "hooked": tiny_hooked}[name]
    model = make()
    model.tokenizer = type(model.tokenizer).from_pretrained(model.tokenizer.name_or_path)
    model.tokenizer.bos_token = None
    before, after, _, record = around(model, Edit(Add(PUSH), SITE))
    assert record.edits[0].tokens == TOKENS.numel()
    assert torch.equal(after, before + PUSH)


@fresh
def test_steering_a_clean_forward_pass_costs_no_bit_when_the_block_is_over(make):
    model = make()
    with torch.no_grad():
        base = model(TOKENS)
        around(model, Edit(Add(PUSH), SITE, ALL))
        assert torch.equal(model(TOKENS), base)
    assert leftovers(model) == []
    assert is_bridge(model) is (make is tiny_bridge)


@pytest.mark.parametrize("make", [tiny_bridge, tiny_hooked])
def test_an_edit_of_codes_is_worked_out_once_though_it_is_measured(make, monkeypatch):
    model, sae, calls = make(), tiny_sae("jumprelu"), []
    worked_out = PreparedCodes.__call__

    def counted(self, *arguments):
        calls.append(1)
        return worked_out(self, *arguments)

    monkeypatch.setattr(PreparedCodes, "__call__", counted)
    with torch.no_grad(), steer(model, Clamp(sae, [2, 5], 3.0)) as record:
        model(TOKENS)
    assert len(calls) == 1
    assert record.edits[0].mean_change > 0
