"""A report of a loop while it runs: accumulation, mixed precision, checkpointing, Trainer, LoRA."""

import pytest
import torch

from sae_steering_plugin.adapters.activations import encode_texts, padded
from sae_steering_plugin.adapters.learning import learning_logits
from sae_steering_plugin.adapters.training_hooks import (
    ConceptGradientEdit,
    linear_decoder,
    training_callback,
    training_hooks,
)
from sae_steering_plugin.concepts import concept_basis
from sae_steering_plugin.runs.learning import counted_positions, learning_report
from sae_steering_plugin.runs.learning_losses import next_token_loss
from sae_steering_plugin.runs.learning_record import GradientRecord
from sae_steering_plugin.runs.updates import Leak
from tests.hosts import CORPUS, SITE, tiny_bridge, tiny_hooked, tiny_sae, tokens_of_length

TEXTS = list(CORPUS)


def batch_of(model, texts):
    return padded(model, encode_texts(model, texts, prepend_bos=True))


def recorded(model, record, texts, *, size=4, scale=1.0, sources=()):
    """What a loop over `texts` in batches of `size` leaves in the record."""
    with training_hooks(model, record) as (live,):
        for start in range(0, len(texts), size):
            batch = batch_of(model, texts[start : start + size])
            live.where = counted_positions(batch)
            record.sources = sources[start : start + size] or None
            (next_token_loss(learning_logits(model, batch), batch) * scale).backward()
    return record.report()


def close(one, other, **tolerance):
    return torch.allclose(one.sums.push, other.sums.push, **tolerance)


def test_accumulated_batches_sum_to_one_large_one_and_to_the_report(host):
    """Sums, not means of means: batches of one, of three and one, and of four are the same."""
    sae = tiny_sae("jumprelu")
    whole = learning_report(host, sae, TEXTS, watch=[4, 9], progress=False)
    for size in (1, 3, 4):
        record = GradientRecord(sae, watch=[4, 9])
        found = recorded(host, record, TEXTS, size=size, sources=["a", "b", "a", "b"])
        assert close(found, whole, atol=1e-5)
        assert torch.allclose(found.per_example, whole.per_example, atol=1e-5)
        assert found.n_positions == whole.n_positions and found.n_examples == 4
        assert found.groups == ("a", "b", "a", "b")
        for key, value in whole.totals().items():
            assert found.totals()[key] == pytest.approx(value, abs=1e-4)
    record.reset()
    with pytest.raises(RuntimeError, match="nothing was recorded at"):
        record.report()


