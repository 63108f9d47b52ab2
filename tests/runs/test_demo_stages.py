"""How the main job chooses its strengths."""

from dataclasses import replace

from sae_steering_plugin.runs.demo_stages import chosen_effect, strengths_above
from tests.test_plots import effect


def test_finer_strengths_divide_the_gap_above_the_chosen_one():
    assert strengths_above(0.5, (0.35, 0.5, 0.65), 2) == [0.55, 0.6]
    assert strengths_above(0.65, (0.35, 0.5, 0.65), 2) == []
    assert strengths_above(0.35, (0.5, 0.35), 0) == []


def test_the_strength_is_the_largest_effect_among_the_clearly_valid():
    tried = [
        effect(strength=0.2, d=0.5, valid_rate=1.0),
        effect(strength=0.4, d=1.2, valid_rate=0.97),
        effect(strength=0.6, d=2.0, valid_rate=0.96),  # within a standard error of the floor
        effect(strength=0.8, d=3.0, valid_rate=0.4),
    ]
    assert chosen_effect(tried, valid=0.95).strength == 0.4
    assert chosen_effect([replace(one, n=50) for one in tried], valid=0.95).strength == 0.2
    assert chosen_effect(tried[3:], valid=0.95).strength == 0.8
    unknown = [effect(strength=s, d=s, valid_rate=float("nan")) for s in (0.2, 0.4)]
    assert chosen_effect(unknown, valid=0.95).strength == 0.4
