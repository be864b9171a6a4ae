"""The kernels' own source on the CPU, in Triton's interpreter, bit for bit against the reference.

The interpreter has no inline assembly, so the exact reciprocal stands in for the approximate one, in both.  It checks
addresses, masks, packing, decisions and roundings; it sees neither races nor what the compiler does.
"""

from __future__ import annotations

import pytest
import torch
from edges import blocks_at_midpoints, blocks_at_thresholds

from qkernels.dropout import dropout_reference, threshold_and_scale
from qkernels.format import BLOCKSIZES, QUANT_STORAGES, QUANT_TYPES, dynamic_map
from qkernels.kernels.blockwise import (
    dequantize_blockwise_triton,
    quantize_blockwise_triton,
    quantize_scales_triton,
)
from qkernels.kernels.dequantize import dequantize_4bit_triton
from qkernels.kernels.dropout import dropout_triton
from qkernels.kernels.mean import order_of, partial_sums_triton
from qkernels.kernels.norm import norm_triton
from qkernels.kernels.quantize import quantize_4bit_triton
from qkernels.kernels.token_attention import token_attention_triton
from qkernels.norm import normalize_reference
from qkernels.reference import (
    decode_absmax_reference,
    dequantize_4bit_reference,
    dequantize_blockwise_reference,
    mean_reference,
    quantize_4bit_reference,
    quantize_blockwise_reference,
)
from qkernels.token_attention import token_attention_reference
from qkernels.tuning import (
    DROPOUT_CONFIG,
    LaunchConfig,
    elementwise_config,
    norm_config,
    partial_sums_config,
)

# bf16 is not tried: the interpreter computes in numpy, which has no such type.
DTYPES = [torch.float32, torch.float16]
LENGTHS = [1, 2, 63, 64, 65, 4095, 4096, 4097, 9001]
CODE = dynamic_map(torch.device("cpu"))


