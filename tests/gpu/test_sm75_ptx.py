"""The code that a T4 would run, run on the GPU at hand: PTX for sm_75, exact to the last bit.

It is held against the reference, which is given the GPU's own reciprocal, and against the native build; the fused
product against float64.
"""

from __future__ import annotations

import pytest
import skinny
import torch
import triton
from edges import blocks_at_midpoints, blocks_at_thresholds
from exact import assert_bits_equal, gpu_reciprocal
from ptx import PtxKernel

import qkernels
from qkernels.dropout import dropout_reference, threshold_and_scale
from qkernels.format import block_count, code_table, dynamic_map, packed_length
from qkernels.kernels._encode import bucket_table
from qkernels.kernels.mean import SLOTS, order_of, partial_sums_triton
from qkernels.reference import (
    decode_absmax_reference,
    dequantize_4bit_reference,
    dequantize_blockwise_reference,
    quantize_4bit_reference,
    quantize_blockwise_reference,
)
from qkernels.tuning.skinny import programs
from qkernels.variants import Variant, variants

pytestmark = pytest.mark.gpu

BLOCKSIZES = (32, 64, 256, 4096)  # 256 is that of the scales
DTYPES = {"*fp32": torch.float32, "*fp16": torch.float16}  # what a T4 computes in
# Less than a block, whole programs, a tail of whole blocks, a tail within a block.  The first row is for the variants
# that are told that the numbers of elements and of packed bytes are divisible by 16.
ALIGNED = (32, 4096, 65536 + 288, 1_000_032)
OTHERS = (2, 77, 4095, 4097, 65536 + 333, 1_000_003)


def dtype_of(variant: Variant) -> torch.dtype | None:
    """Of the decoded side; None for one that is not tried here."""
    kinds = [variant.signature[name] for name in ("x_ptr", "out_ptr") if name in variant.signature]
    return next((DTYPES[kind] for kind in kinds if kind in DTYPES), None)


def cases(kernel: str) -> list:
    """The variants of one kernel, of the block sizes and dtypes above."""
    return [
        pytest.param(variant, id=variant.name.removeprefix(kernel).strip())
        for variant in variants()
        if variant.name.startswith(f"{kernel} ")
        and variant.constants["QUANT_BLOCK"] in BLOCKSIZES
        and dtype_of(variant) is not None
    ]


def lengths(variant: Variant) -> tuple[int, ...]:
    return ALIGNED if variant.signature["n"].endswith(":16") else OTHERS


def grid(variant: Variant, n: int) -> tuple[int, int, int]:
    return triton.cdiv(n, variant.constants["QUANT_BLOCK"] * variant.constants["ROWS"]), 1, 1


