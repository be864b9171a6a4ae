"""The gradient of the 4-bit product: dA = dY W, dbias = sum of dY; the packed weight is frozen.

Room: autograd.  The packed bytes and scales are saved, never a dequantized weight, and backward decodes them to the
dtype of the activations just as forward does, so both use the same weight.

Registered at the operator's Autograd key by hand and not by `torch.library.register_autograd`, whose generic Python
takes longer than the kernels of a small product, in a training step that has hundreds of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops  # noqa: F401  (registers the operators)


def _below_autograd(*arguments: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.qkernels.gemm_4bit.default(*arguments)


class MatMul4Bit(torch.autograd.Function):
    """The arguments are those of the operator `qkernels::gemm_4bit`, but for their order."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        bias: Tensor | None,
        B: Tensor,
        shapeB: Sequence[int],
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        absmax_8bit: Tensor | None,
        absmax_code: Tensor | None,
        absmax_offset: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(B, absmax, absmax_8bit, absmax_code, absmax_offset)
        ctx.weight = shapeB, blocksize, quant_type
        return _below_autograd(
            A, B, shapeB, absmax, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        B, absmax, *nested = ctx.saved_tensors
        shapeB, blocksize, quant_type = ctx.weight
        grad_A = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_A = torch.ops.qkernels.gemm_4bit_dx.default(grad, B, shapeB, absmax, blocksize, quant_type, *nested)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(dim=tuple(range(grad.dim() - 1)), dtype=torch.float32).to(grad.dtype)
        return grad_A, grad_bias, None, None, None, None, None, None, None, None


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    *nested: Tensor | None,
) -> Tensor:
    if torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad)):
        return MatMul4Bit.apply(A, bias, B, shapeB, absmax, blocksize, quant_type, *nested)
    return _below_autograd(A, B, shapeB, absmax, blocksize, quant_type, bias, *nested)


torch.library.impl("qkernels::gemm_4bit", "Autograd", _gemm_4bit)
