"""A model's blocks as two CUDA graphs, one forward and one backward, for steps that take the host longer than the GPU.

Room: capture, replay and when not to; torch only.  A step has thousands of small kernels, and Python needs longer to
launch one than it runs.  A graph launches all of them at once.  It has fixed shapes and addresses, so sequences are
padded to a multiple of `BUCKET` tokens, and inputs and gradients are copied.

The graphs of all shapes share one memory pool.  Nothing in it outlives a step, so they may write over each other's.
Between the forward and the backward pass only what is kept for the latter has to stay.  The rest is idle, and the loss
may have it (`idle_memory`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..dropout import randomness
from .recompute import RecomputedBlock

# Texts of all lengths shall meet in a few graphs, and padding cost little.
BUCKET = 64
# Beyond it the GPU has more to do than the host, and the pool of the graphs is large.
MOST_TOKENS = 8192
MOST_GRAPHS = 16
# Before it a GPU takes longer than the host even for a few hundred tokens.
LEAST_CAPABILITY = (8, 0)

Run = Callable[..., Tensor]


class _Ticket:
    """Alive while a forward pass waits for its backward pass.

    Attributes:
        idle: the memory that nothing uses meanwhile, uint8; see `idle_memory`.
    """

    def __init__(self, idle: Tensor) -> None:
        self.idle = idle


class BlocksGraph:
    """The two graphs of one shape.

    Args:
        run: (hidden, *others) -> hidden, a sum, whose gradient does not need its value.
        hidden: [batch, T, hidden size], as of every later call; the gradient flows to it if it requires one.
        others: tensors that `run` takes beside it, likewise; no gradient flows to them.
        parameters: the trainable ones that `run` uses.
        flat: float32, for the gradients of all of them.
        pool: of `torch.cuda.graph_pool_handle`.

    Attributes:
        idle: uint8, memory of the pool that nothing uses from the end of the forward pass to the backward pass.
    """

    def __init__(
        self,
        run: Run,
        hidden: Tensor,
        others: tuple[Tensor, ...],
        parameters: list[nn.Parameter],
        flat: Tensor,
        pool: Any,
    ) -> None:
        self._hidden = hidden.detach().clone().requires_grad_(hidden.requires_grad)
        self._others = [tensor.detach().clone() for tensor in others]
        self._flat = flat
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: the data loader's threads may do as they like meanwhile.
        with torch.enable_grad(), torch.cuda.graph(self._forward, pool=pool, capture_error_mode="thread_local"):
            out = run(self._hidden, *self._others)
        # It is read no more when its gradient is there, which takes its place.
        self._out = out.detach()
        # The forward pass is done with cuBLAS' workspace as well.
        torch._C._cuda_clearCublasWorkspaces()
        self.idle = _largest_free_in(pool, hidden.device)
        with torch.cuda.graph(self._backward, pool=pool, capture_error_mode="thread_local"):
            grads = torch.autograd.grad(
                out, [*parameters, *([self._hidden] if hidden.requires_grad else [])], self._out
            )
            torch.cat([grad.reshape(-1) for grad in grads[: len(parameters)]], out=flat)
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
        ctx.graph, ctx.ticket = graph, _Ticket(graph.idle)
        graphs.waiting = weakref.ref(ctx.ticket)
        return graph.forward(hidden, others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.ticket is None:
            raise RuntimeError("a step by CUDA graphs has one backward pass: call optimize_model with graphs=False")
        ctx.ticket = None
        grad_hidden, gradients = ctx.graph.backward(grads[0])
        return (None, None, grad_hidden, None, *gradients)


class _Blocks:
    """What a graph has fixed of the blocks: the modules, which adapters act, and which parameters are trained.

    Reading all of it takes longer than a small step may, so it is read once, and then only compared.  Where parameters
    lie is not looked at: `Graphs.forget` is for those who move them.
    """

    def __init__(self, blocks: nn.Module) -> None:
        self.trained = [parameter for parameter in blocks.parameters() if parameter.requires_grad]
        self._modules = [(module, tuple(module._modules.values())) for module in blocks.modules()]
        self._plain = [parameter for parameter in blocks.parameters() if type(parameter) is nn.Parameter]
        self._needs = [parameter.requires_grad for parameter in self._plain]
        self._choosing = [module for module, _ in self._modules if _has_choices(module)]
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
        if any(tuple(module._modules.values()) != children for module, children in self._modules):
            return False
        return [parameter.requires_grad for parameter in self._plain] == self._needs and self._choices == [
            _choices(module) for module in self._choosing
        ]

    def listened_to(self) -> bool:
        """Whether a module has hooks, which a graph would not call."""
        return any(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module, _ in self._modules
        )


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
        self._flat: Any = None
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
            if is_first or len(self) >= MOST_GRAPHS:
                return run(hidden, *others)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            if self._flat is None:
                self._flat = torch.empty(sum(map(Tensor.numel, trained)), device=hidden.device)
            graph = self._graphs[key] = BlocksGraph(run, hidden, others, trained, self._flat, self._pool)
            self._uncounted = _uncounted_in(self._pool)
        return _Replay.apply(self, graph, hidden, others, *trained)


def uncounted_bytes() -> int:
    """Memory that the graphs of all models work in.  torch counts it as reserved, and as allocated only in part."""
    return sum(graphs._uncounted for graphs in _ALL)


def idle_memory(device: torch.device) -> Tensor | None:
    """Memory of graphs, uint8, that nothing uses while a forward pass waits for its backward pass; None if none does.

    For what begins and ends between the two.  The allocator knows nothing of it.
    """
    tickets = [ticket for graphs in _ALL if (ticket := graphs.waiting()) is not None]
    return max((t.idle for t in tickets if t.idle.device == device), key=Tensor.numel, default=None)


def _uncounted_in(pool: Any) -> int:
    return sum(segment["total_size"] - segment["allocated_size"] for segment in _segments_of(pool))


def _largest_free_in(pool: Any, device: torch.device) -> Tensor:
    """The largest block of a pool that is free, which the pool may still give away: uint8, empty if there is none."""
    free = [block for segment in _segments_of(pool) for block in segment["blocks"] if block["state"] == "inactive"]
    memory = torch.empty(0, dtype=torch.uint8, device=device)
    if free:
        largest = max(free, key=lambda block: block["size"])
        memory.set_(torch._C._construct_storage_from_data_pointer(largest["address"], device, largest["size"]))
    return memory


def _segments_of(pool: Any) -> list[dict[str, Any]]:
    return [segment for segment in torch.cuda.memory_snapshot() if segment["segment_pool_id"] == pool]


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
