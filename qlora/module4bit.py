"""`Module4bit`: what `Linear4bit` and `Embedding4bit` share: moving, saving, loading and dequantizing a 4-bit weight.

Room: the modules; torch and qkernels only.

The weight is a `Params4bit` that carries its own scales.  Only where something else has replaced it by a bare tensor
of the same bytes (FSDP's flat or sharded parameters) does the layer fall back on the scales it saw last.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from qkernels import QuantState, dequantize_4bit, packed_length
from qkernels.errors import UserError

from .params4bit import Params4bit, map_state

_STATE_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# The same of a layer that has been split for sharding, as buffers.
_BUFFERS = ("quant_absmax", "quant_code", "quant_offset", "quant_nested_absmax", "quant_nested_code")


class Module4bit(nn.Module):
    """A module whose `weight` is a `Params4bit`.

    Attributes:
        weight: the parameter; float until the first move to a device, packed codes afterwards.
        quant_state: scales and metadata of the packed codes; None while the weight is float.
        weight_name: how error messages call the weight: its name in the model where a state_dict told it.
    """

    weight: torch.Tensor  # a Params4bit, unless FSDP put something else there
    # What the subclasses named after a quant_type are bound to.
    fixed_quant_type: ClassVar[str | None] = None

    def _init_weight(self, weight: torch.Tensor, **fields: Any) -> None:
        self._last_quant_state: QuantState | None = None
        self._last_storage: torch.dtype | None = fields["quant_storage"]
        self._known_name = ""
        self.weight = Params4bit(weight, module=self, **fields)

    def _quantize_weight(
        self, weight: torch.Tensor, device: torch.device | str | int | None, quant_type: str | None, **fields: Any
    ) -> None:
        """Take a float weight over and quantize it on `device`, by default its own."""
        quant_type = quant_type or self.fixed_quant_type or "nf4"
        if self.fixed_quant_type not in (None, quant_type):
            raise UserError(
                "quant_type",
                expected=f"{self.fixed_quant_type!r} for {self._get_name()}",
                got=repr(quant_type),
                remedy="Use the class that is not named after a type.",
            )
        device = weight.device if device is None else torch.device(device)
        self.weight = Params4bit(weight, quant_type=quant_type, module=self, **fields).to(device)
        self._last_storage = fields["quant_storage"]

    @property
    def quant_state(self) -> QuantState | None:
        if isinstance(self.weight, Params4bit):
            return self.weight.quant_state
        return _with_buffers(self._last_quant_state, self._buffers) if self.is_split else self._last_quant_state

    @quant_state.setter
    def quant_state(self, quant_state: QuantState | None) -> None:
        self._last_quant_state = quant_state
        if isinstance(self.weight, Params4bit):
            self.weight.quant_state = quant_state

    @property
    def is_split(self) -> bool:
        """Whether codes and scales are apart, see `split_weight`."""
        return _BUFFERS[0] in self._buffers

    def split_weight(self) -> None:
        """Make the packed codes a plain uint8 parameter and the scales buffers, for good.

        FSDP2 then shards the codes like any parameter, byte for byte, whatever its policy for float dtypes; the scales
        (a fortieth of the codes, with double quantization) move with the module and stay whole.  They are not in its
        state_dict, which is not a checkpoint's any more: keep the checkpoint that the layer was loaded from.

        Raises:
            UserError: the weight is not quantized yet.
        """
        if self.is_split:
            return
        packed, quant_state = self._packed()
        needed = packed_length(torch.Size(quant_state.shape or ()).numel(), torch.uint8)
        codes = packed.detach().view(torch.uint8).view(-1)[:needed].view(-1, 1).clone()  # without the storage's padding
        nested = quant_state.state2
        scales = (
            quant_state.absmax,
            quant_state.code,
            quant_state.offset,
            None if nested is None else nested.absmax,
            None if nested is None else nested.code,
        )
        self.weight = nn.Parameter(codes, requires_grad=False)
        self._last_quant_state, self._last_storage = quant_state, torch.uint8
        for name, tensor in zip(_BUFFERS, scales, strict=True):
            buffer = None if tensor is None else tensor.detach().clone()
            self.register_buffer(name, buffer, persistent=False)

    @property
    def weight_name(self) -> str:
        return f"{self._known_name}.weight" if self._known_name else f"weight of {self._get_name()}"

    @property
    def quant_storage(self) -> torch.dtype:
        """dtype the packed bytes are viewed as."""
        return self.weight.quant_storage if isinstance(self.weight, Params4bit) else self.weight.dtype

    @property
    def W_q(self) -> torch.Tensor:
        """The packed weight under the name by which peft finds layers that dequantize themselves (DoRA needs it)."""
        return self.weight

    def _parameter(self, name: str) -> Any:
        """`getattr(self, name)`, which finds a parameter only after a search that takes longer."""
        # FSDP and torch's parametrizations put parameters elsewhere.
        return self._parameters[name] if name in self._parameters else getattr(self, name)

    def _packed(self) -> tuple[torch.Tensor, QuantState]:
        """The packed codes and their scales, or a clear error where there are none."""
        weight = self._parameter("weight")
        quant_state = weight.quant_state if isinstance(weight, Params4bit) else self._last_quant_state
        if quant_state is None:
            raise UserError(
                self.weight_name,
                expected="a quantized weight",
                got=f"{self.weight.dtype} on {self.weight.device}, not quantized yet",
                remedy="Move the layer to its device first: .to('cuda') or .to('cpu') quantizes it.",
            )
        if isinstance(weight, Params4bit):
            return weight, quant_state
        if weight.numel() != packed_length(torch.Size(quant_state.shape or ()).numel(), weight.dtype):
            raise UserError(
                self.weight_name,
                expected=f"the packed codes of a {tuple(quant_state.shape or ())} weight",
                got=f"a {type(weight).__name__} of shape {tuple(weight.shape)}",
                remedy="Assign a Params4bit, or load a state_dict.",
            )
        if self._last_storage not in (None, weight.dtype):
            raise UserError(
                self.weight_name,
                expected=f"packed codes viewed as {self._last_storage}, as they were quantized",
                got=f"{weight.dtype}: something has cast them, and so destroyed them",
                remedy="For FSDP call qlora.prepare_for_fsdp(model) first; mixed precision then leaves them alone.",
            )
        return weight, quant_state

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as the layer uses it.

        Args:
            dtype: float32, float16 or bfloat16; None is the dtype of the weight that was quantized.

        Returns:
            Tensor of the original weight's shape, each value rounded once to `dtype`.

        Raises:
            UserError: the weight is not quantized yet.
        """
        packed, quant_state = self._packed()
        if dtype is not None:
            quant_state = copy.copy(quant_state)
            quant_state.dtype = dtype
        with torch.no_grad():
            return dequantize_4bit(packed.data, quant_state)

    def extra_repr(self) -> str:
        weight = self.weight
        if not isinstance(weight, Params4bit):
            return super().extra_repr()
        parts = [
            super().extra_repr(),
            f"quant_type={weight.quant_type}",
            f"blocksize={weight.blocksize}",
            f"double_quant={weight.compress_statistics}",
            f"quant_storage={weight.quant_storage}",
            "quantized" if weight.bnb_quantized else "not quantized yet",
        ]
        return ", ".join(parts)

    # Moving.

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Module4bit:
        weight = self.weight
        if self.is_split:
            scales = {name: self._buffers.pop(name) for name in _BUFFERS}
            super()._apply(fn, recurse)
            self._buffers.update({name: _moved(tensor, fn) for name, tensor in scales.items()})
            return self
        if not isinstance(weight, Params4bit):
            return super()._apply(fn, recurse)  # type: ignore[return-value]
        # nn.Module would keep the old scales beside moved bytes, and lose the class on the way from or to "meta".
        with self._weight_set_aside():
            super()._apply(fn, recurse)
        with torch.no_grad():
            applied = fn(weight)
        if applied is not weight:
            self._take(_as_params4bit(applied, weight))
        return self

    def _take(self, new: Params4bit) -> None:
        """Make `new` the layer's weight, inside the present Parameter object where torch can (others may hold it)."""
        old = self.weight
        new.module = self
        if isinstance(old, Params4bit) and torch._has_compatible_shallow_copy_type(old, new):
            old.data = new.data
            old.__dict__.update(new.__dict__)
        else:
            self.weight = new
        self._last_quant_state, self._last_storage = new.quant_state, new.quant_storage

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Pickles and deep copies of a Params4bit come without their layer.
        if isinstance(self.weight, Params4bit) and self.weight.module is None:
            self.weight.module = self

    # Saving and loading.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.quant_state is not None and not self.is_split:
            for key, tensor in self.quant_state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._known_name = prefix.rstrip(".") or self._known_name
        value = state_dict.get(f"{prefix}weight")
        stats = _quantized_stats(state_dict, f"{prefix}weight.")
        if self.is_split or (not stats and (value is None or self.quant_state is None)):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        ours = {f"{prefix}weight", *(f"{prefix}weight.{key}" for key in stats)}
        rest = {key: tensor for key, tensor in state_dict.items() if key not in ours}
        assign = local_metadata.get("assign_to_params_buffers", False)
        if self.weight.is_meta and not assign:
            # The packed codes bring their own memory; a bias left on "meta" beside them would help nobody.
            rest = {key: tensor.detach().clone() for key, tensor in rest.items()}
            local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        with self._weight_set_aside():
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        try:
            self._take(self._loaded_weight(value, stats, assign))
        except UserError as error:
            # torch collects what is wrong with every layer and raises once, with strict=False too.
            error_msgs.append(str(error))

    def _loaded_weight(self, value: torch.Tensor | None, stats: dict[str, torch.Tensor], assign: bool) -> Params4bit:
        """The parameter that a state_dict's entries make: packed codes with their scales, or a float weight that is
        quantized in the present format."""
        weight = self.weight
        assert isinstance(weight, Params4bit)
        is_float = value is not None and value.is_floating_point() and tuple(value.shape) == self.weight_shape
        if value is None or not (stats or is_float):
            raise UserError(
                self.weight_name,
                expected=f"packed codes with their scales, or a float weight of shape {self.weight_shape}",
                got="scales alone" if value is None else f"{value.dtype} of shape {tuple(value.shape)} without scales",
                remedy="The checkpoint is incomplete or of another model.",
            )
        device = value.device if assign or weight.is_meta else weight.device
        if not assign:
            value = value.detach().to(device, copy=True)
            stats = {key: tensor.detach().clone() for key, tensor in stats.items()}
        if stats:
            return self._prequantized(value, stats, device)
        return weight._rebuilt(value, quant_state=None, bnb_quantized=False).to(device)

    def _prequantized(self, value: torch.Tensor, stats: dict[str, torch.Tensor], device: torch.device) -> Params4bit:
        try:
            new = Params4bit.from_prequantized(value, stats, device=device)
        except UserError as error:
            name = f"{self.weight_name}: {error.argument}"
            raise UserError(name, expected=error.expected, got=error.got, remedy=error.remedy) from error
        assert new.quant_state is not None
        if tuple(new.quant_state.shape or ()) != self.weight_shape:
            raise UserError(
                self.weight_name,
                expected=f"the codes of a {self.weight_shape} weight",
                got=f"those of a {tuple(new.quant_state.shape or ())} weight",
                remedy="The checkpoint is of another model.",
            )
        return new

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the float weight."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _weight_set_aside(self) -> Iterator[None]:
        """Let nn.Module's own method run on everything but the weight."""
        weight = self._parameters["weight"]
        self._parameters["weight"] = None  # not deleted: the order of the parameters is that of the optimizer's state
        try:
            yield
        finally:
            self._parameters["weight"] = weight


