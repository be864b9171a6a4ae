"""Specializations of the products with a 4-bit weight, and of the kernels launched beside them.

The fused products are compiled for each K, and stand here with the sizes of Bloom-7B1 and Llama-2-7B and an odd one.

Room: of the enumeration.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..format import NESTED_BLOCKSIZE
from ..kernels._arrange import ARRANGE_CONFIG, arrange_constants, arrange_kernel
from ..kernels._pairs import ALPHA, pair_codes
from ..kernels._sum_parts import SUM_CONFIG, sum_constants, sum_parts_kernel
from ..kernels.matmul_skinny import _matmul_skinny_kernel, ragged_constants, skinny_constants
from ..kernels.matmul_skinny_dx import _matmul_skinny_dx_kernel, float_codes, skinny_dx_constants
from ..kernels.matmul_wgmma import X_LAYOUT, _matmul_wgmma_kernel, wgmma_constants
from ..tuning.skinny import SkinnyConfig, skinny_config
from ..tuning.skinny_dx import SkinnyDxConfig, skinny_dx_config
from ..tuning.wgmma import tiling
from .variant import NESTED_SCALES, TORCH_DTYPES, Variant, optional

# (N, K): query_key_value and dense_4h_to_h of Bloom-7B1, down_proj of Llama-2-7B, and a K that ends in half a chunk.
_SKINNY_SHAPES = ((12288, 4096), (4096, 16384), (4096, 11008), (1000, 4160))
# (N, K, blocksize) of rows that are not whole blocks: of SigLIP and of Qwen2.5-VL, one that begins in the middle of a
# byte and whose bytes are no multiple of 16, and Bloom-7B1's in blocks of 32.
_RAGGED_SHAPES = ((1152, 4304, 64), (1280, 3420, 64), (1001, 1037, 64), (4096, 4096, 32))


def matmul_skinny(sm: int) -> Iterator[Variant]:
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
    torch_dtype = TORCH_DTYPES[dtype]
    phases, tail = ragged_constants(N, K, blocksize)
    out = f"*{dtype}" if config.parts == 1 else "*fp32"
    pointers = {"x_ptr": f"*{dtype}", "packed_ptr": "*u8", "absmax_ptr": "*fp32", "out_ptr": out}
    given, absent = optional((NESTED_SCALES, nested), ({"bias_ptr": f"*{dtype}"}, has_bias))
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


def matmul_skinny_dx(sm: int) -> Iterator[Variant]:
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
    constants = skinny_dx_constants(config, TORCH_DTYPES[dtype])
    out = "*fp32" if constants["SPLIT"] else f"*{dtype}"
    pointers = {"dy_ptr": f"*{dtype}", "packed_ptr": "*u8", "absmax_ptr": "*fp32", "out_ptr": out}
    given, absent = optional((NESTED_SCALES, nested))
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


def matmul_wgmma() -> Iterator[Variant]:
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
    given, absent = optional((NESTED_SCALES, nested), (bias, has_bias), (parts, split), (adapter, rank > 0))
    return Variant(
        f"matmul_wgmma {'dx ' if backward else ''}columns={columns} {dtype}{' nested' if nested else ''}"
        f"{' bias' if has_bias else ''}{' split' if split else ''}{f' adapter {rank}' if rank else ''}"
        f"{'' if quant_type == 'nf4' else ' fp4'}{'' if blocksize == 64 else f' blocks of {blocksize}'}",
        _matmul_wgmma_kernel,
        {"x_desc": f"tensordesc<{dtype}[{columns}, 64],{X_LAYOUT!r}>", **pointers, **given, **sizes},
        wgmma_constants(config, blocksize, quant_type, nested, has_bias, backward, (8 if rank else 0, rank)) | absent,
        config,
    )
