"""The optimized model on a GPU: the kernel that takes bias and causality at once, and what stays off the host."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model, tokens

from qlora import optimize_model
from qlora.optimize.alibi import alibi_attention, alibi_bias

pytestmark = pytest.mark.gpu


def exact(query, key, value, bias):
    scores = query.double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5 + bias.bias.double()
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ value.double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("length", [64, 130])
def test_attention_with_alibi(dtype, padding, length):
    batch, heads, size = 2, 6, 128
    mask = torch.ones(batch, length, dtype=torch.long, device="cuda")
    if padding != "none":
        mask[1, slice(None, length // 2) if padding == "left" else slice(length // 2, None)] = 0
    given = None if padding == "none" else mask
    bias = alibi_bias(heads, dtype, mask.device, queries=length, keys=length, attention_mask=given)
    assert bias.causal
    assert bias.bias.shape[2] == 1
    fused = torch.randn(batch, length, heads, 3, size, device="cuda", dtype=dtype, requires_grad=True)
    truth = fused.detach().double().requires_grad_()
    ours = alibi_attention(*(part.transpose(1, 2) for part in fused.unbind(3)), bias=bias)
    expected = exact(*(part.transpose(1, 2) for part in truth.unbind(3)), bias=bias)
    real = mask.bool()[:, None, :, None]
    upstream = torch.randn_like(ours) * real
    ours.backward(upstream)
    expected.backward(upstream.double())
    tolerance = 8 * torch.finfo(dtype).eps
    for found, wanted in (((ours * real), expected * real), (fused.grad, truth.grad)):
        assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_it_is_the_model_on_the_gpu(family):
    # Heads of 16, as the fused kernels want multiples of 8.
    model = tiny_model(family, hidden_size=64).cuda()
    ids = tokens().cuda()
    expected = model(ids).logits
    torch.testing.assert_close(optimize_model(model)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_forward_and_backward_pass_waits_for_nothing():
    model = optimize_model(tiny_model("bloom", hidden_size=64).cuda().half())
    ids = tokens().cuda()
    mask = torch.ones_like(ids)
    model.transformer(ids, attention_mask=mask, use_cache=False)  # compiles and allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.transformer(ids, attention_mask=mask, use_cache=False).last_hidden_state.float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
