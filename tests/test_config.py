"""Flags and YAML: defaults, what wins over what, and that everything wrong is said at once."""

from __future__ import annotations

import pytest
import torch
import yaml

from qkernels import UserError
from qlora.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
    check_training,
    precision_of,
)
from qlora.config import Parser, parse, resolved

GROUPS = (ModelArguments, LoraArguments, DataArguments, TrainingArguments)


def read(*words: str):
    return parse(Parser(GROUPS, prog="qlora train"), words, check_training)


def wrong(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*words)
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_the_defaults_are_those_of_the_tutorial():
    model, lora, data, training = read()
    assert model.model_name_or_path == "bigscience/bloom-7b1"
    assert (model.bnb_4bit_quant_type, model.use_bnb_nested_quant) == ("nf4", True)
    assert lora.lora_target_modules == ["query_key_value"]
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (16, 16, 0.05)
    assert (data.dataset_name, data.max_samples) == ("fka/awesome-chatgpt-prompts", 50)
    assert training.dataset_text_field == "prompt"
    assert (training.learning_rate, training.num_train_epochs, training.auto_find_batch_size) == (2e-4, 5, True)


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(file):
    path = file("lora_r: 8\nlearning_rate: 1e-3\nlora_target_modules: [q_proj, v_proj]\nuse_bnb_nested_quant: false\n")
    model, lora, _, training = read("--config", path, "--lora_r", "4")
    assert (lora.lora_r, training.learning_rate, lora.lora_target_modules) == (4, 1e-3, ["q_proj", "v_proj"])
    assert model.use_bnb_nested_quant is False


def test_null_in_the_file_means_none_or_the_default(file):
    _, _, data, training = read("--config", file("max_samples: null\ndataset_config: null\nmax_length: null\n"))
    assert (data.max_samples, data.dataset_config, training.max_length) == (None, None, None)


def test_a_value_in_the_file_may_look_like_a_flag(file):
    data = read("--config", file("sample_prompts: ['- one', '-1']\ndataset_config: --x\ndataset_train_split: ''\n"))[2]
    assert (data.sample_prompts, data.dataset_config, data.dataset_train_split) == (["- one", "-1"], "--x", "")


def test_everything_wrong_is_said_at_once(file):
    path = file("lora_ranks: 3\nlearning_rate: fast\nnum_train_epochs: -1\nlora_dropout: 1.0\n")
    message = wrong("--config", path, "--max_samples", "0", "--bogus", "--eval_samples=-2")
    for part in (
        "unknown setting 'lora_ranks'",
        "invalid float value: 'fast'",
        "num_train_epochs has to be more than 0, not -1.0",
        "lora_dropout has to be at least 0 and less than 1, not 1.0",
        "max_samples has to be more than 0, not 0",
        "unknown setting 'bogus'",
        "eval_samples has to be 0 or more, not -2",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--lora_rr", "3"], "did you mean lora_r"),
        (["--lora_r", "many"], "invalid int value: 'many'"),
        (["--lora_r"], "expected one argument"),
        (["--learning_rate", "nan"], "more than 0, not nan"),
        (["--max_length", "1"], "max_length has to be more than 1, not 1"),
        (["--adam_beta2", "1"], "adam_beta2 has to be at least 0 and less than 1, not 1.0"),
        (["--seed", "4294967296"], "seed has to be at least 0 and less than 2^32"),
        (["--dataloader_num_workers=-1"], "dataloader_num_workers has to be 0 or more, not -1"),
        (["--neftune_noise_alpha=-1"], "neftune_noise_alpha has to be 0 or more, not -1.0"),
        (["stray"], "'stray' belongs to no flag"),
        (["--bnb_4bit_quant_type", "int4"], "invalid choice: 'int4'"),
        (["--optim", "adamwat"], "invalid choice: 'adamwat'"),
        (["--lora_target_modules", "q_proj", "lm_head"], "lm_head cannot have an adapter"),
        (["--output_dir", " "], "output_dir has to name a folder"),
        (["--load_best_model_at_end", "--save_strategy", "epoch"], "load_best_model_at_end"),
        (["--sample_prompts", "a", ""], "sample_prompts holds an empty text"),
        (["--eval_strategy", "epoch"], "eval_strategy epoch needs held-out texts: set eval_samples"),
        (["--save_strategy", "best"], "save_strategy best needs measurements to choose by: set eval_strategy"),
        (["--save_strategy", "best"], "save_strategy best needs metric_for_best_model"),
        (["--report_to", "wandbb"], "report_to: 'wandbb' is none of the trackers installed here (none, all"),
        (["--deepspeed", "x.json"], "deepspeed and fsdp are not supported"),
        (["--push_to_hub"], "push_to_hub is not supported: upload the run's adapter folder by `hf upload`"),
        (["--config"], "--config"),
    ],
)
def test_a_wrong_flag(words, part):
    assert part in wrong(*words)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lora_r: [\n", "YAML"),
        ("- lora_r\n", "a list"),
        ("", "an empty file"),
        ("just words\n", "a str"),
        ("lora_r: {a: 1}\n", "--lora-r: invalid int value"),
        ("lora_ranks: null\n", "unknown setting 'lora_ranks'"),
        ("lora_target_modules: null\n", "lora_target_modules cannot be null"),
        ("dataset_name: null\n", "dataset_name cannot be null"),
        ("lora_r: null\n", "--lora-r: invalid int value"),
        ("learning_rate: [1, 2]\n", "learning_rate takes one value, not a list"),
        ("sample_prompts: [--use_cpu, a]\n", "sample_prompts: '--use_cpu' in the list would be read as a flag"),
        ("sample_prompts: [a, -x]\n", "sample_prompts: '-x' in the list"),
        ("sample_prompts:\n- Act: now\n", 'sample_prompts: {"Act": "now"} is not one text'),
        ("lora_target_modules: [null]\n", "lora_target_modules: none is not one text"),
        ("lora_r: 1\nlora_r: 2\n", "lora_r is there twice"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}\n", "a is there twice"),
        ("? [a]\n: 1\n", "unhashable key"),
        ("lora_target_modules: []\n", "at least one argument"),
    ],
)
def test_a_wrong_file(file, text, part):
    message = wrong("--config", file(text))
    assert part in message
    assert "settings.yaml" in message
    assert "\n" not in message


