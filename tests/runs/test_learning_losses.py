"""Losses of a report: token sums, and preferences whose two sides pull opposite ways."""

import pytest
import torch

from sae_steering_plugin.adapters.activations import encode_texts, padded
from sae_steering_plugin.adapters.learning import learning_logits
from sae_steering_plugin.runs.learning import (
    counted_positions,
    gradients,
    preference_report,
)
from sae_steering_plugin.runs.learning_losses import (
    behind_shared_beginning,
    log_chances,
    next_token_loss,
    preference_loss,
)
from sae_steering_plugin.types import Contrast
from tests.hosts import SITE, tiny_hooked, tiny_sae

PAIRS = Contrast(
    ("the cat sat on the mat", "a dog ran in the park"),
    ("the cat sat still", "a dog ran and ran and the cat"),
)


def batch_of(model, texts):
    return padded(model, encode_texts(model, texts, prepend_bos=True))


def in_turn(contrast):
    return [
        text for pair in zip(contrast.positive, contrast.negative, strict=True) for text in pair
    ]


def test_the_sum_over_a_padded_batch_is_the_sum_over_its_texts(host):
    texts = in_turn(PAIRS)
    whole = batch_of(host, texts)
    with torch.no_grad():
        together = next_token_loss(learning_logits(host, whole), whole)
        apart = sum(
            next_token_loss(learning_logits(host, one), one)
            for one in (batch_of(host, [text]) for text in texts)
        )
    assert float(together) == pytest.approx(float(apart), rel=1e-5)


def test_the_loss_is_dpo_s_formula_over_the_answers(host):
    """Against a loop over each text alone, with another model as the reference."""
    reference = tiny_hooked(seed=5)
    batch = batch_of(host, in_turn(PAIRS))

    def said(model, text, shared):
        (one,) = encode_texts(model, [text], prepend_bos=True)
        alone = padded(model, [one])
        chances = torch.log_softmax(learning_logits(model, alone)[0].double(), -1)
        tokens = alone.tokens[0]
        return sum(float(chances[i - 1, tokens[i]].detach()) for i in range(shared, len(tokens)))

    expected = 0.0
    for chosen, rejected in zip(PAIRS.positive, PAIRS.negative, strict=True):
        one, other = (
            encode_texts(host, [t], prepend_bos=True)[0].tokens for t in (chosen, rejected)
        )
        shared = next(i for i in range(len(one)) if one[i] != other[i])
        margin = said(host, chosen, shared) - said(reference, chosen, shared)
        margin -= said(host, rejected, shared) - said(reference, rejected, shared)
        expected -= float(torch.nn.functional.logsigmoid(torch.tensor(0.2 * margin)))
    loss = preference_loss(beta=0.2, reference=reference)
    assert float(loss(learning_logits(host, batch), batch).detach()) == pytest.approx(
        expected, rel=1e-4
    )


def test_the_sides_are_reported_apart_and_pull_opposite_ways(bridge):
    """At the start every pair's slope is -beta / 2: a chosen text's push is that share of its
    own likelihood's, a rejected one's the negative."""
    sae, beta = tiny_sae(), 0.4
    report = preference_report(bridge, sae, PAIRS, beta=beta, watch=range(32), progress=False)
    batch = batch_of(bridge, in_turn(PAIRS))
    assert report.loss == pytest.approx(2 * 0.6931472, rel=1e-5)
    assert report.groups == ("chosen", "rejected") * 2
    for name, sign in (("chosen", 1), ("rejected", -1)):
        rows = [i for i, group in enumerate(report.groups) if group == name]

        def likelihood(logits, given, rows=rows):
            counted = behind_shared_beginning(given)[:, 1:]
            return -(log_chances(logits, given) * counted)[rows].sum()

        _, ((_, g),) = gradients(bridge, [SITE], batch, likelihood)
        unit = torch.nn.functional.normalize(sae.W_dec.double(), dim=1)
        where = counted_positions(batch)
        expected = -(g[where].double() @ unit.T).detach().sum(0) * sign * beta / 2
        assert torch.allclose(report.by_group[name].push, expected, atol=1e-5)
    gap = report.compare("chosen", "rejected")
    assert len(gap) == 32


def test_batches_that_do_not_pair_up_are_refused(bridge):
    lists = Contrast(PAIRS.positive, PAIRS.negative, paired=False)
    with pytest.raises(ValueError, match="preferences need pairs"):
        preference_report(bridge, tiny_sae(), lists)
    with pytest.raises(ValueError, match="batch_size is 3: pairs need an even one"):
        preference_report(bridge, tiny_sae(), PAIRS, batch_size=3)
    odd = batch_of(bridge, list(PAIRS.positive) + ["a dog"])
    with pytest.raises(ValueError, match="3 rows do not pair up"):
        preference_loss()(learning_logits(bridge, odd), odd)
    same = batch_of(bridge, ["a dog", "a dog"])
    with pytest.raises(ValueError, match="same text twice"):
        preference_loss()(learning_logits(bridge, same), same)
