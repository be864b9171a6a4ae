"""The operators as torch sees them: schema, fake, gradient, and no falling back between devices."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from qkernels import quantize_4bit, quantize_blockwise
from qkernels.known import scales_of
from qkernels.ops import SCHEMAS

OPS = torch.ops.qkernels


def weight(nested: bool):
    packed, state = quantize_4bit(torch.randn(24, 40), quant_type="nf4", compress_statistics=nested)
    scales, nested_scales = scales_of(state)
    return (packed.view(-1), state.shape, scales, 64, "nf4"), nested_scales


@pytest.mark.parametrize("nested", [False, True])
def test_products(nested):
    arguments, nested_scales = weight(nested)
    x, bias = torch.randn(3, 40, requires_grad=True), torch.randn(24, requires_grad=True)
    opcheck(OPS.gemm_4bit.default, (x, *arguments, bias, *nested_scales))
    opcheck(OPS.gemm_4bit.default, (x, *arguments, None, *nested_scales))
    opcheck(OPS.gemm_4bit_dx.default, (torch.randn(3, 24), *arguments, *nested_scales))


@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_4bit(nested):
    (packed, shape, *rest), nested_scales = weight(nested)
    arguments = (packed, *rest, shape, torch.float16, *nested_scales)
    opcheck(OPS.dequantize_4bit.default, arguments)
    opcheck(OPS.dequantize_4bit.out, arguments, {"out": torch.empty(shape, dtype=torch.float16)})


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_quantize_4bit(storage):
    opcheck(OPS.quantize_4bit.default, (torch.randn(5, 7), 64, "fp4", storage, False))


def test_blockwise():
    values = torch.randn(24, 40)
    index, state = quantize_blockwise(values, blocksize=256)
    arguments = (index, state.absmax, state.code, 256, torch.float32)
    opcheck(OPS.quantize_blockwise.default, (values, state.code, 256))
    opcheck(OPS.quantize_scales.default, (values.abs().view(-1), state.code, 256))
    opcheck(OPS.dequantize_blockwise.default, arguments)
    opcheck(OPS.dequantize_blockwise.out, arguments, {"out": torch.empty(24, 40)})


def test_dropout():
    opcheck(OPS.dropout.default, (torch.randn(5, 7), torch.tensor([3]), 1000, 1.5))


def test_of_few_rows():
    x, weight = torch.randn(3, 7), torch.randn(7)
    opcheck(OPS.normalize.default, (x, x, weight, weight, 1e-5, True))
    opcheck(OPS.normalize.default, (x, None, weight, None, 1e-5, False))
    query, keys, bias = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 9, 8), torch.randn(1, 3, 1, 9)
    opcheck(OPS.token_attention.default, (query, query, query, keys, keys.clone(), torch.tensor(4), bias))


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_every_operator_is_implemented_on_both_devices(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qkernels::{name}", key)
