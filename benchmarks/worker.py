"""One stack in a process of its own: load, gate, then each case; a line of record at the end of every phase.

A process of its own keeps the peaks honest (no other stack's allocator, caches, imports or patches) and lets the parent
end it at its time limit.  Errors are not caught: the parent reads the traceback's last line as the reason.

    python -m benchmarks.worker JOB.json [PIPE]     # with a pipe it waits for its turn, see `processes.Workers`
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from . import data, gate
from .gauges import Clock, empty, now, peaks_gib
from .jobs import Case, Job
from .providers import DTYPES, PROVIDERS, training_arguments
from .steps import CountingCollator, StepClock

GATE_TEXTS = 4
PROMPT_TOKENS, WARMUP_TOKENS = 32, 8


def run(job: Job) -> None:
    """Do the job; see the module."""
    _constrain(job)
    with Clock() as clock:
        _run(job, clock)


def _run(job: Job, clock: Clock) -> None:
    provider = PROVIDERS[job.provider]
    dtype = DTYPES[job.precision]
    with _phase(job, "load", clock) as record:
        base, record["times_s"] = _loaded(job)
        record["seconds"] = statistics.median(record["times_s"])
        record["gpu_model_gib"] = torch.cuda.memory_allocated() / 2**30 if job.device == "cuda" else None

    tokenizer = AutoTokenizer.from_pretrained(job.checkpoint)
    prompts = data.prompt_dataset(tokenizer, json.loads(Path(job.prompts).read_text(encoding="utf-8")))
    with _phase(job, "gate", clock) as record:
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
        with _phase(job, "case", clock) as record:
            record |= asdict(case)
            record |= _train(job, case, model, tokenizer, dataset)
    if job.new_tokens:
        with _phase(job, "generate", clock) as record:
            record |= _generated(job, model)


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
def _phase(job: Job, name: str, clock: Clock) -> Iterator[dict[str, Any]]:
    """Yields the phase's record, to be filled; written with its begin and end, the GPU's clock and its peak memory.

    Times are CLOCK_MONOTONIC, which the parent shares: it samples this process's host memory.
    """
    empty(job.device)
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    _append(job.record, {"begin": name})
    record: dict[str, Any] = {"phase": name, "begin_s": time.monotonic()}
    yield record
    if job.device == "cuda":
        torch.cuda.synchronize()
    record |= peaks_gib(job.device) | record | {"sm_mhz": clock.mhz(), "end_s": time.monotonic()}
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


def trainer_of(job: Job, case: Case, model: PeftModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> Trainer:
    """The stack's trainer, ready for the steps of a case."""
    arguments = training_arguments(job.precision, job.device) | {
        "output_dir": str(Path(job.folder) / "trainer"),
        "per_device_train_batch_size": case.batch,
        "max_steps": case.steps,
    }
    return PROVIDERS[job.provider].trainer(model, tokenizer, dataset, arguments)


def _train(
    job: Job, case: Case, model: PeftModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset
) -> dict[str, Any]:
    trainer = trainer_of(job, case, model, tokenizer, dataset)
    clock, collator = StepClock(job.device), CountingCollator(trainer.data_collator)
    trainer.add_callback(clock)
    trainer.data_collator = collator
    trainer.train()
    measured = slice(case.warmup_steps, case.steps)
    seconds = sum(clock.step_s[measured])
    return {
        **clock.peaks_gib(),
        "train_s": sum(clock.step_s),
        "times_s": clock.step_s[measured],
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


def load(job: Job) -> PreTrainedModel:
    """The stack's model on the job's device."""
    device = "cuda:0" if job.device == "cuda" else job.device
    return PROVIDERS[job.provider].load(job.checkpoint, DTYPES[job.precision], device)


def _loaded(job: Job) -> tuple[PreTrainedModel, list[float]]:
    """The model, and the seconds that each load of those that count took."""
    seconds = []
    for again in range(job.repeats, -1, -1):
        begin = now(job.device)
        model = load(job)
        seconds.append(now(job.device) - begin)
        if again:
            del model
            empty(job.device)  # the next finds the GPU as the first did
    return model, seconds[1:] or seconds


@torch.no_grad()
def generate(job: Job, model: PeftModel, new_tokens: int) -> torch.Tensor:
    """int64[1, PROMPT_TOKENS + new_tokens]: decoded greedily after one prompt, as the stack's documentation has it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, model.config.vocab_size, (1, PROMPT_TOKENS), generator=generator).to(job.device)
    tokens = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=3,
        **PROVIDERS[job.provider].generation,
    )
    assert tokens.shape[1] == PROMPT_TOKENS + new_tokens
    return tokens


def _generated(job: Job, model: PeftModel) -> dict[str, Any]:
    """New tokens over wall time with the prompt's, after a short call for warming up; and the gate."""
    model.eval()
    tokens = generate(job, model, min(WARMUP_TOKENS, job.new_tokens))
    gate.must_be_greedy(model, tokens, PROMPT_TOKENS, job.precision)
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 + job.repeats):
        begin = now(job.device)
        tokens = generate(job, model, job.new_tokens)
        seconds.append(now(job.device) - begin)
    seconds = seconds[1:] or seconds
    median_s = statistics.median(seconds)
    return {
        "new_tokens": job.new_tokens,
        "generation": PROVIDERS[job.provider].generation,
        "times_s": seconds,
        "generate_s": median_s,
        "new_tokens_per_s": job.new_tokens / median_s,
        **peaks_gib(job.device),
        **_held_against_tokens(job, model, tokens),
    }


def _held_against_tokens(job: Job, model: PeftModel, tokens: torch.Tensor) -> dict[str, Any]:
    """The gate of what was generated; the first bitsandbytes stack leaves its tokens for the others."""
    fields: dict[str, Any] = {"token_regret": gate.must_be_greedy(model, tokens, PROMPT_TOKENS, job.precision)}
    path = Path(job.yardstick).with_suffix(".tokens.json")
    if PROVIDERS[job.provider].is_quantized and path.exists():
        theirs = torch.tensor(json.loads(path.read_text(encoding="utf-8")), device=job.device)
        gate.must_be_greedy(model, theirs, PROMPT_TOKENS, job.precision)
        alike = (tokens == theirs)[0, PROMPT_TOKENS:]
        fields["tokens_alike_at_first"] = int(alike.cumprod(0).sum())
    elif PROVIDERS[job.provider].is_yardstick:
        path.write_text(json.dumps(tokens.tolist()), encoding="utf-8")
    return fields


def _wait_for_its_turn(ready: int) -> None:
    """Tell the parent that everything is imported, and wait until it closes standard input."""
    os.close(ready)
    sys.stdin.read()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _wait_for_its_turn(int(sys.argv[2]))
    run(Job.load(Path(sys.argv[1])))
