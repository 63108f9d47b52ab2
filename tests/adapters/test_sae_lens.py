import json
from dataclasses import replace

import pytest
import torch
from sae_lens import SAE, SAETransformerBridge
from sae_lens.registry import SAE_CLASS_REGISTRY, get_sae_class
from sae_lens.saes.sae import SAEMetadata

from sae_steering_plugin.adapters.dictionary_rows import index_bytes, indices_from_bytes
from sae_steering_plugin.adapters.sae_lens import (
    SteeringDictionary,
    SteeringDictionaryConfig,
    content_hash,
    load_sae,
    register,
    sae_id,
    same_sae,
)
from sae_steering_plugin.types import ALL, DECODE, Positions, Recipe, SparseCodes, SteeringVector
from tests.hosts import D_MODEL, SITE, tiny_bridge, tiny_hooked, tiny_sae, tokens_of_length

RECIPE = Recipe(
    method="probe",
    positive="asks less",
    model_name="tiny",
    sae_id="standard@somewhere#0123456789ab",
    n=64,
    seed=3,
    unit="norm",
    mean_norm=1 / 3,
    settings={"alphas": (0.1, 10.0), "folds": [1, 2], "centred": True, "none": None},
    scores={"auroc": 0.1 + 0.2, "by_fold": ((0.5, 1.0), (0.25, 1.0))},
)


def vector(seed=0, *, label="", codes=None, hook_name=SITE, recipe=RECIPE):
    values = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed)) * 3
    return SteeringVector(values, hook_name, recipe, label or f"v{seed}", codes)


def sparse_vector(sae, seed=0, label="sas"):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(sae.cfg.d_sae, generator=generator)[:5].sort().values
    values = torch.randn(5, generator=generator)
    codes = SparseCodes(indices, values, sae.cfg.d_sae, sae_id(sae))
    return SteeringVector(codes.dense() @ sae.W_dec.detach(), SITE, RECIPE, label, codes)


def assert_same(one, other):
    assert torch.equal(one.vector, other.vector)
    assert one.vector.dtype == other.vector.dtype
    assert (one.hook_name, one.label) == (other.hook_name, other.label)
    assert one.recipe == other.recipe
    assert (one.codes is None) == (other.codes is None)
    if one.codes is not None:
        assert torch.equal(one.codes.indices, other.codes.indices)
        assert torch.equal(one.codes.values, other.codes.values)
        assert (one.codes.d_sae, one.codes.sae_id) == (other.codes.d_sae, other.codes.sae_id)


def reloaded(dictionary, folder, **options):
    dictionary.save_model(folder)
    return SAE.load_from_disk(folder, **options)


def edit_config(folder, change):
    path = folder / "cfg.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_vectors_come_back_bit_for_bit_before_and_after_the_disk(tmp_path):
    sae = tiny_sae()
    given = [vector(1), sparse_vector(sae), vector(2), sparse_vector(sae, 7, "sas 2")]
    made = SteeringDictionary.from_vectors(given, stability=[1.0, 2.0, 3.0, 4.0], spread=[0.5] * 4)
    for dictionary in (made, reloaded(made, tmp_path)):
        assert type(dictionary) is SteeringDictionary
        for one, other in zip(given, dictionary.vectors(), strict=True):
            assert_same(one, other)
        assert dictionary.stability.tolist() == [1, 2, 3, 4]
        assert dictionary.spread.tolist() == [0.5] * 4
        assert dictionary.cfg.codes_per_row == (0, 5, 0, 5)
        assert dictionary.cfg.metadata.model_name == "tiny"
        assert dictionary.cfg.metadata.hook_name == SITE


def test_writing_into_a_vector_given_back_leaves_the_dictionary_alone():
    dictionary = SteeringDictionary.from_vectors([vector(1)])
    dictionary.vectors()[0].vector.zero_()
    assert torch.equal(dictionary.vectors()[0].vector, vector(1).vector)


def test_positions_ride_along_per_row(tmp_path):
    rules = [DECODE, Positions(-3, -1, "prefill", bos=True)]
    made = SteeringDictionary.from_vectors([vector(1), vector(2)], positions=rules)
    assert [row.positions for row in reloaded(made, tmp_path).rows()] == rules
    made = SteeringDictionary.from_vectors([vector(1), vector(2)])
    assert [row.positions for row in made.rows()] == [ALL, ALL]


