"""Normalization and a token's attention, made for few rows: against torch in float64, what they refuse, and who uses
them in a model."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_model, tokens
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from qkernels import UserError, normalize, token_attention
from qkernels.norm import LARGEST_ROW
from qlora import optimize_model
from qlora.optimize import norm, token_layer
from qlora.optimize.cache import CACHE
from qlora.optimize.norm import FEW_ROWS, Norm, add_and_normalize
from qlora.optimize.recompute import RecomputedBlock

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def torchs(x, weight, bias, centered):
    kind = F.layer_norm if centered else lambda x, size, weight, _, eps: F.rms_norm(x, size, weight, eps)
    return kind(x, x.shape[-1:], weight, bias, 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 33), (2, 5, 1)])
def test_a_normalization_is_as_exact_as_torchs(dtype, centered, summed, shape):
    torch.manual_seed(4)
    x, residual = (3 * torch.randn(shape).to(dtype) + 1 for _ in range(2))
    weight, bias = torch.randn(2, shape[-1]).to(dtype)
    bias = bias if centered else None
    total, found = normalize(x, weight, bias, eps=1e-3, centered=centered, residual=residual if summed else None)
    assert torch.equal(total, x + residual if summed else x)
    truth = torchs(total.double(), weight.double(), None if bias is None else bias.double(), centered)
    own, usual = ((y.double() - truth).abs().max() for y in (found, torchs(total, weight, bias, centered)))
    assert found.dtype == dtype
    assert own <= 1.25 * usual + torch.finfo(dtype).eps * truth.abs().max()


def test_a_normalization_takes_any_strides_and_keeps_no_gradient():
    x = torch.randn(5, 7).t().requires_grad_()
    total, found = normalize(x, torch.ones(5, requires_grad=True), eps=1e-5)
    assert total is x
    assert not found.requires_grad
    torch.testing.assert_close(found, F.layer_norm(x, (5,), eps=1e-5).detach())


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.int32)}, "x.dtype"),
        ({"x": torch.ones(())}, "x.shape"),
        ({"x": torch.ones(1, LARGEST_ROW + 1)}, "x.shape"),
        ({"weight": torch.ones(4)}, "weight.shape"),
        ({"bias": torch.ones(1)}, "bias.shape"),
        ({"bias": torch.ones(3, device="meta")}, "bias"),
        ({"residual": torch.ones(3)}, "residual.shape"),
        ({"residual": torch.ones(2, 3).half()}, "residual.dtype"),
    ],
)
def test_what_a_normalization_refuses(changes, argument):
    arguments = {"x": torch.ones(2, 3), "weight": torch.ones(3), "eps": 1e-5} | changes
    with pytest.raises(UserError) as error:
        normalize(**arguments)
    assert error.value.argument == argument


def token(rows: int = 2, heads: int = 3, size: int = 20, room: int = 40, dtype: torch.dtype = torch.float32):
    """A token's query, key and value as Bloom's product leaves them, and a cache with NaN behind its length of 17."""
    fused = torch.randn(rows, 1, heads, 3, size).to(dtype)
    cache = torch.randn(2, rows, heads, room, size).to(dtype)
    cache[:, :, :, 17:] = torch.nan
    bias = (4 * torch.randn(rows, heads, 1, room)).to(dtype)
    keys, values = cache.unbind(0)
    return *(part.transpose(1, 2) for part in fused.unbind(3)), keys, values, torch.tensor(17), bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_bias", [True, False])
def test_a_tokens_attention_is_as_exact_as_torchs(dtype, one_bias):
    torch.manual_seed(4)
    query, key, value, keys, values, length, bias = token(dtype=dtype)
    bias = bias[:1] if one_bias else bias
    all_keys, all_values = (torch.cat([old[:, :, :17], new], 2) for old, new in ((keys, key), (values, value)))
    found = token_attention(query, key, value, keys, values, length, bias)
    for cache, wanted in ((keys, all_keys), (values, all_values)):
        assert torch.equal(cache[:, :, :18], wanted)
        assert cache[:, :, 18:].isnan().all()

    def attention(*inputs):
        return F.scaled_dot_product_attention(*inputs).transpose(1, 2).reshape(2, 1, -1)

    inputs = query, all_keys, all_values, bias[..., :18]
    truth = attention(*(tensor.double() for tensor in inputs))
    own, usual = ((y.double() - truth).abs().max() for y in (found, attention(*inputs)))
    assert own <= 1.25 * usual + torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize(
    ("position", "tensor", "argument"),
    [
        (0, torch.ones(2, 3, 2, 20), "query.shape"),
        (0, torch.ones(2, 3, 1, 20, dtype=torch.int32), "query.dtype"),
        (1, torch.ones(2, 3, 1, 21), "key.shape"),
        (2, torch.ones(2, 3, 1, 20).half(), "value.dtype"),
        (3, torch.ones(3, 2, 40, 20), "keys.shape"),
        (3, torch.ones(2, 3, 20, 40).transpose(2, 3), "keys"),
        (4, torch.ones(2, 3, 41, 20), "values.shape"),
        (4, torch.ones(2, 3, 40, 20, device="meta"), "values"),
        (5, torch.tensor(3.0), "length"),
        (6, torch.ones(2, 1, 1, 40), "bias.shape"),
    ],
)
def test_what_a_tokens_attention_refuses(position, tensor, argument):
    arguments = list(token())
    arguments[position] = tensor
    with pytest.raises(UserError) as error:
        token_attention(*arguments)
    assert error.value.argument == argument


class Called(TorchDispatchMode):
    """The operators of these names, in the order of their calls."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.found = names, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.found += [name] if name in self.names else []
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(norm, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(token_layer, "on_gpu", lambda tensor: True)


def pair(family: str):
    """A model with norms that are no constants, and the optimized one."""
    plain = tiny_model(family)
    generator = torch.Generator().manual_seed(11)
    for parameter in plain.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return plain, optimize_model(copy.deepcopy(plain))


KINDS = {"norm": Norm, "block": RecomputedBlock}
NORMS = {"bloom": 6, "llama": 5, "mistral": 5}  # of two blocks, the last one, and Bloom's of the embedding


@pytest.mark.parametrize("family", NORMS)
@pytest.mark.parametrize("post_layernorm", [False, True])
def test_few_rows_take_the_kernel(on_gpu, family, post_layernorm):
    plain, model = pair(family)
    if family == "bloom":
        for block in (*plain.transformer.h, *model.transformer.h):
            block.apply_residual_connection_post_layernorm = post_layernorm
    with torch.no_grad(), Called("normalize") as called:
        found = model(tokens()).logits
    assert len(called.found) == NORMS[family]
    torch.testing.assert_close(found, plain(tokens()).logits.detach(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", NORMS)
def test_who_does_without_the_kernel(on_gpu, family):
    model = pair(family)[1]
    with Called("normalize") as called:
        model(tokens())  # a gradient
        with torch.no_grad():
            model(tokens(1, FEW_ROWS + 1))
            with torch.autocast("cpu", torch.bfloat16):
                next(module for module in model.modules() if isinstance(module, Norm))(torch.ones(1, 48))
    assert not called.found


def test_a_sum_of_two_dtypes_is_torchs(on_gpu):
    module = next(module for module in pair("bloom")[1].modules() if isinstance(module, Norm))
    branch, residual = torch.randn(2, 1, 48).half(), torch.randn(2, 1, 48)
    with torch.no_grad():
        total, normalized = add_and_normalize(module, branch, residual)
    assert torch.equal(total, residual + branch)
    assert normalized.dtype == torch.float32


@pytest.mark.parametrize("family", NORMS)
@pytest.mark.parametrize("kind", ["norm", "block"])
def test_hooks_are_called(on_gpu, family, kind):
    model, heard = pair(family)[1], []
    listened = [module for module in model.modules() if isinstance(module, KINDS[kind])]
    for module in listened:
        module.register_forward_hook(lambda *args: heard.append(1))
    with torch.no_grad():
        model(tokens())
    assert len(heard) == len(listened) == (2 if kind == "block" else NORMS[family])


@pytest.mark.parametrize("family", NORMS)
def test_a_blocks_replaced_forward_pass_is_called(on_gpu, family):
    model, called = pair(family)[1], []
    block = next(module for module in model.modules() if isinstance(module, RecomputedBlock))
    stock = block.forward
    block.forward = lambda *args, **kwargs: (called.append(1), stock(*args, **kwargs))[1]
    with torch.no_grad():
        model(tokens())
    assert called


def test_a_token_of_blooms_is_put_and_attended_to_in_one(on_gpu):
    plain, model = pair("bloom")
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cache = StaticCache(config=model.config, max_cache_len=20)
    token_layer.TokenLayer.exchange(cache.layers)
    with torch.no_grad(), Called("token_attention") as called:
        parts = [
            model(ids[:, begin:end], attention_mask=mask[:, :end], **{CACHE: cache}).logits
            for begin, end in ((0, 9), (9, 10), (10, 11), (11, 12))
        ]
    assert len(called.found) == 3 * 2
    expected = plain(ids, attention_mask=mask).logits.detach()
    torch.testing.assert_close(torch.cat(parts, 1)[0], expected[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(torch.cat(parts, 1)[1, 3:], expected[1, 3:], rtol=2e-5, atol=2e-5)


def test_a_token_with_a_gradient_or_in_another_dtype_is_not(on_gpu):
    layer = token_layer.TokenLayer(20)
    query = torch.randn(1, 2, 1, 8)
    with torch.no_grad():
        assert not layer.attends(query)
        layer.update(query, query)
        assert layer.attends(query)
        assert not layer.attends(query.half())
        assert not layer.attends(torch.randn(1, 2, 3, 8))
        layer.max_cache_len = token_layer.MOST_PLACES + 1
        assert not layer.attends(query)
        layer.max_cache_len = 20
    assert not layer.attends(query)
