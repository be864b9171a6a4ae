"""An adapter's kernels, and the product with an adapter in one: accuracy, sizes, dropout, and how torch runs it."""

from __future__ import annotations

import pytest
import torch
from exact import assert_bits_equal
from skinny import exact_weight, weight
from torch.utils.checkpoint import checkpoint

import qkernels
from qkernels.adapter import adapter_gradients, add_adapter_
from qkernels.dispatch import ADAPTER_JOINED, Product, capability_of, choose_adapter
from qkernels.dropout import threshold_and_scale
from qkernels.kernels.lora import lora_down_triton, lora_up_triton
from qkernels.kernels.lora_grads import lora_grads_triton
from qkernels.kernels.matmul_wgmma import matmul_wgmma_triton
from qkernels.tuning.lora import DownConfig, TileConfig, down_config, grads_config, up_config
from qkernels.tuning.wgmma import tiling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs tl.dot, of sm_80"
    ),
]
DTYPES = [torch.float16, torch.bfloat16]
needs_wgmma = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs wgmma, of sm_90"
)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def nan(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, device="cuda", dtype=dtype)


def assert_close(name, ours, torchs, exact):
    """The error is at most twice that of torch's products in 16 bits, in maximum and in root mean square.

    Both sides are random, so few results leave room for chance: a share of half an ulp.
    """
    assert not ours.isnan().any(), name
    half_ulp = torch.finfo(ours.dtype).eps / 2 * exact.abs() * (2 / exact.numel() ** 0.5)
    ours, torchs = ((result.double() - exact).abs() for result in (ours, torchs))
    assert rms(ours) <= 2 * rms(torchs) + rms(half_ulp), name
    assert ours.max() <= 2 * torchs.max() + half_ulp.max(), name


def rms(values):
    return values.square().mean().sqrt()


def dropout_of(p):
    return None if p == 0 else (torch.randint(2**62, (1,), device="cuda"), *threshold_and_scale(p))


def dropped(x, dropout):
    return x if dropout is None else qkernels.seeded_dropout(x, dropout[1] / 2**24, dropout[0])


