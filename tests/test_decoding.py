"""The captured step of `generate`, where a GPU would replay: when it is captured, kept, and given back."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from models import TARGETS, tokens, writing_model
from peft import LoraConfig, get_peft_model
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from qlora import NF4Config, optimize_model, quantize_model
from qlora.optimize import bloom, decoding
from qlora.optimize.decoding import LENGTHS, Decoding
from qlora.optimize.state import state_of
from qlora.optimize.token_layer import TokenLayer

FAMILIES = ["bloom", "llama", "mistral"]


class Pretended:
    """Does again what was captured, with the tensors as they are by then; what Python counts stays as it is."""

    def __init__(self, run, layers, hidden):
        self.run, self.layers, self.hidden, self.replays = run, layers, hidden, 0

    def replay(self):
        self.replays += 1
        if self.replays == 1:  # the pass while it was "captured" was a real one here
            return
        for layer in self.layers:
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int -= 1
        self.hidden.copy_(self.run().last_hidden_state)


@pytest.fixture
def captures(monkeypatch):
    """The graphs that were captured, in a list."""
    found = []

    def capture(self, run, input_ids, tensors, kwargs):
        self._static = {"input_ids": input_ids.clone()} | {name: tensor.clone() for name, tensor in tensors.items()}
        cache = copy.copy(kwargs[decoding.CACHE])  # the same layers; a graph does not hold the cache either
        arguments = kwargs | self._static | {decoding.CACHE: cache}
        out = run(**arguments)
        found.append(Pretended(lambda: run(**arguments), cache.layers, out.last_hidden_state))
        self._graph, self._out = found[-1], (type(out), out.last_hidden_state)

    monkeypatch.setattr(Decoding, "_capture", capture)
    monkeypatch.setattr(decoding, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(decoding, "can_defer", lambda **arguments: False)  # a CPU has no events
    return found


def written(model, ids, new_tokens=12, static=True, **settings):
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[1, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0} | settings
    return model.generate(ids, **settings, **({"cache_implementation": "static"} if static else {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 2])
def test_one_graph_for_calls_of_all_lengths(captures, family, rows):
    plain, model = writing_model(family), optimize_model(writing_model(family))
    for length, new_tokens in ((9, 12), (17, 30), (5, 3), (9, 12)):
        ids = tokens(rows, length)
        assert written(model, ids, new_tokens).tolist() == written(plain, ids, new_tokens, static=False).tolist()
    assert len(captures) == 1
    assert captures[0].replays == 10 + 29 + 2 + 11  # but for the first call's first step, all
    assert "forward" not in vars(model.base_model)


def test_a_prompt_finds_a_kept_cache_as_empty_as_a_new_one(captures, monkeypatch):
    """A length that is a tensor would have causality written out, a row for each token."""
    past, stock = [], bloom.alibi_bias
    monkeypatch.setattr(bloom, "alibi_bias", lambda *args, **how: (past.append(how["past"]), stock(*args, **how))[1])
    model = optimize_model(writing_model("bloom"))
    for _ in range(3):
        past.clear()
        written(model, tokens(1, 9))
        assert type(past[0]) is int
    assert len(captures) == 1


def test_a_layer_takes_tokens_as_transformers_does():
    torch.manual_seed(2)
    ours, theirs = TokenLayer(16), StaticLayer(16)
    for length in (5, 1, 1, 3, 1, 1):
        states = torch.randn(2, 2, 3, length, 8)
        assert all(map(torch.equal, ours.update(*states), theirs.update(*states)))
        assert int(ours.get_seq_length()) == int(theirs.get_seq_length())
    ours.reset()
    assert int(ours.get_seq_length()) == 0


def test_layers_that_count_together():
    torch.manual_seed(2)
    ours, theirs = ([StaticLayer(16) for _ in range(3)] for _ in range(2))
    TokenLayer.exchange(ours)
    assert ours[0].get_seq_length() == 0
    for length in (5, 1, 3, 1):
        for own, other in zip(ours, theirs, strict=True):
            states = torch.randn(2, 2, 3, length, 8)
            assert all(map(torch.equal, own.update(*states), other.update(*states)))
        assert {int(layer.get_seq_length()) for layer in (*ours, *theirs)} == {int(theirs[0].get_seq_length())}
        assert ours[0].cumulative_length is ours[2].cumulative_length
    for layer in (*ours, *theirs):
        layer.crop(-2)
    assert {int(layer.get_seq_length()) for layer in (*ours, *theirs)} == {8}


def test_the_layers_of_a_cache_are_such(captures):
    model = optimize_model(writing_model("bloom"))
    written(model, tokens(1, 9))
    assert {type(layer) for layer in model._decoding._layers} == {TokenLayer}


def test_a_longer_text_or_other_rows_are_captured_anew(captures):
    plain, model = writing_model("bloom"), optimize_model(writing_model("bloom"))
    for ids in (tokens(1, 9), tokens(2, 9), tokens(2, LENGTHS), tokens(2, 9)):
        assert written(model, ids).tolist() == written(plain, ids, static=False).tolist()
    assert len(captures) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_that_somebody_has_is_left_alone(captures, family):
    model = optimize_model(writing_model(family))
    first = written(model, tokens(1, 9), return_dict_in_generate=True)
    cache = getattr(first, "past_key_values", None) or first[decoding.CACHE]
    before = [layer.keys.clone() for layer in cache.layers]
    written(model, tokens(1, 7))
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    assert len(captures) == 2
    del first, cache
    written(model, tokens(1, 9))
    assert len(captures) == 2


def test_a_cache_of_the_callers_is_not_kept(captures):
    plain, model = writing_model("bloom"), optimize_model(writing_model("bloom"))
    ids = tokens(1, 9)
    cache = StaticCache(config=model.config, max_cache_len=40)
    found = written(model, ids, static=False, **{decoding.CACHE: cache})
    assert found.tolist() == written(plain, ids, static=False).tolist()
    assert len(captures) == 1
    assert len(model._decoding) == 0
    assert not model._decoding._keys


def changed_adapter(model):
    model.set_adapter("other")


def merged_adapter(model):
    model.merge_adapter()


def without_adapter(model):
    model.base_model.disable_adapter_layers()


def other_scaling(model):
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] *= 3


def moved_weight(model):
    embedding = model.get_base_model().get_input_embeddings()
    embedding.weight.data = embedding.weight.data.flip(0).clone()


def moved_scales(model):
    for module in model.modules():
        if hasattr(module, "quant_state"):
            module.weight.quant_state.absmax = module.weight.quant_state.absmax.roll(1).clone()


def listened_to(model):
    model.get_base_model().transformer.h[0].register_forward_hook(lambda module, args, output: output * 1.5)


@pytest.mark.parametrize(
    "change",
    [changed_adapter, merged_adapter, without_adapter, other_scaling, moved_weight, moved_scales, listened_to],
)
def test_a_changed_model_writes_what_it_is_now(captures, change):
    """What stands for a graph here would do so in any case; a real one knows what it was captured with."""

    def changed(graphs):
        model = quantize_model(writing_model("bloom", hidden_size=64), NF4Config())
        optimize_model(model, graphs=graphs)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS["bloom"], init_lora_weights=False)
        torch.manual_seed(1)
        model = get_peft_model(model, config).eval()
        model.add_adapter("other", config)
        before = written(model, tokens(1, 9)).tolist()
        change(model)
        return before, written(model, tokens(1, 9)).tolist()

    before, after = changed(False)
    assert changed(True) == (before, after)
    assert before != after or change is merged_adapter
    assert captures[0].replays == 10
    assert len(captures) == (1 if change is listened_to else 2)


def test_numbers_that_change_in_their_place_keep_the_graph(captures):
    model = optimize_model(writing_model("bloom"))
    written(model, tokens(1, 9))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)
    found = written(model, tokens(1, 9)).tolist()
    assert len(captures) == 1
    assert found == written(optimize_model(model, graphs=False), tokens(1, 9)).tolist()


@pytest.mark.parametrize(
    "give_back", [lambda model: model.train(), lambda model: model.float(), lambda model: model.to("cpu")]
)
def test_training_and_moving_give_the_memory_back(captures, give_back):
    model = optimize_model(writing_model("llama"))
    written(model, tokens(1, 9))
    assert len(model._decoding) == 1
    give_back(model)
    assert len(model._decoding) == 0
    assert not model._decoding._layers
    assert not model._decoding._keys


def test_evaluation_does_not_give_it_back(captures):
    model = optimize_model(writing_model("llama"))
    written(model, tokens(1, 9))
    model.eval()
    assert len(model._decoding) == 1


def test_beam_search_is_not_captured(captures):
    plain, model = writing_model("bloom"), optimize_model(writing_model("bloom"))
    ids = tokens(1, 9)
    assert written(model, ids, num_beams=3).tolist() == written(plain, ids, static=False, num_beams=3).tolist()
    assert not captures


def test_a_window_that_is_full_is_not_captured(captures):
    plain = writing_model("mistral", sliding_window=16)
    model = optimize_model(writing_model("mistral", sliding_window=16))
    ids = tokens(1, 9)
    assert written(model, ids, 20).tolist() == written(plain, ids, 20, static=False).tolist()
    assert captures[0].replays == 6


def test_a_copy_begins_without_any(captures):
    model = optimize_model(writing_model("bloom"))
    written(model, tokens(1, 9))
    twin = copy.deepcopy(model)
    assert len(twin._decoding) == 0
    assert written(twin, tokens(1, 9)).tolist() == written(model, tokens(1, 9)).tolist()


def test_without_graphs_nothing_is_captured_or_rounded(captures):
    model = optimize_model(writing_model("bloom"), graphs=False)
    written(model, tokens(1, 9))
    assert not captures
    assert model._decoding is None
    assert model._previous_max_cache_length < LENGTHS


def test_nothing_holds_the_model():
    model = optimize_model(writing_model("bloom"))
    written(model, tokens(1, 9))
    state = state_of(model)
    assert state == state_of(model)
    assert not any(referrer is state for referrer in gc.get_referrers(model.transformer))
