"""The measured products with a 4-bit weight: forward, gradient of the activations, and a LoRA layer's training step.

The gate before the clock is the error against float64 on the decoded weight: ours may be no larger than the larger of
bitsandbytes' and twice torch's own in that dtype, in maximum and in RMS.  Where bitsandbytes refuses a weight, or
computes something else, it is not timed, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import peft
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import qkernels
import qlora
from qkernels.reference import decode_absmax_reference

from .operations import GateError, Measured, Provider, on_packed
from .timing import Call
from .weights import BLOCKSIZE, FORMAT, format_of, stored_bytes

RANK = 16
RIVAL = "bitsandbytes"
# Two roundings of a 16-bit product differ by this order; another formula or another weight by far more.
CLOSE = 0.02


def matmul(weight: torch.Tensor, m: int, blocksize: int = BLOCKSIZE) -> Measured:
    """y[m, N] = x[m, K] W[N, K]^T."""
    x = torch.randn(m, weight.shape[1], device=weight.device, dtype=weight.dtype)

    ours = on_packed(qkernels.quantize_4bit, lambda packed, state: qkernels.matmul_4bit(x, packed, state), blocksize)
    decoded_first = on_packed(
        qkernels.quantize_4bit, lambda packed, state: F.linear(x, qkernels.dequantize_4bit(packed, state)), blocksize
    )
    theirs = on_packed(bnb.quantize_4bit, lambda packed, state: bitsandbytes.matmul_4bit(x, packed, state), blocksize)
    wrong = gate("y", weight, x, ours, theirs, blocksize=blocksize)
    providers: dict[str, Provider] = {
        "qkernels": ours,
        "qkernels, dequantize + cuBLAS": decoded_first,
        RIVAL: theirs,
        "torch": lambda w: lambda: F.linear(x, w),
    }
    if m == 1 and weight.is_cuda:
        providers["read only"] = _reader
    return product(weight, m, providers, wrong, blocksize)


def matmul_dx(weight: torch.Tensor, m: int, blocksize: int = BLOCKSIZE) -> Measured:
    """dx[m, K] = dy[m, N] W[N, K], as the backward pass of each computes it."""
    dy = torch.randn(m, weight.shape[0], device=weight.device, dtype=weight.dtype)

    ours = on_packed(
        qkernels.quantize_4bit, lambda packed, state: qkernels.matmul_4bit_dx(dy, packed, state), blocksize
    )
    # bitsandbytes.autograd._functions.MatMul4Bit.backward, word for word but for the autograd around it.
    theirs = on_packed(
        bnb.quantize_4bit,
        lambda packed, state: torch.matmul(dy, bnb.dequantize_4bit(packed, state).to(dy.dtype)),
        blocksize,
    )
    wrong = gate("dx", weight, dy, ours, theirs, transposed=True, blocksize=blocksize)
    providers: dict[str, Provider] = {
        "qkernels": ours,
        RIVAL: theirs,
        "torch": lambda w: lambda: torch.matmul(dy, w),
    }
    return product(weight, m, providers, wrong, blocksize)


def lora(weight: torch.Tensor, m: int) -> Measured:
    """Forward and backward of one LoRA layer of rank 16: y, dx, dA and dB; activations and adapters in one dtype."""
    x = torch.randn(m, weight.shape[1], device=weight.device, dtype=weight.dtype, requires_grad=True)
    dy = torch.randn(m, weight.shape[0], device=weight.device, dtype=weight.dtype)

    def step(layer: torch.nn.Module) -> Call:
        adapters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        return lambda: torch.autograd.grad(layer(x), [x, *adapters], dy)

    def ours(w: torch.Tensor) -> Call:
        return step(_lora_of(packed_layer(qlora.Linear4bit, w), w))

    def theirs(w: torch.Tensor) -> Call:
        return step(_lora_of(packed_layer(bitsandbytes.nn.Linear4bit, w), w))

    def unquantized(w: torch.Tensor) -> Call:
        base = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=w.dtype)
        base.weight.data = w
        return step(_lora_of(base, w))

    for name, our, their in zip(("dx", "dA", "dB"), ours(weight)(), theirs(weight)(), strict=True):  # type: ignore[arg-type]
        _close(name, our, their)
    measured = product(
        weight, m, {"qkernels": ours, "bitsandbytes + peft": theirs, "torch + peft, 16 bits": unquantized}
    )
    adapters = RANK * sum(weight.shape)
    return Measured(2 * measured.bytes, measured.providers, 2 * measured.flops + 6 * m * adapters, m)


PRODUCTS: dict[str, Callable[[torch.Tensor, int], Measured]] = {
    "matmul": matmul,
    "matmul_dx": matmul_dx,
    "lora": lora,
}
# Those that may be measured on blocks of another size: what is called with `blocksize`.
OF_ANY_BLOCKS = ("matmul", "matmul_dx")


def product(
    weight: torch.Tensor,
    m: int,
    providers: dict[str, Provider],
    wrong: str | None = None,
    blocksize: int = BLOCKSIZE,
) -> Measured:
    """What a product with m rows reads, writes and computes, and who computes it.

    Args:
        wrong: why bitsandbytes is not timed, if it is not.
    """
    activations = m * sum(weight.shape) * weight.element_size()
    stored = int(stored_bytes(weight.numel(), blocksize))
    missing = {} if wrong is None else {RIVAL: wrong}
    timed = {name: provider for name, provider in providers.items() if name not in missing}
    return Measured(stored + activations, timed, 2 * m * weight.numel(), m, missing)


def gate(
    name: str,
    weight: torch.Tensor,
    x: torch.Tensor,
    ours: Provider,
    theirs: Provider,
    transposed: bool = False,
    blocksize: int = BLOCKSIZE,
) -> str | None:
    """Hold two products with the quantized weight, x W^T or x W, against float64 on the decoded weight.

    Returns:
        Why bitsandbytes cannot be timed: it refuses this weight, or its result is another; None where it can.

    Raises:
        GateError: our error is larger than bitsandbytes' and than twice that of torch's product.
    """
    packed, state = qkernels.quantize_4bit(weight, **format_of(blocksize))
    decoded = qkernels.dequantize_4bit(packed, state)
    decoded = decoded if transposed else decoded.t()
    truth = x.double() @ decoded.double()

    def errors(result: object) -> tuple[float, float]:
        assert isinstance(result, torch.Tensor)
        difference = result.double() - truth
        return difference.abs().max().item(), difference.pow(2).mean().sqrt().item()

    own, wrong = errors(x @ decoded), None
    try:
        other = errors(theirs(weight)())
    except (RuntimeError, ValueError) as error:
        wrong, other = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", own
    scale = truth.pow(2).mean().sqrt().item()
    if not other[1] <= CLOSE * scale:
        wrong, other = f"it differs by {100 * other[1] / scale:.1f}% from what its weight gives", own
    for what, our, their, torchs in zip(("maximum", "RMS"), errors(ours(weight)()), other, own, strict=True):
        if not our <= max(their, 2 * torchs):
            raise GateError(
                f"{what} error of {name} is {our:.3g}, of bitsandbytes {their:.3g}, of torch's product {torchs:.3g}"
            )
    return wrong


def exact_weight(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Code times scale in float64 [N, K], of float32 codes and float32 scales; nothing is rounded."""
    assert state.state2 is not None
    byte = packed.view(-1).view(torch.uint8).long()
    codes = torch.stack([state.code.double()[byte >> 4], state.code.double()[byte & 15]], 1).view(-1)
    scales = decode_absmax_reference(state.absmax, state.state2.absmax, state.state2.code, state.offset).double()
    n = state.shape.numel()
    return (codes[:n] * scales.repeat_interleave(state.blocksize)[:n]).view(state.shape)


