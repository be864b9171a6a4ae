"""Fine-tuning: TRL's `SFTTrainer` on a 4-bit base, and a run folder around it; `qlora train`.

Room: the order of things and the run folder; the training is TRL's; loading, data and report are their own files.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from qkernels.errors import UserError

from .arguments import (
    DEFAULT_MODEL,
    DataArguments,
    GenerationArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
    check_training,
    lora_targets,
    precision_of,
)
from .callbacks import MetricsWriter, OverflowReport, ProgressBar, peak_memory_gib
from .checkpoint import atomic_file, atomic_folder, check_writable, writing
from .config import Parser, parse, resolved
from .data import TEXT, load_texts, no_data_bars
from .generate import ADAPTER_FOLDER, continue_prompts, device_of, load_base, load_tokenizer
from .integrations.peft_init import initialize_from_float
from .loading import prepare_model_for_training
from .memory import Run, plan
from .optimize import can_optimize, optimize_model
from .report import RunResult, model_sizes, save_loss_plot, save_report
from .shapes import adapted_layers, meta_model, shapes_of
from .trainer import Trainer
from .units import GIB, MIB

# What "--lora_init qera" looks at, of the texts to train on.
TEXTS_FOR_START, START_LENGTH = 128, 512

Arguments = tuple[ModelArguments, LoraArguments, DataArguments, TrainingArguments]


def train(arguments: Arguments) -> RunResult:
    """Fine-tune and write the run folder: checkpoints, adapter, metrics, figure, configuration and report.

    Args:
        arguments: checked settings, as `parse` returns them.

    Raises:
        UserError: data, model, targets or folder are wrong, or the disk fills up.  A folder that this call made and in
            which no checkpoint is whole is removed again; a checkpoint that is not whole is always.
    """
    model_arguments, lora, data, training = arguments
    folder = Path(str(training.output_dir))
    checkpoint = _checkpoint_to_resume(folder, data.resume)
    check_writable(folder)
    policy = precision_of(training)
    print(f"precision: {policy.reason}")
    # A wrong model or wrong targets are found in a moment without the weights and the data, which take minutes.
    adapted_layers(meta_model(model_arguments.model_name_or_path, model_arguments.model_revision), lora)
    texts, held_out = load_texts(data, training.dataset_text_field)
    print(f"data: {len(texts)} texts of {data.dataset_name}" + (f", {len(held_out)} held out" if held_out else ""))
    model, tokenizer = load_base(model_arguments, policy.dtype, device_of(training.use_cpu))
    sizes = model_sizes(model)
    print(
        f"model: {model_arguments.model_name_or_path}, its linear layers {sizes['quantized_16bit'] / MIB:,.1f} MiB in "
        f"16 bits -> {sizes['quantized'] / MIB:,.1f} MiB in 4 bits; what stays float {sizes['kept'] / MIB:,.1f} MiB"
    )
    if (training.packing or training.padding_free) and not can_optimize(model):
        raise UserError(
            "--packing",
            expected="Bloom, Llama or Mistral, whose texts qlora keeps apart",
            got=type(model).__name__,
            remedy="Leave --packing and --padding_free out.",
        )
    if (training.recompute, training.kept_blocks, training.offload) != ("block", 0, False):
        optimize_model(model, recompute=training.recompute, kept_blocks=training.kept_blocks, offload=training.offload)
    prepare_model_for_training(model, gradient_checkpointing=training.gradient_checkpointing)
    settings = resolved(arguments)
    training.dataset_text_field = TEXT
    with _run_folder(folder):
        with atomic_file(folder / "config.yaml") as file:
            file.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        with no_data_bars(), _making_trainer():
            trainer = Trainer(
                model=model,
                args=training,
                train_dataset=texts,
                eval_dataset=held_out,
                processing_class=tokenizer,
                peft_config=_lora_config(lora),
            )
        tuned: Any = trainer.model
        trainable, parameters = tuned.get_nb_trainable_parameters()
        result = RunResult(
            model=str(model_arguments.model_name_or_path),
            dataset=data.dataset_name,
            device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU",
            precision=policy.reason,
            sizes=sizes,
            trainable=trainable,
            parameters=parameters,
        )
        _run(trainer, result, data, checkpoint, lambda: _start_adapter(tuned, model_arguments, lora, texts[TEXT]))
        _save(trainer, result, folder)
    return result


@contextmanager
def _making_trainer() -> Iterator[None]:
    """Turn what the Trainer refuses when it is made into one `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        raise _refused_by_trainer(error) from error


def _refused_by_trainer(error: Exception) -> UserError:
    return UserError(
        "configuration",
        expected="settings that TRL's trainer accepts",
        got=f"{type(error).__name__}: {error}",
        remedy="Change the setting, or install the package, that it names.",
    )


def _run(
    trainer: Trainer, result: RunResult, data: DataArguments, checkpoint: str | None, begin: Callable[[], None]
) -> None:
    """Measure, start the adapter, train, measure again; the figures go into `result`."""
    share = result.trainable / result.parameters
    print(f"adapter: {result.trainable:,} of {result.parameters:,} parameters to train ({share:.4%})")
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    generation = GenerationArguments(prompt=data.sample_prompts, max_new_tokens=data.sample_tokens)
    # The adapter adds nothing yet: this is the base model.
    print("measuring the base model ...")
    before_loss = _held_out_loss(trainer)
    start = [] if before_loss is None else [{"step": 0, "eval_loss": before_loss}]
    before = _samples(trainer, generation)
    if checkpoint is None:
        begin()
    trainer.add_callback(MetricsWriter(Path(str(trainer.args.output_dir)) / "metrics.jsonl", start))
    trainer.add_callback(OverflowReport())
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressBar())
    print("training ...")
    began = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except ImportError as error:  # the package of an optimizer is looked for only now
        raise _refused_by_trainer(error) from error
    except RuntimeError as error:
        if "No executable batch size found" not in str(error):
            raise
        raise UserError(
            "memory",
            expected="room for one text at a time",
            got="out of memory at batch size 1",
            remedy="Lower --max_length, or see `qlora plan` for what fits.",
        ) from error
    result.seconds = time.perf_counter() - began
    result.batch_size = trainer.state.train_batch_size or trainer.args.per_device_train_batch_size
    print("measuring the tuned model ...")
    after_loss = _held_out_loss(trainer)
    result.peak_memory_gib = peak_memory_gib()
    result.history = start + trainer.state.log_history
    if before_loss is not None and after_loss is not None:
        result.eval_loss = (before_loss, after_loss)
        print(f"loss on held-out texts: {before_loss:.3f} -> {after_loss:.3f}")
    after = _samples(trainer, generation)
    result.samples = list(zip(data.sample_prompts, before, after, strict=True)) if before else []


def _start_adapter(model: Any, base: ModelArguments, lora: LoraArguments, texts: Sequence[str]) -> None:
    """Have the adapter begin as `--lora_init` says."""
    if lora.lora_init == "zero":
        return
    tokenizer = load_tokenizer(base.model_name_or_path, base.model_revision)
    chosen = texts[:TEXTS_FOR_START] if lora.lora_init == "qera" else []
    inputs = (tokenizer(text, return_tensors="pt", truncation=True, max_length=START_LENGTH) for text in chosen)
    report = initialize_from_float(
        model, base.model_name_or_path, f"{lora.lora_init}_niter_4", inputs=inputs, revision=base.model_revision
    )
    what = "layers' outputs" if lora.lora_init == "qera" else "weights"
    print(f"quantization error of the {what}: {report.before:.2%}, with the adapter's start {report.after:.2%}")


def _held_out_loss(trainer: Trainer) -> float | None:
    if trainer.eval_dataset is None:
        return None
    loss = trainer.evaluate()["eval_loss"]
    if not math.isfinite(loss):
        print(f"warning: the loss on the held-out texts is {loss}")
    return loss


def _samples(trainer: Trainer, generation: GenerationArguments) -> list[str]:
    if not generation.max_new_tokens:
        return []
    tokenizer: Any = trainer.processing_class
    return continue_prompts(trainer.model, tokenizer, generation.prompt, generation)


def _save(trainer: Trainer, result: RunResult, folder: Path) -> None:
    model: Any = trainer.model
    tokenizer: Any = trainer.processing_class
    with atomic_folder(folder / ADAPTER_FOLDER, replace=True) as adapter:
        model.save_pretrained(adapter)
        tokenizer.save_pretrained(adapter)
        (adapter / "README.md").unlink(missing_ok=True)  # peft's template with nothing filled in
    save_loss_plot(result, folder / "loss.png")
    save_report(result, folder / "report.md")
    print(f"run folder: {folder} (adapter/, metrics.jsonl, loss.png, config.yaml, report.md)")


def _lora_config(lora: LoraArguments) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora_targets(lora),
        bias="none",
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


# The run folder.


@contextmanager
def _run_folder(folder: Path) -> Iterator[None]:
    """Make the folder; when the run fails leave whole checkpoints in it, or else nothing at all."""
    existed = folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except BaseException:
            _remove_partial_checkpoints(folder)
            if not existed and get_last_checkpoint(str(folder)) is None:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _remove_partial_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        # transformers writes this file last.
        if re.fullmatch(r"checkpoint-\d+", checkpoint.name) and not _whole(checkpoint / "trainer_state.json"):
            shutil.rmtree(checkpoint)


def _whole(file: Path) -> bool:
    try:
        return file.read_text(encoding="utf-8").rstrip().endswith("}")
    except FileNotFoundError:
        return False


def _checkpoint_to_resume(folder: Path, resume: bool) -> str | None:
    if not resume:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            what = "holds a run or something else" if folder.is_dir() else "is a file"
            raise UserError(
                "--output_dir",
                expected="a new folder",
                got=f"{str(folder)!r}, which {what}",
                remedy="Choose another --output_dir, or go on with --resume.",
            )
        return None
    if folder.is_dir():
        _remove_partial_checkpoints(folder)
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if checkpoint is None:
        raise UserError(
            "--resume",
            expected=f"a checkpoint in {str(folder)!r}",
            got="none",
            remedy="Name the run's folder by --output_dir, or start it without --resume.",
        )
    return checkpoint


# The command.


def main(argv: Sequence[str]) -> None:
    """`qlora train`.

    Raises:
        UserError: see `train`; wrong flags or YAML; several GPUs or processes; the default model on a machine without
            a GPU.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":  # before parsing: transformers' TrainingArguments would wait for the other processes
        raise UserError(
            "WORLD_SIZE",
            expected="1, since this command does not support training in several processes yet",
            got=processes,
            remedy="Use TRL's SFTTrainer with a model from qlora.load_pretrained_4bit.",
        )
    parser = Parser((ModelArguments, LoraArguments, DataArguments, TrainingArguments), prog="qlora train")
    model, lora, data, training = parse(parser, argv, check_training)
    if model.model_name_or_path == DEFAULT_MODEL and not torch.cuda.is_available():
        raise _needs_gpu(lora, training)
    count = torch.cuda.device_count()
    if count > 1 and not training.use_cpu:
        raise UserError("GPU", expected="one GPU", got=str(count), remedy="Start it with CUDA_VISIBLE_DEVICES=0.")
    train((model, lora, data, training))


def _needs_gpu(lora: LoraArguments, training: TrainingArguments) -> UserError:
    length = training.max_length or 512
    size = training.per_device_train_batch_size
    shapes = shapes_of(meta_model(DEFAULT_MODEL), lora)
    need = [plan(shapes, Run(batch_size, length, torch.float16)).total / GIB for batch_size in (1, size)]
    return UserError(
        "GPU",
        expected=f"an NVIDIA GPU with {need[0]:.1f} GiB of memory (1 text of {length} tokens at a time) to "
        f"{need[1]:.1f} GiB ({size} texts) to fine-tune {DEFAULT_MODEL}",
        got="a machine without one",
        remedy="A T4 is enough. On this machine try `qlora demo`, or a small model by --model_name_or_path.",
    )
