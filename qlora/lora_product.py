"""An adapter's part of a layer's output where the layer does not add it itself: y += scaling * (dropout(x) A^T) B^T.

Room: one autograd function; torch and qkernels.  `Linear4bit` adds its first adapter in its own product; this is for
further ones and for layers with a float weight.  The mathematics are `qkernels.adapter`'s.  Nothing of y's size is
copied, and the dropped input is made again from its seed in the backward pass, so what is kept is x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels import seeded_dropout
from qkernels.adapter import Drop, adapter_gradients, add_adapter_


class Adapter(NamedTuple):
    """What `Linear4bit` is given of an adapter, to add it in its own product.

    Attributes:
        lora_A: [r, K], float32 or 16 bits.
        lora_B: [N, r], likewise.
        scaling: of the update.
        p: share of the input that is dropped.
        seed: int64[1] of `seeded_dropout`; None drops nothing.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    p: float = 0.0
    seed: Tensor | None = None


class _AddLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, adapter: Adapter, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        inner = add_adapter_(y, x, lora_A, lora_B, adapter.scaling, _drop(adapter))
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, inner, lora_A, lora_B)
        ctx.adapter = adapter._replace(lora_A=None, lora_B=None)  # type: ignore[arg-type]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, inner, lora_A, lora_B = ctx.saved_tensors
        grad_x, grad_A, grad_B = adapter_gradients(
            grad, x, inner, lora_A, lora_B, ctx.adapter.scaling, _drop(ctx.adapter)
        )
        return grad, grad_x, None, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)


def _drop(adapter: Adapter) -> Drop:
    seed = adapter.seed
    return (lambda x: x) if seed is None else (lambda x: seeded_dropout(x, adapter.p, seed))


def add_lora(y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """Add an adapter's update to a layer's output, in place.

    Args:
        y: [..., N], contiguous, what the base layer returned and nobody else needs as it was.
        x: [..., K] in y's dtype, the adapter's input.

    Returns:
        y.  The gradients of the factors are summed in float32.
    """
    return _AddLora.apply(y, x, adapter, adapter.lora_A, adapter.lora_B)
