"""The tutorial notebook and the same as a script, on a small model: two variants, run to the end."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from train_runs import save_model

from qlora.data import bundled_prompts

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
SCRIPT, NOTEBOOK = FOLDER / "qlora_bloom_t4.py", FOLDER / "qlora_bloom_t4.ipynb"


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """A tiny Bloom, the prompts that come with the package, and one epoch."""
    with bundled_prompts() as path:
        (tmp_path / "prompts.csv").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    settings = {
        "MODEL": str(save_model("bloom", tmp_path / "bloom", hidden_size=64)),
        "DATA": str(tmp_path / "prompts.csv"),
        "OUTPUT": str(tmp_path / "adapter"),
        "EPOCHS": "1",
        "NEW_TOKENS": "8",
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parent.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **settings}


def check(text: str) -> None:
    assert "0.622 in 4 bits: 4, and back: 0.57142" in text
    assert "0.622 in 8 bits: 79, and back: 0.62204" in text
    found = text.split("relative error in 4 bits: NF4 ")[1].split("\n")[0].split(", evenly spaced ")
    assert 0.085 < float(found[0]) < 0.097 < float(found[1])
    assert "I want you to act as" in text
    assert "trainable params: 8,192" in text  # rank 16 of 64 -> 192, in two layers
    assert "adapter_model.safetensors" in text
    assert "before: I want you to act as a" in text
    assert "after:  I want you to act as a" in text


def test_the_script_and_the_notebook_are_the_same():
    spec = importlib.util.spec_from_file_location("convert", FOLDER / "convert.py")
    convert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert)
    assert json.loads(NOTEBOOK.read_text(encoding="utf-8")) == convert.notebook(SCRIPT.read_text(encoding="utf-8"))


def test_the_notebook_runs_without_bitsandbytes(environment, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", environment)
    book = nbformat.read(NOTEBOOK, as_version=4)
    book.cells.insert(0, nbformat.v4.new_code_cell('import sys; sys.modules["bitsandbytes"] = None'))
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute(env=environment)
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)  # the curves
    check("".join(output.get("text", "") for output in outputs))


def test_the_script_runs_with_bitsandbytes_unchanged(environment, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the rival, part of the [dev] extra")
    # On some CPUs it repacks its weights at the first forward pass in eval mode, and cannot train with them any more.
    script = (
        "import bitsandbytes.nn.modules as m, runpy, sys; m.has_avx512bf16 = lambda: False; runpy.run_path(sys.argv[1])"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(SCRIPT)]
    environment |= {"VARIANT": "BitsAndBytesConfig", "MPLBACKEND": "agg"}
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    check(run.stdout)
