"""The fused product on Hopper, forward and backward: accuracy, sizes, edges, and the ways in which torch runs it."""

from __future__ import annotations

import threading

import pytest
import skinny
import torch
import torch.nn.functional as F
from exact import assert_bits_equal
from skinny import assert_dx_accurate, exact_product, weight

import qkernels
from qkernels import dispatch
from qkernels.dispatch import DEQUANTIZE, WGMMA
from qkernels.kernels._flags import cleared_flags
from qkernels.kernels.matmul_wgmma import matmul_wgmma_triton
from qkernels.known import scales_of
from qkernels.tuning.wgmma import tiling, wgmma_config, wgmma_limit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs wgmma, of sm_90"
    ),
]
DTYPES = [torch.float16, torch.bfloat16]


def fused(x, packed, state, bias=None, backward=False, config=None):
    """The kernel's own result, into an output whose every element is NaN until it is written."""
    (N, K), M = state.shape, x.shape[0]
    scales, nested = scales_of(state)
    out = torch.full((M, K if backward else N), torch.nan, device="cuda", dtype=x.dtype)
    config = config or wgmma_config(M, N, K, backward)
    matmul_wgmma_triton(
        x, packed, (N, K), scales, state.blocksize, state.quant_type, bias, out, config, *nested, backward=backward
    )
    return out


def assert_accurate(y, x, packed, state, bias=None, backward=False):
    if backward:
        assert_dx_accurate(y, x, packed, state)
    else:
        skinny.assert_accurate(y, x, packed, state, bias)


def both_ways(M, N, K, dtype, **options):
    """(x, packed, state, bias, backward) for y = x W^T + b and for dx = dy W."""
    packed, state = weight(N, K, dtype, **options)
    bias = torch.randn(N, device="cuda", dtype=dtype)
    yield torch.randn(M, K, device="cuda", dtype=dtype), packed, state, bias, False
    if N % 8 == 0:
        yield torch.randn(M, N, device="cuda", dtype=dtype), packed, state, None, True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(1024, 1024), (333, 1088), (8, 64), (1000, 4416), (4096, 320)])
def test_shapes(new_inputs, shape, nested, dtype):
    for M in (1, 16, 63, 64, 65, 127, 128, 129, 255, 257, 500, 512):
        for x, packed, state, bias, backward in both_ways(M, *shape, dtype, compress_statistics=nested):
            y = fused(x, packed, state, bias, backward)
            assert_accurate(y, x, packed, state, bias, backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 128, 256])
