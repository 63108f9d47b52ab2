import pytest
import torch
from sae_lens import SAETransformerBridge
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from sae_steering_plugin.adapters.steering import steer
from sae_steering_plugin.adapters.transformer_lens import (
    bos_token,
    canonical_name,
    hook_names,
    is_bridge,
    layer_of,
    load_model,
    pad_token,
    refuse_compiled,
    resolve,
    same_place,
    stop_tokens,
)
from sae_steering_plugin.edits import Add
from sae_steering_plugin.types import Edit
from tests.hosts import (
    D_MODEL,
    SITE,
    tiny_bridge,
    tiny_hf,
    tiny_hooked,
    tiny_sae,
    tiny_tokenizer,
    tokens_of_length,
)

TOKENS = tokens_of_length(2, 6)
PUSH = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5)) * 3


def plain_bridge():
    return TransformerBridge.boot_transformers(
        "tiny-gpt2", hf_model=tiny_hf(), tokenizer=tiny_tokenizer(), device="cpu"
    )


def plain_hooked():
    return HookedTransformer(tiny_hooked().cfg, tokenizer=tiny_tokenizer()).eval()


def compatible_bridge():
    model = tiny_bridge()
    model.enable_compatibility_mode(disable_warnings=True)
    return model


EVERY_HOST = [plain_bridge, tiny_bridge, compatible_bridge, plain_hooked, tiny_hooked]
every_host = pytest.mark.parametrize("make", EVERY_HOST)
RESIDUAL = [
    f"blocks.{layer}.hook_{part}"
    for layer in (0, 1)
    for part in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
]


@pytest.mark.filterwarnings("ignore:.*the input of the MLP's norm")
@every_host
@pytest.mark.parametrize("site", [*RESIDUAL, "hook_embed", "ln_final.hook_normalized"])
def test_the_point_found_is_the_one_the_model_fires_and_an_edit_there_acts_once(make, site):
    model = make()
    point = resolve(model, site).point
    assert resolve(model, resolve(model, site).name).point is point
    assert resolve(model, site).live
    with torch.no_grad():
        base = model(TOKENS)
        with steer(model, Edit(Add(PUSH), site)) as record:
            steered = model(TOKENS)
        handle = point.register_forward_hook(lambda m, a, x: x + PUSH)
        wanted = model(TOKENS)
        handle.remove()
    assert record.edits[0].fired == 1
    assert torch.equal(steered, wanted)
    assert not torch.allclose(steered, base)


@every_host
def test_every_listed_name_resolves_or_says_which_flag_it_needs(make):
    model, found = make(), 0
    for name in hook_names(model):
        try:
            assert resolve(model, name).point is not None
            found += 1
        except ValueError as error:
            assert "fires only when model.cfg.use_" in str(error)
    assert found > 20


def test_an_alias_and_its_canonical_name_are_one_site():
    model = tiny_bridge()
    assert canonical_name(model, SITE) == "blocks.0.hook_out"
    assert resolve(model, SITE).point is resolve(model, "blocks.0.hook_out").point
    assert canonical_name(tiny_hooked(), SITE) == SITE


@every_host
def test_post_of_a_layer_is_pre_of_the_next(make):
    model = make()
    assert same_place(model, SITE, "blocks.1.hook_resid_pre")
    assert not same_place(model, SITE, "blocks.0.hook_resid_pre")
    assert not same_place(model, SITE, "blocks.1.hook_resid_post")
    assert not same_place(model, "blocks.0.hook_mlp_out", SITE)


@every_host
def test_an_unknown_name_lists_the_nearest(make):
    model = make()
    with pytest.raises(
        KeyError, match=r"no hook point 'blocks.0.hook_resid_psot'.*nearest are .*post"
    ):
        resolve(model, "blocks.0.hook_resid_psot")
    with pytest.raises(KeyError, match="the model has blocks 0 to 1"):
        resolve(model, "blocks.2.hook_resid_post")
    for word in ("", "blocks", "blocks.0", "blocks.0.mlp", "embed.weight", "blocks.x.hook_out"):
        with pytest.raises(KeyError, match="no hook point"):
            resolve(model, word)


def test_something_without_hook_points_is_refused():
    with pytest.raises(TypeError, match="GPT2LMHeadModel has no hook points: pass a Transformer"):
        resolve(tiny_hf(), SITE)
    with pytest.raises(TypeError, match="str has no hook points"):
        resolve("gpt2", SITE)


@pytest.mark.parametrize("make", [tiny_bridge, tiny_hooked])
def test_a_site_that_holds_an_sae_is_its_output_and_knows_the_sae(make):
    model, sae = make(), tiny_sae()
    free = resolve(model, SITE)
    for error_term in (True, False):
        with model.saes(saes=[sae], use_error_term=error_term):
            held = resolve(model, SITE)
            assert held.sae is sae and held.sae_error_term is error_term
            assert held.name.endswith(".hook_sae_output")
            assert not free.live and held.live
        assert not held.live
        free = resolve(model, SITE)
        assert free.sae is None and free.live


def test_load_model_boots_a_local_folder_in_eval_mode(tmp_path):
    tiny_hf().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert isinstance(model, SAETransformerBridge) and not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), tiny_hf()(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert model.tokenizer.bos_token_id == 1
    half = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_a_model_that_is_nowhere_is_named(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(OSError, match="could not load .*missing.*neither a local folder"):
        load_model(missing)


@pytest.mark.parametrize("make", [tiny_bridge, tiny_hooked])
def test_special_tokens_are_the_tokenizers(make):
    model = make()
    assert (bos_token(model), pad_token(model), stop_tokens(model)) == (1, 0, (2,))
    if is_bridge(model):
        model.original_model.generation_config.eos_token_id = [2, 7]
        assert stop_tokens(model) == (2, 7)
    model.tokenizer = None
    assert bos_token(model) is None and pad_token(model) is None


def test_layers_are_read_off_names():
    assert layer_of("blocks.11.hook_resid_post") == 11
    assert layer_of("hook_embed") is None


@pytest.mark.parametrize("part", ["transformer", "transformer.h.1", "transformer.h"])
def test_a_compiled_part_around_the_site_is_refused(part):
    model = tiny_bridge()
    model.original_model.get_submodule(part)._compiled_call_impl = lambda *a, **k: None
    with pytest.raises(RuntimeError, match="this model is compiled"):
        refuse_compiled(model, "blocks.1.hook_in")


def test_a_compiled_part_beside_the_site_is_let_be():
    model = tiny_bridge()
    model.original_model.get_submodule("transformer.h.0")._compiled_call_impl = print
    refuse_compiled(model, "blocks.1.hook_in")
    with pytest.raises(RuntimeError, match="this model is compiled"):
        refuse_compiled(model)


def test_text_is_split_as_the_folders_own_tokenizer_file_says_whatever_the_model_type(tmp_path):
    """transformers has a tokenizer class of its own for Qwen3.5 and would split by its rules."""
    from sae_steering_plugin.organisms.tokenizer import CALL, train_tokenizer
    from sae_steering_plugin.organisms.train import qwen3_5_moe
    from sae_steering_plugin.organisms.world import World

    trained = train_tokenizer(World(0).texts(200), tmp_path, vocab_size=400)
    qwen3_5_moe(trained).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path)).tokenizer
    text = CALL[0] + "ask_user"
    assert len(loaded) == len(trained)
    assert loaded.tokenize(text) == trained.tokenize(text)
    for one in World(0).texts(20, seed=1):
        assert loaded(one, add_special_tokens=False) == trained(one, add_special_tokens=False)
