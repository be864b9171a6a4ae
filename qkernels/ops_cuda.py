"""The CUDA implementations of the operators: allocate, choose the configuration, launch.

Room: imported by `ops.py` where Triton is installed.  Triton launches on the current device and stream, so each
launch first makes the tensor's device the current one; the caller's stream is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.blockwise import dequantize_blockwise_triton, quantize_blockwise_triton
from .kernels.dequantize import dequantize_4bit_triton
from .kernels.quantize import quantize_4bit_triton
from .tuning import elementwise_config


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one; free of cost where it is already."""
    if tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@torch.library.impl("qkernels::quantize_4bit", "CUDA")
def _(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    with _on_device_of(A):
        return quantize_4bit_triton(
            A, blocksize, quant_type, quant_storage, elementwise_config("quantize_4bit", blocksize)
        )


@torch.library.impl("qkernels::dequantize_4bit.out", "CUDA")
def _(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    *nested: Tensor | None,
    out: Tensor,
) -> None:
    with _on_device_of(A):
        dequantize_4bit_triton(
            A, absmax, blocksize, quant_type, out, elementwise_config("dequantize_4bit", blocksize), *nested
        )


def dequantize_4bit(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    *nested: Tensor | None,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=A.device)
    with _on_device_of(A):
        dequantize_4bit_triton(
            A, absmax, blocksize, quant_type, out, elementwise_config("dequantize_4bit", blocksize), *nested
        )
    return out


torch.library.impl("qkernels::dequantize_4bit", "CUDA", dequantize_4bit)


@torch.library.impl("qkernels::quantize_blockwise", "CUDA")
def _(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    with _on_device_of(A):
        return quantize_blockwise_triton(A, code, blocksize, elementwise_config("quantize_blockwise", blocksize))


@torch.library.impl("qkernels::dequantize_blockwise.out", "CUDA")
def _(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, *, out: Tensor) -> None:
    with _on_device_of(A):
        dequantize_blockwise_triton(
            A, absmax, code, blocksize, out, elementwise_config("dequantize_blockwise", blocksize)
        )


@torch.library.impl("qkernels::dequantize_blockwise", "CUDA")
def _(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(A.shape, dtype=dtype, device=A.device)
    with _on_device_of(A):
        dequantize_blockwise_triton(
            A, absmax, code, blocksize, out, elementwise_config("dequantize_blockwise", blocksize)
        )
    return out


# The products dequantize to the activations' dtype and hand over to cuBLAS.  They call the function above and not its
# operator: a second trip through the dispatcher costs more than the launch.


@torch.library.impl("qkernels::gemm_4bit", "CUDA")
def _(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    *nested: Tensor | None,
) -> Tensor:
    return F.linear(A, dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype, *nested), bias)


@torch.library.impl("qkernels::gemm_4bit_dx", "CUDA")
def _(
    grad: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    *nested: Tensor | None,
) -> Tensor:
    return grad @ dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, grad.dtype, *nested)
