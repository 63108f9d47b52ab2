"""What the README promises to a newcomer: its commands, its names, its example."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sae_steering_plugin

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def section(name):
    """The text between the heading `## name` and the next one."""
    return TEXT.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("Run", "python -m pip install . && sae-steer demo"),
        ("Test", 'python -m pip install ".[test]" && python -m pytest'),
    ],
)
def test_the_two_commands_stand_alone_and_first(name, command):
    assert re.findall(r"```[^\n]*\n(.*?)```", section(name), flags=re.DOTALL)[0] == command + "\n"


def test_every_name_in_the_tables_is_public():
    code = set(re.findall(r"`([A-Za-z_]+)`", section("From paper to name")))
    assert code <= set(sae_steering_plugin.__all__), code - set(sae_steering_plugin.__all__)


def test_every_release_it_names_is_in_the_hosts_list():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    rows = [line.split("|") for line in section("Your own model").splitlines() if "|" in line]
    specs = [row[3].strip(" `") for row in rows[2:]]
    assert len(specs) == 4
    for spec in specs:
        release, _, name = spec.partition(":")
        assert name in get_pretrained_saes_directory()[release].saes_map, spec


def test_every_local_file_it_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_the_notebook_example_runs_as_printed(tmp_path):
    (example,) = blocks(section("In a notebook"), "python")
    done = subprocess.run(
        [sys.executable, "-c", example],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert (tmp_path / "autonomy" / "sae_weights.safetensors").is_file()
