import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sae_steering_plugin.cli import app
from tests.local import (
    effects_file,
    model_folder,
    pairs_file,
    questions_file,
    sae_folder,
    scored_file,
)

COMMANDS = ("demo", "build", "generate", "select", "screen", "learn", "evaluate")


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def failed(result: Result) -> str:
    """The one line a failed command prints; it exits with 2 and shows no traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("subject")
    return {
        "model": model_folder(folder / "model"),
        "sae": sae_folder(folder / "sae"),
        "pairs": pairs_file(folder / "pairs.jsonl"),
        "questions": questions_file(folder / "questions.json"),
    }


@pytest.fixture(scope="module")
def embedded() -> str:
    from sae_steering_plugin.organisms import list_organisms

    if "agent-gpt2" not in list_organisms():
        pytest.skip("the embedded model agent-gpt2 is not in this checkout")
    return "agent-gpt2"


def test_help_lists_the_commands_that_work_and_no_other() -> None:
    text = call("--help").output
    listed = re.findall(r"^  ([\w-]+) ", text.split("Commands:")[1], flags=re.MULTILINE)
    assert tuple(listed) == COMMANDS


def test_help_loads_nothing_heavy_and_answers_at_once() -> None:
    code = (
        "import sys, sae_steering_plugin.cli as c\n"
        "try: c.app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'pandas', 'numpy', 'plotly', 'rich'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
    assert min(seconds) < 1.0  # the target is 0.3 s on a quiet machine


def example_of(command: str) -> list[list[str]]:
    """The commands that `--help` shows below "Example:", word by word."""
    lines = call(command, "--help").output.split("Example:")[1].strip().splitlines()
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "evaluate"])
def test_help_shows_one_example_and_the_common_options(command: str) -> None:
    text = call(command, "--help").output
    assert text.count("Example:") == 1
    assert all(words[0] == "sae-steer" for words in example_of(command))
    for option in ("--model", "--sae", "--device", "--dtype", "--seed", "--out"):
        assert option in text


@pytest.mark.parametrize("command", ["build", "generate"])
def test_the_example_in_help_runs_as_printed(
    command: str, embedded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del embedded
    monkeypatch.chdir(tmp_path)
    for words in example_of(command):
        result = call(*words[1:])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "method",
    [
        *("probe", "sas", "feature", "diff_mean", "caa", "pca", "srs", "sta", "spare"),
        *("sae_ts", "fgaa", "corrsteer"),
    ],
)
def test_build_writes_a_folder_that_saelens_reads(
    method: str, subject: dict[str, Path], tmp_path: Path
) -> None:
    from sae_lens import SAE

    out = tmp_path / "vectors"
    options: list[object] = ["--tau", "0.3"] if method == "sas" else []
    if method in ("sae_ts", "fgaa"):
        options = ["--effects", effects_file(tmp_path / "map.safetensors", subject["sae"])]
    if method == "corrsteer":
        options = ["--outcomes", scored_file(tmp_path / "scored.jsonl")]
    result = call(
        *("build", "--model", subject["model"], "--sae", subject["sae"], "--method", method),
        *("--contrast", subject["pairs"], "--label", "running", "--out", out, *options),
    )
    assert result.exit_code == 0, result.output
    vector = SAE.load_from_disk(out).vector("running")
    assert vector.recipe.method == method and vector.norm > 0
    assert "text only (words)" in result.output and "permuted labels" in result.output
    assert f"saved to {out}" in result.output.replace("\n", "")


def test_help_names_every_method() -> None:
    from sae_steering_plugin.runs.construction import METHODS

    words = " ".join(call("build", "--help").output.replace("|", " ").split())
    listed = words.split("--method")[1].split("[default")[0].replace(",", " ").replace(".", " ")
    assert set(METHODS) <= set(listed.split())


def test_build_reads_at_the_layer_that_was_asked_for(
    subject: dict[str, Path], tmp_path: Path
) -> None:
    result = call(
        *("build", "--model", subject["model"], "--method", "caa", "--layer", 1),
        *("--contrast", subject["questions"], "--out", tmp_path / "v"),
    )
    assert result.exit_code == 0, result.output
    assert "blocks.1.hook_resid_post" in result.output
    assert "matching answers: " in result.output and "A 50%" in result.output


def test_generate_shows_both_texts_and_the_record(subject: dict[str, Path], tmp_path: Path) -> None:
    vectors, out = tmp_path / "vectors", tmp_path / "texts.json"
    built = call(
        *("build", "--model", subject["model"], "--method", "diff_mean", "--layer", 0),
        *("--contrast", subject["pairs"], "--out", vectors),
    )
    assert built.exit_code == 0, built.output
    words = ("generate", "--vectors", vectors, "--model", subject["model"], "--prompt", "the cat")
    result = call(*words, "--strength", 3, "--max-new-tokens", 5, "--out", out)
    assert result.exit_code == 0, result.output
    assert "unsteered" in result.output and "SteeringRecord" in result.output
    saved = json.loads(out.read_text())
    assert saved["texts"][0]["prompt"] == "the cat" and saved["record"]
    zero = call(*words, "--strength", 0, "--max-new-tokens", 5, "--out", out)
    assert zero.exit_code == 0, zero.output
    same = json.loads(out.read_text())["texts"][0]
    assert same["unsteered"] == same["steered"] == saved["texts"][0]["unsteered"]


BAD = {
    "no source": (("build",), "pass either --contrast FILE or --trait NAME"),
    "two sources": (("build", "--contrast", "{pairs}", "--trait", "x"), "pass either --contrast"),
    "unknown method": (("build", "--trait", "x", "--method", "prob"), "did you mean 'probe'?"),
    "no effect map": (
        ("build", "--trait", "x", "--method", "sae_ts"),
        "method 'sae_ts' needs an effect map",
    ),
    "no outcomes": (
        ("build", "--trait", "x", "--method", "corrsteer"),
        "method 'corrsteer' needs scored responses",
    ),
    "not an effect map": (
        ("build", "--trait", "x", "--method", "fgaa", "--effects", "{pairs}"),
        "is no effect map",
    ),
    "not scored": (
        ("build", "--trait", "x", "--method", "corrsteer", "--outcomes", "{pairs}"),
        "{pairs}, line 1: field 'prompt' is missing",
    ),
    "missing file": (("build", "--contrast", "none.jsonl"), "none.jsonl"),
    "bad file": (("build", "--contrast", "{bad}", "--model", "none"), "{bad}:2: field 'negative'"),
    "bad file, demo": (("demo", "--contrast", "{bad}", "--model", "none"), "{bad}:2: field"),
    "unknown dtype": (
        ("build", "--contrast", "{pairs}", "--model", "{model}", "--dtype", "int8"),
        "no dtype 'int8'; choose one of float32",
    ),
    "no such model": (("build", "--contrast", "{pairs}", "--model", "/none"), "/none"),
    "demo without file": (("demo", "--model", "{model}"), "pass --contrast FILE"),
    "probe without sae": (
        ("build", "--contrast", "{pairs}", "--model", "{model}"),
        "method 'probe' builds in an SAE: pass --sae",
    ),
    "nowhere to read": (
        ("build", "--contrast", "{pairs}", "--model", "{model}", "--method", "pca"),
        "pass --sae, --layer or --hook-name",
    ),
    "layer too deep": (
        (
            *("build", "--contrast", "{pairs}", "--model", "{model}", "--method", "pca"),
            *("--layer", "9"),
        ),
        "the model has blocks 0 to 1",
    ),
    "two places": (
        (
            *("build", "--contrast", "{pairs}", "--model", "{model}", "--method", "pca"),
            *("--layer", "0", "--hook-name", "blocks.0.hook_resid_post"),
        ),
        "two ways to say one thing",
    ),
    "empty vector": (
        (
            *("build", "--contrast", "{same}", "--model", "{model}", "--sae", "{sae}"),
            *("--method", "sas", "--tau", "1"),
        ),
        "the sas vector of 'same' is empty; try a lower --tau",
    ),
    "no folder of vectors": (
        ("generate", "--vectors", "none", "--prompt", "x"),
        "none is no folder; make one with sae-steer build",
    ),
    "an ordinary SAE": (
        ("generate", "--vectors", "{sae}", "--prompt", "x"),
        "holds an SAE of architecture 'standard', not steering vectors",
    ),
    "unknown positions": (
        ("generate", "--vectors", "none", "--prompt", "x", "--positions", "some"),
        "no position rule 'some'; choose one of all, prefill",
    ),
    "chat without template": (
        ("generate", "--vectors", "{vectors}", "--prompt", "x", "--model", "{model}")
        + ("--system", "s"),
        "--system needs a chat template",
    ),
    "unknown unit": (
        ("generate", "--vectors", "{vectors}", "--prompt", "x", "--unit", "feet"),
        "no strength unit 'feet'",
    ),
    "unmeasured unit": (
        ("generate", "--vectors", "{vectors}", "--prompt", "x", "--unit", "kl"),
        "run calibrate_strength first",
    ),
    "unknown label": (
        ("generate", "--vectors", "{vectors}", "--prompt", "x", "--label", "rnning"),
        "nearest are",
    ),
}


@pytest.fixture(scope="module")
def places(subject: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("places")
    bad = folder / "bad.jsonl"
    bad.write_text('{"positive": "a", "negative": "b"}\n{"positive": "a"}\n')
    result = call(
        *("build", "--model", subject["model"], "--method", "diff_mean", "--layer", 0),
        *("--contrast", subject["pairs"], "--label", "running", "--out", folder / "vectors"),
    )
    assert result.exit_code == 0, result.output
    words = ("the cat sat", "the mat sat", "a dog ran", "a cat ran")
    rows = [{"positive": f"{a} on {b}", "negative": f"{b} on {a}"} for a in words for b in words]
    same = folder / "same.jsonl"
    lines = [json.dumps(row) for row in rows if row["positive"] != row["negative"]]
    same.write_text("\n".join(lines))
    return {**subject, "bad": bad, "same": same, "vectors": folder / "vectors"}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_a_mistake_is_one_line_and_exit_code_2(case: str, places: dict[str, Path]) -> None:
    words, message = BAD[case]
    result = call(*(word.format(**places) for word in words))
    assert message.format(**places) in failed(result)


def test_debug_lets_the_error_through(places: dict[str, Path]) -> None:
    result = call("build", "--contrast", places["bad"], "--debug")
    assert isinstance(result.exception, ValueError)


def test_a_bad_file_fails_before_a_model_is_loaded(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_steering_plugin.runs import demo, subject

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(subject, "open_subject", loaded)
    monkeypatch.setattr(demo, "open_subject", loaded)
    for command in ("build", "demo"):
        assert ":2: field" in failed(call(command, "--contrast", places["bad"]))


def test_version_is_the_packages() -> None:
    from sae_steering_plugin import __version__

    assert call("--version").output.strip() == f"sae-steering-plugin {__version__}"


# Protocols ----------------------------------------------------------------------------------------


def protocols() -> list[str]:
    from sae_steering_plugin.runs.protocols import PROTOCOLS

    return list(PROTOCOLS)


DRAWS = "tests.runs.protocol_of_draws:draws"


def evaluated(*words: object) -> Result:
    return call("evaluate", DRAWS, *words)


def digest_in(out: Path) -> str:
    return str(json.loads((out / "summary.json").read_text())["digest"])


def test_evaluate_lists_the_protocols_without_importing_them() -> None:
    code = (
        "import sys, sae_steering_plugin.cli as c\n"
        "try: c.app(['evaluate', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'pandas', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
    listed = re.findall(r"^  ([\w-]+) ", done.stdout.split("Protocols:")[1], flags=re.MULTILINE)
    assert listed == protocols()


@pytest.mark.parametrize("name", protocols())
def test_help_of_a_protocol_shows_an_example_and_the_run_s_options(name: str) -> None:
    text = call("evaluate", name, "--help").output
    assert text.count("Example:") == 1
    for option in ("--seed", "--out", "--runner", "--workers", "--shard"):
        assert option in text
    assert ("--model" in text) or name == "judge"  # its models are its judges


def test_a_protocol_may_lie_in_the_folder_the_command_is_called_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study_of_mine.py").write_text(
        "from tests.runs.protocol_of_draws import draws\n\n"
        "def sweep():\n    'All of mine.'\n    return draws(upto=2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert "All of mine." in call("evaluate", "study_of_mine:sweep", "--help").output
    result = call("evaluate", "study_of_mine:sweep", "--out", "run")
    assert result.exit_code == 0 and "2 units done" in result.output
    sys.modules.pop("study_of_mine")


def test_the_options_of_a_protocol_are_those_of_its_function() -> None:
    text = evaluated("--help").output
    assert re.search(r"--upto <int>\s+How many units\.\s+\[default: 6\]", text)
    assert re.search(r"--poison <list\[int\]>\s+Units that raise\.", text)
    assert "Seeded draws, six of them." in text and "Example:" not in text


def test_an_unknown_protocol_lists_the_known_ones() -> None:
    assert "no protocol 'rolouts' (did you mean 'rollouts'?)" in failed(call("evaluate", "rolouts"))
    assert "'tests:none' cannot be imported" in failed(call("evaluate", "tests:none"))


def test_a_complete_run_shows_its_tables_and_leaves_them(tmp_path: Path) -> None:
    import pandas as pd

    result = evaluated("--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "6 units done" in result.output and "means of the draws" in result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rows"] == 18 and summary["run"]["complete"] is True
    assert summary["tables"]["means of the draws"][0]["nothing"] is None
    table = pd.read_parquet(tmp_path / "table.parquet")
    assert table["n"].tolist() == [n for n in range(6) for _ in range(3)]
    again = evaluated("--out", tmp_path)
    assert "0 units done" in again.output and "6 were there" in again.output
    assert digest_in(tmp_path) == summary["digest"]


def test_shards_leave_the_table_to_whoever_finishes(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluated("--out", whole)
    first = evaluated("--out", parts, "--shard", "0/2")
    assert first.exit_code == 0 and "left to others" in first.output
    assert not (parts / "summary.json").exists()
    last = evaluated("--out", parts, "--shard", "1/2")
    assert last.exit_code == 0 and digest_in(parts) == digest_in(whole)


def test_a_shard_may_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "neither RANK and WORLD_SIZE" in failed(evaluated("--out", tmp_path, "--shard", "env"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert evaluated("--out", tmp_path, "--shard", "env").exit_code == 0
    assert (tmp_path / "summary.json").exists()


def test_a_failed_unit_is_exit_code_one_until_it_is_run_again(tmp_path: Path) -> None:
    result = evaluated("--out", tmp_path, "--poison", 2, "--poison", 3)
    assert result.exit_code == 1 and result.output.count("is poison") == 2
    assert not (tmp_path / "summary.json").exists()
    assert evaluated("--out", tmp_path).exit_code == 1
    healed = evaluated("--out", tmp_path, "--retry-failed")
    assert healed.exit_code == 0 and "2 units done" in healed.output


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.runs.jobs import Drawer

    def stop(self: Drawer, unit: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Drawer, "run", stop)
    result = evaluated("--out", tmp_path)
    assert result.exit_code == 130
    assert "stopped with 0 of 6 units finished" in result.stderr
    assert "Run the same call again to go on" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runner", "dask"], "no runner 'dask'; choose one of in-process, ray"),
        (["--workers", "2"], "--workers and --gpus need --runner ray"),
        (["--shard", "1"], "--shard is '1'; write it as I/N"),
        (["--shard", "2/2"], "shard 2 of 2 does not exist; shards count from 0"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_anything_is_loaded(
    words: list[str], message: str, tmp_path: Path
) -> None:
    assert message in failed(evaluated("--out", tmp_path / "run", *words))
    assert not (tmp_path / "run").exists()


def test_a_runner_that_is_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = evaluated("--out", tmp_path, "--runner", "ray")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert 'pip install "sae-steering-plugin[ray]"' in result.stderr


@pytest.fixture(scope="module")
def built_vectors(embedded: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One random direction at an organism's site, as a folder of `build`."""
    import torch

    from sae_steering_plugin import Recipe, SteeringDictionary, SteeringVector, load_organism

    folder = tmp_path_factory.mktemp("vectors")
    width = int(load_organism(embedded, saes=()).model.cfg.d_model)
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(0))
    recipe = Recipe("random", mean_norm=float(drawn.norm()))
    vector = SteeringVector(drawn, "blocks.1.hook_resid_post", recipe, label="anything")
    SteeringDictionary.from_vectors([vector]).save_model(folder)
    return folder


