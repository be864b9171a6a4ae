"""x in the order in which the product for few rows reads it: kernel and launch, before the product's own.

A lane of the product takes eight k of one row of x at once, and the lanes beside it other rows: in x as it is they ask
for as many lines of the cache as rows, or twice as many where x is shifted.  Here eight k of eight rows lie together,
128 bytes, and there is a copy for each shift below eight that the rows of W have (`_ragged_rows.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..tuning import LaunchConfig
from ..tuning.skinny import CHUNK, SkinnyConfig, chunks
from ._launch import Launch, early_and_late

FRONT = 8  # groups of eight k before the first, as a shift has up to 63 k; they are zeros
_FRONT = tl.constexpr(FRONT)
ARRANGE_CONFIG = LaunchConfig(rows=2048, num_warps=8)


@triton.jit
def place_of(group, row, QUARTERS: tl.constexpr):
    """Of eight places of 16 bytes the one of a row of x, exchanged so that four lanes' groups at one time lie in
    different banks: groups n, n + 1, n + 4 and n + 5, or, QUARTERS, four neighbours."""
    turn = group % 4 if QUARTERS else group // 4 % 2 * 2 + group % 2
    return row ^ (2 * turn)


@triton.jit(do_not_specialize=["M"])
def arrange_kernel(
    x_ptr,
    out_ptr,
    M,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    COPIES: tl.constexpr,
    QUARTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x[M, K] to out[copy][eight rows of x][GROUPS][row][k], zeros for what x does not have.

    The k of a copy begin 8 / COPIES later than those of the one before.  EARLY as in `_early.py`.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    copy = tl.program_id(2)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1) * 8 + at // 8 % 8
    k = (at // 64 - _FRONT) * 8 + at % 8 - copy * (8 // COPIES)
    x = tl.load(x_ptr + m.to(tl.int64) * K + k, mask=(m < M) & (k >= 0) & (k < K), other=0.0)
    begin = (copy * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (GROUPS * 64)
    place = at // 64 * 64 + place_of(at // 64, at // 8 % 8, QUARTERS) * 8 + at % 8
    tl.store(out_ptr + begin + place, x, mask=at < GROUPS * 64)


_LAUNCHERS = early_and_late(arrange_kernel)


def arrange_constants(K: int, blocksize: int, config: SkinnyConfig) -> dict[str, int]:
    """The kernel's compile-time arguments, in its order, before a product of this configuration."""
    return {
        "K": K,
        "GROUPS": chunks(K) * (CHUNK // 8) + FRONT,
        "COPIES": 8 // min(K & -K, 8),
        "QUARTERS": blocksize < 64,
        "BLOCK": ARRANGE_CONFIG.rows,
        "EARLY": config.early,
    }


def arranged(M: int, K: int, blocksize: int, config: SkinnyConfig, product: Launch) -> Callable[..., None]:
    """The launch that arranges x[M, K], and then the product's: a function of what that one takes, x the first."""
    constants = arrange_constants(K, blocksize, config)
    blocks = -(-M // config.columns) * (config.columns // 8)  # of eight rows of x
    groups, copies, size = constants["GROUPS"], constants["COPIES"], constants["BLOCK"]
    grid = -(-groups * 64 // size), blocks, copies
    arrange = Launch(_LAUNCHERS[config.early], grid, (M,), tuple(constants.values()), ARRANGE_CONFIG)

    def launch(x: torch.Tensor, *others: torch.Tensor | None) -> None:
        out = torch.empty(copies * blocks * groups * 64, dtype=x.dtype, device=x.device)
        arrange(x, out)
        product(out, *others)

    return launch
