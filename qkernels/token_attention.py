"""One new token into a cache of keys and values, and its attention over all that are there: the reference.

Room: mathematics; torch only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, length: Tensor, bias: Tensor
) -> Tensor:
    """softmax(query keys^T / sqrt(D) + bias) values, over the tokens up to the new one; in float32, rounded once.

    Args:
        query, key, value: [rows, heads, 1, D] of the new token.
        keys, values: [rows, heads, L, D], in whose places `length` the new ones are written.
        length: int64 scalar, the tokens that are there.
        bias: [rows or 1, heads, 1, L].

    Returns:
        [rows, 1, heads * D] in the query's dtype.
    """
    keys.index_copy_(2, length.view(1), key)
    values.index_copy_(2, length.view(1), value)
    scores = query.float() @ keys.float().transpose(-1, -2) * query.shape[-1] ** -0.5 + bias.float()
    later = torch.arange(keys.shape[2], device=keys.device) > length
    weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
    context = weights @ values.float().masked_fill(later[:, None], 0.0)
    return context.transpose(1, 2).reshape(query.shape[0], 1, -1).to(query.dtype)
