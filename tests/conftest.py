"""Settings for every test: no network, few threads, GPU and slow tests only where they can run, the record of a run."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections import Counter
from pathlib import Path

# Before any Hugging Face library is imported: a test that looks for a hub must fail at once, not wait for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Before bitsandbytes is: it is the yardstick, so it must run on its own kernels and not on ours.
os.environ["QKERNELS_BITSANDBYTES"] = "0"

import pytest
import torch

# Two workers on two cores, and tiny models: more threads only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write outcomes, versions and commit to this JSON file")
    parser.addoption("--commit", help="for a copy without .git: the commit, with + appended when files differ")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--seed", type=int, help="of the tests that draw new inputs in every run; default: a new one")


def pytest_configure(config: pytest.Config) -> None:
    # xdist hands the options to its workers after this, so that all of them have the same seed.
    if config.option.seed is None:
        config.option.seed = secrets.randbits(31)
    path: Path | None = config.getoption("--record")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Record(config, path))


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed of new inputs: {config.option.seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = config.option.slow or "slow" in config.option.markexpr
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if "slow" in item.keywords and not slow:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


class _Record:
    """The record of a run, written again every ten seconds and after each failure: a run that is killed leaves one.

    Its hooks come last, when pytest's reporter has counted the test.
    """

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config, self._path, self._written = config, path, 0.0
        self._environment: dict[str, object] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or time.monotonic() > self._written + 10:
            self._write(ended=False)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        self._write(ended=True)

    def _write(self, ended: bool) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None:
            return
        if not self._environment:
            from benchmarks.environment import environment

            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._environment = environment(device, commit=self._config.getoption("--commit"))
        outcomes = {
            outcome: Counter(report.nodeid.split("[")[0] for report in reporter.stats.get(outcome, []))
            for outcome in ("passed", "failed", "error", "skipped")
        }
        broken = [*reporter.stats.get("failed", []), *reporter.stats.get("error", [])]
        record = {
            **self._environment,
            "seed": self._config.option.seed,
            "ended": ended,
            "totals": {outcome: sum(counts.values()) for outcome, counts in outcomes.items()},
            "tests": outcomes,
            "reasons": {report.nodeid: _last_line(report) for report in broken},
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        self._written = time.monotonic()


def _last_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip().splitlines()[0][:200]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def new_inputs(_seed: None, pytestconfig: pytest.Config) -> None:
    """Other random inputs in each run; `--seed`, printed and recorded, repeats them."""
    torch.manual_seed(pytestconfig.option.seed)


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


@pytest.fixture(scope="session")
def prompts_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight prompts in the form of fka/awesome-chatgpt-prompts."""
    file = tmp_path_factory.mktemp("data") / "prompts.csv"
    texts = [f"I want you to act as number {number} of a row of speakers." for number in range(8)]
    file.write_text("act,prompt\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts)), encoding="utf-8")
    return file
