"""Conversations as a person reads them, and which are shown."""

from sae_steering_plugin.runs.transcripts import Rollout, Rollouts, transcript, transcript_pairs


def spoken(scenario, arm, calls):
    return Rollout(scenario, arm, ({"role": "user", "content": scenario},), 1, calls)


def test_examples_are_the_first_changes_and_one_that_stayed():
    asks = {"base": "ask ask ask - ask ask", "arm": "- - ask - - -"}
    arms = {
        name: Rollouts(
            tuple(
                spoken(f"s{i}", name, ("ask_user",) if word == "ask" else ())
                for i, word in enumerate(row.split())
            ),
            {name: {}},
        )
        for name, row in asks.items()
    }
    found = transcript_pairs(arms["base"], arms["arm"], "autonomy")
    assert [one[0] for one in found] == ["s0", "s1", "s4", "s2"]


def test_a_transcript_shows_calls_and_results():
    call = {"function": {"name": "file_read", "arguments": {"path": "a.md"}}}
    text = transcript(
        (
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "file_read", "content": "two lines"},
        )
    )
    assert text == "[assistant] -> file_read(path='a.md')\n[tool file_read] two lines"
