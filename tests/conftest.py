"""What every test shares: one thread, no network, both hosts, the shared data where it is."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker a core for the whole suite, none for single files (starting them costs more)."""
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


LONGEST = ("test_notebooks.py", "test_demo.py", "test_cli.py")
"""Files of a minute or more, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files start first: a file stays on one worker, and the last one would leave it alone."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


def data_folder() -> Path | None:
    """The folder of shared data: `SAE_STEERING_DATA`, or `../shared/data` beside the checkout."""
    given = os.environ.get("SAE_STEERING_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def data() -> Path:
    folder = data_folder()
    if folder is None:
        pytest.skip("no shared data: set SAE_STEERING_DATA to the folder that holds stories260k/")
    return folder


@pytest.fixture
def bridge() -> Any:
    """A tiny `SAETransformerBridge` with a tokenizer, fresh for each test."""
    from tests.hosts import tiny_bridge

    return tiny_bridge()


@pytest.fixture
def hooked() -> Any:
    """A tiny `HookedSAETransformer` with a tokenizer, fresh for each test."""
    from tests.hosts import tiny_hooked

    return tiny_hooked()


@pytest.fixture(params=["bridge", "hooked"])
def host(request: pytest.FixtureRequest) -> Any:
    """Each of the two hosts in turn."""
    return request.getfixturevalue(request.param)
