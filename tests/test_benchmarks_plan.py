"""The plan's record and the recipe within a T4's limits, at a tiny size on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import plan_check, t4_recipe, worker
from benchmarks.jobs import Case, Job

TINY = ["--layers", "2", "--hidden", "64", "--heads", "4", "--vocab", "512", "--device", "cpu", "--commit", "abc+"]


def only(folder: Path, suffix: str) -> str:
    (file,) = folder.glob(f"*{suffix}")
    return file.read_text(encoding="utf-8")


def test_every_way_is_measured_beside_its_prediction(prompts_csv, tmp_path):
    flags = ["--steps", "1", "--warmup", "1", "--data", str(prompts_csv), "--out", str(tmp_path)]
    assert plan_check.main([*TINY, *flags]) == 0
    rows = [json.loads(line) for line in only(tmp_path, ".jsonl").splitlines()]
    found = [(f"{row['batch']}x{row['length']}", row["recompute"], row["kept_blocks"]) for row in rows]
    cases = plan_check.CASES + plan_check.CASES_WITH_EMBEDDINGS
    assert found == [(size, recompute, min(kept, 2)) for size, recompute, kept, *_ in cases]
    assert [row["quantize_embeddings"] for row in rows] == [number >= len(plan_check.CASES) for number in range(14)]
    assert [row["offload"] for row in rows] == [case[4] for case in cases]
    assert all(row["step_s"] > 0 and row["predicted_allocated_gib"] > 0 and row["commit"] == "abc" for row in rows)
    assert only(tmp_path, ".md").count("\n| ") == len(rows) + 2


def test_the_recipe_is_run_and_judged(prompts_csv, tmp_path):
    flags = ["--prompts", "4", "--data", str(prompts_csv), "--out", str(tmp_path)]
    assert t4_recipe.main([*TINY, *flags]) == 0
    row = json.loads(only(tmp_path, ".jsonl"))
    assert (row["verdict"], row["steps"], row["status"]) == ("passed", 5, "ok")
    assert 0 < row["host_highest_gib"] < 10
    assert "| verdict | passed |" in only(tmp_path, ".md")


OK = {"status": "ok", "predicted_allocated_gib": 5.0, "gpu_peak_allocated_gib": 5.1, "gpu_peak_reserved_gib": 5.5}


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "passed"),
        ({"load_host_peak_gib": 10.5}, "host memory reached 10.50 GiB, more than 10.0"),
        ({"gpu_peak_reserved_gib": 14.2}, "the allocator took 14.20 GiB, more than 14.0"),
        ({"gpu_peak_allocated_gib": 5.5}, "the plan was -9.1% off, more than 5%"),
        ({"losses": [1.0, float("nan")]}, "a loss is not finite"),
        ({"status": "failed", "name": "recipe", "reason": "no room"}, "it failed in recipe: no room"),
    ],
)
def test_the_verdict(change, verdict):
    assert t4_recipe.judged(OK | change)["verdict"] == verdict


def test_a_process_can_be_taken_for_an_older_gpu(monkeypatch, tmp_path):
    job = Job(*["x"] * 8, cases=(Case("one", 1, 8, 1, 0),), gpu_limit_gib=14.0, capability=(7, 5))
    job.save(tmp_path / "job.json")
    assert Job.load(tmp_path / "job.json") == job
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    worker._constrain(job)
    assert torch.cuda.get_device_capability() == (7, 5)