@pytest.mark.parametrize("factors", [torch.float32, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_kernels(new_inputs, p, dtype, factors):
    for M, N, K, r in (
        (1, 16, 64, 1),
        (17, 130, 200, 3),
        (128, 1000, 1088, 16),
        (600, 72, 640, 40),
        (515, 264, 72, 64),
    ):
        x, dy = randn(M, K, dtype=dtype), randn(M, N, dtype=dtype)
        A, B = randn(r, K, dtype=factors or dtype), randn(N, r, dtype=factors or dtype)
        dropout = dropout_of(p)
        kept, mask = dropped(x, dropout), dropped(torch.ones_like(x, dtype=torch.float32), dropout)
        exact_A, exact_B = A.to(dtype).double(), B.to(dtype).double()
        u = lora_down_triton(x, A, False, 0.5, dropout, down_config(M, K, r, p > 0))
        v = lora_down_triton(dy, B, True, 0.5, None, down_config(M, N, r, False))
        u16, v16 = (t.float().sum(0).to(dtype)[:, :r] for t in (u, v))
        assert_close("u", u16, (kept @ A.to(dtype).t()) * 0.5, 0.5 * kept.double() @ exact_A.t())
        assert_close("v", v16, (dy @ B.to(dtype)) * 0.5, 0.5 * dy.double() @ exact_B)
        grad_A, grad_B = nan(r, K, dtype=A.dtype), nan(N, r, dtype=B.dtype)
        lora_grads_triton(dy, x, u, v, grad_A, grad_B, dropout, grads_config(M, p > 0))
        for name, grad, left, right in (("dA", grad_A, v16.t(), kept), ("dB", grad_B, dy.t(), u16)):
            exact = left.double() @ right.double()
            assert_close(name, grad, (left @ right).to(grad.dtype), exact)
        for name, inner, w, tall, C in (("y", u, B, True, N), ("dx", v, A, False, K)):
            bias = randn(C, dtype=dtype) if tall else None
            inner16 = u16 if tall else v16
            factor = B.to(dtype).t() if tall else A.to(dtype)
            exact = inner16.double() @ factor.double() * (1 if tall else mask.double()) + (bias if tall else 0)
            before = randn(M, C, dtype=dtype)
            for accumulate in (False, True):
                out = before.clone() if accumulate else nan(M, C, dtype=dtype)
                lora_up_triton(inner, w, tall, bias, out, accumulate, None if tall else dropout, up_config(M))
                update = inner16 @ factor
                torchs = (update if tall else dropped(update, dropout)) + (bias if tall else 0)
                start = before if accumulate else 0
                assert_close(name, out, torchs + start, exact + start)


def test_parts_and_tiles_make_no_difference_but_in_rounding():
    x, A = randn(100, 1000, dtype=torch.float16), randn(16, 1000)
    expected = x.double() @ A.half().double().t()
    for config in (DownConfig(16, 64, 1, 16, True), DownConfig(64, 128, 3, 3, False), DownConfig(32, 256, 4, 1, False)):
        u = lora_down_triton(x, A, False, 1.0, None, config)
        torch.testing.assert_close(u.double().sum(0), expected, rtol=1e-3, atol=0.1)
    dy = randn(100, 72, dtype=torch.float16)
    v = lora_down_triton(dy, randn(72, 16), True, 1.0, None, down_config(100, 72, 16, False))
    for config in (TileConfig(16, 64), TileConfig(128, 32)):
        grad_A, grad_B = nan(16, 1000), nan(72, 16)
        lora_grads_triton(dy, x, u, v, grad_A, grad_B, None, config)
        torch.testing.assert_close(grad_B.double(), dy.double().t() @ u.sum(0).half().double(), rtol=1e-4, atol=1e-2)


@needs_wgmma
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [16, 32, 64])
def test_within_hoppers_product(new_inputs, rank, dtype):
    """Every width of tile, whole and split, with parts of u and without."""
    for M, N, K in ((200, 456, 1472), (64, 128, 64), (33, 1000, 320)):
        packed, state = weight(N, K, dtype)
        decoded = qkernels.dequantize_4bit(packed, state).to(dtype)
        r = rank - 3
        A, B, bias = randn(r, K) * 0.1, randn(N, r) * 0.1, randn(N, dtype=dtype)
        for backward, C, R, w in ((False, K, N, B), (True, N, K, A)):
            x = randn(M, C, dtype=dtype)
            product = x @ decoded if backward else torch.nn.functional.linear(x, decoded, bias)
            exact_product = x.double() @ (decoded if backward else decoded.t()).double() + (0 if backward else bias)
            for parts in (1, 5):
                inner = randn(parts, M, rank)
                inner[:, :, r:] = 0
                inner = inner.to(dtype) if parts == 1 else inner
                inner16, w16 = inner.float().sum(0).to(dtype)[:, :r], w.to(dtype)
                factor = w16 if backward else w16.t()
                exact = exact_product + inner16.double() @ factor.double()
                torchs = product.addmm(inner16, factor)
                for columns in (64, 128, 256):
                    for programs in (1, 5):
                        config = tiling(M, R, C, columns, programs)
                        out = nan(M, R, dtype=dtype)
                        arguments = (state.state2.absmax, 64, "nf4", None if backward else bias, out, config)
                        nested = (state.absmax, state.state2.code, state.offset)
                        matmul_wgmma_triton(
                            x, packed, (N, K), *arguments, *nested, backward=backward, adapter=(w, inner)
                        )
                        assert_close(f"{M} {columns} {programs} {backward}", out, torchs, exact)


def layer(M, N, K, r, dtype, factors):
    packed, state = weight(N, K, dtype)
    leaves = [randn(M, K, dtype=dtype), randn(N, dtype=dtype), randn(r, K, dtype=factors), randn(N, r, dtype=factors)]
    leaves[2:] = [0.1 * leaf for leaf in leaves[2:]]
    return packed, state, [leaf.requires_grad_() for leaf in leaves]


def in_parts(x, bias, A, B, packed, state, p, seed, dy):
    """y, dx, dA and dB by torch's products with the decoded weight."""
    decoded = qkernels.dequantize_4bit(packed, state).to(x.dtype)
    y = torch.nn.functional.linear(x, decoded, bias)
    drop = (lambda t: t) if seed is None else (lambda t: qkernels.seeded_dropout(t, p, seed))
    inner = add_adapter_(y, x, A, B, 0.5, drop)
    dx, grad_A, grad_B = adapter_gradients(dy, x, inner, A, B, 0.5, drop)
    return y, dx + dy @ decoded, grad_A, grad_B


def in_float64(x, bias, A, B, packed, state, p, seed, dy):
    decoded = exact_weight(packed, state)
    mask = 1.0 if seed is None else qkernels.seeded_dropout(torch.ones_like(x, dtype=torch.float32), p, seed).double()
    A, B = A.to(x.dtype).double(), B.to(x.dtype).double()
    x, dy = x.double(), dy.double()
    u, v = 0.5 * (x * mask) @ A.t(), 0.5 * dy @ B
    return x @ decoded.t() + bias + u @ B.t(), dy @ decoded + (v @ A) * mask, v.t() @ (x * mask), dy.t() @ u


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1024, 1024), (1000, 1088), (72, 96)])
def test_the_product_with_an_adapter(new_inputs, shape, dtype, p):
    for M in (1, 20, 33, 128, 300, 700, 2048):
        packed, state, leaves = layer(M, *shape, 16, dtype, torch.float32)
        seed = torch.randint(2**62, (1,), device="cuda") if p else None
        x, bias, A, B = leaves
        y = qkernels.matmul_4bit_lora(x, packed, state, A, B, 0.5, bias, p, seed)
        dy = torch.randn_like(y)
        ours = (y.detach(), *torch.autograd.grad(y, (x, A, B), dy))
        given = (*(leaf.detach() for leaf in leaves), packed, state, p, seed, dy)
        names = zip(("y", "dx", "dA", "dB"), ours, in_parts(*given), in_float64(*given), strict=True)
        for name, found, torchs, exact in names:
            assert_close(f"{name} M={M}", found, torchs, exact)
        assert ours[2].dtype == ours[3].dtype == torch.float32


