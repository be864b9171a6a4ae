"""The memory plan: published figures of Bloom-7B1, and real models counted out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import save_tiny, tokens
from peft import LoraConfig, get_peft_model

from qlora import load_pretrained_4bit, optimize_model, prepare_model_for_training
from qlora.arguments import LoraArguments, lora_targets
from qlora.memory import Run, plan
from qlora.report import model_sizes
from qlora.shapes import meta_model, shapes_of
from qlora.units import GIB

BLOOM = "bigscience/bloom-7b1"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


@pytest.fixture(scope="module")
def bloom():
    return meta_model(BLOOM)


def planned(model, batch_size: int, length: int, lora: LoraArguments | None = None, **run):
    return plan(shapes_of(model, lora or LoraArguments()), Run(batch_size, length, torch.bfloat16, **run))


def test_bloom_has_its_published_sizes(bloom):
    shapes, found = shapes_of(bloom, LoraArguments()), planned(bloom, 1, 512)
    assert shapes.parameters == 7_069_016_064
    assert shapes.trainable == 7_864_320
    assert found.quantized / GIB == pytest.approx(2.902, abs=0.001)
    assert found.adapter == found.optimizer == 8 * shapes.trainable
    assert (found.quantized + found.kept) / GIB == pytest.approx(4.83, rel=0.01)


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("embeddings", [True, False])
def test_the_weights_are_those_of_the_loaded_model(name, double, embeddings, tmp_path):
    folder = save_tiny(name, tmp_path, hidden_size=128)
    lora = LoraArguments(lora_target_modules=["all-linear"])
    how = {"double_quantization": double, "quantize_embeddings": embeddings}
    found = planned(meta_model(str(folder)), 1, 8, lora, **how)
    model = load_pretrained_4bit(
        folder, compress_statistics=double, quantize_embeddings=embeddings, device="cpu", dtype=torch.bfloat16
    )
    sizes = model_sizes(model)
    # Less than a block of 256 scales a layer is rounded up.
    assert found.quantized == pytest.approx(sizes["quantized"], abs=16 * 4)
    assert found.kept == sizes["kept"]


def test_embeddings_in_4_bits_take_a_quarter_and_their_rows_at_the_loss(bloom):
    shapes = shapes_of(bloom, LoraArguments())
    before, after = (planned(bloom, 4, 512, quantize_embeddings=on) for on in (False, True))
    assert shapes.embeddings == 250_880 * 4096
    assert (before.kept - after.kept) / GIB == pytest.approx(1.914, abs=0.001)
    assert (after.quantized - before.quantized) / GIB == pytest.approx(0.494, abs=0.001)
    assert 1.1 < (before.total - after.total) / GIB < 1.42


def test_what_is_offloaded_is_not_on_the_gpu(bloom):
    before, after = (planned(bloom, 4, 512, offload=on, graphs=False) for on in (False, True))
    assert before.checkpoints == 30 * 4096 * 4 * 512 * 2
    assert after.checkpoints == 0
    assert after.total == before.total - before.checkpoints
    assert not Run(4, 512, torch.bfloat16, offload=True, capability=(9, 0)).by_graphs


def test_the_trainable_parameters_are_those_of_peft(tmp_path):
    folder = save_tiny("llama", tmp_path)
    found = shapes_of(meta_model(str(folder)), LoraArguments(lora_r=3, lora_target_modules=["all-linear"]))
    model = get_peft_model(load_pretrained_4bit(folder, device="cpu"), LoraConfig(r=3, target_modules="all-linear"))
    assert found.trainable == model.get_nb_trainable_parameters()[0]


def test_more_of_anything_takes_more(bloom):
    totals = [planned(bloom, *size).total for size in ((1, 128), (1, 512), (2, 512), (2, 1024))]
    assert totals == sorted(totals)
    assert planned(bloom, 1, 128, LoraArguments(lora_r=64)).total > totals[0]
    assert planned(bloom, 4, 512, recompute="block").total < planned(bloom, 4, 512, recompute="parts").total
    kept = [planned(bloom, 4, 512, kept_blocks=count).total for count in range(31)]
    assert kept[5:] == sorted(kept[5:])  # a kept block or two lie where the recomputed one's work will be
    assert kept[-1] > kept[0]
    everything = planned(bloom, 4, 512, recompute="nothing")
    assert kept[-1] == everything.total
    # 9 hidden sizes a block, the adapter's input, and the block's input; 2 bytes each.
    assert everything.checkpoints == 30 * (9 + 1 + 1) * 4096 * 2048 * 2


class SavedTensors:
    """Bytes that autograd keeps, but for parameters."""

    def __init__(self, model):
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.storages: dict[int, int] = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


@pytest.mark.parametrize(
    ("name", "targets"), [("bloom", ["query_key_value"]), ("llama", ["q_proj"]), ("llama", ["all-linear"])]
)
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_what_a_block_keeps_is_what_autograd_keeps(name, targets, dropout, tmp_path):
    """In float32 on the CPU; nothing recomputed."""
    sizes = {"hidden_size": 256} | ({"intermediate_size": 512} if name == "llama" else {})
    lora = LoraArguments(lora_target_modules=targets, lora_dropout=dropout)
    folder = save_tiny(name, tmp_path, **sizes)
    shapes = shapes_of(meta_model(str(folder)), lora)
    model = optimize_model(prepare_model_for_training(load_pretrained_4bit(folder, device="cpu"), False))
    peft = LoraConfig(r=16, target_modules=lora_targets(lora), lora_dropout=dropout)
    model = get_peft_model(model, peft).train()
    saved = SavedTensors(model)
    ids = tokens(4, 64)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        output = model.get_base_model().base_model(ids, use_cache=False).last_hidden_state
    kept = sum(saved.storages.values()) / 4 / ids.numel()
    del output
    # Once the embedding, the final norm and the small things (mask, rotary embedding, statistics, rank) are added.
    expected = shapes.layers * (shapes.saved_width + shapes.hidden)
    assert kept == pytest.approx(expected, rel=0.15)


def test_the_plan_is_near_every_measured_peak(bloom):
    """The records of `benchmarks.plan_check` at full size: within 5%."""
    records = sorted(RESULTS.glob("plan-bloom-7b1-*.jsonl"))
    if not records:
        pytest.skip("no record of benchmarks.plan_check yet")
    shapes = shapes_of(bloom, LoraArguments())
    for row in (json.loads(line) for file in records for line in file.read_text(encoding="utf-8").splitlines()):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[row["precision"]]
        capability = tuple(int(part) for part in row["capability"].split("."))
        way = (row["recompute"], row["kept_blocks"], row["graphs"])
        others = {name: row.get(name, False) for name in ("quantize_embeddings", "offload")}  # not in the oldest
        run = Run(row["batch"], row["length"], dtype, *way, **others, capability=capability)
        assert plan(shapes, run).allocated / GIB == pytest.approx(row["gpu_peak_allocated_gib"], rel=0.05), row
