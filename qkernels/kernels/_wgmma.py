"""Parts of the Hopper product: which steps a program takes, tiles and parts of tiles written."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

# Triton 3.6 puts no barrier between those of the kernel.  3.9 does, which makes three or four of the two a step, and
# then warp groups that take turns would wait for each other: there they go together.
TAKE_TURNS = gl.constexpr(hasattr(gl, "thread_barrier"))
# Gluon's names in Triton 3.6 and in 3.9.
block_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_UNDERSCORED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

_TILE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
_HALF_A_TURN = gl.constexpr(
    "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; and.b32 t, t, 1; setp.eq.u32 p, t, $1; "
    "@p bar.sync 0; mov.u32 $0, t; }"
)


@gluon.constexpr_function
def storing_layout(rows, columns, backward):
    """A tile of the output [columns, rows], eight neighbours in memory a thread: backward before `in_order_of_k`."""
    order = [0, 1, 2, 3, 4, 5, 6]
    if backward:  # the bits of a row in which the bits of k lie
        order = [3, 4, 0, 1, 2, 5, 6]
    bits = [[0, 1 << bit] for bit in order[: rows.bit_length() - 1]]
    columns_bits = [[1 << bit, 0] for bit in range(columns.bit_length() - 1)]
    warps = (rows // 16).bit_length() - 1
    lanes = bits[3:] + columns_bits[: 5 - len(bits[3:])]
    rest = columns_bits[5 - len(bits[3:]) :]
    return gl.DistributedLinearLayout(bits[:3] + rest[warps:], lanes, rest[:warps], [], [columns, rows])


@gluon.jit
def half_a_turn(odd_groups: gl.constexpr):
    """One more barrier for every second warp group: it then runs one barrier behind (or catches up with) the others."""
    gl.inline_asm_elementwise(_HALF_A_TURN, "=r,r", [odd_groups], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def first_turn(program, all_turns):
    """Where a program ends, and where the one before it begins: programs share all turns evenly, the last one first.

    Who takes a part comes after who gives it, so that no order in which programs begin can hold them up.
    """
    return (gl.num_programs(0) - program) * all_turns // gl.num_programs(0)


@gluon.jit
def place(turn, tile_turns, across, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr):
    """First row and column of a turn's tile of the transposed output, and the turn's first step."""
    tile = turn // tile_turns
    return tile // across * ROWS, tile % across * COLUMNS, turn % tile_turns * STAGES


@gluon.jit
def next_place(
    row0, column0, step, tile_turns, across, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr
):
    """That of the turn after the one at this place; no division, of which a loop would have four a turn."""
    step += STAGES
    if step == tile_turns * STAGES:
        step = 0
        column0 += COLUMNS
        if column0 == across * COLUMNS:
            column0 = 0
            row0 += ROWS
    return row0, column0, step


@gluon.jit
def _part_offsets(ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """Where float32[ROWS, COLUMNS] is kept between programs: a warp's stores from its accumulator are contiguous."""
    r = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    c = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    return ((c // 8 * 2 + r // 8 % 2) * (ROWS // 16) + r // 16) * 64 + r % 8 * 8 + c % 8


@gluon.jit
def _give_part(acc, parts_ptr, flags_ptr, program, layout: gl.constexpr):
    """Leave a program's part of a tile to the one that has the tile's beginning."""
    SIZE: gl.constexpr = acc.shape[0] * acc.shape[1]
    at = parts_ptr + program.to(gl.int64) * SIZE
    gl.store(at + _part_offsets(acc.shape[0], acc.shape[1], layout), acc)
    block_barrier()
    gl.atomic_xchg(flags_ptr + program, 1, sem="release")


@gluon.jit
def _take_part(acc, parts_ptr, flags_ptr, program, layout: gl.constexpr):
    """Wait for another program's part, and add it."""
    SIZE: gl.constexpr = acc.shape[0] * acc.shape[1]
    while gl.atomic_add(flags_ptr + program, 0, sem="acquire") == 0:
        pass
    gl.atomic_xchg(flags_ptr + program, 0, sem="relaxed")  # as the next launch wants to find it
    block_barrier()
    at = parts_ptr + program.to(gl.int64) * SIZE
    return acc + gl.load(at + _part_offsets(acc.shape[0], acc.shape[1], layout), cache_modifier=".cg")


@gluon.jit
def _store_tile(acc, memory, bias_ptr, out_ptr, row0, column0, M, R, HAS_BIAS: gl.constexpr, BACKWARD: gl.constexpr):
    """Write a tile of the transposed output to out[M, R], with the bias, through two free tiles of x."""
    ROWS: gl.constexpr = acc.shape[0]
    HALF: gl.constexpr = acc.shape[1] // 2
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    if HAS_BIAS:
        r = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
        acc += gl.load(bias_ptr + r, mask=r < R, other=0.0).to(gl.float32)[:, None]
    halves = acc.to(DTYPE).reshape([ROWS, 2, HALF]).permute((0, 2, 1)).split()
    for half in gl.static_range(2):
        same_bytes(memory[half], DTYPE, [HALF, ROWS], _TILE_LAYOUT).permute((1, 0)).store(halves[half])
    block_barrier()
    for half in gl.static_range(2):
        value = same_bytes(memory[half], DTYPE, [HALF, ROWS], _TILE_LAYOUT).load(storing_layout(ROWS, HALF, BACKWARD))
        _store_half(in_order_of_k(value) if BACKWARD else value, out_ptr, row0, column0 + half * HALF, M, R)
    # What comes there next comes by TMA.
    fence_async_shared()


@gluon.jit
def finish_tile(
    acc,
    memory,
    pointers,
    sizes,
    turn,
    stop,
    HAS_BIAS: gl.constexpr,
    BACKWARD: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Store the tile of which a program has the turns to `stop` from `turn` on, with the parts of others, if it has the
    tile's beginning; else leave its part.

    `pointers` are to bias, output, parts and flags; `sizes` are M, R, all turns, a tile's, and tiles across.
    """
    bias_ptr, out_ptr, parts_ptr, flags_ptr = pointers
    M, R, all_turns, tile_turns, across = sizes
    layout: gl.constexpr = acc.type.layout
    # Found again, so that no register keeps it in between.
    row0, column0, last = place(stop - 1, tile_turns, across, acc.shape[0], acc.shape[1], STAGES)
    has_begin = (stop - 1 - turn) * STAGES == last
    if has_begin or not SPLIT:
        if SPLIT:
            giver = gl.program_id(0)
            while first_turn(giver, all_turns) - turn < tile_turns:
                giver -= 1
                acc = _take_part(acc, parts_ptr, flags_ptr, giver, layout)
        _store_tile(acc, memory, bias_ptr, out_ptr, row0, column0, M, R, HAS_BIAS, BACKWARD)
    elif SPLIT:
        _give_part(acc, parts_ptr, flags_ptr, gl.program_id(0), layout)


@gluon.jit
def _store_half(value, out_ptr, row0, column0, M, R):
    layout: gl.constexpr = value.type.layout
    r = row0 + gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))[None, :]
    m = column0 + gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))[:, None]
    gl.store(out_ptr + m.to(gl.int64) * R + r, value, mask=(r < R) & (m < M))


@gluon.jit
def in_order_of_k(value):
    """Columns in the order of `decode_columns`' rows to the order of k."""
    COLUMNS: gl.constexpr = value.shape[1]
    value = value.reshape([value.shape[0], COLUMNS // 32, 2, 2, 8]).permute((0, 1, 4, 2, 3))
    return value.reshape([value.shape[0], COLUMNS])


@gluon.jit
def same_bytes(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """Shared memory under another type, shape and layout."""
    if _UNDERSCORED:
        result = memory._reinterpret(dtype, shape, layout)
    else:
        result = memory.reinterpret(dtype, shape, layout)
    return result
