"""The fused product for few rows of x on a GPU: accuracy, sizes, edges, and the ways in which torch runs it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exact import assert_bits_equal
from skinny import assert_accurate, assert_torch_runs_it, exact_product, weight

import qkernels
from qkernels.dispatch import DEQUANTIZE, SKINNY
from qkernels.kernels.matmul_skinny import matmul_skinny_triton
from qkernels.known import scales_of
from qkernels.tuning.skinny import skinny_candidates, skinny_config, skinny_limit

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16]


def sm() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def fused(x, packed, state, bias=None, config=None):
    """The kernel's own result, into an output whose every element is NaN until it is written."""
    (N, K), M = state.shape, x.numel() // state.shape[1]
    scales, nested = scales_of(state)
    out = torch.full((*x.shape[:-1], N), torch.nan, device="cuda", dtype=x.dtype)
    config = config or skinny_config(M, N, K, sm(), state.blocksize)
    matmul_skinny_triton(x, packed, scales, state.blocksize, state.quant_type, bias, out, config, *nested)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(4096, 4096), (333, 1088), (16, 64), (1001, 11008), (97, 16448)])
def test_every_number_of_rows(new_inputs, shape, nested, dtype):
    packed, state = weight(*shape, dtype, compress_statistics=nested)
    bias = torch.randn(shape[0], device="cuda", dtype=dtype)
    for M in range(1, skinny_limit(sm()) + 1):
        x = torch.randn(M, shape[1], device="cuda", dtype=dtype)
        assert_accurate(fused(x, packed, state, bias), x, packed, state, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 5, 13, 32])
def test_every_number_of_columns(new_inputs, M, dtype):
    for N in [*range(16, 70), 95, 96, 97, 127, 129, 767, 769]:
        packed, state = weight(N, 192, dtype)
        x = torch.randn(M, 192, device="cuda", dtype=dtype)
        assert_accurate(fused(x, packed, state), x, packed, state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 8, 16])
def test_every_depth(new_inputs, M, dtype):
    for K in range(64, 64 * 70, 64):
        packed, state = weight(48, K, dtype)
        x = torch.randn(M, K, device="cuda", dtype=dtype)
        assert_accurate(fused(x, packed, state), x, packed, state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(128, 8192), (256, 8256), (4096, 11008), (4096, 16384)])
def test_parts_of_k(new_inputs, shape, nested, dtype):
    packed, state = weight(*shape, dtype, compress_statistics=nested)
    for M in (17, 29, 32, 40):
        in_parts = [config for config in skinny_candidates(M, *shape, sm()) if config.parts > 1]
        assert in_parts
        x = torch.randn(M, shape[1], device="cuda", dtype=dtype)
        bias = torch.randn(shape[0], device="cuda", dtype=dtype) if M % 2 else None
        for config in in_parts:
            y = fused(x, packed, state, bias, config)
            assert_accurate(y, x, packed, state, bias)
            assert_bits_equal(fused(x, packed, state, bias, config), y)


@pytest.mark.parametrize("quant_type", qkernels.QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("M", [2, 11])
def test_blocks_and_types(new_inputs, M, blocksize, nested, quant_type):
    for dtype in DTYPES:
        for shape in ((96, 4096), (50, 320)):
            options = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": nested}
            packed, state = weight(*shape, dtype, **options)
            x = torch.randn(M, shape[1], device="cuda", dtype=dtype)
            assert_accurate(fused(x, packed, state), x, packed, state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "blocksize"), [(1152, 4304, 64), (1280, 3420, 64), (4096, 4096, 32), (333, 1037, 128), (20, 16446, 32)]
)
def test_rows_that_are_not_whole_blocks(new_inputs, N, K, blocksize, nested, dtype):
    packed, state = weight(N, K, dtype, compress_statistics=nested, blocksize=blocksize)
    bias = torch.randn(N, device="cuda", dtype=dtype)
    for M in (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 64, 100, 128):
        x = torch.randn(M, K, device="cuda", dtype=dtype)
        assert_accurate(fused(x, packed, state, bias), x, packed, state, bias)


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("M", [2, 13])
def test_every_depth_of_rows_that_are_not_whole_blocks(new_inputs, M, blocksize):
    for K in (*range(65, 97), *range(1001, 1065, 7), 2084, 4097):
        for N in (16, 17, 75, 200):  # fewer rows than kinds of rows, and more; last bytes that are 16 and that are not
            packed, state = weight(N, K, torch.float16, blocksize=blocksize)
            x = torch.randn(M, K, device="cuda", dtype=torch.float16)
            assert_accurate(fused(x, packed, state), x, packed, state)


