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
* **The sum over warps** goes through shared memory in a fixed order: equal inputs give equal bits.

Codes are held times alpha (`_pairs.py`), and the sum is divided by it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ..format import NESTED_BLOCKSIZE
from ..tuning.skinny import SkinnyConfig
from ._lanes import (
    load_once,
    load_shared,
    load_shared_pair,
    look_up,
    mma,
    shared_address,
    store_shared,
    swap_halves,
    wait_for_all,
)
from ._launch import Launch, Launcher
from ._pairs import ALPHA, pair_codes
from ._skinny_inputs import CHUNK, chunk_offset, decode_scales, fill_table, load_weights, load_x


@gluon.jit
def _zeros(lane):
    zero = (lane * 0).to(gl.float32)
    return (zero, zero, zero, zero)


@gluon.jit
def _add_scaled(acc, ACC: gl.constexpr, part, scale, scale_8):
    """acc[ACC : ACC + 4] plus the sums of row g (two columns) and of row g + 8, each times its scale."""
    return (
        gl.fma(part[0], scale, acc[ACC]),
        gl.fma(part[1], scale, acc[ACC + 1]),
        gl.fma(part[2], scale_8, acc[ACC + 2]),
        gl.fma(part[3], scale_8, acc[ACC + 3]),
    )


@gluon.jit
def _paired_tile(acc, w, x, scales, lane, TILE: gl.constexpr, STRIDE: gl.constexpr, KIND: gl.constexpr):
    """A tile's 16 x 128 weights times x for M <= 4: lanes 0 and 1 of a quad have the sums of the first block of 64,
    lanes 2 and 3 those of the second."""
    part = _zeros(lane)
    for word in gl.static_range(4):
        a = look_up(w[8 * TILE + word], w[8 * TILE + 4 + word], lane * 4, STRIDE)
        part = mma(a, x, 4 * word, part, KIND)
    scale = load_shared(scales + lane % 4 // 2 * 4)
    scale_8 = load_shared(scales + 64 + lane % 4 // 2 * 4)
    return _add_scaled(acc, 4 * TILE, part, scale, scale_8)


@gluon.jit
def _swapped(w, FIRST: gl.constexpr, low):
    """Two words of the first block of 64 and two of the second, from four words of which lanes t < 2 (`low`) have the
    first block's and the others the second's."""
    other = swap_halves(gl.where(low, w[FIRST + 2], w[FIRST]))
    other_1 = swap_halves(gl.where(low, w[FIRST + 3], w[FIRST + 1]))
    first = (gl.where(low, w[FIRST], other), gl.where(low, w[FIRST + 1], other_1))
    second = (gl.where(low, other, w[FIRST + 2]), gl.where(low, other_1, w[FIRST + 3]))
    return first + second


@gluon.jit
def _tile(acc, w, x, scales, lane, TILE: gl.constexpr, COLUMNS: gl.constexpr, STRIDE: gl.constexpr, KIND: gl.constexpr):
    """A tile's 16 x 128 weights times all columns of x, one block of 64 after the other."""
    GROUPS: gl.constexpr = COLUMNS // 8
    row = _swapped(w, 8 * TILE, lane % 4 < 2)
    row_8 = _swapped(w, 8 * TILE + 4, lane % 4 < 2)
    scale = load_shared_pair(scales)
    scale_8 = load_shared_pair(scales + 64)
    first = ()
    a = look_up(row[0], row_8[0], lane * 4, STRIDE)
    a_1 = look_up(row[1], row_8[1], lane * 4, STRIDE)
    for j in gl.static_range(GROUPS):
        part = mma(a_1, x, 16 * j + 4, mma(a, x, 16 * j, _zeros(lane), KIND), KIND)
        first = first + _add_scaled(acc, 4 * (GROUPS * TILE + j), part, scale[0], scale_8[0])
    both = ()
    a = look_up(row[2], row_8[2], lane * 4, STRIDE)
    a_1 = look_up(row[3], row_8[3], lane * 4, STRIDE)
    for j in gl.static_range(GROUPS):
        part = mma(a_1, x, 16 * j + 12, mma(a, x, 16 * j + 8, _zeros(lane), KIND), KIND)
        both = both + _add_scaled(first, 4 * j, part, scale[1], scale_8[1])
    return both


@gluon.jit
def _store(
    shared,
    bias_ptr,
    out_ptr,
    thread,
    first_row,
    M,
    N,
    HAS_BIAS: gl.constexpr,
    ALPHA: gl.constexpr,
    PAIRED: gl.constexpr,
    TILES: gl.constexpr,
    GROUPS: gl.constexpr,
    ROW_WARPS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Add up the warps along K, in their order, and store.  Shared memory holds [value][thread], float32."""
    K_WARPS: gl.constexpr = num_warps // ROW_WARPS
    THREADS: gl.constexpr = 32 * num_warps
    VALUES: gl.constexpr = TILES * GROUPS * 4
    RESULTS: gl.constexpr = VALUES * ROW_WARPS * 32
    for first in gl.static_range(0, RESULTS, THREADS):
        result = first + thread
        lane = result % 32
        row_warp = result // 32 % ROW_WARPS
        value = gl.minimum(result // (32 * ROW_WARPS), VALUES - 1)
        address = shared + (value * THREADS + row_warp * (32 * K_WARPS) + lane) * 4
        total = load_shared(address)
        for k_warp in gl.static_range(1, K_WARPS):
            total += load_shared(address + 128 * k_warp)
        column = value // 4 % GROUPS * 8 + lane % 4 * 2 + value % 2
        inside = result < RESULTS
        if PAIRED:  # the sums of the second block of 64 are two lanes further on
            second = load_shared(address + 8)
            for k_warp in gl.static_range(1, K_WARPS):
                second += load_shared(address + 8 + 128 * k_warp)
            total += second
            inside = inside & (lane % 4 < 2)
        row = first_row + (row_warp * TILES + value // (4 * GROUPS)) * 16 + value // 2 % 2 * 8 + lane // 4
        inside = inside & (column < M)
        total = total * (1.0 / ALPHA)
        if HAS_BIAS:
            total += gl.load(bias_ptr + row, mask=inside, other=0.0).to(gl.float32)
        gl.store(out_ptr + column.to(gl.int64) * N + row, total.to(out_ptr.dtype.element_ty), mask=inside)


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
    STRIDE: gl.constexpr,
    SHARED_BYTES: gl.constexpr,
):
    num_warps: gl.constexpr = gl.num_warps()
    K_WARPS: gl.constexpr = num_warps // ROW_WARPS
    THREADS: gl.constexpr = 32 * num_warps
    ROWS: gl.constexpr = 16 * TILES * ROW_WARPS
    GROUPS: gl.constexpr = COLUMNS // 8
    CHUNKS: gl.constexpr = (K + CHUNK - 1) // CHUNK
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
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
    scales = shared + 256 * STRIDE
    # The last program takes whole tiles too: where N is no multiple it computes rows again that its neighbour has.
    first_row = gl.minimum(gl.program_id(0) * ROWS, N - ROWS)
    row = first_row + row_warp * (16 * TILES) + g
    w_address = packed_ptr.to(gl.int64) + row.to(gl.int64) * (K // 2) + t * 16
    if PAIRED:
        column = g % 4
        inside = ((column < M) & (g // 4 == t // 2)).to(gl.int32)
        x_address = x_ptr.to(gl.int64) + (column * K + t * 32) * 2
    else:
        column = g
        inside = lane * 0 + 1
        x_address = x_ptr.to(gl.int64) + (column * K + t % 2 * 32 + t // 2 * 16) * 2

    chunk = gl.minimum(k_warp, CHUNKS - 1)
    w = load_weights(w_address + chunk_offset(chunk, t, K), K, TILES)
    x = load_x(x_address, chunk, column, t, inside * (k_warp < CHUNKS).to(gl.int32), M, K, PAIRED, COLUMNS)
    fill_table(shared, warp, lane, CODES, STRIDE, num_warps)
    decode_scales(
        scales,
        absmax_ptr,
        absmax_8bit_ptr,
        absmax_code_ptr,
        absmax_offset_ptr,
        first_row,
        warp,
        lane,
        K,
        NESTED,
        NESTED_BLOCK,
        QUANT_BLOCK,
        ROWS,
        num_warps,
    )
    wait_for_all(thread)
    acc = _zeros(lane)
    for _ in gl.static_range(1, TILES * GROUPS):
        acc = acc + _zeros(lane)
    for step in range((CHUNKS + K_WARPS - 1) // K_WARPS):
        chunk = step * K_WARPS + k_warp
        following = gl.minimum(chunk + K_WARPS, CHUNKS - 1)
        following_inside = inside * (chunk + K_WARPS < CHUNKS).to(gl.int32)
        # A warp without a chunk of its own has zeros for x and computes with the last one's scales.
        here = scales + gl.minimum(chunk, CHUNKS - 1) * (ROWS * 8 + 8) + (row_warp * (16 * TILES) + g) * 8
        sums = ()
        following_w = ()
        w_next = w_address + chunk_offset(following, t, K)
        for tile in gl.static_range(TILES):
            if PAIRED:
                sums = sums + _paired_tile(acc, w, x, here + 128 * tile, lane, tile, STRIDE, KIND)
            else:
                sums = sums + _tile(acc, w, x, here + 128 * tile, lane, tile, COLUMNS, STRIDE, KIND)
            following_w = following_w + load_once(w_next + 16 * tile * (K // 2))
            following_w = following_w + load_once(w_next + (16 * tile + 8) * (K // 2))
        acc = sums
        w = following_w
        x = load_x(x_address, following, column, t, following_inside, M, K, PAIRED, COLUMNS)
    wait_for_all(thread)  # the table and the scales make room for the sums
    memory.index(0).store(acc[0])  # and the others by address: each of Gluon's stores would wait for all
    for value in gl.static_range(1, 4 * TILES * GROUPS):
        store_shared(shared + (value * THREADS + thread) * 4, acc[value].to(gl.int32, bitcast=True))
    wait_for_all(thread)
    _store(
        shared,
        bias_ptr,
        out_ptr,
        thread,
        first_row,
        M,
        N,
        HAS_BIAS,
        ALPHA,
        PAIRED,
        TILES,
        GROUPS,
        ROW_WARPS,
        num_warps,
    )


_launch = Launcher(_matmul_skinny_kernel, views={1: torch.uint8}, enable_fp_fusion=False)


def skinny_constants(config: SkinnyConfig, dtype: torch.dtype) -> dict[str, object]:
    """The kernel's last compile-time arguments, in its order: those that the configuration decides."""
    return {
        "KIND": "sm_75" if config.turing else "bf16" if dtype == torch.bfloat16 else "f16",
        "COLUMNS": config.columns,
        "PAIRED": config.paired,
        "TILES": config.tiles,
        "ROW_WARPS": config.row_warps,
        "STRIDE": config.stride,
        "SHARED_BYTES": config.shared_bytes,
    }


@lru_cache(maxsize=4096)
def skinny_launch(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    blocksize: int,
    quant_type: str,
    nested: bool,
    has_bias: bool,
    config: SkinnyConfig,
) -> Launch:
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
    )
    return Launch(_launch, (-(-N // config.rows), 1, 1), (M, N), constants, config)


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
        x: float16 or bfloat16 [..., K], contiguous, aligned to 16 bytes; M, the product of the leading sizes, is 1 to
            config.columns.
        packed: codes of W [N, K], contiguous, aligned to 16 bytes, any storage dtype; K a multiple of 64, and N at
            least the rows of a program.
        absmax: float32 scales, one a block; with double quantization the scales of `absmax_8bit`, one for 256.
        bias: [N] in x's dtype.
        out: [..., N] in x's dtype, contiguous.
        absmax_8bit, absmax_code, absmax_offset: all None, or uint8[blocks], float32[256] and a float32 scalar tensor.
    """
    N, K = out.shape[-1], x.shape[-1]
    nested, has_bias = absmax_8bit is not None, bias is not None
    launch = skinny_launch((x.numel() // K, N, K), x.dtype, blocksize, quant_type, nested, has_bias, config)
    launch(x, packed, absmax, absmax_8bit, absmax_code, absmax_offset, bias, out)
