"""Compiling ahead: what a launch would compile is learned from the launch, and found in the cache after."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.precompile import compile_all, learned
from qkernels.kernels.matmul_wgmma import matmul_wgmma_triton
from qkernels.tuning.wgmma import tiling

# A number for each test: no other one's kernels, nor a real device's, are taken for its own.
_NUMBERS = itertools.count(99)


class _Driver:
    """Of a GPU that is not there, as far as Triton asks before it launches."""

    def __init__(self):
        self.number = next(_NUMBERS)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.number

    def get_current_stream(self, device):
        return 0


class _Run:
    """What Triton launches a compiled kernel by, that needs scratch memory."""

    global_scratch_size = profile_scratch_size = 1

    def __call__(self, *arguments):
        pass


@pytest.fixture
def hits(monkeypatch, tmp_path):
    """Whether each compilation in this process was found in the cache, which is a new one; with another's driver."""
    found: list[bool] = []
    driver = _Driver()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", driver.get_current_device, raising=False)
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **event: found.append(event["cache_hit"]))
    return found


def _launch() -> None:
    """A kernel for two widths of tiles, which are two compilations."""
    x, out = torch.zeros(64, 512, dtype=torch.float16), torch.zeros(64, 128, dtype=torch.float16)
    packed, absmax = torch.zeros(128 * 256, dtype=torch.uint8), torch.zeros(128 * 8)
    for columns in (64, 128):
        config = tiling(64, 128, 512, columns, 2)
        matmul_wgmma_triton(x, packed, (128, 512), absmax, 64, "nf4", None, out, config)


def test_a_launch_finds_what_was_learned_from_it(hits, monkeypatch):
    with learned() as compilations:
        _launch()
        _launch()
    assert sorted(one.name for one in compilations) == ["_matmul_wgmma_kernel"] * 2
    assert not hits
    compile_all(compilations)
    monkeypatch.setattr(triton.compiler.CompiledKernel, "launch_metadata", lambda *arguments: None)
    monkeypatch.setattr(triton.compiler.CompiledKernel, "run", _Run())
    _launch()
    assert hits == [True, True]


def test_after_learning_launches_are_launches_again(hits):
    with pytest.raises(ValueError, match="no matter"), learned():
        raise ValueError("no matter")
    assert triton.knobs.runtime.jit_cache_hook is None


def test_a_process_that_fails_is_not_overlooked(hits, capfd):
    with learned() as compilations:
        _launch()
    broken = [replace(one, name="no_such_kernel") for one in compilations]
    with pytest.raises(RuntimeError, match="2 of 2 processes"):
        compile_all(broken, processes=2)
    assert "no_such_kernel" in capfd.readouterr().err