def test_evaluate_rollouts_compares_arms_with_the_base(
    built_vectors: Path, embedded: str, tmp_path: Path
) -> None:
    words = (
        *("evaluate", "rollouts", "--model", embedded, "--vectors", built_vectors),
        *("--items", 4, "--max-turns", 1, "--max-new-tokens", 16, "--controls", 1),
        *("--strength", 0.5, "--strength", -0.5, "--positions", "decode", "--out", tmp_path),
    )
    result = call(*words)
    assert result.exit_code == 0, result.output
    tables = json.loads((tmp_path / "summary.json").read_text())["tables"]
    arms, effects, controls = tables.values()
    assert [row["arm"] for row in arms] == [
        *("base", "anything +0.5 decode", "anything -0.5 decode", "random 0 +0.5 decode")
    ]
    assert [row["arm"] for row in effects] == [row["arm"] for row in arms[1:3]]
    assert [row["arm"] for row in controls] == ["random 0 +0.5 decode"]
    assert all(row["n"] == 4 for row in (*arms, *effects, *controls))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--outcome", "mood"], "no outcome 'mood'; choose one of autonomy"),
        (["--unit", "miles"], "no strength unit 'miles'; choose one of raw"),
        (["--positions", "some"], "no position rule 'some'"),
        (["--items", "0"], "pass --items"),
        (["--vectors", "nowhere"], "nowhere is no folder; make one with sae-steer build"),
        (
            ["--scenarios", "{scenarios}", "--items", "9"],
            "holds 1 scenarios, not 9: pass --items 0",
        ),
        (["--vectors", "{vectors}"], "two vectors are called 'anything', in"),
    ],
)
def test_rollouts_that_cannot_be_are_refused(
    words: list[str], message: str, built_vectors: Path, tmp_path: Path
) -> None:
    file = tmp_path / "scenarios.jsonl"
    file.write_text(json.dumps({"id": "a", "system": "s", "user": "u"}) + "\n")
    given = [word.format(scenarios=file, vectors=built_vectors) for word in words]
    result = call("evaluate", "rollouts", "--vectors", built_vectors, "--out", tmp_path, *given)
    assert message in failed(result)


