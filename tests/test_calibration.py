"""Calibration of a 4-bit model: nearer to the float model on its inputs, and as good a 4-bit model as any other."""

from __future__ import annotations

import json
import re

import pytest
import torch
from models import LINEARS, save_tiny, tokens
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from train_runs import prompts, refused, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora
from qkernels.errors import UserError
from qlora.cli import main

FLOAT = {"dtype": "float32", "device": "cpu"}
INPUTS = [{"input_ids": tokens(8, 33)}]


@pytest.fixture
def folder(name, tmp_path):
    return save_tiny(name, tmp_path / "float")


def logits(model, ids=INPUTS[0]["input_ids"]):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("settings", [{}, {"blocksize": 32, "compress_statistics": False}, {"quant_type": "fp4"}])
def test_it_comes_closer_to_the_float_model(folder, name, settings):
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    model = qlora.load_pretrained_4bit(folder, **FLOAT, **settings)
    before = (logits(model) - expected).norm()
    report = qlora.calibrate_from_float(model, folder, INPUTS)
    assert (logits(model) - expected).norm() < 0.9 * before
    assert report.layers == 2 * LINEARS[name]
    assert 0.05 < report.before < 0.13
    # Random weights and texts are the hard case: inputs of which all directions matter.
    assert report.after < 0.85 * report.before


def test_it_is_saved_loaded_and_trained_as_before(folder, tmp_path):
    plain = qlora.load_pretrained_4bit(folder, **FLOAT)
    model = qlora.load_pretrained_4bit(folder, **FLOAT)
    qlora.calibrate_from_float(model, folder, INPUTS)
    layouts = [
        {key: (value.shape, value.dtype) for key, value in each.state_dict().items() if "quant_state" not in key}
        for each in (model, plain)
    ]
    assert layouts[0] == layouts[1]
    model.save_pretrained(tmp_path / "calibrated")
    again = qlora.load_pretrained_4bit(tmp_path / "calibrated", **FLOAT)
    assert torch.equal(logits(again), logits(model))
    config = LoraConfig(target_modules="all-linear", r=4, lora_alpha=4, task_type="CAUSAL_LM")
    tuned = get_peft_model(again, config).train()
    tuned(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "settings",
    [
        {"blocksize": 32, "compress_statistics": False},
        {"quant_type": "fp4", "quant_storage": torch.float16},
        {"dtype": "bfloat16"},
    ],
)
def test_the_format_stays_what_it_was(llama, settings):
    """Numbers alone change: not the sizes, the names or the dtypes of anything, nor what is told about the format."""

    def form(model):
        layer = model.model.layers[1].mlp.up_proj
        assert layer.quant_state is layer.weight.quant_state
        state = {key: value for key, value in layer.quant_state.as_dict().items() if key != "nested_offset"}
        parts = {"packed": layer.weight.data, **state}
        return {key: (v.shape, v.dtype) if isinstance(v, torch.Tensor) else v for key, v in parts.items()}

    model = qlora.load_pretrained_4bit(llama, **{**FLOAT, **settings})
    before, packed = form(model), model.model.layers[1].mlp.up_proj.weight.clone()
    qlora.calibrate_from_float(model, llama, INPUTS)
    assert form(model) == before
    layer = model.model.layers[1].mlp.up_proj
    assert not torch.equal(layer.weight.view(torch.uint8), packed.view(torch.uint8))
    decoded = layer.dequantize()
    layer.weight = torch.nn.Parameter(layer.weight.detach(), requires_grad=False)  # as sharding makes it
    assert torch.equal(layer.dequantize(), decoded)


def test_a_model_that_trains_goes_on_training(llama):
    model = qlora.load_pretrained_4bit(llama, **FLOAT).train()
    model.config.attention_dropout = 0.5  # what is measured is the model as it will be used: nothing is dropped
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    plain = qlora.load_pretrained_4bit(llama, **FLOAT)
    qlora.calibrate_from_float(plain, llama, INPUTS)
    qlora.calibrate_from_float(model, llama, INPUTS)
    assert model.training
    assert torch.equal(logits(model.eval()), logits(plain))


def test_the_float_weights_are_those_of_the_revision(llama, monkeypatch):
    asked = []

    class Reader(qlora.calibration.TensorReader):
        def __init__(self, name, revision):
            asked.append((name, revision))
            super().__init__(name)

    monkeypatch.setattr(qlora.calibration, "TensorReader", Reader)
    model = qlora.load_pretrained_4bit(llama, **FLOAT)
    qlora.calibrate_from_float(model, llama, INPUTS, revision="v2")
    assert asked == [(llama, "v2")]


def test_with_the_adapters_start_it_comes_closer_still(folder):
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    left = []
    for calibrated in (False, True):
        model = qlora.load_pretrained_4bit(folder, **FLOAT)
        if calibrated:
            qlora.calibrate_from_float(model, folder, INPUTS, rank=4)
        tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, lora_alpha=4))
        qlora.initialize_from_float(tuned, folder, "qera", inputs=INPUTS)
        left.append((logits(tuned) - expected).norm())
    assert left[1] < 0.8 * left[0]


def test_padding_is_left_out(llama):
    """Texts one by one, and the same in one batch filled up with a token that none of them has."""
    texts = [tokens(1, length) for length in (5, 9, 17)]
    ids = torch.full((3, 17), 3)
    mask = torch.zeros(3, 17, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : text.shape[1]], mask[row, : text.shape[1]] = text[0], 1
    found = []
    for inputs in ([{"input_ids": text} for text in texts], [{"input_ids": ids, "attention_mask": mask}]):
        model = qlora.load_pretrained_4bit(llama, **FLOAT)
        found.append((qlora.calibrate_from_float(model, llama, inputs), logits(model)))
    assert found[0][0].before == pytest.approx(found[1][0].before, rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=5e-3)


