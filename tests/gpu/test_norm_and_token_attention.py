"""Normalization and a token's attention on a GPU: at most torch's error, odd sizes, launched early, in graphs."""

from __future__ import annotations

import pytest
import torch
from exact import assert_bits_equal
from torch.nn import functional as F

import qkernels
from qkernels.format import FLOAT_DTYPES

pytestmark = pytest.mark.gpu


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def is_as_exact(found: torch.Tensor, usual: torch.Tensor, truth: torch.Tensor) -> bool:
    """At most torch's error and a rounding, in maximum and in root mean square; in float32, where it is all sums, twice
    that."""
    errors = [(tensor.double() - truth).abs() for tensor in (found, usual)]
    rounding = torch.finfo(found.dtype).eps * truth.abs().max()
    (largest, mean), (usual_largest, usual_mean) = ((e.max(), e.square().mean().sqrt()) for e in errors)
    allowed = 2.0 if found.dtype == torch.float32 else 1.0
    return bool(largest <= allowed * usual_largest + rounding and mean <= allowed * usual_mean + 0.01 * rounding)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("shape", [(1, 4096), (3, 333), (128, 2560), (2, 5, 1), (1, 65536)])
def test_a_normalization(new_inputs, dtype, centered, summed, shape):
    C = shape[-1]
    x, residual = 3 * draw(*shape, dtype=dtype) + 1, draw(*shape, dtype=dtype)
    weight, bias = draw(2, C, dtype=dtype)

    def torchs(x, weight, bias):
        return F.layer_norm(x, (C,), weight, bias, 1e-5) if centered else F.rms_norm(x, (C,), weight, 1e-5)

    total, found = qkernels.normalize(
        x, weight, bias if centered else None, eps=1e-5, centered=centered, residual=residual if summed else None
    )
    assert_bits_equal(total, x + residual if summed else x)
    truth = torchs(total.double(), weight.double(), bias.double())
    assert is_as_exact(found, torchs(total, weight, bias), truth)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "size", "room"), [(1, 32, 128, 128), (2, 3, 20, 77), (3, 2, 80, 1024), (1, 4, 128, 9000)]
)
def test_a_tokens_attention(new_inputs, dtype, rows, heads, size, room):
    for length in (0, 1, 63, 64, room // 2, room - 1):
        new = [part.transpose(1, 2) for part in draw(rows, 1, heads, 3, size, dtype=dtype).unbind(3)]
        cache = draw(2, rows, heads, room, size, dtype=dtype)
        cache[:, :, :, length:] = torch.nan
        bias = 4 * draw(1 + length % 2 * (rows - 1), heads, 1, room, dtype=dtype)
        whole = [torch.cat([old[:, :, :length], one], 2) for old, one in zip(cache, new[1:], strict=True)]
        found = qkernels.token_attention(*new, *cache, torch.tensor(length, device="cuda"), bias)
        for one, wanted in zip(cache, whole, strict=True):
            assert_bits_equal(one[:, :, : length + 1], wanted)
            assert one[:, :, length + 1 :].isnan().all()

        def attention(*inputs):
            context = F.scaled_dot_product_attention(*inputs[:3], attn_mask=inputs[3])
            return context.transpose(1, 2).reshape(rows, 1, -1)

        inputs = new[0], *whole, bias[..., : length + 1].contiguous()
        truth = attention(*(tensor.double() for tensor in inputs))
        assert is_as_exact(found, attention(*inputs), truth)


@pytest.mark.parametrize("in_graph", [False, True])
def test_nothing_is_read_or_written_too_early(new_inputs, in_graph):
    """Products, sums and attention in turn, each of the result before it, the same as with a pause after each."""
    N, heads = 4096, 32
    packed, state = qkernels.quantize_4bit(0.02 * draw(N, N, dtype=torch.float16), quant_type="nf4")
    x, weight, bias = draw(3, N, dtype=torch.float16)
    cache = torch.zeros(2, 1, heads, 128, 128, device="cuda", dtype=torch.float16)
    scores = draw(1, heads, 1, 128, dtype=torch.float16)
    lengths = torch.arange(8, device="cuda")

    def chain(between=lambda: None) -> torch.Tensor:
        hidden, new = x[None], x[None]
        for length in lengths:
            new = qkernels.matmul_4bit(new, packed, state)
            between()
            hidden, new = qkernels.normalize(new, weight.clone(), bias, eps=1e-5, residual=hidden)
            between()
            parts = [new.view(1, heads, 1, 128)] * 3
            new = qkernels.token_attention(*parts, *cache, length, scores).view(1, N)
            between()
        return torch.cat([hidden, new])

    expected = chain(torch.cuda.synchronize)
    if not in_graph:
        for _ in range(5):
            assert_bits_equal(chain(), expected)
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(5):
        found.fill_(torch.nan)
        graph.replay()
        assert_bits_equal(found, expected)
