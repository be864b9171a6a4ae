"""Rivals of the product that are not always there: each is timed, or listed with the reason why it cannot run.

bitsandbytes and torch's own product stand in the operations themselves, since nothing is measured without them.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F

import qkernels

from .operations import FORMAT, GateError, Measured, Provider, compile_afresh
from .timing import Call

# Another quantization of the scales differs by this order; another code by far more.
CLOSE = 0.02
BLOCKSIZE, SCALES_BLOCKSIZE = 64, 256

TORCHAO, COMPILED = "torchao, NF4Tensor", "torch.compile of plain torch"


def with_rivals(measured: Measured, weight: torch.Tensor) -> Measured:
    """The product `measured` on a weight, with further rivals, or the reasons why they are missing.

    Raises:
        GateError: a rival computes something else.
    """
    x = torch.randn(measured.m or 1, weight.shape[1], device=weight.device, dtype=weight.dtype)
    packed, state = qkernels.quantize_4bit(weight, **FORMAT)
    ours = qkernels.matmul_4bit(x, packed, state).double()
    providers, missing = dict(measured.providers), dict(measured.missing)
    for name, found in {TORCHAO: _torchao(x, weight), COMPILED: _plain_torch(x)}.items():
        if isinstance(found, str):
            missing[name] = found
            continue
        error = ((found(weight)() - ours).norm() / ours.norm()).item()  # type: ignore[operator]
        if not error < CLOSE:
            raise GateError(f"y of {name} differs from ours by {100 * error:.1f}%")
        providers[name] = found
    return replace(measured, providers=providers, missing=missing)


def _torchao(x: torch.Tensor, weight: torch.Tensor) -> Provider | str:
    """NF4 with 8-bit scales too, but its own: evenly spaced codes for the scales, so it decodes to other values."""
    if find_spec("torchao") is None:
        return "torchao is not installed (pip install torchao)"
    if weight.numel() % (BLOCKSIZE * SCALES_BLOCKSIZE):
        return f"torchao takes multiples of {BLOCKSIZE * SCALES_BLOCKSIZE} weights only"
    from torchao.quantization import NF4Tensor

    def make(weight: torch.Tensor) -> Call:
        quantized = NF4Tensor.from_tensor(weight, BLOCKSIZE, SCALES_BLOCKSIZE)
        return lambda: F.linear(x, quantized)

    return make


def _plain_torch(x: torch.Tensor) -> Provider | str:
    """Decoding by look-ups in plain torch and the product, left to inductor to fuse."""
    if not x.is_cuda:
        return "inductor would need a C++ compiler on a CPU"
    run = compile_afresh(decode_and_multiply)

    def make(weight: torch.Tensor) -> Call:
        packed, state = qkernels.quantize_4bit(weight, **FORMAT)
        arguments = (packed.view(-1), state.code, *_scales(state), weight.shape)
        return lambda: run(x, *arguments)

    return make


def _scales(state: qkernels.QuantState) -> tuple[torch.Tensor, ...]:
    assert state.state2 is not None
    assert state.offset is not None
    return state.absmax, state.state2.code, state.state2.absmax, state.offset


def decode_and_multiply(
    x: torch.Tensor,
    packed: torch.Tensor,
    table: torch.Tensor,
    scale_index: torch.Tensor,
    scale_table: torch.Tensor,
    scale_absmax: torch.Tensor,
    offset: torch.Tensor,
    shape: torch.Size,
) -> torch.Tensor:
    """x W^T in plain torch, W [N, K] in NF4 with double quantization, blocks of 64 and 256."""
    index = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1, BLOCKSIZE)
    of_scale = scale_absmax.repeat_interleave(SCALES_BLOCKSIZE)[: scale_index.numel()]
    absmax = scale_table[scale_index.int()] * of_scale + offset
    return F.linear(x, (table[index.int()] * absmax[:, None]).to(x.dtype).view(shape))
