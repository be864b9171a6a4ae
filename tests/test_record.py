"""The record of a test run (`pytest --record`, `make test-gpu`): what it holds, and that a killed run leaves one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LAST = {"ends": "def test_last(): pass", "is killed": "def test_last(): os.kill(os.getpid(), signal.SIGKILL)"}


@pytest.mark.parametrize("way", LAST)
def test_what_a_run_leaves(tmp_path, way):
    first = "import os, signal\ndef test_good(): pass\ndef test_bad(): assert 1 + 1 == 3, 'that is two'\n"
    (tmp_path / "test_of_a_trial.py").write_text(first + LAST[way])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "--record", "record.json", "--commit", "abc"]
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["commit"] == "abc"
    assert record["ended"] is (way == "ends")
    assert record["totals"] == {"passed": 1 + (way == "ends"), "failed": 1, "error": 0, "skipped": 0}
    assert record["tests"]["failed"] == {"test_of_a_trial.py::test_bad": 1}
    (reason,) = record["reasons"].values()
    assert "that is two" in reason
