"""Every method of the table on a concept that is one word of a made-up language."""

import random
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from sae_steering_plugin.adapters.activations import activations_at, encode_texts, padded
from sae_steering_plugin.adapters.learning import learning_logits
from sae_steering_plugin.adapters.sharing import steered_logits
from sae_steering_plugin.adapters.steering import steer
from sae_steering_plugin.organisms import list_organisms, load_organism
from sae_steering_plugin.runs.axbench.detection import auroc
from sae_steering_plugin.runs.axbench.texts import ChatForm, read_texts
from sae_steering_plugin.runs.axbench.world import known_concepts, labelled_rows
from sae_steering_plugin.runs.choice_evaluation import primary_sae
from sae_steering_plugin.runs.steering_methods import METHODS, ConceptData, Fitted, find_method
from sae_steering_plugin.runs.subject import Subject
from sae_steering_plugin.runs.tuned.descent import Schedule, descend, summary
from sae_steering_plugin.runs.tuned.prompts import FALLBACK
from sae_steering_plugin.runs.tuned.texts import ResponseTexts
from sae_steering_plugin.runs.tuned.vectors import TopKShift
from tests.hosts import D_MODEL, SITE, tiny_bridge, tiny_hooked, tiny_qwen_moe, tiny_sae

WORDS = (" dog", " ran", " in", " park", " and", " sat", " on")
WORD = " cat"
BRIEF = {
    "probe": dict(schedule=Schedule(6, 1, 6, 0.05)),
    "ssv": dict(schedule=Schedule(6, 1, 8, 0.05)),
    "reft_r1": dict(schedule=Schedule(6, 1, 8, 0.05, clip=1.0)),
    "loreft": dict(schedule=Schedule(6, 1, 8, 0.02), rank=2),
    "lora": dict(schedule=Schedule(6, 1, 10, 0.02), dropout=0.1),
    "supervised_chosen": dict(pooling=("max",), order=("score",), strengths=(1.0,), controls=2),
}
"""Schedules and grids for a model of two layers."""


def texts(n: int, *, having: bool, seed: int):
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        words = [rng.choice(WORDS) for _ in range(6)]
        if having:
            for place in rng.sample(range(6), 3):
                words[place] = WORD
        rows.append(("the answer", "".join(words)))
    return tuple(rows)


def concept(seed: int = 0, **options) -> ConceptData:
    return ConceptData(
        "cats",
        texts(18, having=True, seed=seed),
        texts(18, having=False, seed=seed + 1),
        feature=3,
        **options,
    )


def subject_of(model) -> Subject:
    return Subject(model, "tiny", tiny_sae())


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(tiny_bridge())


def embeddings_alone() -> Subject:
    """A model whose blocks write nothing, so that a token's state is its own embedding."""
    model = tiny_hooked()
    with torch.no_grad():
        for block in model.blocks:
            for weight in (block.attn.W_O, block.attn.b_O, block.mlp.W_out, block.mlp.b_out):
                weight.zero_()
        model.W_pos.zero_()
    return subject_of(model)


def fit(subject: Subject, word: str, data: ConceptData, seed: int = 1) -> Fitted:
    return find_method(word, **BRIEF.get(word, {})).fit(subject, data, seed=seed)


def chance_of_word(subject: Subject, fitted: Fitted | None, amount: float = 1.0) -> float:
    """Probability of the word as the first of a response."""
    model = subject.model
    word = int(model.tokenizer(WORD, add_special_tokens=False)["input_ids"][0])
    batch = padded(model, encode_texts(model, ["the answer\n"], prepend_bos=True))
    if fitted is None:
        logits = steered_logits(model, batch.tokens, last_only=True)
    else:
        fitted.max_activation = 1.0
        with fitted.applied():
            logits = steered_logits(model, batch.tokens, fitted.edits(amount), last_only=True)
    return float(logits.softmax(-1)[0, word])


