"""Compile on every core what a benchmark is about to launch, before its clock starts.

    compile_ahead(launch_everything)

Triton compiles a variant at its first launch, one after the other in one thread.  Its hook before a compilation may
refuse it: so the launches themselves say which variants they need.  Forked processes, which do not touch the GPU,
compile these into Triton's cache on disk, where the launch then finds them.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource


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
        RuntimeError: a process failed; what it said is on the standard error.
    """
    count = min(processes or len(os.sched_getaffinity(0)), len(compilations))
    # Variants of one kernel take about as long each, so dealt out in their order the shares are alike.
    ordered = sorted(compilations, key=lambda one: (one.module, one.name))
    # Forked, because a process that had to import torch first would take longer for that than for its share.
    context = multiprocessing.get_context("fork")
    running = []
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forking beside torch's threads
            for number in range(count):
                process = context.Process(target=_compile, args=(ordered[number::count],))
                process.start()
                running.append(process)
        for process in running:
            process.join()
    finally:
        for process in running:
            process.kill()
    failed = sum(process.exitcode != 0 for process in running)
    if failed:
        raise RuntimeError(f"{failed} of {count} processes that compile ahead failed; their errors are above")


def _compile(share: Iterable[Compilation]) -> None:
    for compilation in share:
        compilation.compile()


def _hashable(value: Any) -> Any:
    """Lists as the tuples that they were before JSON; Triton keeps its options hashable."""
    if isinstance(value, dict):
        return {key: _hashable(one) for key, one in value.items()}
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
