"""`qlora plan`: the command, its proposals and the roofline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import save_tiny
from train_runs import refused

from qlora import UserError
from qlora.arguments import LoraArguments
from qlora.cli import main
from qlora.gpus import GPUS, find_gpu
from qlora.memory import Run, plan
from qlora.plan import best_run, most_kept_blocks, proposal
from qlora.roofline import step_time
from qlora.shapes import meta_model, shapes_of
from qlora.units import GIB


@pytest.fixture(scope="module")
def bloom():
    return shapes_of(meta_model("bigscience/bloom-7b1"), LoraArguments())


RUN = Run(4, 512, torch.float16)


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


def test_the_memory_can_be_given_apart(capsys):
    assert (
        main(["plan", "--model", "bigscience/bloom-7b1", "--gpu", "t4", "--memory-gib", "6", "--batch_size", "64"]) == 0
    )
    assert "in 6.00 GiB" in capsys.readouterr().out
    assert find_gpu(None, 12.0).capability == (8, 0)
    assert find_gpu("t4", 12.0) == replace(GPUS["t4"], memory_gib=12.0)


def test_it_proposes_what_fits_and_is_fastest(bloom):
    t4 = GPUS["t4"]
    best = best_run(bloom, RUN, t4)
    assert plan(bloom, best).total <= t4.memory_gib * GIB
    assert best.kept_blocks > 0
    one_more = replace(best, kept_blocks=best.kept_blocks + 1)
    assert best.kept_blocks == bloom.layers or plan(bloom, one_more).total > 0.95 * t4.memory_gib * GIB
    assert step_time(bloom, best, t4).total / best.tokens <= step_time(bloom, RUN, t4).total / RUN.tokens
    assert f"--per_device_train_batch_size {best.batch_size} --kept_blocks {best.kept_blocks}" in proposal(
        bloom, RUN, t4
    )
    assert most_kept_blocks(bloom, RUN, 5 * GIB) is None
    assert "try --max_length" in proposal(bloom, replace(RUN, length=32768), replace(t4, memory_gib=8.0))
    assert "does not fit, whatever" in proposal(bloom, RUN, replace(t4, memory_gib=4.0))


def test_time_follows_work_and_speed(bloom):
    h100, t4 = GPUS["h100"], GPUS["t4"]
    time = step_time(bloom, RUN, h100)
    assert time.total >= time.device
    assert step_time(bloom, RUN, t4).total > 5 * time.total
    assert step_time(bloom, replace(RUN, recompute="parts"), h100).device < time.device
    kept = step_time(bloom, replace(RUN, recompute="nothing"), h100)
    assert kept.products < step_time(bloom, replace(RUN, kept_blocks=15), h100).products < time.products
    # Nothing recomputed: two products with each weight, 2 operations each.
    flops = 2 * 2 * 6_039_797_760 * RUN.tokens
    assert kept.products == pytest.approx(flops / (989e12 * 0.80))
    assert step_time(bloom, RUN, find_gpu("24")) is None
    # A few tokens take no less than reading the weights does.
    few = replace(RUN, batch_size=1, length=8, recompute="nothing")
    assert step_time(bloom, few, h100).products == pytest.approx(2 * 6_039_797_760 * 2 / (3350e9 * 0.85))


def test_graphs_take_the_launches_off_the_host(bloom):
    h100 = GPUS["h100"]
    run = replace(RUN, length=32, capability=(9, 0))
    by_graphs, launched = step_time(bloom, run, h100), step_time(bloom, replace(run, graphs=False), h100)
    assert launched.total == launched.host > 2 * by_graphs.total
    assert by_graphs.total == by_graphs.device + by_graphs.host
    assert not replace(run, capability=(7, 5)).by_graphs
    assert not replace(run, length=8192).by_graphs
    more = plan(bloom, run).total - plan(bloom, replace(run, graphs=False)).total
    assert 0 < more < 0.3 * GIB


def test_kept_blocks_are_those_of_the_model(capsys):
    assert "at most 30" in refused(capsys, "plan", "--kept_blocks", "31")
