"""What the tests of the fused products share: weights, the truth in float64, how large an error may be, how the
backward product is launched from a compiled variant, and the ways in which torch runs a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from exact import assert_bits_equal
from torch import Tensor

import qkernels
from qkernels.format import code_table
from qkernels.known import scales_of
from qkernels.reference import decode_absmax_reference
from qkernels.variants import Variant, arrange_variant, sum_variant


def weight(
    N: int, K: int, dtype: torch.dtype, spread: int = 0, device: str = "cuda", **options
) -> tuple[Tensor, qkernels.QuantState]:
    """A quantized weight [N, K]; its blocks' magnitudes are powers of two apart, up to 2^spread."""
    values = 0.02 * torch.randn(N, K, device=device)
    if spread:
        exponents = torch.randint(-spread // 2, spread // 2 + 1, (-(-N * K // 64),), device=device)
        values *= torch.exp2(exponents.float()).repeat_interleave(64)[: N * K].view(N, K)
    return qkernels.quantize_4bit(values.to(dtype), **({"quant_type": "nf4", "compress_statistics": True} | options))


def exact_weight(packed: Tensor, state: qkernels.QuantState) -> Tensor:
    """W in float64, of float32 codes and float32 scales: nothing is rounded to 16 bits."""
    code = code_table(state.quant_type, packed.device).double()
    byte = packed.view(-1).view(torch.uint8).long()
    codes = torch.stack([code[byte >> 4], code[byte & 15]], 1).view(-1)[: state.shape.numel()].view(state.shape)
    absmax = state.absmax
    if state.nested:
        absmax = decode_absmax_reference(state.absmax, state.state2.absmax, state.state2.code, state.offset)
    scales = absmax.double().repeat_interleave(state.blocksize)[: codes.numel()].view(state.shape)
    return codes * scales


def exact_product(x: Tensor, packed: Tensor, state: qkernels.QuantState, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in float64."""
    y = x.double() @ exact_weight(packed, state).T
    return y if bias is None else y + bias.double()


def assert_accurate(y: Tensor, x: Tensor, packed: Tensor, state: qkernels.QuantState, bias: Tensor | None = None):
    """The error of x W^T + bias is as `_hold` allows."""
    decoded = qkernels.dequantize_4bit(packed, state).to(x.dtype)
    _hold(y, exact_product(x, packed, state, bias), F.linear(x, decoded, bias))


def assert_dx_accurate(dx: Tensor, dy: Tensor, packed: Tensor, state: qkernels.QuantState):
    """The error of dy W is as `_hold` allows."""
    decoded = qkernels.dequantize_4bit(packed, state).to(dy.dtype)
    _hold(dx, dy.double() @ exact_weight(packed, state), dy @ decoded)


def _hold(y: Tensor, exact: Tensor, torchs: Tensor) -> None:
    """The error against the exact product is at most that of torch's product with the decoded weight in 16 bits, in
    root mean square, and twice that at its largest.

    Both sides are random, so few results leave room for chance: a share of half an ulp, which rounding the exact
    product would cost at most.
    """
    ours, theirs = ((result.double() - exact).abs() for result in (y, torchs))
    half_ulp = torch.finfo(y.dtype).eps / 2 * exact.abs()
    chance = 2 / exact.numel() ** 0.5
    assert not y.isnan().any()
    assert _rms(ours) <= 1.02 * _rms(theirs) + chance * _rms(half_ulp)
    assert ours.max() <= 2 * theirs.max() + chance * half_ulp.max()


def arranged(compiled: Callable[[Variant], Callable[..., None]], variant: Variant, x: Tensor) -> Tensor:
    """x as the launch before the product's leaves it, where the variant of the product has one.

    Args:
        compiled: of a variant a function of (grid, arguments).
    """
    config: Any = variant.config
    if not config.arranged:
        return x
    (M, K), dtype = x.shape, variant.signature["x_ptr"].removeprefix("*")
    arranging = arrange_variant(K, variant.constants["QUANT_BLOCK"], dtype, config)
    sizes = arranging.constants
    blocks = -(-M // config.columns) * (config.columns // 8)
    out = x.new_full((sizes["COPIES"] * blocks * sizes["GROUPS"] * 64,), torch.nan)
    grid = -(-sizes["GROUPS"] * 64 // sizes["BLOCK"]), blocks, sizes["COPIES"]
    compiled(arranging)(grid, {"x_ptr": x, "out_ptr": out, "M": M})
    assert not out.isnan().any()
    return out


def run_dx(
    compiled: Callable[[Variant], Callable[..., None]],
    variant: Variant,
    dy: Tensor,
    packed: Tensor,
    state: qkernels.QuantState,
) -> Tensor:
    """dy W by a compiled variant, and by that of the kernel that adds its parts.

    Args:
        compiled: of a variant a function of (grid, arguments).
    """
    config: Any = variant.config
    (M, N), K = dy.shape, state.shape[1]
    dx = dy.new_full((M, K), torch.nan)
    tiles_of_columns = -(-M // config.columns)
    tiles = tiles_of_columns * -(-K // config.rows)
    size = tiles * config.parts * config.rows * config.columns
    result = dx if config.parts == 1 else torch.full((size,), torch.nan, device=dy.device)
    arguments = {"dy_ptr": dy, "packed_ptr": packed, "out_ptr": result, "M": M, "N": N}
    arguments |= {"part_steps": config.part_steps(N), **scale_arguments(state)}
    compiled(variant)((tiles, config.parts, 1), arguments)
    if config.parts > 1:
        sizes = {"M": M, "R": K, "columns_of_tiles": tiles_of_columns}
        adding = compiled(sum_variant(config))
        adding((tiles, config.columns, 1), {"parts_ptr": result, "out_ptr": dx, **sizes})
    return dx


def scale_arguments(state: qkernels.QuantState) -> dict[str, Tensor]:
    """A kernel's arguments for plain or for doubly quantized scales."""
    absmax, nested = scales_of(state)
    found = zip(("absmax_8bit_ptr", "absmax_code_ptr", "absmax_offset_ptr"), nested, strict=True)
    return {"absmax_ptr": absmax} | {name: tensor for name, tensor in found if tensor is not None}


def assert_torch_runs_it(product: Callable[[Tensor], Tensor], x: Tensor, expected: Tensor) -> None:
    """On streams of their own, in a CUDA graph and in `torch.compile`, `product(x)` has the expected bits."""
    results = []
    for stream in [torch.cuda.Stream() for _ in range(4)]:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            results.append(product(x.neg().neg()))
    torch.cuda.synchronize()
    for result in results:
        assert_bits_equal(result, expected)

    graph = torch.cuda.CUDAGraph()
    inside = torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = product(inside)
    inside.copy_(x)
    graph.replay()
    assert_bits_equal(y, expected)

    for mode in ("default", "reduce-overhead"):
        torch.compiler.reset()  # or the eighth product of this function in a process would be one too many
        compiled = torch.compile(lambda x: product(x) * 2, fullgraph=True, mode=mode)
        for _ in range(3):
            assert_bits_equal(compiled(x).clone(), expected * 2)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
