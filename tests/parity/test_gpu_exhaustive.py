"""Every case there is, against the real bitsandbytes on the GPU: no sampling.

* A quantizer sees of a block one element and the scale.  So blocks are made of a scale and 63 elements that are no
  larger, until every 16-bit value has met every 16-bit scale: a thousand million pairs.
* A decoder sees a code and a scale: all codes with all mantissas of a float32 scale; and, with double quantization, all
  codes with all 8-bit scales, for many scales of the scales and offsets.
"""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import pytest
import torch
from exact import assert_bits_equal

import qkernels
from qkernels import QuantState
from qkernels.format import FLOAT_DTYPES, NESTED_BLOCKSIZE, QUANT_TYPES, SMALLEST_NORMAL, dynamic_map

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

HALF_DTYPES = (torch.float16, torch.bfloat16)
# Offsets for each double quantization; scales of scales in one tensor.
OFFSETS, SCALES = 32, 512


def every_pair(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Blocks of 64, [scales, blocks, 64]: a scale, and 63 values no larger (0 in place of a larger one).

    bfloat16 reaches into the subnormal numbers of float32, which bitsandbytes flushes to zero and this project does not
    (`docs/format.md`): values and scales below 2^-126 and quotients below 2^-125 are left out.  float16 has none.
    """
    bits = torch.arange(2**16, dtype=torch.int32, device="cuda").to(torch.int16)
    values = bits.view(dtype)
    values = values[values.isfinite() & ((values == 0) | (values.abs() >= SMALLEST_NORMAL))]
    scales = values[values > 0]
    values = torch.nn.functional.pad(values, (0, -len(values) % 63)).view(-1, 63)
    for some in scales.split(2048):
        blocks = values.new_empty(len(some), len(values), 64)
        blocks[..., 0] = some[:, None]
        scale = some[:, None, None]
        smallest = (some.float() * (2 * SMALLEST_NORMAL))[:, None, None]
        fits = (values.abs() <= scale) & (values.abs().float() >= smallest)
        blocks[..., 1:] = torch.where(fits, values, 0)
        yield blocks


def flushed(decoded: torch.Tensor) -> torch.Tensor:
    """With numbers up to 2^-126 as zeros of their sign: bitsandbytes decodes float32's subnormal numbers to zeros."""
    return decoded * (decoded.abs() > SMALLEST_NORMAL)


@pytest.mark.parametrize(
    ("dtype", "scales", "below"), [(torch.float16, 31743, 31743), (torch.bfloat16, 32512, 125 * 128)]
)
def test_every_pair_is_there(dtype, scales, below):
    found = pairs = 0
    for blocks in every_pair(dtype):
        found += len(blocks)
        pairs += int((blocks[..., 1:] != 0).sum())
        assert torch.equal(blocks.abs().amax(dim=-1), blocks[..., 0])
    assert found == scales
    # A scale meets itself and all smaller ones, `below` of them at most, with either sign.
    assert pairs == sum(2 * min(rank, below + 1) for rank in range(1, scales + 1))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_every_value_at_every_scale(dtype, quant_type):
    for blocks in every_pair(dtype):
        packed, state = qkernels.quantize_4bit(blocks, quant_type=quant_type, check_finite=False)
        expected, expected_state = bnb.quantize_4bit(blocks, quant_type=quant_type)
        assert_bits_equal(packed, expected)
        assert_bits_equal(state.absmax, expected_state.absmax)
        assert_bits_equal(state.absmax.view(blocks.shape[:-1]), blocks[..., 0].float())
        decoded = qkernels.dequantize_4bit(packed, state)
        assert_bits_equal(flushed(decoded), flushed(bnb.dequantize_4bit(expected, expected_state)))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_every_value_at_every_scale_in_8_bits(dtype):
    for blocks in every_pair(dtype):
        index, state = qkernels.quantize_blockwise(blocks, blocksize=64)
        expected, expected_state = bnb.quantize_blockwise(blocks, blocksize=64)
        assert_bits_equal(index, expected)
        assert_bits_equal(state.absmax, expected_state.absmax)
        decoded = qkernels.dequantize_blockwise(index, state)
        assert_bits_equal(flushed(decoded), flushed(bnb.dequantize_blockwise(expected, expected_state)))


def both_states(state: QuantState) -> tuple[QuantState, bnb.QuantState]:
    return state, bnb.QuantState.from_dict(state.as_dict(), torch.device("cuda"))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_code_at_every_scale(dtype, quant_type):
    # 16 bytes with every index as the even and as the odd element; all 2^23 mantissas of a float32 scale.
    index = torch.arange(16, dtype=torch.uint8, device="cuda")
    mantissas = torch.arange(2**23, dtype=torch.int32, device="cuda")
    packed = (index << 4 | index.flip(0)).repeat(len(mantissas)).view(-1, 1)
    # Scales around 1, some that decode to float16's subnormal numbers, and some to its infinity.
    for exponent in (0, -15, -24, 15):
        absmax = (mantissas + ((127 + exponent) << 23)).view(torch.float32)
        ours, theirs = both_states(
            QuantState(
                absmax,
                torch.Size((2**23, 32)),
                qkernels.get_4bit_type(quant_type, "cuda"),
                32,
                quant_type,
                dtype,
            )
        )
        assert_bits_equal(qkernels.dequantize_4bit(packed, ours), bnb.dequantize_4bit(packed, theirs))


@pytest.mark.usefixtures("new_inputs")
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_code_at_every_8_bit_scale(dtype, quant_type):
    # A block of 512 holds all 256 bytes; 256 blocks hold all 8-bit scales.
    packed = torch.arange(256, device="cuda").to(torch.uint8).repeat(SCALES * NESTED_BLOCKSIZE).view(-1, 1)
    absmax_8bit = torch.arange(256, device="cuda").to(torch.uint8).repeat(SCALES)
    code, table = dynamic_map(packed.device), qkernels.get_4bit_type(quant_type, "cuda")
    for _ in range(OFFSETS):
        absmax2 = torch.empty(SCALES, device="cuda").uniform_(-20, 8).exp2_()
        offset = torch.empty((), device="cuda").uniform_(-20, 8).exp2_() * torch.randn((), device="cuda").sign()
        state2 = QuantState(absmax2, absmax_8bit.shape, code, NESTED_BLOCKSIZE, dtype=torch.float32)
        shape = torch.Size((SCALES * NESTED_BLOCKSIZE, 512))
        ours, theirs = both_states(
            QuantState(absmax_8bit, shape, table, 512, quant_type, dtype, offset=offset, state2=state2)
        )
        assert torch.equal(theirs.offset, offset)
        assert_bits_equal(qkernels.dequantize_4bit(packed, ours), bnb.dequantize_4bit(packed, theirs))
