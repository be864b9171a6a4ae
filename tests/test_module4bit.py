"""Params4bit and Module4bit: moving, casting, copying, splitting, loading."""

from __future__ import annotations

import copy
import io

import pytest
import safetensors.torch
import torch
from states import as_bytes, assert_same_state, quantized
from torch import nn

from qkernels.errors import UserError
from qlora.linear4bit import LinearFP4, LinearNF4, Params4bit

K, N = 128, 40
STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
STATE_KEYS = [
    "weight",
    "bias",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
]


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(K, N)


# Casting and moving.


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m._apply(lambda t: t + 0 if t.dtype == torch.float64 else torch.Tensor.to(t, torch.float64)),
    ],
)
def test_no_cast_touches_codes_or_scales(linear, storage, cast):
    layer = quantized(linear, quant_storage=storage)
    before = {key: value.clone() for key, value in layer.state_dict().items() if key != "bias"}
    cast(layer)
    assert_same_state({key: value for key, value in layer.state_dict().items() if key != "bias"}, before)


@pytest.mark.parametrize("storage", STORAGES)
def test_no_cast_of_the_parameter_itself_touches_codes(linear, storage):
    weight = quantized(linear, quant_storage=storage).weight
    for cast in (weight.half, weight.bfloat16, weight.float, weight.double, lambda: weight.to(torch.float16)):
        assert cast() is weight


def test_meta_and_back_keeps_the_class_and_loads(linear):
    layer = quantized(linear)
    state = copy.deepcopy(layer.state_dict())
    layer.to("meta")
    assert isinstance(layer.weight, Params4bit)
    assert layer.weight.device.type == layer.quant_state.absmax.device.type == "meta"
    layer.to_empty(device="cpu")
    assert isinstance(layer.weight, Params4bit)
    assert layer.weight.device.type == layer.quant_state.state2.absmax.device.type == "cpu"
    layer.load_state_dict(state)
    assert_same_state(layer.state_dict(), state)


def test_to_empty_of_a_fresh_layer_then_float_weights(linear):
    layer = LinearNF4(K, N, device="meta").to_empty(device="cpu")
    layer.load_state_dict(linear.state_dict())
    assert_same_state(layer.to("cpu").state_dict(), quantized(linear).state_dict())


def test_the_parameter_object_survives_moves_and_loads(linear):
    # Tied layers and optimizers hold the object.
    layer = LinearNF4(K, N)
    weight = layer.weight
    layer.to("cpu").half()
    layer.load_state_dict(quantized(linear).state_dict())
    layer.load_state_dict(linear.state_dict())
    assert layer.weight is weight
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_copy_on_another_device_leaves_the_scales_of_the_first(linear):
    layer = quantized(linear)
    elsewhere = layer.weight.to("meta")
    assert elsewhere.quant_state.state2.code.device.type == "meta"
    assert layer.quant_state.absmax.device.type == layer.quant_state.state2.code.device.type == "cpu"


@pytest.mark.gpu
def test_moves_between_cpu_and_gpu(linear):
    layer = quantized(linear, quant_storage=torch.bfloat16)
    state = copy.deepcopy(layer.state_dict())
    layer.cuda()
    assert layer.quant_state.absmax.device.type == layer.quant_state.state2.code.device.type == "cuda"
    x = torch.randn(3, K)
    assert torch.allclose(layer(x.cuda()).cpu(), quantized(linear)(x), atol=1e-5)
    assert_same_state({key: value.cpu() for key, value in layer.cpu().state_dict().items()}, state)


@pytest.mark.gpu
def test_quantizes_on_the_gpu(linear):
    layer = LinearNF4.from_linear(linear, device="cuda")
    assert layer.weight.device.type == layer.bias.device.type == "cuda"
    fresh = LinearNF4(K, N, device="meta")
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(3, K, device="cuda", dtype=torch.float16)
    assert torch.equal(fresh(x), layer(x))


# Copies.


