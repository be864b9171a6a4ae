"""Kernels that begin while the one before them ends: each sees what that one wrote, and spoils nothing it reads."""

from __future__ import annotations

import pytest
import torch
from exact import assert_bits_equal

import qkernels

pytestmark = pytest.mark.gpu
N = 4096
NOTHING = lambda: None  # noqa: E731


def results(M: int, between) -> list[torch.Tensor]:
    """Products, gradients and an adapter's update, each of the result before it, `between` being called after each;
    what is not kept lies in memory that the next results are written to."""
    torch.manual_seed(M)
    weights = [
        qkernels.quantize_4bit(0.02 * torch.randn(N, N, device="cuda", dtype=torch.float16), quant_type="nf4")
        for _ in range(2)
    ]
    x = torch.randn(M, N, device="cuda", dtype=torch.float16)
    A, B = (0.02 * torch.randn(*size, device="cuda") for size in ((16, N), (N, 16)))
    A.requires_grad_(), B.requires_grad_()
    kept = []
    for turn in range(6):
        # The packed weight itself is written just before it is read.
        packed, state = weights[turn % 2][0].clone(), weights[turn % 2][1]
        between()
        y = qkernels.matmul_4bit(x, packed, state)
        between()
        y = qkernels.matmul_4bit_dx(y, packed, state)
        between()
        leaf = y.detach().requires_grad_()
        z = qkernels.matmul_4bit_lora(leaf, packed, state, A, B, 2.0)
        between()
        gradients = torch.autograd.grad(z, [leaf, A, B], y)
        between()
        x = gradients[0] / gradients[0].float().std()
        x = x.half()
        kept += [z.detach(), *gradients]
    return kept


@pytest.mark.parametrize("M", [1, 2, 8, 16, 30, 64, 128, 256])
def test_nothing_is_read_or_written_too_early(new_inputs, M):
    expected = results(M, torch.cuda.synchronize)
    for _ in range(5):
        for got, right in zip(results(M, NOTHING), expected, strict=True):
            assert_bits_equal(got, right)


@pytest.mark.parametrize("M", [1, 16, 64])
def test_neither_in_a_graph(new_inputs, M):
    torch.manual_seed(0)
    packed, state = qkernels.quantize_4bit(0.02 * torch.randn(N, N, device="cuda", dtype=torch.float16))
    x = torch.randn(M, N, device="cuda", dtype=torch.float16)

    def chain(between=NOTHING):
        y = x
        for _ in range(6):
            y = qkernels.matmul_4bit(y, packed, state)
            between()
            y = qkernels.matmul_4bit_dx(y, packed, state) * 0.5
            between()
        return y

    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for _ in range(20):
        graph.replay()
        assert_bits_equal(y, expected)
