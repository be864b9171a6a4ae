"""The compiled kernels on a GPU against the reference on the same GPU: bits, streams, graphs, compilation, sizes."""

from __future__ import annotations

import pytest
import torch
from exact import assert_bits_equal, gpu_reciprocal
from skinny import assert_accurate, assert_dx_accurate
from torch.utils._python_dispatch import TorchDispatchMode

import qkernels
from qkernels.dropout import dropout_reference, threshold_and_scale
from qkernels.format import BLOCKSIZES, FLOAT_DTYPES, QUANT_STORAGES, QUANT_TYPES, dynamic_map
from qkernels.reference import (
    decode_absmax_reference,
    dequantize_4bit_reference,
    dequantize_blockwise_reference,
    quantize_4bit_reference,
    quantize_blockwise_reference,
)

pytestmark = pytest.mark.gpu
LENGTHS = [*range(1, 131), 4095, 4096, 4097, 1_000_003]


def test_the_reciprocal_is_one_ulp_off_the_exact_one_at_most():
    x = torch.rand(1_000_000, device="cuda") + 1e-3
    exact, ours = (1.0 / x), gpu_reciprocal(x)
    assert (exact.view(torch.int32) - ours.view(torch.int32)).abs().max() == 1


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_nan_and_inf_are_reported_and_otherwise_as_the_reference(quant_type, dtype):
    values = torch.randn(100_000, device="cuda").to(dtype)
    values[70] = torch.nan
    with pytest.raises(qkernels.UserError, match="1 NaN and 0 Inf among 100000"):
        qkernels.quantize_4bit(values, quant_type=quant_type)
    values[30_000] = -torch.inf
    with pytest.raises(qkernels.UserError, match="1 NaN and 1 Inf"):
        qkernels.quantize_4bit(values, quant_type=quant_type, compress_statistics=True)
    packed, state = qkernels.quantize_4bit(values, quant_type=quant_type, check_finite=False)
    expected, absmax = quantize_4bit_reference(values, 64, quant_type, torch.uint8, reciprocal=gpu_reciprocal)
    assert_bits_equal(packed, expected)
    assert_bits_equal(state.absmax, absmax)