def test_deepcopy_is_independent(linear):
    layer = quantized(linear)
    twin = copy.deepcopy(layer)
    assert twin.weight.module is twin
    state = copy.deepcopy(layer.state_dict())
    twin.weight.data.zero_()
    twin.quant_state.absmax.zero_()
    twin.quant_state.state2.absmax.zero_()
    assert_same_state(layer.state_dict(), state)


@pytest.mark.parametrize("storage", STORAGES)
def test_pickle_and_torch_save(linear, storage):
    layer = quantized(linear, quant_storage=storage)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded.weight, Params4bit)
    assert loaded.weight.module is loaded
    assert_same_state(loaded.state_dict(), layer.state_dict())
    x = torch.randn(3, K)
    assert torch.equal(loaded(x), layer(x))


def test_state_dict_is_plain_tensors_that_a_safe_load_accepts(linear):
    buffer = io.BytesIO()
    state = quantized(linear).state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    torch.save(state, buffer)
    buffer.seek(0)
    assert_same_state(torch.load(buffer, weights_only=True), state)


def test_state_dict_of_two_layers_goes_into_one_safetensors_file(tmp_path, linear):
    state = nn.Sequential(quantized(linear), quantized(linear)).state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert safetensors.torch.load_file(tmp_path / "model.safetensors").keys() == state.keys()


def test_share_memory(linear):
    layer = quantized(linear).share_memory()
    tensors = [layer.weight, layer.quant_state.absmax, layer.quant_state.state2.absmax, layer.bias]
    assert all(tensor.is_shared() for tensor in tensors)


