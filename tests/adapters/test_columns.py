"""The last column run alone equals a whole forward pass with the change at the last token.

The tolerance covers float32 rounding of products of other shapes on values of size ten.
"""

import pytest
import torch

from sae_steering_plugin.adapters.activations import TokenBatch, activations_at
from sae_steering_plugin.adapters.columns import ContextRows, check_behind
from sae_steering_plugin.adapters.head import head_gram, head_logits
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.adapters.steering import steer
from sae_steering_plugin.edits import Add
from sae_steering_plugin.types import LAST, Edit
from tests.hosts import (
    D_MODEL,
    tiny_bridge,
    tiny_gemma2,
    tiny_hooked,
    tiny_llama,
    tiny_neox,
    tiny_qwen_moe,
    tokens_of_length,
)

HOSTS = (tiny_bridge, tiny_hooked, tiny_qwen_moe, tiny_llama, tiny_neox, tiny_gemma2)
SITES = ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.0.hook_mlp_out")
MEMBER = torch.tensor([0, 1, 2, 0, 1])
TOLERANCE = 1e-5
CAP = {tiny_gemma2: 30.0}


def steps(n=4):
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(1))


def one_by_one(model, tokens, site, pushes, read=None):
    """Whole forward passes, one per row: logits, or what flows past `read`."""
    out = []
    for row, push in zip(tokens, pushes, strict=True):
        edit = Edit(Add(push), site, positions=LAST)
        if read is None:
            out.append(steered_logits(model, row[None], edit, last_only=True, share=False))
            continue
        real = torch.ones(1, len(row), dtype=torch.bool)
        batch = TokenBatch(row[None], real, torch.zeros(1).long(), torch.zeros(1).bool())
        with steer(model, edit):
            out.append(activations_at(model, read, batch)[:, -1])
    return torch.cat(out)


@pytest.mark.parametrize("make", HOSTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("site", SITES)
def test_logits_equal_whole_forward_passes(make, site):
    model, tokens = make(), tokens_of_length(3, 12)
    laid = ContextRows(model, tokens, site, member=MEMBER)
    for pushes in (steps(4), steps(5), 2 * steps(2)):
        found = head_logits(model, laid.under(pushes).final, cap=CAP.get(make))
        wanted = one_by_one(model, tokens[MEMBER[: len(pushes)]], site, pushes)
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
    clean = head_logits(model, laid.clean.final, cap=CAP.get(make))
    whole = steered_logits(model, tokens[MEMBER], last_only=True)
    torch.testing.assert_close(clean, whole, atol=TOLERANCE, rtol=0)
    assert not torch.allclose(clean[:2], found, atol=100 * TOLERANCE)


@pytest.mark.parametrize("make", HOSTS, ids=lambda make: make.__name__)
def test_a_later_site_is_read_as_in_a_whole_forward_pass(make):
    model, tokens = make(), tokens_of_length(3, 12)
    site, read = "blocks.0.hook_resid_post", f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    if make is tiny_qwen_moe:
        pytest.skip("activations_at runs GatedDeltaNet layers without a cache; logits are compared")
    laid = ContextRows(model, tokens, site, read, member=MEMBER)
    found = laid.under(steps())
    wanted = one_by_one(model, tokens[MEMBER[:4]], site, steps(), read)
    torch.testing.assert_close(found.read, wanted, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.site, laid.clean.site[:4] + steps())


def test_the_last_block_can_be_changed_behind_it(host):
    tokens, site = tokens_of_length(2, 7), "blocks.1.hook_resid_post"
    laid = ContextRows(host, tokens, site)
    found = head_logits(host, laid.under(steps(2)).final)
    wanted = one_by_one(host, tokens, site, steps(2))
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def test_earlier_positions_are_kept_where_they_are_asked_for(host):
    tokens = tokens_of_length(2, 7)
    laid = ContextRows(host, tokens, SITES[1], "blocks.1.hook_resid_post", keep_before=True)
    real = torch.ones(2, 7, dtype=torch.bool)
    batch = TokenBatch(tokens, real, torch.zeros(2).long(), torch.zeros(2).bool())
    whole = activations_at(host, SITES[1], batch)
    torch.testing.assert_close(laid.before_site, whole[:, :-1], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(laid.clean.site, whole[:, -1], atol=TOLERANCE, rtol=0)
    assert laid.before_read.shape == (2, 6, D_MODEL)


def test_the_model_is_left_as_it_was(host):
    tokens = tokens_of_length(2, 7)
    before = steered_logits(host, tokens)
    laid = ContextRows(host, tokens, SITES[0], SITES[1])
    laid.under(steps(2))
    assert torch.equal(steered_logits(host, tokens), before)


def test_a_change_leaves_the_clean_column_as_it_was(host):
    """A site written in place would move the clean run that everything is compared with."""
    for site in SITES:
        laid = ContextRows(host, tokens_of_length(2, 7), site, "blocks.1.hook_resid_post")
        before = [part.clone() for part in (laid.clean.site, laid.clean.read, laid.clean.final)]
        first = laid.under(steps(2)).final.clone()
        for part, kept in zip(
            (laid.clean.site, laid.clean.read, laid.clean.final), before, strict=True
        ):
            assert torch.equal(part, kept)
        assert torch.equal(laid.under(steps(2)).final, first)


def test_the_gram_matrix_gives_the_lengths_of_logit_shifts(host):
    final = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        shift = head_logits(host, final) - head_logits(host, torch.zeros(1, D_MODEL))
    inner = final.double() @ head_gram(host) @ final.double().T
    torch.testing.assert_close(inner.float(), shift @ shift.T, atol=1e-4, rtol=1e-4)


def test_a_capped_head_has_no_gram_matrix():
    with pytest.raises(ValueError, match="caps its logits"):
        head_gram(tiny_gemma2())


@pytest.mark.parametrize(
    "site, read",
    [
        ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre"),
        ("blocks.0.hook_resid_post", "blocks.0.hook_resid_post"),
        ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"),
        ("blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"),
    ],
)
def test_a_read_site_that_is_not_behind_is_refused(bridge, site, read):
    with pytest.raises(ValueError, match="does not lie behind"):
        check_behind(bridge, site, read)


def test_a_hooked_model_and_single_tokens_are_refused(host):
    with pytest.raises(ValueError, match="at least two tokens"):
        ContextRows(host, tokens_of_length(2, 1), SITES[1])
    push = Edit(Add(torch.ones(D_MODEL)), SITES[1])
    with (
        steer(host, push, require=False),
        pytest.raises(ValueError, match="something is hooked"),
    ):
        ContextRows(host, tokens_of_length(2, 5), SITES[1])
    with pytest.raises(ValueError, match="lies in no block"):
        ContextRows(host, tokens_of_length(2, 5), "hook_embed")
    laid = ContextRows(host, tokens_of_length(2, 5), SITES[1])
    with pytest.raises(ValueError, match="3 steps for 2 rows"):
        laid.under(steps(3))
