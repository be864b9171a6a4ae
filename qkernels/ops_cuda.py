"""The CUDA implementations of the operators: allocate, choose the configuration, launch.

Room: imported by `ops.py` where Triton is installed.  Triton launches on the current device and stream, so each
launch first makes the tensor's device the current one; the caller's stream is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .dense import linear
from .dispatch import SKINNY, WGMMA, Plan, Product, Weight, capability_of, choose
from .kernels.blockwise import dequantize_blockwise_triton, quantize_blockwise_triton, quantize_scales_triton
from .kernels.dequantize import dequantize_4bit_triton
from .kernels.dropout import dropout_triton
from .kernels.matmul_skinny import skinny_launch
from .kernels.matmul_skinny_dx import matmul_skinny_dx_triton
from .kernels.matmul_wgmma import matmul_wgmma_triton
from .kernels.mean import ORDER_IS_KNOWN, SLOTS, partial_sums_triton, summation_order
from .kernels.norm import norm_triton
from .kernels.quantize import quantize_4bit_triton
from .kernels.token_attention import token_attention_triton
from .tuning import DROPOUT_CONFIG, elementwise_config, norm_config, partial_sums_config, token_attention_config
from .tuning.skinny import skinny_config
from .tuning.skinny_dx import skinny_dx_config
from .tuning.wgmma import wgmma_config

_NOTHING = nullcontext()
_EARLY_CAPABILITY = (9, 0)  # from which on a launch may begin while the one before it ends
# torch.empty on the current device past torch's dispatcher, which takes longer than the rest of it; as in the code that
# torch.compile generates.
_empty = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one; free of cost where it is already."""
    if tensor.get_device() == torch._C._cuda_getDevice():
        return _NOTHING
    return torch.cuda.device(tensor.device)


def quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype, propagate_nan: bool
) -> tuple[Tensor, Tensor]:
    config = elementwise_config("quantize_4bit", blocksize)
    with on_device_of(A):
        return quantize_4bit_triton(A, blocksize, quant_type, quant_storage, propagate_nan, config)


def dequantize_4bit_out(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    *nested: Tensor | None,
    out: Tensor,
) -> None:
    with on_device_of(A):
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
    dequantize_4bit_out(A, absmax, blocksize, quant_type, shape, dtype, *nested, out=out)
    return out


def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    config = elementwise_config("quantize_blockwise", blocksize)
    with on_device_of(A):
        return quantize_blockwise_triton(A, _aligned(code), blocksize, config)