@pytest.mark.parametrize("r", [8, 64, 65])
@pytest.mark.parametrize("factors", [torch.float32, torch.float16])
def test_ranks_and_what_the_kernels_do_not_take(r, factors):
    for M in (100, 1000):
        packed, state, (x, bias, A, B) = layer(M, 512, 256, r, torch.float16, factors)
        y = qkernels.matmul_4bit_lora(x, packed, state, A, B, 0.5, bias)
        dy = torch.randn_like(y)
        ours = (y.detach(), *torch.autograd.grad(y, (x, A, B), dy))
        given = (x.detach(), bias.detach(), A.detach(), B.detach(), packed, state, 0.0, None, dy)
        for found, torchs, exact in zip(ours, in_parts(*given), in_float64(*given), strict=True):
            assert_close(f"r={r} M={M}", found, torchs.to(found.dtype), exact)
        assert ours[2].dtype == factors


@pytest.mark.parametrize("M", [20, 128, 2048])
def test_equal_inputs_give_equal_bits(M):
    packed, state, (x, bias, A, B) = layer(M, 4096, 1024, 16, torch.float16, torch.float32)
    dy = randn(M, 4096, dtype=torch.float16)

    def step():
        y = qkernels.matmul_4bit_lora(x, packed, state, A, B, 0.5, bias)
        return (y.detach(), *torch.autograd.grad(y, (x, A, B), dy))

    expected = step()
    for _ in range(10):
        for found, first in zip(step(), expected, strict=True):
            assert_bits_equal(found, first)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("M", [96, 1024])
def test_graphs_streams_compilation_and_checkpointing(M, p):
    packed, state, leaves = layer(M, 1024, 1024, 16, torch.bfloat16, torch.float32)
    x, bias, A, B = leaves
    seed = torch.randint(2**62, (1,), device="cuda") if p else None
    dy = randn(M, 1024, dtype=torch.bfloat16)

    def call(x, A, B):
        return qkernels.matmul_4bit_lora(x, packed, state, A, B, 0.5, bias.detach(), p, seed)

    def step(call=call):
        y = call(x, A, B)
        return (y.detach(), *torch.autograd.grad(y, (x, A, B), dy))

    def assert_equal(found):
        for ours, first in zip(found, expected, strict=True):
            assert_bits_equal(ours, first)

    expected = step()
    product = Product(M, 1024, 1024, x.dtype, capability_of(0))
    if capability_of(0) == (9, 0):
        assert (choose_adapter(product, 16, bool(p)).implementation == ADAPTER_JOINED) == (M == 96)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_equal(step())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(captured)
    assert_equal(step(torch.compile(call, fullgraph=True)))
    assert_equal(step(lambda *leaves: checkpoint(call, *leaves, use_reentrant=False)))
    with torch.autocast("cuda", torch.bfloat16):
        assert_equal(step())


def test_what_is_not_contiguous_or_aligned():
    packed, state, (_, bias, A, B) = layer(100, 256, 512, 16, torch.float16, torch.float32)
    flat = randn(100 * 512 + 1, dtype=torch.float16)
    wide = randn(16 * 512 + 1)
    for x, factor in (
        (randn(100, 1024, dtype=torch.float16)[:, ::2], A),
        (flat[1:].view(100, 512), wide[1:].view(16, 512)),
    ):
        y = qkernels.matmul_4bit_lora(x, packed, state, factor, B, 0.5, bias)
        expected = qkernels.matmul_4bit_lora(x.contiguous().clone(), packed, state, factor.clone(), B, 0.5, bias)
        assert_bits_equal(y, expected)
