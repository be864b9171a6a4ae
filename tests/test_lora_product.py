"""The adapter's product and its gradients, against the same in float64."""

from __future__ import annotations

import pytest
import torch

from qkernels import matmul_4bit, quantize_4bit
from qlora.lora_product import Adapter, add_lora


def operands(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = {"y": (2, 5, 24), "x": (2, 5, 16), "A": (3, 16), "B": (24, 3)}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return {name: tensor.to(dtype if name in "xy" else torch.float32) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_value_and_gradients(dtype):
    given = operands(dtype)
    # The products are in the activations' dtype: the truth has the operands that they have.
    exact = {name: tensor.to(dtype).double().requires_grad_() for name, tensor in given.items()}
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    out = add_lora(inputs["y"].clone(), inputs["x"], Adapter(inputs["A"], inputs["B"], 0.5))
    truth = exact["y"] + 0.5 * (exact["x"] @ exact["A"].T) @ exact["B"].T
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(upstream)
    truth.backward(upstream.double())
    tolerance = 4 * torch.finfo(dtype).eps
    assert out.dtype == dtype
    pairs = [(out, truth), *((inputs[name].grad, exact[name].grad) for name in inputs)]
    for found, expected in pairs:
        assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert inputs["A"].grad.dtype == inputs["B"].grad.dtype == torch.float32


def test_gradcheck():
    inputs = [tensor.double().requires_grad_() for tensor in operands(torch.float32).values()]
    assert torch.autograd.gradcheck(lambda y, x, A, B: add_lora(y.clone(), x, Adapter(A, B, 0.5)), inputs)


def test_the_gradients_of_the_adapter_do_not_overflow():
    """4,000 tokens with gradients of 40, as under a loss scale: their sum is past float16."""
    y, x = torch.zeros(4000, 4, dtype=torch.float16), torch.ones(4000, 4, dtype=torch.float16)
    A, B = torch.ones(1, 4, requires_grad=True), torch.ones(4, 1, requires_grad=True)
    add_lora(y, x, Adapter(A, B, 1.0)).backward(torch.full((4000, 4), 40.0, dtype=torch.float16))
    assert B.grad.unique().tolist() == [4000 * 40 * 4]
    assert A.grad.unique().tolist() == [4000 * 40 * 4]


def test_the_update_is_added_in_place():
    given = operands(torch.float16)
    y = given["y"].clone()
    out = add_lora(y, given["x"], Adapter(given["A"], given["B"], 0.5))
    assert out.data_ptr() == y.data_ptr()
    assert not torch.equal(out, given["y"])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 20, 100, 1000])
def test_it_follows_every_implementation_of_the_product(rows):
    """The update is added in place, which torch refuses where a product returns a view."""
    packed, state = quantize_4bit(torch.randn(256, 512, device="cuda"), quant_type="nf4", compress_statistics=True)
    x = torch.randn(1, rows, 512, device="cuda", dtype=torch.float16, requires_grad=True)
    A, B = (torch.randn(shape, device="cuda", requires_grad=True) for shape in ((8, 512), (256, 8)))
    y = matmul_4bit(x, packed, state)
    expected = y.double() + 0.5 * (x.double() @ A.half().double().t()) @ B.half().double().t()
    out = add_lora(y, x, Adapter(A, B, 0.5))
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-1)
    out.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, A, B))