def _quantized_stats(state_dict: Mapping[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    """The entries under `prefix` that describe a quantized weight, by their names without it."""
    names = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    return {name: tensor for name, tensor in names.items() if name in _STATE_KEYS or name.startswith("quant_state.")}


def _moved(tensor: torch.Tensor | None, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    """What `fn` of `nn.Module._apply` makes of a scale, but for a cast, which would damage it."""
    applied = None if tensor is None else fn(tensor)
    if tensor is None or applied is None or applied.dtype == tensor.dtype:
        return applied
    return tensor.to(applied.device)


def _with_buffers(quant_state: QuantState | None, buffers: Mapping[str, torch.Tensor | None]) -> QuantState | None:
    """The state with the tensors that are buffers now."""
    assert quant_state is not None
    new = copy.copy(quant_state)
    absmax, new.code, new.offset, nested_absmax, nested_code = (buffers[name] for name in _BUFFERS)
    assert absmax is not None
    new.absmax = absmax
    if new.state2 is not None and nested_absmax is not None:
        new.state2 = copy.copy(new.state2)
        new.state2.absmax, new.state2.code = nested_absmax, nested_code
    return new


def _as_params4bit(applied: torch.Tensor, weight: Params4bit) -> Params4bit:
    """What a function handed to `nn.Module._apply` made of `weight`, with the class and the scales back."""
    if isinstance(applied, Params4bit):
        return applied
    device = applied.device
    if weight.bnb_quantized and (applied.dtype != weight.dtype or applied.shape != weight.shape):
        applied = weight.data.to(device)  # packed codes are bytes: whatever cast them did not mean to

    def follow(tensor: torch.Tensor) -> torch.Tensor:
        # `to_empty` gives a layer on the meta device memory without values; a state_dict is to follow.
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    return weight._rebuilt(applied, quant_state=map_state(weight.quant_state, follow))
