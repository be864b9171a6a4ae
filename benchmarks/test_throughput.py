"""The measured operations as pytest-benchmark cases: `make bench`, or `pytest benchmarks --benchmark-json FILE`.

On a GPU on one shape of Bloom-7B1 for a few M, and on a Bloom of few layers; elsewhere on a trial's.  `benchmarks.run`
is the instrument that records are made with; these cases are for a developer's before and after
(`--benchmark-autosave`, `--benchmark-compare`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="the rival, part of the [bench] extra")
pytest.importorskip("pytest_benchmark", reason="part of the [bench] extra")

from benchmarks.command import model_size
from benchmarks.gauges import empty
from benchmarks.models import LAYERS, MODEL_OPS, TRIAL, Asked, batch_of, call_of, job_of, prepare
from benchmarks.modules import MODULES
from benchmarks.operations import OPERATIONS, Measured
from benchmarks.precompile import compile_ahead
from benchmarks.products import PRODUCTS
from benchmarks.providers import DTYPES, PROVIDERS
from benchmarks.rivals import WITH_RIVALS, with_rivals
from benchmarks.run import launch_products
from benchmarks.weights import SHAPES, Size
from qlora.precision import choose_precision

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SHAPE = SHAPES["bloom-7b1"][1] if ON_GPU else (64, 128)
ROWS = (1, 16, 256, 2048) if ON_GPU else (1, 16)
ON_ROWS = {**PRODUCTS, **MODULES}
# Seconds for a kernel's case: hundreds of calls; there are more than a hundred cases.
SECONDS = 0.2
PRECISION = next(name for name, dtype in DTYPES.items() if dtype == choose_precision().dtype)
CASES = [*((op, None) for op in OPERATIONS), *((op, m) for op in ON_ROWS for m in ROWS)]


@cache
def _measured(op: str, m: int | None) -> tuple[Measured, torch.Tensor]:
    weight = 0.02 * torch.randn(SHAPE, device=DEVICE, dtype=torch.float16)
    measured = OPERATIONS[op](weight) if m is None else ON_ROWS[op](weight, m)
    return with_rivals(op, measured, weight) if op in WITH_RIVALS else measured, weight


def _cases() -> Iterator[object]:
    if ON_GPU:
        compile_ahead(lambda: launch_products([Size(SHAPE)], ["float16"], ROWS))
    for op, m in CASES:
        measured, _ = _measured(op, m)
        for provider in (*measured.providers, *measured.missing):
            yield pytest.param(op, m, provider, id=f"{op}-{m}-{provider}" if m else f"{op}-{provider}")


@pytest.mark.benchmark(max_time=SECONDS)
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

    wait_for_it()  # what torch.compile forgot while the cases were gathered, it compiles again
    benchmark(wait_for_it)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a small model's checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    prepare(folder, model_size("bloom-7b1", layers=LAYERS) if ON_GPU else TRIAL, DEVICE)
    return folder


@pytest.mark.parametrize("stack", PROVIDERS)
@pytest.mark.parametrize("op", MODEL_OPS)
def test_a_whole_model(op, stack, folder, benchmark):
    tokens, steps = (2048, 4) if ON_GPU else (16, 1)
    asked = Asked([op], {tokens: batch_of(tokens)}, steps, warmup=0, new_tokens=64 if ON_GPU else 4)
    benchmark.group = op
    if op == "train_step":
        benchmark.extra_info.update(steps=steps, tokens=tokens)
    call = call_of(op, job_of(folder, stack, f"{stack} {op}", PRECISION, DEVICE, asked))
    try:
        call()
    except NotImplementedError as error:  # TRL's bf16 adapters and the loss scale of fp16
        pytest.skip(str(error))
    benchmark.pedantic(call, rounds=3)
    empty(DEVICE)
