"""The mean of the scales, to the last bit that of torch on a GPU, without torch's launches.

torch's mean is a reduction whose order of summation gives its bits (ATen/native/cuda/Reduce.cuh): CTAs of 512 slots
read vectors of 4, one after the other, CTA by CTA; a slot sums its vectors by component, then the components; a tree
sums the slots of a CTA, and another the sums of the CTAs.  The order depends on the length alone, but for very long
vectors on the GPU's size, so it can be had in two launches that need no counter to be cleared before them: the sums of
the CTAs here, the tree over them in whatever kernel wants the mean (`finish_mean`).

A single CTA's slots, whose sums are the longest, are spread over programs, and the tree is left to the second kernel.

The order was read in torch 2.11 to 2.13; a newer torch's own mean is taken until its order has been looked at
(`tests/gpu/test_mean.py` compares them).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..tuning import LaunchConfig
from ._launch import Launcher
from ._tile import lane_id

# torch's constants: threads a block, values a thread that are worth another block, and that force one.
SLOTS = 512
_FEW_VALUES = 16
_MANY_VALUES = 256
_VECTOR = 4

_LAST_KNOWN_TORCH = (2, 13)
ORDER_IS_KNOWN = (
    torch.version.hip is None and tuple(int(part) for part in torch.__version__.split(".")[:2]) <= _LAST_KNOWN_TORCH
)

_SLOTS = tl.constexpr(SLOTS)
_VECTOR_C = tl.constexpr(_VECTOR)
_UNROLLED = tl.constexpr(4)
_LANES = tl.constexpr(32)


# Finishing is compiled for so many sums at most.
CAPACITIES = (128, 512, 1024)


class SummationOrder(NamedTuple):
    """Attributes:
    ctas: blocks of 512 slots.
    rounds: vectors that a slot sums.
    n_sums: numbers that are left to `finish_mean`: one a CTA, or with one CTA one a slot.
    """

    ctas: int
    rounds: int
    n_sums: int


@lru_cache(maxsize=1024)
def summation_order(n: int, resident_ctas: int) -> SummationOrder | None:
    """torch's order for the mean of n float32 numbers, contiguous and aligned to 16 bytes.

    Args:
        resident_ctas: blocks of 512 threads that the GPU's multiprocessors hold at once.

    Returns:
        None for fewer numbers than fill all slots, which torch sums in another way, and for more than 2^27, whose sums
        are too many to be finished here.
    """
    values = -(-n // SLOTS)
    ctas = 1
    if values >= _MANY_VALUES:
        ctas = max(min(resident_ctas, -(-values // _FEW_VALUES)), -(-values // _MANY_VALUES))
    if n < SLOTS * _VECTOR or ctas > CAPACITIES[-1]:
        return None
    return order_of(n, ctas)


def order_of(n: int, ctas: int) -> SummationOrder:
    """The order with so many CTAs."""
    return SummationOrder(ctas, -(-(n // _VECTOR) // (SLOTS * ctas)), SLOTS if ctas == 1 else ctas)


@triton.jit
def _tree(v, SIZE: tl.constexpr):
    """v[t] + v[t + half], down to one; a sum of two has one order only."""
    if SIZE == 1:
        total = tl.sum(v, axis=0)
    else:
        total = _tree(tl.sum(v.reshape(2, SIZE // 2), axis=0), SIZE // 2)
    return total


@triton.jit
def _partial_sums_kernel(x_ptr, sums_ptr, n, ctas, rounds, SLOTS: tl.constexpr, WHOLE: tl.constexpr):
    """WHOLE: a program sums a CTA to one number; otherwise some slots of the only CTA to a number each."""
    cta = tl.program_id(0)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    first = (slot + cta * _SLOTS)[:, None] * _VECTOR_C + tl.arange(0, _VECTOR_C)[None, :]
    n_vectors = n // _VECTOR_C * _VECTOR_C
    total = tl.zeros([SLOTS, _VECTOR_C], tl.float32)
    for begin in range(0, rounds, _UNROLLED):
        for step in tl.static_range(_UNROLLED):
            offs_x = first + (begin + step) * (ctas * _SLOTS * _VECTOR_C)
            # torch leaves out what is masked here; the scales are not negative, so adding zero changes nothing.
            total += tl.load(x_ptr + offs_x, mask=offs_x < n_vectors, other=0.0)
    even, odd = tl.split(total.reshape(SLOTS, 2, 2))
    first_component, third = tl.split(even)
    second, fourth = tl.split(odd)
    # The last, incomplete vector goes to the first slots of the first CTA.
    offs_tail = n_vectors + slot + cta * _SLOTS
    first_component += tl.load(x_ptr + offs_tail, mask=offs_tail < n, other=0.0)
    sums = ((first_component + second) + third) + fourth
    if WHOLE:
        tl.store(sums_ptr + cta, _tree(sums, SLOTS))
    else:
        tl.store(sums_ptr + slot, sums)


@triton.jit
def _strided_tree(sums_ptr, left, STEP: tl.constexpr, ROWS: tl.constexpr):
    """This lane's share of the tree: its elements are 32 apart, and the halves meet in it."""
    if STEP == ROWS:
        total = tl.load(sums_ptr, mask=left > 0, other=0.0)
    else:
        upper = _strided_tree(sums_ptr + STEP * _LANES, left - STEP * _LANES, STEP * 2, ROWS)
        total = _strided_tree(sums_ptr, left, STEP * 2, ROWS) + upper
    return total


@triton.jit
def _add_lanes(x, DISTANCE: tl.constexpr):
    asm: tl.constexpr = f"shfl.sync.bfly.b32 $0, $1, {DISTANCE}, 31, 0xffffffff;"
    return x + tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def finish_mean(sums_ptr, n_sums, divisor, CAPACITY: tl.constexpr, USE_ASM: tl.constexpr):
    """The mean from the sums, a scalar: their tree times 1 / divisor.

    Each warp does all of it, without a word to the others.  `n_sums` sums, CAPACITY at most; what is missing counts
    as zero.  The twin without inline assembly is for the interpreter.
    """
    if USE_ASM:
        lane = lane_id()
        total = _strided_tree(sums_ptr + lane, n_sums - lane, 1, CAPACITY // _LANES)
        total = _add_lanes(_add_lanes(_add_lanes(_add_lanes(_add_lanes(total, 16), 8), 4), 2), 1)
    else:
        offs = tl.arange(0, CAPACITY)
        total = _tree(tl.load(sums_ptr + offs, mask=offs < n_sums, other=0.0), CAPACITY)
    # `divisor` may be a constant 1, which has no .to().
    return total * tl.div_rn(1.0, divisor * 1.0)


_launch = Launcher(_partial_sums_kernel, enable_fp_fusion=False)


def partial_sums_triton(x: torch.Tensor, order: SummationOrder, config: LaunchConfig) -> torch.Tensor:
    """Launch on x, float32, contiguous, aligned to 16 bytes, without negative numbers.

    Args:
        order: of x's length.
        config: its `rows` are the slots of a program: 512, or with one CTA only a part of them.

    Returns:
        float32[n_sums], for `finish_mean`.
    """
    ctas, rounds, n_sums = order
    sums = x.new_empty(n_sums)
    _launch((ctas, SLOTS // config.rows, 1), (x, sums), (x.numel(), ctas, rounds), (config.rows, ctas > 1), config)
    return sums
