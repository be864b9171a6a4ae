"""The measured operations on a whole model: loading it in 4 bits, a training step, generating.

Each stack of `providers.py` does them in a process of its own, by the code of `benchmarks.bloom7b1` and behind its
gates; here on a model of few layers, which one run of `benchmarks.run` has time for.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from qlora.arguments import LoraArguments
from qlora.data import bundled_prompts
from qlora.shapes import Shapes, meta_model, shapes_of

from . import data, worker
from .checkpoint import ModelSize, build_checkpoint
from .command import model_size
from .compare import AGAIN, OURS
from .jobs import Case, Job
from .processes import Outcome, Workers
from .providers import DTYPES, MAX_LENGTH, PROVIDERS, lora_targets
from .report import UNMEASURED, Row
from .timing import Call, percentiles
from .weights import stored_bytes

MODEL_OPS = ("load", "train_step", "generate")
LAYERS = 4
TOKENS = (128, 2048)  # of a step: one short text, and four long ones
LIMIT_S = 140.0  # for a stack
TRIAL = ModelSize(layers=2, hidden=64, heads=4, vocab=512)


class Work(NamedTuple):
    """What an operation must move at least, and what it computes."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Asked:
    """Attributes:
    ops: of `MODEL_OPS`.
    batches: tokens of a step -> sequences and tokens of each.
    steps, warmup, repeats, new_tokens: as in `Case` and `Job`.
    """

    ops: Sequence[str]
    batches: dict[int, tuple[int, int]]
    steps: int = 8
    warmup: int = 3
    repeats: int = 2
    new_tokens: int = 64

    @property
    def measured(self) -> list[tuple[str, int | None]]:
        """Each operation, and its rows of activations."""
        rows: dict[str, Sequence[int | None]] = {"load": (None,), "train_step": [*self.batches], "generate": (1,)}
        return [(op, m) for op in MODEL_OPS if op in self.ops for m in rows[op]]

    def cases(self) -> tuple[Case, ...]:
        return tuple(
            Case(str(m), *batch, self.steps + self.warmup, self.warmup)
            for m, batch in (self.batches if "train_step" in self.ops else {}).items()
        )


def batch_of(tokens: int) -> tuple[int, int]:
    """Sequences and the length of each: one sequence up to 512 tokens, more of 512 above.

    Raises:
        argparse.ArgumentTypeError: there is no such batch.
    """
    length = min(tokens, MAX_LENGTH)
    if tokens < 2 or tokens % length:
        raise argparse.ArgumentTypeError(
            f"a training step takes 2 to {MAX_LENGTH} tokens or a multiple of {MAX_LENGTH}, got --m {tokens}"
        )
    return tokens // length, length


def asked_of(options: argparse.Namespace) -> Asked:
    """What the flags of `benchmarks.run` say."""
    tokens = options.m or ((16,) if options.smoke else TOKENS)
    batches = {m: batch_of(m) for m in tokens} if "train_step" in options.op else {}
    small = {"steps": 2, "warmup": 1, "repeats": 1, "new_tokens": 4} if options.smoke else {}
    return Asked(options.op, batches, **small)


def prepare(folder: Path, size: ModelSize, device: str) -> int:
    """Write what the jobs of `job_of` read: checkpoint, tokenizer, prompts; returns the checkpoint's bytes."""
    texts = data.read_prompts(bundled_prompts())
    checkpoint_bytes = build_checkpoint(folder / "checkpoint", size, device=device)
    data.train_tokenizer(texts, size.vocab).save_pretrained(folder / "checkpoint")
    (folder / "prompts.json").write_text(json.dumps(texts), encoding="utf-8")
    return checkpoint_bytes


def job_of(folder: Path, stack: str, provider: str, precision: str, device: str, asked: Asked) -> Job:
    """The job of a stack, whose rows will be a provider's."""
    return Job(
        provider=stack,
        precision=precision,
        device=device,
        checkpoint=str(folder / "checkpoint"),
        prompts=str(folder / "prompts.json"),
        record=str(folder / precision / provider / "record.jsonl"),
        yardstick=str(folder / f"yardstick-{precision}.safetensors"),
        folder=str(folder / precision / provider),
        cases=asked.cases(),
        new_tokens=asked.new_tokens if "generate" in asked.ops else 0,
        repeats=asked.repeats,
    )


