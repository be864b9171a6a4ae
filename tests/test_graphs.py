"""When a step is captured and when not, with graphs that are none; tests/gpu/test_graphs.py has the real ones."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from qlora.dropout import SeededDropout
from qlora.optimize import graphs as graphs_module
from qlora.optimize.graphs import Graphs


class Pretended:
    """Stands for `BlocksGraph`: runs at once, and keeps autograd's graph for the backward pass."""

    def __init__(self, run, inputs, parameters, flat, pool):
        self.run, self.parameters = run, parameters
        assert flat.numel() == sum(parameter.numel() for parameter in parameters)

    def forward(self, inputs):
        with torch.enable_grad():
            self.out = self.run(*inputs)
        return self.out.detach().clone()

    def backward(self, grad):
        return torch.autograd.grad(self.out, self.parameters, grad)


@pytest.fixture(autouse=True)
def _pretended(monkeypatch):
    monkeypatch.setattr(graphs_module, "BlocksGraph", Pretended)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
    layers[0][0].requires_grad_(False)
    return layers


def step(graphs: Graphs, blocks: nn.ModuleList, length: int = 3) -> dict[str, torch.Tensor]:
    def run(hidden):
        for block in blocks:
            hidden = block(hidden)
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
    step(graphs, blocks, length=5)
    assert len(graphs) == 1
    step(graphs, blocks, length=5)
    assert len(graphs) == 2


def test_no_more_than_so_many(blocks, monkeypatch):
    monkeypatch.setattr(graphs_module, "MOST_GRAPHS", 1)
    graphs = Graphs()
    for length in (2, 2, 3, 3):
        assert step(graphs, blocks, length)
    assert len(graphs) == 1


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


def listen(blocks):
    blocks[0].register_forward_hook(lambda *_: None)


def drop_by_torch(blocks):
    blocks[0].append(nn.Dropout(0.1))


@pytest.mark.parametrize("change", [listen, drop_by_torch])
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
            hidden = block(hidden)
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
        return blocks[1](blocks[0](hidden))

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
