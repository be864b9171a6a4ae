"""The step-by-step comparison with peft on bitsandbytes, at a tiny size on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import fidelity
from qlora.linear4bit import Linear4bit

TINY = ["--layers", "2", "--hidden", "64", "--heads", "4", "--device", "cpu", "--steps", "3", "--stability", "4"]


def run(prompts_csv: Path, out: Path) -> tuple[int, list[dict]]:
    pytest.importorskip("bitsandbytes")
    code = fidelity.main([*TINY, "--commit", "abc", "--data", str(prompts_csv), "--out", str(out)])
    (file,) = out.glob("*.jsonl")
    return code, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_stack_takes_the_same_steps(prompts_csv, tmp_path):
    code, rows = run(prompts_csv, tmp_path)
    assert code == 0
    assert [(row["family"], row["stack"], row["steps"], row["verdict"]) for row in rows] == [
        (family, stack, steps, verdict)
        for family in ("bloom", "llama")
        for stack, steps, verdict in (
            *((stack, 3, "same") for stack in fidelity.STACKS),
            ("qlora, optimized", 4, "finite"),
        )
    ]
    assert all(row["largest_loss_difference"] < 1e-4 for row in rows if row["verdict"] == "same")
    assert all(row["largest_loss_error"] < 1e-4 for row in rows if row["verdict"] == "same")
    assert all(row["grad_A_error"] < 1e-4 and row["grad_B_error"] < 1e-4 for row in rows if row["verdict"] == "same")


def test_another_computation_is_found(prompts_csv, tmp_path, monkeypatch):
    plain = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda layer, x, *adapter: plain(layer, x, *adapter) * 1.05)
    code, rows = run(prompts_csv, tmp_path)
    assert code == 1
    # The decoded weights of the yardstick of the gradients are not by this layer.
    assert {row["verdict"] for row in rows if row["stack"] == "qlora"} == {"differs"}
    for theirs, ours in (rows[:2], rows[4:6]):
        relative = [abs(loss / other - 1) for loss, other in zip(ours["losses"], theirs["losses"], strict=True)]
        assert ours["relative_difference"] == max(relative) > 0


def test_a_loss_that_is_not_finite_is_found(monkeypatch):
    monkeypatch.setattr(fidelity.Steps, "__call__", lambda self, batch: self.losses.append(float("nan")))
    monkeypatch.setattr(fidelity, "_optimized", lambda folder, dtype, device: None)
    monkeypatch.setattr(fidelity, "adapted", lambda model, state: torch.nn.Linear(1, 1))
    row = fidelity.stability(Path(), "cpu", [{}], 2)
    assert row["verdict"] == "a loss is not finite"


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "same"),
        ({"largest_loss_difference": 1.1e-3}, "nearer to float32"),
        ({"largest_loss_difference": 1.1e-3, "largest_loss_error": 2.1e-3}, "differs"),
        ({"grad_B_error": 0.021}, "differs"),
    ],
)
def test_the_verdict(changed, verdict):
    yardstick = {"largest_loss_difference": 0.0, "largest_loss_error": 2e-3, "grad_A_error": 0.01, "grad_B_error": 0.01}
    row = {"largest_loss_difference": 1e-3, "largest_loss_error": 2e-3, "grad_A_error": 0.02, "grad_B_error": 0.02}
    assert fidelity.verdict(row | changed, yardstick) == verdict
