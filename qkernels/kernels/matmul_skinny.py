"""y[M, N] = x[M, K] W[N, K]^T + bias for few rows of x, with W decoded on its way into the tensor cores.

A program computes 16 TILES ROW_WARPS rows of W for all of x, in 32 num_warps threads; warps share the rows out
ROW_WARPS ways and K the other ways.  W is the first operand of m16n8k16 (y^T = W x^T), because a lane can then decode
its own bytes into its own fragment:

* **Loads.** A lane takes 16 bytes of a row, four lanes 64 bytes: 128 weights of each of 16 rows in two loads a lane.  A
  whole step of K, all TILES, is in flight while the step before it is computed.
* **Decoding.** A byte is two weights that are neighbours in k, as a fragment register wants them.  A table of all 256
  bytes lies in shared memory once for each bank, so a look-up is an address and a load, without conflicts.
* **The order of k** within a product is free if x is read in the same: lane t of a quad owns the k of its bytes.
* **Scales** multiply the partial sum of 64 k, in float32.  They are decoded once, into shared memory.  Four lanes'
  bytes lie in two quantization blocks of 64, which one instruction would add up: lanes t and t ^ 2 swap half of them
  first.  For M <= 4 the swap is spared (PAIRED): the instruction's first four columns are x where the block is the
  first and zero where it is the second, the other four the other way round.
* **Blocks of 32**, four of them to a chunk, are shared out likewise; PAIRED is for M <= 2 then, two columns a block.
* **Rows that are not whole blocks** are read in W's windows of 64, and only x from another place (`_ragged_rows.py`);
  with more than a few rows of x a launch before arranges these (`_arrange.py`).
* **The sum over warps** goes through shared memory in a fixed order: equal inputs give equal bits.

Codes are held times alpha (`_pairs.py`), and the sum is divided by it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ..format import NESTED_BLOCKSIZE
from ..tuning.skinny import MAP_BYTES as _MAP_SIZE
from ..tuning.skinny import TABLE_BYTES as _TABLE_SIZE
from ..tuning.skinny import SkinnyConfig, phases, programs
from ._arrange import arranged
from ._early import let_next_begin, wait_for_previous
from ._lanes import shared_address, store_shared, wait_for_all, warp_number
from ._launch import Launch, early_and_late
from ._pairs import ALPHA, pair_codes
from ._ragged_rows import load_last
from ._skinny_chunk import add_chunk, zeros
from ._skinny_form import form_of
from ._skinny_inputs import fetch_weights, fill_table, load_weights, load_x, load_x_paired, place_in_x, rows_of
from ._skinny_scales import fetch_scales, load_batch, load_map, store_map, store_scales
from ._skinny_sums import add_and_store
from ._sum_parts import PartsSum, parts_sum

TABLE_BYTES = gl.constexpr(_TABLE_SIZE)
MAP_BYTES = gl.constexpr(_MAP_SIZE)


@gluon.jit(do_not_specialize=["M", "N"])
def _matmul_skinny_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K: gl.constexpr,
    CODES: gl.constexpr,
    ALPHA: gl.constexpr,
    NESTED: gl.constexpr,
    NESTED_BLOCK: gl.constexpr,
    QUANT_BLOCK: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    KIND: gl.constexpr,
    COLUMNS: gl.constexpr,
    PAIRED: gl.constexpr,
    TILES: gl.constexpr,
    ROW_WARPS: gl.constexpr,
    ONE_BRANCH: gl.constexpr,
    EARLY: gl.constexpr,
    PARTS: gl.constexpr,
    SHARED_BYTES: gl.constexpr,
    ARRANGED: gl.constexpr,
    PHASES: gl.constexpr,
    TAIL: gl.constexpr,
):
    WARPS: gl.constexpr = gl.num_warps()
    form: gl.constexpr = form_of(
        K,
        NESTED,
        NESTED_BLOCK,
        QUANT_BLOCK,
        KIND,
        COLUMNS,
        PAIRED,
        TILES,
        ROW_WARPS,
        ONE_BRANCH,
        PARTS,
        ARRANGED,
        PHASES,
        TAIL,
        WARPS,
    )
    THREADS: gl.constexpr = form.THREADS
    K_WARPS: gl.constexpr = form.K_WARPS
    ROWS: gl.constexpr = form.ROWS
    VALUES: gl.constexpr = 4 * TILES * form.GROUPS  # sums of a thread
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    memory = gl.allocate_shared_memory(
        gl.float32, [SHARED_BYTES // (4 * THREADS), THREADS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    thread = gl.arange(0, THREADS, lanes)
    lane = thread % 32
    warp = thread // 32
    g = lane // 4
    t = lane % 4
    k_warp = warp % K_WARPS
    row_warp = warp // K_WARPS
    shared = shared_address(thread)
    map_address = shared + TABLE_BYTES
    scales = map_address + MAP_BYTES
    # Programs beside each other share W's rows, which the second finds in the cache.
    if not ARRANGED:
        x_ptr += gl.program_id(0) * (COLUMNS * K)
    begin = 0
    end = form.CHUNKS
    if PARTS > 1:
        begin = gl.program_id(2) * form.PART
        end = gl.minimum(begin + form.PART, form.CHUNKS)
        tile = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
        out_ptr += (tile * PARTS + gl.program_id(2)).to(gl.int64) * (ROWS * COLUMNS)
    else:
        out_ptr += (gl.program_id(0) * COLUMNS).to(gl.int64) * N
    M -= gl.program_id(0) * COLUMNS
    rows, row, w_address, shift = rows_of(packed_ptr, g, t, row_warp, begin, N, form)
    x_place, inside = place_in_x(x_ptr, g, t, shift, M, form)

    if EARLY:
        fill_table(shared, warp, lane, CODES, WARPS)
        first_chunk = gl.minimum(begin + k_warp, end - 1)
        fetch_weights(w_address, first_chunk, t, shift, form)
        if NESTED and PHASES == 0 and PARTS == 1:
            fetch_scales(absmax_8bit_ptr, rows[0], thread, form)
        wait_for_previous(thread)
        let_next_begin(thread)
    last = ()
    if TAIL:
        last = load_last(packed_ptr, row, rows[1], rows[2], N, K, PHASES)
    first_scales = load_batch(absmax_ptr, absmax_8bit_ptr, rows, warp, lane, 0, form)
    chunk = gl.minimum(begin + k_warp, end - 1)
    inside_now = inside * (begin + k_warp < end).to(gl.int32)
    w = load_weights(w_address, chunk, t, shift, last, form)
    if PAIRED:
        x = load_x_paired(x_place, chunk, t, inside_now, form)
        x_1 = ()
    else:
        x = load_x(x_place, chunk, inside_now, M, 0, form)
        x_1 = load_x(x_place, chunk, inside_now, M, 1, form)
    offset = 0.0
    map_entries = ()
    if NESTED:  # before the scales are there: what is looked up for them should not be waited for after them
        map_entries = load_map(absmax_code_ptr, thread, THREADS)
        offset = gl.load(absmax_offset_ptr)
    wait_for_all(thread)
    if not EARLY:
        fill_table(shared, warp, lane, CODES, WARPS)
    if NESTED:
        store_map(map_address, map_entries, thread, THREADS)
        wait_for_all(thread)
    store_scales(scales, first_scales, map_address, offset, absmax_ptr, absmax_8bit_ptr, rows, warp, lane, form)
    wait_for_all(thread)

    acc = zeros(lane)
    for _ in gl.static_range(1, VALUES // 4):
        acc = acc + zeros(lane)
    this_k_warp = warp_number(K_WARPS)
    for step in range((form.PART + K_WARPS - 1) // K_WARPS):
        chunk = begin + step * K_WARPS + k_warp
        following = gl.minimum(chunk + K_WARPS, end - 1)
        inside_then = inside * (chunk + K_WARPS < end).to(gl.int32)
        # A warp without a chunk of its own has zeros for x and computes with the last one's scales.
        here = scales + (gl.minimum(chunk, end - 1) - begin) * ((ROWS + 1) * 4 * form.SCALES)
        here += (row_warp * (16 * TILES) + g) * (4 * form.SCALES)
        w_then = load_weights(w_address, following, t, shift, last, form)
        acc, x, x_1 = add_chunk(
            w,
            x,
            x_1,
            acc,
            here,
            lane,
            begin + step * K_WARPS,
            this_k_warp,
            end,
            x_place,
            following,
            inside_then,
            M,
            form,
        )
        w = w_then
    wait_for_all(thread)  # the table and the scales make room for the sums
    memory.index(0).store(acc[0])  # and the others by address: each of Gluon's stores would wait for all
    for value in gl.static_range(1, VALUES):
        store_shared(shared + (value * THREADS + thread) * 4, acc[value].to(gl.int32, bitcast=True))
    wait_for_all(thread)
    add_and_store(shared, bias_ptr, out_ptr, thread, rows, M, N, HAS_BIAS, ALPHA, form)


_LAUNCHERS = early_and_late(_matmul_skinny_kernel, views={1: torch.uint8}, enable_fp_fusion=False)


def skinny_constants(config: SkinnyConfig, dtype: torch.dtype) -> dict[str, object]:
    """The kernel's last compile-time arguments, in its order: those that the configuration decides."""
    return {
        "KIND": "sm_75" if config.turing else "bf16" if dtype == torch.bfloat16 else "f16",
        "COLUMNS": config.columns,
        "PAIRED": config.paired,
        "TILES": config.tiles,
        "ROW_WARPS": config.row_warps,
        "ONE_BRANCH": config.one_branch,
        "EARLY": config.early,
        "PARTS": config.parts,
        "SHARED_BYTES": config.shared_bytes,
        "ARRANGED": config.arranged,
    }