def test_a_block_is_measured_behind_blocks_that_are_done(llama, monkeypatch):
    """What reaches the second block while it is measured reaches it in the end; nothing behind it is computed."""
    grams, real = {}, qlora.calibration._grams

    def remembered(model, block, *rest):
        grams[block] = real(model, block, *rest)
        return grams[block]

    monkeypatch.setattr(qlora.calibration, "_grams", remembered)
    model = qlora.load_pretrained_4bit(llama, **FLOAT)
    too_far = model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("computed what nobody asked for"))
    qlora.calibrate_from_float(model, llama, INPUTS)
    too_far.remove()
    assert list(grams) == ["model.layers.0", "model.layers.1"]
    name = "model.layers.1.self_attn.q_proj"
    x = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, arguments: x.append(arguments[0].flatten(0, -2)))
    logits(model)
    torch.testing.assert_close(grams["model.layers.1"][name], x[0].t() @ x[0])


def test_what_is_refused(llama):
    def model():
        return qlora.load_pretrained_4bit(llama, **FLOAT)

    tuned = model()
    get_peft_model(tuned, LoraConfig(target_modules="all-linear"))
    with pytest.raises(UserError, match=r"model: expected .* without adapters, got one with adapters"):
        qlora.calibrate_from_float(tuned, llama, INPUTS)
    with pytest.raises(UserError, match="got no 4-bit linear layer"):
        qlora.calibrate_from_float(AutoModelForCausalLM.from_pretrained(llama), llama, INPUTS)
    with pytest.raises(UserError, match=r"inputs: .* got none that reaches model.layers.0.self_attn.q_proj"):
        qlora.calibrate_from_float(model(), llama, [])
    with pytest.raises(UserError, match=r"inputs: expected batches of tokens, got str\. Pass inputs=\[tokenizer"):
        qlora.calibrate_from_float(model(), llama, ["a text"])
    with pytest.raises(UserError, match="rank: expected 0 or more, got -3"):
        qlora.calibrate_from_float(model(), llama, INPUTS, rank=-3)
    loaded = model()
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"expected the float weight model.layers.0.mlp.up_proj.weight.*, got none"):
        qlora.calibrate_from_float(loaded, llama, INPUTS)


@pytest.mark.parametrize("form", ["ours", "bitsandbytes"])
def test_the_command_writes_a_checkpoint_that_loads_anywhere(form, tmp_path, capsys):
    model = save_model("llama", tmp_path / "float", hidden_size=64, intermediate_size=128)
    flags = {"model_name_or_path": model, "dataset_name": "bundled", "max_samples": 20, "max_length": 24}
    words = ["quantize", "--use_cpu", "true", *(f"--{key}={value}" for key, value in flags.items())]
    plain, made = tmp_path / "plain", tmp_path / "made"
    assert main([*words, "--output_dir", str(plain), "--calibrate", "false"]) == 0
    assert main([*words, "--output_dir", str(made), "--bitsandbytes", str(form == "bitsandbytes").lower()]) == 0
    said = re.search(r"error of the layers' outputs: ([\d.]+)% -> ([\d.]+)% \(14 layers\)", capsys.readouterr().out)
    assert float(said[2]) < 0.85 * float(said[1])
    method = json.loads((made / "config.json").read_text())["quantization_config"]["quant_method"]
    assert method == {"ours": "qkernels_nf4", "bitsandbytes": "bitsandbytes"}[form]
    tokenizer = AutoTokenizer.from_pretrained(made)
    ids = tokenizer(prompts()[:20], return_tensors="pt", padding=True, max_length=24, truncation=True)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(**ids).logits
        found = [
            (qlora.load_pretrained_4bit(folder, **FLOAT)(**ids).logits - expected).norm() for folder in (plain, made)
        ]
    assert found[1] < 0.9 * found[0]


def test_the_texts_that_the_command_takes(tmp_path, monkeypatch):
    """The first ones of the file, cut, each once; what fills up a batch is behind them and masked."""
    model, batches = save_model("llama", tmp_path / "float", hidden_size=64, intermediate_size=128), []

    def calibrate(model, name, inputs, revision):
        assert (name, revision) == (str(flags["model_name_or_path"]), "v2")
        batches.extend(inputs)
        return qlora.calibration.CalibrationReport(0.1, 0.05, 1)

    monkeypatch.setattr("qlora.quantize.calibrate_from_float", calibrate)
    texts = [" ".join(prompts()[0].split()[:length]) for length in (3, 20, 5, 1, 12, 2, 9, 4, 6, 7)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    flags = {"model_name_or_path": model, "dataset_name": tmp_path / "texts.txt", "output_dir": tmp_path / "made"}
    flags |= {"use_cpu": "true", "max_samples": 9, "max_length": 8, "model_revision": "v2"}
    assert main(["quantize", *(f"--{key}={value}" for key, value in flags.items())]) == 0
    rows = [(ids[mask.bool()].tolist(), mask) for b in batches for ids, mask in zip(*b.values(), strict=True)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert sorted(ids for ids, _ in rows) == sorted(tokenizer(text)["input_ids"][:8] for text in texts[:9])
    assert all((mask.diff() <= 0).all() for _, mask in rows)


def test_the_command_refuses_to_write_over_something(llama, tmp_path, capsys):
    assert "--output_dir" in refused(capsys, "quantize", "--model_name_or_path", str(llama))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert "there" in refused(capsys, "quantize", "--output_dir", str(tmp_path / "there"))
    nowhere = tmp_path / "there" / "file" / "below"
    assert "expected a place that can be written" in refused(capsys, "quantize", "--output_dir", str(nowhere))
