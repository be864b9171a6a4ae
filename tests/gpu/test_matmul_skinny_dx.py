"""The backward product for few rows of dy on a GPU: accuracy, sizes, edges, and the ways in which torch runs it."""

from __future__ import annotations

import pytest
import torch
from exact import assert_bits_equal
from skinny import assert_dx_accurate, assert_torch_runs_it, exact_weight, weight

import qkernels
from qkernels.dispatch import SKINNY
from qkernels.kernels.matmul_skinny_dx import matmul_skinny_dx_triton
from qkernels.known import scales_of
from qkernels.tuning.skinny_dx import skinny_dx_candidates, skinny_dx_config, skinny_dx_limit

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16]


def sm() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def fused(dy, packed, state, config=None):
    """The kernels' own result, into an output whose every element is NaN until it is written."""
    (N, K), M = state.shape, dy.shape[0]
    scales, nested = scales_of(state)
    dx = torch.full((M, K), torch.nan, device="cuda", dtype=dy.dtype)
    config = config or skinny_dx_config(M, N, K, sm(), state.blocksize)
    matmul_skinny_dx_triton(dy, packed, scales, state.blocksize, state.quant_type, dx, config, *nested)
    return dx


def gradient(M: int, N: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(M, N, device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(4096, 4096), (333, 1088), (8, 64), (11008, 192), (97, 16448)])
def test_every_number_of_rows(new_inputs, shape, nested, dtype):
    packed, state = weight(*shape, dtype, compress_statistics=nested)
    for M in range(1, skinny_dx_limit(sm(), *shape, 64) + 1):
        dy = gradient(M, shape[0], dtype)
        assert_dx_accurate(fused(dy, packed, state), dy, packed, state)


# (N, K, blocksize) where rows are not whole blocks of 64: vision towers' and Bloom's, rows that begin on any byte and
# within one, blocks longer than W.
RAGGED = [(1152, 4304, 64), (1280, 3420, 64), (4096, 1024, 32), (264, 1030, 64), (333, 1001, 128), (97, 342, 4096)]


@pytest.mark.parametrize(("nested", "dtype"), [(True, torch.float16), (False, torch.bfloat16)])
@pytest.mark.parametrize(("N", "K", "blocksize"), RAGGED)
def test_ragged_rows(new_inputs, N, K, blocksize, nested, dtype):
    packed, state = weight(N, K, dtype, blocksize=blocksize, compress_statistics=nested)
    for M in (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 50, 64, 100):
        dy = gradient(M, N, dtype)
        assert_dx_accurate(fused(dy, packed, state), dy, packed, state)


@pytest.mark.parametrize("K", [8, 9, 31, 33, 36, 60, 66, 104, 127, 513, 1020])
def test_ragged_rows_of_other_lengths(new_inputs, K):
    for N, blocksize in ((8, 32), (40, 128), (77, 64)):
        packed, state = weight(N, K, torch.float16, blocksize=blocksize)
        dy = gradient(9, N, torch.float16)
        assert_dx_accurate(fused(dy, packed, state), dy, packed, state)


@pytest.mark.parametrize("M", [7, 31])
def test_every_configuration_of_ragged_rows(new_inputs, M):
    N, K = 2056, 1020
    packed, state = weight(N, K, torch.float16)
    dy = gradient(M, N, torch.float16)
    for config in skinny_dx_candidates(M, N, K, sm(), 64):
        assert_dx_accurate(fused(dy, packed, state, config), dy, packed, state)


