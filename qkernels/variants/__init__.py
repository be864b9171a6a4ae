"""Every specialization of every kernel that the operators can launch, for compiling them without a GPU.

Room: enumeration for `aot.py` and the tests; nothing here is imported on the user's path.  Lengths divisible by 16 and
others are told apart, and at one block size lengths of 2^31 and more.  The length 1 is left out: Triton folds it into
the code.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..format import BLOCKSIZES
from .elementwise import blockwise, dequantize_4bit, dropout, norm, partial_sums, quantize_4bit, token_attention
from .lora import adapters
from .products import (
    arrange_variant,
    matmul_skinny,
    matmul_skinny_dx,
    matmul_wgmma,
    skinny_dx_variant,
    skinny_variant,
    sum_variant,
    wgmma_variant,
)
from .variant import DTYPES, LENGTHS, Variant

__all__ = [
    "Variant",
    "arrange_variant",
    "skinny_dx_variant",
    "skinny_variant",
    "sum_variant",
    "variants",
    "wgmma_variant",
]


def variants(arch: str = "sm_75") -> Iterator[Variant]:
    """All of them, as they are launched on that architecture."""
    yield from matmul_skinny(int(arch.removeprefix("sm_")))
    yield from matmul_skinny_dx(int(arch.removeprefix("sm_")))
    if arch == "sm_90":
        yield from matmul_wgmma()
    if arch != "sm_75":  # `tl.dot` has no tensor cores there
        yield from adapters()
    yield from dropout()
    yield from token_attention(int(arch.removeprefix("sm_")))
    yield from norm(int(arch.removeprefix("sm_")))
    yield from partial_sums()
    for blocksize in BLOCKSIZES:
        for dtype in DTYPES:
            for length, words in LENGTHS.items():
                if length != "i64:16" or blocksize == 64:
                    tag = f"{dtype} blocksize={blocksize} {words}"
                    yield from quantize_4bit(blocksize, dtype, length, tag)
                    yield from dequantize_4bit(blocksize, dtype, length, tag)
                    yield from blockwise(blocksize, dtype, length, tag)
