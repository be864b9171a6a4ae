"""dx[M, K] = dy[M, N] W[N, K] for few rows of dy, with W decoded on its way into the tensor cores, scales included.

The forward product's way (`matmul_skinny.py`) with W transposed: W^T is the first operand of m16n8k16, dx^T = W^T dy^T,
and the contraction goes over W's rows n.

* **Loads.** A lane takes 4, 8 or 16 bytes of each of eight rows, which are neighbours, and the eight lanes beside it
  along k the bytes that follow.  So dy is read in vectors of eight n, and the order of n within a product is theirs.
* **Decoding.** A fragment register wants one k of two neighbouring n, a byte has two k of one n.  So the nibbles of two
  rows are put together first, four bytes at a time, and a table of all 256 bytes gives the pair.
* **Scales** change from n to n, inside the contraction.  So they multiply the weights, in float32, and the product is
  rounded once: bit for bit the weight that `dequantize_4bit` gives.
* **Rows** are shared out over warps, whose sums are added in shared memory, and over programs, whose sums a second
  launch adds: both in a fixed order, so equal inputs give equal bits.
* **Ragged rows**, which are not whole blocks of 64, are shifted into place, and take up to two scales a lane
  (`_dx_rows.py`, `_dx_ragged.py`).
* **Launches** begin, where the GPU can, while the one before them ends (EARLY).
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ..format import FP4_CODE, NESTED_BLOCKSIZE, NF4_CODE
from ..tuning.skinny_dx import STEP as _STEP_SIZE
from ..tuning.skinny_dx import TABLE_BYTES as _TABLE_SIZE
from ..tuning.skinny_dx import SkinnyDxConfig
from ._dx_form import dx_form_of
from ._dx_lanes import fill_table
from ._dx_rows import load_tail
from ._dx_scales import scale_area, store_map
from ._dx_step import add_warps, load_columns, load_step, multiply, step_scales, store_sums
from ._early import let_next_begin, wait_for_previous
from ._lanes import shared_address, wait_for_all, warp_number
from ._launch import early_and_late
from ._skinny_chunk import zeros
from ._sum_parts import parts_sum

STEP = gl.constexpr(_STEP_SIZE)
TABLE_BYTES = gl.constexpr(_TABLE_SIZE)


@gluon.jit(do_not_specialize=["M", "N", "part_steps"])
def _matmul_skinny_dx_kernel(
    dy_ptr,
    packed_ptr,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    out_ptr,
    M,
    N,
    part_steps,
    K: gl.constexpr,
    CODES: gl.constexpr,
    NESTED: gl.constexpr,
    NESTED_BLOCK: gl.constexpr,
    QUANT_BLOCK: gl.constexpr,
    ALIGNED: gl.constexpr,
    KIND: gl.constexpr,
    COLUMNS: gl.constexpr,
    BYTES: gl.constexpr,
    K_WARPS: gl.constexpr,
    SPLIT: gl.constexpr,
    EARLY: gl.constexpr,
    SHARED_BYTES: gl.constexpr,
):
    WARPS: gl.constexpr = gl.num_warps()
    form: gl.constexpr = dx_form_of(
        K, NESTED, NESTED_BLOCK, QUANT_BLOCK, ALIGNED, KIND, COLUMNS, BYTES, K_WARPS, SPLIT, WARPS
    )
    THREADS: gl.constexpr = form.THREADS
    N_WARPS: gl.constexpr = form.N_WARPS
    ROWS: gl.constexpr = form.ROWS
    GROUPS: gl.constexpr = form.GROUPS
    RAGGED: gl.constexpr = form.RAGGED
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    memory = gl.allocate_shared_memory(
        gl.float32, [SHARED_BYTES // (4 * THREADS), THREADS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    thread = gl.arange(0, THREADS, lanes)
    memory.index(0).store((thread * 0).to(gl.float32))  # it is used by address, and only a use by name keeps it
    lane = thread % 32
    warp = thread // 32
    k_warp = warp % K_WARPS
    n_warp = warp // K_WARPS
    lane8 = lane % 16 * 8
    shared = shared_address(thread)
    map_address = shared + TABLE_BYTES
    tile = gl.program_id(0)
    tiles_of_columns = (M + COLUMNS - 1) // COLUMNS
    first_k = tile // tiles_of_columns * ROWS
    first_m = tile % tiles_of_columns * COLUMNS
    if SPLIT:
        out_ptr += (tile * gl.num_programs(1) + gl.program_id(1)).to(gl.int64) * (ROWS * COLUMNS)
    # Lanes past the end of a row take its last bytes again.
    if RAGGED:
        first_block = first_k + k_warp * (16 * BYTES)
    else:
        first_block = first_k // 64 + k_warp * (BYTES // 4)
    LAST: gl.constexpr = (K - 1) // 2 // BYTES * BYTES if RAGGED else K // 2 - BYTES
    column = gl.minimum(first_k // 2 + (k_warp * 8 + lane // 4) * BYTES, LAST)
    first_step = gl.program_id(1) * part_steps
    steps = gl.minimum(part_steps, (N + (STEP - 1)) // STEP - first_step)
    first = (first_step + n_warp) * STEP
    pointers = (packed_ptr, absmax_ptr, absmax_8bit_ptr, dy_ptr)
    sizes = (M, N)

    wait_for_all(thread)
    fill_table(shared, warp, lane, CODES, WARPS)
    if EARLY:
        wait_for_previous(thread)
        let_next_begin(thread)
    tail = 0
    if RAGGED and not ALIGNED:
        tail = load_tail(packed_ptr, lane, N, K)
    place = (lane, column, first_block, first_m, tail)
    inside = (n_warp < steps).to(gl.int32)
    w, stored = load_step(pointers, place, sizes, first, inside, form)
    dy = load_columns(pointers, place, sizes, first, inside, 0, COLUMNS, form)
    offset = 0.0
    if NESTED:
        offset = gl.load(absmax_offset_ptr)
        store_map(map_address, absmax_code_ptr, thread, THREADS)
    wait_for_all(thread)

    acc = zeros(lane)
    for _ in gl.static_range(1, BYTES * GROUPS):
        acc = acc + zeros(lane)
    this_n_warp = warp_number(WARPS) // K_WARPS
    for turn in range((part_steps + N_WARPS - 1) // N_WARPS):
        first += N_WARPS * STEP
        inside = ((turn + 1) * N_WARPS + n_warp < steps).to(gl.int32)
        w_then, stored_then = load_step(pointers, place, sizes, first, inside, form)
        if GROUPS == 1:
            dy_then = load_columns(pointers, place, sizes, first, inside, 0, COLUMNS, form)
        if turn * N_WARPS + this_n_warp < steps:
            area = scale_area(map_address, warp, 0 if RAGGED else turn, form.AREAS, WARPS)
            here = first - N_WARPS * STEP
            scales = step_scales(stored, area, map_address, offset, place, here, form)
            acc, dy = multiply(acc, w, scales, dy, lane8, pointers, place, sizes, first, inside, form)
        w = w_then
        stored = stored_then
        if GROUPS == 1:
            dy = dy_then
    # Sums of so many columns at once, of eight every second, as shared memory has room for.
    COLUMN_BYTES: gl.constexpr = 2 * BYTES * (THREADS + 1) * 4
    AT_ONCE: gl.constexpr = min(2 * GROUPS, SHARED_BYTES // COLUMN_BYTES)
    for turn in gl.static_range(0, 2 * GROUPS, AT_ONCE):
        wait_for_all(thread)  # the table, or the sums before these, make room
        for i in gl.static_range(AT_ONCE):
            if turn + i < 2 * GROUPS:
                store_sums(shared + i * COLUMN_BYTES, acc, thread, turn + i, BYTES, THREADS)
        wait_for_all(thread)
        for i in gl.static_range(AT_ONCE):
            if turn + i < 2 * GROUPS:
                sums = shared + i * COLUMN_BYTES
                add_warps(sums, out_ptr, thread, first_k, first_m, M, turn + i, form)


_LAUNCHERS = early_and_late(_matmul_skinny_dx_kernel, views={1: torch.uint8}, enable_fp_fusion=False)


@lru_cache
def float_codes(quant_type: str) -> tuple[int, ...]:
    """Bits of the 16 codes as float32, as signed integers."""
    codes = NF4_CODE if quant_type == "nf4" else FP4_CODE
    return tuple(struct.unpack("<i", struct.pack("<f", code))[0] for code in codes)


def skinny_dx_constants(config: SkinnyDxConfig, dtype: torch.dtype) -> dict[str, object]:
    """The kernel's last compile-time arguments, in its order: those that the configuration decides."""
    return {
        "KIND": "sm_75" if config.turing else "bf16" if dtype == torch.bfloat16 else "f16",
        "COLUMNS": config.columns,
        "BYTES": config.bytes,
        "K_WARPS": config.k_warps,
        "SPLIT": config.parts > 1,
        "EARLY": config.early,
        "SHARED_BYTES": config.shared_bytes,
    }