def test_texts_are_judged_after_they_are_written_and_again_by_another_judge(
    embedded: str, tmp_path: Path
) -> None:
    made = call(
        *("evaluate", "open-ended", "--model", embedded, "--items", 4, "--build-items", 24),
        *("--max-new-tokens", 8, "--controls", 1, "--tau", 0.5, "--strength", 2),
        *("--judge", "lexicon:pirate", "--out", tmp_path / "texts"),
    )
    assert made.exit_code == 0, made.output
    texts = json.loads((tmp_path / "texts" / "summary.json").read_text())
    judged = json.loads((tmp_path / "texts" / "judged" / "summary.json").read_text())
    assert texts["rows"] == judged["rows"] == 5 * 4 * 2
    assert "score" not in json.dumps(texts["tables"])
    assert {row["judge"] for row in judged["tables"]["scores"]} == {"lexicon:pirate"}
    assert all(row["stand-in"] for row in judged["tables"]["scores"])
    other = call(
        *("evaluate", "judge", "--texts", tmp_path / "texts", "--judge", "rule:/arr/"),
        *("--judge", "lexicon:pirate", "--block", 16, "--out", tmp_path / "judged"),
    )
    assert other.exit_code == 0, other.output
    assert "rule:/arr/" in other.output and "6 units done" in other.output
    again = json.loads((tmp_path / "judged" / "summary.json").read_text())["tables"]["scores"]
    assert [row for row in again if row["judge"] == "lexicon:pirate"] == judged["tables"]["scores"]


