"""Checks 1 to 6 of shared/methods/causal_feature_scores, section 11, on the planted fixture."""

import pytest
import torch

from sae_steering_plugin import LAST, Add, Edit
from sae_steering_plugin.adapters.sae_parts import decoder_rows
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.features.causal import input_score
from sae_steering_plugin.organisms import list_organisms, load_organism
from sae_steering_plugin.runs.causal_scores import (
    feature_lens,
    firing_peaks,
    output_scores,
)
from tests.planted import PROMPT, planted


def scores(features=None, **options):
    p = planted()
    return output_scores(
        p.model, p.sae, features, **{"prompt": PROMPT, "k": 5, "progress": False, **options}
    )


def test_the_lens_of_both_twins_is_the_labels_tokens():
    p = planted()
    lens = feature_lens(p.model, p.sae, k=5)
    for twins in (p.inputs, p.outputs):
        for feature, own in zip(twins, p.tokens.values(), strict=True):
            assert set(lens.of([feature])[0].tolist()) == set(own)


def test_both_twins_detect_their_label():
    p = planted()
    lens = feature_lens(p.model, p.sae, k=5)
    peaks = firing_peaks(p.model, p.sae, p.texts, progress=False)
    found, counts = input_score(peaks, lens)
    assert (found[: len(p.inputs) + len(p.outputs)] == 1).all()
    assert counts[0] == sum("own0" in text for text in p.texts)
    assert float(found[list(p.random)].nanmean()) < 0.37  # the page's bound for random features


def test_output_twins_cause_and_input_twins_do_not():
    p = planted()
    found = scores().output_score
    inputs, outputs = found[list(p.inputs)], found[list(p.outputs)]
    others = found[list(p.random)]
    assert float(inputs.max()) < 0.018 < 0.15 < float(outputs.min())  # .009-.018, .177-.186
    assert float(others.max()) < 0.101


def test_the_push_saturates_behind_a_final_norm():
    gentle, hard = (scores([0, 6], strength=s, a_max=8.0).output_score for s in (1.0, 10.0))
    assert torch.allclose(gentle, hard, atol=0.01)


def test_no_edit_changes_nothing():
    found = scores(strength=0.0)
    assert not found.output_score.any() and not found.confidence.any()


def test_both_variants_differ_by_the_base_term():
    found = scores()
    assert torch.allclose(found.steered - found.output_score, found.base, rtol=0, atol=1e-15)
    assert (found.base > 0).all()


def test_a_row_of_length_zero_causes_exactly_nothing():
    """With the error kept; this SAE's bad reconstruction in its place would change the logits."""
    import copy

    p = planted()
    sae = copy.deepcopy(p.sae)
    with torch.no_grad():
        sae.W_dec[3] = 0
    found = output_scores(p.model, sae, prompt=PROMPT, k=5, progress=False)
    assert float(found.output_score[3]) == 0.0 and float(found.confidence[3]) == 0.0
    assert feature_lens(p.model, sae).settings["zero_rows"] == [3]
    tokens = torch.tensor([[1, 33, 34, 35, 36]])
    base = steered_logits(p.model, tokens, last_only=True)
    with p.model.saes([sae], use_error_term=False):
        replaced = p.model(tokens)[:, -1]
    assert (replaced - base).abs().max() > 0.1


def test_earlier_positions_are_untouched():
    p = planted()
    tokens = torch.tensor([[1, 33, 34, 35, 36]])
    edit = Edit(Add(10 * decoder_rows(p.sae, [6])), "blocks.0.hook_resid_post", positions=LAST)
    base, steered = (steered_logits(p.model, tokens, e) for e in ((), edit))
    assert torch.equal(base[:, :-1], steered[:, :-1])
    assert not torch.allclose(base[:, -1], steered[:, -1])


def test_scores_equal_edits_of_the_code_itself():
    """The attached SAE with its error term and a code raised by s a_max is the same edit."""
    p = planted()
    found = scores([6])
    push = found.settings["strength"] * found.settings["a_max"]
    tokens = torch.tensor([[1, 33, 34, 35, 36]])

    def raised(codes, hook):
        codes = codes.clone()
        codes[:, -1, 6] += push
        return codes

    name = "blocks.0.hook_resid_post.hook_sae_acts_post"
    with p.model.saes([p.sae], use_error_term=True):
        logits = p.model.run_with_hooks(tokens, fwd_hooks=[(name, raised)])
    probability = logits[0, -1].detach().softmax(-1)[list(p.tokens["label 0"])]
    assert float(found.steered[0]) == pytest.approx(float(probability.max()), abs=1e-5)


@pytest.mark.parametrize("name", list_organisms())
def test_rows_equal_one_feature_at_a_time(name):
    organism = load_organism(name)
    sae = next(iter(organism.saes.values()))
    many = output_scores(organism.model, sae, range(9), progress=False)
    one = output_scores(organism.model, sae, range(9), batch_size=1, progress=False)
    assert torch.allclose(many.steered, one.steered, atol=1e-5)
    assert torch.allclose(many.confidence, one.confidence, atol=1e-4)


def test_what_decides_a_number_is_recorded():
    settings = scores([1]).settings
    assert settings["a_max_rule"].startswith("largest code of any feature")
    assert settings["prompt"] == PROMPT and settings["error_term"] == "kept"
    assert scores([0, 1], a_max=torch.tensor([1.0, 2.0])).settings["a_max_rule"] == (
        "given per feature"
    )


def test_wrong_input_is_refused():
    with pytest.raises(IndexError, match=r"feature 99 lies outside 0\.\.31"):
        scores([99])
    with pytest.raises(ValueError, match="no feature is named"):
        scores([])
    with pytest.raises(ValueError, match="a_max has 3 entries for 2 features"):
        scores([0, 1], a_max=torch.ones(3))
    with pytest.raises(ValueError, match="a_max holds a value that is not finite"):
        scores([0, 1], a_max=float("nan"))


def test_a_silent_prompt_needs_an_a_max():
    import copy

    p = planted()
    sae = copy.deepcopy(p.sae)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    with pytest.raises(ValueError, match="no feature fires at the prompt's last token"):
        output_scores(p.model, sae, prompt=PROMPT, progress=False)
