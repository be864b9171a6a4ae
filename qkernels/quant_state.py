"""`QuantState`: what, besides the packed bytes, is needed to decode a quantized tensor, and its form in files.

Room: format.  The attribute names, the dictionary keys and their order are those of bitsandbytes 0.50, so that each
library reads the other's checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from .errors import UserError
from .format import QUANT_TYPES

_TENSOR_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_PLAIN_KEYS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")
_PACKED_PREFIX = "bitsandbytes__"


class QuantState:
    """Scales and metadata of one quantized tensor.

    Attributes:
        absmax: one scale a block, float32[blocks]; with double quantization uint8[blocks], codes into `state2.code`.
        shape: shape of the original tensor.
        code: code table, float32[16] (4-bit) or float32[256] (8-bit).
        blocksize: elements a block.
        quant_type: "nf4" or "fp4"; None for 8-bit.
        dtype: dtype of the original tensor, and of the dequantized one.
        offset: mean of the scales, a float32 scalar tensor; None without double quantization.
        state2: QuantState of the 8-bit scales; None without double quantization.
        nested: whether the scales are themselves quantized.
        checked: what `functional.py` found when it last looked at the state; None since an attribute was set.
    """

    checked: Any

    def __init__(
        self,
        absmax: torch.Tensor,
        shape: torch.Size | tuple[int, ...] | None = None,
        code: torch.Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.dtype = dtype
        self.offset = offset
        self.state2 = state2

    def __setattr__(self, name: str, value: object) -> None:
        self.__dict__["checked"] = None
        self.__dict__[name] = value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "checked": None}  # a copy or a file has no use for it, and it holds the packed codes

    @property
    def nested(self) -> bool:
        return self.state2 is not None

    def to(self, device: torch.device | str | int) -> QuantState:
        """Move every tensor to `device`, in place; the dtypes never change.  Returns self."""
        self.absmax = self.absmax.to(device)
        if self.code is not None:
            self.code = self.code.to(device)
        if self.offset is not None:
            self.offset = self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)
        return self

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as a flat dictionary.

        Args:
            packed: tensors only, as safetensors needs: what is not a tensor goes as JSON text into one uint8 tensor,
                key `quant_state.bitsandbytes__<quant_type>`.

        Returns:
            Keys absmax, quant_map, and with double quantization nested_absmax, nested_quant_map; unpacked also
            quant_type, blocksize, dtype, shape, nested_blocksize, nested_dtype, nested_offset.
        """
        # The order is part of the format: the JSON text must come out byte for byte as bitsandbytes writes it.
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            # Copies of both maps: they are shared between layers, and safetensors keeps only one of shared tensors.
            "quant_map": None if self.code is None else self.code.clone(),
            "dtype": _dtype_name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None:
            assert self.state2.code is not None
            assert self.offset is not None
            state |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": self.state2.code.clone(),
                "nested_dtype": _dtype_name(self.state2.dtype),
                "nested_offset": self.offset.item(),
            }
        if not packed:
            return state
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        plain = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
        text = json.dumps(plain).encode("utf-8")
        tensors[f"quant_state.{_PACKED_PREFIX}{self.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8)
        return tensors

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str | int) -> QuantState:
        """Rebuild a state from `as_dict`'s result, packed or not, with or without a prefix to the keys.

        Args:
            qs_dict: left as it is (bitsandbytes empties it).
            device: where the tensors go.

        Raises:
            UserError: a key is missing or unknown, or there is not exactly one packed entry.
        """
        state = _unpack(qs_dict)
        nested = any(key.startswith("nested_") for key in state)
        required = {"absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape"}
        if nested:
            required |= {"nested_absmax", "nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset"}
        if missing := sorted(required - state.keys()):
            raise UserError(
                "qs_dict",
                expected="every key of a saved quantization state",
                got=f"no {', '.join(missing)}",
                remedy="The checkpoint is incomplete, or its keys were renamed; save it again.",
            )
        offset, state2 = None, None
        if nested:
            offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32, device=device)
            state2 = cls(
                absmax=state["nested_absmax"].to(device),
                code=state["nested_quant_map"].to(device),
                blocksize=state["nested_blocksize"],
                dtype=_dtype_from_name(state["nested_dtype"]),
            )
        return cls(
            absmax=state["absmax"].to(device),
            shape=None if state["shape"] is None else torch.Size(state["shape"]),
            code=state["quant_map"].to(device),
            blocksize=state["blocksize"],
            quant_type=state["quant_type"],
            dtype=_dtype_from_name(state["dtype"]),
            offset=offset,
            state2=state2,
        )

    def __getattr__(self, name: str) -> torch.Tensor:
        # FSDP walks the dotted keys of a state_dict by getattr, and one of them is quant_state.bitsandbytes__nf4.
        if name.startswith(_PACKED_PREFIX):
            packed = self.as_dict(packed=True)
            if (key := f"quant_state.{name}") in packed:
                return packed[key]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __eq__(self, other: object) -> bool:
        """Bitwise equal tensors and equal metadata, on any devices."""
        if not isinstance(other, QuantState):
            return NotImplemented
        ours, theirs = self.as_dict(), other.as_dict()
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shape = None if self.shape is None else tuple(self.shape)
        return (
            f"QuantState(quant_type={self.quant_type!r}, shape={shape}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}, nested={self.nested}, device={self.absmax.device})"
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    return a == b


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_from_name(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise UserError("dtype", expected="a torch dtype's name", got=repr(name), remedy="The checkpoint is damaged.")
    return dtype


def _unpack(qs_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Strip prefixes from the keys and unfold the packed JSON entry, if there is one."""
    state = {key.rsplit(".", 1)[-1]: value for key, value in qs_dict.items()}
    packed = [key for key in state if key.startswith(_PACKED_PREFIX)]
    valid = [f"{_PACKED_PREFIX}{quant_type}" for quant_type in QUANT_TYPES]
    if len(packed) > 1 or any(key not in valid for key in packed) or not (packed or "quant_type" in state):
        raise UserError(
            "qs_dict",
            expected=f"exactly one entry out of {', '.join(valid)}, or an unpacked state",
            got=packed or "neither",
            remedy="Pass the entries of one tensor, as `QuantState.as_dict(packed=True)` returns them.",
        )
    if packed:
        state |= _decode_json(state.pop(packed[0]))
    if unknown := sorted(state.keys() - {*_TENSOR_KEYS, *_PLAIN_KEYS}):
        raise UserError(
            "qs_dict",
            expected=f"keys out of {', '.join((*_TENSOR_KEYS, *_PLAIN_KEYS))}",
            got=", ".join(unknown),
            remedy="Pass the entries of one quantized tensor only.",
        )
    return state


def _decode_json(packed: torch.Tensor) -> dict[str, Any]:
    """The packed entry's object.

    Raises:
        UserError: the bytes are not UTF-8, not JSON, or not an object.
    """
    text = bytes(packed.cpu().tolist())
    try:
        plain = json.loads(text)  # bytes: it decodes UTF-8 itself
    except ValueError as error:
        raise _damaged(str(error)) from error
    if not isinstance(plain, dict):
        raise _damaged(type(plain).__name__)
    return plain


def _damaged(got: str) -> UserError:
    return UserError(
        "quant_state",
        expected="the UTF-8 bytes of a JSON object",
        got=got,
        remedy="The checkpoint is damaged; save or download it again.",
    )
