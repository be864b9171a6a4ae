"""The codes of the Hopper product as 16-bit integers, and how far the weights are from those of dequantize_4bit."""

from __future__ import annotations

import pytest
import torch

from qkernels.format import code_table
from qkernels.kernels._wgmma_codes import CODES16


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_integers_are_the_codes(quant_type):
    divisor, integers = CODES16[quant_type]
    codes = code_table(quant_type, torch.device("cpu")).double() * divisor
    integers = torch.tensor(integers, dtype=torch.float64)
    assert torch.equal(codes.round(), integers)
    assert integers.abs().max() < 2**15
    if quant_type == "fp4":  # its codes are float32 numbers next to fractions, 1 / 3 for example
        assert (codes - integers).abs().max() < 1e-3


@pytest.mark.parametrize(("dtype", "larger"), [(torch.float16, 1.002), (torch.bfloat16, 1.0002)])
def test_integers_err_far_less_than_rounding_a_weight(dtype, larger):
    divisor, integers = CODES16["nf4"]
    codes = code_table("nf4", torch.device("cpu"))
    torch.manual_seed(0)
    scales = torch.exp2(torch.rand(100_000) * 8 - 6)
    exact = scales.double()[:, None] * codes.double()
    # As the kernel does it: the scale in units of the integers, rounded to 22 bits, then one product, rounded twice.
    rounded = ((scales / divisor).view(torch.int32) + 2 & -4).view(torch.float32)
    ours = (rounded[:, None] * torch.tensor(integers, dtype=torch.float32)).to(dtype)
    errors = [(weight.double() - exact).square().mean().sqrt() for weight in (ours, exact.float().to(dtype))]
    assert errors[0] < larger * errors[1]


def test_an_integer_is_added_to_the_bits_of_a_float():
    # What dp2a makes of an integer, and what the multiplication takes away again.
    bits = torch.tensor([integer + 0x4B400000 for integer in CODES16["nf4"][1]], dtype=torch.int32)
    assert (bits.view(torch.float32) - 3 * 2**22).tolist() == list(CODES16["nf4"][1])
    assert torch.tensor(0xCB400000 - 2**32, dtype=torch.int32).view(torch.float32) == -3 * 2**22
