"""The embedded models as they ship, and their recipe at a size of seconds."""

import json
from pathlib import Path

import pytest
import torch

from sae_steering_plugin.organisms import (
    DATA,
    data_folder,
    list_organisms,
    load_organism,
    read_organism,
)
from sae_steering_plugin.organisms.measure import behaviour, sae_figures
from sae_steering_plugin.organisms.tokenizer import CALL
from sae_steering_plugin.organisms.train import main
from sae_steering_plugin.organisms.world import World, render

NAMES = list_organisms()


@pytest.fixture(scope="module", params=NAMES)
def organism(request):
    return load_organism(request.param)


def test_an_organism_ships_and_all_stay_small():
    assert "agent-gpt2" in NAMES
    sizes = [path.stat().st_size for path in DATA.rglob("*") if path.is_file()]
    assert sum(sizes) < 25e6


def test_an_unknown_organism_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"no organism 'agent-gpt' \(did you mean 'agent-gpt2'\?\)"
    ):
        load_organism("agent-gpt")
    with pytest.raises(ValueError, match="agent-gpt2 has no SAE 'l9'; it has"):
        load_organism("agent-gpt2", saes=["l9"])


def test_an_organism_holds_what_its_card_says(organism):
    card = organism.card
    assert card["name"] == organism.name
    assert organism.model.cfg.n_layers == card["layers"]
    assert organism.model.cfg.d_model == card["d_model"]
    assert len(organism.tokenizer) == card["vocabulary"]
    assert set(organism.saes) == set(card["saes"])
    assert next(iter(organism.saes)) == card["primary_sae"]
    assert organism.primary_sae is organism.saes[card["primary_sae"]]
    html = organism._repr_html_()
    assert html.startswith("<table>") and card["primary_sae"] in html


def test_its_saes_cover_three_architectures_at_two_layers_and_three_widths(organism):
    found = {
        (sae.cfg.metadata.hook_name, sae.cfg.architecture(), sae.cfg.d_sae)
        for sae in organism.saes.values()
    }
    sites = sorted({site for site, _, _ in found})
    assert len(sites) == 2 and all(site.endswith(".hook_resid_post") for site in sites)
    for site in sites:
        assert {kind for at, kind, size in found if at == site and size == 512} == {
            "standard",
            "jumprelu",
            "topk",
        }
    primary = organism.primary_sae.cfg
    assert {
        size
        for at, kind, size in found
        if at == primary.metadata.hook_name and kind == primary.architecture()
    } == {256, 512, 1024}
    for sae in organism.saes.values():
        assert sae.cfg.metadata.model_name == organism.name
        assert sae.cfg.metadata.prepend_bos is True


def test_some_saes_may_be_left_out(organism):
    alone = load_organism(organism.name, saes=[])
    assert alone.saes == {}
    with pytest.raises(KeyError, match="is loaded; loaded: none"):
        _ = alone.primary_sae


def test_the_chat_template_renders_what_the_world_renders(organism):
    tokenizer = organism.tokenizer
    for one in organism.world.transcripts(20, split="test"):
        for ask in (False, True):
            text = tokenizer.apply_chat_template(
                one.messages, tokenize=False, add_generation_prompt=ask
            )
            assert text == render(one.messages, add_generation_prompt=ask)
    both = [
        {"role": "assistant", "content": "I look.", "tool_calls": one.messages[2]["tool_calls"]}
    ]
    if one.messages[2].get("tool_calls"):
        assert tokenizer.apply_chat_template(both, tokenize=False) == render(both)


def test_any_text_comes_back_and_letters_stand_alone(organism):
    tokenizer = organism.tokenizer
    for text in (
        'call\n\t{"a": [1, 2]} x_y __',
        "Grüße, 漢字 🙂",
        *organism.world.texts(20, split="test"),
    ):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    for text in (" (A)", "(B)", "The answer is (A)", "Answer: (B)"):
        assert {"A", "B"} & set(tokenizer.tokenize(text))
    call = tokenizer(CALL[0] + "ask_user", add_special_tokens=False)["input_ids"]
    assert len(call) == 2
    assert tokenizer.decode(call, skip_special_tokens=True).endswith('{"name": "ask_user')


def test_rollouts_behave_as_the_card_says(organism):
    n, card = 60, organism.card["behaviour"]
    found = behaviour(organism.model, organism.world, n=n)
    assert found["valid"] >= 0.95
    # Three standard errors of a share at each n.
    error = 3 * (0.25 / n + 0.25 / card["n"]) ** 0.5
    assert abs(found["ask"] - card["ask"]) < error


def test_the_primary_sae_explains_what_its_card_says(organism):
    name = organism.card["primary_sae"]
    found = sae_figures(organism.model, organism.world, {name: organism.primary_sae}, documents=150)
    said = organism.card["saes"][name]
    assert found[name]["explained_variance"] == pytest.approx(said["explained_variance"], abs=0.02)
    assert found[name]["l0"] == pytest.approx(said["l0"], rel=0.05)


def test_a_readme_stands_beside_each_card(organism):
    folder = data_folder(organism.name)
    page = (folder / "README.md").read_text()
    assert organism.card["primary_sae"] in page
    for one in organism.card["targets"]:
        assert one["met"] or one["what"] in page.split("| what |")[0]


def test_the_recipe_makes_a_loadable_organism(tmp_path: Path, capsys):
    main(["agent-gpt2", "--out", str(tmp_path), "--quick"])
    assert "step 3/3" in capsys.readouterr().err
    made = read_organism(tmp_path)
    assert len(made.saes) == 8 and made.world == World(0)
    assert torch.isfinite(made.model(torch.tensor([[1, 20, 30]]))).all()
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["primary_sae"] in made.saes
    assert {one["what"] for one in card["targets"]} >= {"valid rollouts", "neutral ask rate"}
