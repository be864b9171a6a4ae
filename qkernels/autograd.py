"""The gradient of the 4-bit product: dA = dY W, dbias = sum of dY; the packed weight is frozen.

Room: autograd.  The packed bytes and scales are saved, never a dequantized weight, and backward decodes them to the
dtype of the activations just as forward does, so both use the same weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops  # noqa: F401  (registers the operators that get a gradient here)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _A, B, ctx.shapeB, absmax, ctx.blocksize, ctx.quant_type, bias, *nested = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(B, absmax, *nested)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    B, absmax, *nested = ctx.saved_tensors
    grad_A = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_A = torch.ops.qkernels.gemm_4bit_dx.default(
            grad, B, ctx.shapeB, absmax, ctx.blocksize, ctx.quant_type, *nested
        )
    if ctx.needs_input_grad[6]:
        grad_bias = grad.sum(dim=tuple(range(grad.dim() - 1)), dtype=torch.float32).to(ctx.bias_dtype)
    return grad_A, None, None, None, None, None, grad_bias, None, None, None


torch.library.register_autograd("qkernels::gemm_4bit", _backward, setup_context=_setup_context)
