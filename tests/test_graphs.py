"""When a step is captured and when not, with graphs that are none; the real ones: tests/gpu/test_captured_steps.py."""

from __future__ import annotations

import contextlib
import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model, tokens
from torch import nn
from torch.nn import functional as F

from qlora import optimize_model, prepare_model_for_training
from qlora.dropout import SeededDropout
from qlora.optimize import bloom, llama
from qlora.optimize import graphs as graphs_module
from qlora.optimize.capture import capture
from qlora.optimize.graphs import Graphs
from qlora.optimize.recompute import RECOMPUTE, RecomputedBlock


class Pretended:
    """Stands for `BlocksGraph`: runs at once, and keeps autograd's graph for the backward pass.

    As there, the gradient takes the place of what was returned; autograd would notice if it needed that still.
    """

    def __init__(self, run, blocks, hidden, others, parameters, pool):
        self.run, self.parameters = run, parameters

    def forward(self, hidden, others):
        self.hidden = hidden.detach().requires_grad_(hidden.requires_grad)
        with torch.enable_grad():
            self.out = self.run(self.hidden, *others)
        return self.out.detach()

    def backward(self, grad):
        needed = [*self.parameters, *([self.hidden] if self.hidden.requires_grad else [])]
        grads = torch.autograd.grad(self.out, needed, self.out.detach().copy_(grad))
        return (grads[-1] if self.hidden.requires_grad else None), grads[: len(self.parameters)]


@pytest.fixture(autouse=True)
def _pretended(monkeypatch):
    monkeypatch.setattr(graphs_module, "BlocksGraph", Pretended)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", list)


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
    layers[0][0].requires_grad_(False)
    return layers


def step(graphs: Graphs, blocks: nn.ModuleList, length: int = 3) -> dict[str, torch.Tensor]:
    def run(hidden):
        for block in blocks:
            hidden = hidden + block(hidden)
        return hidden

    blocks.zero_grad()
    hidden = torch.ones(2, length, 4)
    graphs(run, blocks, hidden).square().sum().backward()
    return {name: parameter.grad for name, parameter in blocks.named_parameters() if parameter.grad is not None}


def test_the_second_step_of_a_shape_is_captured_and_equal(blocks):
    graphs = Graphs()
    first = step(graphs, blocks)
    assert len(graphs) == 0
    for _ in range(3):
        again = step(graphs, blocks)
        assert len(graphs) == 1
        assert again.keys() == first.keys() == {"1.0.weight", "1.0.bias"}
        for name, grad in again.items():
            assert torch.equal(grad, first[name])
    step(graphs, blocks, length=2)
    assert len(graphs) == 1
    step(graphs, blocks, length=2)
    assert len(graphs) == 2


def test_the_largest_is_captured_first_and_smaller_ones_again(blocks):
    graphs = Graphs()
    expected = {length: step(graphs, blocks, length) for length in (3, 5)}
    step(graphs, blocks, 3)
    pool = graphs._pool
    step(graphs, blocks, 5)
    assert len(graphs) == 1
    assert graphs._pool is not pool
    pool = graphs._pool
    for length in (3, 5, 3):
        found = step(graphs, blocks, length)
        assert len(graphs) == 2
        assert graphs._pool is pool
        for name, grad in found.items():
            assert torch.equal(grad, expected[length][name])


def test_the_gradient_flows_on_to_what_comes_before(blocks):
    graphs = Graphs()
    scale = torch.tensor(1.5, requires_grad=True)

    def gradient():
        hidden = torch.ones(2, 3, 4) * scale
        return torch.autograd.grad(graphs(lambda x: x + blocks[1](blocks[0](x)), blocks, hidden).sum(), scale)[0]

    first = gradient()
    assert torch.equal(gradient(), first)
    assert len(graphs) == 1
    assert first != 0


def test_what_goes_in_beside_and_whether_a_gradient_comes_out_are_of_the_shape(blocks):
    graphs = Graphs()

    def run(hidden, *others):
        return sum(map(torch.sum, others), hidden + blocks[1](blocks[0](hidden)))

    kinds = [((), False), ((), True), ((torch.ones(1),), False), ((torch.ones(2),), False)]
    kinds += [((torch.ones(2, dtype=torch.float64),), False)]
    for number, (others, needs) in enumerate(kinds):
        for captured in (number, number + 1):
            hidden = torch.ones(2, 3, 4, requires_grad=needs)
            graphs(run, blocks, hidden, *others).sum().backward()
            assert len(graphs) == captured
            assert (hidden.grad is not None) == needs


def test_no_more_than_so_many(blocks, monkeypatch):
    monkeypatch.setattr(graphs_module, "MOST_GRAPHS", 1)
    graphs = Graphs()
    for length in (3, 3, 2, 2, 2):
        assert step(graphs, blocks, length)
    assert lengths(graphs) == {3}
    for length in (4, 4):  # a larger one takes the place of the others
        assert step(graphs, blocks, length)
    assert lengths(graphs) == {4}


