"""The mathematics in plain torch: the CPU backend, and the truth that the kernels are compared with.

Room: any device, no Triton, no input checks.  Written to be read beside `format.py`; every rounding is on purpose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .format import (
    FP4_PATTERNS,
    FP4_THRESHOLDS,
    NESTED_BLOCKSIZE,
    NF4_THRESHOLDS,
    SMALLEST_NORMAL,
    ZERO_INDEX,
    block_count,
    blockwise_thresholds,
    byte_table,
    packed_length,
)


def exact_reciprocal(absmax: torch.Tensor) -> torch.Tensor:
    """1 / absmax, float32, correctly rounded, subnormal results flushed to zero.

    A GPU takes an approximate instruction, at most one ulp off this.  It is the only thing that the hardware decides;
    the quantizers here take it as an argument, so that a GPU's results can be reproduced to the last bit.
    """
    inverse = 1.0 / absmax
    return torch.where(inverse < SMALLEST_NORMAL, 0.0, inverse)


def quantize_4bit_reference(
    A: torch.Tensor,
    blocksize: int,
    quant_type: str,
    quant_storage: torch.dtype,
    propagate_nan: bool = False,
    reciprocal: Callable[[torch.Tensor], torch.Tensor] = exact_reciprocal,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to packed 4-bit codes.

    Args:
        A: float32, float16 or bfloat16, any shape.
        propagate_nan: a NaN makes its block's scale NaN; else the scale ignores it, as in bitsandbytes.

    Returns:
        packed bytes viewed as `quant_storage`, shape [ceil(ceil(n/2) / itemsize), 1], padding bytes zero; and absmax
        float32[ceil(n/blocksize)].
    """
    scaled, absmax = _scale_blocks(A, blocksize, reciprocal, propagate_nan)
    if quant_type == "nf4":
        index = torch.bucketize(scaled, scaled.new_tensor(NF4_THRESHOLDS), out_int32=True)
    else:
        rank = torch.bucketize(scaled.abs(), scaled.new_tensor(FP4_THRESHOLDS), out_int32=True)
        index = torch.tensor(FP4_PATTERNS, dtype=torch.int32, device=A.device)[rank] + 8 * (scaled < 0)
    # torch sorts NaN above every threshold; the format puts it at index 0, where no comparison holds.
    index = torch.where(scaled.isnan(), 0, index)
    index = torch.where((absmax == 0)[:, None], ZERO_INDEX[quant_type], index)
    # The nibble that fills up an odd length is that of a zero: the index of the padding.
    even = A.numel() + A.numel() % 2
    return pack_nibbles(index.reshape(-1)[:even], quant_storage), absmax


