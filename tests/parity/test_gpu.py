"""Bit for bit against the real bitsandbytes on the GPU, in the same process: the yardstick itself."""

from __future__ import annotations

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch

import qkernels
from qkernels.format import BLOCKSIZES, FLOAT_DTYPES, QUANT_STORAGES, QUANT_TYPES

pytestmark = pytest.mark.gpu


def assert_states_equal(ours, theirs) -> None:
    assert torch.equal(ours.absmax, theirs.absmax)
    if theirs.nested:
        assert torch.equal(ours.state2.absmax, theirs.state2.absmax)
        assert torch.equal(ours.state2.code, theirs.state2.code)
        assert torch.equal(ours.offset, theirs.offset)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("nested", [False, True])
def test_everything_is_equal(blocksize, quant_type, dtype, nested):
    weight = torch.randn(4096, 8192, device="cuda").to(dtype)
    options = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": nested}
    packed, state = qkernels.quantize_4bit(weight, **options)
    expected, expected_state = bnb.quantize_4bit(weight, **options)
    assert torch.equal(packed, expected)
    assert_states_equal(state, expected_state)
    assert torch.equal(qkernels.dequantize_4bit(packed, state), bnb.dequantize_4bit(expected, expected_state))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_odd_length(dtype, quant_type):
    for n in range(1, 131):
        values = torch.randn(n, device="cuda").to(dtype)
        packed, state = qkernels.quantize_4bit(values, quant_type=quant_type)
        expected, expected_state = bnb.quantize_4bit(values, quant_type=quant_type)
        assert torch.equal(packed, expected), n
        assert_states_equal(state, expected_state)


@pytest.mark.parametrize("storage", QUANT_STORAGES)
def test_wire_form(storage):
    weight = torch.randn(320, 64, device="cuda", dtype=torch.bfloat16)
    options = {"quant_type": "nf4", "quant_storage": storage, "compress_statistics": True}
    packed, state = qkernels.quantize_4bit(weight, **options)
    expected, expected_state = bnb.quantize_4bit(weight, **options)
    assert packed.shape == expected.shape
    assert torch.equal(packed.view(torch.uint8), expected.view(torch.uint8))
    ours, theirs = state.as_dict(packed=True), expected_state.as_dict(packed=True)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("blocksize", [blocksize for blocksize in BLOCKSIZES if blocksize > 32])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_blockwise(blocksize, dtype):
    values = torch.randn(1024, 4096, device="cuda").to(dtype)
    index, state = qkernels.quantize_blockwise(values, blocksize=blocksize)
    expected, expected_state = bnb.quantize_blockwise(values, blocksize=blocksize)
    assert torch.equal(index, expected)
    assert torch.equal(state.absmax, expected_state.absmax)
    assert torch.equal(qkernels.dequantize_blockwise(index, state), bnb.dequantize_blockwise(expected, expected_state))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("m", [1, 4, 8, 128, 512])
def test_products_are_no_less_exact(m, dtype):
    weight = torch.randn(1024, 2048, device="cuda").to(dtype)
    x = torch.randn(m, 2048, device="cuda").to(dtype)
    packed, state = qkernels.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    expected, expected_state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    truth = x.double() @ qkernels.dequantize_4bit(packed, state).double().t()

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
