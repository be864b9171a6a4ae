"""Loading goes tensor by tensor: host and GPU memory stay near the 4-bit model's size, whatever the checkpoint's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoint import ModelSize, build_checkpoint
from qlora import load_pretrained_4bit

MIB = 2**20
# Eight blocks of 24 MiB in float16 and an embedding of 15 MiB, in three shards.
SIZE = ModelSize(layers=8, hidden=1024, heads=8, vocab=8000)
LARGEST_LAYER = 4 * SIZE.hidden**2

# Samples RssAnon (what the process itself allocated, without the pages of mapped files) every 2 ms.
_MEASURE = """
    import json, re, sys, threading, time, warnings
    from pathlib import Path
    import torch
    from qlora import load_pretrained_4bit

    def anonymous_bytes():
        return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    folder, dtype, output = sys.argv[1:]
    torch.set_num_threads(1)
    begin, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch():
        global peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_pretrained_4bit(folder, device="cpu", dtype=dtype)
    done.set()
    watcher.join()
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"peak": peak - begin, "model": size}))
    if output:
        model.save_pretrained(output)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    assert build_checkpoint(folder, SIZE, device="cpu") > 200 * MIB
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


def measured(folder: Path, dtype: str, output: Path | str = "") -> dict[str, int]:
    # glibc keeps freed blocks of up to 32 MiB for itself, which the layers of a large model exceed and these do not.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(_MEASURE), str(folder), dtype, str(output)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def test_host_memory_is_the_models_and_some_layers(checkpoint, tmp_path):
    found = measured(checkpoint, "float32", tmp_path)
    assert found["model"] < 90 * MIB
    assert found["peak"] < found["model"] + 4 * 4 * LARGEST_LAYER  # a layer in float32, four times
    again = measured(tmp_path, "float32")
    assert again["model"] == found["model"]
    assert again["peak"] < again["model"] + 4 * LARGEST_LAYER


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_memory_is_the_models_and_a_layer(checkpoint, dtype):
    load_pretrained_4bit(checkpoint, dtype=dtype)  # compiles the kernels
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begin = torch.cuda.memory_allocated()
    model = load_pretrained_4bit(checkpoint, dtype=dtype)
    size = torch.cuda.memory_allocated() - begin
    assert size < 100 * MIB
    assert torch.cuda.max_memory_allocated() - begin < size + 6 * LARGEST_LAYER
    assert model.device.type == "cuda"