def lengths(graphs: Graphs) -> set[int]:
    return {shape[1] for _, (shape, _), *_ in graphs._graphs}


def freeze(blocks):
    blocks[1][0].bias.requires_grad_(False)


def exchange(blocks):
    blocks[0][1] = nn.ReLU()


def drop(blocks):
    blocks[0].append(SeededDropout(0.1))


@pytest.mark.parametrize("change", [freeze, exchange, drop])
def test_a_change_of_the_blocks_is_noticed(blocks, change):
    graphs = Graphs()
    step(graphs, blocks)
    step(graphs, blocks)
    assert len(graphs) == 1
    change(blocks)
    changed = step(graphs, blocks)
    assert len(graphs) == 0
    for name, grad in step(Graphs(), blocks).items():
        if change is not drop:
            assert torch.equal(grad, changed[name])
    step(graphs, blocks)
    assert len(graphs) == 1


class Adapted(nn.Identity):
    """What peft's layers say of themselves."""

    def __init__(self):
        super().__init__()
        self.disable_adapters, self.active_adapters = False, ["one"]
        self.merged_adapters, self.scaling = [], {"one": 1.0, "two": 1.0}


class Recomputed(RecomputedBlock, nn.Identity):
    pass


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lambda: SeededDropout(0.1), "p", 0.2),
        (lambda: SeededDropout(0.1), "training", False),
        (Adapted, "disable_adapters", True),
        (Adapted, "active_adapters", ["two"]),
        (Adapted, "merged_adapters", ["one"]),
        (Adapted, "scaling", {"one": 2.0, "two": 1.0}),
        (Recomputed, "recompute", "parts"),
        (Recomputed, "gradient_checkpointing", True),
    ],
)
def test_what_a_module_is_told_is_noticed(blocks, make, name, value):
    module = make()
    blocks[0].append(module)
    graphs = Graphs()
    step(graphs, blocks), step(graphs, blocks)
    assert len(graphs) == 1
    setattr(module, name, value)
    step(graphs, blocks)
    assert len(graphs) == 0


@pytest.mark.parametrize(
    ("differs", "expected"),
    [
        ({}, True),
        ({"is_cuda": False}, False),
        ({"training": False}, False),
        ({"grad": False}, False),
        ({"compiling": True}, False),
        ({"tokens": graphs_module.MOST_TOKENS + 1}, False),
        ({"capability": (7, 5)}, False),
    ],
)
def test_which_passes_are_captured(monkeypatch, differs, expected):
    case = {"is_cuda": True, "training": True, "grad": True, "compiling": False, "capability": (8, 0)}
    case |= {"tokens": graphs_module.MOST_TOKENS} | differs
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case["capability"])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: case["compiling"])
    hidden = SimpleNamespace(is_cuda=case["is_cuda"], shape=(1, case["tokens"], 8), device="cuda")
    with torch.set_grad_enabled(case["grad"]):
        assert graphs_module.can_capture(SimpleNamespace(training=case["training"]), hidden) is expected


def listen(blocks):
    blocks[0].register_forward_hook(lambda *_: None)


def listen_before(blocks):
    blocks[0].register_forward_pre_hook(lambda *_: None)


def listen_backward(blocks):
    blocks[1].register_full_backward_hook(lambda *_: None)


def drop_by_torch(blocks):
    blocks[0].append(nn.Dropout(0.1))


def train_in_16_bits(blocks):
    blocks[1].more = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))


class Offloaded(RecomputedBlock, nn.Identity):
    offload = True


def offload(blocks):
    blocks[0].append(Offloaded())


@pytest.mark.parametrize("change", [listen, listen_before, listen_backward, drop_by_torch, train_in_16_bits, offload])
def test_what_a_graph_would_leave_out_runs_launch_by_launch(blocks, change):
    graphs = Graphs()
    change(blocks)
    for _ in range(3):
        assert step(graphs, blocks)
    assert len(graphs) == 0


def test_two_forward_passes_before_a_backward_pass(blocks):
    """The second one must not write over what the first one left."""
    graphs = Graphs()
    step(graphs, blocks)
    step(graphs, blocks)

    def run(hidden):
        for block in blocks:
            hidden = hidden + block(hidden)
        return hidden

    one, two = torch.ones(2, 3, 4), torch.full((2, 3, 4), 2.0)
    blocks.zero_grad()
    (graphs(run, blocks, one).sum() + graphs(run, blocks, two).sum()).backward()
    found = blocks[1][0].weight.grad.clone()
    blocks.zero_grad()
    (run(one).sum() + run(two).sum()).backward()
    torch.testing.assert_close(found, blocks[1][0].weight.grad)
    # A forward pass whose result is thrown away blocks nothing.
    out = graphs(run, blocks, one)
    assert graphs.waiting() is not None
    del out
    gc.collect()
    assert graphs.waiting() is None


def test_one_backward_pass(blocks):
    graphs = Graphs()
    step(graphs, blocks)

    def run(hidden):
        return hidden + blocks[1](blocks[0](hidden))

    loss = graphs(run, blocks, torch.ones(2, 3, 4)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="graphs=False"):
        loss.backward()


