"""The decision of a 4-bit index: one table look-up and one comparison, exact for every float32.

[-1, 1] is cut into 31 buckets of 1/15, narrower than the least distance of two thresholds, so a bucket holds one at
most.  The table gives that threshold, and how many lie below the bucket.  Any monotone cutting does: of two values in
different buckets the order is known, and within a bucket the comparison decides.

On a GPU each lane of a warp holds the entry of its own number, and a look-up is a shuffle: no memory, no bank
conflict, and the bucket needs no address arithmetic, because a shuffle reads the five low bits only.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from ..format import FP4_THRESHOLDS, NF4_THRESHOLDS
from ._tile import lane_id

_LANES = 32
_BUCKETS = 15  # in a unit interval
# Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the mantissa; 15 more makes the bucket of
# -1 number 0.  NaN has these bits set, and so takes number 31, which is no bucket: its threshold is infinite.
_ROUND = 12582912.0 + _BUCKETS
_BUCKETS_C = tl.constexpr(float(_BUCKETS))
_ROUND_C = tl.constexpr(_ROUND)
_LANES_C = tl.constexpr(_LANES)
_TABLES: dict[tuple[str, torch.device], torch.Tensor] = {}


def bucket_table(quant_type: str, device: torch.device) -> torch.Tensor:
    """int32[64] on `device`: each bucket's threshold (float32 bits, infinity if none), then the rank below each."""
    table = _TABLES.get((quant_type, device))
    if table is None:
        thresholds = torch.tensor(
            NF4_THRESHOLDS if quant_type == "nf4" else FP4_THRESHOLDS, dtype=torch.float32
        ).tolist()
        buckets = [round(_BUCKETS * threshold) + _BUCKETS for threshold in thresholds]
        assert len(set(buckets)) == len(buckets)
        inside = [thresholds[buckets.index(b)] if b in buckets else torch.inf for b in range(_LANES)]
        # The last number is that of NaN, which takes index 0.
        below = [sum(other < b for other in buckets) for b in range(_LANES - 1)] + [0]
        bits = [struct.unpack("<i", struct.pack("<f", threshold))[0] for threshold in inside]
        table = torch.tensor([*bits, *below], dtype=torch.int32, device=device)
        _TABLES[quant_type, device] = table
    return table


def _assembly(nf4: bool) -> str:
    """Four pairs of scaled elements to four bytes in one register, the even element in the high nibble.

    $0 the bytes; $1 to $4 the even elements, $5 to $8 the odd ones; $9 this lane's threshold and $13 its rank (given
    once for each of the four).  FP4 ranks 0..7 are the patterns 0 1 6 7 4 5 2 3: where bit 1 is set, bit 2 is flipped,
    for all eight nibbles at once.
    """
    lines = [".reg .b32 bucket, threshold, rank, word;", ".reg .f32 magnitude;", ".reg .pred above;"]
    for number, operand in enumerate((4, 8, 3, 7, 2, 6, 1, 5)):
        value = f"${operand}"
        if not nf4:
            lines.append(f"abs.f32 magnitude, {value};")
        scaled = value if nf4 else "magnitude"
        lines += [
            f"fma.rn.f32 bucket, {scaled}, 0f{_hex(_BUCKETS)}, 0f{_hex(_ROUND)};",
            "shfl.sync.idx.b32 threshold, $9, bucket, 31, 0xffffffff;",
            "shfl.sync.idx.b32 rank, $13, bucket, 31, 0xffffffff;",
            f"setp.gt.f32 above, {scaled}, threshold;",
            "@above add.s32 rank, rank, 1;",
        ]
        if not nf4:
            lines += [f"setp.lt.f32 above, {value}, 0f00000000;", "@above add.s32 rank, rank, 8;"]
        lines.append("mov.b32 word, rank;" if number == 0 else "mad.lo.s32 word, word, 16, rank;")
    if not nf4:
        lines += ["and.b32 rank, word, 0x22222222;", "shl.b32 rank, rank, 1;", "xor.b32 word, word, rank;"]
    lines.append("mov.b32 $0, word;")
    return "{\n" + "\n".join(lines) + "\n}"


def _hex(value: float) -> str:
    return struct.pack(">f", value).hex()


_NF4_ASSEMBLY = tl.constexpr(_assembly(True))
_FP4_ASSEMBLY = tl.constexpr(_assembly(False))
_CONSTRAINTS = tl.constexpr("=r,f,f,f,f,f,f,f,f,f,f,f,f,r,r,r,r")


@triton.jit
def _rank(x, table_ptr):
    bucket = tl.fma(x, _BUCKETS_C, _ROUND_C).to(tl.int32, bitcast=True) & (_LANES_C - 1)
    threshold = tl.load(table_ptr + bucket).to(tl.float32, bitcast=True)
    return tl.load(table_ptr + _LANES_C + bucket) + (x > threshold).to(tl.int32)


@triton.jit
def _index(x, table_ptr, NF4: tl.constexpr):
    if NF4:
        index = _rank(x, table_ptr)
    else:
        rank = _rank(tl.abs(x), table_ptr)
        index = (rank ^ ((rank & 2) * 2)) + (x < 0.0).to(tl.int32) * 8
    return index


@triton.jit
def encode_pairs(even, odd, table_ptr, NF4: tl.constexpr, USE_ASM: tl.constexpr):
    """Bytes (uint8) of neighbouring scaled elements, float32 in [-1, 1] or NaN.

    The twin without inline assembly is for the interpreter.  Every lane of a warp must arrive here, as in a kernel
    without branches it does.
    """
    if USE_ASM:
        lane = lane_id()
        threshold = tl.load(table_ptr + lane).to(tl.float32, bitcast=True)
        rank = tl.load(table_ptr + _LANES_C + lane)
        packed = tl.inline_asm_elementwise(
            _NF4_ASSEMBLY if NF4 else _FP4_ASSEMBLY,
            _CONSTRAINTS,
            [even, odd, threshold, rank],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        packed = ((_index(even, table_ptr, NF4) << 4) | _index(odd, table_ptr, NF4)).to(tl.uint8)
    return packed