def values(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal values with a stretch of zeros that covers whole blocks."""
    x = torch.randn(n, device="cuda")
    x[n // 2 : n // 2 + 300] = 0
    return x.to(dtype)


def filled(length: int, dtype: torch.dtype) -> torch.Tensor:
    """An output whose every byte is wrong until it is written."""
    return torch.full((length * dtype.itemsize,), 0xAB, dtype=torch.uint8, device="cuda").view(dtype)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def without_nan(x: torch.Tensor) -> torch.Tensor:
    """One value for every NaN, whose other bits nobody promises."""
    return torch.where(x.isnan(), -1.0, x)


@pytest.mark.parametrize("variant", cases("quantize_4bit"))
def test_quantize_4bit(variant):
    kernel, dtype = PtxKernel(variant, "sm_75"), dtype_of(variant)
    blocksize, propagate = variant.constants["QUANT_BLOCK"], variant.constants["PROPAGATE_NAN"]
    quant_type = "nf4" if variant.constants["NF4"] else "fp4"
    for n in lengths(variant):
        x = values(n, dtype)
        edges = blocks_at_thresholds(quant_type, blocksize, dtype)[:n]
        x[: len(edges)] = edges
        if propagate:  # a T4 has no instruction for a maximum that does
            x[-1] = torch.nan
        packed, absmax = filled(packed_length(n), torch.uint8), filled(block_count(n, blocksize), torch.float32)
        arguments = {"x_ptr": x, "packed_ptr": packed, "absmax_ptr": absmax, "n": n, "n_bytes": packed_length(n)}
        kernel(grid(variant, n), {**arguments, "table_ptr": bucket_table(quant_type, device())})
        expected, expected_absmax = quantize_4bit_reference(
            x, blocksize, quant_type, torch.uint8, propagate, reciprocal=gpu_reciprocal
        )
        assert_bits_equal(without_nan(absmax), without_nan(expected_absmax))
        assert_bits_equal(packed, expected.view(-1))
        native, native_absmax = torch.ops.qkernels.quantize_4bit(x, blocksize, quant_type, torch.uint8, propagate)
        assert_bits_equal(without_nan(absmax), without_nan(native_absmax))
        assert_bits_equal(packed, native.view(-1))


@pytest.mark.parametrize("quant_type", qkernels.QUANT_TYPES)
@pytest.mark.parametrize("variant", cases("dequantize_4bit"))
def test_dequantize_4bit(variant, quant_type):
    kernel, dtype = PtxKernel(variant, "sm_75"), dtype_of(variant)
    blocksize, nested = variant.constants["QUANT_BLOCK"], variant.constants["NESTED"]
    for n in lengths(variant):
        options = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": nested}
        packed, state = qkernels.quantize_4bit(values(n, dtype), **options)
        out = filled(n, dtype)
        absmax = state.absmax
        if nested:
            absmax = decode_absmax_reference(state.absmax, state.state2.absmax, state.state2.code, state.offset)
        arguments = {
            "packed_ptr": packed,
            "out_ptr": out,
            "n": n,
            "n_bytes": packed_length(n),
        } | skinny.scale_arguments(state)
        kernel(grid(variant, n), {**arguments, "code_ptr": code_table(quant_type, device())})
        assert_bits_equal(out, dequantize_4bit_reference(packed, absmax, blocksize, quant_type, (n,), dtype))
        assert_bits_equal(out, qkernels.dequantize_4bit(packed, state))


@pytest.mark.parametrize("variant", cases("quantize_blockwise"))
def test_quantize_blockwise(variant):
    kernel, dtype = PtxKernel(variant, "sm_75"), dtype_of(variant)
    blocksize, capacity = variant.constants["QUANT_BLOCK"], variant.constants["SUMS"]
    code = dynamic_map(device())
    for n in lengths(variant):
        for mean in (0.75, -0.75) if capacity else (0.0,):
            x = values(n, dtype)
            edges = blocks_at_midpoints(code, blocksize, mean).to(dtype)[:n]
            x[: len(edges)] = edges
            index, absmax = filled(n, torch.uint8), filled(block_count(n, blocksize), torch.float32)
            arguments = {"x_ptr": x, "code_ptr": code, "out_ptr": index, "absmax_ptr": absmax, "n": n}
            # As many sums as there may be, so that the tree over them has work to do; their mean is exact.
            n_sums = variant.constants.get("n_sums", capacity)
            sums, returned = torch.full((n_sums,), mean, device="cuda"), filled(1, torch.float32)
            arguments |= {"sums_ptr": sums, "mean_ptr": returned, "n_sums": n_sums, "divisor": n_sums}
            kernel(grid(variant, n), arguments)
            offset = torch.tensor(mean, device="cuda")
            expected, expected_absmax = quantize_blockwise_reference(x, code, blocksize, offset, gpu_reciprocal)
            assert_bits_equal(absmax, expected_absmax)
            assert_bits_equal(index, expected)
            native, native_state = qkernels.quantize_blockwise(x - offset if mean else x, blocksize=blocksize)
            assert_bits_equal(absmax, native_state.absmax)
            assert_bits_equal(index, native)
            if capacity:
                assert_bits_equal(returned[0], offset)


@pytest.mark.parametrize("variant", [variant for variant in variants() if variant.name.startswith("partial_sums ")])
def test_partial_sums(variant):
    kernel, whole = PtxKernel(variant, "sm_75"), variant.constants["WHOLE"]
    for n in (2048, 4099, 100_003):
        x = torch.rand(n, device="cuda")
        order = order_of(n, 7 if whole else 1)
        native = partial_sums_triton(x, order, variant.config)
        sums = filled(order.n_sums, torch.float32)
        arguments = {"x_ptr": x, "sums_ptr": sums, "n": n, "ctas": order.ctas, "rounds": order.rounds}
        kernel((order.ctas, SLOTS // variant.config.rows, 1), arguments)
        assert_bits_equal(sums, native)


@pytest.mark.parametrize("variant", cases("dequantize_blockwise"))
def test_dequantize_blockwise(variant):
    kernel, dtype = PtxKernel(variant, "sm_75"), dtype_of(variant)
    blocksize, code = variant.constants["QUANT_BLOCK"], dynamic_map(device())
    for n in lengths(variant):
        index, state = qkernels.quantize_blockwise(values(n, dtype), blocksize=blocksize)
        out = filled(n, dtype)
        arguments = {"x_ptr": index, "absmax_ptr": state.absmax, "code_ptr": code, "out_ptr": out, "n": n}
        kernel(grid(variant, n), arguments)
        assert_bits_equal(out, dequantize_blockwise_reference(index, state.absmax, code, blocksize, dtype))
        assert_bits_equal(out, qkernels.dequantize_blockwise(index, state))


DROPOUTS = [variant for variant in variants() if variant.name.startswith("dropout ") and dtype_of(variant) is not None]


@pytest.mark.parametrize("variant", DROPOUTS, ids=lambda variant: variant.name)
def test_dropout(variant):
    kernel, seed = PtxKernel(variant, "sm_75"), torch.randint(2**63 - 1, (1,), device="cuda")
    for n in lengths(variant):
        x = values(n, dtype_of(variant))
        out = filled(n, x.dtype)
        arguments = {"x_ptr": x, "seed_ptr": seed, "out_ptr": out, "n": n}
        kernel((triton.cdiv(n, variant.constants["BLOCK"]), 1, 1), arguments)
        assert_bits_equal(out, dropout_reference(x, seed, *threshold_and_scale(0.05)))
        assert_bits_equal(out, qkernels.seeded_dropout(x, 0.05, seed))


@pytest.mark.parametrize("variant", cases("matmul_skinny"))
def test_matmul_skinny(variant):
    kernel, constants, N = PtxKernel(variant, "sm_75"), variant.constants, 1000  # as to TAIL all are like their own
    K, nested, columns = constants["K"], constants["NESTED"], constants["COLUMNS"]
    quant_type = "fp4" if " fp4 " in variant.name else "nf4"
    options = {"blocksize": constants["QUANT_BLOCK"], "quant_type": quant_type, "compress_statistics": nested}
    packed, state = skinny.weight(N, K, torch.float16, **options)
    bias = torch.randn(N, device="cuda", dtype=torch.float16) if constants["HAS_BIAS"] else None
    most = 4 if state.blocksize >= 64 else 2
    for M in (1, most) if constants["PAIRED"] else (columns - 3, columns, 3 * columns - 1):
        x = torch.randn(M, K, device="cuda", dtype=torch.float16)
        out = torch.full((M, N), torch.nan, device="cuda", dtype=torch.float16)
        read = skinny.arranged(lambda one: PtxKernel(one, "sm_75"), variant, x)
        arguments = {"x_ptr": read, "packed_ptr": packed, "bias_ptr": bias, "out_ptr": out, "M": M, "N": N}
        grid_of_tiles = (triton.cdiv(M, columns), programs(N, K, state.blocksize, variant.config.rows), 1)
        kernel(grid_of_tiles, arguments | skinny.scale_arguments(state))
        skinny.assert_accurate(out, x, packed, state, bias)


@pytest.mark.parametrize("variant", cases("matmul_skinny_dx"))
def test_matmul_skinny_dx(variant):
    constants, columns = variant.constants, variant.constants["COLUMNS"]
    quant_type = "fp4" if " fp4 " in variant.name else "nf4"
    options = {"blocksize": constants["QUANT_BLOCK"], "quant_type": quant_type}
    options["compress_statistics"] = constants["NESTED"]
    kernels: dict[str, PtxKernel] = {}

    def compiled(one: Variant) -> PtxKernel:
        """Loaded once: the driver takes longer to translate it than the test to run."""
        if one.name not in kernels:
            kernels[one.name] = PtxKernel(one, "sm_75")
        return kernels[one.name]

    for N in (2000, 4096) if constants["ALIGNED"] else (1001, 4093):
        packed, state = skinny.weight(N, constants["K"], torch.float16, **options)
        for M in (1, columns - 3, columns, 3 * columns - 1):
            dy = torch.randn(M, N, device="cuda", dtype=torch.float16)
            dx = skinny.run_dx(compiled, variant, dy, packed, state)
            skinny.assert_dx_accurate(dx, dy, packed, state)