def _close(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
    if not error < CLOSE:
        raise GateError(f"{name} differs from that of peft on bitsandbytes by {100 * error:.1f}%")


def packed_layer(kind: type[torch.nn.Module], weight: torch.Tensor) -> torch.nn.Module:
    """A 4-bit linear layer, ours or bitsandbytes', with `weight` quantized on its device.

    The parameter is exchanged, as transformers does when it loads: `load_state_dict` would quantize a float32 copy, and
    bitsandbytes would decode to float32 ever after.  The layer is made without a weight: drawing a random one on the
    host takes longer than everything that is timed with it.
    """
    layer: Any = kind(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    parameter = type(layer.weight)
    layer.weight = parameter(weight, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(weight.device)


def _lora_of(base: torch.nn.Module, weight: torch.Tensor) -> torch.nn.Module:
    """The layer with an adapter in the weight's dtype, neither factor zero, and the same for each `base`."""
    base.requires_grad_(False)
    config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=["0"])
    adapted = peft.get_peft_model(torch.nn.Sequential(base), config)  # type: ignore[arg-type]
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = 0.02 * torch.randn(parameter.shape).to(weight)
    layer = adapted.base_model.model[0]  # type: ignore[union-attr,index]
    assert isinstance(layer, torch.nn.Module)
    return layer


@triton.jit
def _read_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(x))


def _reader(weight: torch.Tensor) -> Call:
    """Read a weight's packed codes and do nothing: what the memory alone allows a product with one row."""
    packed, _ = qkernels.quantize_4bit(weight, **FORMAT)
    words = packed.view(-1).view(torch.int32)
    block = 4096
    programs = triton.cdiv(words.numel(), block)
    out = torch.empty(programs, dtype=torch.int32, device=weight.device)
    return lambda: _read_kernel[(programs,)](words, out, words.numel(), BLOCK=block, num_warps=8)
