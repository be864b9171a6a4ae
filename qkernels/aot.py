"""Compile every kernel for a GPU that is not present, and report what came out.

    python -m qkernels.aot --arch sm_75

One row a kernel variant: registers a thread, spilled bytes, shared memory, tensor-core instructions, bf16 arithmetic.
The exit code is 1 when a variant spills, takes more shared memory than a program can have there (64 KiB on a T4),
computes in bf16 (a T4 has no such arithmetic), or has a `tl.dot` without tensor-core instructions (Triton compiles it
to FMA for sm_75).

Room: a tool over `kernels/` and `tuning/`; it needs Triton, whose package carries `ptxas`, and no GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from .tuning.skinny import SHARED_LIMIT_BYTES
from .variants import Variant, variants

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")


@dataclass(frozen=True)
class Resources:
    """What ptxas and the PTX say of a compiled variant; sizes in bytes, the others are counts."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core: int
    bf16_arithmetic: int
    has_dot: bool
    serialized: bool
    shared_limit_bytes: int

    def faults(self) -> list[str]:
        """Why the GPU should not run it; empty when it may."""
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > self.shared_limit_bytes:
            found.append(f"takes {self.shared_bytes} bytes of shared memory")
        if self.serialized:
            found.append("wgmma instructions are serialized")
        if self.bf16_arithmetic:
            found.append(f"{self.bf16_arithmetic} bf16 arithmetic instructions")
        if self.has_dot and not self.tensor_core:
            found.append("tl.dot became FMA")
        return found


def compile_variant(variant: Variant, arch: str) -> Any:
    """Compile without a GPU.

    Args:
        arch: "sm_75", "sm_80", ...

    Returns:
        Triton's compiled kernel; `.asm["ptx"]` is its PTX, `.metadata.shared` its shared memory in bytes.
    """
    names = variant.kernel.arg_names
    types = {name: variant.signature.get(name, "constexpr").split(":")[0] for name in names}
    # Allocations are aligned to 16 bytes at least, and Triton specializes on that and on divisible sizes at a launch.
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in variant.signature.items()
        if kind.startswith("*") or kind.endswith(":16")
    }
    source_of = GluonASTSource if variant.kernel.is_gluon() else ASTSource
    source = source_of(
        fn=variant.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs=aligned,
    )
    config = variant.config
    options = {"num_warps": config.num_warps, "maxnreg": config.max_registers, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=options)


def inspect(variant: Variant, arch: str) -> Resources:
    """Compile and count."""
    compiled = compile_variant(variant, arch)
    ptx = compiled.asm["ptx"]
    usage = _ptxas(ptx, arch)
    return Resources(
        registers=int(_first(r"Used (\d+) registers", usage)),
        spilled_bytes=int(_first(r"(\d+) bytes spill stores", usage)) + int(_first(r"(\d+) bytes spill loads", usage)),
        # Triton counts what it allocates, ptxas what assembly declares.
        shared_bytes=compiled.metadata.shared + sum(map(int, re.findall(r"(\d+) bytes smem", usage))),
        tensor_core=len(re.findall(r"\b(?:mma|wgmma)\.", ptx)),
        bf16_arithmetic=len(re.findall(r"\b(?:add|sub|mul|fma|min|max|neg|abs)\.[a-z.]*bf16", ptx)),
        # Gluon has no such stage: its kernels name their instructions.
        has_dot="tt.dot" in compiled.asm.get("ttir", ""),
        serialized="wgmma.mma_async instructions are serialized" in usage,
        shared_limit_bytes=SHARED_LIMIT_BYTES[int(arch.removeprefix("sm_"))],
    )


def _ptxas(ptx: str, arch: str) -> str:
    ptxas = get_ptxas(int(arch.removeprefix("sm_"))).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        # Hopper's PTX names the accelerated target, sm_90a, which must be compiled as such.
        target = _first(r"\.target (\w+)", ptx)
        command = [ptxas, "-v", f"--gpu-name={target}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern!r} not in {text!r}"
    return found.group(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 0 when no variant has a fault, else 1."""
    parser = argparse.ArgumentParser(prog="python -m qkernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm_75")
    parser.add_argument("--kernel", default="", help="only variants whose name contains this")
    options = parser.parse_args(arguments)
    chosen = [variant for variant in variants(options.arch) if options.kernel in variant.name]
    if not chosen:
        parser.error(f"no variant's name contains {options.kernel!r}")
    width = max(len(variant.name) for variant in chosen)
    print(f"{'variant':{width}}  registers  spilled  shared  tensor  bf16")
    faulty = 0
    with ThreadPoolExecutor(max_workers=2) as pool:
        for variant, result in zip(chosen, pool.map(lambda v: inspect(v, options.arch), chosen), strict=True):
            faults = result.faults()
            faulty += bool(faults)
            print(
                f"{variant.name:{width}}  {result.registers:9}  {result.spilled_bytes:7}  {result.shared_bytes:6}  "
                f"{result.tensor_core:6}  {result.bf16_arithmetic:4}  {'; '.join(faults)}".rstrip()
            )
    print(f"{len(chosen)} variants for {options.arch}, Triton {triton.__version__}: {faulty} with a fault")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
