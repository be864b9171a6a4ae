"""peft around Linear4bit: train, save, reload, merge, on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from datasets import Dataset
from models import TARGETS, VOCABULARY, save_tiny, tiny_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.model import LoraModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from qkernels.errors import UserError
from qlora.dequantize import float_layer
from qlora.integrations.peft import LoraLinear4bit, check_adapter_matches, read_adapter_config, register
from qlora.integrations.transformers import NF4Config, dequantize_model
from qlora.linear4bit import Linear4bit
from qlora.loading import prepare_model_for_training


def load(folder, dtype=torch.float32, **config):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(**config), dtype=dtype)


def lora_config(name="llama", **changes):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": TARGETS[name], "r": 4, "lora_alpha": 8, **changes})


def adapters_of(model):
    return [module for module in model.modules() if isinstance(module, LoraLinear4bit)]


def stir(model, std=0.05):
    """Make an adapter's effect visible; a fresh one has none."""
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(len(key)))
    return model


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def train_one_step(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    return loss.item()


# --- wrapping and training


def test_every_target_is_wrapped_and_a_fresh_adapter_changes_nothing(checkpoint, name):
    base = load(checkpoint)
    before = logits(base)
    model = get_peft_model(base, lora_config(name))
    assert len(adapters_of(model)) == 2 * len(TARGETS[name])
    assert torch.equal(logits(model), before)


def test_trainable_parameters_are_counted_as_if_nothing_were_packed(checkpoint, name):
    packed = get_peft_model(load(checkpoint), lora_config(name))
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), lora_config(name))
    assert packed.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()


def test_training_equals_that_on_the_dequantized_model(checkpoint, name):
    """QLoRA is LoRA over the dequantized weight: same losses, same adapter."""
    packed = get_peft_model(load(checkpoint), lora_config(name))
    plain = get_peft_model(dequantize_model(load(checkpoint)), lora_config(name))
    fresh = {key: value for key, value in packed.state_dict().items() if "lora_" in key}
    plain.load_state_dict(fresh, strict=False)
    for _ in range(3):
        assert train_one_step(packed) == pytest.approx(train_one_step(plain), abs=1e-5)
    trained = dict(plain.named_parameters())
    for key, parameter in packed.named_parameters():
        if "lora_" in key:
            torch.testing.assert_close(parameter, trained[key], rtol=1e-3, atol=1e-4)


def test_only_the_adapter_learns(llama):
    model = get_peft_model(prepare_model_for_training(load(llama)), lora_config())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_one_step(model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("lora_" in key for key in changed)


def test_adapters_of_a_half_precision_base_are_float32_and_train_with_loss_scaling(llama):
    """What a T4 does; TRL's cast of the adapters to bfloat16, which it makes for bitsandbytes, would break it."""
    model = get_peft_model(prepare_model_for_training(load(llama, torch.float16)), lora_config())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.AdamW(trainable, lr=0.05)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.float16):
            loss = model(tokens(), labels=tokens()).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def word_tokenizer():
    vocabulary = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"</s>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def sft(model, folder, **changes):
    arguments = SFTConfig(
        output_dir=str(folder),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "max_length": 16,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "bf16": False,
            **changes,
        },
    )
    data = Dataset.from_list([{"text": " ".join(f"w{(i * k) % 90}" for k in range(12))} for i in range(4)])
    trainer = SFTTrainer(
        model, arguments, train_dataset=data, processing_class=word_tokenizer(), peft_config=lora_config()
    )
    trainer.train()
    return trainer.model


def test_sft_trainer(llama, tmp_path):
    model = sft(prepare_model_for_training(load(llama)), tmp_path / "run")
    assert len(adapters_of(model)) == 4
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert all(module.lora_B["default"].weight.abs().sum() > 0 for module in adapters_of(model))


@pytest.mark.gpu
def test_sft_trainer_in_half_precision(llama, tmp_path):
    model = prepare_model_for_training(load(llama, torch.float16))
    model = sft(model, tmp_path / "run", use_cpu=False, fp16=True)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert all(module.lora_B["default"].weight.abs().sum() > 0 for module in adapters_of(model))


