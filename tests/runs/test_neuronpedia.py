import gzip
import json

import pytest

from sae_steering_plugin.runs.neuronpedia import read_neuronpedia
from tests.planted import planted

ID = "gpt2-small/8-res-jb"


def entry(index, description="dogs", **fields):
    known = {"modelId": "gpt2-small", "layer": "8-res-jb", "index": index}
    return {**known, "description": description, **fields}


ENTRIES = [
    entry("3", "dogs", explanationModelName="gpt-4o-mini"),
    entry(1, " cats "),
    entry("3", "puppies"),
    entry("2", ""),
    entry("0", layer="7-res-jb"),
]


def read(path, **options):
    return read_neuronpedia(path, planted().sae, **{"neuronpedia_id": ID, **options})


def test_every_form_of_an_export_gives_one_table(tmp_path):
    lines = "\n".join(json.dumps(one) for one in ENTRIES) + "\n"
    files = {
        "export.json": json.dumps(ENTRIES).encode(),
        "batch-0.jsonl": lines.encode(),
        "batch-0.jsonl.gz": gzip.compress(lines.encode()),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        found = read(tmp_path / name)
        assert found.table.feature.tolist() == [1, 3, 3]
        assert found.table.label.tolist() == ["cats", "dogs", "puppies"]
        assert found.table.explainer.tolist() == ["", "gpt-4o-mini", ""]
        assert found.settings["of_other_sources"] == {"gpt2-small/7-res-jb": 1}
        assert found.settings["without_description"] == 1
        assert found.settings["unlabelled"] == 30


def test_the_id_of_the_sae_is_used(tmp_path):
    import copy

    path = tmp_path / "export.json"
    path.write_text(json.dumps(ENTRIES))
    sae = copy.deepcopy(planted().sae)
    with pytest.raises(ValueError, match="does not say which Neuronpedia source it is"):
        read_neuronpedia(path, sae)
    sae.cfg.metadata.neuronpedia_id = "gpt2-small/7-res-jb"
    assert read_neuronpedia(path, sae).table.feature.tolist() == [0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps([entry(99)]), "entry 1 labels feature 99 and this SAE has 32"),
        (json.dumps([entry("x")]), "entry 1 has the index 'x', no whole number"),
        (json.dumps([entry(-1)]), "entry 1 has the index -1"),
        (json.dumps([{"index": 1}]), "entry 1 lacks the field 'modelId'"),
        (json.dumps([3]), "entry 1 is no JSON object"),
        ("[{", "the list is not JSON"),
        ('{"a": 1}\nno\n', "line 2 is not JSON"),
        (json.dumps([entry(1, layer="9-res-jb")]), "holds no label of .*; it holds gpt2-small/9"),
    ],
)
def test_a_bad_export_is_refused(tmp_path, content, message):
    path = tmp_path / "export.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_file_that_is_not_there_or_damaged_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read(tmp_path / "absent.json")
    (tmp_path / "bad.gz").write_bytes(gzip.compress(b"[]" * 99)[:-6])
    with pytest.raises(ValueError, match="damaged gzip"):
        read(tmp_path / "bad.gz")
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="not UTF-8"):
        read(tmp_path / "latin")