def test_the_loss_scale_is_divided_out_and_overflows_are_counted(bridge):
    sae = tiny_sae()
    plain = recorded(bridge, GradientRecord(sae), TEXTS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    record = GradientRecord(sae, loss_scale=scaler.get_scale)
    scaled = recorded(bridge, record, TEXTS, scale=1024.0)
    assert close(scaled, plain, atol=1e-6)  # a power of two: nothing is rounded
    record = GradientRecord(sae, loss_scale=1024.0)
    with pytest.raises(RuntimeError, match="4 rows overflowed"):
        recorded(bridge, record, TEXTS, scale=float("inf"))
    assert record.overflowed == 4


@pytest.mark.parametrize("made", [tiny_hooked, tiny_bridge])
def test_mixed_precision_gives_the_same_report_to_its_rounding(made):
    model, sae = made(), tiny_sae()
    plain = recorded(model, GradientRecord(sae), TEXTS)
    record = GradientRecord(sae)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = recorded(model, record, TEXTS)
        report = learning_report(model, sae, TEXTS, progress=False)
    size = float(plain.sums.push.norm())
    # bfloat16 keeps 8 bits; errors of independent positions add up like a random walk.
    for found in (mixed, report):
        assert found.n_positions == plain.n_positions
        assert 0 < float((found.sums.push - plain.sums.push).norm()) < 0.05 * size


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:a forward pass without gradients")
def test_a_checkpointed_pass_is_counted_once(reentrant):
    from torch.utils.checkpoint import checkpoint

    model, sae = tiny_hooked(), tiny_sae()
    plain = recorded(model, GradientRecord(sae), TEXTS)
    record, batch = GradientRecord(sae), batch_of(model, TEXTS)
    asks = torch.ones(1, requires_grad=True)

    def loss(one):
        return next_token_loss(learning_logits(model, batch), batch) * one

    with training_hooks(model, record) as (live,):
        live.where = counted_positions(batch)
        checkpoint(loss, asks, use_reentrant=reentrant).backward()
    assert live.fired == 2
    found = record.report()
    assert found.n_examples == 4
    assert close(found, plain, atol=1e-6)


def test_the_order_of_hooks_says_which_gradient_is_seen(bridge):
    sae = tiny_sae()
    edit = ConceptGradientEdit(sae, {3: 0.0})
    batch = batch_of(bridge, TEXTS)
    before, behind = GradientRecord(sae), GradientRecord(sae)
    with training_hooks(bridge, [before, edit, behind]):
        next_token_loss(learning_logits(bridge, batch), batch).backward()
    basis = concept_basis(linear_decoder(sae)[0][[3]])
    given = behind.report().sums
    assert float(given.push[3].abs()) > 0.01
    assert abs(float(before.report().sums.push[3])) < 1e-5 * float(given.push_abs[3])
    assert basis.condition == pytest.approx(1.0)


def test_positions_without_a_gradient_are_left_out_unless_marked(bridge):
    record, batch = GradientRecord(tiny_sae()), batch_of(bridge, TEXTS)
    with training_hooks(bridge, record):
        next_token_loss(learning_logits(bridge, batch), batch).backward()
    found = record.report()
    # all real tokens but each text's last: padding and last tokens have no gradient, the BOS has
    assert found.n_positions == int(batch.real.sum()) - len(TEXTS)


def test_weights_frozen_below_the_site_are_no_hindrance_and_the_value_stays(bridge):
    sae = tiny_sae()
    plain = recorded(bridge, GradientRecord(sae), TEXTS)
    batch = batch_of(bridge, TEXTS)
    logits = learning_logits(bridge, batch)
    bridge.requires_grad_(False)
    frozen = recorded(bridge, GradientRecord(sae), TEXTS)
    assert close(frozen, plain, atol=1e-6)
    with training_hooks(bridge, GradientRecord(sae)):
        assert torch.equal(learning_logits(bridge, batch), logits)


def test_sources_must_fit_the_rows(bridge):
    record = GradientRecord(tiny_sae(), sources=["a"])
    batch = batch_of(bridge, TEXTS)
    with (
        training_hooks(bridge, record),
        pytest.raises(ValueError, match="sources has 1 entries for 4 rows"),
    ):
        next_token_loss(learning_logits(bridge, batch), batch).backward()


def test_a_trainer_with_a_low_rank_adapter_and_accumulation_is_recorded(tmp_path):
    """Two steps of two accumulated batches under the callback: eight examples, base frozen."""
    pytest.importorskip("peft", reason="peft is not installed: pip install .[lora]")
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainingArguments

    from sae_steering_plugin.adapters.peft import low_rank_adapter

    bridge, record = tiny_bridge(), GradientRecord(tiny_sae())
    adapter = low_rank_adapter(bridge, rank=2, alpha=4, dropout=0.0)
    tokens = tokens_of_length(8, 7)
    leak = Leak(bridge, record.sae, [3], TEXTS)

    class Rows(Dataset):
        def __len__(self):
            return len(tokens)

        def __getitem__(self, i):
            return {"input_ids": tokens[i], "labels": tokens[i]}

    own = {name: p.detach().clone() for name, p in bridge.named_parameters()}
    with adapter.applied(learning=True):
        for name, parameter in bridge.original_model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        trainer = Trainer(
            bridge.original_model,
            TrainingArguments(
                str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.1,
                gradient_accumulation_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
                save_strategy="no", logging_strategy="no",
            ),
            train_dataset=Rows(),
            callbacks=[training_callback(bridge, record, measure=leak.measure, every=1)],
        )  # fmt: skip
        trainer.train()
    found = record.report(labels={3: "tides"})
    assert found.n_examples == 8 and found.n_positions == 8 * 6
    assert leak.table()["step"].tolist() == [1.0, 2.0] and leak.records[1]["size"] > 0
    assert found.table()["label"][3] == "tides" and found.hook_name == SITE
    assert all(torch.equal(own[name], p) for name, p in bridge.named_parameters() if name in own)
    assert any(float(one.detach().abs().max()) > 0 for one in adapter.parameters()[1::2])
