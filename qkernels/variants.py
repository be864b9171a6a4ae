"""Every specialization of every kernel that the operators can launch, for compiling them without a GPU.

Room: enumeration for `aot.py` and the tests; nothing here is imported on the user's path.  Lengths divisible by 16 and
others are told apart, and at one block size lengths of 2^31 and more.  The length 1 is left out: Triton folds it into
the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .dropout import threshold_and_scale
from .format import BLOCKSIZES, NESTED_BLOCKSIZE
from .kernels.blockwise import _dequantize_blockwise_kernel, _quantize_blockwise_kernel
from .kernels.dequantize import _dequantize_4bit_kernel
from .kernels.dropout import _dropout_kernel
from .kernels.quantize import _quantize_4bit_kernel
from .tuning import DROPOUT_CONFIG, LaunchConfig, elementwise_config

_DTYPES = ("fp32", "fp16", "bf16")
_LENGTHS = {"i32:16": "n%16==0", "i32": "n%16!=0", "i64:16": "n>=2**31"}


@dataclass(frozen=True)
class Variant:
    """One specialization of a kernel.

    Attributes:
        name: kernel and what distinguishes the variant.
        kernel: the jit function.
        signature: Triton type of each run-time argument; an argument left out is None.
        constants: the compile-time arguments.
        config: the launch configuration.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    config: LaunchConfig


def variants() -> Iterator[Variant]:
    """All of them."""
    yield from _dropout()
    for blocksize in BLOCKSIZES:
        for dtype in _DTYPES:
            for length, words in _LENGTHS.items():
                if length != "i64:16" or blocksize == 64:
                    tag = f"{dtype} blocksize={blocksize} {words}"
                    yield from _quantize_4bit(blocksize, dtype, length, tag)
                    yield from _dequantize_4bit(blocksize, dtype, length, tag)
                    yield from _blockwise(blocksize, dtype, length, tag)


def _dropout() -> Iterator[Variant]:
    threshold, scale = threshold_and_scale(0.05)
    for dtype in _DTYPES:
        for length, words in _LENGTHS.items():
            yield Variant(
                f"dropout {dtype} {words}",
                _dropout_kernel,
                {"x_ptr": f"*{dtype}", "seed_ptr": "*i64", "out_ptr": f"*{dtype}", "n": length},
                {"THRESHOLD": threshold, "SCALE": scale, "BLOCK": DROPOUT_CONFIG.rows},
                DROPOUT_CONFIG,
            )


def _tile(op: str, blocksize: int) -> tuple[dict[str, int], LaunchConfig]:
    config = elementwise_config(op, blocksize)
    return {"QUANT_BLOCK": blocksize, "ROWS": config.rows}, config


def _quantize_4bit(blocksize: int, dtype: str, length: str, tag: str) -> Iterator[Variant]:
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


def _dequantize_4bit(blocksize: int, dtype: str, length: str, tag: str) -> Iterator[Variant]:
    tile, config = _tile("dequantize_4bit", blocksize)
    pointers = {"packed_ptr": "*u8", "absmax_ptr": "*fp32", "code_ptr": "*fp32", "out_ptr": f"*{dtype}"}
    scales = {"absmax_8bit_ptr": "*u8", "absmax_code_ptr": "*fp32", "absmax_offset_ptr": "*fp32"}
    for nested in (False, True):
        yield Variant(
            f"dequantize_4bit {'nested ' if nested else ''}{tag}",
            _dequantize_4bit_kernel,
            {**pointers, "n": length, "n_bytes": length} | (scales if nested else {}),
            {"NESTED": nested, "NESTED_BLOCK": NESTED_BLOCKSIZE, **tile} | ({} if nested else dict.fromkeys(scales)),
            config,
        )


def _blockwise(blocksize: int, dtype: str, length: str, tag: str) -> Iterator[Variant]:
    tile, config = _tile("quantize_blockwise", blocksize)
    pointers = {"x_ptr": f"*{dtype}", "code_ptr": "*fp32", "out_ptr": "*u8", "absmax_ptr": "*fp32"}
    # Only scales have a mean subtracted, and they are float32.
    for subtract in (False, True) if dtype == "fp32" else (False,):
        offset = {"offset_ptr": "*fp32"}
        yield Variant(
            f"quantize_blockwise {'less offset ' if subtract else ''}{tag}",
            _quantize_blockwise_kernel,
            {**pointers, "n": length} | (offset if subtract else {}),
            {"SUBTRACT": subtract, **tile, "USE_ASM": True} | ({} if subtract else dict.fromkeys(offset)),
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
