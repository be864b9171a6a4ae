"""load_pretrained_4bit and prepare_model_for_training, and their messages."""

from __future__ import annotations

import json

import gguf
import numpy
import pytest
import torch
from models import LINEARS, VOCABULARY, save_tiny, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from states import assert_same_state
from transformers import AutoModelForCausalLM

from qkernels.errors import UserError
from qlora import loading
from qlora.integrations.transformers import NF4Config, quantize_model
from qlora.linear4bit import Linear4bit
from qlora.loading import load_pretrained_4bit, prepare_model_for_training
from qlora.precision import PrecisionPolicy


@pytest.fixture
def saved(llama, tmp_path):
    load_pretrained_4bit(llama, blocksize=32).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


# --- loading


def test_loads_quantizes_and_reloads(checkpoint, name, tmp_path):
    model = load_pretrained_4bit(checkpoint)
    assert len(layers_of(model)) == 2 * LINEARS[name]
    assert not model.training
    model.save_pretrained(tmp_path / "saved")
    again = load_pretrained_4bit(tmp_path / "saved")
    assert_same_state(model.state_dict(), again.state_dict())
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)


def test_arguments_reach_the_layers(llama):
    model = load_pretrained_4bit(
        str(llama),
        quant_type="fp4",
        compress_statistics=False,
        blocksize=128,
        quant_storage="float16",
        dtype="float16",
        modules_to_not_convert=["mlp"],
    )
    weights = [layer.weight for layer in layers_of(model)]
    assert len(weights) == 8
    assert {(w.quant_type, w.compress_statistics, w.blocksize, w.dtype) for w in weights} == {
        ("fp4", False, 128, torch.float16)
    }
    assert model.dtype == torch.float16


def test_dtype_is_that_of_the_precision_policy_unless_given(llama, monkeypatch):
    assert load_pretrained_4bit(llama).dtype == torch.float32
    monkeypatch.setattr(loading, "choose_precision", lambda device: PrecisionPolicy(torch.bfloat16, "", False, True))
    assert load_pretrained_4bit(llama).dtype == torch.bfloat16
    assert load_pretrained_4bit(llama, dtype=torch.float16).dtype == torch.float16


def test_arguments_of_transformers_pass_through(llama):
    model = load_pretrained_4bit(llama, attn_implementation="eager", device_map="cpu")
    assert model.config._attn_implementation == "eager"


def test_device_and_safe_unpickling_are_asked_for(llama, monkeypatch):
    """On this machine they are transformers' own defaults, on others or in other versions not."""
    asked = {}

    def from_pretrained(name, **arguments):
        asked.update(arguments)
        return None, {"missing_keys": set()}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_pretrained_4bit(llama, device="cpu")
    assert asked["device_map"] == {"": torch.device("cpu")}
    assert asked["weights_only"] is True


def test_pickled_checkpoint(llama, tmp_path):
    folder = pickled(llama, tmp_path / "bin", load_file(llama / "model.safetensors"))
    assert_same_state(load_pretrained_4bit(folder).state_dict(), load_pretrained_4bit(llama).state_dict())


def test_home_folder(llama, monkeypatch):
    monkeypatch.setenv("HOME", str(llama.parent))
    assert layers_of(load_pretrained_4bit("~/llama"))


def write_gguf(path, model):
    """A float32 GGUF file of a tiny Llama model, in GGUF's names."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(VOCABULARY)
    writer.add_token_list([f"w{i}" for i in range(VOCABULARY)])
    writer.add_tokenizer_model("gpt2")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        array = tensor.numpy().astype(numpy.float32)
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in key:  # GGUF keeps the two halves of a rotary pair side by side
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), numpy.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_unpacked_and_quantized(tmp_path):
    plain = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", plain)
    model = load_pretrained_4bit(tmp_path, gguf_file="tiny.gguf", blocksize=32)
    wanted = quantize_model(plain, NF4Config(blocksize=32))
    assert len(layers_of(model)) == 14
    torch.testing.assert_close(model(tokens()).logits, wanted(tokens()).logits, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    assert_same_state(load_pretrained_4bit(tmp_path / "saved").state_dict(), model.state_dict())


def test_gguf_without_a_weight(tmp_path):
    plain = tiny_model("llama")
    del plain.model.norm
    write_gguf(tmp_path / "tiny.gguf", plain)
    with pytest.raises(UserError, match=r"expected every weight of LlamaForCausalLM, got .* without model.norm.weight"):
        load_pretrained_4bit(tmp_path, gguf_file="tiny.gguf")


@pytest.mark.gpu
def test_on_the_gpu(llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    for model in (load_pretrained_4bit(llama), load_pretrained_4bit(tmp_path, gguf_file="tiny.gguf")):
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
        assert model(tokens().cuda()).logits.isfinite().all()
    assert next(load_pretrained_4bit(llama, device="cpu").parameters()).device.type == "cpu"


# --- a checkpoint that is 4-bit already


def test_stored_format_wins_over_defaults_and_disagreement_is_an_error(saved):
    assert {layer.weight.blocksize for layer in layers_of(load_pretrained_4bit(saved))} == {32}
    load_pretrained_4bit(saved, blocksize=32)
    with pytest.raises(UserError, match=r"blocksize: expected 32, as .*saved' was saved with, got 128"):
        load_pretrained_4bit(saved, blocksize=128)


@pytest.mark.parametrize("field", [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "gptq"}])
def test_checkpoint_of_another_method(saved, field):
    edit_config(saved, quantization_config=field)
    with pytest.raises(UserError, match=f"saved', which is quantized by '{field['quant_method']}'"):
        load_pretrained_4bit(saved)


# --- messages


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(folder, *prefixes):
    path = folder / "model.safetensors"
    kept = {key: tensor for key, tensor in load_file(path).items() if not key.startswith(prefixes)}
    save_file(kept, path, metadata={"format": "pt"})


def pickled(source, folder, contents):
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    torch.save(contents, folder / "pytorch_model.bin")
    return folder


class Trap:
    """Pickled, it would write a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickle_with_code_in_it_is_not_run(llama, tmp_path):
    folder = pickled(llama, tmp_path / "bin", {"lm_head.weight": Trap(tmp_path / "sprung")})
    with pytest.raises(UserError, match=r"bin': torch.load\(weights_only=True\) refuses it. .* which is not run"):
        load_pretrained_4bit(folder)
    assert not (tmp_path / "sprung").exists()


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 99\n"
)


