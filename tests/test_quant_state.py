"""QuantState: the wire form byte for byte, the way back, and wrong dictionaries."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from qkernels import QuantState, UserError, quantize_4bit


def make_state(nested: bool = True) -> QuantState:
    return quantize_4bit(torch.randn(32, 64, dtype=torch.float16), quant_type="nf4", compress_statistics=nested)[1]


def test_packed_json_is_byte_for_byte_the_format():
    state = make_state()
    state.offset = torch.tensor(0.5)
    text = bytes(state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"].tolist()).decode()
    assert text == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [32, 64], '
        '"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}'
    )


def test_packed_keys():
    assert list(make_state().as_dict(packed=True)) == [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state.bitsandbytes__nf4",
    ]
    assert list(make_state(nested=False).as_dict(packed=True)) == [
        "absmax",
        "quant_map",
        "quant_state.bitsandbytes__nf4",
    ]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.layers.0.weight."])
def test_round_trip_leaves_its_argument_alone(nested, packed, prefix):
    state = make_state(nested)
    as_dict = {prefix + key: value for key, value in state.as_dict(packed=packed).items()}
    before = set(as_dict)
    assert QuantState.from_dict(as_dict, "cpu") == state
    assert set(as_dict) == before


def test_copies_are_equal_and_a_changed_scale_is_not():
    state = make_state()
    assert copy.deepcopy(state) == state
    assert pickle.loads(pickle.dumps(state)) == state
    other = copy.deepcopy(state)
    other.state2.absmax[0] *= 2
    assert other != state


def test_to_moves_every_tensor_and_returns_itself():
    state = make_state()
    assert state.to("meta") is state
    tensors = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert state.absmax.dtype == torch.uint8


def test_packed_entry_by_attribute():
    # FSDP resolves the dotted key of the state_dict by getattr.
    state = make_state()
    assert torch.equal(state.bitsandbytes__nf4, state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"])
    with pytest.raises(AttributeError, match="bitsandbytes__fp4"):
        _ = state.bitsandbytes__fp4


@pytest.mark.parametrize("key", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_missing_key(key):
    packed = make_state().as_dict(packed=True)
    del packed[key]
    with pytest.raises(UserError, match=f"no {key}"):
        QuantState.from_dict(packed, "cpu")


def test_unknown_key():
    packed = make_state().as_dict(packed=True) | {"scale": torch.ones(1)}
    with pytest.raises(UserError, match="got scale"):
        QuantState.from_dict(packed, "cpu")


def test_two_packed_entries():
    packed = make_state().as_dict(packed=True)
    packed["quant_state.bitsandbytes__fp4"] = packed["quant_state.bitsandbytes__nf4"]
    with pytest.raises(UserError, match="exactly one entry"):
        QuantState.from_dict(packed, "cpu")


def test_no_packed_entry():
    with pytest.raises(UserError, match="got neither"):
        QuantState.from_dict({"absmax": torch.ones(1)}, "cpu")


def test_damaged_dtype():
    with pytest.raises(UserError, match="got 'float99'"):
        QuantState.from_dict(make_state().as_dict() | {"dtype": "float99"}, "cpu")


@pytest.mark.parametrize(
    ("text", "got"), [(b"{bad", "Expecting property name"), (b"\xff\xfe\xfa", "decode"), (b"[1]", "got list")]
)
def test_damaged_json(text, got):
    packed = make_state().as_dict(packed=True)
    packed["quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(UserError, match=got):
        QuantState.from_dict(packed, "cpu")


def test_a_dtype_that_is_no_name():
    with pytest.raises(UserError, match="a torch dtype's name, got 16"):
        QuantState.from_dict(make_state().as_dict() | {"dtype": 16}, "cpu")


def test_a_quoted_cause_ends_once():
    assert str(UserError("x", expected="y", got="z.", remedy="Do.")) == "x: expected y, got z. Do."
