"""Every input check of `qkernels` and its message: argument, expected, got, remedy.

Room: checks only look.  None casts, copies or moves anything; each raises `UserError`, a `ValueError`, or returns None.
"""

from __future__ import annotations

import torch

from .errors import UserError
from .format import BLOCKSIZES, FLOAT_DTYPES, NESTED_BLOCKSIZE, QUANT_STORAGES, QUANT_TYPES, block_count, packed_length
from .norm import LARGEST_ROW
from .quant_state import QuantState


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise UserError(name, expected="a torch.Tensor", got=type(value).__name__, remedy="Pass a tensor.")
    if value.layout != torch.strided:
        raise UserError(name, expected="a dense tensor", got=value.layout, remedy="Convert it with .to_dense().")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise UserError(
            f"{name}.dtype",
            expected=_names(FLOAT_DTYPES),
            got=tensor.dtype,
            remedy="Convert it with .to(torch.float16), .to(torch.bfloat16) or .to(torch.float32).",
        )


def check_not_empty(name: str, tensor: torch.Tensor) -> None:
    if tensor.numel() == 0:
        raise UserError(
            name,
            expected="at least one element",
            got=f"shape {tuple(tensor.shape)}",
            remedy="There is nothing to quantize; leave this tensor as it is.",
        )


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise if `tensor` holds NaN or Inf; reads it once more and waits for the device."""
    # The maximum magnitude carries every NaN and Inf, and is one pass without a temporary.
    if torch.linalg.vector_norm(tensor, torch.inf).isfinite():
        return
    nans, infs = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    raise UserError(
        name,
        expected="finite values",
        got=f"{nans} NaN and {infs} Inf among {tensor.numel()} elements",
        remedy="Quantizing them would silently spoil their blocks: mend the weights, or pass check_finite=False.",
    )


def check_blocksize(blocksize: int) -> None:
    if not isinstance(blocksize, int) or blocksize not in BLOCKSIZES:
        raise UserError(
            "blocksize", expected=f"one of {', '.join(map(str, BLOCKSIZES))}", got=repr(blocksize), remedy="Use 64."
        )


def check_quant_type(quant_type: str) -> None:
    if quant_type not in QUANT_TYPES:
        raise UserError(
            "quant_type", expected=f"one of {', '.join(QUANT_TYPES)}", got=repr(quant_type), remedy="Use 'nf4'."
        )


def check_quant_storage(quant_storage: torch.dtype) -> None:
    if quant_storage not in QUANT_STORAGES:
        raise UserError(
            "quant_storage", expected=_names(QUANT_STORAGES), got=repr(quant_storage), remedy="Use torch.uint8."
        )


def check_same_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        raise UserError(
            name,
            expected=f"the device of {other_name}, {other.device}",
            got=str(tensor.device),
            remedy=f"Move one of them: {name}.to({str(other.device)!r}).",
        )


def check_out(name: str, out: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    check_tensor(name, out)
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise UserError(
            name,
            expected=f"a contiguous tensor of shape {tuple(shape)}, {dtype}, on {device}",
            got=f"shape {tuple(out.shape)}, strides {out.stride()}, {out.dtype}, on {out.device}",
            remedy="Allocate it with torch.empty of that shape, dtype and device, or leave it out.",
        )


def check_code(name: str, code: object) -> None:
    """An 8-bit map, as the kernels read it: float32[256], contiguous.  That it ascends is not looked at."""
    check_tensor(name, code)
    assert isinstance(code, torch.Tensor)
    if code.shape != (256,) or code.dtype != torch.float32 or not code.is_contiguous():
        raise UserError(
            name,
            expected="contiguous float32 of shape (256,)",
            got=f"{code.dtype} of shape {tuple(code.shape)}, strides {code.stride()}",
            remedy="Use create_dynamic_map().",
        )


def check_absmax(name: str, absmax: torch.Tensor, n: int, blocksize: int, dtype: torch.dtype) -> None:
    """One scale a block, as the kernels read them: one-dimensional and contiguous."""
    check_tensor(name, absmax)
    blocks = block_count(n, blocksize)
    if absmax.shape != (blocks,) or absmax.dtype != dtype or not absmax.is_contiguous():
        raise UserError(
            name,
            expected=f"{blocks} contiguous scales ({n} elements in blocks of {blocksize}) of {dtype}",
            got=f"shape {tuple(absmax.shape)}, strides {absmax.stride()}, {absmax.dtype}",
            remedy="Pass the absmax and blocksize that the tensor was quantized with.",
        )


def check_packed(name: str, packed: torch.Tensor, n: int) -> None:
    """`packed` holds exactly `n` nibbles."""
    check_tensor(name, packed)
    check_quant_storage(packed.dtype)
    expected = packed_length(n, packed.dtype)
    if packed.numel() != expected or not packed.is_contiguous():
        raise UserError(
            name,
            expected=f"{expected} contiguous elements of {packed.dtype}, the packed form of {n} weights",
            got=f"shape {tuple(packed.shape)}, strides {packed.stride()}",
            remedy="Pass the packed tensor together with the quant_state that quantize_4bit returned with it.",
        )


def check_is_state(quant_state: object) -> None:
    if not isinstance(quant_state, QuantState):
        raise UserError(
            "quant_state",
            expected="a qkernels.QuantState",
            got=f"{type(quant_state).__module__}.{type(quant_state).__qualname__}",
            remedy="Pass the state that quantize_4bit returned beside the packed tensor.",
        )


def check_quant_state(quant_state: QuantState | None, packed_name: str, packed: torch.Tensor) -> None:
    """A 4-bit state that fits `packed`: complete, consistent, and on the same device."""
    check_is_state(quant_state)
    assert quant_state is not None
    check_blocksize(quant_state.blocksize)  # type: ignore[arg-type]
    check_quant_type(quant_state.quant_type)  # type: ignore[arg-type]
    if quant_state.dtype not in FLOAT_DTYPES or quant_state.shape is None:
        raise UserError(
            "quant_state",
            expected=f"a shape, and a dtype out of {_names(FLOAT_DTYPES)}",
            got=f"shape {quant_state.shape}, dtype {quant_state.dtype}",
            remedy="Pass a state made by quantize_4bit.",
        )
    assert quant_state.blocksize is not None
    n = torch.Size(quant_state.shape).numel()
    check_packed(packed_name, packed, n)
    check_same_device(packed_name, packed, "quant_state.absmax", quant_state.absmax)
    dtype = torch.uint8 if quant_state.nested else torch.float32
    check_absmax("quant_state.absmax", quant_state.absmax, n, quant_state.blocksize, dtype)
    if quant_state.state2 is not None:
        _check_nested(quant_state, quant_state.state2)


def _check_nested(quant_state: QuantState, state2: QuantState) -> None:
    """The parts of double quantization: complete, consistent, and on the device of the rest."""
    scales, offset = quant_state.absmax, quant_state.offset
    is_scalar = isinstance(offset, torch.Tensor) and offset.dim() == 0 and offset.dtype == torch.float32
    if state2.blocksize != NESTED_BLOCKSIZE or not is_scalar:
        raise UserError(
            "quant_state.state2",
            expected=f"a float32 scalar tensor as offset, and blocks of {NESTED_BLOCKSIZE}",
            got=f"offset {offset!r}, blocks of {state2.blocksize}",
            remedy="Quantize with compress_statistics=True.",
        )
    assert offset is not None
    check_absmax("quant_state.state2.absmax", state2.absmax, scales.numel(), NESTED_BLOCKSIZE, torch.float32)
    check_code("quant_state.state2.code", state2.code)
    assert state2.code is not None
    for name, tensor in (("state2.absmax", state2.absmax), ("state2.code", state2.code), ("offset", offset)):
        check_same_device(f"quant_state.{name}", tensor, "quant_state.absmax", scales)


def check_weight(packed_name: str, packed: torch.Tensor, quant_state: QuantState) -> None:
    """The packed codes of a matrix [N, K] and the state that decodes them."""
    check_quant_state(quant_state, packed_name, packed)
    assert quant_state.shape is not None
    if len(quant_state.shape) != 2:
        raise UserError(
            "quant_state.shape",
            expected="(N, K): a matrix",
            got=str(tuple(quant_state.shape)),
            remedy="Quantize a weight of shape (out_features, in_features).",
        )


def check_activations(
    name: str,
    A: torch.Tensor,
    packed: torch.Tensor,
    shape: torch.Size | tuple[int, ...],
    bias: torch.Tensor | None,
    transposed: bool = False,
) -> None:
    """A[..., K] times the transpose of a weight of `shape` (N, K), plus bias[N]; or transposed, A[..., N] times it."""
    check_floating(name, A)
    check_same_device(name, A, "B", packed)
    inner = shape[0] if transposed else shape[1]
    if A.dim() == 0 or A.shape[-1] != inner:
        raise UserError(
            name,
            expected=f"a last dimension of {'N' if transposed else 'K'} = {inner}, "
            f"for a weight of shape {tuple(shape)} = (N, K)",
            got=f"shape {tuple(A.shape)}",
            remedy="The weight is stored as (out_features, in_features); quantize it in that orientation.",
        )
    if bias is not None:
        check_floating("bias", bias)
        check_same_device("bias", bias, name, A)
        if tuple(bias.shape) != (shape[0],):
            raise UserError(
                "bias", expected=f"shape ({shape[0]},)", got=str(tuple(bias.shape)), remedy="One value an output."
            )


def check_adapter(
    lora_A: torch.Tensor, lora_B: torch.Tensor, shape: torch.Size | tuple[int, ...], A: torch.Tensor
) -> None:
    """lora_A[r, K] and lora_B[N, r] beside a weight of `shape` (N, K), on A's device."""
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_floating(name, factor)
        check_same_device(name, factor, "A", A)
    N, K = shape
    sizes = tuple(lora_A.shape), tuple(lora_B.shape)
    if sizes != ((lora_A.shape[0], K), (N, lora_A.shape[0])):
        raise UserError(
            "lora_A, lora_B",
            expected=f"shapes (r, {K}) and ({N}, r)",
            got=f"{sizes[0]} and {sizes[1]}",
            remedy="lora_A is the factor next to the input, lora_B the one next to the output.",
        )