def ragged_constants(N: int, K: int, blocksize: int) -> tuple[int, bool]:
    """PHASES, how many rows begin each in their own way, 0 where all are whole blocks of 64 and more; and TAIL, whether
    the bytes of W are no multiple of 16."""
    return phases(K, blocksize), (N * K + 1) // 2 % 16 != 0


@lru_cache(maxsize=4096)
def skinny_launch(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    blocksize: int,
    quant_type: str,
    nested: bool,
    has_bias: bool,
    config: SkinnyConfig,
) -> Callable[..., None]:
    """The launch for products of this kind, a function of (x, packed, absmax, absmax_8bit, absmax_code, absmax_offset,
    bias, out) as they are described below.

    Args:
        shape: (M, N, K).
        dtype: of x.
        nested: double quantization.
    """
    M, N, K = shape
    constants = (
        K,
        pair_codes(quant_type, dtype),
        ALPHA[quant_type, dtype],
        nested,
        NESTED_BLOCKSIZE,
        blocksize,
        has_bias,
        *skinny_constants(config, dtype).values(),
        *ragged_constants(N, K, blocksize),
    )
    grid = -(-M // config.columns), programs(N, K, blocksize, config.rows), config.parts
    launch = Launch(_LAUNCHERS[config.early], grid, (M, N), constants, config)
    if config.arranged:
        return arranged(M, K, blocksize, config, launch)
    return launch if config.parts == 1 else _in_parts(launch, parts_sum(M, N, dtype, config))


def _in_parts(product: Launch, sum_of: PartsSum) -> Callable[..., None]:
    """The product's launch of which each program has a part of K, and the one that adds these."""

    def launch(*pointers: torch.Tensor | None) -> None:
        out = pointers[-1]
        assert out is not None
        parts = sum_of.empty(out.device)
        product(*pointers[:-1], parts)
        sum_of.add(parts, out)

    return launch


def matmul_skinny_triton(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: SkinnyConfig,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> None:
    """Launch the kernel into `out`.

    Args:
        x: float16 or bfloat16 [..., K], contiguous, aligned to 16 bytes; M is the product of the leading sizes.
        packed: codes of W [N, K], contiguous, aligned to 16 bytes, any storage dtype; K at least 64, and N at least
            the rows of a program where rows are whole blocks of 64 or more.
        absmax: float32 scales, one a block; with double quantization the scales of `absmax_8bit`, one for 256.
        bias: [N] in x's dtype.
        out: [..., N] in x's dtype, contiguous.
        absmax_8bit, absmax_code, absmax_offset: all None, or uint8[blocks], float32[256] and a float32 scalar tensor.
    """
    N, K = out.shape[-1], x.shape[-1]
    nested, has_bias = absmax_8bit is not None, bias is not None
    launch = skinny_launch((x.numel() // K, N, K), x.dtype, blocksize, quant_type, nested, has_bias, config)
    launch(x, packed, absmax, absmax_8bit, absmax_code, absmax_offset, bias, out)
