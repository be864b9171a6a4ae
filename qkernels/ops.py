"""The operators: schemas, shapes for tracing, and the implementation for each device.

Room: registration.  torch's dispatcher picks the implementation by the device of the tensors: plain torch on the CPU
(`reference.py`), Triton on CUDA (`kernels/`).  Nothing falls back from one to the other.  `torch.compile` sees opaque
operators with known output shapes.  Inputs are checked in `functional.py`, before these are called.

With double quantization `absmax` is the float32 scale of the scales, and `absmax_8bit, absmax_code, absmax_offset` are
given; without, these are None and `absmax` holds one scale a block.  (The convention of bitsandbytes' gemm_4bit.)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .adapter import Drop, add_adapter_, gradients_of_both
from .dense import linear
from .dispatch import Plan, Weight, capability_of, inner_form
from .dropout import dropout_reference
from .format import block_count, packed_length
from .norm import normalize_reference
from .reference import (
    decode_absmax_reference,
    dequantize_4bit_reference,
    dequantize_blockwise_reference,
    quantize_4bit_reference,
    quantize_blockwise_reference,
)
from .token_attention import token_attention_reference

_NESTED = "Tensor? absmax_8bit, Tensor? absmax_code, Tensor? absmax_offset"
_WEIGHT = "Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type"
_ADAPTER = "Tensor lora_A, Tensor lora_B, float scaling, Tensor? seed, int threshold, float kept_scale"
_DEQUANTIZE = f"Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, {_NESTED}"
_DEQUANTIZE_BLOCKWISE = "Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype"

SCHEMAS = {
    "quantize_4bit": (
        "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage, bool propagate_nan) -> (Tensor, Tensor)"
    ),
    "dequantize_4bit": f"({_DEQUANTIZE}) -> Tensor",
    "dequantize_4bit.out": f"({_DEQUANTIZE}, *, Tensor(a!) out) -> ()",
    "quantize_blockwise": "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    # 8-bit indices, their scales, and the mean, which is subtracted first
    "quantize_scales": "(Tensor absmax, Tensor code, int blocksize) -> (Tensor, Tensor, Tensor)",
    "dequantize_blockwise": f"({_DEQUANTIZE_BLOCKWISE}) -> Tensor",
    "dequantize_blockwise.out": f"({_DEQUANTIZE_BLOCKWISE}, *, Tensor(a!) out) -> ()",
    # y[..., N] = A[..., K] W[N, K]^T + bias
    "gemm_4bit": f"(Tensor A, {_WEIGHT}, Tensor? bias, {_NESTED}) -> Tensor",
    # dA[..., K] = grad[..., N] W[N, K]
    "gemm_4bit_dx": f"(Tensor grad, {_WEIGHT}, {_NESTED}) -> Tensor",
    # y = A W^T + bias + scaling (dropout(A) lora_A^T) lora_B^T, and what its gradient needs of the inner product
    "lora_4bit": f"(Tensor A, {_WEIGHT}, Tensor? bias, {_ADAPTER}, {_NESTED}) -> (Tensor, Tensor)",
    # gradients of A (empty where it is not needed), lora_A and lora_B
    "lora_4bit_backward": (
        f"(Tensor grad, Tensor A, Tensor inner, {_WEIGHT}, {_ADAPTER}, bool needs_dA, {_NESTED})"
        " -> (Tensor, Tensor, Tensor)"
    ),
    # kept elements times scale; the mask is a function of the seed
    "dropout": "(Tensor x, Tensor seed, int threshold, float scale) -> Tensor",
    # x + residual (empty without one), and its rows normalized
    "normalize": (
        "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool centered) -> (Tensor, Tensor)"
    ),
    # the attention of a token that is put into the cache
    "token_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor length, Tensor bias)"
        " -> Tensor"
    ),
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"qkernels::{_name}", _schema)


@torch.library.register_fake("qkernels::quantize_4bit")
def _(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype, propagate_nan: bool
) -> tuple[Tensor, Tensor]:
    n = A.numel()
    packed = A.new_empty((packed_length(n, quant_storage), 1), dtype=quant_storage)
    return packed, A.new_empty(block_count(n, blocksize), dtype=torch.float32)


@torch.library.register_fake("qkernels::dequantize_4bit")
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
    return A.new_empty(shape, dtype=dtype)


@torch.library.register_fake("qkernels::dequantize_4bit.out")
@torch.library.register_fake("qkernels::dequantize_blockwise.out")
def _(*args: object, out: Tensor) -> None:
    return None


@torch.library.register_fake("qkernels::quantize_blockwise")
def _(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    absmax = A.new_empty(block_count(A.numel(), blocksize), dtype=torch.float32)
    return A.new_empty(A.shape, dtype=torch.uint8), absmax


@torch.library.register_fake("qkernels::quantize_scales")
def _(absmax: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    scales = absmax.new_empty(block_count(absmax.numel(), blocksize))
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), scales, absmax.new_empty(())


@torch.library.register_fake("qkernels::dequantize_blockwise")
def _(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return A.new_empty(A.shape, dtype=dtype)


@torch.library.register_fake("qkernels::gemm_4bit")
def _(A: Tensor, B: Tensor, shapeB: Sequence[int], *args: object) -> Tensor:
    return A.new_empty((*A.shape[:-1], shapeB[0]))


@torch.library.register_fake("qkernels::gemm_4bit_dx")
def _(grad: Tensor, B: Tensor, shapeB: Sequence[int], *args: object) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], shapeB[1]))


@torch.library.register_fake("qkernels::lora_4bit")
def _(
    A: Tensor,
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
    *args: object,
) -> tuple[Tensor, Tensor]:
    (N, K), r = shapeB, lora_A.shape[0]
    shape, dtype = inner_form(
        A.numel() // max(1, K), K, A.dtype, r, capability_of(A.device.index) if A.is_cuda else None
    )
    return A.new_empty((*A.shape[:-1], N)), A.new_empty(shape, dtype=dtype)


@torch.library.register_fake("qkernels::lora_4bit_backward")
def _(
    grad: Tensor,
    A: Tensor,
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
    needs_dA: bool,
    *nested: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = A.shape if needs_dA else (0,)
    return grad.new_empty(shape), torch.empty_like(lora_A), torch.empty_like(lora_B)


@torch.library.register_fake("qkernels::dropout")
def _(x: Tensor, seed: Tensor, threshold: int, scale: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("qkernels::normalize")
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(0 if residual is None else x.shape), x.new_empty(x.shape)


@torch.library.register_fake("qkernels::token_attention")
def _(query: Tensor, *args: object) -> Tensor:
    rows, heads, _, size = query.shape
    return query.new_empty(rows, 1, heads * size)


# ---- CPU: the reference ----


@torch.library.impl("qkernels::quantize_4bit", "CPU")
def _(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype, propagate_nan: bool
) -> tuple[Tensor, Tensor]:
    return quantize_4bit_reference(A, blocksize, quant_type, quant_storage, propagate_nan)


@torch.library.impl("qkernels::dequantize_4bit", "CPU")
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
    if absmax_8bit is not None:
        assert absmax_code is not None
        assert absmax_offset is not None
        absmax = decode_absmax_reference(absmax_8bit, absmax, absmax_code, absmax_offset)
    return dequantize_4bit_reference(A, absmax, blocksize, quant_type, list(shape), dtype)


@torch.library.impl("qkernels::dequantize_4bit.out", "CPU")
def _(*args: object, out: Tensor) -> None:
    out.copy_(torch.ops.qkernels.dequantize_4bit.default(*args))


@torch.library.impl("qkernels::quantize_blockwise", "CPU")
def _(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return quantize_blockwise_reference(A, code, blocksize)


@torch.library.impl("qkernels::quantize_scales", "CPU")
def _(absmax: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    offset = absmax.mean()
    return *quantize_blockwise_reference(absmax, code, blocksize, offset), offset


@torch.library.impl("qkernels::dequantize_blockwise", "CPU")
def _(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return dequantize_blockwise_reference(A, absmax, code, blocksize, dtype)


@torch.library.impl("qkernels::dequantize_blockwise.out", "CPU")
def _(*args: object, out: Tensor) -> None:
    out.copy_(torch.ops.qkernels.dequantize_blockwise.default(*args))


@torch.library.impl("qkernels::dropout", "CPU")
def _(x: Tensor, seed: Tensor, threshold: int, scale: float) -> Tensor:
    return dropout_reference(x, seed, threshold, scale)


@torch.library.impl("qkernels::normalize", "CPU")
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    return normalize_reference(x, residual, weight, bias, eps, centered)


@torch.library.impl("qkernels::token_attention", "CPU")
def _(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, length: Tensor, bias: Tensor) -> Tensor:
    return token_attention_reference(query, key, value, keys, values, length, bias)


# The product is dequantization to the activations' dtype and the platform's matrix product.


@torch.library.impl("qkernels::gemm_4bit", "CPU")
def _(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    *nested: Tensor | None,
) -> Tensor:
    W = torch.ops.qkernels.dequantize_4bit.default(B, absmax, blocksize, quant_type, shapeB, A.dtype, *nested)
    return linear(A, W, bias)


@torch.library.impl("qkernels::gemm_4bit_dx", "CPU")
def _(
    grad: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    *nested: Tensor | None,
) -> Tensor:
    W = torch.ops.qkernels.dequantize_4bit.default(B, absmax, blocksize, quant_type, shapeB, grad.dtype, *nested)
    return grad @ W


# An adapter's products follow.


def _drop(seed: Tensor | None, threshold: int, kept_scale: float) -> Drop:
    return (lambda x: x) if seed is None else (lambda x: dropout_reference(x, seed, threshold, kept_scale))


@torch.library.impl("qkernels::lora_4bit", "CPU")
def _(
    A: Tensor,
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
    y = torch.ops.qkernels.gemm_4bit.default(A, B, shapeB, absmax, blocksize, quant_type, bias, *nested)
    return y, add_adapter_(y, A, lora_A, lora_B, scaling, _drop(seed, threshold, kept_scale))


@torch.library.impl("qkernels::lora_4bit_backward", "CPU")
def _(
    grad: Tensor,
    A: Tensor,
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
    needs_dA: bool,
    *nested: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    product_dx = partial(
        torch.ops.qkernels.gemm_4bit_dx.default, grad, B, shapeB, absmax, blocksize, quant_type, *nested
    )
    drop = _drop(seed, threshold, kept_scale)
    return gradients_of_both(grad, A, inner, lora_A, lora_B, scaling, drop, product_dx if needs_dA else None)


# Triton exists on Linux only; elsewhere the CPU operators above are all there is.
if importlib.util.find_spec("triton") is not None:
    from .adapter_cuda import IMPLEMENTATIONS as _CUDA
    from .ops_cuda import plan_gemm_4bit
else:
    _CUDA = {}

_OPERATORS = {
    name: getattr(getattr(torch.ops.qkernels, name.split(".")[0]), (name + ".default").split(".")[1])
    for name in SCHEMAS
}
PLAIN = (Tensor, torch.nn.Parameter)


def nothing_listens() -> bool:
    """No tracing (torch.compile), no dispatch mode (as of fake tensors), no function transform is active."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
    )


def in_eager_mode(tensor: Tensor) -> bool:
    """Whether an operator on this tensor may be called without torch's dispatcher, which takes longer than a small
    kernel runs: a plain CUDA tensor, and nothing that listens."""
    return type(tensor) in PLAIN and tensor.is_cuda and nothing_listens()


def operator(name: str, tensor: Tensor) -> Callable[..., Any]:
    """The operator of that name, or in eager mode the function that it would end in, which has no gradient."""
    return _CUDA[name] if in_eager_mode(tensor) else _OPERATORS[name]


def plan_product(A: Tensor, bias: Tensor | None, weight: Weight) -> Plan | None:
    """`ops_cuda.plan_gemm_4bit`; None where torch's dispatcher is to be asked."""
    return plan_gemm_4bit(A, bias, weight) if in_eager_mode(A) else None