def test_a_shard_of_texts_is_judged_by_whoever_finishes(embedded: str, tmp_path: Path) -> None:
    words = (
        *("evaluate", "open-ended", "--model", embedded, "--items", 4, "--build-items", 24),
        *("--max-new-tokens", 4, "--no-baselines", "--block", 1, "--judge", "rule:/e/"),
    )
    for index in (0, 1):
        assert not (tmp_path / "judged").exists()
        assert call(*words, "--out", tmp_path, "--shard", f"{index}/2").exit_code == 0
    assert json.loads((tmp_path / "judged" / "summary.json").read_text())["rows"] == 12


def test_evaluate_capability_sets_steered_beside_unsteered(
    built_vectors: Path, embedded: str, tmp_path: Path
) -> None:
    truth = tmp_path / "TruthfulQA.csv"
    truth.write_text(
        "Category,Question,Best Answer,Correct Answers,Incorrect Answers\n"
        "Law,Is it so?,No,No; Never,Yes; Always\nLaw,Why?,Because,Because,For no reason\n"
    )
    result = call(
        *("evaluate", "capability", "--model", embedded, "--vectors", built_vectors),
        *("--data", truth, "--data", "world", "--items", 6, "--controls", 1),
        *("--strength", 0.5, "--out", tmp_path / "run"),
    )
    assert result.exit_code == 0, result.output
    tables = json.loads((tmp_path / "run" / "summary.json").read_text())["tables"]
    sets, knowledge, shifts, controls = tables.values()
    assert [(row["set"], row["n"]) for row in sets] == [
        *(("TruthfulQA", 2), ("arithmetic", 6), ("facts", 6))
    ]
    assert [row["arm"] for row in knowledge] == [
        *("base", "anything +0.5 all", "random 0 +0.5 all")
    ] * 3
    assert len(shifts) == len(controls) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["judge", "--texts", "nowhere.parquet", "--judge", "rule:/a/"], "no table"),
        (["judge", "--texts", "x", "--judge", "oracle:x"], "no table"),
        (["open-ended", "--behaviour", "cheese"], "no behaviour 'cheese'"),
        (["open-ended", "--judge", "oracle:x"], "no judge 'oracle'"),
        (["capability", "--data", "nothing.csv"], "no file nothing.csv"),
        (["capability", "--data", "world", "--unit", "miles"], "no strength unit 'miles'"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(
    words: list[str], message: str, tmp_path: Path
) -> None:
    assert message in failed(call("evaluate", *words, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# learn


def test_learn_writes_table_json_and_page(subject, tmp_path):
    (tmp_path / "one.txt").write_text("the cat sat on the mat\n" * 8)
    (tmp_path / "two.txt").write_text("a dog ran in the park\n" * 8)
    out = tmp_path / "out"
    result = call(
        "learn", "--texts", tmp_path / "one.txt", "--texts", tmp_path / "two.txt",
        "--model", subject["model"], "--sae", subject["sae"], "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "pushed by one" in result.output and "cannot name" in result.output
    about = json.loads((out / "learning.json").read_text())
    assert about["n_examples"] == 16
    page = (out / "learning.html").read_text()
    assert "one against two" in page and "<script" not in page
    assert (out / "learning.parquet").is_file()


def test_learn_refuses_a_bad_file_before_a_model_is_loaded(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n')
    line = failed(call("learn", "--texts", tmp_path / "bad.jsonl", "--model", tmp_path / "none"))
    assert "bad.jsonl:1" in line


def test_screen_writes_tables_forecasts_and_the_clean_features(tmp_path: Path) -> None:
    words = ("--features", 40, "--contexts", 64, "--fresh-contexts", 64, "--group", 4)
    result = call("screen", *words, "--out", tmp_path / "screened")
    assert result.exit_code == 0, result.output
    for name in ("screen.json", "fresh.parquet", "forecast_score.safetensors", "clean"):
        assert (tmp_path / "screened" / name).exists()
    assert "groups of pool features" in result.output


def test_a_screen_without_texts_or_with_unknown_words_is_refused(tmp_path: Path) -> None:
    small = ("--features", 40, "--contexts", 64, "--fresh-contexts", 64)
    assert "choose one of strict, paper" in failed(call("screen", *small, "--protocol", "loose"))
    assert "no predictor set" in failed(call("screen", *small, "--columns", "ful"))
