"""The reference against the definition written another way, and against the published size of its error."""

from __future__ import annotations

import math

import pytest
import torch

from qkernels import BLOCKSIZES, QUANT_STORAGES, dequantize_4bit, get_4bit_type, quantize_4bit, quantize_blockwise
from qkernels.format import create_dynamic_map
from qkernels.reference import dequantize_4bit_reference, quantize_4bit_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def unpack_nibbles(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The first `n` 4-bit indices: the high nibble of each byte, then the low one."""
    nibbles = [nibble for byte in packed.view(-1).tolist() for nibble in (byte >> 4, byte & 15)]
    return torch.tensor(nibbles[:n])


def nearest_by_definition(values: torch.Tensor, blocksize: int, table: torch.Tensor) -> torch.Tensor:
    """Distance in float64 between each scaled value and its nearest code, block by block in a plain loop."""
    distances = []
    for start in range(0, values.numel(), blocksize):
        block = values[start : start + blocksize].double()
        scaled = block / block.abs().max()
        distances.append((scaled[:, None] - table.double()).abs().min(dim=1).values)
    return torch.cat(distances)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_element_takes_the_nearest_code(quant_type, dtype, blocksize):
    values = torch.randn(9001).to(dtype)
    packed, absmax = quantize_4bit_reference(values, blocksize, quant_type, torch.uint8)
    table = get_4bit_type(quant_type)
    chosen = table[unpack_nibbles(packed, values.numel())].double()
    scale = absmax.repeat_interleave(blocksize)[: values.numel()].double()
    distance = (values.double() / scale - chosen).abs()
    # FP4's thresholds are decimals, 4e-7 off the midpoint at most: so far may a distance exceed the least one.
    torch.testing.assert_close(distance, nearest_by_definition(values, blocksize, table), rtol=0, atol=1e-6)
    assert torch.equal(absmax, torch.stack([block.abs().max() for block in values.float().split(blocksize)]))


@pytest.mark.parametrize("n", range(1, 131))
def test_every_length_round_trips_through_every_storage(n):
    values = torch.randn(n)
    expected, absmax = quantize_4bit_reference(values, 32, "nf4", torch.uint8)
    assert expected.shape == ((n + 1) // 2, 1)
    for storage in QUANT_STORAGES:
        packed, _ = quantize_4bit_reference(values, 32, "nf4", storage)
        as_bytes = packed.view(torch.uint8).reshape(-1)
        assert torch.equal(as_bytes[: len(expected)], expected.view(-1))
        assert not as_bytes[len(expected) :].any()
        decoded = dequantize_4bit_reference(packed, absmax, 32, "nf4", (n,), torch.float32)
        assert (decoded - values).abs().max() <= 0.16 * values.abs().max()


def test_even_element_is_the_high_nibble():
    packed, _ = quantize_4bit_reference(torch.tensor([1.0, -1.0]), 32, "nf4", torch.uint8)
    assert packed.item() == 0xF0


@pytest.mark.parametrize(
    ("blocksize", "nf4", "fp4"),
    [(32, 7.617e-3, 13.02e-3), (64, 8.469e-3, 14.88e-3), (128, 9.134e-3, 16.54e-3), (256, 9.730e-3, 18.14e-3)],
)
def test_mean_squared_error_on_normal_values(blocksize, nf4, fp4):
    values = torch.randn(2**21)
    for quant_type, expected in (("nf4", nf4), ("fp4", fp4)):
        packed, state = quantize_4bit(values, quant_type=quant_type, blocksize=blocksize)
        error = (dequantize_4bit(packed, state) - values).square().mean().item()
        assert error == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress_statistics", [False, True])
def test_an_all_zero_block_decodes_to_exact_zeros(quant_type, compress_statistics):
    values = 0.02 * torch.randn(8, 64)
    values[3] = 0
    packed, state = quantize_4bit(values, quant_type=quant_type, compress_statistics=compress_statistics)
    assert (dequantize_4bit(packed, state)[3] == 0).all()


def test_a_block_of_subnormals_counts_as_zero():
    values = torch.full((64,), 1e-40)
    packed, state = quantize_4bit(values, quant_type="nf4")
    assert (packed == 0x77).all()
    assert state.absmax.item() == 0


def test_nan_and_inf_when_told_to_go_on():
    values = torch.ones(128)
    values[0], values[64] = math.nan, math.inf
    packed, state = quantize_4bit(values, quant_type="nf4", check_finite=False)
    index = unpack_nibbles(packed, 128)
    assert index[0] == 0
    assert state.absmax[0] == 1
    assert state.absmax[1] == math.inf


def test_double_quantized_scales_are_within_half_a_step():
    scales = torch.rand(1000) + 0.5
    index, state = quantize_blockwise(scales - scales.mean(), blocksize=256)
    decoded = create_dynamic_map()[index.int()] * state.absmax.repeat_interleave(256)[:1000] + scales.mean()
    # The widest step of the signed dynamic map is 1/71 of the block's scale.
    assert ((decoded - scales).abs() <= state.absmax.max() / 140).all()


def test_dequantize_rounds_once():
    packed, state = quantize_4bit(torch.randn(64, 64), quant_type="nf4")
    exact = dequantize_4bit_reference(packed, state.absmax, 64, "nf4", (64, 64), torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(dequantize_4bit_reference(packed, state.absmax, 64, "nf4", (64, 64), dtype), exact.to(dtype))
