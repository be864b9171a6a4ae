"""`qlora train` from flags to run folder, `--resume`, and what uses the adapter: generate, compare, merge."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from train_runs import prompts, refused, save_model, train_flags
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(train_flags(model, folder)) == 0
    return folder


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines) if "loss" in entry}


def test_the_run_folder_is_complete(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "adapter",
        "checkpoint-4",
        "checkpoint-8",
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "report.md",
    }
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "adapter" / "tokenizer.json").is_file()
    assert not list(run.rglob(".*"))  # what was being written beside its place
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_falls_and_every_step_is_recorded(run):
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert list(losses(run)) == list(range(1, 9))
    held_out = [entry for entry in entries if "eval_loss" in entry]
    assert [entry["step"] for entry in held_out] == [0, 8]
    assert held_out[1]["eval_loss"] < held_out[0]["eval_loss"] - 0.1
    assert all(entry["tokens_per_s"] > 0 and entry["peak_memory_gib"] > 0 for entry in entries if "loss" in entry)


def test_tokens_are_counted_without_padding(run, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = 2 * sum(min(24, len(tokenizer(text)["input_ids"]) + 1) for text in prompts()[:16])
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert max(entry.get("num_tokens", 0) for entry in last) == expected


@pytest.mark.parametrize("init", ["loftq", "qera"])
def test_an_adapter_can_begin_with_the_quantization_error(run, model, tmp_path, capsys, init):
    flags = ["--lora_init", init, "--max_steps", "1", "--learning_rate", "1e-9"]
    assert main([*train_flags(model, tmp_path / init), *flags]) == 0
    error = re.search(
        r"quantization error of the .*: ([\d.]+)%, with the adapter's start ([\d.]+)%", capsys.readouterr().out
    )
    assert float(error[2]) < float(error[1])
    factors = load_file(tmp_path / init / "adapter" / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for key, value in factors.items() if "lora_B" in key)
    assert f"lora_init: {init}" in (tmp_path / init / "config.yaml").read_text(encoding="utf-8")


def test_embeddings_in_4_bits(tmp_path):
    """The whole way: the tied embedding is packed, the loss falls, and `generate` finds the adapter's base again."""
    base = save_model("llama", tmp_path / "model", hidden_size=64, tie_word_embeddings=True)
    flags = [*train_flags(base, tmp_path / "run"), "--quantize_embeddings", "true"]
    assert main(flags) == 0
    found = losses(tmp_path / "run")
    assert found[8] < found[1] - 0.1
    words = ["generate", "--adapter_path", str(tmp_path / "run"), "--quantize_embeddings", "true", "--use_cpu"]
    assert main([*words, "--prompt", "I want", "--max_new_tokens", "3"]) == 0


def test_the_configuration_file_repeats_the_run(run, tmp_path):
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.yaml"), "--output_dir", str(again)]) == 0
    assert losses(again) == losses(run)
    first, second = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run, again))
    assert first | {"output_dir": str(again)} == second


