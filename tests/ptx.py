"""Run a kernel that was compiled for an older GPU on the one at hand, through the CUDA driver.

The driver translates PTX of an older architecture (not its machine code) for the present GPU.  So the code that a T4
would run is tested where there is no T4; its speed is not.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from typing import Any

import torch

from qkernels.aot import compile_variant
from qkernels.variants import Variant

Grid = tuple[int, int, int]

_C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
# What a kernel may take without asking, and the driver's number for asking for more.
_DEFAULT_SHARED_BYTES = 48 * 1024
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class PtxKernel:
    """A variant compiled for `arch`, callable on the present GPU.

    Args:
        variant: from `qkernels.variants.variants()`.
        arch: "sm_75", ...; must not be newer than the GPU, and "sm_90" (whose PTX is of sm_90a) must be the GPU's own.
    """

    def __init__(self, variant: Variant, arch: str) -> None:
        self._variant = variant
        compiled = compile_variant(variant, arch)
        self._shared_bytes = compiled.metadata.shared
        self._threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
        self._scratch_pointers = scratch_pointers(compiled, variant)
        torch.cuda.synchronize()  # makes torch's context the current one, where nothing has yet
        self._cuda = ctypes.CDLL("libcuda.so.1")
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), compiled.asm["ptx"].encode())
        self._call("cuModuleGetFunction", ctypes.byref(self._function), module, compiled.metadata.name.encode())
        if self._shared_bytes > _DEFAULT_SHARED_BYTES:
            self._call("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, self._shared_bytes)

    def __call__(self, grid: Grid, arguments: Mapping[str, torch.Tensor | int | float | None]) -> None:
        """Launch on torch's current stream.

        Args:
            arguments: a value for each name in the variant's signature; others are left alone.
        """
        values = [_pack(arguments[name], self._variant.signature[name]) for name in argument_names(self._variant)]
        values += [ctypes.c_uint64(0)] * self._scratch_pointers
        addresses = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._call(
            "cuLaunchKernel", self._function, *grid, self._threads, 1, 1, self._shared_bytes, stream, addresses, None
        )

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._cuda, name)(*arguments)
        if error:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(error, ctypes.byref(text))
            raise RuntimeError(f"{name} failed for {self._variant.name}: {error}, {(text.value or b'').decode()}")


def argument_names(variant: Variant) -> list[str]:
    """The run-time arguments in the kernel's order."""
    return [name for name in variant.kernel.arg_names if name in variant.signature]


def scratch_pointers(compiled: Any, variant: Variant) -> int:
    """How many parameters the PTX has after the variant's own.

    Triton adds pointers to scratch memory; a kernel that uses none may be given null.
    """
    ptx = compiled.asm["ptx"]
    declared = re.findall(r"\.param \.(\w+)", ptx[: ptx.index("{")])
    own = [_ptx_type(variant.signature[name]) for name in argument_names(variant)]
    assert declared[: len(own)] == own, f"{variant.name}: the PTX takes {declared}, the signature says {own}"
    added = declared[len(own) :]
    assert set(added) <= {"u64"}, f"{variant.name}: unknown parameters {added}"
    scratch = {name: getattr(compiled.metadata, name) for name in ("global_scratch_size", "profile_scratch_size")}
    assert not any(scratch.values()), f"{variant.name}: needs {scratch}"
    return len(added)


def _ptx_type(kind: str) -> str:
    """The PTX type of a parameter of a Triton type: "*fp16" is u64, "i32:16" is u32."""
    return "u64" if kind.startswith("*") else {"i32": "u32", "i64": "u64", "fp32": "f32"}[kind.split(":")[0]]


def _pack(value: torch.Tensor | int | float | None, kind: str) -> Any:
    if kind.startswith("*"):
        assert isinstance(value, torch.Tensor)
        return ctypes.c_uint64(value.data_ptr())
    return _C_TYPES[kind.split(":")[0]](value)
