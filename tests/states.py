"""What the tests of the 4-bit modules share: quantizing a layer and comparing state_dicts bit for bit."""

from __future__ import annotations

import torch
from torch import nn

from qlora.linear4bit import Linear4bit


def quantized(linear: nn.Linear, **options) -> Linear4bit:
    return Linear4bit.from_linear(linear, **options)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
        assert torch.equal(as_bytes(a[key]), as_bytes(b[key])), key