def test_resume_continues_to_the_same_losses(run, model, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoint-8")
    shutil.rmtree(folder / "adapter")
    written = (folder / "checkpoint-4" / "optimizer.pt").stat().st_mtime_ns
    assert main([*train_flags(model, folder), "--resume"]) == 0
    assert (folder / "checkpoint-4" / "optimizer.pt").stat().st_mtime_ns == written  # not begun anew
    assert losses(folder) == losses(run)
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_passes_over_a_checkpoint_that_is_not_whole(run, model, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "checkpoint-8" / "trainer_state.json").unlink()
    assert main([*train_flags(model, folder), "--resume"]) == 0
    assert losses(folder) == losses(run)


def test_the_report_says_what_was_found(run, model):
    text = (run / "report.md").read_text(encoding="utf-8")
    for expected in (str(model), "bundled", "float32, because", "held-out texts", "After:", "transformers", "commit"):
        assert expected in text
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert all(f"### {prompt}" in text for prompt in settings["sample_prompts"])


def test_generate_and_compare_show_base_and_tuned(run, model, capsys):
    flags = ["--prompt", "I want you", "--max_new_tokens", "5", "--repetition_penalty", "1", "--use_cpu"]
    assert main(["generate", "--adapter_path", str(run), *flags]) == 0
    tuned = capsys.readouterr().out.strip().removeprefix("I want you").strip()
    assert main(["generate", "--model_name_or_path", str(model), *flags]) == 0
    base = capsys.readouterr().out.strip().removeprefix("I want you").strip()
    assert tuned != base
    assert main(["compare", "--adapter_path", str(run), *flags]) == 0
    out = capsys.readouterr().out
    assert "base" in out
    rows = [line.split(" | ") for line in out.splitlines() if " | " in line][2:]
    assert " ".join(row[0].strip() for row in rows).split() == base.split()
    assert " ".join(row[1].strip() for row in rows).split() == tuned.split()


def test_prompts_of_different_lengths_do_not_change_each_other(run, capsys):
    flags = ["generate", "--adapter_path", str(run), "--max_new_tokens", "6", "--use_cpu", "--prompt"]
    given = ["I want", "I want you to act as a coach for people who"]
    alone = ""
    for prompt in given:
        assert main([*flags, prompt]) == 0
        alone += capsys.readouterr().out
    assert main([*flags, *given]) == 0
    assert capsys.readouterr().out == alone


def test_sampling_follows_the_seed(run, capsys):
    flags = [
        "generate",
        "--adapter_path",
        str(run),
        "--prompt",
        "I want",
        "--max_new_tokens",
        "8",
        "--temperature",
        "2",
    ]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*flags, "--seed", seed, "--use_cpu"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_merge_writes_an_ordinary_model(run, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter_path", str(run), "--output_dir", str(merged), "--dtype", "float32"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert not hasattr(plain.config, "quantization_config")
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    flags = ["--prompt", "I want you to", "--max_new_tokens", "6", "--use_cpu"]
    assert main(["generate", "--adapter_path", str(run), *flags]) == 0
    expected = capsys.readouterr().out.splitlines()[-2]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    batch = tokenizer("I want you to", return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False, "repetition_penalty": 1.2}
    output = plain.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    assert tokenizer.decode(output[0], skip_special_tokens=True).split() == expected.split()


def test_bloom_trains_with_the_default_target(tmp_path):
    model = save_model("bloom", tmp_path / "model")
    flags = [flag for flag in train_flags(model, tmp_path / "run", "bloom") if flag != "query_key_value"]
    flags.remove("--lora_target_modules")
    assert main([*flags, "--max_steps", "1"]) == 0
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["target_modules"] == ["query_key_value"]
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"], settings["bias"]) == (16, 16, 0.05, "none")


# What wrong input gets.


def test_an_unknown_target_names_likely_ones_and_leaves_nothing(model, tmp_path, capsys):
    message = refused(capsys, *train_flags(model, tmp_path / "run"), "--lora_target_modules", "qproj")
    assert "--lora_target_modules: expected names of linear layers of LlamaForCausalLM, got 'qproj'" in message
    assert "Pass `--lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj` or" in message
    assert "`--lora_target_modules all-linear`" in message
    assert not list(tmp_path.iterdir())


def test_targets_are_checked_without_the_weights(model, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    flags = [flag for flag in train_flags(bare, tmp_path / "run") if flag not in ("q_proj", "v_proj")]
    flags.remove("--lora_target_modules")  # the default is Bloom's
    message = refused(capsys, *flags)
    assert "'query_key_value'" in message
    assert "--lora_target_modules q_proj k_proj v_proj o_proj" in message


@pytest.mark.parametrize("kind", [ValueError, ImportError])
def test_what_the_trainer_refuses_is_one_line_and_leaves_nothing(model, tmp_path, capsys, monkeypatch, kind):
    def make(self, **kwargs):
        raise kind("no foo")

    monkeypatch.setattr("qlora.train.Trainer.__init__", make)
    message = refused(capsys, *train_flags(model, tmp_path / "run"))
    assert f"expected settings that TRL's trainer accepts, got {kind.__name__}: no foo." in message
    assert not list(tmp_path.iterdir())


def test_an_optimizer_whose_package_is_missing(model, tmp_path, capsys, monkeypatch):
    def make(self):
        raise ImportError("no foo")

    monkeypatch.setattr("qlora.train.Trainer.create_optimizer", make)
    message = refused(capsys, *train_flags(model, tmp_path / "run"))
    assert "expected settings that TRL's trainer accepts, got ImportError: no foo." in message
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_run_folder(model, tmp_path, capsys):
    (tmp_path / "run").touch()
    message = refused(capsys, *train_flags(model, tmp_path / "run"))
    assert "--output_dir: expected a new folder, got " in message
    assert "which is a file" in message


def test_several_processes_are_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(capsys, "train")
    assert "WORLD_SIZE: expected 1" in message
    assert "SFTTrainer" in message


def test_several_gpus_are_refused(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    flags = [flag for flag in train_flags(model, tmp_path / "run") if flag != "--use_cpu=True"]
    assert "GPU: expected one GPU, got 2. Start it with CUDA_VISIBLE_DEVICES=0." in refused(capsys, *flags)


def test_a_missing_model_is_named(tmp_path, capsys):
    message = refused(capsys, *train_flags(tmp_path / "nothing", tmp_path / "run"))
    assert str(tmp_path / "nothing") in message
    assert not list(tmp_path.iterdir())


def test_a_model_without_tokenizer_is_named(model, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, bare / name)
    message = refused(capsys, *train_flags(bare, tmp_path / "run"))
    assert "tokenizer" in message
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_not_written_over(run, model, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert "--resume" in refused(capsys, *train_flags(model, run))
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_resume_without_a_checkpoint(model, tmp_path, capsys):
    assert "without --resume" in refused(capsys, *train_flags(model, tmp_path / "run"), "--resume")


def test_a_place_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    message = refused(capsys, *train_flags(tmp_path / "no model", tmp_path / "file" / "run"))
    assert str(tmp_path / "file" / "run") in message
    assert "folder" in message


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "loss.png", "report.md"])
def test_a_full_disk_leaves_whole_checkpoints_or_nothing(model, tmp_path, capsys, monkeypatch, name):
    """The disk is full when the named file is written."""
    fill_disk(monkeypatch, name)
    message = refused(capsys, *train_flags(model, tmp_path / "run"))
    assert "The disk is full" in message
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    if name in ("optimizer.pt", "adapter_model.safetensors"):  # written in the first checkpoint
        assert not left
    else:
        assert "trainer_state.json" in left
        assert name not in left
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]


def fill_disk(monkeypatch, name: str) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing(write):
        def call(*args, **kwargs):
            target = next((arg for arg in args if isinstance(arg, str | Path)), "")
            folder_of_report = name == "report.md" and ".report.md." in str(target)
            if Path(str(target)).name == name or folder_of_report or f".{name}." in str(target):
                raise full
            return write(*args, **kwargs)

        return call

    import matplotlib.figure
    import peft.peft_model

    monkeypatch.setattr(torch, "save", failing(torch.save))
    monkeypatch.setattr(peft.peft_model, "safe_save_file", failing(peft.peft_model.safe_save_file))
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", failing(matplotlib.figure.Figure.savefig))
    monkeypatch.setattr(Path, "write_text", failing(Path.write_text))


def test_an_adapter_of_another_base_is_refused(run, tmp_path, capsys):
    other = save_model("bloom", tmp_path / "other")
    for command in ("generate", "compare"):
        message = refused(capsys, command, "--adapter_path", str(run), "--model_name_or_path", str(other), "--use_cpu")
        assert "adapter" in message
    output = tmp_path / "merged"
    refused(
        capsys, "merge", "--adapter_path", str(run), "--model_name_or_path", str(other), "--output_dir", str(output)
    )
    assert not output.exists()


def test_an_adapter_that_is_not_there(model, tmp_path, capsys):
    assert "does not exist" in refused(capsys, "generate", "--adapter_path", str(tmp_path / "nothing"))
    assert "which has none" in refused(capsys, "generate", "--adapter_path", str(model))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{bad", "expected a readable adapter"),
        ("[]", "expected a JSON object"),
        ('{"peft_type": "LORA", "base_model_name_or_path": null}', "expected the name of the base model"),
    ],
)
def test_an_adapter_that_cannot_be_read(tmp_path, capsys, text, part):
    file = tmp_path / "adapter_config.json"
    file.write_text(text, encoding="utf-8")
    message = refused(capsys, "generate", "--adapter_path", str(tmp_path), "--use_cpu")
    assert str(file) in message
    assert part in message


def test_merge_does_not_write_over_anything(model, tmp_path, capsys):
    # Said before the adapter is looked for: merging takes long.
    words = ["merge", "--adapter_path", str(tmp_path / "no adapter"), "--output_dir"]
    assert "a folder with files in it" in refused(capsys, *words, str(model))
    assert "got a file" in refused(capsys, *words, str(model / "config.json"))


def test_merge_asks_for_its_folders(capsys):
    assert "--adapter_path" in refused(capsys, "merge")
    assert "--output_dir" in refused(capsys, "merge", "--adapter_path", "x")
    assert "--adapter_path" in refused(capsys, "compare")


def losses_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_texts_side_by_side_do_not_see_each_other(name, tmp_path):
    """The same steps with padding and without: one row of all texts gives the losses that the texts give alone."""
    model = save_model(name, tmp_path / "model")
    settings = ["--max_length", "none", "--num_train_epochs", "1", "--lora_dropout", "0"]
    for output, more in (("padded", []), ("side-by-side", ["--padding_free", "true"])):
        assert main([*train_flags(model, tmp_path / output, name), *settings, *more]) == 0
    assert losses_of(tmp_path / "side-by-side") == pytest.approx(losses_of(tmp_path / "padded"), abs=1e-4)


def test_packing_that_would_mix_texts_is_refused(model, tmp_path, capsys, monkeypatch):
    flags = [*train_flags(model, tmp_path / "run"), "--packing"]
    assert "across each other" in refused(capsys, *flags, "--packing_strategy", "wrapped")
    assert "leave attn_implementation out" in refused(capsys, *flags, "--attn_implementation", "eager")
    monkeypatch.setattr("qlora.train.can_optimize", lambda model: False)
    assert "keeps apart, got LlamaForCausalLM" in refused(capsys, *flags)


def test_running_out_of_memory_at_one_text_says_what_to_do(model, tmp_path, capsys, monkeypatch):
    def train(self, **kwargs):
        raise RuntimeError("No executable batch size found, reached zero.")

    monkeypatch.setattr("qlora.train.Trainer.train", train)
    assert "--max_length" in refused(capsys, *train_flags(model, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_is_recomputed_can_be_chosen(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr("qlora.train.optimize_model", lambda model, **choice: chosen.append(choice))
    flags = train_flags(save_model("llama", tmp_path / "model"), tmp_path / "run")
    choice = ["--kept_blocks", "1", "--recompute", "parts", "--offload", "true"]
    assert main([*flags, *choice, "--num_train_epochs", "1"]) == 0
    assert chosen == [{"recompute": "parts", "kept_blocks": 1, "offload": True}]


def test_recomputation_needs_our_attention(tmp_path, capsys):
    message = refused(capsys, "train", "--kept_blocks", "1", "--attn_implementation", "eager")
    assert "leave attn_implementation out" in message
