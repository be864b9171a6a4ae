"""The CUDA implementations of the product with an adapter: which kernels, in which order.

Room: as `ops_cuda.py`.  `dispatch.choose_adapter` says where the adapter's update is added.  Beside cuBLAS it is
written first and the product added to it, which reads the output once; the other way it would be written twice as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .adapter import Drop, add_adapter_, gradients_of_both
from .dispatch import ADAPTER_APART, ADAPTER_JOINED, DEQUANTIZE, choose, choose_adapter
from .kernels.lora import Dropout, lora_down_triton, lora_up_triton
from .kernels.lora_grads import lora_grads_triton
from .ops_cuda import (
    IMPLEMENTATIONS,
    contiguous_and_aligned,
    dequantize_4bit,
    dropout,
    gemm_4bit,
    gemm_4bit_dx,
    on_device_of,
    product_of,
    product_wgmma,
)
from .tuning.lora import down_config, grads_config, up_config


def lora_4bit(
    x: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    seed: Tensor | None,
    threshold: int,
    kept_scale: float,
    *nested: Tensor | None,
) -> tuple[Tensor, Tensor]:
    product = product_of(x, B, shapeB, blocksize, backward=False)
    how = choose_adapter(product, lora_A.shape[0], seed is not None).implementation
    drop = None if seed is None else (seed, threshold, kept_scale)
    weight = (B, shapeB, absmax, blocksize, quant_type)
    if how == ADAPTER_APART:
        y = gemm_4bit(x, *weight, bias, *nested)
        return y, add_adapter_(y, x, lora_A, lora_B, scaling, _drop(drop))
    M, N, K = product[:3]
    rows = contiguous_and_aligned(x).view(M, K)
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    config = down_config(M, K, lora_A.shape[0], drop is not None)
    with on_device_of(x):
        inner = lora_down_triton(rows, lora_A, False, scaling, drop, config)
        if how == ADAPTER_JOINED:
            return product_wgmma(x, B, product, absmax, quant_type, bias, *nested, adapter=(lora_B, inner)), inner
        if choose(product).implementation == DEQUANTIZE:
            y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
            bias = bias if bias is None else bias.contiguous()
            lora_up_triton(inner, lora_B, True, bias, y.view(M, N), False, None, up_config(M))
            y.view(M, N).addmm_(rows, dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, x.dtype, *nested).t())
            return y, inner
        y = gemm_4bit(x, *weight, bias, *nested)
        lora_up_triton(inner, lora_B, True, None, y.view(M, N), True, None, up_config(M))
        return y, inner


def lora_4bit_backward(
    grad: Tensor,
    x: Tensor,
    inner: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    seed: Tensor | None,
    threshold: int,
    kept_scale: float,
    needs_dx: bool,
    *nested: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    product = product_of(grad, B, shapeB, blocksize, backward=True)
    how = choose_adapter(product, lora_A.shape[0], seed is not None).implementation
    drop = None if seed is None else (seed, threshold, kept_scale)
    weight = (B, shapeB, absmax, blocksize, quant_type)
    if how == ADAPTER_APART:
        product_dx = partial(gemm_4bit_dx, grad, *weight, *nested) if needs_dx else None
        return gradients_of_both(grad, x, inner, lora_A, lora_B, scaling, _drop(drop), product_dx)
    M, N, K = product[:3]
    rows, x_rows = contiguous_and_aligned(grad).view(M, N), contiguous_and_aligned(x).view(M, K)
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    grad_A, grad_B = torch.empty_like(lora_A), torch.empty_like(lora_B)
    with on_device_of(grad):
        grad_inner = lora_down_triton(rows, lora_B, True, scaling, None, down_config(M, N, lora_A.shape[0], False))
        lora_grads_triton(rows, x_rows, inner, grad_inner, grad_A, grad_B, drop, grads_config(M, drop is not None))
        if not needs_dx:
            dx = grad.new_empty(0)
        elif how == ADAPTER_JOINED:
            dx = product_wgmma(grad, B, product, absmax, quant_type, None, *nested, adapter=(lora_A, grad_inner))
        elif choose(product).implementation == DEQUANTIZE:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            lora_up_triton(grad_inner, lora_A, False, None, dx.view(M, K), False, drop, up_config(M))
            W = dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, grad.dtype, *nested)
            dx.view(M, K).addmm_(rows, W)
        else:
            dx = gemm_4bit_dx(grad, *weight, *nested)
            lora_up_triton(grad_inner, lora_A, False, None, dx.view(M, K), True, drop, up_config(M))
    return dx, grad_A, grad_B


def _drop(given: Dropout | None) -> Drop:
    return (lambda x: x) if given is None else (lambda x: dropout(x.contiguous(), *given))


_CUDA: dict[str, Callable[..., Any]] = {"lora_4bit": lora_4bit, "lora_4bit_backward": lora_4bit_backward}
IMPLEMENTATIONS.update(_CUDA)
for _name, _implementation in _CUDA.items():
    torch.library.impl(f"qkernels::{_name}", "CUDA", _implementation)
