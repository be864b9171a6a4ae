"""Every kernel compiles for GPUs that are not here, without a fault; and each kind of fault is found when planted."""

from __future__ import annotations

import pytest
import triton
import triton.language as tl

from qkernels import aot
from qkernels.tuning import LaunchConfig


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_every_variant_compiles_without_a_fault(arch, capsys):
    assert aot.main(["--arch", arch]) == 0
    assert f"variants for {arch}" in capsys.readouterr().out


@triton.jit
def _dot_kernel(a_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a = tl.load(a_ptr + offs)
    tl.store(out_ptr + offs, tl.dot(a, a))


@triton.jit
def _bf16_kernel(a_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs)
    tl.store(out_ptr + offs, a * a)


@triton.jit
def _crowded_kernel(a_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs)
    tl.store(out_ptr + offs, a * tl.sum(a))


def variant(kernel, dtype: str, block: int, num_warps: int = 4) -> aot.Variant:
    out = "*fp32" if kernel is _dot_kernel else f"*{dtype}"
    config = LaunchConfig(rows=1, num_warps=num_warps)
    return aot.Variant("planted", kernel, {"a_ptr": f"*{dtype}", "out_ptr": out}, {"BLOCK": block}, config)


def test_a_dot_that_became_fma_is_a_fault():
    assert aot.inspect(variant(_dot_kernel, "fp16", 32), "sm_75").faults() == ["tl.dot became FMA"]
    assert aot.inspect(variant(_dot_kernel, "fp16", 32), "sm_80").tensor_core > 0


def test_bf16_arithmetic_is_a_fault():
    assert "bf16 arithmetic" in aot.inspect(variant(_bf16_kernel, "bf16", 128), "sm_90").faults()[0]


def test_a_spill_is_a_fault():
    # 512 float32 values a thread stay alive over the sum, and a thread has no more than 255 registers.
    assert aot.inspect(variant(_crowded_kernel, "fp32", 16384, num_warps=1), "sm_75").faults()[0].startswith("spills")


def test_too_much_shared_memory_is_a_fault(monkeypatch):
    # Two operands of 64 KiB, which an A100 has; a kernel too large for it would take a minute to compile.
    planted = variant(_dot_kernel, "fp32", 128)
    assert not any("shared memory" in fault for fault in aot.inspect(planted, "sm_80").faults())
    monkeypatch.setitem(aot.SHARED_LIMIT_BYTES, 80, 64 * 1024)
    assert any("131072 bytes of shared memory" in fault for fault in aot.inspect(planted, "sm_80").faults())


def test_an_unknown_kernel_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_info:
        aot.main(["--kernel", "nonsense"])
    assert exit_info.value.code == 2
    assert "no variant's name contains 'nonsense'" in capsys.readouterr().err
