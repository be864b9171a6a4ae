"""Linear4bit: bitsandbytes' state_dict, quantizing, the arithmetic, the messages."""

from __future__ import annotations

import copy
import gc
import inspect
import re
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from states import as_bytes, assert_same_state, quantized
from torch import nn

from qkernels.errors import UserError
from qlora.linear4bit import Linear4bit, LinearFP4, LinearNF4, Params4bit

K, N = 128, 40
STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(K, N)


# Beside the real bitsandbytes, on its CPU path (in training mode, where it leaves its weights as they are).


@pytest.fixture
def bnb_nn():
    return pytest.importorskip("bitsandbytes").nn


def bnb_quantized(bnb_nn, linear: nn.Linear, **options):
    layer = bnb_nn.Linear4bit(K, N, **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").train()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nested", [True, False])
def test_state_dict_is_that_of_bitsandbytes_bit_for_bit(bnb_nn, linear, quant_type, storage, nested):
    options = {"quant_type": quant_type, "quant_storage": storage, "compress_statistics": nested}
    ours, theirs = quantized(linear, **options).state_dict(), bnb_quantized(bnb_nn, linear, **options).state_dict()
    if quant_type == "fp4":
        # Its CPU path has one zero where its CUDA path, and ours, keep the sign of it: pattern 8 is -0.0.
        for state in (ours, theirs):
            codes = as_bytes(state["weight"])
            state["weight"] = torch.stack([codes >> 4, codes & 15])
            state["weight"][state["weight"] == 8] = 0
            state["weight.quant_map"] = state["weight.quant_map"] + 0.0
    assert_same_state(ours, theirs)


def test_loads_what_bitsandbytes_saved_and_computes_the_same(bnb_nn, linear):
    theirs = bnb_quantized(bnb_nn, linear, quant_type="nf4", quant_storage=torch.bfloat16)
    ours = LinearNF4(K, N)
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    assert ours.quant_storage == torch.bfloat16
    x = torch.randn(3, K)
    assert torch.equal(ours(x), theirs(x))


def test_bitsandbytes_loads_what_we_saved(bnb_nn, linear):
    state = quantized(linear).state_dict()
    theirs = bnb_nn.Linear4bit(K, N, quant_type="nf4")
    stats = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
    theirs.weight = bnb_nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu", module=theirs)
    theirs.bias = nn.Parameter(state["bias"])
    assert_same_state(theirs.train().state_dict(), state)
    x = torch.randn(3, K)
    assert torch.equal(theirs(x), quantized(linear)(x))


@pytest.mark.parametrize("name", ["Linear4bit", "LinearNF4", "LinearFP4", "Params4bit"])
def test_positional_arguments_are_those_of_bitsandbytes(bnb_nn, name):
    ours, theirs = {"Params4bit": Params4bit}.get(name) or globals()[name], getattr(bnb_nn, name)
    if name == "Params4bit":
        ours, theirs = ours.__new__, theirs.__new__
    ours, theirs = (
        {key: p.default for key, p in inspect.signature(f).parameters.items() if p.kind is not p.KEYWORD_ONLY}
        for f in (ours, theirs)
    )
    assert ours == theirs


# Quantizing.


