"""`model.train()` in each step of a trainer, without a walk that writes into every module."""

from __future__ import annotations

import pytest
from models import TARGETS, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from qlora import optimize_model, prepare_model_for_training
from qlora.optimize.modes import stays_in_mode


@pytest.fixture(params=["bloom", "llama"])
def model(request):
    base = prepare_model_for_training(optimize_model(tiny_model(request.param)))
    adapted = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.1, target_modules=TARGETS[request.param]))
    return adapted.train()


@pytest.fixture
def walked(monkeypatch):
    """Modules whose children torch went through."""
    found = []
    named_children = nn.Module.named_children
    monkeypatch.setattr(nn.Module, "named_children", lambda self: found.append(self) or named_children(self))
    return found


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_the_mode_is_left_alone(model, walked, training):
    model.train(not training)
    walked.clear()
    model.train(training)
    everything = len(walked)
    walked.clear()
    model.train(training)
    assert len(walked) < 5 < everything


@pytest.mark.parametrize("training", [True, False])
def test_one_module_in_the_other_mode_is_found(model, training):
    model.train(training)
    odd = [module for module in model.modules() if isinstance(module, nn.Dropout)][-1]
    odd.train(not training)
    model.train(training)
    assert {module.training for module in model.modules()} == {training}


def test_the_mode_is_changed_and_changed_back(model):
    for training in (False, True):
        assert model.train(training) is model
        assert {module.training for module in model.modules()} == {training}


def test_whoever_does_more_in_train_is_called(model):
    """As an adapter that takes itself out of the weights when training begins."""
    calls = []

    class Own(nn.Module):
        def train(self, mode=True):
            calls.append(mode)
            return super().train(mode)

    model.get_base_model().own = Own()
    model.train()
    model.train()
    assert calls == [True, True]


def test_what_stays():
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.Dropout()))
    model.register_module("none", None)
    assert stays_in_mode(model, True)
    assert not stays_in_mode(model, False)
    model[0][1].eval()
    assert not stays_in_mode(model, True)
    model.eval()
    assert stays_in_mode(model, False)
