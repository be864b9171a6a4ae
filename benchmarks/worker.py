"""One stack in a process of its own: load, gate, then each case; a line of record at the end of every phase.

A process of its own keeps the peaks honest (no other stack's allocator, caches, imports or patches) and lets the parent
end it at its time limit.  Errors are not caught: the parent reads the traceback's last line as the reason.

    python -m benchmarks.worker JOB.json
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback

from qlora.optimize.graphs import uncounted_bytes

from . import data, gate
from .jobs import Case, Job
from .providers import DTYPES, PROVIDERS, training_arguments

GATE_TEXTS = 4
PROMPT_TOKENS, WARMUP_TOKENS = 32, 8


class StepClock(TrainerCallback):
    """Wall time of each step, the device's work included, from the end of one to the end of the next; and its loss.

    And the GPU's peaks over the steps, in bytes: what is allocated, and beside it the memory that CUDA graphs work in,
    which torch counts as reserved only.  In the step that captures a graph its memory still counts as allocated.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.peak_allocated = self.peak_reserved = 0
        self._in_graphs = 0
        self.step_s: list[float] = []
        self.losses: list[float] = []
        self._last = 0.0

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_s.append(self._now() - self._last)
        if self.device == "cuda":
            before, self._in_graphs = self._in_graphs, uncounted_bytes()
            beside = self._in_graphs if self._in_graphs == before else 0
            self.peak_allocated = max(self.peak_allocated, torch.cuda.max_memory_allocated() + beside)
            self.peak_reserved = max(self.peak_reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        self._last = self._now()

    def peaks_gib(self) -> dict[str, float]:
        """The columns of a row; none without a GPU."""
        if self.device != "cuda":
            return {}
        peaks = {"allocated": self.peak_allocated, "reserved": self.peak_reserved}
        return {f"gpu_peak_{kind}_gib": peak / 2**30 for kind, peak in peaks.items()}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses.append(float(kwargs["logs"]["loss"]))


class CountingCollator:
    """The stack's own collator, with each batch's tokens counted: real ones, and those with the padding."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, torch.Tensor]]) -> None:
        self.collator = collator
        self.tokens: list[int] = []
        self.padded: list[int] = []

    def __call__(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        batch = self.collator(examples)
        self.tokens.append(int(batch["attention_mask"].sum()))
        self.padded.append(batch["attention_mask"].numel())
        return batch


def run(job: Job) -> None:
    """Do the job; see the module."""
    _constrain(job)
    provider = PROVIDERS[job.provider]
    dtype = DTYPES[job.precision]
    with _phase(job, "load") as record:
        base = provider.load(job.checkpoint, dtype, "cuda:0" if job.device == "cuda" else job.device)
        record["gpu_model_gib"] = torch.cuda.memory_allocated() / 2**30 if job.device == "cuda" else None

    tokenizer = AutoTokenizer.from_pretrained(job.checkpoint)
    prompts = data.prompt_dataset(tokenizer, json.loads(Path(job.prompts).read_text(encoding="utf-8")))
    with _phase(job, "gate") as record:
        packed, scales = gate.sample_weights(base) if provider.is_quantized else ({}, {})
        model = provider.adapt(base)
        model.train()
        first = tokenizer.pad(prompts[:GATE_TEXTS], return_tensors="pt").to(job.device)
        losses = gate.token_losses(model, dict(first), None if dtype == torch.float32 else dtype)
        record["first_batch_loss"] = losses.mean().item()
        record |= _held_against_yardstick(gate.Sample(packed, scales, losses), job)
        trainable, total = model.get_nb_trainable_parameters()
        record |= {"trainable_parameters": trainable, "parameters": total}

    for case in job.cases:
        dataset = prompts
        if case.length is not None:
            dataset = data.synthetic_dataset(case.batch * case.steps, case.length, model.config.vocab_size)
        with _phase(job, "case") as record:
            record |= asdict(case)
            record |= _train(job, case, model, tokenizer, dataset)
    if job.new_tokens:
        with _phase(job, "generate") as record:
            record |= _generate(job, model)


def _constrain(job: Job) -> None:
    """Be a smaller or older GPU, as far as a process can: an allocator that ends earlier, and another capability."""
    if job.gpu_limit_gib is not None and job.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(job.gpu_limit_gib * 2**30 / total)
    if job.capability is not None:
        if job.device == "cuda":
            # Triton keeps this function when it meets the GPU first: it must go on compiling for the one that is there.
            triton.runtime.driver.active.get_current_target()
        capability = job.capability
        torch.cuda.get_device_capability = lambda device=None: capability


@contextmanager
def _phase(job: Job, name: str) -> Iterator[dict[str, Any]]:
    """Yields the phase's record, to be filled; it is written with the phase's begin, end and peak GPU memory.

    Times are CLOCK_MONOTONIC, which the parent shares: it samples this process's host memory.
    """
    gc.collect()
    if job.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    _append(job.record, {"begin": name})
    record: dict[str, Any] = {"phase": name, "begin_s": time.monotonic()}
    yield record
    if job.device == "cuda":
        torch.cuda.synchronize()
        record.setdefault("gpu_peak_allocated_gib", torch.cuda.max_memory_allocated() / 2**30)
        record.setdefault("gpu_peak_reserved_gib", torch.cuda.max_memory_reserved() / 2**30)
    record["end_s"] = time.monotonic()
    _append(job.record, record)


def _append(path: str, line: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _held_against_yardstick(sample: gate.Sample, job: Job) -> dict[str, Any]:
    """Only bitsandbytes makes a yardstick, so nothing is ever its own judge but the first such stack."""
    if not PROVIDERS[job.provider].is_quantized:
        return {"gate": "not quantized"}
    path = Path(job.yardstick)
    if path.exists():
        return {"gate": "passed", **gate.compare(sample, gate.Sample.load(path), job.precision)}
    if PROVIDERS[job.provider].is_yardstick:
        sample.save(path)
        return {"gate": "is the yardstick"}
    return {"gate": "not checked: no bitsandbytes stack ran before this one"}


def _train(
    job: Job, case: Case, model: PeftModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset
) -> dict[str, Any]:
    arguments = training_arguments(job.precision, job.device) | {
        "output_dir": str(Path(job.folder) / "trainer"),
        "per_device_train_batch_size": case.batch,
        "max_steps": case.steps,
    }
    trainer = PROVIDERS[job.provider].trainer(model, tokenizer, dataset, arguments)
    clock, collator = StepClock(job.device), CountingCollator(trainer.data_collator)
    trainer.add_callback(clock)
    trainer.data_collator = collator
    trainer.train()
    measured = slice(case.warmup_steps, case.steps)
    seconds = sum(clock.step_s[measured])
    return {
        **clock.peaks_gib(),
        "train_s": sum(clock.step_s),
        "step_ms": 1e3 * statistics.median(clock.step_s[measured]),
        "tokens_per_s": sum(collator.tokens[measured]) / seconds,
        "padded_tokens_per_s": sum(collator.padded[measured]) / seconds,
        "tokens": sum(collator.tokens[: case.steps]),
        "padded_tokens": sum(collator.padded[: case.steps]),
        "first_loss": clock.losses[0],
        "final_loss": clock.losses[-1],
        "mean_loss": statistics.fmean(clock.losses),
        "losses": clock.losses,
    }


@torch.no_grad()
def _generate(job: Job, model: PeftModel) -> dict[str, Any]:
    """Greedy decoding after one prompt: new tokens over wall time with prefill, after a short call for warming up."""
    settings = PROVIDERS[job.provider].generation
    ids = torch.randint(4, model.config.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    ids = ids.to(job.device)
    model.eval()
    seconds = 0.0
    for count in (min(WARMUP_TOKENS, job.new_tokens), job.new_tokens):
        begin = time.perf_counter()
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=3,
            **settings,
        )
        assert len(tokens.tolist()[0]) == PROMPT_TOKENS + count  # waits for the device
        seconds = time.perf_counter() - begin
    return {
        "new_tokens": job.new_tokens,
        "generation": settings,
        "generate_s": seconds,
        "new_tokens_per_s": job.new_tokens / seconds,
    }


if __name__ == "__main__":
    run(Job.load(Path(sys.argv[1])))
