"""The 16 codes of a 4-bit type in 16 bits, as tensor cores take them, times a factor that makes their rounding small.

A product sums code * x and multiplies by the scale afterwards, in float32.  So the codes may be held times any factor
alpha, if the result is divided by it: alpha is chosen so that all sixteen of code * alpha lie close to 16-bit numbers.
FP4's codes are multiples of 1/192, and 1.5 of them are exact in either type.  For NF4 the search took 2^21 candidates
in [1, 2) and kept the one of the smallest mean square error, each code weighed by how often it occurs in normal weights
in blocks of 64: 0.43 of the error of rounding the codes themselves in float16, 0.57 in bfloat16.

Room: numbers for the kernels; `tests/test_pairs.py` holds the errors and that no neighbouring factor is better.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch

from ..format import FP4_CODE, NF4_CODE

ALPHA = {
    ("nf4", torch.float16): 1.36619234085083,
    ("nf4", torch.bfloat16): 1.436713695526123,
    ("fp4", torch.float16): 1.5,
    ("fp4", torch.bfloat16): 1.5,
}


@lru_cache
def pair_codes(quant_type: str, dtype: torch.dtype) -> tuple[int, ...]:
    """Bits of the 16 codes times alpha, rounded to `dtype` (float16 or bfloat16)."""
    alpha = ALPHA[quant_type, dtype]
    codes = NF4_CODE if quant_type == "nf4" else FP4_CODE
    return tuple(_bits(_float32(code) * alpha, dtype) for code in codes)


def _float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def _bits(value: float, dtype: torch.dtype) -> int:
    """Nearest number of the type, ties to even."""
    if dtype == torch.float16:
        return struct.unpack("<H", struct.pack("<e", value))[0]
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
