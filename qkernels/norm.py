"""A normalization of each row, and the sum before it: the reference.

Room: mathematics; torch only.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_ROW = 65536  # which a GPU's program holds in registers, 64 elements a thread


def normalize_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    """s = x + residual, rounded, and s normalized by rows, times weight, plus bias, in float32 and rounded once.

    Args:
        x: [..., C].
        residual: of x's shape; None for none.
        weight, bias: [C].
        centered: LayerNorm, (s - mean) / sqrt(variance + eps); otherwise RMSNorm, s / sqrt(mean of squares + eps).

    Returns:
        s (empty without a residual) and the normalized rows, in x's dtype.
    """
    total = x if residual is None else x + residual
    rows = total.float()
    if centered:
        rows = rows - rows.mean(dim=-1, keepdim=True)
    rows = rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
    normalized = (rows if bias is None else rows + bias.float()).to(x.dtype)
    return x.new_empty(0) if residual is None else total, normalized
