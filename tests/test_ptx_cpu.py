"""The fused products for few rows without a GPU: their compiled code, executed on the CPU, against float64."""

from __future__ import annotations

import pytest
import skinny
import torch
from ptx_cpu import CpuKernel

from qkernels.variants import skinny_dx_variant, skinny_variant

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("M", "N", "K", "options"),
    [
        (3, 520, 64, {"compress_statistics": True}),  # one block of k, in parts
        (8, 96, 320, {"compress_statistics": True}),  # a tile that is not full
        (13, 77, 192, {"compress_statistics": False}),  # rows of dy that are not aligned
        (37, 8, 128, {"compress_statistics": True, "quant_type": "fp4", "blocksize": 128}),
        (50, 530, 192, {"compress_statistics": True}),  # more than 32 rows, in several turns
    ],
)
def test_dx(arch, M, N, K, options):
    packed, state = skinny.weight(N, K, torch.float16, device="cpu", **options)
    variant = skinny_dx_variant(
        M, N, K, int(arch.removeprefix("sm_")), "fp16", state.quant_type, state.blocksize, state.nested
    )
    dy = torch.randn(M, N).half()
    skinny.assert_dx_accurate(
        skinny.run_dx(lambda one: CpuKernel(one, arch), variant, dy, packed, state), dy, packed, state
    )


def test_dx_in_bfloat16():
    packed, state = skinny.weight(96, 320, torch.bfloat16, device="cpu")
    variant = skinny_dx_variant(20, 96, 320, 80, "bf16", "nf4", 64, nested=True)
    dy = torch.randn(20, 96).bfloat16()
    dx = skinny.run_dx(lambda one: CpuKernel(one, "sm_80"), variant, dy, packed, state)
    skinny.assert_dx_accurate(dx, dy, packed, state)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
@pytest.mark.parametrize(("M", "N", "K"), [(3, 40, 192), (8, 48, 64), (29, 50, 192)])
def test_forward(arch, M, N, K):
    sm = int(arch.removeprefix("sm_"))
    packed, state = skinny.weight(N, K, torch.float16, device="cpu")
    variant = skinny_variant(M, N, K, sm, "fp16", "nf4", 64, nested=True, has_bias=True)
    x, bias, y = torch.randn(M, K).half(), torch.randn(N).half(), torch.full((M, N), torch.nan).half()
    arguments = {"x_ptr": x, "packed_ptr": packed, "bias_ptr": bias, "out_ptr": y, "M": M, "N": N}
    grid = -(-M // variant.config.columns), -(-N // variant.config.rows), 1
    CpuKernel(variant, arch)(grid, arguments | skinny.scale_arguments(state))
    skinny.assert_accurate(y, x, packed, state, bias)


def test_what_is_outside_is_an_error():
    packed, state = skinny.weight(64, 64, torch.float16, device="cpu")
    variant = skinny_dx_variant(8, 64, 64, 75, "fp16", "nf4", 64, nested=True)
    dy = torch.randn(8, 64).half()
    short = packed[:-16].clone()
    with pytest.raises(AssertionError, match="outside of the tensor"):
        skinny.run_dx(lambda one: CpuKernel(one, "sm_75"), variant, dy, short, state)
