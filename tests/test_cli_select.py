import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from sae_steering_plugin.cli import app
from sae_steering_plugin.runs.labelled_texts import world_statements

runner = CliRunner()


def test_select_writes_a_table_json_and_a_saelens_folder(tmp_path):
    drawn = world_statements(300)
    pirate = ["pirate" if one else "plain" for one in drawn.labels["register=pirate"]]
    pd.DataFrame({"body": drawn.texts, "style": pirate, "wording": drawn.groups}).to_csv(
        tmp_path / "posts.csv", index=False
    )
    done = runner.invoke(
        app,
        [
            *("select", "--labels", str(tmp_path / "posts.csv"), "--text", "body"),
            *("--label", "style", "--group", "wording", "--prior", "0.01", "--k", "2"),
            *("--out", str(tmp_path / "out")),
        ],
    )
    assert done.exit_code == 0, done.output
    assert "2 of 2 concepts have a feature" in done.output
    table = pd.read_csv(tmp_path / "out" / "features.csv")
    assert set(table.concept) == {"pirate", "plain"}
    about = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert about["settings"]["variant"] == "full" and about["coverage"] == [2, 2]
    from sae_steering_plugin import load_sae

    labels = [v.label for v in load_sae(tmp_path / "out" / "vectors").vectors()]
    assert labels[0] == "pirate" and len(labels) == len(table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass either --labels FILE or --world"),
        (["--world", "--score", "f9"], "no score 'f9'"),
        (["--labels", "absent.csv"], "there is no file absent.csv"),
        (["--world", "--support", "100000"], "no concept has enough texts"),
        (["--world", "--variant", "both"], "no variant 'both'"),
    ],
)
def test_what_cannot_work_stops_before_a_model_is_loaded(arguments, message, monkeypatch):
    def load(*names, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sae_steering_plugin.runs.subject.open_subject", load)
    done = runner.invoke(app, ["select", *arguments])
    assert done.exit_code == 2
    assert message in done.output
