"""NF4Config in from_pretrained and save_pretrained, on tiny models."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from models import LINEARS, save_tiny, tiny_model, tokens
from safetensors.torch import load_file, save_file
from states import assert_same_state
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from qkernels.errors import UserError
from qlora.embedding4bit import Embedding4bit
from qlora.integrations.transformers import NF4Config, dequantize_model, quantize_model
from qlora.linear4bit import Linear4bit

DTYPES_AND_STORAGES = [
    (torch.float32, torch.uint8),
    (torch.bfloat16, torch.uint8),
    (torch.float16, torch.uint8),
    (torch.float16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


def load(folder, config=None, **kwargs):
    if config is not None:  # an explicit None would erase what config.json says
        kwargs["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **kwargs})


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def stored(folder):
    return load_file(folder / "model.safetensors")


def resave(folder, change):
    """Change the tensors of a checkpoint."""
    tensors = stored(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- quantize, save, reload, save again


@pytest.mark.parametrize(("dtype", "quant_storage"), DTYPES_AND_STORAGES, ids=str)
def test_save_reload_and_save_again_are_bit_identical(checkpoint, name, tmp_path, dtype, quant_storage):
    model = load(checkpoint, NF4Config(quant_storage=quant_storage), dtype=dtype)
    assert len(layers_of(model)) == 2 * LINEARS[name]
    model.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    assert_same_state(stored(tmp_path / "first"), stored(tmp_path / "second"))
    assert (tmp_path / "first" / "config.json").read_text() == (tmp_path / "second" / "config.json").read_text()
    assert_same_state(model.state_dict(), again.state_dict())
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress_statistics", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_every_setting_is_the_layers_own(llama, tmp_path, quant_type, compress_statistics, blocksize):
    config = NF4Config(quant_type=quant_type, compress_statistics=compress_statistics, blocksize=blocksize)
    model = load(llama, config)
    wanted = Linear4bit.from_linear(
        tiny_model("llama").model.layers[1].mlp.up_proj,
        quant_type=quant_type,
        compress_statistics=compress_statistics,
        blocksize=blocksize,
    )
    assert_same_state(model.model.layers[1].mlp.up_proj.state_dict(), wanted.state_dict())
    model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").config.quantization_config == config


def test_names_in_the_file_are_bitsandbytes_own(llama, tmp_path):
    load(llama, NF4Config()).save_pretrained(tmp_path / "saved")
    prefix = "model.layers.0.self_attn.q_proj.weight"
    names = {key.removeprefix(prefix) for key in stored(tmp_path / "saved") if key.startswith(prefix)}
    wanted = {"absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"}
    assert names == {""} | {f".{name}" for name in wanted}


def test_compute_dtype_reaches_the_layers(llama):
    model = load(llama, NF4Config(compute_dtype="bfloat16"))
    assert {layer.compute_dtype for layer in layers_of(model).values()} == {torch.bfloat16}


def test_output_layer_and_embedding_stay_float_besides_the_named_modules(checkpoint, name, tmp_path):
    skipped = {"llama": "mlp", "bloom": "dense_4h_to_h"}[name]
    model = load(checkpoint, NF4Config(modules_to_not_convert=[skipped]))
    assert layers_of(model)
    assert not [layer for layer in layers_of(model) if skipped in layer]
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert module.weight.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    assert set(layers_of(load(tmp_path / "saved"))) == set(layers_of(model))


def test_reload_in_another_dtype_casts_what_is_float_and_keeps_the_codes(checkpoint, tmp_path):
    load(checkpoint, NF4Config(), dtype=torch.float32).save_pretrained(tmp_path / "saved")
    model = load(tmp_path / "saved", dtype=torch.float16)
    codes = set(layers_of(model))
    floats = {
        parameter.dtype
        for name, parameter in model.named_parameters()
        if not (name.endswith(".weight") and name.removesuffix(".weight") in codes)
    }
    assert floats == {torch.float16}
    before = stored(tmp_path / "saved")
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.weight.data, before[f"{name}.weight"])
        assert torch.equal(layer.weight.absmax, before[f"{name}.weight.absmax"])
        assert layer.dequantize().dtype == torch.float16


def test_forward_is_that_of_the_dequantized_model(checkpoint):
    model = load(checkpoint, NF4Config())
    quantized = model(tokens()).logits
    dequantize_model(model)
    assert not layers_of(model)
    torch.testing.assert_close(model(tokens()).logits, quantized, rtol=1e-5, atol=1e-6)


def test_no_packed_weight_is_trainable(checkpoint, tmp_path):
    model = load(checkpoint, NF4Config(quant_storage="float16"))
    assert not any(layer.weight.requires_grad for layer in layers_of(model).values())
    model.save_pretrained(tmp_path / "saved")
    assert not any(layer.weight.requires_grad for layer in layers_of(load(tmp_path / "saved")).values())


def test_transformers_does_not_take_it_for_bitsandbytes(llama):
    model = load(llama, NF4Config())
    assert not hasattr(model, "is_loaded_in_4bit")
    assert model.is_quantized
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_serializable()


def test_device_map_auto_counts_the_packed_size(llama):
    model = load(llama, NF4Config(), device_map="auto")
    quantizer, name = model.hf_quantizer, "model.layers.0.self_attn.q_proj.weight"
    weight = torch.empty(48, 48)
    assert quantizer.param_element_size(model, name, weight) == pytest.approx(0.5 + (1 + 4 / 256) / 64)
    assert quantizer.param_element_size(model, "model.embed_tokens.weight", weight) == 4
    assert quantizer.adjust_max_memory({0: 100}) == {0: 90}


def test_pickled_float_checkpoint_is_quantized_alike(llama, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text((llama / "config.json").read_text())
    torch.save(stored(llama), tmp_path / "bin" / "pytorch_model.bin")
    assert_same_state(load(tmp_path / "bin", NF4Config()).state_dict(), load(llama, NF4Config()).state_dict())


@pytest.mark.gpu
def test_on_the_gpu(checkpoint, tmp_path):
    model = load(checkpoint, NF4Config(), dtype=torch.float16)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert {layer.weight.absmax.device.type for layer in layers_of(model).values()} == {"cuda"}
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(model(tokens().cuda()).logits, again(tokens().cuda()).logits)


# --- without bitsandbytes


def test_works_where_bitsandbytes_cannot_be_imported(llama, tmp_path):
    script = textwrap.dedent("""
        import sys
        sys.modules["bitsandbytes"] = None
        import torch
        from transformers import AutoModelForCausalLM
        from qlora.integrations.transformers import NF4Config
        folder, saved = sys.argv[1:]
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config())
        model.save_pretrained(saved)
        again = AutoModelForCausalLM.from_pretrained(saved)
        again.save_pretrained(saved + "-again")
        ids = torch.arange(8)[None]
        assert torch.equal(model(ids).logits, again(ids).logits)
        print(model.num_parameters())
    """)
    run = subprocess.run(
        [sys.executable, "-c", script, str(llama), str(tmp_path / "saved")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_plain_import_registers_the_method(llama, tmp_path):
    load(llama, NF4Config()).save_pretrained(tmp_path / "saved")
    script = textwrap.dedent("""
        import sys
        import qlora
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        assert sum(isinstance(module, qlora.Linear4bit) for module in model.modules()) == 14
    """)
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "saved")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# --- in memory, and back to float


def test_quantize_model_equals_from_pretrained(checkpoint, tmp_path):
    loaded = load(checkpoint, NF4Config(blocksize=32))
    model = quantize_model(load(checkpoint), NF4Config(blocksize=32))
    assert_same_state(model.state_dict(), loaded.state_dict())
    assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)
    for marked in (model, loaded):
        assert (marked.is_quantized, marked.quantization_method) == (True, "qkernels_nf4")
        assert marked.hf_quantizer.quantization_config is marked.config.quantization_config
    model.save_pretrained(tmp_path / "saved")
    assert_same_state(load(tmp_path / "saved").state_dict(), loaded.state_dict())


def test_dequantized_model_is_an_ordinary_one(checkpoint, tmp_path):
    model = load(checkpoint, NF4Config(), dtype=torch.float16)
    wanted = {name: layer.dequantize() for name, layer in layers_of(model).items()}
    model.dequantize()
    assert not model.is_quantized
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {tensor.dtype for tensor in stored(tmp_path / "saved").values()} == {torch.float16}
    again = load(tmp_path / "saved")
    for name, weight in wanted.items():
        assert torch.equal(again.get_submodule(name).weight, weight)


@pytest.mark.parametrize("dtype", [torch.float32, "float32"], ids=str)
def test_transformers_own_dequantize_takes_a_dtype(llama, dtype):
    model = load(llama, NF4Config(), dtype=torch.float16)
    model.dequantize(dtype)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_dequantize_in_another_dtype_embedding_and_hooks(llama):
    class Hook(ModelHook):
        pass

    model = load(llama, NF4Config(), dtype=torch.float16)
    embedding = Embedding4bit.from_embedding(model.model.embed_tokens)
    model.model.embed_tokens = embedding
    add_hook_to_module(model.model.layers[0].mlp.up_proj, hook := Hook())
    dequantize_model(model, torch.float32)
    assert not hasattr(model, "hf_quantizer")
    assert model.model.layers[0].mlp.up_proj._hf_hook is hook
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert torch.equal(model.model.embed_tokens.weight, embedding.dequantize(torch.float32))


def test_layers_made_float_are_recorded_when_saving(llama, tmp_path):
    model = load(llama, NF4Config(modules_to_not_convert=["k_proj"]))
    dequantize_model(model.model.layers[1].mlp)
    logits = model(tokens()).logits
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert len(layers_of(again)) == 14 - 2 - 3
    assert torch.equal(again(tokens()).logits, logits)


# --- NF4Config


def test_config_survives_json(tmp_path):
    config = NF4Config(
        quant_type="fp4",
        compress_statistics=False,
        blocksize=128,
        quant_storage="bfloat16",
        compute_dtype=torch.float16,
        quantize_embeddings=True,
        modules_to_not_convert=["mlp"],
    )
    config.to_json_file(tmp_path / "config.json")
    fields = json.loads((tmp_path / "config.json").read_text())
    assert NF4Config.from_dict(fields) == config
    assert NF4Config() != config
    assert fields == {
        "quant_method": "qkernels_nf4",
        "quant_type": "fp4",
        "compress_statistics": False,
        "blocksize": 128,
        "quant_storage": "bfloat16",
        "compute_dtype": "float16",
        "quantize_embeddings": True,
        "modules_to_not_convert": ["mlp"],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant_type": "int4"}, "quant_type: expected one of 'nf4', 'fp4', got 'int4'"),
        ({"blocksize": 100}, "blocksize: expected one of 32, 64, .*, got 100"),
        ({"blocksize": 64.0}, "blocksize: expected one of 32, 64, .*, got 64.0"),
        ({"compress_statistics": 1}, "compress_statistics: expected one of True, False, got 1"),
        ({"quant_storage": torch.int8}, "quant_storage: expected one of torch.uint8, .*, got torch.int8"),
        ({"quant_storage": "nonsense"}, "quant_storage: expected one of torch.uint8, .*, got 'nonsense'"),
        ({"compute_dtype": "float64"}, "compute_dtype: expected one of torch.float32, .*bfloat16, got 'float64'"),
        ({"modules_to_not_convert": "mlp"}, "modules_to_not_convert: expected a list of module names, got 'mlp'"),
        ({"modules_to_not_convert": [1]}, r"modules_to_not_convert: expected a list of module names, got \[1\]"),
        ({"quant_method": "bitsandbytes"}, "quant_method: expected one of 'qkernels_nf4', got 'bitsandbytes'"),
        ({"bits": 4}, r"bits: expected an argument of NF4Config, got bits=4. See help\(qlora.NF4Config\)"),
        ({"bnb_4bit_use_double_quant": True}, "BitsAndBytesConfig's name; here it is: compress_statistics"),
    ],
)
def test_config_refuses(arguments, message):
    with pytest.raises(UserError, match=message):
        NF4Config(**arguments)


# --- what loading refuses


def test_unknown_module_name(llama):
    with pytest.raises(UserError, match=r"names of modules of the model, got 'q_porj'. Among them are: .*q_proj"):
        load(llama, NF4Config(modules_to_not_convert=["q_porj"]))


def test_nan_in_weights_names_the_first_and_counts(llama):
    def spoil(tensors):
        tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 1] = float("inf")

    resave(llama, spoil)
    with pytest.raises(UserError, match=r"^model.layers.0.self_attn.q_proj.weight \(and 1 more\): expected finite"):
        load(llama, NF4Config())
    with pytest.raises(UserError, match=r"^model.layers.\d.[a-z_.]+.weight: expected finite"):
        quantize_model(load(llama), NF4Config())


def test_float_weight_of_another_shape(llama):
    resave(llama, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}))
    with pytest.raises(UserError, match=r"mlp.up_proj.weight: expected shape \(80, 48\), got \(3, 3\)"):
        load(llama, NF4Config())


def test_missing_float_weight(llama):
    resave(llama, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"mlp.up_proj.weight: expected a weight in the checkpoint, got none"):
        load(llama, NF4Config())


@pytest.fixture
def saved(llama, tmp_path):
    load(llama, NF4Config()).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def drop(tensors, prefix):
    for key in [key for key in tensors if key.startswith(prefix)]:
        del tensors[key]


def test_float_weight_where_codes_should_be(saved):
    def spoil(tensors):
        drop(tensors, "model.layers.0.mlp.up_proj.weight")
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(80, 48)

    resave(saved, spoil)
    with pytest.raises(UserError, match=r"expected packed 4-bit codes with their scales, got a plain torch.float32"):
        load(saved)


def test_codes_where_a_float_weight_should_be(saved):
    fields = json.loads((saved / "config.json").read_text())
    fields["quantization_config"]["modules_to_not_convert"] = ["up_proj"]
    (saved / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"up_proj.weight \(and 1 more\): expected a float weight, got packed 4-bit"):
        load(saved)


def test_missing_codes_scales_or_everything(saved):
    whole = stored(saved)
    name = "model.layers.0.mlp.up_proj.weight"
    for prefix, message in (
        (name, "expected a weight in the checkpoint, got none"),
        (f"{name}.absmax", "got"),
        (f"{name}.quant_state", "got"),
    ):
        tensors = dict(whole)
        drop(tensors, prefix)
        save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"^{name}: .*{message}"):
            load(saved)
    tensors = {key: tensor for key, tensor in whole.items() if key != name}
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"^{name}: expected a weight in the checkpoint"):
        load(saved)


def test_codes_of_another_shape(saved):
    def spoil(tensors):
        for key in [key for key in tensors if key.startswith("model.layers.0.mlp.up_proj.weight")]:
            tensors[key] = tensors[key.replace("up_proj", "down_proj")].clone()

    resave(saved, spoil)
    with pytest.raises(UserError, match=r"up_proj.weight: expected shape \(80, 48\), got \(48, 80\)"):
        load(saved)


def test_sliced_matmuls_are_refused(tmp_path):
    folder = save_tiny("bloom", tmp_path / "bloom", pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(UserError, match="slow_but_exact: expected False for a model with 4-bit layers"):
        load(folder, NF4Config())
    assert layers_of(load(folder, NF4Config(), slow_but_exact=False))


def test_architecture_without_linear_layers(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"got none in GPT2LMHeadModel"):
        load(tmp_path / "gpt2", NF4Config())


def test_offloading_to_the_disk_is_refused(llama):
    with pytest.raises(UserError, match=r"device_map: expected every module on a GPU or the CPU, got .* cpu, disk"):
        load(llama, NF4Config(), device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.filterwarnings("ignore")
def test_tensor_parallel_plans_are_refused(llama, monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(UserError, match=r"distributed_config: expected none .*codes cannot be sliced alike"):
            load(llama, NF4Config(), tp_plan="auto")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_layers_in_host_memory_are_brought_in_when_they_are_needed(checkpoint):
    """accelerate's hooks, here with the CPU as the place where everything is computed."""
    model = load(checkpoint, NF4Config())
    expected = model(tokens()).logits
    cpu_offload(model, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    for _ in range(2):
        assert torch.equal(model(tokens()).logits, expected)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.gpu
def test_a_device_map_with_layers_in_host_memory(llama):
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    spread = load(llama, NF4Config(), dtype=torch.float16, device_map=dict.fromkeys(names, 0) | {names[2]: "cpu"})
    expected = load(llama, NF4Config(), dtype=torch.float16)(tokens().cuda()).logits
    for _ in range(2):
        torch.testing.assert_close(spread(tokens().cuda()).logits, expected)
    # The CPU quantizes these; a code at a threshold may be its neighbour on the GPU.
    assert spread.model.layers[1].self_attn.q_proj.weight.is_meta


def test_dtype_other_than_the_three(llama):
    with pytest.raises(UserError, match=r"dtype: expected one of torch.float32, .*, torch.bfloat16, got torch.float64"):
        load(llama, NF4Config(), dtype=torch.float64)


# --- beside bitsandbytes, and the page about it

BITSANDBYTES = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


def test_the_same_files_serve_bitsandbytes(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    saved = tmp_path / "saved"
    # Whole blocks a row: bitsandbytes 0.50's CPU path decodes other weights wrongly.
    folder = save_tiny("llama", tmp_path / "float", hidden_size=64, intermediate_size=128)
    load(folder, NF4Config()).save_pretrained(saved)
    ours = {name: layer.dequantize() for name, layer in layers_of(load(saved)).items()}
    fields = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(fields | {"quantization_config": BITSANDBYTES}))
    theirs = {name: m for name, m in load(saved).named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert theirs.keys() == ours.keys()
    for name, layer in theirs.items():
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(weight, ours[name])


def test_the_page_runs(tmp_path, monkeypatch):
    """Every Python block of docs/transformers.md, in order, with a tiny Bloom in the place of Bloom-7B1."""
    page = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text(encoding="utf-8")
    save_tiny("bloom", tmp_path / "bloom")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block.replace('"bigscience/bloom-7b1"', '"./bloom"'), {})
    assert not layers_of(load(tmp_path / "merged"))
