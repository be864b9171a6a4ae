"""Checkpoints that the real bitsandbytes wrote, in a process where it cannot be imported, and back."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from models import save_tiny, tiny_model, tokens
from safetensors.torch import load_file
from states import assert_same_state
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qkernels.errors import UserError
from qlora import Linear4bit, NF4Config, load_pretrained_4bit
from qlora.integrations.transformers.bitsandbytes_files import BitsAndBytesNF4Config

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the rival, part of the [dev] extra")

# quant_type, double quantization, quant_storage, model, what else is saved with
KINDS = {
    "nf4-nested-uint8": ("nf4", True, torch.uint8, "llama", {}),
    "nf4-plain-bfloat16": ("nf4", False, torch.bfloat16, "bloom", {}),
    "fp4-nested-float16": ("fp4", True, torch.float16, "llama", {}),
    "fp4-plain-float32": ("fp4", False, torch.float32, "bloom", {}),
    "nf4-nested-sharded": ("nf4", True, torch.uint8, "bloom", {"max_shard_size": "20KB"}),
    "nf4-skipping": ("nf4", True, torch.uint8, "llama", {"skip": ["lm_head", "v_proj", "model.layers.1.mlp"]}),
}


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **kwargs})


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, of all its shards."""
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return dict(sorted((key, tensor) for part in parts for key, tensor in part.items()))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints written by bitsandbytes, by kind."""
    root = tmp_path_factory.mktemp("theirs")
    folders = {}
    for kind, (quant_type, nested, storage, name, options) in KINDS.items():
        sizes = {"hidden_size": 64, "intermediate_size": 128} if name == "llama" else {"hidden_size": 64}
        floats = root / f"{kind}-float"
        tiny_model(name, **sizes).to(torch.bfloat16).save_pretrained(floats)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_quant_storage=storage,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=options.get("skip"),
        )
        folders[kind] = root / kind
        shards = {key: value for key, value in options.items() if key == "max_shard_size"}
        load(floats, quantization_config=config).save_pretrained(folders[kind], **shards)
    assert len(list(folders["nf4-nested-sharded"].glob("*.safetensors"))) > 1
    return folders


@pytest.fixture(scope="module")
def ours(theirs) -> dict[str, Path]:
    """The same, loaded and saved again where bitsandbytes cannot be imported."""
    script = textwrap.dedent("""
        import json, sys
        sys.modules["bitsandbytes"] = None
        import qlora
        from transformers import AutoModelForCausalLM
        for folder in sys.argv[1:]:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
            assert {type(m).__name__ for m in model.modules() if "4bit" in type(m).__name__} == {"Linear4bit"}
            assert all(m.compute_dtype.itemsize == 2 for m in model.modules() if isinstance(m, qlora.Linear4bit))
            shards = {"max_shard_size": "20KB"} if folder.endswith("sharded") else {}
            model.save_pretrained(folder + "-again", **shards)
    """)
    run = subprocess.run([sys.executable, "-c", script, *map(str, theirs.values())], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {kind: folder.with_name(f"{kind}-again") for kind, folder in theirs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_again_without_bitsandbytes_every_bit_is_there(theirs, ours, kind):
    assert_same_state(stored(ours[kind]), stored(theirs[kind]))
    assert config_of(ours[kind])["quantization_config"] == config_of(theirs[kind])["quantization_config"]


@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_loads_what_was_saved_again(theirs, ours, kind):
    before, after = load(theirs[kind]), load(ours[kind])
    assert {type(module) for module in after.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert_same_state(after.state_dict(), before.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_nf4config_takes_the_checkpoint_where_bitsandbytes_is_installed(theirs, kind, tmp_path):
    model = load(theirs[kind], quantization_config=NF4Config())
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers
    assert {layer.compute_dtype for layer in layers} == {None}  # NF4Config's own; the rest is the checkpoint's
    model.save_pretrained(tmp_path / "saved")
    assert_same_state(stored(tmp_path / "saved"), stored(theirs[kind]))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_load_pretrained_4bit_takes_it_too(theirs):
    folder = theirs["fp4-nested-float16"]
    model = load_pretrained_4bit(folder, dtype="bfloat16")
    assert {m.weight.quant_type for m in model.modules() if isinstance(m, Linear4bit)} == {"fp4"}
    with pytest.raises(UserError, match=r"blocksize: expected 64, as .* was saved with, got 128"):
        load_pretrained_4bit(folder, blocksize=128)


def test_the_logits_are_theirs(theirs):
    folder = theirs["nf4-nested-uint8"]
    expected = load(folder).train()(tokens()).logits  # train(): its CPU path in eval() is another one
    for model in (load(folder, quantization_config=NF4Config()), load_pretrained_4bit(folder, dtype="bfloat16")):
        torch.testing.assert_close(model(tokens()).logits, expected)


def test_another_format_than_the_stored_one_is_refused(theirs):
    with pytest.raises(UserError, match="blocksize: expected 64, as the checkpoint was saved with, got 32"):
        load(theirs["nf4-nested-uint8"], quantization_config=NF4Config(blocksize=32))


def test_eight_bits_are_refused():
    with pytest.raises(UserError, match="expected 4-bit weights of bitsandbytes"):
        BitsAndBytesNF4Config(BitsAndBytesConfig(load_in_8bit=True).to_dict())


def test_bitsandbytesconfig_quantizes_without_bitsandbytes(tmp_path):
    """Unchanged code that quantizes while loading, then trains an adapter and merges a part of it."""
    floats = save_tiny("llama", tmp_path / "float", hidden_size=64, intermediate_size=128)
    script = textwrap.dedent("""
        import sys
        sys.modules["bitsandbytes"] = None
        import qlora, torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype="auto")
        model.save_pretrained(sys.argv[2])
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        ids = torch.arange(8)[None]
        adapted(ids, labels=ids).loss.backward()
        adapted.merge_and_unload().save_pretrained(sys.argv[3])
        AutoModelForCausalLM.from_pretrained(sys.argv[3])
    """)
    packed, merged = tmp_path / "packed", tmp_path / "merged"
    run = subprocess.run(
        [sys.executable, "-c", script, str(floats), str(packed), str(merged)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    expected = load(floats, quantization_config=NF4Config())
    model = load(packed)  # by bitsandbytes
    assert_same_state(dict(sorted(model.state_dict().items())), dict(sorted(expected.state_dict().items())))
    skipped = config_of(merged)["quantization_config"]["llm_int8_skip_modules"]
    assert skipped == ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in load(merged).modules()) == 12


# --- adapters


def adapter_on(model, **settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **settings)
    return get_peft_model(model, config).train()


def steps(model, count=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(count):
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("trained_by", ["us", "bitsandbytes"])
def test_an_adapter_goes_from_one_to_the_other(tmp_path, trained_by, settings):
    from peft import PeftModel

    # float32 throughout, so that only the adapter could make a difference.
    floats = save_tiny("llama", tmp_path / "float", hidden_size=64, intermediate_size=128)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    folder = tmp_path / "base"
    load(floats, quantization_config=config).save_pretrained(folder)
    plain = {"dtype": torch.float32}
    configs = {"us": plain | {"quantization_config": NF4Config()}, "bitsandbytes": plain}
    trained = steps(adapter_on(load(folder, **configs.pop(trained_by)), **settings))
    trained.save_pretrained(tmp_path / "adapter")
    (other,) = configs.values()
    loaded = PeftModel.from_pretrained(load(folder, **other), tmp_path / "adapter").train()  # their eval() repacks
    with torch.no_grad():
        expected, found = trained(tokens()).logits, loaded(tokens()).logits
        untrained = load(folder, **other).train()(tokens()).logits
    torch.testing.assert_close(found, expected)
    assert (expected - untrained).abs().max() > 0.01
