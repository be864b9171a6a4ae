"""NF4 and FP4 quantization in own Triton kernels, under the names of `bitsandbytes.functional`.

import qkernels.functional as F        # was: import bitsandbytes.functional as F
packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
y = F.matmul_4bit(x, packed, state)
"""

from .dispatch import explain
from .errors import UserError
from .few_rows import normalize, token_attention
from .format import (
    BLOCKSIZES,
    FLOAT_DTYPES,
    QUANT_STORAGES,
    QUANT_TYPES,
    create_dynamic_map,
    create_normal_map,
    get_4bit_type,
    packed_length,
)
from .functional import (
    dequantize_4bit,
    dequantize_blockwise,
    dequantize_fp4,
    dequantize_nf4,
    gemv_4bit,
    matmul_4bit,
    matmul_4bit_dx,
    quantize_4bit,
    quantize_blockwise,
    quantize_fp4,
    quantize_nf4,
    seeded_dropout,
)
from .joined import matmul_4bit_lora
from .quant_state import QuantState

__version__ = "0.1.0"

__all__ = [
    "BLOCKSIZES",
    "FLOAT_DTYPES",
    "QUANT_STORAGES",
    "QUANT_TYPES",
    "QuantState",
    "UserError",
    "create_dynamic_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "explain",
    "gemv_4bit",
    "get_4bit_type",
    "matmul_4bit",
    "matmul_4bit_dx",
    "matmul_4bit_lora",
    "normalize",
    "packed_length",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "seeded_dropout",
    "token_attention",
]
