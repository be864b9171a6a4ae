"""A model's blocks as two CUDA graphs, one forward and one backward, for steps that take the host longer than the GPU.

Room: capture, replay and when not to; torch only.  A step has thousands of small kernels, and Python needs longer to
launch one than it runs.  A graph launches all of them at once.  It has fixed shapes and addresses, so sequences are
padded to a multiple of `BUCKET` tokens, and inputs and gradients are copied.

The graphs of all shapes share one memory pool.  Nothing in it outlives a step, so they may write over each other's.  A
small shape finds room in the pieces of a larger one's memory, but not the other way round: so the largest is captured
first, and smaller ones again when they come back.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.grad_mode import set_multithreading_enabled

from ..dropout import randomness
from .capture import capture
from .recompute import RecomputedBlock
from .state import has_hooks

# Texts of all lengths shall meet in a few graphs, and padding cost little.
BUCKET = 64
# Beyond it the GPU has more to do than the host, and the pool of the graphs is large.
MOST_TOKENS = 8192
MOST_GRAPHS = 16
# Before it a GPU takes longer than the host even for a few hundred tokens.
LEAST_CAPABILITY = (8, 0)

Run = Callable[..., Tensor]


class _Ticket:
    """Alive while a forward pass waits for its backward pass."""


class BlocksGraph:
    """The two graphs of one shape.

    Args:
        run: (hidden, *others) -> hidden, a sum, whose gradient does not need its value.
        blocks: whose modules and parameters `run` uses.
        hidden: [batch, T, hidden size], as of every later call; the gradient flows to it if it requires one.
        others: tensors that `run` takes beside it, likewise; no gradient flows to them.
        parameters: the trainable ones that `run` uses, float32.
        pool: of `torch.cuda.graph_pool_handle`.
    """

    def __init__(
        self,
        run: Run,
        blocks: nn.Module,
        hidden: Tensor,
        others: tuple[Tensor, ...],
        parameters: list[nn.Parameter],
        pool: Any,
    ) -> None:
        self._hidden = hidden.detach().clone().requires_grad_(hidden.requires_grad)
        self._others = [tensor.detach().clone() for tensor in others]
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _fresh(blocks, parameters) as leaves:
            with torch.enable_grad(), capture(self._forward, pool=pool):
                out = run(self._hidden, *self._others)
            # It is read no more when its gradient is there, which takes its place.
            self._out = out.detach()
            # In one thread, because cuBLAS has a workspace for each.
            with set_multithreading_enabled(False), capture(self._backward, pool=pool):
                inputs = [*leaves, *([self._hidden] if hidden.requires_grad else [])]
                grads = torch.autograd.grad(out, inputs, self._out)
                flat = torch.cat([grad.reshape(-1) for grad in grads[: len(leaves)]])
        self._flat = _borrowed(flat)
        self._grad_hidden = grads[-1] if hidden.requires_grad else None
        self._shapes = [parameter.shape for parameter in parameters]

    def forward(self, hidden: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        """What `run` returns, until the backward pass."""
        for static, tensor in zip((self._hidden, *self._others), (hidden, *others), strict=True):
            static.copy_(tensor)
        self._forward.replay()
        return self._out.detach()

    def backward(self, grad: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients of hidden and of the parameters, of the forward pass before."""
        self._out.copy_(grad)
        self._backward.replay()
        parts = self._flat.clone().split([shape.numel() for shape in self._shapes])
        grads = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        return None if self._grad_hidden is None else self._grad_hidden.clone(), grads


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graphs: Graphs, graph: BlocksGraph, hidden: Tensor, others: tuple[Tensor, ...], *parameters: Any
    ) -> Tensor:
        ctx.graph, ctx.ticket = graph, _Ticket()
        graphs.waiting = weakref.ref(ctx.ticket)
        return graph.forward(hidden, others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.ticket is None:
            raise RuntimeError("a step by CUDA graphs has one backward pass: call optimize_model with graphs=False")
        graph, ctx.graph, ctx.ticket = ctx.graph, None, None
        grad_hidden, gradients = graph.backward(grads[0])
        return (None, None, grad_hidden, None, *gradients)


class _Blocks:
    """What a graph has fixed of the blocks: the modules, which adapters act, and which parameters are trained.

    Reading all of it takes longer than a small step may, so it is read once, and then only compared.  Where parameters
    lie is not looked at: `Graphs.forget` is for those who move them.
    """

    def __init__(self, blocks: nn.Module) -> None:
        self.trained = [parameter for parameter in blocks.parameters() if parameter.requires_grad]
        self._modules = [*blocks.modules()]
        self._children = self._children_now()
        self._plain = [parameter for parameter in blocks.parameters() if type(parameter) is nn.Parameter]
        self._needs = [parameter.requires_grad for parameter in self._plain]
        self._choosing = [module for module in self._modules if _has_choices(module)]
        self._choices = [_choices(module) for module in self._choosing]
        # torch's dropout cannot be recomputed, offloading copies to the host, and gradients are kept in float32.
        self.can_capture = (
            bool(self.trained)
            and all(parameter.dtype == torch.float32 for parameter in self.trained)
            and not randomness(blocks)[1]
            and not any(isinstance(module, RecomputedBlock) and module.offload for module in self._choosing)
        )

    def unchanged(self) -> bool:
        """Whether all of it is as it was."""
        if self._children_now() != self._children:
            return False
        return [parameter.requires_grad for parameter in self._plain] == self._needs and self._choices == [
            _choices(module) for module in self._choosing
        ]

    def listened_to(self) -> bool:
        """Whether a module has hooks, which a graph would not call."""
        return any(map(has_hooks, self._modules))

    def _children_now(self) -> list[nn.Module | None]:
        return [child for module in self._modules for child in module._modules.values()]


def _has_choices(module: nn.Module) -> bool:
    return isinstance(module, (nn.Dropout, RecomputedBlock)) or hasattr(module, "active_adapters")


def _choices(module: Any) -> tuple[Any, ...]:
    if isinstance(module, nn.Dropout):
        return module.p, module.training
    if isinstance(module, RecomputedBlock):
        return module.recompute, module.offload, module.recomputes
    return (module.disable_adapters, *module.active_adapters, *module.merged_adapters, *module.scaling.values())


_ALL: weakref.WeakSet[Graphs] = weakref.WeakSet()


class Graphs:
    """The graphs of one model's blocks, by shape.  A copy of the model begins without any."""

    def __init__(self) -> None:
        self.waiting: Callable[[], _Ticket | None] = lambda: None
        self.forget()
        _ALL.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def forget(self) -> None:
        """Capture everything anew: parameters have moved."""
        self._blocks: _Blocks | None = None
        self._seen: set[Any] = set()
        self._graphs: dict[Any, BlocksGraph] = {}
        self._pool: Any = None
        self._uncounted = 0

    def __len__(self) -> int:
        """Shapes that have a graph."""
        return len(self._graphs)

    def __call__(self, run: Run, blocks: nn.Module, hidden: Tensor, *others: Tensor) -> Tensor:
        """run(hidden, *others), by a graph where there is one for these shapes.

        Args:
            run, hidden, others: as in `BlocksGraph`.
            blocks: whose modules and parameters `run` uses.
        """
        if self._blocks is None or not self._blocks.unchanged():
            self.forget()
            self._blocks = _Blocks(blocks)
        if self.waiting() is not None or not self._blocks.can_capture or self._blocks.listened_to():
            return run(hidden, *others)
        trained = self._blocks.trained
        key = (hidden.requires_grad, *((tensor.shape, tensor.dtype) for tensor in (hidden, *others)))
        graph = self._graphs.get(key)
        if graph is None:
            # A shape's first step runs as ever: kernels are compiled, and one that never comes again costs nothing.
            is_first = key not in self._seen
            self._seen.add(key)
            is_largest = all(hidden.numel() > shape.numel() for _, (shape, _), *_ in self._graphs)
            if is_first or (len(self) >= MOST_GRAPHS and not is_largest):
                return run(hidden, *others)
            if is_largest:
                self._graphs.clear()
                self._pool = torch.cuda.graph_pool_handle()
            graph = self._graphs[key] = BlocksGraph(run, blocks, hidden, others, trained, self._pool)
            self._uncounted = _uncounted_in(self._pool)
        return _Replay.apply(self, graph, hidden, others, *trained)


def uncounted_bytes() -> int:
    """Memory that the graphs of all models work in.  torch counts it as reserved, and as allocated only in part."""
    return sum(graphs._uncounted for graphs in _ALL)


@contextlib.contextmanager
def _fresh(blocks: nn.Module, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Within it the modules have other parameters with the same memory, which are yielded.

    As long as a result of an earlier step is alive, autograd gathers a parameter's gradient on that step's stream, for
    which a capture must not wait.  And a plain loop holds its last output until it has a new one.
    """
    fresh = {parameter: nn.Parameter(parameter.detach()) for parameter in parameters}
    places = [
        (module._parameters, name, parameter)
        for module in blocks.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in fresh
    ]
    try:
        for owner, name, parameter in places:
            owner[name] = fresh[parameter]
        yield list(fresh.values())
    finally:
        for owner, name, parameter in places:
            owner[name] = parameter


class _Place:
    """Where a tensor lies, by CUDA's array interface; its memory is not kept."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = tensor.__cuda_array_interface__


def _borrowed(tensor: Tensor) -> Tensor:
    """The same elements, while their memory is given back to the pool, where blocks work.

    They are there from the graph that writes them to the next one of any shape, and are copied in between.
    """
    return torch.as_tensor(_Place(tensor), device=tensor.device)


def _uncounted_in(pool: Any) -> int:
    segments = [segment for segment in torch.cuda.memory_snapshot() if segment["segment_pool_id"] == pool]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in segments)


def can_capture(blocks: nn.Module, hidden: Tensor) -> bool:
    """Whether a pass of these hidden states through the blocks is one for `Graphs`."""
    return (
        hidden.is_cuda
        and blocks.training
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and hidden.shape[0] * hidden.shape[1] <= MOST_TOKENS
        and torch.cuda.get_device_capability(hidden.device) >= LEAST_CAPABILITY
    )
