"""The tables against where they come from, and the sizes."""

from __future__ import annotations

import struct

import pytest
import torch

from qkernels import UserError, create_dynamic_map, create_normal_map, get_4bit_type
from qkernels.format import (
    FP4_CODE,
    FP4_PATTERNS,
    FP4_THRESHOLDS,
    NF4_THRESHOLDS,
    ZERO_INDEX,
    blockwise_thresholds,
    packed_length,
)


def test_nf4_table_is_derived_from_the_normal_distribution():
    values = create_normal_map()
    derived = torch.cat([values[values != 0], torch.zeros(1)]).sort().values
    torch.testing.assert_close(get_4bit_type("nf4"), derived, rtol=0, atol=2e-7)


def test_symmetric_normal_map():
    values = create_normal_map(use_extra_value=False)
    non_zero = values[values != 0]
    assert len(values) == 256
    assert len(non_zero) == 14
    torch.testing.assert_close(non_zero, -non_zero.flip(0))


def test_fp4_table_in_the_order_of_its_bit_patterns():
    # value = 2^exponent * (1 + mantissa/2) with a subnormal of 1/16, all divided by the largest, 12.
    expected = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3]) / 12
    table = get_4bit_type("fp4")
    assert torch.equal(table[:8], expected)
    assert torch.equal(table[8:], -expected)
    assert get_4bit_type("fp4")[8] == 0
    assert list(FP4_PATTERNS) == sorted(range(8), key=lambda pattern: FP4_CODE[pattern])


def test_nf4_thresholds_are_the_midpoints_to_one_ulp():
    code, thresholds = get_4bit_type("nf4"), torch.tensor(NF4_THRESHOLDS)
    middle = (code[1:] + code[:-1]) / 2
    ulp = torch.nextafter(middle.abs(), torch.tensor(torch.inf)) - middle.abs()
    assert ((thresholds - middle).abs() <= ulp).all()
    assert (thresholds == middle).sum() == 11


def test_thresholds_are_those_of_the_machine_code():
    # The operands of FSETP.GT in kQuantizeBlockwise, sm_90, of bitsandbytes 0.50.2's libbitsandbytes_cuda130.so.
    nf4 = """bf591cd9 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff 3df64863 3e5067e0 3e9582d4 3ec753f9
    3f006d03 3f248daf 3f5c89d9"""
    fp4 = "3b2aaab9 3db00000 3e555555 3e955555 3ed55556 3f155550 3f555555"
    for thresholds, machine_code in ((NF4_THRESHOLDS, nf4), (FP4_THRESHOLDS, fp4)):
        bits = [struct.pack(">f", threshold).hex() for threshold in thresholds]
        assert bits == machine_code.split()


def test_fp4_thresholds_are_the_midpoints_to_seven_digits():
    magnitudes = torch.tensor([FP4_CODE[p] for p in FP4_PATTERNS])
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    torch.testing.assert_close(torch.tensor(FP4_THRESHOLDS), middle, rtol=2e-6, atol=0)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_zero_index_decodes_to_zero(quant_type):
    assert get_4bit_type(quant_type)[ZERO_INDEX[quant_type]] == 0


def test_unknown_4bit_type():
    with pytest.raises(ValueError, match="expected one of nf4, fp4, got 'int5'"):
        get_4bit_type("int5")


def test_maps_out_of_range():
    with pytest.raises(UserError, match=r"offset: expected a probability between 0\.5 and 1, got 1\.5"):
        create_normal_map(offset=1.5)
    with pytest.raises(UserError, match="1 <= max_exponent_bits < total_bits <= 8, got 7, 12"):
        create_dynamic_map(total_bits=12)


def test_signed_dynamic_map():
    code = create_dynamic_map()
    assert code.shape == (256,)
    assert (code[1:] > code[:-1]).all()
    assert code[127] == 0
    assert code[255] == 1
    assert code[0] == pytest.approx(-0.99296874)
    # Symmetric but for the 1.0 that has no negative twin.
    torch.testing.assert_close(code[:127].flip(0), -code[128:255])


def test_unsigned_dynamic_map():
    code = create_dynamic_map(signed=False)
    assert code.shape == (256,)
    assert code.min() == 0
    assert code.max() == 1


def test_blockwise_thresholds_break_ties_towards_the_even_index():
    code = create_dynamic_map()
    middle = (code[:-1] + code[1:]) * 0.5
    index = torch.bucketize(middle, blockwise_thresholds(code))
    lower = torch.arange(255)
    assert torch.equal(index, torch.where(lower % 2 == 0, lower, lower + 1))


@pytest.mark.parametrize(
    ("n", "storage", "expected"),
    [(1, torch.uint8, 1), (2, torch.uint8, 1), (3, torch.uint8, 2), (9, torch.float16, 3), (9, torch.float32, 2)],
)
def test_packed_length_rounds_up(n, storage, expected):
    assert packed_length(n, storage) == expected