def dequantize_4bit_reference(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: tuple[int, ...] | list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decode packed 4-bit codes.

    Args:
        A: packed codes, any storage dtype.
        absmax: float32 scales, one a block (decoded, if they were quantized).

    Returns:
        Tensor of `shape` and `dtype`: table value times scale in float32, rounded once.
    """
    n = torch.Size(shape).numel()
    # A byte at a time, its two values looked up as one 8-byte element: ten times faster than nibble by nibble, and this
    # is the CPU backend.
    pairs = byte_table(quant_type, A.device).view(torch.float64).view(-1)
    packed = A.reshape(-1).view(torch.uint8)[: packed_length(n)]
    values = torch.index_select(pairs, 0, packed.int()).view(torch.float32)[:n]
    return _unscale_blocks(values, absmax, blocksize).to(dtype).reshape(shape)


def quantize_blockwise_reference(
    A: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    offset: torch.Tensor | None = None,
    reciprocal: Callable[[torch.Tensor], torch.Tensor] = exact_reciprocal,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to 8-bit indices into `code`.

    Args:
        A: float32, float16 or bfloat16, any shape.
        code: float32[256], ascending.
        offset: float32 scalar tensor, subtracted from A in float32; None is zero.

    Returns:
        uint8 indices of A's shape, and absmax float32[ceil(n/blocksize)].
    """
    scaled, absmax = _scale_blocks(A if offset is None else A.float() - offset, blocksize, reciprocal)
    index = torch.bucketize(scaled, blockwise_thresholds(code), out_int32=True)
    # A NaN (an all-zero block: 0 * inf) fails every comparison, so it takes index 0.
    index = torch.where(scaled.isnan(), 0, index)
    return index.to(torch.uint8).reshape(-1)[: A.numel()].reshape(A.shape), absmax


def dequantize_blockwise_reference(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    """Decode 8-bit indices: `code[A] * absmax` in float32, rounded once to `dtype`; A's shape."""
    values = code[A.reshape(-1).int()]
    return _unscale_blocks(values, absmax, blocksize).to(dtype).reshape(A.shape)


def decode_absmax_reference(
    absmax_8bit: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Decode double-quantized scales: `round(code[i] * absmax) + offset`, two roundings, float32[blocks].

    Args:
        absmax_8bit: uint8[blocks].
        absmax: float32[ceil(blocks/256)], the scales of the scales.
        code: float32[256].
        offset: float32 scalar tensor.
    """
    return dequantize_blockwise_reference(absmax_8bit, absmax, code, NESTED_BLOCKSIZE, torch.float32) + offset


def mean_reference(x: torch.Tensor, ctas: int) -> torch.Tensor:
    """The mean of float32[n] in the order in which torch sums on a GPU; which numbers meet when is all there is to it.

    Args:
        ctas: blocks of 512 slots, each of which reads vectors of 4.
    """
    slots, vector = 512, 4
    whole = x.numel() // vector * vector
    rounds = x.new_zeros(-(-whole // (ctas * slots * vector)), ctas, slots, vector)
    rounds.view(-1)[:whole] = x[:whole]
    total = rounds[0]
    for values in rounds[1:]:
        total = total + values
    total[0, : x.numel() - whole, 0] += x[whole:]
    sums = _tree(((total[..., 0] + total[..., 1]) + total[..., 2]) + total[..., 3])
    # The sums of the CTAs go to 512 slots again, one after the other.
    turns = x.new_zeros(-(-ctas // slots), slots)
    turns.view(-1)[:ctas] = sums
    total = turns[0]
    for values in turns[1:]:
        total = total + values
    return _tree(total) * (1 / torch.tensor(x.numel(), dtype=torch.float32, device=x.device))


def _tree(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, a power of two: the upper half is added to the lower one until one is left."""
    while x.shape[-1] > 1:
        lower, upper = x.chunk(2, dim=-1)
        x = lower + upper
    return x[..., 0]


def pack_nibbles(index: torch.Tensor, quant_storage: torch.dtype) -> torch.Tensor:
    """Pack 4-bit indices, two a byte, the even element in the high nibble; [m, 1] of `quant_storage`, zero-padded."""
    length = packed_length(index.numel(), quant_storage)
    padded = torch.zeros(2 * length * quant_storage.itemsize, dtype=torch.uint8, device=index.device)
    padded[: index.numel()] = index
    return (padded[::2] << 4 | padded[1::2]).view(quant_storage).unsqueeze(1)


def _scale_blocks(
    A: torch.Tensor,
    blocksize: int,
    reciprocal: Callable[[torch.Tensor], torch.Tensor],
    propagate_nan: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks divided by their absmax, float32[blocks, blocksize] (the tail padded with zeros), and absmax."""
    n = A.numel()
    blocks = A.new_zeros(block_count(n, blocksize) * blocksize, dtype=torch.float32)
    blocks[:n] = A.reshape(-1)
    blocks = blocks.reshape(-1, blocksize)
    # The GPU's maximum skips NaN unless told otherwise, and flushes a subnormal result to zero.
    magnitude = blocks.abs()
    absmax = (magnitude if propagate_nan else magnitude.nan_to_num(nan=0.0, posinf=torch.inf)).amax(dim=1)
    absmax = torch.where(absmax < SMALLEST_NORMAL, 0.0, absmax)
    # A product with the reciprocal, not a quotient: so does the GPU, and the two round differently.
    return blocks * reciprocal(absmax)[:, None], absmax


def _unscale_blocks(values: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> torch.Tensor:
    """`values` (flat, float32) times the scale of their block, in place."""
    full = values.numel() // blocksize
    values[: full * blocksize].view(full, blocksize).mul_(absmax[:full, None])
    values[full * blocksize :].mul_(absmax[full:])
    return values