# --- saving


def test_adapter_comes_back(checkpoint, name, tmp_path):
    model = stir(get_peft_model(load(checkpoint), lora_config(name)))
    train_one_step(model)
    model.save_pretrained(tmp_path / "adapter")
    assert all("lora_" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter")
    assert len(adapters_of(again)) == len(adapters_of(model))
    assert torch.equal(logits(again), logits(model.eval()))


def test_auto_peft_model_in_a_new_process(llama, tmp_path):
    base = load(llama)
    base.save_pretrained(tmp_path / "base")
    model = stir(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora_config()))
    model.save_pretrained(tmp_path / "adapter")
    torch.save((tokens(), logits(model)), tmp_path / "wanted.pt")
    script = textwrap.dedent("""
        import sys
        sys.modules["bitsandbytes"] = None
        import torch
        from peft import AutoPeftModelForCausalLM
        import qlora.integrations.peft as ours
        model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
        ids, wanted = torch.load(sys.argv[2])
        assert sum(isinstance(module, ours.LoraLinear4bit) for module in model.modules()) == 4
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-6)
        model.merge_and_unload()
    """)
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "adapter"), str(tmp_path / "wanted.pt")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


# --- merging


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_merge_and_unmerge(checkpoint, name, changes):
    model = stir(get_peft_model(load(checkpoint), lora_config(name, **changes)))
    before, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    assert all(isinstance(module.base_layer, torch.nn.Linear) for module in adapters_of(model))
    assert not any(isinstance(module.base_layer, Linear4bit) for module in adapters_of(model))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_merged_weight_is_rounded_once(llama):
    model = stir(get_peft_model(load(llama, torch.float16), lora_config()), std=0.3)
    module = adapters_of(model)[0]
    exact = module.base_layer.dequantize(torch.float32) + module.get_delta_weight("default")
    module.merge()
    assert torch.equal(module.base_layer.weight, exact.half())


def test_merge_and_unload_then_dequantize_is_an_ordinary_model(checkpoint, name, tmp_path):
    model = stir(get_peft_model(load(checkpoint), lora_config(name)))
    before = logits(model)
    merged = dequantize_model(model.merge_and_unload())
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(isinstance(module, Linear4bit) for module in again.modules())
    assert torch.equal(logits(again), logits(merged))


def test_merged_model_can_be_saved_partly_packed(llama, tmp_path):
    merged = stir(get_peft_model(load(llama), lora_config())).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert sum(isinstance(module, Linear4bit) for module in again.modules()) == 10
    assert torch.equal(logits(again), logits(merged))


def test_dequantize_with_the_adapter_still_on(llama):
    model = stir(get_peft_model(load(llama), lora_config()))
    before = logits(model)
    dequantize_model(model)
    for change in (lambda: None, model.merge_adapter, model.unmerge_adapter):
        change()
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)


def test_unload_gives_the_packed_base_back(llama):
    base = load(llama)
    before = logits(base)
    unloaded = stir(get_peft_model(base, lora_config())).unload()
    assert sum(isinstance(module, Linear4bit) for module in unloaded.modules()) == 14
    assert torch.equal(logits(unloaded), before)


@pytest.mark.parametrize("use_dora", [False, True])
def test_two_adapters_merged_together(llama, use_dora):
    model = get_peft_model(load(llama), lora_config(use_dora=use_dora))
    model.add_adapter("second", lora_config(use_dora=use_dora, r=2))
    stir(model)
    before = logits(model)
    module = adapters_of(model)[0]
    deltas = sum(module.get_delta_weight(key) for key in ("default", "second"))
    base = module.base_layer.dequantize()
    model.merge_adapter(["default", "second"])
    assert module.merged_adapters == ["default", "second"]
    if not use_dora:
        torch.testing.assert_close(module.base_layer.weight, base + deltas, rtol=1e-5, atol=1e-6)
    else:
        assert not torch.allclose(module.base_layer.weight, base, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_lora_bias(checkpoint, name):
    config = lora_config(name, lora_bias=True)
    model = stir(get_peft_model(load(checkpoint), config))
    if name == "llama":  # no biases in its layers
        with pytest.raises(UserError, match="lora_bias: expected False for a layer without a bias"):
            model.merge_adapter()
        assert all(isinstance(module.base_layer, Linear4bit) for module in adapters_of(model))
        return
    for module in adapters_of(model):
        torch.nn.init.normal_(module.lora_B["default"].bias)
    before = logits(model)
    packed_bias = adapters_of(model)[0].base_layer.bias.clone()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(adapters_of(model)[0].base_layer.bias, packed_bias)


def test_safe_merge_refuses_nan_and_merges_nothing(llama):
    model = stir(get_peft_model(load(llama), lora_config()))
    module = adapters_of(model)[0]
    module.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"adapter default: expected finite merged weights, got NaN or Inf\. It div"):
        module.merge(safe_merge=True)
    assert isinstance(module.base_layer, Linear4bit)
    assert not module.merged


