import json
from dataclasses import replace

import pytest
import torch

from sae_steering_plugin.organisms import list_organisms
from sae_steering_plugin.runs.screen_job import (
    Sizes,
    axis_table,
    contexts_for,
    difference_rows,
    downstream_word,
    open_downstream,
    read_texts,
    screen_subject,
)
from sae_steering_plugin.runs.subject import Subject, open_subject
from tests.hosts import tiny_sae
from tests.local import model_folder

SMALL = Sizes(contexts=64, fresh=64, features=40, group=4, length=16)


@pytest.mark.parametrize("name", list_organisms())
def test_an_organism_is_screened_from_its_name(name):
    found, subject = screen_subject(name, sizes=SMALL, progress=False)
    assert subject.sae_name.startswith("l2-")
    assert found.fresh.settings["downstream_hook"] == "blocks.3.hook_resid_post"
    assert [row["axis"] for row in axis_table(found)] == ["stability", "spread", "clean"]
    assert len(difference_rows(found)) == len(found.rows)
    assert found.fresh.table["effect"].min() > 0


def test_the_later_sae_has_the_same_architecture():
    name = list_organisms()[0]
    assert downstream_word(name, "l2-topk-512") == "l3-topk-512"
    assert downstream_word(name, "l2-jumprelu-512") == "l3-jumprelu-512"
    assert downstream_word(name, "l2-topk-1024") == "l3-topk-512"
    with pytest.raises(ValueError, match="pass --downstream"):
        downstream_word(name, "l3-topk-512")
    with pytest.raises(ValueError, match="pass --downstream"):
        downstream_word("gpt2", "release:id")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screen_job")
    model_folder(folder / "model")
    tiny_sae(d_sae=64).save_model(folder / "sae")
    later = tiny_sae(d_sae=48, seed=4)
    later.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    later.save_model(folder / "later")
    lines = [f"the {w} sat on mat {i}" for i in range(400) for w in ("cat", "dog")]
    (folder / "texts.txt").write_text("\n".join(lines))
    (folder / "fresh.jsonl").write_text(
        "".join(json.dumps({"text": f"a dog ran in park {i}"}) + "\n" for i in range(150))
    )
    return folder


def test_a_local_model_is_screened_on_texts_of_a_file(local):
    found, _ = screen_subject(
        str(local / "model"),
        str(local / "sae"),
        str(local / "later"),
        texts=local / "texts.txt",
        fresh=local / "fresh.jsonl",
        sizes=replace(SMALL, length=10),
        lowest=0.0,
        highest=1.0,
        progress=False,
    )
    assert len(found.groups.pool) == 16 and found.fresh.settings["n_contexts"] == 64


def test_fresh_contexts_hold_no_label_text(local):
    subject = open_subject(str(local / "model"), str(local / "sae"))
    sizes = replace(SMALL, length=16)
    known, fresh = contexts_for(subject, sizes, texts=local / "texts.txt")
    assert known.shape == fresh.shape == (64, 16)
    rows = {tuple(row) for row in known.tolist()}
    assert not any(tuple(row) in rows for row in fresh.tolist())
    assert torch.equal(known, contexts_for(subject, sizes, texts=local / "texts.txt")[0])


def test_what_is_missing_is_said(local, tmp_path):
    with pytest.raises(ValueError, match="pass --texts FILE"):
        contexts_for(Subject(None, "gpt2", tiny_sae()), SMALL)
    with pytest.raises(ValueError, match="pass --sae"):
        screen_subject(str(local / "model"))
    (tmp_path / "bad.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(ValueError, match="bad.jsonl:1: no field 'text'"):
        read_texts(tmp_path / "bad.jsonl")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no text"):
        read_texts(tmp_path / "empty.txt")
    organism = Subject(None, list_organisms()[0], tiny_sae())
    with pytest.raises(ValueError, match="has no SAE 'l9-none'; it has"):
        open_downstream(organism, "l9-none", device="cpu", dtype="float32")
