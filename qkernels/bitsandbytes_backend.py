"""This project's kernels inside an installed bitsandbytes, so that unchanged code runs on them.

Room: bitsandbytes' operators by name; it never imports that library.  bitsandbytes loads the entry points of the group
"bitsandbytes.backends" when it is imported and calls each: here `register`, which puts our implementations of its 4-bit
and blockwise operators in the place of its CUDA ones.  Nothing is patched; torch's dispatcher finds ours.

`QKERNELS_BITSANDBYTES=0` in the environment leaves bitsandbytes as it is.  Comparisons with bitsandbytes must set it.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import checks
from .errors import UserError
from .format import QUANT_TYPES, get_4bit_type
from .ops import operator

VARIABLE = "QKERNELS_BITSANDBYTES"
# What has been put in place in this process: (operator, device type).
registered: set[tuple[str, str]] = set()
_quant_types = WeakTensorKeyDictionary()
_library = torch.library.Library("bitsandbytes", "IMPL")


def reason_not_to() -> str | None:
    """Why bitsandbytes is left as it is on this machine; None where it gets our kernels."""
    if os.environ.get(VARIABLE, "1") in ("0", "false", "off"):
        return f"{VARIABLE}={os.environ[VARIABLE]}"
    if torch.version.hip is not None:
        return "a ROCm build of torch; the kernels are written for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def register(device: str = "cuda") -> None:
    """Put our implementations in the place of bitsandbytes', where `reason_not_to` has nothing against it.

    bitsandbytes calls it without arguments.  An operator that it does not have, or has with other arguments than in
    0.50, is left alone.

    Args:
        device: type of the devices; the tests take "cpu", on which the mathematics is plain torch.
    """
    if reason_not_to() is not None:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel", UserWarning)
        for name, implementation in OPERATORS.items():
            if (name, device) not in registered and _arguments_of(name) == list(signature(implementation).parameters):
                # torch.library.register_kernel refuses an operator that has a kernel from Python: bitsandbytes' have.
                _library.impl(name, implementation, device.upper(), allow_override=True)
                registered.add((name, device))


def _arguments_of(name: str) -> list[str] | None:
    """The names of the arguments of bitsandbytes' operator; None if there is no such operator."""
    packet, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops.bitsandbytes, packet, None), overload or "default", None)
    return None if found is None else [argument.name for argument in found._schema.arguments]


def _quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    _check_format(blocksize, quant_type)
    checks.check_floating("A", A)
    # As bitsandbytes does it, a NaN is quantized silently.
    return operator("quantize_4bit", A)(A.contiguous(), blocksize, quant_type, quant_storage, False)


def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return operator("dequantize_4bit", A)(*_to_decode(A, absmax, blocksize, quant_type, shape, dtype))


def _dequantize_4bit_out(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype, out: Tensor
) -> None:
    checks.check_out("out", out, torch.Size(shape), dtype, A.device)
    operator("dequantize_4bit.out", A)(*_to_decode(A, absmax, blocksize, quant_type, shape, dtype), out=out)


def _to_decode(A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, *shape_and_dtype: Any) -> tuple[Any, ...]:
    """Our operators' arguments: bitsandbytes decodes nested scales before."""
    _check_format(blocksize, quant_type)
    return A.contiguous(), absmax.contiguous(), blocksize, quant_type, *shape_and_dtype, None, None, None


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    _check_format(blocksize, quant_type)
    nested = (absmax_8bit, absmax_code, absmax_offset)
    weight = (B.contiguous().view(-1), shapeB, absmax, blocksize, quant_type)
    return operator("gemm_4bit", A)(A.contiguous(), *weight, bias, *nested)


def _gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    return _gemm_4bit(A, B, shapeB, absmax, blocksize, _quant_type_of(code))


def _gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    out.copy_(_gemv_4bit(A, B, shapeB, absmax, code, blocksize))


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    checks.check_floating("A", A)
    checks.check_blocksize(blocksize)
    checks.check_code("code", code)
    return operator("quantize_blockwise", A)(A.contiguous(), code.contiguous(), blocksize)


def _dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    checks.check_blocksize(blocksize)
    checks.check_code("code", code)
    return operator("dequantize_blockwise", A)(A.contiguous(), absmax, code.contiguous(), blocksize, dtype)


def _dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    checks.check_blocksize(blocksize)
    checks.check_code("code", code)
    checks.check_out("out", out, A.shape, dtype, A.device)
    operator("dequantize_blockwise.out", A)(A.contiguous(), absmax, code.contiguous(), blocksize, dtype, out=out)


def _check_format(blocksize: int, quant_type: str) -> None:
    checks.check_blocksize(blocksize)
    checks.check_quant_type(quant_type)


def _quant_type_of(code: Tensor) -> str:
    """Which table `code` is.  Reading it waits for the GPU, so it is remembered as long as the tensor lives."""
    if code not in _quant_types:
        values = code.tolist()
        found = [name for name in QUANT_TYPES if values == get_4bit_type(name, device="cpu").tolist()]
        if not found:
            raise UserError("code", expected="the table of nf4 or fp4", got="another one", remedy="Use one of these.")
        _quant_types[code] = found[0]
    return _quant_types[code]


OPERATORS: dict[str, Callable[..., Any]] = {
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "dequantize_4bit.out": _dequantize_4bit_out,
    "gemm_4bit": _gemm_4bit,
    "gemv_4bit": _gemv_4bit,
    "gemv_4bit.out": _gemv_4bit_out,
    "quantize_blockwise": _quantize_blockwise,
    "dequantize_blockwise": _dequantize_blockwise,
    "dequantize_blockwise.out": _dequantize_blockwise_out,
}
