"""An adapter's kernels in Triton's interpreter, against float64 and, for the mask of the dropout, the reference."""

from __future__ import annotations

import pytest
import torch

from qkernels.dropout import dropout_reference, threshold_and_scale
from qkernels.kernels.lora import lora_down_triton, lora_up_triton
from qkernels.kernels.lora_grads import lora_grads_triton
from qkernels.tuning.lora import DownConfig, TileConfig, down_config

TILE = TileConfig(16, 32)


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).half()


def assert_near(found: torch.Tensor, exact: torch.Tensor, of_largest: float) -> None:
    assert (found.double() - exact).abs().max() <= of_largest * exact.abs().max()


def inner_of(parts: torch.Tensor, r: int) -> torch.Tensor:
    """u as those who need it round it; the columns past the rank are zeros."""
    inner = parts.float().sum(0).half()
    assert not inner[:, r:].any()
    return inner[:, :r]


@pytest.mark.parametrize("factors", [torch.float32, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("M", "N", "K", "r"), [(1, 16, 64, 16), (5, 72, 130, 3), (70, 160, 256, 20)])
def test_an_adapters_kernels(M, N, K, r, p, factors):
    x, dy, bias = half(M, K), half(M, N), half(N)
    A, B = torch.randn(r, K).to(factors), torch.randn(N, r).to(factors)
    dropout = None if p == 0 else (torch.tensor([2**62 + 12345]), *threshold_and_scale(p))
    kept = x if dropout is None else dropout_reference(x, *dropout)
    mask = torch.ones(M, K) if dropout is None else dropout_reference(torch.ones(M, K), *dropout)
    part_steps = -(-K // 96)
    for config in (
        down_config(M, K, r, p > 0),
        DownConfig(16, 32, 3, part_steps, False),
        DownConfig(16, 32, 3, part_steps, True),
    ):
        u = lora_down_triton(x, A, False, 0.5, dropout, config)
        assert_near(inner_of(u, r), 0.5 * kept.double() @ A.half().double().T, 1e-3)
    v = lora_down_triton(dy, B, True, 0.5, None, down_config(M, N, r, False))
    u_16, v_16 = inner_of(u, r).double(), inner_of(v, r).double()

    for accumulate in (False, True):
        y, dx = half(M, N), half(M, K)
        if not accumulate:
            y.fill_(torch.nan), dx.fill_(torch.nan)
        exact_y = u_16 @ B.half().double().T + bias.double() + (y.double() if accumulate else 0)
        exact_dx = (v_16 @ A.half().double()) * mask.double() + (dx.double() if accumulate else 0)
        lora_up_triton(u, B, True, bias, y, accumulate, None, TILE)
        lora_up_triton(v, A, False, None, dx, accumulate, dropout, TILE)
        assert_near(y, exact_y, 1e-3)
        assert_near(dx, exact_dx, 1e-3)

    grad_A, grad_B = torch.full((r, K), torch.nan).to(factors), torch.full((N, r), torch.nan).to(factors)
    lora_grads_triton(dy, x, u, v, grad_A, grad_B, dropout, TILE)
    assert_near(grad_A, v_16.T @ kept.double(), 1e-3)
    assert_near(grad_B, dy.double().T @ u_16, 1e-3)