@pytest.mark.parametrize(("M", "dtype"), [(3, torch.float16), (64, torch.bfloat16)])
@pytest.mark.parametrize(("N", "K", "blocksize"), RAGGED)
def test_ragged_weights_are_what_dequantize_4bit_gives(N, K, blocksize, M, dtype):
    """To the bit where a row of dy takes one row of W, by scales far apart; two are NaN, and stay in their blocks."""
    packed, state = weight(N, K, dtype, blocksize=blocksize, compress_statistics=False)
    state.absmax *= torch.exp2(torch.randint(-8, 8, state.absmax.shape, device="cuda").float())
    if blocksize < K:  # else it would spoil all
        state.absmax[[len(state.absmax) // 2, -1]] = torch.nan
    decoded = qkernels.dequantize_4bit(packed, state)
    rows = torch.cat([torch.arange(N - 2, N), torch.randint(N, (M - 2,))]).cuda()
    dx = fused(torch.nn.functional.one_hot(rows, N).to(dtype), packed, state)
    nan = decoded.isnan().any(0)  # 0 times NaN too
    assert torch.equal(dx.isnan(), nan.expand(M, K))
    assert_bits_equal(dx[:, ~nan], decoded[rows][:, ~nan])


def test_ragged_rows_by_the_operator_and_in_a_graph():
    packed, state = weight(1280, 3420, torch.float16)
    assert qkernels.explain(6, 1280, 3420, backward=True).implementation == SKINNY
    dy = gradient(4, 1280, torch.float16)
    expected = fused(dy, packed, state)
    assert_torch_runs_it(lambda dy: qkernels.matmul_4bit_dx(dy, packed, state), dy, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 13, 32])
def test_every_length_of_the_contraction(new_inputs, M, dtype):
    for N in [*range(8, 70), 95, 96, 97, 127, 129, 1023, 1025]:
        packed, state = weight(N, 192, dtype)
        dy = gradient(M, N, dtype)
        assert_dx_accurate(fused(dy, packed, state), dy, packed, state)


@pytest.mark.parametrize("M", [1, 8, 16, 32])
def test_every_number_of_columns(new_inputs, M):
    for K in range(64, 64 * 20, 64):
        packed, state = weight(200, K, torch.float16)
        dy = gradient(M, 200, torch.float16)
        assert_dx_accurate(fused(dy, packed, state), dy, packed, state)


@pytest.mark.parametrize("share", range(6))
@pytest.mark.parametrize("M", [7, 16, 31])
def test_every_configuration(new_inputs, M, share):
    N, K = 2056, 4160
    packed, state = weight(N, K, torch.float16)
    dy = gradient(M, N, torch.float16)
    for config in skinny_dx_candidates(M, N, K, sm())[share::6]:
        assert_dx_accurate(fused(dy, packed, state, config), dy, packed, state)


@pytest.mark.parametrize("quant_type", qkernels.QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128, 512, 4096])
@pytest.mark.parametrize("M", [2, 11])
def test_blocks_and_types(new_inputs, M, blocksize, nested, quant_type):
    for dtype in DTYPES:
        for shape in ((96, 4096), (50, 320)):
            options = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": nested}
            packed, state = weight(*shape, dtype, **options)
            dy = gradient(M, shape[0], dtype)
            assert_dx_accurate(fused(dy, packed, state), dy, packed, state)


