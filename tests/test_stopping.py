"""The late look at whether a text has ended: the same texts, the same random numbers, and who does without."""

from __future__ import annotations

import pytest
import torch
from models import tokens, writing_model
from transformers import LogitsProcessor, MaxTimeCriteria, TextStreamer
from transformers.generation import utils

from qlora import optimize_model
from qlora.optimize import decoding, stopping

FAMILIES = ["bloom", "llama", "mistral"]


class Event:
    def __init__(self, **how):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def late(monkeypatch):
    """The calls of the late check, in a list; a CPU has no events."""
    asked = []
    stock = utils.DeferredStopCheck.__call__
    monkeypatch.setattr(utils.DeferredStopCheck, "__call__", lambda *args: (asked.append(1), stock(*args))[1])
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(decoding, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(decoding, "_fits", lambda *args: False)
    return asked


def written(model, ids, static=True, **settings):
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 20, "pad_token_id": 0, "do_sample": False} | settings
    return model.generate(ids, **settings, **({"cache_implementation": "static"} if static else {})).tolist()


def steps_of(model, monkeypatch):
    stock, steps = type(model).forward, []
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: (steps.append(1), stock(*args, **kwargs))[1])
    return steps


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 2])
def test_texts_that_end_early_and_late(late, family, rows, monkeypatch):
    plain, model = writing_model(family), optimize_model(writing_model(family))
    ids = tokens(rows, 9)
    whole = written(plain, ids, static=False, eos_token_id=None)
    ends = sorted({whole[0][9 + at] for at in (0, 3, 8, 19)})
    for end in [None, *ends]:
        expected = written(plain, ids, static=False, eos_token_id=end)
        assert written(model, ids, eos_token_id=end) == expected
    assert late
    early = [row[9 + 5] for row in whole]
    steps = steps_of(model, monkeypatch)
    new_tokens = len(written(model, ids, eos_token_id=early)[0]) - 9
    assert new_tokens <= 6
    assert len(steps) == new_tokens + 1


def test_random_numbers_go_on_as_without(late):
    plain, model = writing_model("bloom"), optimize_model(writing_model("bloom"))
    ids = tokens(2, 9)

    def drawn(which, **how):
        torch.manual_seed(5)
        return [written(which, ids, do_sample=True, eos_token_id=list(range(1, 40)), **how) for _ in range(4)]

    found = drawn(model)
    assert found == drawn(plain, static=False)
    assert any(len(rows[0]) < 29 for rows in found)
    assert late


class Counting(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    "settings",
    [
        lambda: {"logits_processor": [Counting()]},
        lambda: {"stopping_criteria": [MaxTimeCriteria(100.0)]},
        lambda: {"return_dict_in_generate": True},
        lambda: {"streamer": TextStreamer(None)},
        lambda: {"cache_implementation": "dynamic"},
    ],
)
def test_who_does_without(late, settings, monkeypatch):
    monkeypatch.setattr(TextStreamer, "put", lambda *args: None)
    monkeypatch.setattr(TextStreamer, "end", lambda *args: None)
    model = optimize_model(writing_model("bloom"))
    ids = tokens(1, 9)
    written(model, ids)
    assert len(late) == 20
    model.generate(ids, max_new_tokens=5, pad_token_id=0, **({"cache_implementation": "static"} | settings()))
    assert len(late) == 20
    written(optimize_model(writing_model("bloom"), graphs=False), ids)
    assert len(late) == 20


def test_transformers_check_is_as_it_was(late):
    stock = utils.DeferredStopCheck.is_supported
    device = torch.device("cpu")
    with pytest.raises(ZeroDivisionError):
        stopping.deferred(lambda processors: 1 // 0, tokens(1, 3), [])
    assert utils.DeferredStopCheck.is_supported is stock
    assert not stock(device, None, cache_is_returned=False, is_assistant=False)
