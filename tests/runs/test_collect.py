import pytest
import torch

from sae_steering_plugin.adapters.activations import encode_texts
from sae_steering_plugin.runs.collect import (
    collect_contrast,
    collect_labelled,
    encode_labelled,
    first_seen,
    read_positions,
)
from sae_steering_plugin.types import Contrast
from tests.adapters.test_activations import alone
from tests.hosts import SITE, tiny_sae

QUIET = {"progress": False}
PAIRS = Contrast(
    positive=("the cat sat on the mat", "a dog ran", "the cat"),
    negative=("a dog", "the mat", "a dog ran in the park and the cat sat still"),
    name="pets",
)
QUESTION = "Choices:\n (A) yes\n (B) no\nAnswer: ("
LETTERED = Contrast(
    positive=(QUESTION + "A)", QUESTION + "B)"),
    negative=(QUESTION + "B)", QUESTION + "A)"),
    letters=((len(QUESTION),) * 2, (len(QUESTION),) * 2),
)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_the_last_real_token_of_each_text_whatever_the_batches(host, batch_size, side):
    found = collect_contrast(host, PAIRS, SITE, batch_size=batch_size, padding_side=side, **QUIET)
    texts = (*PAIRS.positive, *PAIRS.negative)
    expected = torch.stack([alone(host, text)[-1] for text in texts])
    assert torch.allclose(found.activations, expected, atol=2e-5)
    assert found.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert found.pairs.tolist() == [0, 1, 2, 0, 1, 2]
    assert found.texts == texts
    assert found.letters == ()
    assert (found.hook_name, found.name) == (SITE, "pets")
    assert found.model_name == host.cfg.model_name


def test_mean_norm_runs_over_real_tokens_without_the_bos(host):
    found = collect_contrast(host, PAIRS, SITE, batch_size=2, **QUIET)
    texts = (*PAIRS.positive, *PAIRS.negative)
    norms = torch.cat([alone(host, text)[1:].norm(dim=-1) for text in texts])
    assert found.mean_norm == pytest.approx(float(norms.mean()), rel=1e-5)


def test_letters_are_read_at_their_own_token_and_the_bracket_is_not(host):
    found = collect_contrast(host, LETTERED, SITE, **QUIET)
    for row, text in zip(found.activations, found.texts, strict=True):
        assert torch.allclose(row, alone(host, text)[-2], atol=2e-5)  # ")" follows the letter
    assert found.letters == ("A", "B", "B", "A")
    last = collect_contrast(host, LETTERED, SITE, position="last", **QUIET)
    assert last.letters == ()
    assert not torch.allclose(last.activations, found.activations, atol=1e-3)
    minus_two = collect_contrast(host, LETTERED, SITE, position=-2, **QUIET)
    assert torch.allclose(minus_two.activations, found.activations, atol=1e-6)


def test_letters_on_one_side_only_leave_the_other_at_its_last_token(bridge):
    mixed = Contrast(
        positive=(QUESTION + "A)",), negative=("the cat",), letters=((len(QUESTION),), ())
    )
    found = collect_contrast(bridge, mixed, SITE, **QUIET)
    assert torch.allclose(found.activations[0], alone(bridge, mixed.positive[0])[-2], atol=2e-5)
    assert torch.allclose(found.activations[1], alone(bridge, "the cat")[-1], atol=2e-5)
    with pytest.raises(ValueError, match="text 1 has no letter offset"):
        collect_contrast(bridge, mixed, SITE, position="letter", **QUIET)


def test_groups_are_those_given_or_one_for_each_distinct_pair(bridge):
    named = Contrast(PAIRS.positive, PAIRS.negative, groups=("x", "x", "y"))
    assert collect_contrast(bridge, named, SITE, **QUIET).groups == ("x", "x", "y") * 2
    repeated = Contrast(("the", "a dog", "the"), ("cat", "mat", "cat"))
    groups = collect_contrast(bridge, repeated, SITE, **QUIET).groups
    assert groups[0] == groups[2] == groups[3] != groups[1]


