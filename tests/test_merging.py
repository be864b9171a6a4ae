"""Merging onto three bases, weight by weight, against peft's own merge of whole models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import save_tiny, tiny_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from states import assert_same_state
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qkernels.errors import UserError
from qlora import Linear4bit, NF4Config, dequantize_model, load_pretrained_4bit, merge_adapter
from qlora.integrations.transformers.bitsandbytes_files import BitsAndBytesNF4Config
from qlora.tensor_files import ShardWriter, TensorReader

ADAPTERS = {
    "lora": ("llama", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}}),
    "rslora": ("bloom", {"target_modules": ["query_key_value"], "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "bias": ("bloom", {"target_modules": ["query_key_value"], "lora_bias": True}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "everything": ("llama", {"target_modules": "all-linear"}),
}
SMALL = 40_000  # bytes a shard, so that there are several


def float_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_adapter(base: Path, folder: Path, std: float = 0.05, **settings) -> Path:
    """An adapter of the 4-bit base, with random weights in all its parts."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(load_pretrained_4bit(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(params=ADAPTERS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def base(kind, tmp_path) -> Path:
    return save_tiny(ADAPTERS[kind][0], tmp_path / "base")


@pytest.fixture
def adapter(kind, base, tmp_path) -> Path:
    return save_adapter(base, tmp_path / "adapter", **ADAPTERS[kind][1])


@pytest.fixture
def llama_adapter(llama, tmp_path) -> Path:
    return save_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])


def merged_by_peft(model, adapter) -> dict[str, torch.Tensor]:
    return dequantize_model(adapted(model, adapter).merge_and_unload()).state_dict()


def adapted(model, adapter) -> PeftModel:
    return PeftModel.from_pretrained(model, adapter)


def made(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    folder.mkdir()
    return folder


# --- the three bases


@pytest.mark.parametrize("stored", ["float", "4bit"])
def test_onto_the_dequantized_base_it_is_what_was_trained(base, adapter, tmp_path, stored):
    four_bit = load_pretrained_4bit(base)
    expected = merged_by_peft(load_pretrained_4bit(base), adapter)
    if stored == "4bit":
        base = tmp_path / "packed"
        four_bit.save_pretrained(base, max_shard_size="20KB")
    folder = made(tmp_path)
    report = merge_adapter(base, adapter, folder, dtype=torch.float32, max_shard_bytes=SMALL)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_same_state(float_model(folder).state_dict(), expected)
    assert (report.error, report.lost) == (0, 0)
    assert report.layers == sum(type(m).__name__ == "LoraLinear4bit" for m in adapted(four_bit, adapter).modules())


def test_onto_the_16_bit_base_it_is_peft_on_the_float_model(base, adapter, tmp_path):
    report = merge_adapter(base, adapter, made(tmp_path), onto="16bit", dtype=torch.float32)
    expected = adapted(float_model(base), adapter).merge_and_unload()
    for name, tensor in float_model(tmp_path / "merged").state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-6, atol=1e-7)
    assert 0.02 < report.error < 0.15  # NF4's own, 9% of nearly normal weights, less where the adapter is large
    assert report.lost > report.error


def test_onto_4_bits_it_is_the_sum_quantized_again(base, adapter, tmp_path):
    report = merge_adapter(base, adapter, made(tmp_path), onto="4bit", dtype=torch.float32)
    model = load_pretrained_4bit(tmp_path / "merged", dtype="float32")
    kept, expected = load_pretrained_4bit(base).state_dict(), merged_by_peft(load_pretrained_4bit(base), adapter)
    changed = 0
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            if torch.equal(kept[f"{name}.weight"], layer.weight.data):  # no adapter here: the codes of the base
                continue
            changed += 1
            assert torch.equal(
                layer.dequantize(), Linear4bit.from_linear(as_linear(expected[f"{name}.weight"])).dequantize()
            )
    assert report.layers == changed
    assert 0.01 < report.error < 0.15
    assert report.lost > report.error
    assert "the sum rounded to 4 bits again" in str(report)


def as_linear(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear


def test_a_small_adapter_is_lost_in_4_bits(llama, tmp_path):
    """Changes smaller than a quantization step: the report says so, and the other two ways keep them."""
    adapter = save_adapter(llama, tmp_path / "adapter", std=0.003, target_modules=["q_proj"])
    (tmp_path / "other").mkdir()
    assert merge_adapter(llama, adapter, made(tmp_path), onto="4bit").lost > 0.8
    assert merge_adapter(llama, adapter, tmp_path / "other", dtype=torch.float32).lost == 0


def test_rounding_to_half_precision_is_reported(llama, llama_adapter, tmp_path):
    report = merge_adapter(llama, llama_adapter, made(tmp_path), dtype=torch.float16)
    assert 1e-5 < report.error < 2**-11
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float16}
    assert report.total_bytes == 2 * sum(tensor.numel() for tensor in tiny_model("llama").state_dict().values())