def test_merged_layer_is_in_the_state_dict_once(llama):
    model = get_peft_model(load(llama), lora_config())
    model.merge_adapter()
    names = [key for key in model.state_dict() if "layers.0.self_attn.q_proj.base_layer" in key]
    assert names == ["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"]


# --- what is refused


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_initializations_that_need_the_float_weight(llama, init):
    with pytest.raises(UserError, match=f"init_lora_weights: expected one of True, .* got '{init}'"):
        get_peft_model(load(llama), lora_config(init_lora_weights=init))


def test_variants_that_need_the_float_weight(llama):
    config = lora_config()
    config.kasa_config = {"anything": 1}
    with pytest.raises(UserError, match="kasa_config: expected no such setting on a 4-bit base"):
        get_peft_model(load(llama), config)


def test_registering_again_changes_nothing(llama):
    registered = LoraModel._create_new_module
    register()
    assert LoraModel._create_new_module is registered
    model = get_peft_model(load(llama), lora_config())
    assert [type(module.base_layer) for module in adapters_of(model)] == [Linear4bit] * 4


def test_float_layers_are_left_to_peft(llama):
    plain = get_peft_model(tiny_model("llama"), lora_config())
    assert not adapters_of(plain)
    assert any("lora_A" in key for key, _ in plain.named_parameters())


def test_float_layer_keeps_the_mode(llama):
    layer = load(llama).model.layers[0].mlp.up_proj.train()
    assert float_layer(layer).training
    assert not float_layer(layer.eval()).training


# --- adapters of another base


@pytest.fixture
def adapter(llama, tmp_path):
    model = get_peft_model(load(llama), lora_config())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_matching_adapter(adapter, llama, recwarn):
    check_adapter_matches(load(llama), adapter)
    assert not [warning for warning in recwarn if "trained on" in str(warning.message)]


def test_adapter_of_another_architecture(adapter, tmp_path):
    bloom = load(save_tiny("bloom", tmp_path / "bloom"))
    with pytest.raises(UserError, match=r"has no such module\), got one of .*llama"):
        check_adapter_matches(bloom, adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, r"v_proj has 48 outputs\), got one of .* \(24 outputs\)"),
        ({"hidden_size": 64}, r"q_proj has 64 inputs\), got one of .* \(48 inputs\)"),
    ],
)
def test_adapter_of_other_sizes(adapter, changes, message):
    with pytest.raises(UserError, match=message):
        check_adapter_matches(tiny_model("llama", **changes), adapter)


def test_adapter_of_another_model_on_the_hub(adapter, llama):
    model = load(llama)
    model.config._name_or_path = model.name_or_path = "bigscience/bloomz-7b1"
    rewrite(adapter, base_model_name_or_path="bigscience/bloom-7b1")
    with pytest.raises(
        UserError, match="expected an adapter of bigscience/bloomz-7b1, got one of bigscience/bloom-7b1"
    ):
        check_adapter_matches(model, adapter)
    rewrite(adapter, base_model_name_or_path="bigscience/bloomz-7b1")
    check_adapter_matches(model, adapter)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a readable adapter"),
        (b"\xff\xfe", "expected a readable adapter"),
        ("[]", r"expected a JSON object, got list"),
        ('{"peft_type": "LORA"}', "expected the name of the base .* base_model_name_or_path, got None"),
        ('{"peft_type": "LORA", "base_model_name_or_path": null}', "the name of the base .*, got None"),
        ('{"peft_type": "LORA", "base_model_name_or_path": ""}', "the name of the base .*, got ''"),
        ('{"peft_type": "LOHA", "base_model_name_or_path": "a/b"}', "expected a LoRA adapter, got peft_type 'LOHA'"),
    ],
)
def test_adapter_config_that_says_too_little(tmp_path, text, message):
    (tmp_path / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"adapter_config.json: .*{message}"):
        read_adapter_config(tmp_path)