def test_unpaired_lists_of_unequal_length_are_collected(bridge):
    unpaired = Contrast(("the cat", "a dog"), ("the mat", "still", "the cat"), paired=False)
    found = collect_contrast(bridge, unpaired, SITE, **QUIET)
    assert found.labels.tolist() == [1, 1, 0, 0, 0]
    assert found.pairs.tolist() == [-1] * 5
    assert found.groups[0] == found.groups[4]  # the same text never straddles a split
    assert len(set(found.groups)) == 4


def test_labelled_texts_come_back_in_their_own_order(host):
    texts = ["the cat sat on the mat", "the", "a dog ran in the park"]
    found = collect_labelled(host, texts, [0, 1, 1], SITE, batch_size=2, name="n", **QUIET)
    for row, text in zip(found.activations, texts, strict=True):
        assert torch.allclose(row, alone(host, text)[-1], atol=2e-5)
    assert found.labels.tolist() == [0, 1, 1]
    assert found.texts == tuple(texts)
    by_letter = collect_labelled(
        host,
        LETTERED.positive,
        [1, 0],
        SITE,
        letters=[len(QUESTION)] * 2,
        groups=["g", "h"],
        **QUIET,
    )
    assert by_letter.letters == ("A", "B")
    assert by_letter.groups == ("g", "h")


def test_a_dictionary_names_the_site_and_the_bos(bridge):
    sae = tiny_sae()
    assert torch.equal(
        collect_contrast(bridge, PAIRS, sae, **QUIET).activations,
        collect_contrast(bridge, PAIRS, SITE, prepend_bos=True, **QUIET).activations,
    )
    sae.cfg.metadata.prepend_bos = False
    without = collect_contrast(bridge, PAIRS, sae, **QUIET)
    assert torch.equal(
        without.activations,
        collect_contrast(bridge, PAIRS, SITE, prepend_bos=False, **QUIET).activations,
    )


def test_codes_of_collected_rows_are_those_of_the_dictionary(bridge):
    sae = tiny_sae("jumprelu", normalize_activations="layer_norm")
    found = collect_contrast(bridge, PAIRS, sae, **QUIET)
    with torch.no_grad():
        expected = sae.encode(found.activations)
    assert torch.allclose(encode_labelled(sae, found, batch_size=4).dense(), expected, atol=1e-5)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    with pytest.raises(ValueError, match="trained on 'blocks.1.hook_resid_post'"):
        encode_labelled(sae, found)


def test_a_dictionary_that_does_not_fit_the_site_is_refused(bridge):
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    with pytest.raises(ValueError, match=r"explains -?\d+\.\d\d of the variance .* BOS policy"):
        collect_contrast(bridge, PAIRS, tiny_sae(), min_explained_variance=0.9, **QUIET)
    narrow = StandardSAE(
        StandardSAEConfig(d_in=8, d_sae=4, metadata=SAEMetadata(hook_name=SITE, prepend_bos=True))
    )
    with pytest.raises(ValueError, match="16 wide and the SAE reads 8"):
        collect_contrast(bridge, PAIRS, narrow, **QUIET)
    with pytest.raises(ValueError, match="needs an SAE"):
        collect_contrast(bridge, PAIRS, SITE, min_explained_variance=0.5, **QUIET)