def test_figures_that_were_not_measured_are_nan():
    dictionary = SteeringDictionary.from_vectors([vector(1)], spread=[2.0])
    assert dictionary.stability.isnan().all()
    assert dictionary.spread.tolist() == [2.0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_latent_numbers_survive_loading_in_any_dtype(tmp_path, dtype):
    indices = torch.tensor([0, 1, 255, 256, 257, 65_537, 131_071, 2**30 + 1])
    codes = SparseCodes(indices, torch.ones(8), 2**31 - 1, "wide#000000000000")
    made = SteeringDictionary.from_vectors([vector(1, codes=codes)])
    loaded = reloaded(made, tmp_path, dtype=dtype)
    assert torch.equal(loaded.vectors()[0].codes.indices, indices)
    assert loaded.W_dec.dtype == loaded.code_values.dtype == getattr(torch, dtype)
    # a cast dictionary can be cast, saved and loaded again
    again = reloaded(loaded.to(torch.float32), tmp_path / "again")
    assert torch.equal(again.vectors()[0].codes.indices, indices)


def test_index_bytes_are_whole_numbers_that_bfloat16_holds():
    indices = torch.tensor([0, 300, 70_000, 2**31 - 1])
    stored = index_bytes(indices)
    assert torch.equal(stored.to(torch.bfloat16).to(torch.uint8), stored)
    assert torch.equal(indices_from_bytes(stored.to(torch.bfloat16)), indices)
    with pytest.raises(ValueError, match="four bytes per index"):
        indices_from_bytes(stored[:, :3])


def test_codes_read_the_signed_multiple_of_a_row():
    dictionary = SteeringDictionary.from_vectors([vector(1), vector(2)])
    for row, one in enumerate(dictionary.vectors()):
        for multiple in (-2.5, 0.0, 1.0, 7.0):
            code = dictionary.encode(multiple * one.vector)[row]
            torch.testing.assert_close(code, torch.tensor(multiple))


def test_decoding_sums_the_rows_and_is_linear():
    dictionary = SteeringDictionary.from_vectors([vector(1), vector(2)])
    first, second = (v.vector for v in dictionary.vectors())
    out = dictionary.decode(torch.tensor([[2.0, -3.0]]))
    torch.testing.assert_close(out, (2 * first - 3 * second)[None])


def test_orthogonal_rows_give_back_what_they_span():
    basis = torch.linalg.qr(torch.randn(D_MODEL, 3, generator=torch.Generator().manual_seed(0))).Q
    rows = [replace(vector(i), vector=basis[:, i].clone() * (i + 1)) for i in range(3)]
    dictionary = SteeringDictionary.from_vectors(rows)
    x = basis @ torch.tensor([1.0, -4.0, 0.5])
    torch.testing.assert_close(dictionary(x), x)


def test_a_zero_row_reads_and_writes_nothing():
    nothing = replace(vector(1), vector=torch.zeros(D_MODEL))
    dictionary = SteeringDictionary.from_vectors([nothing, vector(2)])
    assert dictionary.encode(torch.randn(4, D_MODEL))[:, 0].eq(0).all()
    assert dictionary.decode(torch.tensor([5.0, 0.0])).eq(0).all()


def acts_hook(model, dictionary):
    if isinstance(model, SAETransformerBridge):
        return model.get_sae_hook_name(dictionary)
    return f"{SITE}.hook_sae_acts_post"


def test_attached_without_an_edit_the_model_is_unchanged(host, tmp_path):
    tokens = tokens_of_length(2, 7)
    dictionary = SteeringDictionary.from_vectors([vector(1), vector(2), sparse_vector(tiny_sae())])
    base = host(tokens)
    for attached in (dictionary, reloaded(dictionary, tmp_path)):
        with host.saes([attached], use_error_term=True):
            # x + rounding of (recons + (x - recons)): a few float32 steps through two layers
            torch.testing.assert_close(host(tokens), base, atol=1e-4, rtol=1e-4)
    assert torch.equal(host(tokens), base)


def test_editing_the_codes_equals_adding_the_vector(host, tmp_path):
    tokens = tokens_of_length(2, 7)
    dictionary = SteeringDictionary.from_vectors([vector(1), vector(2)])
    dictionary = reloaded(dictionary, tmp_path)
    step = -1.5 * vector(2).vector

    def push(codes, hook):
        codes = codes.clone()
        codes[..., 1] += -1.5
        return codes

    name = "blocks.0.hook_out" if isinstance(host, SAETransformerBridge) else SITE
    with host.hooks(fwd_hooks=[(name, lambda x, hook: x + step)]):
        added = host(tokens)
    base = host(tokens)
    with host.saes([dictionary], use_error_term=True):
        site = acts_hook(host, dictionary)
        with host.hooks(fwd_hooks=[(site, push)]):
            edited = host(tokens)
    torch.testing.assert_close(edited, added, atol=1e-4, rtol=1e-4)
    assert (edited - base).abs().max() > 0.1


@pytest.mark.parametrize("make", [tiny_bridge, tiny_hooked])
def test_a_bfloat16_dictionary_drives_a_bfloat16_model(make, tmp_path):
    model, tokens = make().to(torch.bfloat16), tokens_of_length(2, 5)
    dictionary = SteeringDictionary.from_vectors([vector(1)])
    dictionary = reloaded(dictionary, tmp_path, dtype="bfloat16")
    base = model(tokens)
    with model.saes([dictionary], use_error_term=True):
        unedited = model(tokens)
    assert unedited.dtype == base.dtype
    assert (unedited - base).abs().max() < 0.25  # recons + (x - recons) in 8 bits of mantissa
    assert torch.equal(dictionary.vectors()[0].vector, vector(1).vector.bfloat16().float())


def test_features_become_rows_of_the_place_the_sae_writes_to():
    sae = tiny_sae("topk")
    dictionary = SteeringDictionary.from_features(sae, [3, 31], labels=["cats", "dogs"])
    assert torch.equal(dictionary.W_dec.detach(), sae.W_dec.detach()[[3, 31]])
    one = dictionary.vector("dogs")
    assert one.hook_name == SITE
    assert one.recipe.settings == {"feature": 31}
    assert one.recipe.row_norm == pytest.approx(float(sae.W_dec[31].detach().norm()))
    assert same_sae(one.recipe.sae_id, sae_id(sae))


def test_a_feature_the_sae_lacks_is_refused():
    with pytest.raises(IndexError, match=r"feature 32 lies outside 0\.\.31"):
        SteeringDictionary.from_features(tiny_sae(), [0, 32])
    with pytest.raises(ValueError, match="labels has 1 entries, not 2"):
        SteeringDictionary.from_features(tiny_sae(), [0, 1], labels=["one"])
    with pytest.raises(ValueError, match="at least one vector"):
        SteeringDictionary.from_features(tiny_sae(), [])


def test_only_vectors_of_one_place_make_a_dictionary():
    with pytest.raises(ValueError, match="at least one vector"):
        SteeringDictionary.from_vectors([])
    with pytest.raises(ValueError, match="share one hook point"):
        SteeringDictionary.from_vectors(
            [vector(1), vector(2, hook_name="blocks.1.hook_resid_post")]
        )
    with pytest.raises(ValueError, match="share one width"):
        SteeringDictionary.from_vectors([vector(1), replace(vector(2), vector=torch.ones(3))])
    with pytest.raises(ValueError, match="labels of one dictionary must differ"):
        SteeringDictionary.from_vectors([vector(1), vector(1)])
    with pytest.raises(ValueError, match="stability has 1 entries, not 2"):
        SteeringDictionary.from_vectors([vector(1), vector(2)], stability=[1.0])
    with pytest.raises(ValueError, match="positions has 1 entries, not 2"):
        SteeringDictionary.from_vectors([vector(1), vector(2)], positions=[ALL])


def test_recipes_of_several_models_need_a_name():
    other = vector(2, recipe=replace(RECIPE, model_name="large"))
    with pytest.raises(ValueError, match=r"recipes name the models \['large', 'tiny'\]"):
        SteeringDictionary.from_vectors([vector(1), other])
    named = SteeringDictionary.from_vectors([vector(1), other], model_name="tiny")
    assert named.cfg.metadata.model_name == "tiny"


def test_an_unknown_label_lists_the_nearest():
    dictionary = SteeringDictionary.from_vectors([vector(1, label="autonomy")])
    with pytest.raises(KeyError, match=r"no vector labelled 'autonmy'.*autonomy"):
        dictionary.vector("autonmy")


def test_a_recipe_that_json_cannot_hold_is_refused_by_name():
    odd = vector(1, recipe=replace(RECIPE, settings={"model": object()}))
    with pytest.raises(TypeError, match="recipe of 'v1' holds a object"):
        SteeringDictionary.from_vectors([odd])


def test_tensors_in_a_recipe_become_plain_numbers():
    numbers = vector(1, recipe=replace(RECIPE, scores={"auroc": torch.tensor(0.5)}))
    back = SteeringDictionary.from_vectors([numbers]).vectors()[0]
    assert back.recipe.scores == {"auroc": 0.5}


def test_codes_that_were_stored_are_refused_by_another_sae(tmp_path):
    from sae_steering_plugin.edits import SparseAdd

    sae = tiny_sae(seed=0)
    made = SteeringDictionary.from_vectors([sparse_vector(sae)])
    stored = reloaded(made, tmp_path).vector("sas")
    assert torch.equal(SparseAdd(sae, stored).codes.indices, stored.codes.indices)
    with pytest.raises(ValueError, match=r"built in 'standard@blocks\.0\.hook_resid_post#"):
        SparseAdd(tiny_sae(seed=1), stored)
    with pytest.raises(ValueError, match="32 latents, the dictionary 64"):
        SparseAdd(tiny_sae(d_sae=64), stored)


def test_folding_the_row_lengths_is_refused(tmp_path):
    dictionary = SteeringDictionary.from_vectors([vector(1)])
    for fold in (dictionary.fold_W_dec_norm, dictionary.fold_and_get_W_dec_norm):
        with pytest.raises(NotImplementedError, match="keep their lengths"):
            fold()
    dictionary.save_model(tmp_path)
    with pytest.raises(NotImplementedError, match="keep their lengths"):
        SAE.load_from_disk(tmp_path, fold_W_dec_norm=True)
    assert torch.equal(dictionary.vectors()[0].vector, vector(1).vector)


def misspell_record(config):
    config["metadata"]["steerings"] = config["metadata"].pop("steering")


def misspell_row(config):
    row = config["metadata"]["steering"]["rows"][0]
    row["lable"] = row.pop("label")


def misspell_recipe(config):
    config["metadata"]["steering"]["rows"][0]["recipe"]["methd"] = "probe"


def drop_recipe(config):
    del config["metadata"]["steering"]["rows"][0]["recipe"]


def drop_row(config):
    config["metadata"]["steering"]["rows"].pop()


def raise_format(config):
    config["metadata"]["steering"]["format"] = 99


def flatten_record(config):
    config["metadata"]["steering"] = ["row"]


def misspell_position(config):
    config["metadata"]["steering"]["rows"][0]["positions"]["begin"] = 0


def negative_codes(config):
    config["codes_per_row"] = [-1, 1]


def normalising(config):
    config["normalize_activations"] = "layer_norm"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (misspell_record, "metadata holds 'steerings'; it must be called 'steering'"),
        (misspell_row, "no field 'lable'; did you mean label"),
        (misspell_recipe, "a recipe has no field 'methd'"),
        (drop_recipe, "a row of metadata.steering lacks 'recipe'"),
        (drop_row, "metadata describes 1 rows, the weights have 2"),
        (raise_format, "has format 99; this version of the plugin reads 1"),
        (flatten_record, "metadata.steering must be a mapping, not list"),
        (misspell_position, "positions has no field 'begin'"),
        (negative_codes, "codes_per_row must count the codes of each of 2 rows"),
        (normalising, "normalize_activations='none', not 'layer_norm'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_spoilt_file_is_refused(tmp_path, spoil, message):
    SteeringDictionary.from_vectors([vector(1), vector(2)]).save_model(tmp_path)
    edit_config(tmp_path, spoil)
    with pytest.raises(ValueError, match=message):
        SAE.load_from_disk(tmp_path)


def test_a_dictionary_made_by_hand_has_unnamed_rows():
    config = SteeringDictionaryConfig(d_in=4, d_sae=2, metadata=SAEMetadata(hook_name=SITE))
    dictionary = SteeringDictionary(config)
    assert [v.label for v in dictionary.vectors()] == ["", ""]
    assert dictionary.vectors()[0].recipe.method == "unknown"


def test_a_dictionary_without_a_hook_point_says_so():
    dictionary = SteeringDictionary(SteeringDictionaryConfig(d_in=4, d_sae=2))
    with pytest.raises(ValueError, match="hook_name"):
        dictionary.vectors()


def test_a_file_of_rows_alone_loads_through_a_converter(tmp_path):
    rows = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(5))

    def rows_only(path, device, cfg_overrides=None):
        metadata = {"sae_lens_version": "6.0.0", "hook_name": SITE, "model_name": "tiny"}
        config = {"architecture": "steering", "d_in": D_MODEL, "d_sae": 2, "metadata": metadata}
        return {**config, "dtype": "float32", "device": device}, {"W_dec": rows.clone()}

    loaded = SAE.load_from_disk(tmp_path, converter=rows_only)
    torch.testing.assert_close(loaded.encode(3 * rows[1])[1], torch.tensor(3.0))
    assert torch.equal(loaded.vectors()[0].vector, rows[0])


def test_the_page_of_a_dictionary_escapes_what_it_shows():
    hostile = vector(1, label="<script>alert(1)</script>")
    page = SteeringDictionary.from_vectors([hostile], spread=[0.25])._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "0.25" in page


def test_registering_again_is_harmless_and_a_stranger_is_named(monkeypatch):
    register()
    assert get_sae_class("steering")[0] is SteeringDictionary
    monkeypatch.setitem(SAE_CLASS_REGISTRY, "steering", get_sae_class("standard"))
    with pytest.raises(ValueError, match=r"sae_lens\.saes\.standard_sae has already registered"):
        register()


@pytest.mark.parametrize("architecture", sorted(set(SAE_CLASS_REGISTRY) - {"steering"}))
def test_an_id_stays_through_saving_and_loading_in_another_dtype(tmp_path, architecture):
    options = {"apply_b_dec_to_input": False} if "transcoder" in architecture else {}
    if "transcoder" in architecture:
        options["d_out"] = D_MODEL
    sae = tiny_sae(architecture, **options)
    sae.save_model(tmp_path)
    for dtype in (None, torch.bfloat16, torch.float64):
        loaded = load_sae(tmp_path, dtype=dtype)
        assert sae_id(loaded) == sae_id(sae)
        assert dtype is None or loaded.W_dec.dtype == dtype
        assert not loaded.training


def test_ids_of_different_weights_differ():
    assert not same_sae(sae_id(tiny_sae(seed=0)), sae_id(tiny_sae(seed=1)))
    assert not same_sae(sae_id(tiny_sae(d_sae=32)), sae_id(tiny_sae(d_sae=64)))


def test_an_id_reads_many_rows_of_a_wide_dictionary():
    wide, other = tiny_sae(d_sae=4096), tiny_sae(d_sae=4096)
    with torch.no_grad():
        other.W_dec[64] += 1
    assert content_hash(wide) != content_hash(other)


def test_an_id_shows_where_the_sae_is_from_and_compares_by_content():
    sae = tiny_sae()
    unnamed = sae_id(sae)
    assert unnamed.startswith(f"standard@{SITE}#")
    sae.cfg.metadata.sae_id = "agent/block-2"
    assert sae_id(sae).startswith("agent/block-2#")
    sae.cfg.metadata.release = "mine"
    assert sae_id(sae).startswith("mine:agent/block-2#")
    assert same_sae(unnamed, sae_id(sae))


def test_an_sae_without_weights_has_no_id():
    with pytest.raises(ValueError, match="device 'meta'"):
        sae_id(tiny_sae().to("meta"))


def test_loading_from_a_folder_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no cfg\.json"):
        load_sae(tmp_path)
    tiny_sae().save_model(tmp_path)
    assert torch.equal(load_sae(str(tmp_path)).W_dec, tiny_sae().W_dec)
    edit_config(tmp_path, lambda config: config.update(architecture="batchtopk"))
    with pytest.raises(ValueError, match="architecture 'batchtopk'; SAELens can run .*steering"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="is not a JSON object"):
        load_sae(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no sae_weights\.safetensors"):
        load_sae(tmp_path)


def test_a_spec_that_is_neither_folder_nor_release_is_refused():
    with pytest.raises(
        FileNotFoundError, match="no folder here and not of the form release:sae_id"
    ):
        load_sae("no-such-folder")
    with pytest.raises(ValueError, match="no release 'gpt2-small-res-jp'.*'gpt2-small-res-jb'"):
        load_sae("gpt2-small-res-jp:blocks.8.hook_resid_pre")
    with pytest.raises(
        ValueError, match=r"has no SAE 'blocks.8.hook_resid_pr'.*blocks.8.hook_resid"
    ):
        load_sae("gpt2-small-res-jb:blocks.8.hook_resid_pr")


def test_a_release_that_cannot_be_reached_says_how_to_get_it(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="fetch it where there is a network"):
        load_sae("gpt2-small-res-jb:blocks.8.hook_resid_pre")


def test_a_release_goes_through_the_hosts_loader_and_remembers_its_name(monkeypatch):
    asked = []

    def from_pretrained(release, name, device, dtype):
        asked.append((release, name, device, dtype))
        return tiny_sae()

    monkeypatch.setattr(SAE, "from_pretrained", staticmethod(from_pretrained))
    sae = load_sae("gpt2-small-res-jb:blocks.8.hook_resid_pre", dtype=torch.bfloat16)
    assert asked == [("gpt2-small-res-jb", "blocks.8.hook_resid_pre", "cpu", "bfloat16")]
    assert sae_id(sae).startswith("gpt2-small-res-jb:blocks.8.hook_resid_pre#")


def test_real_saes_load_with_stable_ids(data):
    folders = sorted(path.parent for path in (data / "saes-stories260k").rglob("cfg.json"))
    assert folders
    ids = {sae_id(load_sae(folder)) for folder in folders}
    assert len(ids) == len(folders)
