"""What a run shows beside the training: where a gradient overflowed, and the loss scale."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from qlora.callbacks import MetricsWriter, OverflowReport


def model_with_gradients(*overflowed: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
            if name in overflowed:
                parameter.grad.view(-1)[1] = torch.inf
    return model


def report(model: nn.Module, skipped: bool) -> None:
    """One step of an optimizer that is not called when a step is skipped."""
    optimizer = SimpleNamespace(step_was_skipped=skipped, scaler=None)
    callback = OverflowReport()
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model, optimizer=optimizer)
    callback.on_optimizer_step(None, SimpleNamespace(global_step=6), None, optimizer=optimizer)
    callback.on_train_end(None, SimpleNamespace(global_step=7), None)


def test_an_overflow_names_the_layer_where_it_began(capsys):
    report(model_with_gradients("1.weight", "1.bias"), skipped=True)
    assert capsys.readouterr().out == (
        "step 7 skipped, the loss scale halved: the overflow of the gradient begins in 1.bias (2 of 4)\n"
    )


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_whatever_the_optimizer_is(capsys, options):
    Accelerator(cpu=True)
    model = model_with_gradients()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(trained, **options), scaler=scaler)
    callback = OverflowReport()
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model, optimizer=optimizer)
    for step, factor in enumerate((1.0, torch.inf, 1.0, torch.inf)):
        loss = factor * model[1](torch.ones(1, 2)).sum() + model[2](torch.ones(1, 2)).sum()
        scaler.scale(loss).backward()
        optimizer.step()
        callback.on_optimizer_step(None, SimpleNamespace(global_step=step), None, optimizer=optimizer)
        optimizer.zero_grad()
    callback.on_train_end(None, SimpleNamespace(global_step=4), None)
    skipped = "skipped, the loss scale halved: the overflow of the gradient begins in 1.bias (2 of 4)"
    assert capsys.readouterr().out.splitlines() == [f"step 2 {skipped}", f"step 4 {skipped}"]
    assert scaler.get_scale() == 1.0


def test_a_step_that_counts_is_not_looked_at(capsys, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: pytest.fail("waits for the gradients"))
    report(model_with_gradients("1.weight"), skipped=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("scaler", "expected"), [(None, None), (SimpleNamespace(get_scale=lambda: 2.0**15), 2.0**15)])
def test_the_loss_scale_is_recorded(tmp_path, scaler, expected):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", [])
    state = SimpleNamespace(log_history=[])
    writer.on_train_begin(None, state, None)
    writer.on_step_begin(None, state, None)
    writer.on_step_end(None, state, None)
    logs = {"loss": 2.5, "num_tokens": 100}
    state.log_history.append(dict(logs))
    writer.on_log(None, state, None, logs=logs, optimizer=SimpleNamespace(scaler=scaler))
    (entry,) = [json.loads(line) for line in writer.path.read_text(encoding="utf-8").splitlines()]
    assert entry["loss"] == 2.5
    assert entry.get("loss_scale") == expected