@pytest.mark.parametrize("M", [1, 7, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_a_thousandfold_apart_and_small_gradients(new_inputs, dtype, M):
    for nested in (False, True):
        packed, state = weight(4096, 512, dtype, spread=10, compress_statistics=nested)
        for size in (1.0, 2.0**-12):
            dy = (size * gradient(M, 4096, torch.float32)).to(dtype)
            assert_dx_accurate(fused(dy, packed, state), dy, packed, state)


@pytest.mark.parametrize("M", [1, 16])
def test_at_the_edge_of_float16(M):
    packed, state = weight(4096, 64, torch.float16, compress_statistics=False)
    dy = gradient(M, 4096, torch.float16)
    decoded = exact_weight(*(packed, state)).half().double()
    # Gradients that put the largest result just inside and just outside of float16; sums are float32 and do not
    # overflow.
    for largest in (65_400.0, 65_600.0):
        near = (dy.double() * (largest / (dy.double() @ decoded).abs().max())).half()
        exact = near.double() @ decoded
        sure = (exact.abs() - 65_520).abs() > 16
        assert_bits_equal(fused(near, packed, state).isinf()[sure], (exact.abs() >= 65_520)[sure])


@pytest.mark.parametrize("M", [1, 9])
def test_nan_and_inf_stay_in_their_row(M):
    packed, state = weight(100, 256, torch.float16)
    for value in (torch.nan, torch.inf):
        dy = gradient(M, 100, torch.float16)
        expected = fused(dy, packed, state)
        dy[M - 1, 77] = value
        dx = fused(dy, packed, state)
        assert not dx[M - 1].isfinite().any()
        assert_bits_equal(dx[: M - 1], expected[: M - 1])


def test_the_weight_is_what_dequantize_4bit_gives():
    for dtype in DTYPES:
        packed, state = weight(96, 4096, dtype)
        # Each row of dy takes one row of W.
        for first in range(0, 96, 32):
            dy = torch.eye(96, device="cuda", dtype=dtype)[first : first + 32].contiguous()
            assert_bits_equal(fused(dy, packed, state), qkernels.dequantize_4bit(packed, state)[first : first + 32])


def test_equal_inputs_give_equal_bits():
    packed, state = weight(4096, 4096, torch.float16)
    for M in (1, 8, 32):
        dy = gradient(M, 4096, torch.float16)
        expected = fused(dy, packed, state)
        for _ in range(20):
            assert_bits_equal(fused(dy, packed, state), expected)


def test_the_operator_takes_the_kernel_that_explain_names():
    packed, state = weight(1024, 4096, torch.float16)
    assert qkernels.explain(6, 1024, 4096, backward=True).implementation == SKINNY
    dy = torch.randn(3, 2, 1024, device="cuda", dtype=torch.float16)
    dx = qkernels.matmul_4bit_dx(dy, packed, state)
    assert dx.shape == (3, 2, 4096)
    assert_bits_equal(dx.view(6, 4096), fused(dy.view(6, 1024), packed, state))


def test_what_is_not_aligned_or_contiguous():
    packed, state = weight(96, 256, torch.float16)
    dy = torch.randn(3, 97, device="cuda", dtype=torch.float16)
    expected = fused(dy[:, 1:].contiguous(), packed, state)
    assert_bits_equal(qkernels.matmul_4bit_dx(dy[:, 1:], packed, state), expected)
    # 8-bit scales that begin anywhere
    codes = state.absmax
    state.absmax = codes.new_empty(codes.numel() + 1)[1:].copy_(codes)
    assert state.absmax.data_ptr() % 4
    assert_bits_equal(qkernels.matmul_4bit_dx(dy[:, 1:], packed, state), expected)


@pytest.mark.parametrize("storage", qkernels.QUANT_STORAGES)
def test_storage_dtypes(storage):
    packed, state = weight(96, 256, torch.float16, quant_storage=storage)
    dy = gradient(2, 96, torch.float16)
    assert_dx_accurate(qkernels.matmul_4bit_dx(dy, packed, state), dy, packed, state)


def test_kernels_that_begin_early_wait_for_what_they_read():
    """Each product's gradient, and each weight, is written by the kernel just before it."""
    packed, state = weight(4096, 4096, torch.float16)
    dys = [gradient(8, 4096, torch.float16) for _ in range(50)]
    expected = [fused(dy, packed, state) for dy in dys]
    torch.cuda.synchronize()
    for dy, right in zip(dys, expected, strict=True):
        late = dy.neg().neg()
        moved = packed.clone()
        assert_bits_equal(qkernels.matmul_4bit_dx(late, moved, state).neg().neg(), right)
    chained = dys[0]
    for _ in range(20):
        chained = qkernels.matmul_4bit_dx(chained, packed, state)
    slow = dys[0]
    for _ in range(20):
        slow = qkernels.matmul_4bit_dx(slow, packed, state)
        torch.cuda.synchronize()
    assert_bits_equal(chained, slow)


def test_streams_graphs_and_compilation():
    packed, state = weight(1024, 512, torch.float16)
    dy = gradient(4, 1024, torch.float16)
    expected = fused(dy, packed, state)
    assert_torch_runs_it(lambda dy: qkernels.matmul_4bit_dx(dy, packed, state), dy, expected)


def test_gradients():
    packed, state = weight(512, 1024, torch.float16)
    x = torch.randn(4, 1024, device="cuda", dtype=torch.float16, requires_grad=True)
    dy = gradient(4, 512, torch.float16)
    (dx,) = torch.autograd.grad(qkernels.matmul_4bit(x, packed, state), x, dy)
    assert_bits_equal(dx, fused(dy, packed, state))
