"""Dropout whose mask is a function of a seed and of the element's number, so that nothing is kept to make it again.

One launch, an element read and written once.  The seed lies on the GPU: a CUDA graph draws a new one each time.  The
mask is `dropout.dropout_reference`'s, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..dropout import FMIX_FIRST, FMIX_SECOND, GOLDEN
from ..tuning import LaunchConfig
from ._launch import Launcher

_FIRST = tl.constexpr(FMIX_FIRST)
_SECOND = tl.constexpr(FMIX_SECOND)
_GOLDEN = tl.constexpr(GOLDEN)


@triton.jit
def _mix(h):
    """MurmurHash3's finalizer: each bit of the input changes each bit of the output with a chance of a half."""
    h = (h ^ (h >> 16)) * _FIRST
    h = (h ^ (h >> 13)) * _SECOND
    return h ^ (h >> 16)


@triton.jit
def dropped(x, offs, seed_ptr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):
    """x in float32 times SCALE where the element with that number, modulo 2^32, is kept, else 0."""
    seed = tl.load(seed_ptr)
    low = _mix(seed.to(tl.uint32))
    high = _mix((seed >> 32).to(tl.uint32) ^ low)
    bits = _mix(_mix(offs.to(tl.uint32) * _GOLDEN + low) ^ high)
    return tl.where((bits >> 8) >= THRESHOLD, x.to(tl.float32) * SCALE, 0.0)


@triton.jit
def _dropout_kernel(x_ptr, seed_ptr, out_ptr, n, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    kept = dropped(x, offs, seed_ptr, THRESHOLD, SCALE)
    tl.store(out_ptr + offs, kept.to(out_ptr.dtype.element_ty), mask=mask)


_launch = Launcher(_dropout_kernel)


def dropout_triton(
    x: torch.Tensor, seed: torch.Tensor, threshold: int, scale: float, config: LaunchConfig
) -> torch.Tensor:
    """Launch the kernel; the result is a new tensor of x's shape.

    Args:
        x: contiguous.
        seed: int64[1].
        threshold: of 24 bits; a smaller number is dropped.
        scale: of what is kept.
    """
    out = torch.empty_like(x)
    n = x.numel()
    _launch((-(-n // config.rows), 1, 1), (x, seed, out), (n,), (threshold, scale, config.rows), config)
    return out
