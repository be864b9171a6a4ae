"""A normalization for few rows, with the sum before it: one program a row, which is read once and stays in registers.

torch's LayerNorm gives a row 128 threads, which read it in turns and wait for each: 8 us for one row of 4,096 on an
H100, whatever the memory could do.  Here a thread has 8 elements, all loads are in flight at once, and the sums go
through shared memory once (RMSNorm) or twice (LayerNorm, whose deviations are squared, not numbers less a mean).

EARLY as in `_early.py`: what comes next may begin at once, and the weights are brought into the L2 cache while the
kernel before this one ends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..tuning import LaunchConfig
from ._launch import early_and_late

_LINE = tl.constexpr(128)  # bytes that an L2 prefetch brings


@triton.jit
def _fetch(pointer, C: tl.constexpr, BLOCK: tl.constexpr):
    """Bring the C elements at a pointer into the L2 cache."""
    STEP: tl.constexpr = _LINE // (pointer.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = BLOCK // STEP if BLOCK > STEP else 1
    offs = tl.minimum(tl.arange(0, LINES) * STEP, C - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [(pointer + offs).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _add(x, residual, USE_ASM: tl.constexpr):
    """The sum in float32, of which LLVM would make one in bfloat16, as it sees that it is rounded."""
    if USE_ASM:
        total = tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [x, residual], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        total = x + residual
    return total


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    out_ptr,
    EPS: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Row program_id(0) of x [., C] + residual, to sum and normalized to out."""
    if EARLY:
        gdc_launch_dependents()
        _fetch(weight_ptr, C, BLOCK)
        if HAS_BIAS:
            _fetch(bias_ptr, C, BLOCK)
        gdc_wait()
    c = tl.arange(0, BLOCK)
    mask = c < C
    offs = tl.program_id(0).to(tl.int64) * C + c
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total = _add(x, residual, USE_ASM).to(out_ptr.dtype.element_ty)
        tl.store(sum_ptr + offs, total, mask=mask)
        x = total.to(tl.float32)
    if CENTERED:
        x = tl.where(mask, x - tl.sum(x) * (1.0 / C), 0.0)
    out = x * tl.rsqrt(tl.sum(x * x) * (1.0 / C) + EPS) * weight
    if HAS_BIAS:
        out += bias
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


_LAUNCHERS = early_and_late(_norm_kernel)


def norm_triton(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    config: LaunchConfig,
    early: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; the results are new tensors, `normalize_reference`'s.

    Args:
        x, residual: [..., C], contiguous.
        weight, bias: [C], contiguous, any float dtype.
        config: its rows are the elements that a program holds, at least C.
    """
    C = x.shape[-1]
    out = torch.empty_like(x)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    if not out.numel():
        return total, out
    _LAUNCHERS[early](
        (x.numel() // C, 1, 1),
        (x, residual, weight, bias, None if residual is None else total, out),
        (),
        (eps, C, config.rows, centered, residual is not None, bias is not None, early, x.is_cuda),
        config,
    )
    return total, out