def check_dropout(name: str, x: torch.Tensor, p: float, seed: torch.Tensor) -> None:
    """A probability and int64[1] on x's device."""
    check_same_device("seed", seed, name, x)
    if not 0.0 <= p <= 1.0 or seed.dtype != torch.int64 or seed.numel() != 1:
        raise UserError(
            "p, seed",
            expected="a probability from 0 to 1, and one int64",
            got=f"{p}, {seed.dtype}{list(seed.shape)}",
            remedy="Make a seed by torch.randint(2**63 - 1, (1,), device=x.device).",
        )


def check_normalized(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> None:
    """Rows of 1 to `LARGEST_ROW` elements, a weight and a bias for each, and a residual like x."""
    check_floating("x", x)
    size = x.shape[-1] if x.dim() else 0
    if not 1 <= size <= LARGEST_ROW:
        raise UserError(
            "x.shape",
            expected=f"[..., C] with C from 1 to {LARGEST_ROW}",
            got=list(x.shape),
            remedy="Longer rows are for torch.nn.functional.layer_norm and rms_norm.",
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_floating(name, tensor)
            _check_beside(name, tensor, (size,), "x", x)
    if residual is not None:
        _check_beside("residual", residual, tuple(x.shape), "x", x)
        _check_dtype("residual", residual, x.dtype)


def check_token_attention(query: torch.Tensor, others: dict[str, torch.Tensor], length: torch.Tensor) -> None:
    """`others`: key and value like the query; keys, values and a bias [rows or 1, heads, 1, L] of its cache."""
    check_floating("query", query)
    if query.dim() != 4 or query.shape[2] != 1:
        raise UserError(
            "query.shape",
            expected="[rows, heads, 1, D]",
            got=list(query.shape),
            remedy="It is for one new token; several are for torch.nn.functional.scaled_dot_product_attention.",
        )
    rows, heads, _, size = query.shape
    cache = rows, heads, others["keys"].shape[2] if others["keys"].dim() == 4 else 0, size
    bias_rows = 1 if others["bias"].shape[:1] == (1,) else rows
    shapes = {"keys": cache, "values": cache, "bias": (bias_rows, heads, 1, cache[2])}
    for name, tensor in others.items():
        _check_beside(name, tensor, shapes.get(name, tuple(query.shape)), "query", query)
        _check_dtype(name, tensor, query.dtype)
        if name in ("keys", "values") and not tensor.is_contiguous():
            raise UserError(
                name,
                expected="a contiguous tensor",
                got=f"strides {tensor.stride()}",
                remedy="It is written in its place.",
            )
    check_same_device("length", length, "query", query)
    if length.dtype != torch.int64 or length.numel() != 1:
        raise UserError(
            "length",
            expected="one int64",
            got=f"{length.dtype}{list(length.shape)}",
            remedy="Pass the number of tokens in the cache as a tensor.",
        )


def _check_beside(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], other_name: str, other: torch.Tensor
) -> None:
    """A shape, on the device of another tensor."""
    check_same_device(name, tensor, other_name, other)
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{name}.shape", expected=str(list(shape)), got=list(tensor.shape), remedy=f"It must fit {other_name}."
        )


def _check_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise UserError(f"{name}.dtype", expected=str(dtype), got=tensor.dtype, remedy=f"Convert it with .to({dtype}).")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
