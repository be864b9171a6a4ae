"""What a run shows and records while it goes: the bar with loss, tokens/s and peak memory, and `metrics.jsonl`.

Room: callbacks for transformers' Trainer; nothing here changes the training.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from .optimize.graphs import uncounted_bytes
from .units import GIB

Gradients = list[tuple[str, torch.Tensor]]


def peak_memory_gib() -> float:
    """Most memory in use so far, in GiB: torch's on the GPU, or the process's resident memory without one.

    The memory that CUDA graphs work in is counted on top, though perhaps not all was in use at the same time.
    """
    if torch.cuda.is_initialized():
        most = torch.cuda.max_memory_allocated() + uncounted_bytes()
        return min(most, torch.cuda.max_memory_reserved()) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts in KiB


class MetricsWriter(TrainerCallback):
    """Adds tokens/s and peak memory to each log entry and appends the entry to a file, one JSON object a line.

    Args:
        path: `metrics.jsonl`.  Begun anew with what the resumed checkpoint remembers, so that steps after the
            checkpoint, which are run again, do not stand there twice.
        start: entries from before the training.
    """

    def __init__(self, path: Path, start: list[dict[str, Any]]) -> None:
        self.path = path
        self.start = start
        self._tokens = 0.0
        self._seconds = 0.0
        self._step_began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.path.write_text("".join(_line(entry) for entry in self.start + state.log_history), encoding="utf-8")
        self._tokens = self._seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._step_began  # steps alone: no evaluation, no checkpoint

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if "loss" in logs:
            # TRL counts the tokens since the start of this process, padding left out.
            extra = {
                "tokens_per_s": round((logs["num_tokens"] - self._tokens) / self._seconds, 1),
                "peak_memory_gib": round(peak_memory_gib(), 3),
            }
            scaler = getattr(optimizer, "scaler", None)
            if scaler is not None:  # float16 only
                extra["loss_scale"] = scaler.get_scale()
            self._tokens, self._seconds = logs["num_tokens"], 0.0
            logs |= extra
            state.log_history[-1] |= extra
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(state.log_history[-1]))


class OverflowReport(TrainerCallback):
    """Says which step was skipped because gradients overflowed under the loss scale (float16), and in which layer.

    The gradient goes from the last layer to the first: the last one that has it in the model's order is where it began.

    Most optimizers are not called for such a step, and accelerate notices.  A fused one, the Trainer's default, is
    called and leaves the step out on the GPU; to ask there would make the host wait in every step.  So its flag is
    copied, and looked at a step later; the gradients are kept as long.
    """

    def __init__(self) -> None:
        self._trained: list[tuple[str, torch.nn.Parameter]] = []
        self._flag: _Flag | None = None
        self._pending: tuple[int, _Flag, Gradients] | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self._trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if getattr(optimizer, "scaler", None) is not None:
            optimizer.optimizer.register_step_post_hook(self._keep_flag)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._look_back()
        step = state.global_step + 1
        if getattr(optimizer, "step_was_skipped", False):
            _tell(step, self._gradients())
        elif self._flag is not None:
            self._pending = step, self._flag, self._gradients()
            self._flag = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look_back()

    def _keep_flag(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        flag = getattr(optimizer, "found_inf", None)  # how torch's GradScaler tells a fused optimizer
        self._flag = None if flag is None else _Flag(flag)

    def _gradients(self) -> Gradients:
        return [(name, parameter.grad) for name, parameter in self._trained if parameter.grad is not None]

    def _look_back(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None and pending[1].is_set():
            _tell(pending[0], pending[2])


class _Flag:
    """A flag on its way from the GPU."""

    def __init__(self, flag: torch.Tensor) -> None:
        self._copy = flag.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if flag.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def is_set(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._copy)


def _tell(step: int, gradients: Gradients) -> None:
    overflowed = [name for name, grad in gradients if not grad.isfinite().all()]
    where = f"begins in {overflowed[-1]} ({len(overflowed)} of {len(gradients)})" if overflowed else "is gone already"
    print(f"step {step} skipped, the loss scale halved: the overflow of the gradient {where}")


class ProgressBar(ProgressCallback):
    """The Trainer's bar with the figures beside it, instead of a line of them above it at each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or "loss" not in logs:
            return
        self.training_bar.set_postfix_str(
            f"loss {logs['loss']:.3f}, {logs['tokens_per_s']:.0f} tokens/s, peak {logs['peak_memory_gib']:.2f} GiB"
        )


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