def test_real_dictionary_fits_its_site_and_not_the_layer_before(data):
    from sae_steering_plugin.adapters.sae_lens import load_sae
    from sae_steering_plugin.adapters.transformer_lens import load_model

    model = load_model(str(data / "stories260k"))
    sae = load_sae(str(data / "saes-stories260k" / "l2-resid-post-topk"))
    stories = Contrast(
        ("Once upon a time, there was a happy girl.", "The dog was so happy to play."),
        ("Once upon a time, there was a sad girl.", "The dog was so sad to leave."),
    )
    options = {"min_explained_variance": 0.8, **QUIET}
    found = collect_contrast(model, stories, sae, **options)
    assert found.hook_name == "blocks.2.hook_resid_post"
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    with pytest.raises(ValueError, match="less than 0.8"):
        collect_contrast(model, stories, sae, **options)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([1], {}, r"labels have shape \(1,\) for 2 texts"),
        ([1, 2], {}, "labels are 1 or 0, and 2 was given"),
        ([1, 0], {"groups": ["x"]}, "groups has 1 entries for 2 texts"),
        ([1, 0], {"letters": [3]}, "letters has 1 entries for 2 texts"),
        ([1, 0], {"batch_size": 0}, "batch_size is 0"),
        ([1, 0], {"position": 9}, r"position 9 of text 0 \(3 tokens\) is outside it or on its BOS"),
        ([1, 0], {"position": 0}, "outside it or on its BOS"),
        ([1, 0], {"max_tokens": 2}, "the limit is 2"),
        ([1, 0], {"letters": [0, 0]}, "text 0: letter 't' .* merged into the token"),
    ],
)
def test_bad_input_is_refused_before_any_forward_pass(bridge, labels, options, message):
    calls = []
    handle = bridge.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        collect_labelled(bridge, ["the cat", "the mat"], labels, SITE, **options, **QUIET)
    handle.remove()
    assert not calls


def test_no_texts_empty_texts_and_unknown_sites_are_refused(bridge):
    with pytest.raises(ValueError, match="no texts"):
        collect_labelled(bridge, [], [], SITE, **QUIET)
    with pytest.raises(ValueError, match="text 1 is empty"):
        collect_labelled(bridge, ["the cat", ""], [1, 0], SITE, **QUIET)
    with pytest.raises(KeyError, match="no hook point"):
        collect_labelled(bridge, ["the cat", "a"], [1, 0], "blocks.0.hook_resid_pst", **QUIET)


def test_position_words_are_checked(bridge):
    encoded = encode_texts(bridge, ["the cat"], prepend_bos=True)
    assert read_positions(encoded, ["the cat"], [None], "auto") == [len(encoded[0]) - 1]
    assert read_positions(encoded, ["the cat"], [None], 1) == [1]


def test_progress_is_shown_unless_switched_off(bridge, capsys):
    collect_contrast(bridge, PAIRS, SITE)
    assert "collect blocks.0.hook_resid_post" in capsys.readouterr().err
    collect_contrast(bridge, PAIRS, SITE, progress=False)
    assert capsys.readouterr().err == ""


def test_equal_items_share_a_group_name():
    assert first_seen(["a", "b", "a"]) == ("item 0", "item 1", "item 0")


def test_every_construction_finds_the_word_feature_of_a_real_dictionary(data):
    """Sentences that end in happy or sad: one real feature fires on the token for happy only."""
    import json

    from sae_steering_plugin.adapters.sae_lens import load_sae
    from sae_steering_plugin.adapters.transformer_lens import load_model
    from sae_steering_plugin.directions import probe_vector, rank_features, sas_vector

    folder = data / "saes-stories260k" / "l2-resid-post-standard"
    table = (folder / "feature_table.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in table.splitlines()]
    (feature,) = (row["feature"] for row in rows if [t for t, _ in row["tokens"]] == ["▁happy"])
    model, sae = load_model(str(data / "stories260k")), load_sae(str(folder))
    who = ("The dog", "A little girl", "Tom", "The boy", "Mia", "The cat", "His mom", "The bird")
    contrast = Contrast(
        tuple(f"{name} was so happy" for name in who), tuple(f"{name} was so sad" for name in who)
    )
    labelled = collect_contrast(model, contrast, sae, **QUIET)
    codes = encode_labelled(sae, labelled)
    sparse = sas_vector(labelled, sae, codes=codes)
    assert int(sparse.codes.indices[sparse.codes.values.argmax()]) == feature
    assert rank_features(codes, labelled.labels, labelled.groups).features[0] == feature
    probe = probe_vector(labelled, sae, codes=codes, permutations=2)
    assert probe.recipe.settings["top_features"][0][0] == feature
    assert probe.recipe.scores["auroc"] == sparse.recipe.scores["auroc"] == 1.0
