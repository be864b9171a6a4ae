"""An adapter's backward pass for many rows: dy is read once, and x is read once.

Room: kernels; A [r, K], B [N, r], v = s dy B, dB = dy^T u, dA = v^T dropout(x), dx = dropout(v A).  `lora.py` has a
kernel for each product, which reads dy for v and again for dB, as little else is to be read where rows are few.

* **dy**: a program has a strip of dy's columns and some of its rows.  Of its rows it has a part of v, of its columns a
  part of dB, in float32.
* **sums**: these parts added in their order, v rounded.
* **x**: a program has a strip of x's columns and all rows: dA, and this adapter's part of dx beside it, whose mask is
  that of x.

No atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..tuning.lora import BackwardConfig, padded_rank
from ._launch import Launcher
from .dropout import dropped
from .lora import Dropout, dropout_constants, load_factor


@triton.jit(do_not_specialize=["M"])
def _lora_dy_kernel(
    dy_ptr,
    B_ptr,
    u_ptr,
    v_ptr,
    grad_B_ptr,
    M,
    N,
    r,
    part_steps,
    SCALING: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Part program_id(0) of v, float32[strips, M, RANK], and part program_id(1) of dB, float32[parts, N, RANK]."""
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    strip, part = tl.program_id(0), tl.program_id(1)
    n, j = strip * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    B = load_factor(B_ptr, n, N, r, RANK, True, DTYPE)
    grad_B = tl.zeros((COLUMNS, RANK), tl.float32)
    for step in tl.range(part * part_steps, (part + 1) * part_steps, num_stages=4):
        rows = step * ROWS + tl.arange(0, ROWS)
        mask = (rows < M)[:, None]
        dy = tl.load(dy_ptr + rows.to(tl.int64)[:, None] * N + n[None, :], mask=mask & (n < N)[None, :], other=0.0)
        u = tl.load(u_ptr + rows[:, None] * RANK + j[None, :], mask=mask, other=0.0)
        grad_B = tl.dot(tl.trans(dy), u, grad_B)
        v = tl.dot(dy, B) * SCALING
        tl.store(v_ptr + (strip.to(tl.int64) * M + rows)[:, None] * RANK + j[None, :], v, mask=mask)
    to = grad_B_ptr + (part.to(tl.int64) * N + n)[:, None] * RANK + j[None, :]
    tl.store(to, grad_B, mask=(n < N)[:, None])


@triton.jit
def _sum_of(parts_ptr, rows, parts, R, RANK: tl.constexpr, GROUP: tl.constexpr):
    """The sum of float32[parts, R, RANK] over its first dimension, [rows, RANK]; zeros past R."""
    j = tl.arange(0, RANK)
    total = tl.zeros((GROUP, rows.shape[0], RANK), tl.float32)
    for first in tl.range(0, parts, GROUP):
        part = first + tl.arange(0, GROUP)
        offs = (part.to(tl.int64)[:, None, None] * R + rows[None, :, None]) * RANK + j[None, None, :]
        total += tl.load(parts_ptr + offs, mask=(part < parts)[:, None, None] & (rows < R)[None, :, None], other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["M"])
