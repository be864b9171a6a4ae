"""What a captured pass has fixed of a model, to be compared before it is replayed.

Room: reading modules; torch only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def state_of(model: nn.Module) -> list[Any]:
    """Modules, modes, adapters that act, and where the numbers lie: equal lists mean the same kernels.

    Numbers that change in their place, as an optimizer changes them, are not in it; a graph reads them anew.
    """
    return [_of_module(module) for module in model.modules()]


def is_listened_to(model: nn.Module) -> bool:
    """Whether a module inside has hooks, which a graph would not call."""
    return any(has_hooks(module) for module in model.modules() if module is not model)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called with this module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def on_gpu(tensor: Tensor) -> bool:
    """Whether it lies on one."""
    return tensor.is_cuda


def _of_module(module: Any) -> tuple[Any, ...]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    adapters: tuple[Any, ...] = ()
    if hasattr(module, "merged_adapters"):  # peft's
        adapters = (module.disable_adapters, *module.active_adapters, *module.merged_adapters, *module.scaling.items())
    return (type(module), module.training, *adapters, *map(_place, tensors))


def _place(tensor: Tensor | None) -> Any:
    """Where a tensor lies, and the scales of one in 4 bits."""
    if tensor is None:
        return None
    scales = getattr(tensor, "quant_state", None)
    nested = None if scales is None else scales.state2
    return (tensor.data_ptr(), tensor.dtype, *(one.absmax.data_ptr() for one in (scales, nested) if one is not None))
