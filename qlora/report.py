"""What a finished run leaves for a person to read: `loss.png` and `report.md`.

Room: results in, files out; it computes no loss and loads no model.
"""

from __future__ import annotations

import math
import platform
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import __version__
from .checkpoint import atomic_file
from .markdown import markdown_table
from .module4bit import Module4bit
from .units import MIB

_PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "datasets")


@dataclass
class RunResult:
    """What `qlora train` found out.

    Attributes:
        model: name of the base model.
        dataset: name of the data.
        device: name of the GPU, or "CPU".
        precision: the chosen precision and why, one sentence.
        sizes: what `model_sizes` says.
        trainable, parameters: trainable parameters and all, adapter included.
        batch_size: texts at a time, as the search for it ended.
        seconds: time of training alone.
        peak_memory_gib: as `callbacks.peak_memory_gib`.
        history: the Trainer's log, a dict an entry.
        eval_loss: loss on the held-out texts before and after, in nats a token; None if none were held out.
        samples: (prompt, continuation before, continuation after).
    """

    model: str
    dataset: str
    device: str
    precision: str
    sizes: dict[str, float]
    trainable: int
    parameters: int
    batch_size: int = 0
    seconds: float = 0.0
    peak_memory_gib: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    eval_loss: tuple[float, float] | None = None
    samples: list[tuple[str, str, str]] = field(default_factory=list)

    def train_losses(self) -> tuple[list[int], list[float]]:
        """Steps and the training loss logged at each."""
        entries = [entry for entry in self.history if "loss" in entry]
        return [entry["step"] for entry in entries], [entry["loss"] for entry in entries]

    def eval_losses(self) -> tuple[list[int], list[float]]:
        """Steps and the held-out loss logged at each; the one before training is at step 0."""
        entries = [entry for entry in self.history if "eval_loss" in entry]
        return [entry["step"] for entry in entries], [entry["eval_loss"] for entry in entries]


def model_sizes(model: torch.nn.Module) -> dict[str, float]:
    """Bytes of the base weights: `quantized` as packed, `quantized_16bit` the same in 16 bits, `kept` the others."""
    sizes = {"quantized": 0.0, "quantized_16bit": 0.0, "kept": 0.0}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Module4bit) and id(module.weight) not in seen:
            state: Any = module.quant_state
            tensors = [module.weight.data, state.absmax]
            if state.state2 is not None:
                tensors.append(state.state2.absmax)
            sizes["quantized"] += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
            sizes["quantized_16bit"] += math.prod(module.weight_shape) * 2
            seen.add(id(module.weight))
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen and "lora_" not in name:
                seen.add(id(parameter))
                sizes["kept"] += parameter.numel() * parameter.itemsize
    return sizes


def save_loss_plot(result: RunResult, path: Path) -> None:
    """Draw the losses over the steps.

    Raises:
        UserError: the disk cannot be written.
    """
    # Without pyplot: it would choose a backend for the whole process.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*result.train_losses(), color="#1f77b4", linewidth=1.2, label="training, each step's batch")
    steps, losses = result.eval_losses()
    if steps:
        axes.plot(steps, losses, "o-", color="#d62728", label="held-out texts")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(f"{Path(result.model).name}, LoRA on {result.dataset}")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120)


def save_report(result: RunResult, path: Path) -> None:
    """Write the report.

    Raises:
        UserError: the disk cannot be written.
    """
    with atomic_file(path) as partial:
        partial.write_text(report_text(result), encoding="utf-8")


def report_text(result: RunResult) -> str:
    """The report as Markdown."""
    steps, losses = result.train_losses()
    tokens = next((entry["num_tokens"] for entry in reversed(result.history) if "num_tokens" in entry), 0)
    parts = [
        f"# Fine-tuning {Path(result.model).name}",
        f"Base model: {result.model}. Data: {result.dataset}. Computed on {result.device} in {result.precision}.",
        "## Loss",
        markdown_table(("", "before", "after"), _loss_rows(result, losses)),
        "![loss over the steps](loss.png)",
        "## Memory and parameters",
        markdown_table(("", ""), _memory_rows(result)),
        "## Run",
        markdown_table(
            ("", ""),
            [
                ("steps", str(steps[-1] if steps else 0)),
                ("texts a batch", str(result.batch_size)),
                ("time of training", f"{result.seconds:.0f} s"),
                ("tokens a second", f"{tokens / result.seconds:.0f}" if result.seconds else "-"),
            ],
        ),
    ]
    if result.samples:
        parts.append("## The same prompts before and after")
    for prompt, before, after in result.samples:
        parts += [f"### {prompt}", f"Before:\n\n{_quoted(before)}", f"After:\n\n{_quoted(after)}"]
    parts += ["## Versions", markdown_table(("", ""), list(versions().items()))]
    return "\n\n".join(parts) + "\n"


def versions() -> dict[str, str]:
    """Versions of what computed the run, and the commit if this is a git checkout."""
    found = {"qlora": f"{__version__}{_commit()}", "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return ""
    return f", commit {done.stdout.strip()}" if done.returncode == 0 else ""


def _loss_rows(result: RunResult, losses: list[float]) -> list[tuple[str, str, str]]:
    rows = []
    if result.eval_loss is not None:
        rows.append(("held-out texts", f"{result.eval_loss[0]:.3f}", f"{result.eval_loss[1]:.3f}"))
    if losses:
        few = max(1, len(losses) // 10)
        first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
        rows.append((f"training, mean of {few} log entries at the start and the end", f"{first:.3f}", f"{last:.3f}"))
    return rows


def _memory_rows(result: RunResult) -> list[tuple[str, str]]:
    sizes = result.sizes
    return [
        ("linear layers in 16 bits", f"{sizes['quantized_16bit'] / MIB:,.1f} MiB"),
        ("the same in 4 bits, with scales", f"{sizes['quantized'] / MIB:,.1f} MiB"),
        ("what stays float", f"{sizes['kept'] / MIB:,.1f} MiB"),
        ("peak of the run", f"{result.peak_memory_gib:.2f} GiB ({'GPU' if result.device != 'CPU' else 'process'})"),
        ("trainable parameters", f"{result.trainable:,} of {result.parameters:,} ({_share(result):.4%})"),
    ]


def _share(result: RunResult) -> float:
    return result.trainable / result.parameters


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines()) or "> (nothing)"
