"""`Params4bit`: a parameter that quantizes itself to 4 bits when it is first moved to a device.

Room: the tensor only; `module4bit.py` holds what the layers around it share.  The class name, the constructor and the
attributes are those of bitsandbytes 0.50, because transformers, peft and accelerate look for them by name.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qkernels import QuantState, packed_length, quantize_4bit
from qkernels.checks import check_blocksize, check_quant_storage, check_quant_type
from qkernels.errors import UserError

# What travels with the bytes when a Params4bit is rebuilt; `module` goes too, except into pickles and deep copies.
_FIELDS = ("blocksize", "compress_statistics", "quant_type", "quant_state", "quant_storage", "bnb_quantized")
_SPLITS = (torch.chunk, torch.split, torch.Tensor.chunk, torch.Tensor.split)


def _state_property(name: str, get: Callable[[QuantState], torch.Tensor | None]) -> property:
    """A read-only attribute of the parameter, taken from its quantization state; absent while there is none."""

    def read(self: Params4bit) -> torch.Tensor:
        value = None if self.quant_state is None else get(self.quant_state)
        if value is None:
            raise AttributeError(f"'Params4bit' object has no attribute '{name}'")
        return value

    return property(read)


class Params4bit(nn.Parameter):
    """A weight that is float until its first move to a device (the CPU too) and packed 4-bit codes from then on.

    Args:
        data: float32, float16 or bfloat16 weight of any shape; or, with `bnb_quantized`, its packed codes.
        requires_grad: packed codes cannot be trained; leave it False.
        quant_state: scales and metadata of packed codes; ignored unless `bnb_quantized`.
        blocksize: elements a scale; None is 64.
        compress_statistics: double quantization (8-bit scales); None is False.
        quant_type: "nf4" or "fp4".
        quant_storage: dtype the packed bytes are viewed as (FSDP wants it to equal the model's dtype).
        module: the layer that holds it; kept as a weak reference, so that deleting a layer frees its memory at once.
        bnb_quantized: `data` is packed already.
        kwargs: ignored.  transformers rebuilds parameters by `Params4bit(value, **old.__dict__)`, and that dictionary
            also holds whatever it or torch.compile attached to the old one.

    Attributes are the arguments of the same names.  Casting (`half()`, `to(dtype)`, ...) changes the dtype of a float
    weight and leaves packed codes and their scales as they are.

    Raises:
        UserError: an unknown quant_type, blocksize or quant_storage; `bnb_quantized` data of another dtype than
            `quant_storage`; when quantizing, NaN or Inf in the weight.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool

    def __new__(
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool | None = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | weakref.ref[nn.Module] | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        data = torch.empty(0) if data is None else data
        blocksize = 64 if blocksize is None else blocksize
        check_quant_type(quant_type)
        check_blocksize(blocksize)
        check_quant_storage(quant_storage)
        if bnb_quantized and data.dtype != quant_storage:
            raise UserError(
                "data",
                expected=f"packed codes of dtype {quant_storage}, since bnb_quantized is True",
                got=f"{data.dtype} of shape {tuple(data.shape)}",
                remedy="For a float weight pass bnb_quantized=False and move the parameter to its device.",
            )
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad)
        self.blocksize = blocksize
        self.compress_statistics = bool(compress_statistics)
        self.quant_type = quant_type
        # Scales belong to one set of packed bytes.  A float weight must never inherit those of the weight it replaces.
        self.quant_state = quant_state if bnb_quantized else None
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self._set_module(module)
        return self

    @property
    def module(self) -> nn.Module | None:
        """The layer that holds the parameter, if it is known and alive."""
        reference = self.__dict__.get("module")
        return None if reference is None else reference()

    @module.setter
    def module(self, module: nn.Module | weakref.ref[nn.Module] | None) -> None:
        self._set_module(module)

    def _set_module(self, module: nn.Module | weakref.ref[nn.Module] | None) -> None:
        # Under the key "module", where `Params4bit(value, **old.__dict__)` passes it on.
        self.__dict__["module"] = weakref.ref(module) if isinstance(module, nn.Module) else module

    @classmethod
    def from_prequantized(
        cls,
        data: torch.Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | int = "cuda",
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """Put packed codes and their saved scales together again.

        Args:
            data: packed codes, any `quant_storage`.
            quantized_stats: the entries that `QuantState.as_dict(packed=True)` made of the scales, prefixed or not.
            requires_grad: leave it False.
            device: where codes and scales go.
            module: the layer that will hold the parameter.
            kwargs: ignored, as in the constructor.

        Raises:
            UserError: entries are missing or unknown, or the packed codes are not as many as the saved shape needs.
        """
        quant_state = QuantState.from_dict(quantized_stats, device=device)
        needed = packed_length(torch.Size(quant_state.shape or ()).numel(), data.dtype)
        if data.numel() != needed:
            raise UserError(
                "data",
                expected=f"{needed} {data.dtype} elements of packed codes for shape {tuple(quant_state.shape or ())}",
                got=f"shape {tuple(data.shape)}",
                remedy="The codes and the scales are of different tensors, or the file is damaged.",
            )
        self = cls(
            data.to(device),
            requires_grad=requires_grad,
            quant_state=quant_state,
            blocksize=quant_state.blocksize,
            compress_statistics=quant_state.nested,
            quant_type=quant_state.quant_type or "",
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
        )
        if module is not None:
            module.quant_state = quant_state  # type: ignore[assignment]
        return self

    # FSDP walks the dotted keys of a state_dict (weight.absmax, ...) by getattr.
    absmax = _state_property("absmax", lambda state: state.absmax)
    quant_map = _state_property("quant_map", lambda state: state.code)
    nested_absmax = _state_property("nested_absmax", lambda state: state.state2.absmax if state.state2 else None)
    nested_quant_map = _state_property("nested_quant_map", lambda state: state.state2.code if state.state2 else None)

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FIELDS}

    def _rebuilt(self, data: torch.Tensor, **changes: Any) -> Params4bit:
        fields = self._fields() | {"module": self.module, "requires_grad": self.requires_grad} | changes
        return type(self)(data, **fields)

    def _quantize(self, device: torch.device | str | int, dtype: torch.dtype | None = None) -> Params4bit:
        """Quantize in place on `device`; `dtype` is what the weight will decode to, its own if None."""
        data = self.data.to(device)
        if dtype == torch.float64:
            data = data.to(dtype)  # not a dtype of the format: refused below
        try:
            packed, quant_state = quantize_4bit(
                data.contiguous(),
                blocksize=self.blocksize,
                compress_statistics=self.compress_statistics,
                quant_type=self.quant_type,
                quant_storage=self.quant_storage,
            )
        except UserError as error:
            argument, dot, part = error.argument.partition(".")
            if argument != "A":
                raise
            name, remedy = f"{self._name()}{dot}{part}", error.remedy
            if not dot and not data.isfinite().all():  # its own remedy names an argument that layers do not have
                remedy = "They would silently spoil their blocks: mend the weights, or keep this layer float."
            raise UserError(name, expected=error.expected, got=error.got, remedy=remedy) from error
        if dtype is not None:
            quant_state.dtype = dtype
        self.data = packed
        self.quant_state = quant_state
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = quant_state  # type: ignore[assignment]
        return self

    def _name(self) -> str:
        if self.module is None:
            return "weight"
        return getattr(self.module, "weight_name", "weight")

    # Moving and casting.  nn.Module's own `to`, `half`, `cuda`, ... end here, one parameter at a time.

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:  # type: ignore[override]
        """`Tensor.to`, except that the first device quantizes (in place) and packed codes are never cast.

        The copy of quantized codes on another device has scales of its own there; this one's stay where they are.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "meta" and not self.bnb_quantized:
            return self._quantize(device, dtype)
        if not self.bnb_quantized:
            return self._rebuilt(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking))
        if device is None or device == self.device:
            return self
        return self._rebuilt(
            self.data.to(device=device, non_blocking=non_blocking),
            quant_state=map_state(self.quant_state, lambda tensor: tensor.to(device)),
        )

    def cpu(self, *args: Any, **kwargs: Any) -> Params4bit:  # type: ignore[override]
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Params4bit:  # type: ignore[override]
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def half(self, *args: Any, **kwargs: Any) -> Params4bit:  # type: ignore[override]
        return self.to(torch.float16)

    def bfloat16(self, *args: Any, **kwargs: Any) -> Params4bit:  # type: ignore[override]
        return self.to(torch.bfloat16)

    def float(self, *args: Any, **kwargs: Any) -> Params4bit:  # type: ignore[override]
        return self.to(torch.float32)

    def double(self, *args: Any, **kwargs: Any) -> Params4bit:  # type: ignore[override]
        return self.to(torch.float64)

    def share_memory_(self) -> Params4bit:  # type: ignore[override]
        super().share_memory_()
        map_state(self.quant_state, torch.Tensor.share_memory_)
        return self

    # Copies.

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        # Without the module: the copied layer, if there is one, takes the copy in.
        new = self._rebuilt(self.data.clone(), quant_state=copy.deepcopy(self.quant_state, memo), module=None)
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # nn.Parameter's own would come back as a plain nn.Parameter.
        return _rebuild, (type(self), self.data, self.requires_grad, self._fields())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # FSDP shards parameters by torch.chunk and torch.split and needs the class back.
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func not in _SPLITS:
            return result
        whole = args[0] if args else next(value for value in kwargs.values() if isinstance(value, cls))
        return tuple(whole._rebuilt(part) for part in result)


def _rebuild(cls: type[Params4bit], data: torch.Tensor, requires_grad: bool, fields: dict[str, Any]) -> Params4bit:
    return cls(data, requires_grad=requires_grad, **fields)


def map_state(quant_state: QuantState | None, fn: Callable[[torch.Tensor], torch.Tensor]) -> QuantState | None:
    """A copy of the state, and of the nested one, with `fn` applied to every tensor."""
    if quant_state is None:
        return None
    new = copy.copy(quant_state)
    new.absmax = fn(quant_state.absmax)
    new.code = None if quant_state.code is None else fn(quant_state.code)
    new.offset = None if quant_state.offset is None else fn(quant_state.offset)
    new.state2 = map_state(quant_state.state2, fn)
    return new