def test_diff_mean_detects_the_planted_word_perfectly_and_permuted_labels_do_not():
    subject = embeddings_alone()
    form = ChatForm.of(subject.model, subject.sae)
    held = [*texts(30, having=True, seed=7), *texts(30, having=False, seed=8)]
    read = read_texts(form, SITE, [form.text(*one) for one in held], batch_size=16)
    truth = np.arange(60) < 30

    def area(data: ConceptData) -> float:
        fitted = fit(subject, "diff_mean", data)
        assert fitted.vector.norm == pytest.approx(1, abs=1e-6)
        scores = [float(fitted.token_scores(one.residual[None]).max()) for one in read]
        return auroc(np.array(scores), truth)

    assert area(concept()) == 1.0
    sides = list(concept().positives), list(concept().negatives)
    found = []
    for seed in range(8):
        for side in sides:
            random.Random(seed).shuffle(side)
        halves = [
            tuple(one for side in sides for one in side[start::2]) for start in (0, 1)
        ]  # as many true texts on either side: the labels know nothing
        found.append(area(ConceptData("nothing", *halves)))
    # below 1/2 is possible: where the word adds nothing, a text with it has a token less to score
    null_error = ((60 + 1) / (12 * 30 * 30)) ** 0.5  # of an AUROC without any signal
    assert max(found) < 0.5 + 3 * null_error


@pytest.mark.parametrize(("word", "amount"), [("ssv", 1.0), ("reft_r1", 6.0), ("loreft", 1.0)])
def test_a_trained_edit_raises_the_chance_of_the_concepts_word(word, amount):
    subject = embeddings_alone()
    fitted = fit(subject, word, concept())
    assert chance_of_word(subject, fitted, amount) > 3 * chance_of_word(subject, None)


def test_a_trained_adapter_raises_the_chance_of_the_concepts_word(subject):
    pytest.importorskip("peft", reason="peft is not installed: pip install .[lora]")
    fitted = fit(subject, "lora", concept())
    assert chance_of_word(subject, fitted) > 3 * chance_of_word(subject, None)


@pytest.mark.parametrize("word", ["ssv", "reft_r1", "loreft"])
@pytest.mark.parametrize("made", [tiny_hooked, tiny_qwen_moe], ids=["hooked", "qwen"])
def test_gradients_reach_a_trained_edit_on_every_host(made, word):
    fitted = fit(subject_of(made()), word, concept())
    loss = (fitted.vector.recipe.settings if fitted.vector else fitted.details)["loss"]
    assert loss["last"] < loss["first"]


def test_lora_lowers_the_loss_and_leaves_the_model_bit_identical(subject):
    pytest.importorskip("peft", reason="peft is not installed: pip install .[lora]")
    model = subject.model
    batch = ResponseTexts.of(subject, concept(5).positives).batch(range(6))
    mask = batch.tokens.real.long()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    plain = steered_logits(model, batch.tokens.tokens, attention_mask=mask)
    fitted = fit(subject, "lora", concept())
    with fitted.applied():
        changed = steered_logits(model, batch.tokens.tokens, attention_mask=mask)
        own = model(batch.tokens.tokens, attention_mask=mask)  # the bridge's own forward sees it
        assert torch.equal(own, changed)
        with pytest.raises(RuntimeError, match="holds an adapter already"), fitted.applied():
            pass
    assert batch.loss(changed) < batch.loss(plain) - 0.1
    assert torch.equal(steered_logits(model, batch.tokens.tokens, attention_mask=mask), plain)
    assert [name for name, _ in model.named_parameters()] == names
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert fitted.changes_weights and not fitted.has_factor and fitted.edits(1.0) == ()


def test_lora_names_a_host_whose_weights_it_cannot_reach(hooked):
    pytest.importorskip("peft", reason="peft is not installed: pip install .[lora]")
    with pytest.raises(TypeError, match="load the model with load_model"):
        fit(subject_of(hooked), "lora", concept())


