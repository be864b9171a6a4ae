"""Every specialization of every kernel that the operators can launch, for compiling them without a GPU.

The fused products are compiled for each K, and stand here with the sizes of Bloom-7B1 and Llama-2-7B and an odd one.

Room: enumeration for `aot.py` and the tests; nothing here is imported on the user's path.  Lengths divisible by 16 and
others are told apart, and at one block size lengths of 2^31 and more.  The length 1 is left out: Triton folds it into
the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from .dropout import threshold_and_scale
from .format import BLOCKSIZES, NESTED_BLOCKSIZE
from .kernels._arrange import ARRANGE_CONFIG, arrange_constants, arrange_kernel
from .kernels._pairs import ALPHA, pair_codes
from .kernels._sum_parts import SUM_CONFIG, sum_constants, sum_parts_kernel
from .kernels.blockwise import _dequantize_blockwise_kernel, _quantize_blockwise_kernel
from .kernels.dequantize import _dequantize_4bit_kernel
from .kernels.dropout import _dropout_kernel
from .kernels.lora import _lora_down_kernel, _lora_sum_kernel, _lora_up_kernel
from .kernels.lora_grads import _lora_grads_kernel
from .kernels.matmul_skinny import _matmul_skinny_kernel, ragged_constants, skinny_constants
from .kernels.matmul_skinny_dx import _matmul_skinny_dx_kernel, float_codes, skinny_dx_constants
from .kernels.matmul_wgmma import X_LAYOUT, _matmul_wgmma_kernel, wgmma_constants
from .kernels.mean import CAPACITIES, SLOTS, _partial_sums_kernel
from .kernels.norm import _norm_kernel
from .kernels.quantize import _quantize_4bit_kernel
from .kernels.token_attention import _token_attention_kernel
from .tuning import (
    DROPOUT_CONFIG,
    LaunchConfig,
    elementwise_config,
    norm_config,
    partial_sums_config,
    token_attention_config,
)
from .tuning.lora import DownConfig, TileConfig, down_config, grads_config, inner_parts, up_config
from .tuning.skinny import SkinnyConfig, skinny_config
from .tuning.skinny_dx import SkinnyDxConfig, skinny_dx_config
from .tuning.wgmma import WgmmaConfig, tiling

_NO_DROPOUT = {"DROPOUT": False, "THRESHOLD": 0, "KEPT_SCALE": 1.0}
_DTYPES = ("fp32", "fp16", "bf16")
_TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_NESTED_SCALES = {"absmax_8bit_ptr": "*u8", "absmax_code_ptr": "*fp32", "absmax_offset_ptr": "*fp32"}
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
    config: LaunchConfig | SkinnyConfig | SkinnyDxConfig | WgmmaConfig | DownConfig | TileConfig


def variants(arch: str = "sm_75") -> Iterator[Variant]:
    """All of them, as they are launched on that architecture."""
    yield from _matmul_skinny(int(arch.removeprefix("sm_")))
    yield from _matmul_skinny_dx(int(arch.removeprefix("sm_")))
    if arch == "sm_90":
        yield from _matmul_wgmma()
    if arch != "sm_75":  # `tl.dot` has no tensor cores there
        yield from _lora()
    yield from _dropout()
    yield from _token_attention(int(arch.removeprefix("sm_")))
    yield from _norm(int(arch.removeprefix("sm_")))
    yield from _partial_sums()
    for blocksize in BLOCKSIZES:
        for dtype in _DTYPES:
            for length, words in _LENGTHS.items():
                if length != "i64:16" or blocksize == 64:
                    tag = f"{dtype} blocksize={blocksize} {words}"
                    yield from _quantize_4bit(blocksize, dtype, length, tag)
                    yield from _dequantize_4bit(blocksize, dtype, length, tag)
                    yield from _blockwise(blocksize, dtype, length, tag)


def _optional(*pointers: tuple[dict[str, str], bool]) -> tuple[dict[str, str], dict[str, None]]:
    """Groups of pointers, each given or not: the types of those that are, and None for the others."""
    given = {name: kind for group, is_given in pointers if is_given for name, kind in group.items()}
    return given, {name: None for group, is_given in pointers if not is_given for name in group}


def _partial_sums() -> Iterator[Variant]:
    for ctas in (1, SLOTS):
        config = partial_sums_config(ctas)
        yield Variant(
            f"partial_sums {'of slots' if ctas == 1 else 'of CTAs'}",
            _partial_sums_kernel,
            {"x_ptr": "*fp32", "sums_ptr": "*fp32", "n": "i32", "ctas": "i32", "rounds": "i32"},
            {"SLOTS": config.rows, "WHOLE": ctas > 1},
            config,
        )


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


def _norm(sm: int) -> Iterator[Variant]:
    """Both kinds, alone and after a sum; 4,096 elements and an odd number of them."""
    for dtype, size, centered, summed in product(_DTYPES, (4096, 333), (True, False), (False, True)):
        config, pointer = norm_config(size), f"*{dtype}"
        given, absent = _optional(
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


def _token_attention(sm: int) -> Iterator[Variant]:
    """Heads of 128 and 64 elements, and of a number that is no power of two."""
    tensors = ("query_ptr", "key_ptr", "value_ptr", "keys_ptr", "values_ptr", "bias_ptr", "out_ptr")
    sizes = {"L": "i32:16"} | dict.fromkeys(("stride_row", "stride_head", "bias_row", "bias_head"), "i32")
    for dtype, size in product(_DTYPES, (128, 64, 20)):
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
    for nested in (False, True):
        given, absent = _optional((_NESTED_SCALES, nested))
        yield Variant(
            f"dequantize_4bit {'nested ' if nested else ''}{tag}",
            _dequantize_4bit_kernel,
            {**pointers, **given, "n": length, "n_bytes": length},
            {"NESTED": nested, "NESTED_BLOCK": NESTED_BLOCKSIZE, **tile, "USE_ASM": True, **absent},
            config,
        )


def _blockwise(blocksize: int, dtype: str, length: str, tag: str) -> Iterator[Variant]:
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


def _lora() -> Iterator[Variant]:
    """Few and many rows (u in parts and in one), float32 and 16-bit factors, with dropout and without."""
    threshold, kept_scale = threshold_and_scale(0.05)
    for M, dtype, factors, rank in (
        (128, "fp16", "fp32", 16),
        (128, "bf16", "fp32", 64),
        (2048, "bf16", "bf16", 64),
        (2048, "fp16", "fp32", 16),
    ):
        parts = inner_parts(M, 4096, rank)
        inner = "*fp32" if parts > 1 else f"*{dtype}"
        for dropout in (False, True):
            tag = f"M={M} {dtype} factors {factors} rank={rank}{' dropout' if dropout else ''}"
            seed, no_seed = _optional(({"seed_ptr": "*i64"}, dropout))
            mask: dict[str, Any] = no_seed | (
                {"DROPOUT": True, "THRESHOLD": threshold, "KEPT_SCALE": kept_scale} if dropout else _NO_DROPOUT
            )
            sizes = dict.fromkeys(("M", "C", "r"), "i32:16")
            for tall in (False, True):
                w = {"w_ptr": f"*{factors}", **seed}
                factor = {"TALL": tall, "RANK": rank, **mask}
                bias, no_bias = _optional(({"bias_ptr": f"*{dtype}"}, tall))
                down, up = down_config(M, 4096, rank, dropout), up_config(M)
                yield Variant(
                    f"lora_down {'B' if tall else 'A'} {tag}",
                    _lora_down_kernel,
                    {"x_ptr": f"*{dtype}", **w, "out_ptr": "*fp32", **sizes, "part_steps": "i32"},
                    {"SCALING": 2.0, "ROWS": down.rows, "COLUMNS": down.columns, **factor},
                    down,
                )
                yield Variant(
                    f"lora_up {'B' if tall else 'A'} {tag}",
                    _lora_up_kernel,
                    {"inner_ptr": inner, **w, **bias, "out_ptr": f"*{dtype}", **sizes},
                    {"PARTS": parts, "ROWS": up.rows, "COLUMNS": up.columns, **factor}
                    | {"HAS_BIAS": tall, "ACCUMULATE": M == 128, **no_bias},
                    up,
                )
            grads = grads_config(M, dropout)
            pointers = {"dy_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "u_ptr": inner, "v_ptr": inner, **seed}
            yield Variant(
                f"lora_grads {tag}",
                _lora_grads_kernel,
                pointers
                | {"grad_A_ptr": f"*{factors}", "grad_B_ptr": f"*{factors}"}
                | dict.fromkeys(("M", "N", "K", "r"), "i32:16")
                | {"tiles_B": "i32"},
                {
                    "RANK": rank,
                    "PARTS_U": parts,
                    "PARTS_V": parts,
                    "ROWS": grads.rows,
                    "COLUMNS": grads.columns,
                    **mask,
                },
                grads,
            )
    config = down_config(2048, 4096, 16, False)
    yield Variant(
        "lora_sum",
        _lora_sum_kernel,
        {"parts_ptr": "*fp32", "out_ptr": "*fp16", "M": "i32:16"},
        {"RANK": 16, "PARTS": config.parts, "ROWS": 64},
        config,
    )


# (N, K): query_key_value and dense_4h_to_h of Bloom-7B1, down_proj of Llama-2-7B, and a K that ends in half a chunk.
_SKINNY_SHAPES = ((12288, 4096), (4096, 16384), (4096, 11008), (1000, 4160))
# (N, K, blocksize) of rows that are not whole blocks: of SigLIP and of Qwen2.5-VL, one that begins in the middle of a
# byte and whose bytes are no multiple of 16, and Bloom-7B1's in blocks of 32.
_RAGGED_SHAPES = ((1152, 4304, 64), (1280, 3420, 64), (1001, 1037, 64), (4096, 4096, 32))


def _matmul_skinny(sm: int) -> Iterator[Variant]:
    for M in (1, 8, 16, 32):
        for N, K in _SKINNY_SHAPES:
            for dtype in ("fp16", "bf16") if sm >= 80 else ("fp16",):
                for nested in (False, True) if K == 4096 else (True,):
                    yield skinny_variant(M, N, K, sm, dtype, "nf4", 64, nested, has_bias=nested)
    yield skinny_variant(3, 12288, 4096, sm, "fp16", "fp4", 256, True, has_bias=False)
    for M in (1, 8, 16, 32):
        for N, K, blocksize in _RAGGED_SHAPES:
            yield skinny_variant(M, N, K, sm, "fp16", "nf4", blocksize, True, has_bias=True)
    for N, K, blocksize in _RAGGED_SHAPES:
        config = skinny_config(16, N, K, sm, blocksize)
        if config is not None and config.arranged:
            yield arrange_variant(K, blocksize, "fp16", config)
    for N, K in _SKINNY_SHAPES:
        config = skinny_config(32, N, K, sm)
        if config is not None and config.parts > 1:
            yield sum_variant(config)
    if sm >= 80:
        yield skinny_variant(16, 1152, 4304, sm, "bf16", "nf4", 64, False, has_bias=False)


def skinny_variant(
    M: int,
    N: int,
    K: int,
    sm: int,
    dtype: str,
    quant_type: str,
    blocksize: int,
    nested: bool,
    has_bias: bool,
    config: SkinnyConfig | None = None,
) -> Variant:
    """The one that `matmul_skinny_triton` would launch, of the table's configuration or of another."""
    config = config or skinny_config(M, N, K, sm, blocksize)
    assert config is not None
    torch_dtype = _TORCH_DTYPES[dtype]
    phases, tail = ragged_constants(N, K, blocksize)
    out = f"*{dtype}" if config.parts == 1 else "*fp32"
    pointers = {"x_ptr": f"*{dtype}", "packed_ptr": "*u8", "absmax_ptr": "*fp32", "out_ptr": out}
    given, absent = _optional((_NESTED_SCALES, nested), ({"bias_ptr": f"*{dtype}"}, has_bias))
    constants = {
        "K": K,
        "CODES": pair_codes(quant_type, torch_dtype),
        "ALPHA": ALPHA[quant_type, torch_dtype],
        "NESTED": nested,
        "NESTED_BLOCK": NESTED_BLOCKSIZE,
        "QUANT_BLOCK": blocksize,
        "HAS_BIAS": has_bias,
        **skinny_constants(config, torch_dtype),
        "PHASES": phases,
        "TAIL": tail,
    }
    return Variant(
        f"matmul_skinny M={M} N={N} K={K} {dtype} {quant_type} blocksize={blocksize}"
        f"{' nested' if nested else ''}{' bias' if has_bias else ''}",
        _matmul_skinny_kernel,
        {**pointers, **given, "M": "i32", "N": "i32"},
        constants | absent,
        config,
    )