def test_a_copy_begins_without_graphs(blocks):
    graphs = Graphs()
    step(graphs, blocks)
    step(graphs, blocks)
    assert len(copy.deepcopy(graphs)) == 0
    graphs.forget()
    assert len(graphs) == 0


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_is_captured_of_llama_is_its_blocks(family, side, checkpointing, monkeypatch):
    """Padded to a bucket, with the padding's mask."""
    mask = torch.ones(2, 9, dtype=torch.long)
    if side is not None:
        mask[1, slice(3) if side == "left" else slice(6, None)] = 0
    real = mask[:, :, None].float()

    def gradients(by_graph):
        seen = []
        monkeypatch.setattr(llama, "can_capture", lambda *_: by_graph)
        monkeypatch.setattr(
            Graphs, "__call__", lambda self, run, blocks, *inputs: (seen.append(inputs), run(*inputs))[1]
        )
        model = prepare_model_for_training(optimize_model(tiny_model(family), graphs=True), checkpointing).train()
        model.model.layers.requires_grad_(True)
        out = model.model(tokens(), attention_mask=mask, use_cache=False).last_hidden_state
        (out * real).square().sum().backward()
        assert [inputs[0].shape for inputs in seen] == [(2, 64, 48)] * by_graph
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found, expected = gradients(True), gradients(False)
    assert found.keys() == expected.keys()
    assert found
    for name, grad in found.items():
        assert grad.isfinite().all()
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-4)


def test_a_slice_of_all_blocks_is_one_and_others_are_as_ever():
    layers = optimize_model(tiny_model("llama"), graphs=True).model.layers
    assert len(layers[:2]) == 1
    assert list(layers[:1]) == [layers[0]]
    assert list(layers) == [layers[0], layers[1]]
    layers = optimize_model(tiny_model("llama"), graphs=False).model.layers
    assert list(layers[:2]) == [layers[0], layers[1]]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("family", ["bloom", "llama", "mistral"])
def test_it_is_captured_unless_told_otherwise(family, graphs):
    model = optimize_model(tiny_model(family), **({} if graphs else {"graphs": False}))
    assert model.graphed_decoding is graphs
    base = model.base_model
    assert (getattr(base, "layers", base).graphs is not None) is graphs


def test_parameters_are_fresh_ones_while_it_is_captured(blocks):
    blocks[1].tied = blocks[1][0]
    trained = [parameter for parameter in blocks.parameters() if parameter.requires_grad]
    before = dict(blocks.named_parameters())
    kept = blocks[1](blocks[0](torch.ones(4)))  # and with it autograd's nodes
    with graphs_module._fresh(blocks, trained) as leaves:
        within = dict(blocks.named_parameters())
        assert within["1.0.weight"] is leaves[0]
        assert within["0.0.weight"] is before["0.0.weight"]
        for leaf, parameter in zip(leaves, trained, strict=True):
            assert leaf is not parameter
            assert leaf.data_ptr() == parameter.data_ptr()
        out = blocks[1](blocks[0](torch.ones(4)))
        assert all(grad is not None for grad in torch.autograd.grad(out.sum(), leaves))
        assert blocks[1].tied.weight is leaves[0]
    after = dict(blocks.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in after)
    kept.sum().backward()
    assert before["1.0.weight"].grad is not None


@pytest.mark.parametrize("family", ["bloom", "llama", "mistral"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_no_block_needs_what_it_returned_when_its_gradient_is_there(family, recompute, monkeypatch):
    """The gradient takes its place, in `Pretended` as in `BlocksGraph`."""
    monkeypatch.setattr(llama, "can_capture", lambda *_: True)
    monkeypatch.setattr(bloom.BloomModel, "_is_for_graphs", lambda *_: True)

    def attention(query, key, value, bias, dropout):  # on a CPU the bias has causality in it
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.bias)

    monkeypatch.setattr(bloom, "alibi_attention", attention)
    model = optimize_model(prepare_model_for_training(tiny_model(family)), recompute=recompute).train()
    base = model.base_model
    blocks = base.h if family == "bloom" else base.layers
    blocks.requires_grad_(True)
    steps = []
    for _ in range(2):
        model.zero_grad()
        base(tokens(2, 64), use_cache=False).last_hidden_state.square().sum().backward()
        steps.append({name: p.grad.clone() for name, p in blocks.named_parameters()})
    assert len(base.graphs if family == "bloom" else blocks.graphs) == 1
    for name, grad in steps[1].items():
        torch.testing.assert_close(grad, steps[0][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_during_a_capture(monkeypatch, collects):
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: contextlib.nullcontext())
    try:
        (gc.enable if collects else gc.disable)()
        with capture(None):
            assert not gc.isenabled()
        assert gc.isenabled() == collects
        with pytest.raises(ZeroDivisionError), capture(None):
            raise ZeroDivisionError
        assert gc.isenabled() == collects
    finally:
        gc.enable()