@pytest.mark.parametrize("word", list(METHODS))
def test_one_seed_gives_one_fit_and_the_model_keeps_its_weights(subject, word):
    if word == "lora":
        pytest.importorskip("peft", reason="peft is not installed: pip install .[lora]")
    before = {name: one.clone() for name, one in subject.model.named_parameters()}
    torch.manual_seed(3)
    first = fit(subject, word, concept())
    torch.manual_seed(4)
    again = fit(subject, word, concept())
    if first.vector is not None:
        assert torch.equal(first.vector.vector, again.vector.vector)
        assert repr(first.vector.recipe) == repr(again.vector.recipe)  # a score may be NaN
    else:
        assert first.details == again.details
        assert chance_of_word(subject, first) == chance_of_word(subject, again)
    for name, one in subject.model.named_parameters():
        assert torch.equal(one, before[name])
        assert one.grad is None


@pytest.mark.parametrize("word", ["ssv", "reft_r1", "lat", "lora"])
def test_another_seed_gives_another_fit(subject, word):
    first, other = (fit(subject, word, concept(), seed) for seed in (1, 2))
    if first.vector is not None:
        assert not torch.equal(first.vector.vector, other.vector.vector)
    else:
        assert chance_of_word(subject, first) != chance_of_word(subject, other)


def codes_after(subject: Subject, fitted: Fitted, factors) -> tuple:
    """Residual before and after, and the feature's codes before and target, at three rows."""
    model, rows = subject.model, len(factors)
    batch = padded(model, encode_texts(model, ["a dog ran in the park"] * rows, prepend_bos=True))
    before = activations_at(model, SITE, batch)
    with steer(model, fitted.edits(torch.tensor(factors))):
        after = activations_at(model, SITE, batch)
    return before, after


@pytest.mark.parametrize("word", ["sae_clamp", "sae_min_clamp"])
def test_the_factor_of_each_row_clamps_that_row_and_the_error_stays(subject, word):
    fitted = fit(subject, word, concept(max_activation=0.7))
    sae = subject.sae
    before, after = codes_after(subject, fitted, (1.0, 2.0, 3.0))
    code = sae.encode(before)[..., 3]
    target = torch.tensor([0.7, 1.4, 2.1])[:, None].expand_as(code)
    if word == "sae_min_clamp":
        target = torch.maximum(target, code)
    expected = (target - code)[..., None] * sae.W_dec[3]
    assert torch.allclose(after - before, expected.detach(), atol=1e-5)
    assert not torch.allclose(after[0], after[2])


@pytest.mark.parametrize("word", ["sae", "diff_mean"])
def test_addition_is_factor_times_maximum_times_the_vector_at_every_position(subject, word):
    fitted = fit(subject, word, concept())
    fitted.max_activation = 0.5
    before, after = codes_after(subject, fitted, (0.0, 1.0, 4.0))
    expected = torch.tensor([0.0, 0.5, 2.0])[:, None, None] * fitted.vector.vector
    assert torch.allclose(after - before, expected.expand_as(before), atol=1e-5)  # BOS included
    assert torch.equal(after[0], before[0])


def test_choosing_by_auroc_takes_the_feature_that_tells_the_texts_apart():
    subject = embeddings_alone()
    fitted = fit(subject, "sae_auroc", concept())
    settings = fitted.vector.recipe.settings
    form = ChatForm.of(subject.model, subject.sae)
    pairs = concept().positives + concept().negatives
    read = read_texts(form, SITE, [form.text(*one) for one in pairs], batch_size=16)
    pooled = torch.stack([subject.sae.encode(one.residual).amax(0).detach() for one in read])
    truth = np.arange(36) < 18
    areas = [auroc(column.double().numpy(), truth) for column in pooled.T]
    assert settings["train_auroc"] == pytest.approx(max(areas), abs=1e-9)
    assert areas[settings["feature"]] == pytest.approx(max(areas), abs=1e-9)
    scores = fitted.token_scores(read[0].residual[None])
    expected = subject.sae.encode(read[0].residual)[:, settings["feature"]]
    assert torch.allclose(scores[0], expected.detach(), atol=1e-5)


