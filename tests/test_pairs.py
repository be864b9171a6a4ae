"""The codes as the tensor cores take them: bits, and a factor that makes their rounding small."""

from __future__ import annotations

import pytest
import torch

from qkernels.format import code_table
from qkernels.kernels._pairs import ALPHA, pair_codes

CPU = torch.device("cpu")
KINDS = [(quant_type, dtype) for quant_type in ("nf4", "fp4") for dtype in (torch.float16, torch.bfloat16)]
# How often each code occurs in normal weights in blocks of 64, in thousandths.
FREQUENCY = torch.tensor([18, 43, 58, 71, 81, 88, 92, 88, 81, 78, 74, 67, 58, 48, 36, 17], dtype=torch.float64) / 1000


def rounding_error(quant_type: str, dtype: torch.dtype, alpha: torch.Tensor) -> torch.Tensor:
    """Root mean square of (round(alpha code) / alpha - code) for each alpha [n], float64."""
    code = code_table(quant_type, CPU).double()
    scaled = alpha.double()[:, None] * code
    error = (scaled.float().to(dtype).double() - scaled) / alpha.double()[:, None]
    return (error.square() * FREQUENCY).sum(1).sqrt()


@pytest.mark.parametrize(("quant_type", "dtype"), KINDS)
def test_the_bits_are_those_of_torch(quant_type, dtype):
    scaled = (code_table(quant_type, CPU).double() * ALPHA[quant_type, dtype]).float().to(dtype)
    expected = scaled.view(torch.int16).int() & 0xFFFF
    assert list(pair_codes(quant_type, dtype)) == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp4_is_exact(dtype):
    # The float32 table is itself rounded: 1/3 is off by 1e-8.
    assert rounding_error("fp4", dtype, torch.tensor([ALPHA["fp4", dtype]])) < 2e-8


@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 0.44), (torch.bfloat16, 0.58)])
def test_nf4_loses_less_than_by_rounding_the_codes(dtype, share):
    alpha = ALPHA["nf4", dtype]
    best, plain = rounding_error("nf4", dtype, torch.tensor([alpha, 1.0], dtype=torch.float64))
    assert best < share * plain
    # The search itself, coarser: no other factor is better by more than the grid's width can hide.
    grid = 1 + torch.arange(2**16, dtype=torch.float64) / 2**16
    assert best < 1.01 * rounding_error("nf4", dtype, grid).min()
