"""The memory plan: figures of Bloom-7B1 that were measured or are published, and real models counted out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import save_tiny
from runs import refused

from qlora import UserError, load_pretrained_4bit
from qlora.arguments import LoraArguments
from qlora.cli import main
from qlora.memory import meta_model, plan
from qlora.report import model_sizes
from qlora.units import GIB

BLOOM = "bigscience/bloom-7b1"
RECORD = Path(__file__).parent.parent / "benchmarks/results/bloom-7b1-nvidia-h100-80gb-hbm3-2026-11-25.jsonl"


@pytest.fixture(scope="module")
def bloom():
    return meta_model(BLOOM)


def planned(model, batch_size: int, length: int, lora: LoraArguments | None = None):
    return plan(model, lora or LoraArguments(), batch_size=batch_size, length=length, dtype=torch.bfloat16)


def test_bloom_has_its_published_sizes(bloom):
    found = planned(bloom, 1, 512)
    assert found.parameters == 7_069_016_064
    assert found.trainable == 7_864_320
    assert found.quantized / GIB == pytest.approx(2.902, abs=0.001)
    assert found.adapter == found.optimizer == 8 * found.trainable
    assert (found.quantized + found.kept) / GIB == pytest.approx(4.83, rel=0.01)


def test_bloom_is_near_the_measured_peaks(bloom):
    rows = [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["stack"] == "qlora" and row["precision"] == "bf16" and row["length"]]
    assert {row["name"] for row in rows} == {"1x128", "4x512", "8x512"}
    for row in rows:
        found = planned(bloom, row["batch"], row["length"])
        # torch counts its own allocations, the CUDA context is beside them.
        assert (found.total - found.context) / GIB == pytest.approx(row["gpu_peak_allocated_gib"], rel=0.1), row["name"]


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("double", [True, False])
def test_the_weights_are_those_of_the_loaded_model(name, double, tmp_path):
    folder = save_tiny(name, tmp_path, hidden_size=128)
    found = plan(
        meta_model(str(folder)),
        LoraArguments(lora_target_modules=["all-linear"]),
        batch_size=1,
        length=8,
        dtype=torch.float32,
        double_quantization=double,
    )
    sizes = model_sizes(load_pretrained_4bit(folder, compress_statistics=double, device="cpu"))
    # Less than a block of 256 scales a layer is rounded up.
    assert found.quantized == pytest.approx(sizes["quantized"], abs=16 * 4)
    assert found.kept == sizes["kept"]


def test_the_trainable_parameters_are_those_of_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = save_tiny("llama", tmp_path)
    found = planned(meta_model(str(folder)), 1, 8, LoraArguments(lora_r=3, lora_target_modules=["all-linear"]))
    model = get_peft_model(load_pretrained_4bit(folder, device="cpu"), LoraConfig(r=3, target_modules="all-linear"))
    assert found.trainable == model.get_nb_trainable_parameters()[0]


def test_more_of_anything_takes_more(bloom):
    totals = [planned(bloom, *size).total for size in ((1, 128), (1, 512), (2, 512), (2, 1024))]
    assert totals == sorted(totals)
    assert planned(bloom, 1, 128, LoraArguments(lora_r=64)).total > totals[0]


def test_the_command_compares_batch_sizes_with_the_gpu(capsys):
    assert main(["plan", "--gpu", "t4", "--batch_size", "4", "64"]) == 0
    out = capsys.readouterr().out
    assert "float16 with loss scaling" in out
    assert "0.1111% of all" in out
    assert [line.split()[3:] for line in out.splitlines() if line.startswith("in 14.56 GiB")] == [
        ["fits", "too", "big"]
    ]
    assert "It assumes" in out


def test_wrong_input(capsys):
    assert "a100-40" in refused(capsys, "plan", "--gpu", "k80")
    assert "-3" in refused(capsys, "plan", "--gpu=-3")
    assert "query_key_value" in refused(capsys, "plan", "--lora_target_modules", "q_proj")
    assert "batch_size" in refused(capsys, "plan", "--batch_size", "0")
    message = refused(capsys, "plan", "--model_name_or_path", "nobody/nothing")
    assert "--model_name_or_path" in message
    assert "'nobody/nothing'" in message
    assert " [...]. Check the name" in message  # cut between words


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert type(meta_model("~/model")).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "/nowhere/at/all"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(UserError, match=r"expected a folder with a checkpoint, .* which is no folder here"):
        meta_model(name)
