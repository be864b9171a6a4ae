"""Settings for every test: no network, few threads, GPU tests only where there is a GPU, and the record of a run."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

# Before any Hugging Face library is imported: a test that looks for a hub must fail at once, not wait for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

# Two workers on two cores, and tiny models: more threads only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write outcomes, versions and commit to this JSON file")
    parser.addoption("--commit", help="for a copy without .git: the commit, with + appended when files differ")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--record")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if path is None or reporter is None or hasattr(session.config, "workerinput"):
        return
    from benchmarks.environment import environment

    outcomes = {
        outcome: Counter(report.nodeid.split("[")[0] for report in reporter.stats.get(outcome, []))
        for outcome in ("passed", "failed", "error", "skipped")
    }
    record = {
        **environment("cuda" if torch.cuda.is_available() else "cpu", commit=session.config.getoption("--commit")),
        "totals": {outcome: sum(counts.values()) for outcome, counts in outcomes.items()},
        "tests": outcomes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Checkpoints of tiny models.  models.py is imported where it is used: it brings transformers, which few tests need.


@pytest.fixture(params=["llama", "bloom"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def checkpoint(name: str, tmp_path: Path) -> Path:
    from models import save_tiny

    return save_tiny(name, tmp_path / "float")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    from models import save_tiny

    return save_tiny("llama", tmp_path / "llama")
