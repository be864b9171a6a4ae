"""The fused products for few rows without a GPU: their compiled code, executed on the CPU, against float64."""

from __future__ import annotations

import pytest
import skinny
import torch
from exact import assert_bits_equal
from ptx_cpu import CpuKernel

import qkernels
from qkernels.tuning.skinny import SkinnyConfig, programs
from qkernels.tuning.skinny_dx import skinny_dx_candidates
from qkernels.variants import skinny_dx_variant, skinny_variant, sum_variant

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


def forward(arch, x, packed, state, bias):
    """x W^T by the compiled variant that would be launched."""
    (M, K), N = x.shape, state.shape[0]
    kind = "bf16" if x.dtype == torch.bfloat16 else "fp16", state.quant_type, state.blocksize, state.nested
    variant = skinny_variant(M, N, K, int(arch.removeprefix("sm_")), *kind, bias is not None)
    x = skinny.arranged(lambda one: CpuKernel(one, arch), variant, x)
    y = x.new_full((M, N), torch.nan)
    arguments = {"x_ptr": x, "packed_ptr": packed, "bias_ptr": bias, "out_ptr": y, "M": M, "N": N}
    grid = -(-M // variant.config.columns), programs(N, K, state.blocksize, variant.config.rows), 1
    CpuKernel(variant, arch)(grid, arguments | skinny.scale_arguments(state))
    return y


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
@pytest.mark.parametrize(("M", "N", "K"), [(3, 40, 192), (8, 48, 64), (29, 50, 192)])
def test_forward(arch, M, N, K):
    packed, state = skinny.weight(N, K, torch.float16, device="cpu")
    x, bias = torch.randn(M, K).half(), torch.randn(N).half()
    skinny.assert_accurate(forward(arch, x, packed, state, bias), x, packed, state, bias)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("M", "K", "shape"), [(29, 640, (2, 2, 4, 4)), (40, 704, (2, 4, 8, 3)), (17, 384, (1, 1, 4, 2))]
)
def test_forward_in_parts_of_k(M, K, shape, has_bias):
    N, shared = 128, 65536
    packed, state = skinny.weight(N, K, torch.float16, device="cpu")
    tiles, row_warps, num_warps, parts = shape
    config = SkinnyConfig(32, tiles, row_warps, num_warps, False, False, True, True, parts, shared)
    variant = skinny_variant(M, N, K, 90, "fp16", "nf4", 64, True, has_bias, config=config)
    x, bias, y = torch.randn(M, K).half(), torch.randn(N).half(), torch.full((M, N), torch.nan).half()
    columns, rows = -(-M // config.columns), N // config.rows
    sums = torch.full((columns * rows * parts * config.rows * config.columns,), torch.nan)
    arguments = {"x_ptr": x, "packed_ptr": packed, "out_ptr": sums, "M": M, "N": N} | skinny.scale_arguments(state)
    CpuKernel(variant, "sm_90")((columns, rows, parts), arguments | ({"bias_ptr": bias} if has_bias else {}))
    adding = CpuKernel(sum_variant(config), "sm_90")
    sizes = {"M": M, "R": N, "columns_of_tiles": columns}
    adding((columns * rows, config.columns, 1), {"parts_ptr": sums, "out_ptr": y, **sizes})
    skinny.assert_accurate(y, x, packed, state, bias if has_bias else None)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("M", "N", "K", "options"),
    [
        (3, 40, 144, {}),  # four kinds of rows
        (11, 150, 140, {}),  # sixteen, of which some have a row more; x in eights of bytes
        (2, 35, 74, {"compress_statistics": False}),  # x in fours of bytes; W's last bytes are no 16
        (9, 77, 137, {}),  # rows that begin in the middle of a byte, and more kinds than the last tile has rows
        (4, 16, 333, {"blocksize": 4096, "quant_type": "fp4"}),  # blocks of several rows
        (2, 40, 192, {"blocksize": 32}),  # whole rows of blocks that are small
        (37, 33, 84, {"blocksize": 32}),  # and neither
    ],
)
def test_forward_of_rows_that_are_not_whole_blocks(arch, M, N, K, options):
    packed, state = skinny.weight(N, K, torch.float16, device="cpu", **options)
    x, bias = torch.randn(M, K).half(), torch.randn(N).half()
    skinny.assert_accurate(forward(arch, x, packed, state, bias), x, packed, state, bias)


