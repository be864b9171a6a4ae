"""An adapter's products beside a 4-bit weight's: y += u B^T with u = s dropout(x) A^T.

Room: kernels; A [r, K], B [N, r], r up to 64.  Three kernels serve both directions, because each direction has the
same three shapes:

* **down**: [M, C] times a factor, to rank r.  u = s dropout(x) A^T, backward v = s dy B.
* **up**: rank r times a factor, to [M, C].  u B^T, backward v A, which the mask of the dropout multiplies again.
  Hopper's product has it within (`_adapter.py`), so it runs beside the others.
* **grads**: dB = dy^T u and dA = v^T dropout(x), summed over the rows in float32, in one launch (`lora_grads.py`).

The factors are read as they are, in float32 or 16 bits, and rounded to the activations' dtype where they are used: no
cast copy.  Nothing dropped is written: the mask is made again from the seed, `seeded_dropout`'s bits.

A small product has too few programs, so the contraction of `down` is split in parts, float32[parts, M, RANK], and who
needs u adds them in their order and rounds.  For many rows that would read more than it saves, and a kernel of its own
does it.  No atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..tuning.lora import DownConfig, TileConfig, padded_rank
from ._launch import Launcher
from .dropout import dropped


@triton.jit
def load_inner(inner_ptr, rows, M, RANK: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """u (or v) of these rows, [rows, RANK], its parts added in order and rounded to DTYPE; zeros past M."""
    offs = rows.to(tl.int64)[:, None] * RANK + tl.arange(0, RANK)[None, :]
    mask = (rows < M)[:, None]
    total = tl.load(inner_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(inner_ptr + part * M.to(tl.int64) * RANK + offs, mask=mask, other=0.0)
    return total.to(DTYPE)


@triton.jit
def _load_factor(w_ptr, c, C, r, RANK: tl.constexpr, TALL: tl.constexpr, DTYPE: tl.constexpr):
    """[c, RANK] of B [C, r] (TALL) or of A [r, C], transposed; zeros past C and r."""
    j = tl.arange(0, RANK)
    if TALL:
        w = tl.load(
            w_ptr + c.to(tl.int64)[:, None] * r + j[None, :], mask=(c < C)[:, None] & (j < r)[None, :], other=0.0
        )
    else:
        offs = j.to(tl.int64)[:, None] * C + c[None, :]
        w = tl.trans(tl.load(w_ptr + offs, mask=(j < r)[:, None] & (c < C)[None, :], other=0.0))
    return w.to(DTYPE)


@triton.jit(do_not_specialize=["M"])
def _lora_down_kernel(
    x_ptr,
    w_ptr,
    seed_ptr,
    out_ptr,
    M,
    C,
    r,
    part_steps,
    SCALING: tl.constexpr,
    TALL: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """Part program_id(1) of SCALING dropout(x[M, C]) w, to float32[parts, M, RANK]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    acc = tl.zeros((ROWS, RANK), tl.float32)
    for step in tl.range(part * part_steps, (part + 1) * part_steps, num_stages=4):
        c = step * COLUMNS + tl.arange(0, COLUMNS)
        offs = rows.to(tl.int64)[:, None] * C + c[None, :]
        x = tl.load(x_ptr + offs, mask=(rows < M)[:, None] & (c < C)[None, :], other=0.0)
        if DROPOUT:
            x = dropped(x, offs, seed_ptr, THRESHOLD, KEPT_SCALE).to(x_ptr.dtype.element_ty)
        w = _load_factor(w_ptr, c, C, r, RANK, TALL, x_ptr.dtype.element_ty)
        acc = tl.dot(x, w, acc)
    out = (part.to(tl.int64) * M + rows)[:, None] * RANK + tl.arange(0, RANK)[None, :]
    tl.store(out_ptr + out, acc * SCALING, mask=(rows < M)[:, None])


