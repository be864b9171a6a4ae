"""The public functions: the names and signatures of `bitsandbytes.functional`, checked inputs, one operator each.

Room: the door of `qkernels`.  Checks come first (`checks.py`), then the operator (`ops.py`); no mathematics here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import autograd, checks
from .dropout import threshold_and_scale
from .errors import UserError
from .format import NESTED_BLOCKSIZE, code_table, dynamic_map
from .known import checked_weight, kind_of, known_weight, scales_of, weight_of
from .ops import in_eager_mode, operator, plan_product
from .quant_state import QuantState


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
    *,
    check_finite: bool = True,
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor to 4 bits in blocks.

    Args:
        A: float32, float16 or bfloat16, any shape; a non-contiguous tensor is copied in row-major order.
        absmax: written with the scales, float32[ceil(n/blocksize)] (uint8 with compress_statistics); None allocates.
        out: written with the packed codes; None allocates.
        blocksize: elements that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096; None is 64.
        compress_statistics: quantize the scales to 8 bits (double quantization).
        quant_type: "nf4" or "fp4".
        quant_storage: dtype that the packed bytes are viewed as: uint8, float16, bfloat16 or float32.
        check_finite: raise on NaN and Inf.  It waits for the device, so it is skipped while torch.compile traces or a
            CUDA graph is captured.  When False, a NaN takes index 0 and is ignored by its
            block's scale, and an Inf makes its block's scale infinite.

    Returns:
        packed codes of shape [ceil(ceil(n/2) / itemsize), 1], and the QuantState that decodes them.  An all-zero block
        decodes to exact zeros.

    Raises:
        UserError (a ValueError): a wrong dtype, shape, device, blocksize, quant_type or quant_storage; NaN or Inf.
    """
    blocksize = 64 if blocksize is None else blocksize
    checks.check_floating("A", A)
    checks.check_not_empty("A", A)
    checks.check_blocksize(blocksize)
    checks.check_quant_type(quant_type)
    checks.check_quant_storage(quant_storage)
    check = check_finite and not _must_not_wait(A)
    packed, scales = operator("quantize_4bit", A)(A.contiguous(), blocksize, quant_type, quant_storage, check)
    offset, state2 = None, None
    if compress_statistics:
        scales, offset, state2 = _quantize_scales(scales, NESTED_BLOCKSIZE)
    # The scales carry every NaN and Inf, and so does their mean.  It is looked at on the host: isfinite() on the device
    # would be four launches more.
    if check and not math.isfinite((scales.mean() if offset is None else offset).item()):
        checks.check_finite("A", A)
    if absmax is not None:
        checks.check_out("absmax", absmax, scales.shape, scales.dtype, scales.device)
        scales = absmax.copy_(scales)
    if out is not None:
        checks.check_out("out", out, packed.shape, packed.dtype, packed.device)
        packed = out.copy_(packed)
    state = QuantState(
        absmax=scales,
        shape=A.shape,
        code=code_table(quant_type, A.device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=A.dtype,
        offset=offset,
        state2=state2,
    )
    return packed, state


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` with quant_type "nf4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` with quant_type "fp4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Decode what `quantize_4bit` packed.

    Args:
        A: packed codes.
        quant_state: from `quantize_4bit`.  None: `absmax`, `blocksize`, `quant_type` and `out` describe the tensor.
        absmax: float32 scales, used without `quant_state` only.
        out: written with the result, contiguous; needed without `quant_state`, whose shape and dtype it then gives.
        blocksize: used without `quant_state` only; None is 64.
        quant_type: used without `quant_state` only.

    Returns:
        Tensor of the original shape and dtype: table value times scale in float32, rounded once.

    Raises:
        UserError (a ValueError): the arguments do not fit each other.
    """
    checks.check_tensor("A", A)
    if quant_state is None:
        if absmax is None or out is None:
            raise UserError(
                "quant_state",
                expected="a QuantState, or absmax and out instead",
                got="none of them",
                remedy="Pass the state that quantize_4bit returned.",
            )
        checks.check_floating("out", out)
        quant_state = QuantState(
            absmax, out.shape, blocksize=64 if blocksize is None else blocksize, quant_type=quant_type, dtype=out.dtype
        )
    checks.check_quant_state(quant_state, "A", A)
    scales, nested = scales_of(quant_state)
    arguments = (A, scales, quant_state.blocksize, quant_state.quant_type, quant_state.shape, quant_state.dtype)
    if out is None:
        return operator("dequantize_4bit", A)(*arguments, *nested)
    assert quant_state.shape is not None
    assert quant_state.dtype is not None
    checks.check_out("out", out, torch.Size(quant_state.shape), quant_state.dtype, A.device)
    operator("dequantize_4bit.out", A)(*arguments, *nested, out=out)
    return out


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` with quant_type "nf4"."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` with quant_type "fp4"."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor to 8-bit indices into a map, in blocks.

    Args:
        A: float32, float16 or bfloat16, any shape; a non-contiguous tensor is copied in row-major order.
        code: float32[256] ascending; None is the signed dynamic map.
        absmax: written with the scales, float32[ceil(n/blocksize)] (uint8 when nested); None allocates.
        out: written with the indices, uint8 of A's shape; None allocates.
        blocksize: one of the eight sizes of `quantize_4bit`.
        nested: quantize the scales too.

    Returns:
        uint8 indices of A's shape, and the QuantState that decodes them.

    Raises:
        UserError (a ValueError): a wrong dtype, shape, device or blocksize.
    """
    checks.check_floating("A", A)
    checks.check_not_empty("A", A)
    checks.check_blocksize(blocksize)
    if code is None:
        code = dynamic_map(A.device)
    checks.check_code("code", code)
    checks.check_same_device("code", code, "A", A)
    index, scales = operator("quantize_blockwise", A)(A.contiguous(), code, blocksize)
    offset, state2 = None, None
    if nested:
        scales, offset, state2 = _quantize_scales(scales, blocksize)
    if absmax is not None:
        checks.check_out("absmax", absmax, scales.shape, scales.dtype, scales.device)
        scales = absmax.copy_(scales)
    if out is not None:
        checks.check_out("out", out, index.shape, index.dtype, index.device)
        index = out.copy_(index)
    return index, QuantState(scales, A.shape, code, blocksize, dtype=A.dtype, offset=offset, state2=state2)


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Decode what `quantize_blockwise` made.

    Args:
        A: uint8 indices.
        quant_state: from `quantize_blockwise`; None: `absmax`, `code` and `blocksize` describe the tensor.
        absmax: float32 scales, used without `quant_state` only.
        code: float32[256], used without `quant_state` only; None is the signed dynamic map.
        out: written with the result, of A's shape and the state's dtype; None allocates.
        blocksize: used without `quant_state` only.
        nested: accepted for bitsandbytes' signature; the state knows.

    Returns:
        Tensor of A's shape, in the dtype of the state, float32 without one.

    Raises:
        UserError (a ValueError): the arguments do not fit each other.
    """
    checks.check_tensor("A", A)
    if A.dtype != torch.uint8:
        raise UserError("A.dtype", expected="torch.uint8", got=A.dtype, remedy="Pass quantize_blockwise's indices.")
    if quant_state is None:
        if absmax is None:
            raise UserError(
                "quant_state",
                expected="a QuantState, or absmax instead",
                got="neither",
                remedy="Pass the state that quantize_blockwise returned.",
            )
        code = dynamic_map(A.device) if code is None else code
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    checks.check_is_state(quant_state)
    blocksize, code, dtype = quant_state.blocksize, quant_state.code, quant_state.dtype  # type: ignore[assignment]
    checks.check_blocksize(blocksize)
    scales = quant_state.absmax
    if quant_state.state2 is not None and quant_state.offset is not None:
        scales = dequantize_blockwise(scales, quant_state.state2) + quant_state.offset
    checks.check_same_device("A", A, "quant_state.absmax", scales)
    checks.check_absmax("quant_state.absmax", scales, A.numel(), blocksize, torch.float32)
    checks.check_code("code", code)
    checks.check_same_device("code", code, "A", A)  # type: ignore[arg-type]
    arguments = (A.contiguous(), scales, code, blocksize, dtype)
    if out is None:
        return operator("dequantize_blockwise", A)(*arguments)
    checks.check_out("out", out, A.shape, dtype, A.device)  # type: ignore[arg-type]
    operator("dequantize_blockwise.out", A)(*arguments, out=out)
    return out


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """y = A W^T + bias, with W [N, K] held in 4 bits.

    Differentiable with respect to A and bias; W is frozen.  Forward and backward decode W to A's dtype, and nothing
    decoded is kept between them.  Under autocast, A and bias are cast to its dtype.

    Args:
        A: activations [..., K], float32, float16 or bfloat16; the leading dimensions may be empty.
        B: packed codes of W, in any shape that keeps their order, [ceil(N*K/2), 1] or its transpose.
        quant_state: W's state, of shape (N, K).
        out: written with the result, [..., N]; no gradient flows through it.
        bias: [N]; cast to A's dtype.

    Returns:
        [..., N] in A's dtype (in autocast's dtype under autocast).

    Raises:
        UserError (a ValueError): the shapes, dtypes or devices do not fit each other.
    """
    known = known_weight(B, quant_state)
    weight = checked_weight(B, quant_state) if known is None else known.weight
    kind = None if known is None else kind_of(A, bias)
    found = None if known is None else known.plans.get(kind)
    if found is None:
        checks.check_activations("A", A, weight[0], weight[1], bias)
    dtype = (autocast_dtype(A) or A.dtype) if found is None else found[0]
    if dtype is not A.dtype:
        A = A.to(dtype)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    plan = plan_product(A, bias, weight) if found is None else found[1]
    if plan is None:
        result = torch.ops.qkernels.gemm_4bit.default(A, *weight[:5], bias, *weight[5:])
    else:
        result = autograd.matmul(A, bias, weight, plan)
    if found is None and plan is not None and known is not None:
        known.keep(kind, dtype, plan)
    if out is None:
        return result
    checks.check_out("out", out, result.shape, result.dtype, result.device)
    return out.copy_(result)


def matmul_4bit_dx(grad: Tensor, B: Tensor, quant_state: QuantState) -> Tensor:
    """dA = dY W: what `matmul_4bit` computes in its backward pass; W [N, K] held in 4 bits.

    Args:
        grad: dY [..., N], float32, float16 or bfloat16.
        B: packed codes of W, as for `matmul_4bit`.
        quant_state: W's state, of shape (N, K).

    Returns:
        dA [..., K] in grad's dtype; differentiable.

    Raises:
        UserError: the shapes, dtypes or devices do not fit each other.
    """
    weight = weight_of(B, quant_state)
    checks.check_activations("grad", grad, weight[0], weight[1], None, transposed=True)
    if in_eager_mode(grad):
        return autograd.matmul_dx(grad, weight)
    return torch.ops.qkernels.gemm_4bit_dx.default(grad, *weight)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """Matrix-vector product y = A W^T with W in 4 bits; `matmul_4bit` under bitsandbytes' older name.

    Args:
        A: [..., K].
        B: packed codes of W [N, K].
        out: written with the result; None allocates.
        transposed_A, transposed_B: accepted for bitsandbytes' signature, which ignores them too.
        state: W's QuantState.
    """
    return matmul_4bit(A, B, state, out)  # type: ignore[arg-type]


def seeded_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Dropout whose mask can be made again: x / (1 - p) where it is kept, else 0.

    The same seed, p and size give the same mask on every device, for every dtype.  Not differentiable; the gradient is
    `seeded_dropout(grad, p, seed)`.

    Args:
        x: float32, float16 or bfloat16, any shape; a non-contiguous tensor is copied in row-major order.
        p: share that is dropped, 0 to 1.
        seed: int64[1] on x's device.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        UserError (a ValueError): a wrong dtype, probability, seed or device.
    """
    checks.check_floating("x", x)
    checks.check_dropout("x", x, p, seed)
    return operator("dropout", x)(x.detach().contiguous(), seed, *threshold_and_scale(p))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants products with `x` in; None outside autocast."""
    # Autocast knows nothing of the meta device and would raise.  (torch.amp.is_autocast_available would say so, but
    # torch 2.11 cannot trace it.)
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def _quantize_scales(scales: Tensor, blocksize: int) -> tuple[Tensor, Tensor, QuantState]:
    """Double quantization: the scales less their mean in 8 bits, the mean, and the state that decodes them."""
    code = dynamic_map(scales.device)
    index, absmax, offset = operator("quantize_scales", scales)(scales, code, blocksize)
    return index, offset, QuantState(absmax, scales.shape, code, blocksize, dtype=scales.dtype)


def _must_not_wait(A: Tensor) -> bool:
    return A.is_meta or torch.compiler.is_compiling() or (A.is_cuda and torch.cuda.is_current_stream_capturing())
