"""LoRALinear and apply_lora: arithmetic beside peft's, QLoRA = LoRA over the dequantized weight, merging, targets."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qkernels.errors import UserError
from qlora.linear4bit import Linear4bit, LinearNF4
from qlora.lora import LoRALinear, apply_lora
from qlora.targets import likely_target_modules, resolve_target_modules

K, N, R = 64, 48, 4


def trained(layer: LoRALinear) -> LoRALinear:
    nn.init.normal_(layer.lora_B.weight, std=0.1)
    return layer


def pair() -> tuple[LoRALinear, LoRALinear]:
    """The same adapter around a 4-bit layer and around a float layer of its dequantized weight."""
    base = LinearNF4.from_linear(nn.Linear(K, N))
    dequantized = nn.Linear(K, N)
    dequantized.weight.data = base.dequantize()
    dequantized.bias.data = base.bias.detach().clone()
    packed = trained(LoRALinear(base, r=R, lora_alpha=8))
    plain = LoRALinear(dequantized, r=R, lora_alpha=8)
    plain.load_state_dict(
        {key: value for key, value in packed.state_dict().items() if key.startswith("lora_")}, strict=False
    )
    return packed, plain


# Arithmetic.


def test_a_fresh_adapter_changes_nothing():
    base = nn.Linear(K, N)
    x = torch.randn(3, K)
    assert torch.equal(LoRALinear(base)(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_qlora_is_exactly_lora_over_the_dequantized_weight(dtype):
    packed, plain = pair()
    plain.base_layer.to(dtype)
    x = torch.randn(5, K, dtype=dtype)
    grads = []
    for layer in (packed, plain):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        grads.append([y.detach(), inputs.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad])
    for ours, reference in zip(*grads, strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_equals_peft(use_rslora):
    peft = pytest.importorskip("peft")
    base = nn.Linear(K, N)
    ours = trained(LoRALinear(copy.deepcopy(base), R, 3, use_rslora=use_rslora))
    config = peft.LoraConfig(r=R, lora_alpha=3, target_modules=["0"], use_rslora=use_rslora)
    theirs = peft.get_peft_model(nn.Sequential(base), config)
    layer = theirs.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(ours.lora_A.weight)
    layer.lora_B["default"].weight.data.copy_(ours.lora_B.weight)
    assert layer.scaling["default"] == ours.scaling
    x = torch.randn(3, K)
    torch.testing.assert_close(ours(x), layer(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.get_delta_weight(), layer.get_delta_weight("default"), rtol=1e-6, atol=1e-7)


def test_initialization_is_peft_s():
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    ours = LoRALinear(nn.Linear(K, N), R)
    torch.manual_seed(7)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), peft.LoraConfig(r=R, target_modules=["0"]))
    # The generators have gone different ways, so the distributions are compared: uniform in +-1/sqrt(K).
    for A in (ours.lora_A.weight, theirs.base_model.model[0].lora_A["default"].weight):
        assert A.abs().max() <= 1 / math.sqrt(K)
        assert A.std().item() == pytest.approx(1 / math.sqrt(3 * K), rel=0.1)
    assert not ours.lora_B.weight.any()


def test_scaling():
    assert LoRALinear(nn.Linear(K, N), 4, 8).scaling == 2
    assert LoRALinear(nn.Linear(K, N), 4, 8, use_rslora=True).scaling == 4


def test_dropout_acts_on_the_adapter_and_in_training_only():
    layer = trained(LoRALinear(nn.Linear(K, N), R, lora_dropout=0.5))
    x = torch.randn(3, K)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.lora_B.weight)
    assert torch.equal(layer.train()(x), layer.base_layer(x))
    assert not LoRALinear(nn.Linear(K, N).eval()).training


def test_only_the_adapter_learns_and_its_dtype_is_its_own():
    layer = LoRALinear(LinearNF4.from_linear(nn.Linear(K, N)).half(), R)
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    assert names == ["lora_A.weight", "lora_B.weight"]
    assert layer.lora_A.weight.dtype == torch.float32
    x = torch.randn(2, K, dtype=torch.float16)
    y = trained(layer)(x)
    assert y.dtype == torch.float16
    exact = layer.base_layer(x).float() + layer.scaling * layer.lora_B(layer.lora_A(x.float()))
    assert torch.equal(y, exact.half())  # the sum is rounded once
    y.sum().backward()
    assert layer.lora_A.weight.grad.dtype == torch.float32
    assert layer.base_layer.bias.grad is None


def test_state_dict_keys():
    keys = list(LoRALinear(nn.Linear(K, N)).state_dict())
    assert keys == ["base_layer.weight", "base_layer.bias", "lora_A.weight", "lora_B.weight"]


def test_autocast():
    layer = trained(LoRALinear(LinearNF4.from_linear(nn.Linear(K, N)), R))
    x = torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        layer.merge()
        merged = layer(x)
    assert y.dtype == merged.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), merged.float(), rtol=0.05, atol=0.05)


# Merging.


@pytest.mark.parametrize("which", [0, 1], ids=["4-bit", "float"])
def test_merge_computes_the_same_and_unmerge_restores_every_bit(which):
    layer = pair()[which].eval()
    x = torch.randn(5, K)
    before, y = copy.deepcopy(layer.state_dict()), layer(x)
    layer.merge()
    assert layer.merged
    assert list(layer.state_dict()) == list(before)
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    assert not torch.equal(layer(x), layer.base_layer(x))
    layer.unmerge()
    assert not layer.merged
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(layer(x), y)


def test_merged_linear_is_the_sum_rounded_once():
    layer, _ = pair()
    layer.base_layer.quant_state.dtype = torch.bfloat16
    exact = layer.base_layer.dequantize(torch.float32) + layer.get_delta_weight()
    linear = layer.merged_linear()
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, exact.bfloat16())
    assert linear.bias.dtype == torch.bfloat16
    assert torch.equal(layer.merged_linear(torch.float32).weight, exact)
    assert LoRALinear(nn.Linear(K, N, bias=False)).merged_linear().bias is None


def test_merging_keeps_the_input_s_dtype_and_follows_moves():
    layer = pair()[0].eval()
    layer.merge()
    assert layer(torch.randn(2, K, dtype=torch.float16)).dtype == torch.float16
    assert layer.half().merged_weight.dtype == torch.float16


def test_training_unmerges_and_merging_again_takes_up_the_change():
    layer = pair()[0].eval()
    x = torch.randn(5, K)
    layer.merge()
    assert not layer.train().merged
    layer.lora_B.weight.data += 1
    layer.eval().merge()
    first = layer(x)
    layer.lora_B.weight.data += 1
    layer.merge()
    assert not torch.equal(layer(x), first)


def test_a_diverged_adapter_is_not_merged():
    layer = LoRALinear(nn.Linear(K, N), R)
    layer.lora_B.weight.data[0, 0] = torch.inf
    with pytest.raises(UserError, match=rf"lora_A, lora_B: expected an adapter .* got {K} NaN or Inf of {K * N} in"):
        layer.merge()
    assert not layer.merged


def test_a_foreign_packed_base_cannot_be_merged():
    base = nn.Linear(K, N)
    base.weight = nn.Parameter(torch.zeros(N * K // 2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"base_layer: expected a float weight of shape \(48, 64\), got Linear"):
        LoRALinear(base).merged_linear()


# Building.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r: expected an integer of at least 1, got 0"),
        ({"r": 2.5}, "r: expected an integer of at least 1, got 2.5"),
        ({"r": True}, "r: expected an integer of at least 1, got True"),
        ({"lora_alpha": 0}, "lora_alpha: expected a positive number, got 0"),
        ({"lora_alpha": "16"}, "lora_alpha: expected a positive number, got '16'"),
        ({"lora_alpha": math.inf}, "lora_alpha: expected a positive number, got inf"),
        ({"lora_dropout": 1.0}, r"lora_dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout: expected a probability in \[0, 1\), got -0.1"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype: expected one of torch.float32, .*, got torch.int8"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        LoRALinear(nn.Linear(K, N), **options)


def test_wrong_bases():
    with pytest.raises(UserError, match=r"base_layer: expected a linear layer, .* got Embedding"):
        LoRALinear(nn.Embedding(K, N))
    with pytest.raises(UserError, match=r"base_layer: expected a layer without an adapter, got LoRALinear"):
        LoRALinear(LoRALinear(nn.Linear(K, N)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(K, 3 * K)
        self.dense = nn.Linear(K, K)
        self.norm = nn.LayerNorm(K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dense(self.norm(self.query_key_value(x)[..., :K]))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([Block(), Block()])
        self.dense = nn.Linear(K, K)
        self.lm_head = nn.Linear(K, 10, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            x = block(x)
        return self.lm_head(self.dense(x))


def test_apply_lora_wraps_freezes_and_trains():
    model = Model()
    x = torch.randn(3, K)
    before = model(x)
    names = apply_lora(model, ["query_key_value"], r=R, lora_alpha=8)
    assert names == ["h.0.query_key_value", "h.1.query_key_value"]
    assert torch.equal(model(x), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{ab}.weight" for name in names for ab in "AB"
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(x), torch.tensor([1, 2, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_apply_lora_twice_keeps_the_first_adapters_trainable():
    model = Model()
    apply_lora(model, ["query_key_value"], r=R)
    apply_lora(model, ["h.1.dense"], r=R)
    assert model.h[0].query_key_value.lora_A.weight.requires_grad
    assert isinstance(model.h[1].dense, LoRALinear)
    assert not isinstance(model.h[0].dense, LoRALinear)
    assert likely_target_modules(model) == ["dense"]
    with pytest.raises(UserError, match=r"query_key_value', which has an adapter already \(h.0.query_key_value\)"):
        apply_lora(model, ["query_key_value"])


def test_likely_targets_are_ordered_by_count_without_the_head():
    assert likely_target_modules(Model()) == ["dense", "query_key_value"]
    model = Model()
    model.h[0].query_key_value = Linear4bit.from_linear(model.h[0].query_key_value)
    assert likely_target_modules(model) == ["dense", "query_key_value"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["dense"], ["h.0.dense", "h.1.dense", "dense"]),
        (("dense", "lm_head"), ["h.0.dense", "h.1.dense", "dense", "lm_head"]),
        ("all-linear", ["h.0.query_key_value", "h.0.dense", "h.1.query_key_value", "h.1.dense", "dense"]),
        (r"h\.\d\.dense", ["h.0.dense", "h.1.dense"]),
    ],
)
def test_resolving_follows_peft(targets, expected):
    model = Model()
    assert resolve_target_modules(model, targets) == expected
    if targets == "all-linear":
        return  # peft takes it with transformers' models only
    peft = pytest.importorskip("peft")
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets), model)
    assert [name for name, module in wrapped.named_modules() if isinstance(module, peft.tuners.lora.Linear)] == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj"], "got 'q_proj', which names nothing. Likely ones: dense, query_key_value."),
        (["dense", "v_proj"], "got 'v_proj', which names nothing. Likely"),
        ("query_key_value", r"which names nothing \(write \['query_key_value'\] for a name\). Likely ones"),
        (["norm"], r"got 'norm', which is a LayerNorm and not a linear layer \(h.0.norm\). Likely ones"),
        ([], "expected names of linear layers of Model, got an empty list. Likely ones: dense"),
        ("(", r"got not a regular expression: .*\. Likely ones"),
    ],
)
def test_unknown_targets_are_refused_with_the_likely_ones(targets, message):
    model = Model()
    with pytest.raises(UserError, match=message) as caught:
        apply_lora(model, targets)
    assert caught.value.argument == "target_modules"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_wrong_option_leaves_the_model_as_it_was():
    model = Model()
    with pytest.raises(UserError, match=r"^r: "):
        apply_lora(model, ["dense"], r=-1)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model.h[0].dense) is nn.Linear


def test_a_layer_that_is_the_whole_model_is_left_as_it_was():
    layer = nn.Linear(3, 4)
    with pytest.raises(UserError, match=r"^model: expected a model .* got Linear, .* Wrap it with LoRALinear"):
        apply_lora(layer, "all-linear")
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_a_model_without_linear_layers():
    with pytest.raises(UserError, match=r"got no linear layer in the model. The model has no linear layer to adapt."):
        resolve_target_modules(nn.Sequential(nn.LayerNorm(4)), "all-linear")