class _Listener(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_operators_are_called_where_something_listens():
    weight = torch.randn(64, 64, device="cuda")
    packed, state = qkernels.quantize_4bit(weight)
    expected = qkernels.dequantize_4bit(packed, state)
    with _Listener() as listener:
        assert_bits_equal(qkernels.dequantize_4bit(packed, state), expected)
    assert listener.seen[0] == "qkernels.dequantize_4bit.default"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_and_dequantize_4bit(blocksize, quant_type, dtype):
    for n in LENGTHS:
        values = torch.randn(n, device="cuda").to(dtype)
        values[n // 2 : n // 2 + 3] = 0
        packed, state = qkernels.quantize_4bit(values, blocksize=blocksize, quant_type=quant_type)
        expected, absmax = quantize_4bit_reference(
            values, blocksize, quant_type, torch.uint8, reciprocal=gpu_reciprocal
        )
        assert_bits_equal(state.absmax, absmax)
        assert_bits_equal(packed, expected)
        out = torch.full((n,), torch.nan, dtype=dtype, device="cuda")
        qkernels.dequantize_4bit(packed, state, out=out)
        assert_bits_equal(out, dequantize_4bit_reference(packed, absmax, blocksize, quant_type, (n,), dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("storage", QUANT_STORAGES)
def test_double_quantization(storage, dtype):
    for shape in ((4096, 4096), (333, 777), (1, 5)):
        weight = (0.02 * torch.randn(shape, device="cuda")).to(dtype)
        packed, state = qkernels.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=True, quant_storage=storage
        )
        absmax = decode_absmax_reference(state.absmax, state.state2.absmax, state.state2.code, state.offset)
        expected = dequantize_4bit_reference(packed, absmax, 64, "nf4", shape, dtype)
        assert_bits_equal(qkernels.dequantize_4bit(packed, state), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blockwise(blocksize, dtype):
    code = dynamic_map(torch.device("cuda", torch.cuda.current_device()))
    for n in (1, 31, 257, 4097, 1_000_003):
        values = torch.randn(n, device="cuda").to(dtype)
        index, state = qkernels.quantize_blockwise(values, blocksize=blocksize)
        expected, absmax = quantize_blockwise_reference(values, code, blocksize, reciprocal=gpu_reciprocal)
        assert_bits_equal(state.absmax, absmax)
        assert_bits_equal(index, expected)
        decoded = qkernels.dequantize_blockwise(index, state)
        assert_bits_equal(decoded, dequantize_blockwise_reference(index, absmax, code, blocksize, dtype))


def test_nan_inf_and_zero_blocks_as_the_reference():
    values = torch.randn(4, 64, device="cuda", dtype=torch.float16)
    values[0, 3], values[1, 5], values[2] = torch.nan, torch.inf, 0
    for quant_type in QUANT_TYPES:
        packed, state = qkernels.quantize_4bit(values, quant_type=quant_type, check_finite=False)
        expected, absmax = quantize_4bit_reference(values, 64, quant_type, torch.uint8, reciprocal=gpu_reciprocal)
        assert_bits_equal(packed, expected)
        assert_bits_equal(state.absmax, absmax)
    with pytest.raises(qkernels.UserError, match="1 NaN and 1 Inf"):
        qkernels.quantize_4bit(values)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_matmul_and_gradients(dtype):
    packed, state = qkernels.quantize_4bit(
        torch.randn(300, 500, device="cuda", dtype=dtype), quant_type="nf4", compress_statistics=True
    )
    bias = torch.randn(300, device="cuda", dtype=dtype, requires_grad=True)
    for m in (0, 1, 7, 130):
        x = torch.randn(m, 500, device="cuda", dtype=dtype, requires_grad=True)
        grad = torch.randn(m, 300, device="cuda", dtype=dtype)
        y = qkernels.matmul_4bit(x, packed, state, bias=bias)
        (dx,) = torch.autograd.grad(y, x, grad)
        assert (y.shape, y.dtype, dx.shape, dx.dtype) == ((m, 300), dtype, (m, 500), dtype)
        if m:
            assert_accurate(y.detach(), x.detach(), packed, state, bias.detach())
            assert_dx_accurate(dx, grad, packed, state)


def test_autocast_leaves_the_scales_in_float32():
    packed, state = qkernels.quantize_4bit(
        torch.randn(64, 64, device="cuda"), quant_type="nf4", compress_statistics=True
    )
    x = torch.randn(3, 64, device="cuda")
    with torch.autocast("cuda", torch.float16):
        y = qkernels.matmul_4bit(x, packed, state)
    assert y.dtype == torch.float16
    assert_accurate(y, x.half(), packed, state)


def test_on_a_stream_of_the_callers():
    weight = torch.randn(2048, 2048, device="cuda", dtype=torch.float16)
    expected, expected_state = qkernels.quantize_4bit(weight, compress_statistics=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The weight is still being written when the quantizer is launched: only the stream's order protects it.
        torch.cuda._sleep(20_000_000)
        late = weight.neg().neg()
        packed, state = qkernels.quantize_4bit(late, compress_statistics=True, check_finite=False)
        decoded = qkernels.dequantize_4bit(packed, state)
    stream.synchronize()
    assert_bits_equal(packed, expected)
    assert_bits_equal(decoded, qkernels.dequantize_4bit(expected, expected_state))


def test_in_a_cuda_graph():
    weight = torch.randn(512, 512, device="cuda", dtype=torch.float16)
    x = torch.randn(4, 512, device="cuda", dtype=torch.float16)

    def step():
        packed, state = qkernels.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return qkernels.matmul_4bit(x, packed, state)

    warm_up = torch.cuda.Stream()
    with torch.cuda.stream(warm_up):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    weight.normal_()
    x.normal_()
    graph.replay()
    assert_bits_equal(y, step())


def test_compiled_with_inductor():
    packed, state = qkernels.quantize_4bit(
        torch.randn(256, 256, device="cuda", dtype=torch.bfloat16), quant_type="nf4", compress_statistics=True
    )

    def step(x):
        return qkernels.matmul_4bit(torch.relu(x), packed, state).float().square().mean()

    x = torch.randn(16, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (expected,) = torch.autograd.grad(step(x), x)
    (actual,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(x), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    n = 2**31 + 4097
    values = torch.randn(4097, device="cuda", dtype=torch.float16).repeat(n // 4097 + 1)[:n]
    packed, state = qkernels.quantize_4bit(values, quant_type="nf4", check_finite=False)
    tail, tail_state = qkernels.quantize_4bit(values[-(n % 64 + 64 * 1000) :].clone(), quant_type="nf4")
    assert_bits_equal(packed.view(-1)[-tail.numel() :], tail.view(-1))
    decoded = qkernels.dequantize_4bit(packed, state)
    assert_bits_equal(decoded[-(n % 64 + 64 * 1000) :], qkernels.dequantize_4bit(tail, tail_state))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_dropout_is_the_reference(p, dtype):
    seed = torch.randint(2**63 - 1, (1,), device="cuda")
    for n in LENGTHS:
        x = torch.randn(n, device="cuda").to(dtype)
        assert_bits_equal(qkernels.seeded_dropout(x, p, seed), dropout_reference(x, seed, *threshold_and_scale(p)))
