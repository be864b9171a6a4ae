"""What a run shows beside the training: where a gradient overflowed, and the loss scale."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
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
    optimizer = SimpleNamespace(step_was_skipped=skipped)
    OverflowReport().on_optimizer_step(None, SimpleNamespace(global_step=6), None, model=model, optimizer=optimizer)


def test_an_overflow_names_the_layer_where_it_began(capsys):
    report(model_with_gradients("1.weight", "1.bias"), skipped=True)
    assert capsys.readouterr().out == (
        "step 7 skipped, the loss scale halved: the overflow of the gradient begins in 1.bias (2 of 4)\n"
    )


def test_a_step_that_counts_is_not_looked_at(capsys, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: pytest.fail("waits for the gradients"))
    report(model_with_gradients("1.weight"), skipped=False)
    OverflowReport().on_optimizer_step(None, SimpleNamespace(global_step=6), None, model=None, optimizer=object())
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
