"""What the tests of the fused product share: weights, the truth in float64, and how large an error may be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels
from qkernels.format import code_table
from qkernels.reference import decode_absmax_reference


def weight(N: int, K: int, dtype: torch.dtype, spread: int = 0, **options) -> tuple[Tensor, qkernels.QuantState]:
    """A quantized weight [N, K]; its blocks' magnitudes are powers of two apart, up to 2^spread."""
    values = 0.02 * torch.randn(N, K, device="cuda")
    if spread:
        exponents = torch.randint(-spread // 2, spread // 2 + 1, (N * K // 64, 1), device="cuda")
        values = (values.view(-1, 64) * torch.exp2(exponents.float())).view(N, K)
    return qkernels.quantize_4bit(values.to(dtype), **({"quant_type": "nf4", "compress_statistics": True} | options))


def exact_product(x: Tensor, packed: Tensor, state: qkernels.QuantState, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in float64, of float32 codes and float32 scales: nothing is rounded to 16 bits."""
    code = code_table(state.quant_type, x.device).double()
    byte = packed.view(-1).view(torch.uint8).long()
    codes = torch.stack([code[byte >> 4], code[byte & 15]], 1).view(state.shape)
    absmax = state.absmax
    if state.nested:
        absmax = decode_absmax_reference(state.absmax, state.state2.absmax, state.state2.code, state.offset)
    scales = absmax.double().repeat_interleave(state.blocksize)[: codes.numel()].view(state.shape)
    y = x.double() @ (codes * scales).T
    return y if bias is None else y + bias.double()


def assert_accurate(y: Tensor, x: Tensor, packed: Tensor, state: qkernels.QuantState, bias: Tensor | None = None):
    """The error against the exact product is at most that of torch's product with the decoded weight in 16 bits, in
    root mean square, and twice that at its largest.

    Both sides are random, so few results leave room for chance: a share of half an ulp, which rounding the exact
    product would cost at most.
    """
    exact = exact_product(x, packed, state, bias)
    decoded = qkernels.dequantize_4bit(packed, state).to(x.dtype)
    ours, torchs = ((result.double() - exact).abs() for result in (y, F.linear(x, decoded, bias)))
    half_ulp = torch.finfo(x.dtype).eps / 2 * exact.abs()
    chance = 2 / exact.numel() ** 0.5
    assert not y.isnan().any()
    assert _rms(ours) <= 1.02 * _rms(torchs) + chance * _rms(half_ulp)
    assert ours.max() <= 2 * torchs.max() + chance * half_ulp.max()


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
