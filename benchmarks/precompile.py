"""Compile on every core what a benchmark is about to launch, before its clock starts.

    compile_ahead(launch_everything)

Triton compiles a variant at its first launch, one after the other in one thread.  Its hook before a compilation may
refuse it: so the launches themselves say which variants they need.  Processes without a GPU compile these into Triton's
cache on disk, where the launch then finds them.

    python -m benchmarks.precompile SHARE.pickle     # such a process
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from .environment import ROOT


@dataclass(frozen=True)
class Compilation:
    """What Triton's compiler is called with.

    Attributes:
        module, name: of the kernel.
        signature, constants, attributes, options: as Triton derives them from a launch.
        target: the GPU.
    """

    module: str
    name: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: GPUTarget

    def compile(self) -> None:
        """Into the cache on disk; nothing where it is there already."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        source_of = GluonASTSource if kernel.is_gluon() else ASTSource
        source = source_of(kernel, self.signature, self.constants, self.attributes)
        triton.compile(source, target=self.target, options=self.options)


@contextmanager
def learned() -> Iterator[list[Compilation]]:
    """Gather what the launches inside would compile; none of those is launched, and results are left as allocated."""
    found: dict[str, Compilation] = {}
    target = triton.runtime.driver.active.get_current_target()

    def refuse(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        options = _hashable(json.loads(compile["specialization_data"])["options"])
        arguments = compile["signature"], compile["constants"], compile["configs"][0]
        found[f"{fn.module}.{fn.name} {key}"] = Compilation(fn.module, fn.name, *arguments, options, target)
        return True

    compilations: list[Compilation] = []
    triton.knobs.runtime.jit_cache_hook = refuse
    try:
        yield compilations
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    compilations += found.values()


def compile_ahead(launch: Callable[[], None]) -> None:
    """Compile on all cores what `launch` would launch one after the other; it launches and computes nothing here."""
    with learned() as compilations:
        launch()
    begin = time.perf_counter()
    compile_all(compilations)
    print(f"{len(compilations)} variants of kernels compiled ahead in {time.perf_counter() - begin:.1f} s", flush=True)


def compile_all(compilations: Sequence[Compilation], processes: int | None = None) -> None:
    """Compile in as many processes as there are cores.

    Raises:
        RuntimeError: a process failed; what it said is in the message.
    """
    count = min(processes or len(os.sched_getaffinity(0)), len(compilations))
    # Variants of one kernel take about as long each, so dealt out in their order the shares are alike.
    ordered = sorted(compilations, key=lambda one: (one.module, one.name))
    with tempfile.TemporaryDirectory() as folder:
        running = []
        try:
            for number in range(count):
                share = Path(folder) / f"{number}.pickle"
                share.write_bytes(pickle.dumps(ordered[number::count]))
                command = [sys.executable, "-m", "benchmarks.precompile", str(share)]
                running.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
            for process in running:
                _, said = process.communicate()
                if process.returncode:
                    raise RuntimeError(f"compiling ahead failed: {said}")
        finally:
            for process in running:
                process.kill()
                process.wait()


def _hashable(value: Any) -> Any:
    """Lists as the tuples that they were before JSON; Triton keeps its options hashable."""
    if isinstance(value, dict):
        return {key: _hashable(one) for key, one in value.items()}
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def main(arguments: Sequence[str]) -> int:
    """Compile a share."""
    for compilation in pickle.loads(Path(arguments[0]).read_bytes()):
        compilation.compile()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
