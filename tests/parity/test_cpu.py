"""Bit for bit against the real bitsandbytes on the CPU, as far as its CPU path is a yardstick.

It is not one in three places, each shown by a test here: its dequantization reads the wrong scales when a row is not a
whole number of blocks, its 8-bit codes differ from its own CUDA kernel's, and its tail is divided instead of multiplied
by the reciprocal (one ulp, only for float32).
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

import qkernels
from qkernels.format import BLOCKSIZES, FLOAT_DTYPES, FP4_THRESHOLDS, QUANT_STORAGES, QUANT_TYPES
from qlora.rounding import quantize_4bit_for_inputs


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_nibbles_scales_and_values(blocksize, quant_type, dtype):
    weight = (0.02 * torch.randn(64, 4096)).to(dtype)
    packed, state = qkernels.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    expected, expected_state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    assert torch.equal(state.absmax, expected_state.absmax)
    if quant_type == "nf4":
        assert torch.equal(packed, expected)
    else:
        # For FP4 the CPU path has other thresholds than CUDA (shown below), and one zero where CUDA keeps the sign:
        # compare values, and let them differ only where a scaled value lies between the two kinds of threshold.
        differing = qkernels.dequantize_4bit(packed, state) != qkernels.dequantize_4bit(expected, state)
        scaled = weight.float().view(-1, blocksize) / state.absmax[:, None]
        thresholds = torch.tensor(FP4_THRESHOLDS)
        distance = (scaled.abs()[..., None] - thresholds).abs().amin(dim=-1).view(64, 4096)
        assert (distance[differing] < 5e-7).all()
    assert torch.equal(qkernels.dequantize_4bit(expected, state), bnb.dequantize_4bit(expected, expected_state))


@pytest.mark.parametrize("storage", QUANT_STORAGES)
@pytest.mark.parametrize("nested", [False, True])
def test_wire_form(storage, nested):
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    options = {"quant_type": "nf4", "quant_storage": storage, "compress_statistics": nested}
    packed, state = qkernels.quantize_4bit(weight, **options)
    expected, expected_state = bnb.quantize_4bit(weight, **options)
    assert packed.shape == expected.shape
    assert torch.equal(packed.view(torch.uint8), expected.view(torch.uint8))
    ours, theirs = state.as_dict(packed=True), expected_state.as_dict(packed=True)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    loaded = qkernels.QuantState.from_dict(theirs, "cpu")
    assert torch.equal(qkernels.dequantize_4bit(packed, loaded), bnb.dequantize_4bit(expected, expected_state))


@pytest.mark.parametrize("nested", [False, True])
def test_it_decodes_weights_rounded_for_their_inputs(nested):
    """Codes and scales are chosen otherwise there; the format is the same."""
    weight, x = torch.randn(32, 128), torch.randn(300, 128)
    packed, state = quantize_4bit_for_inputs(weight, x.t() @ x, compress_statistics=nested)
    loaded = bnb.QuantState.from_dict(state.as_dict(packed=True), torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(packed, loaded), qkernels.dequantize_4bit(packed, state))


@pytest.mark.parametrize("n", range(1, 131))
def test_every_length(n):
    values = torch.randn(n, dtype=torch.float16)
    packed, state = qkernels.quantize_4bit(values, quant_type="nf4")
    expected, expected_state = bnb.quantize_4bit(values, quant_type="nf4")
    assert torch.equal(packed, expected)
    assert torch.equal(state.absmax, expected_state.absmax)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blockwise_scales_and_values(blocksize):
    values = torch.randn(64, 1024)
    index, state = qkernels.quantize_blockwise(values, blocksize=blocksize)
    _, expected_state = bnb.quantize_blockwise(values, blocksize=blocksize)
    assert torch.equal(state.absmax, expected_state.absmax)
    assert torch.equal(qkernels.dequantize_blockwise(index, state), bnb.dequantize_blockwise(index, expected_state))


def test_maps():
    for signed in (True, False):
        assert torch.equal(qkernels.create_dynamic_map(signed), bnb.create_dynamic_map(signed))
    for extra in (True, False):
        assert torch.equal(
            qkernels.create_normal_map(use_extra_value=extra), bnb.create_normal_map(use_extra_value=extra)
        )
    for quant_type in QUANT_TYPES:
        assert torch.equal(qkernels.get_4bit_type(quant_type), bnb.get_4bit_type(quant_type, device="cpu"))


def test_fp4_follows_the_cuda_thresholds_where_the_cpu_path_does_not():
    # 0.5833332 lies between CUDA's 0.583333 and the midpoint 0.5833334 of the CPU path.
    values = torch.tensor([1.0, 0.5833332])
    ours, _ = qkernels.quantize_4bit(values, quant_type="fp4")
    theirs, _ = bnb.quantize_4bit(values, quant_type="fp4")
    assert ours.item() == 0x32
    assert theirs.item() == 0x35


def test_rows_that_are_not_whole_blocks_decode_here_and_not_there():
    weight = torch.randn(64, 96)
    packed, state = qkernels.quantize_4bit(weight, quant_type="nf4")
    expected, expected_state = bnb.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(packed, expected)
    bound = 0.16 * weight.abs().max()
    assert (qkernels.dequantize_4bit(packed, state) - weight).abs().max() <= bound
    assert (bnb.dequantize_4bit(expected, expected_state) - weight).abs().max() > bound


def test_an_all_zero_block_is_zero():
    weight = 0.02 * torch.randn(8, 64)
    weight[3] = 0
    options = {"quant_type": "nf4", "compress_statistics": True}
    assert not qkernels.dequantize_4bit(*qkernels.quantize_4bit(weight, **options))[3].any()


def test_nan_raises_here_and_passes_there():
    weight = torch.randn(2, 64)
    weight[0, 0] = torch.nan
    with pytest.raises(qkernels.UserError, match="1 NaN"):
        qkernels.quantize_4bit(weight)
    bnb.quantize_4bit(weight)


def test_storage_padding_is_zero_and_inside_the_tensor():
    # 5 bytes of nibbles in float32 elements: two, the last half empty.  bitsandbytes' CUDA path writes past its one.
    packed, state = qkernels.quantize_4bit(torch.randn(9), quant_type="nf4", quant_storage=torch.float32)
    assert packed.shape == (2, 1)
    assert not packed.view(torch.uint8).view(-1)[5:].any()
    assert torch.isfinite(qkernels.dequantize_4bit(packed, state)).all()
