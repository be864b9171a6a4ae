"""The kernels that quantize, decode and drop, as a T4 would run them: their compiled code on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import skinny
import torch
from edges import blocks_at_midpoints, blocks_at_thresholds
from exact import assert_bits_equal
from ptx_cpu import CpuKernel

import qkernels
from qkernels.dropout import dropout_reference, threshold_and_scale
from qkernels.format import block_count, code_table, dynamic_map, packed_length
from qkernels.kernels._encode import bucket_table
from qkernels.reference import (
    decode_absmax_reference,
    dequantize_4bit_reference,
    dequantize_blockwise_reference,
    quantize_4bit_reference,
    quantize_blockwise_reference,
)
from qkernels.variants import Variant, variants

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# Whole programs; and a tail of whole blocks, and one within a block, behind one.
LENGTHS = {"n%16==0": (8192, 4096 + 288), "n%16!=0": (77, 4096 + 333)}


def cases(kernel: str, blocksizes: tuple[int, ...], **constants: object) -> list:
    """The variants of a kernel in the dtypes of a T4, with these constants."""
    return [
        pytest.param(variant, id=variant.name.removeprefix(kernel).strip())
        for variant in variants("sm_75")
        if variant.name.startswith(f"{kernel} ")
        and variant.constants["QUANT_BLOCK"] in blocksizes
        and any(f" {dtype} " in variant.name for dtype in DTYPES)
        and any(length in variant.name for length in LENGTHS)
        and constants.items() <= variant.constants.items()
    ]


def of(variant: Variant) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype of what is not quantized, and lengths that the variant is for."""
    dtype = next(torch_dtype for name, torch_dtype in DTYPES.items() if f" {name} " in variant.name)
    return dtype, next(lengths for name, lengths in LENGTHS.items() if name in variant.name)


def values(n: int, dtype: torch.dtype, edges: torch.Tensor | None = None) -> torch.Tensor:
    """Numbers at the edges between codes, as many as there is room for, then zeros that cover whole blocks, and normal
    values behind."""
    x = torch.randn(n)
    if edges is not None:
        x[: len(edges)] = edges[:n]
    x[n // 2 : n // 2 + 300] = 0
    return x.to(dtype)


def filled(length: int, dtype: torch.dtype) -> torch.Tensor:
    """An output whose every byte is wrong until it is written."""
    return torch.full((length * dtype.itemsize,), 0xAB, dtype=torch.uint8).view(dtype)


def run(variant: Variant, n: int, arguments: dict[str, object]) -> None:
    constants = variant.constants
    elements = constants["BLOCK"] if "BLOCK" in constants else constants["QUANT_BLOCK"] * constants["ROWS"]
    CpuKernel(variant, "sm_75")((-(-n // elements), 1, 1), {"n": n, "n_bytes": packed_length(n), **arguments})


@pytest.mark.parametrize("variant", cases("quantize_4bit", (32, 64, 4096)))
def test_quantize_4bit(variant):
    dtype, lengths = of(variant)
    blocksize, propagate = variant.constants["QUANT_BLOCK"], variant.constants["PROPAGATE_NAN"]
    quant_type = "nf4" if variant.constants["NF4"] else "fp4"
    for n in lengths:
        x = values(n, dtype, blocks_at_thresholds(quant_type, blocksize, dtype))
        if propagate:  # a T4 has no instruction for a maximum that does
            x[-1] = torch.nan
        packed, absmax = filled(packed_length(n), torch.uint8), filled(block_count(n, blocksize), torch.float32)
        table = bucket_table(quant_type, CPU)
        run(variant, n, {"x_ptr": x, "packed_ptr": packed, "absmax_ptr": absmax, "table_ptr": table})
        expected, scales = quantize_4bit_reference(x, blocksize, quant_type, torch.uint8, propagate)
        assert_bits_equal(absmax.nan_to_num(-1.0), scales.nan_to_num(-1.0))
        assert_bits_equal(packed, expected.view(-1))


@pytest.mark.parametrize("quant_type", qkernels.QUANT_TYPES)
@pytest.mark.parametrize("variant", cases("dequantize_4bit", (32, 64, 4096)))
def test_dequantize_4bit(variant, quant_type):
    dtype, lengths = of(variant)
    blocksize, nested = variant.constants["QUANT_BLOCK"], variant.constants["NESTED"]
    for n in lengths:
        options = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": nested}
        packed, state = qkernels.quantize_4bit(values(n, dtype), **options)
        out, absmax = filled(n, dtype), state.absmax
        if nested:
            absmax = decode_absmax_reference(state.absmax, state.state2.absmax, state.state2.code, state.offset)
        arguments = {"packed_ptr": packed, "code_ptr": code_table(quant_type, CPU), "out_ptr": out}
        run(variant, n, arguments | skinny.scale_arguments(state))
        assert_bits_equal(out, dequantize_4bit_reference(packed, absmax, blocksize, quant_type, (n,), dtype))


@pytest.mark.parametrize("variant", cases("quantize_blockwise", (64, 256), SUMS=0))
def test_quantize_blockwise(variant):
    dtype, lengths = of(variant)
    blocksize, code = variant.constants["QUANT_BLOCK"], dynamic_map(CPU)
    for n in lengths:
        x = values(n, dtype, blocks_at_midpoints(code, blocksize, 0.0))
        index, absmax = filled(n, torch.uint8), filled(block_count(n, blocksize), torch.float32)
        run(variant, n, {"x_ptr": x, "code_ptr": code, "out_ptr": index, "absmax_ptr": absmax})
        expected, scales = quantize_blockwise_reference(x, code, blocksize)
        assert_bits_equal(absmax, scales)
        assert_bits_equal(index, expected)


@pytest.mark.parametrize("variant", cases("dequantize_blockwise", (64, 256)))
def test_dequantize_blockwise(variant):
    dtype, lengths = of(variant)
    blocksize, code = variant.constants["QUANT_BLOCK"], dynamic_map(CPU)
    for n in lengths:
        index, state = qkernels.quantize_blockwise(values(n, dtype), blocksize=blocksize)
        out = filled(n, dtype)
        run(variant, n, {"x_ptr": index, "absmax_ptr": state.absmax, "code_ptr": code, "out_ptr": out})
        assert_bits_equal(out, dequantize_blockwise_reference(index, state.absmax, code, blocksize, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(dtype):
    seed = torch.randint(2**63 - 1, (1,))
    for length, lengths in LENGTHS.items():
        variant = next(variant for variant in variants("sm_75") if variant.name == f"dropout {dtype} {length}")
        for n in lengths:
            x = values(n, DTYPES[dtype])
            out = filled(n, x.dtype)
            run(variant, n, {"x_ptr": x, "seed_ptr": seed, "out_ptr": out})
            assert_bits_equal(out, dropout_reference(x, seed, *threshold_and_scale(0.05)))
