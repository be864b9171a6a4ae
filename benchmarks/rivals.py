"""Rivals that are not always there: each is timed, or listed with the reason why it cannot run.

bitsandbytes and torch's own product stand in the operations themselves, since nothing is measured without them.  A new
rival of an operation is one entry in `_finders`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from triton.errors import TritonError

import qkernels

from . import int4
from .operations import Measured, Provider, compile_afresh
from .products import CLOSE
from .timing import Call
from .weights import FORMAT

# How much less exact than ours another 4-bit weight may be, as RMS error: a wrong code table is off by far more.
LESS_EXACT = 1.1
BLOCKSIZE, SCALES_BLOCKSIZE = 64, 256

TORCHAO, COMPILED = "torchao, NF4Tensor", "torch.compile of plain torch"
WITH_RIVALS = ("quantize", "dequantize", "matmul")


class Rival(NamedTuple):
    """Attributes:
    make: the call for a weight.
    decoded: what the weight measured first decodes to in the rival's format.
    """

    make: Provider
    decoded: torch.Tensor


def with_rivals(op: str, measured: Measured, weight: torch.Tensor) -> Measured:
    """An operation measured on a weight, with further rivals.

    One that cannot run, or computes something else, is listed among the missing with the reason.
    """
    x = torch.randn(measured.m or 1, weight.shape[1], device=weight.device, dtype=weight.dtype)
    providers, missing = dict(measured.providers), dict(measured.missing)
    for name, find in _finders(op, x, weight).items():
        try:
            found = find()
            reason = found if isinstance(found, str) else _differs(op, found, x, weight)
        except (ImportError, RuntimeError, TritonError) as error:  # it does not fit these versions or this GPU
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if reason is not None:
            missing[name] = reason
        elif isinstance(found, Rival):
            providers[name] = found.make
    return replace(measured, providers=providers, missing=missing)


def _differs(op: str, rival: Rival, x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """How a rival's weight or result is not what it should be; None where both are."""
    ours = _relative(qkernels.dequantize_4bit(*qkernels.quantize_4bit(weight, **FORMAT)), weight)
    if not (theirs := _relative(rival.decoded, weight)) < LESS_EXACT * ours:
        return f"its weight is off by {100 * theirs:.1f}%, ours by {100 * ours:.1f}%"
    result: Any = rival.make(weight)()
    if op == "quantize":
        result = result.get_original_weight()
    expected = x.double() @ rival.decoded.double().t() if op == "matmul" else rival.decoded
    if not (error := _relative(result, expected)) < CLOSE:
        return f"it differs by {100 * error:.1f}% from what its weight gives"
    return None


def _finders(op: str, x: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], Rival | str]]:
    use = {"quantize": _as_it_is, "dequantize": _decode, "matmul": _multiply_by(x)}[op]
    found: dict[str, Callable[[], Rival | str]] = {TORCHAO: lambda: _torchao(weight, use)}
    if op == "dequantize":
        found[COMPILED] = lambda: _plain_torch(weight, decode)
    if op == "matmul":
        found[COMPILED] = lambda: _plain_torch(weight, decode_and_multiply, x)
        found |= {name: partial(_int4, kernel, x, weight) for name, kernel in int4.KERNELS.items()}
    return found


def _int4(kernel: Callable[..., Provider | str], x: torch.Tensor, weight: torch.Tensor) -> Rival | str:
    found = kernel(x, weight)
    return found if isinstance(found, str) else Rival(found, int4.decode(int4.quantize(weight)))


def _relative(result: Any, expected: torch.Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def _torchao(weight: torch.Tensor, use: Callable[[Callable[[], Any]], Call]) -> Rival | str:
    """NF4 with 8-bit scales too, but its own: evenly spaced codes for the scales, so it decodes to other values.

    Args:
        use: from what quantizes a weight to the call that is timed.
    """
    if find_spec("torchao") is None:
        return "torchao is not installed (pip install torchao)"
    if weight.numel() % (BLOCKSIZE * SCALES_BLOCKSIZE):
        return f"torchao takes multiples of {BLOCKSIZE * SCALES_BLOCKSIZE} weights only"
    from torchao.quantization import NF4Tensor

    def quantize(w: torch.Tensor) -> Any:
        return NF4Tensor.from_tensor(w, BLOCKSIZE, SCALES_BLOCKSIZE)

    return Rival(lambda w: use(lambda: quantize(w)), quantize(weight).get_original_weight())


def _as_it_is(quantize: Callable[[], Any]) -> Call:
    return quantize


def _decode(quantize: Callable[[], Any]) -> Call:
    quantized = quantize()
    return lambda: quantized.get_original_weight()


def _multiply_by(x: torch.Tensor) -> Callable[[Callable[[], Any]], Call]:
    def use(quantize: Callable[[], Any]) -> Call:
        quantized = quantize()
        return lambda: F.linear(x, quantized)

    return use


def _plain_torch(weight: torch.Tensor, function: Callable[..., torch.Tensor], *before: torch.Tensor) -> Rival | str:
    """Decoding by look-ups in plain torch, left to inductor to fuse with what follows."""
    if not weight.is_cuda:
        return "inductor would need a C++ compiler on a CPU"
    run = compile_afresh(function)

    def make(weight: torch.Tensor) -> Call:
        packed, state = qkernels.quantize_4bit(weight, **FORMAT)
        arguments = (*before, packed.view(-1), state.code, *_scales(state), weight.shape, weight.dtype)
        return lambda: run(*arguments)

    return Rival(make, qkernels.dequantize_4bit(*qkernels.quantize_4bit(weight, **FORMAT)))


def _scales(state: qkernels.QuantState) -> tuple[torch.Tensor, ...]:
    assert state.state2 is not None
    assert state.offset is not None
    return state.absmax, state.state2.code, state.state2.absmax, state.offset


def decode(
    packed: torch.Tensor,
    table: torch.Tensor,
    scale_index: torch.Tensor,
    scale_table: torch.Tensor,
    scale_absmax: torch.Tensor,
    offset: torch.Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W[N, K] in plain torch, from NF4 with double quantization, blocks of 64 and 256."""
    index = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1, BLOCKSIZE)
    of_scale = scale_absmax.repeat_interleave(SCALES_BLOCKSIZE)[: scale_index.numel()]
    absmax = scale_table[scale_index.int()] * of_scale + offset
    return (table[index.int()] * absmax[:, None]).to(dtype).view(shape)


def decode_and_multiply(x: torch.Tensor, *weight: Any) -> torch.Tensor:
    """x W^T in plain torch, W as `decode` takes it."""
    return F.linear(x, decode(*weight))
