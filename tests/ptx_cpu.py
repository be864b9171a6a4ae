"""Run a compiled kernel's PTX on the CPU: what a GPU would execute, instruction by instruction, without one.

Triton's interpreter knows no inline assembly, so kernels that name their own instructions (shared memory by address,
shuffles, tensor cores) cannot be run by it.  Here a program's threads are one numpy vector.  It sees addresses, masks
and arithmetic; it sees neither races, as all threads do one instruction before any does the next, nor caches.  Numbers
are those of a GPU, but sums inside a tensor core are taken in float64.

An instruction that is not known is an error, so is an address outside of the tensors or of shared memory, a shared word
that was never written, or a barrier that not all threads reach.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ptx_operations import (
    COMPARISONS,
    OPERATIONS,
    Values,
    dtype_of,
    from_bits,
    halves,
    names_of,
    parsed,
    rounded,
    whole_warps,
)

from qkernels.aot import compile_variant
from qkernels.variants import Variant

_AXES = ("x", "y", "z")
_SPECIAL = {f"%{name}.{axis}": 3 * n + i for n, name in enumerate(("ctaid", "nctaid")) for i, axis in enumerate(_AXES)}
_WIDER: dict[Any, Any] = {np.uint16: np.uint32, np.int32: np.int64, np.uint32: np.uint64}
_GAP = 1 << 20  # between tensors, and before the first


class CpuKernel:
    """A variant compiled for `arch`, callable on tensors of the CPU, which it writes to.

    Args:
        variant: from `qkernels.variants`.
        arch: "sm_75", "sm_80" or "sm_90", of whose instructions those of TMA, wgmma and clusters are not known.
    """

    def __init__(self, variant: Variant, arch: str) -> None:
        compiled = compile_variant(variant, arch)
        self._variant = variant
        self._threads = 32 * compiled.metadata.num_warps
        self._shared_bytes = compiled.metadata.shared
        self._code, self._labels = parsed(compiled.asm["ptx"])

    def __call__(self, grid: tuple[int, int, int], arguments: Mapping[str, Any]) -> None:
        """Run every program of the grid, one after the other.

        Args:
            arguments: a value for each name in the variant's signature.
        """
        memory = _Memory()
        values = []
        for name in self._variant.kernel.arg_names:
            if name in self._variant.signature:
                value = arguments[name]
                values.append(memory.add(value) if isinstance(value, torch.Tensor) else value)
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    program = _Program(self, memory, [*values, 0, 0], (x, y, z, *grid))
                    program.run()
        memory.write_back()

    @property
    def parts(self) -> tuple[list[tuple[str, ...]], dict[str, int], int, int]:
        return self._code, self._labels, self._threads, self._shared_bytes


class _Memory:
    """Tensors at addresses of their own, far from each other."""

    def __init__(self) -> None:
        self._tensors: list[tuple[int, torch.Tensor, Values]] = []
        self._next = _GAP

    def add(self, tensor: torch.Tensor) -> int:
        assert tensor.is_contiguous()
        content = tensor.view(-1).view(torch.uint8).numpy().copy()
        begin = self._next
        self._tensors.append((begin, tensor, content))
        self._next += (len(content) // _GAP + 2) * _GAP
        return begin

    def write_back(self) -> None:
        for _, tensor, content in self._tensors:
            tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(content))

    def _of(self, addresses: Values, size: int) -> tuple[Values, Values]:
        for begin, _, content in self._tensors:
            if begin <= addresses[0] < begin + len(content):
                offsets = (addresses - np.uint64(begin)).astype(np.int64)
                assert 0 <= offsets.min() <= offsets.max() <= len(content) - size, "outside of the tensor"
                assert (offsets % size == 0).all(), "not aligned"
                return content, offsets
        raise AssertionError("outside of every tensor")

    def load(self, addresses: Values, size: int) -> Values:
        content, offsets = self._of(addresses, size)
        return content[offsets[:, None] + np.arange(size)]

    def store(self, addresses: Values, data: Values) -> None:
        content, offsets = self._of(addresses, data.shape[1])
        content[offsets[:, None] + np.arange(data.shape[1])] = data


class _Program:
    def __init__(self, kernel: CpuKernel, memory: _Memory, values: list[int], ids: tuple[int, ...]) -> None:
        self.code, self.labels, self.threads, shared_bytes = kernel.parts
        self.memory, self.values, self.ids = memory, values, ids
        self.shared = np.zeros(shared_bytes, np.uint8)
        self.written = np.zeros(shared_bytes, bool)
        self.registers: dict[str, Values] = {}

    def run(self) -> None:
        """The threads that are furthest behind go on, so that those of a branch meet again after it."""
        at = np.zeros(self.threads, np.int64)
        end = len(self.code)
        while (at < end).any():
            here = int(at.min())
            active = at == here
            predicate, op, *operands = self.code[here]
            if predicate:
                active &= self.registers[predicate.lstrip("!")] ^ (predicate[0] == "!")
            at[at == here] += 1
            if op.startswith("bra"):
                at[active] = self.labels[operands[0]]
            elif op == "ret":
                at[active] = end
            elif op == "bar.warp.sync":
                assert whole_warps(active)
            elif op.startswith("bar."):
                assert active.all(), "a barrier that not all threads reach"
            elif op == "prefetch.global.L2":
                self.memory.load(self.address(operands[0])[active], 1)  # it must be there
            elif op.startswith("griddepcontrol."):
                pass  # the kernel before has ended
            elif active.any():
                self._execute(op, operands, active)

    # Operands

    def get(self, operand: str, dtype: Any) -> Values:
        """A register, a special register, the start of shared memory or an immediate, as a vector over the threads."""
        if operand in self.registers:
            value = self.registers[operand]
            if value.dtype == bool or value.dtype == dtype:
                return value
            if value.dtype.itemsize == np.dtype(dtype).itemsize:
                return value.view(dtype)
            return value.astype(f"u{value.dtype.itemsize}").astype(dtype)
        if re.fullmatch(r"%(r|rd|rs|f)\d+", operand):  # never written, and so never to count
            return np.full(self.threads, 0x7FC1DEAD, np.uint32).astype(f"u{np.dtype(dtype).itemsize}").view(dtype)
        if operand == "%tid.x":
            return np.arange(self.threads).astype(dtype)
        if operand == "%laneid":
            return (np.arange(self.threads) % 32).astype(dtype)
        if operand in _SPECIAL:
            return np.full(self.threads, self.ids[_SPECIAL[operand]]).astype(dtype)
        if operand == "global_smem":
            return np.zeros(self.threads, dtype)
        if re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):
            return np.full(self.threads, int(operand[2:], 16), np.uint32).view(np.float32).astype(dtype)
        if dtype is bool:
            return np.full(self.threads, operand not in ("0", "false"))
        bits = 8 * np.dtype(dtype).itemsize
        return np.full(self.threads, int(operand.rstrip("U"), 0) % (1 << bits), f"u{bits // 8}").view(dtype)

    def set(self, operand: str, value: Values, active: Values) -> None:
        old = self.registers.get(operand)
        if active.all() or old is None:
            self.registers[operand] = value.copy()
        else:
            self.registers[operand] = np.where(active, value, old.view(value.dtype))

    def address(self, operand: str) -> Values:
        """Of "[register + immediate]"."""
        register, offset = re.fullmatch(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()  # type: ignore
        name = self.registers[register]
        return name.astype(np.uint64) + np.uint64(int(offset or "0", 0))

    # Instructions

    def _execute(self, op: str, operands: list[str], active: Values) -> None:
        name = op.split(".")[0]
        kind = op.split(".")[-1]
        if name in ("ld", "st"):
            self._move(op, operands, active)
        elif name == "mma":
            self._mma(op, operands, active)
        elif name == "shfl":
            assert op in ("shfl.sync.idx.b32", "shfl.sync.bfly.b32", "shfl.sync.down.b32")
            assert whole_warps(active)
            thread, lane = np.arange(self.threads), self.get(operands[2], np.int32) % 32
            if ".down." in op:
                source = np.where(thread % 32 + lane < 32, thread + lane, thread)
            else:
                source = thread ^ lane if ".bfly." in op else thread // 32 * 32 + lane
            self.set(operands[0], self.get(operands[1], np.uint32)[source], active)
        elif name == "mov" and "{" in "".join(operands):
            self._pack(op, operands, active)
        elif name == "setp":
            dtype = dtype_of(kind)
            a, b = (self.get(operand, dtype) for operand in operands[1:])
            self.set(operands[0], COMPARISONS[op.split(".")[1]](a, b), active)
        elif name == "selp":
            a, b = (self.get(operand, dtype_of(kind)) for operand in operands[1:3])
            self.set(operands[0], np.where(self.registers[operands[3]], a, b), active)
        elif name == "stmatrix":
            self._store_matrix(op, operands, active)
        elif name == "ldmatrix":
            self._load_matrix(op, operands, active)
        elif name == "cvt":
            self._convert(op, operands, active)
        else:
            self._compute(op, operands, active)

    def _compute(self, op: str, operands: list[str], active: Values) -> None:
        name, kind = op.split(".")[0], op.split(".")[-1]
        dtype = dtype_of(kind)
        if ".wide." in op:
            wide = _WIDER[dtype]
            a, b = (self.get(operand, dtype).astype(wide) for operand in operands[1:3])
            self.set(operands[0], a * b + (self.get(operands[3], wide) if name == "mad" else 0), active)
            return
        values = [self.get(operand, dtype) for operand in operands[1:]]
        with np.errstate(all="ignore"):
            result = OPERATIONS[name](*values)
        self.set(operands[0], np.asarray(result).astype(dtype), active)

    def _convert(self, op: str, operands: list[str], active: Values) -> None:
        _, *_middle, to, source = op.split(".")
        if source in ("f16", "bf16"):
            self.set(operands[0], from_bits(self.get(operands[1], np.uint16), source).astype(dtype_of(to)), active)
            return
        values = [self.get(operand, dtype_of(source)) for operand in operands[1:]]
        if to in ("f16x2", "bf16x2"):  # the first is the high half
            high, low = (rounded(value, to) for value in values)
            self.set(operands[0], high.astype(np.uint32) << np.uint32(16) | low, active)
        elif to in ("f16", "bf16"):
            self.set(operands[0], rounded(values[0], to + "x2"), active)
        else:
            self.set(operands[0], values[0].astype(dtype_of(to)), active)

    def _pack(self, op: str, operands: list[str], active: Values) -> None:
        """A register from two of half its size, the low one first, or the other way round."""
        whole = dtype_of(op.split(".")[-1])
        bits = 4 * np.dtype(whole).itemsize
        half = np.dtype(f"u{bits // 8}").type
        if operands[1].startswith("{"):
            low, high = (self.get(part, half).astype(whole) for part in names_of(operands[1]))
            self.set(operands[0], low | high << whole(bits), active)
        else:
            value = self.get(operands[1], whole)
            for part, content in zip(names_of(operands[0]), (value, value >> whole(bits)), strict=True):
                self.set(part, content.astype(half), active)

    def _move(self, op: str, operands: list[str], active: Values) -> None:
        kind = op.split(".")[-1]
        dtype = dtype_of(kind)
        names = names_of(operands[0] if op.startswith("ld") else operands[1])
        if op.startswith("ld.param"):
            number = int(operands[1].rstrip("]").rsplit("_", 1)[1])
            self.set(names[0], np.full(self.threads, self.values[number]).astype(dtype), active)
            return
        size = np.dtype(dtype).itemsize
        addresses = self.address(operands[1] if op.startswith("ld") else operands[0])[active]
        shared = op.split(".")[1] == "shared"
        if op.startswith("st"):
            data = np.concatenate([self.get(name, dtype)[active, None].view(np.uint8) for name in names], 1)
            if shared:
                places = addresses.astype(np.int64)[:, None] + np.arange(data.shape[1])
                assert (addresses % data.shape[1] == 0).all(), "not aligned"
                self.shared[places], self.written[places] = data, True
            else:
                self.memory.store(addresses, data)
            return
        total = size * len(names)
        if shared:
            places = addresses.astype(np.int64)[:, None] + np.arange(total)
            assert (addresses % total == 0).all(), "not aligned"
            assert self.written[places].all(), "a shared word that was never written"
            data = self.shared[places]
        else:
            data = self.memory.load(addresses, total)
        for number, name in enumerate(names):
            value = np.zeros(self.threads, dtype)
            value[active] = np.ascontiguousarray(data[:, size * number : size * (number + 1)]).view(dtype)[:, 0]
            if size < 4:  # in a register that is as wide or wider
                value = value.astype(np.uint16 if name.startswith("%rs") else np.uint32)
            self.set(name, value, active)

    def _store_matrix(self, op: str, operands: list[str], active: Values) -> None:
        """Eight rows of 16 bytes a warp: lane i has the address of row i, lanes 4 i to 4 i + 3 its content."""
        assert op == "stmatrix.sync.aligned.m8n8.x1.shared.b16"
        assert active.all()
        rows = self.address(operands[0]).reshape(-1, 32)[:, :8].astype(np.int64)
        places = rows.reshape(-1, 1) + np.arange(16)
        self.shared[places] = self.get(names_of(operands[1])[0], np.uint32).view(np.uint8).reshape(-1, 16)
        self.written[places] = True

    def _load_matrix(self, op: str, operands: list[str], active: Values) -> None:
        """Four times the other way round: the rows' addresses of matrix i are in lanes 8 i to 8 i + 7."""
        assert op == "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
        assert active.all()
        rows = self.address(operands[1]).reshape(-1, 4, 8).astype(np.int64)
        for matrix, name in enumerate(names_of(operands[0])):
            places = rows[:, matrix].reshape(-1, 1) + np.arange(16)
            assert self.written[places].all(), "a shared word that was never written"
            self.set(name, self.shared[places].reshape(-1, 4).view(np.uint32)[:, 0], active)

    def _mma(self, op: str, operands: list[str], active: Values) -> None:
        """m16n8k8 and m16n8k16, row and column fragments of 16 bits, float32 sums."""
        kind = op.split(".")[-2]
        assert re.fullmatch(r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(b?f16)\.\2\.f32", op), op
        d, a, b, c = (names_of(operand) for operand in operands)
        assert whole_warps(active)
        warps = self.threads // 32
        lane = np.arange(32)
        g, t = lane // 4, lane % 4
        A, B = np.zeros((warps, 16, 8 * len(b))), np.zeros((warps, 8 * len(b), 8))
        for register, name in enumerate(a):
            low, high = halves(self.get(name, np.uint32).reshape(warps, 32), kind)
            row, column = g + register % 2 * 8, 2 * t + register // 2 * 8
            A[:, row, column], A[:, row, column + 1] = low, high
        for register, name in enumerate(b):
            low, high = halves(self.get(name, np.uint32).reshape(warps, 32), kind)
            B[:, 2 * t + register * 8, g], B[:, 2 * t + 1 + register * 8, g] = low, high
        with np.errstate(all="ignore"):
            product = A @ B
        for register, name in enumerate(d):
            part = product[:, g + register // 2 * 8, 2 * t + register % 2].reshape(-1)
            self.set(name, (self.get(c[register], np.float32) + part).astype(np.float32), active)
