"""The timing code under `benchmarks/`: planted growth is found, disagreement is an exit code."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.timing import Clock, Report, exponent, interleaved, main, whole
from sae_steering_plugin.organisms import data_folder, list_organisms
from sae_steering_plugin.runs import screen_job
from sae_steering_plugin.runs.subject import Subject
from tests.hosts import tiny_sae
from tests.local import model_folder
from tests.runs.test_screening import screened

KEYS = {
    "row", "what", "ratio", "target", "met", "exponent", "max_abs_error", "shapes", "dtype",
    "threads", "seconds", "versions",
}  # fmt: skip


def test_planted_growth_is_recovered():
    sizes = [1, 2, 4, 8, 16]
    assert exponent(sizes, [3e-6 * n**1.5 for n in sizes]) == pytest.approx(1.5)


def test_growth_over_less_than_a_factor_of_eight_is_refused():
    with pytest.raises(ValueError, match="a factor of 8 apart, not 1 to 4"):
        exponent([1, 2, 4], [1.0, 2.0, 4.0])


def test_every_variant_runs_once_a_round_and_only_the_timed_part_counts():
    ran = []

    def untimed(clock: Clock) -> None:
        ran.append("untimed")
        sum(range(100_000))
        with clock:
            pass

    def work() -> int:
        ran.append("work")
        return sum(range(200_000))

    times = interleaved({"untimed": untimed, "work": whole(work)}, rounds=7, warm_up=2)
    assert ran.count("untimed") == ran.count("work") == 9
    assert [len(found) for found in times.cpu.values()] == [7, 7]
    assert times.ratio("untimed", "work") < 0.5
    assert times.ratio("work", "work") == 1.0


def test_a_target_of_the_full_size_is_no_target_of_a_quick_run():
    report = Report("x", quick=True, full_size=frozenset({"2a"}))
    report.add("2a", "one", 2.0, target=1.0)
    report.add("1c", "other", 2.0, target=1.0)
    assert [row["met"] for row in report.rows] == [None, False]


@pytest.mark.parametrize("off, code", [(0.0, 0), (0.5, 1), (float("nan"), 1)])
def test_disagreement_alone_decides_the_exit_code(off, code, monkeypatch, tmp_path, capsys):
    def measure(report: Report) -> None:
        error = report.agree("the answer", torch.ones(2), torch.ones(2) + off, 0.1)
        report.add("1a", "missed", 9.0, target=1.0, error=error)

    monkeypatch.setattr("logging.disable", lambda level: None)
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--json", str(tmp_path / "rows.json")])
    with pytest.raises(SystemExit) as stopped:
        main("x", measure, machine=False)
    assert stopped.value.code == code
    assert ("ANSWERS DISAGREE" in capsys.readouterr().out) == bool(code)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert set(rows[0]) >= KEYS and rows[0]["met"] is False


def test_presets_name_releases_that_saelens_knows():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    from benchmarks.presets import PRESETS
    from sae_steering_plugin.prediction import named_columns

    known = get_pretrained_saes_directory()
    for one in PRESETS.values():
        for word in (one.sae, one.downstream):
            release, _, sae_id = word.partition(":")
            assert sae_id in known[release].saes_map, word
        assert one.sae != one.downstream
        named_columns(one.columns)


def test_the_comparison_of_widths_is_one_command_on_an_agent(tmp_path, capsys, monkeypatch):
    """The screen itself is tested beside `screen_subject`; here: which two, and the table."""
    from benchmarks import presets

    asked, found = [], screened()

    def recorded(*words, **options):
        asked.append((words, options))
        return found, Subject(None, words[0], tiny_sae(d_sae=64), words[1])

    monkeypatch.setattr(screen_job, "screen_subject", recorded)
    agent = list_organisms()[0]
    presets.main(["llama", "--compare", "llama-32x", "--model", agent, "--out", str(tmp_path)])
    assert [words for words, _ in asked] == [
        (agent, "l2-topk-512", None),
        (agent, "l2-topk-1024", None),
    ]
    for _, options in asked:
        assert (options["target"], options["train_share"]) == ("clean", 0.7)
        assert (options["sizes"].fresh, options["sizes"].panel) == (256, 1024)
    axes = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert [(row["axis"], row["preset"]) for row in axes] == [
        (axis, name) for axis in ("stability", "spread", "clean") for name in ("llama", "llama-32x")
    ]
    assert (tmp_path / "llama-32x" / "clean" / "cfg.json").is_file()
    for _, word, later in [w for w, _ in asked]:
        folder = data_folder(agent) / "saes"
        assert (folder / word).is_dir() and later is None
        assert (folder / screen_job.downstream_word(agent, word)).is_dir()


def test_a_preset_runs_on_folders(tmp_path, capsys, monkeypatch):
    from benchmarks import presets

    small = replace(presets.PRESETS["gpt2"], contexts=64, fresh=64, features=60, group=4)
    monkeypatch.setitem(presets.PRESETS, "gpt2", replace(small, lowest=0.0))
    model = model_folder(tmp_path / "model")
    tiny_sae(d_sae=96).save_model(tmp_path / "sae")
    later = tiny_sae(d_sae=48, seed=4)
    later.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    later.save_model(tmp_path / "later")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"the {w} sat on mat {i}" for i in range(900) for w in ("a", "b")))
    folders = ["--model", str(model), "--sae", str(tmp_path / "sae"),
               "--downstream", str(tmp_path / "later")]  # fmt: skip
    presets.main(["gpt2", *folders, "--texts", str(texts), "--out", str(tmp_path / "out")])
    told = json.loads((tmp_path / "out" / "screen.json").read_text())
    assert told["settings"]["columns"] == "geometry_only"  # the paper's choice for this setting
    assert told["settings"]["target"] == "clean_log_count_per_effect"
    assert len(capsys.readouterr().out.splitlines()) == 3 * 7 + 3