def arrange_variant(K: int, blocksize: int, dtype: str, config: SkinnyConfig) -> Variant:
    """Of the kernel that arranges x for a product with this configuration."""
    signature = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "M": "i32"}
    return Variant(
        f"arrange K={K} blocksize={blocksize} {dtype}",
        arrange_kernel,
        signature,
        arrange_constants(K, blocksize, config),
        ARRANGE_CONFIG,
    )


# (N, K) as above, one that is not split, and an N that is no multiple of eight.
_SKINNY_DX_SHAPES = ((12288, 4096), (4096, 16384), (11008, 4096), (333, 64), (1001, 4160))
# (N, K, blocksize) of rows that are not whole blocks of 64: of vision towers, blocks of 32, and rows that begin within
# a byte.
_RAGGED_DX_SHAPES = ((1152, 4304, 64), (1280, 3420, 64), (4096, 4096, 32), (333, 1001, 128))


def _matmul_skinny_dx(sm: int) -> Iterator[Variant]:
    for M in (1, 16, 32, 64):
        for N, K in _SKINNY_DX_SHAPES:
            for dtype in ("fp16", "bf16") if sm >= 80 and K == 4096 else ("fp16",):
                yield skinny_dx_variant(M, N, K, sm, dtype, "nf4", 64, nested=K != 64)
        for N, K, blocksize in _RAGGED_DX_SHAPES:
            yield skinny_dx_variant(M, N, K, sm, "bf16" if sm >= 80 else "fp16", "nf4", blocksize, nested=K % 2 == 0)
    yield skinny_dx_variant(3, 12288, 4096, sm, "fp16", "fp4", 256, nested=True)
    config = skinny_dx_config(1, 12288, 4096, sm)
    assert config is not None
    if config.parts > 1:
        yield sum_variant(config)


