"""Bit for bit against the real bitsandbytes on the GPU, in the same process: the yardstick itself.

The random inputs are other ones in each run (`--seed` repeats them); `test_gpu_exhaustive.py` leaves nothing to chance.
"""

from __future__ import annotations

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
from exact import assert_bits_equal
from skinny import exact_product

import qkernels
from qkernels.format import (
    BLOCKSIZES,
    FLOAT_DTYPES,
    FP4_THRESHOLDS,
    NF4_THRESHOLDS,
    QUANT_STORAGES,
    QUANT_TYPES,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("new_inputs")]


def many_values(dtype: torch.dtype) -> torch.Tensor:
    """2^27 normal values; the 4096 of each row have a standard deviation of their own, 2^-12 to 2^12."""
    values = torch.randn(2**15, 4096, device="cuda")
    values *= torch.empty(2**15, 1, device="cuda").uniform_(-12, 12).exp2_()
    return values.to(dtype)


def assert_states_equal(ours, theirs) -> None:
    assert_bits_equal(ours.absmax, theirs.absmax)
    assert (ours.state2 is not None) == theirs.nested
    if theirs.nested:
        assert_bits_equal(ours.state2.absmax, theirs.state2.absmax)
        assert_bits_equal(ours.state2.code, theirs.state2.code)
        assert_bits_equal(ours.offset, theirs.offset)


def assert_round_trip_equal(values: torch.Tensor, check_finite: bool = True, **options) -> None:
    """Codes, scales, offset and decoded values."""
    packed, state = qkernels.quantize_4bit(values, check_finite=check_finite, **options)
    expected, expected_state = bnb.quantize_4bit(values, **options)
    assert_bits_equal(packed, expected)
    assert_states_equal(state, expected_state)
    assert_bits_equal(qkernels.dequantize_4bit(packed, state), bnb.dequantize_4bit(expected, expected_state))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_two_to_the_27_values(blocksize, quant_type, dtype):
    values = many_values(dtype)
    options = {"blocksize": blocksize, "quant_type": quant_type}
    # With and without the check: two builds of the quantizer.
    assert_round_trip_equal(values, **options, check_finite=True)
    assert_round_trip_equal(values, **options, check_finite=False, compress_statistics=True)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_threshold(quant_type):
    # The block's absmax is 1, so every value is its own scaled value: the thresholds, and one ulp to either side.
    thresholds = torch.tensor(NF4_THRESHOLDS if quant_type == "nf4" else FP4_THRESHOLDS, device="cuda")
    infinity = thresholds.new_tensor(torch.inf)
    around = torch.cat([thresholds, thresholds.nextafter(infinity), thresholds.nextafter(-infinity)])
    values = torch.cat([thresholds.new_ones(1), around, -around])
    assert_round_trip_equal(values, quant_type=quant_type, blocksize=128)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_length(dtype, quant_type, nested):
    for n in range(1, 131):
        values = torch.randn(n, device="cuda").to(dtype)
        assert_round_trip_equal(values, quant_type=quant_type, compress_statistics=nested)


@pytest.mark.parametrize("storage", QUANT_STORAGES)
def test_wire_form(storage):
    weight = torch.randn(320, 64, device="cuda", dtype=torch.bfloat16)
    options = {"quant_type": "nf4", "quant_storage": storage, "compress_statistics": True}
    packed, state = qkernels.quantize_4bit(weight, **options)
    expected, expected_state = bnb.quantize_4bit(weight, **options)
    assert_bits_equal(packed, expected)
    ours, theirs = state.as_dict(packed=True), expected_state.as_dict(packed=True)
    assert list(ours) == list(theirs)
    for key in ours:
        assert_bits_equal(ours[key], theirs[key])


@pytest.mark.parametrize("blocksize", [size for size in BLOCKSIZES if size > 32])  # bitsandbytes has no 32
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_blockwise(blocksize, dtype):
    values = many_values(dtype)
    index, state = qkernels.quantize_blockwise(values, blocksize=blocksize)
    expected, expected_state = bnb.quantize_blockwise(values, blocksize=blocksize)
    assert_bits_equal(index, expected)
    assert_bits_equal(state.absmax, expected_state.absmax)
    assert_bits_equal(qkernels.dequantize_blockwise(index, state), bnb.dequantize_blockwise(expected, expected_state))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("m", [1, 4, 8, 128, 512])
def test_products_are_no_less_exact(m, dtype):
    weight = torch.randn(1024, 2048, device="cuda").to(dtype)
    x = torch.randn(m, 2048, device="cuda").to(dtype)
    packed, state = qkernels.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    expected, expected_state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    truth = exact_product(x, packed, state)  # rounding the weights to 16 bits is part of everyone's error

    def error(y):
        return ((y.double() - truth).norm() / truth.norm()).item()

    ours = error(qkernels.matmul_4bit(x, packed, state))
    theirs = error(bitsandbytes.matmul_4bit(x, expected, expected_state))
    assert ours <= 1.05 * theirs


def test_an_all_zero_block_is_zero_here_and_not_there():
    weight = 0.02 * torch.randn(8, 64, device="cuda")
    weight[3] = 0
    options = {"quant_type": "nf4", "compress_statistics": True}
    assert not qkernels.dequantize_4bit(*qkernels.quantize_4bit(weight, **options))[3].any()
    assert bnb.dequantize_4bit(*bnb.quantize_4bit(weight, **options))[3].any()