def assert_bits_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def awkward_values(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal values, among them zeros of both signs, a constant stretch and an all-zero stretch."""
    values = torch.randn(n)
    values[::7] = 0.0
    values[1::11] = -0.0
    values[n // 3 : n // 3 + 40] = 0.5
    values[n // 2 : n // 2 + 130] = 0.0
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_4bit(blocksize, quant_type, dtype):
    for n in LENGTHS:
        values = awkward_values(n, dtype)
        for storage in QUANT_STORAGES:
            packed, absmax = quantize_4bit_triton(
                values, blocksize, quant_type, storage, False, elementwise_config("quantize_4bit", blocksize)
            )
            expected, expected_absmax = quantize_4bit_reference(values, blocksize, quant_type, storage)
            assert_bits_equal(packed, expected)
            assert_bits_equal(absmax, expected_absmax)


@pytest.mark.parametrize("propagate_nan", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_quantize_4bit_with_nan_and_inf(quant_type, propagate_nan):
    values = torch.randn(1000)
    values[70], values[300] = torch.nan, -torch.inf
    config = elementwise_config("quantize_4bit", 64)
    packed, absmax = quantize_4bit_triton(values, 64, quant_type, torch.uint8, propagate_nan, config)
    expected, expected_absmax = quantize_4bit_reference(values, 64, quant_type, torch.uint8, propagate_nan)
    assert torch.equal(absmax.isnan(), expected_absmax.isnan())
    assert absmax.isnan().any() == propagate_nan
    assert absmax[300 // 64].isinf()
    assert torch.equal(absmax.nan_to_num(), expected_absmax.nan_to_num())
    assert_bits_equal(packed, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_quantize_4bit_at_every_threshold(quant_type, dtype):
    values = blocks_at_thresholds(quant_type, 128, dtype)
    packed, _ = quantize_4bit_triton(
        values, 128, quant_type, torch.uint8, False, elementwise_config("quantize_4bit", 128)
    )
    expected, _ = quantize_4bit_reference(values, 128, quant_type, torch.uint8)
    assert_bits_equal(packed, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize_4bit(blocksize, quant_type, dtype):
    for n in LENGTHS:
        packed, absmax = quantize_4bit_reference(torch.randn(n), blocksize, quant_type, torch.uint8)
        offset = absmax.mean()
        absmax_8bit, absmax2 = quantize_blockwise_reference(absmax - offset, CODE, 256)
        decoded = decode_absmax_reference(absmax_8bit, absmax2, CODE, offset)
        for scales, nested in ((absmax, None), (decoded, (absmax_8bit, CODE, offset))):
            out = torch.full((n,), torch.nan, dtype=dtype)
            stored = absmax if nested is None else absmax2
            dequantize_4bit_triton(
                packed,
                stored,
                blocksize,
                quant_type,
                out,
                elementwise_config("dequantize_4bit", blocksize),
                *(nested or ()),
            )
            assert_bits_equal(out, dequantize_4bit_reference(packed, scales, blocksize, quant_type, (n,), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blockwise(blocksize, dtype):
    for n in LENGTHS:
        values = awkward_values(n, dtype)
        config = elementwise_config("quantize_blockwise", blocksize)
        index, absmax = quantize_blockwise_triton(values, CODE, blocksize, config)
        expected, expected_absmax = quantize_blockwise_reference(values, CODE, blocksize)
        assert torch.equal(index, expected)
        assert_bits_equal(absmax, expected_absmax)
        out = torch.full((n,), torch.nan, dtype=dtype)
        dequantize_blockwise_triton(index, absmax, CODE, blocksize, out, config)
        assert_bits_equal(out, dequantize_blockwise_reference(expected, expected_absmax, CODE, blocksize, dtype))


def test_scales_less_their_mean():
    config = elementwise_config("quantize_blockwise", 256)
    for n in LENGTHS:
        values, mean = torch.rand(n), torch.tensor(0.37)
        index, absmax, returned = quantize_scales_triton(values, CODE, 256, mean.view(1), 1, config)
        expected, expected_absmax = quantize_blockwise_reference(values, CODE, 256, mean)
        assert torch.equal(index, expected)
        assert_bits_equal(absmax, expected_absmax)
        assert_bits_equal(returned, mean)


@pytest.mark.parametrize(("ctas", "n"), [(1, 2048), (1, 2049), (1, 9003), (2, 9003), (3, 20_000), (130, 20_002)])
def test_the_mean_is_summed_in_the_order_of_the_reference(ctas, n):
    values = torch.rand(n)
    sums = partial_sums_triton(values, order_of(n, ctas), partial_sums_config(ctas))
    *_, mean = quantize_scales_triton(values, CODE, 256, sums, n, elementwise_config("quantize_blockwise", 256))
    assert_bits_equal(mean, mean_reference(values, ctas))
    torch.testing.assert_close(mean, values.mean())


def test_many_sums_are_finished_in_the_order_of_the_reference():
    sums = torch.rand(600)
    values = torch.zeros(600, 2048)
    values[:, 0] = sums
    config = elementwise_config("quantize_blockwise", 256)
    *_, mean = quantize_scales_triton(sums, CODE, 256, sums, values.numel(), config)
    assert_bits_equal(mean, mean_reference(values.view(-1), 600))


@pytest.mark.parametrize("mean", [0.0, 0.75, -0.75])
def test_blockwise_breaks_ties_towards_the_even_index(mean):
    values = blocks_at_midpoints(CODE, 256, mean)
    config = elementwise_config("quantize_blockwise", 256)
    if mean:
        index, *_ = quantize_scales_triton(values, CODE, 256, torch.tensor([mean]), 1, config)
    else:
        index, _ = quantize_blockwise_triton(values, CODE, 256, config)
    assert torch.equal(index, quantize_blockwise_reference(values, CODE, 256, torch.tensor(mean))[0])
    tie, above, below = index.view(-1, 256)[:, 1:4].int().unbind(1)
    assert (tie % 2 == 0).all()
    assert (above == below + 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.05, 1.0])
def test_dropout(p, dtype):
    for n in LENGTHS:
        values, seed = awkward_values(n, dtype), torch.randint(2**63 - 1, (1,))
        arguments = (seed, *threshold_and_scale(p))
        assert_bits_equal(dropout_triton(values, *arguments, DROPOUT_CONFIG), dropout_reference(values, *arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("summed", [True, False])
def test_norm(summed, centered, dtype):
    for C in (1, 64, 333, 4096):
        x, residual = (2 * torch.randn(2, 3, C).to(dtype) + 1 for _ in range(2))
        weight, bias = torch.randn(2, C).to(dtype)
        inputs = x, residual if summed else None, weight, bias if centered else None, 1e-3, centered
        for found, expected in zip(
            norm_triton(*inputs, norm_config(C), early=False), normalize_reference(*inputs), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 76])
def test_token_attention(length, dtype):
    for size, rows in ((16, 1), (20, 2)):
        fused = torch.randn(rows, 1, 3, 3, size).to(dtype)
        new = [part.transpose(1, 2) for part in fused.unbind(3)]
        cache = torch.randn(2, rows, 3, 77, size).to(dtype)
        cache[:, :, :, length:] = torch.nan  # what is there must not matter
        bias = (4 * torch.randn(1 + length % 2 * (rows - 1), 3, 1, 80)).to(dtype)[..., :77]
        copies = cache.clone()
        arguments = torch.tensor(length), bias
        for config in (LaunchConfig(32, 4), LaunchConfig(128, 4)):
            found = token_attention_triton(*new, *cache.unbind(0), *arguments, config, early=False)
            expected = token_attention_reference(*new, *copies.unbind(0), *arguments)
            assert_bits_equal(cache.nan_to_num(7.0), copies.nan_to_num(7.0))
            torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)
