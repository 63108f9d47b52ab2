"""Exports run without this package: plain transformers, the harness's own hook, gguf's reader."""

import json
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from tempfile import mkdtemp

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_steering_plugin.adapters.checkpoint import opened_otherwise, plain_model
from sae_steering_plugin.adapters.engine import generate
from sae_steering_plugin.adapters.sae_lens import SteeringDictionary, load_sae
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.adapters.transformer_lens import load_model
from sae_steering_plugin.adapters.weights import (
    EVERYWHERE,
    NotConvertible,
    WeightEdit,
    to_bias_edit,
)
from sae_steering_plugin.edits import Add, Clamp
from sae_steering_plugin.runs import export
from sae_steering_plugin.runs.export import (
    export_checkpoint,
    export_gguf,
    export_lm_eval,
    read_gguf,
    read_lm_eval,
)
from sae_steering_plugin.types import ALL, Edit, Recipe, SteeringVector
from tests.hosts import (
    D_MODEL,
    tiny_bridge,
    tiny_gemma2,
    tiny_hooked,
    tiny_llama,
    tiny_neox,
    tiny_qwen3,
    tiny_sae,
    tiny_tokenizer,
    tokens_of_length,
)

HOSTS = {
    "gpt2": tiny_bridge,
    "pythia": tiny_neox,
    "llama": tiny_llama,
    "qwen3": tiny_qwen3,
    "gemma2": tiny_gemma2,
}
PUSH = 3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5))
TOKENS = tokens_of_length(2, 9)


@cache
def model_of(name):
    return HOSTS[name]()


def at(site, vector=PUSH):
    return Edit(Add(vector), site, EVERYWHERE)


SAVED = [
    ("gpt2", "blocks.0.hook_resid_post"),
    ("pythia", "blocks.0.hook_resid_post"),
    ("llama", "blocks.0.hook_resid_post"),
    ("qwen3", "blocks.1.hook_attn_out"),
    ("gemma2", "blocks.0.attn.hook_z"),
    ("gemma2", "blocks.0.hook_resid_pre"),
]


