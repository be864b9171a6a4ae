"""A low-rank adapter's products in plain torch: y += scaling (dropout(x) A^T) B^T, and their gradients.

Room: mathematics; torch only.  The CPU's implementation, and the GPU's where `kernels/lora.py` is not for a product.
A [r, K] and B [N, r] may be float32 (the optimizer's); the products are in the activations' dtype, and what the sum
over the rows gives for A and B is float32 all the way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Drop = Callable[[Tensor], Tensor]  # x without what is dropped; a gradient takes the same way


def add_adapter_(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, drop: Drop) -> Tensor:
    """Add the update of x[..., K] to y[..., N] in place and in float32, so that the sum is rounded once.

    Returns:
        dropout(x) A^T, [M, r] in x's dtype, for `adapter_gradients`.
    """
    inner = drop(x).reshape(-1, x.shape[-1]) @ lora_A.to(x.dtype).t()
    y.view(-1, y.shape[-1]).addmm_(inner, lora_B.to(x.dtype).t(), alpha=scaling)
    return inner


def adapter_gradients(
    grad: Tensor, x: Tensor, inner: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, drop: Drop
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x[..., K], A and B from dY[..., N], x and what the forward pass returned; A's and B's float32."""
    grad2, x2 = grad.reshape(-1, grad.shape[-1]), drop(x).reshape(-1, x.shape[-1])
    grad_inner = (grad2 @ lora_B.to(grad.dtype)) * scaling
    grad_x = drop((grad_inner @ lora_A.to(grad.dtype)).view(x.shape))
    return grad_x, _mm_float32(grad_inner.t(), x2), _mm_float32(grad2.t(), inner) * scaling


def gradients_of_both(
    grad: Tensor,
    x: Tensor,
    inner: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    drop: Drop,
    product_dx: Callable[[], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator `lora_4bit_backward` returns, of an adapter beside a product whose gradient of x is asked for;
    None is not wanted, and then that of x is empty."""
    dx, grad_A, grad_B = adapter_gradients(grad, x, inner, lora_A, lora_B, scaling, drop)
    dx = grad.new_empty(0) if product_dx is None else dx.add_(product_dx())
    return dx, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)


def _mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32: a sum over thousands of tokens, times the loss scale, leaves float16's range."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
