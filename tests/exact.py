"""Equality to the last bit, and what the GPU alone decides: the last bit of its reciprocal."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qkernels.kernels._tile import reciprocal


@triton.jit
def _reciprocal_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=1.0)
    tl.store(out_ptr + offs, reciprocal(x, True), mask=offs < n)


def gpu_reciprocal(absmax: torch.Tensor) -> torch.Tensor:
    """The GPU's own approximate reciprocal, for the reference to be compared with to the last bit."""
    out = torch.empty_like(absmax)
    _reciprocal_kernel[(triton.cdiv(absmax.numel(), 1024),)](absmax, out, absmax.numel(), BLOCK=1024)
    return out


def assert_bits_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same dtype, shape and bits (0.0 and -0.0 differ, a NaN equals itself); says how many elements differ, and one."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = _INTEGERS[actual.element_size()]
    ours, theirs = actual.contiguous().view(bits), expected.contiguous().view(bits)
    if not torch.equal(ours, theirs):
        differing = (ours != theirs).view(-1)
        first = int(differing.int().argmax())
        raise AssertionError(
            f"{int(differing.sum())} of {differing.numel()} elements differ; element {first} is "
            f"{actual.reshape(-1)[first].item()} instead of {expected.reshape(-1)[first].item()}"
        )


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
