"""Inputs on the edges of the decisions, where a random value never comes: the thresholds and their neighbours."""

from __future__ import annotations

import torch

from qkernels.format import FP4_THRESHOLDS, NF4_THRESHOLDS


def around(points: torch.Tensor) -> torch.Tensor:
    """[3, n] of the points' dtype: the points, the next number above each, the next below."""
    infinity = torch.full_like(points, torch.inf)
    return torch.stack([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])


def blocks_at_thresholds(quant_type: str, blocksize: int, dtype: torch.dtype) -> torch.Tensor:
    """Whole blocks with a magnitude of 1, so that every value is its own scaled value: all thresholds of both signs.

    In 16 bits a threshold is not a number; then the numbers nearest to it.
    """
    thresholds = torch.tensor(NF4_THRESHOLDS if quant_type == "nf4" else FP4_THRESHOLDS)
    points = around(torch.cat([thresholds, -thresholds]).to(dtype)).reshape(-1)
    blocks = points.new_zeros(-(-points.numel() // (blocksize - 1)), blocksize - 1)
    blocks.view(-1)[: points.numel()] = points
    return torch.cat([blocks.new_ones(len(blocks), 1), blocks], dim=1).reshape(-1)


def blocks_at_midpoints(code: torch.Tensor, blocksize: int, mean: float) -> torch.Tensor:
    """Float32 blocks whose values, less `mean` and scaled by their block, are the midpoints of neighbouring codes.

    Args:
        code: float32[256] of the 8-bit map.
        mean: subtracted by the quantizer, exactly: 0, or a number whose opposite sign the midpoints then have.

    Returns:
        A block for each midpoint: 1, the midpoint, one ulp more, one less, and zeros, all times a power of two of the
        block's own and plus `mean`.
    """
    code = code.cpu()
    midpoints = (code[:-1] + code[1:]) * 0.5
    power = torch.ones_like(midpoints)
    if mean:
        midpoints = midpoints[midpoints * mean < 0]
        # Within a factor of two of the mean, where a difference is exact.
        power = torch.exp2((abs(mean) / midpoints.abs()).log2().round())
    points = around(midpoints * power) + mean
    assert torch.equal((points - mean) / power, around(midpoints))
    blocks = torch.full((len(midpoints), blocksize), mean)
    blocks[:, 0] = power + mean
    blocks[:, 1:4] = points.t()
    assert torch.equal((blocks - mean).abs().amax(dim=1), power)
    return blocks.reshape(-1)
