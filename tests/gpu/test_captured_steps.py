"""Training and decoding by CUDA graphs against the same launch by launch."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from models import TARGETS, tiny_model, tokens, writing_model
from peft import LoraConfig, get_peft_model
from transformers.generation import utils

from qlora import NF4Config, optimize_model, prepare_model_for_training, quantize_model
from qlora.optimize.capture import capture
from qlora.optimize.graphs import _borrowed
from qlora.optimize.recompute import RECOMPUTE

pytestmark = pytest.mark.gpu


def tuned(
    graphs: bool,
    dtype: torch.dtype = torch.float16,
    recompute: str = "block",
    dropout: float = 0.3,
    family: str = "bloom",
):
    model = quantize_model(tiny_model(family, hidden_size=64).to(dtype), NF4Config()).cuda()
    optimize_model(prepare_model_for_training(model), graphs=graphs, recompute=recompute)
    torch.manual_seed(4)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=TARGETS[family], lora_dropout=dropout, init_lora_weights=False
    )
    return get_peft_model(model, config).train()


def captured(model) -> int:
    base = model.get_base_model().base_model
    return len(getattr(base, "layers", base).graphs)


def gradients(model, seed: int, rows: int = 2, length: int = 50, hidden_end: int = 7):
    """Of one step; the generator's state decides what is dropped, in a graph as outside."""
    ids = tokens(rows, length).cuda()
    mask = torch.ones_like(ids)
    mask[0, length - hidden_end :] = 0
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast("cuda", model.dtype):
        output = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(found, expected):
    """Padding to another length chooses other kernels, which sum in another order."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)
    assert found[1].keys() == expected[1].keys()
    for name, grad in found[1].items():
        difference = (grad - expected[1][name]).norm() / expected[1][name].norm()
        assert difference < 2e-2, (name, difference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["bloom", "llama", "mistral"])
def test_a_captured_step_has_the_same_gradients(family, dropout, recompute, dtype):
    by_graph, plain = (tuned(graphs, dtype, recompute, dropout, family) for graphs in (True, False))
    # What is dropped depends on an element's number, which padding changes: with dropout whole buckets only.
    lengths = (50, 50, 33, 64, 50, 60) if dropout == 0.0 else (64, 64, 64)
    for seed, length in enumerate(lengths):
        assert_near(gradients(by_graph, seed, 2, length), gradients(plain, seed, 2, length))
    for seed in range(3):
        assert_near(gradients(by_graph, seed, 1, 128), gradients(plain, seed, 1, 128))
    # Llama has a mask, and with it another size, where a text is padded.
    assert captured(by_graph) == 2


def test_weights_that_change_are_seen():
    by_graph, plain = tuned(True, dropout=0.0), tuned(False, dropout=0.0)
    for model in (by_graph, plain):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for seed in range(4):
            gradients(model, seed)
            optimizer.step()
    assert captured(by_graph) == 1
    assert_near(gradients(by_graph, 9), gradients(plain, 9))


def test_an_adapter_that_is_switched_off_is_noticed():
    by_graph, plain = tuned(True, dropout=0.0), tuned(False, dropout=0.0)
    ids = tokens(2, 50).cuda()

    def logits(model):
        with torch.no_grad():
            return model(input_ids=ids).logits.float()

    for seed in range(3):
        gradients(by_graph, seed)
    assert captured(by_graph) == 1
    with by_graph.disable_adapter(), plain.disable_adapter():
        without = logits(by_graph)
        torch.testing.assert_close(without, logits(plain), rtol=1e-2, atol=1e-2)
    with_adapter = logits(by_graph)
    torch.testing.assert_close(with_adapter, logits(plain), rtol=1e-2, atol=1e-2)
    assert (with_adapter - without).norm() > 0.02 * without.norm()


def test_an_embedding_that_is_trained_too():
    by_graph, plain = tuned(True, dropout=0.0), tuned(False, dropout=0.0)
    for model in (by_graph, plain):
        model.get_base_model().transformer.word_embeddings.weight.requires_grad_(True)
    for seed in range(3):
        found, expected = gradients(by_graph, seed), gradients(plain, seed)
        assert any("word_embeddings" in name for name in found[1])
        assert_near(found, expected)
    assert captured(by_graph) == 1


def test_a_result_of_the_step_before_is_still_there():
    by_graph, plain = tuned(True, dropout=0.0), tuned(False, dropout=0.0)
    ids = tokens(2, 64).cuda()
    for _ in range(4):
        for model in (by_graph, plain):
            model.zero_grad()
        output, expected = (model(input_ids=ids, labels=ids) for model in (by_graph, plain))
        output.loss.backward()
        expected.loss.backward()
    assert captured(by_graph) == 1
    for (name, ours), theirs in zip(by_graph.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_shape_more_keeps_its_input_and_what_it_returns():
    """And nothing else: where blocks have worked and gradients lay, those of other shapes work too."""
    model = tuned(True, dropout=0.0)
    sizes = ((2, 512), (2, 256))
    held = []
    for rows, length in sizes:
        for _ in range(3):
            gradients(model, 0, rows, length)
        model.zero_grad()
        held.append(torch.cuda.memory_allocated())
    assert captured(model) == 2
    rows, length = sizes[1]
    hidden, bias = 64 * rows * length * 2, 4 * rows * length * 4
    assert held[1] - held[0] <= 2 * hidden + bias + 8 * 512


def test_what_is_borrowed_is_the_same_elements_and_does_not_keep_them():
    before = torch.cuda.memory_allocated()
    tensor = torch.arange(20.0, device="cuda")
    found = _borrowed(tensor)
    assert found.data_ptr() == tensor.data_ptr()
    tensor[3] = 7.0
    assert found.tolist() == tensor.tolist()
    del tensor
    assert torch.cuda.memory_allocated() == before


def test_accumulated_gradients():
    by_graph, plain = tuned(True, dropout=0.0), tuned(False, dropout=0.0)
    ids = tokens(2, 64).cuda()
    for model in (by_graph, plain):
        for _ in range(4):
            model(input_ids=ids, labels=ids).loss.backward()
    for (name, ours), theirs in zip(by_graph.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["bloom", "llama", "mistral"])
@pytest.mark.parametrize("padding", [False, True])
def test_decoding_writes_the_same_tokens(family, padding, monkeypatch):
    replays = count_replays(monkeypatch)
    plain, model = (writing_model(family, hidden_size=64).cuda() for _ in range(2))
    optimize_model(model, graphs=True)
    for length, new_tokens in ((9, 20), (9, 20), (14, 30), (5, 3)):
        ids = tokens(2, length).cuda()
        mask = torch.ones_like(ids)
        if padding:
            mask[1, :3] = 0
        settings = {"attention_mask": mask, "max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        expected = plain.generate(ids, **settings)
        found = model.generate(ids, **settings, cache_implementation="static")
        assert found.tolist() == expected.tolist()
    assert len(replays) == 18 + 19 + 29 + 2  # all steps of one token but for the very first one
    assert "forward" not in vars(model.base_model)


@pytest.mark.parametrize("family", ["bloom", "llama", "mistral"])
@pytest.mark.parametrize("sampling", [False, True])
def test_decoding_ends_where_the_texts_end(family, sampling, monkeypatch):
    late = []
    stock = utils.DeferredStopCheck.__call__
    monkeypatch.setattr(utils.DeferredStopCheck, "__call__", lambda *args: (late.append(1), stock(*args))[1])
    plain, model = (writing_model(family, hidden_size=64).cuda() for _ in range(2))
    optimize_model(model, graphs=True)
    ids = tokens(2, 9).cuda()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": sampling, "pad_token_id": 0}

    def written(which, ends, **cache):
        torch.manual_seed(5)
        return [which.generate(ids, **settings, eos_token_id=ends, **cache).tolist() for _ in range(3)]

    whole = written(plain, None)[0]
    for ends in (None, [row[9 + 5] for row in whole], [whole[0][9]]):
        expected = written(plain, ends)
        assert written(model, ends, cache_implementation="static") == expected
    assert late


@contextlib.contextmanager
def chosen(model, adapter: str | None):
    """The model with an adapter, or with none."""
    if adapter is not None:
        model.set_adapter(adapter)
    with model.disable_adapter() if adapter is None else contextlib.nullcontext():
        yield model


def test_decoding_follows_the_adapter():
    by_graph, plain = tuned(True), tuned(False)
    for model in (by_graph, plain):
        model.add_adapter("other", model.peft_config["default"])
        model.eval()  # after it: a new adapter's dropout is on
    torch.manual_seed(7)
    # So large that the three differ: a tiny Bloom repeats the prompt's last token whatever small adapters add.
    strong = {name: torch.randn_like(one) for name, one in by_graph.named_parameters() if ".lora_" in name}
    ids = tokens(1, 9).cuda()
    for model in (by_graph, plain):
        for name, parameter in model.named_parameters():
            if name in strong:
                parameter.data.copy_(strong[name])

    def written(adapter: str | None):
        """Three calls, the second and third by the graph of the first where nothing has changed."""
        settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
        with chosen(by_graph, adapter) as model:
            texts = [model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings) for _ in range(3)]
        assert texts[0].tolist() == texts[1].tolist() == texts[2].tolist()
        return texts[0]

    def falls_short(text, adapter: str | None) -> float:
        """By how much a token's logit is below the largest one, at most, by the model without graphs."""
        with chosen(plain, adapter) as model, torch.no_grad():
            logits = model(input_ids=text[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :].float()
        taken = logits.gather(-1, text[:, ids.shape[1] :, None])[..., 0]
        return (logits.amax(dim=-1) - taken).max().item()

    # The two round otherwise, so that of two tokens that are almost equally likely they may take either.
    order = ("default", "other", "default", None, "other")
    for adapter, text in [(adapter, written(adapter)) for adapter in order]:
        for one in ("default", "other", None):
            assert (falls_short(text, one) < 0.1) == (one == adapter), (adapter, one)


def test_training_gives_the_memory_of_decoding_back():
    model = tuned(True).eval()
    base = model.get_base_model()
    ids = tokens(4, 500).cuda()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    assert len(base._decoding) == 1
    kept = torch.cuda.memory_allocated()
    model.train()
    cache_bytes = 2 * 2 * 4 * 512 * 64 * 2  # two blocks' keys and values, 4 texts, 512 places, 64 features, 2 bytes
    assert kept - torch.cuda.memory_allocated() >= cache_bytes


def count_replays(monkeypatch) -> list[int]:
    found: list[int] = []
    stock = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (found.append(1), stock(graph))[1])
    return found


def test_an_old_graph_in_a_cycle_does_not_end_a_capture():
    old, found = [torch.cuda.CUDAGraph()], torch.zeros(4, device="cuda")
    with torch.cuda.graph(old[0]):
        found.add_(1)
    old.append(old)
    graph = torch.cuda.CUDAGraph()
    before = gc.get_threshold()
    try:
        with capture(graph):
            del old
            gc.set_threshold(1, 1, 1)
            kept = [[number] for number in range(10_000)]  # new containers are what the collector counts
            found.add_(len(kept))
    finally:
        gc.set_threshold(*before)
    graph.replay()
    assert found.tolist() == [10_000.0] * 4
