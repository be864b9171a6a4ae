"""One new token into a cache of keys and values, and its attention over all that are there.

A program has a head of a sequence, and goes through the cache in blocks of keys, a block ahead in flight; scores,
softmax and sums are float32.  It writes the token's key and value to their place, and its softmax begins with the new
token's score, so nothing that is written is read.

EARLY as in `_early.py`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..tuning import LaunchConfig
from ._launch import early_and_late

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load_block(ptr, begin, end, d, D: tl.constexpr, KEYS: tl.constexpr):
    j = begin + tl.arange(0, KEYS)
    return tl.load(ptr + j[:, None] * D + d[None, :], mask=(j < end)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["stride_row", "stride_head", "bias_row", "bias_head"])
def _token_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    length_ptr,
    bias_ptr,
    out_ptr,
    stride_row,
    stride_head,
    bias_row,
    bias_head,
    L,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Head program_id(0) of row program_id(1)."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    row = tl.program_id(1)
    heads = tl.num_programs(0)
    d = tl.arange(0, BLOCK_D)
    mask_d = d < D
    new = row.to(tl.int64) * stride_row + head * stride_head + d
    cache = (row.to(tl.int64) * heads + head) * L * D
    bias_ptr += row.to(tl.int64) * bias_row + head * bias_head
    keys_ptr += cache
    values_ptr += cache
    keys = _load_block(keys_ptr, 0, L, d, D, KEYS)  # before the length is known
    values = _load_block(values_ptr, 0, L, d, D, KEYS)
    length = tl.load(length_ptr).to(tl.int32)
    key = tl.load(key_ptr + new, mask=mask_d, other=0.0)
    value = tl.load(value_ptr + new, mask=mask_d, other=0.0)
    query = tl.load(query_ptr + new, mask=mask_d, other=0.0).to(tl.float32)
    tl.store(keys_ptr + length * D + d, key, mask=mask_d)
    tl.store(values_ptr + length * D + d, value, mask=mask_d)
    query = query * (_LOG2_E / math.sqrt(D))
    largest = tl.sum(query * key.to(tl.float32)) + tl.load(bias_ptr + length).to(tl.float32) * _LOG2_E
    total = 1.0
    acc = value.to(tl.float32)
    for begin in range(0, length, KEYS):
        keys_then = _load_block(keys_ptr, begin + KEYS, length, d, D, KEYS)
        values_then = _load_block(values_ptr, begin + KEYS, length, d, D, KEYS)
        j = begin + tl.arange(0, KEYS)
        bias = tl.load(bias_ptr + j, mask=j < length, other=0.0).to(tl.float32)
        scores = tl.sum(keys.to(tl.float32) * query[None, :], axis=1) + bias * _LOG2_E
        scores = tl.where(j < length, scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores))
        weights = tl.exp2(scores - larger)
        shrink = tl.exp2(largest - larger)
        # What lies behind the length may be anything.
        seen = tl.where((j < length)[:, None], values.to(tl.float32), 0.0)
        acc = acc * shrink + tl.sum(seen * weights[:, None], axis=0)
        total = total * shrink + tl.sum(weights)
        largest = larger
        keys = keys_then
        values = values_then
    out = (row.to(tl.int64) * heads + head) * D + d
    tl.store(out_ptr + out, (acc / total).to(out_ptr.dtype.element_ty), mask=mask_d)


_LAUNCHERS = early_and_late(_token_attention_kernel)


def token_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    bias: torch.Tensor,
    config: LaunchConfig,
    early: bool,
) -> torch.Tensor:
    """Launch the kernel; arguments and result are `token_attention_reference`'s.

    Args:
        query, key, value: of the same strides, the last dimension contiguous.
        keys, values: contiguous.
        bias: the last dimension contiguous.
        config: its rows are the keys of a block.
    """
    rows, heads, _, D = query.shape
    out = torch.empty((rows, 1, heads * D), dtype=query.dtype, device=query.device)
    _LAUNCHERS[early](
        (heads, rows, 1),
        (query, key, value, keys, values, length, bias, out),
        (*query.stride()[:2], bias.stride(0) if len(bias) > 1 else 0, bias.stride(1), keys.shape[2]),
        (D, triton.next_power_of_2(D), config.rows, early),
        config,
    )
    return out