def test_adapter_config_is_read(adapter, llama):
    assert read_adapter_config(str(adapter))["base_model_name_or_path"] == str(llama)


def test_rank_of_the_weights_and_of_the_config(llama, adapter, tmp_path):
    get_peft_model(load(llama), lora_config(rank_pattern={"v_proj": 2})).save_pretrained(tmp_path / "ranks")
    check_adapter_matches(load(llama), tmp_path / "ranks")
    rewrite(tmp_path / "ranks", rank_pattern={})
    with pytest.raises(UserError, match=r"expected rank 4 in .*v_proj, .* got rank 2 in its lora_A"):
        check_adapter_matches(load(llama), tmp_path / "ranks")
    weights = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in weights if "lora_B" in key)
    save_file(weights | {key: weights[key][:, :1].contiguous()}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"expected rank 4 in .*q_proj, .* got rank 1 in its lora_B"):
        check_adapter_matches(load(llama), adapter)


def test_moved_base_is_a_warning_only(adapter, llama):
    rewrite(adapter, base_model_name_or_path="/elsewhere/other-model")
    with pytest.warns(UserWarning, match="was trained on /elsewhere/other-model"):
        check_adapter_matches(load(llama), adapter)


def test_no_adapter_and_damaged_ones(adapter, llama, tmp_path):
    model = load(llama)
    with pytest.raises(UserError, match=r"expected a folder with an adapter .* got no such folder"):
        check_adapter_matches(model, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"expected a folder with an adapter .* got no such file"):
        check_adapter_matches(model, llama)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="expected a readable adapter"):
        check_adapter_matches(model, adapter)
    weights.unlink()
    with pytest.raises(UserError, match=r"expected adapter_model.safetensors beside adapter_config.json, got no such"):
        check_adapter_matches(model, adapter)
    rewrite(adapter, peft_type="PROMPT_TUNING")
    with pytest.raises(UserError, match="expected a LoRA adapter, got peft_type 'PROMPT_TUNING'"):
        check_adapter_matches(model, adapter)


def test_pickled_adapter_is_read_without_running_code(adapter, llama, tmp_path):
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    check_adapter_matches(load(llama), adapter)
    torch.save({"weight": Trap(tmp_path / "sprung")}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="expected a readable adapter"):
        check_adapter_matches(load(llama), adapter)
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Pickled, it would write a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


# --- several adapters, and modules trained whole


def test_several_adapters_are_switched_weighted_and_saved_apart(llama, tmp_path):
    model = get_peft_model(load(llama), lora_config())
    plain = logits(model)
    model.add_adapter("other", lora_config(r=2))
    stir(model)
    found = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        found[name] = logits(model)
        trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable
        assert all(f".{name}." in key for key in trainable)
    assert not torch.equal(found["default"], found["other"])
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.25], "both", combination_type="cat")
    model.set_adapter("both")
    assert not torch.equal(logits(model), found["other"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(llama), tmp_path)  # "default" lies in the folder itself
    again.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(again), found["default"])
    again.set_adapter("other")
    assert torch.equal(logits(again), found["other"])


def test_modules_to_save_are_trained_saved_and_merged(checkpoint, name, tmp_path):
    head = {"llama": "lm_head", "bloom": "ln_f"}[name]
    model = stir(get_peft_model(load(checkpoint), lora_config(name, modules_to_save=[head])))
    train_one_step(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    torch.testing.assert_close(logits(dequantize_model(again.merge_and_unload())), expected, rtol=1e-4, atol=1e-5)
