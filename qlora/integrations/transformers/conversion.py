"""What happens to one weight on its way from the checkpoint into a 4-bit layer.

Room: transformers' conversion operations.  transformers collects whatever an operation raises and reports all of it
in one RuntimeError about its own internals.  A `UserError` is therefore kept in `refused`, by the name of the weight,
and the quantizer raises it when loading is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.quantizers_utils import get_module_from_name

from qkernels.errors import UserError

from ...module4bit import Module4bit
from ...params4bit import Params4bit

# What a 4-bit layer writes for one weight.  "weight" is last: transformers 5.17 takes the first pattern that matches.
STORED_NAMES = (
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "weight",
)


class Quantize(ConversionOps):
    """One float weight to a quantized parameter, on the device it has been put on.

    Args:
        refused: errors by the weight's name; written to.
    """

    def __init__(self, refused: dict[str, UserError]) -> None:
        self.refused = refused

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        result: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            layer, _ = get_module_from_name(model, name)
            try:
                result[name] = quantized_weight(name, _single(value), layer)
            except UserError as error:
                self.refused[name] = error
                result[name] = torch.empty(0)  # loading goes on, to name every bad weight; a float one would take room
        return result


class Deserialize(ConversionOps):
    """The stored tensors of one `weight` to a parameter: packed codes with their scales, or a float weight as it is.

    Args:
        hf_quantizer: the quantizer.  By this attribute's name transformers 5.24 knows not to cast what the operation
            reads, which would damage the scales; float weights are cast here instead.
    """

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Deserialize:
        # transformers copies the converter for each weight; what is refused must reach the one quantizer.
        return self

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        tensors = {name: _single(value) for name, value in input_dict.items()}
        layer, _ = get_module_from_name(model, full_layer_name)
        try:
            return {"weight": stored_weight(full_layer_name, tensors, layer, self.hf_quantizer.dtype)}
        except UserError as error:
            self.hf_quantizer.refused[full_layer_name] = error
            return {"weight": layer.weight}


def converters(hf_quantizer: Any) -> list[WeightConverter]:
    """How the tensors of a 4-bit checkpoint become weights."""
    return [WeightConverter(list(STORED_NAMES), "weight", [Deserialize(hf_quantizer)])]


def without_ours(conversions: list[Any] | None) -> list[Any]:
    """The conversions that saving has to undo: not ours, since codes and scales are saved as they were read."""
    return [
        conversion
        for conversion in conversions or []
        if not any(isinstance(op, Deserialize) for op in getattr(conversion, "operations", ()))
    ]


def quantized_weight(name: str, value: torch.Tensor, layer: Module4bit) -> Params4bit:
    """Quantize a float weight as `layer` wants it, where it is.

    Args:
        name: how errors call the weight.
        value: float32, float16 or bfloat16, of the layer's shape.
        layer: holds a float `Params4bit` on any device, "meta" included, which says how to quantize.

    Raises:
        UserError: another shape; NaN or Inf in the weight.
    """
    if tuple(value.shape) != layer.weight_shape:
        raise wrong_shape(name, value.shape, layer.weight_shape)
    old = layer.weight
    assert isinstance(old, Params4bit)
    return Params4bit(value, requires_grad=False, **vars(old)).to(value.device)


def stored_weight(
    name: str, tensors: Mapping[str, torch.Tensor], layer: nn.Module, dtype: torch.dtype | None
) -> torch.Tensor:
    """The parameter that a checkpoint's tensors make.

    Args:
        name: how errors call the weight.
        tensors: by their names from "weight" on: packed codes and scales for a 4-bit layer, else one float weight.
        layer: what the parameter is for.
        dtype: what the codes are to decode to; the codes are the same for every dtype.  None is what they came from.

    Raises:
        UserError: codes for a float layer, a float weight for a 4-bit layer, missing scales, another shape.
    """
    data = tensors.get("weight")
    if data is None:
        raise missing_weight(name)
    is_packed = len(tensors) > 1
    if is_packed != isinstance(layer, Module4bit):
        raise UserError(
            name,
            expected="a float weight" if is_packed else "packed 4-bit codes with their scales",
            got="packed 4-bit codes" if is_packed else f"a plain {data.dtype} weight",
            remedy="The weights and the quantization_config in config.json disagree: modules_to_not_convert there "
            "and quantize_embeddings must mean exactly the layers that are stored as float.",
        )
    if not isinstance(layer, Module4bit):
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        return data.to(weight.dtype) if data.is_floating_point() else data
    scales = {key: tensor for key, tensor in tensors.items() if key != "weight"}
    parameter = Params4bit.from_prequantized(data, scales, device=data.device, module=layer)
    state = parameter.quant_state
    assert state is not None
    if tuple(state.shape or ()) != layer.weight_shape:
        raise wrong_shape(name, state.shape or (), layer.weight_shape)
    state.dtype = dtype or state.dtype
    return parameter


def missing_weight(name: str) -> UserError:
    return UserError(
        name,
        expected="a weight in the checkpoint",
        got="none",
        remedy="The checkpoint is incomplete, or of another model than its config.json.",
    )


def wrong_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> UserError:
    return UserError(
        name,
        expected=f"shape {tuple(wanted)}",
        got=tuple(shape),
        remedy="The weights are of another model than config.json.",
    )


def _single(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, list) else value
