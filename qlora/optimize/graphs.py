"""A model's blocks as two CUDA graphs, one forward and one backward, for steps that take the host longer than the GPU.

Room: capture, replay and when not to; torch only.  A step has thousands of small kernels, and Python needs longer to
launch one than it runs.  A graph launches all of them at once.  It has fixed shapes and addresses, so sequences are
padded to a multiple of `BUCKET` tokens, and inputs and gradients are copied.

The graphs of all shapes share one memory pool.  Nothing in it outlives a step, so they may write over each other's.
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
    """Alive while a forward pass waits for its backward pass."""


class BlocksGraph:
    """The two graphs of one shape.

    Args:
        run: (hidden, *inputs) -> hidden.
        inputs: tensors of the shapes and dtypes of every later call: hidden, and what `run` takes beside it.
        parameters: the trainable ones that `run` uses.
        flat: float32, for the gradients of all of them.
        pool: of `torch.cuda.graph_pool_handle`.
    """

    def __init__(
        self, run: Run, inputs: tuple[Tensor, ...], parameters: list[nn.Parameter], flat: Tensor, pool: Any
    ) -> None:
        self.inputs = [tensor.detach().clone() for tensor in inputs]
        self.flat = flat
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: the data loader's threads may do as they like meanwhile.
        with torch.enable_grad(), torch.cuda.graph(self._forward, pool=pool, capture_error_mode="thread_local"):
            out = run(*self.inputs)
        self.out = out.detach()
        self.grad_out = torch.empty_like(self.out)
        with torch.cuda.graph(self._backward, pool=pool, capture_error_mode="thread_local"):
            grads = torch.autograd.grad(out, parameters, self.grad_out)
            torch.cat([grad.reshape(-1) for grad in grads], out=flat)
        self._shapes = [parameter.shape for parameter in parameters]

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """What `run` returns."""
        for static, tensor in zip(self.inputs, inputs, strict=True):
            static.copy_(tensor)
        self._forward.replay()
        return self.out.clone()

    def backward(self, grad: Tensor) -> list[Tensor]:
        """The parameters' gradients of the forward pass before."""
        self.grad_out.copy_(grad)
        self._backward.replay()
        parts = self.flat.clone().split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: Graphs, graph: BlocksGraph, inputs: tuple[Tensor, ...], *parameters: Any) -> Tensor:
        ctx.graph, ctx.ticket = graph, _Ticket()
        graphs.waiting = weakref.ref(ctx.ticket)
        return graph.forward(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.ticket is None:
            raise RuntimeError("a step by CUDA graphs has one backward pass: call optimize_model with graphs=False")
        ctx.ticket = None
        return (None, None, None, *ctx.graph.backward(grads[0]))


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


class Graphs:
    """The graphs of one model's blocks, by shape.  A copy of the model begins without any."""

    def __init__(self) -> None:
        self.waiting: Callable[[], _Ticket | None] = lambda: None
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def forget(self) -> None:
        """Capture everything anew: parameters have moved."""
        self._blocks: _Blocks | None = None
        self._seen: set[Any] = set()
        self._graphs: dict[Any, BlocksGraph] = {}
        self._pool: Any = None
        self._flat: Any = None

    def __len__(self) -> int:
        """Shapes that have a graph."""
        return len(self._graphs)

    def __call__(self, run: Run, blocks: nn.Module, *inputs: Tensor) -> Tensor:
        """run(*inputs), by a graph where there is one for these shapes.

        Args:
            run: as in `BlocksGraph`; the gradient flows to the blocks' parameters only.
            blocks: whose modules and parameters `run` uses.
        """
        if self._blocks is None or not self._blocks.unchanged():
            self.forget()
            self._blocks = _Blocks(blocks)
        if self.waiting() is not None or not self._blocks.can_capture or self._blocks.listened_to():
            return run(*inputs)
        trained, key = self._blocks.trained, tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        graph = self._graphs.get(key)
        if graph is None:
            # A shape's first step runs as ever: kernels are compiled, and one that never comes again costs nothing.
            is_first = key not in self._seen
            self._seen.add(key)
            if is_first or len(self) >= MOST_GRAPHS:
                return run(*inputs)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            if self._flat is None:
                self._flat = torch.empty(sum(map(Tensor.numel, trained)), device=inputs[0].device)
            graph = self._graphs[key] = BlocksGraph(run, inputs, trained, self._flat, self._pool)
        return _Replay.apply(self, graph, inputs, *trained)


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
