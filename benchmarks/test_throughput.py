"""The measured operations as pytest-benchmark cases: `make bench`, or `pytest benchmarks --benchmark-json FILE`.

On a GPU on one shape of Bloom-7B1 for a few M, elsewhere on a trial's.  `benchmarks.run` is the instrument that records
are made with; these cases are for a developer's before and after (`--benchmark-autosave`, `--benchmark-compare`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="the rival, part of the [bench] extra")
pytest.importorskip("pytest_benchmark", reason="part of the [bench] extra")

from benchmarks.modules import MODULES
from benchmarks.operations import OPERATIONS, SHAPES, Measured
from benchmarks.products import PRODUCTS
from benchmarks.rivals import WITH_RIVALS, with_rivals

ON_GPU = torch.cuda.is_available()
SHAPE = SHAPES["bloom-7b1"][1] if ON_GPU else (64, 128)
ROWS = (1, 16, 256, 2048) if ON_GPU else (1, 16)
ON_ROWS = {**PRODUCTS, **MODULES}
CASES = [*((op, None) for op in OPERATIONS), *((op, m) for op in ON_ROWS for m in ROWS)]


@cache
def _measured(op: str, m: int | None) -> tuple[Measured, torch.Tensor]:
    weight = 0.02 * torch.randn(SHAPE, device="cuda" if ON_GPU else "cpu", dtype=torch.float16)
    measured = OPERATIONS[op](weight) if m is None else ON_ROWS[op](weight, m)
    return with_rivals(op, measured, weight) if op in WITH_RIVALS else measured, weight


def _cases() -> Iterator[object]:
    for op, m in CASES:
        measured, _ = _measured(op, m)
        for provider in (*measured.providers, *measured.missing):
            yield pytest.param(op, m, provider, id=f"{op}-{m}-{provider}" if m else f"{op}-{provider}")


@pytest.mark.parametrize(("op", "m", "provider"), list(_cases()))
def test_throughput(op, m, provider, benchmark):
    measured, weight = _measured(op, m)
    if (reason := measured.missing.get(provider)) is not None:
        pytest.skip(reason)
    benchmark.group = f"{op} {SHAPE[0]}x{SHAPE[1]}" + (f" M={m}" if m else "")
    benchmark.extra_info.update(bytes=measured.bytes, flops=measured.flops)
    call = measured.providers[provider](weight)

    def wait_for_it() -> None:
        call()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark(wait_for_it)