@pytest.mark.parametrize("cls", [Linear4bit, LinearNF4, LinearFP4])
def test_first_move_to_a_device_quantizes(cls, linear):
    layer = cls(K, N)
    layer.load_state_dict(linear.state_dict())
    assert layer.weight.dtype == torch.float32
    assert layer.quant_state is None
    assert layer.to("cpu") is layer
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.shape == (K * N // 2, 1)
    assert layer.weight.bnb_quantized
    expected = quantized(linear, quant_type="nf4" if cls is LinearNF4 else "fp4")
    assert_same_state(layer.state_dict(), expected.state_dict())


def test_casting_alone_does_not_quantize(linear):
    layer = LinearNF4(K, N).half()
    assert (layer.weight.dtype, layer.quant_state) == (torch.float16, None)
    assert isinstance(layer.weight, Params4bit)
    assert layer.to("cpu").quant_state.dtype == torch.float16


def test_device_and_dtype_together_quantize_the_values_given(linear):
    # What bitsandbytes does too; rounding to 16 bits first would lose precision for nothing.
    layer = LinearNF4(K, N)
    layer.load_state_dict(linear.state_dict())
    layer.to("cpu", torch.bfloat16)
    assert torch.equal(layer.weight, quantized(linear).weight)
    assert layer.dequantize().dtype == torch.bfloat16
    assert layer.bias.dtype == torch.bfloat16


def test_from_linear_copies_and_keeps_the_original(linear):
    before = copy.deepcopy(linear.state_dict())
    linear.bias.requires_grad_(False)
    layer = quantized(linear.eval(), blocksize=32, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        layer.bias.add_(1)
    assert_same_state(linear.state_dict(), before)
    assert (layer.training, layer.bias.requires_grad, layer.compute_dtype) == (False, False, torch.bfloat16)
    assert layer.quant_state.absmax.numel() == K * N // 32
    assert quantized(nn.Linear(K, N, bias=False)).bias is None


def test_from_linear_on_meta_stays_empty():
    layer = LinearNF4.from_linear(nn.Linear(K, N, device="meta"))
    assert (layer.weight.device.type, layer.quant_state) == ("meta", None)


def test_deleting_a_layer_frees_it_without_the_garbage_collector(linear):
    gc.disable()
    try:
        layer = quantized(linear)
        reference = weakref.ref(layer)
        del layer
        assert reference() is None
    finally:
        gc.enable()


# Arithmetic.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (0, K), (2, 0, K)])
def test_forward_is_linear_over_the_dequantized_weight(linear, dtype, shape):
    layer = quantized(linear)
    x = torch.randn(shape, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x, layer.dequantize(dtype), layer.bias.to(dtype)))


@pytest.mark.parametrize(("k", "n"), [(1, 1), (33, 7), (65, 3), (100, 37), (63, 64)])
@pytest.mark.parametrize("storage", STORAGES)
def test_any_size_and_storage_without_warnings(k, n, storage):
    linear = nn.Linear(k, n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = quantized(linear, quant_storage=storage)
        y = layer(torch.ones(2, k))
    assert torch.equal(y, F.linear(torch.ones(2, k), layer.dequantize(), layer.bias))
    assert torch.allclose(layer.dequantize(), linear.weight, atol=0.2 * linear.weight.detach().abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backward_uses_the_weight_of_the_forward(dtype):
    # bitsandbytes decodes to the original weight's dtype in the backward pass and to the input's in the forward pass.
    layer = quantized(nn.Linear(K, N).to(torch.bfloat16))
    layer.bias.data = layer.bias.data.float()
    x = torch.randn(4, K, dtype=dtype, requires_grad=True)
    grad = torch.randn(4, N, dtype=dtype)
    layer(x).backward(grad)
    W = layer.dequantize(dtype)
    x2 = x.detach().clone().requires_grad_()
    F.linear(x2, W).backward(grad)
    assert torch.equal(x.grad, x2.grad)
    assert torch.allclose(layer.bias.grad, grad.float().sum(0), rtol=1e-2, atol=1e-2)
    assert layer.weight.grad is None


def test_compute_dtype_is_of_the_products_and_not_of_the_output(linear):
    layer = quantized(linear, compute_dtype=torch.bfloat16)
    x = torch.randn(3, K)
    expected = F.linear(x.bfloat16(), layer.dequantize(torch.bfloat16), layer.bias.bfloat16()).float()
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), expected)
    assert layer.bias.dtype == torch.float32  # bitsandbytes casts the bias of the layer itself


def test_without_compute_dtype_each_call_follows_its_input(linear):
    layer = quantized(linear)
    x = torch.randn(3, K)
    exact = layer(x)
    layer(x.bfloat16())
    assert torch.equal(layer(x), exact)


def test_autocast_computes_in_and_returns_its_dtype(linear):
    layer = quantized(linear, compute_dtype=torch.float16)
    x = torch.randn(3, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == nn.Linear(K, N)(x).dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x.bfloat16(), layer.dequantize(torch.bfloat16), layer.bias.bfloat16()))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_layer_on_meta_computes_shapes(linear):
    y = quantized(linear).to("meta")(torch.zeros(2, 3, K, dtype=torch.float16, device="meta"))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, N), torch.float16, "meta")