@triton.jit(do_not_specialize=["M"])
def _lora_sum_kernel(parts_ptr, out_ptr, M, RANK: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """The parts of `down`, added in order and rounded, to out[M, RANK]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner = load_inner(parts_ptr, rows, M, RANK, PARTS, out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * RANK + tl.arange(0, RANK)[None, :], inner, mask=(rows < M)[:, None])


@triton.jit(do_not_specialize=["M"])
def _lora_up_kernel(
    inner_ptr,
    w_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    M,
    C,
    r,
    TALL: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """out[M, C] (+)= dropout(inner w^T) + bias, in float32 and rounded once."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = load_inner(inner_ptr, rows, M, RANK, PARTS, DTYPE)
    w = _load_factor(w_ptr, c, C, r, RANK, TALL, DTYPE)
    out = tl.dot(inner, tl.trans(w))
    offs = rows.to(tl.int64)[:, None] * C + c[None, :]
    mask = (rows < M)[:, None] & (c < C)[None, :]
    if DROPOUT:
        out = dropped(out, offs, seed_ptr, THRESHOLD, KEPT_SCALE)
    if HAS_BIAS:
        out += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if ACCUMULATE:
        out += tl.load(out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, out.to(DTYPE), mask=mask)


_launch_down = Launcher(_lora_down_kernel)
_launch_sum = Launcher(_lora_sum_kernel)
_launch_up = Launcher(_lora_up_kernel)

# seed, threshold of 24 bits, scale of what is kept: as `seeded_dropout`'s kernel takes them.
Dropout = tuple[torch.Tensor, int, float]


def dropout_constants(dropout: Dropout | None) -> tuple[torch.Tensor | None, tuple[object, ...]]:
    """The seed, and the kernels' last compile-time arguments."""
    return (None, (False, 0, 1.0)) if dropout is None else (dropout[0], (True, *dropout[1:]))


def lora_down_triton(
    x: torch.Tensor, w: torch.Tensor, tall: bool, scaling: float, dropout: Dropout | None, config: DownConfig
) -> torch.Tensor:
    """scaling dropout(x) w: float32[parts, M, RANK], or with `config.summed` in x's dtype and one part.

    Args:
        x: float16 or bfloat16 [M, C], contiguous.
        w: A [r, C], or `tall` B [C, r]; contiguous, float32 or 16 bits.
    """
    M, C = x.shape
    r = w.shape[1 if tall else 0]
    rank = padded_rank(r)
    parts = torch.empty((config.parts, M, rank), dtype=torch.float32, device=x.device)
    seed, constants = dropout_constants(dropout)
    _launch_down(
        (-(-M // config.rows), config.parts, 1),
        (x, w, seed, parts),
        (M, C, r, config.part_steps),
        (scaling, tall, rank, config.rows, config.columns, *constants),
        config,
    )
    if not config.summed:
        return parts
    out = torch.empty((1, M, rank), dtype=x.dtype, device=x.device)
    _launch_sum((-(-M // 64), 1, 1), (parts, out), (M,), (rank, config.parts, 64), config)
    return out


def lora_up_triton(
    inner: torch.Tensor,
    w: torch.Tensor,
    tall: bool,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    accumulate: bool,
    dropout: Dropout | None,
    config: TileConfig,
) -> None:
    """out = dropout(inner w^T) + bias, plus what was there with `accumulate`.

    Args:
        inner: what `lora_down_triton` gave.
        w: `tall` B [C, r], or A [r, C].
        bias: [C] or None.
        out: float16 or bfloat16 [M, C], contiguous.
    """
    M, C = out.shape
    seed, constants = dropout_constants(dropout)
    _launch_up(
        (-(-C // config.columns), -(-M // config.rows), 1),
        (inner, w, bias, seed, out),
        (M, C, w.shape[1 if tall else 0]),
        (
            tall,
            inner.shape[2],
            inner.shape[0],
            config.rows,
            config.columns,
            bias is not None,
            accumulate,
            *constants,
        ),
        config,
    )
