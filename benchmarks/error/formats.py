"""The quantizers under test, each as a round trip: a weight in, what it decodes to out, in float32.

A new format is one entry in `FORMATS` and its table in `tables.py`; a new rival is one entry in `RIVALS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels

RoundTrip = Callable[[Tensor, int, bool], Tensor]

NESTED_BLOCK = 256


@dataclass(frozen=True)
class Format:
    """Attributes:
    bits: of a code.
    provider: whose code the round trip runs.
    round_trip: (weight float32, blocksize, double quantization) -> decoded weight, same shape.
    """

    bits: int
    provider: str
    round_trip: RoundTrip

    def bits_per_weight(self, blocksize: int, nested: bool) -> float:
        """Codes and scales; without the one offset a tensor that double quantization adds."""
        scale = 8 + 32 / NESTED_BLOCK if nested else 32
        return self.bits + scale / blocksize


def _four_bits(quant_type: str) -> RoundTrip:
    def round_trip(weight: Tensor, blocksize: int, nested: bool) -> Tensor:
        packed, state = qkernels.quantize_4bit(
            weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
        )
        return qkernels.dequantize_4bit(packed, state)

    return round_trip


def _integer(bits: int) -> RoundTrip:
    """Symmetric integers with a zero: round(x / absmax * levels), and back."""
    levels = 2 ** (bits - 1) - 1

    def round_trip(weight: Tensor, blocksize: int, nested: bool) -> Tensor:
        n = weight.numel()
        blocks = F.pad(weight.reshape(-1), (0, -n % blocksize)).view(-1, blocksize)
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        index = torch.where(absmax > 0, blocks / absmax * levels, 0).round_()
        scale = _through_8_bits(absmax) if nested else absmax
        return (index.mul_(scale / levels)).view(-1)[:n].view(weight.shape)

    return round_trip


def _through_8_bits(absmax: Tensor) -> Tensor:
    """The same double quantization of the scales as the 4-bit formats have."""
    mean = absmax.mean()
    index, state = qkernels.quantize_blockwise(absmax - mean, blocksize=NESTED_BLOCK)
    return qkernels.dequantize_blockwise(index, state) + mean


FORMATS = {
    "nf4": Format(4, "qkernels", _four_bits("nf4")),
    "fp4": Format(4, "qkernels", _four_bits("fp4")),
    "int4": Format(4, "torch", _integer(4)),
    "int8": Format(8, "torch", _integer(8)),
}


def _bitsandbytes(quant_type: str) -> RoundTrip:
    def round_trip(weight: Tensor, blocksize: int, nested: bool) -> Tensor:
        # A row a block: its CPU path reads wrong scales where rows are not whole blocks.
        rows = weight.reshape(-1, blocksize)
        packed, state = bnb.quantize_4bit(rows, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)
        return bnb.dequantize_4bit(packed, state).view(weight.shape)

    return round_trip


RIVALS = {
    "nf4": Format(4, "bitsandbytes", _bitsandbytes("nf4")),
    "fp4": Format(4, "bitsandbytes", _bitsandbytes("fp4")),
}


def why_not(rival: Format, weight: Tensor, blocksize: int) -> str | None:
    """Why a rival cannot take this weight; None when it can."""
    if rival.provider == "bitsandbytes" and not weight.is_cuda and weight.numel() % blocksize:
        return "not a whole number of blocks: its CPU dequantize_4bit reads wrong scales there"
    return None