@pytest.mark.parametrize(
    "split",
    [
        lambda w: torch.chunk(w, 2),
        lambda w: w.chunk(2),
        lambda w: torch.split(w, w.shape[0] // 2),
        lambda w: torch.split(tensor=w, split_size_or_sections=w.shape[0] // 2),
        lambda w: w.split(w.shape[0] // 2),
    ],
)
def test_chunk_and_split_keep_the_class_and_the_scales(linear, split):
    weight = quantized(linear).weight
    parts = split(weight)
    assert [type(part) for part in parts] == [Params4bit, Params4bit]
    assert all(part.quant_state is weight.quant_state and part.bnb_quantized for part in parts)
    assert torch.equal(torch.cat(parts), weight.data)


def test_rebuilds_the_way_transformers_and_accelerate_do(linear):
    old = quantized(linear, blocksize=128, quant_storage=torch.bfloat16).weight
    old._is_hf_initialized = True
    moved = Params4bit(old.to("cpu"), requires_grad=False, **old.__dict__)
    assert torch.equal(as_bytes(moved), as_bytes(old))
    assert moved.quant_state is old.quant_state
    fresh = LinearNF4(K, N, device="meta", blocksize=128)
    new = Params4bit(linear.weight, requires_grad=False, **fresh.weight.__dict__).to("cpu")
    assert torch.equal(as_bytes(new), as_bytes(old))
    assert new.module is fresh
    assert type(new).__name__ == "Params4bit"


def test_a_float_weight_never_inherits_scales(linear):
    old = quantized(linear).weight
    fields = old.__dict__ | {"bnb_quantized": False}  # peft's way
    new = Params4bit(torch.zeros(N, K), requires_grad=False, **fields)
    assert new.quant_state is None
    assert not new.to("cpu").quant_state.absmax.equal(old.quant_state.absmax)


def test_a_bare_tensor_of_the_same_bytes_uses_the_layer_s_scales(linear):
    # FSDP replaces parameters by views of a flat buffer.
    layer = quantized(linear)
    x = torch.randn(3, K)
    expected = layer(x)
    layer._parameters["weight"] = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    assert torch.equal(layer(x), expected)
    layer.weight = nn.Parameter(torch.zeros(N, K))
    with pytest.raises(UserError, match=r"weight of Linear4bit: expected the packed codes of a \(40, 128\) weight"):
        layer(x)


def test_attributes_that_fsdp_and_peft_look_up(linear):
    layer = quantized(linear)
    assert layer.W_q is layer.weight
    for key in STATE_KEYS[2:]:
        value = layer
        for part in key.split("."):
            value = getattr(value, part)
        assert torch.equal(as_bytes(value), as_bytes(layer.state_dict()[key]))
    assert not hasattr(LinearNF4(K, N).weight, "absmax")
    assert not hasattr(quantized(linear, compress_statistics=False).weight, "nested_absmax")


# Loading.


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_strict_load_of_a_quantized_state(linear, device, ready, assign):
    # Another type, block size and storage than the layer was made with: the file decides.
    state = quantized(linear, blocksize=32, quant_storage=torch.float16).state_dict()
    layer = LinearFP4(K, N, device=device)
    if ready and device == "cpu":
        layer.to("cpu")
    assert str(layer.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert_same_state(layer.state_dict(), state)
    assert (layer.weight.quant_type, layer.weight.blocksize, layer.quant_storage) == ("nf4", 32, torch.float16)
    assert (layer.weight.data_ptr() == state["weight"].data_ptr()) == assign
    assert (layer.quant_state.absmax.data_ptr() == state["weight.absmax"].data_ptr()) == assign
    x = torch.randn(3, K)
    assert torch.equal(layer(x), quantized(linear, blocksize=32)(x))


@pytest.mark.parametrize("strict", [True, False])
def test_a_load_never_keeps_old_scales(linear, strict):
    # bitsandbytes copies the new codes beside the old absmax under strict=False.
    layer, other = quantized(linear), quantized(nn.Linear(K, N))
    before = copy.deepcopy(layer.state_dict())
    state = other.state_dict()
    for missing in ("weight", "weight.absmax", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4"):
        partial = {key: value for key, value in state.items() if key not in (missing, "bias")}
        with pytest.raises(RuntimeError, match=r"weight of Linear4bit"):
            layer.load_state_dict({**partial, "bias": before["bias"]}, strict=strict)
        assert_same_state(layer.state_dict(), before)
    with pytest.raises(RuntimeError, match=r"without scales"):
        layer.load_state_dict({"weight": state["weight"], "bias": before["bias"]}, strict=strict)
    layer.load_state_dict(state, strict=strict)
    assert_same_state(layer.state_dict(), state)


@pytest.mark.parametrize("strict", [True, False])
def test_float_weights_into_a_quantized_layer_are_quantized(linear, strict):
    layer = quantized(nn.Linear(K, N))
    layer.load_state_dict(linear.state_dict(), strict=strict)
    assert_same_state(layer.state_dict(), quantized(linear).state_dict())


def test_missing_and_unexpected_keys_are_reported(linear):
    layer = nn.Sequential(LinearNF4(K, N))
    state = nn.Sequential(quantized(linear)).state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.bias"'):
        layer.load_state_dict({key: value for key, value in state.items() if key != "0.bias"})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0.weight.SCB"'):
        layer.load_state_dict({**state, "0.weight.SCB": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.weight", "0.bias"'):
        layer.load_state_dict({})
    result = layer.load_state_dict({}, strict=False)
    assert result.missing_keys == ["0.weight", "0.bias"]


def test_a_state_of_another_shape_is_refused(linear):
    state = nn.Sequential(quantized(nn.Linear(N, K))).state_dict()
    with pytest.raises(RuntimeError, match=r"0.weight: expected the codes of a \(40, 128\) weight, got those of"):
        nn.Sequential(LinearNF4(K, N)).load_state_dict(state, strict=False)
    state["0.weight"] = state["0.weight"][:-1]
    with pytest.raises(RuntimeError, match=r"0.weight: data: expected 2560 torch.uint8 elements"):
        nn.Sequential(LinearNF4(N, K)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"0.weight: expected packed codes with their scales, or a float weight"):
        nn.Sequential(quantized(linear)).load_state_dict(nn.Sequential(nn.Linear(K + 1, N)).state_dict())
