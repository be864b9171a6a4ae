"""Products with a decoded weight, by the platform's library (cuBLAS on a GPU).

Room: plain torch, for the operators of both devices.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear(A: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """A[..., K] W[N, K]^T + bias[N], in a tensor of its own.

    `F.linear` may return a view, and a view that an autograd function returns cannot be changed in place, as an
    adapter's update does.
    """
    out = A.new_empty((*A.shape[:-1], W.shape[0]))
    rows, out_rows = A.reshape(-1, W.shape[1]), out.view(-1, W.shape[0])
    if bias is None:
        torch.mm(rows, W.t(), out=out_rows)
    else:
        torch.addmm(bias, rows, W.t(), out=out_rows)
    return out