def test_a_file_that_is_not_there(tmp_path):
    assert "no.yaml" in wrong("--config", str(tmp_path / "no.yaml"))


def test_a_run_that_keeps_its_best_checkpoint():
    words = ["--save_strategy=best", "--eval_strategy=epoch", "--metric_for_best_model=eval_loss", "--eval_samples=2"]
    assert read(*words)[3].save_strategy == "best"


def test_the_resolved_settings_say_the_same_again(file):
    words = ["--lora_r=3", "--warmup_steps=2", "--max_samples=none", "--no_use_bnb_nested_quant", "--seed=7"]
    words += ["--lr_scheduler_type", "cosine_with_restarts"]
    first = read(*words, "--lr_scheduler_kwargs", '{"num_cycles": 2}')
    again = read("--config", file(yaml.safe_dump(resolved(first))))
    assert resolved(again) == resolved(first)
    assert again[:3] == first[:3]
    assert again[3].to_dict() == first[3].to_dict()


def test_secrets_are_not_among_the_resolved_settings():
    settings = resolved(read("--hub_token", "secret"))
    assert "secret" not in str(settings)
    assert "hub_token" not in settings  # nor a placeholder, which a run that reads the file would take for the token


def test_trl_is_told_the_precision_and_not_asked_for_it(monkeypatch):
    training = read("--use_cpu")[3]
    assert (training.fp16, training.bf16) == (False, False)
    assert precision_of(training).dtype == torch.float32


def test_a_precision_that_the_device_lacks_is_refused():
    assert "runs on the CPU" in wrong("--use_cpu", "--bf16", "true")
    assert "runs on the CPU" in wrong("--use_cpu", "--fp16")


@pytest.mark.parametrize(("capability", "flag", "allowed"), [((7, 5), "bf16", False), ((9, 0), "fp16", True)])
def test_a_precision_that_is_asked_for_on_a_gpu(monkeypatch, capability, flag, allowed):
    from qlora import arguments
    from qlora.precision import choose_precision

    monkeypatch.setattr(arguments, "choose_precision", lambda device: choose_precision(capability=capability))
    asked = type("Asked", (), {"use_cpu": False, "fp16": flag == "fp16", "bf16": flag == "bf16"})
    if not allowed:
        with pytest.raises(UserError, match="by emulation"):
            precision_of(asked)
        return
    policy = precision_of(asked)
    assert (policy.dtype, policy.fp16, policy.bf16) == (torch.float16, True, False)