def model_rows(options: argparse.Namespace, device: str) -> Iterator[Row]:
    """A row for each operation, dtype and stack, ours once more at the end for the noise; without the shares."""
    asked = asked_of(options)
    size = TRIAL if options.smoke else model_size(options.model, layers=options.layers)
    names = [name for name, dtype in DTYPES.items() if _name(dtype) in options.dtype] if device == "cuda" else ["fp32"]
    stacks = [(stack, stack, name) for name in names for stack in options.stacks]
    stacks += [(stack, stack + AGAIN, names[0]) for stack in options.stacks if stack in OURS]
    with tempfile.TemporaryDirectory(prefix="models-") as work:
        folder = Path(work)
        jobs = {
            (provider, name): job_of(folder, stack, provider, name, device, asked) for stack, provider, name in stacks
        }
        with Workers(jobs.values()) as workers:
            begin = time.monotonic()
            checkpoint_bytes = prepare(folder, size, device)
            print(f"checkpoint: {checkpoint_bytes / 1e9:.2f} GB after {time.monotonic() - begin:.0f} s", flush=True)
            lora = LoraArguments(lora_target_modules=lora_targets(size.family))
            shapes = shapes_of(meta_model(str(folder / "checkpoint")), lora)
            for (provider, name), job in jobs.items():
                dtype = DTYPES[name]
                base = {"model": size.name, "rows": None, "columns": None, "dtype": _name(dtype)}
                outcome = workers.run(job, limit_s=LIMIT_S)
                print(f"{provider} {name}: ended after {time.monotonic() - begin:.0f} s", flush=True)
                if outcome.failure is not None:
                    print(outcome.log_tail, file=sys.stderr, flush=True)
                for op, m in asked.measured:
                    least = work_of(op, m, shapes, asked, checkpoint_bytes, dtype.itemsize)
                    yield {**base, "op": op, "m": m, "provider": provider, **_row(op, m, outcome, least)}


def call_of(op: str, job: Job) -> Call:
    """An operation in this process, without its gate: for a developer's before and after.

    Args:
        job: with one case, whose steps a call of a training step all does.
    """
    if op == "load":
        return lambda: worker.load(job)
    model = PROVIDERS[job.provider].adapt(worker.load(job))
    if op == "generate":
        model.eval()
        return lambda: worker.generate(job, model, job.new_tokens)
    (case,) = job.cases
    assert case.length is not None
    dataset = data.synthetic_dataset(case.batch * case.steps, case.length, model.config.vocab_size)
    return worker.trainer_of(job, case, model, AutoTokenizer.from_pretrained(job.checkpoint), dataset).train


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row(op: str, m: int | None, outcome: Outcome, work: Work) -> Row:
    """What was measured, or why it was not."""
    phase = _phase_of(op, m, outcome.phases)
    if phase is None:
        reason = f"in {outcome.failed_in}: {outcome.failure}"
        return {"method": None, "status": "not run", "reason": reason, **UNMEASURED, **work._asdict()}
    timing = percentiles([1e6 * seconds for seconds in phase["times_s"]])
    gib = phase.get("gpu_peak_allocated_gib")
    return {
        "method": "wall",
        "status": "ok",
        "reason": None,
        **asdict(timing),
        "gbps": work.bytes / timing.median_us / 1e3,
        "tflops": work.flops / timing.median_us / 1e6,
        "peak_mib": None if gib is None else 1024 * gib,
        "sm_mhz": phase["sm_mhz"],
        "implementation": None,
        **work._asdict(),
    }


def _phase_of(op: str, m: int | None, phases: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The record of an operation; None where it was not finished, or nothing got through the gate."""
    if not any(phase["phase"] == "gate" for phase in phases):
        return None
    name = "case" if op == "train_step" else op
    found = (phase for phase in phases if phase["phase"] == name and phase.get("name", str(m)) == str(m))
    return next(found, None)


def work_of(op: str, m: int | None, shapes: Shapes, asked: Asked, checkpoint_bytes: int, itemsize: int) -> Work:
    """Of weights in 4 bits, embedding and output layer in the dtype; activations but for the cache's are left out.

    Args:
        itemsize: bytes of the dtype.
    """
    stored = int(stored_bytes(shapes.quantized))
    head = shapes.vocabulary * shapes.hidden
    if op == "load":
        rest = itemsize * (shapes.parameters - shapes.quantized)
        return Work(checkpoint_bytes + stored + rest, 0)
    if op == "train_step":
        assert m is not None
        _, length = asked.batches[m]
        attention = 3 * 2 * m * length * shapes.hidden * shapes.layers  # causal; its gradient is twice as much
        flops = m * (4 * shapes.quantized + 6 * shapes.trainable + 4 * head) + attention
        # Weights forward and backward; adapters, their gradients and AdamW's two moments, each read and written.
        return Work(2 * (stored + itemsize * head) + 2 * 4 * 4 * shapes.trainable, flops)
    new = asked.new_tokens
    prompt = worker.PROMPT_TOKENS
    tokens = prompt + new - 1
    seen = tokens * (tokens + 1) // 2  # by the queries of a layer, together
    cached = seen - prompt * (prompt + 1) // 2  # read after the prompt's pass, token by token
    width = shapes.hidden * shapes.layers
    flops = 2 * tokens * (shapes.quantized + shapes.trainable) + 2 * new * head + 4 * seen * width
    return Work(new * (stored + itemsize * head) + 2 * itemsize * cached * width, flops)
