"""What is noted while a stack trains: each step's time and loss, the GPU's peaks, and the tokens of each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from qlora.optimize.graphs import uncounted_bytes

from .gauges import in_gib, now


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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = now(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_s.append(now(self.device) - self._last)
        if self.device == "cuda":
            before, self._in_graphs = self._in_graphs, uncounted_bytes()
            beside = self._in_graphs if self._in_graphs == before else 0
            self.peak_allocated = max(self.peak_allocated, torch.cuda.max_memory_allocated() + beside)
            self.peak_reserved = max(self.peak_reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        self._last = now(self.device)

    def peaks_gib(self) -> dict[str, float]:
        """The columns of a row; none without a GPU."""
        if self.device != "cuda":
            return {}
        return in_gib(self.peak_allocated, self.peak_reserved)

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
