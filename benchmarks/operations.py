"""The measured operations on a weight: the bytes they must move, their providers, and the gate before the clock.

A new operation is one function here or in `products.py`; a new rival is one entry of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes.functional as bnb
import torch

import qkernels

from .timing import Call
from .weights import BLOCKSIZE, FORMAT, format_of, stored_bytes

Provider = Callable[[torch.Tensor], Call]

BLOCKWISE = 256  # of the 8-bit codes: what double quantization uses for the scales


class GateError(AssertionError):
    """A provider computes something else than bitsandbytes; timing it would be meaningless."""


@dataclass(frozen=True)
class Measured:
    """Attributes:
    bytes: the least that must be read and written once.
    providers: name -> a function that makes the call for one weight.
    missing: name of a provider that cannot run here -> the reason.
    flops: of a product; 0 elsewhere.
    m: rows of activations of a product.
    """

    bytes: int
    providers: dict[str, Provider]
    flops: int = 0
    m: int | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


def blockwise_bytes(n: int) -> float:
    """8-bit codes and float32 scales of `n` weights."""
    return n * (1 + 4 / BLOCKWISE)


def on_packed(
    quantize_4bit: Callable[..., Any], use: Callable[[Any, Any], object], blocksize: int = BLOCKSIZE
) -> Provider:
    """A provider that `use`s the codes and the state that its own quantizer makes of each weight."""

    def make(weight: torch.Tensor) -> Call:
        packed, state = quantize_4bit(weight, **format_of(blocksize))
        return lambda: use(packed, state)

    return make


def quantize(weight: torch.Tensor) -> Measured:
    """4-bit codes and doubly quantized scales of a weight."""
    ours, our_state = qkernels.quantize_4bit(weight, **FORMAT)
    theirs, their_state = bnb.quantize_4bit(weight, **FORMAT)
    _must_be_equal("packed codes", ours, theirs)
    if weight.is_cuda:  # bitsandbytes' CPU path searches the 8-bit map in another way than its kernels
        _must_be_equal("scale codes", our_state.absmax, their_state.absmax)
    _must_be_equal("scales of the scales", our_state.state2.absmax, their_state.state2.absmax)
    providers: dict[str, Provider] = {
        # Without the check for NaN and Inf, which bitsandbytes does not make.
        "qkernels": lambda w: lambda: qkernels.quantize_4bit(w, **FORMAT, check_finite=False),
        "qkernels, checking for NaN and Inf": lambda w: lambda: qkernels.quantize_4bit(w, **FORMAT),
        "bitsandbytes": lambda w: lambda: bnb.quantize_4bit(w, **FORMAT),
    }
    if weight.is_cuda:  # on a CPU inductor would need a C++ compiler
        compiled = compile_afresh(lambda w: qkernels.quantize_4bit(w, **FORMAT, check_finite=False))
        _must_be_equal("packed codes, compiled,", compiled(weight)[0], ours)
        providers["qkernels, in torch.compile"] = lambda w: lambda: compiled(w)
    return Measured(int(weight.nbytes + stored_bytes(weight.numel())), providers)


def dequantize(weight: torch.Tensor) -> Measured:
    """The weight's dtype again, from codes and doubly quantized scales."""
    packed, state = qkernels.quantize_4bit(weight, **FORMAT)
    bnb_state = bnb.QuantState.from_dict(state.as_dict(), weight.device)
    ours = torch.full_like(weight, torch.nan)
    qkernels.dequantize_4bit(packed, state, out=ours)
    _must_be_equal("decoded weights", ours, bnb.dequantize_4bit(packed, bnb_state))

    # Both allocate their result, since bitsandbytes' CPU path, which the trial uses, takes no `out`.
    providers = {
        "qkernels": on_packed(qkernels.quantize_4bit, qkernels.dequantize_4bit),
        "bitsandbytes": on_packed(bnb.quantize_4bit, bnb.dequantize_4bit),
    }
    if weight.is_cuda:
        compiled = compile_afresh(lambda packed, state: qkernels.dequantize_4bit(packed, state))
        _must_be_equal("decoded weights, compiled,", compiled(packed, state), ours)
        providers["qkernels, in torch.compile"] = on_packed(qkernels.quantize_4bit, compiled)
    return Measured(int(weight.nbytes + stored_bytes(weight.numel())), providers)


def quantize_blockwise(weight: torch.Tensor) -> Measured:
    """8-bit codes and scales of a weight, in the blocks that scales are quantized in."""
    ours, our_state = qkernels.quantize_blockwise(weight, blocksize=BLOCKWISE)
    theirs, their_state = bnb.quantize_blockwise(weight, blocksize=BLOCKWISE)
    if weight.is_cuda:  # bitsandbytes' CPU path searches the 8-bit map in another way than its kernels
        _must_be_equal("8-bit codes", ours, theirs)
    _must_be_equal("scales of 8-bit codes", our_state.absmax, their_state.absmax)
    return Measured(
        int(weight.nbytes + blockwise_bytes(weight.numel())),
        {
            "qkernels": lambda w: lambda: qkernels.quantize_blockwise(w, blocksize=BLOCKWISE),
            "bitsandbytes": lambda w: lambda: bnb.quantize_blockwise(w, blocksize=BLOCKWISE),
        },
    )


def dequantize_blockwise(weight: torch.Tensor) -> Measured:
    """The weight's dtype again, from 8-bit codes and scales."""
    index, state = qkernels.quantize_blockwise(weight, blocksize=BLOCKWISE)
    bnb_state = bnb.QuantState(state.absmax, code=state.code, blocksize=BLOCKWISE, dtype=weight.dtype)
    decoded = qkernels.dequantize_blockwise(index, state)
    _must_be_equal("decoded 8-bit codes", decoded, bnb.dequantize_blockwise(index, bnb_state))

    def of(library: Any) -> Provider:
        def make(w: torch.Tensor) -> Call:
            index, state = library.quantize_blockwise(w, blocksize=BLOCKWISE)
            return lambda: library.dequantize_blockwise(index, state)

        return make

    return Measured(
        int(weight.nbytes + blockwise_bytes(weight.numel())), {"qkernels": of(qkernels), "bitsandbytes": of(bnb)}
    )


def copy(weight: torch.Tensor) -> Measured:
    """Read and write the weight: the bandwidth that the other operations are held against."""

    def call(w: torch.Tensor) -> Call:
        out = torch.empty_like(w)
        return lambda: out.copy_(w)

    return Measured(bytes=2 * weight.nbytes, providers={"torch": call})


def peak(weight: torch.Tensor, size: int) -> Measured:
    """A square product in the weight's dtype: the matrix rate that the other products are held against."""
    x, w = (torch.randn(size, size, device=weight.device, dtype=weight.dtype) for _ in range(2))
    out = torch.empty_like(x)
    return Measured(3 * x.nbytes, {"torch": lambda _: lambda: torch.matmul(x, w, out=out)}, 2 * size**3, size)


def compile_afresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled afresh: from the second shape on torch would make sizes dynamic, and after eight give up."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


OPERATIONS: dict[str, Callable[[torch.Tensor], Measured]] = {
    "quantize": quantize,
    "dequantize": dequantize,
    "quantize_blockwise": quantize_blockwise,
    "dequantize_blockwise": dequantize_blockwise,
}


def _must_be_equal(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    if not torch.equal(ours, theirs):
        raise GateError(f"{int((ours != theirs).sum())} of {ours.numel()} {what} differ from bitsandbytes'")
