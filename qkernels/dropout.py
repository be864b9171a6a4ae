"""Dropout whose mask is a function of a seed and of each element's number: the numbers, and the reference.

Room: mathematics; torch only.  A mask that can be made again is neither kept for the backward pass, nor does it depend
on torch's generator: recomputation need not save and restore that one's state, and a CUDA graph can draw new seeds.

The bits are MurmurHash3's finalizer over the element's number and both halves of the seed (Austin Appleby, public
domain).
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B1
FMIX_FIRST, FMIX_SECOND = 0x85EBCA6B, 0xC2B2AE35
BITS = 24
_MASK = 0xFFFFFFFF


def threshold_and_scale(p: float) -> tuple[int, float]:
    """What is dropped, as a number below 2^24, and what the rest is multiplied by."""
    threshold = round(p * 2**BITS)
    return threshold, 0.0 if threshold == 2**BITS else 1.0 / (1.0 - p)


def dropout_reference(x: Tensor, seed: Tensor, threshold: int, scale: float) -> Tensor:
    """x * scale where the element's 24 bits reach the threshold, else 0; rounded once.

    Args:
        x: any shape; elements are numbered in row-major order, modulo 2^32.
        seed: int64[1].
    """
    number = torch.arange(x.numel(), device=x.device) & _MASK
    low = _mix(seed & _MASK)
    high = _mix(((seed >> 32) & _MASK) ^ low)
    bits = _mix(_mix((number * GOLDEN + low) & _MASK) ^ high)
    kept = (bits >> (32 - BITS) >= threshold).view(x.shape)
    return torch.where(kept, x.float() * scale, 0.0).to(x.dtype)


def _mix(h: Tensor) -> Tensor:
    """The finalizer on 32-bit numbers in int64, whose products wrap around above the bits that are wanted."""
    h = ((h ^ (h >> 16)) * FMIX_FIRST) & _MASK
    h = ((h ^ (h >> 13)) * FMIX_SECOND) & _MASK
    return h ^ (h >> 16)
