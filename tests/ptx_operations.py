"""What `ptx_cpu.py` takes apart and computes: PTX as a list of instructions, and those that have only operands."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Values = NDArray[Any]
_SIZES = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}


def whole_warps(active: Values) -> bool:
    return bool((active.reshape(-1, 32) == active[::32, None]).all())


def names_of(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip().strip("{}").split(",")]


def dtype_of(kind: str) -> Any:
    if kind in ("f32", "pred"):
        return np.float32 if kind == "f32" else bool
    return {"s": {"32": np.int32, "64": np.int64}}.get(kind[0], _SIZES)[kind[1:]]


def rounded(value: Values, to: str) -> Values:
    """Bits of float32 rounded to 16, as uint16."""
    kind = torch.bfloat16 if to == "bf16x2" else torch.float16
    return torch.from_numpy(value.copy()).to(kind).view(torch.int16).numpy().view(np.uint16)


def halves(words: Values, kind: str) -> tuple[Values, Values]:
    """The two 16-bit numbers of each word in float64, the low one first."""
    return tuple(from_bits((words >> np.uint32(shift)).astype(np.uint16), kind) for shift in (0, 16))


def from_bits(bits: Values, kind: str) -> Values:
    """16-bit numbers in float64."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return torch.from_numpy(bits.view(np.int16).copy()).view(dtype).double().numpy()


def _dp4a(a: Values, b: Values, c: Values) -> Values:
    """c plus the sum of four products of bytes."""
    bytes_of = [(value[..., None] >> np.arange(0, 32, 8, dtype=np.uint32)) & np.uint32(255) for value in (a, b)]
    return c + (bytes_of[0] * bytes_of[1]).sum(-1).astype(np.uint32)


def _lop3(a: Values, b: Values, c: Values, table: Values) -> Values:
    result = np.zeros_like(a)
    for index in range(8):
        if int(table[0]) >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def _prmt(a: Values, b: Values, selector: Values) -> Values:
    source = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros_like(a)
    for index in range(4):
        nibble = selector >> np.uint32(4 * index) & np.uint32(15)
        assert (nibble < 8).all()
        byte = source >> (nibble.astype(np.uint64) * np.uint64(8)) & np.uint64(255)
        result |= byte.astype(np.uint32) << np.uint32(8 * index)
    return result


def _funnel(low: Values, high: Values, bits: Values) -> Values:
    """shf.r.wrap: 32 bits of two words from a bit of the low one on."""
    both = high.astype(np.uint64) << np.uint64(32) | low
    return (both >> (bits & np.uint32(31)).astype(np.uint64)).astype(np.uint32)


def _fma(a: Values, b: Values, c: Values) -> Values:
    return (a.astype(np.float64) * b + c) if a.dtype == np.float32 else a * b + c


def _maximum(a: Values, b: Values) -> Values:
    """A NaN loses, where the instruction does not say otherwise."""
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def _reciprocal(a: Values) -> Values:
    """1 / a rounded to the nearest, from which a GPU's may be an ulp away; what is below the normal numbers is 0."""
    least = np.finfo(np.float32).tiny
    result = np.float32(1) / np.where(np.abs(a) < least, np.float32(0) * a, a)
    return np.where(np.abs(result) < least, np.float32(0) * result, result)


def _extracted(a: Values, begin: Values, length: Values) -> Values:
    """So many bits from `begin` on; of a signed number the uppermost of them is the sign."""
    bits = a.view(np.uint32) >> begin.view(np.uint32) & ((np.uint32(1) << length.view(np.uint32)) - np.uint32(1))
    if a.dtype.kind == "u":
        return bits
    above = np.uint32(32) - length.view(np.uint32)
    return (bits << above).view(np.int32) >> above.view(np.int32)


def _divided(a: Values, b: Values) -> Values:
    return np.trunc(a / b) if a.dtype.kind == "i" else a // b


COMPARISONS: dict[str, Callable[..., Values]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
OPERATIONS: dict[str, Callable[..., Values]] = {
    "mov": lambda a: a,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _divided,
    "rem": np.fmod,
    "mad": _fma,
    "fma": _fma,
    "neg": np.negative,
    "min": np.minimum,
    "max": _maximum,
    "abs": np.abs,
    "rcp": _reciprocal,
    "not": np.invert,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "bfe": _extracted,
    "shf": _funnel,
    "dp4a": _dp4a,
    "lop3": _lop3,
    "prmt": _prmt,
}


def parsed(ptx: str) -> tuple[list[tuple[str, ...]], dict[str, int]]:
    """Instructions as (predicate, name, operands...), and where each label stands."""
    body = ptx[ptx.index("\n{") + 2 : ptx.index("$L__func_end0")]
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"^\s*\.loc[^\n]*", "", body, flags=re.M)
    body = re.sub(r"^\s*(\$\w+):", r"label \1;", body, flags=re.M)
    code: list[tuple[str, ...]] = []
    labels: dict[str, int] = {}
    for text in body.split(";"):
        # Braces that open and close a block of assembly stand alone, those of vectors among operands.
        statement = re.sub(r"^[\s{}]+", "", text).strip()
        if not statement or statement.startswith("."):
            continue
        if statement.startswith("label"):
            labels[statement.split()[1]] = len(code)
            continue
        predicate, op, operands = re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", statement, re.S).groups()  # type: ignore
        parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands)
        code.append((predicate or "", op, *parts))
    return code, labels
