"""The measured modules: one linear layer, where the host's part of a call counts, in inference and in training."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import torch

import qlora

from .operations import Measured, Provider
from .products import RIVAL, gate, packed_layer, product
from .timing import Call


def linear4bit(weight: torch.Tensor, m: int) -> Measured:
    """`Linear4bit.forward` on x[m, K], beside `nn.Linear` with the unquantized weight."""
    return _layers(weight, torch.randn(m, weight.shape[1], device=weight.device, dtype=weight.dtype))


def linear4bit_training(weight: torch.Tensor, m: int) -> Measured:
    """The same of an x that needs a gradient: torch records a graph, which is dropped."""
    x = torch.randn(m, weight.shape[1], device=weight.device, dtype=weight.dtype, requires_grad=True)
    return _layers(weight, x)


def _layers(weight: torch.Tensor, x: torch.Tensor) -> Measured:
    def of(make: Callable[[torch.Tensor], torch.nn.Module]) -> Provider:
        def call(w: torch.Tensor) -> Call:
            layer = make(w).requires_grad_(False)
            return lambda: layer(x)

        return call

    ours = of(lambda w: packed_layer(qlora.Linear4bit, w))
    theirs = of(lambda w: packed_layer(bitsandbytes.nn.Linear4bit, w))
    with torch.no_grad():
        wrong = gate("y", weight, x, ours, theirs)
    providers = {"qkernels": ours, RIVAL: theirs, "torch": of(_float_layer)}
    return product(weight, x.shape[0], providers, wrong)


def _float_layer(weight: torch.Tensor) -> torch.nn.Module:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


MODULES: dict[str, Callable[[torch.Tensor, int], Measured]] = {
    "linear4bit": linear4bit,
    "linear4bit_training": linear4bit_training,
}