SPOILT = {
    "pointer": lambda data: LFS_POINTER,
    "half": lambda data: data[: len(data) // 2],
    "short": lambda data: b"junk",
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_damaged_weights(llama, tmp_path, kind, spoil):
    folder = llama
    if kind == "bin":
        folder = pickled(llama, tmp_path / "bin", load_file(llama / "model.safetensors"))
    file = folder / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=r"name_or_path: expected a checkpoint that can be read, got '.*': \S.*damaged"):
        load_pretrained_4bit(folder)


def test_missing_folder_and_file_instead_of_folder(llama, tmp_path):
    with pytest.raises(UserError, match=r"got '.*/nowhere', which is no folder here. Check the path"):
        load_pretrained_4bit(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"got './nowhere', which is no folder here"):
        load_pretrained_4bit("./nowhere")
    with pytest.raises(UserError, match=r"config.json', which is a file"):
        load_pretrained_4bit(llama / "config.json")


def test_folder_without_a_model(llama, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty', which has no config.json. Give the folder"):
        load_pretrained_4bit(tmp_path / "empty")
    with pytest.raises(UserError, match=r"which has no tiny.gguf"):
        load_pretrained_4bit(tmp_path / "empty", gguf_file="tiny.gguf")
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"no config.json but a LoRA adapter. Load its base model"):
        load_pretrained_4bit(tmp_path / "adapter")
    (llama / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"llama': Error no file named model.safetensors.* copy the folder again, whole"
    ):
        load_pretrained_4bit(llama)


def test_folder_without_a_part_of_the_weights(llama):
    (llama / "model.safetensors").rename(llama / "model-00001-of-00002.safetensors")
    stored = dict.fromkeys(load_file(llama / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors")
    index = llama / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": stored | {"x": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(UserError, match=r"No such file .*model-00002-of-00002.safetensors. A file is missing"):
        load_pretrained_4bit(llama)
    index.write_text("{")
    with pytest.raises(UserError, match=r"a JSON file in it is not valid: Expecting .* damaged"):
        load_pretrained_4bit(llama)


def test_name_that_is_no_name():
    with pytest.raises(UserError, match=r"name_or_path: expected a folder, or the id of a model .*, got None"):
        load_pretrained_4bit(None)
    with pytest.raises(UserError, match=r"got 'nobody nothing': Repo id must use .* `hf auth login`"):
        load_pretrained_4bit("nobody nothing")


def test_hub_out_of_reach():
    """The tests run offline; a hub that cannot be reached gives the same message after its retries."""
    with pytest.raises(UserError, match=r"got 'nobody/nothing': .* The hub cannot be reached .* go online") as caught:
        load_pretrained_4bit("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_unusable_config(llama):
    for field, message in (
        ({"model_type": "nonsense"}, "model type `nonsense`"),
        ({"model_type": "t5"}, "Unrecognized configuration class .*T5Config"),
        ({"hidden_size": "a"}, "'hidden_size' expected int, got str"),
    ):
        original = (llama / "config.json").read_text()
        edit_config(llama, **field)
        with pytest.raises(UserError, match=rf"^config.json of '.*llama': expected .* causal .*{message}") as caught:
            load_pretrained_4bit(llama)
        assert "\n" not in str(caught.value)
        assert "hf auth" not in str(caught.value)
        (llama / "config.json").write_text(original)
    (llama / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^config.json of .* Should have a `model_type` key"):
        load_pretrained_4bit(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json' is not a valid JSON file. A file is missing, damaged"):
        load_pretrained_4bit(llama)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_missing_float_weight(llama, saved, key):
    for folder in (llama, saved):
        without(folder, key)
        with pytest.raises(UserError, match=rf"expected every weight of LlamaForCausalLM, got .*' without {key}\. "):
            load_pretrained_4bit(folder)


def test_many_missing_weights_are_counted(llama):
    norms = [f"model.layers.{i}.{name}_layernorm" for i in (0, 1) for name in ("input", "post_attention")]
    without(llama, "model.norm", *norms)
    with pytest.raises(UserError, match=r"layernorm.weight, model.layers.1.input_layernorm.weight and 2 more\. The"):
        load_pretrained_4bit(llama)


def test_only_one_of_two_tied_weights_is_stored(tmp_path):
    folder = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_pretrained_4bit(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    without(folder, "model.embed_tokens.weight")
    with pytest.raises(UserError, match=r"without lm_head\.weight, model\.embed_tokens\.weight\. "):
        load_pretrained_4bit(folder)


def test_weights_of_another_model(llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"expected weights of the sizes in config|norm.weight: expected shape \(48,\)"):
        load_pretrained_4bit(llama)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_in_4bit": True}, "load_in_4bit: expected an argument of load_pretrained_4bit.*leave it out"),
        ({"quantization_config": NF4Config()}, "quantization_config: .*Pass its fields here"),
        ({"torch_dtype": torch.float16}, "torch_dtype: .*The argument is called dtype"),
        ({"output_loading_info": True}, "output_loading_info: .*leave it out"),
        ({"weights_only": False}, r"weights_only: .*without running the code"),
        (
            {"attn_implementation": "foo"},
            "attn_implementation: expected .*, got 'foo': Specified .*\"foo\".* leave it out",
        ),
        ({"device_map": "foo"}, "device_map: expected .*, got 'foo': When passing device_map as a string"),
        ({"gguf_file": "config.json"}, "gguf_file: expected .*, got 'config.json': .* not a GGUF file"),
        ({"variant": "foo"}, "no file named model.foo.safetensors.* or leave variant out"),
        ({"nonsense": 3}, r"kwargs: expected arguments of AutoModel.*'nonsense'"),
        ({"device": "cpu", "device_map": "auto"}, "device_map: expected device_map or device, got both"),
        ({"gguf_file": "a.gguf", "device_map": "auto"}, "device_map: expected device_map or gguf_file, got both"),
        ({"dtype": "int8"}, "dtype: expected one of torch.float32, .*, torch.bfloat16, got 'int8'"),
        ({"device": "tpu"}, "device: expected 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        ({"blocksize": 48}, "blocksize: expected one of 32, .*, got 48"),
        ({"modules_to_not_convert": ["nonsense"]}, "names of modules of the model, got 'nonsense'"),
    ],
)
def test_wrong_arguments(llama, arguments, message):
    with pytest.raises(UserError, match=message):
        load_pretrained_4bit(llama, **arguments)


def test_errors_that_are_not_the_users_pass_through(llama, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_pretrained_4bit(llama)


# --- ready to train


def test_prepared_model_is_frozen_uncast_and_recomputes(checkpoint):
    model = load_pretrained_4bit(checkpoint, dtype=torch.float16)
    before = {key: (value.dtype, value.clone()) for key, value in model.state_dict().items()}
    assert prepare_model_for_training(model) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.is_gradient_checkpointing
    for key, value in model.state_dict().items():
        assert (value.dtype, True) == (before[key][0], torch.equal(value, before[key][1]))
    hidden = model.get_input_embeddings()(tokens())
    assert hidden.requires_grad


def test_what_is_no_base_model_is_not_prepared(checkpoint):
    with pytest.raises(UserError, match="model: expected a model of transformers, got a Linear"):
        prepare_model_for_training(torch.nn.Linear(2, 2))
    tuned = get_peft_model(load_pretrained_4bit(checkpoint), LoraConfig(target_modules="all-linear"))
    with pytest.raises(UserError, match="model: expected a base model without adapters"):
        prepare_model_for_training(tuned)


def test_gradients_with_and_without_recomputation_are_the_same(checkpoint, name):
    gradients = []
    for recompute in (True, False):
        torch.manual_seed(0)
        model = prepare_model_for_training(load_pretrained_4bit(checkpoint), gradient_checkpointing=recompute)
        assert model.is_gradient_checkpointing == recompute
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2)).train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key])


def test_model_with_adapters_is_not_frozen(llama):
    model = get_peft_model(load_pretrained_4bit(llama), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="expected a base model without adapters"):
        prepare_model_for_training(model)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_architecture_that_cannot_recompute(llama, monkeypatch):
    model = load_pretrained_4bit(llama)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="gradient_checkpointing: expected False for this architecture"):
        prepare_model_for_training(model)
