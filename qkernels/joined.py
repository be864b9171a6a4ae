"""A 4-bit product and its adapter's update in one: y = x W^T + bias + scaling (dropout(x) A^T) B^T, and the gradients.

Room: the public function and its gradient, as `functional.py` and `autograd.py` for the product alone.  What is kept is
x and the inner product of rank r; nothing dropped or decoded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .adapter import Drop, adapter_gradients
from .autograd import matmul_dx
from .dispatch import Weight
from .dropout import threshold_and_scale
from .functional import autocast_dtype
from .known import weight_of
from .ops import in_eager_mode, operator
from .quant_state import QuantState

# scaling, seed, threshold, kept_scale: as the operators take them.
Scalars = tuple[float, Tensor | None, int, float]


def matmul_4bit_lora(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = A W^T + bias + scaling (dropout(A) lora_A^T) lora_B^T, with W [N, K] held in 4 bits and frozen.

    Differentiable with respect to A, bias, lora_A and lora_B.  The products are in A's dtype (in autocast's under
    autocast), to which the factors are rounded; the gradients of the factors are summed in float32.

    Args:
        A: activations [..., K], float32, float16 or bfloat16; the leading dimensions may be empty.
        B: packed codes of W, as for `matmul_4bit`.
        quant_state: W's state, of shape (N, K).
        lora_A: [r, K], float32 or 16 bits.
        lora_B: [N, r], likewise.
        scaling: of the update.
        bias: [N]; cast to A's dtype.
        p: share of A that is dropped on its way to the adapter.
        seed: int64[1] of `seeded_dropout`; None drops nothing.

    Returns:
        [..., N] in A's dtype (in autocast's dtype under autocast).

    Raises:
        UserError (a ValueError): the shapes, dtypes or devices do not fit each other.
    """
    weight = weight_of(B, quant_state)
    checks.check_activations("A", A, weight[0], weight[1], bias)
    checks.check_adapter(lora_A, lora_B, weight[1], A)
    if seed is not None:
        checks.check_dropout("A", A, p, seed)
    dtype = autocast_dtype(A) or A.dtype
    A = A.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    scalars: Scalars = (float(scaling), seed, *threshold_and_scale(p))
    if in_eager_mode(A):
        return _matmul_lora(A, bias, lora_A, lora_B, weight, scalars)[0]
    arguments = (A, *weight[:5], bias, lora_A, lora_B, *scalars, *weight[5:])
    return torch.ops.qkernels.lora_4bit.default(*arguments)[0]


class _MatMul4BitLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, A: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, weight: Weight, scalars: Scalars
    ) -> tuple[Tensor, Tensor]:
        y, inner = _product(A, bias, lora_A, lora_B, weight, scalars)
        ctx.save_for_backward(A, inner, lora_A, lora_B)
        ctx.weight, ctx.scalars = weight, scalars
        ctx.mark_non_differentiable(inner)
        return y, inner

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(dim=tuple(range(grad.dim() - 1)), dtype=torch.float32).to(grad.dtype)
        gradients = _differentiable if torch.is_grad_enabled() else _gradients
        grad_A, *factors = gradients(ctx, grad)
        return grad_A, grad_bias, *factors, None, None


def _matmul_lora(
    A: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, weight: Weight, scalars: Scalars
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (A, bias, lora_A, lora_B)):
        return _MatMul4BitLora.apply(A, bias, lora_A, lora_B, weight, scalars)
    return _product(A, bias, lora_A, lora_B, weight, scalars)


def _product(
    A: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, weight: Weight, scalars: Scalars
) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return operator("lora_4bit", A)(A, *weight[:5], bias, lora_A, lora_B, *scalars, *weight[5:])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    A, inner, lora_A, lora_B = ctx.saved_tensors
    weight, needs_dA = ctx.weight, ctx.needs_input_grad[0]
    arguments = (grad, A, inner, *weight[:5], lora_A, lora_B, *ctx.scalars, needs_dA, *weight[5:])
    with torch._C._AutoDispatchBelowAutograd():
        dA, *factors = operator("lora_4bit_backward", grad)(*arguments)
    return dA if needs_dA else None, *factors


def _differentiable(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same of products that have gradients themselves, for create_graph=True."""
    A, _, lora_A, lora_B = ctx.saved_tensors
    scaling, drop = ctx.scalars[0], _mask(A, ctx.scalars)
    inner = drop(A).reshape(-1, A.shape[-1]) @ lora_A.to(A.dtype).t()
    dA, *factors = adapter_gradients(grad, A, inner, lora_A, lora_B, scaling, drop)
    return dA + matmul_dx(grad, ctx.weight), *(
        f.to(like.dtype) for f, like in zip(factors, (lora_A, lora_B), strict=True)
    )


def _mask(A: Tensor, scalars: Scalars) -> Drop:
    _, seed, threshold, kept_scale = scalars
    if seed is None:
        return lambda t: t
    mask = operator("dropout", A)(torch.ones_like(A), seed, threshold, kept_scale)
    return lambda t: t * mask


def _lora_4bit(A: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    B, shapeB, absmax, blocksize, quant_type, bias, lora_A, lora_B, scaling, seed, threshold, kept_scale, *nested = (
        arguments
    )
    weight = (B, shapeB, absmax, blocksize, quant_type, *nested)
    return _matmul_lora(A, bias, lora_A, lora_B, weight, (scaling, seed, threshold, kept_scale))


torch.library.impl("qkernels::lora_4bit", "Autograd", _lora_4bit)