def skinny_dx_variant(
    M: int,
    N: int,
    K: int,
    sm: int,
    dtype: str,
    quant_type: str,
    blocksize: int,
    nested: bool,
    config: SkinnyDxConfig | None = None,
) -> Variant:
    """The one that `matmul_skinny_dx_triton` would launch, by the table's configuration or by this one."""
    config = config or skinny_dx_config(M, N, K, sm, blocksize)
    assert config is not None
    constants = skinny_dx_constants(config, _TORCH_DTYPES[dtype])
    out = "*fp32" if constants["SPLIT"] else f"*{dtype}"
    pointers = {"dy_ptr": f"*{dtype}", "packed_ptr": "*u8", "absmax_ptr": "*fp32", "out_ptr": out}
    given, absent = _optional((_NESTED_SCALES, nested))
    return Variant(
        f"matmul_skinny_dx M={M} N={N} K={K} {dtype} {quant_type} blocksize={blocksize}{' nested' if nested else ''}",
        _matmul_skinny_dx_kernel,
        {**pointers, **given, "M": "i32", "N": "i32", "part_steps": "i32"},
        {
            "K": K,
            "CODES": float_codes(quant_type),
            "NESTED": nested,
            "NESTED_BLOCK": NESTED_BLOCKSIZE,
            "QUANT_BLOCK": blocksize,
            "ALIGNED": N % 8 == 0,
            **constants,
            **absent,
        },
        config,
    )