@pytest.mark.parametrize("M", [2, 5])
@pytest.mark.parametrize("blocksize", [32, 64])
def test_a_scale_that_is_nan_spoils_the_rows_of_its_block_and_no_others(M, blocksize):
    N, K = 33, 84
    packed, state = skinny.weight(N, K, torch.bfloat16, device="cpu", blocksize=blocksize, compress_statistics=False)
    x = torch.randn(M, K).bfloat16()
    expected = forward("sm_80", x, packed, state, None)
    for block in (0, 5, 6, len(state.absmax) - 1):
        scale = state.absmax[block].item()
        state.absmax[block] = torch.nan
        y = forward("sm_80", x, packed, state, None)
        state.absmax[block] = scale
        rows = torch.arange(N * K).view(N, K) // blocksize
        spoilt = (rows == block).any(1)
        assert y[:, spoilt].isnan().all()
        assert_bits_equal(y[:, ~spoilt], expected[:, ~spoilt])


def test_what_is_outside_is_an_error():
    packed, state = skinny.weight(64, 64, torch.float16, device="cpu")
    variant = skinny_dx_variant(8, 64, 64, 75, "fp16", "nf4", 64, nested=True)
    dy = torch.randn(8, 64).half()
    short = packed[:-16].clone()
    with pytest.raises(AssertionError, match="outside of the tensor"):
        skinny.run_dx(lambda one: CpuKernel(one, "sm_75"), variant, dy, short, state)


# (N, K, blocksize) where rows are not whole blocks of 64: a lane's bytes lie in one block; blocks end every eight, four
# and two k; rows begin within bytes, and W ends within a word; W's last byte is half used; a block is longer than W.
RAGGED = [
    (40, 208, 64),
    (24, 104, 64),
    (24, 212, 64),
    (16, 90, 32),
    (21, 137, 64),
    (33, 35, 32),
    (19, 66, 4096),
    (16, 64, 32),
]


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize(("N", "K", "blocksize"), RAGGED)
@pytest.mark.parametrize(("M", "width"), [(3, 8), (3, 16), (20, 4)])
def test_ragged_dx(arch, M, width, N, K, blocksize):
    """To the bit where a row of dy takes one row of W: scales are far apart, and two are NaN, one of them the last."""
    packed, state = skinny.weight(N, K, torch.float16, device="cpu", blocksize=blocksize, compress_statistics=False)
    state.absmax *= torch.exp2(torch.randint(-6, 6, state.absmax.shape).float())
    if blocksize < K:  # else it would spoil all
        state.absmax[[len(state.absmax) // 2, -1]] = torch.nan
    decoded = qkernels.dequantize_4bit(packed, state)
    rows = torch.cat([torch.arange(N - 2, N), torch.randint(N, (M - 2,))])
    dy = torch.nn.functional.one_hot(rows, N).half()
    sm = int(arch.removeprefix("sm_"))
    config = next(one for one in skinny_dx_candidates(M, N, K, sm, blocksize) if one.bytes == width)
    variant = skinny_dx_variant(M, N, K, sm, "fp16", "nf4", blocksize, False, config)
    dx = skinny.run_dx(lambda one: CpuKernel(one, arch), variant, dy, packed, state)
    # Whatever a row of dy takes, a column with a NaN has one: 0 times NaN.
    assert_bits_equal(dx.nan_to_num(7), (dy @ decoded).nan_to_num(7))


@pytest.mark.parametrize(
    ("M", "N", "K", "blocksize", "dtype"),
    [(9, 77, 60, 64, "bf16"), (50, 530, 212, 32, "fp16"), (5, 300, 128, 32, "fp16")],
)
def test_ragged_dx_of_nested_scales(M, N, K, blocksize, dtype):
    packed, state = skinny.weight(N, K, DTYPES[dtype], device="cpu", blocksize=blocksize)
    dy = torch.randn(M, N).to(DTYPES[dtype])
    variant = skinny_dx_variant(M, N, K, 80, dtype, "nf4", blocksize, nested=True)
    dx = skinny.run_dx(lambda one: CpuKernel(one, "sm_80"), variant, dy, packed, state)
    skinny.assert_dx_accurate(dx, dy, packed, state)