def quantize_scales(absmax: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    config = elementwise_config("quantize_blockwise", blocksize)
    with on_device_of(absmax):
        # The mean's bits are those of torch's, as bitsandbytes takes that.
        n, order = absmax.numel(), None
        if ORDER_IS_KNOWN and absmax.data_ptr() % 16 == 0:
            order = summation_order(n, _resident_ctas(absmax.get_device()))
        if order is None:
            return quantize_scales_triton(absmax, _aligned(code), blocksize, absmax.mean().view(1), 1, config)
        sums = partial_sums_triton(absmax, order, partial_sums_config(order.ctas))
        return quantize_scales_triton(absmax, _aligned(code), blocksize, sums, n, config)


@lru_cache
def _resident_ctas(device: int) -> int:
    """Blocks of 512 threads that the multiprocessors hold at once."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * (properties.max_threads_per_multi_processor // SLOTS)


def _aligned(code: Tensor) -> Tensor:
    """A map that begins at a multiple of 16 bytes, as its kernel reads vectors."""
    return code if code.data_ptr() % 16 == 0 else code.clone()


def dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, *, out: Tensor
) -> None:
    config = elementwise_config("dequantize_blockwise", blocksize)
    with on_device_of(A):
        dequantize_blockwise_triton(A, absmax, code, blocksize, out, config)


def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(A.shape, dtype=dtype, device=A.device)
    dequantize_blockwise_out(A, absmax, code, blocksize, dtype, out=out)
    return out


def dropout(x: Tensor, seed: Tensor, threshold: int, scale: float) -> Tensor:
    with on_device_of(x):
        return dropout_triton(x, seed, threshold, scale, DROPOUT_CONFIG)


def normalize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    with on_device_of(x):
        return norm_triton(x, residual, weight, bias, eps, centered, norm_config(x.shape[-1]), _begins_early(x))


def token_attention(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, length: Tensor, bias: Tensor
) -> Tensor:
    with on_device_of(query):
        config = token_attention_config(query.shape[-1], query.itemsize)
        return token_attention_triton(query, key, value, keys, values, length, bias, config, _begins_early(query))


def _begins_early(x: Tensor) -> bool:
    return capability_of(x.get_device()) >= _EARLY_CAPABILITY


# The products ask `dispatch.py`.  What no fused kernel takes is dequantized to the activations' dtype and handed to
# cuBLAS, by the function above and not its operator: a second trip through torch's dispatcher costs more than the
# launch.


def product_of(x: Tensor, B: Tensor, shapeB: Sequence[int], blocksize: int, backward: bool) -> Product:
    """What `dispatch.py` chooses by: x[M, K] W^T, or backward x[M, N] W."""
    N, K = shapeB
    M = x.numel() // max(1, N if backward else K)
    aligned = B.data_ptr() % 16 == 0
    return Product(M, N, K, x.dtype, capability_of(x.device.index), blocksize, backward, aligned)


def plan_gemm_4bit(A: Tensor, bias: Tensor | None, weight: Weight) -> Plan:
    """How this product is computed, and every other of the same shape, dtypes and device with a weight of its kind."""
    B, shapeB, _, blocksize, quant_type, *nested = weight
    product = product_of(A, B, shapeB, blocksize, backward=False)
    implementation = choose(product).implementation
    if implementation == SKINNY:
        sizes = product.M, product.N, product.K
        config = skinny_config(*sizes, product.sm, blocksize)
        assert config is not None
        kind = A.dtype, blocksize, quant_type, nested[0] is not None, bias is not None
        shape = (*A.shape[:-1], product.N)
        return partial(_gemm_4bit_skinny, skinny_launch(sizes, *kind, config), shape, _contiguous_strides(shape))
    return partial(_gemm_4bit_wgmma, product) if implementation == WGMMA else _gemm_4bit_dense


def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    *nested: Tensor | None,
) -> Tensor:
    weight = (B, shapeB, absmax, blocksize, quant_type, *nested)
    return plan_gemm_4bit(A, bias, weight)(A, bias, weight)


def _gemm_4bit_dense(A: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
    B, shapeB, absmax, blocksize, quant_type, *nested = weight
    return linear(A, dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype, *nested), bias)


def _gemm_4bit_wgmma(product: Product, A: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
    B, _, absmax, _, quant_type, *nested = weight
    return product_wgmma(A, B, product, absmax, quant_type, bias, *nested)


def _gemm_4bit_skinny(
    launch: Callable[..., None],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    A: Tensor,
    bias: Tensor | None,
    weight: Weight,
) -> Tensor:
    if A.get_device() != torch._C._cuda_getDevice():
        with torch.cuda.device(A.device):
            return _gemm_4bit_skinny(launch, shape, strides, A, bias, weight)
    B, _, absmax, _, _, absmax_8bit, absmax_code, absmax_offset = weight
    x = A if A.is_contiguous() and A.data_ptr() % 16 == 0 else contiguous_and_aligned(A)
    out = _empty(shape, strides, A.dtype)
    bias = bias if bias is None else bias.contiguous()
    launch(x, B, absmax, absmax_8bit, absmax_code, absmax_offset, bias, out)
    return out


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    return tuple(strides[::-1])


def contiguous_and_aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x  # a slice of another tensor may begin anywhere


def product_wgmma(
    A: Tensor,
    B: Tensor,
    product: Product,
    absmax: Tensor,
    quant_type: str,
    bias: Tensor | None,
    *nested: Tensor | None,
    adapter: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    M, N, K, backward = product.M, product.N, product.K, product.backward
    columns = K if backward else N
    x = contiguous_and_aligned(A).view(M, -1)
    out = torch.empty((*A.shape[:-1], columns), dtype=A.dtype, device=A.device)  # no view is returned: see `dense.py`
    rows = out.view(M, columns)
    bias = bias if bias is None else bias.contiguous()
    config = wgmma_config(M, N, K, backward)
    weight = (B, (N, K), absmax, product.blocksize, quant_type)
    with on_device_of(A):
        matmul_wgmma_triton(x, *weight, bias, rows, config, *nested, backward=backward, adapter=adapter)
    return out


def gemm_4bit_dx(
    grad: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    *nested: Tensor | None,
) -> Tensor:
    product = product_of(grad, B, shapeB, blocksize, backward=True)
    implementation = choose(product).implementation
    if implementation == SKINNY:
        return _gemm_4bit_dx_skinny(grad, B, product, absmax, quant_type, *nested)
    if implementation == WGMMA:
        return product_wgmma(grad, B, product, absmax, quant_type, None, *nested)
    return grad @ dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, grad.dtype, *nested)


def _gemm_4bit_dx_skinny(
    grad: Tensor, B: Tensor, product: Product, absmax: Tensor, quant_type: str, *nested: Tensor | None
) -> Tensor:
    M, N, K = product[:3]
    codes = nested[0]
    if codes is not None and codes.data_ptr() % 4:  # read in words
        nested = (codes.clone(), *nested[1:])
    dx = torch.empty((*grad.shape[:-1], K), dtype=grad.dtype, device=grad.device)
    config = skinny_dx_config(M, N, K, product.sm, product.blocksize)
    assert config is not None
    dy = contiguous_and_aligned(grad).view(M, N)
    with on_device_of(grad):
        matmul_skinny_dx_triton(dy, B, absmax, product.blocksize, quant_type, dx.view(M, K), config, *nested)
    return dx


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "quantize_4bit": quantize_4bit,
    "dequantize_4bit": dequantize_4bit,
    "dequantize_4bit.out": dequantize_4bit_out,
    "quantize_blockwise": quantize_blockwise,
    "quantize_scales": quantize_scales,
    "dequantize_blockwise": dequantize_blockwise,
    "dequantize_blockwise.out": dequantize_blockwise_out,
    "dropout": dropout,
    "normalize": normalize,
    "token_attention": token_attention,
    "gemm_4bit": gemm_4bit,
    "gemm_4bit_dx": gemm_4bit_dx,
}
for _name, _implementation in IMPLEMENTATIONS.items():
    torch.library.impl(f"qkernels::{_name}", "CUDA", _implementation)
