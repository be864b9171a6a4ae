"""The adapter's part of a layer's output: y += scaling * (dropout(x) A^T) B^T.

Room: one autograd function; torch and qkernels.  A and B are float32 (the optimizer's), the products are in the
activations' dtype, and what the sum over the tokens gives for A and B is float32 all the way.  The second product adds
the update to y in place and in float32: the sum is rounded once, and nothing of y's size is copied.
The dropped input is made again from its seed in the backward pass, so what is kept is x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import seeded_dropout


class _AddLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, p: float, seed: Tensor | None
    ) -> Tensor:
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        dropped = x if seed is None else seeded_dropout(x, p, seed)
        inner = dropped.reshape(-1, x.shape[-1]) @ A.t()
        y.view(-1, y.shape[-1]).addmm_(inner, B.t(), alpha=scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, inner, A, B)
        ctx.scaling, ctx.p, ctx.seed = scaling, p, seed
        ctx.dtypes = lora_A.dtype, lora_B.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, inner, A, B = ctx.saved_tensors
        grad2 = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad2 @ B).mul_(ctx.scaling)
        grad_x = grad_A = None
        if ctx.needs_input_grad[1]:
            grad_x = (grad_inner @ A).view(x.shape)
            grad_x = grad_x if ctx.seed is None else seeded_dropout(grad_x, ctx.p, ctx.seed)
        if ctx.needs_input_grad[2]:
            dropped = x if ctx.seed is None else seeded_dropout(x, ctx.p, ctx.seed)
            grad_A = _mm_float32(grad_inner.t(), dropped.reshape(-1, x.shape[-1])).to(ctx.dtypes[0])
        grad_B = _mm_float32(grad2.t(), inner).mul_(ctx.scaling).to(ctx.dtypes[1]) if ctx.needs_input_grad[3] else None
        return grad, grad_x, grad_A, grad_B, None, None, None


def add_lora(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Add an adapter's update to a layer's output, in place.

    Args:
        y: [..., N], contiguous, what the base layer returned and nobody else needs as it was.
        x: [..., K] in y's dtype, the adapter's input.
        lora_A: [r, K], float32 or 16 bits.
        lora_B: [N, r], likewise.
        scaling: of the update.
        p: share of x that is dropped.
        seed: int64[1] of `seeded_dropout`; None drops nothing.

    Returns:
        y.  The gradients of lora_A and lora_B are summed in float32.
    """
    return _AddLora.apply(y, x, lora_A, lora_B, scaling, p, seed)


def _mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32: a sum over thousands of tokens, times the loss scale, leaves float16's range."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
