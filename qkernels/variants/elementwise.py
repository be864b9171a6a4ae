"""Specializations of the kernels without a product: quantizing, decoding, dropout, sums, a normalization, a token.

Room: of the enumeration.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ..dropout import threshold_and_scale
from ..format import NESTED_BLOCKSIZE
from ..kernels.blockwise import _dequantize_blockwise_kernel, _quantize_blockwise_kernel
from ..kernels.dequantize import _dequantize_4bit_kernel
from ..kernels.dropout import _dropout_kernel
from ..kernels.mean import CAPACITIES, SLOTS, _partial_sums_kernel
from ..kernels.norm import _norm_kernel
from ..kernels.quantize import _quantize_4bit_kernel
from ..kernels.token_attention import _token_attention_kernel
from ..tuning import (
    DROPOUT_CONFIG,
    LaunchConfig,
    elementwise_config,
    norm_config,
    partial_sums_config,
    token_attention_config,
)
from .variant import DTYPES, LENGTHS, NESTED_SCALES, Variant, optional


def partial_sums() -> Iterator[Variant]:
    for ctas in (1, SLOTS):
        config = partial_sums_config(ctas)
        yield Variant(
            f"partial_sums {'of slots' if ctas == 1 else 'of CTAs'}",
            _partial_sums_kernel,
            {"x_ptr": "*fp32", "sums_ptr": "*fp32", "n": "i32", "ctas": "i32", "rounds": "i32"},
            {"SLOTS": config.rows, "WHOLE": ctas > 1},
            config,
        )


def dropout() -> Iterator[Variant]:
    threshold, scale = threshold_and_scale(0.05)
    for dtype in DTYPES:
        for length, words in LENGTHS.items():
            yield Variant(
                f"dropout {dtype} {words}",
                _dropout_kernel,
                {"x_ptr": f"*{dtype}", "seed_ptr": "*i64", "out_ptr": f"*{dtype}", "n": length},
                {"THRESHOLD": threshold, "SCALE": scale, "BLOCK": DROPOUT_CONFIG.rows},
                DROPOUT_CONFIG,
            )


def norm(sm: int) -> Iterator[Variant]:
    """Both kinds, alone and after a sum; 4,096 elements and an odd number of them."""
    for dtype, size, centered, summed in product(DTYPES, (4096, 333), (True, False), (False, True)):
        config, pointer = norm_config(size), f"*{dtype}"
        given, absent = optional(
            (dict.fromkeys(("residual_ptr", "sum_ptr"), pointer), summed), ({"bias_ptr": pointer}, centered)
        )
        yield Variant(
            f"norm {'layer' if centered else 'rms'}{' after a sum' if summed else ''} {dtype} of {size}",
            _norm_kernel,
            dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), pointer) | given,
            {"EPS": 1e-5, "C": size, "BLOCK": config.rows, "CENTERED": centered, "HAS_RESIDUAL": summed}
            | {"HAS_BIAS": centered, "EARLY": sm >= 90, "USE_ASM": True, **absent},
            config,
        )


def token_attention(sm: int) -> Iterator[Variant]:
    """Heads of 128 and 64 elements, and of a number that is no power of two."""
    tensors = ("query_ptr", "key_ptr", "value_ptr", "keys_ptr", "values_ptr", "bias_ptr", "out_ptr")
    sizes = {"L": "i32:16"} | dict.fromkeys(("stride_row", "stride_head", "bias_row", "bias_head"), "i32")
    for dtype, size in product(DTYPES, (128, 64, 20)):
        config = token_attention_config(size, 4 if dtype == "fp32" else 2)
        yield Variant(
            f"token_attention {dtype} heads of {size}",
            _token_attention_kernel,
            dict.fromkeys(tensors, f"*{dtype}") | {"length_ptr": "*i64", **sizes},
            {"D": size, "BLOCK_D": 1 << (size - 1).bit_length(), "KEYS": config.rows, "EARLY": sm >= 90},
            config,
        )


def _tile(op: str, blocksize: int) -> tuple[dict[str, int], LaunchConfig]:
    config = elementwise_config(op, blocksize)
    return {"QUANT_BLOCK": blocksize, "ROWS": config.rows}, config


def quantize_4bit(blocksize: int, dtype: str, length: str, tag: str) -> Iterator[Variant]:
    tile, config = _tile("quantize_4bit", blocksize)
    pointers = {"x_ptr": f"*{dtype}", "packed_ptr": "*u8", "absmax_ptr": "*fp32", "table_ptr": "*i32"}
    for nf4 in (True, False):
        for propagate in (False, True):
            yield Variant(
                f"quantize_4bit {'nf4' if nf4 else 'fp4'} {'propagating NaN ' if propagate else ''}{tag}",
                _quantize_4bit_kernel,
                {**pointers, "n": length, "n_bytes": length},
                {"NF4": nf4, "PROPAGATE_NAN": propagate, **tile, "USE_ASM": True},
                config,
            )


def dequantize_4bit(blocksize: int, dtype: str, length: str, tag: str) -> Iterator[Variant]:
    tile, config = _tile("dequantize_4bit", blocksize)
    pointers = {"packed_ptr": "*u8", "absmax_ptr": "*fp32", "code_ptr": "*fp32", "out_ptr": f"*{dtype}"}
    for nested in (False, True):
        given, absent = optional((NESTED_SCALES, nested))
        yield Variant(
            f"dequantize_4bit {'nested ' if nested else ''}{tag}",
            _dequantize_4bit_kernel,
            {**pointers, **given, "n": length, "n_bytes": length},
            {"NESTED": nested, "NESTED_BLOCK": NESTED_BLOCKSIZE, **tile, "USE_ASM": True, **absent},
            config,
        )


def blockwise(blocksize: int, dtype: str, length: str, tag: str) -> Iterator[Variant]:
    tile, config = _tile("quantize_blockwise", blocksize)
    pointers = {"x_ptr": f"*{dtype}", "code_ptr": "*fp32", "out_ptr": "*u8", "absmax_ptr": "*fp32"}
    known = {"n_sums": 1, "divisor": 1}  # of no mean, or of one that is given: Triton folds a 1 into the code
    yield Variant(
        f"quantize_blockwise {tag}",
        _quantize_blockwise_kernel,
        {**pointers, "n": length},
        {"SUMS": 0, **tile, "USE_ASM": True, "sums_ptr": None, "mean_ptr": None, **known},
        config,
    )
    # Only scales have their mean subtracted, and they are float32.
    for sums in (1, *CAPACITIES) if dtype == "fp32" else ():
        numbers = {"n_sums": "i32", "divisor": "i32"} if sums > 1 else {}
        yield Variant(
            f"quantize_blockwise less the mean of {sums} sums {tag}",
            _quantize_blockwise_kernel,
            {**pointers, "sums_ptr": "*fp32", "mean_ptr": "*fp32", "n": length, **numbers},
            {"SUMS": max(sums, CAPACITIES[0]), **tile, "USE_ASM": True} | ({} if numbers else known),
            config,
        )
    tile, config = _tile("dequantize_blockwise", blocksize)
    yield Variant(
        f"dequantize_blockwise {tag}",
        _dequantize_blockwise_kernel,
        {"x_ptr": "*u8", "absmax_ptr": "*fp32", "code_ptr": "*fp32", "out_ptr": f"*{dtype}", "n": length},
        tile,
        config,
    )
