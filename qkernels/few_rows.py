"""What a model does between its products where it has few rows, as in generation: public functions, one operator each.

Room: as `functional.py`, for what is not bitsandbytes'.  torch's own kernels are made for many rows.
"""

from __future__ import annotations

from torch import Tensor

from . import checks
from .ops import operator


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    centered: bool = True,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm or RMSNorm of each row, and the sum before it, in one kernel made for few rows.

    In float32, rounded once to x's dtype.  Not differentiable, and autocast does not change it.

    Args:
        x: [..., C], float32, float16 or bfloat16, C up to 65,536; a non-contiguous tensor is copied.
        weight: [C], any of these dtypes.
        bias: [C], likewise; None for none.
        eps: added to the variance or the mean of squares.
        centered: LayerNorm; otherwise RMSNorm, which subtracts no mean.
        residual: added to x first, of its shape and dtype; None for none.

    Returns:
        x + residual (x itself without one), rounded to x's dtype, and its normalized rows.

    Raises:
        UserError (a ValueError): shapes, dtypes or devices do not fit each other.
    """
    checks.check_normalized(x, weight, bias, residual)
    total, out = operator("normalize", x)(
        x.detach().contiguous(),
        None if residual is None else residual.detach().contiguous(),
        weight.detach().contiguous(),
        None if bias is None else bias.detach().contiguous(),
        eps,
        centered,
    )
    return (x if residual is None else total), out


def token_attention(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, length: Tensor, bias: Tensor
) -> Tensor:
    """Put one new token into a cache and attend to all that are there: softmax(q keys^T / sqrt(D) + bias) values.

    In float32, rounded once.  Not differentiable.

    Args:
        query, key, value: [rows, heads, 1, D] of the new token, float32, float16 or bfloat16.
        keys, values: [rows, heads, L, D], contiguous; the new ones are written to their places `length`.
        length: int64[] on the same device, the tokens that are there, less than L; it is not changed.
        bias: [rows or 1, heads, 1, L], added to the scores.

    Returns:
        [rows, 1, heads * D] in the query's dtype.

    Raises:
        UserError (a ValueError): shapes, dtypes or devices do not fit each other.
    """
    others = {"key": key, "value": value, "keys": keys, "values": values, "bias": bias}
    checks.check_token_attention(query, others, length)
    if key.stride() != query.stride() or value.stride() != query.stride() or query.stride(-1) != 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    if bias.stride(-1) != 1:
        bias = bias.contiguous()
    return operator("token_attention", query)(query, key, value, keys, values, length, bias)
