"""Sums of a gradient over concepts against plain formulas."""

import math

import pytest
import torch

from sae_steering_plugin.concepts import GradientSums
from sae_steering_plugin.concepts.gradient import COLUMNS

F, D = 7, 5


def parts(lengths=(4, 2, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).double()  # noqa: E731
    rows, bias = draw(F, D), draw(D)
    rows[2] = 0
    examples = [(draw(n, D), draw(n, D), draw(n, F).clamp(min=0)) for n in lengths]
    return rows, bias, examples


def summed(lengths=(4, 2, 3), **options):
    rows, bias, examples = parts(lengths)
    sums = GradientSums(rows, bias, **options)
    for one in examples:
        sums.add(*one)
    return sums, rows, bias, examples


def test_scores_are_their_formulas():
    sums, rows, _, examples = summed(watch=(1, 4), keep=3)
    g, h, z = (torch.cat(part) for part in zip(*examples, strict=True))
    unit = torch.nn.functional.normalize(rows, dim=1)
    push = -g @ unit.T
    assert torch.allclose(sums.push, push.sum(0))
    assert float(sums.push[2]) == 0.0  # a zero row names no concept
    assert torch.allclose(sums.push_abs, push.abs().sum(0))
    assert torch.allclose(sums.amount, (push * (z > 0)).sum(0))
    assert torch.allclose(sums.attribution, (-(g @ rows.T) * z).sum(0))
    assert torch.equal(sums.active, (z > 0).sum(0).double())
    each = torch.stack([-(one[0] @ unit.T).sum(0) for one in examples])
    assert torch.allclose(torch.stack(sums.watched), each[:, [1, 4]])
    assert sums.top_latents[0].tolist() == each[0].abs().topk(3).indices.tolist()


def test_the_split_of_gradient_times_activation_is_exact():
    """g.h = sum (g.d) z + g.b + g.err (gradient_projection 3.3)."""
    sums, rows, bias, examples = summed()
    g, h, z = (torch.cat(part) for part in zip(*examples, strict=True))
    assert sums.total == pytest.approx(float((g * h).sum()), abs=1e-10)
    assert sums.named + sums.biased + sums.unnamed == pytest.approx(sums.total, abs=1e-10)
    err = (g * (h - z @ rows - bias)).sum(1)
    assert sums.unnamed == pytest.approx(float(err.sum()), abs=1e-10)
    assert sums.unnamed_abs == pytest.approx(float(err.abs().sum()), abs=1e-10)


def test_two_halves_merge_to_the_whole():
    whole, rows, bias, examples = summed(lengths=(4, 2, 3, 1), watch=(0,))
    halves = []
    for part in (examples[:2], examples[2:]):
        half = GradientSums(rows, bias, (0,))
        for one in part:
            half.add(*one)
        halves.append(half)
    merged = halves[0].merge(halves[1])
    for name in (*COLUMNS, "second"):
        assert torch.allclose(getattr(merged, name), getattr(whole, name), atol=1e-12), name
    assert (merged.examples, merged.positions) == (whole.examples, whole.positions)
    assert torch.equal(torch.stack(merged.watched), torch.stack(whole.watched))
    with pytest.raises(ValueError, match="do not merge"):
        merged.merge(GradientSums(rows + 1, bias, (0,)))


def test_the_standard_error_is_over_examples_and_absent_below_eight():
    few, *_ = summed()
    assert torch.isnan(few.standard_errors()).all()
    lengths = (3,) * 12
    sums, rows, _, examples = summed(lengths)
    unit = torch.nn.functional.normalize(rows, dim=1)
    means = torch.stack([(-(one[0] @ unit.T)).mean(0) for one in examples])
    expected = means.std(0) / math.sqrt(12)  # equal lengths: the plain error of a mean
    assert torch.allclose(sums.standard_errors(), expected, atol=1e-12)


def test_blocks_of_latents_change_nothing(monkeypatch):
    whole, *_ = summed()
    monkeypatch.setattr("sae_steering_plugin.concepts.gradient.BLOCK", 8)
    blocked, *_ = summed()
    assert torch.allclose(whole.push, blocked.push)
    assert blocked.named == pytest.approx(whole.named, abs=1e-12)


def test_energy_of_a_span_is_its_share_of_the_squared_gradient():
    sums, rows, _, examples = summed()
    g = torch.cat([one[0] for one in examples])
    q = torch.linalg.qr(rows[:2].T).Q
    expected = (g @ q).square().sum() / g.square().sum()
    assert sums.energy(rows[:2]) == pytest.approx(float(expected), abs=1e-12)
    assert sums.energy(torch.eye(D)) == pytest.approx(1.0)