def test_a_4_bit_checkpoint_stays_what_it_was(llama, llama_adapter, tmp_path):
    """The form of bitsandbytes, FP4 without double quantization in bfloat16 storage."""
    given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage="bfloat16")
    config = BitsAndBytesNF4Config(given.to_dict())
    packed = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    merge_adapter(tmp_path / "packed", llama_adapter, made(tmp_path), onto="4bit", dtype=torch.float32)
    stored = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    assert stored == json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    model = load_pretrained_4bit(tmp_path / "merged", dtype="float32")
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert (weight.quant_type, weight.quant_storage, weight.compress_statistics) == ("fp4", torch.bfloat16, False)
    assert torch.isfinite(model(tokens()).logits).all()


# --- checkpoints as they come


def test_names_without_the_prefix_and_pickled_files(tmp_path):
    """Bloom's published checkpoints are like this."""
    base = save_tiny("bloom", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["query_key_value"])
    expected = merged_by_peft(load_pretrained_4bit(base), adapter)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    merge_adapter(base, adapter, made(tmp_path), dtype=torch.float32)
    assert "h.0.self_attention.query_key_value.weight" in TensorReader(tmp_path / "merged")
    assert_same_state(float_model(tmp_path / "merged").state_dict(), expected)


def test_no_more_than_a_shard_is_held(tmp_path):
    writer = ShardWriter(tmp_path, max_shard_bytes=1000)
    for number in range(7):
        writer.add(f"w{number}", torch.full((100,), float(number)))
        assert sum(tensor.numel() * 4 for tensor in writer._pending.values()) <= 1000
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert (index["metadata"]["total_size"], len(set(index["weight_map"].values()))) == (2800, 4)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == sorted(set(index["weight_map"].values()))
    reader = TensorReader(tmp_path)
    assert all(torch.equal(reader.read(f"w{n}"), torch.full((100,), float(n))) for n in range(7))


def test_the_skeleton_takes_no_memory(llama, llama_adapter, tmp_path, monkeypatch):
    from qlora import merging

    sizes = []
    stock = merging._adapted

    def watched(skeleton, adapter):
        model = stock(skeleton, adapter)
        sizes.append(sum(p.untyped_storage().nbytes() for name, p in model.named_parameters() if "lora_" not in name))
        return model

    monkeypatch.setattr(merging, "_adapted", watched)
    merge_adapter(llama, llama_adapter, made(tmp_path))
    assert sizes[0] < 1000


# --- messages


def test_what_is_refused(llama, llama_adapter, tmp_path):
    with pytest.raises(UserError, match="onto: expected one of 'dequantized', '16bit', '4bit', got '8bit'"):
        merge_adapter(llama, llama_adapter, tmp_path, onto="8bit")
    load_pretrained_4bit(llama).save_pretrained(tmp_path / "packed")
    with pytest.raises(UserError, match=r"base: expected a float checkpoint, since onto is '16bit', got .*is 4-bit"):
        merge_adapter(tmp_path / "packed", llama_adapter, made(tmp_path), onto="16bit")
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"base: expected a weight model.layers.1.self_attn.q_proj.weight"):
        merge_adapter(llama, llama_adapter, tmp_path / "merged")


def test_nan_in_an_adapter(llama, llama_adapter, tmp_path):
    file = llama_adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(UserError, match="expected finite merged weights"):
        merge_adapter(llama, llama_adapter, made(tmp_path))


def test_an_adapter_on_a_tied_weight(tmp_path):
    base = save_tiny("bloom", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["query_key_value", "word_embeddings"])
    with pytest.raises(UserError, match="expected no adapter on a weight that two modules share"):
        merge_adapter(base, adapter, made(tmp_path))


def test_no_checkpoint(llama_adapter, llama, tmp_path):
    (llama / "model.safetensors").unlink()
    with pytest.raises(UserError, match="which has none of these"):
        merge_adapter(llama, llama_adapter, made(tmp_path))


def test_config_says_how_a_float_base_was_quantized(llama, tmp_path):
    adapter = save_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    config = NF4Config(quant_type="fp4", blocksize=32, modules_to_not_convert=["v_proj"])
    merge_adapter(llama, adapter, made(tmp_path), dtype=torch.float32, config=config, onto="4bit")
    model = load_pretrained_4bit(tmp_path / "merged")
    assert {m.weight.blocksize for m in model.modules() if isinstance(m, Linear4bit)} == {32}
    assert type(model.model.layers[0].self_attn.v_proj) is torch.nn.Linear
