"""What a program of the fused product knows when it is compiled, by name: the kernel's constants and what they mean.

The kernel and the reasons are in `matmul_skinny.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon

from ..tuning.skinny import CHUNK, chunks


class Form(NamedTuple):
    """The kernel's compile-time arguments, but for the codes, the bias and the memory; `SkinnyConfig` says more."""

    K: int
    NESTED: bool
    NESTED_BLOCK: int
    QUANT_BLOCK: int
    KIND: str
    COLUMNS: int
    PAIRED: bool
    TILES: int
    ROW_WARPS: int
    ONE_BRANCH: bool
    PARTS: int
    ARRANGED: bool
    PHASES: int
    TAIL: bool
    WARPS: int

    @property
    def THREADS(self) -> int:
        """Of a program."""
        return 32 * self.WARPS

    @property
    def K_WARPS(self) -> int:
        """Warps that share K."""
        return self.WARPS // self.ROW_WARPS

    @property
    def ROWS(self) -> int:
        """Rows of W a program."""
        return 16 * self.TILES * self.ROW_WARPS

    @property
    def GROUPS(self) -> int:
        """Of eight rows of x."""
        return self.COLUMNS // 8

    @property
    def BLOCK(self) -> int:
        """Weights of a chunk that share a scale."""
        return min(self.QUANT_BLOCK, 64)

    @property
    def SCALES(self) -> int:
        """Of a row and chunk."""
        return CHUNK // self.BLOCK

    @property
    def CHUNKS(self) -> int:
        """Of a row."""
        return chunks(self.K)

    @property
    def PART(self) -> int:
        """Chunks of a program."""
        return -(-self.CHUNKS // self.PARTS)


@gluon.constexpr_function
def form_of(*constants):
    """The form of a kernel, of its constants in that order."""
    return Form(*constants)
