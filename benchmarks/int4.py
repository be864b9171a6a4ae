"""Products with an INT4 weight, as a line to compare with: another format, which decodes by a shift and a multiply.

Codes are evenly spaced between the least and the largest weight of a group, round to nearest; scale and zero have the
weight's dtype, so 4.5 bits a weight in 16 bits.  All kernels get the same codes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch

from .operations import Provider
from .timing import Call

GROUP = 64
GEMLITE, TINYGEMM = "gemlite, INT4 (another format)", "torch's tinygemm, INT4 (another format)"


class Int4(NamedTuple):
    """W[N, K] = (codes - zeros) * scales, groups of 64 along K.

    Attributes:
        codes: uint8[N, K], 0 to 15.
        scales, zeros: [N, K / 64], in the weight's dtype.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def quantize(weight: torch.Tensor) -> Int4:
    """Round each weight to the nearest of 16 evenly spaced values of its group."""
    groups = weight.float().view(weight.shape[0], -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = ((high - low) / 15).clamp_min(torch.finfo(weight.dtype).tiny).to(weight.dtype)
    zeros = (-low / scales.float()).to(weight.dtype)
    codes = (groups / scales.float() + zeros.float()).round().clamp(0, 15)
    return Int4(codes.to(torch.uint8).view(weight.shape), scales.squeeze(-1), zeros.squeeze(-1))


def decode(weight: Int4) -> torch.Tensor:
    """float64[N, K]."""
    groups = weight.codes.double().view(*weight.scales.shape, GROUP)
    return ((groups - weight.zeros.double()[..., None]) * weight.scales.double()[..., None]).view(weight.codes.shape)


def gemlite(x: torch.Tensor, weight: torch.Tensor) -> Provider | str:
    """GemLite's Triton kernels, with the launch configurations that it ships for this GPU and shape, else tuned."""
    if find_spec("gemlite") is None:
        return "gemlite is not installed (pip install gemlite)"
    if not weight.is_cuda:
        return "gemlite wants a GPU"
    from gemlite.helper import A16W4_HQQ_INT

    def make(weight: torch.Tensor) -> Call:
        layer = A16W4_HQQ_INT(device=weight.device, dtype=weight.dtype).from_weights(*quantize(weight))
        return lambda: layer(x)

    return make


def tinygemm(x: torch.Tensor, weight: torch.Tensor) -> Provider | str:
    """The INT4 product that comes with torch for CUDA."""
    if not weight.is_cuda:
        return "torch's kernel for a CPU is another one"
    if weight.dtype != torch.bfloat16:
        return f"it takes bfloat16 only, not {str(weight.dtype).removeprefix('torch.')}"

    def make(weight: torch.Tensor) -> Call:
        quantized = quantize(weight)
        pairs = quantized.codes[:, ::2] << 4 | quantized.codes[:, 1::2]
        packed = torch._convert_weight_to_int4pack(pairs.contiguous(), innerKTiles=8)
        shifted = (8 - quantized.zeros.float()) * quantized.scales.float()  # its codes are signed, -8 to 7
        scales_and_zeros = (
            torch.stack((quantized.scales, shifted.to(weight.dtype)), dim=-1).transpose(0, 1).contiguous()
        )
        return lambda: torch._weight_int4pack_mm(x, packed, GROUP, scales_and_zeros)

    return make


KERNELS: dict[str, Callable[[torch.Tensor, torch.Tensor], Provider | str]] = {GEMLITE: gemlite, TINYGEMM: tinygemm}