def matmul_skinny_dx_triton(
    dy: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    out: torch.Tensor,
    config: SkinnyDxConfig,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> None:
    """Launch the kernels into `out`.

    Args:
        dy: float16 or bfloat16 [M, N], contiguous, aligned to 16 bytes.
        packed: codes of W [N, K], contiguous, aligned to 16 bytes, any storage dtype; N at least 8.
        absmax: float32 scales, one a block; with double quantization the scales of `absmax_8bit`, one for 256.
        blocksize: as in `qkernels.format`.
        out: [M, K] in dy's dtype, contiguous.
        absmax_8bit, absmax_code, absmax_offset: all None, or uint8[blocks] aligned to 4 bytes, float32[256] and a
            float32 scalar tensor.
    """
    (M, N), K = dy.shape, out.shape[1]
    tiles = -(-M // config.columns) * -(-K // config.rows)
    sum_of = parts_sum(M, K, out.dtype, config) if config.parts > 1 else None
    result = out if sum_of is None else sum_of.empty(dy.device)
    constants = (
        K,
        float_codes(quant_type),
        absmax_8bit is not None,
        NESTED_BLOCKSIZE,
        blocksize,
        N % 8 == 0,
        *skinny_dx_constants(config, dy.dtype).values(),
    )
    pointers = (dy, packed, absmax, absmax_8bit, absmax_code, absmax_offset, result)
    _LAUNCHERS[config.early]((tiles, config.parts, 1), pointers, (M, N, config.part_steps(N)), constants, config)
    if sum_of is not None:
        sum_of.add(result, out)
