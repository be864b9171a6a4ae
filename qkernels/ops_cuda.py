"""The CUDA implementations of the operators: allocate, choose the configuration, launch.

Room: imported by `ops.py` where Triton is installed.  Triton launches on the current device and stream, so each
launch first makes the tensor's device the current one; the caller's stream is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.blockwise import dequantize_blockwise_triton, quantize_blockwise_triton
from .kernels.dequantize import dequantize_4bit_triton
from .kernels.quantize import quantize_4bit_triton
from .tuning import elementwise_config


@torch.library.impl("qkernels::quantize_4bit", "CUDA")
def _(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.cuda.device(A.device):
        return quantize_4bit_triton(A, blocksize, quant_type, quant_storage, elementwise_config(blocksize))


@torch.library.impl("qkernels::dequantize_4bit.out", "CUDA")
def _(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
    *,
    out: Tensor,
) -> None:
    config = elementwise_config(blocksize)
    with torch.cuda.device(A.device):
        dequantize_4bit_triton(A, absmax, blocksize, quant_type, out, absmax_8bit, absmax_code, absmax_offset, config)


@torch.library.impl("qkernels::dequantize_4bit", "CUDA")
def _(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=A.device)
    config = elementwise_config(blocksize)
    with torch.cuda.device(A.device):
        dequantize_4bit_triton(A, absmax, blocksize, quant_type, out, absmax_8bit, absmax_code, absmax_offset, config)
    return out


@torch.library.impl("qkernels::quantize_blockwise", "CUDA")
def _(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    with torch.cuda.device(A.device):
        return quantize_blockwise_triton(A, code, blocksize, elementwise_config(blocksize))


@torch.library.impl("qkernels::dequantize_blockwise.out", "CUDA")
def _(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, *, out: Tensor) -> None:
    with torch.cuda.device(A.device):
        dequantize_blockwise_triton(A, absmax, code, blocksize, out, elementwise_config(blocksize))


@torch.library.impl("qkernels::dequantize_blockwise", "CUDA")
def _(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(A.shape, dtype=dtype, device=A.device)
    with torch.cuda.device(A.device):
        dequantize_blockwise_triton(A, absmax, code, blocksize, out, elementwise_config(blocksize))
    return out
