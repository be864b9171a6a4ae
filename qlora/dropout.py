"""Dropout of an adapter's input, by seeds that recomputation is given again.

Room: which seed, and the module; torch and qkernels.  Neither a mask nor the dropped input is kept for the backward
pass: both are made again from the seed.  Whoever recomputes draws the seeds outside of what it recomputes
(`draw_seeds`) and hands them in (`seeded`); anyone else leaves it to the module, which draws from torch's generator.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import seeded_dropout

_active = threading.local()  # the backward pass recomputes in a thread of its own


class SeededDropout(nn.Dropout):
    """`nn.Dropout` by a seed."""

    def draw(self, device: torch.device) -> Tensor | None:
        """int64[1], the seed for one pass; None where nothing is dropped."""
        if not self.training or self.p == 0.0:
            return None
        seeds = getattr(_active, "seeds", None)
        return draw_seeds(1, device) if seeds is None else next(seeds)

    def forward(self, x: Tensor) -> Tensor:
        seed = self.draw(x.device)
        return x if seed is None else _Dropout.apply(x, self.p, seed)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return seeded_dropout(x, p, seed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Dropout.apply(grads[0], ctx.p, ctx.seed), None, None


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """int64[count] from torch's generator of the device."""
    return torch.randint(2**63 - 1, (count,), device=device)


@contextmanager
def seeded(seeds: Tensor) -> Iterator[None]:
    """Within, in this thread, each pass through a `SeededDropout` takes the next of these seeds."""
    before = getattr(_active, "seeds", None)
    _active.seeds = iter(seeds.split(1))
    try:
        yield
    finally:
        _active.seeds = before


def randomness(module: nn.Module) -> tuple[int, bool]:
    """How many seeds a pass through the module may take, and whether it draws from torch's generator besides."""
    dropouts = [child for child in module.modules() if isinstance(child, nn.Dropout) and child.p and child.training]
    by_seed = sum(isinstance(dropout, SeededDropout) for dropout in dropouts)
    return by_seed, by_seed < len(dropouts)