def test_a_feature_is_named_by_the_words_it_fires_on_and_labels_are_not_read():
    subject = embeddings_alone()
    feature = 5
    word = int(subject.model.tokenizer(WORD, add_special_tokens=False)["input_ids"][0])
    sae = tiny_sae()
    with torch.no_grad():  # a feature that fires on the word alone
        state = subject.model.W_E[word]
        sae.W_enc[:, feature] = 50 * state / state.norm() ** 2
        sae.b_enc[feature] = -49.0
    subject = Subject(subject.model, "tiny", sae)
    fitted = fit(subject, "sae_named", concept())
    settings = fitted.vector.recipe.settings
    assert (settings["feature"], settings["share_of_texts"]) == (feature, 1.0)
    data = concept()
    turned = ConceptData("cats", data.negatives, data.positives)
    assert fit(subject, "sae_named", turned).vector.recipe.settings["feature"] == feature
    with pytest.raises(LookupError, match="no feature fires on a word of 'weather'"):
        fit(subject, "sae_named", ConceptData("weather", data.positives, data.negatives))


def test_a_prompt_is_put_before_the_question_and_a_missing_one_names_the_concept(subject):
    fitted = fit(subject, "prompt", concept(prompt="Speak of cats."))
    assert fitted.prompt("Who?") == "Speak of cats.\n\nQuestion: Who?"
    fallback = fit(subject, "prompt", concept())
    assert fallback.prompt("Who?").startswith(FALLBACK.format(concept="cats"))
    assert fallback.edits(1.0) == () and fallback.token_scores(torch.zeros(1, 2, 4)) is None
    assert fit(subject, "diff_mean", concept()).prompt("Who?") == "Who?"


def test_oriented_components_point_to_the_positive_texts(subject):
    for word in ("pca", "lat"):
        gap = fit(subject, "diff_mean", concept()).vector.vector
        for seed in range(4):
            vector = find_method(word, oriented=True).fit(subject, concept(), seed=seed).vector
            assert float(vector.vector @ gap) >= 0


def test_top_k_shift_is_the_mean_of_the_largest_latents_without_padding():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, D_MODEL, generator=generator)
    w = torch.randn(D_MODEL, generator=generator)
    tokens = torch.ones(2, 6, dtype=torch.bool)
    tokens[1, 2:] = False
    shift = TopKShift(w, 3, tokens)
    moved = shift.prepare(dtype=torch.float32, device="cpu")(x)
    latent = (x @ w).relu()
    first = latent[0].topk(3).values.mean() * w
    short = latent[1, :2].mean() * w
    assert torch.allclose(moved[0], first.expand(6, -1), atol=1e-5)
    assert torch.allclose(moved[1, :2], short.expand(2, -1), atol=1e-5)
    assert not moved[1, 2:].any()
    assert (shift.outside[0][0] > 0).sum() == max(0, int((latent[0] > 0).sum()) - 3)


def test_learning_counts_the_responses_tokens_alone(subject):
    read = ResponseTexts.of(subject, (("the answer", " cat sat"), ("a dog", " cat")))
    batch = read.batch([0, 1])
    logits = torch.randn(2, batch.tokens.tokens.shape[1], len(subject.model.tokenizer))
    losses = []
    for row, (prompt, text) in enumerate(zip(read.prompt_lengths, read.encoded, strict=True)):
        for place in range(prompt, len(text)):
            said = int(batch.tokens.tokens[row, place])
            losses.append(-logits[row, place - 1].log_softmax(-1)[said])
    assert float(batch.loss(logits)) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


def test_a_unit_vector_stays_one_and_finds_the_planted_direction():
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(8, generator=generator)
    planted /= planted.norm()
    w = torch.ones(8) / 8**0.5
    w.requires_grad_()
    losses = descend(
        [w], 12, lambda rows, _: -(w @ planted), Schedule(4, 1, 60, 0.05), generator, unit_rows=True
    )
    assert float(w.detach().norm()) == pytest.approx(1, abs=1e-5)
    assert float(w.detach() @ planted) > 0.999
    assert summary(losses)["steps"] == 180 and summary(losses)["last"] < summary(losses)["first"]


