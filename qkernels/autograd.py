"""The gradient of the 4-bit product: dA = dY W, dbias = sum of dY; the packed weight is frozen.

Room: autograd.  The packed bytes and scales are kept, never a dequantized weight, and backward decodes them to the
dtype of the activations just as forward does, so both use the same weight.  The two products are each other's gradient,
so they can be differentiated any number of times.

Registered at the operators' Autograd keys by hand and not by `torch.library.register_autograd`, whose generic Python
takes longer than the kernels of a small product, in a training step that has hundreds of them.  In eager mode on a GPU
not even the operators are asked (`ops.operator`).

The weight is kept as an attribute and not by `save_for_backward`: it is frozen and lives anyway, and torch's
checkpointing recomputes a block up to its last saved tensor, so a block that ends in a frozen product is spared it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import Plan, Weight
from .ops import operator, plan_product


class MatMul4Bit(torch.autograd.Function):
    """y = A W^T + bias."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, bias: Tensor | None, weight: Weight, plan: Plan) -> Tensor:
        ctx.weight = weight
        return plan(A, bias, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_A = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_A = matmul_dx(grad, ctx.weight)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(dim=tuple(range(grad.dim() - 1)), dtype=torch.float32).to(grad.dtype)
        return grad_A, grad_bias, None, None


class MatMul4BitDx(torch.autograd.Function):
    """dA = dY W."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return _product_dx(grad, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return matmul(grads[0], None, ctx.weight), None


# torch's own `apply` in Python sees to function transforms, for half of what a product with a graph costs the host.
_apply_without_transforms = super(torch.autograd.Function, MatMul4Bit).apply


def matmul(A: Tensor, bias: Tensor | None, weight: Weight, plan: Plan | None = None) -> Tensor:
    """y[..., N] = A[..., K] W^T + bias, differentiable in A and bias.

    Args:
        plan: what `plan_product` said of a product of this kind, if that is known; nothing listens then.
    """
    plan = plan or plan_product(A, bias, weight) or _product
    if torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad)):
        apply = MatMul4Bit.apply if plan is _product else _apply_without_transforms
        return apply(A, bias, weight, plan)
    return plan(A, bias, weight)


def matmul_dx(grad: Tensor, weight: Weight) -> Tensor:
    """dA[..., K] = grad[..., N] W, differentiable in grad."""
    if torch.is_grad_enabled() and grad.requires_grad:
        return MatMul4BitDx.apply(grad, weight)
    return _product_dx(grad, weight)


def _product(A: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        B, shapeB, absmax, blocksize, quant_type, *nested = weight
        return operator("gemm_4bit", A)(A, B, shapeB, absmax, blocksize, quant_type, bias, *nested)


def _product_dx(grad: Tensor, weight: Weight) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return operator("gemm_4bit_dx", grad)(grad, *weight)


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
    return matmul(A, bias, (B, shapeB, absmax, blocksize, quant_type, *nested))


def _gemm_4bit_dx(grad: Tensor, *weight: Any) -> Tensor:
    return matmul_dx(grad, weight)


torch.library.impl("qkernels::gemm_4bit", "Autograd", _gemm_4bit)
torch.library.impl("qkernels::gemm_4bit_dx", "Autograd", _gemm_4bit_dx)
