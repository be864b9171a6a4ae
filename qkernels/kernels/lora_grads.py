"""The gradients of an adapter's factors: dB = dy^T u and dA = v^T dropout(x), in one launch.

Room: kernels; the adapter's products, and how u and v come in parts, are in `lora.py`.  Sums over the rows are in
float32 and in their order: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..tuning.lora import TileConfig
from ._launch import Launcher
from .dropout import dropped
from .lora import Dropout, dropout_constants, load_inner


@triton.jit
def _factor_gradient(
    t_ptr,
    inner_ptr,
    seed_ptr,
    tile,
    M,
    C,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """dropout(t[M, C])^T inner[M, RANK] of a tile of columns, float32 [COLUMNS, RANK]."""
    DTYPE: tl.constexpr = t_ptr.dtype.element_ty
    c = tile * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS, RANK), tl.float32)
    # Parts of u fill shared memory in a pipeline, and few rows are few steps.
    for first in tl.range(0, M, ROWS, num_stages=1 if PARTS > 1 else 4):
        rows = first + tl.arange(0, ROWS)
        offs = rows.to(tl.int64)[:, None] * C + c[None, :]
        t = tl.load(t_ptr + offs, mask=(rows < M)[:, None] & (c < C)[None, :], other=0.0)
        if DROPOUT:
            t = dropped(t, offs, seed_ptr, THRESHOLD, KEPT_SCALE).to(DTYPE)
        acc = tl.dot(tl.trans(t), load_inner(inner_ptr, rows, M, RANK, PARTS, DTYPE), acc)
    return acc


@triton.jit(do_not_specialize=["M"])
def _lora_grads_kernel(
    dy_ptr,
    x_ptr,
    u_ptr,
    v_ptr,
    seed_ptr,
    grad_A_ptr,
    grad_B_ptr,
    M,
    N,
    K,
    r,
    tiles_B,
    RANK: tl.constexpr,
    PARTS_U: tl.constexpr,
    PARTS_V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """Programs below tiles_B: dB[N, r] = dy^T u; the others dA[r, K] = v^T dropout(x)."""
    tile = tl.program_id(0)
    j = tl.arange(0, RANK)
    if tile < tiles_B:
        grad_B = _factor_gradient(dy_ptr, u_ptr, seed_ptr, tile, M, N, RANK, PARTS_U, ROWS, COLUMNS, False, 0, 1.0)
        n = tile * COLUMNS + tl.arange(0, COLUMNS)
        to_B = grad_B_ptr + n.to(tl.int64)[:, None] * r + j[None, :]
        tl.store(to_B, grad_B.to(grad_B_ptr.dtype.element_ty), mask=(n < N)[:, None] & (j < r)[None, :])
    else:
        tile_A = tile - tiles_B
        grad_A = _factor_gradient(
            x_ptr, v_ptr, seed_ptr, tile_A, M, K, RANK, PARTS_V, ROWS, COLUMNS, DROPOUT, THRESHOLD, KEPT_SCALE
        )
        k = tile_A * COLUMNS + tl.arange(0, COLUMNS)
        to_A = grad_A_ptr + j.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(to_A, tl.trans(grad_A).to(grad_A_ptr.dtype.element_ty), mask=(j < r)[:, None] & (k < K)[None, :])


_launch = Launcher(_lora_grads_kernel)


def lora_grads_triton(
    dy: torch.Tensor,
    x: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    grad_A: torch.Tensor,
    grad_B: torch.Tensor,
    dropout: Dropout | None,
    config: TileConfig,
) -> None:
    """grad_A[r, K] = v^T dropout(x) and grad_B[N, r] = dy^T u.

    Args:
        dy, x: float16 or bfloat16 [M, N] and [M, K], contiguous.
        u, v: what `lora_down_triton` gave of x and of dy.
        grad_A, grad_B: contiguous, float32 or 16 bits.
    """
    (M, N), K = dy.shape, x.shape[1]
    tiles_B = -(-N // config.columns)
    seed, constants = dropout_constants(dropout)
    _launch(
        (tiles_B + -(-K // config.columns), 1, 1),
        (dy, x, u, v, seed, grad_A, grad_B),
        (M, N, K, grad_B.shape[1], tiles_B),
        (u.shape[2], u.shape[0], v.shape[0], config.rows, config.columns, *constants),
        config,
    )