def test_compiles_without_graph_breaks(linear):
    layer = quantized(linear)
    x = torch.randn(3, K)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


# Messages.


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_weights_are_named_and_counted(bad):
    linear = nn.Linear(K, N)
    with torch.no_grad():
        linear.weight.flatten()[5:8] = bad
    with pytest.raises(UserError, match=r"^weight of LinearNF4: .*\b3\b.* mend the weights, or keep .* float\.$"):
        LinearNF4.from_linear(linear)
    model = nn.ModuleDict({"h": nn.ModuleDict({"dense": LinearNF4(K, N)})})
    model.load_state_dict({f"h.dense.{key}": value for key, value in linear.state_dict().items()})
    with pytest.raises(UserError, match=r"^h\.dense\.weight: .*\b3\b"):
        model.to("cpu")


@pytest.mark.parametrize("move", [lambda m: m.double().to("cpu"), lambda m: m.to("cpu", torch.float64)])
def test_double_precision_weights_are_refused_by_name(move):
    with pytest.raises(UserError, match=r"^weight of LinearNF4\.dtype: expected torch.float32, .*, got torch.float64"):
        move(LinearNF4(K, N))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "int4"}, "quant_type: expected one of nf4, fp4, got 'int4'"),
        ({"blocksize": 48}, "blocksize: expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got 48"),
        ({"quant_storage": torch.int32}, "quant_storage: expected torch.uint8, .*, got torch.int32"),
    ],
)
def test_wrong_format_arguments(linear, options, message):
    with pytest.raises(UserError, match=message):
        Linear4bit(K, N, **options)
    with pytest.raises(UserError, match=message):
        quantized(linear, **options)


def test_wrong_sources(linear):
    with pytest.raises(UserError, match=r"linear: expected a float torch.nn.Linear, got Embedding"):
        Linear4bit.from_linear(nn.Embedding(K, N))
    with pytest.raises(UserError, match=r"linear: expected a float torch.nn.Linear, got Linear4bit"):
        Linear4bit.from_linear(quantized(linear))
    with pytest.raises(UserError, match=r"quant_type: expected 'nf4' for LinearNF4, got 'fp4'"):
        LinearNF4.from_linear(linear, quant_type="fp4")
    with pytest.raises(UserError, match=r"data: expected packed codes of dtype torch.uint8.*got torch.float32"):
        Params4bit(torch.zeros(4, 4), bnb_quantized=True)


def test_wrong_inputs(linear):
    layer = LinearNF4(K, N)
    with pytest.raises(UserError, match=re.escape("torch.float32 on cpu, not quantized yet. Move the layer")):
        layer(torch.zeros(1, K))
    with pytest.raises(UserError, match=r"not quantized yet"):
        layer.dequantize()
    layer.to("cpu")
    with pytest.raises(UserError, match=rf"A: expected a last dimension of K = {K}"):
        layer(torch.zeros(1, K + 1))
    with pytest.raises(UserError, match=r"A.dtype: expected torch.float32, .*, got torch.int64"):
        layer(torch.zeros(1, K, dtype=torch.int64))
    with pytest.raises(UserError, match=r"got meta"):
        layer(torch.zeros(1, K, device="meta"))


def test_repr_says_the_format(linear):
    assert repr(quantized(linear, blocksize=128)) == (
        "Linear4bit(in_features=128, out_features=40, bias=True, quant_type=nf4, blocksize=128, double_quant=True, "
        "quant_storage=torch.uint8, quantized)"
    )
    assert "not quantized yet" in repr(LinearFP4(K, N))