def _lora_sums_kernel(
    v_parts_ptr,
    grad_B_parts_ptr,
    v_ptr,
    grad_B_ptr,
    M,
    N,
    r,
    v_parts,
    grad_B_parts,
    programs_v,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Programs below programs_v: v[M, RANK]; the others dB[N, r]."""
    program, j = tl.program_id(0), tl.arange(0, RANK)
    if program < programs_v:
        rows = program * ROWS + tl.arange(0, ROWS)
        v = _sum_of(v_parts_ptr, rows, v_parts, M, RANK, 16)
        tl.store(v_ptr + rows[:, None] * RANK + j[None, :], v.to(v_ptr.dtype.element_ty), mask=(rows < M)[:, None])
    else:
        n = (program - programs_v) * ROWS + tl.arange(0, ROWS)
        grad_B = _sum_of(grad_B_parts_ptr, n, grad_B_parts, N, RANK, 4)
        to = grad_B_ptr + n.to(tl.int64)[:, None] * r + j[None, :]
        tl.store(to, grad_B.to(grad_B_ptr.dtype.element_ty), mask=(n < N)[:, None] & (j < r)[None, :])


@triton.jit(do_not_specialize=["M"])
def _lora_x_kernel(
    x_ptr,
    v_ptr,
    A_ptr,
    seed_ptr,
    grad_A_ptr,
    dx_ptr,
    M,
    K,
    r,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    DROPOUT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """dA[r, K] = v^T dropout(x) and dx[M, K] = dropout(v A) of a strip of columns."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    k, j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    A = tl.trans(load_factor(A_ptr, k, K, r, RANK, False, DTYPE))
    grad_A = tl.zeros((COLUMNS, RANK), tl.float32)
    for first in tl.range(0, M, ROWS, num_stages=3):
        rows = first + tl.arange(0, ROWS)
        offs = rows.to(tl.int64)[:, None] * K + k[None, :]
        mask = (rows < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0)
        if DROPOUT:
            x = dropped(x, offs, seed_ptr, THRESHOLD, KEPT_SCALE).to(DTYPE)
        v = tl.load(v_ptr + rows[:, None] * RANK + j[None, :], mask=(rows < M)[:, None], other=0.0)
        grad_A = tl.dot(tl.trans(x), v, grad_A)
        if NEEDS_DX:
            dx = tl.dot(v, A)
            if DROPOUT:
                dx = dropped(dx, offs, seed_ptr, THRESHOLD, KEPT_SCALE)
            tl.store(dx_ptr + offs, dx.to(DTYPE), mask=mask)
    to = grad_A_ptr + j.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(to, tl.trans(grad_A).to(grad_A_ptr.dtype.element_ty), mask=(j < r)[:, None] & (k < K)[None, :])


_launch_dy = Launcher(_lora_dy_kernel)
_launch_sums = Launcher(_lora_sums_kernel)
_launch_x = Launcher(_lora_x_kernel)


def lora_backward_triton(
    dy: torch.Tensor,
    x: torch.Tensor,
    u: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    dropout: Dropout | None,
    grad_A: torch.Tensor,
    grad_B: torch.Tensor,
    dx: torch.Tensor | None,
    config: BackwardConfig,
) -> None:
    """grad_A, grad_B, and the adapter's part of dx.

    Args:
        dy, x: float16 or bfloat16 [M, N] and [M, K], contiguous.
        u: what `lora_down_triton` gave of x, in one part.
        lora_A, lora_B, grad_A, grad_B: [r, K] and [N, r], contiguous, float32 or 16 bits.
        dx: [M, K] as x, contiguous; None if it is not asked for.
    """
    (M, N), K, r = dy.shape, x.shape[1], lora_A.shape[0]
    rank = padded_rank(r)
    strips, parts = -(-N // config.dy.columns), config.parts
    v_parts = torch.empty((strips, M, rank), dtype=torch.float32, device=dy.device)
    grad_B_parts = torch.empty((parts, N, rank), dtype=torch.float32, device=dy.device)
    v = torch.empty((M, rank), dtype=dy.dtype, device=dy.device)
    _launch_dy(
        (strips, parts, 1),
        (dy, lora_B, u, v_parts, grad_B_parts),
        (M, N, r, config.part_steps),
        (scaling, rank, config.dy.rows, config.dy.columns),
        config.dy,
    )
    rows = config.sums.rows
    programs_v = -(-M // rows)
    _launch_sums(
        (programs_v + -(-N // rows), 1, 1),
        (v_parts, grad_B_parts, v, grad_B),
        (M, N, r, strips, parts, programs_v),
        (rank, rows),
        config.sums,
    )
    seed, constants = dropout_constants(dropout)
    _launch_x(
        (-(-K // config.x.columns), 1, 1),
        (x, v, lora_A, seed, grad_A, dx),
        (M, K, r),
        (rank, config.x.rows, config.x.columns, dx is not None, *constants),
        config.x,
    )