def sum_variant(config: SkinnyConfig | SkinnyDxConfig) -> Variant:
    """Of the kernel that adds the parts of a product with this configuration."""
    signature = {"parts_ptr": "*fp32", "out_ptr": "*fp16"} | dict.fromkeys(("M", "R", "columns_of_tiles"), "i32")
    name = f"sum_parts fp16 {config.parts} of {config.rows} x {config.columns}"
    return Variant(name, sum_parts_kernel, signature, sum_constants(config), SUM_CONFIG)


def _matmul_wgmma() -> Iterator[Variant]:
    for columns in (64, 128, 256):
        for backward in (False, True):
            for split in (False, True):
                yield wgmma_variant(columns, "fp16", split, backward)
            yield wgmma_variant(columns, "bf16", False, backward, nested=False, has_bias=not backward, n="i32")
            yield wgmma_variant(columns, "fp16", True, backward, rank=16)
            yield wgmma_variant(columns, "bf16", False, backward, rank=64)
            for dtype, split in (("fp16", True), ("bf16", False)):
                yield wgmma_variant(columns, dtype, split, backward, has_bias=not (backward or split), blocksize=32)
    yield wgmma_variant(256, "fp16", True, False, quant_type="fp4")


def wgmma_variant(
    columns: int,
    dtype: str,
    split: bool,
    backward: bool,
    *,
    nested: bool = True,
    has_bias: bool = False,
    n: str = "i32:16",
    rank: int = 0,
    quant_type: str = "nf4",
    blocksize: int = 64,
) -> Variant:
    """The one that `matmul_wgmma_triton` would launch; `n` is the type of N, divisible by 16 or not."""
    config = tiling(columns, 4096, 4096, columns, 33 if split else 32)
    pointers = {"packed_ptr": "*u8", "absmax_ptr": "*fp32", "table_ptr": "*fp32", "out_ptr": f"*{dtype}"}
    bias, parts = {"bias_ptr": f"*{dtype}"}, {"parts_ptr": "*fp32", "flags_ptr": "*i32"}
    adapter = {"w_ptr": "*fp32", "inner_ptr": "*fp32"}
    sizes = dict.fromkeys(("M", "all_turns", "tile_turns", "across", "r"), "i32") | {"N": n, "K": "i32:16"}
    given, absent = _optional((_NESTED_SCALES, nested), (bias, has_bias), (parts, split), (adapter, rank > 0))
    return Variant(
        f"matmul_wgmma {'dx ' if backward else ''}columns={columns} {dtype}{' nested' if nested else ''}"
        f"{' bias' if has_bias else ''}{' split' if split else ''}{f' adapter {rank}' if rank else ''}"
        f"{'' if quant_type == 'nf4' else ' fp4'}{'' if blocksize == 64 else f' blocks of {blocksize}'}",
        _matmul_wgmma_kernel,
        {"x_desc": f"tensordesc<{dtype}[{columns}, 64],{X_LAYOUT!r}>", **pointers, **given, **sizes},
        wgmma_constants(config, blocksize, quant_type, nested, has_bias, backward, (8 if rank else 0, rank)) | absent,
        config,
    )