@pytest.mark.parametrize("name, site", SAVED)
def test_a_saved_checkpoint_gives_the_hooks_greedy_text_in_plain_transformers(name, site, tmp_path):
    model, edit = model_of(name), at(site)
    export_checkpoint(model, edit, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(plain) is type(model.original_model)
    plain.generation_config.eos_token_id = None
    found = plain.generate(TOKENS, do_sample=False, max_new_tokens=32, pad_token_id=0)
    hooked = generate(model, TOKENS, edit, max_new_tokens=32, stop_at_eos=False).tokens
    unsteered = generate(model, TOKENS, max_new_tokens=4, stop_at_eos=False).tokens
    assert torch.equal(found, hooked)
    assert not torch.equal(found[:, : unsteered.shape[1]], unsteered)
    with torch.no_grad():
        logits = plain(TOKENS).logits
    torch.testing.assert_close(logits, steered_logits(model, TOKENS, edit), atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path).vocab == model.tokenizer.vocab


def test_the_saved_tokenizer_is_the_checkpoint_s_own(tmp_path):
    model = model_of("gpt2")  # its host has a tokenizer that prepends a BOS; this one does not
    own, texts = tiny_tokenizer(), ["the cat", "sat"]
    assert model.tokenizer(texts)["input_ids"] != own(texts)["input_ids"]
    export_checkpoint(model, at("blocks.0.hook_resid_post"), tmp_path / "own")
    saved = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert saved(texts)["input_ids"] == own(texts)["input_ids"]
    told = json.loads((tmp_path / "own" / "steering.json").read_text())["tokenizer"]
    assert told == "as in the checkpoint of the model"


def test_a_tokenizer_whose_source_is_gone_is_saved_as_the_host_has_it_and_said(tmp_path):
    model = tiny_bridge()
    model.tokenizer = deepcopy(model.tokenizer)
    model.tokenizer.name_or_path = str(tmp_path / "gone")
    export_checkpoint(model, at("blocks.0.hook_resid_post"), tmp_path / "host")
    saved = AutoTokenizer.from_pretrained(tmp_path / "host")
    assert saved("sat")["input_ids"] == model.tokenizer("sat")["input_ids"]
    told = json.loads((tmp_path / "host" / "steering.json").read_text())["tokenizer"]
    assert told.startswith("as the host has it")


def test_a_tokenizer_that_transformers_opens_as_another_is_told(tmp_path, monkeypatch):
    own = tiny_tokenizer()
    model_of("gpt2").original_model.config.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    assert opened_otherwise(own, tmp_path) is None
    assert opened_otherwise(lambda text: {"input_ids": [3]}, tmp_path)
    # agent-qwen3_5_moe's architecture is such a one: transformers has a way of its own to split
    monkeypatch.setattr(export, "opened_otherwise", lambda *_: "Qwen3_5Tokenizer")
    with pytest.warns(UserWarning, match="opens .* as Qwen3_5Tokenizer and splits texts otherwise"):
        export_checkpoint(model_of("gpt2"), at("blocks.0.hook_resid_post"), tmp_path / "other")
    told = json.loads((tmp_path / "other" / "steering.json").read_text())["tokenizer"]
    assert told.endswith("AutoTokenizer opens it as Qwen3_5Tokenizer, which splits otherwise")


def test_only_what_is_needed_is_switched_on_and_untied(tmp_path):
    model, before = model_of("gemma2"), model_of("gemma2").original_model.config.to_dict()
    export_checkpoint(model, at("blocks.0.attn.hook_z"), tmp_path / "bias")
    export_checkpoint(model, at("blocks.0.hook_resid_pre"), tmp_path / "embedding")
    bias, embedding = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("bias", "embedding")
    )
    assert bias["attention_bias"] and bias["tie_word_embeddings"]
    assert not embedding["attention_bias"] and not embedding["tie_word_embeddings"]
    saved = load_file(tmp_path / "embedding" / "model.safetensors")
    table = model.embed._original_component.weight.detach()
    assert torch.equal(saved["lm_head.weight"], table)
    scaled = saved["model.embed_tokens.weight"] - table
    torch.testing.assert_close(scaled, (PUSH / D_MODEL**0.5).expand_as(table))
    assert model.original_model.config.to_dict() == before


