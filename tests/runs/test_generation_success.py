"""GenSuccess on the planted fixture: an output twin writes its label's tokens, an input twin not.

Source of the protocol: arXiv 2505.20063."""

import pytest

from sae_steering_plugin.runs.generation_success import success_of_features
from tests.planted import PROMPT, planted

PROMPTS = (PROMPT, "word5 word6", "word9")
FACTORS = (1.0, 5.0, 100.0)


def measured(**options):
    p = planted()
    return success_of_features(
        p.model, p.sae, [p.inputs[0], p.outputs[0]], PROMPTS, [3.0, 0.1],
        **{"factors": FACTORS, "k": 5, "max_new_tokens": 12, "progress": False, **options},
    )  # fmt: skip


def test_the_cause_writes_its_tokens_and_the_detector_does_not():
    detector, cause = measured()
    assert cause.success[-1] > 10 > 3 > max(detector.success)  # nearly every new token of 12
    assert cause.success[0] < cause.success[1] < cause.success[2]
    assert 0 <= detector.unsteered < 3 and min(cause.perplexity) > 1
    assert cause.factor in FACTORS[:2] and cause.rows()[0]["factor"] == 0.0


def test_a_run_is_its_seeds_and_no_usable_factor_is_none():
    assert measured() == measured()
    assert measured(factors=(100.0,))[1].factor is None


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="at least one prompt and one factor above 0"):
        measured(factors=(0.0,))
    p = planted()
    with pytest.raises(ValueError, match="a_max has 2 entries for 1 features"):
        success_of_features(p.model, p.sae, [0], PROMPTS, [1.0, 2.0], progress=False)
