"""Bloom's attention: ALiBi, causality and padding as one small bias for torch's fused attention.

Room: arithmetic on tensors; torch only.  transformers adds ALiBi by `baddbmm`, keeps the scores of all heads
[batch * heads, T, T], and takes their softmax in a float32 copy.  Here the bias stays [batch, heads, 1, keys], because
ALiBi depends on the key alone (a query's constant drops out of its softmax), and no score reaches memory.  In float32
on a GPU torch's fused attention is not exact enough, and the plain formula takes its place.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# The fused kernels load biases in 16-byte vectors: the rows of a bias must start on one.
_ALIGNED_KEYS = 16
_ALIGNED_SIZE = 8
# cuDNN plans each shape anew, which takes longer than many calls: for lengths that come again, as those of CUDA graphs.
_CUDNN_LENGTHS, _CUDNN_LARGEST_SIZE, _CUDNN_CAPABILITY = 64, 128, (9, 0)


class AttentionBias(NamedTuple):
    """What is added to the scores of every layer; built once for a forward pass.

    Attributes:
        bias: [batch or 1, heads, queries or 1, keys] in the compute dtype: ALiBi, and half the dtype's minimum where a
            key is padding (or, with a row for each query, where it must not see the key).
        causal: query i must see the keys up to i only, and the bias does not say so.
    """

    bias: Tensor
    causal: bool


def alibi_slopes(heads: int, device: torch.device | str = "cpu") -> Tensor:
    """float32[heads]: 2^(-8/n), 2^(-16/n), ... for n the power of two below, and every other one of 2n's for the rest.

    Made on the device by torch's own operators, so that nothing waits for a copy from the host.
    """
    power = 2 ** math.floor(math.log2(heads))

    def series(count: int, of: int, step: int) -> Tensor:
        base = torch.full((), 2.0 ** (-8.0 / of), dtype=torch.float32, device=device)
        return base ** torch.arange(1, 1 + step * count, step, device=device, dtype=torch.int32)

    if power == heads:
        return series(heads, power, 1)
    return torch.cat([series(power, power, 1), series(heads - power, 2 * power, 2)])


def alibi_bias(
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    queries: int,
    keys: int,
    past: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> AttentionBias:
    """The bias of one forward pass.

    Args:
        heads: attention heads.
        dtype: of the activations.
        device: of the activations.
        queries: tokens that are computed.
        keys: tokens that they may see: `queries`, those in a cache before them, and a static cache's empty places.
        past: tokens in the cache before the first query.
        attention_mask: [batch, keys], 0 for padding, on either side; None is none.  With `position_ids` it is not read.
        position_ids: [batch, queries] of packed texts: each begins again at 0 and sees itself only.  No cache then.
    """
    slopes = alibi_slopes(heads, device)
    if position_ids is not None:
        allowed = _same_text(position_ids)
        positions, hidden = position_ids, ~allowed[:, None]
    elif attention_mask is not None:
        positions = (attention_mask.cumsum(dim=-1) - 1) * attention_mask
        hidden = (attention_mask == 0)[:, None, None]
    else:
        positions, hidden = torch.arange(keys, device=device)[None], None
    # As transformers has it: the position times the slope in float32, rounded once to the dtype of the scores.
    bias = (slopes[None, :, None] * positions[:, None]).to(dtype)[:, :, None]
    lowest = torch.finfo(dtype).min / 2  # whole, it would overflow in a kernel that scales scores by log2 e
    if hidden is not None:
        bias = bias.masked_fill(hidden, lowest)
    starts_empty = isinstance(past, int) and past == 0
    causal = position_ids is None and starts_empty and queries > 1
    sees_all = queries == 1 and isinstance(past, int) and keys == past + 1
    if position_ids is None and not causal and not sees_all:
        rows = past + torch.arange(queries, device=device)
        bias = bias.masked_fill(torch.arange(keys, device=device) > rows[:, None], lowest)
    if causal and not (device.type == "cuda" and dtype.itemsize == 2):
        # Only CUDA's fused kernel takes a bias and causality at once, and it is not used in float32; elsewhere the bias
        # gets a row for each query.
        bias = bias.masked_fill(torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1), lowest)
        causal = False
    return AttentionBias(_aligned(bias), causal)


def alibi_attention(query: Tensor, key: Tensor, value: Tensor, bias: AttentionBias, dropout: float = 0.0) -> Tensor:
    """softmax(query key^T / sqrt(size) + bias) value; in 16 bits without the scores in memory.

    Args:
        query: [batch, heads, queries, size], any strides with the last dimension contiguous.
        key: [batch, heads, keys, size].
        value: [batch, heads, keys, size].
        bias: from `alibi_bias`.
        dropout: probability of leaving out an attention weight.

    Returns:
        [batch, heads, queries, size] in the dtype of the query.
    """
    if query.is_cuda and (query.dtype == torch.float32 or query.shape[-1] % _ALIGNED_SIZE):
        # In float32 the fused kernel's gradients are further from the exact ones than those of the plain formula.
        # Training on a GPU is in 16 bits; float32 is for checks, so it is exact rather than lean.  In 16 bits there is
        # no fused kernel for heads of other sizes.
        return _plain_attention(query, key, value, bias, dropout)
    if not bias.causal:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.bias, dropout_p=dropout)
    # The operators that scaled_dot_product_attention calls for a bias on a GPU, which take is_causal beside it; the
    # public function takes one or the other, and a bias [heads, T, T] at twice the work.
    wants_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if wants_grad and dropout == 0.0 and _is_for_cudnn(query, key):
        return torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, bias.bias, True, 0.0, True, False, scale=query.shape[-1] ** -0.5
        )[0]
    expanded = bias.bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, expanded, wants_grad, dropout, True, scale=query.shape[-1] ** -0.5
    )[0]


def _is_for_cudnn(query: Tensor, key: Tensor) -> bool:
    """Whether cuDNN's kernels, made for this GPU, take these shapes: about twice as fast as torch's, made for sm_80."""
    return (
        not torch.compiler.is_compiling()
        and query.shape[2] == key.shape[2]
        and query.shape[2] % _CUDNN_LENGTHS == 0
        and query.shape[3] <= _CUDNN_LARGEST_SIZE
        and torch.cuda.get_device_capability(query.device) >= _CUDNN_CAPABILITY
        and torch.backends.cudnn.is_available()
        and torch.backends.cudnn.enabled
    )


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: AttentionBias, dropout: float) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias.bias
    if bias.causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
    return F.dropout(scores.softmax(dim=-1), dropout) @ value


def _same_text(position_ids: Tensor) -> Tensor:
    """[batch, T, T]: whether the query (second dimension) may see the key: the same text, and not a later token."""
    text = (position_ids == 0).cumsum(dim=-1)
    same = text[:, :, None] == text[:, None, :]
    return same & torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril()


def _aligned(bias: Tensor) -> Tensor:
    """The same bias with rows that start on a 16-byte boundary."""
    keys = bias.shape[-1]
    return F.pad(bias, (0, -keys % _ALIGNED_KEYS))[..., :keys]
