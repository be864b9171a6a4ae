"""The wheel: small, complete, and what it installs into an empty environment works.

The environment has its own site-packages with the wheel alone; the libraries come from the environment of the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the work tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "qlora_command.py", "qkernels", "qlora"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "-w", "dist", "."], cwd=folder, check=True)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of the environment that the wheel is installed in."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, wheel], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, *words: str, **environment: str) -> str:
    """In the root folder, so that the work tree is not importable."""
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "QKERNELS_BITSANDBYTES")}
    done = subprocess.run([python, *words], cwd="/", env=variables | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_small_and_complete(wheel):
    assert wheel.stat().st_size < 1_000_000
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = {path.relative_to(ROOT).as_posix() for name in ("qkernels", "qlora") for path in (ROOT / name).rglob("*")}
    wanted = {name for name in files if name.endswith((".py", "py.typed", ".csv"))}
    assert wanted <= packed
    assert not {name for name in packed if name.startswith(("tests", "benchmarks"))}


def test_it_imports_and_works_where_it_is_installed(python):
    """What `qlora` needs, registered with transformers and peft; bitsandbytes is not there."""
    script = """
import sys
sys.modules["bitsandbytes"] = None
import qkernels, qlora, torch
from transformers import BloomConfig, BloomForCausalLM
assert all(str(sys.prefix) in module.__file__ for module in (qkernels, qlora)), qkernels.__file__
model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=64, n_layer=1, n_head=2))
model = qlora.quantize_model(model, qlora.NF4Config())
assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
"""
    run(python, "-c", script)


def test_the_installed_command(python):
    assert run(python.parent / "qlora", "--version") == "qlora 0.1.0\n"
    assert "compare" in run(python.parent / "qlora", "--help")


def test_an_installed_bitsandbytes_finds_the_entry_point(python):
    pytest.importorskip("bitsandbytes", reason="the rival, part of the [dev] extra")
    script = """
import bitsandbytes
from qkernels.bitsandbytes_backend import OPERATORS, registered
print(sorted(registered) == sorted((name, "cuda") for name in OPERATORS), len(registered))
"""
    assert run(python, "-c", script).split() == ["True", "9"]
    assert run(python, "-c", script, QKERNELS_BITSANDBYTES="0").split() == ["False", "0"]


def test_the_report_of_the_environment(python):
    pytest.importorskip("bitsandbytes", reason="the rival, part of the [dev] extra")
    report = run(python, "-m", "qkernels.env_report")
    for words in (
        "qkernels        0.1.0",
        "torch           ",
        "bitsandbytes    0.",
        "GPU",
        "quantize_4bit",
        "gemm_4bit_dx",
    ):
        assert words in report
    assert "runs on these kernels for tensors on a GPU (entry point bitsandbytes.backends)" in report


def test_the_command_is_installed(python):
    assert "usage: qlora COMMAND" in run(python, str(python.with_name("qlora")), "--help")
