"""The public functions: gradients, `out=`, autocast, compilation, and what wrong input is told."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import qkernels
from qkernels import (
    BLOCKSIZES,
    QUANT_STORAGES,
    UserError,
    checks,
    dequantize_4bit,
    dequantize_blockwise,
    gemv_4bit,
    matmul_4bit,
    matmul_4bit_dx,
    quantize_4bit,
    quantize_blockwise,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def packed_weight(n: int = 24, k: int = 40, dtype: torch.dtype = torch.float32, **options):
    return quantize_4bit(torch.randn(n, k, dtype=dtype), **({"quant_type": "nf4"} | options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", QUANT_STORAGES)
def test_matmul_is_the_product_with_the_dequantized_weight(dtype, quant_type, nested, storage):
    packed, state = packed_weight(
        25, 39, dtype, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    x = torch.randn(2, 3, 39, dtype=dtype)
    bias = torch.randn(25, dtype=dtype)
    expected = F.linear(x, dequantize_4bit(packed, state), bias)
    assert torch.equal(matmul_4bit(x, packed, state, bias=bias), expected)
    assert torch.equal(matmul_4bit(x, packed.t(), state, bias=bias), expected)
    assert torch.equal(gemv_4bit(x, packed, state=state), F.linear(x, dequantize_4bit(packed, state)))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_gradients_are_those_of_the_dequantized_weight(blocksize):
    packed, state = packed_weight(blocksize=blocksize, compress_statistics=True)
    x = torch.randn(5, 40, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    grad = torch.randn(5, 24)
    expected = torch.autograd.grad(F.linear(x, dequantize_4bit(packed, state), bias), (x, bias), grad)
    actual = torch.autograd.grad(matmul_4bit(x, packed, state, bias=bias), (x, bias), grad)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_dx_is_the_backward_pass(dtype):
    packed, state = packed_weight(compress_statistics=True)
    x, grad = torch.randn(2, 5, 40, dtype=dtype, requires_grad=True), torch.randn(2, 5, 24, dtype=dtype)
    (expected,) = torch.autograd.grad(matmul_4bit(x, packed, state), x, grad)
    assert torch.equal(matmul_4bit_dx(grad, packed, state), expected)
    with pytest.raises(UserError, match=r"last dimension of N = 24, for a weight of shape \(24, 40\)"):
        matmul_4bit_dx(x, packed, state)


def test_gradients_have_gradients():
    packed, state = packed_weight()
    weight = dequantize_4bit(packed, state)
    x = torch.randn(5, 40, requires_grad=True)

    def penalty(product):
        # Of a gradient that depends on x: the norm of d(sum y^3)/dx.
        (grad,) = torch.autograd.grad(product(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), x)

    torch.testing.assert_close(penalty(lambda x: matmul_4bit(x, packed, state)), penalty(lambda x: x @ weight.t()))


def test_a_product_saves_no_tensor_for_backward():
    # torch's checkpointing recomputes a block up to its last saved tensor.
    packed, state = packed_weight()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        matmul_4bit(torch.randn(5, 40, requires_grad=True), packed, state)
    assert not saved


def test_forward_and_backward_use_the_same_weight():
    # The weight was float32, the activations are float16: both directions must round it to float16.
    packed, state = packed_weight()
    x = torch.eye(40, dtype=torch.float16, requires_grad=True)
    y = matmul_4bit(x, packed, state)
    (grad,) = torch.autograd.grad(y, x, torch.eye(24, dtype=torch.float16).repeat(2, 1)[:40])
    assert torch.equal(grad[:24], y.t())


def test_nothing_dequantized_is_saved_for_backward():
    packed, state = packed_weight(512, 512)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        matmul_4bit(torch.randn(2, 512, requires_grad=True), packed, state)
    assert sum(t.numel() * t.element_size() for t in saved) < 512 * 512


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,)])
def test_empty_and_one_dimensional_activations(shape):
    packed, state = packed_weight()
    x = torch.randn(shape, requires_grad=True)
    y = matmul_4bit(x, packed, state)
    assert y.shape == (*shape[:-1], 24)
    y.sum().backward()
    assert x.grad.shape == shape


def test_autocast_casts_activations_and_bias_only():
    packed, state = packed_weight()
    x, bias = torch.randn(3, 40, requires_grad=True), torch.randn(24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = matmul_4bit(x, packed, state, bias=bias)
    weight = dequantize_4bit(packed, state).bfloat16()
    assert torch.equal(y, F.linear(x.bfloat16(), weight, bias.bfloat16()))
    y.float().sum().backward()
    assert x.grad.dtype == bias.grad.dtype == torch.float32


def test_compiles_to_one_graph():
    packed, state = packed_weight(compress_statistics=True)

    def step(x):
        return matmul_4bit(x, packed, state).square().sum()

    x = torch.randn(4, 40, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(step(x), x)
    (actual,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(actual, expected)


def test_quantize_compiles_to_one_graph():
    compiled = torch.compile(
        lambda w: dequantize_4bit(*quantize_4bit(w, quant_type="nf4", compress_statistics=True)),
        fullgraph=True,
        backend="aot_eager",
    )
    weight = torch.randn(64, 64)
    expected = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    assert torch.equal(compiled(weight), expected)


def test_out_arguments_are_written_and_returned():
    weight = torch.randn(24, 40)
    expected, expected_state = quantize_4bit(weight)
    out, absmax = torch.empty_like(expected), torch.empty_like(expected_state.absmax)
    packed, state = quantize_4bit(weight, absmax=absmax, out=out)
    assert packed is out
    assert state.absmax is absmax
    assert torch.equal(out, expected)
    assert torch.equal(absmax, expected_state.absmax)
    decoded = torch.full((24, 40), torch.nan)
    assert dequantize_4bit(packed, state, out=decoded) is decoded
    assert torch.equal(decoded, dequantize_4bit(expected, expected_state))
    product = torch.full((3, 24), torch.nan)
    x = torch.randn(3, 40)
    assert matmul_4bit(x, packed, state, out=product) is product
    assert torch.equal(product, matmul_4bit(x, packed, state))


def test_dequantize_from_absmax_instead_of_a_state():
    weight = torch.randn(24, 40)
    packed, state = quantize_4bit(weight, quant_type="nf4")
    out = torch.empty(24, 40)
    dequantize_4bit(packed, absmax=state.absmax, out=out, quant_type="nf4")
    assert torch.equal(out, dequantize_4bit(packed, state))


@pytest.mark.parametrize("nested", [False, True])
def test_blockwise_round_trip(nested):
    values = torch.randn(33, 65)
    index, state = quantize_blockwise(values, blocksize=256, nested=nested)
    out = torch.empty(33, 65)
    decoded = dequantize_blockwise(index, state, out=out)
    assert decoded is out
    assert (decoded - values).abs().max() < 0.03 * values.abs().max()
    if not nested:
        assert torch.equal(dequantize_blockwise(index, absmax=state.absmax, blocksize=256), decoded)


def test_transposed_weights_are_quantized_in_their_own_order():
    weight = torch.randn(40, 24)
    packed, state = quantize_4bit(weight.t())
    expected, _ = quantize_4bit(weight.t().contiguous())
    assert torch.equal(packed, expected)
    assert state.shape == (24, 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"A": torch.ones(4, dtype=torch.int32)}, "A.dtype: expected torch.float32, .* got torch.int32"),
        ({"A": torch.empty(0, 4)}, r"A: expected at least one element, got shape \(0, 4\)"),
        ({"A": [1.0]}, "A: expected a torch.Tensor, got list"),
        ({"A": torch.eye(3).to_sparse()}, "A: expected a dense tensor, got torch.sparse_coo"),
        ({"blocksize": 64.0}, r"blocksize: expected one of 32, .*, got 64\.0"),
        ({"blocksize": 48}, "blocksize: expected one of 32, 64, .*, got 48"),
        ({"quant_type": "int4"}, "quant_type: expected one of nf4, fp4, got 'int4'"),
        ({"quant_storage": torch.int8}, "quant_storage: expected torch.uint8, .* got torch.int8"),
        ({"A": torch.tensor([1.0, torch.nan, torch.inf])}, "expected finite values, got 1 NaN and 1 Inf among 3"),
        ({"out": torch.empty(3, dtype=torch.uint8)}, r"out: expected a contiguous tensor of shape \(32, 1\)"),
        ({"absmax": torch.empty(2)}, r"absmax: expected a contiguous tensor of shape \(1,\)"),
    ],
)
def test_quantize_4bit_says_what_is_wrong(arguments, message):
    with pytest.raises(UserError, match=message):
        quantize_4bit(**({"A": torch.randn(64)} | arguments))


def test_matmul_says_what_is_wrong():
    packed, state = packed_weight()
    x = torch.randn(3, 40)
    cases = [
        ((torch.randn(3, 24), packed, state), {}, r"last dimension of K = 40, for a weight of shape \(24, 40\)"),
        ((x.int(), packed, state), {}, "A.dtype: expected torch.float32"),
        ((x, packed[:-1], state), {}, "B: expected 480 contiguous elements of torch.uint8"),
        ((x, packed, None), {}, "quant_state: expected a qkernels.QuantState, got builtins.NoneType"),
        ((x.to("meta"), packed, state), {}, "A: expected the device of B, cpu, got meta"),
        ((x, packed, state), {"bias": torch.ones(23)}, r"bias: expected shape \(24,\), got \(23,\)"),
        ((x, packed, state), {"out": torch.empty(3, 23)}, r"out: expected a contiguous tensor of shape \(3, 24\)"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(UserError, match=message):
            matmul_4bit(*arguments, **options)


def test_a_weight_is_checked_once_until_a_part_of_it_is_exchanged(monkeypatch):
    packed, state = packed_weight(compress_statistics=True)
    x = torch.randn(2, 40)
    y = matmul_4bit(x, packed, state)
    checked = []
    right = checks.check_weight
    monkeypatch.setattr(checks, "check_weight", lambda *arguments: (checked.append(arguments), right(*arguments)))
    assert torch.equal(matmul_4bit(x, packed, state), y)
    assert not checked
    other, _ = packed_weight(compress_statistics=True)
    assert not torch.equal(matmul_4bit(x, other, state), y)  # other codes: looked at, and used
    assert len(checked) == 1
    with pytest.raises(UserError, match="B"):
        matmul_4bit(x, packed[:-1], state)
    state.state2.absmax = state.state2.absmax.double()
    with pytest.raises(UserError, match="absmax"):
        matmul_4bit(x, packed, state)
    state.state2.absmax = state.state2.absmax.float()
    matmul_4bit(x, packed, state)
    state.shape = torch.Size((40, 25))
    with pytest.raises(UserError, match="B"):
        matmul_4bit(x, packed, state)


def test_a_copied_or_saved_state_leaves_the_codes_behind():
    packed, state = packed_weight()
    matmul_4bit(torch.randn(2, 40), packed, state)
    assert state.checked is not None
    assert copy.deepcopy(state).checked is None
    assert pickle.loads(pickle.dumps(state)).checked is None


def test_dequantize_says_what_is_wrong():
    packed, state = packed_weight()
    with pytest.raises(UserError, match="expected a QuantState, or absmax and out instead"):
        dequantize_4bit(packed)
    with pytest.raises(UserError, match="out: expected a contiguous tensor"):
        dequantize_4bit(packed, state, out=torch.empty(24, 40).t())
    state.absmax = state.absmax[:-1]
    with pytest.raises(UserError, match=r"absmax: expected 15 contiguous scales \(960 elements in blocks of 64\)"):
        dequantize_4bit(packed, state)
    with pytest.raises(UserError, match=r"A\.dtype: expected torch\.uint8"):
        dequantize_blockwise(torch.ones(4))
    with pytest.raises(UserError, match=r"code: expected contiguous float32 of shape \(256,\)"):
        quantize_blockwise(torch.ones(4), code=torch.ones(16))


@pytest.mark.parametrize("part", ["state2.absmax", "state2.code", "offset"])
def test_every_part_of_a_state_must_be_on_one_device(part):
    packed, state = packed_weight(compress_statistics=True)
    owner = state.state2 if part.startswith("state2") else state
    name = part.removeprefix("state2.")
    setattr(owner, name, getattr(owner, name).to("meta"))
    with pytest.raises(
        UserError, match=rf"quant_state.{part}: expected the device of quant_state.absmax, cpu, got meta"
    ):
        dequantize_4bit(packed, state)


def test_scales_must_lie_as_the_kernels_read_them():
    packed, state = packed_weight()
    state.absmax = state.absmax.repeat_interleave(2)[::2]
    with pytest.raises(UserError, match=r"absmax: expected 15 contiguous scales .* got shape \(15,\), strides \(2,\)"):
        dequantize_4bit(packed, state)
    state.absmax = state.absmax.contiguous().view(15, 1)
    with pytest.raises(UserError, match=r"got shape \(15, 1\)"):
        dequantize_4bit(packed, state)


def test_a_damaged_nested_state_is_refused():
    packed, state = packed_weight(compress_statistics=True)
    state.offset = None
    with pytest.raises(UserError, match="a float32 scalar tensor as offset, and blocks of 256, got offset None"):
        matmul_4bit(torch.randn(3, 40), packed, state)


def test_dequantize_blockwise_says_what_is_wrong():
    index, state = quantize_blockwise(torch.randn(64))
    with pytest.raises(UserError, match="expected a QuantState, or absmax instead"):
        dequantize_blockwise(index)
    with pytest.raises(UserError, match=r"expected a qkernels.QuantState, got builtins.str"):
        dequantize_blockwise(index, "state")
    with pytest.raises(UserError, match="code: expected the device of A, cpu, got meta"):
        dequantize_blockwise(index, absmax=state.absmax, code=state.code.to("meta"))


def test_meta_tensors_compute_shapes():
    packed, state = quantize_4bit(torch.empty(24, 40, device="meta"), compress_statistics=True)
    assert packed.shape == (480, 1)
    assert dequantize_4bit(packed, state).shape == (24, 40)


def test_every_public_name_exists():
    assert all(hasattr(qkernels, name) for name in qkernels.__all__)