def test_what_cannot_be_fitted_says_why(subject):
    with pytest.raises(ValueError, match="did you mean 'diff_mean'"):
        find_method("diffmean")
    with pytest.raises(ValueError, match="ssv has no setting 'rank'; it has schedule"):
        find_method("ssv", rank=2)
    with pytest.raises(ValueError, match="set max_activation first"):
        fit(subject, "pca", concept()).edits(1.0)
    with pytest.raises(LookupError, match="no feature is labelled 'dogs'"):
        fit(subject, "sae", ConceptData("dogs", concept().positives))
    with pytest.raises(ValueError, match="has no negative training text"):
        fit(subject, "diff_mean", ConceptData("dogs", concept().positives))
    with pytest.raises(ValueError, match="where to steer"):
        fit(Subject(subject.model, "tiny"), "pca", concept())
    with pytest.raises(ValueError, match="needs an SAE"):
        fit(Subject(subject.model, "tiny"), "sae", concept(hook_name=SITE))
    with pytest.raises(ValueError, match="the model has blocks 0 to 1"):
        find_method("loreft", layers=(5,)).fit(subject, concept())
    with pytest.raises(ValueError, match="the model's context is 64"):
        fit(subject, "pca", ConceptData("long", (("the", " cat" * 90),)))
    with pytest.raises(ValueError, match="lower learning_rate"):
        w = torch.ones(2, requires_grad=True)
        descend(
            [w], 2, lambda rows, _: w.sum() * float("nan"), Schedule(1, 1, 1, 1.0),
            torch.Generator(),
        )  # fmt: skip


@pytest.mark.parametrize("name", list_organisms())
def test_trained_methods_learn_a_concept_of_an_organisms_world(name):
    organism = load_organism(name)
    subject = Subject(organism.model, name, organism.saes[primary_sae(name)])
    pirate = known_concepts()[0]
    rows = labelled_rows(0, pirate, "train", 8, 0)
    sides = {
        side: tuple((r["input"], r["output"]) for r in rows if r["category"] == side)
        for side in ("positive", "negative")
    }
    data = ConceptData(pirate.words, sides["positive"], sides["negative"])
    batch = ResponseTexts.of(subject, data.positives).batch(range(8))

    def loss(fitted: Fitted | None) -> float:
        """Of the concept's own responses, as the method learned them."""
        edits = ()
        if fitted is not None:
            fitted.max_activation = 1.0
            edits = fitted.edits(1.0)
        with torch.no_grad(), nullcontext() if fitted is None else fitted.applied():
            logits = learning_logits(
                subject.model, batch.tokens, edits, prompt_lengths=batch.prompts
            )
        return float(batch.loss(logits))

    before = {key: one.clone() for key, one in subject.model.named_parameters()}
    plain = loss(None)
    schedule = Schedule(8, 1, 8, 0.03)
    slower = replace(schedule, learning_rate=0.003)
    for word, settings in (
        ("ssv", {"schedule": schedule}),
        ("loreft", {"schedule": schedule, "rank": 1}),
        ("lora", {"schedule": slower, "dropout": 0.0}),
    ):
        if word == "lora" and find_spec("peft") is None:
            continue
        fitted = find_method(word, **settings).fit(subject, data, seed=0)
        assert loss(fitted) < plain, word
    reft = find_method("reft_r1", schedule=replace(schedule, clip=1.0)).fit(subject, data, seed=0)
    learned = reft.vector.recipe.settings["loss"]
    assert learned["last"] < learned["first"] and reft.vector.norm == pytest.approx(1, abs=1e-5)
    assert all(torch.equal(one, before[key]) for key, one in subject.model.named_parameters())
    assert loss(None) == plain
