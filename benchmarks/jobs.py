"""What the parent asks of a worker process: one stack, one precision, the cases to time."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """Attributes:
    name: unique within a run.
    batch: sequences a step.
    length: tokens of each synthetic sequence; None: the prompts, padded to the longest of their batch.
    steps: optimizer steps in all.
    warmup_steps: the first of them, left out of step time and tokens/s (compilation, the allocator's first growth).
    """

    name: str
    batch: int
    length: int | None
    steps: int
    warmup_steps: int


@dataclass(frozen=True)
class Job:
    """Attributes:
    provider: a name in `providers.PROVIDERS`.
    precision: "bf16", "fp16" or "fp32".
    device: "cuda" or "cpu".
    checkpoint: folder with the model and its tokenizer.
    prompts: JSON file, a list of texts.
    record: JSON-lines file the worker appends to, a line when a phase begins and one when it ends.
    yardstick: safetensors file of the first stack's numbers; written if missing, else compared with.
    folder: scratch of this run.
    cases: in the order they run.
    gpu_limit_gib: what torch's allocator may take of the GPU's memory; None: all of it.
    new_tokens: to generate after the cases; 0 leaves it out.
    repeats: how often loading and generating are timed after a first time, which is left out then; 0: the first counts.
    capability: compute capability to take the GPU for, where Python chooses by it; None: its own.
    """

    provider: str
    precision: str
    device: str
    checkpoint: str
    prompts: str
    record: str
    yardstick: str
    folder: str
    cases: tuple[Case, ...]
    gpu_limit_gib: float | None = None
    new_tokens: int = 0
    repeats: int = 0
    capability: tuple[int, int] | None = None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Job:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["cases"] = tuple(Case(**case) for case in fields["cases"])
        fields["capability"] = fields["capability"] and tuple(fields["capability"])
        return cls(**fields)