def test_every_tiling_whole_and_split(new_inputs, columns, dtype):
    for M, N, K in ((200, 456, 1472), (300, 1000, 4416), (64, 128, 64)):
        for x, packed, state, bias, backward in both_ways(M, N, K, dtype):
            R, C = (K, N) if backward else (N, K)
            tiles = -(-M // columns) * -(-R // 128)
            # A program with several tiles, one each, tiles that lie with two, with three and with many.
            for programs in (1, 3, tiles, tiles + 1, 2 * tiles + 1, 132):
                config = tiling(M, R, C, columns, programs)
                y = fused(x, packed, state, bias, backward, config)
                assert_accurate(y, x, packed, state, bias, backward)


@pytest.mark.parametrize("quant_type", qkernels.QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_blocks_and_types(new_inputs, blocksize, nested, quant_type):
    options = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": nested}
    for shape in ((96, 4096), (200, 320)):
        for x, packed, state, bias, backward in both_ways(70, *shape, torch.float16, **options):
            y = fused(x, packed, state, bias, backward)
            assert_accurate(y, x, packed, state, bias, backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 128, 256])
def test_blocks_of_32(new_inputs, columns, dtype):
    # Rows that end in half a step, tiles whole and split, scales so far apart that a wrong one is seen.
    for M, N, K in ((200, 456, 1504), (70, 1000, 4384), (300, 128, 160)):
        for nested in (False, True):
            options = {"blocksize": 32, "compress_statistics": nested, "spread": 10}
            for x, packed, state, bias, backward in both_ways(M, N, K, dtype, **options):
                R, C = (K, N) if backward else (N, K)
                for programs in (1, 5, 132):
                    config = tiling(M, R, C, columns, programs)
                    y = fused(x, packed, state, bias, backward, config)
                    assert_accurate(y, x, packed, state, bias, backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [64, 128, 256])
def test_scales_a_thousandfold_apart(new_inputs, dtype, M):
    for nested in (False, True):
        for x, packed, state, bias, backward in both_ways(M, 512, 1024, dtype, spread=10, compress_statistics=nested):
            y = fused(x, packed, state, bias, backward)
            assert_accurate(y, x, packed, state, bias, backward)


def test_at_the_edge_of_float16():
    packed, state = weight(64, 4096, torch.float16, compress_statistics=False)
    x = torch.randn(80, 4096, device="cuda", dtype=torch.float16)
    exact = exact_product(x, packed, state)
    # Scales that put the largest result just inside and just outside of float16; sums are float32 and do not overflow.
    for largest in (65_400.0, 65_600.0):
        state.absmax *= largest / exact.abs().max()
        exact = exact_product(x, packed, state)
        assert_bits_equal(fused(x, packed, state).isinf(), exact.abs() >= 65_520)


def test_the_weight_is_that_of_dequantize_4bit_or_its_neighbour():
    for dtype, often in ((torch.float16, 0.03), (torch.bfloat16, 0.005)):
        packed, state = weight(456, 512, dtype)
        decoded = qkernels.dequantize_4bit(packed, state).to(dtype)
        for backward, n in ((False, 512), (True, 456)):
            identity = torch.eye(n, device="cuda", dtype=dtype)
            product = fused(identity, packed, state, backward=backward)
            product = product if backward else product.T.contiguous()
            apart = (product.view(torch.int16).int() - decoded.view(torch.int16).int()).abs()
            assert apart.max() <= 1
            assert 0 < apart.float().mean() < often


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64])
def test_a_share_while_the_rest_is_decoded(new_inputs, blocksize, dtype):
    for M, N, K, backward in ((2048, 11008, 320, False), (2000, 328, 11008, True), (2048, 12288, 192, False)):
        assert dispatch.fused_share(dispatch.Product(M, N, K, dtype, (9, 0), blocksize, backward))
        packed, state = weight(N, K, dtype, blocksize=blocksize)
        x = torch.randn(M, N if backward else K, device="cuda", dtype=dtype)
        product = qkernels.matmul_4bit_dx if backward else qkernels.matmul_4bit
        assert_accurate(product(x, packed, state), x, packed, state, backward=backward)
        if not backward:
            bias = torch.randn(N, device="cuda", dtype=dtype)
            assert_accurate(qkernels.matmul_4bit(x, packed, state, bias=bias), x, packed, state, bias)


def test_a_share_begins_and_ends_with_the_product(new_inputs):
    """What it reads is written just before, and what it writes is read at once, in memory that others had."""
    wide, tall = weight(11008, 512, torch.float16), weight(512, 11008, torch.float16)

    def chain(between):
        x, kept = first, []
        for _ in range(4):
            for product, w in (
                (qkernels.matmul_4bit, wide),
                (qkernels.matmul_4bit, tall),
                (qkernels.matmul_4bit_dx, tall),
                (qkernels.matmul_4bit_dx, wide),
            ):
                x = product(x, w[0].clone(), w[1])
                between()
                x = x / x.std()
            kept.append(x)
        return kept

    first = torch.randn(2048, 512, device="cuda", dtype=torch.float16)
    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(lambda: None)
    for _ in range(3):
        graph.replay()
        for found in (chain(lambda: None), captured):
            for ours, right in zip(found, expected, strict=True):
                assert_bits_equal(ours, right)


@pytest.mark.parametrize("M", [64, 300])
def test_nan_and_inf_stay_in_their_row(M):
    packed, state = weight(128, 256, torch.float16)
    for backward in (False, True):
        for value in (torch.nan, torch.inf):
            x = torch.randn(M, 128 if backward else 256, device="cuda", dtype=torch.float16)
            expected = fused(x, packed, state, backward=backward)
            x[M - 1, 100] = value
            y = fused(x, packed, state, backward=backward)
            assert not y[M - 1].isfinite().all()
            assert_bits_equal(y[: M - 1], expected[: M - 1])


@pytest.mark.parametrize("M", [64, 128, 256, 512])
def test_equal_inputs_give_equal_bits(M):
    packed, state = weight(4096, 4096, torch.float16)
    for backward in (False, True):
        x = torch.randn(M, 4096, device="cuda", dtype=torch.float16)
        expected = fused(x, packed, state, backward=backward)
        for _ in range(20):
            assert_bits_equal(fused(x, packed, state, backward=backward), expected)


