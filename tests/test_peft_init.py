"""LoftQ, QERA and PiSSA on a 4-bit base: closer to the float weights, and the adapter trains, saves and loads."""

from __future__ import annotations

import pytest
import torch
from models import save_tiny, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import qlora
from qkernels.errors import UserError
from qlora.integrations import peft_init

FLOAT = {"dtype": "float32", "device": "cpu"}
INPUTS = [{"input_ids": tokens(4, 33)}]


@pytest.fixture
def folder(name, tmp_path):
    return save_tiny(name, tmp_path / "float")


def adapted(folder, **settings):
    targets = {"target_modules": "all-linear", "r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
    return get_peft_model(qlora.load_pretrained_4bit(folder, **FLOAT), LoraConfig(**{**targets, **settings}))


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("method", ["loftq", "loftq_niter_8", "qera", "qera_niter_8", "pissa", "pissa_niter_8"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_it_starts_closer_to_the_float_model(folder, method, settings):
    from transformers import AutoModelForCausalLM

    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    model = adapted(folder, **settings)
    before = (logits(model) - expected).norm()
    report = qlora.initialize_from_float(model, folder, method, inputs=INPUTS)
    assert (logits(model) - expected).norm() < before
    assert report.layers == len([m for m in model.modules() if hasattr(m, "lora_dropout")])
    assert 0.05 < report.before < 0.12
    # Rank 8 of a 48-row matrix takes up a third of its error or more.
    assert report.after < 0.85 * report.before


def test_loftq_is_the_best_of_its_rank_and_leaves_the_base_alone(folder):
    model = adapted(folder)
    before = {key: value.clone() for key, value in model.state_dict().items() if "lora_" not in key}
    qlora.initialize_from_float(model, folder, "loftq")
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    weights = load_file(folder / "model.safetensors")
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            error = weights[f"{name}.weight"] - layer.base_layer.dequantize(torch.float32)
            left = (error - layer.get_delta_weight("default")).norm()
            torch.testing.assert_close(left, torch.linalg.svdvals(error)[8:].norm(), rtol=1e-4, atol=0)


def test_qera_is_the_best_of_its_rank_for_the_inputs_it_saw(folder):
    """The error of each layer's output, on these inputs, is the least that the rank allows."""
    model, seen = adapted(folder), {}
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_A")}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].flatten(0, -2)}))
    model(**INPUTS[0])
    report = qlora.initialize_from_float(model, folder, "qera", inputs=INPUTS)
    weights = load_file(folder / "model.safetensors")
    before = after = whole = 0.0
    for name, layer in layers.items():
        x, weight = seen[name], weights[f"{name}.weight"]
        error = x @ (weight - layer.base_layer.dequantize(torch.float32)).t()
        left = (error - x @ layer.get_delta_weight("default").t()).norm()
        torch.testing.assert_close(left, torch.linalg.svdvals(error)[8:].norm(), rtol=1e-3, atol=0)
        before, after, whole = before + error.norm() ** 2, after + left**2, whole + (x @ weight.t()).norm() ** 2
    assert report.before == pytest.approx((before / whole).sqrt().item(), rel=1e-4)
    assert report.after == pytest.approx((after / whole).sqrt().item(), rel=1e-3)
    assert report.after < 0.8 * report.before


def test_fewer_rows_stand_for_all():
    """Of inputs whose directions are far apart in size, where columns are zero, the same or few."""
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 2, 40)
    x[:, 7], x[:, 9] = 0, x[:, 8]
    rows, weight = peft_init._fewer(x), torch.randn(16, 40)
    assert (rows.shape, rows.dtype) == ((40, 40), torch.float32)
    torch.testing.assert_close(rows.t() @ rows, x.t() @ x, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close((rows @ weight.t()).norm(), (x @ weight.t()).norm())
    assert peft_init._fewer(torch.zeros(9, 4)).abs().max() < 1e-30


@pytest.mark.parametrize("method", ["loftq", "qera"])
def test_a_part_of_the_rank_begins_as_peft_has_it(folder, method):
    torch.manual_seed(0)
    model = adapted(folder)
    fresh = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    report = qlora.initialize_from_float(model, folder, method, inputs=INPUTS, rank=3)
    smaller = adapted(folder, r=3, lora_alpha=6)
    expected = qlora.initialize_from_float(smaller, folder, method, inputs=INPUTS)
    assert (report.before, report.after) == pytest.approx((expected.before, expected.after), rel=1e-5)
    assert report.after < report.before
    found = model.state_dict()
    for name, value in fresh.items():
        rest = (slice(3, None),) if "lora_A" in name else (slice(None), slice(3, None))
        assert torch.equal(found[name][rest], value[rest])
        assert found[name].shape == value.shape


def test_pissa_is_peft_on_the_float_model_with_its_rest_quantized(folder):
    from transformers import AutoModelForCausalLM

    config = LoraConfig(target_modules="all-linear", r=8, lora_alpha=16, init_lora_weights="pissa")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    ours = adapted(folder)
    qlora.initialize_from_float(ours, folder, "pissa")
    expected = dict(theirs.named_modules())
    for name, layer in ours.named_modules():
        if hasattr(layer, "lora_A"):
            rest = expected[name].base_layer.weight
            torch.testing.assert_close(layer.get_delta_weight("default"), expected[name].get_delta_weight("default"))
            ideal = qlora.Linear4bit.from_linear(expected[name].base_layer).dequantize(torch.float32)
            error, least = (layer.base_layer.dequantize(torch.float32) - rest).norm(), (ideal - rest).norm()
            torch.testing.assert_close(error, least, rtol=1e-3, atol=0)


def test_base_and_adapter_of_pissa_come_back(folder, tmp_path):
    model = adapted(folder)
    qlora.initialize_from_float(model, folder, "pissa")
    model.train()(tokens(), labels=tokens()).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(qlora.load_pretrained_4bit(tmp_path / "base", **FLOAT), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)


def test_what_is_refused(llama, tmp_path):
    model = adapted(llama)
    with pytest.raises(UserError, match="method: expected 'loftq', 'qera' or 'pissa'"):
        qlora.initialize_from_float(model, llama, "olora")
    with pytest.raises(UserError, match="model: expected 4-bit layers with the adapter 'other', got none"):
        qlora.initialize_from_float(model, llama, adapter_name="other")
    for rank in (0, 9):
        with pytest.raises(UserError, match=f"rank: expected 1 to 8, the adapter's rank, got {rank}"):
            qlora.initialize_from_float(model, llama, rank=rank)
    with pytest.raises(UserError, match="rank: expected 1 to 4, the adapter's rank, got 5"):
        qlora.initialize_from_float(adapted(llama, rank_pattern={"v_proj": 4}), llama, rank=5)
    with pytest.raises(UserError, match="inputs: expected batches that go through every layer"):
        qlora.initialize_from_float(model, llama, "qera")
    packed = qlora.load_pretrained_4bit(llama, **FLOAT)
    packed.save_pretrained(tmp_path / "packed")
    with pytest.raises(UserError, match=r"checkpoint: expected the float weight .*q_proj.weight.*, got torch.uint8"):
        qlora.initialize_from_float(model, tmp_path / "packed")
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"expected the float weight model.layers.0.mlp.up_proj.weight.*, got none"):
        qlora.initialize_from_float(model, llama)
