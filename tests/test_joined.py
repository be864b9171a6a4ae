"""The product with an adapter in one, on a CPU: against its parts, its gradients, and how torch runs it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import qkernels
from qkernels import UserError, matmul_4bit, matmul_4bit_lora, quantize_4bit, seeded_dropout
from qkernels.adapter import adapter_gradients, gradients_of_both
from qkernels.dispatch import (
    ADAPTER_APART,
    ADAPTER_BESIDE,
    ADAPTER_JOINED,
    WGMMA,
    Product,
    choose,
    choose_adapter,
    inner_form,
)
from qkernels.tuning.lora import down_config, inner_parts, padded_rank
from qlora.lora_product import Adapter, add_lora

SEED = torch.tensor([2**62 + 12345])
N, K, R = 24, 64, 3


def operands(dtype=torch.float32, factors=torch.float32):
    generator = torch.Generator().manual_seed(0)
    packed, state = quantize_4bit(torch.randn(N, K, generator=generator), quant_type="nf4", compress_statistics=True)
    sizes = {"x": (2, 5, K), "bias": (N,), "A": (R, K), "B": (N, R)}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    leaves = [tensors[name].to(dtype if name in ("x", "bias") else factors).requires_grad_() for name in sizes]
    return packed, state, leaves


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_the_product_and_the_update(dtype, p):
    packed, state, leaves = operands(dtype)
    x, bias, A, B = leaves
    seed = SEED if p else None
    y = matmul_4bit_lora(x, packed, state, A, B, 0.5, bias, p, seed)
    expected = add_lora(matmul_4bit(x, packed, state, bias=bias), x, Adapter(A, B, 0.5, p, seed))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y, leaves, upstream)
    for ours, theirs, leaf in zip(found, torch.autograd.grad(expected, leaves, upstream), leaves, strict=True):
        assert ours.dtype == leaf.dtype
        torch.testing.assert_close(ours, theirs)


def test_what_needs_no_gradient_is_spared():
    packed, state, (x, bias, A, B) = operands()
    y = matmul_4bit_lora(x.detach(), packed, state, A, B, 0.5, bias.detach())
    y.sum().backward()
    assert x.grad is None
    assert A.grad is not None
    with torch.no_grad():
        assert not matmul_4bit_lora(x, packed, state, A, B, 0.5).requires_grad


@pytest.mark.parametrize("wanted", [True, False])
def test_the_gradient_of_x_beside_an_adapters_is_made_only_where_it_is_asked_for(wanted):
    _, _, (x, _, A, B) = operands()
    asked = []

    def product_dx():
        asked.append(True)
        return torch.ones_like(x)

    inner, grad = torch.randn(10, R), torch.randn(2, 5, N)
    arguments = (grad, x.detach(), inner, A.detach(), B.detach(), 0.5, lambda t: t)
    dx, grad_A, grad_B = gradients_of_both(*arguments, product_dx if wanted else None)
    assert asked == [True] * wanted
    expected, *factors = adapter_gradients(*arguments)
    assert torch.equal(dx, expected + 1 if wanted else torch.empty(0))
    assert torch.equal(grad_A, factors[0])
    assert torch.equal(grad_B, factors[1])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_second_derivatives(p):
    packed, state, leaves = operands()
    x, bias, A, B = leaves
    mask = seeded_dropout(torch.ones_like(x), p, SEED)
    W = qkernels.dequantize_4bit(packed, state)

    def second(y):
        grads = torch.autograd.grad(y.square().sum(), (x, A, B), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    found = second(matmul_4bit_lora(x, packed, state, A, B, 0.5, bias, p, SEED if p else None))
    expected = second(x @ W.t() + bias + 0.5 * (x * mask) @ A.t() @ B.t())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_autocast_casts_x_and_bias_and_keeps_the_factors():
    packed, state, (x, bias, A, B) = operands()
    with torch.autocast("cpu", torch.bfloat16):
        y = matmul_4bit_lora(x, packed, state, A, B, 0.5, bias)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (torch.float32,) * 3
    expected = matmul_4bit_lora(x.bfloat16(), packed, state, A, B, 0.5, bias.bfloat16())
    assert torch.equal(y, expected)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_torch_compile_and_checkpointing(p):
    packed, state, leaves = operands()
    seed = SEED if p else None

    def call(x, bias, A, B):
        return matmul_4bit_lora(x, packed, state, A, B, 0.5, bias, p, seed)

    upstream = torch.randn(2, 5, N)
    expected = torch.autograd.grad(call(*leaves), leaves, upstream)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for y in (compiled(*leaves), checkpoint(call, *leaves, use_reentrant=False)):
        for ours, theirs in zip(torch.autograd.grad(y, leaves, upstream), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_torch_compile_with_a_number_of_rows_that_changes():
    packed, state, (_, _, A, B) = operands()
    compiled = torch.compile(
        lambda x: matmul_4bit_lora(x, packed, state, A, B, 0.5), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for rows in (3, 7, 600):
        x = torch.randn(rows, K)
        torch.testing.assert_close(compiled(x), matmul_4bit_lora(x, packed, state, A, B, 0.5))


def test_wrong_arguments():
    packed, state, (x, _, A, B) = operands()
    for wrong in ((A.t(), B), (A, B[:5]), (A[:2], B), (A.long(), B)):
        with pytest.raises(UserError, match="lora_"):
            matmul_4bit_lora(x, packed, state, *wrong, 0.5)
    with pytest.raises(UserError, match="p, seed"):
        matmul_4bit_lora(x, packed, state, A, B, 0.5, p=1.5, seed=SEED)


def test_empty_rows():
    packed, state, (_, bias, A, B) = operands()
    x = torch.empty(0, 3, K, requires_grad=True)
    y = matmul_4bit_lora(x, packed, state, A, B, 0.5, bias)
    assert y.shape == (0, 3, N)
    y.sum().backward()
    assert not A.grad.any()


@pytest.mark.parametrize(
    ("M", "dtype", "capability", "r", "backward", "dropout", "expected"),
    [
        (128, torch.float16, (9, 0), 16, False, True, ADAPTER_JOINED),
        (128, torch.bfloat16, (9, 0), 64, True, False, ADAPTER_JOINED),
        (128, torch.float16, (9, 0), 16, True, True, ADAPTER_BESIDE),
        (8, torch.float16, (9, 0), 16, False, False, ADAPTER_BESIDE),
        (2048, torch.float16, (9, 0), 16, False, False, ADAPTER_BESIDE),
        (128, torch.float16, (8, 0), 16, False, False, ADAPTER_BESIDE),
        (128, torch.float16, (7, 5), 16, False, False, ADAPTER_APART),
        (128, torch.float32, (9, 0), 16, False, False, ADAPTER_APART),
        (128, torch.float16, (9, 0), 65, False, False, ADAPTER_APART),
        (0, torch.float16, (9, 0), 16, False, False, ADAPTER_APART),
    ],
)
def test_where_the_update_is_added(M, dtype, capability, r, backward, dropout, expected):
    product = Product(M, 4096, 4096, dtype, capability, backward=backward)
    choice = choose_adapter(product, r, dropout)
    assert choice.implementation == expected
    assert choice.reason


def test_blocks_of_32_leave_the_products_kernel_no_registers_for_it():
    product = Product(128, 4096, 4096, torch.float16, (9, 0), blocksize=32)
    assert choose(product).implementation == WGMMA
    assert choose_adapter(product, 16, dropout=False).implementation == ADAPTER_BESIDE


@pytest.mark.parametrize("M", [1, 16, 128, 512, 513, 2048, 100_000])
@pytest.mark.parametrize("C", [32, 4096, 12288, 11008])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("r", [16, 33])
def test_the_parts_cover_the_contraction_once(M, C, r, dropout):
    config = down_config(M, C, r, dropout)
    assert (
        (config.parts - 1) * config.part_steps * config.columns < C <= config.parts * config.part_steps * config.columns
    )
    shape, dtype = inner_form(M, C, torch.float16, r, (9, 0))
    assert shape == (inner_parts(M, C, r), M, padded_rank(r))
    assert (dtype == torch.float16) == (shape[0] == 1)
    assert config.summed == (shape[0] == 1)


def test_the_rank_as_the_tensor_cores_take_it():
    assert [padded_rank(r) for r in (1, 8, 16, 17, 33, 64)] == [16, 16, 16, 32, 64, 64]