def test_the_public_function_takes_it_and_differentiates_it():
    packed, state = weight(4096, 4096, torch.float16)
    for shape in ((96,), (2, 3, 33)):
        x = torch.randn(*shape, 4096, device="cuda", dtype=torch.float16, requires_grad=True)
        M = x.numel() // 4096
        assert qkernels.explain(M, 4096, 4096, x.dtype).implementation == WGMMA
        assert qkernels.explain(M, 4096, 4096, x.dtype, backward=True).implementation == WGMMA
        bias = torch.randn(4096, device="cuda", dtype=torch.float16)
        y = qkernels.matmul_4bit(x, packed, state, bias=bias)
        assert_bits_equal(y.view(M, -1), fused(x.detach().view(M, -1), packed, state, bias))
        dy = torch.randn_like(y)
        y.backward(dy)
        assert_bits_equal(x.grad.view(M, -1), fused(dy.view(M, -1), packed, state, backward=True))


def test_every_flag_is_taken_down_and_graphs_have_flags_of_their_own():
    packed, state = weight(4096, 4096, torch.float16)
    x = torch.randn(300, 4096, device="cuda", dtype=torch.float16)
    config = tiling(300, 4096, 4096, 256, 132)
    assert config.split
    expected = fused(x, packed, state, config=config)
    of_stream = cleared_flags(x.device)
    assert not of_stream.any()
    graphs, results, of_graphs = [torch.cuda.CUDAGraph() for _ in range(2)], [], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            results.append(fused(x, packed, state, config=config))
            of_graphs.append(cleared_flags(x.device))
    assert len({flags.data_ptr() for flags in (of_stream, *of_graphs)}) == 3
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):  # at the same time, and beside launches outside of graphs
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        assert_bits_equal(fused(x, packed, state, config=config), expected)
    torch.cuda.synchronize()
    for result in results:
        assert_bits_equal(result, expected)


def test_it_may_be_the_first_that_a_thread_does():
    packed, state = weight(4096, 4096, torch.float16)
    x = torch.randn(96, 4096, device="cuda", dtype=torch.float16)
    expected, found = fused(x, packed, state), []
    torch.empty_like(expected)  # so that the thread need not ask CUDA for memory
    thread = threading.Thread(target=lambda: found.append(fused(x, packed, state)))
    thread.start()
    thread.join()
    assert_bits_equal(found[0], expected)


def test_what_is_not_contiguous_or_aligned():
    packed, state = weight(256, 512, torch.float16)
    many = torch.randn(100, 1024, device="cuda", dtype=torch.float16)
    flat = torch.randn(100 * 512 + 1, device="cuda", dtype=torch.float16)
    for x in (many[:, ::2], many[:, 3:515], flat[1:].view(100, 512), many.T[:512].T):
        assert_bits_equal(qkernels.matmul_4bit(x, packed, state), fused(x.contiguous().clone(), packed, state))


def test_what_it_refuses_is_decoded_apart(monkeypatch):
    packed, state = weight(333, 1088, torch.float16)
    assert qkernels.explain(100, 333, 1088, backward=True).implementation == DEQUANTIZE
    x = torch.randn(100, 1088, device="cuda", dtype=torch.float16, requires_grad=True)
    y = qkernels.matmul_4bit(x, packed, state)
    y.backward(torch.ones_like(y))
    decoded = qkernels.dequantize_4bit(packed, state)
    assert_bits_equal(x.grad, torch.ones_like(y) @ decoded)
    many = torch.randn(wgmma_limit(4096, 4096) + 1, 4096, device="cuda", dtype=torch.float16)
    packed, state = weight(4096, 4096, torch.float16)
    expected = F.linear(many, qkernels.dequantize_4bit(packed, state))
    assert_bits_equal(qkernels.matmul_4bit(many, packed, state), expected)


@pytest.mark.parametrize("M", [96, wgmma_limit(4096, 4096)])
def test_graphs_streams_and_compilation(M):
    packed, state = weight(4096, 4096, torch.bfloat16)
    x = torch.randn(M, 4096, device="cuda", dtype=torch.bfloat16)
    expected = qkernels.matmul_4bit(x, packed, state)
    assert dispatch.explain(M, 4096, 4096, x.dtype).implementation == WGMMA
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = qkernels.matmul_4bit(x, packed, state)
    for _ in range(3):
        captured.fill_(torch.nan)
        graph.replay()
        assert_bits_equal(captured, expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = qkernels.matmul_4bit(x, packed, state)
    stream.synchronize()
    assert_bits_equal(elsewhere, expected)
    compiled = torch.compile(lambda t: qkernels.matmul_4bit(t, packed, state), fullgraph=True)
    assert_bits_equal(compiled(x), expected)
