import pytest
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

from sae_steering_plugin.adapters.sae_parts import (
    KNOWN,
    TRANSCODERS,
    architecture,
    decoder_rows,
    normalised,
    own_nonlinearity,
    parts_of,
    site_names,
    whole_codes,
)
from tests.edits.test_codes import D_SAE, cases, residual, sae_of, spelled
from tests.hosts import D_MODEL, SITE
from tests.oracles import decoded, own_rule

every_dictionary = pytest.mark.parametrize("case", list(cases()), ids=spelled)


def test_every_architecture_of_saelens_is_known():
    assert set(SAE_CLASS_REGISTRY) == KNOWN
    assert {w for w in SAE_CLASS_REGISTRY if w.endswith("transcoder")} == TRANSCODERS
    for word in SAE_CLASS_REGISTRY:
        assert architecture(sae_of(word)) == word


@every_dictionary
def test_rows_are_what_one_unit_of_code_adds_to_the_output(case):
    sae, x = sae_of(case[0], **case[1]), residual()
    none, unit = torch.zeros(2, 5, D_SAE), torch.zeros(2, 5, D_SAE)
    unit[..., 7] = 1.0
    added = decoded(sae, x, unit) - decoded(sae, x, none)
    scale = normalised(sae, x)[1]
    row = decoder_rows(sae, [7])[0]
    torch.testing.assert_close(
        row.expand_as(added) if scale is None else row * scale, added, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(decoder_rows(sae)[7], row)
    assert not decoder_rows(sae).requires_grad


@every_dictionary
def test_the_rule_leaves_the_dictionarys_own_codes_alone(case):
    sae, x = sae_of(case[0], **case[1]), residual()
    if case[0] in ("topk", "abstopk"):
        codes = sae.encode(x).detach()
        same = torch.stack([torch.stack([own_rule(sae, token) for token in row]) for row in codes])
        assert torch.equal(same, codes)
        return
    parts = parts_of(sae, range(D_SAE), "cpu")
    codes = parts.encode_rows(x)
    assert torch.equal(own_nonlinearity(parts, case[0])(codes), codes)
    torch.testing.assert_close(codes, sae.encode(x).detach(), rtol=1e-4, atol=1e-5)


def test_bfloat16_dictionaries_are_read_in_float32():
    sae, x = sae_of("jumprelu"), residual()
    half = sae_of("jumprelu").to(torch.bfloat16)
    parts = parts_of(half, [1, 2, 3], "cpu")
    assert parts.rows.dtype == parts.encode_rows(x).dtype == torch.float32
    torch.testing.assert_close(parts.rows, decoder_rows(sae, [1, 2, 3]), rtol=2**-8, atol=1e-2)


def test_whole_codes_runs_no_hook_and_puts_them_back():
    sae, x, runs = sae_of("matching_pursuit"), residual(), []
    sae.hook_sae_input.add_hook(lambda acts, hook: runs.append(1) and None)
    torch.testing.assert_close(whole_codes(sae, x), sae_of("matching_pursuit").encode(x))
    assert runs == []
    sae.encode(x)
    assert runs == [1]


def test_site_names_tell_read_from_write():
    sae = sae_of("standard")
    assert site_names(sae) == (SITE, SITE)
    sae.cfg.metadata = SAEMetadata(hook_name="a", hook_name_out="b")
    assert site_names(sae) == ("a", "b")
    sae.cfg.metadata = SAEMetadata()
    with pytest.raises(ValueError, match="StandardSAE does not say where it was trained: set"):
        site_names(sae)


def test_a_feature_outside_is_refused():
    with pytest.raises(ValueError, match=r"feature 99 is outside 0\.\.31 of this dictionary"):
        parts_of(sae_of("standard"), [3, 99], "cpu")


def test_an_unknown_architecture_is_read_but_its_rule_is_not_guessed():
    sae = sae_of("standard")

    class Mystery(type(sae.cfg)):
        @classmethod
        def architecture(cls):
            return "mystery"

    sae.cfg.__class__ = Mystery
    x = residual()
    parts = parts_of(sae, [3, 4], "cpu")
    assert parts.kind == "whole"
    torch.testing.assert_close(parts.encode_rows(x), sae.encode(x).detach())
    with pytest.raises(ValueError, match="'mystery' is not known here; pass nonlinearity='relu'"):
        own_nonlinearity(parts, "mystery")
    from sae_steering_plugin.edits import Ablate, SparseAdd

    f32 = {"dtype": torch.float32, "device": torch.device("cpu")}
    with pytest.raises(ValueError, match="'mystery' is not known here"):
        SparseAdd(sae, torch.ones(D_SAE)).prepare(**f32)
    SparseAdd(sae, torch.ones(D_SAE), nonlinearity="relu").prepare(**f32)(x)
    codes = sae.encode(x).detach()
    change = Ablate(sae, 3).prepare(**f32)(x)
    torch.testing.assert_close(
        change, -codes[..., 3:4] * sae.W_dec[3].detach().reshape(1, 1, D_MODEL)
    )