@pytest.mark.parametrize("quant_type", qkernels.QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", qkernels.BLOCKSIZES)
def test_blocks_across_rows(new_inputs, blocksize, nested, quant_type):
    for dtype in DTYPES:
        for N, K in ((96, 4080), (50, 300)):
            options = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": nested}
            packed, state = weight(N, K, dtype, spread=10, **options)
            for M in (2, 11):
                x = torch.randn(M, K, device="cuda", dtype=dtype)
                assert_accurate(fused(x, packed, state), x, packed, state)


@pytest.mark.parametrize("M", [2, 5])
@pytest.mark.parametrize("blocksize", [32, 64])
def test_a_scale_that_is_nan_spoils_the_rows_of_its_block_and_no_others(M, blocksize):
    N, K = 300, 1044
    packed, state = weight(N, K, torch.float16, blocksize=blocksize, compress_statistics=False)
    x = torch.randn(M, K, device="cuda", dtype=torch.float16)
    expected = fused(x, packed, state)
    blocks = torch.arange(N * K, device="cuda").view(N, K) // blocksize
    for value in (torch.nan, torch.inf):
        for block in (0, K // blocksize, 100, len(state.absmax) - 1):
            scale = state.absmax[block].item()
            state.absmax[block] = value
            y = fused(x, packed, state)
            state.absmax[block] = scale
            spoilt = (blocks == block).any(1)
            assert not y[:, spoilt].isfinite().any()
            assert_bits_equal(y[:, ~spoilt], expected[:, ~spoilt])


def test_rows_that_are_not_whole_blocks_as_torch_runs_them():
    for M, N, K, blocksize in ((4, 96, 4304, 64), (16, 100, 1001, 64), (30, 96, 4300, 64), (4, 96, 1024, 32)):
        packed, state = weight(N, K, torch.float16, blocksize=blocksize)
        assert qkernels.explain(M, N, K, blocksize=blocksize).implementation == SKINNY
        x = torch.randn(M, K, device="cuda", dtype=torch.float16)
        expected = fused(x, packed, state)
        assert_torch_runs_it(lambda x: qkernels.matmul_4bit(x, packed, state), x, expected)  # noqa: B023
        shifted = x.new_empty(M * K + 1)[1:].view(M, K).copy_(x)
        assert_bits_equal(qkernels.matmul_4bit(shifted, packed, state), expected)


def test_products_one_after_the_other_that_each_arrange_x(new_inputs):
    """What one arranges lies in memory that the next writes to, and begins while the one before it ends."""
    packed, state = weight(4100, 4100, torch.float16)
    x = torch.randn(24, 4100, device="cuda", dtype=torch.float16)

    def chain(between):
        y = x
        for _ in range(8):
            y = qkernels.matmul_4bit(y, packed, state)
            between()
        return y

    expected = chain(torch.cuda.synchronize)
    assert expected.isfinite().all()
    for _ in range(20):
        assert_bits_equal(chain(lambda: None), expected)


@pytest.mark.parametrize("M", [1, 7, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_a_thousandfold_apart(new_inputs, dtype, M):
    for nested in (False, True):
        packed, state = weight(512, 4096, dtype, spread=10, compress_statistics=nested)
        x = torch.randn(M, 4096, device="cuda", dtype=dtype)
        assert_accurate(fused(x, packed, state), x, packed, state)


@pytest.mark.parametrize("M", [1, 16])
def test_at_the_edge_of_float16(M):
    packed, state = weight(64, 4096, torch.float16, compress_statistics=False)
    x = torch.randn(M, 4096, device="cuda", dtype=torch.float16)
    exact = exact_product(x, packed, state)
    # Scales that put the largest result just inside and just outside of float16; sums are float32 and do not overflow.
    for largest in (65_400.0, 65_600.0):
        state.absmax *= largest / exact.abs().max()
        exact = exact_product(x, packed, state)
        assert_bits_equal(fused(x, packed, state).isinf(), exact.abs() >= 65_520)


@pytest.mark.parametrize("M", [1, 9])
def test_nan_and_inf_stay_in_their_row(M):
    packed, state = weight(100, 256, torch.float16)
    for value in (torch.nan, torch.inf):
        x = torch.randn(M, 256, device="cuda", dtype=torch.float16)
        expected = fused(x, packed, state)
        x[M - 1, 200] = value
        y = fused(x, packed, state)
        assert not y[M - 1].isfinite().any()
        assert_bits_equal(y[: M - 1], expected[: M - 1])


def test_equal_inputs_give_equal_bits():
    packed, state = weight(4096, 4096, torch.float16)
    for M in (1, 8, 32):
        x = torch.randn(M, 4096, device="cuda", dtype=torch.float16)
        expected = fused(x, packed, state)
        for _ in range(20):
            assert_bits_equal(fused(x, packed, state), expected)


def test_a_row_does_not_depend_on_how_many_there_are_beside_it():
    packed, state = weight(512, 4096, torch.float16)
    x = torch.randn(8, 4096, device="cuda", dtype=torch.float16)
    assert_bits_equal(fused(x[:5], packed, state), fused(x, packed, state)[:5])


def test_the_operator_takes_the_kernel_that_explain_names():
    packed, state = weight(96, 4096, torch.float16)
    for M, expected in ((1, SKINNY), (2048, DEQUANTIZE)):
        assert qkernels.explain(M, 96, 4096).implementation == expected
    x = torch.randn(3, 2, 4096, device="cuda", dtype=torch.float16)
    assert_bits_equal(qkernels.matmul_4bit(x, packed, state), fused(x, packed, state))
    large = torch.randn(2048, 4096, device="cuda", dtype=torch.float16)
    assert_bits_equal(
        qkernels.matmul_4bit(large, packed, state), F.linear(large, qkernels.dequantize_4bit(packed, state))
    )


def test_what_is_not_aligned_or_contiguous():
    packed, state = weight(96, 256, torch.float16)
    x = torch.randn(3, 257, device="cuda", dtype=torch.float16)
    expected = fused(x[:, 1:].contiguous(), packed, state)
    assert_bits_equal(qkernels.matmul_4bit(x[:, 1:], packed, state), expected)
    shifted = x.new_empty(3 * 256 + 1)[1:].view(3, 256).copy_(x[:, 1:])
    assert shifted.data_ptr() % 16
    assert_bits_equal(qkernels.matmul_4bit(shifted, packed, state), expected)
    moved = packed.new_empty(packed.numel() + 8)[8:].view(-1, 1).copy_(packed)
    assert moved.data_ptr() % 16
    assert_accurate(qkernels.matmul_4bit(shifted, moved, state), shifted, packed, state)


@pytest.mark.parametrize("storage", qkernels.QUANT_STORAGES)
def test_storage_dtypes(storage):
    packed, state = weight(96, 256, torch.float16, quant_storage=storage)
    x = torch.randn(2, 256, device="cuda", dtype=torch.float16)
    assert_accurate(qkernels.matmul_4bit(x, packed, state), x, packed, state)


def test_streams_graphs_compilation_and_autocast():
    packed, state = weight(512, 1024, torch.float16)
    x = torch.randn(4, 1024, device="cuda", dtype=torch.float16)
    expected = fused(x, packed, state)
    assert_torch_runs_it(lambda x: qkernels.matmul_4bit(x, packed, state), x, expected)
    with torch.autocast("cuda", torch.float16):
        assert_bits_equal(qkernels.matmul_4bit(x.float(), packed, state), expected)


def test_gradients():
    packed, state = weight(512, 1024, torch.float16)
    x = torch.randn(4, 1024, device="cuda", dtype=torch.float16, requires_grad=True)
    grad = torch.randn(4, 512, device="cuda", dtype=torch.float16)
    (ours,) = torch.autograd.grad(qkernels.matmul_4bit(x, packed, state), x, grad)
    torch.testing.assert_close(ours, grad @ qkernels.dequantize_4bit(packed, state))