def test_the_checkpoint_says_what_was_added(tmp_path):
    site = "blocks.0.hook_resid_post"
    vector = SteeringVector(PUSH, site, Recipe("diff_mean", seed=3), label="kind")
    export_checkpoint(model_of("gpt2"), vector, tmp_path)
    told = json.loads((tmp_path / "steering.json").read_text())
    assert told["edits"][0]["label"] == "kind"
    assert Recipe.from_dict(told["edits"][0]["recipe"]) == vector.recipe
    assert told["parameters"] == {"blocks.0.mlp.b_out": pytest.approx(vector.norm)}
    with pytest.raises(FileExistsError, match="not empty"):
        export_checkpoint(model_of("gpt2"), vector, tmp_path)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_architectures_without_the_bias_are_refused_with_what_they_can_carry(name, tmp_path):
    site = "blocks.1.mlp.hook_out"
    edit = to_bias_edit(model_of(name), at(site))  # convertible in memory, not in the format
    with pytest.raises(
        NotConvertible, match=r"layers\.1\.mlp\.down_proj has no bias in any"
    ) as told:
        export_checkpoint(model_of(name), edit, tmp_path / "out")
    assert "blocks.1.attn.hook_z" in str(told.value) and site not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_weights_that_were_processed_after_loading_are_found_out(tmp_path):
    model = tiny_bridge()
    for block in model.blocks:
        block.ln1._original_component.weight.data.uniform_(0.5, 2.0)
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(NotConvertible, match="enable_compatibility_mode"):
        export_checkpoint(model, at("blocks.0.hook_resid_post"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_hosts_have_no_checkpoint_to_save(tmp_path):
    with pytest.raises(TypeError, match="holds no Hugging Face model"):
        export_checkpoint(tiny_hooked(), at("blocks.0.hook_resid_post"), tmp_path / "out")


LM_EVAL = [
    ("gpt2", "blocks.0.hook_resid_post", "h.0"),
    ("gpt2", "blocks.1.hook_resid_pre", "h.0"),
    ("gpt2", "blocks.1.hook_attn_out", "h.1.attn"),
    ("pythia", "blocks.1.hook_mlp_out", "layers.1.mlp"),
    ("llama", "blocks.0.hook_resid_pre", "embed_tokens"),
    ("llama", "blocks.1.hook_attn_out", "layers.1.self_attn"),
    ("gemma2", "blocks.0.hook_resid_post", "layers.0"),
    ("gemma2", "blocks.0.hook_attn_out", "layers.0.post_attention_layernorm"),
]


@pytest.mark.parametrize("name, site, module", LM_EVAL)
def test_the_harness_file_steers_a_plain_model_as_the_hook_does(name, site, module, tmp_path):
    model = model_of(name)
    path = export_lm_eval(model, at(site), tmp_path / "steer.pt")
    read = read_lm_eval(path)
    assert list(read) == [module]
    assert torch.equal(read[module], PUSH)
    plain = plain_of(name)
    with harness_steering(plain, path), torch.no_grad():
        logits = plain(TOKENS).logits
    wanted = steered_logits(model, TOKENS, at(site))
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wanted, steered_logits(model, TOKENS), atol=1e-2)


@cache
def checkpoint_of(name):
    """A folder with the unsteered model and its tokenizer, as transformers reads them."""
    folder = mkdtemp(prefix=f"plain_{name}_")
    plain_model(WeightEdit(model_of(name), ())).save_pretrained(folder)
    model_of(name).tokenizer.save_pretrained(folder)
    return folder


@cache
def plain_of(name):
    return AutoModelForCausalLM.from_pretrained(checkpoint_of(name)).eval()


@contextmanager
def harness_steering(plain, path):
    """The loop of lm_eval/models/hf_steered.py: a forward hook on each module of the base model."""
    entries = torch.load(path, weights_only=True)
    handles = []
    for name, module in plain.base_model.named_modules():
        if name in entries:
            entry = entries[name]
            step = entry["steering_coefficient"] * entry["steering_vector"]
            handles.append(module.register_forward_hook(partial(added, step)))
    assert len(handles) == len(entries)
    yield
    for handle in handles:
        handle.remove()


def added(step, module, arguments, output):
    return (output[0] + step, *output[1:]) if isinstance(output, tuple) else output + step


TWO_PLACES = [
    ("gpt2", ("blocks.0.hook_resid_post", "blocks.1.hook_attn_out")),
    ("llama", ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post")),
    ("llama", ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre")),  # one module, summed
]


@pytest.mark.parametrize(
    "name, sites", [*((name, (site,)) for name, site, _ in LM_EVAL), *TWO_PLACES]
)
def test_the_harness_itself_steers_as_the_hook_does(name, sites, tmp_path):
    steered = pytest.importorskip(
        "lm_eval.models.hf_steered", reason="lm-eval is not installed: pip install lm-eval"
    )
    from lm_eval.api.instance import Instance

    model, edits = model_of(name), [at(site, PUSH.roll(i)) for i, site in enumerate(sites)]
    path = export_lm_eval(model, edits, tmp_path / "steer.pt")
    harness = steered.SteeredModel(checkpoint_of(name), str(path), device="cpu")
    wanted = steered_logits(model, TOKENS, edits)
    torch.testing.assert_close(harness._model_call(TOKENS), wanted, atol=1e-5, rtol=1e-5)
    text = harness._model_generate(TOKENS, max_length=25, stop=["<eos>"])
    assert torch.equal(text, generate(model, TOKENS, edits, max_new_tokens=16).tokens)

    start, end = "the cat", " sat on the mat"
    asked = Instance("loglikelihood", {}, (start, end), 0, metadata=("task", 0, 1))
    ((found, _),) = harness.loglikelihood([asked], disable_tqdm=True)
    ids, first = torch.tensor([harness.tok_encode(start + end)]), len(harness.tok_encode(start))
    spoken = steered_logits(model, ids, edits)[0, :-1].log_softmax(-1)
    each = spoken.gather(1, ids[0, 1:, None])[first - 1 :]
    assert found == pytest.approx(float(each.sum()), abs=1e-4)


def test_edits_of_one_module_are_summed_for_the_harness(tmp_path):
    edits = [at("blocks.0.hook_resid_post"), at("blocks.1.hook_resid_pre", PUSH.roll(2))]
    read = read_lm_eval(export_lm_eval(model_of("gpt2"), edits, tmp_path / "two.pt"))
    assert list(read) == ["h.0"]
    torch.testing.assert_close(read["h.0"], PUSH + PUSH.roll(2))


def test_what_the_harness_cannot_do_is_refused(tmp_path):
    model, path = model_of("gpt2"), tmp_path / "steer.pt"
    with pytest.raises(NotConvertible, match="depends on the activation"):
        export_lm_eval(model, Edit(Clamp(tiny_sae(), 3, 5.0), positions=EVERYWHERE), path)
    with pytest.raises(NotConvertible, match="BOS and padding"):
        export_lm_eval(model, Edit(Add(PUSH), "blocks.0.hook_resid_post", ALL), path)
    for site in ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid"):
        with pytest.raises(NotConvertible, match="not the output of a module"):
            export_lm_eval(model, at(site), path)
    with pytest.raises(ValueError, match=r"end in \.pt"):
        export_lm_eval(model, at("blocks.0.hook_resid_post"), tmp_path / "steer.csv")
    with pytest.raises(TypeError, match="holds no Hugging Face model"):
        export_lm_eval(tiny_hooked(), at("blocks.0.hook_resid_post"), path)
    assert not path.exists()
    torch.save({"h.0": {"action": "clamp"}}, path)
    with pytest.raises(ValueError, match="'clamp'"):
        read_lm_eval(path)


def test_control_vectors_are_read_back_as_they_were_written(tmp_path):
    pytest.importorskip("gguf")
    model = model_of("llama")
    edits = [at("blocks.1.hook_resid_post"), at("blocks.1.hook_resid_post", PUSH.roll(2))]
    read = read_gguf(export_gguf(model, edits, tmp_path / "control.gguf"))
    assert list(read) == [1]
    torch.testing.assert_close(read[1], PUSH + PUSH.roll(2))


def test_control_vectors_have_the_names_and_types_that_llama_cpp_reads(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = export_gguf(model_of("llama"), at("blocks.1.hook_resid_post"), tmp_path / "c.gguf")
    reader = gguf.GGUFReader(str(path))
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [
        ("direction.1", "F32", [D_MODEL])
    ]
    hint = reader.fields["controlvector.model_hint"]
    assert bytes(hint.parts[hint.data[0]]).decode() == "llama"


def test_what_a_control_vector_cannot_do_is_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "control.gguf"
    for site in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"):
        with pytest.raises(NotConvertible, match="block 1 or a later one"):
            export_gguf(model_of("llama"), at(site), path)
    with pytest.raises(NotConvertible, match="BOS and padding"):
        export_gguf(model_of("llama"), Edit(Add(PUSH), "blocks.1.hook_resid_post", ALL), path)
    assert not path.exists()
    other = gguf.GGUFWriter(str(path), "llama")
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.write_tensors_to_file()
    other.close()
    with pytest.raises(ValueError, match="holds a 'llama'"):
        read_gguf(path)


def test_a_real_model_with_a_trained_sae_is_saved_with_a_features_row(data, tmp_path):
    model = load_model(str(data / "stories260k"))
    sae = load_sae(next(path.parent for path in sorted(data.glob("saes-stories260k/**/cfg.json"))))
    (vector,) = SteeringDictionary.from_features(sae, [3]).vectors()
    edit = Edit(Add(vector, 4.0), positions=EVERYWHERE)
    export_checkpoint(model, edit, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    plain.generation_config.eos_token_id = None
    tokens = model.tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    found = plain.generate(tokens, do_sample=False, max_new_tokens=32)
    hooked = generate(model, tokens, edit, max_new_tokens=32, stop_at_eos=False)
    assert torch.equal(found, hooked.tokens)
